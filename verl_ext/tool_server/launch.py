"""Start a tool server as a child process for the length of a ``with`` block, and stop it by its pid.

Standard library only, so a launcher needs neither aiohttp nor verl.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

_LAST_LINES = 15


class ServerStartError(RuntimeError):
    """The server ended or was not ready in time; the message has its last words."""


@dataclass
class ServerHandle:
    """A running server. Use as a context manager, or call :meth:`stop`."""

    url: str
    pid: int
    isolation: str
    _process: subprocess.Popen[bytes] = field(repr=False)
    _directory: tempfile.TemporaryDirectory[str] = field(repr=False)

    def stop(self, seconds: float = 25.0) -> None:
        """SIGTERM (running work is drained), SIGKILL after ``seconds``. Returns once it is gone. Safe to call twice."""
        _end(self._process, seconds)
        self._directory.cleanup()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        """What the server wrote to stderr so far."""
        return (Path(self._directory.name) / "stderr").read_text(errors="replace")

    def __enter__(self) -> ServerHandle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()


def start_server(
    *,
    isolation: str = "auto",
    unsafe_no_isolation: bool = False,
    workers: int | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    ready_seconds: float = 120.0,
    extra_arguments: tuple[str, ...] = (),
) -> ServerHandle:
    """Start ``python -m verl_ext.tool_server`` and wait until it serves. It ends when this process ends.

    Args:
        isolation: ``strong``, ``standard`` or ``auto``.
        unsafe_no_isolation: run code with nothing but rlimits around it.
        workers: executions at once; None: one per CPU.
        port: 0 for any free port.
        ready_seconds: includes building the tool runtime on first use.
        extra_arguments: further options, as on the command line.

    Raises:
        ServerStartError: it ended, or was not ready in time; it is stopped and the message has its last lines.
    """
    directory = tempfile.TemporaryDirectory(prefix="tool-server-")
    ready = Path(directory.name) / "ready.json"
    command = [sys.executable, "-m", "verl_ext.tool_server", "--host", host, "--port", str(port)]
    command += ["--ready-file", str(ready), "--parent-pid", str(os.getpid()), "--isolation", isolation]
    command += ["--unsafe-no-isolation"] if unsafe_no_isolation else []
    command += ["--workers", str(workers)] if workers is not None else []
    command += extra_arguments
    # Found from any working directory: this package's own parent comes first.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([_package_parent(), os.environ.get("PYTHONPATH", "")])}
    with open(Path(directory.name) / "stderr", "wb") as stderr:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr
        )
    try:
        deadline = time.monotonic() + ready_seconds
        while not ready.exists():
            if process.poll() is not None:
                raise ServerStartError(f"tool server ended with status {process.returncode}:\n{_tail(directory.name)}")
            if time.monotonic() > deadline:
                raise ServerStartError(f"tool server not ready after {ready_seconds:g} s:\n{_tail(directory.name)}")
            time.sleep(0.02)
        facts = json.loads(ready.read_text())
    except BaseException:
        _end(process, 5.0)
        directory.cleanup()
        raise
    return ServerHandle(facts["url"], facts["pid"], facts["isolation"], process, directory)


def _package_parent() -> str:
    return str(Path(__file__).resolve().parents[2])


def _tail(directory: str) -> str:
    lines = (Path(directory) / "stderr").read_text(errors="replace").splitlines()
    return "\n".join(lines[-_LAST_LINES:])


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()
