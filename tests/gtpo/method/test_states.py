"""Laws of credit by state, on a tree whose every group is enumerated, and on ragged batches."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trees import PARAMETERS, TREE, Groups, exact_gradient, trajectories, value, worth

from recipe.gtpo.method.advantage import compare_turns, discounted_returns
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.method.states import bootstrap_returns, state_values

pytestmark = pytest.mark.unit

groups = functools.cache(Groups.all)


def test_the_tree_is_what_it_says():
    assert len(trajectories()) == 12 and value("x") == pytest.approx(0.2 + 0.5 * 0.7)
    assert value("root") == pytest.approx(0.5 * 0.55 + 0.3 * (-0.1 + 0.6 * 0.2 + 0.4 * 0.7) + 0.2 * 0.3)
    assert worth("root", "malformed") == pytest.approx(-0.1 + 0.6 * 0.2 + 0.4 * 0.7)
    assert groups(3).weight.sum() == pytest.approx(1.0)
    exact = dict(zip(PARAMETERS, exact_gradient().tolist(), strict=True))
    # by the policy-gradient theorem: P(at the node) * P(action) * (Q - V)
    assert exact["x", "call"] == pytest.approx(0.5 * 0.5 * (0.7 - value("x")))
    assert exact["late", "answer"] == pytest.approx((0.5 * 0.5 + 0.3 * 0.4) * 0.7 * (1 - 0.7))


UNBIASED = [
    *(
        {"baseline": "state", "state_prior": p, "lone_state": lone}
        for p in (0.0, 1.0, 3.0)
        for lone in ("parent", "lone")
    ),
    {"baseline": "group"},
]


@pytest.mark.parametrize("bootstrap", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("options", UNBIASED, ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_advantage_times_score_is_the_policy_gradient_in_expectation(size, options, bootstrap):
    _, compared = groups(size).compare(bootstrap=bootstrap, **options)
    mean, _ = groups(size).mean_and_variance(groups(size).gradients(compared.advantage))
    torch.testing.assert_close(mean, exact_gradient(), atol=1e-6, rtol=0)


def test_with_its_own_return_in_the_mean_it_is_not():
    _, compared = groups(3).compare(baseline="state", leave_one_out=False)
    mean, _ = groups(3).mean_and_variance(groups(3).gradients(compared.advantage))
    assert (mean - exact_gradient()).abs().max() > 0.01


@pytest.mark.parametrize("bootstrap", [0.5, 1.0])
@pytest.mark.parametrize("size", [2, 3])
def test_a_target_has_the_expectation_of_its_action_and_no_more_variance_than_the_return(size, bootstrap):
    """In row 0, for every action of the tree: E[T | state, action] = Q, Var[T] <= Var[R], less where siblings meet."""
    everything = groups(size)
    returns, _ = everything.compare()
    targets, _ = everything.compare(bootstrap=bootstrap)
    first = [group[0] for group in everything.members]
    for node, row in TREE.items():
        for action, (_, then) in row.items():
            at = [(n, steps.index((node, action))) for n, steps in enumerate(first) if (node, action) in steps]
            rows, turns = (torch.tensor(x) for x in zip(*at, strict=True))
            weight = everything.weight[rows] / everything.weight[rows].sum()

            def moments(values, rows=rows, turns=turns, weight=weight):
                taken = values[rows * size, turns].double()
                mean = (weight * taken).sum()
                return float(mean), float((weight * (taken - mean).square()).sum())

            (mean, variance), (_, sampled) = moments(targets), moments(returns)
            assert mean == pytest.approx(worth(node, action), abs=1e-6)
            assert variance < sampled - 1e-4 if then else variance == pytest.approx(sampled, abs=1e-9)


@pytest.mark.parametrize("size", [2, 3])
def test_the_gradient_varies_less_the_more_of_a_return_is_the_states_mean(size):
    """Whatever the baseline. Of the baselines no such law holds: the mean of fewer siblings is a noisier one."""

    def variance(**options) -> float:
        _, compared = groups(size).compare(**options)
        return float(groups(size).mean_and_variance(groups(size).gradients(compared.advantage))[1].sum())

    for baseline in ("group", "state"):
        sampled, half, whole = (variance(baseline=baseline, bootstrap=b) for b in (0.0, 0.5, 1.0))
        assert whole < half < sampled


def test_where_the_answer_of_a_tool_tells_the_call_a_target_moves_no_gradient():
    """All who are in a state did the same to get there, so one score weighs their returns and their mean alike: of a
    group in which nobody words a call otherwise the gradient is that of the sampled returns, whatever the baseline."""
    one_wording = [
        i for i, group in enumerate(groups(3).members) if not any(("root", "reworded") in steps for steps in group)
    ]
    assert len(one_wording) == 8**3
    for baseline in ("group", "state"):
        sampled, target = (
            groups(3).gradients(groups(3).compare(baseline=baseline, bootstrap=b)[1].advantage) for b in (0.0, 1.0)
        )
        torch.testing.assert_close(target[one_wording], sampled[one_wording], atol=1e-6, rtol=0)
        assert (target - sampled).abs().max() > 0.01


def test_where_the_models_own_words_matter_later_a_target_is_biased_towards_the_states_mean():
    """Two wordings of a call, equally often, which the tool answers alike; who said the first is right afterwards in
    0.9, who said the other in 0.1. Of two siblings a target is half the own return and half the other's."""
    right = {"one": 0.9, "other": 0.1}
    expected = {word: dict.fromkeys((0.0, 0.5, 1.0), 0.0) for word in right}
    for words in itertools.product(right, repeat=2):
        for outcomes in itertools.product((0.0, 1.0), repeat=2):
            rewards = torch.tensor([[0.0, outcome] for outcome in outcomes])
            returns, states = discounted_returns(rewards, torch.ones(2, 2).bool(), 1.0), torch.tensor([[0, 1]] * 2)
            weight = 0.5  # of the other's wording; the own one is given
            for word, outcome in zip(words, outcomes, strict=True):
                weight *= right[word] if outcome else 1 - right[word]
            for b, sum_of in expected[words[0]].items():
                targets = bootstrap_returns(returns, states >= 0, states, gamma=1.0, bootstrap=b)
                expected[words[0]][b] = sum_of + weight * float(targets[0, 0])
    assert list(expected["one"].values()) == pytest.approx([0.9, 0.8, 0.7])
    assert list(expected["other"].values()) == pytest.approx([0.1, 0.2, 0.3])


