"""Protects the record of a trajectory: it crosses process borders as JSON and comes back equal, and its code is the
code that ran.
"""

from __future__ import annotations

import json

import pytest

from recipe.gtpo.method.turns import NOT_EXECUTED, Finish, FormatReason, ToolCall, ToolOutcome, Trajectory, Turn

pytestmark = pytest.mark.unit


def python(code: str) -> ToolCall:
    return ToolCall("python", {"code": code})


def ran(outcome: str = "ok") -> ToolOutcome:
    return ToolOutcome(outcome, "out", 0.25)


MALFORMED = ToolCall("", {}, FormatReason.INVALID_JSON, "the tool call is not valid JSON")
RECORD = Trajectory(
    turns=(
        Turn(0, 4, "a", (python("x = 1"), MALFORMED), (ran(), ran("malformed")), FormatReason.INVALID_JSON),
        Turn(9, 12, "b", (python("y = 2"), python("z = 3")), (ran("error"), ran("over_limit")), None, "<eos>", 7),
        Turn(15, 17, "c", (python("never"),), ()),  # a limit ended the trajectory before the call ran
    ),
    finish=Finish.TURN_LIMIT,
    acc=0.0,
    pred="7",
)


def test_the_record_comes_back_equal_through_json():
    assert Trajectory.from_dict(json.loads(json.dumps(RECORD.to_dict()))) == RECORD


def test_a_record_from_before_the_ends_of_turns_were_recorded_is_readable():
    old = RECORD.to_dict()
    for turn in old["turns"]:
        del turn["ended_by"], turn["overrun"]
    assert [(turn.ended_by, turn.overrun) for turn in Trajectory.from_dict(old).turns] == [("", 0)] * 3


@pytest.mark.parametrize("finish", Finish)
def test_every_finish_reason_comes_back(finish):
    record = Trajectory((Turn(0, 1, ""),), finish, 1.0)
    back = Trajectory.from_dict(json.loads(json.dumps(record.to_dict())))
    assert back.finish is finish
    assert back.truncated == (finish in (Finish.TURN_LIMIT, Finish.LENGTH))


@pytest.mark.parametrize("reason", FormatReason)
def test_every_format_reason_comes_back(reason):
    record = Trajectory((Turn(0, 1, "", broken=reason),), Finish.ANSWER, 0.0)
    assert Trajectory.from_dict(json.loads(json.dumps(record.to_dict()))).turns[0].broken is reason


def test_code_is_what_reached_the_tool_failing_or_not():
    assert [turn.code for turn in RECORD.turns] == ["x = 1", "y = 2", ""]
    assert RECORD.code == "x = 1\ny = 2"


@pytest.mark.parametrize("outcome", sorted(NOT_EXECUTED))
def test_code_that_never_reached_the_tool_does_not_count(outcome):
    assert Turn(0, 1, "", (python("x"),), (ran(outcome),)).code == ""


@pytest.mark.parametrize("key", ["turns", "finish", "acc", "pred"])
def test_a_record_with_a_missing_part_raises(key):
    with pytest.raises(KeyError, match=key):
        Trajectory.from_dict({k: v for k, v in RECORD.to_dict().items() if k != key})


def test_a_word_that_is_no_reason_raises():
    with pytest.raises(ValueError, match="gave_up"):
        Trajectory.from_dict({**RECORD.to_dict(), "finish": "gave_up"})
