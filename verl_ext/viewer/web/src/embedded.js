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
    const found = (row) => words.length > 0 && has(run, row, words);
    return { ...group, rows: step.filter((row) => row.grp === group.id).map((row) => ({ ...row, found: found(row) })), before: near(-1), after: near(1) };
  }
  if (second === "whatif") {
    const answers = globalThis.viewerCredit.recompute(step, JSON.parse(p.settings));
    return Object.fromEntries(step.flatMap((row, i) => (row.grp === group.id ? [[row.id, answers[i]]] : [])));
  }
  throw new Error(`an exported page has no ${path}`);
}

const ORDERS = {
  step: (a, b) => a.step - b.step || a.id - b.id,
  latest: (a, b) => b.step - a.step || a.id - b.id,
  spread: (a, b) => b.spread - a.spread || a.id - b.id,
  largest: (a, b) => b.top - a.top || a.id - b.id,
  tokens: (a, b) => b.tokens - a.tokens || a.id - b.id,
  "least solved": (a, b) => a.solved / a.size - b.solved / b.size || a.id - b.id,
};

const wordsOf = (text) => (text ?? "").toLowerCase().replaceAll('"', " ").split(/\s+/).filter(Boolean);
const has = (run, row, words) => {
  const text = JSON.stringify(run.conversations[row.id]).toLowerCase();
  return words.every((word) => text.includes(word));
};

function list(run, p) {
  const words = wordsOf(p.q);
  const rows = (g) => run.rows[`${g.split}/${g.step}`].filter((row) => row.grp === g.id);
  const found = run.groups.filter((g) =>
    g.split === (p.split ?? "train") &&
    (!p.step || g.step === Number(p.step)) &&
    [p.flag ?? []].flat().every((flag) => g.flags.includes(flag)) &&
    (!words.length || rows(g).some((row) => has(run, row, words))));
  found.sort(ORDERS[p.sort ?? "step"]);
  const offset = Number(p.offset ?? 0);
  return { total: found.length, groups: found.slice(offset, offset + PAGE) };
}
