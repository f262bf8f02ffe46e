"""The figures of RESULTS.md, from the files beside this one: `python -m recipe.gtpo.experiments.results.draw`.

Writes `recipe/gtpo/experiments/figures/*.png`. Each PNG carries `fingerprint()` of what it shows, so that a test can
tell that it is up to date.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from recipe.gtpo.experiments.report import statistics

RESULTS = Path(__file__).parent
FIGURES = RESULTS.parent / "figures"
CURVES, DIFFERENCES = FIGURES / "curves_six_calls.png", FIGURES / "differences.png"
MAP = FIGURES / "credit_map.png"
FIRST_CALL = FIGURES / "first_call.png"
EVERY_RIVAL = FIGURES / "every_rival.png"
FIVE_SEEDS = frozenset(range(701, 706))  # those that every method has at horizon 6


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A method minus GRPO on the summed reward, on the same seeds: a row of the main table of RESULTS.md."""

    file: str
    horizon: int
    method: str
    tested: bool  # 16 seeds, and fixed before its first run
    steps: int
    seeds: int
    final: Interval
    area: Interval


@dataclass(frozen=True)
class Look:
    label: str
    colour: str  # of Okabe and Ito's palette
    marker: str


LOOKS: Mapping[str, Look] = {
    "grpo_sum": Look("GRPO, summed reward", "#000000", "o"),
    "dr_grpo_sum": Look("Dr. GRPO, summed reward", "#d55e00", "D"),
    "gtpo_turn_batch_std": Look("GTPO, recommended setting", "#0072b2", "s"),
    "gtpo": Look("GTPO as published", "#009e73", "^"),
}

#: File, horizon, method, tested: the rows of the main table, in its order.
MAIN_TABLE = (
    ("horizon6", 6, "gtpo_turn_batch_std", True),
    ("horizon6", 6, "dr_grpo_sum", False),
    ("horizon6", 6, "gtpo", False),
    ("horizon4", 4, "gtpo_turn_batch_std", True),
    ("horizon4", 4, "gtpo", False),
    ("confirmation", 2, "gtpo_turn_batch_std", False),  # 16 seeds, but added when the others were known
    ("confirmation", 2, "gtpo_no_shaping", True),
    ("confirmation", 2, "gtpo", True),
    ("horizons", 2, "gtpo_turn_batch_std", False),
    ("horizons", 2, "gtpo", False),
    ("horizons", 1, "gtpo_turn_batch_std", False),
    ("horizons", 1, "gtpo", False),
)


@cache
def load(file: str) -> Any:
    """A file of results, its methods by today's names: each file says which of its own have another meaning now."""
    found = json.loads((RESULTS / f"{file}.json").read_text())
    names = found["names_today"]
    for entry in (*found["rows"], *found["runs"]):
        entry["method"] = names.get(entry["method"], entry["method"])
    return found


def difference(file: str, horizon: int, method: str, tested: bool) -> Difference:
    rows = load(file)["rows"]
    # The older files know one horizon only, and do not name it.
    (row,) = [r for r in rows if r["method"] == method and r.get("horizon", horizon) == horizon]
    final, area = (row[f"{measure}_difference"]["interval"] for measure in ("final", "area"))
    intervals = [Interval(i["mean"], i["low"], i["high"]) for i in (final, area)]
    return Difference(file, horizon, method, tested, load(file)["steps"], final["count"], *intervals)


def main_table() -> list[Difference]:
    return [difference(*row) for row in MAIN_TABLE]


def curve(file: str, method: str, seeds: frozenset[int] | None = None) -> dict[int, Interval]:
    """Step -> accuracy at horizon 6, the mean over `seeds` (None: all there are) and its Student's 95% interval."""
    runs = [r for r in load(file)["runs"] if r["method"] == method and (seeds is None or r["seed"] in seeds)]
    return {int(step): _student([r["curve"][step] for r in runs]) for step in runs[0]["curve"]}


def _student(values: Sequence[float]) -> Interval:
    return _of_seeds(statistics.t_interval(values))


def _bootstrap(differences: Sequence[float]) -> Interval:
    return _of_seeds(statistics.bootstrap_interval(differences))


def _of_seeds(found: statistics.Interval) -> Interval:
    assert found.ends is not None  # of several seeds
    return Interval(found.mean, *found.ends)


