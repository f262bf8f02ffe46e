"""From rewards to one advantage per generated token: the second part of GTPO (arXiv 2511.14846), without verl.

    R[i,j] = sum over m >= j of gamma^(m-j) * r[i,m]       `discounted_returns`     one number a turn
    A[i,j] = (R[i,j] - mean) / (std + 1e-6)                `normalize_returns`      mean, std over a pool of returns
    A[i,t] = A[i, turn of token t], else exactly 0         `spread_to_tokens`       tool output, template, padding: 0

`compute_gtpo_advantage` is the three in a row with the signature of verl's advantage registry. That registry passes
neither turns nor outcomes, so a trainer that has recorded them hands them over with `recorded_turns`; without a record
the turns are the runs of the response mask.

Shapes: B rows (trajectories), T turns (the longest row's), L response tokens. `turn_mask` is (B, T) bool, true for the
turns that exist. `turn_ids` is (B, L) integer: the turn a token was generated in, -1 for every other token. A row whose
ids are all -1 (padding, a dropped trajectory) takes part in nothing.

Degenerate cases: a pool below `min_pool` and a pool without spread give exactly 0; nothing is ever NaN or infinite.
With one turn and gamma = 1 the result is that of verl's GRPO, bit for bit.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch

from recipe.gtpo.method.options import Baseline, GTPOOptions, Scale, SparseTurn, UnsolvedGroups
from recipe.gtpo.method.pools import GroupIds, PoolStatistics, group_index, pool_of, pool_statistics
from recipe.gtpo.method.tokens import Runs, find_runs, spread_to_tokens, sum_rewards_by_turn, turn_starts

logger = logging.getLogger(__name__)

#: Added to the std before dividing; verl's GRPO uses the same.
EPSILON = 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Returns


def discounted_returns(turn_rewards: torch.Tensor, turn_mask: torch.Tensor, gamma: float) -> torch.Tensor:
    """R[i,j] = sum over m >= j of gamma^(m-j) * r[i,m], for the turns that exist; 0 elsewhere. (B, T) float32.

    Accumulated in float64. A reward at turn k reaches turns <= k only.
    """
    rewards = torch.where(turn_mask, turn_rewards.double(), 0.0)
    turn = torch.arange(rewards.shape[1], device=rewards.device)
    lag = turn[:, None] - turn[None, :]  # m - j
    discount = torch.where(lag >= 0, torch.as_tensor(gamma, dtype=torch.float64) ** lag.clamp_min(0), 0.0)
    return torch.where(turn_mask, rewards @ discount.to(rewards), 0.0).float()


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation over a pool


def normalize_returns(
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
) -> torch.Tensor:
    """A[i,j] = (R[i,j] - mean) / scale over the pool that `baseline` names. (B, T) float32, 0 where there is no turn.

    Args:
        returns: (B, T). turn_mask: (B, T) bool.
        group_ids: (B,), any labels: rows with equal labels answer one prompt. Groups may be ragged and scattered.
        baseline: the pool: `group` all turn returns of the prompt, `turn` those at the same turn index, `batch` all.
        scale: `std` the pool's own (n-1, as verl's GRPO), `batch_std` the std of all centred returns, `none` 1.
        leave_one_out: the mean (not the std) leaves out all returns of the row's own trajectory.
        min_pool: a pool with fewer returns gives 0.
        sparse_turn: what `baseline=turn` does with a pool below `min_pool`: 0, or the statistics of the group's pool.
        solved: (B,) bool, the trajectory's raw outcome; needed for `unsolved_groups=zero`.
        unsolved_groups: `zero` silences groups in which no trajectory is solved. Only their own advantages change:
            what they add to the statistics of other pools (`baseline=batch`, `scale=batch_std`) stays.
    """
    if unsolved_groups == "zero" and solved is None:
        raise ValueError("unsolved_groups=zero needs `solved`, the raw outcome of every row")
    rows, turns = turn_mask.nonzero(as_tuple=True)  # row-major: every pool keeps the order of the batch, as verl's GRPO
    values = returns[rows, turns].float()
    if len(group_ids) != len(turn_mask):
        raise ValueError(f"{len(group_ids)} group ids for {len(turn_mask)} rows")
    group = group_index(group_ids, returns.device)[rows]
    stats = pool_statistics(values, pool_of(baseline, group, turns), rows, leave_one_out)
    usable = (stats.count >= min_pool) & (stats.others > 0)
    if baseline == "turn" and sparse_turn == "group":
        fallback = pool_statistics(values, group, rows, leave_one_out)
        stats = PoolStatistics(*(torch.where(usable, a, b) for a, b in zip(stats, fallback, strict=True)))
        usable = (stats.count >= min_pool) & (stats.others > 0)

    centred = torch.where(usable & ~stats.flat, values - stats.mean, 0.0)
    if scale == "std":
        advantage = centred / (stats.std + EPSILON)
    elif scale == "batch_std" and int(usable.sum()) > 1:
        advantage = centred / (centred[usable].std() + EPSILON)
    else:  # none; or a batch without two comparable returns, where everything is 0 already
        advantage = centred
    if unsolved_groups == "zero":
        assert solved is not None
        solved_in = torch.zeros(int(group.max()) + 1 if len(group) else 0, device=returns.device)
        solved_in.index_add_(0, group, solved.to(values)[rows])
        advantage = torch.where(solved_in[group] > 0, advantage, 0.0)

    out = torch.zeros(turn_mask.shape, dtype=torch.float32, device=returns.device)
    out[rows, turns] = advantage
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The estimator, as verl's registry calls it


_Record: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]  # turn ids, solved

_RECORDED: ContextVar[_Record | None] = ContextVar("gtpo_recorded_turns", default=None)


@contextmanager
def recorded_turns(turn_ids: torch.Tensor, solved: torch.Tensor | None = None) -> Iterator[None]:
    """Hand the recorded turns to the `compute_gtpo_advantage` that verl calls inside the `with` block.

    Args:
        turn_ids: (B, L), rows in the order of the batch. Another width than the rewards' is accepted when no turn is
            cut: missing columns count as -1, surplus ones must all be -1.
        solved: (B,) bool, the raw outcomes; needed only for `unsolved_groups=zero`.
    """
    token = _RECORDED.set((turn_ids, solved))
    try:
        yield
    finally:
        _RECORDED.reset(token)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Apart from the passes over all tokens everything here is small, and there are some fifty operations: with several
    threads each waits at a barrier, for milliseconds when the host is busy. Measured so: 7 times faster with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
@_one_thread()
def compute_gtpo_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: GroupIds,
    config: Mapping[str, Any] | None = None,
    turn_ids: torch.Tensor | None = None,
    solved: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GTPO's advantages and returns, both (B, L) float32 and exactly 0 outside unmasked generated tokens.

    Args:
        token_level_rewards: (B, L). A turn's reward is what lies on its tokens and on the tokens after it up to the
            next turn; rows without a turn are ignored.
        response_mask: (B, L), non-zero on tokens that are trained on.
        index: (B,) the prompt of each row (verl's uid).
        config: verl's `config.algorithm`; our options are its key `gtpo` (absent: the defaults).
        turn_ids: (B, L); without it those of `recorded_turns`; without those the runs of `response_mask` are the
            turns. A masked token inside a recorded turn (rollout correction rejects tokens) gets 0 and changes nothing
            else; a row whose tokens are all rejected still counts in its pool, as in verl's GRPO.
        solved: (B,) bool, the raw outcomes, as for `recorded_turns`.

    Raises ValueError, naming the row, when turns and mask disagree, a reward is not finite, or an option needs a record
    that is not there.
    """
    options = GTPOOptions.from_config(None if config is None else config.get("gtpo"))
    record = _RECORDED.get()
    if turn_ids is None and record is not None:
        turn_ids, solved = record
    if turn_ids is None:
        _check_runs_on_the_mask(config, options, solved)
    else:
        turn_ids = _fit(turn_ids.to(response_mask.device), response_mask)

    runs = find_runs(response_mask, turn_ids)
    starts, turn_mask = turn_starts(runs)
    _check_mask_inside_turns(runs)
    turn_rewards = sum_rewards_by_turn(token_level_rewards, starts, turn_mask)
    returns = discounted_returns(turn_rewards, turn_mask, options.gamma)
    advantages = normalize_returns(
        returns,
        turn_mask,
        index,
        baseline=options.baseline,
        scale=options.scale,
        leave_one_out=options.leave_one_out,
        min_pool=options.min_pool,
        sparse_turn=options.sparse_turn,
        solved=None if solved is None else solved.to(returns.device),
        unsolved_groups=options.unsolved_groups,
    )
    return spread_to_tokens(advantages, runs), spread_to_tokens(returns, runs)


