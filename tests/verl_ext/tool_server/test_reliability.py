"""10,000 mixed requests while zygotes and children are being killed: nothing lost, nothing twice, nothing mixed up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter

import pytest
from lab import Server, _rss_of, descendants, own_server, process_table

from verl_ext.tool_server import ExecutionRequest, ExecutionResult, ToolClient

FLAGS = ("--wall-seconds", "3", "--cpu-seconds", "2", "--memory-mib", "128", "--packages", "numpy")


def program(i: int) -> tuple[str, str, str]:
    """Program number ``i`` of the mix, the outcome it must have and the text its answer must contain."""
    return (
        (f"print({i})", "ok", f"{i}\n"),
        (f"x = {i}\nx", "ok", f"{i}\n"),
        (f"raise ValueError({i})", "error", f"ValueError: {i}"),
        (f"import time; time.sleep(0.1); print({i})", "ok", f"{i}\n"),
        (f"print('a' * 3000, {i})", "ok", f" {i}\n"),
        (f"def f{i}(:", "syntax_error", f"def f{i}(:"),
        (f"import numpy as np\nint(np.full(1, {i})[0])", "ok", f"{i}\n"),
        (f"print({i})\nimport ctypes; ctypes.string_at(0)", "crash", f"{i}\n[crash"),
        (f"import sys; print({i}); sys.exit(3)", "error", f"{i}\n"),
        (f"print({i}); x = bytearray(2**30)", "memory", f"{i}\n"),
    )[i % 10]


class Killer:
    """SIGKILLs a random zygote or running child of the server now and then."""

    def __init__(self, server: Server, pause: float) -> None:
        self.server, self.pause, self.kills = server, pause, Counter()
        self._random = random.Random(7)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._random.uniform(0.5, 1.5) * self.pause)
            table = process_table()
            children = descendants(table, self.server.pid)
            zygotes = [
                p for p in children if "zygote.main()" in table[p][2] and "bwrap" not in table[p][2].split("\0")[0]
            ]
            running = [p for p in zygotes if table[p][0] in zygotes]
            for name, pids in (("zygote", sorted(set(zygotes) - set(running))), ("child", running)):
                if pids and self._random.random() < 0.7:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self._random.choice(pids), signal.SIGKILL)
                        self.kills[name] += 1


def is_bubblewrap(command: str) -> bool:
    return command.split("\0")[0].endswith("bwrap")


def footprint(server: Server) -> dict[str, int]:
    everything = descendants(process_table(), server.pid)
    return {
        "descriptors": len(os.listdir(f"/proc/{server.pid}/fd")),
        "processes": len(everything),
        "server_rss": _rss_of(server.pid),
    }


def settle(server: Server) -> None:
    """All zygote pools filled, as any amount of work leaves them."""

    async def go() -> None:
        async with ToolClient.from_url(server.url) as client:
            await client.run_batch(
                [f"import time; time.sleep(0.2); {kind}" for kind in ("import numpy", "1") for _ in range(8)]
            )

    asyncio.run(go())
    time.sleep(0.5)


@pytest.mark.parametrize(
    ("count", "pause"),
    [
        pytest.param(1_000, 0.08, marks=pytest.mark.e2e),
        pytest.param(10_000, 0.08, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("isolation", ["strong", "standard"])
def test_nothing_is_lost_doubled_or_mixed_up(isolation: str, count: int, pause: float) -> None:
    with own_server(isolation=isolation, workers=4, extra_arguments=FLAGS) as server:
        settle(server)
        before = footprint(server)
        answered: Counter[str] = Counter()
        wrong: list[tuple[int, ExecutionResult]] = []

        async def go() -> Counter[str]:
            killer = Killer(server, pause)
            killing = asyncio.ensure_future(killer.run())
            numbers = iter(range(count))

            async def client_loop(client: ToolClient) -> None:
                for i in numbers:
                    code, outcome, text = program(i)
                    request = ExecutionRequest(code, request_id=f"number-{i}")
                    for result in await client.run_batch([request], deadline=60):
                        answered[result.request_id] += 1
                        right = result.outcome.value == outcome and text in result.output
                        if not right or result.request_id != f"number-{i}":
                            wrong.append((i, result))

            async def stop_before_the_last_ones() -> None:
                # The very last request would otherwise be hit by every single kill.
                while len(answered) < count - 40:
                    await asyncio.sleep(0.01)
                killing.cancel()

            try:
                async with ToolClient.from_url(server.url, attempts=10) as client:
                    await asyncio.gather(stop_before_the_last_ones(), *(client_loop(client) for _ in range(12)))
            finally:
                killing.cancel()
                await asyncio.gather(killing, return_exceptions=True)
            return killer.kills

        kills = asyncio.run(go())
        print(f"{isolation}: {count} requests, kills {dict(kills)}")
        assert wrong == []
        assert len(answered) == count and set(answered.values()) == {1}
        assert kills["zygote"] >= 5 and kills["child"] >= 5, "the test must have hurt"
        settle(server)
        after = footprint(server)
        assert after["descriptors"] <= before["descriptors"] + 8, (before, after)
        assert after["processes"] <= before["processes"] + 4, (before, after)
        assert after["server_rss"] <= before["server_rss"] + 48 * 2**20, (before, after)
