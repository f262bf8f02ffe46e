"""Rewards, returns, pools and advantages of recorded trajectories as other options would have had them.

By `method/`, the code that trains. `arithmetic.js` has the same formulas for an exported page, which has no Python; a
test compares the two on a thousand generated groups. A row is what the viewer's index keeps of a trajectory:

    group, finish, acc, outcome  as recorded; `acc` None: padding, or no outcome; such a row takes part in nothing
    code                         bool: it ran code that shaping compares
    similar                      {position of a sibling in the rows: similarity}; None where nothing was recorded
    turns                        [{"tokens": n, "broken": reason or None, "said": what the tools said, "" for nothing}];
                                 `masked`: of its tokens, how many rollout correction left out; missing or None: none
    update                       which update of the step it was in: batches are of one; missing: 0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from recipe.gtpo.method.advantage import Compared, compare_returns, compare_turns
from recipe.gtpo.method.credit import Credit, assign_credit
from recipe.gtpo.method.estimators import ESTIMATORS, turn_values
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.method.similarity import make_similarity
from recipe.gtpo.method.turns import FAILED, Finish, FormatReason, ToolCall, ToolOutcome, Trajectory, Turn
from recipe.gtpo.whatif import OF_VERL, defaults, uncontrolled
from verl_ext.viewer.records import trained_tokens

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
        `return`, `mean`, `divisor` and `count` of the pool that it is compared with, `advantage`, and
        `advantage_parts`: the advantage split by reward part, adding up to it. Methods that compare in several ways or
        over tokens have no such pool and no parts: None, and {}.

    Raises ValueError naming the option that is wrong, SimilarityError when programs cannot be compared.
    """
    settings = {**defaults(), **settings}
    options = _options(settings, config)
    batches: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        if row["acc"] is not None and row["turns"]:
            batches.setdefault(row.get("update", 0), []).append(i)
    answers: list[dict[str, Any]] = [{"dropped": False, "shaped": None, "turns": []} for _ in rows]
    for batch in batches.values():
        credit = _credit(rows, batch, options, codes)
        numbers = _numbers(credit, settings, options)
        # One conversion each: asking a tensor for its numbers one by one takes most of the time of a step.
        parts = {part: getattr(credit.rewards, part).tolist() for part in PARTS}
        lists = {name: value.tolist() for name, value in numbers.items()}
        shaped = credit.shaped.tolist()
        counts, dropped = credit.turn_mask.sum(dim=1).tolist(), credit.dropped.tolist()
        for at, i in enumerate(batch):
            turns = [_turn(parts, lists, at, k) for k in range(counts[at])]
            answers[i] = {"dropped": dropped[at], "shaped": None if dropped[at] else shaped[at], "turns": turns}
    return answers


def _credit(rows: Rows, batch: Sequence[int], options: GTPOOptions, codes: Callable[[], Sequence[str]]) -> Credit:
    """Of the rows at these places. A turn counts with the tokens that were trained on, of which it may have none."""
    members = [_trajectory(i, rows[i]) for i in batch]
    credit = assign_credit(members, [str(rows[i]["group"]) for i in batch], options, _Recorded(rows, options, codes))
    spans = torch.zeros_like(credit.spans)
    for at, i in enumerate(batch):
        if credit.valid[at]:
            trained = [trained_tokens(turn) for turn in rows[i]["turns"]]
            spans[at, : len(trained), 1] = torch.tensor(trained)
    return replace(credit, spans=spans)


def _options(settings: Settings, config: Mapping[str, Any] | None) -> GTPOOptions:
    if settings["estimator"] not in ESTIMATORS:
        raise ValueError(f"estimator: {settings['estimator']!r} is not one of {', '.join(ESTIMATORS)}")
    # Options that no control changes are the run's.
    nested: dict[str, Any] = {"shaping": {"similarity": {}}} | uncontrolled(config)
    for name, value in settings.items():
        if name.startswith("shaping."):
            nested["shaping"][name.removeprefix("shaping.")] = value
        elif name not in OF_VERL:
            nested[name] = value
    prefix = "algorithm.gtpo.shaping.similarity."
    for key, value in (config or {}).items():
        if key.startswith(prefix):
            nested["shaping"]["similarity"][key.removeprefix(prefix)] = value
    return GTPOOptions.from_config(nested)


