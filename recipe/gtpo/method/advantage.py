"""The equations from the rewards of turns to their advantages (arXiv 2511.14846), numbered as in recipe/gtpo/README.md.

    (4)  R[i,j] = sum over m >= j of gamma^(m-j) * r[i,m]       `discounted_returns`
    (5)  A[i,j] = (R[i,j] - mean) / (std + 1e-6)                `compare_returns`: mean, std over a pool of returns

`turn_advantages` is the two in a row, from the options. With `bootstrap` above 0 the return of (4) becomes the target
of (9), and with `baseline=state` the mean of (5) becomes the value of (8): `states.py`.

Shapes: B rows (trajectories), T turns (the longest row's). `turn_mask` is (B, T) bool, true for the turns that exist; a
row without turns (padding, a dropped trajectory) takes part in nothing. All tensors are on the CPU.

Degenerate cases: a pool below `min_pool` and a pool of equal returns give exactly 0; nothing is ever NaN or infinite.
With one turn and gamma = 1 the result is that of verl's GRPO, bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from recipe.gtpo.method.options import Baseline, GTPOOptions, LoneState, Scale, SparseTurn, UnsolvedGroups
from recipe.gtpo.method.pools import (
    RELATIVE_RANGE,
    GroupIds,
    PoolStatistics,
    group_index,
    pool_of,
    pool_statistics,
)
from recipe.gtpo.method.states import bootstrap_returns, state_values

#: Added to the std before dividing; verl's GRPO uses the same.
EPSILON = 1e-6


def discounted_returns(turn_rewards: torch.Tensor, turn_mask: torch.Tensor, gamma: float) -> torch.Tensor:
    """R[i,j] = sum over m >= j of gamma^(m-j) * r[i,m], for the turns that exist; 0 elsewhere. (B, T) float32.

    Accumulated in float64. A reward at turn k reaches turns <= k only.
    """
    return _discounted(turn_rewards, turn_mask, gamma).float()


def _discounted(turn_rewards: torch.Tensor, turn_mask: torch.Tensor, gamma: float) -> torch.Tensor:
    rewards = torch.where(turn_mask, turn_rewards.double(), 0.0)
    turn = torch.arange(rewards.shape[1])
    lag = turn[:, None] - turn[None, :]  # m - j
    discount = torch.where(lag >= 0, torch.as_tensor(gamma, dtype=torch.float64) ** lag.clamp_min(0), 0.0)
    return torch.where(turn_mask, rewards @ discount, 0.0)


class Compared(NamedTuple):
    """What became of every return. All fields are (B, T) float32, 0 where there is no turn."""

    advantage: torch.Tensor  # (return - mean) / divisor; exactly 0 in a pool that is flat or too small
    mean: torch.Tensor  # of the pool, or of what `leave_one_out` leaves of it; `baseline=state`: shrunk, (8)
    std: torch.Tensor  # of the pool; `baseline=state`: of the prompt's returns
    divisor: torch.Tensor  # what `scale` names, with EPSILON; 1 for `none`
    count: torch.Tensor  # returns in the pool


def compare_returns(
    returns: torch.Tensor,
    turn_mask: torch.Tensor,
    group_ids: GroupIds,
    *,
    baseline: Baseline = "group",
    scale: Scale = "std",
    leave_one_out: bool = False,
    min_pool: int = 2,
    sparse_turn: SparseTurn = "zero",
    solved: torch.Tensor | None = None,
    unsolved_groups: UnsolvedGroups = "keep",
    targets: torch.Tensor | None = None,
    states: torch.Tensor | None = None,
    state_prior: float = 1.0,
    lone_state: LoneState = "parent",
) -> Compared:
    """A[i,j] = (R[i,j] - mean) / scale over the pool that `baseline` names.

    Args:
        returns: (B, T). turn_mask: (B, T) bool.
        group_ids: (B,), any labels: rows with equal labels answer one prompt. Groups may be ragged and scattered.
        baseline: the pool: `group` all turn returns of the prompt, `turn` those at the same turn index, `batch` all,
            `state` those in the same state, with the state before it as prior (`states.state_values`).
        scale: `std` the pool's own (n-1, as verl's GRPO), `batch_std` the std of all centred returns, `none` 1.
        leave_one_out: the mean (not the std) leaves out all returns of the row's own trajectory.
        min_pool: a pool with fewer returns gives 0.
        sparse_turn: what `baseline=turn` does with a pool below `min_pool`: 0, or the statistics of the group's pool.
        solved: (B,) bool, the trajectory's raw outcome; needed for `unsolved_groups=zero`.
        unsolved_groups: `zero` silences groups in which no trajectory is solved. Only their own advantages change:
            what they add to the statistics of other pools (`baseline=batch`, `scale=batch_std`) stays.
        targets: (B, T) what is compared in place of the returns, which still make up the pools: so that a pool without
            the row's own trajectory holds nothing of it (`states.bootstrap_returns`).
        states, state_prior, lone_state: of `baseline=state`, as for `states.state_values`. Its std, and its pool for
            `min_pool`, are those of all the prompt's returns.
    """
    if baseline == "state" and states is None:
        raise ValueError("baseline=state needs `states`, what the tools had said before every turn")
    if unsolved_groups == "zero" and solved is None:
        raise ValueError("unsolved_groups=zero needs `solved`, the raw outcome of every row")
    rows, turns = turn_mask.nonzero(as_tuple=True)  # row-major: every pool keeps the order of the batch, as verl's GRPO
    values = returns[rows, turns].float()
    if len(group_ids) != len(turn_mask):
        raise ValueError(f"{len(group_ids)} group ids for {len(turn_mask)} rows")
    group = group_index(group_ids)[rows]
    stats = pool_statistics(
        values, pool_of("group" if baseline == "state" else baseline, group, turns), rows, leave_one_out
    )
    counted = stats.count
    usable = (stats.count >= min_pool) & (stats.others > 0)
    if baseline == "turn" and sparse_turn == "group":
        fallback = pool_statistics(values, group, rows, leave_one_out)
        stats = PoolStatistics(*(torch.where(usable, a, b) for a, b in zip(stats, fallback, strict=True)))
        usable = (stats.count >= min_pool) & (stats.others > 0)

    if baseline == "state":
        assert states is not None
        worth, others = state_values(
            returns, turn_mask, states, leave_one_out=leave_one_out, prior=state_prior, lone_state=lone_state
        )
        stats = stats._replace(mean=worth[rows, turns].float())
        counted = others[rows, turns] + int(leave_one_out)

    compared = values if targets is None else targets[rows, turns].float()
    moved = (compared - values).abs() > RELATIVE_RANGE * values.abs()  # by a target: then a flat pool is no reason
    centred = torch.where(usable & (moved | ~stats.flat), compared - stats.mean, 0.0)
    divisor = torch.ones_like(centred)
    if scale == "std":
        divisor = stats.std + EPSILON
    elif scale == "batch_std" and int(usable.sum()) > 1:
        divisor = (centred[usable].std() + EPSILON).expand_as(centred)
    # none; or a batch without two comparable returns, where everything is 0 already
    advantage = centred / divisor
    if unsolved_groups == "zero":
        assert solved is not None
        advantage = torch.where(torch.isin(group, group[solved[rows].bool()]), advantage, 0.0)

    def at_turns(found: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(turn_mask.shape, dtype=torch.float32)
        out[rows, turns] = found
        return out

    return Compared(*map(at_turns, (advantage, stats.mean, stats.std, divisor, counted.float())))


def normalize_returns(
    returns: torch.Tensor, turn_mask: torch.Tensor, group_ids: GroupIds, **options: Any
) -> torch.Tensor:
    """A[i,j] of `compare_returns` alone, with its options: (B, T) float32."""
    return compare_returns(returns, turn_mask, group_ids, **options).advantage


def compare_turns(
    turn_rewards: torch.Tensor,
    turn_mask: torch.Tensor,
    group_ids: GroupIds,
    options: GTPOOptions,
    solved: torch.Tensor | None,
    states: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Compared]:
    """(4) and (5) as `options` has them: returns, (B, T) float32, and what they were compared with.

    With `bootstrap` above 0 the returns are the targets of (9).

    Args:
        turn_rewards: (B, T). turn_mask: (B, T) bool. group_ids: (B,), as for `compare_returns`.
        solved: (B,) bool, the raw outcomes; needed only for `unsolved_groups=zero`.
        states: (B, T), `Credit.states`; needed only for `baseline=state` and `bootstrap`.
    """
    returns = returns_of(turn_rewards, turn_mask, options, states)
    bootstrapped = options.bootstrap > 0
    compared = compare_returns(
        discounted_returns(turn_rewards, turn_mask, options.gamma) if bootstrapped else returns,
        turn_mask,
        group_ids,
        baseline=options.baseline,
        scale=options.scale,
        leave_one_out=options.leave_one_out,
        min_pool=options.min_pool,
        sparse_turn=options.sparse_turn,
        solved=solved,
        unsolved_groups=options.unsolved_groups,
        targets=returns if bootstrapped else None,
        states=states,
        state_prior=options.state_prior,
        lone_state=options.lone_state,
    )
    return returns, compared


def returns_of(
    turn_rewards: torch.Tensor, turn_mask: torch.Tensor, options: GTPOOptions, states: torch.Tensor | None = None
) -> torch.Tensor:
    """The returns of `compare_turns` alone: of (4), or with `bootstrap` above 0 the targets of (9)."""
    if options.bootstrap == 0:
        return discounted_returns(turn_rewards, turn_mask, options.gamma)
    if states is None:
        raise ValueError("bootstrap needs `states`, what the tools had said before every turn")
    sampled = _discounted(turn_rewards, turn_mask, options.gamma)
    return bootstrap_returns(sampled, turn_mask, states, gamma=options.gamma, bootstrap=options.bootstrap).float()


def turn_advantages(
    turn_rewards: torch.Tensor,
    turn_mask: torch.Tensor,
    group_ids: GroupIds,
    options: GTPOOptions,
    solved: torch.Tensor | None,
    states: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns and advantages alone, both (B, T) float32, 0 where there is no turn."""
    returns, compared = compare_turns(turn_rewards, turn_mask, group_ids, options, solved, states)
    return returns, compared.advantage
