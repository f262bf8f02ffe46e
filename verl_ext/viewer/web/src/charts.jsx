import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import uPlot from "uplot";
import { get } from "./api.js";
import { SERIES } from "./colour.js";
import { go, useAnswer } from "./route.js";

function Plot({ title, data, series, dark, height = 220, range, bands }) {
  const at = useRef();
  useLayoutEffect(() => {
    const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink"), line = getComputedStyle(document.documentElement).getPropertyValue("--line");
    const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 } };
    const width = () => Math.max(280, at.current.clientWidth);
    const plot = new uPlot({
      title, width: width(), height, bands,
      scales: { x: { time: false }, y: range ? { range } : {} },
      axes: [{ ...axis, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000] }, { ...axis, size: 56 }],
      series: [{ label: "step" }, ...series],
    }, data, at.current);
    const watch = new ResizeObserver(() => plot.setSize({ width: width(), height }));
    watch.observe(at.current);
    return () => { watch.disconnect(); plot.destroy(); };
  }, [JSON.stringify([title, data, series.map((s) => s.label)]), dark]);
  return <div class="plot" ref={at} />;
}

// Names without the words that they begin and end with alike, for a legend: "gtpo", "grpo" of "sums-gtpo-1", "sums-grpo-1".
export function short(names) {
  const words = names.map((name) => name.split(/(?<=[-/])|(?=[-/])/));
  const alike = (at) => new Set(words.map((one) => one.at(at))).size === 1;
  const least = Math.min(...words.map((one) => one.length));
  let from = 0, to = 0;
  while (from < least && alike(from)) from++;
  while (from + to < least && alike(-1 - to)) to++;
  const cut = words.map((one) => one.slice(from, one.length - to).join("").replace(/^[-/]+|[-/]+$/g, ""));
  return cut.every(Boolean) ? cut : names;
}

// The mean over all answers; with several to a problem, best@ and maj@ stand beside it.
export const ACCURACY = /^val-core\/.*\/acc\/mean@/;
// What to begin with, as far as a run has it.
const FIRST = [ACCURACY, /^gtpo\/acc\/mean$/, /^gtpo\/turns\/mean$/, /^gtpo\/reward\/mean$/, /^gtpo\/advantage\/std$/, /^gtpo\/pools\/zero_spread$/,
  /^gtpo\/format\/first_turn_no_call$/, /^gtpo\/tool\/error_rate$/, /^timing_s\/step$/];

// Another after every line of metrics of any run: their trajectories come at other times.
export const written = (runs) => runs.map((run) => run.metrics).join();

export function Curves({ overview, route, dark }) {
  const [all, error] = useAnswer(() => get("api/curves"), [written(overview.runs)]);
  const names = all?.names ?? [];
  const first = FIRST.flatMap((pattern) => names.filter((name) => pattern.test(name)).slice(0, 1));
  const chosen = route.metrics ? route.metrics.split(",").filter((name) => names.includes(name)) : first;
  const [found] = useAnswer(() => (chosen.length ? get("api/curves", { name: chosen }) : null), [chosen.join(), written(overview.runs)]);
  if (!all) return <p class="empty">{error ?? "reading …"}</p>;
  if (!names.length) return <p class="empty">No run here has a metrics.jsonl.</p>;
  const labels = short(overview.runs.map((one) => one.name));
  return (
    <main class="page">
      <p class="row">
        <label>add <select aria-label="add a metric" value="" onChange={(e) => e.target.value && go({ metrics: [...chosen, e.target.value].join(",") })}>
          <option value="">a metric …</option>{names.filter((name) => !chosen.includes(name)).map((name) => <option>{name}</option>)}
        </select></label>
        {route.metrics && <button class="quiet" onClick={() => go({ metrics: "" })}>the usual ones</button>}
      </p>
      <div class="plots">
        {chosen.filter((name) => found?.curves[name]).map((name) => {
          const curves = found.curves[name];
          const steps = [...new Set(curves.flatMap((curve) => curve.map(([step]) => step)))].sort((a, b) => a - b);
          const data = [steps, ...curves.map((curve) => { const by = new Map(curve); return steps.map((step) => by.get(step) ?? null); })];
          const series = overview.runs.map((one, at) => ({ label: labels[at], stroke: SERIES[at % SERIES.length], width: 2, spanGaps: true, points: { show: steps.length < 40 } }));
          return <figure class="card"><Plot {...{ title: name, data, series, dark }} />
            <button class="quiet" onClick={() => go({ metrics: chosen.filter((one) => one !== name).join(",") })}>remove</button></figure>;
        })}
      </div>
    </main>
  );
}

const BY = { turn: "by turn index", kind: "by how the group did", part: "by reward part" };

export function Gradient({ run, dark }) {
  const [found, error] = useAnswer(() => get(`api/${run.run}/gradient`), [run.run, run.revision]);
  if (!found) return <p class="empty">{error ?? "reading …"}</p>;
  if (!found.length) return <p class="empty">No recorded advantage is other than zero.</p>;
  const steps = [...new Set(found.map((one) => one.step))];
  return (
    <main class="page">
      <p class="note">Share of |advantage| × tokens: what pushes the policy, before clipping. A turn's weight is split over reward parts as its advantage is, since every part is centred and divided alike.</p>
      <div class="plots">
        {Object.entries(BY).map(([key, title]) => {
          const labels = [...new Set(found.map((one) => one[key]))].sort((a, b) => (a < b ? -1 : 1));
          const weight = new Map();
          for (const one of found) for (const at of [`${one.step} ${one[key]}`, `${one.step}`]) weight.set(at, (weight.get(at) ?? 0) + one.weight);
          // Stacked: each line is the sum of the shares up to its own; the band under it is its own share.
          const stacked = labels.map((_, at) => steps.map((step) =>
            labels.slice(0, at + 1).reduce((sum, label) => sum + (weight.get(`${step} ${label}`) ?? 0), 0) / weight.get(`${step}`)));
          const series = labels.map((label, at) => {
            const tint = SERIES[at % SERIES.length];
            return { label: key === "turn" ? `turn ${label}` : String(label), stroke: tint, fill: `${tint}bb`, width: 1, points: { show: steps.length < 2 },
              value: (plot, value, series, i) => (i === null || i === undefined || value === null ? "–" : `${(100 * (value - (at ? stacked[at - 1][i] : 0))).toFixed(0)} %`) };
          });
          const bands = labels.slice(1).map((_, at) => ({ series: [at + 2, at + 1] }));
          return <figure class="card"><Plot {...{ title, data: [steps, ...stacked], series, bands, dark, height: 260, range: [0, 1] }} /></figure>;
        })}
      </div>
      <Totals found={found} />
    </main>
  );
}

function Totals({ found }) {
  const total = found.reduce((sum, one) => sum + one.weight, 0);
  return (
    <div class="columns">
      {Object.entries(BY).map(([key, title]) => {
        const sums = {};
        for (const one of found) sums[one[key]] = (sums[one[key]] ?? 0) + one.weight;
        return (
          <section class="card"><h3>All steps, {title}</h3>
            <table><tbody>{Object.entries(sums).map(([name, weight]) => (
              <tr><th>{key === "turn" ? `turn ${name}` : name}</th><td>{((100 * weight) / total).toFixed(1)} %</td><td class="how"><i class="share" style={{ width: `${(140 * weight) / total}px` }} /></td></tr>))}</tbody></table>
          </section>);
      })}
    </div>
  );
}
