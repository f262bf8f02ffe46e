"""The equations beyond the laws: what each option does on numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recipe.gtpo.method.advantage import discounted_returns, normalize_returns

pytestmark = pytest.mark.unit

#: Two prompts, two trajectories each, of up to two turns.
RETURNS = torch.tensor([[2.0, 4.0], [6.0, 0.0], [1.0, 1.0], [5.0, 9.0]])
EXISTS = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
UIDS = ["p", "p", "q", "q"]


def normalized(**options) -> list[list[float]]:
    out = normalize_returns(RETURNS, EXISTS, UIDS, **options)
    assert not out[1, 1]
    return [[round(float(v), 4) for v in row] for row in out]


def test_group_pool_is_all_turn_returns_of_the_prompt():
    # p: 2 4 6, mean 4, std 2. q: 1 1 5 9, mean 4, std sqrt(44/3).
    s = (44 / 3) ** 0.5
    assert normalized() == [[-1.0, 0.0], [1.0, 0.0], [round(-3 / s, 4)] * 2, [round(1 / s, 4), round(5 / s, 4)]]


def test_turn_pool_is_the_same_turn_of_the_prompt():
    # p turn 0: 2 6; turn 1: 4 alone. q turn 0: 1 5; turn 1: 1 9.
    half = round(0.5**0.5, 4)
    assert normalized(baseline="turn") == [[-half, 0.0], [half, 0.0], [-half, -half], [half, half]]


def test_sparse_turn_falls_back_to_the_group():
    centred = normalized(baseline="turn", scale="none", sparse_turn="group")
    assert centred == [[-2.0, 0.0], [2.0, 0.0], [-2.0, -4.0], [2.0, 4.0]]  # the lone 4 meets the group's mean, 4
    scaled = normalize_returns(RETURNS + 1.5 * (RETURNS == 4), EXISTS, UIDS, baseline="turn", sparse_turn="group")
    assert float(scaled[0, 1]) == pytest.approx((5.5 - 4.5) / np.std([2, 5.5, 6], ddof=1), abs=1e-5)


def test_batch_pool_is_everything():
    values = np.array([2, 4, 6, 1, 1, 5, 9])
    got = normalize_returns(RETURNS, EXISTS, UIDS, baseline="batch")[EXISTS]
    np.testing.assert_allclose(got, (values - values.mean()) / values.std(ddof=1), atol=1e-5)


def test_scale_none_only_centres_and_batch_std_divides_by_one_number():
    centred = normalized(scale="none")
    assert centred == [[-2.0, 0.0], [2.0, 0.0], [-3.0, -3.0], [1.0, 5.0]]
    one = np.std([-2, 0, 2, -3, -3, 1, 5], ddof=1)
    got = normalize_returns(RETURNS, EXISTS, UIDS, scale="batch_std")
    np.testing.assert_allclose(got, np.array(centred) / one, atol=1e-5)


def test_leave_one_out_mean_is_of_the_other_trajectories():
    # p: row 0 meets 6, row 1 meets (2+4)/2. q: row 2 meets 7, row 3 meets 1.
    assert normalized(leave_one_out=True, scale="none") == [[-4.0, -2.0], [3.0, 0.0], [-6.0, -6.0], [4.0, 8.0]]


def test_leave_one_out_of_a_lone_trajectory_has_nothing_to_compare_with():
    two_turns = torch.tensor([[1.0, 2.0]]), torch.ones(1, 2, dtype=torch.bool), ["p"]
    assert normalize_returns(*two_turns).any()  # the group pool holds its two returns
    assert not normalize_returns(*two_turns, leave_one_out=True).any()


def test_unsolved_groups_are_silenced_and_nothing_else_changes():
    solved = torch.tensor([False, False, False, True])
    for options in ({}, {"scale": "batch_std"}, {"baseline": "batch"}):
        kept = normalize_returns(RETURNS, EXISTS, UIDS, **options)
        zeroed = normalize_returns(RETURNS, EXISTS, UIDS, **options, solved=solved, unsolved_groups="zero")
        assert kept[:2].any() and not zeroed[:2].any() and torch.equal(kept[2:], zeroed[2:])
    with pytest.raises(ValueError, match="solved"):
        normalize_returns(RETURNS, EXISTS, UIDS, unsolved_groups="zero")


def test_a_success_without_a_turn_of_its_own_does_not_solve_its_group():
    """A dropped trajectory takes part in nothing, whatever its outcome was."""
    exists = EXISTS.clone()
    exists[1] = False
    out = normalize_returns(
        RETURNS, exists, UIDS, solved=torch.tensor([False, True, False, True]), unsolved_groups="zero", scale="none"
    )
    assert not out[:2].any() and out[2:].any()


def test_min_pool_counts_returns():
    assert normalized(min_pool=4)[:2] == [[0.0, 0.0], [0.0, 0.0]] != normalized(min_pool=3)[:2]


def test_returns_discount_by_turn():
    rewards = torch.tensor([[0.0, -0.1, 1.0], [1.0, 9.0, 9.0]])
    exists = torch.tensor([[True, True, True], [True, False, False]])
    expected = torch.tensor([[0.9 * -0.1 + 0.81, -0.1 + 0.9, 1.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(discounted_returns(rewards, exists, 0.9), expected)
    torch.testing.assert_close(discounted_returns(rewards, exists, 0.0), torch.where(exists, rewards, 0.0))
