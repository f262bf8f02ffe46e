"""Read one assistant turn: what its tokens say, what of it is thought, and its tool calls, malformed ones included.

verl's `HermesToolParser` drops a malformed call silently, so a malformed call looks like a final answer. Here each call
is classified, and the model can be told what was wrong. The other direction is here too: tool text, which is data, as
tokens. Pure functions, no verl; every one takes time linear in its text, whatever the model wrote.

    tokens -> `read_tokens` -> text -> `spoken` (no thoughts) -> `parse_calls`, and the task's answer
    tool text -> `printable` -> `as_data` -> chat template -> `encode_data` -> tokens
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipe.gtpo.method.turns import FormatReason, ToolCall

OPEN_TAG, CLOSE_TAG = "<tool_call>", "</tool_call>"
THOUGHT, THOUGHT_END = "<think>", "</think>"
_CALL_TAGS = re.compile(f"{OPEN_TAG}|{CLOSE_TAG}")
_MARKS = re.compile(f"{OPEN_TAG}|{THOUGHT}|{THOUGHT_END}")

#: Deepest nesting of a call. Whoever copies, prints or sends a deeper one recurses: Python's limit is 1000 frames.
MAX_DEPTH = 64
#: Characters of a name that the model wrote and an error message repeats.
MAX_NAME = 60

#: JSON-schema type name -> Python types of a value that json.loads may return for it.
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}


# -- tokens ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """What the tokens of one turn say."""

    text: str  # with every control token but the one that ended the turn: call tags may be special tokens
    kept: int  # tokens up to that one, itself included; the server should have generated no further
    ended_by: str  # that token, "" where there is none: the turn was cut, or a stop string ended it


def read_tokens(ids: Sequence[int], ends: Collection[int], tokenizer: Any) -> Said:
    """Read the tokens of one turn. `ends`: those that end a turn; what follows the first of them is another turn's."""
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    text = tokenizer.decode(list(ids[:end]), skip_special_tokens=False)
    if end is None:
        return Said(text, len(ids), "")
    return Said(text, end + 1, tokenizer.decode([ids[end]], skip_special_tokens=False))


# -- thoughts ----------------------------------------------------------------------------------------------------------


def opens_thought(prompt_end: str) -> bool:
    """Whether a prompt leaves a `<think>` open that the turn goes on with, as the templates of some models do."""
    return prompt_end.rstrip().endswith(THOUGHT)


def spoken(text: str) -> str:
    """What a turn says: its text without its thoughts, the only part that calls tools, answers, and is scored.

    A thought reaches from `<think>` to the next `</think>`. Where one of the two is missing, it reaches from the
    beginning of the turn (a template may have opened it) or to its end (it was never closed). A tag inside a string of
    a well-formed call is data.
    """
    if THOUGHT not in text and THOUGHT_END not in text:
        return text
    parts: list[str] = []
    begin = at = 0
    while mark := _MARKS.search(text, at):
        at = mark.end()
        if mark.group() == OPEN_TAG:
            whole = _whole_call(text, at)
            at = at if whole is None else whole[1]
        elif mark.group() == THOUGHT_END:
            parts, begin = [], at
        else:
            parts.append(text[begin : mark.start()])
            end = text.find(THOUGHT_END, at)
            begin = at = len(text) if end < 0 else end + len(THOUGHT_END)
    return "\n".join(part.strip("\n") for part in (*parts, text[begin:]) if part.strip())


# -- calls -------------------------------------------------------------------------------------------------------------


