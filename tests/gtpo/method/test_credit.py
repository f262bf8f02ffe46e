"""From recorded trajectories to turn rewards: who takes part, and that the record fits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trajectories import trajectory, turn

from recipe.gtpo.estimator import compute_gtpo_advantage, recorded_turns
from recipe.gtpo.method.credit import REASONS, assign_credit
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.method.turns import Finish, FormatReason

pytestmark = pytest.mark.unit

OPTIONS = GTPOOptions(format_rule="strict")
SOLVED = trajectory(turn(0, 3, "a = 1"), turn(5, 7), acc=1.0)
FAILED = trajectory(
    turn(0, 2, broken=FormatReason.FIRST_TURN_NO_CALL), turn(2, 4, "a = 2"), turn(6, 9, broken=FormatReason.NO_ANSWER)
)
INFRA = trajectory(turn(0, 2, "a = 1"), finish=Finish.INFRA, acc=1.0)
CUT = trajectory(turn(0, 4, "a = 1"), finish=Finish.LENGTH)


def test_a_batch_of_every_kind():
    credit = assign_credit([FAILED, None, SOLVED, INFRA, CUT], ["p", "pad", "p", "p", "q"], OPTIONS)
    assert credit.valid.tolist() == [True, False, True, False, True]
    assert credit.dropped.tolist() == [False, False, False, True, False]
    assert credit.solved.tolist() == [False, False, True, False, False]
    assert credit.turn_mask.sum(dim=1).tolist() == [3, 0, 2, 0, 1]
    assert credit.spans[2, :2].tolist() == [[0, 3], [5, 7]]
    assert [REASONS[i] if i >= 0 else None for i in credit.reasons[0].tolist()] == [
        FormatReason.FIRST_TURN_NO_CALL, None, FormatReason.NO_ANSWER
    ]  # fmt: skip
    # "a = 2" and "a = 1" share 2 of 4 tokens; the infra sibling is no success to learn from, the other prompt neither.
    torch.testing.assert_close(credit.rewards.shaping[0], torch.tensor([0, 0, 0.25]))
    torch.testing.assert_close(credit.rewards.combined[0], torch.tensor([-0.1, 0, 0.15]))
    assert credit.rewards.combined[2].tolist() == [0, 1, 0] and not credit.rewards.combined[[1, 3, 4]].any()


def test_token_rewards_and_turn_ids():
    credit = assign_credit([SOLVED, None, INFRA], ["p", "pad", "p"], OPTIONS)
    assert [row.tolist() for row in credit.token_rewards([7, 2, 3])] == [[0, 0, 0, 0, 0, 0, 1], [0, 0], [0, 0, 0]]
    assert credit.turn_ids(8).tolist() == [[0, 0, 0, -1, -1, 1, 1, -1], [-1] * 8, [-1] * 8]
    with pytest.raises(ValueError, match="row 0: a recorded turn ends after the response's 6 tokens"):
        credit.turn_ids(6)
    with pytest.raises(ValueError, match="row 0: turn 1 ends at token 7 of a response of 6 tokens"):
        credit.token_rewards([6, 2, 3])


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), max_size=4), min_size=1, max_size=6))
def test_turn_ids_are_the_spans(rows):
    trajectories, expected = [], []
    for gaps in rows:
        turns, ids = [], []
        for k, (gap, size) in enumerate(gaps):
            ids += [-1] * gap + [k] * size
            turns.append(turn(len(ids) - size, len(ids)))
        trajectories.append(trajectory(*turns) if turns else None)
        expected.append(ids)
    length = max(len(ids) for ids in expected)
    credit = assign_credit(trajectories, [str(i) for i in range(len(rows))], OPTIONS)
    assert credit.turn_ids(length).tolist() == [ids + [-1] * (length - len(ids)) for ids in expected]


def test_the_trainers_whole_path():
    """Credit, dense rewards, and the estimator as verl calls it, with the discount done by hand."""
    credit = assign_credit([SOLVED, FAILED, None, INFRA], ["p", "p", "pad", "p"], OPTIONS)
    rewards = torch.nn.utils.rnn.pad_sequence(credit.token_rewards([7, 9, 1, 2]), batch_first=True)
    ids = credit.turn_ids(9)
    with recorded_turns(ids, credit.solved):
        advantages, returns = compute_gtpo_advantage(rewards, (ids >= 0).long(), list(credit.group_ids))
    by_hand = [0.9, 1.0, -0.1 + 0.81 * 0.15, 0.9 * 0.15, 0.15]
    first_tokens = [(0, 0), (0, 5), (1, 0), (1, 2), (1, 6)]
    assert [float(returns[i, t]) for i, t in first_tokens] == pytest.approx(by_hand, abs=1e-6)
    mean, std = torch.tensor(by_hand).mean(), torch.tensor(by_hand).std()
    expected = [(float((value - mean) / std)) for value in by_hand]
    assert [float(advantages[i, t]) for i, t in first_tokens] == pytest.approx(expected, abs=1e-5)
    assert not advantages[2:].any()


def test_truncated_trajectories_are_kept_or_dropped():
    kept = assign_credit([SOLVED, CUT], "pp", OPTIONS)
    assert kept.valid.all() and kept.rewards.shaping[1, 0] == 0.5  # the same code as the success
    dropped = assign_credit([SOLVED, CUT], "pp", GTPOOptions(truncated="drop"))
    assert dropped.dropped.tolist() == [False, True] and not dropped.turn_mask[1].any()


@pytest.mark.parametrize("reason", FormatReason)
def test_the_papers_rule_charges_an_invalid_call_and_a_first_turn_without_one_and_the_strict_rule_everything(reason):
    row = trajectory(turn(0, 2), turn(3, 5, broken=reason))
    paper = assign_credit([row], "p", GTPOOptions())
    strict = assign_credit([row], "p", OPTIONS)
    free = reason in (FormatReason.NO_ANSWER, FormatReason.NO_CALL_NO_ANSWER)
    torch.testing.assert_close(paper.rewards.format, torch.tensor([[0, 0.0 if free else -0.1]]))
    torch.testing.assert_close(strict.rewards.format, torch.tensor([[0, -0.1]]))
    assert (paper.well_formed.item(), strict.well_formed.item()) == (free, False)
    assert paper.reasons.tolist() == strict.reasons.tolist() == [[-1, REASONS.index(reason)]]  # what was seen stays


def test_shaping_can_be_switched_off():
    options = GTPOOptions.from_config({"shaping": {"enable": False}, "format_rule": "strict"})
    credit = assign_credit([SOLVED, FAILED], "pp", options)
    assert not credit.rewards.shaping.any()
    torch.testing.assert_close(credit.rewards.combined[1], torch.tensor([-0.1, 0, -0.1]))


def test_without_turn_rewards_all_parts_lie_on_the_last_turn():
    credit = assign_credit([SOLVED, FAILED], "pp", GTPOOptions(turn_rewards=False, format_rule="strict"))
    torch.testing.assert_close(credit.rewards.combined, torch.tensor([[0, 1, 0], [0, 0, 0.05]]))


def test_code_that_never_ran_is_not_compared():
    for outcome, shaped in (("ok", 0.5), ("error", 0.5), ("over_limit", 0.0)):
        same_code = trajectory(turn(0, 2, "a = 1", outcome=outcome))
        assert float(assign_credit([SOLVED, same_code], "pp", OPTIONS).rewards.shaping[1, 0]) == shaped


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "row 1: a trajectory that ended by 'answer' has no turn"),
        ([turn(0, 0)], r"row 1: turn 0 has the tokens \[0, 0\)"),
        ([turn(0, 3), turn(2, 4)], r"row 1: turn 1 has the tokens \[2, 4\) after a turn that ends at 3"),
        ([turn(-1, 3)], r"row 1: turn 0"),
    ],
)
def test_a_record_that_cannot_be_names_its_row(turns, message):
    with pytest.raises(ValueError, match=message):
        assign_credit([SOLVED, trajectory(*turns)], "pp", OPTIONS)


def test_an_empty_batch_and_a_batch_of_padding():
    assert assign_credit([], [], OPTIONS).turn_mask.shape == (0, 0)
    credit = assign_credit([None, INFRA], ["x", "p"], OPTIONS)
    assert not credit.valid.any() and credit.turn_ids(3).tolist() == [[-1] * 3] * 2
    with pytest.raises(ValueError, match="1 trajectories for 2 group ids"):
        assign_credit([SOLVED], "pp", OPTIONS)
