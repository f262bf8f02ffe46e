"""Every rival equals its source: verl's function on the same batch, else the paper's formula written out."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trajectories import trajectory, turn
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos

from recipe.gtpo.method import rivals
from recipe.gtpo.method.credit import Credit, assign_credit
from recipe.gtpo.method.estimators import ESTIMATORS, turn_values
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.method.tokens import at_turn_ends
from recipe.gtpo.method.turns import FormatReason

pytestmark = pytest.mark.unit

BAD = FormatReason.INVALID_JSON
OPTIONS = GTPOOptions.from_config({"shaping": {"enable": False}})


def credit_of(rows, **options) -> Credit:
    """`rows`: (group, acc, turns); a turn is (tokens, whether it breaks the format, what the tool said)."""
    trajectories = []
    for _, acc, turns in rows:
        made, at = [], 0
        for size, broken, said in turns:
            made.append(turn(at, at + size, "x" if said else "", broken=BAD if broken else None, said=said))
            at += size + 1  # one token of the tool's
        trajectories.append(trajectory(*made, acc=float(acc)))
    config = {"shaping": {"enable": False}, **options}
    return assign_credit(trajectories, [group for group, *_ in rows], GTPOOptions.from_config(config))


#: Two prompts, ragged; every group has two rewards at least.
ROWS = [
    ("p", 1, [(3, False, "7"), (2, False, "9"), (1, False, "")]),
    ("p", 0, [(2, True, ""), (4, False, "7"), (2, True, "")]),
    ("q", 1, [(1, False, "3"), (2, False, "")]),
    ("p", 1, [(3, False, "7"), (1, True, "9"), (2, False, "")]),
    ("q", 0, [(2, False, "3"), (3, False, "")]),
    ("p", 0, [(5, False, "8")]),
    ("q", 0, [(2, False, "4"), (1, True, "3"), (2, False, "5"), (1, False, "")]),
]
REWARDS = ("sum", "min", "outcome")


def verl_arguments(credit: Credit):
    """Token rewards, mask and prompts as verl's functions take them; every row ends in a token of nobody's."""
    lengths = [int(spans.max()) + 1 for spans in credit.spans]
    rewards = torch.nn.utils.rnn.pad_sequence(credit.token_rewards(lengths), batch_first=True)
    mask = (credit.turn_ids(rewards.shape[1]) >= 0).long()
    return rewards, mask, np.array(credit.group_ids, dtype=object)


def verls(name: str, credit: Credit, **extra) -> torch.Tensor:
    """(B, T) what verl's function says of each turn; within a turn it says one thing."""
    rewards, mask, index = verl_arguments(credit)
    advantages, _ = core_algos.get_adv_estimator_fn(name)(rewards, mask, index=index, **extra)
    for row, exists, spans in zip(advantages, credit.turn_mask, credit.spans, strict=True):
        for start, end in spans[exists].tolist():
            assert (row[start:end] == row[start]).all()
    return at_turn_ends(advantages, credit.turn_mask, credit.spans)


def ours(name: str, credit: Credit, **more) -> torch.Tensor:
    return turn_values(name, credit, OPTIONS, **more)[1]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.any()


# -- those that verl has ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("divide", [True, False])
def test_grpo_and_dr_grpo_are_verls(reward, divide):
    credit = credit_of(ROWS, trajectory_reward=reward)
    close(ours("grpo", credit, divide=divide), verls("grpo", credit, norm_adv_by_std_in_grpo=divide))


@pytest.mark.parametrize("reward", REWARDS)
def test_rloo_is_verls(reward):
    credit = credit_of(ROWS, trajectory_reward=reward)
    close(ours("rloo", credit), verls("rloo", credit))


@pytest.mark.parametrize("reward", REWARDS)
def test_reinforce_plus_plus_is_verls(reward):
    """Also on a sum, where the return differs by turn, and with turns of unequal lengths."""
    credit = credit_of(ROWS, trajectory_reward=reward)
    close(ours("reinforce_plus_plus", credit), verls("reinforce_plus_plus", credit, config=AlgoConfig(gamma=1.0)))


def test_gdpo_is_verls():
    credit = credit_of(ROWS)
    _, mask, _ = verl_arguments(credit)
    expected = verls(
        "gdpo",
        credit,
        config={"gdpo_reward_keys": ["right", "format"]},
        non_tensor_batch={
            "right": np.array([row[1] for row in ROWS]),
            "format": np.array([not any(broken for _, broken, _ in row[2]) for row in ROWS]),
        },
        batch={"prompts": torch.zeros(len(ROWS), 3), "attention_mask": torch.ones(len(ROWS), 3 + mask.shape[1]).long()},
    )
    close(ours("recorded_gdpo", credit), expected)


groups_of_eight = st.lists(
    st.tuples(
        st.sampled_from("pq"),
        st.integers(0, 1),
        st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.sampled_from(("", "1"))), min_size=1, max_size=4),
    ),
    min_size=8,
    max_size=8,
)


