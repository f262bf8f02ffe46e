"""The server's end of one zygote: starts it, hands it executions one at a time, collects output, notices its death."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from verl_ext.tool_server.isolation import Tier
from verl_ext.tool_server.types import ExecutionRequest, Limits

START_SECONDS = 60.0  # importing scipy and sympy from a cold disk on a busy machine
BACKSTOP_SECONDS = 2.0  # a zygote that has not enforced a deadline this long after it is killed as a whole
_READ_CHUNK = 256 * 1024


class WorkerLost(RuntimeError):
    """The zygote died or misbehaved; the execution it carried has no result."""


class Capture:
    """Head and tail of a byte stream in bounded memory."""

    def __init__(self, kept: int) -> None:
        self._half = kept // 2
        self._head = bytearray()
        self._tail = bytearray()
        self.total = 0

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self._half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > 8 * self._half:  # trimmed rarely, so that small writes stay cheap
            del self._tail[: -self._half]

    @property
    def cut(self) -> int:
        """Bytes missing between head and tail."""
        return max(0, self.total - len(self._head) - self._half)

    def text(self) -> str:
        """The kept text, the cut marked with the number of bytes that are missing."""
        tail = self._tail[-self._half :]
        if not self.cut:
            return (self._head + tail).decode("utf-8", "replace")
        marker = f"\n[... {self.cut} bytes cut ...]\n"
        return self._head.decode("utf-8", "replace") + marker + tail.decode("utf-8", "replace")


@dataclass(frozen=True)
class RawRun:
    """The kernel's account of one execution, and what it wrote."""

    status: int  # as wait4 gives it
    killed: str  # why we killed it: "", "wall", "output", "cancel"
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    stdout: Capture
    stderr: Capture
    marks: bytes  # the status bytes, see inside/runner.py


