"""Protects what is settled before verl's first import: the platform of the hardware that was chosen, wherever it is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from composition import compose_with_choices

from recipe.gtpo.run.checks import ConfigError, check
from recipe.gtpo.run.environment import settle

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]


@pytest.fixture
def own(tmp_path):
    """A folder of one's own with a hardware file for the CPU and one for GPUs."""
    (tmp_path / "hardware").mkdir()
    (tmp_path / "hardware" / "laptop.yaml").write_text("# @package _global_\ndefaults: [cpu]\ntrainer: {device: cpu}\n")
    (tmp_path / "hardware" / "cluster.yaml").write_text(
        "# @package _global_\ndefaults: [/gpu]\ntrainer: {device: cuda}\n"
    )
    (tmp_path / "hardware" / "cpu.yaml").write_text("# @package _global_\ntrainer: {device: cuda}\n")  # ours wins
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "platform"),
    [
        ([], "cpu"),
        (["hardware=cpu", "seed=1"], "cpu"),
        (["hardware=single_gpu"], None),
        (["hardware=single_gpu", "hardware=cpu"], "cpu"),
        (["hardware=nonsense"], None),  # hydra refuses it
        (["hardware=laptop", "--config-dir", "OWN"], "cpu"),
        (["hardware=laptop", "--config-dir=OWN"], "cpu"),
        (["-cd", "OWN", "hardware=laptop"], "cpu"),
        (["hardware=laptop"], None),
        (["hardware=cluster", "--config-dir", "OWN"], None),
        (["hardware=cpu", "--config-dir", "OWN"], "cpu"),
        (["--config-dir"], "cpu"),
    ],
)
def test_the_platform_is_that_of_the_chosen_hardware(own, monkeypatch, arguments, platform):
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    settle([argument.replace("OWN", str(own)) for argument in arguments])
    assert os.environ.get("VERL_PLATFORM") == platform
    monkeypatch.setenv("VERL_PLATFORM", "cpu")  # of this process


def search(own):
    return f"hydra.searchpath=[pkg://verl.trainer.config,file://{own}]"


def test_a_hardware_file_of_ones_own_takes_the_rollouts_of_its_device(own):
    check(*compose_with_choices("hardware=laptop", "rollout=transformers", search(own)))
    check(*compose_with_choices("hardware=cluster", "rollout=vllm", search(own)))
    with pytest.raises(ConfigError, match="rollout=vllm does not run on hardware=laptop; use rollout=transformers"):
        check(*compose_with_choices("hardware=laptop", "rollout=vllm", search(own)))
    check(*compose_with_choices("hardware=cluster", "rollout=transformers", search(own)))
    with pytest.raises(ConfigError, match="rollout=vllm_cpu does not run on hardware=cluster; use rollout=vllm"):
        check(*compose_with_choices("hardware=cluster", "rollout=vllm_cpu", search(own)))


#: As the scripts see it: `nvidia-smi -L` lists GPUS of them.
STACK = r"""
nvidia-smi() { for ((i = 0; i < GPUS; i++)); do echo "GPU $i: NVIDIA H100 (UUID: GPU-$i)"; done; }
source "$ROOT/examples/stack.sh" "$@"
echo "$STACK ${ARGS[*]} $VENV"
"""


@pytest.mark.parametrize(
    ("gpus", "arguments", "stack"),
    [
        (0, [], "cpu hardware=cpu rollout=transformers .venv"),
        (1, [], "vllm hardware=single_gpu rollout=vllm .venv-vllm"),
        *((n, [], "vllm hardware=single_node rollout=vllm .venv-vllm") for n in (2, 7, 8)),
        (8, ["hardware=cpu"], "cpu hardware=cpu rollout=transformers .venv"),
        (0, ["rollout=vllm_cpu"], "vllm_cpu hardware=cpu rollout=vllm_cpu .venv-vllm_cpu"),
        (1, ["hardware=cpu", "rollout=vllm_cpu"], "vllm_cpu hardware=cpu rollout=vllm_cpu .venv-vllm_cpu"),
        (0, ["rollout=transformers"], "cpu hardware=cpu rollout=transformers .venv"),
        # Refused by the checks, after the arguments.
        (0, ["rollout=vllm"], "cpu hardware=cpu rollout=transformers .venv"),
        (1, ["rollout=sglang"], "sglang hardware=single_gpu rollout=sglang .venv-sglang"),
        (1, ["rollout=transformers"], "vllm hardware=single_gpu rollout=transformers .venv-vllm"),
        (1, ["rollout=of_my_own"], "vllm hardware=single_gpu rollout=vllm .venv-vllm"),
        (0, ["hardware=laptop", "--config-dir", "OWN"], "cpu hardware=laptop rollout=transformers .venv"),
        (0, ["hardware=laptop", "--config-dir=OWN"], "cpu hardware=laptop rollout=transformers .venv"),
        (1, ["hardware=cluster", "--config-dir", "OWN"], "vllm hardware=cluster rollout=vllm .venv-vllm"),
    ],
)
def test_the_scripts_choose_the_stack_of_the_machine(own, gpus, arguments, stack):
    done = choose_stack([argument.replace("OWN", str(own)) for argument in arguments], gpus)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == stack


def choose_stack(arguments, gpus, **variables):
    environment = {"PATH": os.environ["PATH"], "ROOT": str(ROOT), "GPUS": str(gpus), **variables}
    command = ["bash", "-euc", STACK, "stack", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)


def test_a_variable_chooses_the_rollout_too_and_an_environment_that_is_named_stays():
    done = choose_stack([], gpus=0, ROLLOUT="vllm_cpu", VENV="/mine")
    assert done.stdout.strip() == "vllm_cpu hardware=cpu rollout=vllm_cpu /mine"


@pytest.mark.parametrize(("arguments", "variables"), [(["rollout=vllm_cpu"], {}), ([], {"ROLLOUT": "vllm_cpu"})])
def test_vllm_for_the_cpu_is_refused_on_gpus_before_anything_is_installed(arguments, variables):
    done = choose_stack(arguments, gpus=1, **variables)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "stack: rollout=vllm_cpu does not run on hardware=single_gpu; use rollout=vllm, or hardware=cpu\n"
    )
