"""What a process may use of its machine."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # version 2, as containers have it


def processors() -> int:
    """Those that this process may use; a container's quota counts."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return count if quota == "max" else max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):
        return count


def raise_open_files() -> None:
    """Raise this process's limit on descriptors as far as it may.

    The usual 1024 are few: each client that waits takes one, each zygote two and each execution up to eight.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):  # above what the kernel grants anybody now (fs.nr_open): it stays as it is
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
