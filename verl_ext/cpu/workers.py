"""verl's workers with a gloo process group, and the trainer mixin that puts them in place.

verl builds the group from the string "cpu:gloo,<device>:<backend>"; with the device "cpu" that names the CPU twice and
torch refuses it. verl skips the step when a group exists, so these workers make one first.

A stock verl command finds `cpu_sync` with VERL_USE_EXTERNAL_MODULES=verl_ext.cpu.platform,verl_ext.cpu.workers: in this
order, because verl asks for the platform while it imports its trainers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
import torch
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.distributed import initialize_global_process_group_ray
from verl.workers.engine_workers import TrainingWorker

import verl_ext.cpu.engine  # noqa: F401  registers the engine in the process that needs it


class CPUTrainingWorker(TrainingWorker):
    def __init__(self, config):
        if not torch.distributed.is_initialized():
            initialize_global_process_group_ray(backend="gloo")
        super().__init__(config)


class CPUActorRolloutRefWorker(DetachActorWorker):
    """verl's worker of policy and reference, with what separate_async asks of it: to keep older weights at hand."""

    actor_worker_cls = CPUTrainingWorker
    ref_worker_cls = CPUTrainingWorker

    @property
    def copy_handler(self) -> Callable[[torch.nn.Module], tuple[dict, Any]]:
        """verl keeps `tensor.cpu()`, which is no copy where the tensor is on the CPU: the weights themselves."""
        save = super().copy_handler

        def copy(module: torch.nn.Module) -> tuple[dict, Any]:
            kept, spec = save(module)
            return {name: (tensor.clone(), its_spec) for name, (tensor, its_spec) in kept.items()}, spec

        return copy


class CPUWorkersMixin(PPOTrainer):
    """For a verl V1 trainer: swap the worker classes when the device is the CPU. Put it before the trainer class."""

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        if self.config.trainer.device != "cpu":
            return
        swap = {Role.Critic: CPUTrainingWorker}
        for role in self.role_worker_mapping:
            self.role_worker_mapping[role] = ray.remote(swap.get(role, CPUActorRolloutRefWorker))


@register_trainer("cpu_sync")
class CPUTrainerSync(CPUWorkersMixin, PPOTrainerSync):
    """verl's synchronous trainer on the CPU: `trainer.v1.trainer_mode=cpu_sync` in a stock verl command."""

    def __init__(self, config):
        config.trainer.v1.trainer_mode = "sync"  # verl compares the mode's name with "sync" in several places
        super().__init__(config)
