"""Protects what the user reads of a run: the bar's numbers, and the last lines with the accuracy before and after."""

from __future__ import annotations

import io
import json
import time

import pytest
from omegaconf import OmegaConf

from recipe.gtpo.run import progress
from recipe.gtpo.run.progress import Progress, summarize, validation_accuracy
from recipe.gtpo.run.record import RunRecord

pytestmark = pytest.mark.unit

CONFIG = OmegaConf.create({"method": "gtpo", "task": {"name": "arithmetic"}, "seed": 3})


def validation(acc: float, **aux: float) -> dict[str, float]:
    """verl's names: the core metric by its best@/mean@ n, the others under val-aux."""
    metrics = {"val-core/arithmetic/acc/mean@2": acc, "val-core/arithmetic/acc/best@2/mean": 1.0}
    return metrics | {f"val-aux/arithmetic/{name}/mean@2": value for name, value in aux.items()}


def training(acc: float, turns: float = 2.0) -> dict[str, float]:
    return {"gtpo/acc/mean": acc, "gtpo/turns/mean": turns}


@pytest.fixture
def record(tmp_path):
    return RunRecord(tmp_path)


def test_a_validation_that_takes_long_says_how_far_it_is(record, monkeypatch):
    monkeypatch.setattr(progress, "_SAY_SECONDS", 0.0)
    record.write_rollout(0, "validation", 9, 96)  # of an earlier start: not said
    out = io.StringIO()
    shown = Progress(record, 4, out)
    for split, done in [("validation", 9), ("validation", 24), ("validation", 24), ("validation", 96), ("train", 1)]:
        record.write_rollout(0, split, done, 96)
        shown._draw()
    assert out.getvalue() == "step 0: validation, 24 of 96 prompts done\n"


def test_accuracy_is_the_mean_over_validation_sets():
    metrics = {"val-core/a/acc/mean@2": 0.25, "val-core/b/acc/mean@4": 0.75, "val-core/a/reward/mean@2": 9.0}
    assert validation_accuracy(metrics) == 0.5
    assert validation_accuracy(training(1.0)) is None


def test_the_summary_compares_the_first_and_the_last_validation(record, capsys):
    record.write_metrics(0, validation(0.25, first_turn_call=0.5, malformed_call=0.4, tool_error=0.3, turns=2.5))
    record.write_metrics(1, training(0.3))
    record.write_metrics(2, training(0.4) | validation(0.5, first_turn_call=0.75))
    record.write_metrics(3, training(0.9))  # not validated: no summary number
    summary = summarize(record, CONFIG, seconds=12.345)
    assert summary == {
        "method": "gtpo",
        "task": "arithmetic",
        "horizon": None,
        "seed": 3,
        "steps": [0, 2],
        "accuracy": [0.25, 0.5],
        "first_turn_call": [0.5, 0.75],
        "malformed_call": [0.4, None],
        "tool_error": [0.3, None],
        "turns": [2.5, None],
        "seconds": 12.3,
    }
    assert json.loads((record.dir / "summary.json").read_text()) == summary
    lines = capsys.readouterr().out.splitlines()
    assert "held-out accuracy                0.250     0.500" in lines
    assert "first turn calls the tool        0.500     0.750" in lines
    assert not any("malformed" in line for line in lines)  # one of its two numbers is missing
    assert lines[-1] == f"outputs: {record.dir}"


def test_the_summary_names_the_horizon_of_a_task_that_has_one(record):
    record.write_metrics(0, validation(0.25))
    assert summarize(record, OmegaConf.merge(CONFIG, {"task": {"horizon": 4}}))["horizon"] == 4


def test_a_run_without_validation_says_so_and_is_complete_all_the_same(record, capsys):
    """Without a summary a comparison would train it twice and call it failed."""
    record.write_metrics(1, training(0.5))
    summary = summarize(record, CONFIG)
    assert (summary["steps"], summary["accuracy"]) == ([0, 1], [None, None])
    assert "without validation" in capsys.readouterr().out
    assert record.read_summary() == summary


def test_the_bar_shows_the_latest_step_and_validation_its_own_line(record):
    out = io.StringIO()
    with Progress(record, total_steps=4, out=out):
        record.write_metrics(0, validation(0.25))
        record.write_metrics(1, training(0.5, turns=2.25))
        record.write_metrics(2, training(0.75, turns=2.5) | validation(0.5))
    shown = out.getvalue()
    assert "step 0: held-out accuracy 0.250\n" in shown
    assert "step 2: held-out accuracy 0.500" in shown
    assert "2/4" in shown and "acc=0.75 turns=2.5" in shown


def test_the_bar_counts_where_the_number_of_steps_is_not_known(record):
    out = io.StringIO()
    with Progress(record, None, out):
        record.write_metrics(1, training(0.5))
    assert "training: 1step" in out.getvalue()


def test_numbers_that_are_not_finite_and_rows_left_out_are_said(record):
    out = io.StringIO()
    left_out = {"gtpo/data/too_long_total": 3.0, "gtpo/validation/too_long_total": 0.0}
    with Progress(record, total_steps=4, out=out):
        record.write_metrics(1, training(0.5) | left_out)
        record.write_metrics(2, training(0.5) | left_out | {"actor/grad_norm": float("nan")})
    shown = out.getvalue()
    assert shown.count("warning: 3 training rows are left out: prompts longer than data.max_prompt_length") == 1
    assert shown.count("warning: step 2: actor/grad_norm is nan") == 1


def test_a_resumed_run_goes_on_from_the_steps_it_has(record):
    record.write_metrics(0, validation(0.25))
    record.write_metrics(1, training(0.5))
    out = io.StringIO()
    with Progress(record, total_steps=4, out=out):
        record.write_metrics(2, training(0.75))
    assert "held-out" not in out.getvalue()  # said by the run before
    assert "2/4" in out.getvalue() and "1/4" in out.getvalue()


def test_steps_that_a_resumed_run_does_again_are_shown_again(record, monkeypatch):
    monkeypatch.setattr(progress, "_POLL_SECONDS", 0.01)
    for step in range(4):
        record.write_metrics(step, training(0.1))
    out = io.StringIO()
    with Progress(record, total_steps=4, out=out) as shown:
        record.forget_after(1)  # the trainer, when it has loaded its checkpoint
        deadline = time.monotonic() + 10
        while shown._seen != 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        record.write_metrics(2, training(0.25))
    assert "2/4" in out.getvalue() and "acc=0.25" in out.getvalue()
