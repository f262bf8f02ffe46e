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
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from recipe.gtpo.method.options import Baseline, GTPOOptions, Scale, SparseTurn, UnsolvedGroups
from recipe.gtpo.method.pools import GroupIds, PoolStatistics, group_index, pool_of, pool_statistics

logger = logging.getLogger(__name__)

#: Added to the std before dividing; verl's GRPO uses the same.
EPSILON = 1e-6

#: Elements of a (rows, length) block worked on at once: it stays in the cache, so that a pass over a gigabyte of tokens
#: allocates no second gigabyte.
_BLOCK = 1 << 18


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
# Between turns and tokens


class _Runs(NamedTuple):
    """The maximal stretches of tokens of a row with one turn id and one mask value, in order. Fields are (N,)."""

    row: torch.Tensor
    column: torch.Tensor  # where in the row it starts
    length: torch.Tensor
    turn: torch.Tensor  # -1: not generated
    mask: torch.Tensor  # bool


def spread_to_tokens(turn_values: torch.Tensor, turn_ids: torch.Tensor) -> torch.Tensor:
    """The value of a token is the value of its turn; exactly 0 where the id is -1. (B, T), (B, L) -> (B, L) float32."""
    return _spread(turn_values, _find_runs(turn_ids >= 0, turn_ids), turn_ids.shape)


def _spread(turn_values: torch.Tensor, runs: _Runs, shape: torch.Size) -> torch.Tensor:
    live = (runs.turn >= 0) & runs.mask
    padded = torch.nn.functional.pad(turn_values.float(), (0, 1))  # one column more, so that (B, 0) can be indexed too
    values = torch.where(live, padded[runs.row, runs.turn.clamp_min(0)], 0.0)
    return _repeat(values, runs.length, shape.numel()).view(shape)


def _find_runs(response_mask: torch.Tensor, turn_ids: torch.Tensor | None) -> _Runs:
    """Runs of the mask and the turn ids together. Without ids, the k-th unmasked run of a row is its turn k."""
    batch, length = response_mask.shape
    start = _run_starts(response_mask, turn_ids)
    row, column = start // max(1, length), start % max(1, length)
    run_length = torch.diff(start, append=start.new_tensor([batch * length]))
    masked = response_mask[row, column].bool()
    if turn_ids is not None:
        return _Runs(row, column, run_length, turn_ids[row, column].long(), masked)
    seen = torch.cumsum(masked, 0)  # unmasked runs so far, this one included, over the whole batch
    before_row = torch.zeros(batch, dtype=torch.long, device=row.device).index_add_(0, row, masked.long())
    before_row = torch.cumsum(before_row, 0) - before_row
    return _Runs(row, column, run_length, torch.where(masked, seen - 1 - before_row[row], -1), masked)