def parse_calls(text: str, schemas: Mapping[str, Mapping[str, Any]], *, cut: bool = False) -> tuple[ToolCall, ...]:
    """All Hermes calls in `text`, in order, malformed ones included.

    A body that is one JSON object ends where the object ends: tags inside its strings are data. Any other body ends at
    the next tag.

    Args:
        text: what one assistant turn says, with `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` blocks.
        schemas: tool name -> the JSON schema of its arguments ("parameters" of the OpenAI function schema).
        cut: the text ends where the tokens ran out. A call that may have gone on there is unclosed and nothing else.

    Returns:
        One `ToolCall` a block. `error` names the first thing wrong with it and `detail` says so in words for the model.
        A stray or missing tag yields one call with `UNBALANCED_TAG`.
    """
    calls: list[ToolCall] = []
    at = 0
    while tag := _CALL_TAGS.search(text, at):
        start = at = tag.end()
        if tag.group() == CLOSE_TAG:
            calls.append(_unbalanced(f"{CLOSE_TAG} has no {OPEN_TAG} before it"))
            continue
        block = _whole_call(text, start) or _plain_block(text, start, cut)
        if block is None:
            calls.append(_unbalanced(f"{OPEN_TAG} is not closed by {CLOSE_TAG}"))
            if cut and _runs_out(text, start):
                break
        else:
            end, at = block
            calls.append(_parse_body(text[start:end], schemas))
    return tuple(calls)


def _unbalanced(detail: str) -> ToolCall:
    return ToolCall("", {}, FormatReason.UNBALANCED_TAG, detail)


_SPACE = re.compile(r"[ \t\n\r]*")  # of JSON
_CLOSING = re.compile(rf"[ \t\n\r]*{CLOSE_TAG}")
#: Outside a string: what begins one, opens or closes a level, or is no JSON at all.
_STRUCTURE = re.compile(r'["{}\[\]<\\]')
_REST_OF_STRING = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)


def _whole_call(text: str, start: int) -> tuple[int, int] | None:
    """Where the body that begins at `start` ends and where its block does, if it is one JSON object and closed."""
    begin, end = _object(text, start)
    close = None if end is None or end > len(text) else _CLOSING.match(text, end)
    if end is None or close is None:
        return None
    try:
        _decode(text[begin:end])
    except json.JSONDecodeError:
        return None
    except ValueError:
        pass  # JSON that cannot be used: one call all the same
    return end, close.end()


def _plain_block(text: str, start: int, cut: bool) -> tuple[int, int] | None:
    """The same for a body that is no JSON object: it ends at the next tag, which must close it."""
    if cut and _runs_out(text, start):
        return None
    close = _CALL_TAGS.search(text, start)
    return close.span() if close is not None and close.group() == CLOSE_TAG else None


def _runs_out(text: str, start: int) -> bool:
    """Whether a JSON object begins at `start` and the text ends inside it."""
    end = _object(text, start)[1]
    return end is not None and end > len(text)


def _object(text: str, start: int) -> tuple[int, int | None]:
    """Where the JSON object after `start` begins and where it ends, by its quotes and brackets alone.

    The end is beyond the text where that ends inside it, and None where there is no object: none begins, or a tag
    stands outside its strings. Linear over all calls of a text: of two objects that begin at different tags, one is in
    a string wherever the other is not, so that the next tag ends one of them.
    """
    begin = _SPACE.match(text, start).end()  # type: ignore[union-attr]  # it matches anything
    if not text.startswith("{", begin):
        return begin, None
    at, depth = begin, 0
    while found := _STRUCTURE.search(text, at):
        at = found.end()
        if found.group() == '"':
            at = _REST_OF_STRING.match(text, at).end() + 1  # type: ignore[union-attr]
            if at > len(text) or text[at - 1] != '"':
                break
        elif found.group() in "{[":
            depth += 1
        elif found.group() in "]}":
            depth -= 1
            if depth == 0:
                return begin, at
        else:
            return begin, None
    return begin, len(text) + 1


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:MAX_NAME]} is no number that JSON can hold")
    return value


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def _decode(body: str) -> Any:
    """The JSON value. Raises JSONDecodeError for what is none, ValueError for one that nothing here can send on."""
    try:
        value = _DECODER.decode(body)
        deep = _depth(value) > MAX_DEPTH
    except RecursionError:
        deep = True
    if deep:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no UTF-8
    return value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [node for node in level if isinstance(node, (dict, list))]:
        depth += 1
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
    return depth


