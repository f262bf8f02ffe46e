// The data of an exported page: gzip in base64 inside the page, answered as the server would answer.
// What another setting would have done is computed by the method's own script (globalThis.viewerCredit).
const PAGE = 100;

export async function embedded() {
  const bytes = Uint8Array.from(atob(document.getElementById("data").textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = await new Response(stream).json();
  return (path, parameters) => answer(data, path.split("/").slice(1), parameters);
}

function answer(data, [first, second], p) {
  if (first === "overview") return data.overview;
  if (first === "prompt") return data.runs.flatMap((run, at) => run.groups.filter((g) => g.prompt_key === p.key)
    .map((g) => ({ ...g, run: at, name: data.overview.runs[at].name })));
  if (first === "curves") {
    const names = [p.name ?? []].flat();
    const curve = (run, name) => run.metrics.filter((m) => name in m.metrics).map((m) => [m.step, m.metrics[name]]);
    const all = new Set(data.runs.flatMap((run) => run.metrics.flatMap((m) => Object.keys(m.metrics))));
    return { names: [...all].sort(), curves: Object.fromEntries(names.map((n) => [n, data.runs.map((r) => curve(r, n))])) };
  }
  const run = data.runs[first];
  if (second === "groups") return list(run, p);
  if (second === "gradient") return run.gradient;
  if (second === "conversation") return run.conversations[p.id];
  const at = run.groups.findIndex((g) => g.id === Number(p.id));
  const group = run.groups[at];
  if (!group) throw new Error(`not in this page: group ${p.id}`);
  const step = run.rows[`${group.split}/${group.step}`];
  if (second === "group") {
    const near = (by) => (run.groups[at + by]?.split === group.split ? run.groups[at + by].id : null);
    const words = wordsOf(p.q);
    const found = (row) => words !== null && has(run, row, words);
    return { ...group, rows: step.filter((row) => row.grp === group.id).map((row) => ({ ...row, found: found(row) })), before: near(-1), after: near(1) };
  }
  if (second === "whatif") {
    const answers = globalThis.viewerCredit.recompute(step, JSON.parse(p.settings));
    return Object.fromEntries(step.flatMap((row, i) => (row.grp === group.id ? [[row.id, answers[i]]] : [])));
  }
  throw new Error(`an exported page has no ${path}`);
}

const recorded = (a, b) => a.step - b.step || a.place - b.place;
const ORDERS = {
  step: recorded,
  latest: (a, b) => b.step - a.step || recorded(a, b),
  spread: (a, b) => b.spread - a.spread || recorded(a, b),
  largest: (a, b) => b.top - a.top || recorded(a, b),
  tokens: (a, b) => b.tokens - a.tokens || recorded(a, b),
  "least solved": (a, b) => a.solved / a.size - b.solved / b.size || recorded(a, b),
};

// As the server's index takes words (SQLite's unicode61 with _): letters and digits, without case and accents.
const plain = (text) => ` ${text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase().replace(/[^\p{L}\p{N}\p{Co}_]+/gu, " ").trim()} `;

// All words and "quoted phrases", the last one possibly a beginning; null where nothing is asked for.
function wordsOf(typed = "") {
  if (!typed.trim()) return null;
  const terms = [...typed.matchAll(/"([^"]+)"|(\S+)/g)].map(([, quoted, word]) => plain(quoted ?? word)).filter((term) => term.trim());
  if (terms.length && !/[\s"]$/.test(typed)) terms.push(terms.pop().slice(0, -1));
  return terms;
}

const textOf = (text) => (typeof text === "string" ? text : text?.text ?? "");
function has(run, row, words) {
  const { prompt, turns } = run.conversations[row.id];
  const texts = [...prompt.map((message) => message.content), ...turns.flatMap((turn) => [turn.text, ...turn.calls.flatMap((call) => [call.arguments, call.output])])];
  const text = texts.map((one) => plain(textOf(one))).join("");
  return words.length > 0 && words.every((word) => text.includes(word));
}

function list(run, p) {
  const words = wordsOf(p.q);
  const rows = (g) => run.rows[`${g.split}/${g.step}`].filter((row) => row.grp === g.id);
  const found = run.groups.filter((g) =>
    g.split === (p.split ?? "train") &&
    (!p.step || g.step === Number(p.step)) &&
    [p.flag ?? []].flat().every((flag) => g.flags.includes(flag)) &&
    (!p.prompt || g.prompt_key === p.prompt) &&
    (words === null || rows(g).some((row) => has(run, row, words))));
  found.sort(ORDERS[p.sort ?? "step"]);
  const offset = Number(p.offset ?? 0);
  return { total: found.length, groups: found.slice(offset, offset + PAGE) };
}
