"""The words of a report: its tables, its verdicts, and the page, whose HTML is in `page.html.jinja`."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from recipe.gtpo.experiments.report.figures import Figure, Section
from recipe.gtpo.experiments.report.runs import Run, by_horizon
from recipe.gtpo.experiments.report.statistics import BestRival, Interval, Paired, Row, baseline_of

CLAIM_SEEDS = 16  # fewer resolve about as much as the methods differ by, and a bootstrap of few values is too sure

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)

Column = tuple[str, Callable[[Row], str]]

_NAMES: tuple[Column, ...] = (
    ("horizon", lambda row: str(row.horizon)),  # only where there are several
    ("method", lambda row: row.method),
    ("seeds", lambda row: str(len(row.seeds))),
)
_ACCURACY: tuple[Column, ...] = (
    ("final accuracy", lambda row: _plus_minus(row.final)),
    ("area", lambda row: _plus_minus(row.area)),
    ("final over {baseline}, points", lambda row: _points(row.final_difference)),
    ("wins-losses, p", lambda row: _wins(row.final_difference)),
    ("area over {baseline}, points", lambda row: _points(row.area_difference)),
    ("final over the best rival, points", lambda row: _over_rival(row.best_rival)),
    ("steps to {threshold:g}", lambda row: "not reached" if row.reached is None else f"{row.reached:g}"),
    ("reward", lambda row: row.reward),
)
_BEHAVIOUR: tuple[Column, ...] = (
    ("turns", lambda row: _number(row.turns, "{:.2f}")),
    ("tool errors", lambda row: _number(row.tool_error, "{:.3f}")),
    ("first-turn call", lambda row: _number(row.first_turn_call, "{:.3f}")),
    ("s / step", lambda row: _number(row.step_seconds, "{:.2f}")),
    ("step time / {baseline}'s", lambda row: _number(row.step_cost, "{:.3f}")),
    ("advantage phase over {baseline}'s, % of a step", lambda row: _number(row.adv_cost, "{:+.2%}").rstrip("%")),
)


@dataclass(frozen=True)
class Table:
    """Rows as text, column name -> cell, in groups of one horizon."""

    columns: list[str]
    groups: list[list[dict[str, str]]]

    @property
    def lines(self) -> list[dict[str, str]]:
        return [line for group in self.groups for line in group]


def tabulate(rows: Sequence[Row], columns: Sequence[Column], threshold: float) -> Table:
    """The columns that name a row, then `columns`."""
    words = {"threshold": threshold, "baseline": baseline_of(row.method for row in rows)}
    chosen = {name.format(**words): text for name, text in (*_NAMES[0 if _several(rows) else 1 :], *columns)}
    groups: dict[int | None, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[row.horizon].append({name: text(row) for name, text in chosen.items()})
    return Table(list(chosen), list(groups.values()))


def _several(rows: Sequence[Row]) -> bool:
    """Whether horizons have to be named."""
    return len({row.horizon for row in rows}) > 1


def _plus_minus(interval: Interval) -> str:
    if interval.ends is None:
        return f"{interval.mean:.3f}"
    low, high = interval.ends
    return f"{interval.mean:.3f} ± {(high - low) / 2:.3f}"


def _points(difference: Paired | None) -> str:
    if difference is None:
        return ""
    mean, ends = difference.interval.mean, difference.interval.ends
    return f"{100 * mean:+.1f}" + ("" if ends is None else f" [{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}]")


def _over_rival(best: BestRival | None) -> str:
    return "" if best is None else f"{_points(best.final)} ({best.method})"


def _wins(difference: Paired | None) -> str:
    return "" if difference is None else f"{difference.wins}-{difference.losses}, {difference.p_value:.2g}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def markdown(rows: Sequence[Row], threshold: float) -> str:
    """The whole table as Markdown."""
    table = tabulate(rows, [*_ACCURACY, *_BEHAVIOUR], threshold)
    cells = [table.columns, ["---"] * len(table.columns), *(line.values() for line in table.lines)]
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A sentence for each method, horizon and what it is compared with: the baseline, and for GTPO the best rival.

    The words follow from the interval of the final accuracy alone.
    """
    said = []
    for row in rows:
        name = f"{row.method} at horizon {row.horizon}" if _several(rows) else row.method
        against = {f"{row.baseline} on {row.baseline_reward}": row.final_difference}
        if (best := row.best_rival) is not None:
            rival = f"{best.method} on {best.reward}"
            if best.method == row.baseline:
                against = {f"{rival}, the best rival": best.final}
            else:
                against[f"the best rival, {rival}"] = best.final
        for other, difference in against.items():
            if difference is not None and difference.interval.ends is not None:
                count = difference.interval.count
                what = _judgement(other, *difference.interval.ends, count)
                said.append(f"{name}: {what} ({_points(difference)} points, {count} seeds)")
    return said or ["No method shares two seeds with a rival: nothing can be said"]


def _judgement(other: str, low: float, high: float, seeds: int) -> str:
    """What the ends of a difference's interval say of a method beside `other`."""
    if low <= 0 <= high:
        return f"not told apart from {other}"
    what = f"better than {other}" if low > 0 else f"worse than {other}"
    return what if seeds >= CLAIM_SEEDS else f"{what}, here, on too few seeds for a claim"


def verdict(rows: Sequence[Row]) -> str:
    """All verdicts as one line for the terminal."""
    return "; ".join(verdicts(rows)) + "."


def page(runs: Sequence[Run], rows: Sequence[Row], sections: Sequence[Section], out: Path, threshold: float) -> str:
    """The self-contained HTML page; the PNGs of `sections` are read from `out`."""

    def image(figure: Figure) -> str:
        return base64.b64encode((out / figure.file).read_bytes()).decode()

    horizons = [str(horizon) for horizon in by_horizon(runs) if horizon is not None]
    at = f", horizon{'s' * (len(horizons) > 1)} {', '.join(horizons)}" if horizons else ""
    return _TEMPLATES.get_template("page.html.jinja").render(
        title=f"{runs[0].task}: {len({run.method for run in runs})} methods{at}",
        within=" within a horizon" if len(horizons) > 1 else "",
        baseline=baseline_of(row.method for row in rows),
        claim_seeds=CLAIM_SEEDS,
        runs=len(runs),
        seeds=len({run.seed for run in runs}),
        steps=max(runs[0].curve),
        engine=runs[0].engine,
        commits=sorted({run.commit for run in runs}),
        machines=sorted({run.machine for run in runs}),
        commands=sorted(run.command for run in runs),
        intervals=sum(2 * (row.final_difference is not None) + (row.best_rival is not None) for row in rows),
        rivals=any(row.best_rival is not None for row in rows),
        verdicts=verdicts(rows),
        accuracy=tabulate(rows, _ACCURACY, threshold),
        behaviour=tabulate(rows, _BEHAVIOUR, threshold),
        sections=sections,
        image=image,
    )
