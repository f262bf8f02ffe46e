r"""Multi-step arithmetic word problems that need the tool: generator, splits, score.

A problem is a chain: a start value, then k steps (add, subtract, multiply), told in one of several wordings. The
numbers are too large for a tiny policy to compute, small enough to copy: every value on the way has 4 to 6 digits,
addends have 3, factors have 2. These sizes carry a law that the whole task rests on (a test states it):

    one step, written without spaces, takes at most MAX_CODE_LENGTH characters; any two consecutive steps take more.

So the tool's JSON schema, which limits `code` to MAX_CODE_LENGTH, forces one call a step, and each call needs the
result of the one before: k steps are k dependent calls.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from recipe.gtpo.tasks.task import boxed, make_row
from verl_ext.tools.schema import python_schema

DATA_SOURCE = "arithmetic"
AGENT_NAME = "gtpo_agent"
SPLITS = ("train", "validation")
MAX_STEPS = 6

SYMBOLS = {"add": "+", "sub": "-", "mul": "*"}
_START = (1_000, 9_999)
_OPERANDS = {"add": (100, 999), "sub": (100, 999), "mul": (32, 99)}
#: Every running value, wrong paths excepted. 1_000 * 32 * 32 > 999_999: two factors never follow each other.
VALUE_RANGE = (1_000, 999_999)
#: 6 digits, the operator, 3 digits. The shortest two steps take 11: 4 digits * 2 digits + 3 digits.
MAX_CODE_LENGTH = 10

#: The horizon knob's default: the longest number of dependent calls (`step_mix`).
HORIZON = 2

SYSTEM_MESSAGE = "Compute one step per call. Put the answer in \\boxed{}."


@dataclass(frozen=True)
class Wording:
    """How a chain is told: an opening with the start value, a sentence a step, a question."""

    opening: str
    steps: Mapping[str, str]
    question: str


WORDINGS = (
    Wording(
        "Start with {}.",
        {"add": "Add {}.", "sub": "Subtract {}.", "mul": "Multiply by {}."},
        "What is the result?",
    ),
    Wording(
        "A depot holds {} crates.",
        {"add": "It receives {}.", "sub": "It ships {}.", "mul": "The stock grows by a factor of {}."},
        "How many crates are there now?",
    ),
    Wording(
        "Mia has {} points.",
        {"add": "She wins {}.", "sub": "She loses {}.", "mul": "A bonus multiplies them by {}."},
        "How many points has she now?",
    ),
    Wording(
        "A lake has {} fish.",
        {"add": "People release {}.", "sub": "People catch {}.", "mul": "The stock grows by a factor of {}."},
        "How many fish are there now?",
    ),
)


def apply_step(operation: str, value: int, operand: int) -> int:
    """`value` after one step."""
    if operation == "add":
        return value + operand
    if operation == "sub":
        return value - operand
    if operation == "mul":
        return value * operand
    raise ValueError(f"unknown operation {operation!r}; operations: {', '.join(SYMBOLS)}")


@dataclass(frozen=True)
class Step:
    operation: str
    operand: int


@dataclass(frozen=True)
class Problem:
    """One chain of steps. Its numbers, not its wording, decide which split it belongs to."""

    start: int
    steps: tuple[Step, ...]
    wording: int

    @property
    def values(self) -> tuple[int, ...]:
        """The start value and the value after each step: k + 1 integers."""
        values = [self.start]
        for step in self.steps:
            values.append(apply_step(step.operation, values[-1], step.operand))
        return tuple(values)

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def operations(self) -> str:
        """In order, such as `add-mul`."""
        return "-".join(step.operation for step in self.steps)

    @property
    def question(self) -> str:
        wording = WORDINGS[self.wording]
        told = [wording.steps[step.operation].format(step.operand) for step in self.steps]
        return " ".join([wording.opening.format(self.start), *told, wording.question])

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": self.question}]

    @property
    def split(self) -> str:
        """A function of the numbers alone (1 in 8 is for validation): no seed can make the splits overlap."""
        key = f"{self.start} " + " ".join(f"{SYMBOLS[s.operation]}{s.operand}" for s in self.steps)
        return "validation" if zlib.crc32(key.encode()) % 8 == 0 else "train"


def step_mix(horizon: int) -> dict[int, float]:
    """Number of steps -> weight: 60% of the problems have `horizon` steps, the others one less. Raises ValueError."""
    if not 1 <= horizon <= MAX_STEPS:
        raise ValueError(f"horizon={horizon}: the task has 1 to {MAX_STEPS} dependent calls")
    return {1: 1.0} if horizon == 1 else {horizon - 1: 0.4, horizon: 0.6}


@dataclass(frozen=True)
class Limits:
    """Of one conversation: tokens of the prompt, tokens of the response, assistant turns."""

    prompt: int
    response: int
    turns: int

    @classmethod
    def of(cls, horizon: int) -> Limits:
        """Room for the longest chain, its answer and two turns of repair (a call and its reply take 45 tokens)."""
        return cls(prompt=64 + 16 * horizon, response=64 * (horizon + 1), turns=horizon + 3)


def sample_problems(split: str, seed: int, mix: Mapping[int, float] | None = None) -> Iterator[Problem]:
    """An endless stream of distinct problems of one split, a pure function of the arguments.

    Args:
        mix: number of steps -> weight; default: `step_mix(HORIZON)`.

    Raises:
        ValueError: unknown split, or a mix that is no distribution over 1..MAX_STEPS steps.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; splits: {', '.join(SPLITS)}")
    mix = step_mix(HORIZON) if mix is None else mix
    if any(not 1 <= k <= MAX_STEPS or w < 0 for k, w in mix.items()) or not any(mix.values()):
        raise ValueError(f"the mix must map step counts 1..{MAX_STEPS} to weights >= 0, not all 0; got {dict(mix)}")
    counts, weights = list(mix), list(mix.values())
    rng = random.Random(f"{DATA_SOURCE}/{split}/{seed}")
    seen: set[tuple[int, tuple[Step, ...]]] = set()
    while True:
        steps = rng.choices(counts, weights)[0]
        problem = _sample_chain(rng, steps)
        while problem.split != split or (problem.start, problem.steps) in seen:  # the step count is drawn only once:
            problem = _sample_chain(rng, steps)  # rejections must not bend the mix
        seen.add((problem.start, problem.steps))
        yield problem


