"""One model on all benchmarks: its servers, its samples, what came of them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from copy import deepcopy
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from recipe.gtpo.agent_loop import ids_of, turn_end
from recipe.gtpo.evaluate.entries import Entry, say
from recipe.gtpo.evaluate.models import Model
from recipe.gtpo.evaluate.request import Request
from recipe.gtpo.evaluate.results import Result
from recipe.gtpo.evaluate.rollout import Roller, in_parallel, load_model_config, load_rows, opened_tools
from recipe.gtpo.evaluate.samples import Samples
from recipe.gtpo.evaluate.servers import Endpoint, own_ray, start_servers, watch
from recipe.gtpo.main import keep_logs, naming_lost_part, watch_machine
from recipe.gtpo.method.turns import Finish, Trajectory
from recipe.gtpo.run.errors import ConfigError
from recipe.gtpo.run.gpu import fill_logical_gpus, served_context
from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.tasks.unit_tests import close_client
from verl_ext.tool_server.launch import ServerHandle

_AT_ONCE = 64  # trajectories over an endpoint, where concurrency= does not say


class TooManyLost(RuntimeError):
    """Samples that failed on our side: the last cause."""


class Evaluation:
    """One model on all benchmarks."""

    def __init__(self, entries: Sequence[Entry], model: Model, step: int, record: RunRecord, request: Request) -> None:
        self.entries, self.model, self.step, self.record, self.request = entries, model, step, record, request
        self.samples = Samples(record, step, int(entries[0].config.seed))
        if again := self.samples.load():
            say(f"{again} samples of {model} failed on our side before: they are done again")
        self._lost = 0
        self.server_config = _server_config(entries, model)

    def load(self) -> None:
        """Tokenizer and data sets: who knows how many problems there are."""
        self.model_config = load_model_config(self.server_config)
        for entry in self.entries:
            entry.config.actor_rollout_ref.model.path = self.model.path
            rows = load_rows(entry.config, self.model_config)
            if entry.rows is not None and len(rows) != len(entry.rows):
                raise ConfigError(
                    f"{entry.name}: of its problems {len(entry.rows)} fit data.max_prompt_length="
                    f"{entry.config.data.max_prompt_length} for one model and {len(rows)} for the other: set it higher"
                )
            entry.rows = rows

    def missing(self, entry: Entry) -> list[tuple[int, int]]:
        return self.samples.missing(entry.name, len(entry.rows), entry.samples)

    @property
    def complete(self) -> bool:
        return not any(self.missing(entry) for entry in self.entries)

    async def with_servers(self) -> None:
        manager = await start_servers(self.server_config)
        rollout = self.server_config.actor_rollout_ref.rollout
        most = self.request.concurrency or rollout.max_num_seqs * len(manager.get_replicas())
        await self._beside(self._all(manager.get_client(), most), watch(manager, self.record, self.server_config))

    def _endpoint(self) -> Endpoint:
        tokenizer, request = self.model_config.tokenizer, self.request
        end = turn_end(tokenizer)
        if end is None:
            end = next(iter(ids_of(tokenizer.eos_token_id)), None)
        assert request.endpoint is not None
        return Endpoint(request.endpoint, request.served_model, tokenizer, end, request.api_key_env)

    async def ask_endpoint(self) -> dict[str, Any]:
        """What is said of the endpoint in the output. Raises ConfigError for one that cannot be used."""
        async with self._endpoint() as endpoint:
            for lost in endpoint.lost:
                say(f"warning: endpoint {endpoint.url}: {lost}")
            return {"url": endpoint.url, "model": endpoint.model, "lost": endpoint.lost}

    async def with_endpoint(self) -> None:
        async with self._endpoint() as endpoint:
            await self._all(endpoint, self.request.concurrency or _AT_ONCE)

    async def _beside(self, work: Coroutine, guard: Coroutine) -> None:
        """Until the work is done, or the guard raises."""
        guarding = asyncio.ensure_future(guard)
        working = asyncio.ensure_future(work)
        try:
            await asyncio.wait({guarding, working}, return_when=asyncio.FIRST_COMPLETED)
            await (guarding if guarding.done() else working)
        finally:
            for task in (guarding, working):
                task.cancel()
            await asyncio.gather(guarding, working, return_exceptions=True)

    async def _all(self, server: Any, most: int) -> None:
        try:
            for entry in self.entries:  # one after the other: problem and sample make the name of a request
                await self._one(entry, server, most)
        finally:
            await close_client()

    async def _one(self, entry: Entry, server: Any, most: int) -> None:
        missing = self.missing(entry)
        total = len(entry.rows) * entry.samples
        if not missing:
            return
        async with AsyncExitStack() as stack:
            tools = await stack.enter_async_context(opened_tools(entry.config))
            roller = Roller(entry.config, self.model_config, server, tools)
            seen = {"right": 0, "scored": 0, "infra": 0}
            bar = stack.enter_context(
                tqdm(total=total, initial=total - len(missing), desc=entry.name, unit="sample", mininterval=0.5)
            )

            async def sample(job: tuple[int, int]) -> None:
                index, session = job
                # A class of the user's own (data.custom_cls) may give rows other numbers, or all of them verl's 0:
                # samples that went by these would not be found again, or be one another's.
                row = {**entry.rows[index], "index": index}
                rollout = await roller.roll_out(row, session, self.step)
                done = self.samples.add(entry.name, row, session, rollout.trajectory, rollout.token_ids)
                seen["right"] += int(done.acc >= 1)
                seen["scored"] += int(done.scored)
                seen["infra"] += int(done.finish is Finish.INFRA)
                self._judge(entry, rollout.trajectory, seen["infra"], total)
                bar.set_postfix_str(
                    f"acc={seen['right'] / max(1, seen['scored']):.3f} infra={seen['infra']} lost={self._lost}",
                    refresh=False,
                )
                bar.update()

            await in_parallel(missing, sample, most)

    def _judge(self, entry: Entry, trajectory: Trajectory, infra: int, total: int) -> None:
        """Raise TooManyLost where a training run would end as well.

        Args:
            infra: samples that this start has lost to the tool server.
            total: all samples of the benchmark. What a second start finds missing may be just those that always fail.
        """
        config = entry.config
        if trajectory.finish is Finish.FAULT:
            self._lost += 1
            if self._lost > config.max_lost_trajectories:
                raise TooManyLost(
                    f"{self._lost} samples are lost (max_lost_trajectories={config.max_lost_trajectories}): "
                    f"{trajectory.fault.strip()}"
                )
        if infra > config.max_dropped_share * total:
            raise TooManyLost(
                f"{infra} of {total} samples of {entry.name} were failed by the tool server (max_dropped_share="
                f"{config.max_dropped_share:g}): {(trajectory.infra_outputs or [''])[-1].strip()}"
            )

    async def results(self) -> dict[str, Result]:
        found = {}
        for entry in self.entries:
            done = self.samples.of(entry.name, entry.samples)
            too_long = int(getattr(entry.rows, "too_long", 0))
            found[entry.name] = await Result.of(done, len(entry.rows), entry.samples, too_long, entry.task.same)
        return found


def _server_config(entries: Sequence[Entry], model: Model) -> DictConfig:
    """Of servers that hold the longest trajectory of all benchmarks."""
    config = deepcopy(entries[0].config)  # its interpolations are settled
    rollout, all_of_them = config.actor_rollout_ref.rollout, [one.config.actor_rollout_ref.rollout for one in entries]
    rollout.prompt_length = max(one.prompt_length for one in all_of_them)
    rollout.response_length = max(one.response_length for one in all_of_them)
    config.actor_rollout_ref.model.path = model.path
    limits = [one.max_model_len for one in all_of_them]
    longest = max(one.max_model_len or one.prompt_length + one.response_length for one in all_of_them)
    rollout.max_model_len = served_context(config, longest) if None in limits else longest
    fill_logical_gpus(config)
    return config


def roll_out(evaluation: Evaluation, server: ServerHandle | None) -> None:
    """All samples that are missing."""
    request, record, config = evaluation.request, evaluation.record, evaluation.server_config
    with watch_machine(server, record, config.watchdog.poll_seconds) as ending:
        try:
            with naming_lost_part(server, record):
                if request.endpoint is not None:
                    asyncio.run(evaluation.with_endpoint())
                    return
                say(f"starting the rollout servers of {evaluation.model}")
                with own_ray(config, record):
                    try:
                        asyncio.run(evaluation.with_servers())
                    finally:
                        ending.set()
                        keep_logs(record)
        finally:
            ending.set()
