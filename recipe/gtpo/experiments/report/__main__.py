"""Compare finished runs: `python -m recipe.gtpo.experiments.report RUNS... -o report/`.

RUNS are run folders, or folders of run folders (what `recipe.gtpo.experiments.compare` leaves). Writes `index.html`
(self-contained), the same figures as PNG, the table as `table.md`, and every number as `report.json`.

Everything is read from the runs' own records. Accuracy is the raw outcome on held-out problems, sampled as the run's
config says (temperature 1 by default). Runs at several horizons (longest number of dependent tool calls) are compared
within each, with an overview across them.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import integrate, stats

from recipe.gtpo.run.progress import validation_accuracy, validation_mean
from recipe.gtpo.run.record import RunRecord

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
    horizon: int | None  # None: the task has none, or the record is older than the knob
    seed: int
    lines: list[dict[str, Any]]  # metrics.jsonl
    start: dict[str, Any]  # the last entry of versions.json

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Raises ValueError for a run without a validation before and after training."""
        record = RunRecord(folder)
        summary = json.loads((folder / "summary.json").read_text())
        starts = json.loads((folder / "versions.json").read_text())
        run = cls(
            dir=folder,
            method=summary["method"],
            task=summary["task"],
            engine=summary.get("engine", "verl"),
            horizon=summary.get("horizon"),
            seed=summary["seed"],
            lines=record.read_metrics(),
            start=starts[-1],
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
        ValueError: there is none, one is given twice, or they are not comparable (task, engine, number of steps; some
            name a horizon and some do not).
    """
    folders: list[Path] = []
    for path in paths:
        found = [path] if (path / "summary.json").exists() else sorted(p.parent for p in path.glob("*/summary.json"))
        if not found:
            raise ValueError(f"{path}: no finished run (no summary.json in it or in its folders)")
        folders += found
    runs = [Run.load(folder) for folder in folders]
    seen: dict[tuple[str, int | None, int], Run] = {}
    for run in runs:
        other = seen.setdefault((run.method, run.horizon, run.seed), run)
        if other is not run:
            at = "" if run.horizon is None else f" at horizon {run.horizon}"
            raise ValueError(f"{run.dir} and {other.dir} are both {run.method} with seed {run.seed}{at}")
        if (run.horizon is None) != (runs[0].horizon is None):
            without, known = sorted((run, runs[0]), key=lambda r: r.horizon is not None)
            raise ValueError(f"{without.dir} does not say its horizon, {known.dir} does: they cannot be compared")
        for what in ("task", "engine"):
            if getattr(run, what) != getattr(runs[0], what):
                raise ValueError(f"{run.dir} and {runs[0].dir} differ in {what}: they cannot be compared")
        if max(run.curve) != max(runs[0].curve):
            raise ValueError(
                f"{run.dir} ends at step {max(run.curve)}, {runs[0].dir} at {max(runs[0].curve)}: not comparable"
            )
    return runs


def by_horizon(runs: Sequence[Run]) -> dict[int | None, list[Run]]:
    """The runs that may be compared with each other, shortest horizon first."""
    groups: dict[int | None, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda r: r.horizon or 0):
        groups[run.horizon].append(run)
    return dict(groups)


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
    """One method at one horizon in the table."""

    method: str
    horizon: int | None
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
    """One row a method and horizon; within a horizon the best mean of final accuracy and area first."""
    return [row for members in by_horizon(runs).values() for row in _rows(members, threshold)]


def _rows(runs: Sequence[Run], threshold: float) -> list[Row]:
    """Of one horizon."""
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
                horizon=runs[0].horizon,
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

_MEASURES = {"final": "final accuracy", "area": "area"}
_BASELINE_COLOUR = "#3b4048"
_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7b4fa3", "#8c564b", "#6b8e23", "#c2185b",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A PNG in the report's folder and what the page says around it."""

    file: str
    width: int  # on the page, in pixels
    title: str
    caption: str


@dataclass(frozen=True)
class Sheet:
    """Where the figures of a section go. A method has the same colour in all of them."""

    out: Path
    methods: Sequence[str]
    prefix: str = ""

    def colour(self, method: str) -> str:
        others = sorted(set(self.methods) - {BASELINE})
        return _BASELINE_COLOUR if method == BASELINE else _COLOURS[others.index(method) % len(_COLOURS)]

    def panels(self, height: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Any, Any]:
        """A figure and its (height, columns) axes."""
        import matplotlib  # only who draws pays for the import

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        look = {"spines.top": False, "spines.right": False, "grid": True, "titlesize": 10, "axisbelow": True}
        plt.rc("axes", **look)
        plt.rc("grid", alpha=0.25)
        plt.rc("figure", dpi=130)
        plt.rc("legend", frameon=False, fontsize=9)
        return plt.subplots(height, columns, figsize=size, squeeze=False, layout="constrained", **shared)

    def grid(self, count: int) -> tuple[Any, list[Any]]:
        """A figure and its `count` equal axes, at most three side by side."""
        columns = min(3, count)
        height = -(-count // columns)
        size = (10 if columns > 1 else 7, 0.6 + {1: 3.6, 2: 3.2, 3: 2.6}[columns] * height)
        figure, axes = self.panels(height, columns, size, sharex=True, sharey=True)
        for axis in axes.flat[count:]:
            axis.set_visible(False)
        for axis in axes.flat[max(0, count - columns) : count]:
            axis.tick_params(labelbottom=True)  # where the panel below is empty, too
        return figure, list(axes.flat[:count])

    def save(self, figure: Any, name: str, title: str, caption: str) -> Figure:
        import matplotlib.pyplot as plt

        file = f"{self.prefix}{name}.png"
        figure.savefig(self.out / file)
        plt.close(figure)
        return Figure(file, round(100 * figure.get_figwidth()), title, caption)


def draw(runs: Sequence[Run], rows: Sequence[Row], sheet: Sheet) -> list[Figure]:
    """Write the PNGs of one horizon. Returns them in the order of the page."""
    figures = (_learning_curves, _paired_differences, _credit_by_turn, _group_signal, _problem_classes)
    return [made for figure in figures if (made := figure(runs, rows, sheet)) is not None]


def draw_overview(rows: Sequence[Row], sheet: Sheet) -> list[Figure]:
    """The same for what only several horizons show."""
    figures = (_differences_by_horizon, _accuracy_by_horizon)
    return [made for figure in figures if (made := figure(rows, sheet)) is not None]


def _learning_curves(runs: Sequence[Run], rows: Sequence[Row], sheet: Sheet) -> Figure:
    seeds = {row.method: len(row.seeds) for row in rows}
    shown = [method for method in seeds if method != BASELINE] or [BASELINE]
    figure, axes = sheet.grid(len(shown))
    for axis, method in zip(axes, shown, strict=True):
        for name in dict.fromkeys([m for m in (BASELINE, method) if m in seeds]):
            points = _by_step([run.curve for run in runs if run.method == name])
            bands = [t_interval(values) for values in points.values()]
            label = f"{name} (n={seeds[name]})"
            axis.plot(list(points), [b.mean for b in bands], "o-", ms=3, color=sheet.colour(name), label=label)
            if all(b.low is not None for b in bands):
                low, high = [b.low for b in bands], [b.high for b in bands]
                axis.fill_between(list(points), low, high, color=sheet.colour(name), alpha=0.14, lw=0)
        axis.set_title(f"{method} (n={seeds[method]})", color=sheet.colour(method))
    axes[0].set_ylim(0, min(1.0, axes[0].get_ylim()[1]))
    if BASELINE in seeds and shown != [BASELINE]:
        lines, labels = axes[0].get_legend_handles_labels()
        figure.legend(lines[:1], [f"{labels[0]}, in every panel"], loc="outside upper right")
    figure.supxlabel("training step", fontsize=10)
    figure.supylabel("held-out accuracy (sampled)", fontsize=10)
    return sheet.save(
        figure,
        "learning_curves",
        "Learning curves",
        "Mean over seeds at each validated step; the band is the 95% t interval of that mean. It holds how much seeds "
        "differ, which is much the same for all methods: bands that overlap do not show that two methods are alike. "
        "The paired differences leave that part out.",
    )


def _paired_differences(runs: Sequence[Run], rows: Sequence[Row], sheet: Sheet) -> Figure | None:
    compared = [row for row in reversed(rows) if row.final_difference is not None]
    labels = [f"{row.method} (n={len(row.final_difference.by_seed)})" for row in compared if row.final_difference]
    if not compared:
        return None
    figure, axes = sheet.panels(1, 2, (10, 1.1 + 0.45 * len(compared)), sharex=True, sharey=True)
    for axis, (what, label) in zip(axes.flat, _MEASURES.items(), strict=True):
        for y, row in enumerate(compared):
            difference: Paired = getattr(row, f"{what}_difference")
            colour, interval = sheet.colour(row.method), difference.interval
            dots = [100 * d for d in difference.by_seed.values()]
            axis.plot(dots, [y + 0.22] * len(dots), "o", ms=4, alpha=0.5, mew=0, color=colour)
            if interval.low is not None and interval.high is not None:
                axis.plot([100 * interval.low, 100 * interval.high], [y, y], color=colour, lw=3)
            axis.plot([100 * interval.mean], [y], "D", ms=6, color=colour)
        axis.axvline(0, color=_BASELINE_COLOUR, lw=0.9)
        axis.set_yticks(range(len(compared)), labels)
        axis.set_ylim(-0.6, len(compared) - 0.4)
        axis.set_xlabel(f"{label}, points over {BASELINE}")
    return sheet.save(
        figure,
        "paired_differences",
        f"Against {BASELINE}, seed by seed",
        f"Each dot is one seed: the method minus {BASELINE} on the same seed. Diamond: mean; bar: 95% bootstrap "
        "interval of the mean. n is the number of seeds in common; with few, the bar is shorter than it should be.",
    )


def _credit_by_turn(runs: Sequence[Run], rows: Sequence[Row], sheet: Sheet) -> Figure | None:
    name = "gtpo/by_turn/advantage/mean/t"
    found = {key for run in runs for line in run.lines for key in line["metrics"] if key.startswith(name)}
    indices = sorted(int(key.removeprefix(name)) for key in found)
    if not indices:
        return None
    import matplotlib

    figure, axes = sheet.grid(len(rows))
    shades = [matplotlib.colormaps["viridis"](0.9 * k / max(1, indices[-1])) for k in indices]
    for axis, row in zip(axes, rows, strict=True):
        for k, shade in zip(indices, shades, strict=True):
            points = _by_step([run.series(f"{name}{k}") for run in runs if run.method == row.method])
            means = _smooth([statistics.fmean(v) for v in points.values()])
            axis.plot(list(points), means, lw=1.4, color=shade, label=f"turn {k + 1}")
        axis.axhline(0, color=_BASELINE_COLOUR, lw=0.7)
        axis.set_title(row.method)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(9, len(indices)))
    figure.supxlabel("training step", fontsize=10)
    figure.supylabel("mean advantage of the turn", fontsize=10)
    return sheet.save(
        figure,
        "credit_by_turn",
        "Credit by turn",
        "Where credit went: mean advantage of each turn index over the trajectories that have it (running mean of five "
        "steps, mean over seeds). Few trajectories have the last turns, so their lines are noisy; long "
        "conversations are also the ones where something went wrong. An outcome-only method gives all turns of a "
        "trajectory the same.",
    )


def _group_signal(runs: Sequence[Run], rows: Sequence[Row], sheet: Sheet) -> Figure:
    panels = {
        "gtpo/groups/unsolved_signal/mean": "mean |advantage| in groups\nthat nobody solved",
        "gtpo/groups/all_solved_first_turn_advantage/mean": "first turn's advantage in\ngroups that all solved",
        "gtpo/groups/all_solved_last_turn_advantage/mean": "last turn's advantage in\ngroups that all solved",
    }
    methods = [row.method for row in reversed(rows)]
    figure, axes = sheet.panels(1, 3, (10, 1.2 + 0.34 * len(methods)), sharey=True)
    for axis, (metric, title) in zip(axes.flat, panels.items(), strict=True):
        values = [_mean([run.mean(metric) for run in runs if run.method == method]) for method in methods]
        for y, (method, value) in enumerate(zip(methods, values, strict=True)):
            axis.barh(y, value or 0.0, 0.65, color=sheet.colour(method), alpha=0.85)
            said = " no such group" if value is None else f" {value:.2f} "
            axis.annotate(said, (value or 0.0, y), va="center", ha="right" if (value or 0) < 0 else "left", fontsize=8)
        axis.axvline(0, color=_BASELINE_COLOUR, lw=0.9)
        axis.margins(x=0.3)
        if not any(value is not None for value in values):
            axis.set_xticks([])  # no scale where there is nothing
        axis.tick_params(axis="x", labelsize=9)
        axis.set_yticks(range(len(methods)), methods)
        axis.set_title(title)
    return sheet.save(
        figure,
        "group_signal",
        "Groups without a contrast",
        "What a method says to groups without a contrast in outcome: those that nobody solved (only format and "
        "closeness can differ there) and those that all solved (only length can). Mean over the training steps that "
        "had such a group, then over seeds.",
    )


def _problem_classes(runs: Sequence[Run], rows: Sequence[Row], sheet: Sheet) -> Figure | None:
    """A table of accuracies, shaded by the difference from the baseline."""
    tables = {row.method: _class_means([run.classes for run in runs if run.method == row.method]) for row in rows}
    classes = sorted({name for table in tables.values() for name in table})
    if not classes:
        return None
    values = np.array([[100 * tables[row.method].get(name, np.nan) for name in classes] for row in rows])
    base = tables.get(BASELINE, {})
    gains = values - [100 * base.get(name, np.nan) for name in classes]
    size = (max(4.5, min(10, 2.6 + 0.75 * len(classes))), 1.0 + 0.34 * len(rows))
    figure, axes = sheet.panels(1, 1, size)
    axis = axes[0, 0]
    shades = np.clip(np.nan_to_num(gains), -15, 15)
    axis.imshow(shades, cmap="RdBu", vmin=-25, vmax=25, aspect="auto")  # pale enough for the numbers
    for (y, x), value in np.ndenumerate(values):
        if not np.isnan(value):
            axis.annotate(f"{value:.0f}", (x, y), ha="center", va="center", fontsize=9)
    axis.set_xticks(range(len(classes)), classes, rotation=0 if len(classes) < 8 else 30, ha="center")
    axis.set_yticks(range(len(rows)), [row.method for row in rows])
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    return sheet.save(
        figure,
        "problem_classes",
        "Problem classes",
        f"Final held-out accuracy in percent by problem class, mean over seeds. Blue: above {BASELINE}, red: below; "
        "the colour stops at 15 points. A class has fewer problems than the whole, so its numbers are noisier: no "
        "intervals are given and none of them is a claim.",
    )


def _class_means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Over the runs that have the class."""
    names = dict.fromkeys(name for one in found for name in one)
    return {name: statistics.fmean(one[name] for one in found if name in one) for name in names}


def _horizons(rows: Sequence[Row]) -> list[int]:
    return sorted({row.horizon for row in rows if row.horizon is not None})


def _lines_over_horizons(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row], list[float]]]:
    """A method, its rows by horizon, and their places on the x axis: side by side rather than on top of each other."""
    methods = sorted({row.method for row in rows})
    for i, method in enumerate(methods):
        line = [row for row in rows if row.method == method]
        yield (
            method,
            line,
            [row.horizon + 0.4 * ((i + 0.5) / len(methods) - 0.5) for row in line if row.horizon is not None],
        )


def _differences_by_horizon(rows: Sequence[Row], sheet: Sheet) -> Figure | None:
    compared = [row for row in rows if row.final_difference is not None]
    if not compared:
        return None
    figure, axes = sheet.panels(1, 2, (10, 4.2), sharex=True, sharey=True)
    for axis, (what, label) in zip(axes.flat, _MEASURES.items(), strict=True):
        for method, line, x in _lines_over_horizons(compared):
            found = [getattr(row, f"{what}_difference").interval for row in line]
            mean = [100 * i.mean for i in found]
            low = [100 * (i.mean - (i.mean if i.low is None else i.low)) for i in found]
            high = [100 * ((i.mean if i.high is None else i.high) - i.mean) for i in found]
            axis.errorbar(
                x, mean, (low, high), fmt="o-", ms=5, lw=1.4, elinewidth=2, color=sheet.colour(method), label=method
            )
        axis.axhline(0, color=_BASELINE_COLOUR, lw=0.9)
        axis.set(title=label, xlabel="horizon", xticks=_horizons(rows))
    axes[0, 0].set_ylabel(f"points over {BASELINE}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return sheet.save(
        figure,
        "differences_by_horizon",
        f"Against {BASELINE}, by horizon",
        f"The method minus {BASELINE} on the same seeds and the same horizon: mean and its 95% bootstrap interval "
        "(none with a single seed). Lines only join a method's points. Methods are set a little apart to be seen.",
    )


def _accuracy_by_horizon(rows: Sequence[Row], sheet: Sheet) -> Figure:
    figure, axes = sheet.panels(1, 1, (7, 3.6))
    axis = axes[0, 0]
    for method, line, x in _lines_over_horizons(rows):
        axis.plot(x, [row.final.mean for row in line], "o-", ms=5, color=sheet.colour(method), label=method)
        axis.plot(x, [row.start for row in line], "o--", ms=5, mfc="white", lw=1, color=sheet.colour(method))
    axis.set(xlabel="horizon", ylabel="held-out accuracy", xticks=_horizons(rows))
    axis.set_ylim(0, min(1.0, axis.get_ylim()[1]))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    return sheet.save(
        figure,
        "accuracy_by_horizon",
        "Start and end, by horizon",
        "Mean held-out accuracy over seeds, before training (hollow, dashed) and at the end (filled). A horizon has "
        "its own problems and starting policies: heights at two horizons differ for more reasons than the method.",
    )


def _by_step(series: Sequence[Mapping[int, float]]) -> dict[int, list[float]]:
    """Step -> the values of all runs that have it, in step order."""
    steps = sorted({step for one in series for step in one})
    return {step: [one[step] for one in series if step in one] for step in steps}


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


# ---------------------------------------------------------------------------------------------------------------------
# Page

Column = tuple[str, Callable[[Row], str]]

_NAMES: tuple[Column, ...] = (
    ("horizon", lambda row: str(row.horizon)),  # only where there are several
    ("method", lambda row: row.method),
    ("seeds", lambda row: str(len(row.seeds))),
)
_ACCURACY: tuple[Column, ...] = (
    ("final accuracy", lambda row: _plus_minus(row.final)),
    ("area", lambda row: _plus_minus(row.area)),
    (f"final over {BASELINE}, points", lambda row: _points(row.final_difference)),
    ("wins-losses, p", lambda row: _wins(row.final_difference)),
    (f"area over {BASELINE}, points", lambda row: _points(row.area_difference)),
    ("steps to {threshold:g}", lambda row: "not reached" if row.reached is None else f"{row.reached:g}"),
)
_BEHAVIOUR: tuple[Column, ...] = (
    ("turns", lambda row: _number(row.turns, "{:.2f}")),
    ("tool errors", lambda row: _number(row.tool_error, "{:.3f}")),
    ("first-turn call", lambda row: _number(row.first_turn_call, "{:.3f}")),
    ("s / step", lambda row: _number(row.step_seconds, "{:.2f}")),
    (f"step time / {BASELINE}'s", lambda row: _number(row.step_cost, "{:.3f}")),
    (f"advantage phase over {BASELINE}'s, % of a step", lambda row: _number(row.adv_cost, "{:+.2%}").rstrip("%")),
)


def tabulate(rows: Sequence[Row], columns: Sequence[Column], threshold: float) -> list[list[str]]:
    """The header and one line a row, as text."""
    chosen = [*_NAMES[0 if _several(rows) else 1 :], *columns]
    return [[name.format(threshold=threshold) for name, _ in chosen], *([text(r) for _, text in chosen] for r in rows)]


def _several(rows: Sequence[Row]) -> bool:
    """Whether horizons have to be named."""
    return len({row.horizon for row in rows}) > 1


def _plus_minus(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} ± {(interval.high - interval.low) / 2:.3f}"


def _points(difference: Paired | None) -> str:
    if difference is None:
        return ""
    interval = difference.interval
    if interval.low is None or interval.high is None:
        return f"{100 * interval.mean:+.1f}"
    return f"{100 * interval.mean:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def _wins(difference: Paired | None) -> str:
    return "" if difference is None else f"{difference.wins}-{difference.losses}, {difference.p_value:.2g}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def markdown(rows: Sequence[Row], threshold: float) -> str:
    head, *body = tabulate(rows, [*_ACCURACY, *_BEHAVIOUR], threshold)
    return "".join("| " + " | ".join(line) + " |\n" for line in [head, ["---"] * len(head), *body])


def verdicts(rows: Sequence[Row]) -> list[str]:
    """One sentence a method and horizon, in words that follow from the interval of the final accuracy alone."""
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
        name = f"{row.method} at horizon {row.horizon}" if _several(rows) else row.method
        said.append(f"{name}: {what} ({_points(d)} points, {d.interval.count} seeds)")
    return said or [f"No method shares two seeds with {BASELINE}: nothing can be said"]


def verdict(rows: Sequence[Row]) -> str:
    return "; ".join(verdicts(rows)) + "."


def _table(rows: Sequence[Row], columns: Sequence[Column], threshold: float) -> str:
    """A horizon is a <tbody>."""
    head, *lines = tabulate(rows, columns, threshold)
    parts: dict[int | None, str] = defaultdict(str)
    for row, line in zip(rows, lines, strict=True):
        parts[row.horizon] += _line("td", line, head)
    body = "".join(f"<tbody>{part}</tbody>" for part in parts.values())
    return f'<div class="wide"><table><thead>{_line("th", head, head)}</thead>{body}</table></div>'


def _line(tag: str, texts: Sequence[str], head: Sequence[str]) -> str:
    kinds = (' class="name"' if name == "method" else "" for name in head)
    return "<tr>" + "".join(f"<{tag}{k}>{html.escape(t)}</{tag}>" for t, k in zip(texts, kinds, strict=True)) + "</tr>"


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    figures: Sequence[Figure]


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e21; max-width: 1060px; margin: 2.5rem auto; padding: 0 1.2rem }
h1 { font-size: 1.6rem; line-height: 1.25; margin-bottom: .3rem }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .6rem; padding-top: .7rem; border-top: 1px solid #d5d8dc }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .5rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #e3e5e8; text-align: right; white-space: nowrap }
th { vertical-align: bottom; white-space: normal; color: #5a6068; font-weight: 600; max-width: 9rem }
.name { text-align: left; font-weight: 600; position: sticky; left: 0; background: #fff }
tbody + tbody { border-top: 2px solid #aab0b8 }
figure { margin: 0 0 1.2rem } img { max-width: 100%; height: auto }
figcaption, .quiet { color: #5a6068; font-size: 13px; max-width: 52rem }
ul { padding-left: 1.2rem } nav a { margin-right: .9rem }
pre { background: #f5f6f7; padding: .8rem; overflow-x: auto; font-size: 12px } summary { cursor: pointer }
"""


def _figure(figure: Figure, out: Path) -> str:
    image = base64.b64encode((out / figure.file).read_bytes()).decode()
    return (
        f"<h3>{html.escape(figure.title)}</h3><figure>"
        f'<img alt="{html.escape(figure.title)}" width="{figure.width}" src="data:image/png;base64,{image}">'
        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>"
    )


def page(runs: Sequence[Run], rows: Sequence[Row], sections: Sequence[Section], out: Path, threshold: float) -> str:
    """The self-contained HTML page."""
    first = runs[0]
    commits = ", ".join(sorted({str(run.start.get("commit")) for run in runs}))
    machines = "; ".join(sorted({f"{r.start.get('machine')}, {r.start.get('cores')} cores" for r in runs}))
    commands = "\n".join(sorted(command_of(run) for run in runs))
    methods, seeds = {run.method for run in runs}, {run.seed for run in runs}
    horizons = [str(horizon) for horizon in by_horizon(runs) if horizon is not None]
    at = f", horizon{'s' * (len(horizons) > 1)} {', '.join(horizons)}" if horizons else ""
    title = f"{first.task}: {len(methods)} methods{at}"
    within = " within a horizon" if len(horizons) > 1 else ""
    intervals = 2 * sum(row.final_difference is not None for row in rows)
    links = "".join(f'<a href="#s{i}">{html.escape(part.title)}</a>' for i, part in enumerate(sections))
    body = "".join(
        f'<h2 id="s{i}">{html.escape(part.title)}</h2>' + "".join(_figure(figure, out) for figure in part.figures)
        for i, part in enumerate(sections)
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{_STYLE}</style>
<h1>{html.escape(title)}</h1>
<p class="quiet">{len(runs)} runs, {len(seeds)} seeds, {max(first.curve)} steps, engine {html.escape(first.engine)},
commit {html.escape(commits)}; {html.escape(machines)}</p>
<p><b>How to read this.</b> Accuracy is the share of held-out problems that a sampled trajectory solves. A method is
compared with {BASELINE} seed by seed{within}. It differs where the 95% interval of that difference leaves 0 out; a
claim also takes {CLAIM_SEEDS} seeds. By chance alone about one such interval in twenty leaves 0 out, and this page
has {intervals}.</p>
<ul>{"".join(f"<li>{html.escape(said)}</li>" for said in verdicts(rows))}</ul>
<nav>{links if len(sections) > 1 else ""}</nav>
<h2>Accuracy</h2>{_table(rows, _ACCURACY, threshold)}
<p class="quiet">Mean over seeds ± half of the 95% t interval. Area: mean height of the learning curve. Differences
are paired by seed, with a 95% bootstrap interval of the mean; wins, losses and the two-sided sign test are of the final
accuracy. Rows{within} are in the order of final accuracy and area together.</p>
<h2>Behaviour and cost</h2>{_table(rows, _BEHAVIOUR, threshold)}
<p class="quiet">Turns, share with a tool error and share whose first turn calls the tool: at the last validation. Times
are medians over steps, their ratios medians over common seeds. The step time holds the rollout's own noise (other
samples, other lengths) and whatever else ran on the machine; the advantage phase is what the method itself costs.</p>
{body}
<h2>Commands</h2><p class="quiet">OUT is the folder of all runs.</p>
<details><summary>{len(runs)} runs</summary><pre>{html.escape(commands)}</pre></details>
</html>
"""


def command_of(run: Run) -> str:
    """The command that made the run, to be given in the repository again; OUT is the folder that the run's is in."""
    program, *arguments = run.start["command"]
    module = "recipe.gtpo.experiments.twin" if "twin" in Path(program).stem else "recipe.gtpo.main"
    return f"python -m {module} {shlex.join(arguments)}".replace(str(run.dir.resolve().parent), "OUT")


def write_report(paths: Sequence[Path], out: Path, threshold: float) -> list[Row]:
    """Everything of the module's docstring. Returns the rows of the table."""
    runs = load_runs(paths)
    rows = make_rows(runs, threshold)
    out.mkdir(parents=True, exist_ok=True)
    methods = [row.method for row in rows]
    groups = by_horizon(runs)
    sections = [Section("Across horizons", draw_overview(rows, Sheet(out, methods)))] if len(groups) > 1 else []
    for horizon, members in groups.items():
        title, prefix = (f"Horizon {horizon}", f"h{horizon}_") if len(groups) > 1 else ("Figures", "")
        theirs = [row for row in rows if row.horizon == horizon]
        sections.append(Section(title, draw(members, theirs, Sheet(out, methods, prefix))))
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
                "horizon": r.horizon,
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
    (out / "index.html").write_text(page(runs, rows, sections, out, threshold))
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