@given(groups_of_eight, st.sampled_from(("grpo", "rloo", "reinforce_plus_plus")), st.sampled_from(REWARDS))
def test_they_are_verls_wherever_rewards_differ(rows, name, reward):
    credit = credit_of(rows, trajectory_reward=reward)
    rewards, mask, index = verl_arguments(credit)
    extra = {"config": AlgoConfig(gamma=1.0)} if name == "reinforce_plus_plus" else {}
    expected = at_turn_ends(
        core_algos.get_adv_estimator_fn(name)(rewards, mask, index=index, **extra)[0], credit.turn_mask, credit.spans
    )
    totals = credit.trajectory_rewards
    found = ours(name, credit)
    if name == "reinforce_plus_plus":
        same = bool((credit.rewards.combined == 0).all()) or float(expected.abs().max()) < 1e-2
        torch.testing.assert_close(found, torch.zeros_like(found) if same else expected, atol=1e-4, rtol=1e-4)
        return
    for group in set(index):
        members = torch.tensor([label == group for label in index])
        if len(totals[members].unique()) > 1:
            torch.testing.assert_close(found[members], expected[members], atol=1e-4, rtol=1e-4)
        else:
            assert not found[members].any()  # where verl leaves a lone row's score, or noise


@pytest.mark.parametrize("penalties", range(8))
def test_verls_grpo_is_silent_in_a_group_of_zeros_or_of_ones_and_leaves_noise_in_one_of_equal_penalties(penalties):
    """A reward of 0 or 1 has no rounding; a sum of penalties has, and the division by 1e-6 shows it. Ours are 0."""
    turns = [(1, k < penalties, "") for k in range(8)]
    for size, acc in itertools.product((2, 4, 6, 8, 16), (0, 1)):
        rows = [("p", acc, turns)] * size
        for reward in ("min", "outcome"):
            assert not verls("grpo", credit_of(rows, trajectory_reward=reward)).any()
        summed = credit_of(rows, trajectory_reward="sum")
        assert verls("grpo", summed).abs().max() < 0.13 and not ours("grpo", summed).any()


# -- those that it has not --------------------------------------------------------------------------------------------


def z_scores(values: dict) -> dict:
    """key -> (x - mean) / (std + 1e-6); 0 where all are equal or there is one."""
    spread = statistics.stdev(values.values()) if len(values) > 1 else 0.0
    mean = statistics.fmean(values.values())
    return {key: (x - mean) / (spread + 1e-6) if spread > 1e-9 else 0.0 for key, x in values.items()}


def test_mt_grpo_is_the_papers_formula_with_two_turns():
    """A[i,1] = z(turn reward) + z(outcome reward), A[i,2] = z(outcome reward): arXiv 2505.11821."""
    turn_rewards = torch.tensor([[0.0, 1.0], [-0.1, 1.0], [0.0, 0.0], [0.0, -0.1]])
    first, second = z_scores(dict(enumerate([0.0, -0.1, 0.0, 0.0]))), z_scores(dict(enumerate([1.0, 1.0, 0.0, -0.1])))
    expected = torch.tensor([[first[i] + second[i], second[i]] for i in range(4)])
    close(rivals.mt_grpo(turn_rewards, torch.ones(4, 2, dtype=torch.bool), list("pppp")), expected)


def test_mt_grpo_of_ragged_rows_is_written_out():
    credit = credit_of(ROWS)
    rewards = {
        (i, k): -0.1 * broken + (acc if k == len(turns) - 1 else 0)
        for i, (_, acc, turns) in enumerate(ROWS)
        for k, (_, broken, _) in enumerate(turns)
    }
    last = {i: len(turns) - 1 for i, (_, _, turns) in enumerate(ROWS)}
    expected = torch.zeros(credit.turn_mask.shape)
    for group in "pq":
        rows = [i for i, row in enumerate(ROWS) if row[0] == group]
        outcome = z_scores({i: rewards[i, last[i]] for i in rows})
        for k in range(max(last.values()) + 1):
            turn_level = {i: rewards[i, k] for i in rows if k < last[i]}
            for i, z in (z_scores(turn_level) if turn_level else {}).items():
                expected[i, k] = z + outcome[i]
        for i in rows:
            expected[i, last[i]] = outcome[i]
    close(ours("mt_grpo", credit), expected)


