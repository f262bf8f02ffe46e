"""Draw who gets credit for what in one group: `python -m recipe.gtpo.experiments.draw_credit RUN_DIR --step 3`.

One row a trajectory, one cell a turn, coloured by GTPO's advantage of that turn; at the right, what GRPO would give the
whole trajectory. RUN_DIR is a run folder of any method: both are computed here from the recorded turns, with the
default options. Without RUN_DIR it draws the group that is committed with the picture of the README,
`docs/credit_group.jsonl`: rows of one prompt, copied from a `trajectories/<step>.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipe.gtpo.method.advantage import discounted_returns, normalize_returns
from recipe.gtpo.method.credit import assign_credit
from recipe.gtpo.method.options import GTPOOptions, ShapingOptions
from recipe.gtpo.method.turns import Finish, Trajectory, Turn
from recipe.gtpo.run.record import RunRecord

DOCS = Path(__file__).parents[3] / "docs"
EXAMPLE = DOCS / "credit_group.jsonl"

Group = Sequence[Trajectory]  # siblings: trajectories of one prompt


# ---------------------------------------------------------------------------------------------------------------------
# The group


def by_prompt(rows: Iterable[dict[str, Any]]) -> dict[str, list[Trajectory]]:
    """The recorded trajectories of a step by prompt, without those that were dropped."""
    groups: dict[str, list[Trajectory]] = {}
    for row in rows:
        if not row["dropped"]:
            groups.setdefault(row["group"], []).append(Trajectory.from_dict(row))
    return groups


def choose(groups: dict[str, list[Trajectory]]) -> str:
    """The group that shows most: as many of these as there are, and then the most different trajectories."""

    def shows(label: str) -> tuple[int, int]:
        group = groups[label]
        credit = assign_credit(group, [label] * len(group), GTPOOptions())
        features = (
            0 < sum(t.acc for t in group) < len(group),
            len({len(t.turns) for t in group}) > 1,
            any(t.acc and turn.broken for t in group for turn in t.turns),  # solved in spite of a broken turn
            any(outcome.outcome != "ok" for t in group for turn in t.turns for outcome in turn.outcomes),
            bool((credit.rewards.shaping > 0).any()),
        )
        return sum(features), len({tuple(turn.text for turn in t.turns) for t in group})

    return max(groups, key=shows)


def gtpo_advantages(group: Group) -> list[list[float]]:
    """A number a turn, by trajectory: `method=gtpo`."""
    options, prompt = GTPOOptions(), [""] * len(group)
    credit = assign_credit(group, prompt, options)
    returns = discounted_returns(credit.rewards.combined, credit.turn_mask, options.gamma)
    advantages = normalize_returns(returns, credit.turn_mask, prompt)
    return [row[mask].tolist() for row, mask in zip(advantages, credit.turn_mask, strict=True)]


def grpo_advantages(group: Group) -> list[float]:
    """A number a trajectory: `method=grpo_sum`, the summed rewards without shaping."""
    prompt = [""] * len(group)
    credit = assign_credit(group, prompt, GTPOOptions(shaping=ShapingOptions(enable=False)))
    summed = credit.rewards.combined.sum(dim=1, keepdim=True)
    return normalize_returns(summed, torch.ones_like(summed, dtype=torch.bool), prompt).squeeze(1).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# What a cell says


_NOT_EXECUTED = {"malformed": "malformed call", "over_limit": "too many calls"}


def describe(trajectory: Trajectory, index: int) -> tuple[str, str]:
    """What the turn did, and what came of it."""
    turn = trajectory.turns[index]
    last = index == len(trajectory.turns) - 1
    if turn.calls:
        return _code(turn), _tool_result(turn)
    if last and trajectory.finish is Finish.ANSWER and trajectory.pred:
        manner = ", no call" if turn.broken else " answer"
        return f"= {trajectory.pred}", ("✓ right" if trajectory.acc else "✗ wrong") + manner
    return turn.text, f"✗ {turn.broken.value if turn.broken else 'cut off'}".replace("_", " ")


def _code(turn: Turn) -> str:
    code = turn.calls[0].arguments.get("code")
    if code is None:  # the call was not parsed: what it was going to be
        found = re.search(r'"code":\s*"([^"]*)', turn.text)
        code = found[1] if found else turn.text
    return str(code)


def _tool_result(turn: Turn) -> str:
    if not turn.outcomes:
        return "✗ cut off"
    first = turn.outcomes[0]
    if first.outcome == "ok":
        return f"tool: {first.output}"
    return f"✗ {_NOT_EXECUTED.get(first.outcome, first.outcome).replace('_', ' ')}"


# ---------------------------------------------------------------------------------------------------------------------
# The picture. Lengths are pixels of a page on which it is 880 wide, or wider where a trajectory has many turns; y grows
# downwards.

_WIDTH, _MARGIN, _TOP, _FOOT = 880, 18, 118, 82
_CELL, _HEIGHT, _GAP = 128, 44, 6
_LEFT, _OUTCOME, _GRPO = 42, 84, 184  # the row's number; the two columns at the right
_COLOURS = ("#b35806", "#e08214", "#fdb863", "#fee0b6", "#ffffff", "#d1e5f0", "#92c5de", "#4393c3", "#2166ac")
_INK, _FAINT, _EDGE = "#222222", "#666666", "#b0b0b0"
_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}


def draw(group: Group, out: Path) -> None:
    """Write the picture of a group as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # only who draws pays for the import
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch
    from PIL import Image

    by_turn, by_row = gtpo_advantages(group), grpo_advantages(group)
    order = sorted(range(len(group)), key=lambda i: (-group[i].acc, len(group[i].turns), [-a for a in by_turn[i]]))
    most = max(len(t.turns) for t in group)
    limit = max(abs(a) for row in [*by_turn, by_row] for a in row) or 1.0
    shade = ScalarMappable(Normalize(-limit, limit), LinearSegmentedColormap.from_list("credit", _COLOURS))

    width = max(_WIDTH, _LEFT + most * (_CELL + _GAP) + 2 * _GAP + _OUTCOME + _GRPO + _MARGIN)
    height = _TOP + len(group) * (_HEIGHT + _GAP) + _FOOT
    grpo = width - _MARGIN - _GRPO
    outcome = grpo - _OUTCOME
    cell = (outcome - 2 * _GAP - _LEFT) / most - _GAP
    figure = Figure(figsize=(width / 100, height / 100), dpi=200, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")

    def text(x: float, y: float, what: str, size: float = 8, **style: Any) -> None:
        look: dict[str, Any] = {"fontsize": size, "color": _INK, "va": "center", "parse_math": False}
        axes.text(x, y, what, **look | style)

    def box(x: float, y: float, width: float, advantage: float) -> str:
        """A coloured cell. Returns the colour that is legible on it."""
        colour = shade.to_rgba(np.array(advantage))
        look: dict[str, Any] = {"facecolor": colour, "edgecolor": _EDGE, "linewidth": 0.6}
        axes.add_patch(FancyBboxPatch((x, y), width, _HEIGHT, boxstyle="round,pad=0,rounding_size=5", **look))
        luminance = sum(w * c**2.2 for w, c in zip((0.2126, 0.7152, 0.0722), colour, strict=False))
        return "white" if luminance < 0.21 else _INK  # where both contrast alike

    count = _WORDS.get(len(group), len(group))
    title = f"One prompt, {count} trajectories: advantage by turn (GTPO) and by trajectory (GRPO)"
    text(_MARGIN, 26, title, 11.5, weight="bold")
    meaning = "Training makes blue turns more likely, orange turns less."
    cause = "A turn answers for itself and, discounted, for what follows."
    text(_MARGIN, 50, f"{meaning} {cause}", 8.5, color=_FAINT)
    text(_LEFT, 82, "GTPO: one colour per turn", 9, weight="bold")
    text(grpo, 82, "GRPO: one colour per row", 9, weight="bold")
    for k in range(most):
        text(_LEFT + k * (cell + _GAP), 105, f"turn {k + 1}", color=_FAINT)
    text(outcome, 105, "outcome", color=_FAINT)
    text(grpo, 105, "the whole trajectory", color=_FAINT)

    for place, i in enumerate(order):
        trajectory, y = group[i], _TOP + place * (_HEIGHT + _GAP)
        middle = y + _HEIGHT / 2
        text(_MARGIN, middle, str(place + 1), color=_FAINT)
        for k, advantage in enumerate(by_turn[i]):
            x = _LEFT + k * (cell + _GAP)
            ink = box(x, y, cell, advantage)
            did, result = describe(trajectory, k)
            text(x + 8, y + 15, _fit(did, cell - 52, 6.8), family="DejaVu Sans Mono", color=ink)
            text(x + cell - 7, y + 15, _signed(advantage), 7.5, color=ink, ha="right", weight="bold")
            text(x + 8, y + 32, _fit(result, cell - 14, 6.4), 7.5, color=ink)
        text(outcome, middle, "✓ solved" if trajectory.acc else "✗ failed", 8.5, weight="bold")
        length = _GRPO * len(trajectory.turns) / most
        ink = box(grpo, y, length, by_row[i])
        text(grpo + length / 2, middle, _signed(by_row[i]), 8.5, color=ink, ha="center", weight="bold")

    bar = figure.add_axes((0.3, 46 / height, 0.4, 10 / height))
    figure.colorbar(shade, cax=bar, orientation="horizontal")
    for spine in bar.spines.values():
        spine.set(edgecolor=_EDGE, linewidth=0.6)
    bar.set_xlabel("advantage", fontsize=8, color=_INK, labelpad=1)
    bar.tick_params(labelsize=7.5, color=_EDGE, labelcolor=_INK, length=2)
    text(0.3 * width - 10, height - 51, "less likely", ha="right", color=_FAINT)
    text(0.7 * width + 10, height - 51, "more likely", color=_FAINT)

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # 256 colours: a third of the size
    image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, optimize=True)


