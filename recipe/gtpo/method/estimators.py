"""Which advantage a method computes: the one place that reads the name `algorithm.adv_estimator` outside verl.

    Credit (`credit.py`) -> advantages of turns, by the name of the estimator

The plain-PyTorch engine calls `turn_values`. A run under verl gets the same from verl's registry: verl's own functions
for the names that verl has, and for the others `recipe/gtpo/estimator.py`, which calls the same functions as this
module. A test takes every method of the config through both (tests/gtpo/test_trainer.py).
"""

from __future__ import annotations

import torch

from recipe.gtpo.method import rivals
from recipe.gtpo.method.advantage import returns_of, turn_advantages
from recipe.gtpo.method.credit import Credit
from recipe.gtpo.method.options import GTPOOptions

ESTIMATORS = ("gtpo", "grpo", "rloo", "reinforce_plus_plus", "recorded_gdpo", "mt_grpo", "gigpo")


def turn_values(
    estimator: str, credit: Credit, options: GTPOOptions, *, divide: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns and advantages of every turn, both (B, T) float32, 0 where there is none.

    The return of a rival is its trajectory's reward, in every turn.

    Args:
        estimator: one of `ESTIMATORS`. Raises ValueError for another.
        options: `algorithm.gtpo`; of the rivals only `gigpo` reads them, after `assign_credit` has.
        divide: `algorithm.norm_adv_by_std_in_grpo`, which only `grpo` reads.
    """
    if estimator == "gtpo":
        return turn_advantages(
            credit.rewards.combined, credit.turn_mask, credit.group_ids, options, credit.solved, credit.states
        )
    return turn_returns(estimator, credit, options), _of_rival(estimator, credit, options, divide)


def turn_returns(estimator: str, credit: Credit, options: GTPOOptions) -> torch.Tensor:
    """The returns of `turn_values` alone."""
    if estimator == "gtpo":
        return returns_of(credit.rewards.combined, credit.turn_mask, options, credit.states)
    return credit.trajectory_rewards[:, None] * credit.turn_mask


def _of_rival(estimator: str, credit: Credit, options: GTPOOptions, divide: bool) -> torch.Tensor:
    rewards, totals = credit.rewards.combined, credit.trajectory_rewards
    mask, groups, lengths = credit.turn_mask, credit.group_ids, credit.turn_lengths
    match estimator:
        case "grpo":
            return rivals.of_trajectories(totals, mask, groups, scale="std" if divide else "none")
        case "rloo":
            return rivals.of_trajectories(totals, mask, groups, scale="none", leave_one_out=True)
        case "reinforce_plus_plus":
            return rivals.reinforce_plus_plus(rewards, mask, lengths)
        case "recorded_gdpo":
            return rivals.gdpo(list(credit.reward_parts.values()), mask, groups, lengths)
        case "mt_grpo":
            return rivals.mt_grpo(rewards, mask, groups)
        case "gigpo":
            return rivals.gigpo(rewards, mask, groups, credit.states, gamma=options.gamma, scale=options.scale)
    raise ValueError(f"unknown estimator {estimator!r}; estimators: {', '.join(ESTIMATORS)}")
