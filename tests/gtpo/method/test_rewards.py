"""Which turn earns what, and on which token it lies."""

from __future__ import annotations

import pytest
import torch

from recipe.gtpo.method.rewards import assign_turn_rewards, scatter_to_tokens

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


def test_a_turns_value_lies_on_its_last_token():
    spans = torch.tensor([[[0, 2], [3, 4], [6, 7]], [[1, 3], [0, 0], [0, 0]], [[0, 0]] * 3])
    rows = scatter_to_tokens(torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]), EXISTS, spans, [7, 5, 2])
    assert [row.tolist() for row in rows] == [[0, 1, 0, 2, 0, 0, 3], [0, 0, 4, 0, 0], [0, 0]]
    assert all(row.dtype == torch.float32 for row in rows)


def test_a_turn_that_does_not_fit_names_its_row():
    spans = torch.tensor([[[0, 2], [3, 4], [6, 7]], [[1, 3], [0, 0], [0, 0]], [[0, 0]] * 3])
    with pytest.raises(ValueError, match="row 1: turn 0 ends at token 3 of a response of 2 tokens"):
        scatter_to_tokens(torch.ones(3, 3), EXISTS, spans, [7, 2, 2])
    with pytest.raises(ValueError, match="2 response lengths for 3 rows"):
        scatter_to_tokens(torch.ones(3, 3), EXISTS, spans, [7, 5])
