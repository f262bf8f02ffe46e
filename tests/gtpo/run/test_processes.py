"""Functions in processes: what they return and raise comes back, what stalls or dies ends alone."""

from __future__ import annotations

import asyncio
import concurrent.futures
import operator
import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool

import pytest
from pebble import ProcessExpired

from recipe.gtpo.run.processes import Processes

pytestmark = pytest.mark.unit

LONG = 60.0


@pytest.fixture(scope="module")
def processes():
    some = Processes()
    yield some
    some.end()


def test_values_and_errors_come_back_from_another_process(processes):
    async def ask():
        with pytest.raises(ZeroDivisionError):
            await processes.call(operator.truediv, 1, 0, seconds=LONG)
        return await processes.call(os.getpid, seconds=LONG), await processes.call(operator.add, 2, 3, seconds=LONG)

    pid, five = asyncio.run(ask())
    assert pid != os.getpid() and five == 5


def test_what_stalls_and_what_dies_ends_alone(processes):
    async def ask():
        with pytest.raises(TimeoutError, match=r"not done after 0\.2 s"):
            await processes.call(time.sleep, 600, seconds=0.2)
        with pytest.raises(ProcessExpired):
            await processes.call(os._exit, 3, seconds=LONG)
        return await processes.call(operator.add, 2, 3, seconds=LONG)

    assert asyncio.run(ask()) == 5


def test_a_process_that_dies_idle_costs_no_call(processes, caplog):
    """Such as one that the kernel killed for its memory. Calls at the same time are all answered."""
    for _ in range(2):
        os.kill(asyncio.run(processes.call(os.getpid, seconds=LONG)), signal.SIGKILL)

        async def ask():
            return await asyncio.gather(*(processes.call(operator.add, i, 1, seconds=LONG) for i in range(20)))

        assert asyncio.run(ask()) == list(range(1, 21))


class BreaksDown:
    """A pool in which every process dies before it has said that it has begun; what is queued then stays there."""

    def __init__(self, queued: bool) -> None:
        self.active, self._queued = True, queued

    def schedule(self, function, args, timeout):
        future = concurrent.futures.Future()
        if self._queued:
            self.active = False
        else:
            future.set_exception(BrokenProcessPool("All workers expired"))
        return future

    def stop(self): ...

    def join(self): ...


@pytest.mark.parametrize("queued", [False, True])
def test_a_pool_that_breaks_down_again_and_again_is_a_process_that_died(queued, monkeypatch, caplog):
    monkeypatch.setattr(Processes, "_new_pool", lambda self: BreaksDown(queued))
    some = Processes()
    with pytest.raises(ProcessExpired, match="processes died in 3 attempts"):
        asyncio.run(some.call(operator.add, 2, 3, seconds=LONG))
    assert [record.message for record in caplog.records] == 3 * [
        "a process died beside a call of add: new ones take the pool's place"
    ]


def test_a_call_that_nobody_waits_for_any_more_is_ended(monkeypatch):
    monkeypatch.setattr("recipe.gtpo.run.processes.MAX_PROCESSES", 1)
    some = Processes()

    async def ask():
        stalled = asyncio.create_task(some.call(time.sleep, 10 * LONG, seconds=10 * LONG))
        await asyncio.sleep(0.01)
        stalled.cancel()
        return await asyncio.wait_for(some.call(operator.add, 2, 3, seconds=LONG), LONG)  # by the only process

    assert asyncio.run(ask()) == 5
    some.end()


def test_the_event_loop_goes_on_while_a_process_works(processes):
    async def ask():
        slow = asyncio.create_task(processes.call(time.sleep, 1, seconds=LONG))
        await asyncio.sleep(0.01)
        assert not slow.done()
        await slow

    asyncio.run(ask())


def test_there_may_be_fewer_than_processors():
    one = Processes(at_most=1)

    async def ask():
        await one.call(os.getpid, seconds=LONG)
        began = time.monotonic()
        await asyncio.gather(*(one.call(time.sleep, 0.3, seconds=LONG) for _ in range(2)))
        return time.monotonic() - began

    try:
        assert asyncio.run(ask()) >= 0.6  # one after the other
    finally:
        one.end()
