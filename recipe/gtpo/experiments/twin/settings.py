"""What the plain-PyTorch engine takes from the composed config, and what it refuses.

Every number is the one that a run under verl reads. A key that the engine does not read is refused where the user sets
it, so that no override is without effect in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.gtpo.conversation import Rules
from recipe.gtpo.method.estimators import ESTIMATORS
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.run.checks import ConfigError
from recipe.gtpo.tasks.arithmetic.problems import tool_schema
from recipe.gtpo.tasks.arithmetic.task import Arithmetic
from recipe.gtpo.tasks.task import Task

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"

#: Keys and sections of the config that the engine reads, and those that only name a run.
READ = (
    "method",
    "experiment",
    "matrix",
    "task",
    "seed",
    "run_dir",
    "trajectory_freq",
    "trajectory_keep",
    "trajectory_zstd",
    "algorithm.adv_estimator",
    "algorithm.norm_adv_by_std_in_grpo",
    "algorithm.gtpo",
    "data.train_batch_size",
    "data.max_response_length",
    f"{_ACTOR}.optim.lr",
    f"{_ACTOR}.optim.betas",
    f"{_ACTOR}.optim.weight_decay",
    f"{_ACTOR}.clip_ratio_low",
    f"{_ACTOR}.clip_ratio_high",
    f"{_ACTOR}.optim.clip_grad",
    f"{_ACTOR}.ppo_max_token_len_per_gpu",
    f"{_ACTOR}.ppo_mini_batch_size",
    f"{_ROLLOUT}.n",
    f"{_ROLLOUT}.multi_turn.max_assistant_turns",
    f"{_ROLLOUT}.multi_turn.max_parallel_calls",
    f"{_ROLLOUT}.multi_turn.max_tool_response_length",
    f"{_ROLLOUT}.multi_turn.tool_response_truncate_side",
    "trainer.experiment_name",
    "trainer.total_training_steps",
    "trainer.test_freq",
)

#: What the engine's update and sampling are, as config values: another one would be another experiment.
FIXED: Mapping[str, Any] = {
    f"{_ACTOR}.optim.optimizer": "AdamW",
    f"{_ACTOR}.optim.lr_scheduler_type": "constant",
    f"{_ACTOR}.optim.lr_warmup_steps_ratio": 0.0,
    f"{_ACTOR}.ppo_epochs": 1,
    f"{_ACTOR}.loss_agg_mode": "token-mean",
    f"{_ACTOR}.entropy_coeff": 0,
    f"{_ACTOR}.use_kl_loss": False,
    "algorithm.use_kl_in_reward": False,
    f"{_ROLLOUT}.temperature": 1.0,
    f"{_ROLLOUT}.top_p": 1.0,
    f"{_ROLLOUT}.top_k": -1,
    f"{_ROLLOUT}.val_kwargs.temperature": 1.0,
    f"{_ROLLOUT}.val_kwargs.n": 1,
}


@dataclass(frozen=True)
class Settings:
    """One run of the engine."""

    method: str
    estimator: str  # one of method.estimators.ESTIMATORS
    options: GTPOOptions
    scale_by_std: bool  # of grpo
    task: Arithmetic
    policy: Path
    rules: Rules
    seed: int
    prompts: int  # a step
    rollouts: int  # a prompt
    steps: int
    test_freq: int  # steps between two validations
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    clip_low: float
    clip_high: float
    clip_grad: float
    micro_batch_tokens: int
    run_dir: Path
    trajectory_freq: int  # steps between two records of all trajectories
    compress: bool  # them
    keep: int | None  # those of the latest so many recorded steps

    @classmethod
    def of(cls, config: DictConfig, task: Task) -> Settings:
        """From a composed and prepared config (`run.checks.prepare`). Raises ConfigError for what it has not got."""
        if not isinstance(task, Arithmetic):
            raise ConfigError(f"task={task.name}: the plain-PyTorch engine has task=arithmetic only; use engine=verl")
        if config.algorithm.adv_estimator not in ESTIMATORS:
            raise ConfigError(
                f"algorithm.adv_estimator={config.algorithm.adv_estimator}: the plain-PyTorch engine has "
                f"{', '.join(ESTIMATORS)}; use engine=verl"
            )
        for key, value in FIXED.items():
            if (found := OmegaConf.select(config, key)) != value:
                raise ConfigError(f"{key}={found}: the plain-PyTorch engine has {value} only; use engine=verl")
        actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
        if actor.ppo_mini_batch_size != config.data.train_batch_size:
            raise ConfigError(
                f"{_ACTOR}.ppo_mini_batch_size={actor.ppo_mini_batch_size}: the plain-PyTorch engine makes one update "
                f"a step, so it must be data.train_batch_size={config.data.train_batch_size}"
            )
        if config.trainer.test_freq < 1:
            raise ConfigError(f"trainer.test_freq={config.trainer.test_freq}: at least 1, the curve is the result")
        if config.trainer.total_training_steps is None:
            raise ConfigError("trainer.total_training_steps=null: the plain-PyTorch engine counts steps; set a number")
        options = GTPOOptions.from_config(config.algorithm.gtpo)
        return cls(
            method=config.method,
            estimator=config.algorithm.adv_estimator,
            options=options,
            scale_by_std=config.algorithm.norm_adv_by_std_in_grpo,
            task=task,
            policy=Path(config.actor_rollout_ref.model.path),
            rules=Rules.of(rollout, options, {"python": tool_schema()["function"]["parameters"]}, task.extract_answer),
            seed=config.seed,
            prompts=config.data.train_batch_size,
            rollouts=rollout.n,
            steps=config.trainer.total_training_steps,
            test_freq=config.trainer.test_freq,
            learning_rate=actor.optim.lr,
            betas=(actor.optim.betas[0], actor.optim.betas[1]),
            weight_decay=actor.optim.weight_decay,
            clip_low=actor.clip_ratio_low,
            clip_high=actor.clip_ratio_high,
            clip_grad=actor.optim.clip_grad,
            micro_batch_tokens=actor.ppo_max_token_len_per_gpu,
            run_dir=Path(config.run_dir),
            trajectory_freq=config.trajectory_freq,
            compress=config.trajectory_zstd,
            keep=config.trajectory_keep,
        )


def refuse_unread(overrides: Sequence[str]) -> None:
    """Raise ConfigError for an override on the command line whose key the engine does not read."""
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if not any(key == known or key.startswith(f"{known}.") for known in READ):
            raise ConfigError(
                f"{override}: the plain-PyTorch engine does not read {key}; use engine=verl, or leave it out"
            )
