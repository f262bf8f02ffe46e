// How one turn's advantage came about, with every number recomputed in place from the ones before it.
import { signed } from "./colour.js";
import { poolOf, shapedBy } from "./pool.js";

const near = (a, b) => Math.abs(a - b) <= 1e-3 * Math.max(1, Math.abs(a), Math.abs(b));
const number = (value) => (value === null || value === undefined ? "–" : (value < 0 ? "−" : "") + Math.abs(value).toFixed(4));
const total = (values) => Object.values(values).reduce((a, b) => a + (b ?? 0), 0);

function Check({ computed, shown }) {
  return near(computed, shown) ? <span class="right"> ✓</span> : <strong class="bad"> ≠ {number(computed)}</strong>;
}

// rows: the group's; own, answers: what the method's code makes of each of them with the run's settings, and with others
// ({id: answer}; null without a method, and where nothing else was asked for).
export function Ledger({ rows, row, k, own, settings, answers }) {
  const turn = row.turns[k], answer = answers?.[row.id];
  const source = (answers ?? own)?.[row.id], counted = source?.turns[k];
  const masked = turn.masked ?? 0, trained = turn.tokens - masked;
  const untrained = !answer && masked === turn.tokens;  // the record's 0 is rollout correction's, not the method's
  const rewards = answer ? counted?.rewards : turn.rewards ?? counted?.rewards;
  const of = (name) => (answer ? counted?.[name] : turn[name] ?? counted?.[name]);
  const reward = rewards ? total(rewards) : turn.reward;
  const divisor = of("divisor") ?? null;
  const computed = of("mean") === null || of("mean") === undefined || divisor === null ? null : (of("return") - of("mean")) / divisor;
  const advantage = answer ? counted?.advantage ?? null : turn.advantage;
  const pool = poolOf(rows, answers ?? own, row, k, settings, counted?.count);
  const few = counted?.count < settings?.min_pool;
  if (answer ? answer.dropped : row.dropped) {
    return <section class="card"><h3>Ledger of turn {k}</h3><p>The trajectory was dropped ({row.finish.replaceAll("_", " ")}): no reward of it is compared with anything, and none of its tokens is trained on.</p></section>;
  }
  return (
    <section class="card ledger">
      <h3>Ledger of turn {k} <span class="faint">{answer ? "what if" : "record"}</span></h3>
      <table>
        <tbody>
          {rewards && Object.entries(rewards).map(([part, value]) => (
            <tr class={value ? "" : "faint"}><th>{part}</th><td>{value === null || value === undefined ? "unassigned" : number(value)}</td>
              <td class="how">{part === "format" && turn.broken ? turn.broken.replaceAll("_", " ") : ""}
                {part === "shaping" && value ? <Shaping {...{ rows, row, value, settings }} answers={answers ?? own} /> : ""}</td></tr>))}
          <tr class="sum"><th>reward r</th><td>{reward === null || reward === undefined ? "unassigned" : number(reward)}</td><td class="how">{rewards ? "sum of its parts" : "parts not recorded"}</td></tr>
          <tr class="sum"><th>return R</th><td>{number(of("return"))}</td>
            <td class="how">{source && <Return turns={source.turns} value={of("return")} {...{ k, settings }} />}</td></tr>
          <tr><th>pool mean</th><td>{number(of("mean"))}</td>
            <td class="how">{counted?.count ? `of ${counted.count} returns: ${poolName(settings)}${few ? ", too few" : ""}` : of("mean") === null ? "the method compares in no single pool" : ""}
              {pool && <Check computed={pool.mean} shown={of("mean")} />}
              {pool && <details><summary>the returns</summary>
                <dl class="pool">{pool.lines.map(([at, values]) => <><dt>{at}</dt><dd>{values.map(number).join("  ")}</dd></>)}</dl></details>}</td></tr>
          <tr><th>divided by</th><td>{number(divisor)}</td><td class="how">{divisor === null ? "" : divisorName(settings)}
            {pool && scaleOf(settings) === "std" && <Check computed={pool.std + 1e-6} shown={divisor} />}</td></tr>
          <tr class="sum"><th>advantage A</th><td>{advantage === null || advantage === undefined ? "unassigned" : signed(advantage, 4)}</td>
            <td class="how">{untrained ? "none of its tokens was trained on: rollout correction left them all out" : <>{computed !== null && `(${number(of("return"))} − ${number(of("mean"))}) / ${number(divisor)} = ${signed(computed, 4)}`}
              {computed !== null && advantage !== null && (near(computed, advantage) ? <span class="right"> ✓</span>
                : advantage === 0 ? <span class="faint"> · 0: the pool is flat or silenced</span> : <strong class="bad"> ≠ the record's</strong>)}</>}</td></tr>
          {!answer && turn.log_prob !== null && <tr><th>log-probability</th><td>{number(turn.log_prob)}</td><td class="how">mean of its tokens{turn.gap !== null && `; rollout and policy differ by ${turn.gap.toExponential(1)}`}</td></tr>}
          <tr><th>weight</th><td>{advantage === null || advantage === undefined ? "–" : number(Math.abs(advantage) * trained)}</td><td class="how">|A| × {trained} tokens{masked > 0 && `; ${masked} more are masked: rollout correction left them out of the update`}</td></tr>
        </tbody>
      </table>
      {!answer && !untrained && counted && <p class="note">{near(counted.advantage ?? 0, advantage ?? 0)
        ? "The method's own code, run on the record, gives the same advantage."
        : <strong class="bad">The method's own code gives {signed(counted.advantage, 4)} from the record with this run's settings.</strong>}</p>}
    </section>
  );
}

function Shaping({ rows, answers, row, value, settings }) {
  const found = shapedBy(rows, answers, row), alpha = settings?.["shaping.alpha"];
  if (!found || alpha === undefined) return "alpha / |P| × sum of similarities";
  const [close, solved, least] = found, outcome = row.outcome ?? 0, start = Math.min(0, outcome);
  const credit = (alpha / solved) * close.reduce((sum, one) => sum + Math.min(1, Math.max(0, one)), 0), most = alpha * (least - start);
  const how = `${alpha} / ${solved} × (${close.map((one) => one.toFixed(3)).join(" + ")})`, bound = credit > most + 1e-9;
  return <>{bound ? `${alpha} × ${start ? `(${number(least)} − (${number(start)}))` : number(least)}` : how}{outcome > 0 ? ` − ${number(outcome)}` : ""}
    <Check computed={Math.max(outcome, start + Math.min(credit, most)) - outcome} shown={value} />{bound && `: the least that a solved sibling got bounds ${how}`}</>;
}

function Return({ turns, k, value, settings }) {
  const rewards = turns.map((one) => total(one.rewards));
  if (settings && settings.estimator !== "gtpo") return `sum over the trajectory: ${rewards.map(number).join(" + ")}`;
  const gamma = settings?.gamma;
  if (gamma === undefined) return "";
  if (settings.bootstrap > 0) {
    return `with ${settings.bootstrap} of what follows a turn taken from all siblings that its tools led to the same state; this trajectory alone: ${number(discounted(rewards, k, gamma))}`;
  }
  return <>{rewards.slice(k).map((r, m) => (m === 0 ? number(r) : `${gamma}${m > 1 ? `^${m}` : ""}·${number(r)}`)).join(" + ")}
    <Check computed={discounted(rewards, k, gamma)} shown={value} /></>;
}

const discounted = (rewards, k, gamma) => rewards.slice(k).reduceRight((rest, r) => r + gamma * rest, 0);

const scaleOf = (settings) => settings?.estimator === "grpo" ? (settings.divide ? "std" : "none") : settings?.estimator === "rloo" ? "none" : settings?.scale;
const divisorName = (settings) =>
  ({ std: "the pool's standard deviation + 1e-6", batch_std: "one standard deviation for the batch + 1e-6", none: "nothing" })[scaleOf(settings)] ?? "";

function poolName(settings) {
  if (settings?.estimator !== "gtpo") return "one a trajectory of the prompt";
  const state = `turns of the prompt whose tools had said the same${settings.state_prior > 0 ? `; the state before counts as ${settings.state_prior}` : ""}`;
  const names = { group: "all turns of the prompt", turn: "this turn of the prompt", state, batch: "all turns of the step" };
  return names[settings.baseline] + (settings.leave_one_out ? ", without its own trajectory's" : "");
}