class Worker:
    """One zygote. Not safe for concurrent :meth:`run`: the pool lends it to one execution at a time."""

    def __init__(self, tier: Tier, kind: str, index: int, limits: Limits) -> None:
        self.tier, self.kind, self.index, self.limits = tier, kind, index, limits
        self.executions = 0
        self.zygote_pid = 0  # in the server's pid namespace, as the kernel vouches for it
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._base_address_space = 0
        self._thread_limit = limits.threads
        self._stderr = tempfile.TemporaryFile()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._control is not None and self._process.poll() is None

    async def start(self) -> None:
        """Start the zygote and wait until its libraries are loaded.

        Raises:
            WorkerLost: it ended or did not report within ``START_SECONDS``; the message has its last words.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._control = ours
        try:
            command = self.tier.command(self.kind, theirs.fileno(), self.index)
            identity = {} if command.uid is None else {"user": command.uid, "group": command.uid, "extra_groups": []}
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
            raise WorkerLost(f"cannot start a zygote: {error}") from error
        finally:
            theirs.close()
        try:
            message, ancillary = await asyncio.wait_for(self._receive(), START_SECONDS)
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
        with open(f"/proc/{self.zygote_pid}/statm") as statm:
            self._base_address_space = int(statm.read().split()[0]) * os.sysconf("SC_PAGESIZE")
        if not self.tier.namespaces and command.uid is None:
            # RLIMIT_NPROC counts all of this user's tasks when neither the uid nor the user namespace is our own.
            self._thread_limit = _tasks_of_this_user() + 1024

    def last_words(self) -> str:
        """The last line the zygote wrote to its stderr, for the operator."""
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    async def run(self, request: ExecutionRequest, wall_seconds: float) -> RawRun:
        """Run one program. Cancelling the task kills the execution.

        Raises:
            WorkerLost: the zygote died, or could not confine the child. It must not be used again.
        """
        assert self._control is not None
        self.executions += 1
        loop = asyncio.get_running_loop()
        stdout, stderr = Capture(self.limits.output_kept_bytes), Capture(self.limits.output_kept_bytes)
        marks = Capture(16)
        killing = False

        def on_output() -> None:
            nonlocal killing
            if not killing and stdout.total + stderr.total > self.limits.output_kill_bytes:
                killing = True
                self._send_kill("output")

        pipes = [_Pipe(loop, capture, on_output) for capture in (stdout, stderr)]
        pipes.append(_Pipe(None, marks, on_output))  # a few bytes at most: read once, at the end
        try:
            self._send_order(request, wall_seconds, [p.write_fd for p in pipes])
            for pipe in pipes:
                pipe.close_write_end()
            answer = await self._await_answer(wall_seconds)
            for pipe in pipes:
                pipe.drain()  # the writer is dead: all it ever wrote is in the pipe by now
        finally:
            for pipe in pipes:
                pipe.close()
        if "failed" in answer:
            raise WorkerLost(f"the zygote could not run the program: {answer['failed']}")
        return RawRun(
            answer["status"],
            answer["killed"],
            answer["seconds"],
            answer["cpu"],
            answer["rss"],
            stdout,
            stderr,
            marks.text().encode(),
        )

    def _send_order(self, request: ExecutionRequest, wall_seconds: float, write_fds: list[int]) -> None:
        limits = self.limits
        order = {
            "wall": wall_seconds,
            "cpu": limits.cpu_seconds,
            "memory": self._base_address_space + limits.memory_bytes,
            "files": limits.open_files,
            "threads": self._thread_limit,
            "scratch": limits.scratch_bytes,
            "echo": request.echo,
            "code_bytes": limits.code_bytes,
        }
        assert self._control is not None
        inputs = [_sealed_memfd(request.code)]
        try:
            if request.stdin is not None:
                inputs.append(_sealed_memfd(request.stdin))
            fds = [inputs[0], *write_fds, *inputs[1:]]
            socket.send_fds(self._control, [json.dumps(order).encode()], fds)
        except OSError as error:
            raise WorkerLost(f"the zygote is gone: {error}") from error
        finally:
            for fd in inputs:
                os.close(fd)

    async def _await_answer(self, wall_seconds: float) -> dict:
        try:
            message, _ = await asyncio.wait_for(self._receive(), wall_seconds + BACKSTOP_SECONDS)
        except asyncio.TimeoutError as error:
            self.close()
            raise WorkerLost("the zygote did not enforce a deadline") from error
        except asyncio.CancelledError:
            # Kill the child but keep the zygote: it answers at once, and the answer must not be left in the socket.
            self._send_kill("cancel")
            try:
                await asyncio.wait_for(self._receive(), BACKSTOP_SECONDS)
            except (WorkerLost, asyncio.TimeoutError, asyncio.CancelledError):
                self.close()
            raise
        return json.loads(message)

    def _send_kill(self, reason: str) -> None:
        try:
            assert self._control is not None
            self._control.send(json.dumps({"kill": reason}).encode())
        except OSError:
            pass  # the zygote is gone, and with it the child; _receive reports it

    async def _receive(self) -> tuple[bytes, list[tuple[int, int, bytes]]]:
        """One message from the zygote. Raises ``WorkerLost`` when it is gone."""
        assert self._control is not None
        loop = asyncio.get_running_loop()
        control = self._control
        while True:
            try:
                message, ancillary, _, _ = control.recvmsg(4096, 256)
            except BlockingIOError:
                readable = loop.create_future()
                loop.add_reader(control.fileno(), _resolve, readable)
                try:
                    await readable
                finally:
                    if control.fileno() >= 0:
                        loop.remove_reader(control.fileno())
                continue
            except OSError as error:
                raise WorkerLost(f"the zygote is gone: {error}") from error
            if not message:
                raise WorkerLost("the zygote is gone")
            return message, ancillary

    def close(self) -> None:
        """Kill the zygote, and with it whatever it runs. Safe to call twice."""
        if self._control is not None:
            self._control.close()
            self._control = None
        process, self._process = self._process, None
        if process is not None:
            if self.zygote_pid:
                _kill(self.zygote_pid, process)
            process.kill()
            process.wait()
        self._stderr.close()


def _kill(zygote_pid: int, process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the zygote itself where bwrap stands between us and it (bwrap passes its own death on, but later)."""
    if process.poll() is None and zygote_pid != process.pid:
        try:
            os.kill(zygote_pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _sealed_memfd(text: str) -> int:
    """An anonymous file holding ``text`` that nobody can change or grow any more."""
    fd = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(text.encode("utf-8", "surrogatepass"))
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _tasks_of_this_user() -> int:
    """Threads of all processes of this user."""
    uid, count = os.geteuid(), 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid == uid:
                    count += len(os.listdir(f"/proc/{name}/task"))
            except OSError:
                continue  # it ended meanwhile
    return count


class _Pipe:
    """A pipe whose write end goes to the child and whose read end feeds a :class:`Capture`, watched by ``loop`` if any."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None, capture: Capture, on_data: Callable[[], None]) -> None:
        self._loop, self._capture, self._on_data = loop, capture, on_data
        self.read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.read_fd, False)
        self._ended = False
        if loop is not None:
            loop.add_reader(self.read_fd, self._read)

    def _read(self) -> bool:
        """Take one chunk. Returns whether there may be more."""
        try:
            data = os.read(self.read_fd, _READ_CHUNK)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
            return False
        if not data:
            self._ended = True
            self._unwatch()
            return False
        self._capture.add(data)
        self._on_data()
        return True

    def drain(self) -> None:
        while not self._ended and self._read():
            pass

    def close_write_end(self) -> None:
        if self.write_fd >= 0:
            os.close(self.write_fd)
            self.write_fd = -1

    def _unwatch(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self.read_fd)
            self._loop = None

    def close(self) -> None:
        self._unwatch()
        self.close_write_end()
        os.close(self.read_fd)
