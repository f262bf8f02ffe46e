"""Backend ``local``: the dispatcher inside this process, without HTTP. Code still runs in zygotes started by exec."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl_ext.tool_server.backends import BackendUnavailable, RequestRejected
from verl_ext.tool_server.channel import WorkerLost
from verl_ext.tool_server.dispatcher import Dispatcher, Overloaded
from verl_ext.tool_server.machine import processors
from verl_ext.tool_server.probe import reach_tier
from verl_ext.tool_server.runtime import DEFAULT_PACKAGES, ensure_runtime
from verl_ext.tool_server.sessions import RequestRefused
from verl_ext.tool_server.types import ExecutionRequest, ExecutionResult, Limits


class LocalBackend:
    """Starts on first use, in the event loop that uses it.

    Args:
        isolation: ``strong``, ``standard`` or ``auto``; a tier that does not hold here is an error at first use.
        workers: executions at once; None: one per CPU.
    """

    def __init__(
        self,
        isolation: str = "auto",
        workers: int | None = None,
        limits: Limits | None = None,
        queue_size: int = 1024,
        packages: Sequence[str] = DEFAULT_PACKAGES,
        runtime_dir: Path | None = None,
    ) -> None:
        self._isolation, self._limits = isolation, limits or Limits()
        self.workers = workers or processors()
        self._queue_size, self._packages, self._runtime_dir = queue_size, packages, runtime_dir
        self._dispatcher: Dispatcher | None = None
        self._starting = asyncio.Lock()

    async def dispatcher(self) -> Dispatcher:
        """The running dispatcher.

        Raises:
            TierUnavailable, RuntimeBuildError: this machine cannot run code safely; retrying will not help.
            BackendUnavailable: the zygotes did not start.
        """
        async with self._starting:
            if self._dispatcher is None:
                runtime = await asyncio.to_thread(ensure_runtime, self._runtime_dir, self._packages)
                try:
                    tier = await reach_tier(self._isolation, runtime)
                    dispatcher = Dispatcher(tier, self._limits, self.workers, self._queue_size)
                    await dispatcher.start()
                except WorkerLost as error:
                    raise BackendUnavailable(str(error)) from error
                self._dispatcher = dispatcher
        return self._dispatcher

    @property
    def load(self) -> int:
        """Executions running or waiting."""
        return self._dispatcher.running + self._dispatcher.waiting if self._dispatcher else 0

    async def run(self, requests: Sequence[ExecutionRequest]) -> list[ExecutionResult]:
        dispatcher = await self.dispatcher()
        answers = await asyncio.gather(*map(dispatcher.execute, requests), return_exceptions=True)
        results = []
        for request, answer in zip(requests, answers, strict=True):
            if isinstance(answer, Overloaded):
                if len(requests) == 1:
                    raise BackendUnavailable(str(answer), answer.retry_after, busy=True) from answer
                isolation = dispatcher.tier.isolation
                answer = ExecutionResult.infra(request.request_id, str(answer), isolation, busy=True)
            elif isinstance(answer, RequestRefused):
                raise RequestRejected(str(answer)) from answer
            elif isinstance(answer, BaseException):
                raise answer
            results.append(answer)
        return results

    async def open_session(self) -> str:
        try:
            return (await self.dispatcher()).open_session()
        except RequestRefused as error:
            raise RequestRejected(str(error)) from error

    async def close_session(self, session_id: str) -> None:
        try:
            await (await self.dispatcher()).sessions.close(session_id)
        except RequestRefused as error:
            raise RequestRejected(str(error)) from error

    async def health(self) -> dict[str, Any]:
        dispatcher = await self.dispatcher()
        try:
            await dispatcher.canary()
        except WorkerLost as error:
            raise BackendUnavailable(str(error)) from error
        return {"status": "ok", "isolation": dispatcher.tier.isolation.value, "workers": self.workers}

    async def close(self) -> None:
        if self._dispatcher is not None:
            await self._dispatcher.drain(0.0)
