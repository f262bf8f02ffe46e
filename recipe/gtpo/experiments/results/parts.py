"""Which part of GTPO costs what, from `parts.csv`: the tables of design 8.

    python -m recipe.gtpo.experiments.results.parts

A row of the file is a training: a setting (`method`, `gamma`, `shaping`; the last two are empty for the rival), a seed
and the accuracy after 0, 10 and 20 steps. An effect is paired by seed; brackets are 95% intervals over seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from recipe.gtpo.experiments.report.statistics import Interval, bootstrap_interval
from recipe.gtpo.experiments.results.draw import csv_rows, mean_height

MEASURES = ("final", "area")
RIVAL = "dr_grpo_sum"


class Setting(NamedTuple):
    """What of GTPO is switched."""

    method: str = "gtpo"
    gamma: str = "0.9"
    shaping: str = "true"


#: Name -> the field of a setting, its value in the remedy; the published form has the default.
EFFECTS: Mapping[str, tuple[str, str]] = {
    "gamma 1 minus 0.9": ("gamma", "1.0"),
    "shaping off minus on": ("shaping", "false"),
    "the same turn minus the group": ("method", "gtpo_turn"),
}
SETTINGS = tuple(map(Setting._make, itertools.product(("gtpo", "gtpo_turn"), ("0.9", "1.0"), ("true", "false"))))
#: Compared with the rival besides: what the design's question began with, and what turns by themselves change.
OVER_RIVAL: Mapping[str, Setting] = {
    "the same turn, discount and shaping on": Setting("gtpo_turn"),
    "turns by themselves: all three remedies": Setting("gtpo_turn", "1.0", "false"),
}
#: Accuracy or area, by setting (None: the rival) and seed.
Numbers = dict[Setting | None, dict[int, float]]


def read(measure: str, rows: Sequence[Mapping[str, str]] | None = None) -> Numbers:
    """Every training's final accuracy, or the mean height of its curve from step 0 to 20.

    Raises ValueError where a setting or a seed of one is missing, for then no effect is paired.
    """
    found: Numbers = {setting: {} for setting in (*SETTINGS, None)}
    for row in csv_rows("parts.csv") if rows is None else rows:
        setting = None if row["method"] == RIVAL else Setting(row["method"], row["gamma"], row["shaping"])
        start, middle, end = (float(row[f"step_{step}"]) for step in (0, 10, 20))
        found[setting][int(row["seed"])] = end if measure == "final" else mean_height(start, middle, end)
    seeds = set().union(*found.values())
    if lacking := {setting: seeds - by_seed.keys() for setting, by_seed in found.items() if by_seed.keys() != seeds}:
        raise ValueError(f"parts.csv: these lack seeds: {lacking}")
    return found


def effect(numbers: Numbers, name: str) -> Interval:
    """The mean over the four pairs of settings that differ in this part alone."""
    field, remedy = EFFECTS[name]
    with_it = [setting for setting in SETTINGS if getattr(setting, field) == remedy]
    return _mean_difference(numbers, [(one, one._replace(**{field: getattr(Setting(), field)})) for one in with_it])


def alone(numbers: Numbers, name: str) -> Interval:
    """The remedy of this part, the other two as published, minus the published form."""
    field, remedy = EFFECTS[name]
    return _mean_difference(numbers, [(Setting()._replace(**{field: remedy}), Setting())])


def over_rival(numbers: Numbers, setting: Setting) -> Interval:
    """A setting minus the rival, which has the same reward and no turns."""
    return _mean_difference(numbers, [(setting, None)])


def _mean_difference(numbers: Numbers, pairs: Sequence[tuple[Setting | None, Setting | None]]) -> Interval:
    seeds = sorted(numbers[None])
    return bootstrap_interval([fmean(numbers[one][s] - numbers[other][s] for one, other in pairs) for s in seeds])


def lines() -> list[str]:
    """The page's two tables."""
    by_measure = {measure: read(measure) for measure in MEASURES}
    found = ["| pool | gamma | shaping | final accuracy | area |", "|---|---|---|---|---|"]
    for setting in (*SETTINGS, None):
        named = ("`dr_grpo_sum`", "", "") if setting is None else (f"`{setting.method}`", *setting[1:])
        means = [f"{fmean(numbers[setting].values()):.3f}" for numbers in by_measure.values()]
        found.append(f"| {' | '.join([*named, *means])} |")
    found += ["", "| effect, points | final | area | final, the rest as published |", "|---|---|---|---|"]
    for name in EFFECTS:
        both = [points(effect(numbers, name)) for numbers in by_measure.values()]
        found.append(f"| {name} | {' | '.join(both)} | {points(alone(by_measure['final'], name))} |")
    for name, setting in OVER_RIVAL.items():
        both = [points(over_rival(numbers, setting)) for numbers in by_measure.values()]
        found.append(f"| {name} minus `{RIVAL}` | {' | '.join(both)} | |")
    return found


def points(found: Interval) -> str:
    ends = "" if found.ends is None else " [{:+.1f}, {:+.1f}]".format(*(100 * end for end in found.ends))
    return f"{100 * found.mean:+.1f}{ends}"


if __name__ == "__main__":
    print("\n".join(lines()))
