"""Ragged batches for tests, and GTPO's advantage written again as plain float64 loops over rows, turns and tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

#: What a turn can earn: nothing, the penalty, a shaped outcome, success.
REWARDS = (0.0, -0.1, 0.25, 0.43, 1.0, 0.9)


@dataclass
class Batch:
    """B rows of L tokens, as `compute_gtpo_advantage` takes them."""

    rewards: torch.Tensor
    mask: torch.Tensor
    uids: np.ndarray
    turn_ids: torch.Tensor

    def select(self, rows) -> Batch:
        return Batch(self.rewards[rows], self.mask[rows], self.uids[np.asarray(rows)], self.turn_ids[rows])

    @property
    def args(self):
        return self.rewards, self.mask, self.uids


def make_batch(rows: list[tuple[str, list[tuple[int, int, float]]]], extra: int = 0) -> Batch:
    """One row is (uid, turns); a turn is (tokens before it that are not generated, generated tokens, reward).

    Rewards lie on the last token of their turn. `extra` padding tokens are added to the longest row.
    """
    length = max((sum(gap + size for gap, size, _ in turns) for _, turns in rows), default=0) + extra
    rewards, turn_ids = torch.zeros(len(rows), length), torch.full((len(rows), length), -1)
    for i, (_, turns) in enumerate(rows):
        at = 0
        for k, (gap, size, reward) in enumerate(turns):
            at += gap
            turn_ids[i, at : at + size] = k
            at += size
            rewards[i, at - 1] = reward
    return Batch(rewards, (turn_ids >= 0).long(), np.array([uid for uid, _ in rows], dtype=object), turn_ids)


def ragged_rows(rewards=REWARDS, max_turns: int = 5):
    """Groups of any size, interleaved; rows of one to `max_turns` turns, one to three tokens apart; padding rows."""
    turn = st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from(rewards))
    row = st.tuples(st.sampled_from("abcd"), st.lists(turn, min_size=1, max_size=max_turns))
    padding = st.tuples(st.just("pad"), st.just([]))
    return st.lists(st.one_of(row, row, row, padding), min_size=1, max_size=14)


def ragged_batches(rewards=REWARDS, max_turns: int = 5):
    """`ragged_rows` as a `Batch`, the longest row padded by one to three tokens."""
    return st.builds(make_batch, ragged_rows(rewards, max_turns), extra=st.integers(1, 3))


def reference(
    batch: Batch,
    *,
    gamma=0.9,
    baseline="group",
    scale="std",
    leave_one_out=False,
    min_pool=2,
    sparse_turn="zero",
    unsolved_groups="keep",
    solved=None,
    bootstrap=0.0,
    state_prior=1.0,
    lone_state="parent",
    states=None,
) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, returns), (B, L) float64. `turn_ids` tells the turns; the rest is the definition, loop by loop."""
    rewards, ids = batch.rewards.double().numpy(), batch.turn_ids.numpy()
    returns: dict[tuple[int, int], float] = {}
    for i in range(len(ids)):
        turns = sorted(set(ids[i]) - {-1})
        starts = [int(np.argmax(ids[i] == k)) for k in turns]
        earned = [0.0] * len(turns)
        for t, reward in enumerate(rewards[i]):
            begun = [k for k, start in enumerate(starts) if start <= t]
            if turns:
                earned[begun[-1] if begun else 0] += reward
        for k in turns:
            returns[i, int(k)] = sum(gamma ** (m - k) * earned[m] for m in range(k, len(turns)))

    def in_state(i, k):
        return [key for key in returns if states[key] == states[i, k]]

    def target(i, k):
        if (i, k + 1) not in returns:
            return returns[i, k]
        met = np.mean([returns[key] for key in in_state(i, k + 1)])
        after = (1 - bootstrap) * target(i, k + 1) + bootstrap * met
        return returns[i, k] + gamma * (after - returns[i, k + 1])

    def state_value(i, k):
        there = [returns[key] for key in in_state(i, k) if not (leave_one_out and key[0] == i)]
        if k == 0:
            return np.mean(there) if there else 0.0
        alone = [key for key in members(i, k, "group") if key[1] > 0 and len(in_state(*key)) == 1]
        others = [returns[key] for key in alone if not (leave_one_out and key[0] == i)]
        if lone_state == "lone" and (i, k) in alone and others:
            return np.mean(others)
        if not there:
            return state_value(i, k - 1)
        return (sum(there) + state_prior * state_value(i, k - 1)) / (len(there) + state_prior)

    def members(i, k, kind):
        same = {
            "batch": lambda j, m: True,
            "group": lambda j, m: batch.uids[j] == batch.uids[i],
            "state": lambda j, m: batch.uids[j] == batch.uids[i],  # but for the mean
            "turn": lambda j, m: batch.uids[j] == batch.uids[i] and m == k,
        }[kind]
        return [(j, m) for j, m in returns if same(j, m)]

    def usable(i, pool):
        others = [j for j, _ in pool if not (leave_one_out and j == i)]
        return len(pool) >= min_pool and others

    centred, std = {}, {}
    for (i, k), value in returns.items():
        pool = members(i, k, baseline)
        if not usable(i, pool) and baseline == "turn" and sparse_turn == "group":
            pool = members(i, k, "group")
        if not usable(i, pool):
            continue
        values = np.array([returns[key] for key in pool])
        mean = np.mean([returns[key] for key in pool if not (leave_one_out and key[0] == i)])
        if baseline == "state":
            mean = state_value(i, k)
        compared = target(i, k) if bootstrap else value
        flat = values.max() - values.min() <= 1e-6 * np.abs(values).max() and np.isclose(compared, value, rtol=1e-6)
        centred[i, k], std[i, k] = 0.0 if flat else compared - mean, values.std(ddof=1)
    whole = np.std(list(centred.values()), ddof=1) if len(centred) > 1 else 0.0

    advantage, spread_returns = np.zeros(ids.shape), np.zeros(ids.shape)
    for (i, k), value in returns.items():
        tokens = (ids[i] == k) & (batch.mask[i].numpy() != 0)
        spread_returns[i, tokens] = target(i, k) if bootstrap else value
        if (i, k) not in centred:
            continue
        divisor = {"std": std[i, k] + 1e-6, "batch_std": whole + 1e-6, "none": 1.0}[scale]
        if unsolved_groups == "zero" and not any(solved[j] for j, _ in members(i, k, "group")):
            continue
        advantage[i, tokens] = centred[i, k] / divisor
    return advantage, spread_returns
