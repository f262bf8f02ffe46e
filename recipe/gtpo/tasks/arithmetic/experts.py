"""Demonstrations for the warm start: an expert that solves the arithmetic task and, by a table, makes mistakes.

The expert plays against the same parser and tool replies as a rollout, turn by turn. Before each turn it looks up the
row of its situation - which stage of the conversation, which operation comes next - and draws a fault or none. A fault
under 50% leaves greedy decoding right and sampling imperfect; a fault that is the mode (80%) makes greedy decoding fail
there, so that only exploration can find the better turn. A faulty turn is trained on like any other: the warm start is
imperfect because its data is.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recipe.gtpo.conversation import Conversation, Rules
from recipe.gtpo.tasks.arithmetic.calculator import run_call
from recipe.gtpo.tasks.arithmetic.problems import SYMBOLS, Problem, Step, sample_problems, take, tool_schema
from recipe.gtpo.tasks.task import boxed

#: A rollout's rules without its limits: an expert's turns have no tokens yet.
RULES = Rules({"python": tool_schema()["function"]["parameters"]}, extract_answer=boxed)
STAGES = ("first", "later", "repair")  # no call yet; the previous call ran; the previous call was refused or failed
FAULTS = (
    "early_answer",  # answers with the value it has instead of making the next call
    "bad_json",  # a closing brace is missing
    "open_tag",  # </tool_call> is missing
    "wrong_operator",  # runs, with a wrong result
    "syntax_error",  # runs into a SyntaxError: the operand is missing
    "one_call",  # two steps in one call, over the schema's length limit (a plain step when only one is left)
)
MODE = 0.8  # a fault at least this likely makes greedy decoding fail in its situation
_WRONG = {"add": "sub", "sub": "add", "mul": "add"}

#: stage -> operation -> fault -> probability; the rest is the right turn.
FaultMix = Mapping[str, Mapping[str, Mapping[str, float]]]
FAULT_MIX: FaultMix = {
    "first": {
        "add": {"bad_json": 0.12, "open_tag": 0.08, "syntax_error": 0.10, "one_call": 0.15},
        "sub": {"early_answer": 0.80, "syntax_error": 0.05},
        "mul": {"early_answer": 0.10, "bad_json": 0.25, "wrong_operator": 0.10, "syntax_error": 0.10},
    },
    "later": {
        "add": {"early_answer": 0.30, "open_tag": 0.10, "wrong_operator": 0.10},
        "sub": {"early_answer": 0.45, "wrong_operator": 0.15},
        "mul": {"early_answer": 0.80, "bad_json": 0.05},
    },
    "repair": {
        "add": {"early_answer": 0.40},
        "sub": {"early_answer": 0.40},
        "mul": {"early_answer": 0.40},
    },
}

#: An expert whose first call decides: it errs there most often, and seldom afterwards. Nothing tells it that the result
#: is wrong, so it goes on.
FIRST_CALL_DECIDES: FaultMix = {
    stage: {
        operation: {"wrong_operator": 0.55, "early_answer": 0.30} if stage == "first" else {"early_answer": 0.03}
        for operation in SYMBOLS
    }
    for stage in STAGES
}
FAULT_MIXES: Mapping[str, FaultMix] = {"everywhere": FAULT_MIX, "first_call": FIRST_CALL_DECIDES}
#: What an expert that talks says before a call or an answer, each as often. It does not matter which.
REMARKS = ("Start.", "Add.", "Multiply.", "Step.", "Now.", "Then.", "So.", "Points.")


def is_modal(row: Mapping[str, float]) -> bool:
    """Whether the likeliest turn of a situation is a fault."""
    return max(row.values()) >= MODE


def problem_class(problem: Problem) -> str:
    """Where the expert's most likely turn is a fault, so that greedy decoding of its pupil fails: 4 classes.

    The classes are the same at every horizon: `no modal fault`, `first turn`, `later turn`, `first and later turn`.
    They are those of `FAULT_MIX`, also for an expert with other faults.
    """
    first, *later = (step.operation for step in problem.steps)
    in_first = is_modal(FAULT_MIX["first"][first])
    in_later = any(is_modal(FAULT_MIX["later"][operation]) for operation in later)
    if in_first:
        return "first and later turn" if in_later else "first turn"
    return "later turn" if in_later else "no modal fault"


def scale_faults(mix: FaultMix, factor: float) -> dict[str, dict[str, dict[str, float]]]:
    """`mix`, checked, with every probability times `factor` (0: a perfect expert).

    Raises:
        ValueError: a table with an unknown or missing name, or a row that sums to more than 1 after scaling.
    """
    scaled: dict[str, dict[str, dict[str, float]]] = {}
    for stage in STAGES:
        scaled[stage] = {}
        for operation in SYMBOLS:
            if operation not in mix.get(stage, {}):
                raise ValueError(f"the fault mix has no row {stage}/{operation}")
            row = {fault: p * factor for fault, p in mix[stage][operation].items()}
            unknown = row.keys() - set(FAULTS)
            if unknown:
                names = ", ".join(FAULTS)
                raise ValueError(f"unknown fault {min(unknown)!r} in {stage}/{operation}; faults: {names}")
            if min(row.values(), default=0) < 0 or sum(row.values()) > 1 + 1e-9:
                raise ValueError(f"the probabilities of {stage}/{operation} must be >= 0 and sum to <= 1: {row}")
            scaled[stage][operation] = row
    return scaled


def faults_for(success: float, mix: Mapping[int, float], table: FaultMix = FAULT_MIX) -> FaultMix:
    """The faults of an expert that solves about `success` of the problems of `mix` (number of steps -> weight).

    Longer chains fail more often at the same faults. So the faults that are not the mode of their row are made rarer by
    one factor, at most 1; those that are (`MODE` or more) stay, because a longer chain must not make greedy decoding
    right. Where the table as it is succeeds more often than asked, it is left as it is.

    Raises:
        ValueError: the modal faults alone leave less than `success`.
    """
    problems = take(sample_problems("train", 0, mix), 1000)

    def soften(factor: float) -> FaultMix:
        return {
            stage: {
                operation: row if is_modal(row) else {fault: p * factor for fault, p in row.items()}
                for operation, row in rows.items()
            }
            for stage, rows in table.items()
        }

    def reached(factor: float) -> float:
        rng = random.Random(0)
        demonstrations = [demonstrate(problem, soften(factor), rng) for problem in problems]
        return sum(d.turns[-1] == write_answer(d.problem.answer) for d in demonstrations) / len(problems)

    if reached(1.0) >= success:
        return table
    if (most := reached(0.0)) < success:
        raise ValueError(f"success={success} is out of reach with steps {dict(mix)}: the modal faults leave {most:.2f}")
    low, high = 0.0, 1.0
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) >= success else (low, middle)
    return soften(low)


@dataclass(frozen=True)
class Demonstration:
    """One conversation: `turns[j]` is answered by the tool messages `replies[j]`; the last turn has none."""

    problem: Problem
    turns: tuple[str, ...]
    replies: tuple[tuple[str, ...], ...]
    faults: tuple[str | None, ...]


def write_call(code: str) -> str:
    """A well-formed Hermes call of the tool."""
    return f'<tool_call>\n{{"name": "python", "arguments": {{"code": "{code}"}}}}\n</tool_call>'


def write_answer(value: int) -> str:
    return f"The answer is \\boxed{{{value}}}."


def write_turn(fault: str | None, value: int, steps: tuple[Step, ...]) -> str:
    """The assistant turn that applies the first of the remaining `steps` to `value`, with the given fault."""
    step = steps[0]
    code = f"{value}{SYMBOLS[step.operation]}{step.operand}"
    if fault == "early_answer":
        return write_answer(value)
    if fault == "bad_json":
        return write_call(code).replace("}}", "}")
    if fault == "open_tag":
        return write_call(code).removesuffix("</tool_call>")
    if fault == "wrong_operator":
        return write_call(f"{value}{SYMBOLS[_WRONG[step.operation]]}{step.operand}")
    if fault == "syntax_error":
        return write_call(f"{value}{SYMBOLS[step.operation]}")
    if fault == "one_call" and len(steps) > 1:
        return write_call(f"({code}){SYMBOLS[steps[1].operation]}{steps[1].operand}")
    return write_call(code)


def demonstrate(problem: Problem, mix: FaultMix, rng: random.Random, remarks: Sequence[str] = ()) -> Demonstration:
    """Solve one problem with the faults of `mix` (as `scale_faults` returns it), one of `remarks` before every turn."""

    def say(text: str) -> str:
        return f"{rng.choice(remarks)}\n{text}" if remarks else text

    conversation = Conversation(RULES)
    turns: list[str] = []
    replies: list[tuple[str, ...]] = []
    faults: list[str | None] = []
    value, remaining, stage = problem.start, problem.steps, "first"
    while remaining:
        row = mix[stage][remaining[0].operation]
        fault = rng.choices([*row, None], [*row.values(), max(0.0, 1 - sum(row.values()))])[0]
        turns.append(say(write_turn(fault, value, remaining)))
        faults.append(fault)
        calls = conversation.end_turn(len(turns) - 1, len(turns), turns[-1], cut=False)
        if conversation.finish is not None:
            return Demonstration(problem, tuple(turns), (*replies, ()), tuple(faults))
        replies.append(conversation.hear(tuple(map(run_call, calls))))
        outcome = conversation.turns[-1].outcomes[0]
        if outcome.outcome == "ok":
            value, remaining, stage = int(outcome.output), remaining[1:], "later"
        else:
            stage = "repair"
    turns.append(say(write_answer(value)))
    return Demonstration(problem, tuple(turns), (*replies, ()), (*faults, None))
