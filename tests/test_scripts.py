"""Protects the shell scripts: they pass shellcheck, and the one that trains takes what the machine's GPUs call for."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from gpus import nvidia_smi

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]
FORMS = ("examples/**/*.sh", "examples/**/*.sbatch", "tests/*.sh")
SCRIPTS = sorted(path for form in FORMS for path in ROOT.glob(form))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(script):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "bash examples/setup_env.sh cpu dev brings it"
    done = subprocess.run(
        [shellcheck, "-x", "-S", "style", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A copy of the scripts and an environment whose python notes what it is called with."""

    def of(count: int, stack: str) -> list[str]:
        shutil.copytree(ROOT / "examples", tmp_path / "examples")
        for name in ("requirements", "pyproject.toml", "requirements.txt"):
            (tmp_path / name).symlink_to(ROOT / name)
        texts = [ROOT / "requirements.txt", *sorted((ROOT / "requirements").glob("*.txt")), ROOT / "pyproject.toml"]
        stamp = hashlib.sha256(b"".join(path.read_bytes() for path in texts)).hexdigest()[:16]
        (tmp_path / "venv/bin").mkdir(parents=True)
        (tmp_path / "venv/.installed").write_text(f"{stamp}-{stack}")
        (tmp_path / "venv/bin/python").write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/called\n')
        (tmp_path / "venv/bin/python").chmod(0o755)
        nvidia_smi(tmp_path, count)
        return ["bash", str(tmp_path / "examples/run_gtpo_qwen.sh")]

    def run(count: int, *arguments: str, prepared: bool = False) -> list[str]:
        on_gpus = count and "hardware=cpu" not in arguments
        command = of(count, "vllm" if on_gpus else "vllm_cpu" if "rollout=vllm_cpu" in arguments else "cpu")
        if prepared:
            (tmp_path / "outputs/data/math").mkdir(parents=True)
            (tmp_path / "outputs/data/math/manifest.json").touch()
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VENV": str(tmp_path / "venv")}
        subprocess.run([*command, *arguments], check=True, env=environment, timeout=30, capture_output=True)
        return (tmp_path / "called").read_text().splitlines()

    return run


PREPARE = "-m recipe.gtpo.data prepare task=math"


@pytest.mark.parametrize(
    ("count", "arguments", "called"),
    [
        (0, [], ["-m recipe.gtpo.main hardware=cpu rollout=transformers"]),
        (0, ["rollout=vllm_cpu"], ["-m recipe.gtpo.main hardware=cpu rollout=vllm_cpu rollout=vllm_cpu"]),
        (1, [], [PREPARE, "-m recipe.gtpo.main hardware=single_gpu rollout=vllm task=math"]),
        (8, ["seed=2"], [PREPARE, "-m recipe.gtpo.main hardware=single_node rollout=vllm task=math seed=2"]),
        (8, ["task=gsm8k"], ["-m recipe.gtpo.main hardware=single_node rollout=vllm task=gsm8k"]),
        (8, ["task.folder=mine"], ["-m recipe.gtpo.main hardware=single_node rollout=vllm task=math task.folder=mine"]),
        (1, ["experiment=horizon4"], ["-m recipe.gtpo.main hardware=single_gpu rollout=vllm experiment=horizon4"]),
        (1, ["hardware=cpu"], ["-m recipe.gtpo.main hardware=cpu rollout=transformers hardware=cpu"]),
    ],
)
def test_the_script_takes_task_and_hardware_from_what_the_machine_has(machine, count, arguments, called):
    assert machine(count, *arguments) == called


def test_data_that_are_there_are_not_fetched_again(machine):
    assert machine(1, prepared=True) == ["-m recipe.gtpo.main hardware=single_gpu rollout=vllm task=math"]


def test_the_cluster_file_is_one_that_ray_takes():
    # Ray has no public check of such a file; this breaks when it moves.
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "examples/ray/cluster.yaml").read_text())
    validate_config(prepare_config(config))