@pytest.mark.parametrize("scale", ["std", "none"])
def test_gigpo_is_the_papers_formula(scale):
    """A = (R - mean)/F over episodes + (R[t] - mean)/F over the steps of a state: arXiv 2505.10978, (3) to (8)."""
    gamma = 0.5
    credit = credit_of(ROWS, trajectory_reward="outcome")

    def centred(values: dict) -> dict:
        if scale == "std":
            return z_scores(values)
        mean = statistics.fmean(values.values())
        return {key: x - mean for key, x in values.items()}

    expected = torch.zeros(credit.turn_mask.shape)
    anchors: dict = defaultdict(dict)
    for i, (group, acc, turns) in enumerate(ROWS):
        said: tuple = ()
        for k, (_, _, output) in enumerate(turns):
            anchors[group, said][i, k] = acc * gamma ** (len(turns) - 1 - k)
            said += (output,)
    assert sorted(map(len, anchors.values()))[-2:] == [3, 4]  # the two prompts; and states that recur behind them
    assert sum(len(steps) > 1 for steps in anchors.values()) == 5
    for steps in anchors.values():
        for (i, k), advantage in centred(steps).items():
            expected[i, k] += advantage
    for group in "pq":
        episodes = centred({i: float(acc) for i, (label, acc, _) in enumerate(ROWS) if label == group})
        for i, advantage in episodes.items():
            expected[i] += advantage * credit.turn_mask[i]
    options = GTPOOptions.from_config({"gamma": gamma, "scale": scale})
    close(turn_values("gigpo", credit, options)[1], expected)


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
def test_nobody_learns_from_equal_rewards_or_from_a_lone_trajectory(name):
    equal = credit_of([("p", 1, [(3, False, "7"), (1, False, "")])] * 3, trajectory_reward="outcome", gamma=1.0)
    quiet = GTPOOptions.from_config({"gamma": 1.0})
    assert not turn_values(name, equal, quiet)[1].any()
    if name not in ("reinforce_plus_plus", "recorded_gdpo"):  # which compare the tokens of the whole batch
        lone = credit_of([("p", 1, [(3, False, "")]), ("q", 0, [(2, False, "")])], trajectory_reward="outcome")
        assert not turn_values(name, lone, quiet)[1].any()


@given(groups_of_eight, st.sampled_from(ESTIMATORS), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_and_the_names_of_the_prompts_change_nothing(rows, name, random):
    order = list(range(8))
    random.shuffle(order)
    before = ours(name, credit_of(rows))
    shuffled = ours(name, credit_of([({"p": "x", "q": "a"}[rows[i][0]], *rows[i][1:]) for i in order]))
    torch.testing.assert_close(shuffled, before[order], atol=1e-4, rtol=1e-4)
    assert torch.isfinite(before).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_rows_without_turns_take_part_in_nothing(name):
    with_padding = assign_credit(
        [None, *(t for t in [trajectory(turn(0, 2), acc=1.0), trajectory(turn(0, 1), acc=0.0)])],
        ["pad", "p", "p"],
        OPTIONS,
    )
    without = assign_credit([trajectory(turn(0, 2), acc=1.0), trajectory(turn(0, 1), acc=0.0)], ["p", "p"], OPTIONS)
    assert torch.equal(ours(name, with_padding)[1:], ours(name, without)) and not ours(name, with_padding)[0].any()
    assert ours(name, without).any()


OTHERS = [
    {"baseline": "turn"},
    {"baseline": "state"},
    {"bootstrap": 1.0},
    {"leave_one_out": True},
    {"unsolved_groups": "zero"},
    {"min_pool": 30},
    {"gamma": 0.5},
    {"scale": "none"},
]


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "gtpo"])
def test_of_the_options_that_make_no_reward_gigpo_reads_gamma_and_scale_and_the_others_none(name):
    unsolved = [("r", 0, [(2, True, "7"), (1, False, "")]), ("r", 0, [(1, False, "")])]
    credit = credit_of(ROWS + unsolved)
    plain = ours(name, credit)
    for option in OTHERS:
        read = name == "gigpo" and bool(option.keys() & {"gamma", "scale"})
        assert torch.equal(plain, turn_values(name, credit, GTPOOptions.from_config(option))[1]) != read, option
        assert not torch.equal(ours("gtpo", credit), turn_values("gtpo", credit, GTPOOptions.from_config(option))[1])


def test_an_unknown_estimator_is_told_the_known_ones():
    with pytest.raises(ValueError, match="unknown estimator 'gae'; estimators: gtpo, grpo"):
        turn_values("gae", credit_of(ROWS), OPTIONS)


# -- states -----------------------------------------------------------------------------------------------------------


def test_a_state_is_the_prompt_and_all_that_the_tools_have_said():
    states = credit_of(ROWS).states
    assert (states >= 0).tolist() == credit_of(ROWS).turn_mask.tolist()
    assert len({int(states[i, 0]) for i in (0, 1, 3, 5)}) == 1 and len({int(states[i, 0]) for i in (2, 4, 6)}) == 1
    assert states[0, 0] != states[2, 0]  # another prompt
    assert states[0, 1] == states[3, 1] and states[0, 2] == states[3, 2]  # "7", then "7", "9"
    assert states[1, 1] != states[0, 1] and states[1, 2] != states[0, 1]  # nothing; nothing, then "7"
    assert states[6, 2] not in (states[2, 1], states[6, 1])
