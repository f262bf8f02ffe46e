"""The figures of a report: what each shows, how it is drawn, and what the page says around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from recipe.gtpo.experiments.report.runs import Run, by_horizon
from recipe.gtpo.experiments.report.statistics import Interval, Paired, Row, baseline_of, mean_of_known, t_interval

_Key = TypeVar("_Key", int, str)
_Measure = Callable[[Row], Paired | None]

_MEASURES: dict[str, _Measure] = {
    "final accuracy": lambda row: row.final_difference,
    "area": lambda row: row.area_difference,
}
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
class Section:
    """The figures of one horizon, or across them, under a heading of the page."""

    title: str
    figures: Sequence[Figure]


@dataclass(frozen=True)
class Sheet:
    """Where the figures of a section go. A method has the same colour in all of them."""

    out: Path
    methods: Sequence[str]
    prefix: str = ""

    @property
    def baseline(self) -> str:
        return baseline_of(self.methods)

    def colour(self, method: str) -> str:
        others = sorted(set(self.methods) - {self.baseline})
        return _BASELINE_COLOUR if method == self.baseline else _COLOURS[others.index(method) % len(_COLOURS)]

    def panels(self, height: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Any, Any]:
        """A figure and its (height, columns) axes."""
        matplotlib.use("Agg")
        look = {"spines.top": False, "spines.right": False, "grid": True, "titlesize": 10, "axisbelow": True}
        plt.rc("axes", **look)
        plt.rc("grid", alpha=0.25)
        plt.rc("figure", dpi=130)
        plt.rc("legend", frameon=False, fontsize=9)
        return plt.subplots(height, columns, figsize=size, squeeze=False, layout="constrained", **shared)

    def grid_over_steps(self, count: int, height_label: str) -> tuple[Any, list[Any]]:
        """A figure and its `count` equal axes over the training steps, at most three side by side."""
        columns = min(3, count)
        height = -(-count // columns)
        size = (10 if columns > 1 else 7, 0.6 + {1: 3.6, 2: 3.2, 3: 2.6}[columns] * height)
        figure, axes = self.panels(height, columns, size, sharex=True, sharey=True)
        for axis in axes.flat[count:]:
            axis.set_visible(False)
        for axis in axes.flat[max(0, count - columns) : count]:
            axis.tick_params(labelbottom=True)  # where the panel below is empty, too
        figure.supxlabel("training step", fontsize=10)
        figure.supylabel(height_label, fontsize=10)
        return figure, list(axes.flat[:count])

    def save(self, figure: Any, name: str, title: str, caption: str) -> Figure:
        """Write the PNG, with the sheet's prefix before `name`, and close the figure."""
        file = f"{self.prefix}{name}.png"
        figure.savefig(self.out / file)
        plt.close(figure)
        return Figure(file, round(100 * figure.get_figwidth()), title, caption)


def draw_sections(runs: Sequence[Run], rows: Sequence[Row], out: Path) -> list[Section]:
    """Write all PNGs of a report into `out`: an overview where there are several horizons, then each of them."""
    methods = [row.method for row in rows]
    groups = by_horizon(runs)
    several = len(groups) > 1
    sections = [Section("Across horizons", _draw_overview(rows, Sheet(out, methods)))] if several else []
    for horizon, members in groups.items():
        title, prefix = (f"Horizon {horizon}", f"h{horizon}_") if several else ("Figures", "")
        theirs = [row for row in rows if row.horizon == horizon]
        sections.append(Section(title, _draw_horizon(members, theirs, Sheet(out, methods, prefix))))
    return sections


def _draw_horizon(runs: Sequence[Run], rows: Sequence[Row], sheet: Sheet) -> list[Figure]:
    """Write the PNGs of one horizon. Returns them in the order of the page."""
    figures = (_learning_curves, _paired_differences, _credit_by_turn, _group_signal, _problem_classes)
    return [made for figure in figures if (made := figure(runs, rows, sheet)) is not None]


