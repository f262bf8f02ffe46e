"""What the status screen says of a run, from a folder of three lines; when its watch ends."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.status import describe, main, seconds_a_step, sparkline, state, total_steps, watch

pytestmark = pytest.mark.unit

STEP = {
    "gtpo/acc/mean": 0.25,
    "gtpo/tool/outcome_total/ok": 9.0,
    "gtpo/tool/outcome_total/error": 1.0,
    "gtpo/rows/valid_total": 7.0,
    "gtpo/rows/dropped_total": 1.0,
    "gtpo/rows/infra_total": 1.0,
    "gtpo/rows/lost_total": 0.0,
    "timing_s/step": 3.0,
}


@pytest.fixture
def record(tmp_path):
    record = RunRecord(tmp_path)
    record.write_config({"method": "gtpo", "task.name": "arithmetic", "seed": 3, "trainer.total_training_steps": 4})
    record.write_metrics(0, {"val-core/arithmetic/acc/mean@1": 0.125})
    record.write_metrics(1, STEP)
    record.write_metrics(
        2, STEP | {"gtpo/acc/mean": 0.75, "gtpo/rows/lost_total": 2.0, "actor/grad_norm": float("nan")}
    )
    return record


def test_a_rollout_that_goes_on_is_counted(record):
    record.write_rollout(3, "train", 1, 4)
    assert describe(record, record.last_write())[0][2] == "  rollout of step 3: 1 of 4 prompts done"
    record.write_rollout(3, "validation", 3, 4)
    assert describe(record, record.last_write())[0][2] == "  validation of step 3: 3 of 4 prompts done"
    record.write_rollout(3, "validation", 4, 4)
    assert "prompts done" not in "\n".join(describe(record, record.last_write())[0])
    record.write_rollout(3, "train", 1, 4)
    record.write_cause("interrupted")
    assert "prompts done" not in "\n".join(describe(record, record.last_write())[0])


@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.integers(1, 50))
def test_a_sparkline_has_a_bar_a_value_up_to_its_width_and_rises_with_them(values, width):
    drawn = sparkline(values, width)
    assert len(drawn) == min(len(values), width)
    bars = sparkline(sorted(values), width)
    assert bars == "".join(sorted(bars))


def test_bars_are_between_the_least_and_the_greatest():
    assert sparkline([0.0, 7.0, 3.0]) == "▁█▄"
    assert sparkline([2.0, 2.0]) == "▁▁" and sparkline([]) == ""
    assert sparkline([0.0, 2.0, 8.0, 8.0], width=2) == "▁█"  # means of neighbours


def test_how_far_a_run_goes_is_what_the_latest_start_said():
    first, longer = {"command": ["main", "trainer.total_training_steps=4"]}, {"command": ["main", "seed=1"]}
    config = {"trainer.total_training_steps": 8}
    assert total_steps([longer, first], config) == 4
    assert total_steps([first, longer], config) == 8
    assert total_steps([], {}) is None and total_steps([], {"trainer.total_training_steps": None}) is None


def test_a_step_takes_what_the_latest_ones_took_with_their_validations():
    lines = [{"metrics": {"timing_s/step": 100.0}}] + [{"metrics": {"timing_s/step": 2.0}}] * 9
    assert seconds_a_step([*lines, {"metrics": {"timing_s/step": 2.0, "timing_s/testing": 10.0}}]) == 3.0
    assert seconds_a_step([{"metrics": {}}]) is None


@pytest.mark.parametrize(
    ("given", "said", "ended"),
    [
        ((2, 4, None, None, 5.0, 3.0), "running, about 6 s left; wrote 5 s ago", False),
        ((0, 4, None, None, 5.0, None), "running; wrote 5 s ago", False),
        ((9, None, None, None, 5.0, 3.0), "running; wrote 5 s ago", False),
        ((2, 4, None, None, 700.0, 3.0), "silent for 12 min, where a step takes 3 s: killed, or stuck", False),
        ((2, 4, None, None, 700.0, 300.0), "running, about 10 min left; wrote 12 min ago", False),
        ((0, 4, None, None, 7300.0, None), "silent for 2.0 h: killed, or stuck", False),
        ((4, 4, {}, None, 1e6, 3.0), "done", True),
        ((4, None, {}, None, 1e6, 3.0), "done", True),
        ((4, 8, {}, None, 5.0, 3.0), "running, about 12 s left; wrote 5 s ago", False),  # a longer run goes on
        ((4, 8, {}, "the rollout server died", 5.0, 3.0), "ended early: the rollout server died", True),
    ],
)
def test_a_run_is_alive_done_silent_or_ended_by_a_cause(given, said, ended):
    assert state(*given) == (said, ended)


def test_the_screen_of_a_run(record):
    screen, ended = describe(record, record.last_write() + 5)
    assert not ended and [line.rstrip() for line in screen] == [
        f"gtpo on arithmetic, seed 3: {record.dir}",
        "step 2 of 4, running, about 6 s left; wrote 5 s ago",
        "  accuracy, held out ▁  0.125 (step 0) -> 0.125 (step 0)",
        "  accuracy, training ▁█ 0.25 (step 1) -> 0.75 (step 2)",
        "  seconds a step     ▁▁ 3 (step 1) -> 3 (step 2)",
        "  calls of step 2: 9 ok, 1 error",
        "  trajectories of step 2: 7 trained on, 1 dropped, 1 failed by the tool server, 2 lost; "
        "of 2 steps: 2 dropped, 2 failed by the tool server, 2 lost",
        "  warning: 1 metrics are no finite number, the latest actor/grad_norm = nan in step 2",
    ]


def test_a_run_without_a_config_is_named_by_its_summary(tmp_path):
    record = RunRecord(tmp_path)
    record.write_metrics(0, {})
    record.write_summary({"method": "grpo", "task": "sums", "seed": 2, "steps": [0, 0]})
    assert describe(record, 0.0) == ([f"grpo on sums, seed 2: {tmp_path}", "step 0 of ?, done"], True)


def test_a_run_that_has_only_started_has_a_screen(tmp_path):
    record = RunRecord(tmp_path)
    record.write_start(seed=1)
    assert describe(record, record.last_write())[0][1].startswith("step 0 of ?, running; wrote 0 s ago")


def test_an_evaluation_that_has_its_report_has_ended(tmp_path):
    record = RunRecord(tmp_path)
    record.write_start(1)
    record.write_metrics(40, {"val-core/arithmetic/acc/mean@4": 0.8})
    assert not describe(record, record.last_write())[1]
    record.write_evaluation_report({})
    screen, ended = describe(record, record.last_write() + 1e6)
    assert ended and screen[1] == "step 40 of ?, evaluated"


def test_a_sign_of_life_is_any_file_that_a_run_writes_while_it_goes_on(record):
    os.utime(record.metrics_path, (1, 1))
    assert record.last_write() == 1.0
    record.write_trajectories(3, [])
    assert record.last_write() > 1.0
    assert RunRecord(record.dir / "nothing").last_write() == 0.0


def test_a_watch_speaks_until_the_run_has_ended(record):
    out, pauses = io.StringIO(), []

    def pause():
        pauses.append(out.getvalue().count("step 2 of 4, running"))
        if len(pauses) == 2:
            record.write_cause("interrupted")

    watch(record, out, pause)
    assert pauses == [1, 2] and "step 2 of 4, ended early: interrupted" in out.getvalue()
    assert "\x1b" not in out.getvalue()  # no screen to clear


def test_a_reader_that_has_seen_enough_is_no_error(record):
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does
    command = [sys.executable, "-m", "recipe.gtpo.status", str(record.dir)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_that_is_no_runs_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"status: error: {tmp_path}: no run's folder (neither metrics.jsonl nor versions.json)\n"
    )


def test_the_command_prints_the_screen(record, capsys):
    assert main([str(record.dir)]) == 0
    assert "step 2 of 4" in capsys.readouterr().out
