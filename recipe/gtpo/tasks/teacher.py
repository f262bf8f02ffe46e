r"""A scripted teacher for a few of reasoning-gym's generators: transcripts for a model that has never seen a tool.

A base model that writes no tool call cannot be sampled for good transcripts, because there are none. What the teacher
says is written down here and nowhere else: one call of the tool python whose program is one line, and, once the tool
has answered, `\boxed{what it printed}`. The programs are right; the tool runs them like anybody's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any


def _expression(problem: Mapping[str, Any]) -> str:
    return problem["expression"]


def _lcm(problem: Mapping[str, Any]) -> str:
    return f"__import__('math').lcm({', '.join(map(str, problem['numbers']))})"


def _gcd(problem: Mapping[str, Any]) -> str:
    return f"__import__('math').gcd({', '.join(map(str, problem['numbers']))})"


def _linear(problem: Mapping[str, Any]) -> str:
    """The solution of simple_equations' `a*x + b = c`, whose terms come in any order: `(c - b) // a`."""
    left, _, value = problem["equation"].partition(" = ")
    factor, rest = "", ""
    for sign, number, variable in re.findall(r"(?:^|([+-]) ?)(-?\d+)(\*[a-z])?", left):
        signed = f"-{number}" if sign == "-" else number
        if variable:
            factor = signed
        else:  # to the other side
            rest = f" + {number}" if sign == "-" else f" - {number}"
    if not re.fullmatch(r"-?\d+", factor):
        raise ValueError(f"the teacher cannot solve {problem['equation']!r}")
    return f"({value}{rest}) // {factor}" if rest else f"{value} // {factor}"


#: generator -> the expression that the teacher prints, of a problem's metadata.
EXPRESSIONS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "basic_arithmetic": _expression,
    "chain_sum": _expression,
    "gcd": _gcd,
    "lcm": _lcm,
    "products": _expression,
    "simple_equations": _linear,
}


def program(generator: str, problem: Mapping[str, Any]) -> str:
    """What the teacher runs. Raises ValueError for a generator, or an equation, that it does not know."""
    if generator not in EXPRESSIONS:
        raise ValueError(f"the teacher knows no {generator}; it knows {', '.join(EXPRESSIONS)}")
    return f"print({EXPRESSIONS[generator](problem)})"


def turns(code: str, said: str) -> list[dict[str, str]]:
    """The teacher's two turns, and between them what the tool said."""
    call = json.dumps({"name": "python", "arguments": {"code": code}})
    return [
        {"role": "assistant", "content": f"<tool_call>\n{call}\n</tool_call>"},
        {"role": "tool", "content": said},
        {"role": "assistant", "content": f"\\boxed{{{said}}}"},
    ]
