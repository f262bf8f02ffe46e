"""The ways a :class:`~verl_ext.tool_server.client.ToolClient` can have code run: one small class each.

A backend turns requests into results. It does not retry: the client does that, in one place, for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from verl_ext.tool_server.types import ExecutionRequest, ExecutionResult


class BackendUnavailable(RuntimeError):
    """The backend gave no answer (connection lost, queue full). Asking again with the same ids is safe.

    ``retry_after``: seconds the backend asked us to wait; ``busy``: it is alive and merely full; ``away``: nobody is
    there, or the connection broke, as where a server starts again.
    """

    def __init__(self, detail: str, retry_after: float = 0.0, busy: bool = False, away: bool = False) -> None:
        super().__init__(detail)
        self.retry_after, self.busy, self.away = retry_after, busy, away


class RequestRejected(ValueError):
    """The request is the caller's mistake (malformed, an unknown session, a wrong token); it is never retried."""


class Backend(Protocol):
    """What the client needs."""

    async def run(self, requests: Sequence[ExecutionRequest]) -> list[ExecutionResult]:
        """Return one result per request, in order. Raises ``BackendUnavailable`` or ``RequestRejected``."""
        ...

    async def open_session(self) -> str:
        """Open a session and return its id. Raises as :meth:`run` does."""
        ...

    async def close_session(self, session_id: str) -> None: ...

    async def health(self) -> dict[str, Any]:
        """Raises ``BackendUnavailable`` when the backend cannot run code."""
        ...

    async def close(self) -> None: ...
