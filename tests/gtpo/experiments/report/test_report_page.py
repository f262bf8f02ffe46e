"""The comparison of runs: statistics on tiny hand-made records, and what the page says follows from the numbers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from recipe.gtpo.experiments.report import __main__ as report
from recipe.gtpo.run.record import RunRecord

pytestmark = pytest.mark.unit


def make_run(folder, method, seed, curve, *, task="arithmetic", horizon=None, seconds=2.0, adv=0.1, **extra):
    """A run folder as a finished run leaves it: `curve` is step -> held-out accuracy. Old records name no horizon."""
    record = RunRecord(folder / (f"{method}-seed{seed}" if horizon is None else f"{method}-h{horizon}-seed{seed}"))
    record.write_start(seed)
    for step in range(max(curve) + 1):
        metrics = {"timing_s/step": seconds, "timing_s/adv": adv, "gtpo/by_turn/advantage/mean/t0": 0.1 * step}
        if step in curve:
            metrics |= {"val-core/arithmetic/acc/mean@1": curve[step], "val-aux/arithmetic/turns/mean@1": 2.0}
        record.write_metrics(step, metrics | extra)
    known = {} if horizon is None else {"horizon": horizon}
    record.write_summary({"method": method, "task": task, **known, "seed": seed, "steps": [0, max(curve)]})
    return record.dir


def test_area_is_the_mean_height_of_the_curve(tmp_path):
    run = report.Run.load(make_run(tmp_path, "gtpo", 1, {0: 0.0, 1: 0.4, 3: 0.8}))
    # (0 + .4) / 2 over one step, (.4 + .8) / 2 over two
    assert run.area == pytest.approx((0.2 * 1 + 0.6 * 2) / 3)
    assert run.final == 0.8
    assert (run.reached(0.4), run.reached(0.5), run.reached(0.9)) == (1.0, 3.0, None)


def test_t_interval_on_three_values():
    interval = report.t_interval([0.1, 0.2, 0.3])
    half = 4.302653 * 0.1 / 3**0.5  # t quantile for 2 degrees of freedom
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert report.t_interval([0.5]) == report.Interval(0.5, None, None, 1)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12))
def test_a_bootstrap_interval_holds_the_mean_and_stays_in_the_data(values):
    interval = report.bootstrap_interval(values)
    slack = 1e-9
    assert min(values) - slack <= interval.low <= interval.mean + slack
    assert interval.mean - slack <= interval.high <= max(values) + slack
    assert report.bootstrap_interval(values) == interval  # seeded


def test_differences_are_paired_by_seed(tmp_path):
    for seed, (ours, theirs) in enumerate([(0.5, 0.4), (0.9, 0.7), (0.3, 0.35), (0.6, 0.6)]):
        make_run(tmp_path, "gtpo", seed, {0: 0.2, 2: ours})
        make_run(tmp_path, "grpo", seed, {0: 0.2, 2: theirs})
    make_run(tmp_path, "gtpo", 9, {0: 0.2, 2: 1.0})  # no partner: not compared
    found = report.paired(report.load_runs([tmp_path]), "gtpo", lambda r: r.final)
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
    rows = report.make_rows(report.load_runs([tmp_path]), threshold=0.5)
    assert [(row.horizon, row.method) for row in rows] == [(1, "gtpo"), (1, "grpo"), (6, "gtpo"), (6, "grpo")]
    assert rows[0].final_difference.by_seed == pytest.approx({0: 0.1, 1: 0.0})
    assert rows[2].final_difference.by_seed == pytest.approx({0: 0.2, 1: 0.4})
    assert rows[2].area_difference.by_seed == pytest.approx({0: 0.1, 1: 0.2})


def test_rows_are_ranked_by_final_accuracy_and_area_together(tmp_path):
    make_run(tmp_path, "grpo", 1, {0: 0.2, 2: 0.3, 4: 0.62})  # the best end, the smallest area
    make_run(tmp_path, "gtpo", 1, {0: 0.2, 2: 0.6, 4: 0.6}, seconds=2.2, adv=0.12)
    rows = report.make_rows(report.load_runs([tmp_path]), threshold=0.5)
    assert [row.method for row in rows] == ["gtpo", "grpo"]
    gtpo, grpo = rows
    assert (gtpo.reached, grpo.reached) == (2.0, 4.0)
    assert gtpo.step_cost == pytest.approx(1.1)
    assert gtpo.adv_cost == pytest.approx(0.01)
    assert grpo.final_difference is None


@pytest.mark.parametrize(
    ("difference", "seeds", "said"),
    [
        (0.1, 16, "better than grpo (+10.0 [+10.0, +10.0] points"),
        (0.1, 15, "better than grpo here, on too few seeds for a claim"),
        (-0.1, 16, "worse than grpo ("),
        (-0.1, 4, "worse than grpo here, on too few seeds for a claim"),
        (None, 16, "not told apart from grpo ("),
        (None, 4, "not told apart from grpo ("),
    ],
)
def test_the_verdict_follows_from_the_interval_and_the_number_of_seeds(tmp_path, difference, seeds, said):
    for seed in range(seeds):
        make_run(tmp_path, "grpo", seed, {0: 0.2, 1: 0.5})
        gain = difference if difference is not None else (-1) ** seed * 0.1
        make_run(tmp_path, "gtpo", seed, {0: 0.2, 1: 0.5 + gain})
    assert said in report.verdict(report.make_rows(report.load_runs([tmp_path]), 0.5))


def test_a_verdict_names_the_horizon_where_there_are_several(tmp_path):
    for seed in (1, 2):
        for horizon, gain in ((1, 0.0), (3, -0.1)):
            make_run(tmp_path, "grpo", seed, {0: 0.2, 1: 0.5}, horizon=horizon)
            make_run(tmp_path, "gtpo", seed, {0: 0.2, 1: 0.5 + gain}, horizon=horizon)
    rows = report.make_rows(report.load_runs([tmp_path]), 0.5)
    assert report.verdict(rows) == (
        "gtpo at horizon 1: not told apart from grpo (+0.0 [+0.0, +0.0] points, 2 seeds); "
        "gtpo at horizon 3: worse than grpo here, on too few seeds for a claim (-10.0 [-10.0, -10.0] points, 2 seeds)."
    )
    assert report.verdict(rows[:2]).startswith("gtpo: not told apart")


def test_one_seed_says_nothing(tmp_path):
    make_run(tmp_path, "grpo", 1, {0: 0.2, 1: 0.5})
    make_run(tmp_path, "gtpo", 1, {0: 0.2, 1: 0.9})
    assert "nothing can be said" in report.verdict(report.make_rows(report.load_runs([tmp_path]), 0.5))


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        report.load_runs([tmp_path])
    first = make_run(tmp_path / "a", "gtpo", 1, {0: 0.2, 2: 0.5})
    with pytest.raises(ValueError, match="both gtpo with seed 1"):
        report.load_runs([first, make_run(tmp_path / "b", "gtpo", 1, {0: 0.2, 2: 0.5})])
    far = make_run(tmp_path / "a", "gtpo", 1, {0: 0.2, 2: 0.5}, horizon=3)
    assert len(report.load_runs([far, make_run(tmp_path / "b", "gtpo", 1, {0: 0.2, 2: 0.5}, horizon=4)])) == 2
    with pytest.raises(ValueError, match="both gtpo with seed 1 at horizon 3"):
        report.load_runs([far, make_run(tmp_path / "b", "gtpo", 1, {0: 0.2, 2: 0.5}, horizon=3)])
    with pytest.raises(ValueError, match=r"gtpo-seed1 does not say its horizon, .*gtpo-h3-seed1 does"):
        report.load_runs([far, first])
    with pytest.raises(ValueError, match="differ in task"):
        report.load_runs([first, make_run(tmp_path / "c", "grpo", 1, {0: 0.2, 2: 0.5}, task="other")])
    with pytest.raises(ValueError, match="ends at step 3"):
        report.load_runs([first, make_run(tmp_path / "d", "grpo", 1, {0: 0.2, 3: 0.5})])
    with pytest.raises(ValueError, match="no validation before and after"):
        report.load_runs([make_run(tmp_path / "e", "grpo", 1, {2: 0.5})])


def test_a_report_is_whole_and_its_numbers_read_back(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, "grpo", seed, {0: 0.2, 2: 0.5 + 0.01 * seed})
        classes = {"val-class/later turn/acc": 0.25, "gtpo/groups/unsolved_signal/mean": 0.5}
        make_run(tmp_path, "gtpo", seed, {0: 0.2, 2: 0.6}, **classes)
    out = tmp_path / "report"
    report.write_report([tmp_path], out, threshold=0.5)
    facts = json.loads((out / "report.json").read_text())
    assert {row["method"]: row["final"]["mean"] for row in facts["rows"]} == pytest.approx({"gtpo": 0.6, "grpo": 0.515})
    assert facts["runs"][0]["curve"] == {"0": 0.2, "2": 0.51}
    table = (out / "table.md").read_text().splitlines()
    assert table[2].startswith("| gtpo | 2 | 0.600 ± 0.000 |") and len({line.count("|") for line in table}) == 1
    page = (out / "index.html").read_text()
    figures = sorted(path.name for path in out.glob("*.png"))
    assert figures == [
        "credit_by_turn.png",
        "group_signal.png",
        "learning_curves.png",
        "paired_differences.png",
        "problem_classes.png",
    ]
    assert page.count("data:image/png;base64,") == len(figures)
    assert "http" not in page.replace("http-equiv", "")  # self-contained


def test_the_table_has_the_paired_difference_of_the_area_too(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, "grpo", seed, {0: 0.0, 2: 0.5})
        make_run(tmp_path, "gtpo", seed, {0: 0.0, 2: 0.5 + 0.1 * seed})
    head, _, gtpo, grpo = report.markdown(report.make_rows(report.load_runs([tmp_path]), 0.5), 0.5).splitlines()
    columns = [cell.strip() for cell in head.split("|")]
    found = {name: cell.strip() for name, cell in zip(columns, gtpo.split("|"), strict=True)}
    assert found["final over grpo, points"] == "+15.0 [+10.0, +20.0]"
    assert found["area over grpo, points"] == "+7.5 [+5.0, +10.0]"
    assert found["wins-losses, p"] == "2-0, 0.5"
    assert grpo.split("|")[columns.index("area over grpo, points")].strip() == ""
    assert "horizon" not in columns


def test_several_horizons_are_an_overview_and_a_section_each(tmp_path):
    for horizon in (6, 2):
        for seed in (1, 2):
            for method in ("gtpo", "grpo", "rloo"):
                make_run(tmp_path, method, seed, {0: 0.2, 2: 0.5 / horizon}, horizon=horizon)
    out = tmp_path / "report"
    report.write_report([tmp_path], out, threshold=0.5)
    facts = json.loads((out / "report.json").read_text())
    assert [row["horizon"] for row in facts["rows"]] == [2, 2, 2, 6, 6, 6]
    assert {(r["method"], r["seed"], r["horizon"]) for r in facts["runs"]} == {
        (method, seed, horizon) for method in ("gtpo", "grpo", "rloo") for seed in (1, 2) for horizon in (2, 6)
    }
    each = ("credit_by_turn", "group_signal", "learning_curves", "paired_differences")
    figures = sorted(path.stem for path in out.glob("*.png"))
    overview = ["accuracy_by_horizon", "differences_by_horizon"]
    assert figures == overview + [f"h{horizon}_{name}" for horizon in (2, 6) for name in each]
    page = (out / "index.html").read_text()
    places = [page.index(f">{title}</h2>") for title in ("Accuracy", "Across horizons", "Horizon 2", "Horizon 6")]
    assert places == sorted(places)
    assert page.count("data:image/png;base64,") == len(figures) and "http" not in page
    assert (out / "table.md").read_text().startswith("| horizon | method | seeds |")


@pytest.mark.parametrize("horizon", [None, 3])
def test_one_horizon_needs_no_overview_and_no_prefix(tmp_path, horizon):
    for method in ("gtpo", "grpo"):
        make_run(tmp_path, method, 1, {0: 0.2, 2: 0.5}, horizon=horizon)
    out = tmp_path / "report"
    report.write_report([tmp_path], out, threshold=0.5)
    assert not list(out.glob("h*.png")) and (out / "learning_curves.png").exists()
    page = (out / "index.html").read_text()
    assert "Across horizons" not in page
    assert page.count("2 methods, horizon 3<") == (2 if horizon else 0)  # in the title and the heading


@pytest.mark.parametrize("methods", [("grpo",), ("rloo", "gtpo")])
def test_a_report_without_a_pair_says_so(tmp_path, methods):
    for method in methods:
        make_run(tmp_path, method, 1, {0: 0.2, 2: 0.5})
    report.write_report([tmp_path], tmp_path / "report", threshold=0.5)
    assert not (tmp_path / "report" / "paired_differences.png").exists()
    assert "nothing can be said" in (tmp_path / "report" / "index.html").read_text()
