"""Opt-in state between turns: which sessions exist, who may use them, and when they end.

A session is opened explicitly and named by an id, so that a restarted server or an expired session is an error the
caller sees, never a turn that quietly starts from nothing. The processes behind it are in inside/session.py.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field

from verl_ext.tool_server.worker import SessionProcess


class RequestRefused(ValueError):
    """The request itself cannot be served (an unknown session, a reused id). Retrying will not help."""


@dataclass
class Session:
    """One open session; its process is started by the first turn, on a zygote that fits that turn's imports."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # turns of one session run in order, one at a time
    process: SessionProcess | None = None
    lost: str = ""
    expiry: asyncio.TimerHandle | None = None


class SessionTable:
    """Sessions by id, at most ``most`` of them, each ended after ``idle_seconds`` without a turn."""

    def __init__(self, most: int, idle_seconds: float) -> None:
        self.most, self.idle_seconds = most, idle_seconds
        self._sessions: dict[str, Session] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, session_id: str | None) -> str:
        """Register a session. Returns its id. Raises ``RequestRefused`` when the id is taken or the table is full."""
        session_id = session_id or uuid.uuid4().hex
        if session_id in self._sessions:
            raise RequestRefused(f"session {session_id!r} is already open")
        if len(self._sessions) >= self.most:
            raise RequestRefused(f"{self.most} sessions are open already (--max-sessions)")
        session = self._sessions[session_id] = Session()
        self.touch(session_id, session)
        return session_id

    def get(self, session_id: str) -> Session:
        """Raises ``RequestRefused`` when there is no such session (never opened, closed, or expired)."""
        try:
            return self._sessions[session_id]
        except KeyError:
            raise RequestRefused(
                f"no session {session_id!r}: open it with POST /v1/sessions; idle ones expire"
            ) from None

    def touch(self, session_id: str, session: Session) -> None:
        """Start the idle time anew."""
        if session.expiry is not None:
            session.expiry.cancel()
        session.expiry = asyncio.get_running_loop().call_later(self.idle_seconds, self._expire, session_id)

    def _expire(self, session_id: str) -> None:
        session = self._sessions.get(session_id)
        if session is None or session.turn.locked():
            return  # a turn is running or waiting to; it starts the idle time anew when it ends
        task = asyncio.ensure_future(self.close(session_id))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def close(self, session_id: str) -> None:
        """End a session once its running turn is over. Raises ``RequestRefused`` when there is no such session."""
        session = self.get(session_id)
        del self._sessions[session_id]
        if session.expiry is not None:
            session.expiry.cancel()
        async with session.turn:
            if session.process is not None:
                process, session.process = session.process, None
                session.lost = "closed"
                await process.close()

    async def close_all(self) -> None:
        for session_id in list(self._sessions):
            await self.close(session_id)
        await asyncio.gather(*self._ending, return_exceptions=True)
