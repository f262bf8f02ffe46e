"""The estimator beyond the laws: how turns get in, what is refused, and verl's own estimators as special cases."""

from __future__ import annotations

import logging

import pytest
import torch
from batches import make_batch, ragged_batches
from hypothesis import given
from omegaconf import OmegaConf
from verl.trainer.config import AlgoConfig
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo import core_algos

from recipe.gtpo import estimator
from recipe.gtpo.estimator import compute_gtpo_advantage, recorded_turns

pytestmark = pytest.mark.unit

# -- how turns get in -------------------------------------------------------------------------------------------------

BATCH = make_batch(
    [("a", [(1, 2, 0.0), (1, 1, 1.0)]), ("a", [(0, 3, -0.1), (2, 1, 0.0)]), ("b", [(0, 1, 0.0), (1, 2, 0.3)])], extra=1
)


def test_recorded_turns_reach_the_estimator_through_verls_registry():
    expected = compute_gtpo_advantage(*BATCH.args, turn_ids=BATCH.turn_ids)
    merged = BATCH.turn_ids.clamp_max(0)  # another division of the same tokens: one turn a row
    with recorded_turns(merged):
        inside = compute_gtpo_advantage(*BATCH.args)
        explicit = compute_gtpo_advantage(*BATCH.args, turn_ids=BATCH.turn_ids)
    assert not torch.equal(inside[0], expected[0]) and torch.equal(explicit[0], expected[0])
    assert torch.equal(inside[0], compute_gtpo_advantage(*BATCH.args, turn_ids=merged)[0])
    assert torch.equal(compute_gtpo_advantage(*BATCH.args)[0], expected[0])  # the record ends with the block


def test_recorded_turns_end_with_an_exception_too():
    with pytest.raises(KeyError), recorded_turns(BATCH.turn_ids.clamp_max(0)):
        raise KeyError
    assert estimator._RECORDED.get() is None


def test_recorded_outcomes_serve_unsolved_groups():
    config = {"gtpo": {"unsolved_groups": "zero"}}
    with recorded_turns(BATCH.turn_ids, solved=torch.tensor([False, False, True])):
        advantages, returns = compute_gtpo_advantage(*BATCH.args, config=config)
    assert not advantages[:2].any() and advantages[2].any() and returns[:2].any()


@given(ragged_batches())
def test_turns_from_the_mask_are_its_runs(batch):
    """Every turn of these batches is followed by a token that is not generated, so both ways see the same turns."""
    recorded = compute_gtpo_advantage(*batch.args, turn_ids=batch.turn_ids)
    for a, b in zip(recorded, compute_gtpo_advantage(*batch.args), strict=True):
        assert torch.equal(a, b)


def test_turns_from_the_mask_are_announced_once(caplog):
    estimator._say_turns_come_from_the_mask.cache_clear()
    with caplog.at_level(logging.WARNING):
        compute_gtpo_advantage(*BATCH.args)
        compute_gtpo_advantage(*BATCH.args)
    assert [r.message for r in caplog.records] == [
        "gtpo: no recorded turns: turns from the response mask, outcome on the last turn, no shaping"
    ]


def test_adjacent_recorded_turns_stay_two():
    batch = make_batch([("a", [(0, 2, 0.0), (0, 2, 1.0)]), ("a", [(0, 2, 0.0), (0, 2, 0.0)])])
    _, returns = compute_gtpo_advantage(*batch.args, turn_ids=batch.turn_ids)
    assert returns[0].tolist() == pytest.approx([0.9, 0.9, 1.0, 1.0])


def test_tokens_rejected_by_rollout_correction_get_0_and_change_nothing_else():
    before = compute_gtpo_advantage(*BATCH.args, turn_ids=BATCH.turn_ids)
    rejected = BATCH.mask.clone()
    rejected[0, 2] = 0  # a token inside turn 0
    rejected[1, :] = 0  # a whole sequence
    after = compute_gtpo_advantage(BATCH.rewards, rejected, BATCH.uids, turn_ids=BATCH.turn_ids)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a * rejected, b)


