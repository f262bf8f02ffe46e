"""Read the tool calls of one assistant turn, malformed ones included.

verl's `HermesToolParser` drops a malformed call silently, so a malformed call looks like a final answer. Here each call
is classified, and the model can be told what was wrong. Pure functions: no verl, no tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
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
