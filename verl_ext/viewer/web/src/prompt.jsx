// The same prompt, wherever it was given: runs as columns, steps as rows, so that methods are read in pairs.
import { get } from "./api.js";
import { Grid, Legend, sorted, strongest } from "./grid.jsx";
import { Solved } from "./list.jsx";
import { go, useAnswer } from "./route.js";
import { visible } from "./text.jsx";

const SHOWN = 24;

export function SamePrompt({ overview, route, dark }) {
  const [found, error] = useAnswer(async () => {
    const list = (await get("api/prompt", { key: route.prompt })).slice(0, 400);
    const some = list.slice(0, SHOWN);
    const groups = await Promise.all(some.map((one) => get(`api/${one.run}/group`, { id: one.id })));
    return { total: list.length, groups: groups.map((group, at) => ({ ...group, run: some[at].run })) };
  }, [route.prompt]);
  if (!found) return <p class="empty">{error ?? "reading …"}</p>;
  const columns = [...new Set(found.groups.map((group) => group.run))];
  const lines = [...new Set(found.groups.map((group) => `${group.split}/${group.step}`))];
  const most = Math.max(0, ...found.groups.map((group) => strongest(group.rows)));
  return (
    <main class="page">
      <h2 dir="auto">{visible(found.groups[0]?.prompt ?? "")}</h2>
      <p class="note">{found.total} groups with this prompt{found.total > SHOWN && `; the first ${SHOWN} are shown`}. One colour scale for all. <a href={`#${new URLSearchParams({ ...route, view: "groups" })}`}>back to the group</a></p>
      <Legend most={most} dark={dark} />
      <div class="scroll">
        <table class="pairs">
          <thead><tr><th />{columns.map((run) => <th>{overview.runs[run].name}</th>)}</tr></thead>
          <tbody>
            {lines.map((line) => (
              <tr>
                <th>{line.replace("train/", "step ").replace("/", " ")}</th>
                {columns.map((run) => (
                  <td>{found.groups.filter((group) => group.run === run && `${group.split}/${group.step}` === line).map((group) => (
                    <div>
                      <a href={`#${new URLSearchParams({ run, group: group.id })}`}><Solved {...group} /></a>
                      <Grid small rows={sorted(group.rows, "outcome")} {...{ most, dark }} choose={(row, turn) => go({ run, view: "groups", group: group.id, row, turn, prompt: "" })} />
                    </div>))}</td>))}
              </tr>))}
          </tbody>
        </table>
      </div>
    </main>
  );
}
