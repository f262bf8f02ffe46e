"""Every metric on a batch small enough to count by hand, and the price of all of them."""

from __future__ import annotations

import time

import pytest
import torch
from trajectories import trajectory, turn
from verl.trainer.ppo.v1.utils import MetricsAggregator

from recipe.gtpo.method.credit import assign_credit
from recipe.gtpo.method.metrics import credit_metrics, log_prob_gap_by_turn
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.method.turns import Finish, FormatReason

pytestmark = pytest.mark.unit

#: p: one solved in two turns, one failed in one. q: all solved. u: nobody solved. Then an infra and a padding row.
ROWS = [
    ("p", trajectory(turn(0, 2, "a = 1"), turn(3, 5), acc=1.0)),
    ("p", trajectory(turn(0, 2, "a = 2", broken=FormatReason.NO_ANSWER, outcome="error"))),
    ("q", trajectory(turn(0, 2, "b"), turn(2, 4, "b"), acc=1.0)),
    ("u", trajectory(turn(0, 2, broken=FormatReason.FIRST_TURN_NO_CALL), finish=Finish.LENGTH)),
    ("u", trajectory(turn(0, 1, "c"))),
    ("u", trajectory(turn(0, 1, "c"), finish=Finish.INFRA)),
    ("pad", None),
]
TRAJECTORIES = [t for _, t in ROWS]
CREDIT = assign_credit(TRAJECTORIES, [uid for uid, _ in ROWS], GTPOOptions(format_rule="strict"))
RETURNS = torch.tensor([[0.9, 1.0], [0.15, 0], [0.9, 1.0], [-0.1, 0], [0, 0], [0, 0], [0, 0]])
ADVANTAGES = torch.tensor([[0.5, 1.0], [-1.5, 0], [-0.7, 0.7], [-0.6, 0], [0.6, 0], [0, 0], [0, 0]])


def test_every_number():
    metrics = credit_metrics(CREDIT, TRAJECTORIES, RETURNS, ADVANTAGES)
    expected = {
        "gtpo/rows/valid_total": 5,
        "gtpo/rows/dropped_total": 1,
        "gtpo/rows/infra_total": 1,
        "gtpo/truncated": 1 / 6,  # of the real rows
        "gtpo/acc/mean": 2 / 5,
        "gtpo/reward/mean": (1 + 0.15 + 1 - 0.1) / 5,
        "gtpo/reward/outcome/mean": 2 / 5,
        "gtpo/reward/format/mean": -0.2 / 5,
        "gtpo/reward/shaping/mean": 0.25 / 5,
        "gtpo/turns/mean": 7 / 5,
        "gtpo/tool/calls/mean": 5 / 5,
        "gtpo/tool/first_turn_call": 4 / 5,
        "gtpo/tool/outcome_total/ok": 4,
        "gtpo/tool/outcome_total/error": 1,
        "gtpo/tool/error_rate": 1 / 5,
        "gtpo/return/mean": (0.9 + 1 + 0.15 + 0.9 + 1 - 0.1) / 7,
        "gtpo/advantage/mean": 0.0,
        "gtpo/advantage/std": ((0.25 + 1 + 2.25 + 2 * 0.49 + 2 * 0.36) / 7) ** 0.5,
        "gtpo/by_turn/survivors/t0": 1.0,
        "gtpo/by_turn/survivors/t1": 2 / 5,
        "gtpo/by_turn/reward/mean/t0": (0.15 - 0.1) / 5,
        "gtpo/by_turn/reward/mean/t1": 1.0,
        "gtpo/by_turn/reward/outcome/mean/t0": 0.0,
        "gtpo/by_turn/reward/outcome/mean/t1": 1.0,
        "gtpo/by_turn/reward/format/mean/t0": -0.2 / 5,
        "gtpo/by_turn/reward/format/mean/t1": 0.0,
        "gtpo/by_turn/reward/shaping/mean/t0": 0.25 / 5,
        "gtpo/by_turn/reward/shaping/mean/t1": 0.0,
        "gtpo/by_turn/return/mean/t0": (0.9 + 0.15 + 0.9 - 0.1) / 5,
        "gtpo/by_turn/return/mean/t1": 1.0,
        "gtpo/by_turn/advantage/mean/t0": -1.7 / 5,
        "gtpo/by_turn/advantage/mean/t1": 0.85,
        "gtpo/by_turn/advantage/std/t0": ((0.25 + 2.25 + 0.49 + 0.72) / 5 - 0.34**2) ** 0.5,
        "gtpo/by_turn/advantage/std/t1": 0.15,
        "gtpo/by_turn/wrong/advantage/mean/t0": (-1.5 - 0.6 + 0.6) / 3,  # no wrong one has a second turn
        "gtpo/by_turn/wrong/above_zero/t0": 1 / 3,
        "gtpo/groups/unsolved": 1 / 3,
        "gtpo/groups/all_solved": 1 / 3,
        "gtpo/groups/unsolved_with_signal": 1.0,
        "gtpo/groups/unsolved_signal/mean": 0.6,
        "gtpo/groups/all_solved_first_turn_advantage/mean": -0.7,
        "gtpo/groups/all_solved_last_turn_advantage/mean": 0.7,
        "gtpo/pools/zero_spread": 0.0,
    }
    reasons = {FormatReason.NO_ANSWER: 1, FormatReason.FIRST_TURN_NO_CALL: 1}
    for reason in FormatReason:
        expected[f"gtpo/format/{reason.value}"] = reasons.get(reason, 0) / 7
        expected[f"gtpo/by_turn/format/{reason.value}/t0"] = reasons.get(reason, 0) / 5
        expected[f"gtpo/by_turn/format/{reason.value}/t1"] = 0.0
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-6), name
        assert type(metrics[name]) is float


