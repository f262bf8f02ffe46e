"""Compose and check a run's configuration. Everything that can be wrong before a process starts is found here."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.run.environment import CONFIG_DIR
from recipe.gtpo.run.errors import ConfigError, is_null_group, one_line
from recipe.gtpo.run.gpu import (
    Check,
    attention,
    check_disk,
    check_ulysses,
    fill_logical_gpus,
    fill_model,
    fit_memory,
    machine_checks,
    machines_of,
    shape_of,
    slow_adapter,
)
from recipe.gtpo.run.identity import flatten, variant
from recipe.gtpo.run.inputs import (
    Prompt,
    Say,
    ask_reward,
    check_choices,
    check_counts,
    check_data,
    check_machine,
    check_reward,
    expand_paths,
    fill_open,
    ray_starts_here,
)
from recipe.gtpo.run.machine import cpu_dtype, gpus, host_memory
from recipe.gtpo.run.model import check_model, context_of
from recipe.gtpo.sft import cold_start
from recipe.gtpo.tasks.prepared import PreparedTask
from recipe.gtpo.tasks.task import Task, load_task
from verl_ext.tool_server.client import is_ray

#: hardware -> rollouts that make sense on it. A hardware file of the user's own takes those of its device.
ROLLOUTS = {
    "cpu": ("transformers", "vllm_cpu"),
    "single_gpu": ("vllm", "sglang", "transformers"),
    "single_node": ("vllm", "sglang", "transformers"),
    "multi_node": ("vllm", "sglang", "transformers"),
}


def rollouts_on(hardware: str, device: str) -> tuple[str, ...]:
    """The rollouts that make sense on a choice of `hardware` whose `trainer.device` is `device`."""
    return ROLLOUTS.get(hardware) or ROLLOUTS["cpu" if device == "cpu" else "single_node"]


def config_file(group: str, name: str) -> Path:
    """The file of `GROUP=NAME` in our config. Raises ValueError with the known names."""
    known = sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))
    if name not in known:
        raise ValueError(f"unknown {group} {name!r}; {group}s: {', '.join(known)}")
    return CONFIG_DIR / group / f"{name}.yaml"


def register() -> None:
    """Make the options (`gtpo_options`) and our resolvers known; call before hydra composes."""
    ConfigStore.instance().store(name="gtpo_options", node=asdict(GTPOOptions()))
    OmegaConf.register_new_resolver("gtpo_config", lambda name: str(CONFIG_DIR / name), replace=True)
    OmegaConf.register_new_resolver("gtpo_variant", lambda: variant(), replace=True)
    OmegaConf.register_new_resolver("gtpo_attention", lambda: attention()[0], replace=True)
    OmegaConf.register_new_resolver(
        "gtpo_weight_sync", lambda device: "gloo" if device == "cpu" else "nccl", replace=True
    )
    OmegaConf.register_new_resolver("gtpo_text", lambda name: (CONFIG_DIR / name).read_text(), replace=True)
    OmegaConf.register_new_resolver("gtpo_cpu_dtype", cpu_dtype, replace=True)
    OmegaConf.register_new_resolver("gtpo_gpus", lambda otherwise: len(gpus()) or otherwise, replace=True)


def compose(*overrides: str) -> tuple[DictConfig, dict[str, str]]:
    """The config that `recipe.gtpo.main` composes of these overrides, and hydra's choice of each group.

    For programs that need a config without being a hydra application. Call `environment.settle` before.
    """
    register()
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        try:
            config = hydra_compose("gtpo_trainer", overrides=list(overrides), return_hydra_config=True)
        except ValueError as e:
            if is_null_group(e):
                raise HydraException(one_line(e)) from e
            raise
    choices = dict(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    return config, choices


def check(config: DictConfig, choices: dict[str, Any]) -> GTPOOptions:
    """Raise ConfigError where a run could not start or would not mean what it says.

    Args:
        config: the composed configuration.
        choices: hydra's `runtime.choices` (which file of each group was taken).
    """
    hardware, rollout = choices["hardware"], choices["rollout"]
    fitting = rollouts_on(hardware, config.trainer.device)
    ours = {name for names in ROLLOUTS.values() for name in names}  # of a file of the user's own nothing is known
    if rollout in ours and rollout not in fitting:
        raise ConfigError(f"rollout={rollout} does not run on hardware={hardware}; use rollout={fitting[0]}")
    try:
        options = GTPOOptions.from_config(config.algorithm.get("gtpo"))
    except ValueError as e:
        raise ConfigError(str(e)) from e  # names the key
    if not config.trainer.use_v1:
        raise ConfigError("trainer.use_v1=false: GTPO runs on verl's V1 trainer only")
    check_mode(config)
    check_estimator(config)
    check_length(config)
    check_validation(config)
    check_rewards(config)
    filters = config.algorithm.filter_groups
    if filters.enable and filters.metric != "acc":
        raise ConfigError(f"algorithm.filter_groups.metric={filters.metric}: turn rewards shift it; filter on acc")
    if (hardware == "multi_node" or config.trainer.nnodes > 1) and config.tool_server.url is None:
        raise ConfigError(
            "tool_server.url is not set: other nodes cannot reach a server on this machine's loopback; set it to ray "
            "(an executor on every node), or to the address of a `python -m verl_ext.tool_server` that all nodes reach"
        )
    if is_ray(config.tool_server.url) and ray_starts_here(config):
        raise ConfigError(
            f"tool_server.url={config.tool_server.url} is for a Ray cluster that runs (ray_kwargs.ray_init.address); "
            "leave it out, and the run starts a tool server on this machine"
        )
    check_call_format(config)
    check_adapter(config)
    missing = sorted(OmegaConf.missing_keys(config) - _UNUSED_MANDATORY)
    if missing:
        raise ConfigError(f"{missing[0]} has no value: set it on the command line ({missing[0]}=...)")
    check_counts(config)
    check_choices(config)
    return options


MODES = ("gtpo_sync", "gtpo_colocate_async", "gtpo_separate_async")


def check_mode(config: DictConfig) -> None:
    """Raise ConfigError for a trainer that there is not, or that could not start: verl says so after Ray has."""
    mode, parts = config.trainer.v1.trainer_mode, config.actor_rollout_ref
    rollout = parts.rollout
    if mode not in MODES:
        raise ConfigError(f"trainer.v1.trainer_mode={mode}: this recipe has {', '.join(MODES)}")
    if mode == "gtpo_sync":
        return
    word = mode.removeprefix("gtpo_")
    if rollout.full_determinism:
        raise ConfigError(
            f"trainer.v1.trainer_mode={mode} with actor_rollout_ref.rollout.full_determinism=true: which weights a "
            "turn meets depends on the clock, and a turn that is interrupted would draw its seed's numbers twice; set "
            f"it to false, or take mode={word}, which does"
        )
    if mode == "gtpo_colocate_async":
        return
    if rollout.nnodes < 1 or rollout.n_gpus_per_node < 1 or rollout.checkpoint_engine.backend == "naive":
        raise ConfigError(
            f"trainer.v1.trainer_mode={mode} samples on devices of its own: take mode={word}, or set "
            "actor_rollout_ref.rollout.nnodes, .n_gpus_per_node and .checkpoint_engine.backend (nccl; on the CPU gloo)"
        )
    steps, mini = config.trainer.v1.separate_async.parameter_sync_step, parts.actor.ppo_mini_batch_size
    if config.data.train_batch_size != steps * mini:
        raise ConfigError(
            f"trainer.v1.trainer_mode={mode}: data.train_batch_size={config.data.train_batch_size} is not "
            f"trainer.v1.separate_async.parameter_sync_step={steps} x "
            f"actor_rollout_ref.actor.ppo_mini_batch_size={mini}"
        )


#: `trainer.total_epochs` in gtpo_trainer.yaml: more than any run has.
_EPOCHS = 1_000_000


def check_length(config: DictConfig) -> None:
    """Raise ConfigError where epochs would end a run before its last step, or do nothing: verl saves and validates at
    the last of `total_training_steps`, and where the epochs end first it just stops."""
    epochs, steps = config.trainer.total_epochs, config.trainer.total_training_steps
    if steps is not None and epochs != _EPOCHS:
        raise ConfigError(
            f"trainer.total_epochs={epochs} with trainer.total_training_steps={steps}: a run whose epochs end first "
            "loses the steps behind its last checkpoint. Leave trainer.total_epochs out, and the steps decide; or set "
            "trainer.total_training_steps=null, and the epochs do"
        )


def check_validation(config: DictConfig) -> None:
    """Raise ConfigError where verl would train although it is asked to validate only, or sample although it is not."""
    trainer, sampling = config.trainer, config.actor_rollout_ref.rollout.val_kwargs
    if trainer.val_only and not trainer.val_before_train:
        raise ConfigError(
            "trainer.val_only=true with trainer.val_before_train=false: the one validation of such a run is the one "
            "before training, and without it verl trains; leave trainer.val_before_train out"
        )
    if not sampling.do_sample and sampling.temperature > 0:  # verl's V1 trainers read the temperature only
        key = "actor_rollout_ref.rollout.val_kwargs"
        raise ConfigError(
            f"{key}.do_sample=false with {key}.temperature={sampling.temperature:g}: answers would be sampled at that "
            f"temperature all the same; set {key}.temperature=0, and the likeliest token is taken"
        )


#: By what verl scores answers that an agent loop has not scored, and ours scores them all: key -> verl's default ...
_SCORED_BY_VERL = {
    "reward.reward_manager.name": "naive",
    "reward.reward_manager.source": "register",
    "reward.reward_model.enable": False,
    "reward.sandbox_fusion.url": None,
}
#: ... and the older sections for the same, which its V1 trainers do not read.
_OLD_REWARD = ("custom_reward_function", "reward_model", "sandbox_fusion")


def check_rewards(config: DictConfig) -> None:
    """Raise ConfigError for a key of verl that says what a reward is and here would change none."""
    old = (flatten(OmegaConf.to_container(config[section]), section) for section in _OLD_REWARD)
    for key, default in [*_SCORED_BY_VERL.items(), *((key, None) for keys in old for key in keys)]:
        if (value := OmegaConf.select(config, key)) != default:
            raise ConfigError(
                f"{key}={value} would change no reward: answers are scored by the task, or by "
                "reward.custom_reward_function.path; set that, or leave it out"
            )


#: Estimators of verl 0.9.1 that its V1 trainers do not hand what they read: estimator -> what that is.
_UNFED = {
    "gdpo": "the parts of the reward; method=gdpo hands it ours",
    "optimal_token_baseline": "sum_pi_squared of every token",
    "tir_optimal_token_baseline": "sum_pi_squared of every token",
    "remax": "the reward of a greedy answer",
}


def check_estimator(config: DictConfig) -> None:
    """Raise ConfigError for an advantage that verl could not compute, or would compute without what is set."""
    name = config.algorithm.adv_estimator
    if name in _UNFED:
        raise ConfigError(f"algorithm.adv_estimator={name}: verl's V1 trainers do not hand it {_UNFED[name]}")
    if config.algorithm.use_kl_in_reward:
        # It would train (equation (7)), but the record, its metrics and what-if know no such part of a turn's reward.
        raise ConfigError(
            "algorithm.use_kl_in_reward=true: neither the record nor the metrics would show the rewards that are "
            "trained with; use actor_rollout_ref.actor.use_kl_loss=true"
        )
    if name != "recorded_gdpo":
        return
    for key in ("gdpo_reward_keys", "gdpo_reward_weights"):
        if config.algorithm.get(key) is not None:
            raise ConfigError(f"algorithm.{key}: GDPO here has outcome and well_formed, equally weighed; drop it")


#: Mandatory keys of verl's defaults that nothing reads in our runs (no reward model).
_UNUSED_MANDATORY = {"reward.reward_model.rollout.name"}


def prepare(config: DictConfig, say: Say = lambda text: None) -> Task:
    """Have the task prepare itself, fill what the config leaves open, and settle every interpolation.

    Raises ConfigError with the task's own reason, and for a reward function, data or a model that no run can use.

    Args:
        say: told what there is, in lines for the terminal.
    """
    task = prepare_task(config)
    prepare_model(config, say)
    choose_model(config, task, say)
    for look in given_checks(config).values():
        look(say)
    if cold_start.is_wanted(config):
        try:
            config.actor_rollout_ref.model.path = str(cold_start.cold_start(config, say))
        except ValueError as e:
            raise ConfigError(f"cold start: {e}") from e
    fill_logical_gpus(config)
    config.run_dir = str(Path(config.run_dir).resolve())
    config.trainer.default_local_dir = str(Path(config.trainer.default_local_dir).resolve())
    os.environ.setdefault("TENSORBOARD_DIR", f"{config.run_dir}/tensorboard")
    OmegaConf.resolve(config)
    return task


def prepare_task(config: DictConfig, *, scored: bool = True) -> Task:
    """Have the task prepare itself, and fill what the config leaves open. Raises ConfigError.

    Args:
        scored: whether answers are going to be scored.
    """
    expand_paths(config)
    try:
        task = load_task(config)
        if scored:
            check_reward(config, task)  # before what may take minutes
        made = task.prepare()
    except InstantiationException as e:  # hydra's wrapper, whose first line does not say what is wrong
        raise ConfigError(f"task={config.task.name}: {e.__cause__ or e}") from e
    except ValueError as e:
        raise ConfigError(f"task={config.task.name}: {e}") from e
    fill_open(config, made)
    return task


def prepare_model(config: DictConfig, say: Say) -> None:
    """The policy of `model=NAME`, where the config names no other. Raises ConfigError."""
    if config.model is None or config.actor_rollout_ref.model.path is not None:
        return
    try:
        config.actor_rollout_ref.model.path = str(instantiate(config.model).prepare(say))
    except ValueError as e:
        raise ConfigError(f"model: {e}") from e


def choose_model(config: DictConfig, task: Task, say: Say) -> None:
    """A task on published problems brings data and no model: on GPUs there is a default."""
    if isinstance(task, PreparedTask):
        fill_model(config, machines_of(config, gpus(), host_memory()), say)


def first_checks(config: DictConfig, choices: dict[str, Any]) -> dict[str, Check]:
    """What is looked at before a task is prepared, by name; a run stops at the first that raises ConfigError."""

    def composition(say: Say) -> None:
        check(config, choices)
        if (warning := slow_adapter(config)) is not None:
            say(f"warning: {warning}")

    return {"config": composition, "folders": lambda say: check_machine(config), **machine_checks(config)}


#: Those of `given_checks` that need the data and no model.
OF_DATA = ("data", "the reward function's answers")


def given_checks(config: DictConfig) -> dict[str, Check]:
    """What is looked at once a task has filled the config, by name, in this order: data, model, what both need."""
    prompts: list[Prompt] = []

    def context(say: Say) -> None:
        if (warning := short_context(config)) is not None:
            say(f"warning: {warning}")

    def memory(say: Say) -> None:
        check_ulysses(config, shape_of(config))
        fit_memory(config, machines_of(config, gpus(), host_memory()), shape_of(config), say)

    return {
        OF_DATA[0]: lambda say: prompts.extend(check_data(config, say)),
        OF_DATA[1]: lambda say: ask_reward(config, prompts),
        "model and tokenizer": lambda say: check_model(config, prompts, say),
        "context": context,  # before the memory: that fills max_model_len, and the warning says whose limit it is
        "memory": memory,
        "disk": lambda say: check_disk(config, shape_of(config)),
    }


def check_call_format(config: DictConfig) -> None:
    """Raise ConfigError for tool calls in a format that `parsing.parse_calls` does not read."""
    written = config.actor_rollout_ref.rollout.multi_turn.format
    if written != "hermes":
        raise ConfigError(
            f"actor_rollout_ref.rollout.multi_turn.format={written}: this recipe reads hermes calls only "
            '(<tool_call>{"name": ..., "arguments": ...}</tool_call>); use a model that writes them'
        )


def check_adapter(config: DictConfig) -> None:
    """Raise ConfigError for an adapter whose weights would reach no rollout.

    verl sends servers that stand alone (`engine_workers.update_weights` with a checkpoint engine) the weights below the
    adapter and never the adapter: training would sample from the model that it began with, to the end and in silence.
    """
    model = config.actor_rollout_ref.model
    if not model.lora_rank or model.lora.merge:
        return
    if config.trainer.v1.trainer_mode == "gtpo_separate_async":
        raise ConfigError(
            f"actor_rollout_ref.model.lora_rank={model.lora_rank} with mode=separate_async: verl sends servers of "
            "their own whole weights and no adapter, so the model would be sampled as it was before training; set "
            "actor_rollout_ref.model.lora.merge=true, or take mode=sync"
        )
    if config.actor_rollout_ref.rollout.name == "transformers":  # fails at the first weight sync
        raise ConfigError(
            f"actor_rollout_ref.model.lora_rank={model.lora_rank}: rollout=transformers takes whole weights and no "
            "adapter; set actor_rollout_ref.model.lora.merge=true, or take another rollout"
        )


def short_context(config: DictConfig) -> str | None:
    """A warning where the server's context is shorter than prompt and response together, else None."""
    limit, source = config.actor_rollout_ref.rollout.max_model_len, "actor_rollout_ref.rollout.max_model_len"
    if limit is None:  # the servers take the model's
        limit, source = context_of(config.actor_rollout_ref.model), "the model's max_position_embeddings"
    wanted = config.data.max_prompt_length + config.data.max_response_length
    if limit is None or limit >= wanted:
        return None
    return (
        f"{source}={limit} is below data.max_prompt_length + data.max_response_length = {wanted}: a trajectory that "
        "gets so long ends there, cut by length and not charged"
    )
