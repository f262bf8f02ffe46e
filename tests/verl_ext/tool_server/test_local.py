"""The dispatcher inside this process: pools, recycling and the wait for a worker."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from lab import descendants, process_table

from verl_ext.tool_server import ExecutionRequest, Outcome, ToolClient
from verl_ext.tool_server.backends import RequestRejected

pytestmark = pytest.mark.e2e


def with_local(use: Callable[[ToolClient, Any], Awaitable[Any]], **options: Any) -> Any:
    async def go() -> Any:
        async with ToolClient.local(packages=("numpy",), **options) as client:
            return await use(client, await client._backend.dispatcher())

    return asyncio.run(go())


def test_local_runs_code_keeps_sessions_and_leaves_nothing() -> None:
    async def use(client: ToolClient, dispatcher: Any) -> None:
        assert (await client.health())["isolation"] == "strong"
        assert [r.output for r in await client.run_batch([f"{i}" for i in range(5)])] == [f"{i}\n" for i in range(5)]
        session = await client.open_session()
        await client.run("x = 5", session_id=session)
        assert (await client.run("x", session_id=session)).output == "5\n"
        await client.close_session(session)
        with pytest.raises(RequestRejected):
            await client.run("x", session_id=session)

    before = descendants(process_table(), os.getpid())
    with_local(use, isolation="strong", workers=2)
    table = process_table()
    left = descendants(table, os.getpid()) - before
    assert not any("zygote.main()" in table[pid][2] for pid in left)


def test_a_zygote_is_replaced_after_its_share_of_executions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl_ext.tool_server.dispatcher.RECYCLE_AFTER", 3)

    async def use(client: ToolClient, dispatcher: Any) -> None:
        before = dispatcher.counters.zygotes_started
        for i in range(9):
            assert (await client.run(f"{i}")).output == f"{i}\n"
        assert dispatcher.counters.zygotes_started - before == 3
        assert len(dispatcher.zygotes) <= 3

    with_local(use, isolation="standard", workers=1)


def test_waiting_too_long_for_a_worker_is_our_fault() -> None:
    async def use(client: ToolClient, dispatcher: Any) -> None:
        dispatcher.queue_seconds = 0.3
        slow = asyncio.ensure_future(client.run("import time; time.sleep(1.5); 1"))
        await asyncio.sleep(0.3)
        result = (await client._backend.run([ExecutionRequest("2")]))[0]
        assert result.outcome is Outcome.INFRA and "waited longer" in result.detail
        assert (await slow).output == "1\n"
        assert (await client.run("3")).output == "3\n", "the slot is free again"
        assert dispatcher.running == dispatcher.waiting == 0

    with_local(use, isolation="standard", workers=1)


def test_cancelling_frees_the_worker_wherever_the_request_is() -> None:
    async def use(client: ToolClient, dispatcher: Any) -> None:
        tasks = [asyncio.ensure_future(client.run("import time; time.sleep(10)")) for _ in range(3)]
        await asyncio.sleep(0.5)
        assert (dispatcher.running, dispatcher.waiting) == (1, 2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (await client.run("4")).output == "4\n"
        assert (dispatcher.running, dispatcher.waiting) == (0, 0)

    with_local(use, isolation="strong", workers=1)


class Shortage:
    """In the place of ``os.pipe2``: fails while ``left`` is not used up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        self._pipe2 = os.pipe2
        monkeypatch.setattr(os, "pipe2", self)
        monkeypatch.setattr("verl_ext.tool_server.dispatcher.ROOM_SECONDS", 0.01)

    def __call__(self, flags: int) -> tuple[int, int]:
        if self.left > 0:
            self.left -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._pipe2(flags)


def test_without_descriptors_an_execution_waits_for_some(monkeypatch: pytest.MonkeyPatch) -> None:
    shortage = Shortage(monkeypatch)

    async def use(client: ToolClient, dispatcher: Any) -> None:
        before = len(os.listdir("/proc/self/fd"))
        shortage.left = 5
        (result,) = await client._backend.run([ExecutionRequest("1")])
        assert (result.output, result.attempts, shortage.left) == ("1\n", 1, 0)
        dispatcher.queue_seconds, shortage.left = 0.05, 10**9
        (result,) = await client._backend.run([ExecutionRequest("2")])
        assert result.outcome is Outcome.INFRA and result.busy and "Too many open files" in result.detail
        shortage.left = 0
        assert (await client.run("3")).output == "3\n"
        assert dispatcher.running == dispatcher.waiting == 0 and dispatcher.counters.zygotes_lost == 0
        assert len(os.listdir("/proc/self/fd")) == before

    with_local(use, isolation="standard", workers=1)


def test_without_descriptors_a_zygote_waits_for_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the descriptors it is that one is missing."""

    async def use(client: ToolClient, dispatcher: Any) -> None:
        dispatcher.queue_seconds = 0.05
        monkeypatch.setattr("verl_ext.tool_server.dispatcher.ROOM_SECONDS", 0.01)
        outcomes = []
        while Outcome.OK not in outcomes:
            for worker in dispatcher.zygotes:
                dispatcher._idle[worker.kind].clear()
                dispatcher._discard(worker)
            before = len(os.listdir("/proc/self/fd")) - 1  # the listing has one
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (before + len(outcomes), limits[1]))
                (result,) = await client._backend.run([ExecutionRequest("1")])
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert result.ok or result.busy, result.detail
            assert len(os.listdir("/proc/self/fd")) - 1 == before + 2 * len(dispatcher.zygotes)
            outcomes.append(result.outcome)
        assert len(outcomes) > 5
        assert sorted(dispatcher._returned_indices + [worker.index for worker in dispatcher.zygotes]) == [0, 1, 2]

    with_local(use, isolation="standard", workers=1)


def test_without_descriptors_a_session_keeps_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    shortage = Shortage(monkeypatch)

    async def use(client: ToolClient, dispatcher: Any) -> None:
        session = await client.open_session()
        await client.run("x = 5", session_id=session)
        shortage.left = 2
        assert (await client.run("x", session_id=session)).output == "5\n"
        assert shortage.left == 0

    with_local(use, isolation="strong", workers=1)


def test_the_limit_of_open_files_is_raised() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def use(client: ToolClient, dispatcher: Any) -> None:
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limits[1], limits[1])
        code = "import resource; resource.getrlimit(resource.RLIMIT_NOFILE)"
        assert (await client.run(code)).output == "(64, 64)\n", "a program's own limit stays"

    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1] // 2, limits[1]))
        with_local(use, isolation="standard", workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
