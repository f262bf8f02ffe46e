"""``python -m verl_ext.tool_server``: start the server, or say in one line why this machine cannot run it safely."""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import ipaddress
import json
import logging
import math
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from aiohttp import web

from verl_ext.tool_server.app import build_app
from verl_ext.tool_server.channel import WorkerLost
from verl_ext.tool_server.dispatcher import Dispatcher
from verl_ext.tool_server.isolation import TierUnavailable
from verl_ext.tool_server.launch import building_mark
from verl_ext.tool_server.machine import processors
from verl_ext.tool_server.probe import reach_tier
from verl_ext.tool_server.runtime import DEFAULT_PACKAGES, Runtime, RuntimeBuildError, default_cache_dir, ensure_runtime
from verl_ext.tool_server.types import KIB, MIB, Limits

TOKEN_VARIABLE = "TOOL_SERVER_TOKEN"
EXIT_WRONG_USAGE, EXIT_CANNOT_START = 2, 3


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_WRONG_USAGE, f"tool_server: error: {message}\n")


def _number(kind: Callable[[str], float], least: float, above: bool = False, most: float = math.inf) -> Any:
    """An argparse type: a finite number from ``least`` (``above``: exclusively) to ``most``."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a{'n integer' if kind is int else ' number'}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if value < least or value > most or (above and value == least):
            wanted = f"above {least:g}" if above else f"at least {least:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}" + f" and at most {most:g}" * (most < math.inf))
        return value

    return parse


_SECONDS = {"type": _number(float, 0, above=True), "metavar": "SECONDS"}
_COUNT, _COUNT_FROM_0 = {"type": _number(int, 1), "metavar": "N"}, {"type": _number(int, 0), "metavar": "N"}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    limits = Limits()
    parser = _Parser(
        prog="python -m verl_ext.tool_server",
        usage="%(prog)s [options]",
        description=f"Run model-written Python, isolated, over HTTP. Where ${TOKEN_VARIABLE} is set, requests need it.",
        allow_abbrev=False,
    )

    def add(name: str, default: Any, text: str, **options: Any) -> None:
        shown = f" (default: {default})" if default not in (None, False) else ""  # those say it in words
        parser.add_argument(name, default=default, help=text + shown, **options)

    tiers = ["auto", "strong", "standard"]
    port = {"type": _number(int, 0, most=65535), "metavar": "N"}
    add("--host", "127.0.0.1", f"Address to listen on; other than loopback needs ${TOKEN_VARIABLE}.")
    add("--port", 8080, "Port to listen on; 0 takes any free one, see --ready-file.", **port)
    add("--ready-file", None, "Gets one JSON {url, pid, isolation} once requests are served; default: none.", type=Path)
    add("--parent-pid", None, "Exit, with everything started, when this process ends; default: none.", **_COUNT)
    add("--isolation", "auto", "Tier to run in; auto takes strong where it holds, else standard.", choices=tiers)
    add(
        "--unsafe-no-isolation", False, "Run code with nothing but rlimits around it; default: no.", action="store_true"
    )
    add("--workers", processors(), "Executions at once; by default one for each CPU.", **_COUNT)
    add("--queue-size", 1024, "Requests that may wait; more are answered 429.", **_COUNT_FROM_0)
    add("--queue-seconds", 60.0, "Longest wait for a worker; then the client is to ask again.", **_SECONDS)
    add(
        "--drain-seconds",
        20.0,
        "Time that running work gets to end on SIGTERM.",
        type=_number(float, 0),
        metavar="SECONDS",
    )
    add("--max-sessions", 64, "Sessions open at once; each holds an interpreter of its own.", **_COUNT_FROM_0)
    add("--session-idle-seconds", 600.0, "A session ends after so long without a turn.", **_SECONDS)
    add("--wall-seconds", limits.wall_seconds, "Wall time of one execution; a request may ask for less.", **_SECONDS)
    add("--cpu-seconds", limits.cpu_seconds, "CPU time of one execution, whole seconds.", **_COUNT)
    add(
        "--memory-mib",
        limits.memory_bytes // MIB,
        "Memory of one execution, as address space beyond the libraries.",
        **_COUNT,
    )
    add("--scratch-mib", limits.scratch_bytes // MIB, "Size of its private /tmp, in the tier strong.", **_COUNT)
    add("--open-files", limits.open_files, "Files it may have open, at least 8.", type=_number(int, 8), metavar="N")
    add("--threads", limits.threads, "Threads it may have; more in the tier standard as an ordinary user.", **_COUNT)
    add("--code-kib", limits.code_bytes // KIB, "Longest program; a longer one gets an error.", **_COUNT)
    add(
        "--output-kib",
        limits.output_kept_bytes // KIB,
        "Output kept, half from the head, half from the tail.",
        **_COUNT,
    )
    add("--output-kill-mib", limits.output_kill_bytes // MIB, "Output that gets a program killed.", **_COUNT)
    add("--packages", ",".join(DEFAULT_PACKAGES), "What programs can import, of what is installed here; by comma.")
    add("--runtime-dir", None, f"Where the tool runtime is kept; default: {default_cache_dir()}.", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.output_kib * KIB > arguments.output_kill_mib * MIB:
        parser.error("argument --output-kib: more than --output-kill-mib, so no program would live to write it")
    if not is_loopback(arguments.host) and not os.environ.get(TOKEN_VARIABLE):
        parser.error(f"--host {arguments.host} can be reached from elsewhere: set ${TOKEN_VARIABLE}")
    if arguments.ready_file is not None and not os.access(arguments.ready_file.parent, os.W_OK):
        parser.error(f"argument --ready-file: cannot write in {arguments.ready_file.parent}")
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


def require_free(host: str, port: int) -> None:
    """Raise ``OSError`` when the address cannot be had: at once, not after all the work of starting."""
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(address)
            except OSError as error:
                raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from error


def write_ready_file(path: Path, content: dict[str, object]) -> None:
    """Write atomically: whoever sees the file sees all of it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as out:
        json.dump(content, out)
    os.replace(out.name, path)


