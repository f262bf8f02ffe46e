"""A run folder belongs to one config: another config gets another folder, or is refused with what differs.

Without this, a repeated command with another learning rate would find a finished run and print its numbers, and a
resumed one would go on with the optimizer's old rate while the recorded config says the new one. So it is with a reward
function that was edited, though its path is the same: a hash of its file stands beside the path.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from recipe.gtpo.run.record import RecordError, RunRecord

_ACTOR, _REF, _ROLLOUT = (f"actor_rollout_ref.{part}" for part in ("actor", "ref", "rollout"))
#: What decides where a step's numbers lie and how many are worked on at once: a run that died of its memory goes on
#: with less. verl divides a loss by the whole batch's tokens, whatever micro-batches it comes in; only the order in
#: which sums are rounded is another. Not the limits of a trajectory, which cut it (rollout.max_model_len).
MEMORY = (
    f"{_ACTOR}.ppo_max_token_len_per_gpu",
    *(f"{part}.log_prob_max_token_len_per_gpu" for part in (_REF, _ROLLOUT)),  # which follow it
    *(
        f"{part}.fsdp_config.{offload}"
        for part in (_ACTOR, _REF)
        for offload in ("param_offload", "optimizer_offload", "offload_policy")
    ),
    *(
        f"{_ROLLOUT}.{key}"
        for key in ("gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "enforce_eager")
    ),
)
#: Keys and sections in which two starts of one run may differ: where it is, how long it goes on, what watches it, what
#: it costs. Everything else makes another run.
FREE = (
    *MEMORY,
    "run_dir",
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
#: How keys end: of a reward function (an evaluation has one a benchmark), and of the hash of its file.
_PATH, _HASH = ".custom_reward_function.path", ".custom_reward_function.sha256"


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
    hashes = _reward_hashes(ours)
    theirs = record.read_config()
    if theirs is None:
        record.write_config(ours | hashes)
        return
    if differs := differences(_compared(theirs), _compared(ours)):
        raise RecordError(
            f"{record.dir} belongs to a run with another config: {differs}. Give this one a folder of its own "
            "(run_dir=...), or the same values"
        )
    if (edited := edited_reward(theirs)) is not None:
        raise RecordError(
            f"the reward function {edited} has changed since {record.dir} was begun with it. Give this one a folder of "
            "its own (run_dir=...), or the file as it was"
        )
    if not hashes.keys() <= theirs.keys():  # begun before there were hashes: what the file was then, nobody knows
        record.write_config(theirs | hashes)


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not _is_free(key) and not key.endswith(_HASH)}


def edited_reward(config: Mapping[str, Any]) -> str | None:
    """The reward function of a recorded config whose file is not what it was then; None where there is none."""
    now = _reward_hashes(config)
    edited = (key for key, found in now.items() if config.get(key, found) != found)
    return next((config[key.removesuffix(_HASH) + _PATH] for key in edited), None)


def _reward_hashes(config: Mapping[str, Any]) -> dict[str, str]:
    """Of the files themselves. What they import is not looked at."""
    paths = {key: path for key, path in config.items() if key.endswith(_PATH) and path is not None}
    files = {key.removesuffix(_PATH) + _HASH: _reward_file(path) for key, path in paths.items()}
    return {key: hashlib.sha256(file.read_bytes()).hexdigest() for key, file in files.items() if file.is_file()}


def _reward_file(path: str) -> Path:
    """Of what `scoring.load_function` loads."""
    if path.startswith("pkg://"):
        try:
            spec = importlib.util.find_spec(path.removeprefix("pkg://").replace("/", "."))
        except ImportError:  # of a package around it, which is gone
            spec = None
        path = (spec and spec.origin) or ""
    return Path(path.removeprefix("file://")).expanduser()


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
    in_a_benchmark = key.endswith(tuple(f".{one}" for one in MEMORY))  # an evaluation has the rollout's once for each
    return in_a_benchmark or any(key == free or key.startswith(f"{free}.") for free in FREE)


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")
