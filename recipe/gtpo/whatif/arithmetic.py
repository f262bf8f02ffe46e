"""Rewards, returns, pools and advantages of recorded trajectories as other options would have had them.

By `method/`, the code that trains. `arithmetic.js` has the same formulas for an exported page, which has no Python; a
test compares the two on a thousand generated groups. A row is what the viewer's index keeps of a trajectory:

    group, finish, acc, outcome  as recorded; `acc` None: padding, or no outcome; such a row takes part in nothing
    code                         bool: it ran code that shaping compares
    similar                      {position of a sibling in the rows: similarity}; None where nothing was recorded
    turns                        [{"tokens": n, "broken": reason or None}, ...]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from recipe.gtpo.method.advantage import EPSILON, discounted_returns, normalize_returns, turn_advantages
from recipe.gtpo.method.credit import Credit, assign_credit
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.method.pools import group_index, pool_of, pool_statistics
from recipe.gtpo.method.similarity import make_similarity
from recipe.gtpo.method.turns import Finish, FormatReason, ToolCall, ToolOutcome, Trajectory, Turn
from recipe.gtpo.whatif import UNITS, defaults

#: Reward parts, in the order in which they are shown.
PARTS = ("outcome", "shaping", "format")

Rows = Sequence[Mapping[str, Any]]
Settings = Mapping[str, Any]


def recompute(
    rows: Rows, settings: Settings, config: Mapping[str, Any] | None, codes: Callable[[], Sequence[str]]
) -> list[dict[str, Any]]:
    """Rewards, returns, pools and advantages of all turns, as `settings` would have had them.

    Args:
        rows: all trajectories of one step, in the order of the record: a batch-wide scale needs every one.
        settings: values by name of `controls`; a missing one is the default.
        config: the run's flat config, for the backend that compares programs.
        codes: the executed code of every row; asked only where shaping needs a similarity that was not recorded.

    Returns:
        one mapping a row: `dropped`, `shaped` (the outcome after shaping), and `turns`, each with `rewards` by part,
        `return`, `mean` and `divisor` and `count` of its pool (None where there is nothing to compare with),
        `advantage`, and `advantage_parts`: the advantage split by reward part, which adds up to it.

    Raises ValueError naming the option that is wrong, SimilarityError when programs cannot be compared.
    """
    options, unit = _options({**defaults(), **settings}, config)
    taking_part = [i for i, row in enumerate(rows) if row["acc"] is not None and row["turns"]]
    members = [_trajectory(i, rows[i]) for i in taking_part]
    groups = [str(rows[i]["group"]) for i in taking_part]
    credit = assign_credit(members, groups, options, _Recorded(rows, options, codes))
    numbers = _numbers(credit, options, unit)
    # One conversion each: asking a tensor for its numbers one by one takes most of the time of a step.
    parts = {part: getattr(credit.rewards, part).tolist() for part in PARTS}
    lists = {name: value.tolist() for name, value in numbers.items()}
    shaped = (credit.outcomes + credit.rewards.shaping.sum(dim=1)).tolist()
    counts, dropped = credit.turn_mask.sum(dim=1).tolist(), credit.dropped.tolist()
    answers: list[dict[str, Any]] = [{"dropped": False, "shaped": None, "turns": []} for _ in rows]
    for at, i in enumerate(taking_part):
        turns = [_turn(parts, lists, at, k) for k in range(counts[at])]
        answers[i] = {"dropped": dropped[at], "shaped": None if dropped[at] else shaped[at], "turns": turns}
    return answers


def _options(settings: Settings, config: Mapping[str, Any] | None) -> tuple[GTPOOptions, str]:
    unit = settings["unit"]
    if unit not in UNITS:
        raise ValueError(f"unit: {unit!r} is not one of {', '.join(UNITS)}")
    nested: dict[str, Any] = {"shaping": {"similarity": {}}}
    for name, value in settings.items():
        if name == "unit":
            continue
        if name.startswith("shaping."):
            nested["shaping"][name.removeprefix("shaping.")] = value
        else:
            nested[name] = value
    prefix = "algorithm.gtpo.shaping.similarity."
    for key, value in (config or {}).items():
        if key.startswith(prefix):
            nested["shaping"]["similarity"][key.removeprefix(prefix)] = value
    return GTPOOptions.from_config(nested), unit


def _trajectory(position: int, row: Mapping[str, Any]) -> Trajectory:
    """A trajectory as far as credit reads it; its code is its position, which `_Recorded` looks up."""
    turns, start = [], 0
    for k, turn in enumerate(row["turns"]):
        end = start + max(1, turn["tokens"])
        ran = row["code"] and k == 0
        turns.append(
            Turn(
                start,
                end,
                "",
                calls=(ToolCall("", {"code": str(position)}),) if ran else (),
                outcomes=(ToolOutcome("ok", "", 0.0),) if ran else (),
                broken=FormatReason(turn["broken"]) if turn["broken"] else None,
            )
        )
        start = end
    return Trajectory(tuple(turns), Finish(row["finish"]), float(row["acc"]), outcome=row["outcome"])


class _Recorded:
    """The similarities of the record; where it has none, the backend's that the run's options name."""

    def __init__(self, rows: Rows, options: GTPOOptions, codes: Callable[[], Sequence[str]]) -> None:
        self._rows, self._options, self._codes = rows, options, codes

    def compare(self, groups: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[np.ndarray]:
        matrices = [self._look_up(a, b) for a, b in groups]
        missing = [at for at, matrix in enumerate(matrices) if matrix is None]
        if missing:
            codes = self._codes()
            texts = [tuple([codes[int(i)] for i in side] for side in groups[at]) for at in missing]
            backend = make_similarity(self._options.shaping.similarity)
            for at, matrix in zip(missing, backend.compare(texts), strict=True):  # type: ignore[arg-type]
                matrices[at] = matrix
        return matrices  # type: ignore[return-value]

    def _look_up(self, a: Sequence[str], b: Sequence[str]) -> np.ndarray | None:
        known = [self._rows[int(i)]["similar"] or {} for i in a]
        if any(int(j) not in row for row in known for j in b):
            return None
        return np.array([[row[int(j)] for j in b] for row in known])


def similarities(
    rows: Rows, config: Mapping[str, Any] | None, codes: Callable[[], Sequence[str]]
) -> list[dict[int, float] | None]:
    """`similar` of every row, the missing ones computed: what an exported page needs to switch shaping on."""
    options, _ = _options(defaults(), config)
    found: list[dict[int, float] | None] = [dict(row["similar"]) if row["similar"] else None for row in rows]
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if row["acc"] is not None and row["code"]:
            groups.setdefault(str(row["group"]), []).append(i)
    pairs = []
    for members in groups.values():
        failed = [i for i in members if rows[i]["acc"] != 1]
        solved = [i for i in members if rows[i]["acc"] == 1]
        if failed and solved:
            pairs.append((failed, solved))
    matrices = _Recorded(rows, options, codes).compare([([*map(str, a)], [*map(str, b)]) for a, b in pairs])
    for (failed, solved), matrix in zip(pairs, matrices, strict=True):
        for i, line in zip(failed, matrix.tolist(), strict=True):
            found[i] = dict(zip(solved, line, strict=True))
    return found


def _numbers(credit: Credit, options: GTPOOptions, unit: str) -> dict[str, torch.Tensor]:
    """(B, T) each. With `unit=trajectory` all turns of a row have its numbers, as in verl's GRPO, Dr. GRPO and RLOO."""
    mask, groups = credit.turn_mask, credit.group_ids
    rewards = {part: getattr(credit.rewards, part) for part in PARTS}
    if unit == "trajectory":
        one = mask.any(dim=1, keepdim=True)
        compared = GTPOOptions(scale=options.scale, leave_one_out=options.leave_one_out, gamma=1.0)
        rewards = {part: value.sum(dim=1, keepdim=True) for part, value in rewards.items()}
    else:
        one, compared = mask, options
    total = torch.stack(list(rewards.values())).sum(dim=0)
    returns, advantages = turn_advantages(total, one, groups, compared, credit.solved)
    pool = _pool(returns, one, groups, compared)
    numbers = {"return": returns, "advantage": advantages} | pool
    for part, value in rewards.items():
        centred = normalize_returns(
            discounted_returns(value, one, compared.gamma),
            one,
            groups,
            baseline=compared.baseline,
            scale="none",
            leave_one_out=compared.leave_one_out,
            min_pool=compared.min_pool,
            sparse_turn=compared.sparse_turn,
        )
        numbers[part] = torch.where(advantages != 0, centred / pool["divisor"].nan_to_num(nan=1.0), 0.0)
    return {name: value.expand(mask.shape) for name, value in numbers.items()}


