// How one turn's advantage came about, with every number recomputed in place from the ones before it.
import { signed } from "./colour.js";

const near = (a, b) => Math.abs(a - b) <= 1e-3 * Math.max(1, Math.abs(a), Math.abs(b));
const number = (value) => (value === null || value === undefined ? "–" : (value < 0 ? "−" : "") + Math.abs(value).toFixed(4));

// recorded: the row; own: what the method's code makes of the record with the run's settings (null without a method).
export function Ledger({ row, k, own, settings, answer }) {
  const turn = row.turns[k];
  const counted = (answer ?? own)?.turns[k];
  const shown = answer ? "what if" : "record";
  const masked = turn.masked ?? 0, trained = turn.tokens - masked;
  const rewards = answer ? counted?.rewards : turn.rewards ?? counted?.rewards;
  const of = (name) => (answer ? counted?.[name] : turn[name] ?? counted?.[name]);
  const reward = rewards ? Object.values(rewards).reduce((a, b) => a + (b ?? 0), 0) : turn.reward;
  const source = answer ?? own;
  const later = source?.turns.slice(k).map((one) => Object.values(one.rewards).reduce((a, b) => a + b, 0));
  const whole = settings !== null && settings?.estimator !== "gtpo";
  const all = source?.turns.map((one) => Object.values(one.rewards).reduce((a, b) => a + b, 0));
  const gamma = settings?.gamma;
  const divisor = of("divisor") ?? null;
  const computed = of("mean") === null || of("mean") === undefined || divisor === null ? null : (of("return") - of("mean")) / divisor;
  const advantage = answer ? counted?.advantage ?? null : turn.advantage;
  if (answer ? answer.dropped : row.dropped) {
    return <section class="card"><h3>Ledger of turn {k}</h3><p>The trajectory was dropped ({row.finish.replaceAll("_", " ")}): no reward of it is compared with anything, and none of its tokens is trained on.</p></section>;
  }
  return (
    <section class="card ledger">
      <h3>Ledger of turn {k} <span class="faint">{shown}</span></h3>
      <table>
        <tbody>
          {rewards && Object.entries(rewards).map(([part, value]) => (
            <tr class={value ? "" : "faint"}><th>{part}</th><td>{value === null || value === undefined ? "unassigned" : number(value)}</td>
              <td class="how">{part === "format" && turn.broken ? turn.broken.replaceAll("_", " ") : ""}
                {part === "shaping" && value ? "alpha / |P| × sum of similarities" : ""}</td></tr>))}
          <tr class="sum"><th>reward r</th><td>{reward === null || reward === undefined ? "unassigned" : number(reward)}</td><td class="how">{rewards ? "sum of its parts" : "parts not recorded"}</td></tr>
          <tr class="sum"><th>return R</th><td>{number(of("return"))}</td>
            <td class="how">{whole && all ? `sum over the trajectory: ${all.map(number).join(" + ")}`
              : later && gamma !== undefined ? later.map((r, m) => (m === 0 ? number(r) : `${gamma}${m > 1 ? `^${m}` : ""}·${number(r)}`)).join(" + ") : ""}</td></tr>
          <tr><th>pool mean</th><td>{number(of("mean"))}</td>
            <td class="how">{counted?.count ? `of ${counted.count} returns: ${poolName(settings)}${counted.count < settings?.min_pool ? ", too few" : ""}` : of("mean") === null ? "the method compares in no single pool" : ""}</td></tr>
          <tr><th>divided by</th><td>{number(divisor)}</td><td class="how">{divisor === null ? "" : divisorName(settings)}</td></tr>
          <tr class="sum"><th>advantage A</th><td>{advantage === null || advantage === undefined ? "unassigned" : signed(advantage, 4)}</td>
            <td class="how">{computed !== null && `(${number(of("return"))} − ${number(of("mean"))}) / ${number(divisor)} = ${signed(computed, 4)}`}
              {computed !== null && advantage !== null && (near(computed, advantage) ? <span class="right"> ✓</span>
                : advantage === 0 ? <span class="faint"> · 0: the pool is flat or silenced</span> : <strong class="bad"> ≠ the record's</strong>)}</td></tr>
          {!answer && turn.log_prob !== null && <tr><th>log-probability</th><td>{number(turn.log_prob)}</td><td class="how">mean of its tokens{turn.gap !== null && `; rollout and policy differ by ${turn.gap.toExponential(1)}`}</td></tr>}
          <tr><th>weight</th><td>{advantage === null || advantage === undefined ? "–" : number(Math.abs(advantage) * trained)}</td><td class="how">|A| × {trained} tokens{masked > 0 && `; ${masked} more are masked: rollout correction left them out of the update`}</td></tr>
        </tbody>
      </table>
      {!answer && own && <p class="note">{near(own.turns[k]?.advantage ?? 0, advantage ?? 0)
        ? "The method's own code, run on the record, gives the same advantage."
        : <strong class="bad">The method's own code gives {signed(own.turns[k]?.advantage, 4)} from the record with this run's settings.</strong>}</p>}
    </section>
  );
}

const divisorName = (settings) => {
  const scale = settings?.estimator === "grpo" ? (settings.divide ? "std" : "none") : settings?.estimator === "rloo" ? "none" : settings?.scale;
  return { std: "the pool's standard deviation + 1e-6", batch_std: "one standard deviation for the batch + 1e-6", none: "nothing" }[scale] ?? "";
};

const poolName = (settings) => settings?.estimator !== "gtpo" ? "one a trajectory of the prompt"
  : { group: "all turns of the prompt", turn: "this turn of the prompt", batch: "all turns of the step" }[settings?.baseline] +
    (settings?.leave_one_out ? ", without its own trajectory's" : "");
