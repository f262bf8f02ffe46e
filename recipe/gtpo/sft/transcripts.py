"""Transcripts of tool calls as chat messages, read from the forms that they are published in.

A transcript is a list of messages {role, content} of roles system, user, assistant and tool, in which a call stands in
the assistant's text as the policy itself would write it: `<tool_call>{"name": ..., "arguments": ...}</tool_call>`. So
what is imitated does not depend on how a chat template renders calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from verl_ext.records.schema import Record

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}
_CODE = re.compile(r"<code>(.*?)</code>", re.DOTALL)
_FENCE = re.compile(r"```(?:python|py)?\s*(.*?)```", re.DOTALL)
_INTERPRETER = re.compile(r"\s*<interpreter>(.*?)</interpreter>", re.DOTALL)
#: What ReTool's prompts say around the problem.
_RETOOL_QUESTION = "*user question:*"


class NoTranscriptError(ValueError):
    """A row that is no transcript: its message is the reason, the same for all rows that have it."""


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as the policy writes it (`parsing.parse_calls` reads it)."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': dict(arguments)}, ensure_ascii=False)}\n</tool_call>"


def read(row: Mapping[str, Any]) -> list[Message]:
    """A row of a published set: chat messages, or ReTool's two messages with `<code>` and `<interpreter>`.

    Raises NoTranscriptError.
    """
    try:
        return _read(row)
    except NoTranscriptError:
        raise
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as e:  # a call without arguments, arguments that are no JSON
        raise NoTranscriptError(f"messages or calls that are not as chat messages are ({type(e).__name__})") from e


def _read(row: Mapping[str, Any]) -> list[Message]:
    messages = row.get("messages") or row.get("conversations")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise NoTranscriptError(f"no column `messages` with chat messages (columns: {', '.join(map(str, row))})")
    if len(messages) == 2 and "<code>" in str(messages[1].get("content")):
        return _read_retool(*(str(message["content"]) for message in messages))
    return [_read_message(message) for message in messages]


def _read_message(message: Mapping[str, Any]) -> Message:
    role, content = message.get("role"), message.get("content")
    if role is None and "from" in message:  # `conversations` in ShareGPT's words
        role, content = _SHAREGPT.get(message["from"], message["from"]), message.get("value")
    if role not in ROLES:
        raise NoTranscriptError(f"a message of role {role!r}, not one of {', '.join(ROLES)}")
    if content is not None and not isinstance(content, str):
        raise NoTranscriptError("a message whose content is no text")
    parts = [content.strip()] if content and content.strip() else []
    for call in message.get("tool_calls") or ():
        function = call.get("function") or call
        arguments = function["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        given = {name: value for name, value in arguments.items() if value is not None}  # parquet fills up with null
        parts.append(call_text(function["name"], given))
    return {"role": str(role), "content": "\n".join(parts)}


def _read_retool(asked: str, solved: str) -> list[Message]:
    """ReTool-SFT (JoeYing/ReTool-SFT): thoughts, `<code>` and `<interpreter>` in one text, the answer in `<answer>`."""
    question = asked.rpartition(_RETOOL_QUESTION)[2] if _RETOOL_QUESTION in asked else asked
    messages = [{"role": "user", "content": _without_tags(question)}]
    at = 0
    while (code := _CODE.search(solved, at)) is not None:
        output = _INTERPRETER.match(solved, code.end())
        if output is None:
            raise NoTranscriptError("a <code> without an <interpreter> after it")
        fenced = _FENCE.search(code[1])
        program = (fenced[1] if fenced else code[1]).strip()
        thought = solved[at : code.start()].strip()
        said = "\n".join([*([thought] if thought else []), call_text("python", {"code": program})])
        messages += [{"role": "assistant", "content": said}, {"role": "tool", "content": output[1].strip()}]
        at = output.end()
    messages.append({"role": "assistant", "content": _without_tags(solved[at:])})
    return messages


def _without_tags(text: str) -> str:
    return re.sub(r"</?answer>", "", text).strip()


def from_record(record: Record) -> list[Message]:
    """A trajectory of a run, if it is fit to be imitated: it solved its problem, and no turn breaks the format.

    Raises NoTranscriptError.
    """
    if record.acc != 1 or record.finish != "answer":
        raise NoTranscriptError("not solved")
    if any(turn.broken for turn in record.turns):
        raise NoTranscriptError("a turn breaks the format")
    if not any(turn.calls for turn in record.turns):
        raise NoTranscriptError("no tool call")
    if not record.prompt:
        raise NoTranscriptError("a record without its prompt")
    messages: list[Message] = [{"role": message.role, "content": str(message.content)} for message in record.prompt]
    for turn in record.turns:
        messages.append({"role": "assistant", "content": turn.text})
        messages += [{"role": "tool", "content": outcome.output} for outcome in turn.outcomes]
    return messages


def check(messages: Sequence[Message]) -> None:
    """Raise NoTranscriptError where there is nothing to learn about tools, or the roles make no conversation."""
    roles = [message["role"] for message in messages]
    if not roles or roles[-1] != "assistant":
        raise NoTranscriptError("the last message is not the assistant's")
    if "user" not in roles:
        raise NoTranscriptError("no message of the user")
    if not any(m["role"] == "assistant" and "<tool_call>" in m["content"] for m in messages):
        raise NoTranscriptError("no tool call")
    unanswered = 0  # calls of the assistant's last message
    for message in messages:
        if message["role"] == "tool":
            unanswered -= 1
        else:
            unanswered = message["content"].count("<tool_call>") if message["role"] == "assistant" else 0
        if unanswered < 0:
            raise NoTranscriptError("a tool answers what the assistant did not ask")


def question(messages: Iterable[Mapping[str, str]]) -> str:
    """The problem: the last message of the user before the assistant speaks."""
    asked = ""
    for message in messages:
        if message["role"] == "assistant":
            break
        if message["role"] == "user":
            asked = message["content"]
    return asked


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The transcript with the run's own system message, where it has none."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]
