"""Rewards by turn: equation (1) of GTPO (arXiv 2511.14846), numbered as in recipe/gtpo/README.md.

    r[i,j] = acc[i] if j is the last turn else 0, plus format_penalty if turn j breaks the format

acc[i] is 1 when the answer verifies, else the shaped credit of a failed trajectory (`shaping.py`). *Why* a turn breaks
the format is decided by the agent loop and recorded in the turn (`turns.FormatReason`, at most one a turn); here it
only costs. The three parts are kept apart so that the metrics can tell an answer from a penalty from a closeness.

What the rewards of a trajectory's turns add up to is an option (`trajectory_rewards`), because the methods that GTPO is
compared with see nothing but that sum, and it decides how strong they are.

Shapes: B rows, T turns; `turn_mask` is (B, T) bool.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recipe.gtpo.method.options import TrajectoryReward


@dataclass(frozen=True)
class TurnRewards:
    """The reward of every turn, (B, T) float32, by where it came from. 0 where there is no turn."""

    outcome: torch.Tensor  # 1 on the last turn of a solved trajectory
    shaping: torch.Tensor  # credit on the last turn of a failed one, below 1
    format: torch.Tensor  # what broken format costs: on its turn, or on the last one where it is no sum of penalties

    @property
    def combined(self) -> torch.Tensor:
        """r[i,j]: what the return is made of."""
        return self.outcome + self.shaping + self.format


def trajectory_rewards(
    outcomes: torch.Tensor, penalties: torch.Tensor, well_formed: torch.Tensor, kind: TrajectoryReward
) -> torch.Tensor:
    """(B,) the one reward of each trajectory.

    Args:
        outcomes: (B,), shaped where shaping is on.
        penalties: (B,) the sum of the trajectory's format penalties, 0 or below.
        well_formed: (B,) bool, no turn breaks the format.
        kind: `sum` outcome + penalties; `min` min(outcome, 1 if well formed else 0), so one broken turn costs a success
            as much as failing, and an outcome above 1 counts as 1; `outcome` the outcome alone.
    """
    if kind == "sum":
        return outcomes + penalties
    if kind == "min":
        return torch.minimum(outcomes, well_formed.to(outcomes.dtype))
    return outcomes


def assign_turn_rewards(
    outcomes: torch.Tensor,
    shaped: torch.Tensor,
    broken: torch.Tensor,
    turn_mask: torch.Tensor,
    *,
    format_penalty: float,
    turn_rewards: bool = True,
    trajectory_reward: TrajectoryReward = "sum",
) -> TurnRewards:
    """Put each part of a trajectory's reward on its turn.

    Args:
        outcomes: (B,) raw outcome, 0 or 1. shaped: (B,) the same after shaping (equal where nothing was shaped).
        broken: (B, T) bool, the turn breaks the format.
        turn_mask: (B, T) bool. A row without turns gets nothing.
        format_penalty: 0 or below, added once per broken turn; without effect unless `trajectory_reward` is `sum`.
        turn_rewards: false sums each part on the last turn: the trajectory-level reward of the ablation.
        trajectory_reward: what a row's rewards add up to (`trajectory_rewards`); only `sum` has parts by turn.
    """
    last = last_turns(turn_mask)
    broken = broken & turn_mask
    penalty = torch.where(broken, format_penalty, 0.0)
    if trajectory_reward != "sum":
        total = trajectory_rewards(shaped, penalty.sum(dim=1), ~broken.any(dim=1), trajectory_reward)
        penalty = torch.where(last, (total - shaped)[:, None], 0.0)
    elif not turn_rewards:
        penalty = torch.where(last, penalty.sum(dim=1, keepdim=True), 0.0)
    return TurnRewards(
        outcome=torch.where(last, outcomes[:, None], 0.0),
        shaping=torch.where(last, (shaped - outcomes)[:, None], 0.0),
        format=penalty,
    )


def last_turns(turn_mask: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: the last existing turn of each row."""
    after = torch.zeros_like(turn_mask)
    after[:, :-1] = turn_mask[:, 1:]
    return turn_mask & ~after