Curves = dict[str, dict[int, Interval]]


def curves() -> dict[str, Curves]:
    """Panel of the first figure -> method -> curve."""
    return {
        "16 seeds, 701 to 716": {m: curve("horizon6", m) for m in ("grpo_sum", "gtpo_turn_batch_std")},
        "5 of them, 701 to 705": {m: curve("horizon6", m, FIVE_SEEDS) for m in LOOKS},
    }


def fingerprint(shown: object) -> str:
    """Of what a figure shows; floats count to five digits, so that another version of scipy does not matter."""
    text = re.sub(r"\d+\.\d+(?:e-\d+)?", lambda found: f"{float(found[0]):.5f}", repr(shown))
    return hashlib.sha256(text.encode()).hexdigest()


def drawn_differences() -> list[Difference]:
    return [d for d in main_table() if d.method in LOOKS]


#: Panel of the map -> its heading, and the numbers of it by line and column, in hundredths of cosine.
Panels = dict[str, dict[tuple[str, str], float]]


@cache
def leads() -> tuple[Panels, Panels]:
    """`credit_map.lead` by cell: of the grid, rollouts down and horizon across; of the variations at horizon 6 with 8
    rollouts, errors that can be mended down and success rate across."""
    from recipe.gtpo.experiments import credit_map  # which imports torch

    places = {"even": "every call", "first": "the first call", "last": "the last call"}
    found = credit_map.by_cell(credit_map.read())
    grid: Panels = {}
    varied: Panels = {}
    for cell in sorted(found, key=lambda cell: (cell.wordings, list(places).index(cell.risk))):
        value = round(100 * credit_map.lead(found[cell]), 2)
        mended = f"{cell.recoverable:.0%} mendable"
        if (cell.wordings, cell.risk) == (1, "even"):
            panel = grid.setdefault(f"{cell.success:.0%} right, {mended}", {})
            panel[f"{cell.rollouts} rollouts", f"{cell.horizon} calls"] = value
        if (cell.horizon, cell.rollouts) == (6, 8) and cell.recoverable < 1:
            ways = "one wording" if cell.wordings == 1 else f"{cell.wordings} wordings"
            panel = varied.setdefault(f"{places[cell.risk]} errs, {ways}", {})
            panel[mended, f"{cell.success:.0%} right"] = value
    return grid, varied


#: The methods of the fifth design, the one that it tests first.
FIRST_CALL_LOOKS: Mapping[str, Look] = {
    "gtpo_within_state": Look("credit by state", "#0072b2", "s"),
    "gigpo": Look("GiGPO", "#cc79a7", "v"),
    "dr_grpo": Look("Dr. GRPO", "#d55e00", "D"),
    "grpo_outcome": Look("GRPO, outcome", "#000000", "o"),
}


@dataclass(frozen=True)
class FirstCall:
    """A setting of the fifth design."""

    rollouts: int
    seeds: int
    curves: dict[str, dict[int, Interval]]  # method -> step -> mean accuracy and its Student's interval
    final: dict[str, Interval]  # rival -> `gtpo_within_state` minus it in final accuracy, bootstrap
    area: dict[str, Interval]  # the same in the mean height of the curve
    best_rival: str  # with the highest mean final accuracy


def csv_rows(name: str) -> list[dict[str, str]]:
    """A file of raw numbers, with a row for each method and seed."""
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def by_seed(rows: Sequence[Mapping[str, str]], method: str, column: str) -> dict[int, float]:
    return {int(row["seed"]): float(row[column]) for row in rows if row["method"] == method}


def minus(rows: Sequence[Mapping[str, str]], method: str, rival: str, column: str) -> Interval:
    """`method` minus `rival`, paired by seed. Raises ValueError where one has a seed that the other lacks."""
    ours, theirs = by_seed(rows, method, column), by_seed(rows, rival, column)
    if lacking := ours.keys() ^ theirs.keys():
        raise ValueError(f"{method} and {rival} do not both have the seeds {sorted(lacking)}")
    return _bootstrap([ours[seed] - theirs[seed] for seed in ours])


def mean_height(start: float, middle: float, end: float) -> float:
    """Of a curve of three points, equally far apart: its area."""
    return (start / 2 + middle + end / 2) / 2


