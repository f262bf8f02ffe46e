"""Read one assistant turn: its tool calls, its answer, and whether it breaks the format.

verl's `HermesToolParser` drops a malformed call silently, so a malformed call looks like a final answer. Here each call
is classified, and the model can be told what was wrong. Pure functions: no verl, no tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from recipe.gtpo.method.turns import FormatReason, ToolCall

OPEN_TAG, CLOSE_TAG = "<tool_call>", "</tool_call>"
_TAGS = re.compile(f"{OPEN_TAG}|{CLOSE_TAG}")

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


def parse_calls(text: str, schemas: Mapping[str, Mapping[str, Any]]) -> tuple[ToolCall, ...]:
    """All Hermes calls in `text`, in order, malformed ones included.

    Args:
        text: one assistant turn, with `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` blocks.
        schemas: tool name -> the JSON schema of its arguments ("parameters" of the OpenAI function schema).

    Returns:
        One `ToolCall` a block. `error` names the first thing wrong with it and `detail` says so in words for the model.
        A stray or missing tag yields one call with `UNBALANCED_TAG`.
    """
    calls: list[ToolCall] = []
    start: int | None = None  # where the body of the open block begins
    for tag in _TAGS.finditer(text):
        if tag.group() == OPEN_TAG:
            if start is not None:
                calls.append(_unbalanced(f"{OPEN_TAG} is not closed by {CLOSE_TAG}"))
            start = tag.end()
        elif start is None:
            calls.append(_unbalanced(f"{CLOSE_TAG} has no {OPEN_TAG} before it"))
        else:
            calls.append(_parse_body(text[start : tag.start()], schemas))
            start = None
    if start is not None:
        calls.append(_unbalanced(f"{OPEN_TAG} is not closed by {CLOSE_TAG}"))
    return tuple(calls)


def _unbalanced(detail: str) -> ToolCall:
    return ToolCall("", {}, FormatReason.UNBALANCED_TAG, detail)


def _parse_body(body: str, schemas: Mapping[str, Mapping[str, Any]]) -> ToolCall:
    try:
        call = json.loads(body)
        json.dumps(call, ensure_ascii=False).encode()  # half of a surrogate pair: nothing can send it on
    except (ValueError, RecursionError) as e:  # ValueError: also Python's limit on the digits of a number
        return ToolCall("", {}, FormatReason.INVALID_JSON, f"the tool call is not valid JSON: {e}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ToolCall("", {}, FormatReason.INVALID_JSON, 'the tool call needs "name" and "arguments"')
    name, arguments = call["name"], call.get("arguments", {})
    if name not in schemas:
        return ToolCall(name, {}, FormatReason.UNKNOWN_TOOL, f"unknown tool {name!r}; tools: {', '.join(schemas)}")
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
            return FormatReason.BAD_ARGUMENT, f"unknown argument {name!r}; arguments: {', '.join(properties)}"
        rule = properties[name]
        types = _JSON_TYPES.get(rule.get("type", ""), (object,))
        # bool is an int in Python, not in JSON
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types and object not in types):
            return FormatReason.BAD_ARGUMENT, f"argument {name!r} must be of type {rule['type']}"
        limit = rule.get("maxLength")
        if limit is not None and isinstance(value, str) and len(value) > limit:
            return FormatReason.BAD_ARGUMENT, f"{name} is longer than {limit} characters"
    return None, ""


def extract_answer(text: str) -> str | None:
    r"""The content of the last balanced `\boxed{...}` in `text`, or None. Nested braces are kept."""
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) != -1:
        depth = 0
        for i in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : i].strip()
        end = start  # this one never closes: look further left
    return None


def judge_format(
    *, is_first: bool, is_last: bool, truncated: bool, calls: Sequence[ToolCall], has_answer: bool
) -> FormatReason | None:
    """The one format verdict of a turn, which the format penalty charges, or None when it keeps the format.

    Args:
        is_first, is_last: position in the trajectory.
        truncated: the turn was cut by a limit of ours; then what is missing at its end is not the model's fault, and
            neither is a call that the limit left unclosed.
        calls: what `parse_calls` found.
        has_answer: whether `extract_answer` found one.
    """
    for call in calls:
        if call.error is not None and not (truncated and call.error is FormatReason.UNBALANCED_TAG):
            return call.error
    if truncated:
        return None
    if is_first and not calls:
        return FormatReason.FIRST_TURN_NO_CALL
    if not is_last and not calls and not has_answer:
        return FormatReason.NO_CALL_NO_ANSWER
    if is_last and not has_answer:
        return FormatReason.NO_ANSWER
    return None
