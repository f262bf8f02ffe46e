"""Many trajectories at once, each by the agent loop of training (`recipe/gtpo/agent_loop.py`), in this process.

What verl's agent-loop workers do around a loop is TransferQueue, padding and a trainer that waits; an evaluation needs
none of it. Loop, tools, reward and limits are the same objects, made of the same config.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
from verl.trainer.ppo.utils import create_rl_dataset
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig

from recipe.gtpo.agent_loop import GTPOAgentLoop
from recipe.gtpo.method.turns import TRAJECTORY, Trajectory
from recipe.gtpo.run.tools import close_tool, environment, load_tools


@dataclass(frozen=True)
class Rollout:
    trajectory: Trajectory
    token_ids: Sequence[int]  # of the response


def load_model_config(config: DictConfig) -> HFModelConfig:
    """Tokenizer, processor and config of the model, as verl's agent-loop worker has them."""
    model: HFModelConfig = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    if model.get("custom_chat_template", None) is not None:
        if model.processor is not None:
            model.processor.chat_template = model.custom_chat_template
        model.tokenizer.chat_template = model.custom_chat_template
    return model


def load_rows(config: DictConfig, model: HFModelConfig) -> Any:
    """The data set of `data.val_files`, as the trainer makes it: rows by number; `too_long` of them are left out."""
    import datasets

    datasets.disable_progress_bars()
    # It makes the tools, for what they add to a prompt, and calls none: any address will do. It prints how many rows.
    with environment({"GTPO_TOOL_SERVER_URL": "http://127.0.0.1"}), contextlib.redirect_stdout(io.StringIO()):
        return create_rl_dataset(
            config.data.val_files,
            config.data,
            model.tokenizer,
            model.processor,
            is_train=False,
            max_samples=config.data.get("val_max_samples", -1),
        )


class Roller:
    """Rolls out the problems of one benchmark's config.

    Args:
        server: what continues a conversation (`servers.py`).
    """

    def __init__(self, config: DictConfig, model: HFModelConfig, server: Any, tools: Sequence[Any]) -> None:
        config = copy.deepcopy(config)
        # Every turn has a seed of its own, made of the run's seed, step, problem, number of the sample and turn: a
        # second start repeats no draw of the first. Only the loop hears of it: servers and kernels are as in training.
        config.actor_rollout_ref.rollout.full_determinism = True
        config.actor_rollout_ref.rollout.calculate_log_probs = False  # nobody trains on them
        values = config.actor_rollout_ref.rollout.val_kwargs
        self._sampling = {
            "temperature": values.temperature,
            "top_p": values.top_p,
            "top_k": values.top_k,
            "repetition_penalty": 1.0,
            "logprobs": False,
        }
        kind = getattr(model.hf_config, "model_type", None)
        self._loop = GTPOAgentLoop(
            trainer_config=DictConfigWrap(config),
            server_manager=server,
            tokenizer=model.tokenizer,
            processor=model.processor,
            dataset_cls=None,
            data_config=DictConfigWrap(config.data),
            hf_model_type=kind if isinstance(kind, str) else None,
            tools=ToolListWrap(list(tools)),
        )

    async def roll_out(self, row: dict[str, Any], session: int, step: int) -> Rollout:
        """One trajectory. Never raises for what model, tool, server or reward function did: the record says it.

        Args:
            step: of training. With the seeds of `rollout.full_determinism`, which the CPU has, the first samples are
                those of the run's own validation at that step.
        """
        output = await self._loop.run(dict(self._sampling), **row, session_id=session, global_steps=step)
        return Rollout(Trajectory.from_dict(output.extra_fields[TRAJECTORY]), output.response_ids)


@contextlib.asynccontextmanager
async def opened_tools(config: DictConfig) -> AsyncIterator[list[Any]]:
    tools = load_tools(config)
    try:
        yield tools
    finally:
        for tool in tools:
            await close_tool(tool)


async def in_parallel(jobs: Iterable[Any], work: Callable[[Any], Awaitable[None]], most: int) -> None:
    """Do all jobs, `most` at a time, in order. What one raises ends the others, and is raised."""
    waiting = iter(jobs)

    async def worker() -> None:
        for job in waiting:
            await work(job)

    await all_or_none([worker() for _ in range(most)])


async def all_or_none(work: Iterable[Awaitable[None]]) -> None:
    """Wait for all; what one raises ends the others, and is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