@cache
def first_call() -> list[FirstCall]:
    """Both settings, of the seeds that every method has. Raises ValueError where a seed lacks a method."""
    rows = csv_rows("first_call.csv")
    found = []
    for rollouts in sorted({int(row["rollouts"]) for row in rows}):
        here = [row for row in rows if int(row["rollouts"]) == rollouts]
        steps = {0: "step_0", 6: "step_6", 12: "step_12"}
        accuracy = {
            (method, step): {int(row["seed"]): float(row[name]) for row in here if row["method"] == method}
            for method in FIRST_CALL_LOOKS
            for step, name in steps.items()
        }
        seeds = sorted({int(row["seed"]) for row in here})
        for (method, _), by_seed in accuracy.items():
            if sorted(by_seed) != seeds:
                raise ValueError(f"{method} with {rollouts} rollouts lacks seeds {set(seeds) - by_seed.keys()}")
        curves = {
            method: {step: _student([accuracy[method, step][seed] for seed in seeds]) for step in steps}
            for method in FIRST_CALL_LOOKS
        }
        ours, *rivals = FIRST_CALL_LOOKS
        final, area = {}, {}
        for rival in rivals:
            start, middle, end = ([accuracy[ours, at][s] - accuracy[rival, at][s] for s in seeds] for at in steps)
            final[rival] = _bootstrap(end)
            area[rival] = _bootstrap(list(map(mean_height, start, middle, end)))
        best = max(rivals, key=lambda rival: curves[rival][max(steps)].mean)
        found.append(FirstCall(rollouts, len(seeds), curves, final, area, best))
    return found


@dataclass(frozen=True)
class Ended:
    """A method of the seventh design."""

    method: str
    final: Interval  # accuracy after 20 steps: mean over seeds and Student's interval
    praise: float  # share of its weight that makes wrong answers more likely, in the first step: mean of `HALVES`


#: Columns of praise_of_wrong.csv: the seventh design ran on two machines, each with a base policy of its own.
HALVES = ("seeds_1101_to_1108", "seeds_1109_to_1116")


@cache
def every_rival() -> list[Ended]:
    """The seventh design's methods, the most accurate first."""
    rows = csv_rows("every_rival.csv")
    praise = {row["method"]: fmean(float(row[half]) for half in HALVES) for row in csv_rows("praise_of_wrong.csv")}
    methods = dict.fromkeys(row["method"] for row in rows)
    found = [Ended(m, _student(list(by_seed(rows, m, "step_20").values())), praise[m]) for m in methods]
    return sorted(found, key=lambda one: -one.final.mean)


def draw() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rc("axes", **{"spines.top": False, "spines.right": False, "axisbelow": True, "titlesize": 12})
    plt.rc("font", size=12)
    plt.rc("legend", frameon=False, fontsize=11)
    FIGURES.mkdir(exist_ok=True)
    for path, figure, shown, dpi in (
        (CURVES, _draw_curves(plt), curves(), 120),
        (DIFFERENCES, _draw_differences(plt), drawn_differences(), 120),
        (MAP, _draw_map(plt), leads(), 100),
        (FIRST_CALL, _draw_first_call(plt), first_call(), 110),
        (EVERY_RIVAL, _draw_every_rival(plt), every_rival(), 110),
    ):
        figure.savefig(path, dpi=dpi, metadata={"Description": fingerprint(shown)})
        plt.close(figure)


def _draw_curves(plt: Any) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), sharey=True, layout="constrained")
    for axis, (title, by_method) in zip(axes, curves().items(), strict=True):
        for at, (method, points) in enumerate(by_method.items()):
            _draw_curve(axis, points, LOOKS[method], aside=0.35 * (at - (len(by_method) - 1) / 2))
        axis.set(title=title, xlabel="training steps", xticks=list(points), ylim=(0, 0.75))
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("accuracy on held-out problems")
    handles = [_handle(plt, look, linestyle="-") for look in LOOKS.values()]
    axes[0].legend(handles=handles, loc="upper left")
    return figure


