"""Protects the run folder's layout and what a resumed run makes of it: the viewer, the report and the progress bar read
these files.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from full_disk import full_disk
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

from recipe.gtpo.run.record import RecordError, RunRecord, latest_checkpoint
from verl_ext.records import Reader

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


def test_of_causes_that_come_at_once_one_stands_and_all_writers_are_told_it(record):
    """A watch, a signal and the trainer's process write theirs."""
    together = threading.Barrier(8)

    def write(i):
        together.wait()
        return RunRecord(record.dir).write_cause(f"cause {i}")

    with ThreadPoolExecutor(8) as threads:
        told = set(threads.map(write, range(8)))
    assert told == {record.read_cause()} and [path.name for path in record.dir.glob("*cause*")] == ["cause.txt"]


def test_a_cause_on_a_full_disk_is_known_to_who_wrote_it_and_blocks_no_later_one(record):
    with full_disk():
        assert record.write_cause("no room") == record.write_cause("what follows") == record.read_cause() == "no room"
    assert not list(record.dir.glob("*cause*"))
    assert RunRecord(record.dir).write_cause("the trainer's own") == "the trainer's own" == record.read_cause()
    record.drop_cause()
    assert record.read_cause() is None


def test_a_file_system_without_hard_links_keeps_the_first_cause_too(record, monkeypatch):
    def link(*_):
        raise PermissionError

    monkeypatch.setattr(os, "link", link)
    assert [record.write_cause(cause) for cause in ("first", "second")] == ["first", "first"]
    assert [path.name for path in record.dir.glob("*cause*")] == ["cause.txt"]


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


def test_only_numbers_are_metrics(record):
    kept = {"int": 1, "numpy": np.float32(0.5), "tensor": torch.tensor(2.0)}
    left_out = {"word": "1", "flag": True, "list": [1], "none": None, "vector": torch.ones(2)}
    record.write_metrics(1, kept | left_out)
    assert record.read_metrics() == [{"step": 1, "metrics": {"int": 1.0, "numpy": 0.5, "tensor": 2.0}}]


def test_a_number_that_is_not_finite_is_named_in_strict_json(record):
    """Also when the line is made of what the checkpoint was saved with."""
    metrics = {"good": 1, "nan": np.float32("nan"), "far": float("inf"), "low": torch.tensor(-float("inf"))}
    line = {"step": 1, "metrics": {"good": 1.0}, "not_finite": {"nan": "nan", "far": "inf", "low": "-inf"}}
    record.write_metrics(1, metrics)
    assert [strict(text) for text in record.metrics_path.read_text().splitlines()] == [line] == record.read_metrics()
    record.forget_after(0)
    record.write_checkpoint_metrics(1, metrics)
    record.complete(1, {})
    assert record.read_metrics() == [line]


