"""Credit for failed trajectories: who gets it, from whom, how much, and what the backend is asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipe.gtpo.method.options import SimilarityOptions
from recipe.gtpo.method.shaping import shape_outcomes
from recipe.gtpo.method.similarity import TokenJaccard

pytestmark = pytest.mark.unit


class Table:
    """A similarity that is looked up, and remembers what it was asked."""

    def __init__(self, **pairs: float) -> None:
        self.pairs, self.asked = pairs, []

    def compare(self, groups):
        self.asked.extend(groups)
        return [np.array([[self.pairs[x + y] for y in b] for x in a]) for a, b in groups]


def shape(outcomes, codes, groups, similarity, alpha=0.5):
    outcomes = torch.tensor(outcomes)
    return shape_outcomes(outcomes, outcomes >= 1, codes, groups, similarity, alpha).outcomes.tolist()


def test_the_mean_over_the_successes_times_alpha():
    similarity = Table(cA=0.8, cB=0.4)
    assert shape([1.0, 0.0, 1.0], ["A", "c", "B"], "ggg", similarity) == pytest.approx([1.0, 0.5 * 0.6, 1.0])
    assert similarity.asked == [(["c"], ["A", "B"])]


def test_a_success_without_code_counts_in_p_with_similarity_0():
    assert shape([1.0, 0.0, 1.0, 1.0], ["A", "c", "", " \n"], "gggg", Table(cA=0.9))[1] == pytest.approx(0.5 * 0.9 / 3)


def test_only_groups_with_both_kinds_of_code_are_asked_about():
    similarity = Table(xX=0.5)
    outcomes = [0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    codes = ["a", "b", "c", "d", "", "e", "f", "", "x", "X"]
    # u: nobody solved it. s: everybody did. e: the failure ran nothing. n: the success ran nothing.
    shaped = shape(outcomes, codes, "uusseenngg", similarity)
    assert similarity.asked == [(["x"], ["X"])]
    assert shaped == [0, 0, 1, 1, 0, 1, 0, 1, 0.25, 1]
    shape([0.0, 0.0], ["a", "b"], "uu", (untouched := Table()))
    assert untouched.asked == []


def test_opposite_is_no_worse_than_unrelated():
    assert shape([1.0, 0.0, 1.0], ["A", "c", "B"], "ggg", Table(cA=-0.7, cB=0.4))[1] == pytest.approx(0.5 * 0.2)


def test_a_perfect_copy_earns_alpha_and_never_more():
    copies = ["print(1)"] * 4
    shaped = shape([1.0, 0.0, 1.0, 0.0], copies, "gggg", TokenJaccard(SimilarityOptions()), alpha=0.99)
    assert shaped == pytest.approx([1.0, 0.99, 1.0, 0.99])
    assert shape([1.0, 0.0], ["A", "c"], "gg", Table(cA=1.0000004))[1] == 0.5  # a float32 cosine of equal vectors


def test_a_success_that_is_paid_less_bounds_what_closeness_pays():
    """Right and long, at 0.3: a wrong copy of it used to get 0.5."""
    solved, same = torch.tensor([True, False, True]), Table(cA=1.0, cB=1.0)
    for outcomes, expected in (([0.3, 0.0, 0.9], 0.15), ([3.0, 0.0, 1.0], 0.5), ([0.3, 0.2, 0.3], 0.2)):
        shaped = shape_outcomes(torch.tensor(outcomes), solved, ["A", "c", "B"], "ggg", same, 0.5).outcomes.tolist()
        assert shaped == pytest.approx([outcomes[0], expected, outcomes[2]])


@given(
    st.lists(st.floats(-3, 3), min_size=1, max_size=4),
    st.floats(-3, 3),
    st.lists(st.floats(0, 1), min_size=4, max_size=4),
    st.floats(0, 0.99),
)
def test_whatever_a_reward_function_pays_a_failure_gets_at_most_alpha_and_less_than_every_success(
    paid, own, close, alpha
):
    names = "ABCD"[: len(paid)]
    outcomes, solved = torch.tensor([own, *paid]), torch.tensor([False, *[True] * len(paid)])
    similarity = Table(**{f"c{name}": value for name, value in zip(names, close, strict=False)})
    shaped = shape_outcomes(outcomes, solved, ["c", *names], "g" * (1 + len(paid)), similarity, alpha).outcomes
    assert shaped[1:].equal(outcomes[1:])
    assert outcomes[0] <= shaped[0] <= outcomes[0] + alpha + 1e-5
    assert shaped[0] < min(paid) + 1e-6 or shaped[0] == outcomes[0]  # one that was paid more than a success keeps it


def test_a_failure_below_0_starts_from_its_own_outcome():
    """Code that is like nobody's used to be lifted from -1 to 0, and a copy of a success at -0.2 above it."""
    solved, codes = torch.tensor([True, False]), ["A", "c"]
    for paid, own, close, expected in (
        (1.0, -1.0, 0.0, -1.0),
        (1.0, -1.0, 0.6, -0.7),
        (1.0, -1.0, 1.0, -0.5),
        (-0.2, -1.2, 1.0, -0.7),
        (-0.2, -0.6, 1.0, -0.4),
        (-1.0, -0.6, 1.0, -0.6),
        (0.0, 0.0, 1.0, 0.0),
    ):
        shaped = shape_outcomes(torch.tensor([paid, own]), solved, codes, "gg", Table(cA=close), 0.5).outcomes.tolist()
        assert shaped == pytest.approx([paid, expected])


