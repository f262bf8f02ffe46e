"""What the page needs of one recorded trajectory: the numbers that the index keeps, and the texts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from verl_ext.records.schema import Call, Record, Turn, upgrade

#: What a reader can filter by; the value is the bit in the index.
FLAGS = {
    "no first call": 1,
    "malformed": 2,
    "timeout": 4,
    "tool error": 8,
    "truncated": 16,
    "dropped": 32,
    "no answer": 64,
    "all equal": 128,  # of a group: no advantage is other than 0, so that it teaches nothing
}
_TRUNCATED = ("turn_limit", "length")
_DID_NOT_RUN = ("malformed", "over_limit")
#: Characters of a prompt, and of an answer, that lists show.
_HEAD, _ANSWER = 240, 80


def parse(line: bytes, step: int, split: str) -> Record:
    """A line of any version. Raises ValueError when it is none."""
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    try:
        return Record.model_validate(upgrade({"step": step, "split": split, **found}))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no record: {type(error).__name__} {error}") from error


def finite(value: Any) -> Any:
    """The value without what JSON has not: a float that is not finite, as a run that diverged records it, is None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


def numbers(record: Record) -> dict[str, Any]:
    """What the index keeps of a trajectory, so that grid, ledger and what-if need no text. None: not known."""
    acc, outcome = finite(record.acc), finite(record.outcome)
    return {
        "finish": record.finish,
        "acc": acc,
        "outcome": acc if outcome is None else outcome,
        "shaped": finite(record.shaped),
        "dropped": record.dropped,
        "update": record.update,
        "pred": record.pred[:_ANSWER],
        "gold": None if record.gold is None else _text(record.gold)[:_ANSWER],
        "session": record.session,
        "index": record.index,
        "weights": record.weights,
        "code": any(code.strip() for code in executed(record)),
        "partners": {one.session: one.similarity for one in record.partners if math.isfinite(one.similarity)},
        "turns": [_numbers_of(turn) for turn in record.turns],
    }


def _numbers_of(turn: Turn) -> dict[str, Any]:
    rewards = finite(turn.rewards)
    kept = {
        "tokens": turn.end - turn.start,
        "masked": turn.masked,
        "broken": turn.broken,
        "calls": len(turn.calls),
        "tools": [outcome.outcome for outcome in turn.outcomes],
        "said": _said(turn),
        "rewards": None if rewards and None in rewards.values() else rewards,  # the page adds them up
        "reward": turn.reward,
        "return": turn.return_,
        "mean": turn.pool_mean,
        "divisor": turn.divisor,
        "advantage": turn.advantage,
        "log_prob": turn.log_prob,
        "gap": turn.log_prob_gap,
    }
    return finite(kept)


def trained_tokens(turn: Mapping[str, Any]) -> int:
    """Of a turn of `numbers`: those that its advantage weighs, without what rollout correction left out."""
    return turn["tokens"] - (turn.get("masked") or 0)


def _said(turn: Turn) -> str:
    """Equal for turns whose tools said the same; "" where none said anything."""
    said = [(outcome.outcome, outcome.output.strip()) for outcome in turn.outcomes]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12] if said else ""


def flags(kept: Mapping[str, Any]) -> int:
    """The bits of FLAGS that a trajectory (`numbers`) has."""
    turns = kept["turns"]
    tools = {outcome for turn in turns for outcome in turn["tools"]}
    found = {
        "no first call": not turns or not turns[0]["calls"],
        "malformed": "malformed" in tools,
        "timeout": "timeout" in tools,
        "tool error": bool(tools - {"ok", "infra", "timeout", *_DID_NOT_RUN}),
        "truncated": kept["finish"] in _TRUNCATED,
        "dropped": kept["dropped"],
        "no answer": any(turn["broken"] == "no_answer" for turn in turns),
    }
    return sum(FLAGS[name] for name, has in found.items() if has)


def prompt(record: Record) -> list[dict[str, str]]:
    """The messages before the first turn."""
    return [{"role": message.role, "content": _text(message.content)} for message in record.prompt or []]


def prompt_head(record: Record) -> str:
    """The last thing the user said, shortened: how lists name a prompt."""
    said = [message["content"] for message in prompt(record) if message["role"] == "user"]
    return (said or [""])[-1][:_HEAD]


def prompt_key(record: Record) -> str:
    """Equal for the same prompt in other steps and runs; "" where the record has no prompt."""
    messages = prompt(record)
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16] if messages else ""


def executed(record: Record) -> list[str]:
    """The code that each turn ran: what shaping compares."""
    return [
        "\n".join(
            str(call.arguments.get("code", ""))
            for call, outcome in zip(turn.calls, turn.outcomes, strict=False)
            if outcome.outcome not in _DID_NOT_RUN
        )
        for turn in record.turns
    ]


def searchable(record: Record) -> Iterator[str]:
    """Every text of a trajectory that search finds.

    Code of several lines is in a turn's text as JSON, where a line begins in the middle of a word ("\\nprint").
    """
    for message in prompt(record):
        yield message["content"]
    for turn in record.turns:
        yield turn.text
        for call in turn.calls:
            yield from (value for value in call.arguments.values() if isinstance(value, str) and "\n" in value)
        for outcome in turn.outcomes:
            yield outcome.output


def conversation(record: Record) -> dict[str, Any]:
    """All texts of a trajectory, as the page shows them."""
    return {
        "prompt": prompt(record),
        "fault": record.fault,
        "turns": [
            {
                "text": turn.text,
                "ended_by": turn.ended_by,
                "weights": turn.weights,
                "calls": [_call(turn, k) for k in range(len(turn.calls))],
            }
            for turn in record.turns
        ],
    }


def _call(turn: Turn, k: int) -> dict[str, Any]:
    call = turn.calls[k]
    came = turn.outcomes[k] if k < len(turn.outcomes) else None
    return {
        "name": call.name,
        **_arguments(call),
        "error": call.error,
        "detail": call.detail,
        "outcome": came and came.outcome,
        "output": came and came.output,
        "seconds": came and finite(came.seconds),
    }


def _arguments(call: Call) -> dict[str, str]:
    """Code as code; other arguments as JSON."""
    code = call.arguments.get("code")
    if isinstance(code, str):
        return {"arguments": code, "language": "python"}
    return {"arguments": _text(call.arguments), "language": "json"}


def gaps(record: Record) -> list[list[tuple[int, float | None]] | None]:
    """By turn the (token id, rollout's log-probability minus the policy's) of each token; None where not recorded."""
    return [
        list(zip(turn.token_ids, finite(turn.log_prob_gaps), strict=False))
        if turn.token_ids and turn.log_prob_gaps
        else None
        for turn in record.turns
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1, default=str)
