"""Protects the numbers of an evaluation: exact values, and for any attempts what loops over all draws give."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.gtpo.evaluate.measures import (
    Attempts,
    by_problem,
    difference,
    estimate,
    maj_at_k,
    pass_at_k,
    sizes,
    wilson,
)

pytestmark = pytest.mark.unit

#: The answers of some attempts: a number, or None for none. 0 is right.
said = st.lists(st.sampled_from([None, 0, 1, 2, 3]), min_size=1, max_size=7)


def answers_of(said):
    return [(votes, float(answer == 0)) for answer, votes in Counter(a for a in said if a is not None).items()]


def majority_right(drawn):
    """By the definition, for one draw: the expectation over how a tie is broken."""
    votes = Counter(answer for answer in drawn if answer is not None)
    if not votes:
        return 0.0
    first = [answer for answer, count in votes.items() if count == max(votes.values())]
    return first.count(0) / len(first)


@given(said, st.data())
def test_maj_at_k_is_its_mean_over_all_draws(said, data):
    k = data.draw(st.integers(1, len(said)))
    draws = [majority_right(drawn) for drawn in itertools.combinations(said, k)]
    assert maj_at_k(answers_of(said), len(said), k) == pytest.approx(sum(draws) / len(draws))


@given(said, st.data())
def test_pass_at_k_is_its_mean_over_all_draws(said, data):
    k = data.draw(st.integers(1, len(said)))
    draws = [float(0 in drawn) for drawn in itertools.combinations(said, k)]
    assert pass_at_k(len(said), said.count(0), k) == pytest.approx(sum(draws) / len(draws))


@given(said)
def test_with_one_attempt_all_measures_are_the_mean(said):
    n, c = len(said), said.count(0)
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)
    assert maj_at_k(answers_of(said), n, 1) == pytest.approx(c / n)


@given(said)
def test_pass_at_k_grows_with_k_and_is_above_maj_at_k(said):
    n, c = len(said), said.count(0)
    passed = [pass_at_k(n, c, k) for k in range(1, n + 1)]
    assert passed == sorted(passed) and passed[-1] == float(c > 0)
    voted = [maj_at_k(answers_of(said), n, k) for k in range(1, n + 1)]
    assert all(v <= p + 1e-12 for v, p in zip(voted, passed, strict=True))


def test_exact_values():
    assert pass_at_k(4, 1, 2) == 0.5
    assert pass_at_k(5, 2, 3) == 1 - 1 / 10
    # three right, two wrong that agree: of the ten pairs 3 are both right, 6 tie, 1 is both wrong
    assert maj_at_k([(3, 1.0), (2, 0.0)], 5, 2) == pytest.approx((3 + 6 / 2) / 10)
    # of all five, the right answer has most
    assert maj_at_k([(3, 1.0), (2, 0.0)], 5, 5) == 1.0
    # two right, two attempts without an answer, three that disagree: the right answer is the only one with two votes
    assert maj_at_k([(2, 1.0), (1, 0.0), (1, 0.0), (1, 0.0)], 7, 7) == 1.0
    # an answer that the checker finds right once of two counts half
    assert maj_at_k([(2, 0.5)], 2, 2) == 0.5
    assert maj_at_k([], 3, 2) == 0.0


def test_many_attempts_stay_exact():
    assert maj_at_k([(200, 1.0), (56, 0.0)], 256, 256) == 1.0
    assert maj_at_k([(128, 1.0), (128, 0.0)], 256, 63) == pytest.approx(0.5)


def counted(right, wrong, n, k):
    """maj@k of two answers, by counting draws in whole numbers."""
    found = Fraction(0)
    for ours, theirs in itertools.product(range(1, right + 1), range(wrong + 1)):
        if theirs <= ours and ours + theirs <= k:
            draws = math.comb(right, ours) * math.comb(wrong, theirs) * math.comb(n - right - wrong, k - ours - theirs)
            found += draws * (Fraction(1, 2) if ours == theirs else 1)
    return float(found / math.comb(n, k))


@pytest.mark.parametrize(
    ("right", "wrong", "n", "k"), [(60, 50, 2200, 1100), (100, 5000, 5100, 400), (40, 45, 3000, 2999), (7, 5, 20, 11)]
)
def test_more_draws_than_a_float_can_count_are_no_limit(right, wrong, n, k):
    assert maj_at_k([(right, 1.0), (wrong, 0.0)], n, k) == pytest.approx(counted(right, wrong, n, k), abs=1e-11)


@pytest.mark.parametrize("n", [5, 64, 1100])
def test_equal_chances_are_equal_to_the_last_bit(n):
    """A majority that is right whenever one is drawn: `estimate` asks whether all problems have the same value."""
    assert maj_at_k([(n - 2, 1.0)], n, 3) == maj_at_k([(n - 3, 1.0), (1, 1.0)], n, 3) == 1.0


@pytest.mark.parametrize("k", [0, 4])
def test_more_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=f"k={k} of n=3 attempts: k is 1 to n"):
        pass_at_k(3, 1, k)
    with pytest.raises(ValueError, match="k is 1 to n"):
        maj_at_k([(1, 1.0)], 3, k)


def test_more_votes_than_attempts_are_refused():
    with pytest.raises(ValueError, match="more votes than the 1 attempts"):
        Attempts((1.0,), ((2, 1.0),))


def test_the_sizes_reported():
    assert [sizes(n) for n in (1, 2, 3, 8, 12)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12]]


def test_a_problem_counts_as_far_as_its_attempts_go():
    """One lost an attempt, one lost all: neither is filled with zeros."""
    problems = {
        0: Attempts((1.0, 0.0), ((1, 1.0), (1, 0.0))),
        1: Attempts((1.0,), ((1, 1.0),)),
        2: Attempts((), ()),
    }
    found = by_problem(problems, 2)
    assert found == {
        "mean@2": {0: 0.5, 1: 1.0},
        "pass@1": {0: 0.5, 1: 1.0},
        "maj@1": {0: 0.5, 1: 1.0},
        "pass@2": {0: 1.0},
        "maj@2": {0: 0.5},
    }


# -- intervals --------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30))
def test_an_interval_has_the_value_in_it_and_stays_a_share(values):
    found = estimate(values)
    assert -1e-9 <= found.low <= found.value + 1e-9 and found.value - 1e-9 <= found.high <= 1 + 1e-9
    assert found.value == pytest.approx(sum(values) / len(values)) and found.problems == len(values)


def test_problems_that_are_all_solved_leave_a_doubt():
    """The bootstrap would say [1, 1] of them."""
    assert estimate([1.0] * 30).low == pytest.approx(30 / (30 + 1.959964**2))
    assert estimate([0.0] * 30).high == pytest.approx(1.959964**2 / (30 + 1.959964**2))
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_one_problem_has_no_interval():
    found = estimate([0.25])
    assert (found.value, found.low, found.high, found.problems) == (0.25, None, None, 1)
    with pytest.raises(ValueError, match="no problem"):
        estimate([])


def test_a_difference_is_paired_by_problem():
    """Problem 3 is in one of them only; the spread of the problems themselves does not widen the interval."""
    theirs = {0: 0.0, 1: 0.5, 2: 1.0}
    found = difference({0: 0.1, 1: 0.5, 2: 1.0, 3: 1.0}, theirs)
    assert found.value == pytest.approx(0.1 / 3) and found.problems == 3
    assert 0.0 <= found.low <= found.high <= 0.1 + 1e-9
    same = difference(theirs, theirs)
    assert (same.value, same.low, same.high) == (0.0, None, None)
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_the_bootstrap_is_the_same_every_time():
    values = [math.sin(i) ** 2 for i in range(20)]
    assert estimate(values) == estimate(values)
