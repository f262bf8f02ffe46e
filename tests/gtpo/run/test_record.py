"""Protects the run folder's layout and what a resumed run makes of it: the viewer, the report and the progress bar read
these files.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from recipe.gtpo.run.record import RunRecord

pytestmark = pytest.mark.unit


@pytest.fixture
def record(tmp_path):
    record = RunRecord(tmp_path / "run")
    record.write_start(seed=7)
    return record


def test_a_start_says_what_ran(record):
    (start,) = json.loads((record.dir / "versions.json").read_text())
    assert start["seed"] == 7 and start["command"] == sys.argv
    assert start["packages"]["verl"] == "0.9.1" and start["packages"]["torch"] == torch.__version__
    assert start["python"].split(".")[:2] == [str(n) for n in sys.version_info[:2]]
    assert start["cores"] >= 1 and start["time"] and start["machine"]


def test_a_resumed_run_has_one_entry_a_start(record):
    record.write_start(seed=8)
    assert [start["seed"] for start in json.loads((record.dir / "versions.json").read_text())] == [7, 8]
    assert [start["seed"] for start in record.read_starts()] == [7, 8]


def test_the_first_cause_of_a_start_s_end_stays(record):
    assert record.read_cause() is None
    record.write_cause("the rollout server died: pid 7")
    record.write_cause("RuntimeError: no trajectories")
    assert record.read_cause() == "the rollout server died: pid 7"
    record.drop_cause()
    assert record.read_cause() is None
    record.drop_cause()


def test_logs_lie_by_start(record, tmp_path):
    (tmp_path / "ray").mkdir()
    for start in ("0", "1"):
        (tmp_path / "ray" / "worker.err").write_text(start)
        record.keep_logs(tmp_path / "ray")
        record.write_traceback(f"Traceback {start}")
        record.write_start(seed=7)
    for start in ("0", "1"):
        folder = record.dir / "logs" / start
        assert (folder / "worker.err").read_text() == start
        assert (folder / "driver.txt").read_text() == f"Traceback {start}"


def test_metrics_are_one_json_line_a_step(record):
    record.write_metrics(0, {"a": 1})
    record.write_metrics(1, {"a": 2.5})
    assert record.metrics_path.read_text() == (
        '{"step": 0, "metrics": {"a": 1.0}}\n{"step": 1, "metrics": {"a": 2.5}}\n'
    )


def test_only_finite_or_infinite_numbers_are_metrics(record):
    kept = {"int": 1, "numpy": np.float32(0.5), "tensor": torch.tensor(2.0)}
    left_out = {"word": "1", "flag": True, "nan": float("nan"), "list": [1], "none": None, "vector": torch.ones(2)}
    record.write_metrics(1, kept | left_out)
    assert record.read_metrics() == [{"step": 1, "metrics": {"int": 1.0, "numpy": 0.5, "tensor": 2.0}}]


def test_the_latest_line_of_a_step_wins_after_a_resume(record):
    for step, value in ((1, 0.1), (2, 0.2), (3, 0.3), (2, 0.25), (3, 0.35), (4, 0.4)):
        record.write_metrics(step, {"a": value})
    assert [(line["step"], line["metrics"]["a"]) for line in record.read_metrics()] == [
        (1, 0.1), (2, 0.25), (3, 0.35), (4, 0.4)
    ]  # fmt: skip


def test_a_half_written_last_line_is_not_read_yet(record):
    record.write_metrics(1, {"a": 1})
    with record.metrics_path.open("a") as f:
        f.write('{"step": 2, "metr')
    assert [line["step"] for line in record.read_metrics()] == [1]


def test_a_run_without_metrics_has_none(record):
    assert record.read_metrics() == []


def test_trajectories_are_one_file_a_step_written_whole(record):
    record.write_trajectories(3, iter([{"group": "a"}, {"group": "b"}]))
    record.write_trajectories(3, [{"group": "c"}])  # the step is done again after a resume
    record.write_trajectories(10, [])
    folder = record.dir / "trajectories"
    assert {path.name for path in folder.iterdir()} == {"3.jsonl", "10.jsonl"}  # no temporary file is left
    assert (folder / "3.jsonl").read_text() == '{"group": "c"}\n'
    assert record.trajectory_steps() == [3, 10]
    assert record.read_trajectories(3) == [{"group": "c"}] and record.read_trajectories(10) == []


def test_trajectories_that_are_not_there_are_named(record):
    with pytest.raises(ValueError, match="trajectories: no recorded trajectories"):
        record.read_trajectories(1)
    record.write_trajectories(3, [])
    record.write_trajectories(10, [])
    with pytest.raises(ValueError, match="trajectories: no step 1; recorded: 3, 10"):
        record.read_trajectories(1)


def test_a_row_that_cannot_be_written_leaves_the_earlier_file(record):
    record.write_trajectories(1, [{"group": "a"}])
    with pytest.raises(TypeError):
        record.write_trajectories(1, [{"group": object()}])
    assert (record.dir / "trajectories" / "1.jsonl").read_text() == '{"group": "a"}\n'


def test_the_summary_replaces_the_one_before(record):
    assert record.read_summary() is None
    record.write_summary({"accuracy": [0.1, 0.2]})
    record.write_summary({"accuracy": [0.1, 0.9]})
    assert json.loads((record.dir / "summary.json").read_text()) == {"accuracy": [0.1, 0.9]} == record.read_summary()
