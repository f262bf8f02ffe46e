"""What `import verl` loads of this package in every process, through the entry point `verl.plugins` (pyproject.toml).

It makes the platform known that verl lacks, the CPU, where `VERL_PLATFORM=cpu` asks for it, and the rollout that verl
lacks, "transformers", on every platform. An accelerator run imports nothing of `verl_ext.cpu`, and `verl_ext.rollout`
only where a config names it. A plugin of a recipe imports this module first: verl settles its platform once, at the
first question any of its modules asks.
"""

from __future__ import annotations

import os
from typing import Any

if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
    import verl_ext.cpu.platform
    import verl_ext.cpu.vllm_rollout  # noqa: F401

# isort: split
from verl.workers.rollout.base import _ROLLOUT_REGISTRY
from verl.workers.rollout.replica import RolloutReplicaRegistry


def _replica() -> Any:
    from verl_ext.rollout.server import TransformersReplica

    return TransformersReplica


RolloutReplicaRegistry.register("transformers", _replica)
# verl has a public registry for replicas but none for the trainer-side adapter, only this dict.
# tests/verl_ext/rollout/test_server.py breaks when it moves.
_ROLLOUT_REGISTRY["transformers", "async"] = "verl_ext.rollout.server.TransformersAdapter"


def trainer_base() -> Any:
    """The class to build a verl V1 trainer on: verl's own, or on the CPU one that puts the CPU's workers in place.

    Put it before a trainer of verl's: `class Mine(trainer_base()): ...; class MineSync(Mine, PPOTrainerSync): ...`.
    """
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer
    from verl.utils.device import get_device_name

    if get_device_name() != "cpu":
        return PPOTrainer
    from verl_ext.cpu.workers import CPUWorkersMixin

    return CPUWorkersMixin
