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
def machine(tmp_path):
    """A copy of the scripts, and an environment of each stack in its own folder, whose python notes what it is called
    with."""
    for name in ("examples", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name in ("requirements", "pyproject.toml", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    texts = [ROOT / "requirements.txt", *sorted((ROOT / "requirements").glob("*.txt")), ROOT / "pyproject.toml"]
    stamp = hashlib.sha256(b"".join(path.read_bytes() for path in texts)).hexdigest()[:16]
    for stack, folder in (("cpu", ".venv"), ("vllm_cpu", ".venv-vllm_cpu"), ("vllm", ".venv-vllm")):
        (tmp_path / folder / "bin").mkdir(parents=True)
        (tmp_path / folder / ".installed").write_text(f"{stamp}-{stack}+dev+smollm2")
        python = tmp_path / folder / "bin/python"
        python.write_text(f'#!/bin/sh\necho "{folder} $*" >>{tmp_path}/called\n')
        python.chmod(0o755)

    def run(count: int, script: str, *arguments: str) -> list[str]:
        nvidia_smi(tmp_path, count)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = ["bash", str(tmp_path / script), *arguments]
        subprocess.run(command, check=True, env=environment, timeout=30, capture_output=True)
        return (tmp_path / "called").read_text().splitlines()

    return run


PREPARE = ".venv-vllm -m recipe.gtpo.data prepare task=math"
TRAIN = ".venv-vllm -m recipe.gtpo.main"
VLLM_CPU = ".venv-vllm_cpu -m recipe.gtpo.main"


@pytest.mark.parametrize(
    ("count", "arguments", "called"),
    [
        (0, [], [".venv -m recipe.gtpo.main hardware=cpu rollout=transformers"]),
        (0, ["rollout=vllm_cpu"], [f"{VLLM_CPU} hardware=cpu rollout=vllm_cpu rollout=vllm_cpu"]),
        (1, [], [PREPARE, f"{TRAIN} hardware=single_gpu rollout=vllm task=math"]),
        (8, ["seed=2"], [PREPARE, f"{TRAIN} hardware=single_node rollout=vllm task=math seed=2"]),
        (8, ["task=gsm8k"], [f"{TRAIN} hardware=single_node rollout=vllm task=gsm8k"]),
        (8, ["task.folder=mine"], [f"{TRAIN} hardware=single_node rollout=vllm task=math task.folder=mine"]),
        (1, ["experiment=horizon4"], [f"{TRAIN} hardware=single_gpu rollout=vllm experiment=horizon4"]),
        (1, ["hardware=cpu"], [".venv -m recipe.gtpo.main hardware=cpu rollout=transformers hardware=cpu"]),
    ],
)
def test_the_script_takes_task_hardware_and_environment_from_what_the_machine_has(machine, count, arguments, called):
    assert machine(count, "examples/run_gtpo_qwen.sh", *arguments) == called


def test_data_that_are_there_are_not_fetched_again(machine, tmp_path):
    (tmp_path / "outputs/data/math").mkdir(parents=True)
    (tmp_path / "outputs/data/math/manifest.json").touch()
    called = machine(1, "examples/run_gtpo_qwen.sh")
    assert called == [f"{TRAIN} hardware=single_gpu rollout=vllm task=math"]


def test_the_tests_have_the_environment_without_gpus_where_there_are_some_too(machine):
    """The README's two commands, in either order, on one machine."""
    machine(8, "examples/run_gtpo_qwen.sh")
    tests = machine(8, "tests/run.sh", "-m", "unit")[2:]  # after the data and the training
    assert {line.split()[0] for line in tests} == {".venv"}
    assert tests[-1].startswith(".venv -m pytest") and "-m unit" in tests[-1]


def test_the_cluster_file_is_one_that_ray_takes():
    # Ray has no public check of such a file; this breaks when it moves.
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "examples/ray/cluster.yaml").read_text())
    validate_config(prepare_config(config))
