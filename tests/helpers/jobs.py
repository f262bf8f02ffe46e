"""The main job on one GPU at toy size, and what it measured of itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from runs import TOY

from recipe.gtpo.run.record import RunRecord

METHODS = ("gtpo", "grpo")
ATTENTIONS = ("sdpa", "flash_attention_2")


def job_overrides(method: str, attention: str, folder: Path) -> list[str]:
    """Of two steps with vLLM: the embedded policy and task, with a checkpoint after each step."""
    return [
        *TOY,
        *("hardware=single_gpu", "rollout=vllm", f"method={method}", "trainer.total_training_steps=2"),
        f"actor_rollout_ref.model.override_config.attn_implementation={attention}",
        *(f"run_dir={folder}/{method}-{attention}", f"task.cache={folder}/policy"),
        # a tiny model beside a whole card: no graphs to capture, no share to fill
        *("actor_rollout_ref.rollout.enforce_eager=true", "actor_rollout_ref.rollout.gpu_memory_utilization=0.3"),
    ]


def real_model(folder: Path) -> list[str]:
    """A model in the embedded policy's place, whose tokenizer has other lengths."""
    return [f"actor_rollout_ref.model.path={folder}", "data.max_prompt_length=256", "data.max_response_length=256"]


def evaluation_arguments(run: Path, folder: Path) -> list[str]:
    """Of the command that evaluates the run's last checkpoint and its base model with vLLM."""
    return [
        *(f"model={run}", "benchmarks=arithmetic", "samples=2", "compare=base", f"run_dir={folder}"),
        *("hardware=single_gpu", "rollout=vllm"),
        *("actor_rollout_ref.rollout.enforce_eager=true", "actor_rollout_ref.rollout.gpu_memory_utilization=0.3"),
    ]


def evaluation_job(arguments: list[str], seconds: float = 900) -> dict[str, Any]:
    """Run the command; its evaluation.json. AssertionError with the end of the output where it fails."""
    command = [sys.executable, "-W", "ignore", "-m", "recipe.gtpo.evaluate", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = next(one.split("=", 1)[1] for one in arguments if one.startswith("run_dir="))
    return json.loads((Path(folder) / "evaluation.json").read_text())


def main_job(overrides: list[str], seconds: float = 900) -> dict[str, Any]:
    """Run the command; its last step's metrics. AssertionError with the end of the output where it fails."""
    command = [sys.executable, "-W", "ignore", "-m", "recipe.gtpo.main", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = next(one.split("=", 1)[1] for one in overrides if one.startswith("run_dir="))
    return RunRecord(Path(folder)).read_metrics()[-1]


def measured(metrics: dict[str, Any]) -> dict[str, float]:
    """Seconds by phase, memory, and how far rollout and trainer are apart."""
    wanted = ("timing_s/", "perf/max_memory", "training/rollout_probs_diff_m", "gtpo/log_prob_gap/mean")
    flat = metrics.get("metrics", metrics)
    return {key: value for key, value in flat.items() if key.startswith(wanted)}