# -- on ragged batches -------------------------------------------------------------------------------------------------


@st.composite
def batches(draw):
    """(rewards, mask, prompts, states): rows of one to four turns; what the tools say is 0 or 1."""
    rows = draw(
        st.lists(
            st.tuples(
                st.sampled_from("ab"),
                st.lists(st.tuples(st.sampled_from((0.0, -0.1, 0.4, 1.0)), st.booleans()), min_size=0, max_size=4),
            ),
            min_size=1,
            max_size=9,
        )
    )
    turns = max(1, max(len(row) for _, row in rows))
    rewards, states = torch.zeros(len(rows), turns), torch.full((len(rows), turns), -1)
    known: dict[tuple, int] = {}
    for i, (prompt, row) in enumerate(rows):
        for k, (reward, _) in enumerate(row):
            rewards[i, k] = reward
            states[i, k] = known.setdefault((prompt, *(said for _, said in row[:k])), len(known))
    return rewards, states >= 0, [prompt for prompt, _ in rows], states


@given(batches(), st.sampled_from((0.0, 0.5, 0.9, 1.0)), st.sampled_from((0.3, 1.0)))
def test_over_the_rows_in_a_state_targets_add_up_to_returns(batch, gamma, bootstrap):
    rewards, mask, _, states = batch
    returns = discounted_returns(rewards, mask, gamma)
    targets = bootstrap_returns(returns, mask, states, gamma=gamma, bootstrap=bootstrap)
    for state in states[mask].unique():
        there = states == state
        assert targets[there].sum() == pytest.approx(float(returns[there].sum()), abs=1e-5)