def _parse_body(body: str, schemas: Mapping[str, Mapping[str, Any]]) -> ToolCall:
    try:
        call = _decode(body)
    except ValueError as e:  # also Python's limit on the digits of a number
        return ToolCall("", {}, FormatReason.INVALID_JSON, f"the tool call is not valid JSON: {e}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ToolCall("", {}, FormatReason.INVALID_JSON, 'the tool call needs "name" and "arguments"')
    name, arguments = call["name"], call.get("arguments", {})
    if name not in schemas:
        known = ", ".join(schemas)
        return ToolCall(name, {}, FormatReason.UNKNOWN_TOOL, f"unknown tool {_quote(name)}; tools: {known}")
    if not isinstance(arguments, dict):
        return ToolCall(name, {}, FormatReason.BAD_ARGUMENT, "arguments must be a JSON object")
    error, detail = _check_arguments(arguments, schemas[name])
    return ToolCall(name, arguments, error, detail)


def _check_arguments(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> tuple[FormatReason | None, str]:
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in arguments:
            return FormatReason.MISSING_ARGUMENT, f"missing argument {name!r}"
    for name, value in arguments.items():
        if name not in properties:
            known = ", ".join(properties)
            return FormatReason.BAD_ARGUMENT, f"unknown argument {_quote(name)}; arguments: {known}"
        rule = properties[name]
        allowed = rule.get("type", ())
        allowed = [allowed] if isinstance(allowed, str) else list(allowed)  # several: any of them
        if allowed and not any(_is(value, kind) for kind in allowed):
            return FormatReason.BAD_ARGUMENT, f"argument {name!r} must be of type {' or '.join(allowed)}"
        limit = rule.get("maxLength")
        if limit is not None and isinstance(value, str) and len(value) > limit:
            return FormatReason.BAD_ARGUMENT, f"{name} is longer than {limit} characters"
    return None, ""


def _is(value: Any, kind: str) -> bool:
    """Whether a value is of a JSON-schema type. A type that is not JSON schema's takes any value."""
    types = _JSON_TYPES.get(kind, (object,))
    # bool is an int in Python, not in JSON
    return isinstance(value, types) and (not isinstance(value, bool) or bool in types or object in types)


def _quote(name: str) -> str:
    """A name that the model wrote, safe to repeat to it: short, and no control token can be spelt in it."""
    shown = re.sub(r"[^\w.\-]", "?", name[:MAX_NAME])
    return f"'{shown}...'" if len(name) > MAX_NAME else f"'{shown}'"


# -- tool text ---------------------------------------------------------------------------------------------------------

#: Marks where `as_data` breaks a control token. No text holds it (`printable`): it is no character of Unicode's.
BREAK = "\ufdd0"


def printable(text: str) -> str:
    """`text` with what no tokenizer takes, lone surrogates above all, as visible escapes such as `\\udc80`."""
    return text.encode("utf-8", "backslashreplace").decode().replace(BREAK, r"\ufdd0")


def as_data(text: str, control: frozenset[str], *, mark: str = BREAK) -> str:
    """`text` with a `mark` inside every control token that it spells; `encode_data` makes ordinary tokens of it.

    Args:
        control: the spellings of the tokenizer's control tokens, special or not (`get_added_vocab`).
        mark: a visible one, such as a space, where the encoder is not ours.
    """
    pattern = _spelling(control)
    return text if pattern is None else pattern.sub(lambda first: first.group() + mark, text)


@functools.lru_cache(maxsize=8)
def _spelling(control: frozenset[str]) -> re.Pattern[str] | None:
    """The first character of any control token. Runs of spaces and newlines, which some have, control nothing."""
    names = sorted(name for name in control if len(name.strip()) > 1)
    return re.compile(f"(?={'|'.join(map(re.escape, names))}).", re.DOTALL) if names else None


def encode_data(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendered `text`: control tokens outside what `as_data` marked, ordinary ones inside.

    The ids decode to the text without marks. Where a tokenizer cannot keep that promise (it begins every piece with a
    space, say), each mark becomes a visible space.
    """

    def encode(piece: str) -> list[int]:
        return tokenizer.encode(piece, add_special_tokens=False)

    if BREAK not in text:
        return encode(text)
    ids = [token for piece in text.split(BREAK) for token in encode(piece)]
    if tokenizer.decode(ids) == tokenizer.decode(encode(text.replace(BREAK, ""))):
        return ids
    return encode(text.replace(BREAK, " "))
