// The runs that were opened, how far they are, and in what their configs differ.
import { get } from "./api.js";
import { ACCURACY, written } from "./charts.jsx";
import { useAnswer } from "./route.js";
import { visible } from "./text.jsx";

export function Runs({ overview }) {
  const { runs, differences } = overview;
  const [found] = useAnswer(async () => {
    const { names } = await get("api/curves");
    const name = names.find((one) => ACCURACY.test(one));
    return { name, curves: name && (await get("api/curves", { name: [name] })).curves[name] };
  }, [written(runs)]);
  const accuracy = (run) => {
    const curve = found?.curves?.[run] ?? [], [first, last] = [curve[0], curve.at(-1)];
    return first ? `${first[1].toFixed(3)} (step ${first[0]}) → ${last[1].toFixed(3)} (step ${last[0]})` : <span class="faint">–</span>;
  };
  return (
    <main class="page">
      <h2>Runs</h2>
      <div class="scroll"><table class="plain">
        <thead><tr><th>run</th><th title={found?.name}>held-out accuracy</th><th>steps recorded</th><th>trajectories</th><th>folder</th></tr></thead>
        <tbody>{runs.map((run) => (
          <tr>
            <th><a href={`#${new URLSearchParams({ run: run.run })}`}>{run.name}</a></th>
            <td>{accuracy(run.run)}</td>
            <td>{Object.entries(run.steps).map(([split, steps]) => `${split}: ${steps.length}`).join(", ") || "none"}</td>
            <td>{run.trajectories.toLocaleString("en")}{run.skipped > 0 && <strong class="bad"> ({run.skipped} lines left out: {visible(run.why)})</strong>}</td>
            <td class="path">{visible(run.path)}</td>
          </tr>))}</tbody>
      </table></div>
      <h2>Differences of config</h2>
      {runs.some((run) => !run.has_config) && <p class="note">Without a config.json, so not compared: {runs.filter((run) => !run.has_config).map((run) => run.name).join(", ")}</p>}
      {differences.length ? (
        <div class="scroll"><table class="plain">
          <thead><tr><th>key</th>{runs.map((run) => <th>{run.name}</th>)}</tr></thead>
          <tbody>{differences.map(({ key, values }) => <tr><th>{key}</th>{values.map((value) => <td>{value === null ? <span class="faint">–</span> : visible(String(value))}</td>)}</tr>)}</tbody>
        </table></div>) : <p class="empty">{runs.filter((run) => run.has_config).length > 1 ? "None." : "Fewer than two runs with a config: nothing to compare with. Open several: python -m verl_ext.viewer RUN_DIR RUN_DIR"}</p>}
    </main>
  );
}
