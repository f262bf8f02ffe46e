"""Compare finished runs: `python -m recipe.gtpo.report RUNS... -o report/`.

RUNS are run folders, or folders of run folders (what `recipe.gtpo.compare` leaves). Writes `index.html`
(self-contained), the same figures as PNG, the table as `table.md`, and every number as `report.json`.

Everything is read from the runs' own records. Accuracy is the raw outcome on held-out problems, sampled as the run's
config says (temperature 1 by default).
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import integrate, stats

from recipe.gtpo.progress import validation_accuracy, validation_mean
from recipe.gtpo.run_record import RunRecord

BASELINE = "grpo"
CONFIDENCE = 0.95
CLAIM_SEEDS = 16  # fewer resolve about as much as the methods differ by, and a bootstrap of few values is too sure
_RESAMPLES = 10_000


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class Run:
    """One finished run, read from its folder."""

    dir: Path
    method: str
    task: str
    engine: str
    seed: int
    lines: list[dict[str, Any]]  # metrics.jsonl
    start: dict[str, Any]  # the last entry of versions.json

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Raises ValueError for a run without a validation before and after training."""
        record = RunRecord(folder)
        summary = json.loads((folder / "summary.json").read_text())
        starts = json.loads((folder / "versions.json").read_text())
        engine = summary.get("engine", "verl")
        run = cls(
            folder, summary["method"], summary["task"], engine, summary["seed"], record.read_metrics(), starts[-1]
        )
        if len(run.curve) < 2:
            raise ValueError(f"{folder}: no validation before and after training; set trainer.test_freq")
        return run

    @cached_property
    def curve(self) -> dict[int, float]:
        """Step -> held-out accuracy."""
        pairs = ((line["step"], validation_accuracy(line["metrics"])) for line in self.lines)
        return {step: accuracy for step, accuracy in pairs if accuracy is not None}

    @property
    def final(self) -> float:
        return self.curve[max(self.curve)]

    @property
    def area(self) -> float:
        """Mean height of the learning curve (trapezoid rule over steps)."""
        steps, heights = list(self.curve), list(self.curve.values())
        return float(integrate.trapezoid(heights, steps) / (steps[-1] - steps[0]))

    def reached(self, threshold: float) -> float | None:
        """The first validated step at or above `threshold`."""
        return next((float(step) for step, accuracy in self.curve.items() if accuracy >= threshold), None)

    def last(self, name: str) -> float | None:
        """A quantity of the last validation."""
        return validation_mean(self.lines[-1]["metrics"], name)

    def series(self, metric: str) -> dict[int, float]:
        return {line["step"]: line["metrics"][metric] for line in self.lines if metric in line["metrics"]}

    def median(self, metric: str) -> float | None:
        """Over training steps; the first one warms caches up and is left out."""
        values = list(self.series(metric).values())[1:]
        return statistics.median(values) if values else None

    def mean(self, metric: str) -> float | None:
        """Over the steps that have it."""
        values = list(self.series(metric).values())
        return statistics.fmean(values) if values else None

    @property
    def classes(self) -> dict[str, float]:
        """Final accuracy by problem class, where the run recorded it."""
        found = {}
        for key, value in self.lines[-1]["metrics"].items():
            parts = key.split("/")
            if parts[0] == "val-class" and parts[-1] == "acc":
                found[parts[1]] = value
        return found


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """All finished runs in the given folders.

    Raises:
        ValueError: there is none, one is given twice, or they are not comparable (task, engine, number of steps).
    """
    folders: list[Path] = []
    for path in paths:
        found = [path] if (path / "summary.json").exists() else sorted(p.parent for p in path.glob("*/summary.json"))
        if not found:
            raise ValueError(f"{path}: no finished run (no summary.json in it or in its folders)")
        folders += found
    runs = [Run.load(folder) for folder in folders]
    seen: dict[tuple[str, int], Run] = {}
    for run in runs:
        other = seen.setdefault((run.method, run.seed), run)
        if other is not run:
            raise ValueError(f"{run.dir} and {other.dir} are both {run.method} with seed {run.seed}")
        for what in ("task", "engine"):
            if getattr(run, what) != getattr(runs[0], what):
                raise ValueError(f"{run.dir} and {runs[0].dir} differ in {what}: they cannot be compared")
        if max(run.curve) != max(runs[0].curve):
            raise ValueError(
                f"{run.dir} ends at step {max(run.curve)}, {runs[0].dir} at {max(runs[0].curve)}: not comparable"
            )
    return runs


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