def _draw_overview(rows: Sequence[Row], sheet: Sheet) -> list[Figure]:
    """The same for what only several horizons show."""
    figures = (_differences_by_horizon, _accuracy_by_horizon)
    return [made for figure in figures if (made := figure(rows, sheet)) is not None]


def _learning_curves(runs: Sequence[Run], rows: Sequence[Row], sheet: Sheet) -> Figure:
    seeds = {row.method: len(row.seeds) for row in rows}
    shown = [method for method in seeds if method != sheet.baseline] or [sheet.baseline]
    figure, axes = sheet.grid_over_steps(len(shown), "held-out accuracy (sampled)")
    for axis, method in zip(axes, shown, strict=True):
        for name in dict.fromkeys([m for m in (sheet.baseline, method) if m in seeds]):
            points = _collect([run.curve for run in runs if run.method == name])
            bands = [t_interval(values) for values in points.values()]
            ends = [band.ends for band in bands if band.ends is not None]
            label = f"{name} (n={seeds[name]})"
            axis.plot(list(points), [b.mean for b in bands], "o-", ms=3, color=sheet.colour(name), label=label)
            if len(ends) == len(bands):
                axis.fill_between(list(points), *zip(*ends, strict=True), color=sheet.colour(name), alpha=0.14, lw=0)
        axis.set_title(f"{method} (n={seeds[method]})", color=sheet.colour(method))
    axes[0].set_ylim(0, min(1.0, axes[0].get_ylim()[1]))
    if sheet.baseline in seeds and shown != [sheet.baseline]:
        lines, labels = axes[0].get_legend_handles_labels()
        figure.legend(lines[:1], [f"{labels[0]}, in every panel"], loc="outside upper right")
    return sheet.save(
        figure,
        "learning_curves",
        "Learning curves",
        "Mean over seeds at each validated step; the band is the 95% t interval of that mean. It holds how much seeds "
        "differ, which is much the same for all methods: bands that overlap do not show that two methods are alike. "
        "The paired differences leave that part out.",
    )


def _paired_differences(runs: Sequence[Run], rows: Sequence[Row], sheet: Sheet) -> Figure | None:
    labels = [f"{row.method} (n={len(d.by_seed)})" for row, d in _compared(reversed(rows))]
    if not labels:
        return None
    figure, axes = sheet.panels(1, 2, (10, 1.1 + 0.45 * len(labels)), sharex=True, sharey=True)
    for axis, (label, measure) in zip(axes.flat, _MEASURES.items(), strict=True):
        for y, (row, difference) in enumerate(_compared(reversed(rows), measure)):
            colour, interval = sheet.colour(row.method), difference.interval
            dots = [100 * d for d in difference.by_seed.values()]
            axis.plot(dots, [y + 0.22] * len(dots), "o", ms=4, alpha=0.5, mew=0, color=colour)
            if interval.ends is not None:
                axis.plot([100 * end for end in interval.ends], [y, y], color=colour, lw=3)
            axis.plot([100 * interval.mean], [y], "D", ms=6, color=colour)
        axis.axvline(0, color=_BASELINE_COLOUR, lw=0.9)
        axis.set_yticks(range(len(labels)), labels)
        axis.set_ylim(-0.6, len(labels) - 0.4)
        axis.set_xlabel(f"{label}, points over {sheet.baseline}")
    return sheet.save(
        figure,
        "paired_differences",
        f"Against {sheet.baseline}, seed by seed",
        f"Each dot is one seed: the method minus {sheet.baseline} on the same seed. Diamond: mean; bar: 95% bootstrap "
        "interval of the mean. n is the number of seeds in common; with few, the bar is shorter than it should be.",
    )