def _pool(
    returns: torch.Tensor, mask: torch.Tensor, groups: Sequence[str], options: GTPOOptions
) -> dict[str, torch.Tensor]:
    """What each return is compared with and divided by; NaN where its pool is too small."""
    rows, turns = mask.nonzero(as_tuple=True)
    values, group = returns[rows, turns], group_index(groups)[rows]
    stats = pool_statistics(values, pool_of(options.baseline, group, turns), rows, options.leave_one_out)
    usable = (stats.count >= options.min_pool) & (stats.others > 0)
    if options.baseline == "turn" and options.sparse_turn == "group":
        other = pool_statistics(values, group, rows, options.leave_one_out)
        stats = type(stats)(*(torch.where(usable, a, b) for a, b in zip(stats, other, strict=True)))
        usable = (stats.count >= options.min_pool) & (stats.others > 0)
    if options.scale == "std":
        divisor = stats.std + EPSILON
    elif options.scale == "batch_std" and int(usable.sum()) > 1:
        centred = torch.where(usable & ~stats.flat, values - stats.mean, 0.0)
        divisor = torch.full_like(values, float(centred[usable].std() + EPSILON))
    else:
        divisor = torch.ones_like(values)
    out = {}
    for name, value in {"mean": stats.mean, "divisor": divisor, "count": stats.count.float()}.items():
        out[name] = torch.full(mask.shape, float("nan"))
        out[name][rows, turns] = torch.where(usable, value, float("nan"))
    return out


def _turn(parts: Mapping[str, Any], numbers: Mapping[str, Any], row: int, turn: int) -> dict[str, Any]:
    def number(name: str) -> float | None:
        value = numbers[name][row][turn]
        return None if value != value else value

    return {
        "rewards": {part: parts[part][row][turn] for part in PARTS},
        **{name: number(name) for name in ("return", "mean", "divisor", "count", "advantage")},
        "advantage_parts": {part: number(part) for part in PARTS},
    }
