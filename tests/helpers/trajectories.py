"""Short ways to write recorded trajectories."""

from __future__ import annotations

from recipe.gtpo.method.turns import Finish, FormatReason, ToolCall, ToolOutcome, Trajectory, Turn


def turn(
    start: int, end: int, code: str = "", broken: FormatReason | None = None, outcome: str = "ok", said: str = ""
) -> Turn:
    """A turn of the tokens [start, end) that ran `code`, when there is any, and was told `said`."""
    if not code:
        return Turn(start, end, "", broken=broken)
    call = ToolCall("python", {"code": code})
    return Turn(start, end, "", calls=(call,), outcomes=(ToolOutcome(outcome, said, 0.0),), broken=broken)


def trajectory(*turns: Turn, acc: float = 0.0, finish: Finish = Finish.ANSWER) -> Trajectory:
    return Trajectory(turns=turns, finish=finish, acc=acc)
