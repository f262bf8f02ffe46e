"""A run folder belongs to one config: another config gets another folder, or is refused with what differs.

Without this, a repeated command with another learning rate would find a finished run and print its numbers, and a
resumed one would go on with the optimizer's old rate while the recorded config says the new one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from recipe.gtpo.run.record import RecordError, RunRecord

#: Keys and sections in which two starts of one run may differ: where it is, how long it goes on, what watches it, what
#: it costs. Everything else makes another run.
FREE = (
    "run_dir",
    "experiment",
    "matrix",
    "max_dropped_share",
    "max_lost_trajectories",
    "ray_kwargs",
    "reward_timeout_seconds",
    "tool_server",
    "trainer.default_local_dir",
    "trainer.experiment_name",
    "trainer.logger",
    "trainer.max_actor_ckpt_to_keep",
    "trainer.max_critic_ckpt_to_keep",
    "trainer.project_name",
    "trainer.resume_from_path",
    "trainer.resume_mode",
    "trainer.rollout_data_dir",
    "trainer.save_freq",
    "trainer.test_freq",
    "trainer.total_epochs",
    "trainer.total_training_steps",
    "trainer.val_before_train",
    "trainer.val_only",
    "trainer.validation_data_dir",
    "trajectory_freq",
    "trajectory_keep",
    "trajectory_zstd",
    "watchdog",
)
#: Named in `trainer.experiment_name` by themselves, or chosen by the machine.
_NAMED = ("hardware", "method", "model", "rollout", "seed", "task")


def variant(overrides: Sequence[str] | None = None) -> str:
    """`-` and a short hash of the overrides that make another run of the same task, method and seed; "" without any.

    Args:
        overrides: of the command line; None: those of the hydra application that runs.
    """
    if overrides is None:
        overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    own = sorted(one for one in overrides if not _is_free(_key(one)) and _key(one) not in _NAMED)
    return "-" + hashlib.sha256("\n".join(own).encode()).hexdigest()[:6] if own else ""


def claim(record: RunRecord, config: DictConfig) -> None:
    """Make the run folder this config's, or find that it is.

    Raises RecordError with what differs when the folder holds another config's run.
    """
    ours = flatten(OmegaConf.to_container(config, resolve=True))
    theirs = record.read_config()
    if theirs is None:
        record.write_config(ours)
        return
    theirs, ours = ({key: value for key, value in one.items() if not _is_free(key)} for one in (theirs, ours))
    if differs := differences(theirs, ours):
        raise RecordError(
            f"{record.dir} belongs to a run with another config: {differs}. Give this one a folder of its own "
            "(run_dir=...), or the same values"
        )


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The first values in which two flat mappings differ, in words; "" where there are none."""
    differs = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    shown = "; ".join(f"{key}={theirs.get(key)} there, {ours.get(key)} here" for key in differs[:4])
    return f"{shown} and {len(differs) - 4} more" if len(differs) > 4 else shown


def same_overrides(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two command lines make the same run, whatever is free."""
    return {a for a in one if not _is_free(_key(a))} == {a for a in other if not _is_free(_key(a))}


def flatten(node: Any, path: str = "") -> dict[str, Any]:
    """A nested mapping as full key -> value; what is no number, truth value or None, as a text."""
    if isinstance(node, Mapping) and node:
        parts = (flatten(value, f"{path}.{key}" if path else str(key)) for key, value in node.items())
        return {key: value for part in parts for key, value in part.items()}
    return {path: node if node is None or isinstance(node, bool | int | float) else str(node)}


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")