def _sample_chain(rng: random.Random, count: int) -> Problem:
    while True:
        steps = []
        for _ in range(count):
            operation = rng.choice(tuple(SYMBOLS))
            steps.append(Step(operation, rng.randint(*_OPERANDS[operation])))
        problem = Problem(rng.randint(*_START), tuple(steps), rng.randrange(len(WORDINGS)))
        if all(VALUE_RANGE[0] <= value <= VALUE_RANGE[1] for value in problem.values):
            return problem


def take(stream: Iterator[Problem], count: int) -> list[Problem]:
    """The next `count` problems of a stream."""
    return [next(stream) for _ in range(count)]


def tool_schema(max_code_length: int = MAX_CODE_LENGTH) -> dict[str, Any]:
    """The schema of the tool `python` as a rollout shows it, with the length limit that makes each call one step."""
    return python_schema(max_code_length)


def to_row(problem: Problem, index: int) -> dict[str, Any]:
    """One row of a data file."""
    row = make_row(
        DATA_SOURCE,
        index,
        problem.messages,
        str(problem.answer),
        split=problem.split,
        operations=problem.operations,
        steps=len(problem.steps),
    )
    return row | {"agent_name": AGENT_NAME}


# 1234, or 1,234 and 1 234 with well-placed separators
_INTEGER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+)", re.ASCII)


def parse_integer(answer: str) -> int | None:
    """The integer an answer states, or None when it is no integer. Thousands separators and leading zeros are fine."""
    answer = answer.strip()
    if len(answer) > 1000:  # no answer of this task, and Python refuses to read one of 4,300 digits
        return None
    return int(re.sub("[, ]", "", answer)) if _INTEGER.fullmatch(answer) else None


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any] | None = None
) -> dict[str, float | str]:
    r"""Exact integer comparison of the boxed answer, in the signature verl's reward manager calls.

    Args:
        solution_str: text of the *final assistant turn*. Never the whole response: an answer printed by the tool in an
            earlier turn must not score.
        ground_truth: the integer in decimal.

    Returns:
        `score` and `acc` in {0.0, 1.0}, and `pred`, the answer in canonical form ("" when there is none): the same keys
        on every call, because verl averages a missing one as null.
    """
    answer = boxed(solution_str)
    value = None if answer is None else parse_integer(answer)
    correct = float(value is not None and value == int(ground_truth))
    return {"score": correct, "acc": correct, "pred": (answer or "") if value is None else str(value)}
