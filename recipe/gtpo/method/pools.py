"""The pools of returns that an advantage is taken over, and their statistics.

A pool is the returns of a prompt, of one turn index or one state of a prompt, or of the whole batch
(`options.Baseline`). N returns, B rows (trajectories), T turns; `turn_mask` is (B, T) bool, true for the turns that
exist.

Statistics use the same float32 torch operations in the same order as verl's GRPO, so that with one turn and gamma = 1
the advantages of the two agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from recipe.gtpo.method.options import Baseline

#: Returns count as equal when the largest and the smallest differ by at most this share of the larger magnitude.
RELATIVE_RANGE = 1e-6

GroupIds: TypeAlias = torch.Tensor | np.ndarray | Sequence[Any]


class PoolStatistics(NamedTuple):
    """Of the pool each return is in: all fields are (N,), one entry a return."""

    count: torch.Tensor  # returns in the pool
    others: torch.Tensor  # returns the mean is taken over: `count`, or those of other trajectories
    mean: torch.Tensor
    std: torch.Tensor
    flat: torch.Tensor  # bool: the returns are all equal


def pool_of(
    baseline: Baseline, group: torch.Tensor, turns: torch.Tensor, states: torch.Tensor | None = None
) -> torch.Tensor:
    """(N,) the pool of each return, as any integer label. `states` (N,) are read for `state` only, and needed there."""
    if baseline == "state":
        assert states is not None, "baseline=state needs the states"
        return states
    if baseline == "group":
        return group
    if baseline == "turn":
        return group * (int(turns.max()) + 1 if len(turns) else 1) + turns
    return torch.zeros_like(group)


def pool_statistics(
    values: torch.Tensor, pool: torch.Tensor, rows: torch.Tensor, leave_one_out: bool
) -> PoolStatistics:
    """Statistics of ragged pools: pools of one size form a dense (pools, size) block, reduced along its rows.

    That is the reduction verl applies to each group, so the results are the same to the last bit; padding the pools to
    one size and dividing masked sums would not give that. One iteration a distinct size, of which there are few.
    """
    _, pool, counts = torch.unique(pool, return_inverse=True, return_counts=True)
    order = torch.argsort(pool, stable=True)
    first = torch.cumsum(counts, 0) - counts
    mean = torch.zeros(len(counts), dtype=torch.float32)
    std, low, high = mean.clone(), mean.clone(), mean.clone()
    for size in torch.unique(counts).tolist():
        pools = (counts == size).nonzero().squeeze(1)
        block = values[order[first[pools, None] + torch.arange(size)]]
        mean[pools] = block.mean(dim=1)
        low[pools], high[pools] = torch.aminmax(block, dim=1)
        if size > 1:
            std[pools] = block.std(dim=1)
    flat = high - low <= RELATIVE_RANGE * torch.maximum(high.abs(), low.abs())

    count, others, mean_of = counts[pool], counts[pool], mean[pool]
    if leave_one_out:
        _, own, own_counts = torch.unique(torch.stack((pool, rows)), dim=1, return_inverse=True, return_counts=True)
        wide = values.double()
        sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, pool, wide)
        own_sums = torch.zeros(len(own_counts), dtype=torch.float64).index_add_(0, own, wide)
        others = count - own_counts[own]
        mean_of = ((sums[pool] - own_sums[own]) / others.clamp_min(1)).float()
    return PoolStatistics(count, others, mean_of, std[pool], flat[pool])


def group_index(group_ids: GroupIds) -> torch.Tensor:
    """(B,) labels of any hashable kind as (B,) integers from 0. Labels are one group when Python says they are equal.

    Raises ValueError, naming the row, for a label that is None or NaN, or that cannot be compared.
    """
    if isinstance(group_ids, torch.Tensor):
        return torch.unique(group_ids, return_inverse=True)[1].cpu()
    # By hash, not by numpy's sort: an array of labels would make the texts "1" and "1" of [1, "1"].
    labels = group_ids.tolist() if isinstance(group_ids, np.ndarray) else list(group_ids)
    seen: dict[Any, int] = {}
    index = []
    for row, label in enumerate(labels):
        try:
            known = label is not None and label == label
            index.append(seen.setdefault(label, len(seen)))
        except TypeError:
            known = False
        if not known:
            raise ValueError(f"row {row}: a group id must be a number, a text or a tuple of them, not {label!r}")
    return torch.tensor(index, dtype=torch.long)


def zero_spread_share(
    returns: torch.Tensor,
    turn_mask: torch.Tensor,
    group_ids: GroupIds,
    baseline: Baseline = "group",
    states: torch.Tensor | None = None,
) -> float:
    """The share of pools whose returns are all equal (one-return pools too): they teach nothing. 0.0 without a pool."""
    rows, turns = turn_mask.nonzero(as_tuple=True)
    if not len(rows):
        return 0.0
    in_state = None if states is None else states[rows, turns]
    pool = pool_of(baseline, group_index(group_ids)[rows], turns, in_state)
    stats = pool_statistics(returns[rows, turns].float(), pool, rows, leave_one_out=False)
    return float((stats.flat / stats.count).sum() / (1 / stats.count).sum())  # every pool weighs one
