"""The server's end of one zygote: starts it, hands it executions one at a time, notices its death."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable
from typing import IO, Any

from verl_ext.tool_server.channel import BACKSTOP_SECONDS, Channel, NoRoom, RawRun, WorkerLost, lost_by
from verl_ext.tool_server.isolation import Tier
from verl_ext.tool_server.types import ExecutionRequest, Limits

START_SECONDS = 60.0  # importing scipy and sympy from a cold disk on a busy machine
# Tasks of a session's user: zygote, supervisor, holder of the state, running turn, and the turn's successor.
SESSION_TASKS = 5
# Where the user is not the zygote's own, RLIMIT_NPROC counts all tasks of that user, also those that start while a
# program runs (Ray, torch and vLLM start a thousand and more) and those in other containers, which cannot be seen from
# here. Hence the whole machine's, and many to spare: a program must not be refused a thread for what others do. It is
# not left out, because seccomp bars forks, but address space bounds only those threads that have a stack each.
SPARE_TASKS = 4096


class Worker:
    """One zygote. Not safe for concurrent :meth:`run`: the pool lends it to one execution or session at a time."""

    def __init__(self, tier: Tier, kind: str, index: int, limits: Limits) -> None:
        self.tier, self.kind, self.index, self.limits = tier, kind, index, limits
        self.executions = 0
        self.zygote_pid = 0  # in the server's pid namespace, as the kernel vouches for it
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._base_address_space = 0
        self._shares_user = False  # with tasks that are not ours
        self._stderr: IO[bytes] | None = None

    @property
    def alive(self) -> bool:
        running = self._process is not None and self._process.poll() is None
        return running and self._channel is not None and self._channel.is_open

    async def start(self) -> None:
        """Start the zygote and wait until its libraries are loaded.

        Raises:
            WorkerLost: it ended or did not report within ``START_SECONDS``; the message has its last words.
            NoRoom: this process lacks what one more takes.
        """
        try:
            self._stderr = tempfile.TemporaryFile()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            self.close()
            raise lost_by(error, "cannot start a zygote") from error
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._channel = Channel(ours)
        try:
            command = self.tier.command(self.kind, theirs.fileno(), self.index)
            identity: dict[str, Any] = {}
            if command.uid is not None:
                identity = {"user": command.uid, "group": command.uid, "extra_groups": []}
            # Exec from this thread, not a pool: PR_SET_PDEATHSIG follows the thread that starts the process.
            self._process = subprocess.Popen(
                command.argv,
                env=command.env,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                **identity,
            )
        except OSError as error:
            self.close()
            raise lost_by(error, "cannot start a zygote") from error
        finally:
            theirs.close()
        try:
            self._channel.send(command.config)
            message, ancillary = await asyncio.wait_for(self._channel.receive_with_ancillary(), START_SECONDS)
        except (WorkerLost, asyncio.TimeoutError) as error:
            reason = self.last_words() or str(error) or "no report in time"
            self.close()
            raise WorkerLost(f"zygote {self.kind!r} did not start: {reason}") from error
        except BaseException:
            self.close()
            raise
        assert json.loads(message) == {"ready": True}
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                self.zygote_pid = struct.unpack("3i", data[:12])[0]
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        try:
            with open(f"/proc/{self.zygote_pid}/statm") as statm:
                self._base_address_space = int(statm.read().split()[0]) * os.sysconf("SC_PAGESIZE")
        except OSError as error:
            self.close()
            raise lost_by(error, "cannot start a zygote") from error
        self._shares_user = not self.tier.namespaces and command.uid is None

    def last_words(self) -> str:
        """The last line the zygote wrote to its stderr, for the operator."""
        assert self._stderr is not None
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    async def run(self, request: ExecutionRequest, wall_seconds: float) -> RawRun:
        """Run one program. Cancelling the task kills the execution.

        Raises:
            WorkerLost: the zygote died, or could not confine the child. It must not be used again.
            NoRoom: this process lacks what one more execution takes; the zygote is as it was.
        """
        assert self._channel is not None
        self.executions += 1
        return await self._channel.execute(request, self._order(request, wall_seconds), self.limits)

    def _order(self, request: ExecutionRequest, wall_seconds: float) -> dict[str, Any]:
        return {
            "wall": wall_seconds,
            "cpu": self.limits.cpu_seconds,
            "memory": self._base_address_space + self.limits.memory_bytes,
            "files": self.limits.open_files,
            "threads": _tasks_of_this_machine() + SPARE_TASKS if self._shares_user else self.limits.threads,
            "scratch": self.limits.scratch_bytes,
            "echo": request.echo,
            "code_bytes": self.limits.code_bytes,
        }

    async def open_session(self, seconds: float) -> SessionProcess:
        """Start a session on this zygote, which is then lent out until the session ends (at most ``seconds``).

        Raises:
            WorkerLost: it did not start.
            NoRoom: this process lacks what one more session takes; the zygote is as it was.
        """
        assert self._channel is not None
        self.executions += 1
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise lost_by(error, "cannot start a session") from error
        channel = Channel(ours)
        order = self._order(ExecutionRequest(""), seconds) | {"session": True, "threads": SESSION_TASKS}
        try:
            self._channel.send(order, [theirs.fileno()])
            theirs.close()
            await asyncio.wait_for(channel.receive(), START_SECONDS)
        except (WorkerLost, asyncio.TimeoutError) as error:
            channel.close()
            self.close()
            raise WorkerLost(f"a session did not start: {error}") from error
        finally:
            theirs.close()
        return SessionProcess(self, channel)

    def close(self) -> None:
        """Kill the zygote, and with it whatever it runs. Safe to call twice."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        process, self._process = self._process, None
        if process is not None:
            if self.zygote_pid:
                _kill(self.zygote_pid, process)
            process.kill()
            process.wait()
        if self._stderr is not None:
            self._stderr.close()