def _credit_by_turn(runs: Sequence[Run], rows: Sequence[Row], sheet: Sheet) -> Figure | None:
    name = "gtpo/by_turn/advantage/mean/t"
    found = {key for run in runs for line in run.lines for key in line["metrics"] if key.startswith(name)}
    indices = sorted(int(key.removeprefix(name)) for key in found)
    if not indices:
        return None
    figure, axes = sheet.grid_over_steps(len(rows), "mean advantage of the turn")
    shades = [matplotlib.colormaps["viridis"](0.9 * k / max(1, indices[-1])) for k in indices]
    for axis, row in zip(axes, rows, strict=True):
        for k, shade in zip(indices, shades, strict=True):
            points = _collect([run.series(f"{name}{k}") for run in runs if run.method == row.method])
            means = _smooth([fmean(v) for v in points.values()])
            axis.plot(list(points), means, lw=1.4, color=shade, label=f"turn {k + 1}")
        axis.axhline(0, color=_BASELINE_COLOUR, lw=0.7)
        axis.set_title(row.method)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(9, len(indices)))
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
        values = [mean_of_known([run.mean(metric) for run in runs if run.method == method]) for method in methods]
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
    tables = {row.method: _class_means([run for run in runs if run.method == row.method]) for row in rows}
    classes = sorted({name for table in tables.values() for name in table})
    if not classes:
        return None
    values = np.array([[100 * tables[row.method].get(name, np.nan) for name in classes] for row in rows])
    base = tables.get(sheet.baseline, {})
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
        f"Final held-out accuracy in percent by problem class, mean over seeds. Blue: above {sheet.baseline}, red: "
        "below; the colour stops at 15 points. A class has fewer problems than the whole, so its numbers are noisier: "
        "no intervals are given and none of them is a claim.",
    )


def _class_means(runs: Sequence[Run]) -> dict[str, float]:
    """Over the runs that have the class."""
    return {name: fmean(values) for name, values in _collect([run.classes for run in runs]).items()}


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
    compared = [row for row, _ in _compared(rows)]
    if not compared:
        return None
    figure, axes = sheet.panels(1, 2, (10, 4.2), sharex=True, sharey=True)
    for axis, (label, measure) in zip(axes.flat, _MEASURES.items(), strict=True):
        for method, line, x in _lines_over_horizons(compared):
            found = [difference.interval for _, difference in _compared(line, measure)]
            mean = [100 * i.mean for i in found]
            bars = np.transpose([_below_and_above(i) for i in found])
            look = {"fmt": "o-", "ms": 5, "lw": 1.4, "elinewidth": 2, "color": sheet.colour(method)}
            axis.errorbar(x, mean, bars, **look, label=method)
        axis.axhline(0, color=_BASELINE_COLOUR, lw=0.9)
        axis.set(title=label, xlabel="horizon", xticks=_horizons(rows))
    axes[0, 0].set_ylabel(f"points over {sheet.baseline}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return sheet.save(
        figure,
        "differences_by_horizon",
        f"Against {sheet.baseline}, by horizon",
        f"The method minus {sheet.baseline} on the same seeds and the same horizon: mean and its 95% bootstrap "
        "interval (none with a single seed). Lines only join a method's points. Methods are set a little apart to be "
        "seen.",
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


def _compared(rows: Iterable[Row], measure: _Measure = _MEASURES["final accuracy"]) -> list[tuple[Row, Paired]]:
    """The rows that have a difference from the baseline, with it."""
    return [(row, difference) for row in rows if (difference := measure(row)) is not None]


def _below_and_above(interval: Interval) -> tuple[float, float]:
    """How far the interval reaches from its mean, in points; (0, 0) for a single seed."""
    low, high = interval.ends or (interval.mean, interval.mean)
    return 100 * (interval.mean - low), 100 * (high - interval.mean)


def _collect(found: Sequence[Mapping[_Key, float]]) -> dict[_Key, list[float]]:
    """Key (a step, a problem class) -> the values of all runs that have it, in the order of the keys."""
    keys = sorted({key for one in found for key in one})
    return {key: [one[key] for one in found if key in one] for key in keys}


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    return [fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]