def _draw_curve(axis: Any, points: Mapping[int, Interval], look: Look, aside: float) -> None:
    """`aside`: in steps, so that the bars of several methods do not hide each other."""
    axis.errorbar(
        [step + aside for step in points],
        [p.mean for p in points.values()],
        yerr=[[p.mean - p.low for p in points.values()], [p.high - p.mean for p in points.values()]],
        color=look.colour, marker=look.marker, markersize=7, linewidth=2, elinewidth=1.5, capsize=3, label=look.label,
    )  # fmt: skip


def _draw_differences(plt: Any) -> Any:
    found = drawn_differences()
    horizons = sorted({d.horizon for d in found})
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.8), sharey=True, layout="constrained")
    for axis, measure, title in zip(axes, ("final", "area"), ("final accuracy", "area under the curve"), strict=True):
        axis.axhline(0, color="black", linewidth=1)
        for place, horizon in enumerate(horizons):
            # Methods side by side, the sets of seeds of one method together.
            here = [d for d in found if d.horizon == horizon]
            here.sort(key=lambda d: (list(LOOKS).index(d.method), d.seeds))
            for at, d in enumerate(here):
                interval: Interval = getattr(d, measure)
                look = LOOKS[d.method]
                x = place + 0.2 * (at - (len(here) - 1) / 2)
                low, mean, high = (100 * v for v in (interval.low, interval.mean, interval.high))
                axis.errorbar(
                    [x], [mean], yerr=[[mean - low], [high - mean]], color=look.colour, marker=look.marker,
                    markersize=8, markerfacecolor=look.colour if d.tested else "white", markeredgewidth=1.5,
                    elinewidth=1.8, capsize=3,
                )  # fmt: skip
                # Away from the line of no difference.
                end, offset, side = (high, 5, "bottom") if mean >= 0 else (low, -5, "top")
                axis.annotate(
                    str(d.seeds), (x, end), (0, offset), textcoords="offset points", ha="center", va=side, fontsize=10
                )
        axis.set(title=title, xlabel="horizon (dependent calls)", xticks=range(len(horizons)), xticklabels=horizons)
        axis.set_ylim(-8, 20)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("points over GRPO on the summed reward")
    methods = [_handle(plt, look, linestyle="") for method, look in LOOKS.items() if method != "grpo_sum"]
    filled = plt.Line2D([], [], color="grey", marker="o", markersize=8, linestyle="", label="filled: a test (16 seeds)")
    hollow = plt.Line2D([], [], color="grey", marker="o", markersize=8, linestyle="", label="hollow: no claim",
                        markerfacecolor="white", markeredgewidth=1.5)  # fmt: skip
    axes[0].legend(handles=[*methods, filled, hollow], loc="upper left")
    return figure


#: Every rival of the seventh design.
_RIVAL = Look("rival", "#000000", "o")

#: Orange: behind the best rival; blue: ahead. Light, so that a number can be read on each.
_MAP_COLOURS = ("#f0a030", "#f9dcae", "#ffffff", "#b5daf0", "#56aee0")
_MAP_LIMIT = 20  # hundredths of cosine; what is beyond has the last colour


