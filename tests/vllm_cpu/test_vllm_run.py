"""The command of the README with rollout=vllm_cpu at toy size: training, validation, checkpoint, an engine that is
killed, and the start that goes on. The two tests tell one story, in order.
"""

from __future__ import annotations

import time

import pytest
from runs import start

from recipe.gtpo.run.progress import validation_accuracy
from recipe.gtpo.run.record import RunRecord, latest_checkpoint

pytestmark = pytest.mark.vllm

ENGINE = "VLLM::EngineCore"  # vLLM's own title of the process that holds the model
START = 600  # seconds: vLLM's processes import for long on a busy machine
GAP = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


def run_of(folder, steps):
    # The toy policy's trajectories all earn the same: without a term for entropy, no weight would ever change.
    overrides = ("actor_rollout_ref.actor.entropy_coeff=0.1", f"trainer.total_training_steps={steps}")
    return start(folder, "rollout=vllm_cpu", "watchdog.poll_seconds=2", *overrides)


def test_a_run_that_loses_its_engine_ends_within_a_minute_with_the_cause(folder):
    with run_of(folder, 100000) as run:
        run.wait_for_step(1, START)
        run.find(ENGINE).kill()
        began = time.monotonic()
        assert run.wait(60) != 0
        print(f"ended {time.monotonic() - began:.0f} s after its engine")
        line = run.last_line()
        assert line.startswith("gtpo: error: the rollout server lost its engine: "), run.text()[-2000:]
        assert run.left_behind() == []


def test_the_next_start_goes_on_and_trains_with_the_weights_that_it_samples_with(folder):
    record = RunRecord(folder / "run")
    saved = latest_checkpoint(record.dir / "checkpoints")
    assert saved is not None
    total = saved + 2
    with run_of(folder, total) as run:
        assert run.wait(START) == 0, run.text()[-3000:]
        assert f"going on from the checkpoint of step {saved}" in run.text()
        assert run.last_line() == f"outputs: {record.dir}"
        assert run.left_behind() == []
    lines = record.read_metrics()
    assert [line["step"] for line in lines] == list(range(total + 1))
    for line in lines:
        assert validation_accuracy(line["metrics"]) is not None or (line["step"] % 2 and line["step"] < total)
        if line["step"]:
            assert line["metrics"]["actor/grad_norm"] > 0
            assert line["metrics"]["gtpo/log_prob_gap/mean"] < GAP
            assert line["metrics"]["training/rollout_probs_diff_max"] < GAP
    for step in range(1, total + 1):
        rows = record.read_trajectories(step)
        assert len(rows) == 4  # two prompts x two rollouts
        for row in rows:
            assert all(turn["log_prob_gap"] < GAP for turn in row["turns"])
    assert "cpu" in record.read_starts()[-1]["packages"]["vllm"]
