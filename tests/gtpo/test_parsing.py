"""Protects the reading of one assistant turn: every malformed call is found and named, nothing the model writes raises,
and a turn is charged at most once, for the first reason that applies. No thought calls or answers, and no text takes
more than linear time.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipe.gtpo import parsing
from recipe.gtpo.method.turns import FormatReason, ToolCall
from recipe.gtpo.parsing import MAX_DEPTH, MAX_NAME, as_data, encode_data, opens_thought, parse_calls, printable, spoken

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
            "several": {"type": ["integer", "number", "null"]},  # verl's function tools make it of `float | None`
            "unheard": {"type": ["tensor"]},
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
        (call("search", ratio=float("nan")), FormatReason.INVALID_JSON, "NaN is no number that JSON can hold"),
        (call("search", ratio=0.5).replace("0.5", "1e999"), FormatReason.INVALID_JSON, "1e999 is no number that JSON"),
        (call("pyhton", code="1"), FormatReason.UNKNOWN_TOOL, "unknown tool 'pyhton'; tools: python, search"),
        (call("python"), FormatReason.MISSING_ARGUMENT, "missing argument 'code'"),
        ('<tool_call>{"name": "python"}</tool_call>', FormatReason.MISSING_ARGUMENT, "missing argument 'code'"),
        (call("python", code="1", shell=True), FormatReason.BAD_ARGUMENT, "unknown argument 'shell'; arguments: code"),
        (call("python", code=1), FormatReason.BAD_ARGUMENT, "argument 'code' must be of type string"),
        (call("python", code="1+1+1+"), FormatReason.BAD_ARGUMENT, "code is longer than 5 characters"),
        (call("search", query="q", limit=1.5), FormatReason.BAD_ARGUMENT, "argument 'limit' must be of type integer"),
        (call("search", query="q", several="1"), FormatReason.BAD_ARGUMENT, "be of type integer or number or null"),
        (call("search", query="q", several=True), FormatReason.BAD_ARGUMENT, "be of type integer or number or null"),
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
        {"query": "q", "several": 3},
        {"query": "q", "several": 0.5},
        {"query": "q", "several": None},
        {"query": "q", "unheard": True},
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


@pytest.mark.parametrize(
    ("body", "reasons"),
    [
        # a tag in a string of a body that is no JSON: the tag ends the body, as any tag ends it
        ('{"name": "python", "arguments": {"code": "</tool_call>"}', ["invalid_json", "unbalanced_tag"]),
        ('{"name": "python", "arguments": {"code": "<tool_call>"}', ["unbalanced_tag", "invalid_json"]),
        ('{"name": "python", "arguments": {"code": "1</tool_call>', ["invalid_json", "unbalanced_tag"]),
        ('{"name": "python"} and so on', ["invalid_json"]),
        ('{"name": "python\n"}', ["invalid_json"]),
    ],
)
def test_a_malformed_body_ends_at_the_next_tag(body, reasons):
    found = parse_calls(f"<tool_call>{body}</tool_call>", SCHEMAS)
    assert [c.error.value for c in found] == reasons


def test_a_string_that_is_never_closed_does_not_hide_the_next_call():
    text = '<tool_call>{"name": "python</tool_call> again: ' + call("python", code="1")
    assert [c.error for c in parse_calls(text, SCHEMAS)] == [FormatReason.INVALID_JSON, None]


def nested(depth: int) -> str:
    return '{"name": "search", "arguments": {"query": "q", "anything": ' + "[" * depth + "]" * depth + "}}"


@pytest.mark.parametrize(("depth", "accepted"), [(MAX_DEPTH - 2, True), (MAX_DEPTH - 1, False), (700, False)])
def test_what_is_nested_too_deep_to_be_recorded_is_refused_by_name(depth, accepted):
    """700 levels are valid JSON, and more than Python copies."""
    (found,) = parse_calls(f"<tool_call>{nested(depth)}</tool_call>", SCHEMAS)
    assert (found.error is None) == accepted
    if not accepted:
        assert found.error is FormatReason.INVALID_JSON and f"nested more than {MAX_DEPTH} deep" in found.detail


@pytest.mark.parametrize(
    ("name", "shown"),
    [("<|im_end|>", "'??im_end??'"), ("x" * 100_000, f"'{'x' * MAX_NAME}...'"), ("größe_2", "'größe_2'")],
)
def test_a_name_is_repeated_to_the_model_short_and_without_control_tokens(name, shown):
    (tool,) = parse_calls(call(name, code="1"), SCHEMAS)
    assert tool.detail == f"unknown tool {shown}; tools: python, search"
    (argument,) = parse_calls(call("python", **{"code": "1", name: 1}), SCHEMAS)
    assert argument.detail == f"unknown argument {shown}; arguments: code"


@pytest.mark.parametrize(
    "tail",
    [
        "<tool_call>",
        '<tool_call>{"name": "python", "argum',
        call("python", code="1").removesuffix("_call>"),
        '<tool_call>{"name": "python", "arguments": {"code": "</tool_call> 1',
        '<tool_call>{"name": "python", "arguments": {"code": "<tool_call>{} 1',
    ],
)
def test_a_call_that_the_cut_left_open_is_unclosed_and_nothing_else(tail):
    before = "<tool_call>{}</tool_call>"
    bad, cut = parse_calls(before + tail, SCHEMAS, cut=True)
    assert (bad.error, cut.error) == (FormatReason.INVALID_JSON, FormatReason.UNBALANCED_TAG)


def test_a_cut_after_a_call_leaves_it_whole():
    assert parse_calls(call("python", code="1") + " and", SCHEMAS, cut=True) == (ToolCall("python", {"code": "1"}),)


PIECES = st.sampled_from(
    [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        '{"name": "python", "arguments": ',
        '{"code": "1"}}',
        "}",
        "{",
        "[",
        '"',
        "\\",
        "\\boxed{",
        "\n",
        "\x00",
    ]
)
TEXT = st.one_of(st.text(), st.lists(st.one_of(PIECES, st.text(max_size=5))).map("".join))


@given(TEXT, st.booleans())
def test_no_text_raises(text, cut):
    calls = parse_calls(text, SCHEMAS, cut=cut)
    assert all(c.error is None or c.detail for c in calls)
    assert bool(calls) == ("<tool_call>" in text or "</tool_call>" in text)
    spoken(text)


@settings(max_examples=600)
@given(
    query=TEXT,
    limit=st.integers(-(10**30), 10**30),
    exact=st.booleans(),
    said=st.text().filter(lambda s: "tool_call>" not in s),
    style=st.sampled_from([{}, {"ensure_ascii": False}, {"indent": 1}, {"separators": (",", ":")}]),
    space=st.text(" \n\t", max_size=2),
)
def test_a_well_formed_call_round_trips(query, limit, exact, said, style, space):
    """Whatever its strings hold: tags, braces, quotes, newlines. Also between others of its kind."""
    arguments = {"query": query, "limit": limit, "exact": exact}
    body = json.dumps({"name": "search", "arguments": arguments}, **style)
    text = f"{said}<tool_call>{space}{body}{space}</tool_call>{said}"
    assert parse_calls(text, SCHEMAS) == (ToolCall("search", arguments),)
    assert parse_calls(text * 2, SCHEMAS) == (ToolCall("search", arguments),) * 2
    assert parse_calls(text, SCHEMAS, cut=True) == (ToolCall("search", arguments),)
    if "think>" not in said:
        assert spoken(text).strip("\n") == text.strip("\n")  # a tag in a string is no thought


# -- thoughts ---------------------------------------------------------------------------------------------------------

CALL = call("python", code="1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no thought", "no thought"),
        ("\n kept as it is \n", "\n kept as it is \n"),
        ("<think>\nhm\n</think>\n\nso", "so"),
        ("<think>\n\n</think>\n\nso", "so"),
        ("a<think>b</think>c<think>d</think>", "a\nc"),
        ("<think>a<think>b</think>c", "c"),  # no thought within a thought
        ("a</think>b", "b"),  # the template opened it
        ("a</think>b</think>c", "c"),
        ("<think>a</think>b</think>c", "c"),
        ("a<think>b", "a"),  # never closed
        ("<think>b", ""),
        (f"<think>{CALL}</think>{CALL}", CALL),
        (f"{CALL}<think>{CALL}", CALL),
        (f"{CALL}</think>so", "so"),
        (f"<tool_<think></think>call>{CALL}", f"<tool_\ncall>{CALL}"),  # no tag is made of two halves
        # data
        (call("python", code="<think>"), call("python", code="<think>")),
        (call("python", code="</think>") + "<think>", call("python", code="</think>")),
    ],
)
def test_a_thought_is_not_said(text, said):
    assert spoken(text) == said


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>assistant\n", False),
    ],
)
def test_a_prompt_may_open_a_thought(prompt, opens):
    assert opens_thought(prompt) == opens


# -- cost -------------------------------------------------------------------------------------------------------------


class Reader:
    """A compiled pattern that counts the characters it goes over."""

    def __init__(self, pattern, counts):
        self.pattern, self.counts = pattern, counts

    def _note(self, found, text, at):
        self.counts.append((found.end() if found else len(text)) - at)
        return found

    def search(self, text, at):
        return self._note(self.pattern.search(text, at), text, at)

    def match(self, text, at):
        found = self.pattern.match(text, at)
        if found is None:  # at the first character that does not fit
            self.counts.append(len(text[at:]) - len(text[at:].lstrip()) + 12)
            return None
        return self._note(found, text, at)


def read(text, patch):
    """How many characters are gone over to read `text` as a turn."""
    counts: list[int] = []
    for name in ("_CALL_TAGS", "_MARKS", "_STRUCTURE", "_REST_OF_STRING", "_SPACE", "_CLOSING"):
        pattern = getattr(parsing, name)
        patch.setattr(parsing, name, Reader(pattern, counts))
    decode = parsing._decode
    patch.setattr(parsing, "_decode", lambda body: counts.append(len(body)) or decode(body))
    parse_calls(spoken(text), SCHEMAS)
    parse_calls(text, SCHEMAS, cut=True)
    return sum(counts)


#: Characters gone over for one of the text, in the three passes of `read`, whatever the text.
COST = 24

HOSTILE = [
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "<think></think>",
    "\\boxed{",
    "{",
    "[",
    '"',
    "\\",
    "x",
    " ",
    "<tool_call>{",
    '<tool_call>{"',
    '<tool_call>{\\"',
    '<tool_call>{"a": "',
    '<tool_call>{"\\"',
    '<tool_call> {"a": "b"}',
    '<tool_call>{"a": "</tool_call>',
    '<tool_call>{"a": "<think></tool_call>',
    '<tool_call>{"a": [',
    "<tool_call>{}</tool_call>",
    CALL,
    call("python", code="</tool_call>"),
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_100_kilobytes_of_anything_are_read_in_linear_time(unit, monkeypatch):
    text = unit * (100_000 // len(unit))
    assert read(text, monkeypatch) <= COST * len(text)


@given(st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=12), st.integers(1, 40))
def test_any_mixture_is_read_in_linear_time(units, times):
    text = "".join(units) * times
    with pytest.MonkeyPatch.context() as patch:
        assert read(text, patch) <= COST * len(text) + 100


# -- tool text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"), [("a\ud800b", r"a\ud800b"), ("\ufdd0", r"\ufdd0"), ("é\x00\n😀", "é\x00\n😀")]
)
def test_what_no_tokenizer_takes_is_shown_as_an_escape(text, shown):
    assert printable(text) == shown


@given(st.lists(st.one_of(st.sampled_from(["<|im_end|>", "<|im_start|>", "<tool_call>", "<", "|", ">"]), st.text())))
def test_tool_text_becomes_ordinary_tokens_that_say_the_same(stream, parts):
    text = printable("".join(parts))
    control = stream.tokenizer.get_added_vocab()
    ids = encode_data(stream.tokenizer, as_data(text, frozenset(control)))
    assert not set(ids) & set(control.values())
    assert stream.tokenizer.decode(ids) == stream.tokenizer.decode(stream.tokenizer.encode(text))


def test_text_without_control_tokens_is_encoded_as_ever(stream):
    text = "5 < 6 | x\n"
    assert as_data(text, frozenset(stream.tokenizer.get_added_vocab())) == text
    assert encode_data(stream.tokenizer, text) == stream.tokenizer.encode(text)


def test_control_tokens_that_overlap_are_all_broken():
    assert as_data("aab", frozenset({"aa", "ab", "a", " \n "}), mark="|") == "a|a|b"


class SpaceBefore:
    """A tokenizer that begins every piece with a space, as SentencePiece may; ids are characters."""

    def encode(self, text, add_special_tokens):
        return list(map(ord, f" {text}"))

    def decode(self, ids):
        return "".join(map(chr, ids)).removeprefix(" ")


def test_where_a_tokenizer_cannot_break_a_token_the_text_shows_a_space():
    tokenizer = SpaceBefore()
    assert tokenizer.decode(encode_data(tokenizer, as_data("a<eos>", frozenset({"<eos>"})))) == "a< eos>"
