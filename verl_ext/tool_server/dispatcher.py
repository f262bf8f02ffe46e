"""Decides who runs what and when: bounded queue, zygote pools by kind, one retry of lost work, idempotent request ids.

The HTTP server and the Ray actor are two faces of this one class.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import logging
import re
import time
from dataclasses import dataclass, field

from verl_ext.tool_server.channel import NoRoom, NotStarted, RawRun, WorkerLost
from verl_ext.tool_server.isolation import Tier
from verl_ext.tool_server.machine import raise_open_files
from verl_ext.tool_server.outcome import build_result
from verl_ext.tool_server.sessions import RequestRefused, Session, SessionTable
from verl_ext.tool_server.types import ExecutionRequest, ExecutionResult, Limits, Outcome
from verl_ext.tool_server.worker import Worker

logger = logging.getLogger(__name__)
KINDS = ("bare", "numpy", "sci")
ROOM_SECONDS = 0.5  # how soon an execution that this process had no room for is tried again
SESSION_SECONDS = 24 * 3600.0  # backstop in the zygote; the idle time ends sessions much sooner
RECYCLE_AFTER = 10_000  # executions; bounds whatever a long-lived interpreter or kernel object might accumulate
_REMEMBERED = 512  # finished results kept for a client that asks again; each has at most three kept outputs
_SCI = re.compile(r"^[ \t]*(?:import|from)\b[^\n#]*\b(?:sympy|scipy|mpmath)\b", re.MULTILINE)
_NUMPY = re.compile(r"^[ \t]*(?:import|from)\b[^\n#]*\bnumpy\b", re.MULTILINE)


class Overloaded(RuntimeError):
    """There is no room. ``retry_after`` is a guess, in seconds, of when it is worth asking again."""

    def __init__(self, retry_after: float, cause: str = "the queue is full") -> None:
        super().__init__(f"{cause}, try again in {retry_after:.1f} s")
        self.retry_after = retry_after


@dataclass
class Counters:
    """What /metrics shows."""

    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    queue_seconds: float = 0.0
    rejected: int = 0
    retried: int = 0
    zygotes_started: int = 0
    zygotes_lost: int = 0


@dataclass
class _Entry:
    """A request known by id: its execution and how many callers wait for it."""

    request: ExecutionRequest
    task: asyncio.Task[ExecutionResult]
    waiters: int = 0


def kind_of(code: str) -> str:
    """Which zygote to fork for ``code``. A wrong guess costs an import, never correctness."""
    if _SCI.search(code):
        return "sci"
    return "numpy" if _NUMPY.search(code) else "bare"


class Dispatcher:
    """Runs requests on at most ``workers`` zygote children at once; up to ``queue_size`` more may wait."""

    def __init__(
        self,
        tier: Tier,
        limits: Limits,
        workers: int,
        queue_size: int = 1024,
        queue_seconds: float = 60.0,
        max_sessions: int = 64,
        session_idle_seconds: float = 600.0,
    ) -> None:
        self.tier, self.limits, self.workers = tier, limits, workers
        self.queue_size, self.queue_seconds = queue_size, queue_seconds
        self.counters = Counters()
        self.sessions = SessionTable(max_sessions, session_idle_seconds)
        self.running = 0
        self._admitted = 0  # executions accepted and not ended
        self._waiting: collections.deque[asyncio.Future[bool]] = collections.deque()
        self._idle: dict[str, list[Worker]] = {kind: [] for kind in KINDS}
        self._all: set[Worker] = set()
        self._free_indices = itertools.count()
        self._returned_indices: list[int] = []
        self._known: collections.OrderedDict[str, _Entry] = collections.OrderedDict()
        self._closing = False

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def draining(self) -> bool:
        return self._closing

    @property
    def zygotes(self) -> list[Worker]:
        return list(self._all)

    async def start(self) -> None:
        """Start one zygote of each kind and run a program on it. Raises ``WorkerLost`` when that fails."""
        raise_open_files()
        for number, kind in enumerate(KINDS, 1):
            logger.info("loading interpreter %d of %d (%s)", number, len(KINDS), kind)
            self._idle[kind].append(await self._new_worker(kind))
        for kind in KINDS:
            await self.canary(kind)

    async def canary(self, kind: str = "bare") -> None:
        """Run a known program past the queue. Raises ``WorkerLost`` unless it answers correctly."""
        run = await self._run_on_a_living_zygote(ExecutionRequest("print(6 * 7)"), kind, wall=10.0)
        if run.stdout.text() != "42\n" or run.status != 0:
            raise WorkerLost(f"canary failed: status {run.status}, stderr {run.stderr.text()[-300:]!r}")

    async def execute(self, request: ExecutionRequest) -> ExecutionResult:
        """Run ``request``, or join or repeat the answer of an earlier one with the same id.

        Cancelling the last caller that waits for an execution kills it.

        Raises:
            Overloaded: the queue is full.
            RequestRefused: an unknown session, or an id that belongs to a different request.
        """
        if (refusal := self._too_large(request)) is not None:
            return self._count(refusal)
        if request.session_id is not None:
            self.sessions.get(request.session_id)
        entry = self._known.get(request.request_id)
        if entry is not None and entry.request != request:
            raise RequestRefused(f"request id {request.request_id!r} was used for a different request")
        if entry is None or (entry.task.done() and self._worth_repeating(entry.task)):
            self.check_room(1)
            entry = _Entry(request, asyncio.ensure_future(self._execute(request)))
            self._admitted += 1
            entry.task.add_done_callback(self._one_less)
            self._known[request.request_id] = entry
            self._known.move_to_end(request.request_id)
            self._forget_old()
        entry.waiters += 1
        try:
            return await asyncio.shield(entry.task)
        except asyncio.CancelledError:
            if entry.waiters == 1 and not entry.task.done():
                entry.task.cancel()
            raise
        finally:
            entry.waiters -= 1

    def open_session(self, session_id: str | None = None) -> str:
        """Open a session and return its id.

        Raises:
            RequestRefused: not in this isolation tier, too many sessions, or the id is taken.
        """
        if not self.tier.namespaces:
            # State is kept by forking, and only a pid namespace makes sure that a fork can be found and ended.
            raise RequestRefused(f"sessions need isolation 'strong'; this server runs {self.tier.isolation.value!r}")
        return self.sessions.open(session_id)

    def check_room(self, count: int) -> None:
        """Raise ``Overloaded`` unless ``count`` more requests fit."""
        if self._closing:
            raise Overloaded(5.0)
        # Counted from admission: a task that was created but has not had its first step is neither running nor waiting.
        if self._admitted + count > self.queue_size + self.workers:
            self.counters.rejected += count
            raise Overloaded(self.retry_after())

    def retry_after(self) -> float:
        """A guess, in seconds, of when a worker will be free for one who asks now."""
        finished = sum(self.counters.outcomes.values())
        mean = self.counters.seconds / finished if finished else 1.0
        return min(30.0, max(0.5, mean * (len(self._waiting) + 1) / self.workers))

    def _one_less(self, task: asyncio.Task[ExecutionResult]) -> None:
        self._admitted -= 1

    @staticmethod
    def _worth_repeating(task: asyncio.Task[ExecutionResult]) -> bool:
        """Whether a finished execution said nothing about its program, so that the same id may run again."""
        return task.cancelled() or task.exception() is not None or task.result().outcome is Outcome.INFRA

    def _too_large(self, request: ExecutionRequest) -> ExecutionResult | None:
        """The result of a request over a size limit: the program's fault, told to the model like any other error."""
        limits = self.limits
        sizes = (("code", request.code, limits.code_bytes), ("stdin", request.stdin, limits.stdin_bytes))
        for name, text, most in sizes:
            if text and (len(text) > most or len(text.encode("utf-8", "surrogatepass")) > most):
                note = f"[error: not run, {name} is larger than {most} bytes]"
                isolation = self.tier.isolation
                return ExecutionResult(Outcome.ERROR, note, "", note, request.request_id, isolation, exit_code=1)
        return None

    def _forget_old(self) -> None:
        while len(self._known) > _REMEMBERED:
            request_id, entry = next(iter(self._known.items()))
            if not entry.task.done():
                break  # the oldest still runs; the queue bound keeps the rest of the table small
            del self._known[request_id]

    async def _execute(self, request: ExecutionRequest) -> ExecutionResult:
        queued = time.monotonic()
        if not await self._acquire_slot():
            return self._waited_too_long(request, "a free worker")
        try:
            while True:
                try:
                    return self._count(await self._run(request, time.monotonic() - queued))
                except NoRoom as error:
                    if time.monotonic() - queued > self.queue_seconds:
                        return self._waited_too_long(request, f"room ({error})")
                await asyncio.sleep(ROOM_SECONDS)  # the slot is kept: while room is short, less runs at once
        finally:
            self._release_slot()

    def _waited_too_long(self, request: ExecutionRequest, what: str) -> ExecutionResult:
        self.counters.rejected += 1
        detail = f"waited longer than {self.queue_seconds:g} s for {what}"
        return ExecutionResult.infra(request.request_id, detail, self.tier.isolation, busy=True)

    async def _run(self, request: ExecutionRequest, queue_seconds: float) -> ExecutionResult:
        wall = min(request.timeout or self.limits.wall_seconds, self.limits.wall_seconds)
        if request.session_id is not None:
            return await self._run_turn(request, request.session_id, wall, queue_seconds)
        result = await self._run_once(request, wall, queue_seconds, attempt=1)
        if result.outcome is Outcome.INFRA:
            # The zygote or the child was lost to an outside cause. Stateless work can simply be done again.
            self.counters.retried += 1
            result = await self._run_once(request, wall, queue_seconds, attempt=2)
        return result

    async def _run_once(
        self, request: ExecutionRequest, wall: float, queue_seconds: float, attempt: int
    ) -> ExecutionResult:
        try:
            run = await self._run_on_a_living_zygote(request, kind_of(request.code), wall)
        except NoRoom:
            raise
        except WorkerLost as error:
            return ExecutionResult.infra(request.request_id, str(error), self.tier.isolation, attempts=attempt)
        return build_result(
            request, run, self.limits, self.tier.isolation, self.tier.runtime, wall, queue_seconds, attempt
        )

    async def _run_on_a_living_zygote(self, request: ExecutionRequest, kind: str, wall: float) -> RawRun:
        """Run on the first zygote that takes the order: one that died in the pool is not a lost execution."""
        while True:
            worker = await self._take_worker(kind)
            try:
                return await worker.run(request, wall)
            except NotStarted:
                continue  # _give_back discards it, so this ends with a fresh zygote at the latest
            finally:
                self._give_back(worker)

    async def _run_turn(
        self, request: ExecutionRequest, session_id: str, wall: float, queue_seconds: float
    ) -> ExecutionResult:
        """Run one turn of a session. A turn is never repeated: its session's state may have gone with it."""
        isolation = self.tier.isolation
        session = self.sessions.get(session_id)
        async with session.turn:
            self.sessions.touch(session_id, session)
            if session.lost:
                return ExecutionResult.infra(request.request_id, f"the session is lost: {session.lost}", isolation)
            try:
                if session.process is None:
                    await self._start_session(session, kind_of(request.code))
                assert session.process is not None
                run = await session.process.run(request, wall)
            except NoRoom:
                raise  # before the turn began: the state is as it was
            except (WorkerLost, asyncio.CancelledError) as error:
                session.lost = str(error) or "a turn was cancelled"
                await self._end_session(session)
                if isinstance(error, asyncio.CancelledError):
                    raise
                return ExecutionResult.infra(request.request_id, f"the session is lost: {session.lost}", isolation)
            finally:
                self.sessions.touch(session_id, session)
        return build_result(request, run, self.limits, isolation, self.tier.runtime, wall, queue_seconds, attempts=1)

    async def _start_session(self, session: Session, kind: str) -> None:
        worker = await self._take_worker(kind)
        try:
            session.process = await worker.open_session(SESSION_SECONDS)
        except BaseException:
            self._give_back(worker)
            raise
        session.process.on_close = self._give_back

    async def _end_session(self, session: Session) -> None:
        process, session.process = session.process, None
        if process is not None:
            await process.close()

    def _count(self, result: ExecutionResult) -> ExecutionResult:
        self.counters.outcomes[result.outcome.value] += 1
        self.counters.seconds += result.seconds
        self.counters.cpu_seconds += result.cpu_seconds
        self.counters.queue_seconds += result.queue_seconds
        return result

    async def _acquire_slot(self) -> bool:
        """Wait, first come first served, for one of ``workers`` slots. Returns False after ``queue_seconds``."""
        if self.running < self.workers and not self._waiting:
            self.running += 1
            return True
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        timer = asyncio.get_running_loop().call_later(self.queue_seconds, _resolve, turn, False)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.result():
                self._release_slot()  # the slot was handed over in the moment we were cancelled
            raise
        finally:
            timer.cancel()
            if turn in self._waiting:
                self._waiting.remove(turn)

    def _release_slot(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(True)  # the slot changes hands; `running` stays
                return
        self.running -= 1

    async def _take_worker(self, kind: str) -> Worker:
        while self._idle[kind]:
            worker = self._idle[kind].pop()
            if worker.alive:
                return worker
            self.counters.zygotes_lost += 1
            self._discard(worker)
        return await self._new_worker(kind)

    async def _new_worker(self, kind: str) -> Worker:
        index = self._returned_indices.pop() if self._returned_indices else next(self._free_indices)
        worker = Worker(self.tier, kind, index, self.limits)
        self._all.add(worker)
        try:
            await worker.start()
        except BaseException:
            self._discard(worker)
            raise
        self.counters.zygotes_started += 1
        return worker

    def _give_back(self, worker: Worker) -> None:
        if worker.alive and worker.executions < RECYCLE_AFTER and not self._closing:
            self._idle[worker.kind].append(worker)
        else:
            if not worker.alive:
                self.counters.zygotes_lost += 1
            self._discard(worker)

    def _discard(self, worker: Worker) -> None:
        worker.close()
        if worker in self._all:
            self._all.remove(worker)
            self._returned_indices.append(worker.index)

    async def drain(self, seconds: float) -> None:
        """Take no new work, give running and queued work ``seconds`` to end, then kill what is left."""
        self._closing = True
        tasks = [entry.task for entry in self._known.values() if not entry.task.done()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self.sessions.close_all()
        for worker in self.zygotes:
            self._discard(worker)


def _resolve(future: asyncio.Future[bool], value: bool) -> None:
    if not future.done():
        future.set_result(value)
