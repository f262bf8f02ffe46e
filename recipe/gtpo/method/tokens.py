"""Between turns and tokens, in both directions: equations (6) and (7) of recipe/gtpo/README.md.

Shapes: B rows (trajectories), T turns (the longest row's), L response tokens. `turn_mask` is (B, T) bool, true for the
turns that exist. A turn's tokens are told in one of two ways: `spans` is (B, T, 2) integer, the tokens [start, end) of
each turn, as recorded; `turn_ids` is (B, L) integer, the turn a token was generated in, -1 for every other token. All
tensors are on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

#: Elements of a (rows, length) block worked on at once: it stays in the cache, so that a pass over a gigabyte of tokens
#: allocates no second gigabyte.
_BLOCK = 1 << 18


# ---------------------------------------------------------------------------------------------------------------------
# Recorded spans


def turn_ids_of_spans(turn_mask: torch.Tensor, spans: torch.Tensor, length: int) -> torch.Tensor:
    """(B, length) int16: the turn each token was generated in, -1 elsewhere.

    Raises ValueError, naming the row, when a turn ends after `length`.
    """
    batch, turns = turn_mask.shape
    starts = torch.where(turn_mask, spans[..., 0], length)
    ends = torch.where(turn_mask, spans[..., 1], length)
    beyond = (ends > length).any(dim=1)
    if beyond.any():
        row = int(beyond.nonzero()[0])
        raise ValueError(f"row {row}: a recorded turn ends after the response's {length} tokens")
    # A row is: gap, turn 0, gap, turn 1, ..., rest. Turns that do not exist have length 0, at the end.
    edges = torch.zeros(batch, 2 * turns + 2, dtype=torch.long)
    edges[:, 1:-1:2], edges[:, 2:-1:2], edges[:, -1] = starts, ends, length
    value = torch.full((2 * turns + 1,), -1, dtype=torch.int16)
    value[1::2] = torch.arange(turns, dtype=torch.int16)
    return value.repeat(batch).repeat_interleave(edges.diff(dim=1).flatten()).view(batch, length)


def scatter_to_tokens(
    turn_values: torch.Tensor, turn_mask: torch.Tensor, spans: torch.Tensor, lengths: Sequence[int]
) -> list[torch.Tensor]:
    """One 1-D float32 tensor a row, `lengths[i]` long, with each turn's value on the turn's last token and 0 elsewhere.

    Nothing is lost: a row's tokens hold the row's turn values, (B, T), each exactly once.
    Raises ValueError, naming the row, when a turn does not fit its row.
    """
    rows, turns = turn_mask.nonzero(as_tuple=True)
    last_token = spans[rows, turns, 1] - 1
    size = torch.as_tensor(lengths, dtype=torch.long)
    if len(size) != len(turn_mask):
        raise ValueError(f"{len(size)} response lengths for {len(turn_mask)} rows")
    beyond = last_token >= size[rows]
    if beyond.any():
        at = int(beyond.nonzero()[0])
        raise ValueError(
            f"row {int(rows[at])}: turn {int(turns[at])} ends at token {int(last_token[at]) + 1} of a response of "
            f"{int(size[rows[at]])} tokens: the record is not of this row"
        )
    offset = torch.cumsum(size, 0) - size
    flat = torch.zeros(int(size.sum()), dtype=torch.float32)
    flat[offset[rows] + last_token] = turn_values[rows, turns].float()
    return list(flat.split(size.tolist()))


def at_turn_ends(
    token_values: torch.Tensor, turn_mask: torch.Tensor, spans: torch.Tensor, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, T): the value on the last token of each turn, 0 where there is no turn.

    Args:
        token_values: (B, L), or nested.
        kept: as token_values, 0 on tokens that are not trained on; the last of the others is a turn's last one, and a
            turn without any has 0. None: all are.
    """
    values = dense(token_values)
    last = (spans[..., 1] - 1).clamp_min(0)
    if kept is None:
        return torch.where(turn_mask, values.gather(1, last), 0.0)
    places = torch.where(dense(kept) > 0, torch.arange(values.shape[1]), -1).cummax(dim=1).values
    last = places.gather(1, last)
    return torch.where(turn_mask & (last >= spans[..., 0]), values.gather(1, last.clamp_min(0)), 0.0)


