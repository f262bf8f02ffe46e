"""What `torch.cuda.empty_cache` is to a GPU, for ordinary memory."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def empty_cache() -> None:
    """Give the system back what this process has freed. glibc keeps it for the process, like a GPU's allocator.

    With another C library than glibc nothing happens.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim.argtypes = [ctypes.c_size_t]
    return trim
