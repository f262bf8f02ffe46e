"""``ToolClient``: the one way to have model-written code run, whatever runs it.

The program's own failures are results, never exceptions, and never retried. Only failures of the service are: with
growing pauses, under one deadline, with the same request id so that no server runs a program twice. One that answers
and fails is asked a few times; one that is not there, as it starts again, for a minute; one that is merely busy for as
long as the deadline lasts. When it stays away, the result says ``infra`` and the model is not charged.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from verl_ext.tool_server.backends import Backend, BackendUnavailable
from verl_ext.tool_server.types import ExecutionRequest, ExecutionResult, Isolation, Outcome

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
AWAY_SECONDS = 60.0


def is_ray(url: str | None) -> bool:
    """Whether this names no server, but an executor on every node of the Ray cluster that a process is connected to."""
    return url is not None and url.partition("://")[0] == "ray"


class ToolClient:
    """Runs code on a backend. Use as an async context manager, in the event loop that created it.

    Args:
        backend: where code runs; see the ``from_*`` constructors.
        deadline: default for the longest a call may take in all, queueing and retries included, in seconds.
        attempts: how often a request is handed to the service when it fails; being told "busy" does not count, nor
            does finding nobody there.
        away_seconds: for how long in a call a service by URL is looked for that cannot be reached; 0: once.
    """

    def __init__(
        self, backend: Backend, *, deadline: float = 300.0, attempts: int = 4, away_seconds: float = AWAY_SECONDS
    ) -> None:
        if attempts < 1 or deadline <= 0 or away_seconds < 0:
            raise ValueError("attempts must be at least 1, deadline positive and away_seconds not negative")
        self._backend = backend
        self._deadline = deadline
        self._attempts = attempts
        self._away_seconds = away_seconds

    @classmethod
    def from_url(cls, url: str, token: str | None = None, **options: Any) -> ToolClient:
        """A tool server at ``url``; ``ray``, or ``ray://strong``, stands for :meth:`from_ray` with that isolation."""
        if is_ray(url):
            return cls.from_ray(isolation=url.partition("://")[2] or "auto", **options)
        from verl_ext.tool_server.backends.http import HttpBackend

        return cls(HttpBackend(url, token), **options)

    @classmethod
    def local(
        cls, *, deadline: float = 300.0, attempts: int = 4, away_seconds: float = AWAY_SECONDS, **options: Any
    ) -> ToolClient:
        """Zygotes of this process, no server. ``options``: see :class:`~.backends.local.LocalBackend`."""
        from verl_ext.tool_server.backends.local import LocalBackend

        return cls(LocalBackend(**options), deadline=deadline, attempts=attempts, away_seconds=away_seconds)

    @classmethod
    def from_ray(
        cls, *, deadline: float = 300.0, attempts: int = 4, away_seconds: float = AWAY_SECONDS, **options: Any
    ) -> ToolClient:
        """One executor per node of the connected Ray cluster. ``options``: see :class:`~.backends.ray.RayBackend`."""
        from verl_ext.tool_server.backends.ray import RayBackend

        return cls(RayBackend(**options), deadline=deadline, attempts=attempts, away_seconds=away_seconds)

    @classmethod
    def sandbox_fusion(cls, url: str, **options: Any) -> ToolClient:
        """A service that speaks SandboxFusion's interface; see that backend for what gets lost."""
        from verl_ext.tool_server.backends.sandbox_fusion import SandboxFusionBackend

        return cls(SandboxFusionBackend(url), **options)

    async def __aenter__(self) -> ToolClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._backend.close()

    async def health(self) -> dict[str, Any]:
        """The backend's health report. Raises ``BackendUnavailable`` when it cannot run code."""
        return await self._backend.health()

    async def open_session(self) -> str:
        """Open a session (strong isolation only) and return the id to pass to :meth:`run`. Close it when done.

        Raises:
            BackendUnavailable, RequestRejected: no session can be had.
        """
        return await self._backend.open_session()

    async def close_session(self, session_id: str) -> None:
        """End a session. Raises ``RequestRejected`` when there is none of that id (it may have expired)."""
        await self._backend.close_session(session_id)

    async def run(
        self,
        code: str,
        timeout: float | None = None,
        session_id: str | None = None,
        stdin: str | None = None,
        *,
        echo: bool = True,
        deadline: float | None = None,
    ) -> ExecutionResult:
        """Run one program.

        Args:
            code: the program; the value of a last expression is shown when ``echo``.
            timeout: wall seconds; the server's own limit also holds.
            session_id: as :meth:`open_session` gave it; variables are kept between calls, a failed call changes none.
            stdin: text for standard input.
            deadline: seconds for the whole call; None: the client's default.

        Raises:
            RequestRejected: the request itself is wrong (an unknown session, a bad token).
        """
        request = ExecutionRequest(code, timeout=timeout, session_id=session_id, stdin=stdin, echo=echo)
        return (await self.run_batch([request], deadline=deadline))[0]

    async def run_batch(
        self, requests: Sequence[str | ExecutionRequest], *, deadline: float | None = None
    ) -> list[ExecutionResult]:
        """Run several programs at once. Returns their results in order; raises as :meth:`run` does."""
        orders = [r if isinstance(r, ExecutionRequest) else ExecutionRequest(r) for r in requests]
        ends = time.monotonic() + (self._deadline if deadline is None else deadline)
        results: dict[str, ExecutionResult] = {}
        last_failure = ""
        away_since: float | None = None
        failures = dict.fromkeys((order.request_id for order in orders), 0)
        pause = _FIRST_PAUSE_SECONDS
        run = self._backend.run

        def pending() -> list[ExecutionRequest]:
            return [o for o in orders if _unsettled(o, results) and failures[o.request_id] < self._attempts]

        while asked := pending():
            left = ends - time.monotonic()
            if left <= 0:
                break
            wait = pause * random.uniform(0.5, 1.0)
            try:
                results |= {result.request_id: result for result in await asyncio.wait_for(run(asked), left)}
                away_since = None
                busy = {id_ for id_, result in results.items() if result.busy}
                for order in asked:
                    failures[order.request_id] += order.request_id not in busy
                if busy:
                    wait = _FIRST_PAUSE_SECONDS  # they have waited long enough in the queue
            except BackendUnavailable as error:
                last_failure = str(error)
                wait = max(wait, error.retry_after)
                for order in asked:
                    failures[order.request_id] += not (error.busy or error.away)
                away_since = (away_since or time.monotonic()) if error.away else None
                if away_since is not None and time.monotonic() - away_since >= self._away_seconds:
                    break
            except asyncio.TimeoutError:
                last_failure = "the client's deadline passed"
                break
            if pending():
                await asyncio.sleep(min(wait, max(0.0, ends - time.monotonic())))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        unknown = last_failure or "no answer"
        return [
            results.get(o.request_id) or ExecutionResult.infra(o.request_id, unknown, Isolation.UNKNOWN) for o in orders
        ]


def _unsettled(order: ExecutionRequest, results: dict[str, ExecutionResult]) -> bool:
    """Whether ``order`` has no answer yet, or one that may be asked for again.

    A session's infra answer is final: its state may be gone, and running the turn on a fresh one would lie. Unless
    the turn was only waiting for a worker.
    """
    result = results.get(order.request_id)
    return result is None or (result.outcome is Outcome.INFRA and (result.busy or order.session_id is None))
