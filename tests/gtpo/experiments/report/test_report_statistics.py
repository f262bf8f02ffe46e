"""The numbers of a report, on tiny hand-made records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded_runs import make_run
from scipy import stats

from recipe.gtpo.experiments.report.runs import load_runs
from recipe.gtpo.experiments.report.statistics import (
    Interval,
    best_rival,
    bootstrap_interval,
    make_rows,
    paired,
    t_interval,
)

pytestmark = pytest.mark.unit


def test_t_interval_on_three_values():
    interval = t_interval([0.1, 0.2, 0.3])
    half = 4.302653 * 0.1 / 3**0.5  # t quantile for 2 degrees of freedom
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert t_interval([0.5]) == Interval(0.5, None, None, 1)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12))
def test_a_bootstrap_interval_holds_the_mean_and_stays_in_the_data(values):
    interval = bootstrap_interval(values)
    slack = 1e-9
    assert min(values) - slack <= interval.low <= interval.mean + slack
    assert interval.mean - slack <= interval.high <= max(values) + slack
    assert bootstrap_interval(values) == interval  # seeded


def test_differences_are_paired_by_seed(tmp_path):
    for seed, (ours, theirs) in enumerate([(0.5, 0.4), (0.9, 0.7), (0.3, 0.35), (0.6, 0.6)]):
        make_run(tmp_path, "gtpo", seed, {0: 0.2, 2: ours})
        make_run(tmp_path, "grpo", seed, {0: 0.2, 2: theirs})
    make_run(tmp_path, "gtpo", 9, {0: 0.2, 2: 1.0})  # no partner: not compared
    found = paired(load_runs([tmp_path]), "gtpo", "grpo", lambda r: r.final)
    assert found.by_seed == pytest.approx({0: 0.1, 1: 0.2, 2: -0.05, 3: 0.0})
    assert found.interval.mean == pytest.approx(0.0625)
    assert (found.wins, found.losses) == (2, 1)  # a tie is neither
    assert found.p_value == pytest.approx(stats.binomtest(2, 3).pvalue)


def test_differences_are_paired_within_a_horizon(tmp_path):
    finals = {1: [(0.9, 0.8), (0.8, 0.8)], 6: [(0.3, 0.1), (0.5, 0.1)]}
    for horizon, pairs in finals.items():
        for seed, (ours, theirs) in enumerate(pairs):
            make_run(tmp_path, "gtpo", seed, {0: 0.0, 2: ours}, horizon=horizon)
            make_run(tmp_path, "grpo", seed, {0: 0.0, 2: theirs}, horizon=horizon)
    make_run(tmp_path, "gtpo", 7, {0: 0.0, 2: 1.0}, horizon=6)  # its partner is at another horizon: not compared
    make_run(tmp_path, "grpo", 7, {0: 0.0, 2: 0.5}, horizon=1)
    rows = make_rows(load_runs([tmp_path]), threshold=0.5)
    assert [(row.horizon, row.method) for row in rows] == [(1, "gtpo"), (1, "grpo"), (6, "gtpo"), (6, "grpo")]
    assert rows[0].final_difference.by_seed == pytest.approx({0: 0.1, 1: 0.0})
    assert rows[2].final_difference.by_seed == pytest.approx({0: 0.2, 1: 0.4})
    assert rows[2].area_difference.by_seed == pytest.approx({0: 0.1, 1: 0.2})


def test_rows_are_ranked_by_final_accuracy_and_area_together(tmp_path):
    make_run(tmp_path, "grpo", 1, {0: 0.2, 2: 0.3, 4: 0.62})  # the best end, the smallest area
    make_run(tmp_path, "gtpo", 1, {0: 0.2, 2: 0.6, 4: 0.6}, seconds=2.2, adv=0.12)
    rows = make_rows(load_runs([tmp_path]), threshold=0.5)
    assert [row.method for row in rows] == ["gtpo", "grpo"]
    gtpo, grpo = rows
    assert (gtpo.reached, grpo.reached) == (2.0, 4.0)
    assert gtpo.step_cost == pytest.approx(1.1)
    assert gtpo.adv_cost == pytest.approx(0.01)
    assert grpo.final_difference is None


def test_the_best_rival_is_the_one_that_a_method_gains_least_over(tmp_path):
    for seed in (1, 2, 3):
        make_run(tmp_path, "gtpo", seed, {0: 0.2, 2: 0.6})
        make_run(tmp_path, "gtpo_turn", seed, {0: 0.2, 2: 0.9})  # no rival
        make_run(tmp_path, "grpo", seed, {0: 0.2, 2: 0.5})
        make_run(tmp_path, "rloo", seed, {0: 0.2, 2: 0.4 + 0.1 * seed}, reward="outcome")
    make_run(tmp_path, "gigpo", 3, {0: 0.2, 2: 1.0})  # a single seed is no comparison where others share more
    runs = load_runs([tmp_path])
    best = best_rival(runs, "gtpo")
    assert (best.method, best.reward) == ("rloo", "the outcome")
    assert best.final.by_seed == pytest.approx({1: 0.1, 2: 0.0, 3: -0.1})
    assert best.area.by_seed == pytest.approx({1: 0.05, 2: 0.0, 3: -0.05})
    assert best_rival(runs, "rloo") is None
    assert best_rival([r for r in runs if r.method == "gigpo" or r.seed == 3], "gtpo").method == "gigpo"
    assert best_rival([r for r in runs if r.ours], "gtpo") is None


def test_where_only_grpo_on_the_outcome_was_run_it_is_the_baseline(tmp_path):
    """As in experiment=first_call, whose table would else have columns without a number."""
    for method, end in (("grpo_outcome", 0.5), ("gigpo", 0.7), ("gtpo", 0.6)):
        make_run(tmp_path, method, 1, {0: 0.2, 2: end}, reward="outcome")
    rows = {row.method: row for row in make_rows(load_runs([tmp_path]), threshold=0.5)}
    assert {row.baseline for row in rows.values()} == {"grpo_outcome"}
    assert rows["gigpo"].final_difference.by_seed == pytest.approx({1: 0.2})
    assert rows["grpo_outcome"].final_difference is None and rows["gtpo"].best_rival.method == "gigpo"


def test_where_the_papers_baseline_was_not_run_the_summed_one_is_the_baseline(tmp_path):
    for method in ("grpo_sum", "gtpo"):
        make_run(tmp_path, method, 1, {0: 0.2, 2: 0.5}, reward="sum")
    base, ours = sorted(make_rows(load_runs([tmp_path]), threshold=0.5), key=lambda row: row.method)
    assert ours.baseline == "grpo_sum" and ours.final_difference is not None and base.final_difference is None
    make_run(tmp_path, "grpo", 1, {0: 0.2, 2: 0.5})
    assert {row.baseline for row in make_rows(load_runs([tmp_path]), threshold=0.5)} == {"grpo"}
