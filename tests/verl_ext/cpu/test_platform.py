"""Protects the CPU as a verl platform: chosen by name only, answering what verl asks of a device and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import verl
from verl.plugin.platform.platform_manager import PlatformRegistry, get_platform
from verl.utils.device import get_device_id, get_device_name, get_nccl_backend, get_torch_device
from verl.utils.distributed import initialize_global_process_group_ray
from verl.workers.engine import EngineRegistry

from verl_ext.cpu.engine import CPUFSDP2Engine
from verl_ext.cpu.platform import CPUPlatform

pytestmark = pytest.mark.unit

#: Names of torch.cuda that verl uses only where there is a stream, IPC or a memory fraction, which the CPU has not.
NOT_ON_THE_CPU = {
    "Event",
    "Stream",
    "current_stream",
    "stream",
    "ipc_collect",
    "set_per_process_memory_fraction",
}


def test_the_platform_is_the_one_that_was_asked_for():
    assert isinstance(get_platform(), CPUPlatform) and PlatformRegistry.get("cpu") is CPUPlatform
    assert get_device_name() == "cpu" and get_nccl_backend() == "gloo"
    assert torch.ones(1, device=get_device_id()).device == torch.device("cpu")


def test_the_platform_is_never_detected():
    """Every machine has a CPU: it must not win over an accelerator that a probe fails to see."""
    assert CPUPlatform().is_available()
    assert not CPUPlatform().is_platform_available(use_smi_check=True)
    assert not CPUPlatform().is_platform_available(use_smi_check=False)


def used_by_verl() -> set[str]:
    source = Path(verl.__file__).parent
    found: set[str] = set()
    for path in source.rglob("*.py"):
        found |= set(re.findall(r"get_torch_device\(\)\.([A-Za-z_]+)", path.read_text(errors="replace")))
    return found


def test_the_device_answers_every_name_that_verl_uses():
    """A name that a new verl adds fails here first."""
    names = used_by_verl()
    assert {"empty_cache", "synchronize", "is_available", "mem_get_info"} <= names  # the search still finds them
    device = get_torch_device()
    assert {name for name in names if not hasattr(device, name)} == NOT_ON_THE_CPU & names


@pytest.mark.parametrize("name", ["Stream", "memory_summary", "nonsense"])
def test_the_device_answers_no_other_name(name):
    with pytest.raises(AttributeError, match=name):
        getattr(get_torch_device(), name)


def test_the_device_s_numbers_are_the_process_s_own():
    device = get_torch_device()
    free, total = device.mem_get_info()
    assert 0 < free <= total
    # the imports alone take over 100 MB, and the peak is no lower than what is used now
    assert 1e8 < device.memory_allocated() <= 1.05 * device.max_memory_allocated() < total
    assert device.memory_reserved() > 1e8 and device.device_count() == 1 and device.is_available()
    assert device.get_device_name() == "cpu" and device.current_device() == torch.device("cpu")
    assert device.empty_cache() is device.synchronize() is device.set_device(0) is None


def test_the_random_state_is_stored_and_restored():
    """A checkpoint keeps it; a resumed run goes on with the same numbers."""
    device = get_torch_device()
    state = device.get_rng_state()
    drawn = torch.rand(3)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)
    get_platform().manual_seed(5)
    drawn = torch.rand(3)
    get_platform().manual_seed_all(5)
    assert torch.equal(torch.rand(3), drawn)


def test_the_engine_of_the_cpu_is_fsdp2():
    assert EngineRegistry.get_engine_cls(model_type="language_model", backend="fsdp2") is CPUFSDP2Engine


@pytest.fixture
def alone(monkeypatch):
    """One rank, and no process group left behind."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_verl_s_helper_makes_a_gloo_group_that_averages(alone):
    initialize_global_process_group_ray(backend=get_nccl_backend())
    assert torch.distributed.get_backend() == "gloo"
    value = torch.tensor([3.0])
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.AVG)  # FSDP2 averages gradients with it
    assert value.item() == 3.0


def test_verl_s_own_choice_of_backend_fails_on_the_cpu(alone):
    """Why our workers make the group first: when this fails in a new verl, that part of verl_ext.cpu.workers can go."""
    with pytest.raises(ValueError, match="cpu"):
        initialize_global_process_group_ray()
