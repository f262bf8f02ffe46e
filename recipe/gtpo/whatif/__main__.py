"""What every method would have given: `python -m recipe.gtpo.whatif RUN_DIR [--steps 2-6] [--methods gtpo,grpo]`.

Of the trajectories that a run recorded, as they were sampled: the mean advantage of a turn and the share of turns whose
advantage is above 0, by method, by whether the answer was right, and by turn number. "of the run" is with the run's own
settings. A wrong answer's turn that is above 0 is made more likely.

It says where each method would have pushed this policy, not where training with it would have led. Trajectories that
credit leaves out, with the settings asked about, are in no mean. All methods are compared with `format_rule` and the
other options as their files in config/method have them.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recipe.gtpo import whatif
from recipe.gtpo.method.similarity import SimilarityError
from verl_ext.records.reader import Reader
from verl_ext.viewer.runs import Run, parse_steps

OWN = "of the run"
#: (the answer is right, turn number from 1)
Place = tuple[bool, int]


def table(
    run: Run, steps: Iterable[int], methods: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[Place, list[float]]]:
    """Every turn's advantage: method -> place -> advantages, in the order of the record.

    Args:
        methods: name -> settings, as `whatif.presets`.

    Raises ValueError naming the option that is wrong, SimilarityError when programs cannot be compared.
    """
    found: dict[str, dict[Place, list[float]]] = {name: defaultdict(list) for name in methods}
    for step in steps:
        rows = run.rows("train", step)
        for name, settings in methods.items():
            for row, answer in zip(rows, run.recompute("train", step, dict(settings)), strict=True):
                if not answer["dropped"]:
                    for number, turn in enumerate(answer["turns"], start=1):
                        found[name][row["acc"] == 1, number].append(turn["advantage"])
    return found


def lines(found: Mapping[str, Mapping[Place, Sequence[float]]]) -> list[str]:
    """The table as text."""
    places = sorted({place for by_place in found.values() for place in by_place}, key=lambda p: (not p[0], p[1]))
    width = max(map(len, found)) + 2
    heads = [f"{'right' if right else 'wrong'}, turn {number}" for right, number in places]
    out = ["".join([f"{'':{width}}", *(f"{head:>16}" for head in heads)])]
    for name, by_place in found.items():
        cells = [_cell(by_place.get(place, ())) for place in places]
        out.append("".join([f"{name:{width}}", *(f"{cell:>16}" for cell in cells)]))
    counts = [len(by_place) for by_place in (found[next(iter(found))].get(place, ()) for place in places)]
    out.append("".join([f"{'turns':{width}}", *(f"{count:>16}" for count in counts)]))
    return out


def _cell(advantages: Sequence[float]) -> str:
    if not advantages:
        return "-"
    above = sum(one > 0 for one in advantages) / len(advantages)
    return f"{sum(advantages) / len(advantages):+.2f} ({above:4.0%})"


def main(argv: Sequence[str] | None = None) -> int:
    presets = whatif.presets()
    parser = argparse.ArgumentParser(
        prog="python -m recipe.gtpo.whatif", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="a run folder; it has a folder trajectories/")
    parser.add_argument("--steps", type=parse_steps, help="as 1,5,10-12 (default: all that are recorded)")
    parser.add_argument("--methods", default=",".join(presets), help="some of config/method (default: all)")
    arguments = parser.parse_args(argv)
    try:
        recorded = Reader(arguments.run_dir).steps("train")
        steps = sorted(arguments.steps or recorded)
        missing = [step for step in steps if step not in recorded]
        if missing or not steps:
            there = f"{recorded[0]} to {recorded[-1]}" if recorded else "none; RUN_DIR is the folder with trajectories/"
            raise ValueError(f"{arguments.run_dir}: no step {missing[0] if missing else 1}; recorded: {there}")
        names = arguments.methods.split(",")
        if unknown := [name for name in names if name not in presets]:
            raise ValueError(f"--methods: {unknown[0]!r} is none of {', '.join(presets)}")
        run = Run(arguments.run_dir, whatif)
        run.index.update()
        lost, why = run.unread("train", steps)
        if lost:  # a mean is one of all siblings
            print(f"whatif: {lost} lines are left out, so groups and numbers are not the run's: {why}", file=sys.stderr)
        if not any(run.rows("train", step) for step in steps):
            raise ValueError(f"{run.path}: no trajectory can be read{': ' if why else ''}{why}")
        methods = {OWN: run.settings or {}} | {name: presets[name] for name in names}
        found = table(run, tqdm(steps, unit="step", file=sys.stderr), methods)
    except (ValueError, OSError, SimilarityError) as e:
        print(f"whatif: error: {e}", file=sys.stderr)
        return 1
    over = f"{len(steps)} steps from {steps[0]} to {steps[-1]}"
    print(f"{run.path}: mean advantage of a turn (share of turns above 0), {over}")
    print("\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
