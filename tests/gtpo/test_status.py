"""What a look at a run folder says: how far, how well, what was lost, why it ended."""

from __future__ import annotations

import pytest

from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.status import describe, main, sparkline

pytestmark = pytest.mark.unit


@pytest.fixture
def record(tmp_path):
    record = RunRecord(tmp_path)
    record.write_start(seed=3)
    record.write_config({"method": "gtpo", "task.name": "sums", "trainer.total_training_steps": 10})
    return record


def train(record, steps):
    record.write_metrics(0, {"val-core/sums/acc/mean@1": 0.25})
    for step in steps:
        metrics = {"timing_s/step": 2.0, "gtpo/acc/mean": step / 10, "gtpo/rows/lost_total": 1.0}
        record.write_metrics(step, metrics | ({"val-core/sums/acc/mean@1": 0.5} if step % 2 == 0 else {}))


def page(record, after=0.0):
    return describe(record, now=record.metrics_path.stat().st_mtime + after).splitlines()


def test_a_curve_goes_from_the_lowest_bar_to_the_highest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.0]) == "▁▁" and sparkline([]) == ""
    assert sparkline([float(i // 100) for i in range(800)], width=8) == "▁▂▃▄▅▆▇█"  # means of neighbours


def test_a_run_that_goes_on(record):
    train(record, range(1, 5))
    lines = page(record, after=65)
    assert lines[0] == f"gtpo on sums, seed 3: {record.dir}"
    assert lines[1] == "step 4 of 10, 2 s a step, about 0:00:12 left; the last line is 0:01:05 old"
    assert "  held-out accuracy           0.25  ▁██  0.5" in lines
    assert "  training accuracy            0.1  ▁▃▆█  0.4" in lines
    assert "  trajectories lost: 4, failed by the tool server: 0, dropped: 0" in lines


def test_a_run_that_has_not_begun_to_train(record):
    assert "step 0 of 10: no training step yet" in describe(record)


def test_a_run_that_ended_says_why(record):
    train(record, range(1, 3))
    record.write_cause("the tool server died: pid 7")
    assert page(record)[1] == "step 2 of 10: ended early: the tool server died: pid 7"
    record.drop_cause()
    record.write_summary({"steps": [0, 10]})
    train(record, range(3, 11))
    assert page(record)[1] == "step 10 of 10: complete"


def test_a_number_that_is_not_finite_is_shown(record):
    train(record, [1])
    record.write_metrics(2, {"timing_s/step": 2.0, "actor/grad_norm": float("nan")})
    assert page(record)[-1] == "  not finite: 1 numbers, the last one actor/grad_norm=nan in step 2"


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"status: error: {tmp_path} holds no run: it has no versions.json\n"
