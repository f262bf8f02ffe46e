"""Protects the reading of one assistant turn: every malformed call is found and named, nothing the model writes raises,
and a turn is charged at most once, for the first reason that applies.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.gtpo.method.turns import FormatReason, ToolCall
from recipe.gtpo.parsing import parse_calls

pytestmark = pytest.mark.unit

SCHEMAS = {
    "python": {
        "type": "object",
        "properties": {"code": {"type": "string", "maxLength": 5}},
        "required": ["code"],
    },
    "search": {
        "type": "object",
        "properties": {
            "query": {"type": "string"},
            "limit": {"type": "integer"},
            "ratio": {"type": "number"},
            "exact": {"type": "boolean"},
            "anything": {},
        },
        "required": ["query"],
    },
}


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_a_well_formed_call_keeps_its_name_and_arguments():
    assert parse_calls("Let me see.\n" + call("python", code="1+1"), SCHEMAS) == (ToolCall("python", {"code": "1+1"}),)


def test_text_without_a_tag_has_no_call():
    assert parse_calls('{"name": "python", "arguments": {"code": "1"}}', SCHEMAS) == ()


@pytest.mark.parametrize(
    ("text", "reason", "told"),
    [
        ('<tool_call>{"name": "python"', FormatReason.UNBALANCED_TAG, "<tool_call> is not closed by </tool_call>"),
        ("1 </tool_call>", FormatReason.UNBALANCED_TAG, "</tool_call> has no <tool_call> before it"),
        ("<tool_call>{code: 1}</tool_call>", FormatReason.INVALID_JSON, "the tool call is not valid JSON"),
        ("<tool_call></tool_call>", FormatReason.INVALID_JSON, "the tool call is not valid JSON"),
        ("<tool_call>[1]</tool_call>", FormatReason.INVALID_JSON, 'needs "name" and "arguments"'),
        ('<tool_call>{"name": 3}</tool_call>', FormatReason.INVALID_JSON, 'needs "name" and "arguments"'),
        (f"<tool_call>{'[' * 100_000}</tool_call>", FormatReason.INVALID_JSON, "the tool call is not valid JSON"),
        # Python refuses numbers this long, with an error that is not a JSONDecodeError
        (f"<tool_call>{'1' * 5000}</tool_call>", FormatReason.INVALID_JSON, "the tool call is not valid JSON"),
        # half of a surrogate pair: no UTF-8, so no tool server could be asked
        (call("python", code="\ud800"), FormatReason.INVALID_JSON, "the tool call is not valid JSON"),
        (call("pyhton", code="1"), FormatReason.UNKNOWN_TOOL, "unknown tool 'pyhton'; tools: python, search"),
        (call("python"), FormatReason.MISSING_ARGUMENT, "missing argument 'code'"),
        ('<tool_call>{"name": "python"}</tool_call>', FormatReason.MISSING_ARGUMENT, "missing argument 'code'"),
        (call("python", code="1", shell=True), FormatReason.BAD_ARGUMENT, "unknown argument 'shell'; arguments: code"),
        (call("python", code=1), FormatReason.BAD_ARGUMENT, "argument 'code' must be of type string"),
        (call("python", code="1+1+1+"), FormatReason.BAD_ARGUMENT, "code is longer than 5 characters"),
        (call("search", query="q", limit=1.5), FormatReason.BAD_ARGUMENT, "argument 'limit' must be of type integer"),
        # True is an int in Python, not in JSON
        (call("search", query="q", limit=True), FormatReason.BAD_ARGUMENT, "argument 'limit' must be of type integer"),
        ('<tool_call>{"name": "python", "arguments": "1"}</tool_call>', FormatReason.BAD_ARGUMENT, "a JSON object"),
    ],
)
def test_every_fault_of_a_call_has_its_name_and_is_told_in_words(text, reason, told):
    (found,) = parse_calls(text, SCHEMAS)
    assert found.error is reason
    assert told in found.detail


@pytest.mark.parametrize(
    "arguments",
    [
        {"query": "q", "limit": 3, "ratio": 3, "exact": False},
        {"query": "", "ratio": 0.5},
        {"query": "q", "anything": [1, {"a": True}]},
        {"query": "q", "anything": True},
    ],
)
def test_each_json_type_is_accepted_where_the_schema_allows_it(arguments):
    assert parse_calls(call("search", **arguments), SCHEMAS) == (ToolCall("search", arguments),)


def test_calls_are_read_in_order_and_one_fault_does_not_hide_its_neighbours():
    text = "</tool_call>" + call("python", code="1") + "<tool_call>" + call("python", code="2") + "<tool_call>"
    unbalanced, first, reopened, second, last = parse_calls(text, SCHEMAS)
    assert [c.error for c in (unbalanced, reopened, last)] == [FormatReason.UNBALANCED_TAG] * 3
    assert (first.arguments, second.arguments) == ({"code": "1"}, {"code": "2"})
    assert first.error is second.error is None


PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", '{"name": "python", "arguments": ', '{"code": "1"}}', "}", "{", "\\boxed{", "\x00"]
)


@given(st.one_of(st.text(), st.lists(st.one_of(PIECES, st.text(max_size=5))).map("".join)))
def test_no_text_raises(text):
    calls = parse_calls(text, SCHEMAS)
    assert all(c.error is None or c.detail for c in calls)
    assert bool(calls) == ("<tool_call>" in text or "</tool_call>" in text)


@given(
    query=st.text().filter(lambda s: "tool_call>" not in s),  # a tag inside a JSON string cannot be told from a tag
    limit=st.integers(),
    exact=st.booleans(),
    said=st.text().filter(lambda s: "tool_call>" not in s),
)
def test_a_well_formed_call_round_trips(query, limit, exact, said):
    arguments = {"query": query, "limit": limit, "exact": exact}
    assert parse_calls(said + call("search", **arguments) + said, SCHEMAS) == (ToolCall("search", arguments),)
