"""How one execution crosses into the sandbox and back: an order with descriptors out, the kernel's account in.

The program travels in a sealed memory file, its output in pipes of its own. Whoever carries the order (a zygote, or the
supervisor of a session) sees neither.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from verl_ext.tool_server.types import ExecutionRequest, Limits

BACKSTOP_SECONDS = 2.0  # a carrier that has not enforced a deadline this long after it is given up
_READ_CHUNK = 256 * 1024
_ANCILLARY_BYTES = 256
_LINE_MARK_BYTES = 16  # nothing a program prints by chance
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN)


class WorkerLost(RuntimeError):
    """The zygote died or misbehaved; the execution it carried has no result."""


class NoRoom(WorkerLost):
    """This process lacks descriptors or memory for one more execution: it has not begun, and may when others end."""


class NotStarted(WorkerLost):
    """The zygote turned out to be dead before it got the order: the program has certainly not run."""


class Capture:
    """Head and tail of a byte stream in bounded memory.

    ``line_mark``: taken out wherever it appears (in one piece); what follows it starts on a line of its own.
    """

    def __init__(self, kept: int, line_mark: bytes = b"") -> None:
        self._half = kept // 2
        self._head = bytearray()
        self._tail = bytearray()
        self._mark = line_mark
        self._end_line = False  # a line's end is due before anything more
        self._last = b""
        self.total = 0

    def add(self, data: bytes) -> None:
        data, *marked = data.split(self._mark) if self._mark else [data]
        self._add(data)
        for data in marked:
            self._end_line = self._last not in (b"", b"\n")
            self._add(data)

    def _add(self, data: bytes) -> None:
        if self._end_line and data:
            self._end_line = False
            self._keep(b"\n")
        self._keep(data)

    def _keep(self, data: bytes) -> None:
        self.total += len(data)
        self._last = data[-1:] or self._last
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
    killed: str  # why it was killed: "", "wall", "output", "cancel"
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    stdout: Capture
    stderr: Capture
    marks: bytes  # the status bytes, see inside/runner.py


class Channel:
    """One end of a SOCK_SEQPACKET pair: whole JSON messages, descriptors alongside, in one event loop."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end

    @property
    def is_open(self) -> bool:
        return self._socket.fileno() >= 0

    def close(self) -> None:
        self._socket.close()

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Raises ``NotStarted`` when nobody is at the other end; the channel is then closed."""
        try:
            socket.send_fds(self._socket, [json.dumps(message).encode()], list(fds))
        except OSError as error:
            self.close()
            raise NotStarted(f"the zygote is gone: {error}") from error

    async def receive(self) -> dict[str, Any]:
        """The next message. Raises ``WorkerLost`` when the other end is gone."""
        return json.loads((await self.receive_with_ancillary())[0])

    async def receive_with_ancillary(self) -> tuple[bytes, list[tuple[int, int, bytes]]]:
        loop = asyncio.get_running_loop()
        while True:
            try:
                message, ancillary, _, _ = self._socket.recvmsg(4096, _ANCILLARY_BYTES)
            except BlockingIOError:
                readable = loop.create_future()
                loop.add_reader(self._socket.fileno(), _resolve, readable)
                try:
                    await readable
                finally:
                    if self.is_open:
                        loop.remove_reader(self._socket.fileno())
                continue
            except OSError as error:
                self.close()
                raise WorkerLost(f"the zygote is gone: {error}") from error
            if not message:
                self.close()
                raise WorkerLost("the zygote is gone")
            return message, ancillary

    async def execute(self, request: ExecutionRequest, order: dict[str, Any], limits: Limits) -> RawRun:
        """Have the carrier at the other end run one program under ``order``. Cancelling the task kills it.

        Raises:
            WorkerLost: no account of the program came back; the channel is closed and the carrier must be killed.
            NotStarted: likewise, and the program did not run.
            NoRoom: the carrier was asked nothing, and is as it was.
        """
        line_mark = secrets.token_bytes(_LINE_MARK_BYTES) if request.echo else b""
        order = order | {"line_mark": line_mark.hex()}
        stdout, stderr = Capture(limits.output_kept_bytes, line_mark), Capture(limits.output_kept_bytes)
        marks = Capture(16)
        killing = False

        def on_output() -> None:
            nonlocal killing
            if not killing and stdout.total + stderr.total > limits.output_kill_bytes:
                killing = True
                self.kill("output")

        loop = asyncio.get_running_loop()
        pipes: list[_Pipe] = []
        try:
            try:
                for capture in (stdout, stderr, marks):
                    pipes.append(_Pipe(capture, on_output))
                for pipe in pipes[:2]:  # the marks are a few bytes at most: read once, at the end
                    pipe.watch(loop)
                self._send_order(request, order, [pipe.write_fd for pipe in pipes])
            except OSError as error:
                raise lost_by(error, "cannot hand over the program") from error
            for pipe in pipes:
                pipe.close_write_end()
            answer = await self._await_answer(order["wall"])
            for pipe in pipes:
                pipe.drain()  # the writer has ended: all it ever wrote is in the pipe by now
        finally:
            for pipe in pipes:
                pipe.close()
        if "failed" in answer:
            self.close()
            raise WorkerLost(f"the zygote could not run the program: {answer['failed']}")
        seconds, cpu, rss = answer["seconds"], answer["cpu"], answer["rss"]
        return RawRun(
            answer["status"], answer["killed"], seconds, cpu, rss, stdout, stderr, marks.text().encode()
        )  # fmt: skip

    def kill(self, reason: str) -> None:
        """Ask the carrier to kill what it runs. No error when it is gone: then so is what it ran."""
        try:
            self.send({"kill": reason})
        except WorkerLost:
            pass

    def _send_order(self, request: ExecutionRequest, order: dict[str, Any], write_fds: list[int]) -> None:
        inputs = [_sealed_memfd(request.code)]
        try:
            if request.stdin is not None:
                inputs.append(_sealed_memfd(request.stdin))
            self.send(order, [inputs[0], *write_fds, *inputs[1:]])
        finally:
            for fd in inputs:
                os.close(fd)

    async def _await_answer(self, wall_seconds: float) -> dict[str, Any]:
        try:
            return await asyncio.wait_for(self.receive(), wall_seconds + BACKSTOP_SECONDS)
        except asyncio.TimeoutError as error:
            self.close()
            raise WorkerLost("a deadline was not enforced in the sandbox") from error
        except asyncio.CancelledError:
            # Kill the program but keep its carrier: it answers at once, and that answer must not stay in the socket.
            self.kill("cancel")
            try:
                await asyncio.wait_for(self.receive(), BACKSTOP_SECONDS)
            except (WorkerLost, asyncio.TimeoutError, asyncio.CancelledError):
                self.close()
            raise


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def lost_by(error: OSError, what: str) -> WorkerLost:
    """What to raise for an error on this side: ``NoRoom`` where it helps to wait."""
    return (NoRoom if error.errno in _SHORTAGES else WorkerLost)(f"{what}: {error}")


def _sealed_memfd(text: str) -> int:
    """An anonymous file holding ``text`` that nobody can change or grow any more."""
    fd = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(text.encode("utf-8", "surrogatepass"))
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


class _Pipe:
    """A pipe whose write end goes to the child; its read end feeds a :class:`Capture`."""

    def __init__(self, capture: Capture, on_data: Callable[[], None]) -> None:
        self._capture, self._on_data = capture, on_data
        self._loop: asyncio.AbstractEventLoop | None = None
        self.read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.read_fd, False)
        self._ended = False

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read whenever there is something."""
        loop.add_reader(self.read_fd, self._read)
        self._loop = loop

    def _read(self) -> bool:
        """Take one chunk. Returns whether there may be more."""
        try:
            data = os.read(self.read_fd, _READ_CHUNK)
        except BlockingIOError:
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
