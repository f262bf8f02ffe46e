"""What a task brings, and how an answer is found."""

from __future__ import annotations

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
        ("boxed{1}", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_balanced_box(text, answer):
    assert boxed(text) == answer


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "x", "\\boxed", "1"])).map("".join))
def test_one_pass_finds_what_a_search_from_every_box_finds(text):
    assert boxed(text) == search_from_every_box(text)


def search_from_every_box(text: str) -> str | None:
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) != -1:
        depth = 0
        for i in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : i].strip()
        end = start
    return None


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
