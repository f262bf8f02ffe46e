"""Which turn earns what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipe.gtpo.method.rewards import assign_turn_rewards, trajectory_rewards

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


@pytest.mark.parametrize(
    ("kind", "by_hand"),
    [
        ("sum", [0.8, 1.0, 0.0, -0.1, 1.9]),
        ("min", [0.0, 1.0, 0.0, 0.0, 0.0]),
        ("outcome", [1.0, 1.0, 0.0, 0.0, 2.0]),
    ],
)
def test_the_one_reward_of_a_trajectory(kind, by_hand):
    """Solved with two broken turns; solved, well formed; failed, well formed; failed, broken; worth 2, broken."""
    outcomes, penalties = torch.tensor([1.0, 1.0, 0.0, 0.0, 2.0]), torch.tensor([-0.2, 0.0, 0.0, -0.1, -0.1])
    torch.testing.assert_close(trajectory_rewards(outcomes, penalties, penalties == 0, kind), torch.tensor(by_hand))


def test_an_outcome_above_one_counts_as_one_beside_well_formed():
    assert trajectory_rewards(torch.tensor([2.5]), torch.zeros(1), torch.tensor([True]), "min").tolist() == [1.0]


@given(
    st.lists(
        st.tuples(st.sampled_from((0.0, 0.25, 1.0, 2.0, -0.5)), st.lists(st.booleans(), max_size=5)),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(("sum", "min", "outcome")),
    st.booleans(),
)
def test_the_turns_add_up_to_the_trajectory_s_reward(rows, kind, turn_rewards):
    turns = max((len(flags) for _, flags in rows), default=0)
    mask, broken = torch.zeros(len(rows), turns, dtype=torch.bool), torch.zeros(len(rows), turns, dtype=torch.bool)
    for i, (_, flags) in enumerate(rows):
        mask[i, : len(flags)] = True
        broken[i, : len(flags)] = torch.tensor(flags, dtype=torch.bool)
    shaped = torch.tensor([outcome for outcome, _ in rows])
    outcomes = torch.where(shaped == 0.25, 0.0, shaped)  # 0.25 is shaped credit
    given_rewards = assign_turn_rewards(
        outcomes, shaped, broken, mask, format_penalty=-0.1, turn_rewards=turn_rewards, trajectory_reward=kind
    )
    exists = mask.any(dim=1)
    total = trajectory_rewards(shaped, -0.1 * broken.sum(dim=1), ~broken.any(dim=1), kind)
    torch.testing.assert_close(given_rewards.combined.sum(dim=1), torch.where(exists, total, 0.0))
    if kind != "sum" or not turn_rewards:
        assert not given_rewards.combined[:, :-1][mask[:, 1:]].any()  # nothing before the last turn
    torch.testing.assert_close(given_rewards.outcome.sum(dim=1), torch.where(exists, outcomes, 0.0))
