import { useEffect, useLayoutEffect, useState } from "preact/hooks";
import { exported, get } from "./api.js";
import { Curves, Gradient } from "./charts.jsx";
import { GroupList } from "./list.jsx";
import { GroupView } from "./group.jsx";
import { SamePrompt } from "./prompt.jsx";
import { go, useAnswer, useRoute } from "./route.js";
import { Runs } from "./runs.jsx";

const VIEWS = { groups: "Groups", curves: "Learning curves", gradient: "Where the gradient goes", runs: "Runs" };
const POLL_MS = 2000;

// Asks for the overview again while a run may be growing. Its revision and metrics tell everybody else when to ask again.
function useOverview() {
  const [tick, setTick] = useState(0);
  useEffect(() => {
    if (exported) return;
    const timer = setInterval(() => document.hidden || setTick((n) => n + 1), POLL_MS);
    return () => clearInterval(timer);
  }, []);
  return useAnswer(() => get("api/overview"), [tick]);
}

export function useDark() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
  const [theme, setTheme] = useState(stored() ?? (system.matches ? "dark" : "light"));
  useLayoutEffect(() => { document.documentElement.dataset.theme = theme; }, [theme]);
  const toggle = () => {
    const next = theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("theme", next); } catch { /* a page from disk may have no storage */ }
    setTheme(next);
  };
  return [theme === "dark", toggle];
}

// At once where the field is there: what is typed next belongs to it.
function search() {
  const field = () => document.getElementById("search");
  if (field()) return field().focus();
  go({ view: "groups" });
  setTimeout(() => field()?.focus(), 50);
}

export function App() {
  const [overview, error] = useOverview();
  const route = useRoute();
  const [dark, toggleDark] = useDark();
  const [help, setHelp] = useState(false);

  useLayoutEffect(() => {
    const pressed = (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Escape") { setHelp(false); event.target.blur?.(); return; }
      if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
      if (event.key === "?") setHelp((shown) => !shown);
      else if (event.key === "/") { event.preventDefault(); search(); }
      else dispatchEvent(new CustomEvent("viewer-key", { detail: event.key }));
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, []);

  if (!overview) return <p class="empty">{error ? `The viewer does not answer: ${error}` : "reading …"}</p>;
  const view = route.view ?? "groups";
  const number = Math.min(Number(route.run ?? 0), overview.runs.length - 1);
  const run = overview.runs[number];
  const shared = { overview, run, route, dark };
  return (
    <>
      <header>
        <h1>Where the credit went</h1>
        <select aria-label="run" value={number} onChange={(e) => go({ run: e.target.value, group: "", row: "", turn: "", step: "" })}>
          {overview.runs.map((one) => <option value={one.run}>{one.name}</option>)}
        </select>
        <nav>
          {Object.entries(VIEWS).map(([name, title]) => (
            <a href={`#${new URLSearchParams({ ...route, view: name })}`} class={view === name ? "here" : ""} aria-current={view === name ? "page" : undefined}>{title}</a>))}
        </nav>
        <span class="state">
          {run.trajectories.toLocaleString("en")} trajectories
          {run.skipped > 0 && <strong class="bad" title={run.why}> · {run.skipped} lines are no records, left out</strong>}
          {run.torn.length > 0 && <span title={`${run.torn.join(", ")}: it is being written, or its writer was killed`}> · {run.torn.length} unfinished line{run.torn.length > 1 && "s"}</span>}
          {error && <strong class="bad"> · not updated: {error}</strong>}
        </span>
        <button class="quiet" onClick={toggleDark} title="light or dark">{dark ? "☀ light" : "☾ dark"}</button>
        <button class="quiet" onClick={() => setHelp(true)} title="keys and signs (?)">? help</button>
      </header>
      {view === "groups" && (
        <main class="split">
          <GroupList {...shared} />
          {route.group ? <GroupView {...shared} /> : <p class="empty">Choose a group at the left, or press n.</p>}
        </main>)}
      {view === "curves" && <Curves {...shared} />}
      {view === "gradient" && <Gradient {...shared} />}
      {view === "runs" && <Runs {...shared} />}
      {view === "prompt" && <SamePrompt {...shared} />}
      {help && <Help close={() => setHelp(false)} />}
    </>
  );
}

function Help({ close }) {
  const keys = [
    ["n, p", "next, previous group"], ["j, k", "next, previous sibling"], ["← →", "turn before, after"], ["e", "open or close everything"],
    ["/", "search"], ["?", "this page"], ["Esc", "close; leave a field"],
  ];
  const signs = [
    ["✓", "the tool ran the code"], ["✗", "the code failed"], ["◷", "time limit"], ["⚠", "malformed call"], ["⊘", "call not run: over the limit"],
    ["⚡", "the tool server failed"], ["●", "right answer"], ["○", "wrong answer"], ["·", "no call, no answer"], ["…", "cut by a limit"],
  ];
  return (
    <div class="veil" onClick={close}>
      <div class="dialog" role="dialog" aria-label="help" onClick={(e) => e.stopPropagation()}>
        <h2>Keys</h2>
        <dl>{keys.map(([key, what]) => <><dt><kbd>{key}</kbd></dt><dd>{what}</dd></>)}</dl>
        <h2>A cell of the grid</h2>
        <p>One turn. Colour: its advantage, orange below 0, blue above. Width: its tokens. Signs:</p>
        <dl>{signs.map(([sign, what]) => <><dt>{sign}</dt><dd>{what}</dd></>)}</dl>
        <p>Hatched: nothing was assigned. Plain grey with 0: compared, and equal. Crossed out: the trajectory was dropped.</p>
        <button onClick={close}>close</button>
      </div>
    </div>
  );
}