@pytest.mark.parametrize("width", [-1, 3])
def test_turn_ids_may_be_narrower_or_wider_when_no_turn_is_cut(width):
    narrow = BATCH.turn_ids[:, :-1]  # the last column is padding
    ids = narrow if width < 0 else torch.nn.functional.pad(BATCH.turn_ids, (0, width), value=-1)
    expected = compute_gtpo_advantage(*BATCH.args, turn_ids=BATCH.turn_ids)
    assert torch.equal(compute_gtpo_advantage(*BATCH.args, turn_ids=ids)[0], expected[0])


def test_turn_ids_that_would_be_cut_are_refused():
    wide = torch.nn.functional.pad(BATCH.turn_ids, (0, 2), value=-1)
    wide[1, -1] = 1
    with pytest.raises(ValueError, match="row 1: a recorded turn goes on after the response's 7 tokens"):
        compute_gtpo_advantage(*BATCH.args, turn_ids=wide)
    with pytest.raises(ValueError, match="row 0: response_mask trains on token 4"):
        compute_gtpo_advantage(*BATCH.args, turn_ids=BATCH.turn_ids[:, :4])
    with pytest.raises(ValueError, match=r"turn ids of shape \(2, 7\) for a batch of shape \(3, 7\)"):
        compute_gtpo_advantage(*BATCH.args, turn_ids=BATCH.turn_ids[:2])


def test_a_reward_that_is_no_number_names_its_row():
    rewards = BATCH.rewards.clone()
    rewards[1, 0] = float("nan")
    with pytest.raises(ValueError, match="row 1: a token-level reward is NaN"):
        compute_gtpo_advantage(rewards, BATCH.mask, BATCH.uids, turn_ids=BATCH.turn_ids)


def test_group_ids_must_match_the_rows():
    with pytest.raises(ValueError, match="2 group ids for 3 rows"):
        compute_gtpo_advantage(BATCH.rewards, BATCH.mask, BATCH.uids[:2], turn_ids=BATCH.turn_ids)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64, torch.bool], ids=str)
def test_the_type_of_rewards_and_mask_changes_nothing(kind):
    rewards = (BATCH.rewards > 0).float()
    expected = compute_gtpo_advantage(rewards, BATCH.mask, BATCH.uids)
    for r, mask in ((rewards.to(kind), BATCH.mask), (rewards, BATCH.mask.to(kind))):
        found = compute_gtpo_advantage(r, mask, BATCH.uids)
        assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(expected, found, strict=True))


def test_group_ids_that_are_tuples_or_of_mixed_types_make_the_same_groups():
    expected = compute_gtpo_advantage(*BATCH.args)  # of the groups a, a, b
    for uids in ([(0, 1), (0, 1), (0, 2)], [1, 1, "1"]):
        found = compute_gtpo_advantage(BATCH.rewards, BATCH.mask, uids)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_kl_in_the_reward_is_summed_over_the_turn():
    dense = BATCH.rewards - 0.01 * torch.arange(7)
    _, returns = compute_gtpo_advantage(dense, BATCH.mask, BATCH.uids, {"gtpo": {"gamma": 0.0}}, BATCH.turn_ids)
    # Row 0 is: tool, turn 0 twice, tool, turn 1, padding. What precedes the first turn belongs to it.
    assert returns[0].tolist() == pytest.approx([0, -0.06, -0.06, 0, 1 - 0.15, 0, 0], abs=1e-6)


def test_a_batch_of_nothing_but_padding():
    nothing = torch.zeros(2, 3)
    for turn_ids in (None, torch.full((2, 3), -1)):
        advantages, returns = compute_gtpo_advantage(nothing + 1, nothing, ["a", "a"], turn_ids=turn_ids)
        assert not advantages.any() and not returns.any() and advantages.shape == (2, 3)


# -- beside verl's estimators -----------------------------------------------------------------------------------------


