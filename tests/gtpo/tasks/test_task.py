"""What a task brings, and how an answer is found."""

from __future__ import annotations

import itertools
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from recipe.gtpo.tasks.arithmetic.task import Arithmetic
from recipe.gtpo.tasks.task import OwnData, Task, boxed, load_task

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{ 42 }", "42"),
        (r"\boxed{}", ""),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1}, no: \boxed{2}", "2"),
        (r"\boxed{1} or \boxed{2", "1"),  # the last one that closes
        (r"\boxed{a \boxed{b}", "b"),
        (r"\boxed{1", None),
        (r"\\boxed{1}", "1"),  # as in JSON
        ("boxed{1}", None),
        # as LaTeX reads it: spaces after the command, escaped braces that open and close nothing
        (r"earlier \boxed{5}, finally \boxed {7}", "7"),
        ("\\boxed\n{7}", "7"),
        (
            r"\boxed{\left\{\begin{array}{l}x=1\\y=2\end{array}\right.}",
            r"\left\{\begin{array}{l}x=1\\y=2\end{array}\right.",
        ),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"\boxed{a \{ b}", r"a \{ b"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \\{b} c}", r"a \\{b} c"),  # a line break, and a brace
        (r"\boxed\{7\}", None),
        # without braces, one digit or letter that stands alone
        (r"\boxed{5}, no: $\boxed 7$.", "7"),
        (r"\(\boxed7\)", "7"),
        (r"\boxed B", "B"),
        (r"\boxed{a \boxed 7}", "7"),
        (r"\boxed 72", None),
        (r"\boxed 7.5", None),
        (r"\boxed answer", None),
        (r"\boxedB", None),
        (r"\boxed", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_balanced_box(text, answer):
    assert boxed(text) == answer


@given(
    st.lists(
        st.sampled_from(
            ["\\boxed{", "\\boxed {", "\\boxed", "{", "}", "\\{", "\\}", "\\\\", "\\frac", " ", "\n", "x", "1", "."]
        )
    ).map("".join)
)
def test_one_pass_finds_what_latex_would_box_last(text):
    assert boxed(text) == last_box(text)


def last_box(text: str) -> str | None:
    """From TeX's tokens: a command, an escaped character, spaces, any other character."""
    tokens = re.findall(r"\\[A-Za-z]+|\\.|\s+|.", text, re.DOTALL)
    boxes = (i for i, token in enumerate(tokens) if token == "\\boxed")
    arguments = [argument(tokens[i + 1 :]) for i in boxes]
    return next((found for found in reversed(arguments) if found is not None), None)


def argument(tokens: list[str]) -> str | None:
    tokens = tokens[1:] if tokens and tokens[0].isspace() else tokens
    if not tokens or tokens[0] != "{":
        word = "".join(itertools.takewhile(lambda token: not token.isspace(), tokens))
        alone = tokens and tokens[0].isalnum() and not any(character.isalnum() for character in word[1:])
        return tokens[0] if alone else None
    depth = list(itertools.accumulate({"{": 1, "}": -1}.get(token, 0) for token in tokens))
    return "".join(tokens[1 : depth.index(0)]).strip() if 0 in depth else None


@pytest.mark.parametrize("part", ["\\", "\\boxed ", "\\boxed{", "{", "\\boxed 1", "\\boxed1", " "])
def test_a_long_turn_is_searched_in_one_pass(part):
    began = time.process_time()
    boxed(r"\boxed" + part * 20_000)
    assert time.process_time() - began < 1


def test_own_data_finds_answers_as_it_is_told():
    assert OwnData(name="x").extract_answer(r"so \boxed{7}") == "7"
    hashes = OwnData(name="x", answer="#### (.+)")
    assert hashes.extract_answer("#### 1\nno: #### 42 ") == "42" and hashes.extract_answer(r"\boxed{42}") is None
    anything = OwnData(name="x", answer="any")
    assert anything.extract_answer(" yes ") == "yes" and anything.extract_answer("  ") is None


@pytest.mark.parametrize(
    ("answer", "message"), [("#### .+", "needs one group"), ("(a)(b)", "it has 2"), ("(", "is no regular expression")]
)
def test_an_answer_pattern_that_cannot_work_is_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        OwnData(name="x", answer=answer)


def test_a_section_of_the_config_becomes_its_task_and_the_same_section_the_same_object():
    section = {"_target_": "recipe.gtpo.tasks.task.OwnData", "name": "mine", "answer": "any"}
    config = OmegaConf.create({"task": section})
    assert load_task(config) == OwnData(name="mine", answer="any")
    assert load_task(config) is load_task(OmegaConf.create({"task": dict(section)}))


def test_a_config_without_a_task_has_answers_in_a_box_and_no_score():
    """Somebody else's recipe that takes only our agent loop."""
    task = load_task(OmegaConf.create({}))
    assert task.extract_answer(r"\boxed{1}") == "1" and not task.scores


def test_a_class_that_scores_says_so():
    class Scoring(Task):
        def score(self, *args: Any, **kwargs: Any) -> float:
            return 1.0

    assert Scoring(name="x").scores and not Task(name="x").scores
    assert issubclass(Arithmetic, Task)
