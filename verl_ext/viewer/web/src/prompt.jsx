// The same prompt, wherever it was given: runs as columns, steps as rows, so that methods are read in pairs.
import { useState } from "preact/hooks";
import { get } from "./api.js";
import { Grid, Legend, sorted, strongest } from "./grid.jsx";
import { Solved } from "./list.jsx";
import { go, useAnswer } from "./route.js";
import { visible } from "./text.jsx";

const MORE = 8;  // steps that are drawn at once

// [[step's name, its groups], ...]: steps that most runs have first, since they can be compared; else in order.
function paired(list) {
  const lines = new Map();
  for (const one of list) {
    const name = `${one.split === "train" ? "" : `${one.split}, `}step ${one.step}`;
    lines.set(name, [...(lines.get(name) ?? []), one]);
  }
  const runs = ([, groups]) => new Set(groups.map((one) => one.run)).size;
  const order = ([, [one]]) => [one.split === "train" ? 0 : 1, one.step];
  return [...lines].sort((a, b) => runs(b) - runs(a) || order(a)[0] - order(b)[0] || order(a)[1] - order(b)[1]);
}

// Over the steps that every run has: what each run solved of this prompt. Different steps would be no comparison.
function Together({ columns, lines }) {
  const common = lines.filter(([, groups]) => columns.every((run) => groups.some((one) => one.run === run)));
  if (columns.length < 2 || !common.length) return null;
  const sum = (run, name) => common.flatMap(([, groups]) => groups).filter((one) => one.run === run).reduce((all, one) => all + one[name], 0);
  return (
    <tr class="together"><th title="steps in which every run had this prompt">{common.length} steps together</th>{columns.map((run) => {
      const solved = sum(run, "solved"), size = sum(run, "size"), first = sum(columns[0], "solved") / sum(columns[0], "size");
      const more = Math.round(100 * (solved / size - first));
      return <td><Solved solved={solved} size={size} />: {Math.round((100 * solved) / size)} %{run !== columns[0] && ` (${more > 0 ? "+" : more < 0 ? "−" : "±"}${Math.abs(more)} points)`}</td>;
    })}</tr>);
}

export function SamePrompt({ overview, route, dark }) {
  const [shown, setShown] = useState(MORE);
  const [list, error] = useAnswer(() => get("api/prompt", { key: route.prompt }), [route.prompt]);
  const lines = list ? paired(list) : [], some = lines.slice(0, shown);
  const [groups] = useAnswer(async () => {
    const wanted = some.flatMap(([, here]) => here);
    const found = await Promise.all(wanted.map((one) => get(`api/${one.run}/group`, { id: one.id })));
    return new Map(found.map((group, at) => [`${wanted[at].run} ${group.id}`, group]));
  }, [list, shown]);
  if (!list) return <p class="empty">{error ?? "reading …"}</p>;
  const columns = [...new Set(list.map((one) => one.run))].sort((a, b) => a - b);
  const drawn = groups ? [...groups.values()] : [];
  const most = Math.max(0, ...drawn.map((group) => strongest(group.rows)));
  return (
    <main class="page">
      <h2 dir="auto">{visible(drawn[0]?.prompt ?? "")}</h2>
      <p class="note">{list.length} groups with this prompt in {lines.length} steps of {columns.length} runs. One colour scale for all. <a href={`#${new URLSearchParams({ ...route, prompt: "", view: "groups" })}`}>back to the group</a></p>
      <Legend most={most} dark={dark} />
      <div class="scroll">
        <table class="pairs">
          <thead><tr><th />{columns.map((run) => <th>{overview.runs[run].name}</th>)}</tr></thead>
          <tbody>
            <Together {...{ columns, lines }} />
            {some.map(([name, here]) => (
              <tr>
                <th>{name}</th>
                {columns.map((run) => (
                  <td>{here.filter((one) => one.run === run).map((one) => {
                    const group = groups?.get(`${run} ${one.id}`);
                    return (
                      <div>
                        <a href={`#${new URLSearchParams({ run, group: one.id })}`}><Solved {...one} /></a>
                        {group && <Grid small rows={sorted(group.rows, "outcome")} {...{ most, dark }} choose={(row, turn) => go({ run, view: "groups", group: one.id, row, turn, prompt: "" })} />}
                      </div>);
                  })}</td>))}
              </tr>))}
          </tbody>
        </table>
      </div>
      {lines.length > shown && <button onClick={() => setShown(shown + MORE)}>{Math.min(MORE, lines.length - shown)} more of {lines.length - shown} steps</button>}
    </main>
  );
}
