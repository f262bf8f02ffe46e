"""`python -m verl_ext.viewer RUN_DIR...`: serve the page on this machine, or write it as one file with --export."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from aiohttp import web

from verl_ext.viewer import export, whatif
from verl_ext.viewer.app import build_app
from verl_ext.viewer.runs import Run, parse_steps

#: Seconds between two looks for new lines.
_TAIL_SECONDS = 1.0


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"viewer: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = _Parser(prog="python -m verl_ext.viewer", description="Show where the credit of a run went.")
    parser.add_argument("run_dir", nargs="+", type=Path, help="run folders; each has a folder trajectories/")
    parser.add_argument("--port", type=int, default=8686, help="port to listen on, 0 for any free one (default: 8686)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--export", type=Path, metavar="PAGE.html", help="write one self-contained page and end")
    parser.add_argument(
        "--steps", type=parse_steps, help="with --export: the steps to put in, as 1,5,10-12 (default: all)"
    )
    arguments = parser.parse_args(argv)
    if arguments.steps is not None and arguments.export is None:
        parser.error("--steps belongs to --export")
    for folder in arguments.run_dir:
        if not folder.is_dir():
            parser.error(f"{folder}: no such folder; give a run's folder, the one with trajectories/ in it")
    try:
        method = whatif.load()
        runs = [Run(folder, method) for folder in arguments.run_dir]
        if arguments.export is not None:
            for run in runs:
                _read(run)
            print(export.write(runs, arguments.export, arguments.steps))
        else:
            with contextlib.suppress(KeyboardInterrupt):
                asyncio.run(_serve(runs, arguments.host, arguments.port))
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _read(run: Run) -> None:
    began = time.monotonic()
    lines = run.update()
    if lines:
        print(f"{run.path}: {lines} lines read in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)


async def _serve(runs: Sequence[Run], host: str, port: int) -> None:
    runner = web.AppRunner(build_app(runs, _names(host)), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    await site.start()
    assert site._server is not None
    bound = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{bound}/", flush=True)
    if not _is_loopback(host):
        print("viewer: whoever reaches this address reads these runs", file=sys.stderr, flush=True)
    stop = threading.Event()
    tail = asyncio.create_task(asyncio.to_thread(_tail, runs, stop))
    try:
        await tail  # ends by an error only, which is the viewer's
    finally:
        stop.set()
        await runner.cleanup()


def _tail(runs: Sequence[Run], stop: threading.Event) -> None:
    """Read what is there, then what is added, until told to stop. A page is served meanwhile."""
    while not stop.is_set():
        for run in runs:
            _read(run)
        if warm := runs[0].whatif:
            warm.recompute([], {}, None, list)  # the first question would wait for what the method imports
        stop.wait(_TAIL_SECONDS)


def _names(host: str) -> list[str]:
    """Under which a page may be asked for: this machine's own names, whatever a name server says of others."""
    local = ["localhost", "127.0.0.1", "::1"]
    return local if _is_loopback(host) else [*local, host.lower(), socket.gethostname().lower()]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    main()
