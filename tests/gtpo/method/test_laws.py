"""The ten laws of recipe/gtpo/README.md, in its order and by number. What they state holds for every batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from batches import make_batch, ragged_batches, ragged_rows, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from recipe.gtpo.estimator import compute_gtpo_advantage
from recipe.gtpo.method.advantage import discounted_returns, normalize_returns
from recipe.gtpo.method.tokens import scatter_to_tokens

pytestmark = pytest.mark.unit

OPTIONS = [
    {"baseline": baseline, "scale": scale, "leave_one_out": loo, "sparse_turn": sparse}
    for baseline, scale, loo, sparse in itertools.product(
        ("group", "turn", "batch"), ("std", "batch_std", "none"), (False, True), ("zero", "group")
    )
]
STATE_OPTIONS = [
    {"baseline": "state", "scale": scale, "leave_one_out": loo, "state_prior": prior, "lone_state": lone}
    for scale, loo, prior, lone in itertools.product(
        ("std", "batch_std", "none"), (False, True), (0.0, 1.0), ("parent", "lone")
    )
]
any_options = st.sampled_from(OPTIONS)


def gtpo(batch, **options):
    return compute_gtpo_advantage(*batch.args, config={"gtpo": options}, turn_ids=batch.turn_ids)


@pytest.mark.parametrize("size", range(2, 17))
def test_law_1_one_turn_without_discount_is_verls_grpo_bit_for_bit(size):
    generator = torch.Generator().manual_seed(size)
    for outcomes in (
        torch.rand(60, size, generator=generator),
        torch.randint(0, 2, (60, size), generator=generator).float(),
        torch.randn(60, size, generator=generator) * 100,
    ):
        differ = outcomes[(outcomes != outcomes[:, :1]).any(dim=1)]
        uids = [f"u{g}" for g in range(len(differ)) for _ in range(size)]
        rows = [(uid, [(2, 3, float(r))]) for uid, r in zip(uids, differ.flatten(), strict=True)]
        order = torch.randperm(len(rows), generator=generator).tolist()
        batch = make_batch([rows[i] for i in order], extra=2)
        ours, _ = gtpo(batch, gamma=1.0)
        verls, _ = compute_grpo_outcome_advantage(*batch.args)
        assert ours.any() and torch.equal(ours, verls)


def test_law_1_holds_for_ragged_groups_of_one_batch():
    generator = torch.Generator().manual_seed(0)
    rows = [(f"u{g}", [(0, 2, float(torch.rand((), generator=generator)))]) for g in range(2, 17) for _ in range(g)]
    batch = make_batch(rows)
    assert torch.equal(gtpo(batch, gamma=1.0)[0], compute_grpo_outcome_advantage(*batch.args)[0])


@given(ragged_batches(rewards=(0.0, 1.0, 0.3)))
def test_law_2_turn_baseline_without_discount_is_verls_grpo_at_turn_0(batch):
    last = torch.zeros_like(batch.rewards)
    last[:, -1] = batch.rewards.amax(dim=1)  # verl's place for an outcome
    batch.rewards = last
    ours, _ = gtpo(batch, gamma=1.0, baseline="turn")
    verls, _ = compute_grpo_outcome_advantage(*batch.args)
    for uid in set(batch.uids):
        rows = batch.uids == uid
        if last[rows].sum(dim=1).unique().numel() > 1:  # otherwise law 7
            first_turn = batch.turn_ids[rows] == 0
            assert torch.equal(ours[rows][first_turn], verls[rows][first_turn])


@given(ragged_batches(), any_options, st.randoms(use_true_random=False))
def test_law_3_permuting_rows_permutes_the_result(batch, options, random):
    order = random.sample(range(len(batch.mask)), len(batch.mask))
    for before, after in zip(gtpo(batch, **options), gtpo(batch.select(order), **options), strict=True):
        torch.testing.assert_close(after, before[order], rtol=1e-5, atol=1e-6)


@given(ragged_batches(), any_options)
def test_law_3_relabelling_uids_changes_nothing(batch, options):
    before = gtpo(batch, **options)
    batch.uids = np.array([{"a": 7, "b": -1, "c": 3, "d": 100, "pad": 5}[uid] for uid in batch.uids])
    for a, b in zip(before, gtpo(batch, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@given(ragged_batches(), any_options, st.sampled_from("abcd"))
def test_law_3_padding_rows_change_nothing_for_others(batch, options, uid):
    before = gtpo(batch, **options)
    padding = torch.zeros(2, batch.mask.shape[1])
    batch.rewards = torch.cat((batch.rewards, padding + 5.0))  # verl's padding rows are copies: rewards and all
    batch.mask = torch.cat((batch.mask, padding.long()))
    batch.turn_ids = torch.cat((batch.turn_ids, padding.long() - 1))
    batch.uids = np.append(batch.uids, [uid, "pad2"])
    for a, b in zip(before, gtpo(batch, **options), strict=True):
        assert torch.equal(a, b[:-2]) and not b[-2:].any()


@given(ragged_rows(), any_options, st.data())
def test_law_4_observation_tokens_between_turns_change_no_advantage(rows, options, data):
    longer = st.integers(0, 9)
    spread = [(uid, [(gap + data.draw(longer), size, r) for gap, size, r in turns]) for uid, turns in rows]
    near, far = make_batch(rows), make_batch(spread, extra=data.draw(longer))
    for a, b in zip(gtpo(near, **options), gtpo(far, **options), strict=True):
        assert torch.equal(a[near.mask != 0], b[far.mask != 0]) and not b[far.mask == 0].any()


@given(ragged_batches(), st.data())
def test_law_5_nothing_is_lost_wherever_the_reward_sits(batch, data):
    real = batch.mask.any(dim=1).nonzero().flatten().tolist()
    for i in real:  # anywhere: before the first turn, on tool output, on padding behind the last
        batch.rewards[i, data.draw(st.integers(0, batch.mask.shape[1] - 1))] += 0.5
    for turn_ids in (batch.turn_ids, None):  # recorded turns, and turns from the mask
        _, returns = compute_gtpo_advantage(*batch.args, config={"gtpo": {"gamma": 1.0}}, turn_ids=turn_ids)
        for i in real:  # without discount the return of the first turn is the sum of the row
            assert returns[i, batch.turn_ids[i] == 0][0] == pytest.approx(float(batch.rewards[i].sum()), abs=1e-6)


@given(ragged_batches())
def test_law_5_token_rewards_hold_every_turn_reward(batch):
    ids, length = batch.turn_ids, batch.mask.shape[1]
    turns = int(ids.max()) + 1
    exists = (
        torch.stack([(ids == k).any(dim=1) for k in range(turns)], dim=1) if turns else torch.zeros(len(ids), 0) > 0
    )
    position = torch.arange(length)
    last = [torch.where(ids == k, position, -1).amax(dim=1) + 1 for k in range(turns)]
    spans = torch.zeros(*exists.shape, 2, dtype=torch.long)
    if turns:
        spans[..., 1] = torch.stack(last, dim=1)
    values = torch.where(exists, torch.arange(1.0, turns + 1) / 10, 0.0)
    tokens = scatter_to_tokens(values, exists, spans, [length] * len(ids))
    assert [float(row.sum()) for row in tokens] == [pytest.approx(float(v.sum()), abs=1e-6) for v in values]
    assert [int((row != 0).sum()) for row in tokens] == exists.sum(dim=1).tolist()


@given(st.integers(1, 6), st.integers(0, 5), st.floats(0, 1), st.floats(-10, 10))
def test_law_6_a_reward_never_reaches_later_turns(turns, k, gamma, reward):
    k = min(k, turns - 1)
    rewards = torch.linspace(-1, 1, turns)[None]
    mask = torch.ones(1, turns, dtype=torch.bool)
    before = discounted_returns(rewards, mask, gamma)
    rewards[0, k] += reward
    after = discounted_returns(rewards, mask, gamma)
    assert torch.equal(before[:, k + 1 :], after[:, k + 1 :])
    expected = before[0, : k + 1].double() + torch.tensor([gamma ** (k - j) * reward for j in range(k + 1)])
    torch.testing.assert_close(after[0, : k + 1].double(), expected, rtol=1e-5, atol=1e-5)


@given(ragged_batches(rewards=(0.1,), max_turns=1), any_options)
def test_law_7_equal_returns_give_exactly_0(batch, options):
    advantages, returns = gtpo(batch, **options)
    assert not advantages.any()
    assert torch.equal(returns != 0, batch.mask != 0)


@given(st.lists(st.sampled_from((0.0, 1.0, 0.1)), min_size=1, max_size=5), any_options)
def test_law_7_one_member_pools_give_0(outcomes, options):
    batch = make_batch([(f"u{i}", [(0, 2, r)]) for i, r in enumerate(outcomes)])
    advantages, _ = gtpo(batch, **options)
    assert not advantages.any() or options["baseline"] == "batch"  # the batch is one pool


@given(ragged_batches(rewards=(0.0, 1.0, -0.1, 1e-30, 1e12, -1e12, 3e-7)), any_options, st.floats(0, 1))
def test_law_7_nothing_is_ever_nan_or_inf(batch, options, gamma):
    for result in gtpo(batch, gamma=gamma, **options):
        assert torch.isfinite(result).all() and not result[batch.mask == 0].any()


def test_law_8_a_trained_token_outside_the_recorded_turns_names_its_row():
    batch = make_batch([("a", [(0, 2, 1.0), (1, 2, 0.0)]), ("a", [(0, 2, 0.0), (1, 2, 1.0)])])
    batch.turn_ids[1, 3:] = -1  # the record holds one turn, the mask and the rewards hold two
    with pytest.raises(ValueError, match=r"row 1: response_mask trains on token 3"):
        gtpo(batch)


@pytest.mark.parametrize("ids", [[0, 0, -1, 2], [1, 1, -1, 2], [0, -1, 1, 0]])
def test_law_8_a_missing_turn_names_its_row(ids):
    batch = make_batch([("a", [(0, 2, 1.0), (1, 1, 0.0)])] * 2)
    batch.turn_ids[1] = torch.tensor(ids)
    with pytest.raises(ValueError, match=r"row 1: turn \d at token \d follows turn"):
        gtpo(batch)


def stop_or_continue(groups: int, size: int, horizon: int, reward_of_stopping: float, seed: int):
    """At each turn stop (earns `reward_of_stopping`, ends) or continue; who never stops earns 1. P(continue) = 1/2.

    Returns (rewards, turn_mask, score), each (rows, horizon): score = d log pi(action) / d theta, theta the logit.
    """
    go = torch.rand(groups * size, horizon, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = torch.cat((torch.ones(len(go), 1, dtype=torch.bool), go.cumprod(dim=1)[:, :-1].bool()), dim=1)
    rewards = torch.where(mask & ~go, reward_of_stopping, 0.0)
    rewards[:, -1] += (mask & go)[:, -1].float()
    return rewards, mask, torch.where(go, 0.5, -0.5) * mask


def test_law_9_leave_one_out_is_the_policy_gradient_and_centring_rewards_by_turn_is_not():
    groups, size, horizon, stop = 4000, 8, 3, 0.5
    analytic = 0.0  # sum over trajectories of P * reward * score, by enumeration: stop at turn j, or never
    for j in range(horizon):
        analytic += 0.5 ** (j + 1) * stop * (0.5 * j - 0.5)
    analytic += 0.5**horizon * 1.0 * 0.5 * horizon
    rewards, mask, score = stop_or_continue(groups, size, horizon, stop, seed=0)
    uids = torch.arange(groups).repeat_interleave(size)

    def estimate(advantages):
        by_group = (advantages * score).sum(dim=1).double().view(groups, size).mean(dim=1)
        return float(by_group.mean()), float(by_group.std() / groups**0.5)

    returns = discounted_returns(rewards, mask, gamma=1.0)
    for baseline in ("group", "batch"):
        mean, error = estimate(
            normalize_returns(returns, mask, uids, baseline=baseline, scale="none", leave_one_out=True)
        )
        assert abs(mean - analytic) < 3 * error and error < analytic / 10  # right, and not for lack of resolution

    # What looks alike and is wrong: subtract from each reward the mean of its turn index, then sum what is left. The
    # mean at a later turn is the survivors' own, so going on is worth nothing and stopping early looks good.
    at_turn = normalize_returns(rewards, mask, uids, baseline="turn", scale="none")
    mean, error = estimate(discounted_returns(at_turn, mask, gamma=1.0))
    assert analytic > 0 > mean + 3 * error


@settings(max_examples=200)
@given(
    ragged_batches(),
    st.sampled_from(OPTIONS + STATE_OPTIONS),
    st.sampled_from((0.0, 0.5, 0.9, 1.0)),
    st.integers(2, 4),
    st.booleans(),
    st.data(),
)
def test_law_10_equals_a_float64_loop(batch, options, gamma, min_pool, silence, data):
    options = {**options, "gamma": gamma, "min_pool": min_pool, "unsolved_groups": "zero" if silence else "keep"}
    options["bootstrap"] = data.draw(st.sampled_from((0.0, 0.4, 1.0)))
    solved = [data.draw(st.booleans()) for _ in batch.mask]
    heard = [[data.draw(st.booleans()) for _ in range(int(ids.max()) + 1)] for ids in batch.turn_ids]
    states = torch.full((len(heard), max(map(len, heard))), -1)
    known: dict[tuple, int] = {}
    for i, (uid, said) in enumerate(zip(batch.uids, heard, strict=True)):
        for k in range(len(said)):
            states[i, k] = known.setdefault((uid, *said[:k]), len(known))
    result = compute_gtpo_advantage(
        *batch.args, config={"gtpo": options}, turn_ids=batch.turn_ids, solved=torch.tensor(solved), states=states
    )
    for ours, loop in zip(result, reference(batch, **options, solved=solved, states=states.numpy()), strict=True):
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours.double().numpy(), loop, rtol=1e-5, atol=1e-5)
