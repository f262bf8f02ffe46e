"""Python functions in processes of their own, where they may stall, die, or guard themselves with SIGALRM.

A call that takes too long is ended with its process, and a new process takes its place. Imports neither verl nor hydra:
what a process needs, it imports with the function that it is asked for.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pebble import ProcessExpired, ProcessPool

MAX_PROCESSES = 4  # of one agent-loop worker
ATTEMPTS = 3  # of a call whose pool breaks down
CHECK_SECONDS = 1.0  # between two looks at whether the pool of a waiting call is alive
logger = logging.getLogger(__name__)


class Processes:
    """At most one process a CPU, started at the first call, ended with the program.

    Args:
        warm_up: a function of a module, called first in every process, such as one that imports what calls need: what
            it takes is not counted as a call's.
        at_most: of them, where calls are short and what a process imports is large.
    """

    def __init__(self, warm_up: Callable[[], None] | None = None, at_most: int = MAX_PROCESSES) -> None:
        self._warm_up, self._at_most = warm_up, at_most
        self._pool = self._new_pool()
        atexit.register(self.end)

    def _new_pool(self) -> ProcessPool:
        return ProcessPool(
            max_workers=max(1, min(self._at_most, os.cpu_count() or 1)),
            # the program has threads: a fork of it could inherit a held lock
            context=multiprocessing.get_context("spawn"),
            initializer=self._warm_up,
        )

    async def call(self, function: Callable[..., Any], *args: Any, seconds: float) -> Any:
        """What the function of a module returns; what it raises is raised here.

        Raises TimeoutError after so many seconds, and pebble's ProcessExpired where its process dies. A function may
        be called again where processes died and which call killed them is not known.
        """
        # pebble gives up its whole pool, for good, where a process dies that has nothing to do, or whose word that it
        # has begun was not read yet: calls of others must not fail for that, nor all calls from then on.
        for _ in range(ATTEMPTS):
            if not self._pool.active:
                self.end()
                self._pool = self._new_pool()
            try:
                return await self._answer(self._pool, function, args, seconds)
            # both the built-in one from Python 3.11 on; in 3.10 asyncio turns pebble's into its own
            except (concurrent.futures.TimeoutError, asyncio.TimeoutError) as e:
                raise TimeoutError(f"not done after {seconds:g} s") from e
            except BrokenProcessPool:
                logger.warning("a process died beside a call of %s: new ones take the pool's place", function.__name__)
        raise ProcessExpired(f"processes died in {ATTEMPTS} attempts")

    @staticmethod
    async def _answer(pool: ProcessPool, function: Callable[..., Any], args: Sequence[Any], seconds: float) -> Any:
        """Raises BrokenProcessPool also where the pool broke down with the call in its queue: pebble leaves it."""
        try:
            call = asyncio.wrap_future(pool.schedule(function, args=list(args), timeout=seconds))
        except RuntimeError as e:  # not active any more
            raise BrokenProcessPool(str(e)) from e
        try:
            while not (await asyncio.wait([call], timeout=CHECK_SECONDS))[0]:
                if not pool.active:
                    raise BrokenProcessPool("broken down with calls in its queue")
            return await call
        finally:
            call.cancel()  # with its process, where nobody waits for it any more

    def end(self) -> None:
        self._pool.stop()
        self._pool.join()
