"""The record of one trajectory, turn by turn: written by the agent loop, read by everything after it.

prompt -> agent loop -> **Trajectory** -> reward -> group credit -> advantage -> update -> record

A `Trajectory` crosses process borders as a plain dict (`to_dict` / `from_dict`) in verl's `extra_fields`. The spans are
those of the tokens the policy generated, noted while they were generated: nothing downstream guesses turns from a mask
that verl may rewrite (rollout correction does).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum

#: Key of the record in verl's `extra_fields`: written by the agent loop, read by the trainer.
TRAJECTORY = "trajectory"


class FormatReason(str, Enum):
    """Why a turn breaks the format. At most one per turn, the first that applies in this order."""

    UNBALANCED_TAG = "unbalanced_tag"  # <tool_call> without </tool_call>, or the reverse
    INVALID_JSON = "invalid_json"  # the call is not a JSON object with "name" and "arguments"
    UNKNOWN_TOOL = "unknown_tool"
    MISSING_ARGUMENT = "missing_argument"
    BAD_ARGUMENT = "bad_argument"  # unknown name, or a value of the wrong JSON type
    FIRST_TURN_NO_CALL = "first_turn_no_call"
    NO_CALL_NO_ANSWER = "no_call_no_answer"  # a turn before the last that does neither
    NO_ANSWER = "no_answer"  # the last turn has no parseable answer


class Finish(str, Enum):
    """Why a trajectory ended."""

    ANSWER = "answer"  # a turn without a tool call: the model is done, right or wrong
    TURN_LIMIT = "turn_limit"
    LENGTH = "length"  # response budget, or the context that the server has
    INFRA = "infra"  # the tool server failed, not the code: never charged to the model
    FAULT = "fault"  # something else of ours failed, such as the reward function: never charged, and the run may end


#: Ends that are a limit of ours, not a choice of the model's.
TRUNCATED = frozenset({Finish.TURN_LIMIT, Finish.LENGTH})
#: Ends that are a failure of ours: nothing of such a trajectory is judged, scored or trained on.
FAILED = frozenset({Finish.INFRA, Finish.FAULT})


@dataclass(frozen=True)
class ToolCall:
    """One call the model wrote. `error` is None when the call is well formed."""

    name: str
    arguments: dict
    error: FormatReason | None = None
    detail: str = ""  # what the model was told about a malformed call


#: Outcomes of calls that never reached the tool: the format is broken, or the turn made more calls than allowed.
NOT_EXECUTED = frozenset({"malformed", "over_limit"})


@dataclass(frozen=True)
class ToolOutcome:
    """What became of one call: the tool server's closed set (ok, error, timeout, ...) or one of `NOT_EXECUTED`."""

    outcome: str
    output: str
    seconds: float


@dataclass(frozen=True)
class Turn:
    """One assistant turn. `[start, end)` indexes the response tokens the policy generated in this turn.

    `text` has the turn's thoughts, `calls` are those outside them. `outcomes[i]` belongs to `calls[i]`; the turn that
    ends a trajectory at a limit has calls and no outcomes.
    """

    start: int
    end: int
    text: str
    calls: tuple[ToolCall, ...] = ()
    outcomes: tuple[ToolOutcome, ...] = ()
    broken: FormatReason | None = None
    ended_by: str = ""  # the control token that ended it, as text; "" where it was cut, and in older records
    overrun: int = 0  # tokens that the server generated past that token: left out of the response
    #: First and last step whose weights sampled it; None: the server did not say, and older records.
    weights: tuple[int, int] | None = None

    @property
    def code(self) -> str:
        """The executed code of this turn: only calls that reached the tool."""
        executed = (c for c, o in zip(self.calls, self.outcomes, strict=False) if o.outcome not in NOT_EXECUTED)
        return "\n".join(str(c.arguments.get("code", "")) for c in executed)


@dataclass(frozen=True)
class Trajectory:
    """One rollout of one prompt."""

    turns: tuple[Turn, ...]
    finish: Finish
    acc: float  # 1.0 when it is solved, else 0.0; never shaped
    pred: str = ""
    outcome: float | None = None  # what the reward function said, any finite number; None: `acc`
    fault: str = ""  # finish=FAULT: which row, and what failed

    @property
    def raw_outcome(self) -> float:
        """What the last turn is rewarded with, before shaping."""
        return self.acc if self.outcome is None else self.outcome

    @property
    def code(self) -> str:
        """The executed code of all turns, in order: what shaping compares."""
        return "\n".join(t.code for t in self.turns if t.code)

    @property
    def states(self) -> tuple[tuple, ...]:
        """What each turn could see beyond the prompt and the model's own words: all that the tools have said so far."""
        said: list[tuple[tuple[str, str], ...]] = [
            tuple((o.outcome, o.output.strip()) for o in turn.outcomes) for turn in self.turns
        ]
        return tuple(tuple(said[:k]) for k in range(len(said)))

    @property
    def infra_outputs(self) -> list[str]:
        """What the tools said that failed on our side."""
        return [o.output for turn in self.turns for o in turn.outcomes if o.outcome == "infra"]

    @property
    def truncated(self) -> bool:
        return self.finish in TRUNCATED

    def to_dict(self) -> dict:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Trajectory:
        """Inverse of `to_dict`. Raises KeyError / ValueError on a record that is not one."""
        return cls(
            turns=tuple(_turn(t) for t in data["turns"]),
            finish=Finish(data["finish"]),
            acc=float(data["acc"]),
            pred=data["pred"],
            outcome=data.get("outcome"),
            fault=data.get("fault", ""),
        )


def validation_info(trajectory: Trajectory) -> dict[str, float | str]:
    """What verl averages over a validation set. Always the same keys: verl fills missing ones with nulls."""
    calls = [call for turn in trajectory.turns for call in turn.calls]
    outcomes = [outcome.outcome for turn in trajectory.turns for outcome in turn.outcomes]
    first_calls = trajectory.turns[0].calls if trajectory.turns else ()
    return {
        "acc": trajectory.acc,
        "pred": trajectory.pred,
        "turns": float(len(trajectory.turns)),
        "first_turn_call": float(any(call.error is None for call in first_calls)),
        "malformed_call": float(any(call.error is not None for call in calls)),
        "tool_error": float(any(o not in NOT_EXECUTED | {"ok", "infra"} for o in outcomes)),
        "no_answer": float(any(t.broken is FormatReason.NO_ANSWER for t in trajectory.turns[-1:])),
        "truncated": float(trajectory.truncated),
        "infra": float(trajectory.finish is Finish.INFRA),
        "lost": float(trajectory.finish is Finish.FAULT),
        "fault": trajectory.fault,  # a text: verl leaves it out of its means, and our trainer reads it
    }


def _turn(data: dict) -> Turn:
    calls = tuple(
        ToolCall(c["name"], c["arguments"], FormatReason(c["error"]) if c["error"] else None, c["detail"])
        for c in data["calls"]
    )
    return Turn(
        start=data["start"],
        end=data["end"],
        text=data["text"],
        calls=calls,
        outcomes=tuple(ToolOutcome(**o) for o in data["outcomes"]),
        broken=FormatReason(data["broken"]) if data["broken"] else None,
        ended_by=data.get("ended_by", ""),
        overrun=data.get("overrun", 0),
        weights=(weights[0], weights[1]) if (weights := data.get("weights")) else None,
    )
