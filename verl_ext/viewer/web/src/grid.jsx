// The group grid: siblings as rows, turns as columns, one cell a turn.
import { colour, signed } from "./colour.js";

const TOOLS = { ok: "✓", malformed: "⚠", over_limit: "⊘", timeout: "◷", infra: "⚡" };
const WORDS = { ok: "the tool ran", malformed: "malformed call", over_limit: "call over the limit", timeout: "time limit", infra: "the tool server failed" };

// [sign, words] of a turn: what its tool calls came to, or what it answered.
export function sign(row, k) {
  const turn = row.turns[k], last = k === row.turns.length - 1;
  if (turn.tools.length) {
    const worst = turn.tools.find((one) => one !== "ok") ?? "ok";
    return [TOOLS[worst] ?? "✗", WORDS[worst] ?? worst.replaceAll("_", " ")];
  }
  if (last && (row.finish === "turn_limit" || row.finish === "length")) return ["…", "cut by a limit"];
  if (last && row.finish !== "answer") return ["⚡", row.finish];
  if (last && turn.broken !== "no_answer") return row.acc === 1 ? ["●", "right answer"] : row.acc === null ? ["·", "no outcome"] : ["○", "wrong answer"];
  return ["·", turn.broken ? turn.broken.replaceAll("_", " ") : "no call"];
}

export const strongest = (rows, answers) =>
  Math.max(0, ...rows.flatMap((row) => (answers?.[row.id]?.turns ?? row.turns).map((turn) => Math.abs(turn.advantage ?? 0))));

const ORDERS = {
  "as recorded": () => 0,
  outcome: (a, b) => (b.acc ?? -1) - (a.acc ?? -1),
  advantage: (a, b) => total(b) - total(a),
  tokens: (a, b) => size(b) - size(a),
  turns: (a, b) => b.turns.length - a.turns.length,
};
const total = (row) => row.turns.reduce((sum, turn) => sum + (turn.advantage ?? 0) * turn.tokens, 0);
const size = (row) => row.turns.reduce((sum, turn) => sum + turn.tokens, 0);
export const orders = Object.keys(ORDERS);
export const sorted = (rows, order) => rows.map((row, at) => ({ ...row, at: row.at ?? at })).sort(ORDERS[order] ?? ORDERS["as recorded"]);

// rows: `sorted`. answers: {id: answer of the what-if}, or null for the record. choose(number of the sibling, turn).
export function Grid({ rows, answers = null, most, dark, selected, choose, small = false }) {
  const turns = Math.max(1, ...rows.map((row) => row.turns.length));
  const widest = Math.max(1, ...rows.flatMap((row) => row.turns.map((turn) => turn.tokens)));
  return (
    <table class={small ? "grid small" : "grid"}>
      {!small && <thead><tr><th /><th>outcome</th>{Array.from({ length: turns }, (_, k) => <th>turn {k}</th>)}</tr></thead>}
      <tbody>
        {rows.map((row) => {
          const here = selected?.row === row.at;
          return (
            <tr class={here ? "here" : ""}>
              <th scope="row" title={row.found ? "found by the search" : undefined}>{row.found && <span class="found">⌕</span>}{row.at + 1}</th>
              <td class="outcome"><Outcome row={row} answer={answers?.[row.id]} /></td>
              {Array.from({ length: turns }, (_, k) => (
                <td>{k < row.turns.length && <Cell row={row} k={k} {...{ answers, most, dark, widest, choose, small }} here={here && selected.turn === k} />}</td>))}
            </tr>);
        })}
      </tbody>
    </table>
  );
}

function Outcome({ row, answer }) {
  if (answer?.dropped || row.dropped) return <span class="faint" title={row.finish}>dropped</span>;
  if (row.acc === null) return <span class="faint">none</span>;
  const gain = (answer ? answer.shaped : row.shaped) - row.outcome;
  if (row.acc === 1) return <span class="right">● right</span>;
  return <span>○ wrong{gain > 0 ? <span class="faint"> +{gain.toFixed(2)}</span> : ""}</span>;
}

function Cell({ row, k, answers, most, dark, widest, choose, here, small }) {
  const turn = row.turns[k];
  const [glyph, words] = sign(row, k);
  const answer = answers?.[row.id];
  const dropped = answer ? answer.dropped : row.dropped;
  const value = dropped ? null : answer ? answer.turns[k]?.advantage ?? null : turn.advantage;
  const masked = turn.masked ?? 0;
  const state = dropped ? "dropped" : value === null ? "unassigned" : masked === turn.tokens ? "masked" : value === 0 ? "zero" : "";
  const shade = state ? {} : colour(value, most, dark);
  const moved = answer && !dropped && Math.abs((value ?? 0) - (turn.advantage ?? 0)) > 0.005;
  const title = `${words} · ${turn.tokens} tokens${turn.broken ? ` · breaks the format: ${turn.broken.replaceAll("_", " ")}` : ""}` +
    (state === "unassigned" ? " · no advantage was assigned" : state === "dropped" ? " · dropped" : ` · advantage ${signed(value, 4)}`) +
    (masked ? ` · ${masked} tokens masked by rollout correction` : "") +
    (moved ? ` (recorded ${signed(turn.advantage, 4)})` : "");
  const share = Math.max(20, (100 * turn.tokens) / widest), room = small ? 88 : 64;
  const text = <span class="value">{state === "dropped" ? "×" : state === "unassigned" ? "" : signed(value)}</span>;
  return (
    <button class={`cell ${here ? "here" : ""} ${moved ? "moved" : ""}`} title={title} aria-label={`turn ${k}: ${title}`} onClick={() => choose?.(row.at + 1, k)}>
      <span class={`bar ${state}`} style={{ ...shade, width: `${share}%` }}>
        {masked > 0 && <i class="masked" style={{ width: `${(100 * masked) / turn.tokens}%` }} />}
        <span class={turn.broken ? "glyph broken" : "glyph"}>{glyph}</span>
        {share >= room && text}
      </span>
      {share < room && text}
    </button>
  );
}

export function Legend({ most, dark }) {
  return (
    <p class="legend" aria-hidden="true">
      <span>−{most.toFixed(1)}</span>
      {[-1, -0.4, 0, 0.4, 1].map((v) => <i style={colour(v, 1, dark)} />)}
      <span>+{most.toFixed(1)}</span>
      <span>width: tokens</span>
      <span><i class="bar unassigned" /> unassigned</span><span><i class="bar" style={colour(0.4, 1, dark)}><i class="masked" /></i> masked</span><span><i class="bar zero" /> zero</span><span><i class="bar dropped" /> dropped</span>
    </p>
  );
}