class SessionProcess:
    """The processes that hold one session's state. Turns run one at a time; the caller sees to that."""

    def __init__(self, worker: Worker, channel: Channel) -> None:
        self.worker = worker
        self.on_close: Callable[[Worker], None] = lambda worker: None  # gets the zygote back
        self._channel = channel

    @property
    def alive(self) -> bool:
        return self._channel.is_open and self.worker.alive

    async def run(self, request: ExecutionRequest, wall_seconds: float) -> RawRun:
        """Run one turn. A turn that fails leaves the state as it was before.

        Raises:
            WorkerLost: the session is gone, with its state.
            NoRoom: this process lacks what one more turn takes; the session is as it was.
        """
        order = {
            "wall": wall_seconds,
            "cpu": self.worker.limits.cpu_seconds,
            "echo": request.echo,
            "code_bytes": self.worker.limits.code_bytes,
        }
        try:
            return await self._channel.execute(request, order, self.worker.limits)
        except NoRoom:
            raise
        except BaseException:
            self._channel.close()  # a cancelled turn too: what it left behind is nobody's state
            raise

    async def close(self) -> None:
        """End the session and free its zygote for other work."""
        self._channel.close()  # the supervisor ends on this, and all in its pid namespace with it
        channel = self.worker._channel
        if channel is not None and channel.is_open:
            channel.kill("cancel")
            try:
                await asyncio.wait_for(channel.receive(), BACKSTOP_SECONDS)
            except (WorkerLost, asyncio.TimeoutError):
                channel.close()
        self.on_close(self.worker)


def _kill(zygote_pid: int, process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the zygote itself where bwrap stands between us and it (bwrap passes its own death on, but later)."""
    if process.poll() is None and zygote_pid != process.pid:
        try:
            os.kill(zygote_pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _tasks_of_this_machine() -> int:
    """Threads of all processes of all users; a container shows the whole machine's too."""
    try:
        with open("/proc/loadavg") as loadavg:
            return int(loadavg.read().split()[3].partition("/")[2])
    except OSError as error:
        raise lost_by(error, "cannot count the machine's tasks") from error
