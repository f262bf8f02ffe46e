"""The comparison of methods, end to end at toy size: two methods x one seed x one horizon x two steps under verl, then
the report.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from runs import ROOT, TOY, launch

from recipe.gtpo.run.record import RunRecord

pytestmark = pytest.mark.e2e


def test_two_methods_become_one_report_whose_numbers_are_the_runs_own(tmp_path):
    out = tmp_path / "matrix"
    command = [
        "bash",
        "examples/compare_baselines.sh",
        "methods=gtpo,grpo",
        "seeds=1",
        "horizons=1",
        "steps=2",
        f"out={out}",
        *TOY,
        f"task.cache={tmp_path / 'cache'}",
    ]
    text = run(command, seconds=600)
    assert "2 complete, 0 were, 0 failed" in text

    facts = json.loads((out / "report" / "report.json").read_text())
    assert [(r["method"], r["seed"], r["horizon"]) for r in facts["runs"]] == [("grpo", 1, 1), ("gtpo", 1, 1)]
    for one in facts["runs"]:
        lines = RunRecord(out / f"{one['method']}-h1-seed1").read_metrics()
        recorded = {str(x["step"]): x["metrics"].get("val-core/arithmetic/acc/mean@1") for x in lines}
        assert one["curve"] == {step: value for step, value in recorded.items() if value is not None}
        assert set(one["curve"]) == {"0", "2"}
    # the same seed is the same start: both methods were measured on the same problems with the same policy
    assert facts["runs"][0]["curve"]["0"] == facts["runs"][1]["curve"]["0"]
    rows = {row["method"]: row for row in facts["rows"]}
    assert rows["gtpo"]["final_difference"]["by_seed"].keys() == {"1"}
    assert rows["gtpo"]["step_cost"] > 0
    page = (out / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") >= 3 and "recipe.gtpo.main" in page

    again = run(command, seconds=120)  # nothing to do: only the report is made anew
    assert "0 complete, 2 were, 0 failed" in again


def test_a_matrix_that_is_told_to_end_ends_its_cells_and_says_how_to_go_on(tmp_path):
    cell = ["methods=gtpo", "seeds=1", "engine=twin", *TOY[:1], f"task.cache={tmp_path / 'cache'}"]
    out = tmp_path / "matrix"
    command = [sys.executable, "-m", "recipe.gtpo.experiments.compare", *cell, f"out={out}"]
    with launch(command, out, tmp_path / "log") as matrix:
        matrix.wait_until(lambda: len(matrix.seen) >= 1, 100)  # the moment that its process is there
        matrix.process.send_signal(signal.SIGTERM)
        assert matrix.wait(100) == 143
        assert matrix.last_line() == "compare: error: terminated (SIGTERM); the same command goes on from here"
        assert matrix.left_behind() == []


def run(command, seconds):
    """Output of a command that ends with 0 in time; whatever it started is ended with it."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "VENV": sys.prefix, "OMP_NUM_THREADS": "1", "HARDWARE": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        text, _ = process.communicate(timeout=90)
        pytest.fail(f"not after {seconds} s:\n{text[-3000:]}")
    assert process.returncode == 0, text[-3000:]
    return text
