"""The decisions of a rollout: how a turn ends, which calls run, what a refused call is told, how turns are judged.

Whoever generates the tokens and runs the tools asks here, so that two engines cannot drift apart: the agent loop under
verl (`agent_loop.py`) and the plain-PyTorch engine (`experiments/twin`). No tokens, no tools, no verl.

    turn = what the policy said  -> `end_turn` -> the calls to run
    their outcomes               -> `hear`     -> the tool messages
    all of it, once finished     -> `trajectory`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.method.turns import TRUNCATED, Finish, FormatReason, ToolCall, ToolOutcome, Trajectory, Turn
from recipe.gtpo.parsing import parse_calls, printable, spoken

ExtractAnswer = Callable[[str], str | None]


@dataclass(frozen=True)
class Rules:
    """What a conversation is held to. One object serves all trajectories of a run."""

    argument_schemas: Mapping[str, Mapping[str, Any]]  # tool name -> JSON schema of its arguments
    extract_answer: ExtractAnswer  # the final answer that a turn states, or None (`tasks/task.py`)
    response_length: float = float("inf")  # tokens of all turns and tool messages together
    context_length: float = float("inf")  # tokens of these and the prompt: what the server can hold
    max_turns: float = float("inf")  # assistant turns
    max_parallel_calls: int = 1  # calls that one turn may run
    max_tool_response_length: float = float("inf")  # characters of a tool message
    truncate_side: str = "middle"  # which side of a longer one goes: left, right, middle
    success_threshold: float = 1.0  # `read_score`

    @classmethod
    def of(
        cls,
        rollout: Any,
        options: GTPOOptions,
        argument_schemas: Mapping[str, Mapping[str, Any]],
        extract_answer: ExtractAnswer,
    ) -> Rules:
        """From verl's `actor_rollout_ref.rollout`, as OmegaConf or as verl's dataclass; a limit of None is none."""
        limits = rollout.multi_turn
        return cls(
            argument_schemas=argument_schemas,
            extract_answer=extract_answer,
            response_length=rollout.response_length,
            context_length=rollout.max_model_len or float("inf"),
            max_turns=limits.max_assistant_turns or float("inf"),
            max_parallel_calls=limits.max_parallel_calls,
            max_tool_response_length=limits.max_tool_response_length,
            truncate_side=limits.tool_response_truncate_side,
            success_threshold=options.success_threshold,
        )

    def room(self, response_length: int, prompt_length: int = 0) -> float:
        """How many tokens the next turn may have after a prompt and a response of these lengths; 0 or less is none."""
        return min(self.response_length, self.context_length - prompt_length) - response_length

    def shorten(self, text: str) -> str:
        """At most `max_tool_response_length` characters of `text`, the cut marked, on the side that verl's key says."""
        if len(text) <= self.max_tool_response_length:
            return text
        limit = int(self.max_tool_response_length)
        if self.truncate_side == "left":
            return "(truncated)..." + text[len(text) - limit :]
        if self.truncate_side == "right":
            return text[:limit] + "...(truncated)"
        return text[: limit // 2] + "...(truncated)..." + text[len(text) - limit // 2 :]


class Conversation:
    """One trajectory while it happens. `finish` is None until it has ended."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.turns: list[Turn] = []
        self.finish: Finish | None = None
        self._refused: tuple[ToolOutcome | None, ...] = ()  # of the last turn, one a call
        self._cut = False  # the last turn ran out of tokens

    def end_turn(
        self,
        start: int,
        end: int,
        text: str,
        *,
        cut: bool,
        ended_by: str = "",
        overrun: int = 0,
        weights: tuple[int, int] | None = None,
    ) -> tuple[ToolCall, ...]:
        """Record an assistant turn.

        Args:
            start, end: the response tokens `[start, end)` that the policy generated in it.
            text: what these tokens say, thoughts included (`parsing.read_tokens`).
            cut: the turn ran out of tokens, it did not end by itself (`was_cut`).
            ended_by, overrun, weights: as in the record (`method.turns.Turn`).

        Returns:
            The calls to run, in order; `hear` wants one outcome for each. Also empty when all calls are refused, so ask
            `finish` whether the conversation goes on.
        """
        self._cut = cut
        calls = parse_calls(spoken(text), self.rules.argument_schemas, cut=cut)
        self.turns.append(Turn(start, end, text, calls, ended_by=ended_by, overrun=overrun, weights=weights))
        if cut:
            self.finish = Finish.LENGTH
        elif not calls:
            self.finish = Finish.ANSWER
        elif len(self.turns) >= self.rules.max_turns:
            self.finish = Finish.TURN_LIMIT
        if self.finish is not None:
            return ()
        self._refused = refusals(calls, self.rules.max_parallel_calls)
        return tuple(call for call, refused in zip(calls, self._refused, strict=True) if refused is None)

    def hear(self, outcomes: Sequence[ToolOutcome], as_data: Callable[[str], str] = str) -> tuple[str, ...]:
        """Record what became of the calls that `end_turn` returned; the tool messages of the turn, one a call.

        What a tool said is data: it passes through `as_data` on its way into a message (`parsing.as_data`). A refusal
        is our own text. A tool that failed on our side ends the conversation: what it said is no message, but the
        cause, and is kept whole.
        """
        ran = iter(replace(o, output=self._kept(o)) for o in outcomes)
        answered = tuple(refused or next(ran) for refused in self._refused)
        self.turns[-1] = replace(self.turns[-1], outcomes=answered)
        if any(outcome.outcome == "infra" for outcome in answered):
            self.finish = Finish.INFRA
        return tuple(
            outcome.output if refused else as_data(outcome.output)
            for outcome, refused in zip(answered, self._refused, strict=True)
        )

    def _kept(self, outcome: ToolOutcome) -> str:
        text = printable(outcome.output)
        return text if outcome.outcome == "infra" else self.rules.shorten(text)

    def check_room(self, response_length: int, prompt_length: int = 0) -> None:
        """End the conversation where its tool messages, included in `response_length`, leave no room for a token."""
        if self.rules.room(response_length, prompt_length) < 1:
            self.out_of_room()

    def out_of_room(self) -> None:
        """End the conversation before a turn that not a single token is left for."""
        self.finish = Finish.LENGTH

    @property
    def final_words(self) -> str:
        """What the last turn says, its thoughts left out: what is scored."""
        return spoken(self.turns[-1].text)

    def trajectory(self, scored: Any) -> Trajectory:
        """The finished conversation as the record that credit assignment reads.

        Args:
            scored: what the reward function said of the *final assistant turn's* text (`read_score`): an answer that
                only a tool printed is not the model's. Not looked at where the tool server failed.

        Raises ValueError for what is no outcome.
        """
        assert self.finish is not None, "the conversation goes on"
        judged = judge_turns(self.turns, self.finish, self.rules.extract_answer, cut=self._cut)
        if self.finish is Finish.INFRA:
            return Trajectory(judged, self.finish, acc=0.0)
        outcome, solved, pred = read_score(scored, self.rules.success_threshold)
        return Trajectory(judged, self.finish, float(solved), pred, None if outcome == float(solved) else outcome)

    def lost(self, fault: str) -> Trajectory:
        """The record of a conversation that something of ours ended or kept from being scored: `fault` names it."""
        return Trajectory(tuple(self.turns), Finish.FAULT, acc=0.0, fault=fault)


def was_cut(*, ended: bool, stop_reason: str | None, generated: int, room: float) -> bool:
    """Whether a turn ran out of tokens.

    Args:
        ended: its tokens hold one that ends a turn: then it is whole, also on the last token that there was room for.
        stop_reason: the server's. SGLang says "length"; vLLM under verl says "completed" for either, so its tokens are
            counted.
        generated: tokens of the turn.
        room: tokens that it could have (`Rules.room`).
    """
    return not ended and (stop_reason in ("length", "abort", "aborted") or generated >= room)


def refusals(calls: Sequence[ToolCall], max_parallel_calls: int) -> tuple[ToolOutcome | None, ...]:
    """What a call is told that is not run, None for one that is. At most `max_parallel_calls` of a turn are."""
    allowed = max_parallel_calls
    answers: list[ToolOutcome | None] = []
    for call in calls:
        if call.error is not None:
            answers.append(ToolOutcome("malformed", f"Error: {call.detail}", 0.0))
        elif allowed == 0:
            text = f"Error: not run: at most {max_parallel_calls} tool call(s) a turn"
            answers.append(ToolOutcome("over_limit", text, 0.0))
        else:
            allowed -= 1
            answers.append(None)
    return tuple(answers)


def judge_turns(turns: Sequence[Turn], finish: Finish, extract_answer: ExtractAnswer, *, cut: bool) -> tuple[Turn, ...]:
    """The turns with their format verdicts. `cut`: the last one ran out of tokens.

    What a limit or a failing tool server ended was not ended by the model; but its last turn may have been.
    """
    last = len(turns) - 1
    return tuple(
        replace(
            turn,
            broken=judge_format(
                is_first=k == 0,
                is_last=k == last,
                truncated=k == last and (finish in TRUNCATED or finish is Finish.INFRA),
                cut=k == last and cut,
                calls=turn.calls,
                has_answer=extract_answer(spoken(turn.text)) is not None,
            ),
        )
        for k, turn in enumerate(turns)
    )


def judge_format(
    *, is_first: bool, is_last: bool, truncated: bool, cut: bool, calls: Sequence[ToolCall], has_answer: bool
) -> FormatReason | None:
    """The one format verdict of a turn, or None when it keeps the format. What it costs: `rewards.CHARGED`.

    Args:
        is_first, is_last: position in the trajectory.
        truncated: a limit of ours ended the trajectory with this turn; then a missing answer is not the model's fault.
        cut: the turn itself ran out of tokens; then neither is a last call that is not closed. One in a turn that the
            model ended is, also where the trajectory ends with it.
        calls: what `parse_calls` found.
        has_answer: whether the task's `extract_answer` found one.
    """
    for k, call in enumerate(calls):
        unfinished = cut and k == len(calls) - 1 and call.error is FormatReason.UNBALANCED_TAG
        if call.error is not None and not unfinished:
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


#: Why a row with anything else is refused: a policy would be trained on images that it has not seen.
TEXT_ONLY = "this recipe's agent loop is for text; leave such rows out"


def not_text(row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], media: Sequence[str]) -> str | None:
    """What of a row the agent loop would not pass on: a column's name or a part's type; None where all is text.

    Args:
        messages: its prompt. media: the columns of images, videos and sounds.
    """
    parts = (part for m in messages if isinstance(m["content"], list) for part in m["content"])
    kinds = (str(part.get("type", "text")) for part in parts if isinstance(part, Mapping))
    return next((key for key in media if row.get(key)), None) or next((kind for kind in kinds if kind != "text"), None)


def read_score(scored: Any, success_threshold: float = 1.0) -> tuple[float, bool, str]:
    """Outcome, whether it is solved, and the stated answer, from what a reward function returned.

    Args:
        scored: in any form that verl's own reward functions return: a number (Python's, numpy's, a tensor of one
            element), or a mapping with `score` (the outcome), `acc` (whether it is solved) or both, and maybe `pred`.
        success_threshold: an outcome at or above it is solved, where there is no `acc`.

    Raises ValueError for anything else, and for an outcome that is not finite.
    """
    if not isinstance(scored, Mapping):
        outcome = _number(scored)
        return outcome, outcome >= success_threshold, ""
    if "score" not in scored and "acc" not in scored:
        raise ValueError(f"the reward function returned the keys {sorted(map(str, scored))}: it needs score or acc")
    outcome = _number(scored["score" if "score" in scored else "acc"])
    solved = outcome >= success_threshold if "acc" not in scored else _number(scored["acc"]) >= 1
    pred = scored.get("pred")  # None: it found no answer, which is not the answer "None"
    return outcome, solved, "" if pred is None else str(pred)


def _number(value: Any) -> float:
    try:
        one = value.item() if hasattr(value, "item") else value  # numpy, torch
    except (ValueError, RuntimeError):  # of several elements, or none
        one = None
    if not isinstance(one, bool | int | float) or not math.isfinite(one):
        raise ValueError(
            f"the reward function returned {value!r:.80}: an outcome is a finite number, 1 for a solved trajectory "
            "(README.md, section 'Your own data and reward')"
        )
    return float(one)