@dataclass(frozen=True)
class Interval:
    """A mean over seeds; `low` and `high` are None for a single one."""

    mean: float
    low: float | None
    high: float | None
    count: int


def t_interval(values: Sequence[float]) -> Interval:
    """Student's 95% interval of the mean."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None, len(values))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half, len(values))


def bootstrap_interval(values: Sequence[float]) -> Interval:
    """Percentile bootstrap of the mean; the resampling is seeded."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None, len(values))
    found = stats.bootstrap(
        (np.array(values),),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), len(values))


@dataclass(frozen=True)
class Paired:
    """A method minus the baseline on the same seeds."""

    by_seed: dict[int, float]
    interval: Interval
    wins: int
    losses: int
    p_value: float  # sign test, two-sided; 1.0 where nothing differs


def paired(runs: Sequence[Run], method: str, value: Callable[[Run], float]) -> Paired | None:
    """None without a common seed."""
    ours = {r.seed: value(r) for r in runs if r.method == method}
    base = {r.seed: value(r) for r in runs if r.method == BASELINE}
    by_seed = {seed: ours[seed] - base[seed] for seed in sorted(ours.keys() & base.keys())}
    if not by_seed:
        return None
    differences = list(by_seed.values())
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    p_value = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return Paired(by_seed, bootstrap_interval(differences), wins, losses, p_value)


@dataclass(frozen=True)
class Row:
    """One method in the table."""

    method: str
    seeds: list[int]
    final: Interval
    area: Interval
    start: float
    reached: float | None  # median step, None when fewer than half of the seeds got there
    turns: float | None
    tool_error: float | None
    first_turn_call: float | None
    step_seconds: float | None
    step_cost: float | None  # median over common seeds of this method's step time / the baseline's
    adv_cost: float | None  # the same for the advantage phase alone: (its seconds - the baseline's) / baseline's step
    final_difference: Paired | None
    area_difference: Paired | None


