"""Which figures a report has, and where they go."""

from __future__ import annotations

import pytest
from recorded_runs import make_run

from recipe.gtpo.experiments.report.figures import Sheet, draw_sections
from recipe.gtpo.experiments.report.runs import load_runs
from recipe.gtpo.experiments.report.statistics import make_rows

pytestmark = pytest.mark.unit


def draw(folder, out):
    runs = load_runs([folder])
    out.mkdir()
    return draw_sections(runs, make_rows(runs, 0.5), out)


@pytest.mark.parametrize("horizon", [None, 3])
def test_one_horizon_needs_no_overview_and_no_prefix(tmp_path, horizon):
    for method in ("gtpo", "grpo"):
        make_run(tmp_path, method, 1, {0: 0.2, 2: 0.5}, horizon=horizon)
    out = tmp_path / "report"
    (section,) = draw(tmp_path, out)
    assert section.title == "Figures"
    assert [figure.file for figure in section.figures] == [
        "learning_curves.png",
        "paired_differences.png",
        "credit_by_turn.png",
        "group_signal.png",
    ]
    assert sorted(path.name for path in out.iterdir()) == sorted(figure.file for figure in section.figures)


@pytest.mark.parametrize("methods", [("grpo",), ("rloo", "gtpo")])
def test_without_a_pair_there_is_no_figure_of_differences(tmp_path, methods):
    for method in methods:
        make_run(tmp_path, method, 1, {0: 0.2, 2: 0.5})
    draw(tmp_path, tmp_path / "report")
    assert not (tmp_path / "report" / "paired_differences.png").exists()
    assert (tmp_path / "report" / "learning_curves.png").exists()


def test_a_method_has_the_same_colour_in_any_order_of_rows(tmp_path):
    methods = ["rloo", "grpo", "gtpo"]
    colours = {method: Sheet(tmp_path, methods).colour(method) for method in methods}
    assert len(set(colours.values())) == 3
    assert colours == {method: Sheet(tmp_path, sorted(methods), "h1_").colour(method) for method in methods}
