"""What every method would have given: `python -m recipe.gtpo.whatif RUN_DIR [--steps 2-6] [--methods gtpo,grpo]`.

Of the trajectories that one or several runs recorded, as they were sampled: the mean advantage of a turn and the share
of turns whose advantage is above 0, by method, by whether the answer was right, and by turn number. "of the run" is
with the run's own settings; of an estimator of verl that is no method of the recipe, what was recorded. A wrong
answer's turn that is above 0 is made more likely; the last column says how much of a method's weight, |advantage|
times tokens over all turns, does that.

It says where each method would have pushed this policy, not where training with it would have led. Trajectories that
credit leaves out, with the settings asked about, are in no mean. Options that no file of config/method sets, such as
the format penalty, are the run's in all rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from recipe.gtpo import whatif
from recipe.gtpo.method.similarity import SimilarityError
from verl_ext.records.reader import Reader
from verl_ext.viewer.records import trained_tokens
from verl_ext.viewer.runs import Run, parse_steps

OWN = "of the run"
#: (the answer is right, turn number from 1)
Place = tuple[bool, int]


class Weighed(NamedTuple):
    """A turn."""

    advantage: float
    tokens: int


#: Method -> place -> its turns.
Table = dict[str, dict[Place, list[Weighed]]]


def add(table: Table, run: Run, step: int, methods: Mapping[str, Mapping[str, Any]]) -> None:
    """All turns of a recorded step, with every method's advantage.

    Args:
        methods: name -> settings, as `whatif.presets`.

    Raises ValueError naming the option that is wrong, SimilarityError when programs cannot be compared.
    """
    rows = run.rows("train", step)
    for name, settings in methods.items():
        is_computed = whatif.is_computed(settings)
        turns = _computed(rows, run.recompute("train", step, dict(settings))) if is_computed else _recorded(rows)
        for place, turn in turns:
            table[name].setdefault(place, []).append(turn)


def _computed(
    rows: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[Place, Weighed]]:
    for row, answer in zip(rows, answers, strict=True):
        if not answer["dropped"]:
            for number, (turn, credit) in enumerate(zip(row["turns"], answer["turns"], strict=True), start=1):
                yield (row["acc"] == 1, number), Weighed(credit["advantage"], trained_tokens(turn))


def _recorded(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Place, Weighed]]:
    for row in rows:
        if not row["dropped"] and row["acc"] is not None:
            for number, turn in enumerate(row["turns"], start=1):
                if turn["advantage"] is not None:
                    yield (row["acc"] == 1, number), Weighed(turn["advantage"], trained_tokens(turn))


def praise_of_wrong(by_place: Mapping[Place, Sequence[Weighed]]) -> float | None:
    """The share of the weight, |advantage| times tokens, that makes wrong answers more likely; None where all is 0."""
    weight = sum(abs(one.advantage) * one.tokens for turns in by_place.values() for one in turns)
    praise = sum(
        max(one.advantage, 0.0) * one.tokens for (right, _), turns in by_place.items() if not right for one in turns
    )
    return praise / weight if weight else None


def lines(table: Table) -> list[str]:
    """The table as text."""
    places = sorted({place for by_place in table.values() for place in by_place}, key=lambda p: (not p[0], p[1]))
    heads = [f"{'right' if right else 'wrong'}, turn {number}" for right, number in places]
    body = {"": [*heads, "praise of wrong"]}
    for name, by_place in table.items():
        share = praise_of_wrong(by_place)
        cells = [_cell(by_place.get(place, ())) for place in places]
        body[name] = [*cells, "-" if share is None else f"{share:.1%}"]
    first = next(iter(table.values()))
    body["turns"] = [*(str(len(first.get(place, ()))) for place in places), ""]
    width = max(map(len, body)) + 2
    return ["".join([f"{name:{width}}", *(f"{cell:>16}" for cell in cells)]).rstrip() for name, cells in body.items()]


def _cell(turns: Sequence[Weighed]) -> str:
    if not turns:
        return "-"
    above = sum(one.advantage > 0 for one in turns) / len(turns)
    return f"{sum(one.advantage for one in turns) / len(turns):+.2f} ({above:4.0%})"


def main(argv: Sequence[str] | None = None) -> int:
    presets = whatif.presets()
    parser = argparse.ArgumentParser(
        prog="python -m recipe.gtpo.whatif", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run_dirs", metavar="RUN_DIR", nargs="+", type=Path, help="run folders; each has a folder trajectories/"
    )
    parser.add_argument("--steps", type=parse_steps, help="as 1,5,10-12 (default: all that are recorded)")
    parser.add_argument("--methods", default=",".join(presets), help="some of config/method (default: all)")
    arguments = parser.parse_args(argv)
    names = arguments.methods.split(",")
    table: Table = {name: {} for name in (OWN, *names)}
    try:
        if unknown := [name for name in names if name not in presets]:
            raise ValueError(f"--methods: {unknown[0]!r} is none of {', '.join(presets)}")
        chosen = {path: _steps(path, arguments.steps) for path in arguments.run_dirs}
        with tqdm(total=sum(map(len, chosen.values())), unit="step", file=sys.stderr) as bar:
            for path, steps in chosen.items():
                run = _read(path, steps)
                own = run.settings or {}
                if not whatif.is_computed(own):
                    said = f'"{OWN}" is what was recorded: {own["estimator"]} is no method of the recipe'
                    print(f"whatif: {path}: {said}", file=sys.stderr)
                methods = {OWN: own} | {name: own | presets[name] for name in names}
                for step in steps:
                    add(table, run, step, methods)
                    bar.update()
    except (ValueError, OSError, SimilarityError) as e:
        print(f"whatif: error: {e}", file=sys.stderr)
        return 1
    for path, steps in chosen.items():
        over = f"{len(steps)} steps from {steps[0]} to {steps[-1]}"
        print(f"{path.resolve()}: mean advantage of a turn (share of turns above 0), {over}")
    print("\n".join(lines(table)))
    return 0


def _steps(path: Path, wanted: Iterable[int] | None) -> list[int]:
    """The wanted recorded steps of a run, or all. Raises ValueError where one is missing, or none is recorded."""
    recorded = Reader(path).steps("train")
    steps = sorted(wanted or recorded)
    missing = [step for step in steps if step not in recorded]
    if missing or not steps:
        there = f"{recorded[0]} to {recorded[-1]}" if recorded else "none; RUN_DIR is the folder with trajectories/"
        raise ValueError(f"{path}: no step {missing[0] if missing else 1}; recorded: {there}")
    return steps


def _read(path: Path, steps: Sequence[int]) -> Run:
    """Says on stderr how many lines cannot be read. Raises ValueError where no trajectory can."""
    run = Run(path, whatif)
    run.index.update()
    lost, why = run.unread("train", steps)
    if lost:  # a mean is one of all siblings
        print(f"whatif: {lost} lines are left out, so groups and numbers are not the run's: {why}", file=sys.stderr)
    if not any(run.rows("train", step) for step in steps):
        raise ValueError(f"{run.path}: no trajectory can be read{': ' if why else ''}{why}")
    return run


if __name__ == "__main__":
    sys.exit(main())