async def build_runtime(arguments: argparse.Namespace, packages: list[str]) -> Runtime:
    """The runtime, built on first use, with a mark for the launcher meanwhile.

    In a thread that this process's end does not wait for, unlike those of asyncio: a build can take minutes. The next
    one removes what is left of it.
    """
    built: concurrent.futures.Future[Runtime] = concurrent.futures.Future()
    built.set_running_or_notify_cancel()

    def build() -> None:
        try:
            built.set_result(ensure_runtime(arguments.runtime_dir, packages))
        except BaseException as error:
            built.set_exception(error)

    mark = building_mark(arguments.ready_file) if arguments.ready_file else None
    if mark is not None:
        mark.touch()
    try:
        threading.Thread(target=build, daemon=True).start()
        return await asyncio.wrap_future(built)
    finally:
        if mark is not None:
            mark.unlink(missing_ok=True)


async def start(arguments: argparse.Namespace) -> Dispatcher:
    """A dispatcher that runs programs. Raises as :func:`serve` does; cancelled, it leaves no process behind."""
    packages = [name.strip() for name in arguments.packages.split(",") if name.strip()]
    names = ", ".join(packages) or "none"
    logging.info("starting: isolation %s, %d workers, packages %s", arguments.isolation, arguments.workers, names)
    runtime = await build_runtime(arguments, packages)
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
    try:
        await dispatcher.start()
    except BaseException:
        await dispatcher.drain(0.0)
        raise
    return dispatcher


async def serve(arguments: argparse.Namespace) -> None:
    """Run until SIGTERM, SIGINT or the parent's end, which also end a start.

    Raises:
        TierUnavailable, RuntimeBuildError, WorkerLost: the server cannot start safely.
        OSError: it cannot have its address.
    """
    require_free(arguments.host, arguments.port)
    loop = asyncio.get_running_loop()
    stop, parent_gone = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if arguments.parent_pid:
        watch_parent(arguments.parent_pid, loop, parent_gone)
    waits = [asyncio.ensure_future(event.wait()) for event in (stop, parent_gone)]
    starting = asyncio.ensure_future(start(arguments))
    await asyncio.wait([starting, *waits], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        logging.info("stopping before it serves: %s", "parent process ended" if parent_gone.is_set() else "signal")
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return
    dispatcher = starting.result()
    runner = web.AppRunner(
        build_app(dispatcher, os.environ.get(TOKEN_VARIABLE)),
        handler_cancellation=True,  # a client that goes away frees its child
        access_log=None,
        shutdown_timeout=arguments.drain_seconds,
    )
    try:
        await runner.setup()
        site = web.TCPSite(runner, arguments.host, arguments.port, backlog=1024)
        await site.start()
        host, port = runner.addresses[0][:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        isolation = dispatcher.tier.isolation.value
        logging.info("serving on %s, isolation %s, %d workers (Ctrl-C ends it)", url, isolation, arguments.workers)
        if arguments.ready_file:
            write_ready_file(arguments.ready_file, {"url": url, "pid": os.getpid(), "isolation": isolation})
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
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