def test_a_quantity_without_a_case_is_left_out():
    credit = assign_credit(TRAJECTORIES[:2], ["p", "p"], GTPOOptions())
    names = credit_metrics(credit, TRAJECTORIES[:2], RETURNS[:2], ADVANTAGES[:2])
    assert not [name for name in names if "all_solved_" in name or "unsolved_" in name]
    nothing = assign_credit([None, TRAJECTORIES[5]], ["x", "u"], GTPOOptions())
    assert credit_metrics(nothing, [None, TRAJECTORIES[5]], torch.zeros(2, 0), torch.zeros(2, 0)) == {
        "gtpo/rows/valid_total": 0, "gtpo/rows/dropped_total": 1, "gtpo/rows/infra_total": 1, "gtpo/truncated": 0
    }  # fmt: skip


def test_verl_adds_up_the_counts_and_averages_everything_else():
    """Over the iterations of one update: verl decides by words in the name."""
    metrics = credit_metrics(CREDIT, TRAJECTORIES, RETURNS, ADVANTAGES)
    metrics |= log_prob_gap_by_turn(torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2))
    kind = MetricsAggregator()._get_aggregation_type
    for name in metrics:
        assert kind(name) == ("sum" if "_total" in name else "weighted_avg"), name


def test_log_prob_gap_by_turn():
    actor = torch.tensor([[-1.0, -2.0, -9.0, -1.0], [-3.0, 0.0, 0.0, 0.0]])
    rollout = torch.tensor([[-1.5, -2.0, 0.0, -2.0], [-2.0, 5.0, 5.0, 5.0]])
    ids = torch.tensor([[0, 0, -1, 1], [0, -1, -1, -1]], dtype=torch.int16)
    expected = {
        "gtpo/log_prob_gap/mean": 2.5 / 4,
        "gtpo/by_turn/log_prob_gap/mean/t0": 1.5 / 3,
        "gtpo/by_turn/log_prob_gap/mean/t1": 1.0,
    }
    assert log_prob_gap_by_turn(actor, rollout, ids) == pytest.approx(expected)
    lengths = (4, 1)
    nested = [
        torch.nested.as_nested_tensor([row[:n] for row, n in zip(t, lengths, strict=True)], layout=torch.jagged)
        for t in (actor, rollout)
    ]
    assert log_prob_gap_by_turn(*nested, ids) == pytest.approx(expected)
    assert log_prob_gap_by_turn(actor, rollout, torch.full((2, 4), -1)) == {}


def test_metrics_of_a_large_batch_take_less_than_a_hundredth_of_a_ten_second_step():
    rows = [
        (
            f"u{i // 16}",
            trajectory(*(turn(8 * k, 8 * k + 6, "x = 1") for k in range(1 + i % 16)), acc=float(i % 3 == 0)),
        )
        for i in range(1024)
    ]
    trajectories = [t for _, t in rows]
    credit = assign_credit(trajectories, [uid for uid, _ in rows], GTPOOptions())
    values = torch.randn(credit.turn_mask.shape)
    took = []
    for _ in range(5):
        began = time.process_time()
        credit_metrics(credit, trajectories, values, values)
        took.append(time.process_time() - began)
    assert min(took) < 0.1
