"""Which turn earns what."""

from __future__ import annotations

import pytest
import torch

from recipe.gtpo.method.rewards import assign_turn_rewards

pytestmark = pytest.mark.unit

EXISTS = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
BROKEN = torch.tensor([[True, False, True], [True, False, False], [False, True, True]])
OUTCOMES = torch.tensor([1.0, 0.0, 0.0])
SHAPED = torch.tensor([1.0, 0.25, 0.0])


def assigned(**options):
    return assign_turn_rewards(OUTCOMES, SHAPED, BROKEN, EXISTS, format_penalty=-0.1, **options)


def test_outcome_on_the_last_turn_penalty_where_it_is_due():
    rewards = assigned()
    assert rewards.outcome.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert rewards.shaping.tolist() == [[0, 0, 0], [0.25, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(rewards.format, torch.tensor([[-0.1, 0, -0.1], [-0.1, 0, 0], [0, 0, 0]]))
    torch.testing.assert_close(rewards.combined, torch.tensor([[-0.1, 0, 0.9], [0.15, 0, 0], [0, 0, 0]]))


def test_without_turn_rewards_the_same_sum_lies_on_the_last_turn():
    summed = assigned(turn_rewards=False)
    torch.testing.assert_close(summed.format, torch.tensor([[0, 0, -0.2], [-0.1, 0, 0], [0, 0, 0]]))
    torch.testing.assert_close(summed.combined.sum(dim=1), assigned().combined.sum(dim=1))
    assert torch.equal(summed.combined != 0, torch.tensor([[False, False, True], [True, False, False], [False] * 3]))
