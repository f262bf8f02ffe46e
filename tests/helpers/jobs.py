"""The main job on one GPU at toy size, and what it measured of itself."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from runs import TOY

from recipe.gtpo.run import memory
from recipe.gtpo.run.gpu import asked_for, shape_of
from recipe.gtpo.run.machine import gpus
from recipe.gtpo.run.memory import Machines
from recipe.gtpo.run.record import RunRecord

METHODS = ("gtpo", "grpo")
ATTENTIONS = ("sdpa", "flash_attention_2")
ROLLOUTS = ("transformers", "vllm")

#: A tiny model beside a whole card: no graphs to capture, no share to fill, no room for a thousand trajectories.
SMALL_ROLLOUT = {
    "vllm": ("actor_rollout_ref.rollout.enforce_eager=true", "actor_rollout_ref.rollout.gpu_memory_utilization=0.3"),
    "transformers": ("actor_rollout_ref.rollout.max_num_seqs=64",),
}


def on_one_gpu(rollout: str) -> list[str]:
    return ["hardware=single_gpu", f"rollout={rollout}", *SMALL_ROLLOUT[rollout]]


def job_overrides(rollout: str, method: str, attention: str, folder: Path) -> list[str]:
    """Of two steps: the embedded policy and task, with a checkpoint after each step."""
    return [
        *TOY,
        *(*on_one_gpu(rollout), f"method={method}", "trainer.total_training_steps=2"),
        f"actor_rollout_ref.model.override_config.attn_implementation={attention}",
        *(f"run_dir={folder}/run", f"task.cache={folder}/policy"),
    ]


def real_model(folder: Path) -> list[str]:
    """A model in the embedded policy's place, whose tokenizer has other lengths."""
    return [f"actor_rollout_ref.model.path={folder}", "data.max_prompt_length=256", "data.max_response_length=256"]


def evaluation_arguments(rollout: str, run: Path, folder: Path) -> list[str]:
    """Of the command that evaluates the run's last checkpoint and its base model."""
    return [
        *(f"model={run}", "benchmarks=arithmetic", "samples=2", "compare=base", f"run_dir={folder}"),
        *on_one_gpu(rollout),
    ]


def evaluation_job(arguments: list[str], seconds: float = 900) -> dict[str, Any]:
    """Run the command; its evaluation.json. AssertionError with the end of the output where it fails."""
    folder = run_module("recipe.gtpo.evaluate", arguments, seconds)
    return json.loads((folder / "evaluation.json").read_text())


def main_job(overrides: list[str], seconds: float = 900) -> dict[str, float]:
    """Run the command; what it measured, beside what was added up before. AssertionError as above."""
    with peak_of_card() as card:
        folder = run_module("recipe.gtpo.main", overrides, seconds)
    record = RunRecord(folder)
    return measured(record.read_metrics()[-1]) | planned(record) | card


def run_module(module: str, arguments: list[str], seconds: float) -> Path:
    """The folder that it was told to write to."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Path(next(one.split("=", 1)[1] for one in arguments if one.startswith("run_dir=")))


@contextmanager
def peak_of_card(seconds: float = 0.5) -> Iterator[dict[str, float]]:
    """The most that all processes together had of the first GPU, as nvidia-smi shows it; known when the block ends."""
    over = threading.Event()

    def used() -> float:
        return max((gpu.used / memory.GB for gpu in gpus.__wrapped__()[:1]), default=0.0)  # not the one answer it keeps

    found = {"card/before_gb": used(), "card/peak_gb": 0.0}

    def watch() -> None:
        while not over.wait(seconds):
            found["card/peak_gb"] = max(found["card/peak_gb"], used())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def planned(record: RunRecord) -> dict[str, float]:
    """The sums of recipe/gtpo/run/memory.py for a run on one GPU, with the settings that it had."""
    config = OmegaConf.create()
    for key, value in (record.read_config() or {}).items():
        OmegaConf.update(config, key, value)
    settings, chosen = asked_for(config)
    settings = replace(settings, **chosen)
    shape, machines = shape_of(config), Machines(1, gpus()[0].memory)
    phases = {"update": memory.update, "generation": memory.generation}
    return {f"planned/{name}_gb": sum(f(shape, machines, settings).values()) / memory.GB for name, f in phases.items()}


def measured(metrics: dict[str, Any]) -> dict[str, float]:
    """Seconds by phase, memory, and how far rollout and trainer are apart."""
    wanted = ("timing_s/", "actor/perf/max_memory", "training/rollout_probs_diff_m", "gtpo/log_prob_gap/mean")
    flat = metrics.get("metrics", metrics)
    return {key: value for key, value in flat.items() if key.startswith(wanted)}
