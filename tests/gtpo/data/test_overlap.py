"""Which problems are the same, and which share too much."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.gtpo.data.overlap import SHARE, Known, N, key, ngrams, words

pytestmark = pytest.mark.unit

PROBLEM = "A farmer has seven cows and sells three of them at the market for forty dollars each on a Monday morning"


def known(*problems: str, partial: bool = True) -> Known:
    one = Known(partial)
    for problem in problems:
        one.add(problem, "test set")
    return one


@pytest.mark.parametrize("written", ["What is  $2+3$?", "what is 2 + 3", "What is 2+3 ?"])
def test_case_spaces_dollars_and_the_last_mark_make_no_other_problem(written):
    assert key(written) == key("What is 2+3?") and known("What is 2+3?").find(written) == ("exactly", "test set")


def test_a_sign_makes_another_problem():
    assert known("What is 2+3?").find("What is 2-3?") is None


@given(st.integers(0, 11))
def test_half_of_the_runs_of_words_is_what_counts(cut):
    """A problem of n words has n - N + 1 runs; one that has the first words of it, and nothing else, has fewer."""
    said = words(PROBLEM)
    beginning = " ".join(said[: len(said) - cut])
    shared, whole = len(list(ngrams(words(beginning)))), len(list(ngrams(said)))
    found = known(PROBLEM).find(f"{beginning} and then?")
    assert (found == ("in part", "test set")) is (shared >= SHARE * whole)


def test_a_problem_of_fewer_words_is_known_by_all_of_it_only():
    assert len(words("What is 2 times 3?")) < N
    assert known("What is 2 times 3?").find("What is 2 times 3? Explain.") is None


def test_templated_problems_are_known_by_all_of_them_only():
    assert known(PROBLEM, partial=False).find(PROBLEM + " in May") is None
    assert known(PROBLEM, partial=False).find(PROBLEM) == ("exactly", "test set")
