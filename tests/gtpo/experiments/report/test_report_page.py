"""What the page says follows from the numbers, and text stays text in it."""

from __future__ import annotations

import json

import pytest
from recorded_runs import make_run

from recipe.gtpo.experiments.report.figures import Figure, Section
from recipe.gtpo.experiments.report.page import markdown, page, verdict
from recipe.gtpo.experiments.report.runs import load_runs
from recipe.gtpo.experiments.report.statistics import make_rows

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("difference", "seeds", "said"),
    [
        (0.1, 16, "better than grpo on min(outcome, well-formed), the best rival (+10.0 [+10.0, +10.0] points"),
        (0.1, 15, "better than grpo on min(outcome, well-formed), the best rival, here, on too few seeds for a claim"),
        (-0.1, 16, "worse than grpo on min(outcome, well-formed), the best rival ("),
        (-0.1, 4, "worse than grpo on min(outcome, well-formed), the best rival, here, on too few seeds for a claim"),
        (None, 16, "not told apart from grpo on min(outcome, well-formed), the best rival ("),
        (None, 4, "not told apart from grpo on min(outcome, well-formed), the best rival ("),
    ],
)
def test_the_verdict_follows_from_the_interval_and_the_number_of_seeds(tmp_path, difference, seeds, said):
    for seed in range(seeds):
        make_run(tmp_path, "grpo", seed, {0: 0.2, 1: 0.5})
        gain = difference if difference is not None else (-1) ** seed * 0.1
        make_run(tmp_path, "gtpo", seed, {0: 0.2, 1: 0.5 + gain})
    assert said in verdict(make_rows(load_runs([tmp_path]), 0.5))


def test_a_verdict_names_the_horizon_where_there_are_several(tmp_path):
    for seed in (1, 2):
        for horizon, gain in ((1, 0.0), (3, -0.1)):
            make_run(tmp_path, "grpo", seed, {0: 0.2, 1: 0.5}, horizon=horizon)
            make_run(tmp_path, "gtpo", seed, {0: 0.2, 1: 0.5 + gain}, horizon=horizon)
    rows = make_rows(load_runs([tmp_path]), 0.5)
    assert verdict(rows) == (
        "gtpo at horizon 1: not told apart from grpo on min(outcome, well-formed), the best rival "
        "(+0.0 [+0.0, +0.0] points, 2 seeds); gtpo at horizon 3: worse than grpo on min(outcome, well-formed), the "
        "best rival, here, on too few seeds for a claim (-10.0 [-10.0, -10.0] points, 2 seeds)."
    )
    assert verdict(rows[:2]).startswith("gtpo: not told apart")


def test_the_verdict_names_the_best_rival_and_the_reward_that_it_got(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, "grpo", seed, {0: 0.2, 1: 0.5})
        make_run(tmp_path, "dr_grpo", seed, {0: 0.2, 1: 0.7}, reward="outcome")
        make_run(tmp_path, "gtpo", seed, {0: 0.2, 1: 0.6})
    runs = load_runs([tmp_path])
    rows = make_rows(runs, 0.5)
    few = ", here, on too few seeds for a claim"
    assert verdict(rows) == (
        f"dr_grpo: better than grpo on min(outcome, well-formed){few} (+20.0 [+20.0, +20.0] points, 2 seeds); "
        f"gtpo: better than grpo on min(outcome, well-formed){few} (+10.0 [+10.0, +10.0] points, 2 seeds); "
        f"gtpo: worse than the best rival, dr_grpo on the outcome{few} (-10.0 [-10.0, -10.0] points, 2 seeds)."
    )
    head, _, *lines = markdown(rows, 0.5).splitlines()
    columns = [cell.strip() for cell in head.split("|")]
    at, reward = columns.index("final over the best rival, points"), columns.index("reward")
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in lines}
    assert cells["gtpo"][at] == "-10.0 [-10.0, -10.0] (dr_grpo)"
    assert (cells["dr_grpo"][at], cells["dr_grpo"][reward]) == ("", "the outcome")
    text = page(runs, rows, [], tmp_path, 0.5)
    assert "of rivals that are alike it is the\nluckiest" in text and "this page has 5" in text


def test_one_seed_says_nothing(tmp_path):
    make_run(tmp_path, "grpo", 1, {0: 0.2, 1: 0.5})
    make_run(tmp_path, "gtpo", 1, {0: 0.2, 1: 0.9})
    assert "nothing can be said" in verdict(make_rows(load_runs([tmp_path]), 0.5))


def test_the_table_has_the_paired_difference_of_the_area_too(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, "grpo", seed, {0: 0.0, 2: 0.5})
        make_run(tmp_path, "gtpo", seed, {0: 0.0, 2: 0.5 + 0.1 * seed})
    head, _, gtpo, grpo = markdown(make_rows(load_runs([tmp_path]), 0.5), 0.5).splitlines()
    columns = [cell.strip() for cell in head.split("|")]
    found = {name: cell.strip() for name, cell in zip(columns, gtpo.split("|"), strict=True)}
    assert found["final over grpo, points"] == "+15.0 [+10.0, +20.0]"
    assert found["area over grpo, points"] == "+7.5 [+5.0, +10.0]"
    assert found["wins-losses, p"] == "2-0, 0.5"
    assert grpo.split("|")[columns.index("area over grpo, points")].strip() == ""
    assert "horizon" not in columns


@pytest.mark.parametrize("horizon", [None, 3])
def test_the_title_names_the_horizon_that_the_records_name(tmp_path, horizon):
    for method in ("gtpo", "grpo"):
        make_run(tmp_path, method, 1, {0: 0.2, 2: 0.5}, horizon=horizon)
    runs = load_runs([tmp_path])
    text = page(runs, make_rows(runs, 0.5), [], tmp_path, 0.5)
    assert text.count("2 methods, horizon 3<") == (2 if horizon else 0)  # in the title and the heading


@pytest.mark.parametrize("methods", [("grpo",), ("rloo", "gtpo")])
def test_a_page_without_a_pair_says_so(tmp_path, methods):
    for method in methods:
        make_run(tmp_path, method, 1, {0: 0.2, 2: 0.5})
    runs = load_runs([tmp_path])
    assert "nothing can be said" in page(runs, make_rows(runs, 0.5), [], tmp_path, 0.5)


def test_text_of_the_records_is_escaped(tmp_path):
    markup, escaped = '<script>&"', "&lt;script&gt;&amp;&#34;"
    for method in (f"{markup}method", "grpo"):
        folder = make_run(tmp_path, method, 1, {0: 0.2, 1: 0.5}, task=f"{markup}task")
        start = {"command": ["main.py", f"{markup}argument"]}
        start |= {name: f"{markup}{name}" for name in ("commit", "machine", "cores")}
        (folder / "versions.json").write_text(json.dumps([start]))
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"engine": f"{markup}engine"}))
    (tmp_path / "drawn.png").write_bytes(b"")
    figure = Figure("drawn.png", 700, f"{markup}figure", f"{markup}caption")
    sections = [Section(f"{markup}section", [figure]), Section("other", [])]
    runs = load_runs([tmp_path])
    text = page(runs, make_rows(runs, 0.5), sections, tmp_path, 0.5)
    assert "<script" not in text and '&"' not in text
    for name in ("method", "task", "commit", "machine", "cores", "engine", "argument", "figure", "caption", "section"):
        assert f"{escaped}{name}" in text
