"""State between turns: kept by success, untouched by failure, never shared, never silently lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from lab import Server, World, own_server

from verl_ext.tool_server import ExecutionResult, ToolClient
from verl_ext.tool_server.backends import RequestRejected

pytestmark = pytest.mark.e2e


def in_session(server: Server, use: Callable[[Callable[..., Awaitable[ExecutionResult]]], Awaitable[Any]]) -> Any:
    async def go() -> Any:
        async with ToolClient.from_url(server.url, attempts=1) as client:
            session = await client.open_session()

            async def turn(code: str, **options: Any) -> ExecutionResult:
                return await client.run(code, session_id=session, **options)

            try:
                return await use(turn)
            finally:
                await client.close_session(session)

    return asyncio.run(go())


def turns(server: Server, *codes: str, **options: Any) -> list[ExecutionResult]:
    async def use(turn: Callable[..., Awaitable[ExecutionResult]]) -> list[ExecutionResult]:
        return [await turn(code, **options) for code in codes]

    return in_session(server, use)


def test_state_is_kept(strong_server: Server) -> None:
    codes = "import numpy as np\nx = np.arange(3)", "x = x * 2\nx", "def f(): return x.sum()", "int(f())"
    results = turns(strong_server, *codes)
    assert [result.output for result in results] == ["", "array([0, 2, 4])\n", "", "6\n"]


@pytest.mark.parametrize(
    ("failing", "outcome"),
    [
        ("x = 2\n1 / 0", "error"),
        ("x = 2\nimport sys; sys.exit(1)", "error"),
        ("x = 2\nimport os; os._exit(0)", "error"),  # nobody is left who could hold its state
        ("x = 2 +", "syntax_error"),
        ("x = 2\nwhile True: pass", "timeout"),
        ("x = 2\nx = bytearray(2**31)", "memory"),
        ("x = 2\nimport ctypes; ctypes.string_at(0)", "crash"),
        ("x = 2\nwhile True: print('x' * 1000)", "output_limit"),
        ("x = 2\nimport os\nif os.fork() == 0:\n    import time; time.sleep(60)", "error"),
        ("x = 2\nimport os\nwhile True: os.fork()", "error"),
    ],
)
def test_a_failed_turn_leaves_the_state_as_it_was(strong_server: Server, failing: str, outcome: str) -> None:
    before, failed, after = turns(strong_server, "x = 1", failing, "x", timeout=0.5)
    assert before.ok
    assert failed.outcome.value == outcome, failed
    assert after.output == "1\n"


def test_tracebacks_show_lines_of_earlier_turns(strong_server: Server) -> None:
    *_, failed = turns(strong_server, "def f():\n    raise KeyError('deep')", "1", "f()")
    assert '<code 3>", line 1' in failed.output and "raise KeyError('deep')" in failed.output


def test_sessions_do_not_see_each_other(strong_server: Server) -> None:
    async def go() -> list[str]:
        async with ToolClient.from_url(strong_server.url) as client:
            a, b = await client.open_session(), await client.open_session()
            firsts = (a, "x = 'a'; open('f', 'w')"), (b, "x = 'b'")
            await asyncio.gather(*(client.run(code, session_id=session) for session, code in firsts))
            code = "import os; print(x, os.listdir())"
            answers = [await client.run(code, session_id=s) for s in (a, b)]
            stateless = await client.run("x")
            await client.close_session(a)
            await client.close_session(b)
            return [answer.output for answer in (*answers, stateless)]

    a, b, stateless = asyncio.run(go())
    assert (a, b) == ("a ['f']\n", "b []\n") and "NameError" in stateless


def test_turns_sent_at_once_run_one_after_the_other(strong_server: Server) -> None:
    async def use(turn: Callable[..., Awaitable[ExecutionResult]]) -> list[ExecutionResult]:
        await turn("n = 0")
        return await asyncio.gather(*(turn("n += 1\nn") for _ in range(5)))

    assert sorted(result.output for result in in_session(strong_server, use)) == [f"{i}\n" for i in range(1, 6)]


def test_a_session_must_be_opened_and_ends_when_closed(strong_server: Server) -> None:
    async def go() -> None:
        async with ToolClient.from_url(strong_server.url) as client:
            with pytest.raises(RequestRejected, match="no session"):
                await client.run("1", session_id="never-opened")
            session = await client.open_session()
            await client.run("1", session_id=session)
            await client.close_session(session)
            with pytest.raises(RequestRejected, match="no session"):
                await client.run("1", session_id=session)

    asyncio.run(go())


def test_a_session_that_kills_its_holder_is_lost_loudly_and_alone(strong_server: Server) -> None:
    code = "import os\nos.kill(os.getppid(), 9)\nimport time; time.sleep(9)"
    lost, after = turns(strong_server, code, "1", timeout=1)
    assert lost.outcome.value == "infra" and "the session is lost" in lost.detail
    assert after.outcome.value == "infra" and "the session is lost" in after.detail
    assert turns(strong_server, "1")[0].ok, "others go on"


def test_sessions_leave_no_process(world: World) -> None:
    if world.server.isolation != "strong":
        with pytest.raises(RequestRejected, match="need isolation 'strong'"):
            turns(world.server, "1")
        return
    code = "import os, threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nos.fork()"
    turns(world.server, "x = 1", code, "x", "import os\nos.setsid() if os.fork() == 0 else 0", timeout=1)
    assert world.damage("") == []


def test_an_idle_session_expires_and_there_are_not_too_many() -> None:
    flags = ("--session-idle-seconds", "0.5", "--max-sessions", "1", "--packages", "numpy")
    with own_server(isolation="strong", workers=1, extra_arguments=flags) as server:

        async def go() -> None:
            async with ToolClient.from_url(server.url) as client:
                session = await client.open_session()
                assert (await client.run("import time; time.sleep(1); 1", session_id=session)).ok
                with pytest.raises(RequestRejected, match="sessions are open already"):
                    await client.open_session()
                await asyncio.sleep(1.5)
                with pytest.raises(RequestRejected, match="no session"):
                    await client.run("1", session_id=session)
                assert (await client.health())["sessions"] == 0
                await client.close_session(await client.open_session())

        asyncio.run(go())
