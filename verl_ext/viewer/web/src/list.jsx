// The list of groups: what to look at, found by filter, search and order.
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { get } from "./api.js";
import { go, read, useAnswer } from "./route.js";
import { visible } from "./text.jsx";

const PAGE = 100;

export function GroupList({ overview, run, route }) {
  const flags = route.flags ? route.flags.split(",") : [];
  const splits = Object.keys(run.steps);
  const split = route.split ?? (splits.includes("train") ? "train" : splits[0] ?? "train");
  const offset = Number(route.offset ?? 0);
  const question = { split, step: route.step, flag: flags, q: route.q, prompt: route.prompt, sort: route.sort ?? "step", offset };
  const [found, error, asking] = useAnswer(
    () => get(`api/${run.run}/groups`, question), [run.run, run.revision, JSON.stringify(question)]);
  const groups = found?.groups ?? [];
  const selected = useRef();
  useEffect(() => { selected.current?.scrollIntoView({ block: "nearest" }); }, [route.group, groups.length]);

  const move = async (step) => {
    const now = read().group, at = groups.findIndex((group) => String(group.id) === now);
    const open = (id, changes = {}) => id && go({ group: id, row: "", turn: "", ...changes });
    if (at < 0 && now && found.total > PAGE && !flags.length && !route.q) {  // on another page: its neighbours in the record
      const group = await get(`api/${run.run}/group`, { id: now });
      return open(step > 0 ? group.after : group.before);
    }
    const next = groups[at < 0 ? 0 : at + step];
    if (next) return open(next.id);
    const there = offset + step * PAGE;
    if (there < 0 || there >= found.total) return;
    const more = await get(`api/${run.run}/groups`, { ...question, offset: there });
    open(more.groups.at(step > 0 ? 0 : -1)?.id, { offset: there || "" });
  };
  useLayoutEffect(() => {  // a key may come as soon as the list is there
    const pressed = ({ detail }) => {
      const step = { n: 1, p: -1 }[detail];
      if (step && groups.length) move(step);
    };
    addEventListener("viewer-key", pressed);
    return () => removeEventListener("viewer-key", pressed);
  });

  const toggle = (flag) =>
    go({ flags: (flags.includes(flag) ? flags.filter((f) => f !== flag) : [...flags, flag]).join(","), offset: "" });
  return (
    <aside>
      <Search value={route.q ?? ""} />
      <div class="row">
        {splits.length > 1 && (
          <select aria-label="split" value={split} onChange={(e) => go({ split: e.target.value, step: "", group: "", offset: "" })}>
            {splits.map((one) => <option>{one}</option>)}
          </select>)}
        <select aria-label="step" value={route.step ?? ""} onChange={(e) => go({ step: e.target.value, offset: "" })}>
          <option value="">all steps</option>
          {(run.steps[split] ?? []).map((step) => <option value={step}>step {step}</option>)}
        </select>
        <select aria-label="order" value={route.sort ?? "step"} onChange={(e) => go({ sort: e.target.value, offset: "" })}>
          {overview.sorts.map((one) => <option value={one}>by {one}</option>)}
        </select>
      </div>
      <div class="chips" role="group" aria-label="filters">
        {overview.flags.map((flag) => (
          <button class={flags.includes(flag) ? "chip on" : "chip"} aria-pressed={flags.includes(flag)} onClick={() => toggle(flag)}>{flag}</button>))}
      </div>
      <p class="note" aria-live="polite">
        {error ? <strong class="bad">{error}</strong> : found ? `${found.total.toLocaleString("en")} groups` : "…"}
        {asking && found ? " …" : ""}
        {found?.total > PAGE && (
          <span> · {offset + 1}–{Math.min(offset + PAGE, found.total)}{" "}
            <button class="quiet" disabled={offset === 0} onClick={() => go({ offset: offset - PAGE || "" })}>◂</button>
            <button class="quiet" disabled={offset + PAGE >= found.total} onClick={() => go({ offset: offset + PAGE })}>▸</button>
          </span>)}
      </p>
      <ol class="groups">
        {groups.map((group) => {
          const here = String(group.id) === route.group;
          return (
            <li>
              <button ref={here ? selected : null} class={here ? "here" : ""} aria-current={here} onClick={() => go({ group: group.id, row: "", turn: "" })}>
                <span class="head">{visible(group.prompt || `group ${group.label.slice(0, 8)}`)}</span>
                <span class="sub">
                  step {group.step} · <Solved {...group} />
                  {group.flags.filter((f) => f !== "tool error").map((f) => <span class="tag">{f}</span>)}
                </span>
              </button>
            </li>);
        })}
      </ol>
      {found && !groups.length && <p class="empty">No group has all of this.</p>}
    </aside>
  );
}

export function Solved({ solved, size }) {
  return <span class="solved" title={`${solved} of ${size} solved`}>{solved}/{size} solved</span>;
}

function Search({ value }) {
  const [typed, setTyped] = useState(value);
  useEffect(() => setTyped(value), [value]);
  useEffect(() => {
    const timer = setTimeout(() => go({ q: typed, offset: "" }, { replace: true }), 150);
    return () => clearTimeout(timer);
  }, [typed]);
  return <input id="search" type="search" value={typed} placeholder="search all texts (/)" aria-label="search all texts" onInput={(e) => setTyped(e.target.value)} />;
}