def _fit(turn_ids: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Turn ids as wide as the mask, when that loses nothing."""
    batch, length = response_mask.shape
    if turn_ids.ndim != 2 or len(turn_ids) != batch:
        raise ValueError(f"turn ids of shape {tuple(turn_ids.shape)} for a batch of shape {(batch, length)}")
    surplus = turn_ids[:, length:] != -1
    if surplus.any():
        row = int(surplus.any(dim=1).nonzero()[0])
        raise ValueError(f"row {row}: a recorded turn goes on after the response's {length} tokens")
    missing = length - turn_ids.shape[1]
    return torch.nn.functional.pad(turn_ids, (0, missing), value=-1) if missing > 0 else turn_ids[:, :length]


def _check_mask_inside_turns(runs: Runs) -> None:
    outside = runs.mask & (runs.turn < 0)
    if outside.any():
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"row {int(runs.row[at])}: response_mask trains on token {int(runs.column[at])}, which is in none of the "
            "row's recorded turns. Either the record is another row's, or a dropped row still has its mask: zero it"
        )


def _check_runs_on_the_mask(
    config: Mapping[str, Any] | None, options: GTPOOptions, solved: torch.Tensor | None
) -> None:
    """Refuse what cannot be right when turns are read off the mask."""
    if options.unsolved_groups == "zero" and solved is None:
        raise ValueError(
            "algorithm.gtpo.unsolved_groups=zero needs recorded outcomes: a positive reward is no proof of success. "
            "Run it with recipe.gtpo's trainer, or set unsolved_groups=keep"
        )
    correction = None if config is None else config.get("rollout_correction")
    # verl's trainers rewrite response_mask before the advantage when rejection sampling is on, except in bypass mode,
    # where the loss rejects. Importance weights (rollout_is) leave the mask alone.
    if correction is not None and correction.get("rollout_rs") is not None and not correction.get("bypass_mode"):
        raise ValueError(
            f"algorithm.rollout_correction.rollout_rs={correction.get('rollout_rs')} rewrites response_mask: without "
            "recorded turns a rejected token would split its turn in two. Use recipe.gtpo's trainer (it records "
            "turns), or set rollout_rs=null, or bypass_mode=true"
        )
    _say_turns_come_from_the_mask()


@functools.cache  # once a process
def _say_turns_come_from_the_mask() -> None:
    logger.warning("gtpo: no recorded turns: turns from the response mask, outcome on the last turn, no shaping")
