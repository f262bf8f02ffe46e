"""The recipe's configuration as its command composes it, once for each set of overrides."""

from __future__ import annotations

import copy
import functools
import itertools

from omegaconf import DictConfig, OmegaConf, open_dict
from verl.utils.config import omega_conf_to_dataclass

from recipe.gtpo.main import validate
from recipe.gtpo.run import checks
from recipe.gtpo.run.checks import CONFIG_DIR, ROLLOUTS, check


def names(group: str) -> list[str]:
    """The choices of a config group."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


METHODS, TASKS = names("method"), names("task")
#: (hardware, rollout) pairs that make sense.
STACKS = [(hardware, rollout) for hardware, rollouts in ROLLOUTS.items() for rollout in rollouts]
#: (method, task, hardware, rollout): all that makes sense.
EVERYTHING = [(method, task, *stack) for method, task, stack in itertools.product(METHODS, TASKS, STACKS)]


def compose(*overrides: str) -> DictConfig:
    """The composed config; a copy, to be changed at will."""
    return copy.deepcopy(_compose(overrides)[0])


def compose_with_choices(*overrides: str) -> tuple[DictConfig, dict[str, str]]:
    """Also hydra's record of which file of each group was taken."""
    config, choices = _compose(overrides)
    return copy.deepcopy(config), dict(choices)


@functools.cache  # about a second each
def _compose(overrides: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
    return checks.compose(*overrides)


def composed(method: str, task: str, hardware: str, rollout: str) -> tuple[DictConfig, dict[str, str]]:
    """One of `EVERYTHING`, with hydra's choices."""
    overrides = [f"method={method}", f"task={task}", f"hardware={hardware}", f"rollout={rollout}"]
    return compose_with_choices(*overrides)


def assert_can_start(method: str, task: str, hardware: str, rollout: str) -> None:
    """All that a run does with its configuration before anything starts, and what verl's processes then do with it."""
    config, choices = composed(method, task, hardware, rollout)
    options = check(config, choices)
    OmegaConf.resolve(config)  # every interpolation has a value
    validate(config)
    # What verl converts in its trainer and workers. Its model config needs a model on disk, and it leaves `algorithm`
    # a mapping, which is why our options may live there.
    parts = config.actor_rollout_ref
    assert omega_conf_to_dataclass(parts.rollout).name == {"vllm_cpu": "vllm"}.get(rollout, rollout)
    assert omega_conf_to_dataclass(parts.rollout.checkpoint_engine).backend == "naive"
    assert omega_conf_to_dataclass(parts.actor).strategy == "fsdp2"
    assert omega_conf_to_dataclass(_as_the_worker_does(parts.ref)).strategy == "fsdp2"
    assert (config.trainer.device == "cpu") == (hardware == "cpu")
    assert config.method == method == choices["method"] and config.task.name == task
    unshaped = ("gtpo_no_shaping", "gtpo_state", "gtpo_bootstrap", "gtpo_within_state")
    assert options.shaping.enable == (method.startswith("gtpo") and method not in unshaped)


def _as_the_worker_does(ref: DictConfig) -> DictConfig:
    """verl's worker makes an actor's config of the reference's before it converts it."""
    with open_dict(ref):
        for key in ("micro_batch_size", "micro_batch_size_per_gpu", "max_token_len_per_gpu"):
            ref[f"ppo_{key}"] = ref.pop(f"log_prob_{key}")
        ref.use_dynamic_bsz = ref.pop("log_prob_use_dynamic_bsz")
    return ref
