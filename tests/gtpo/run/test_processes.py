"""Functions in processes: what they return and raise comes back, what stalls or dies ends alone."""

from __future__ import annotations

import asyncio
import operator
import os
import time

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
