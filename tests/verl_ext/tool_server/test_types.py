"""Laws of the objects everything else passes around."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_ext.tool_server import ExecutionRequest, ExecutionResult, Isolation, Outcome

pytestmark = pytest.mark.unit

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=200),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


def test_outcomes_are_the_closed_set() -> None:
    names = {"ok", "error", "syntax_error", "timeout", "memory", "output_limit", "crash", "infra"}
    assert {outcome.value for outcome in Outcome} == names


def test_a_result_survives_its_dictionary() -> None:
    result = ExecutionResult(
        Outcome.CRASH,
        "text",
        "out",
        "err",
        "id",
        Isolation.STRONG,
        1.5,
        0.5,
        0.1,
        10,
        None,
        11,
        True,
        2.0,
        2,
        "why",
        True,
    )
    assert ExecutionResult.from_dict(result.to_dict()) == result
    assert result.to_dict()["outcome"] == "crash" and result.to_dict()["isolation"] == "strong"


def test_a_request_survives_its_dictionary() -> None:
    request = ExecutionRequest("print(1)", timeout=2.0, stdin="x", session_id="s", echo=False)
    assert ExecutionRequest.from_dict(request.to_dict()) == request


def test_requests_have_different_ids() -> None:
    assert ExecutionRequest("1").request_id != ExecutionRequest("1").request_id


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ([], "JSON object"),
        ({}, "'code'"),
        ({"code": 1}, "'code'"),
        ({"code": "", "timeout": 0}, "'timeout'"),
        ({"code": "", "timeout": True}, "'timeout'"),
        ({"code": "", "timeout": float("nan")}, "'timeout'"),
        ({"code": "", "stdin": 5}, "'stdin'"),
        ({"code": "", "session_id": ""}, "'session_id'"),
        ({"code": "", "request_id": "x" * 129}, "'request_id'"),
        ({"code": "", "request_id": 7}, "'request_id'"),
        ({"code": "", "echo": 1}, "'echo'"),
        ({"code": "", "codee": ""}, "'codee'"),
    ],
)
def test_a_wrong_field_is_named(data: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ExecutionRequest.from_dict(data)


fields = st.sampled_from(["code", "timeout", "stdin", "session_id", "request_id", "echo", "x"])


@given(st.one_of(json_values, st.dictionaries(fields, json_values)))
def test_untrusted_json_is_a_request_or_a_value_error(data: object) -> None:
    try:
        request = ExecutionRequest.from_dict(data)
    except ValueError:
        return
    assert isinstance(request.code, str) and (request.timeout is None or request.timeout > 0)