@pytest.mark.parametrize("answer", [np.array([[np.nan]]), np.array([[1.5]]), np.zeros((1, 2)), np.zeros(1)])
def test_an_impossible_answer_raises(answer):
    class Broken:
        def compare(self, groups):
            return [answer]

    with pytest.raises(ValueError, match="similarity backend"):
        shape([1.0, 0.0], ["A", "c"], "gg", Broken())


def test_a_failing_backend_raises():
    class Down:
        def compare(self, groups):
            raise ConnectionError("no server")

    with pytest.raises(ConnectionError):
        shape([1.0, 0.0], ["A", "c"], "gg", Down())
    assert shape([1.0, 0.0], ["A", "c"], "gg", Down(), alpha=0.0) == [1.0, 0.0]  # nothing to ask


def test_what_cannot_be_shaped_is_refused():
    with pytest.raises(ValueError, match=r"alpha=1.0 must be in \[0, 1\)"):
        shape([1.0], ["A"], "g", Table(), alpha=1.0)
    with pytest.raises(ValueError, match="2 outcomes, 1 codes and 2 group ids"):
        shape([1.0, 0.0], ["A"], "gg", Table())


def test_closeness_never_lowers_an_outcome_of_its_own():
    """A reward function may give a failed trajectory a part of the outcome."""
    table = Table(cA=0.8, dA=0.2)
    assert shape([1.0, 0.25, 0.25], ["A", "c", "d"], "ggg", table) == pytest.approx([1.0, 0.4, 0.25])
    assert shape([2.0, -1.0], ["A", ""], "gg", table) == [2.0, -1.0]


programs = st.sampled_from(["", "a = 1", "a = 2\nprint(a)", "import math", "print(math.pi)", "x"])
rows = st.lists(st.tuples(st.sampled_from((0.0, 1.0)), programs, st.sampled_from("gh")), min_size=1, max_size=10)


@given(rows, st.floats(0, 0.99), st.randoms(use_true_random=False))
def test_order_does_not_matter_and_closeness_never_pays_as_much_as_success(batch, alpha, random):
    jaccard = TokenJaccard(SimilarityOptions())
    outcomes, codes, groups = (list(column) for column in zip(*batch, strict=True))
    shaped = shape(outcomes, codes, groups, jaccard, alpha)
    assert all(s == 1 if o else 0 <= s <= alpha + 1e-7 for o, s in zip(outcomes, shaped, strict=True))
    order = random.sample(range(len(batch)), len(batch))
    permuted = shape(*([column[i] for i in order] for column in (outcomes, codes, groups)), jaccard, alpha)
    assert permuted == pytest.approx([shaped[i] for i in order])
