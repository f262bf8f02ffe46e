"""The calculator against Python itself, and the text of tool messages."""

from __future__ import annotations

import contextlib
import io
import random
import traceback
from dataclasses import replace

import pytest

from recipe.gtpo.conversation import Conversation
from recipe.gtpo.method.turns import FormatReason
from recipe.gtpo.tasks.arithmetic.calculator import run_call, run_code
from recipe.gtpo.tasks.arithmetic.experts import RULES, write_call

pytestmark = pytest.mark.unit


def python_says(code: str) -> str:
    """What an interactive Python shows for `code`: the echo of its value, or the last line of its traceback."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        try:
            exec(compile(code, "<code>", "single"), {})
        except Exception as e:
            return traceback.format_exception_only(e)[-1]
    return shown.getvalue()


def random_code(rng: random.Random) -> str:
    code = str(rng.randrange(10**8))
    for _ in range(rng.randrange(3)):
        code += rng.choice(["+", "-", "*", " + ", "+-", "*-"]) + str(rng.randrange(10**5))
    return f"({code})*{rng.randrange(100)}" if rng.random() < 0.3 else code


def test_results_are_pythons_on_random_expressions():
    rng = random.Random(1)
    for _ in range(300):
        code = random_code(rng)
        result = run_code(code)
        assert (result.outcome, result.output) == ("ok", python_says(code)), code


@pytest.mark.parametrize("code", ["12345+", "*3", "12+*3", "(1+2", "1+2)", "12 34", "0123+4", "1..2+3", "+"])
def test_syntax_errors_are_pythons(code):
    result = run_code(code)
    assert result.outcome == "syntax_error"
    assert result.output.splitlines()[-1] + "\n" == python_says(code)


@pytest.mark.parametrize("code", ["x", "print(1)", "1/2", "2**9", "1.5+2", "True", "a=3", "1;2", "1,234+5", "'a'*3"])
def test_other_programs_are_errors_and_never_run(code):
    assert run_code(code).outcome == "error"


@pytest.mark.parametrize("code", ["\0", "(" * 5000])
def test_hostile_text_does_not_raise(code):
    assert run_code(code).outcome in ("error", "syntax_error")


@pytest.mark.parametrize("code", ["", "# nothing"])
def test_empty_program_shows_nothing(code):
    assert (run_code(code).outcome, run_code(code).output) == ("ok", "")


def test_a_conversation_answers_every_call_in_order():
    text = write_call("1+2") + write_call("3+") + write_call("1234567+1234567") + "<tool_call>{}"
    conversation = Conversation(replace(RULES, max_parallel_calls=2))
    calls = conversation.end_turn(0, 1, text, cut=False)
    assert conversation.hear(tuple(map(run_call, calls))) == (
        "3\n",
        "SyntaxError: invalid syntax",
        "Error: code is longer than 10 characters",
        "Error: <tool_call> is not closed by </tool_call>",
    )
    assert [c.error for c in conversation.turns[0].calls] == [
        None,
        None,
        FormatReason.BAD_ARGUMENT,
        FormatReason.UNBALANCED_TAG,
    ]