def test_files_are_strict_json_whatever_is_in_them(record, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main", "run_dir=\udcff"])  # a file name that is no UTF-8
    value = {"array": np.arange(2), "number": np.float64(0.5), "whole": np.int64(3), "flag": np.bool_(True)}
    value |= {"nan": float("nan"), "text": "lone \ud800", "pair": (1.0, -float("inf")), "tensor": torch.ones(1)}
    plain = {"array": [0, 1], "number": 0.5, "whole": 3, "flag": True}
    plain |= {"nan": "nan", "text": "lone ?", "pair": [1.0, "-inf"], "tensor": [1.0]}
    record.write_config(value)
    record.write_summary(value)
    record.write_trajectories(1, [value])
    record.write_start(seed=1)
    assert record.read_config() == record.read_summary() == plain and record.read_trajectories(1) == [plain]
    assert record.read_starts()[-1]["command"] == ["main", "run_dir=?"]
    for file in ("config.json", "summary.json", "trajectories/1.jsonl", "versions.json"):
        strict((record.dir / file).read_bytes().decode("ascii"))


@pytest.mark.parametrize("text", ["\ud800", "\U0001f600", "\U0001f600 and \udc00", "C:\\udata", "\\ud83d", "\u00e9"])
def test_whole_characters_are_kept_and_halves_are_not(record, text):
    record.write_trajectories(1, [{"text": text}])
    (kept,) = record.read_trajectories(1)
    assert kept == {"text": text.encode(errors="replace").decode()}


def test_a_record_with_numbers_that_json_has_not_is_read(record):
    turn = {"start": 0, "end": 1, "text": "", "advantage": np.float32(0.5), "log_prob": float("-inf")}
    record.write_trajectories(
        1, [{"version": 1, "group": "p", "turns": [turn | {"reward": float("nan")}], "finish": "answer", "acc": 1.0}]
    )
    (read,) = Reader(record.dir).read(1)
    assert (read.turns[0].advantage, read.turns[0].log_prob) == (0.5, float("-inf")) and math.isnan(
        read.turns[0].reward
    )


def test_a_cause_with_any_text_is_written(record):
    record.write_cause("lone \ud800")
    record.write_traceback("lone \ud800")
    assert record.read_cause() == "lone \\ud800"


def strict(text):
    """Raises ValueError for the words that Python reads and JSON has not."""

    def refuse(word):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


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


def test_what_a_killed_writer_left_costs_no_line_after_it_and_is_said_once(record, caplog):
    record.write_metrics(1, {"a": 1})
    with record.metrics_path.open("a") as f:
        f.write('{"step": 2, "metr')
    resumed = RunRecord(record.dir)
    resumed.write_metrics(2, {"a": 2})
    resumed.write_metrics(3, {"a": 3})
    for _ in range(3):
        assert [line["step"] for line in resumed.read_metrics()] == [1, 2, 3]
    (said,) = caplog.messages
    assert said == f"{record.metrics_path}: line 2 is no JSON, passed over: its writer was killed"
    resumed.forget_after(3)
    assert [json.loads(line)["step"] for line in record.metrics_path.read_text().splitlines()] == [1, 2, 3]


def test_a_good_line_glued_to_a_torn_one_is_said_not_swallowed(record, caplog):
    record.metrics_path.write_text('{"step": 1, "metr{"step": 1, "metrics": {}}\n{"step": 2, "metrics": {}}\n')
    assert [line["step"] for line in record.read_metrics()] == [2]
    assert "line 1 is no JSON" in caplog.text


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(record):
    for step in range(6):
        record.write_metrics(step, {"a": step})
        record.write_trajectories(step, [{"group": "a"}])
    (record.dir / "trajectories" / "6.jsonl.tmp").write_text("half")
    record.write_checkpoint_metrics(5, {"a": 5})
    record.forget_after(3)
    assert [line["step"] for line in record.read_metrics()] == record.trajectory_steps() == [0, 1, 2, 3]
    assert {path.name for path in (record.dir / "trajectories").iterdir()} == {f"{step}.jsonl" for step in range(4)}
    record.complete(5, {})
    assert len(record.read_metrics()) == 4  # the metrics of the lost step are gone too


def test_a_run_that_was_done_and_goes_on_has_no_summary(record):
    """Stopped at step 25 of 40, it would be taken for the run of 20 steps that it once was."""
    record.write_summary({"steps": [0, 20]})
    record.forget_after(20)
    assert record.read_summary() is None


def test_a_checkpoint_without_its_line_gets_it_from_what_was_saved_with_it(record):
    record.write_checkpoint_metrics(2, {"a": 0.5, "word": "x"})
    record.complete(2, {"val": 0.25})
    record.complete(2, {"val": 0.75})  # it has one
    assert record.read_metrics() == [{"step": 2, "metrics": {"a": 0.5, "val": 0.25}}]
    record.complete(4, {"val": 0.5})  # a checkpoint that another run saved
    assert record.read_metrics()[1] == {"step": 4, "metrics": {"val": 0.5}}
    record.complete(6, {})
    assert len(record.read_metrics()) == 2  # nothing is known of it


@pytest.mark.parametrize("torn", ["", "[", '{"steps": [0', "\0\0\0", "7"])
def test_a_torn_file_is_named_in_one_line(record, torn):
    reads = {
        "versions.json": record.read_starts,
        "summary.json": record.read_summary,
        "checkpoint_metrics.json": lambda: record.complete(1, {}),
    }
    for name, read in reads.items():
        (record.dir / name).write_text(torn)
        with pytest.raises(RecordError, match=rf"{name} is no JSON (list|dict), its writing was cut off: delete it$"):
            read()


def checkpoint(folder, step, age):
    data = folder / f"global_step_{step}" / "data.pt"
    data.parent.mkdir()
    data.touch()
    os.utime(data, (1e9 - age, 1e9 - age))


def test_the_latest_checkpoint_is_the_one_that_verl_goes_on_from(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("4")
    checkpoint(tmp_path, 4, age=0)
    assert latest_checkpoint(tmp_path) == 4
    assert find_latest_ckpt_path(str(tmp_path)) == str(tmp_path / "global_step_4")


@pytest.mark.parametrize("torn", ["", "\0"])
def test_a_torn_tracker_is_mended_with_the_checkpoint_written_last(tmp_path, torn):
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text(torn)
    with pytest.raises(RecordError, match=r"names no step, and there is no checkpoint: .*delete this file"):
        latest_checkpoint(tmp_path)
    for step, age in ((8, 30), (10, 10), (20, 20)):  # 20 is from an earlier attempt
        checkpoint(tmp_path, step, age)
    (tmp_path / "global_step_12").mkdir()  # only begun
    assert latest_checkpoint(tmp_path) == 10
    assert find_latest_ckpt_path(str(tmp_path)) == str(tmp_path / "global_step_10")


def test_a_tracker_whose_checkpoint_is_gone_is_named(tmp_path):
    """verl would start over, and the record with it."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    with pytest.raises(RecordError, match="names step 4, but there is no global_step_4: put the checkpoint back"):
        latest_checkpoint(tmp_path)


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


def test_only_the_latest_steps_keep_their_trajectories_where_that_is_asked_for(tmp_path):
    record = RunRecord(tmp_path, keep=2)
    for step in (9, 10, 11):
        record.write_trajectories(step, [{}])
        record.write_trajectories(step // 10 * 10, [{}], split="validation")
    assert record.trajectory_steps() == [10, 11]
    assert Reader(tmp_path).steps("validation") == [0, 10]


def test_a_file_that_somebody_put_beside_the_trajectories_is_left_alone(record):
    record.write_trajectories(1, [{}])
    notes = record.dir / "trajectories" / "notes.jsonl"
    notes.write_text("{}\n")
    record.forget_after(0)
    assert record.trajectory_steps() == [] and notes.exists()


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
