"""``python -m verl_ext.tool_server``: start the server, or say in one line why this machine cannot run it safely."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from aiohttp import web

from verl_ext.tool_server.app import build_app
from verl_ext.tool_server.channel import WorkerLost
from verl_ext.tool_server.dispatcher import Dispatcher
from verl_ext.tool_server.isolation import TierUnavailable
from verl_ext.tool_server.probe import reach_tier
from verl_ext.tool_server.runtime import DEFAULT_PACKAGES, RuntimeBuildError, ensure_runtime
from verl_ext.tool_server.types import KIB, MIB, Limits

TOKEN_VARIABLE = "TOOL_SERVER_TOKEN"
EXIT_CANNOT_START = 3


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    limits = Limits()
    parser = argparse.ArgumentParser(prog="python -m verl_ext.tool_server", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help=f"other than loopback needs ${TOKEN_VARIABLE}")
    parser.add_argument("--port", type=int, default=8080, help="0: any free port, see --ready-file")
    parser.add_argument("--ready-file", type=Path, help="gets one JSON {url, pid, isolation} once requests are served")
    parser.add_argument("--parent-pid", type=int, help="exit, with everything started, when this process ends")
    parser.add_argument("--isolation", choices=["auto", "strong", "standard"], default="auto")
    parser.add_argument("--unsafe-no-isolation", action="store_true", help="nothing but rlimits around the code")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="executions at once")
    parser.add_argument("--queue-size", type=int, default=1024, help="requests that may wait; more get 429")
    parser.add_argument("--queue-seconds", type=float, default=60.0, help="longest wait for a worker")
    parser.add_argument("--drain-seconds", type=float, default=20.0, help="time running work gets on SIGTERM")
    parser.add_argument("--max-sessions", type=int, default=64, help="each holds a zygote of its own")
    parser.add_argument("--session-idle-seconds", type=float, default=600.0, help="a session ends after so long unused")
    parser.add_argument("--wall-seconds", type=float, default=limits.wall_seconds)
    parser.add_argument("--cpu-seconds", type=int, default=limits.cpu_seconds)
    parser.add_argument("--memory-mib", type=int, default=limits.memory_bytes // MIB)
    parser.add_argument("--scratch-mib", type=int, default=limits.scratch_bytes // MIB, help="private /tmp (strong)")
    parser.add_argument("--open-files", type=int, default=limits.open_files)
    parser.add_argument("--threads", type=int, default=limits.threads)
    parser.add_argument("--code-kib", type=int, default=limits.code_bytes // KIB)
    parser.add_argument("--output-kib", type=int, default=limits.output_kept_bytes // KIB, help="kept, head and tail")
    parser.add_argument("--output-kill-mib", type=int, default=limits.output_kill_bytes // MIB)
    parser.add_argument("--packages", default=",".join(DEFAULT_PACKAGES), help="what executed code can import")
    parser.add_argument("--runtime-dir", type=Path, help="where the tool runtime is kept")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1 or arguments.queue_size < 0:
        parser.error("--workers must be at least 1 and --queue-size at least 0")
    if not is_loopback(arguments.host) and not os.environ.get(TOKEN_VARIABLE):
        parser.error(f"--host {arguments.host} can be reached from elsewhere: set ${TOKEN_VARIABLE}")
    return arguments


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def limits_of(arguments: argparse.Namespace) -> Limits:
    return Limits(
        wall_seconds=arguments.wall_seconds,
        cpu_seconds=arguments.cpu_seconds,
        memory_bytes=arguments.memory_mib * MIB,
        open_files=arguments.open_files,
        threads=arguments.threads,
        scratch_bytes=arguments.scratch_mib * MIB,
        code_bytes=arguments.code_kib * KIB,
        output_kept_bytes=arguments.output_kib * KIB,
        output_kill_bytes=arguments.output_kill_mib * MIB,
    )


def watch_parent(pid: int, loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Set ``stop`` when process ``pid`` ends; at once if it is gone already."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        stop.set()
        return

    def gone() -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        stop.set()

    loop.add_reader(descriptor, gone)


def write_ready_file(path: Path, content: dict[str, object]) -> None:
    """Write atomically: whoever sees the file sees all of it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as out:
        json.dump(content, out)
    os.replace(out.name, path)


async def serve(arguments: argparse.Namespace) -> None:
    """Run until SIGTERM, SIGINT or the parent's end.

    Raises:
        TierUnavailable, RuntimeBuildError, WorkerLost: the server cannot start safely.
    """
    loop = asyncio.get_running_loop()
    stop, parent_gone = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if arguments.parent_pid:
        watch_parent(arguments.parent_pid, loop, parent_gone)
    packages = [name for name in arguments.packages.split(",") if name]
    runtime = await asyncio.to_thread(ensure_runtime, arguments.runtime_dir, packages)
    wanted = "none" if arguments.unsafe_no_isolation else arguments.isolation
    tier = await reach_tier(wanted, runtime)
    dispatcher = Dispatcher(
        tier,
        limits_of(arguments),
        arguments.workers,
        arguments.queue_size,
        arguments.queue_seconds,
        arguments.max_sessions,
        arguments.session_idle_seconds,
    )
    runner = web.AppRunner(
        build_app(dispatcher, os.environ.get(TOKEN_VARIABLE)),
        handler_cancellation=True,  # a client that goes away frees its child
        access_log=None,
        shutdown_timeout=arguments.drain_seconds,
    )
    try:
        await dispatcher.start()
        await runner.setup()
        site = web.TCPSite(runner, arguments.host, arguments.port, backlog=1024)
        await site.start()
        host, port = runner.addresses[0][:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        isolation = tier.isolation.value
        logging.info("serving on %s, isolation %s, %d workers", url, isolation, arguments.workers)
        if arguments.ready_file:
            write_ready_file(arguments.ready_file, {"url": url, "pid": os.getpid(), "isolation": isolation})
        waits = [asyncio.ensure_future(event.wait()) for event in (stop, parent_gone)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        logging.info("stopping: %s", "parent process ended" if parent_gone.is_set() else "signal")
        await site.stop()
        await dispatcher.drain(0.0 if parent_gone.is_set() else arguments.drain_seconds)
    finally:
        await dispatcher.drain(0.0)
        await runner.cleanup()


def main() -> int:
    arguments = parse_arguments(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s tool_server %(levelname)s %(message)s")
    try:
        asyncio.run(serve(arguments))
    except (TierUnavailable, RuntimeBuildError, WorkerLost, OSError) as error:
        print(f"tool_server: cannot start: {error}", file=sys.stderr)
        return EXIT_CANNOT_START
    return 0


if __name__ == "__main__":
    sys.exit(main())
