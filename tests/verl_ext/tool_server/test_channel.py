"""How an order leaves this process: with every descriptor it needs, or with none left open."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

from verl_ext.tool_server.channel import Channel, NoRoom, RawRun, WorkerLost
from verl_ext.tool_server.types import ExecutionRequest, Limits

pytestmark = pytest.mark.unit


def carry(end: socket.socket) -> None:
    """A carrier whose program says hello."""
    _, fds, _, _ = socket.recv_fds(end, 65536, 8)
    os.write(fds[1], b"hello")
    for fd in fds:
        os.close(fd)
    end.send(json.dumps({"status": 0, "killed": "", "seconds": 0.0, "cpu": 0.0, "rss": 0}).encode())


def failing(call: Callable[..., Any], number: int, code: int) -> Callable[..., Any]:
    """``call``, of which call ``number`` fails."""
    calls = iter(range(1, 100))

    def instead(*arguments: Any) -> Any:
        if next(calls) == number:
            raise OSError(code, os.strerror(code))
        return call(*arguments)

    return instead


@pytest.mark.parametrize(
    ("name", "number", "code", "raised"),
    [
        ("pipe2", 1, errno.EMFILE, NoRoom),
        ("pipe2", 2, errno.EMFILE, NoRoom),
        ("pipe2", 3, errno.ENFILE, NoRoom),
        ("memfd_create", 1, errno.EMFILE, NoRoom),
        ("memfd_create", 2, errno.ENOMEM, NoRoom),
        ("lseek", 2, errno.ENOMEM, NoRoom),
        ("lseek", 1, errno.EINVAL, WorkerLost),  # waiting would not help
    ],
)
def test_an_order_that_cannot_be_made_leaves_nothing_open(
    name: str, number: int, code: int, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    order = {"wall": 10.0, "echo": True}
    request = ExecutionRequest("1", stdin="2")

    async def go() -> RawRun:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, int)  # its thread and all it needs is there before the counting
        before = len(os.listdir("/proc/self/fd")), len(loop._selector.get_map())  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing(getattr(os, name), number, code))
            with pytest.raises(raised, match=os.strerror(code)) as caught:
                await channel.execute(request, order, Limits())
            assert caught.type is raised
        assert (len(os.listdir("/proc/self/fd")), len(loop._selector.get_map())) == before  # type: ignore[attr-defined]
        answering = loop.run_in_executor(None, carry, theirs)
        run = await channel.execute(request, order, Limits())
        await answering
        return run

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        channel = Channel(ours)
        assert asyncio.run(go()).stdout.text() == "hello"
