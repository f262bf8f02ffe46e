"""The command of the README, end to end at toy size: trains, records, resumes, and cleans up after itself."""

from __future__ import annotations

import json
import signal

import pytest
from runs import start

from recipe.gtpo.method.turns import Trajectory

pytestmark = pytest.mark.e2e


def test_a_run_trains_and_leaves_its_record(tmp_path):
    with start(tmp_path, "trainer.total_training_steps=2") as run:
        assert run.wait(300) == 0, run.text()[-3000:]
        assert run.left_behind() == []
    lines = run.record.read_metrics()
    assert [line["step"] for line in lines] == [0, 1, 2]
    metrics = lines[2]["metrics"]
    assert metrics["training/rollout_probs_diff_mean"] < 1e-4  # the sampler has the policy's weights
    assert metrics["actor/grad_norm"] >= 0 and "gtpo/acc/mean" in metrics
    assert "val-core/arithmetic/acc/mean@1" in metrics
    rows = [json.loads(line) for line in (run.record.dir / "trajectories" / "1.jsonl").read_text().splitlines()]
    assert len(rows) == 4  # two prompts x two rollouts
    for row in rows:
        assert len(row["turn_rewards"]) == len(row["advantages"]) == len(Trajectory.from_dict(row).turns)
    summary = json.loads((run.record.dir / "summary.json").read_text())
    assert summary["steps"] == [0, 2] and summary["method"] == "gtpo"
    versions = json.loads((run.record.dir / "versions.json").read_text())
    assert versions[0]["packages"]["verl"] == "0.9.1" and versions[0]["seed"] == 1
    assert (run.record.dir / "hydra" / "config.yaml").exists()

    with start(tmp_path, "trainer.total_training_steps=2") as again:
        assert again.wait(120) == 0
    assert "this run is complete" in again.last_line()


def test_ctrl_c_leaves_no_process_and_the_next_start_goes_on(tmp_path):
    with start(tmp_path, "trainer.total_training_steps=100000") as run:
        run.wait_for_step(2)
        run.process.send_signal(signal.SIGINT)
        assert run.wait(60) == 130
        assert run.last_line() == "gtpo: error: interrupted"
        assert run.left_behind() == []
    saved = int((run.record.dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    done = run.record.read_metrics()[-1]["step"]
    assert saved >= done - 1 >= 1

    with start(tmp_path, f"trainer.total_training_steps={saved + 2}") as resumed:
        assert resumed.wait(300) == 0, resumed.text()[-3000:]
        assert resumed.left_behind() == []
    lines = run.record.read_metrics()
    assert [line["step"] for line in lines] == list(range(saved + 3))  # no step lost, none beyond the limit
    assert len(json.loads((run.record.dir / "versions.json").read_text())) == 2
    # It went on from the checkpoint: the second start has no step before it.
    raw = [json.loads(line)["step"] for line in run.record.metrics_path.read_text().splitlines()]
    assert min(raw[len(range(done + 1)) :]) >= saved
