"""The advantages of the methods that GTPO is compared with, from the rewards of turns.

Each function is one method, with its paper. Where verl has the method, a run under verl uses verl's own function, and
the plain-PyTorch engine this one; tests say that the two agree (tests/gtpo/method/test_rivals.py).

Shapes: B rows (trajectories), T turns. `turn_rewards` is (B, T), `turn_mask` (B, T) bool, `group_ids` (B,) labels of
prompts. All functions return (B, T) float32, 0 where there is no turn. A row without turns takes part in nothing.

Degenerate cases, in all of them: a pool of one return and a pool of equal returns give exactly 0. verl passes the raw
score of a lone row through, and leaves rounding noise where all are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recipe.gtpo.method.advantage import discounted_returns, normalize_returns
from recipe.gtpo.method.options import Scale
from recipe.gtpo.method.pools import RELATIVE_RANGE, GroupIds
from recipe.gtpo.method.rewards import last_turns

#: Added to the variance before the root; verl's `masked_whiten` uses the same.
_VARIANCE_EPSILON = 1e-8


def of_trajectories(
    rewards: torch.Tensor,
    turn_mask: torch.Tensor,
    group_ids: GroupIds,
    *,
    scale: Scale = "std",
    leave_one_out: bool = False,
) -> torch.Tensor:
    """One advantage a trajectory, the same in all its turns: A[i] = (R[i] - mean) / scale, over the prompt's group.

    GRPO (arXiv 2402.03300) as it stands, Dr. GRPO (arXiv 2503.20783) with `scale=none`, RLOO (arXiv 2402.14740) with
    that and `leave_one_out`.

    Args:
        rewards: (B,) one reward a trajectory.
    """
    exists = turn_mask.any(dim=1, keepdim=True)
    one = normalize_returns(rewards[:, None], exists, group_ids, scale=scale, leave_one_out=leave_one_out)
    return one * turn_mask


def reinforce_plus_plus(
    turn_rewards: torch.Tensor, turn_mask: torch.Tensor, turn_lengths: torch.Tensor
) -> torch.Tensor:
    """REINFORCE++ (arXiv 2501.03262): the undiscounted return, whitened over all generated tokens of the batch.

    The paper's reward has a KL term a token as well; no method here has one.

    Args:
        turn_lengths: (B, T) generated tokens: a turn counts once a token in mean and variance.
    """
    return _whiten(discounted_returns(turn_rewards, turn_mask, gamma=1.0), turn_mask, turn_lengths)


def gdpo(
    parts: Sequence[torch.Tensor], turn_mask: torch.Tensor, group_ids: GroupIds, turn_lengths: torch.Tensor
) -> torch.Tensor:
    """GDPO (arXiv 2601.05242): GRPO of each part of the reward by itself, summed, whitened over the batch's tokens.

    Over tokens is verl's way; the paper's mean and std are over the batch's trajectories, so a long one weighs no more.

    Args:
        parts: (B,) each; they weigh the same.
        turn_lengths: as for `reinforce_plus_plus`.
    """
    normalized = [of_trajectories(part, turn_mask, group_ids) for part in parts]
    return _whiten(torch.stack(normalized).sum(dim=0), turn_mask, turn_lengths)


def mt_grpo(turn_rewards: torch.Tensor, turn_mask: torch.Tensor, group_ids: GroupIds) -> torch.Tensor:
    """MT-GRPO (arXiv 2505.11821), for any number of turns.

        A[i,j] = z(reward of turn j) + z(reward of the last turn)   in turns before the last
        A[i,j] = z(reward of the last turn)                         in the last one

    z is (x - mean) / std: of a turn over the prompt's trajectories in which that turn exists and is not the last, of
    the last turn over all of them. The paper has two turns, of which the first calls the tool; with two this is the
    paper's, with its weight of 1 between the two.
    """
    last = last_turns(turn_mask)
    outcome = of_trajectories(torch.where(last, turn_rewards, 0.0).sum(dim=1), turn_mask, group_ids)
    return outcome + normalize_returns(turn_rewards, turn_mask & ~last, group_ids, baseline="turn")


def gigpo(
    turn_rewards: torch.Tensor,
    turn_mask: torch.Tensor,
    group_ids: GroupIds,
    states: torch.Tensor,
    *,
    gamma: float,
    scale: Scale,
) -> torch.Tensor:
    """GiGPO (arXiv 2505.10978): A[i,j] = episode advantage[i] + step advantage[i,j], both with weight 1.

    The episode's is GRPO's of the summed rewards; the step's compares discounted returns of all turns of the prompt
    that were taken in the same state, whatever their index. A turn that nobody else took in its state has 0 as the
    latter. In the episode's mean a trajectory counts once, as in the paper; the authors' code counts it once a turn
    unless told otherwise (`compute_mean_std_cross_steps`).

    Args:
        states: (B, T) integers, equal in turns of one prompt taken in the same state, different between prompts.
        gamma: discount of the step's return, by turn.
        scale: what both are divided by; the paper's F_norm is `std` or, in its agent runs, `none`.
    """
    episode = of_trajectories(torch.where(turn_mask, turn_rewards, 0.0).sum(dim=1), turn_mask, group_ids, scale=scale)
    returns = discounted_returns(turn_rewards, turn_mask, gamma)[turn_mask][:, None]
    step = torch.zeros_like(episode)
    step[turn_mask] = normalize_returns(
        returns, torch.ones_like(returns, dtype=torch.bool), states[turn_mask], scale=scale
    )[:, 0]
    return episode + step


def _whiten(values: torch.Tensor, turn_mask: torch.Tensor, turn_lengths: torch.Tensor) -> torch.Tensor:
    """(B, T) float32: centred and divided by the std (n-1) over all tokens; a turn counts `turn_lengths` times."""
    weights = torch.where(turn_mask, turn_lengths, 0).double()
    wide = torch.where(turn_mask, values, 0.0).double()
    tokens = weights.sum()
    present = wide[weights > 0]
    if tokens < 2 or present.max() - present.min() <= RELATIVE_RANGE * present.abs().max():
        return torch.zeros(values.shape, dtype=torch.float32)
    centred = torch.where(turn_mask, wide - (weights * wide).sum() / tokens, 0.0)
    variance = (weights * centred.square()).sum() / (tokens - 1)
    return (centred * torch.rsqrt(variance + _VARIANCE_EPSILON)).float()