def _turn_starts(runs: _Runs, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) the first token of each turn (0 where there is none) and (B, T) which turns exist.

    Raises ValueError, naming the row, unless every row's turns are 0, 1, 2, ... in order.
    """
    of_turn = runs.turn >= 0
    row, column, turn = runs.row[of_turn], runs.column[of_turn], runs.turn[of_turn]
    same_row = torch.zeros_like(row, dtype=torch.bool)
    same_row[1:] = row[1:] == row[:-1]
    previous = torch.where(same_row, torch.roll(turn, 1), -1)
    wrong = (turn != previous) & (turn != previous + 1)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"row {int(row[at])}: turn {int(turn[at])} at token {int(column[at])} follows turn {int(previous[at])}; "
            "the recorded turn ids of a row must be 0, 1, 2, ... in order, -1 outside generated turns"
        )
    new = turn != previous
    starts = torch.zeros(batch, int(turn.max()) + 1 if len(turn) else 0, dtype=torch.long, device=row.device)
    exists = torch.zeros_like(starts, dtype=torch.bool)
    starts[row[new], turn[new]] = column[new]
    exists[row[new], turn[new]] = True
    return starts, exists


def _sum_rewards_by_turn(
    token_level_rewards: torch.Tensor, starts: torch.Tensor, turn_mask: torch.Tensor
) -> torch.Tensor:
    """(B, T) float64: a turn's reward is all that lies from its start to the next turn's start.

    So a reward on a masked token is not lost (verl writes the score on the last response token, whatever its mask): it
    belongs to the last turn that began at or before it, or to the first turn when none has.
    """
    begins = starts.clone()
    begins[:, :1] = 0
    rewards = torch.where(turn_mask, _segment_sums(token_level_rewards, begins, turn_mask), 0.0)
    if not torch.isfinite(rewards).all():
        row = int((~torch.isfinite(rewards)).any(dim=1).nonzero()[0])
        raise ValueError(f"row {row}: a token-level reward is NaN or infinite")
    return rewards


# ---------------------------------------------------------------------------------------------------------------------
# The three passes over all tokens. On the CPU they run in numpy, on views of the same memory: its repeat and nonzero
# are several times faster than torch's, and one thread without barriers keeps its pace when the host is busy.
# Elsewhere they are torch's. The two give the same result; a test compares them.


def _run_starts(response_mask: torch.Tensor, turn_ids: torch.Tensor | None) -> torch.Tensor:
    """(N,) flat positions at which a row begins or its mask or turn id changes, in order."""
    if response_mask.device.type == "cpu":
        return _run_starts_numpy(response_mask, turn_ids)
    return _run_starts_torch(response_mask, turn_ids)


def _run_starts_torch(response_mask: torch.Tensor, turn_ids: torch.Tensor | None) -> torch.Tensor:
    mask = response_mask.bool()
    edge = torch.ones_like(mask)
    edge[:, 1:] = mask[:, 1:] != mask[:, :-1]
    if turn_ids is not None:
        edge[:, 1:] |= turn_ids[:, 1:] != turn_ids[:, :-1]
    return edge.view(-1).nonzero().squeeze(1)


def _run_starts_numpy(response_mask: torch.Tensor, turn_ids: torch.Tensor | None) -> torch.Tensor:
    length = response_mask.shape[1]
    starts: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    for block in _row_blocks(response_mask.shape):
        mask = response_mask[block].numpy() != 0
        edge = np.ones(mask.shape, dtype=bool)
        np.not_equal(mask[:, 1:], mask[:, :-1], out=edge[:, 1:])
        if turn_ids is not None:
            ids = turn_ids[block].numpy()
            edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
        starts.append(np.flatnonzero(edge) + block.start * length)
    return torch.from_numpy(np.concatenate(starts))


def _segment_sums(values: torch.Tensor, begins: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    """(B, T) float64: the sum of `values` (B, L) from each existing begin to the row's next one or its end.

    Begins ascend in a row and the first is 0. Unspecified where none exists.
    """
    if values.device.type == "cpu":
        return _segment_sums_numpy(values, begins, exists)
    return _segment_sums_torch(values, begins, exists)


def _segment_sums_torch(values: torch.Tensor, begins: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    length = values.shape[1]
    ends = torch.nn.functional.pad(torch.where(exists, begins, length)[:, 1:], (0, 1), value=length)
    prefix = torch.nn.functional.pad(torch.cumsum(values, dim=1, dtype=torch.float64), (1, 0))
    return prefix.gather(1, ends) - prefix.gather(1, begins.clamp_max(length))


def _segment_sums_numpy(values: torch.Tensor, begins: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
    length = values.shape[1]
    sums = np.zeros(begins.shape)
    scratch = np.empty(0)
    for block in _row_blocks(values.shape):
        have = exists[block].numpy()
        rows, _ = have.nonzero()
        if len(rows):
            # A row without a begin must not be summed into the row before it: every row opens a segment.
            opens = np.arange(len(have)) * length
            flat = np.concatenate((rows * length + begins[block].numpy()[have], opens[~have.any(axis=1)]))
            order = np.argsort(flat, kind="stable")
            if scratch.size < len(have) * length:  # the first block is the largest
                scratch = np.empty(len(have) * length)
            wide = scratch[: len(have) * length]
            np.copyto(wide.reshape(len(have), length), values[block].numpy())
            parts = np.empty(len(flat))
            parts[order] = np.add.reduceat(wide, flat[order])
            sums[block][have] = parts[: len(rows)]
    return torch.from_numpy(sums)


def _repeat(values: torch.Tensor, counts: torch.Tensor, size: int) -> torch.Tensor:
    """`values[i]`, `counts[i]` times each: (size,). torch's builds an index of that size first."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.repeat(values.numpy(), counts.numpy()))
    return torch.repeat_interleave(values, counts, output_size=size)


def _row_blocks(shape: torch.Size) -> Iterator[slice]:
    """The rows of a (B, L) tensor in blocks of about `_BLOCK` elements."""
    batch, length = shape
    step = max(1, _BLOCK // max(1, length))
    return (slice(top, min(top + step, batch)) for top in range(0, batch, step))


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

    runs = _find_runs(response_mask, turn_ids)
    starts, turn_mask = _turn_starts(runs, batch=len(response_mask))
    _check_mask_inside_turns(runs)
    turn_rewards = _sum_rewards_by_turn(token_level_rewards, starts, turn_mask)
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
    return _spread(advantages, runs, response_mask.shape), _spread(returns, runs, response_mask.shape)


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


def _check_mask_inside_turns(runs: _Runs) -> None:
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