def _draw_map(plt: Any) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("lead", _MAP_COLOURS)
    grid, varied = leads()
    figure = plt.figure(figsize=(9.5, 9.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[3 * 3.6, 2 * 3.0])
    above = "Every call errs equally often, a right call can be worded in one way"
    below = "Six calls, eight rollouts: which call errs, and in how many ways a right call can be worded"
    for part, panels, lines, title in ((upper, grid, 3, above), (lower, varied, 2, below)):
        part.suptitle(title, fontsize=13, fontweight="bold")
        for axis, (name, numbers) in zip(part.subplots(lines, 3).flat, panels.items(), strict=True):
            downs, acrosses = (list(dict.fromkeys(key[at] for key in numbers)) for at in (0, 1))
            table = [[numbers[down, across] for across in acrosses] for down in downs]
            axis.imshow(table, cmap=colours, vmin=-_MAP_LIMIT, vmax=_MAP_LIMIT, aspect="auto")
            for i, j in itertools.product(range(len(downs)), range(len(acrosses))):
                shown = round(table[i][j])
                axis.text(j, i, f"{shown:+d}" if shown else "0", ha="center", va="center", fontsize=12)
            place = axis.get_subplotspec()
            axis.set_title(name, fontsize=11)
            axis.set_xticks(range(len(acrosses)), acrosses if place.is_last_row() else [""] * len(acrosses))
            axis.set_yticks(range(len(downs)), downs if place.is_first_col() else [""] * len(downs))
            axis.tick_params(length=0, labelsize=11)
            axis.spines[:].set_visible(False)
            axis.set_xticks([j - 0.5 for j in range(1, len(acrosses))], minor=True)
            axis.set_yticks([i - 0.5 for i in range(1, len(downs))], minor=True)
            axis.grid(which="minor", color="#dddddd", linewidth=1)
            axis.tick_params(which="minor", length=0)
    return figure


def _draw_first_call(plt: Any) -> Any:
    settings = first_call()
    figure, axes = plt.subplots(len(settings), 2, figsize=(9, 3.4 * len(settings)), layout="constrained", squeeze=False)
    for (left, right), one in zip(axes, settings, strict=True):
        for at, (method, points) in enumerate(one.curves.items()):
            _draw_curve(left, points, FIRST_CALL_LOOKS[method], aside=0.25 * (at - (len(one.curves) - 1) / 2))
        left.set(title=f"{128 // one.rollouts} problems x {one.rollouts} rollouts, {one.seeds} seeds")
        left.set(ylabel="accuracy", ylim=(0.1, 0.35), xticks=list(next(iter(one.curves.values()))))
        left.grid(axis="y", alpha=0.3)
        for at, (rival, interval) in enumerate(one.final.items()):
            look = FIRST_CALL_LOOKS[rival]
            low, mean, high = (100 * v for v in (interval.low, interval.mean, interval.high))
            right.errorbar(
                [mean], [at], xerr=[[mean - low], [high - mean]], color=look.colour, marker=look.marker, markersize=8,
                elinewidth=1.8, capsize=3,
            )  # fmt: skip
        right.axvline(0, color="black", linewidth=1)
        right.axvline(3, color="grey", linewidth=1, linestyle="--")
        right.set_yticks(range(len(one.final)), [f"minus {FIRST_CALL_LOOKS[r].label}" for r in one.final])
        right.set(title="credit by state, points after 12 steps", xlim=(-9, 9), ylim=(-0.6, len(one.final) - 0.4))
        right.grid(axis="x", alpha=0.3)
    axes[-1][0].set_xlabel("training steps")
    axes[-1][1].set_xlabel("points (dashed: the goal)")
    axes[0][0].legend(loc="lower right")
    return figure


def _draw_every_rival(plt: Any) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.4), layout="constrained", width_ratios=(1.1, 1))
    found = every_rival()
    for at, one in enumerate(reversed(found)):
        look = _RIVAL if one.method not in LOOKS else LOOKS[one.method]
        low, mean, high = one.final.low, one.final.mean, one.final.high
        style = {"color": look.colour, "marker": look.marker, "markersize": 8, "elinewidth": 1.8, "capsize": 3}
        left.errorbar([mean], [at], xerr=[[mean - low], [high - mean]], **style)
        right.errorbar([100 * one.praise], [mean], yerr=[[mean - low], [high - mean]], **style)
        if one.praise > 0:
            right.annotate(one.method, (100 * one.praise, low), (0, -4), textcoords="offset points", ha="center",
                           va="top", fontsize=9)  # fmt: skip
    silent = [one for one in found if one.praise == 0]
    right.annotate(f"{len(silent)} rivals on the outcome", (0, max(one.final.high for one in silent)), (-4, 5),
                   textcoords="offset points", ha="left", va="bottom", fontsize=9)  # fmt: skip
    left.set_yticks(range(len(found)), [one.method for one in reversed(found)])
    left.set(xlabel="accuracy after 20 steps")
    left.grid(axis="x", alpha=0.3)
    right.set(xlabel="praise of wrong answers in step 1, %", ylabel="accuracy after 20 steps")
    right.margins(x=0.08, y=0.1)
    right.grid(alpha=0.3)
    return figure


def _handle(plt: Any, look: Look, linestyle: str) -> Any:
    return plt.Line2D(
        [], [], color=look.colour, marker=look.marker, markersize=7, linewidth=2, linestyle=linestyle, label=look.label
    )


if __name__ == "__main__":
    draw()
