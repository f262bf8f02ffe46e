"""Run a command and print the most memory that it and all its descendants ever held together, and its wall time.

    python benchmarks/peak_memory.py bash examples/run_gtpo_qwen.sh
    python benchmarks/peak_memory.py --each bash examples/run_gtpo_qwen.sh     # and what each process held then

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


def title(process: psutil.Process) -> str:
    """What a reader knows it by: Ray's name of an actor, else the command."""
    try:
        return " ".join(process.cmdline()).strip()[:100] or process.name()
    except psutil.Error:
        return "?"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks")
    parser.add_argument("--each", action="store_true", help="also print what each process held at the peak")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    began, peak, at, parts = time.monotonic(), 0, 0.0, []
    child = subprocess.Popen(args.command)
    try:
        while child.poll() is None:
            top = psutil.Process(child.pid)
            family = [(held(p.pid), title(p)) for p in [top, *top.children(recursive=True)]]
            total = sum(size for size, _ in family)
            if total > peak:
                peak, at, parts = total, time.monotonic() - began, family
            time.sleep(args.every)
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    seconds = time.monotonic() - began
    print(f"peak {peak / 2**30:.2f} GiB in {len(parts)} processes, {seconds:.0f} s, exit {child.returncode}")
    if args.each:
        print(f"the peak was seen {at:.0f} s after the start:")
        for size, name in sorted(parts, reverse=True):
            print(f"{size / 2**20:8.0f} MiB  {name}")
    return child.returncode


if __name__ == "__main__":
    sys.exit(main())
