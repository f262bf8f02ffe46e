"""What the teacher shows is right, and in the words that the policy is held to."""

from __future__ import annotations

import contextlib
import io

import pytest

from recipe.gtpo.data.__main__ import make_task
from recipe.gtpo.parsing import parse_calls
from recipe.gtpo.sft.transcripts import check
from recipe.gtpo.tasks.task import boxed
from recipe.gtpo.tasks.teacher import EXPRESSIONS, program
from verl_ext.tools.schema import python_schema

pytestmark = pytest.mark.unit

SCHEMAS = {"python": python_schema()["function"]["parameters"]}


def run_code(code: str) -> str:
    """As the tool would; the teacher's programs are our own."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue()


@pytest.mark.parametrize(
    ("equation", "expression"),
    [
        ("6*h + 66 = 456", "(456 - 66) // 6"),
        ("84 - 60*q = -5616", "(-5616 - 84) // -60"),
        ("33*q - 10 = 56", "(56 + 10) // 33"),
        ("7*x = 91", "91 // 7"),
    ],
)
def test_equations(equation, expression):
    assert program("simple_equations", {"equation": equation}) == f"print({expression})"


@pytest.mark.parametrize("equation", ["0 = 0", "k - 37 = -14", "99 - y = 49"])
def test_an_equation_that_the_teacher_does_not_solve_is_refused(equation):
    with pytest.raises(ValueError, match="cannot solve"):
        program("simple_equations", {"equation": equation})


def test_an_unknown_generator_is_refused():
    with pytest.raises(ValueError, match=r"knows no n_queens; it knows .*chain_sum"):
        program("n_queens", {})


@pytest.fixture(scope="module")
def task():
    return make_task("reasoning_gym", ["task.train_problems=200", "task.validation_problems=200"])


def test_its_transcripts_call_the_tool_and_answer_what_it_said(task):
    assert set(task.generators) <= set(EXPRESSIONS)
    shown, refused = [], 0
    for row in task.training_rows():
        try:
            shown.append((row, task.demonstrate(row, run_code)))
        except ValueError:
            refused += 1
    assert refused < 10 and len(shown) + refused == 200
    for row, messages in shown:
        check(messages)
        assert [m["role"] for m in messages] == ["system", "user", "assistant", "tool", "assistant"]
        (call,) = parse_calls(messages[2]["content"], SCHEMAS, cut=False)
        assert call.error is None and run_code(call.arguments["code"]).strip() == messages[3]["content"]
        assert boxed(messages[4]["content"]) == str(row["answer"])


def test_a_program_that_does_not_print_the_answer_is_no_transcript(task):
    row = next(iter(task.training_rows()))
    with pytest.raises(ValueError, match="does not print the answer"):
        task.demonstrate(row, lambda code: "12345678901")