def test_leave_one_out_with_one_turn_is_verls_rloo():
    outcomes = torch.rand(24, generator=torch.Generator().manual_seed(0)).tolist()
    batch = make_batch([(f"u{i % 5}", [(0, 2, r)]) for i, r in enumerate(outcomes)])
    config = {"gtpo": {"gamma": 1.0, "leave_one_out": True, "scale": "none"}}
    ours, _ = compute_gtpo_advantage(*batch.args, config=config, turn_ids=batch.turn_ids)
    verls, _ = core_algos.compute_rloo_outcome_advantage(*batch.args)
    torch.testing.assert_close(ours, verls, rtol=1e-5, atol=1e-6)


def test_scale_none_with_one_turn_is_verls_dr_grpo():
    batch = make_batch([(f"u{i % 3}", [(0, 2, float(i * i % 7))]) for i in range(12)])
    config = {"gtpo": {"gamma": 1.0, "scale": "none"}}
    ours, _ = compute_gtpo_advantage(*batch.args, config=config, turn_ids=batch.turn_ids)
    verls, _ = core_algos.compute_grpo_outcome_advantage(*batch.args, norm_adv_by_std_in_grpo=False)
    assert torch.equal(ours, verls)


# -- verl's configs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"rollout_correction": {"rollout_rs": "token_k1"}},
        OmegaConf.create({"rollout_correction": {"rollout_rs": "seq_mean_k3", "bypass_mode": False}}),
        AlgoConfig(rollout_correction=RolloutCorrectionConfig(rollout_rs="seq_sum_k1")),
    ],
    ids=["dict", "omegaconf", "dataclass"],
)
def test_rejection_sampling_needs_recorded_turns(config):
    with pytest.raises(ValueError, match=r"rollout_rs=.* rewrites response_mask"):
        compute_gtpo_advantage(*BATCH.args, config=config)
    compute_gtpo_advantage(*BATCH.args, config=config, turn_ids=BATCH.turn_ids)


@pytest.mark.parametrize(
    "correction", [None, {"rollout_is": "token"}, {"rollout_rs": "token_k1", "bypass_mode": True}], ids=str
)
def test_corrections_that_leave_the_mask_alone_are_accepted(correction):
    advantages, _ = compute_gtpo_advantage(*BATCH.args, config={"rollout_correction": correction})
    assert torch.equal(advantages, compute_gtpo_advantage(*BATCH.args)[0])


def test_what_verl_rewrites_the_mask_with_is_what_is_refused():
    """The refusal above names verl's switch: with it verl's own helper changes the mask, without it not."""
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask as correct

    old, mask = torch.zeros(1, 4), torch.ones(1, 4)
    rollout = torch.tensor([[0.0, 5.0, 0.0, 0.0]])
    _, rejected, _ = correct(old, rollout, mask, rollout_rs="token_k1", rollout_rs_threshold="0.5_2.0")
    _, untouched, _ = correct(old, rollout, mask, rollout_is="token", rollout_is_threshold=2.0)
    assert not torch.equal(rejected, mask) and torch.equal(untouched, mask)


def test_unsolved_groups_zero_is_refused_without_recorded_outcomes():
    with pytest.raises(ValueError, match="unsolved_groups=zero needs recorded outcomes"):
        compute_gtpo_advantage(*BATCH.args, config={"gtpo": {"unsolved_groups": "zero"}})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_device_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    rows = [(f"u{i % 9}", [(1, 2, float(torch.rand((), generator=generator)))] * (1 + i % 4)) for i in range(60)]
    batch = make_batch(rows)
    cpu = compute_gtpo_advantage(*batch.args, turn_ids=batch.turn_ids)
    gpu = compute_gtpo_advantage(batch.rewards.cuda(), batch.mask.cuda(), batch.uids, turn_ids=batch.turn_ids)
    for a, b in zip(cpu, gpu, strict=True):
        assert b.is_cuda and torch.equal(a, b.cpu())