def mean_by_turn(token_values: torch.Tensor, turn_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(T,) float64 the mean of `token_values` (B, L) over the tokens of all k-th turns, and (T,) how many tokens."""
    generated = turn_ids >= 0
    values, turns = token_values[generated].double(), turn_ids[generated].long()
    counts = torch.bincount(turns)
    return torch.bincount(turns, weights=values) / counts.clamp_min(1), counts


def mean_of_turns(token_values: torch.Tensor, turn_ids: torch.Tensor, turns: int) -> torch.Tensor:
    """(B, turns) float32: the mean of `token_values` (B, L) over the tokens of each turn, 0 where there is none."""
    slot = torch.where(turn_ids >= 0, turn_ids.long(), turns)  # one slot more, for the tokens of no turn
    sums = torch.zeros(len(turn_ids), turns + 1, dtype=torch.float64).scatter_add_(1, slot, token_values.double())
    counts = torch.zeros_like(sums).scatter_add_(1, slot, torch.ones_like(sums[:, :1]).expand(slot.shape))
    return (sums / counts.clamp_min(1))[:, :turns].float()


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """A nested tensor padded with 0 to its longest row; a dense one as it is."""
    return tensor.to_padded_tensor(0.0) if tensor.is_nested else tensor


# ---------------------------------------------------------------------------------------------------------------------
# Turn ids, or a mask alone


class Runs(NamedTuple):
    """The maximal stretches of tokens of a row with one turn id and one mask value, in order. Tensors are (N,)."""

    row: torch.Tensor
    column: torch.Tensor  # where in the row it starts
    length: torch.Tensor
    turn: torch.Tensor  # -1: not generated
    mask: torch.Tensor  # bool
    shape: torch.Size  # (B, L)


def find_runs(response_mask: torch.Tensor, turn_ids: torch.Tensor | None) -> Runs:
    """Runs of the mask and the turn ids together. Without ids, the k-th unmasked run of a row is its turn k."""
    batch, length = response_mask.shape
    start = _run_starts(response_mask, turn_ids)
    row, column = start // max(1, length), start % max(1, length)
    run_length = torch.diff(start, append=start.new_tensor([batch * length]))
    masked = response_mask[row, column].bool()
    if turn_ids is not None:
        return Runs(row, column, run_length, turn_ids[row, column].long(), masked, response_mask.shape)
    seen = torch.cumsum(masked, 0)  # unmasked runs so far, this one included, over the whole batch
    before_row = torch.zeros(batch, dtype=torch.long).index_add_(0, row, masked.long())
    before_row = torch.cumsum(before_row, 0) - before_row
    turn = torch.where(masked, seen - 1 - before_row[row], -1)
    return Runs(row, column, run_length, turn, masked, response_mask.shape)


def turn_starts(runs: Runs) -> tuple[torch.Tensor, torch.Tensor]:
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
    starts = torch.zeros(runs.shape[0], int(turn.max()) + 1 if len(turn) else 0, dtype=torch.long)
    exists = torch.zeros_like(starts, dtype=torch.bool)
    starts[row[new], turn[new]] = column[new]
    exists[row[new], turn[new]] = True
    return starts, exists


def sum_rewards_by_turn(
    token_level_rewards: torch.Tensor, starts: torch.Tensor, turn_mask: torch.Tensor
) -> torch.Tensor:
    """(B, T) float64: a turn's reward is all that lies from its start to the next turn's start: (7).

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


def spread_to_tokens(turn_values: torch.Tensor, runs: Runs) -> torch.Tensor:
    """The value of a token is the value of its turn, (B, T) -> (B, L) float32; exactly 0 on a token that is masked or
    was not generated: (6)."""
    live = (runs.turn >= 0) & runs.mask
    padded = torch.nn.functional.pad(turn_values.float(), (0, 1))  # one column more, so that (B, 0) can be indexed too
    values = torch.where(live, padded[runs.row, runs.turn.clamp_min(0)], 0.0)
    return torch.from_numpy(np.repeat(values.numpy(), runs.length.numpy())).view(runs.shape)


# ---------------------------------------------------------------------------------------------------------------------
# The passes over all tokens, in numpy on views of the same memory: its repeat and nonzero are several times faster than
# torch's, and one thread without barriers keeps its pace when the host is busy.


def _run_starts(response_mask: torch.Tensor, turn_ids: torch.Tensor | None) -> torch.Tensor:
    """(N,) flat positions at which a row begins or its mask or turn id changes, in order."""
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


def _row_blocks(shape: torch.Size) -> Iterator[slice]:
    """The rows of a (B, L) tensor in blocks of about `_BLOCK` elements."""
    batch, length = shape
    step = max(1, _BLOCK // max(1, length))
    return (slice(top, min(top + step, batch)) for top in range(0, batch, step))
