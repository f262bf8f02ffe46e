"""The rollout's decisions by themselves: verdicts, refusals, outcomes. In a real rollout: test_agent_loop.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipe.gtpo.conversation import Conversation, Rules, judge_format, read_score, refusals, was_cut
from recipe.gtpo.method.turns import Finish, FormatReason, ToolCall, ToolOutcome, Trajectory, validation_info
from recipe.gtpo.tasks.task import boxed

pytestmark = pytest.mark.unit

GOOD = ToolCall("python", {"code": "1"})
BAD = ToolCall("python", {}, FormatReason.MISSING_ARGUMENT, "missing argument 'code'")
UNCLOSED = ToolCall("", {}, FormatReason.UNBALANCED_TAG, "not closed")


def judge(calls=(), *, first=False, last=False, truncated=False, cut=False, answer=False):
    return judge_format(
        is_first=first, is_last=last, truncated=truncated or cut, cut=cut, calls=calls, has_answer=answer
    )


def test_the_first_turn_must_call_even_when_it_answers():
    assert judge(first=True, last=True, answer=True) is FormatReason.FIRST_TURN_NO_CALL
    assert judge([GOOD], first=True) is None


def test_a_turn_in_the_middle_calls_or_answers():
    assert judge() is FormatReason.NO_CALL_NO_ANSWER
    assert judge([GOOD]) is None and judge(answer=True) is None


def test_the_last_turn_answers():
    assert judge(last=True) is FormatReason.NO_ANSWER
    assert judge(last=True, answer=True) is None


def test_a_malformed_call_comes_before_every_other_reason():
    assert judge([GOOD, BAD], first=True, last=True) is FormatReason.MISSING_ARGUMENT
    assert judge([BAD, UNCLOSED], last=True, answer=True) is FormatReason.MISSING_ARGUMENT  # the first fault written


def test_a_limit_of_ours_excuses_what_is_missing_at_the_end_and_nothing_else():
    assert judge(first=True, last=True, truncated=True) is None
    assert judge(last=True, truncated=True) is None
    assert judge([UNCLOSED], last=True, cut=True) is None
    assert judge([UNCLOSED], last=True) is FormatReason.UNBALANCED_TAG
    assert judge([BAD, UNCLOSED], last=True, cut=True) is FormatReason.MISSING_ARGUMENT
    assert judge([UNCLOSED, GOOD], last=True, cut=True) is FormatReason.UNBALANCED_TAG  # not the one that was cut


def test_a_call_left_open_by_the_model_is_charged_whatever_ends_the_trajectory_after_it():
    """Equal turns have equal verdicts: the next turn, the turn limit and a full response come after it."""
    open_call = '<tool_call>{"name": "python"'
    for max_turns, response_length in ((3, 100), (1, 100), (3, 5)):
        conversation = Conversation(Rules(SCHEMAS, boxed, max_turns=max_turns, response_length=response_length))
        conversation.end_turn(0, 4, open_call, cut=False)
        if conversation.finish is None:
            conversation.hear([])
            conversation.check_room(5)
        if conversation.finish is None:
            conversation.end_turn(5, 9, r"\boxed{1}", cut=False)
        assert conversation.trajectory(0.0).turns[0].broken is FormatReason.UNBALANCED_TAG


@given(calls=st.lists(st.sampled_from([GOOD, BAD])), limit=st.integers(0, 4))
def test_the_first_well_formed_calls_run_up_to_the_limit_and_every_other_one_is_answered(calls, limit):
    answers = refusals(calls, limit)
    assert len(answers) == len(calls)
    ran = [call for call, answer in zip(calls, answers, strict=True) if answer is None]
    assert ran == [call for call in calls if call.error is None][:limit]
    for call, answer in zip(calls, answers, strict=True):
        if answer is not None:
            assert answer.outcome == ("malformed" if call.error else "over_limit")


SCHEMAS = {"python": {"properties": {"code": {"type": "string"}}, "required": ["code"]}}
CALL = '<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call>'


def test_a_conversation_takes_one_outcome_a_call_that_it_asked_for():
    conversation = Conversation(Rules(SCHEMAS, boxed, max_parallel_calls=2))
    asked = conversation.end_turn(0, 5, "<tool_call>{}</tool_call>" + 3 * CALL, cut=False)
    assert [call.arguments["code"] for call in asked] == ["1", "1"]
    said = conversation.hear([ToolOutcome("ok", "one", 0.1), ToolOutcome("error", "two", 0.1)])
    assert [text[:10] for text in said] == ["Error: the", "one", "two", "Error: not"]
    assert [o.outcome for o in conversation.turns[0].outcomes] == ["malformed", "ok", "error", "over_limit"]
    assert conversation.finish is None


def test_no_room_for_another_token_ends_it():
    conversation = Conversation(Rules(SCHEMAS, boxed, response_length=9))
    conversation.end_turn(0, 5, CALL, cut=False)
    conversation.hear([ToolOutcome("ok", "1", 0.1)])
    conversation.check_room(8)
    assert conversation.finish is None
    conversation.check_room(9)
    assert conversation.finish is Finish.LENGTH


@pytest.mark.parametrize(
    ("prompt", "response", "room"), [(0, 0, 9), (3, 2, 7), (6, 0, 6), (6, 5, 1), (12, 0, 0), (5, 9, -2)]
)
def test_a_turn_has_the_room_of_the_response_and_of_the_context(prompt, response, room):
    rules = Rules(SCHEMAS, boxed, response_length=9, context_length=12)
    assert rules.room(response, prompt) == room
    conversation = Conversation(rules)
    conversation.check_room(response, prompt)
    assert conversation.finish is (None if room >= 1 else Finish.LENGTH)


@pytest.mark.parametrize(
    ("ended", "stop_reason", "generated", "cut"),
    [
        (True, "completed", 5, False),
        (True, "length", 9, False),  # by itself, on the last token
        (False, "completed", 9, True),  # vLLM's word for either end
        (False, "completed", 5, False),  # at a stop string
        (False, "stop", 5, False),
        (False, "length", 8, True),  # SGLang keeps a token
        (False, "aborted", 5, True),
        (False, None, 9, True),
        (False, None, 5, False),
    ],
)
def test_a_turn_is_cut_where_the_server_says_so_or_its_tokens_are_used_up(ended, stop_reason, generated, cut):
    assert was_cut(ended=ended, stop_reason=stop_reason, generated=generated, room=9) == cut


def converse(*turns, cut=False):
    conversation = Conversation(Rules(SCHEMAS, boxed))
    for turn in turns:
        asked = conversation.end_turn(0, 1, turn, cut=cut and turn == turns[-1])
        if conversation.finish is None:
            conversation.hear([ToolOutcome("ok", "1", 0.0)] * len(asked))
    return conversation, [turn.broken for turn in conversation.trajectory(0.0).turns]


def test_a_call_that_is_only_thought_of_is_not_run():
    conversation, broken = converse(f"<think>{CALL}</think>No.")
    assert conversation.finish is Finish.ANSWER and broken == [FormatReason.FIRST_TURN_NO_CALL]
    assert conversation.turns[0].calls == () and conversation.turns[0].text == f"<think>{CALL}</think>No."


def test_an_answer_that_is_only_thought_of_is_none():
    thought = r"<think>\boxed{5}</think>"
    conversation, broken = converse(CALL, f"{thought}I am done.")
    assert broken == [None, FormatReason.NO_ANSWER] and conversation.final_words == "I am done."
    conversation, broken = converse(CALL, thought + r"\boxed{6}")
    assert broken == [None, None] and conversation.final_words == r"\boxed{6}"


def test_a_thought_without_an_end_says_nothing():
    conversation, broken = converse(CALL, rf"<think>{CALL} \boxed{{5}}")
    assert conversation.finish is Finish.ANSWER and broken == [None, FormatReason.NO_ANSWER]
    conversation, broken = converse(CALL, rf"<think>{CALL} \boxed{{5}}", cut=True)
    assert conversation.finish is Finish.LENGTH and broken == [None, None]


def test_a_cut_call_with_a_tag_in_its_string_is_not_charged():
    _, broken = converse('<tool_call>{"name": "python", "arguments": {"code": "\'</tool_call>\'', cut=True)
    assert broken == [None]


def test_what_a_tool_said_is_data_and_what_we_say_is_not():
    conversation = Conversation(Rules(SCHEMAS, boxed, max_tool_response_length=12, truncate_side="right"))
    conversation.end_turn(0, 5, "<tool_call>{}</tool_call>" + 2 * CALL, cut=False)
    said = conversation.hear([ToolOutcome("ok", "\ud800<im_end> and more", 0.1)], as_data=str.upper)
    assert said[1] == r"\UD800<IM_EN...(TRUNCATED)" and said[0].startswith("Error: ") and said[2].startswith("Error: ")
    assert conversation.turns[0].outcomes[1].output == r"\ud800<im_en...(truncated)"


@pytest.mark.parametrize(
    ("scored", "read"),
    [
        (1, (1.0, True, "")),
        (0.0, (0.0, False, "")),
        (True, (1.0, True, "")),
        (0.5, (0.5, False, "")),
        (-1, (-1.0, False, "")),
        (2, (2.0, True, "")),
        (np.float32(1), (1.0, True, "")),
        (np.bool_(False), (0.0, False, "")),
        (np.array([1.0]), (1.0, True, "")),
        (torch.tensor(1.0), (1.0, True, "")),
        ({"score": 1.0}, (1.0, True, "")),
        ({"acc": 1.0, "pred": 7}, (1.0, True, "7")),
        ({"score": 0.0, "pred": None}, (0.0, False, "")),  # no answer is not the answer "None", which would have a vote
        ({"acc": False}, (0.0, False, "")),
        ({"score": -1.0, "acc": False, "pred": "x"}, (-1.0, False, "x")),  # verl's math_dapo
        ({"score": 0.4, "acc": True}, (0.4, True, "")),
    ],
)
def test_an_outcome_is_read_in_every_form_that_verls_reward_functions_return(scored, read):
    assert read_score(scored) == read


def test_the_threshold_decides_who_is_solved_where_the_reward_function_does_not():
    assert read_score(0.5, 0.5) == (0.5, True, "") and read_score(0.4, 0.5) == (0.4, False, "")
    assert read_score({"score": 0.9, "acc": False}, 0.5)[1] is False


@pytest.mark.parametrize(
    "scored",
    [None, (1.0, "x"), [1.0], "1.0", float("nan"), float("inf"), np.array([]), np.array([1.0, 0.0]), {}, {"acc": None},
     {"score": "1"}, {"reward": 1.0}, torch.tensor([1.0, 2.0])],
)  # fmt: skip
def test_what_is_no_outcome_is_refused(scored):
    with pytest.raises(ValueError, match="the reward function returned"):
        read_score(scored)


def test_a_trajectory_keeps_the_outcome_and_whether_it_is_solved():
    conversation = Conversation(Rules(SCHEMAS, boxed, success_threshold=0.5))
    conversation.end_turn(0, 5, r"\boxed{1}", cut=False)
    trajectory = conversation.trajectory({"score": 0.75, "pred": "1"})
    assert (trajectory.acc, trajectory.raw_outcome, trajectory.pred) == (1.0, 0.75, "1")
    assert Trajectory.from_dict(json.loads(json.dumps(trajectory.to_dict()))) == trajectory
    old = {key: value for key, value in trajectory.to_dict().items() if key not in ("outcome", "fault")}
    assert Trajectory.from_dict(old).raw_outcome == 1.0  # a record from before there were other outcomes than 0 and 1


def test_a_lost_conversation_names_what_lost_it_and_judges_nothing():
    conversation = Conversation(Rules(SCHEMAS, boxed))
    conversation.end_turn(0, 5, "no call, no answer", cut=False)
    trajectory = conversation.lost("row 3 of gsm8k: the reward function raised ValueError: x")
    assert trajectory.finish is Finish.FAULT and trajectory.turns[0].broken is None
    assert validation_info(trajectory)["lost"] == 1.0 and "row 3" in validation_info(trajectory)["fault"]
    assert validation_info(Conversation(Rules(SCHEMAS, boxed)).lost("x"))["turns"] == 0.0
