"""The command of the README at toy size, and all that can happen to a run: each of its parts dies, Ctrl-C, the end.

One run folder goes through it all: every start is the same command again, and goes on where the one before was ended.
The tests tell the story in order, but each takes the folder as it finds it, so that one that fails does not decide the
next.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from runs import Run, start

from recipe.gtpo.method.turns import Trajectory
from recipe.gtpo.run.progress import validation_accuracy
from recipe.gtpo.run.record import RunRecord, latest_checkpoint
from verl_ext.records import Reader

pytestmark = pytest.mark.e2e


class Life:
    """The run folder of this module, and how often it was started."""

    def __init__(self, folder):
        self.folder = folder
        self.record = RunRecord(folder / "run")
        self.starts = 0

    @property
    def saved(self) -> int:
        """The step that the next start goes on from."""
        return latest_checkpoint(self.record.dir / "checkpoints") or 0

    @contextmanager
    def start(self, total: int) -> Iterator[Run]:
        self.starts += 1
        with start(self.folder, f"trainer.total_training_steps={total}", "watchdog.poll_seconds=2") as run:
            yield run

    @contextmanager
    def training(self) -> Iterator[Run]:
        """A start in the middle of its training, from the step after the checkpoint on."""
        saved = self.saved
        before = [line for line in self.raw_lines() if json.loads(line)["step"] <= saved]
        with self.start(total=100000) as run:
            run.wait_for_step(saved + 1)  # a step has a line only after it has a checkpoint: this one is of this start
            assert f"going on from the checkpoint of step {saved}" in run.text() or saved == 0
            assert self.raw_lines()[: len(before)] == before  # of the steps that were done, it did none again
            yield run

    def raw_lines(self) -> list[str]:
        path = self.record.metrics_path
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    return Life(tmp_path_factory.mktemp("life"))


# (part of the process's command line, what the last line must name)
PARTS = [
    pytest.param("ray::TransformersServer", "the rollout server died", id="rollout-server"),
    pytest.param("ray::WorkerDict", "the training worker died", id="training-worker"),
    pytest.param("ray::AgentLoopWorkerTQ", "the agent loop worker died", id="agent-loop-worker"),
    pytest.param("-m verl_ext.tool_server", "the tool server died", id="tool-server"),
]


@pytest.mark.parametrize(("title", "named"), PARTS)
def test_a_run_that_loses_a_part_ends_and_names_it(life, title, named):
    """Non-zero within 60 s, the part in the last line, no process left."""
    with life.training() as run:
        run.find(title).kill()
        status = run.wait(60)
        assert status != 0
        assert run.last_line().startswith("gtpo: error: ") and named in run.last_line(), run.text()[-2000:]
        assert run.left_behind() == []


@pytest.mark.parametrize(
    ("number", "status", "cause"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated (SIGTERM)")],
    ids=["ctrl-c", "sigterm"],
)
def test_a_run_that_is_told_to_end_says_so_and_leaves_no_process(life, number, status, cause):
    with life.training() as run:
        run.process.send_signal(number)
        assert run.wait(60) == status
        assert run.last_line() == f"gtpo: error: {cause}"
        assert life.record.read_cause() == cause
        assert run.left_behind() == []
    assert life.saved >= life.record.read_metrics()[-1]["step"] >= 1


def test_the_last_start_trains_to_the_end_and_leaves_the_record_of_one_run(life):
    total = life.saved + 2
    with life.start(total) as run:
        assert run.wait(400) == 0, run.text()[-3000:]
        assert run.left_behind() == []
    record = life.record
    lines = record.read_metrics()
    # No step is lost, none is there twice, none is beyond the limit, as read and in the file.
    assert [line["step"] for line in lines] == list(range(total + 1))
    assert [json.loads(line)["step"] for line in life.raw_lines()] == list(range(total + 1))
    for line in lines:
        step, metrics = line["step"], line["metrics"]
        assert step == 0 or "gtpo/acc/mean" in metrics
        assert validated(line) or (step % 2 and step < total)  # trainer.test_freq=2
    metrics = lines[-1]["metrics"]
    assert metrics["training/rollout_probs_diff_mean"] < 1e-4  # the sampler has the policy's weights
    assert metrics["actor/grad_norm"] >= 0
    assert "val-core/arithmetic/acc/mean@1" in metrics
    assert record.trajectory_steps() == list(range(1, total + 1))
    for step in record.trajectory_steps():
        rows = record.read_trajectories(step)
        assert len(rows) == 4  # two prompts x two rollouts
        for row in rows:
            assert Trajectory.from_dict(row).turns and row["prompt"] and row["gold"]
            assert all(None not in (turn["reward"], turn["return"], turn["advantage"]) for turn in row["turns"])
    # A start that goes on from a step validates it again, also where the step's line has no validation.
    assert {line["step"] for line in lines if validated(line)} <= {*Reader(record.dir).steps("validation")}
    summary = record.read_summary()
    assert summary["steps"] == [0, total] and summary["method"] == "gtpo"
    starts = record.read_starts()
    assert len(starts) == life.starts
    assert starts[0]["packages"]["verl"] == "0.9.1" and starts[0]["seed"] == 1
    assert list((record.dir / "hydra").glob("*/config.yaml"))


def validated(line) -> bool:
    return validation_accuracy(line["metrics"]) is not None


def test_a_complete_run_is_not_trained_again(life):
    if life.record.read_summary() is None:
        pytest.skip("the run has not reached its end: see the test before")
    before = life.raw_lines()
    with life.start(life.saved) as again:
        assert again.wait(120) == 0
    assert "this run is complete" in again.last_line()
    assert life.raw_lines() == before
