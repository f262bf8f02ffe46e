"""Run a command and print the most memory that it and all its descendants ever held together, and its wall time.

    python benchmarks/peak_memory.py bash examples/run_gtpo_qwen.sh

Memory is PSS: a page that several processes share counts once. It looks every `--every` seconds and misses a shorter
peak.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil


def held(pid: int) -> int:
    """PSS in bytes, 0 for a process that has just ended."""
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except (OSError, ProcessLookupError):
        return 0
    return int(found[1]) << 10 if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    began, peak, processes = time.monotonic(), 0, 0
    child = subprocess.Popen(args.command)
    try:
        while child.poll() is None:
            family = [child.pid, *(p.pid for p in psutil.Process(child.pid).children(recursive=True))]
            total = sum(map(held, family))
            if total > peak:
                peak, processes = total, len(family)
            time.sleep(args.every)
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    seconds = time.monotonic() - began
    print(f"peak {peak / 2**30:.2f} GiB in {processes} processes, {seconds:.0f} s, exit {child.returncode}")
    return child.returncode


if __name__ == "__main__":
    sys.exit(main())
