"""multiprocessing's semaphores without shared memory, for programs that can have no other process to share one with.

The kernel's own need a writable path, which the tier ``standard`` has none of, and some of them a process beside the
program. Locks, queues and thread pools are made of them. (Sessions can fork, so they have the kernel's.)
"""

import _multiprocessing
import threading
import time

_RECURSIVE_MUTEX = 0


class SemLock:
    """The interface of ``_multiprocessing.SemLock``."""

    SEM_VALUE_MAX = (1 << 31) - 1

    def __init__(self, kind: int, value: int, maxvalue: int, name: str, unlink: bool) -> None:
        self.kind, self.maxvalue, self.name, self.handle = kind, maxvalue, None, 0
        self._value = value
        self._changed = threading.Condition(threading.Lock())
        self._held, self._owner = 0, 0  # how often by whom last, as multiprocessing asks

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        if self.kind == _RECURSIVE_MUTEX and self._is_mine():
            self._held += 1
            return True
        ends = None if timeout is None else time.monotonic() + max(0.0, timeout)
        with self._changed:
            while self._value == 0:
                left = None if ends is None else ends - time.monotonic()
                if not block or (left is not None and left <= 0):
                    return False
                self._changed.wait(left)
            self._value -= 1
            self._held += 1
            self._owner = threading.get_ident()
        return True

    def release(self) -> None:
        if self.kind == _RECURSIVE_MUTEX:
            if not self._is_mine():
                raise AssertionError("attempt to release recursive lock not owned by thread")
            if self._held > 1:
                self._held -= 1
                return
        with self._changed:
            if self._value >= self.maxvalue:
                raise ValueError("semaphore or lock released too many times")
            self._value += 1
            self._held -= 1
            self._changed.notify()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    def _count(self) -> int:
        return self._held

    def _is_mine(self) -> bool:
        return self._held > 0 and self._owner == threading.get_ident()

    def _get_value(self) -> int:
        return self._value

    def _is_zero(self) -> bool:
        return self._value == 0

    def _after_fork(self) -> None:
        self._held = 0


def install() -> None:
    """For this process."""
    _multiprocessing.SemLock = SemLock  # type: ignore[misc]
