"""A signal that ends a program must not cut in two what is to be done whole."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def signals_wait() -> Iterator[None]:
    """SIGINT and SIGTERM that come in the block are handled behind it. For the main thread.

    Around the start of a process, up to where it is noted: an exception of a handler in between (KeyboardInterrupt,
    SystemExit) leaves a process that nobody knows of and nobody ends. Python runs its handlers in the main thread
    whichever thread the signal reached, so that a mask of this thread's signals would not keep them off.

    A signal without a handler of Python's ends the process or is ignored, as outside the block.
    """
    came: list[int] = []
    now = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in now.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for one in dict.fromkeys(came):
            signal.raise_signal(one)