@given(batches(), st.sampled_from((0.5, 1.0)))
def test_where_no_state_recurs_the_target_is_the_sampled_return_exactly(batch, bootstrap):
    rewards, mask, prompts, _ = batch
    options = {"gamma": 0.9, "scale": "none"}
    lonely = torch.arange(mask.numel()).view(mask.shape)  # but for the first turns, which no turn leads to
    sampled, plain = compare_turns(rewards, mask, prompts, GTPOOptions(**options), None)
    target, compared = compare_turns(
        rewards, mask, prompts, GTPOOptions(**options, bootstrap=bootstrap), None, states=lonely
    )
    assert torch.equal(sampled, target) and torch.equal(plain.advantage, compared.advantage)


@given(batches(), st.sampled_from(("parent", "lone")), st.data())
def test_what_a_row_is_compared_with_holds_nothing_of_the_row(batch, lone, data):
    rewards, mask, _, states = batch
    row = data.draw(st.integers(0, len(rewards) - 1))
    options = {"leave_one_out": True, "prior": 1.0, "lone_state": lone}
    before, _ = state_values(rewards, mask, states, **options)
    changed = rewards.clone()
    changed[row] += 5 * mask[row]
    after, _ = state_values(changed, mask, states, **options)
    torch.testing.assert_close(after[row], before[row], atol=1e-12, rtol=0)


def test_values_by_hand():
    """Prompt of four: three hear "1" and get 1, 0, 1 from there on; one hears "2", two turns long, and gets 0."""
    rewards = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]]).bool()
    states = torch.tensor([[0, 1, -1], [0, 1, -1], [0, 1, -1], [0, 2, 3]])
    returns = discounted_returns(rewards, mask, 1.0)
    values, counts = state_values(returns, mask, states, leave_one_out=True, prior=1.0)
    # turn 0: the others' mean. Turn 1 of row 0: (0 + 1 + 1/3) / (2 + 1). Row 3 is alone: what the prompt is worth.
    expected = [[1 / 3, 4 / 9, 0], [2 / 3, (2 + 2 / 3) / 3, 0], [1 / 3, 4 / 9, 0], [2 / 3, 2 / 3, 2 / 3]]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))
    assert counts.tolist() == [[3, 2, 0], [3, 2, 0], [3, 2, 0], [3, 0, 0]]
    targets = bootstrap_returns(returns, mask, states, gamma=1.0, bootstrap=1.0)
    # the call is worth what those who heard "1" got, right or wrong afterwards
    assert targets.tolist() == [[2 / 3, 1, 0], [2 / 3, 0, 0], [2 / 3, 1, 0], [0, 0, 0]]


def test_strays_are_compared_with_strays():
    """Two rows went astray, each on its own: what follows a wrong call is not charged for it."""
    rewards = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    mask = torch.ones(4, 2, dtype=torch.bool)
    states = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 3]])
    common = {"gamma": 1.0, "scale": "none", "leave_one_out": True, "baseline": "state", "bootstrap": 1.0}
    advantage = {
        lone: compare_turns(rewards, mask, ["a"] * 4, GTPOOptions(**common, lone_state=lone), None, states)[1].advantage
        for lone in ("parent", "lone")
    }
    torch.testing.assert_close(advantage["parent"][2], torch.tensor([-2 / 3, -2 / 3]))
    torch.testing.assert_close(advantage["lone"][2], torch.tensor([-2 / 3, 0.0]))
    torch.testing.assert_close(advantage["lone"][:2], advantage["parent"][:2])


@pytest.mark.parametrize(("baseline", "bootstrap"), itertools.product(("group", "state"), (0.0, 1.0)))
def test_a_group_of_equal_returns_is_silent(baseline, bootstrap):
    rewards = torch.tensor([[0.0, 0.7], [0.0, 0.7], [0.7, 0.0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0]]).bool()
    options = GTPOOptions(gamma=1.0, baseline=baseline, bootstrap=bootstrap)
    states = torch.tensor([[0, 1], [0, 1], [0, -1]])
    assert not compare_turns(rewards, mask, ["a"] * 3, options, None, states)[1].advantage.any()


@pytest.mark.parametrize("options", [{"baseline": "state"}, {"bootstrap": 0.5}])
def test_states_are_asked_for(options):
    with pytest.raises(ValueError, match="needs `states`"):
        compare_turns(torch.zeros(1, 1), torch.ones(1, 1).bool(), ["a"], GTPOOptions(**options), None)
