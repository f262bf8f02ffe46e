"""The report's folder is whole, and its files agree with the runs."""

from __future__ import annotations

import json

import pytest
from recorded_runs import make_run

from recipe.gtpo.experiments.report.writer import write_report

pytestmark = pytest.mark.unit


def test_a_report_is_whole_and_its_numbers_read_back(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, "grpo", seed, {0: 0.2, 2: 0.5 + 0.01 * seed})
        classes = {"val-class/later turn/acc": 0.25, "gtpo/groups/unsolved_signal/mean": 0.5}
        make_run(tmp_path, "gtpo", seed, {0: 0.2, 2: 0.6}, **classes)
    out = tmp_path / "report"
    write_report([tmp_path], out, threshold=0.5)
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


def test_several_horizons_are_an_overview_and_a_section_each(tmp_path):
    for horizon in (6, 2):
        for seed in (1, 2):
            for method in ("gtpo", "grpo", "rloo"):
                make_run(tmp_path, method, seed, {0: 0.2, 2: 0.5 / horizon}, horizon=horizon)
    out = tmp_path / "report"
    write_report([tmp_path], out, threshold=0.5)
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