def _signed(number: float) -> str:
    return f"{number:+.2f}".replace("-", "−")


def _fit(text: str, width: float, character: float) -> str:
    """One line that is no wider."""
    line = " ".join(text.split())
    room = max(2, int(width / character))
    return line if len(line) <= room else line[: room - 1] + "…"


# ---------------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m recipe.gtpo.experiments.draw_credit", description=__doc__)
    parser.add_argument("run_dir", nargs="?", type=Path, help="a run folder; default: the committed example")
    parser.add_argument("--step", type=int, help="training step; default: the last one recorded")
    parser.add_argument("--group", help="the group's id or how it begins; default: the one that shows most")
    parser.add_argument("-o", "--out", type=Path, help="default: ./credit.png; of the example, its picture in docs/")
    options = parser.parse_args(argv)
    out = options.out or (DOCS if options.run_dir is None else Path()) / "credit.png"
    try:
        groups = by_prompt(_rows(options.run_dir, options.step))
        label = _find(groups, options.group) if options.group else choose(groups)
    except (OSError, ValueError) as e:
        sys.exit(str(e))
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(groups[label], out)
    print(f"{out}: group {label}")


def _rows(run_dir: Path | None, step: int | None) -> list[dict[str, Any]]:
    if run_dir is None:
        return [json.loads(line) for line in EXAMPLE.read_text().splitlines()]
    record = RunRecord(run_dir)
    return record.read_trajectories(max(record.trajectory_steps(), default=0) if step is None else step)


def _find(groups: dict[str, list[Trajectory]], start: str) -> str:
    found = [label for label in groups if label.startswith(start)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} groups begin with {start!r}; groups: {', '.join(groups)}")
    return found[0]


if __name__ == "__main__":
    main()
