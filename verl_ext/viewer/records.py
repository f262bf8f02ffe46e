"""What the viewer reads in one recorded line: the only module that knows how a record spells it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

#: What a reader can filter by; the value is the bit in the index.
FLAGS = {
    "no first call": 1,
    "malformed": 2,
    "timeout": 4,
    "tool error": 8,
    "truncated": 16,
    "dropped": 32,
    "no answer": 64,
    "all equal": 128,  # of a group: no return differs from another, so that it teaches nothing
}
_TRUNCATED = ("turn_limit", "length")
#: Characters of a prompt that lists show.
_HEAD = 240


def numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the index keeps of a trajectory so that grid, ledger and what-if need no text."""
    turns = [_turn(record, k) for k in range(len(record["turns"]))]
    acc = record.get("acc")
    return {
        "finish": record["finish"],
        "acc": acc,
        "outcome": acc if record.get("outcome") is None else record["outcome"],
        "dropped": bool(record.get("dropped")),
        "pred": str(record.get("pred") or "")[:80],
        "code": any(code.strip() for code in executed(record)),
        "similar": None,
        "turns": turns,
    }


def _turn(record: Mapping[str, Any], k: int) -> dict[str, Any]:
    turn = record["turns"][k]
    rewards, advantages = record.get("turn_rewards") or [], record.get("advantages") or []
    return {
        "tokens": turn["end"] - turn["start"],
        "broken": turn["broken"],
        "calls": len(turn["calls"]),
        "tools": [outcome["outcome"] for outcome in turn["outcomes"]],
        "rewards": None,
        "reward": rewards[k] if k < len(rewards) else None,
        "return": None,
        "mean": None,
        "std": None,
        "advantage": advantages[k] if k < len(advantages) else None,
    }


def flags(kept: Mapping[str, Any]) -> int:
    """The bits of FLAGS that a trajectory (`numbers`) has."""
    turns = kept["turns"]
    tools = {outcome for turn in turns for outcome in turn["tools"]}
    broken = {turn["broken"] for turn in turns}
    found = {
        "no first call": not turns or not turns[0]["calls"],
        "malformed": "malformed" in tools,
        "timeout": "timeout" in tools,
        "tool error": bool(tools - {"ok", "malformed", "over_limit", "infra", "timeout"}),
        "truncated": kept["finish"] in _TRUNCATED,
        "dropped": kept["dropped"],
        "no answer": "no_answer" in broken,
    }
    return sum(FLAGS[name] for name, has in found.items() if has)


def prompt(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages before the first turn."""
    return [{"role": str(m.get("role", "")), "content": _text(m.get("content"))} for m in record.get("prompt") or []]


def prompt_head(record: Mapping[str, Any]) -> str:
    """The last thing the user said, shortened: how lists name a prompt."""
    said = [m["content"] for m in prompt(record) if m["role"] == "user"]
    return (said or [""])[-1][:_HEAD]


def prompt_key(record: Mapping[str, Any]) -> str:
    """Equal for the same prompt in other steps and runs; "" where the record has no prompt."""
    messages = prompt(record)
    return hashlib.sha256(json.dumps(messages).encode("utf-8", "replace")).hexdigest()[:16] if messages else ""


def group_label(record: Mapping[str, Any]) -> str:
    return str(record["group"])


def executed(record: Mapping[str, Any]) -> list[str]:
    """The code that each turn ran: what shaping compares."""
    return [_code(turn) for turn in record["turns"]]


def _code(turn: Mapping[str, Any]) -> str:
    pairs = zip(turn["calls"], turn["outcomes"], strict=False)
    ran = [call for call, outcome in pairs if outcome["outcome"] not in ("malformed", "over_limit")]
    return "\n".join(str(call["arguments"].get("code", "")) for call in ran)


def searchable(record: Mapping[str, Any]) -> Iterator[str]:
    """Every text of a trajectory that search finds."""
    for message in prompt(record):
        yield message["content"]
    for turn in record["turns"]:
        yield turn["text"]
        for outcome in turn["outcomes"]:
            yield outcome["output"]


def conversation(record: Mapping[str, Any]) -> dict[str, Any]:
    """All texts of a trajectory, as the page shows them."""
    turns = []
    for turn in record["turns"]:
        calls = []
        for k, call in enumerate(turn["calls"]):
            outcome = turn["outcomes"][k] if k < len(turn["outcomes"]) else None
            code = call["arguments"].get("code")
            calls.append(
                {
                    "name": call["name"],
                    "arguments": _text(code if code is not None else call["arguments"]),
                    "language": "python" if code is not None else "json",
                    "error": call["error"],
                    "detail": call["detail"],
                    "outcome": outcome and outcome["outcome"],
                    "output": outcome and outcome["output"],
                    "seconds": outcome and outcome["seconds"],
                }
            )
        turns.append({"text": turn["text"], "calls": calls, "ended_by": turn.get("ended_by", "")})
    return {"prompt": prompt(record), "gold": record.get("gold"), "fault": record.get("fault", ""), "turns": turns}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1, default=str)