def _trajectory(position: int, row: Mapping[str, Any]) -> Trajectory:
    """A trajectory as far as credit reads it; its code is its position, which `_Recorded` looks up."""
    turns, start = [], 0
    # Code counts whatever its turn; on one that has heard from a tool it makes no state that was not there.
    heard = next((k for k, turn in enumerate(row["turns"]) if turn["said"]), 0)
    for k, turn in enumerate(row["turns"]):
        end = start + max(1, turn["tokens"])
        ran = row["code"] and k == heard
        turns.append(
            Turn(
                start,
                end,
                "",
                calls=(ToolCall("", {"code": str(position)}),) if ran else (),
                outcomes=(ToolOutcome("ok", turn["said"], 0.0),) if ran or turn["said"] else (),
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
) -> tuple[list[dict[int, float]], int, str]:
    """What an exported page needs to switch shaping on: `similar` of every row, as recorded, the missing ones computed.

    Returns them, how many pairs are still missing, and why: the backend's words, where it cannot answer.
    """
    options = _options(defaults(), config)
    found: list[dict[int, float]] = [dict(row["similar"] or {}) for row in rows]
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if row["acc"] is not None and row["code"] and Finish(row["finish"]) not in FAILED:  # these no option takes in
            groups.setdefault(str(row["group"]), []).append(i)
    pairs = []
    for members in groups.values():
        solved = [j for j in members if rows[j]["acc"] == 1]
        failed = [i for i in members if rows[i]["acc"] != 1 and any(j not in found[i] for j in solved)]
        if failed:
            pairs.append((failed, [j for j in solved if any(j not in found[i] for i in failed)]))
    if not pairs:
        return found, 0, ""
    try:
        matrices = _Recorded(rows, options, codes).compare([([*map(str, a)], [*map(str, b)]) for a, b in pairs])
    except (ValueError, RuntimeError, OSError) as error:  # a server or a model that was there when the run was
        return found, sum(j not in found[i] for a, b in pairs for i in a for j in b), str(error)
    for (failed, solved), matrix in zip(pairs, matrices, strict=True):
        for i, line in zip(failed, matrix.tolist(), strict=True):
            found[i] = dict(zip(solved, line, strict=True)) | found[i]
    return found, 0, ""


def _numbers(credit: Credit, settings: Settings, options: GTPOOptions) -> dict[str, torch.Tensor]:
    """(B, T) float32 each, by name; those that the method has not got are missing."""
    mask, groups = credit.turn_mask, credit.group_ids
    returns, advantages = turn_values(settings["estimator"], credit, options, divide=settings["divide"])
    found = {"return": returns, "advantage": advantages}
    if (pool := _pool(credit, settings, options)) is None:
        return found
    one, parts, compared, options = pool
    found |= {"mean": compared.mean, "divisor": compared.divisor, "count": compared.count}
    unscaled = replace(options, scale="none", unsolved_groups="keep")
    for name, part in parts.items():
        _, of_part = compare_turns(part, one, groups, unscaled, None, credit.states)
        found[name] = torch.where(advantages != 0, of_part.advantage / compared.divisor.clamp_min(1e-12), 0.0)
    return {name: value.expand(mask.shape) for name, value in found.items()}


def _pool(
    credit: Credit, settings: Settings, options: GTPOOptions
) -> tuple[torch.Tensor, dict[str, torch.Tensor], Compared, GTPOOptions] | None:
    """Which turns are compared, the reward parts on them, with what, and under which options; None: in no one pool."""
    parts = {name: getattr(credit.rewards, name) for name in PARTS}
    if settings["estimator"] == "gtpo":
        whole = credit.rewards.combined
        _, compared = compare_turns(whole, credit.turn_mask, credit.group_ids, options, credit.solved, credit.states)
        return credit.turn_mask, parts, compared, options
    if settings["estimator"] not in ("grpo", "rloo"):
        return None
    by_std = settings["estimator"] == "grpo" and settings["divide"]
    options = GTPOOptions(scale="std" if by_std else "none", leave_one_out=settings["estimator"] == "rloo", gamma=1.0)
    one = credit.turn_mask.any(dim=1, keepdim=True)  # each trajectory is one turn
    totals = credit.trajectory_rewards[:, None]
    compared = compare_returns(totals, one, credit.group_ids, scale=options.scale, leave_one_out=options.leave_one_out)
    return one, {name: part.sum(dim=1, keepdim=True) for name, part in parts.items()}, compared, options


def _turn(parts: Mapping[str, Any], numbers: Mapping[str, Any], row: int, turn: int) -> dict[str, Any]:
    return {
        "rewards": {part: parts[part][row][turn] for part in PARTS},
        **{
            name: numbers[name][row][turn] if name in numbers else None
            for name in ("return", "mean", "divisor", "count", "advantage")
        },
        "advantage_parts": {part: numbers[part][row][turn] for part in PARTS if part in numbers},
    }
