"""Python functions in processes of their own, where they may stall, die, or guard themselves with SIGALRM.

A call that takes too long is ended with its process, and a new process takes its place. Imports neither verl nor hydra:
what a process needs, it imports with the function that it is asked for.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

from pebble import ProcessPool

MAX_PROCESSES = 4  # of one agent-loop worker


class Processes:
    """At most one process a CPU, started at the first call, ended with the program.

    Args:
        warm_up: a function of a module, called first in every process, such as one that imports what calls need: what
            it takes is not counted as a call's.
        at_most: of them, where calls are short and what a process imports is large.
    """

    def __init__(self, warm_up: Callable[[], None] | None = None, at_most: int = MAX_PROCESSES) -> None:
        self._pool = ProcessPool(
            max_workers=max(1, min(at_most, os.cpu_count() or 1)),
            # the program has threads: a fork of it could inherit a held lock
            context=multiprocessing.get_context("spawn"),
            initializer=warm_up,
        )
        atexit.register(self.end)

    async def call(self, function: Callable[..., Any], *args: Any, seconds: float) -> Any:
        """What the function of a module returns; what it raises is raised here.

        Raises TimeoutError after so many seconds, and pebble's ProcessExpired where its process dies.
        """
        try:
            return await asyncio.wrap_future(self._pool.schedule(function, args=list(args), timeout=seconds))
        except concurrent.futures.TimeoutError as e:  # the built-in one from Python 3.11 on
            raise TimeoutError(f"not done after {seconds:g} s") from e

    def end(self) -> None:
        self._pool.stop()
        self._pool.join()