def make_rows(runs: Sequence[Run], threshold: float) -> list[Row]:
    """One row a method, the best mean of final accuracy and area first."""
    by_method: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda r: r.seed):
        by_method[run.method].append(run)
    base = {run.seed: run for run in by_method.get(BASELINE, [])}
    rows = []
    for method, members in by_method.items():
        steps = (r.reached(threshold) for r in members)
        middle = sorted(float("inf") if step is None else step for step in steps)[len(members) // 2]
        costs, adv_costs = [], []
        for run in members:
            other = base.get(run.seed)
            if other is None:
                continue
            ours, theirs = (r.median("timing_s/step") for r in (run, other))
            our_adv, their_adv = (r.median("timing_s/adv") for r in (run, other))
            if ours and theirs:
                costs.append(ours / theirs)
                if our_adv is not None and their_adv is not None:
                    adv_costs.append((our_adv - their_adv) / theirs)
        rows.append(
            Row(
                method=method,
                seeds=[r.seed for r in members],
                final=t_interval([r.final for r in members]),
                area=t_interval([r.area for r in members]),
                start=statistics.fmean(r.curve[min(r.curve)] for r in members),
                reached=None if middle == float("inf") else middle,
                turns=_mean([r.last("turns") for r in members]),
                tool_error=_mean([r.last("tool_error") for r in members]),
                first_turn_call=_mean([r.last("first_turn_call") for r in members]),
                step_seconds=_mean([r.median("timing_s/step") for r in members]),
                step_cost=statistics.median(costs) if costs else None,
                adv_cost=statistics.median(adv_costs) if adv_costs else None,
                final_difference=None if method == BASELINE else paired(runs, method, lambda r: r.final),
                area_difference=None if method == BASELINE else paired(runs, method, lambda r: r.area),
            )
        )
    return sorted(rows, key=lambda row: -(row.final.mean + row.area.mean))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


# ---------------------------------------------------------------------------------------------------------------------
# Figures


@dataclass(frozen=True)
class Figure:
    """A PNG in the report's folder and what the page says around it."""

    file: str
    title: str
    caption: str


def draw(runs: Sequence[Run], rows: Sequence[Row], out: Path) -> list[Figure]:
    """Write the PNGs. Returns them in the order of the page."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
        }
    )
    methods = [row.method for row in rows]
    palette = plt.get_cmap("tab10")
    colour = {method: palette(i % 10) for i, method in enumerate(sorted(methods))}
    figures: list[Figure] = []

    def save(figure: Any, name: str, title: str, caption: str) -> None:
        figure.tight_layout()
        figure.savefig(out / f"{name}.png")
        plt.close(figure)
        figures.append(Figure(f"{name}.png", title, caption))

    figure, axis = plt.subplots(figsize=(8, 4.5))
    for method in methods:
        points = _by_step([run.curve for run in runs if run.method == method])
        bands = [t_interval(values) for values in points.values()]
        steps = list(points)
        count = max(b.count for b in bands)
        axis.plot(steps, [b.mean for b in bands], "o-", ms=3, color=colour[method], label=f"{method} (n={count})")
        if all(b.low is not None for b in bands):
            low, high = [b.low for b in bands], [b.high for b in bands]
            axis.fill_between(steps, low, high, color=colour[method], alpha=0.12, lw=0)
    axis.set(xlabel="training step", ylabel="held-out accuracy (sampled)", ylim=(0, 1))
    axis.legend(fontsize=8, loc="lower right")
    save(
        figure,
        "learning_curves",
        "Learning curves",
        "Mean over seeds; the band is the 95% t interval at each validated step.",
    )

    compared = [row for row in rows if row.final_difference is not None]
    if compared:
        figure, axes = plt.subplots(1, 2, figsize=(10, 1.2 + 0.45 * len(compared)), sharey=True)
        for axis, what in zip(axes, ("final", "area"), strict=True):
            for y, row in enumerate(reversed(compared)):
                difference = getattr(row, f"{what}_difference")
                dots = [100 * d for d in difference.by_seed.values()]
                axis.plot(dots, [y + 0.2] * len(dots), "o", ms=4, alpha=0.5, color=colour[row.method])
                interval = difference.interval
                if interval.low is not None:
                    axis.plot([100 * interval.low, 100 * interval.high], [y, y], color=colour[row.method], lw=3)
                axis.plot([100 * interval.mean], [y], "D", ms=6, color=colour[row.method])
            axis.axvline(0, color="black", lw=0.8)
            axis.set_yticks(range(len(compared)), [row.method for row in reversed(compared)])
            axis.set_ylim(-0.6, len(compared) - 0.4)
            axis.set_xlabel(
                f"{'final accuracy' if what == 'final' else 'area under the curve'}, points over {BASELINE}"
            )
        save(
            figure,
            "paired_differences",
            f"Against {BASELINE}, seed by seed",
            f"Each dot is one seed: the method minus {BASELINE} on the same seed. Diamond: mean; bar: 95% bootstrap "
            "interval of the mean.",
        )

    indices = sorted(
        {
            int(key.rsplit("/t", 1)[1])
            for run in runs
            for line in run.lines
            for key in line["metrics"]
            if key.startswith("gtpo/by_turn/advantage/mean/t")
        }
    )
    if indices:
        columns = min(3, len(methods))
        height = -(-len(methods) // columns)
        shape = (3.4 * columns, 2.5 * height + 0.3)
        figure, grid = plt.subplots(height, columns, figsize=shape, sharex=True, sharey=True, squeeze=False)
        shades = plt.get_cmap("viridis")
        for axis, method in zip(grid.flat, methods, strict=False):
            for k in indices:
                name = f"gtpo/by_turn/advantage/mean/t{k}"
                points = _by_step([run.series(name) for run in runs if run.method == method])
                steps, means = list(points), [statistics.fmean(v) for v in points.values()]
                axis.plot(steps, _smooth(means), lw=1.4, color=shades(k / max(1, indices[-1])), label=f"turn {k + 1}")
            axis.axhline(0, color="black", lw=0.6)
            axis.set_title(method, fontsize=9)
        for axis in grid.flat[len(methods) :]:
            axis.set_visible(False)
        grid[0][0].legend(fontsize=7, ncols=2)
        figure.supxlabel("training step", fontsize=9)
        figure.supylabel("mean advantage of the turn", fontsize=9)
        save(
            figure,
            "credit_by_turn",
            "Credit by turn",
            "Where credit went: mean advantage of each turn index over the trajectories that have it (running mean of "
            "five steps). An outcome-only method gives all turns of a trajectory the same.",
        )

    figure, axes = plt.subplots(1, 3, figsize=(11, 1.4 + 0.35 * len(methods)), sharey=True)
    panels = (
        ("gtpo/groups/unsolved_signal/mean", "mean |advantage| in groups\nthat nobody solved"),
        ("gtpo/groups/all_solved_first_turn_advantage/mean", "first turn's advantage in\ngroups that all solved"),
        ("gtpo/groups/all_solved_last_turn_advantage/mean", "last turn's advantage in\ngroups that all solved"),
    )
    for axis, (metric, title) in zip(axes, panels, strict=True):
        for y, method in enumerate(reversed(methods)):
            value = _mean([run.mean(metric) for run in runs if run.method == method])
            axis.barh(y, value or 0.0, color=colour[method], alpha=0.8)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_yticks(range(len(methods)), list(reversed(methods)))
        axis.set_title(title, fontsize=9)
    save(
        figure,
        "group_signal",
        "Groups without a contrast",
        "What a method says to groups without a contrast in outcome: those that nobody solved (only format and "
        "closeness can differ there) and those that all solved (only length can).",
    )

    classes = sorted({name for run in runs for name in run.classes})
    if classes:
        figure, axis = plt.subplots(figsize=(max(8, 0.9 * len(classes)), 3.6))
        width = 0.8 / len(methods)
        for i, method in enumerate(methods):
            members = [run for run in runs if run.method == method]
            heights = [_mean([run.classes.get(name) for run in members]) or 0.0 for name in classes]
            offsets = [x - 0.4 + width * (i + 0.5) for x in range(len(classes))]
            axis.bar(offsets, heights, width, color=colour[method], label=method)
        axis.set_xticks(range(len(classes)), classes, rotation=30, ha="right", fontsize=8)
        axis.set_ylabel("final accuracy")
        axis.legend(fontsize=7, ncols=3)
        save(figure, "problem_classes", "Problem classes", "Final held-out accuracy by problem class, mean over seeds.")
    return figures


def _by_step(series: Sequence[Mapping[int, float]]) -> dict[int, list[float]]:
    """Step -> the values of all runs that have it, in step order."""
    steps = sorted({step for one in series for step in one})
    return {step: [one[step] for one in series if step in one] for step in steps}


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


# ---------------------------------------------------------------------------------------------------------------------
# Page

HEADERS = (
    "method",
    "seeds",
    "final accuracy",
    "area",
    "final over grpo, points",
    "wins-losses, p",
    "steps to {threshold:g}",
    "turns",
    "tool errors",
    "first-turn call",
    "s / step",
    "step time / grpo's",
)


def cells(row: Row) -> list[str]:
    """The row as text, in the order of HEADERS."""
    difference = row.final_difference
    return [
        row.method,
        str(len(row.seeds)),
        _plus_minus(row.final),
        _plus_minus(row.area),
        "" if difference is None else _points(difference.interval),
        "" if difference is None else f"{difference.wins}-{difference.losses}, {difference.p_value:.2g}",
        "not reached" if row.reached is None else f"{row.reached:g}",
        _number(row.turns, 2),
        _number(row.tool_error, 3),
        _number(row.first_turn_call, 3),
        _number(row.step_seconds, 2),
        _number(row.step_cost, 3),
    ]


def _plus_minus(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} ± {(interval.high - interval.low) / 2:.3f}"


def _points(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{100 * interval.mean:+.1f}"
    return f"{100 * interval.mean:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def headers(threshold: float) -> list[str]:
    return [h.format(threshold=threshold) for h in HEADERS]


def markdown(rows: Sequence[Row], threshold: float) -> str:
    lines = [headers(threshold), ["---"] * len(HEADERS), *map(cells, rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def verdict(rows: Sequence[Row]) -> str:
    """One sentence a method, in words that follow from the interval alone."""
    said = []
    for row in rows:
        d = row.final_difference
        if d is None or d.interval.low is None or d.interval.high is None:
            continue
        if d.interval.low > 0:
            what = f"better than {BASELINE}"
        elif d.interval.high < 0:
            what = f"worse than {BASELINE}"
        else:
            what = f"not told apart from {BASELINE}"
        if d.interval.count < CLAIM_SEEDS and d.interval.low * d.interval.high > 0:
            what += " here, on too few seeds for a claim"
        said.append(f"{row.method}: {what} ({_points(d.interval)} points, {d.interval.count} seeds)")
    return "; ".join(said) + "." if said else f"No method shares two seeds with {BASELINE}: nothing can be said."


def _table(rows: Sequence[Row], threshold: float) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headers(threshold))
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells(row)) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e21; max-width: 1060px; margin: 2.5rem auto; padding: 0 1.2rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; display: block }
table { overflow-x: auto }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #e3e5e8; text-align: right; white-space: nowrap }
th { vertical-align: bottom; white-space: normal; color: #5a6068; font-weight: 600 }
th:first-child, td:first-child { text-align: left; font-weight: 600 }
figure { margin: 0 0 1.2rem } img { max-width: 100% } figcaption, .quiet { color: #5a6068; font-size: 13px }
pre { background: #f5f6f7; padding: .8rem; overflow-x: auto; font-size: 12px } summary { cursor: pointer }
"""


def _figure(figure: Figure, out: Path) -> str:
    image = base64.b64encode((out / figure.file).read_bytes()).decode()
    return (
        f"<h2>{html.escape(figure.title)}</h2><figure>"
        f'<img alt="{html.escape(figure.title)}" src="data:image/png;base64,{image}">'
        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>"
    )


def page(runs: Sequence[Run], rows: Sequence[Row], figures: Sequence[Figure], out: Path, threshold: float) -> str:
    """The self-contained HTML page."""
    first = runs[0]
    commits = ", ".join(sorted({str(run.start.get("commit")) for run in runs}))
    machines = "; ".join(sorted({f"{r.start.get('machine')}, {r.start.get('cores')} cores" for r in runs}))
    commands = "\n".join(sorted(command_of(run) for run in runs))
    costs = "; ".join(
        f"{row.method}: step {row.step_cost:.3f}x, advantage phase {100 * row.adv_cost:+.2f}% of a step"
        for row in rows
        if row.step_cost is not None and row.adv_cost is not None and row.method != BASELINE
    )
    body = "".join(_figure(figure, out) for figure in figures)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{html.escape(first.task)}: {len(rows)} methods</title><style>{_STYLE}</style>
<h1>{html.escape(first.task)}: {len(rows)} methods, {len(runs)} runs</h1>
<p class="quiet">engine {html.escape(first.engine)}, {max(first.curve)} steps, commit {html.escape(commits)};
{html.escape(machines)}</p>
<p>{html.escape(verdict(rows))}</p>
<h2>Table</h2>{_table(rows, threshold)}
<p class="quiet">Mean over seeds ± half of the 95% t interval. Area: mean height of the learning curve. Differences
are paired by seed, with a 95% bootstrap interval and a two-sided sign test. Rows are in the order of final accuracy and
area together.</p>
{body}
<h2>Cost of a step</h2><p>{html.escape(costs) or "No seed in common with the baseline."}</p>
<p class="quiet">Median over steps and common seeds, everything else equal. The step time holds the rollout's own noise
(other samples, other lengths); the advantage phase is what the method itself costs.</p>
<h2>Commands</h2><p class="quiet">OUT is the folder of all runs.</p>
<details><summary>{len(runs)} runs</summary><pre>{html.escape(commands)}</pre></details>
</html>
"""


def command_of(run: Run) -> str:
    """The command that made the run, to be given in the repository again; OUT is the folder that the run's is in."""
    program, *arguments = run.start["command"]
    name = "python benchmarks/twin.py" if program.endswith("twin.py") else "python -m recipe.gtpo.main"
    return f"{name} {shlex.join(arguments)}".replace(str(run.dir.resolve().parent), "OUT")


def write_report(paths: Sequence[Path], out: Path, threshold: float) -> list[Row]:
    """Everything of the module's docstring. Returns the rows of the table."""
    runs = load_runs(paths)
    rows = make_rows(runs, threshold)
    out.mkdir(parents=True, exist_ok=True)
    figures = draw(runs, rows, out)
    (out / "table.md").write_text(markdown(rows, threshold))
    facts = {
        "task": runs[0].task,
        "engine": runs[0].engine,
        "steps": max(runs[0].curve),
        "threshold": threshold,
        "rows": rows,
        "runs": [
            {
                "method": r.method,
                "seed": r.seed,
                "curve": r.curve,
                "classes": r.classes,
                "commit": r.start.get("commit"),
                "command": command_of(r),
            }
            for r in runs
        ],
    }
    (out / "report.json").write_text(json.dumps(facts, indent=1, default=lambda o: o.__dict__))
    (out / "index.html").write_text(page(runs, rows, figures, out, threshold))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of run folders")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--threshold", type=float, default=0.5, help="accuracy of `steps to`")
    args = parser.parse_args()
    try:
        rows = write_report(args.runs, args.out, args.threshold)
    except ValueError as e:
        print(f"report: error: {e}", file=sys.stderr)
        return 1
    print(markdown(rows, args.threshold))
    print(verdict(rows))
    print(f"report: {args.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
