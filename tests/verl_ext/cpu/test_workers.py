"""Protects what separate_async asks of the training worker on the CPU: weights that it kept are of their time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.utils.distributed import initialize_global_process_group_ray
from verl.utils.fsdp_utils import fsdp2_sharded_save_to_cpu

from verl_ext.cpu.workers import CPUActorRolloutRefWorker

pytestmark = pytest.mark.unit


@pytest.fixture
def model(monkeypatch):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    initialize_global_process_group_ray(backend="gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    yield fully_shard(torch.nn.Linear(3, 2), mesh=mesh)
    torch.distributed.destroy_process_group()


def worker_with(model):
    worker = object.__new__(CPUActorRolloutRefWorker)
    worker._strategy_handlers = None
    worker.config = SimpleNamespace(actor=SimpleNamespace(strategy="fsdp2"))
    worker.actor = SimpleNamespace(engine=SimpleNamespace(module=model))
    return worker


def values(model):
    return model.weight.to_local().detach().clone()


def test_weights_that_were_kept_come_back_after_an_update(model):
    worker = worker_with(model)
    before = values(model)
    worker.save_model_to_cpu(0)
    with torch.no_grad():
        model.weight.add_(1.0)
    worker.save_model_to_cpu(1)
    worker.restore_model_from_cpu(0)
    assert torch.equal(values(model), before)
    worker.restore_model_from_cpu(1)
    assert torch.equal(values(model), before + 1)
    worker.clear_cpu_model(1)
    assert set(worker.cpu_saved_models) == {0}


def test_verl_s_own_way_of_keeping_them_is_no_copy_on_the_cpu(model):
    """The reason for ours: once this fails, ours can go."""
    kept, _ = fsdp2_sharded_save_to_cpu(model)
    assert kept["weight"][0].data_ptr() == model.weight.to_local().data_ptr()
    assert issubclass(CPUActorRolloutRefWorker, DetachActorWorker)
