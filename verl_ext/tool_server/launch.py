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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

_LAST_LINES = 15
#: What one execution, and the queue, may use; `python -m verl_ext.tool_server --help` says what each means.
LIMITS = (
    "wall_seconds",
    "cpu_seconds",
    "memory_mib",
    "scratch_mib",
    "open_files",
    "threads",
    "code_kib",
    "output_kib",
    "output_kill_mib",
    "queue_size",
    "queue_seconds",
    "max_sessions",
    "session_idle_seconds",
)


def building_mark(ready_file: Path) -> Path:
    """The file that is there while a server builds its runtime, or waits for one that does."""
    return ready_file.with_name(f"{ready_file.name}.building")


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
    limits: Mapping[str, float | None] | None = None,
    packages: Sequence[str] | None = None,
    ready_seconds: float = 120.0,
    progress: Callable[[str], None] | None = None,
    extra_arguments: tuple[str, ...] = (),
) -> ServerHandle:
    """Start ``python -m verl_ext.tool_server`` and wait until it serves. It ends when this process ends.

    Args:
        isolation: ``strong``, ``standard`` or ``auto``.
        unsafe_no_isolation: run code with nothing but rlimits around it.
        workers: executions at once; None: one per CPU.
        port: 0 for any free port.
        limits: by name (``LIMITS``), as the options of the command line; None or left out: the server's default.
        packages: what programs can import; None: the server's default.
        ready_seconds: without building the tool runtime on first use, which takes as long as it takes.
        progress: called with each line that the server logs until it is ready.
        extra_arguments: further options, as on the command line.

    Raises:
        ServerStartError: a limit has an unknown name, or the server ended, or was not ready in time; then it is
            stopped and the message has its last lines.
    """
    unknown = sorted(set(limits or {}) - set(LIMITS))
    if unknown:
        raise ServerStartError(f"the tool server has no limit {unknown[0]!r}; known: {', '.join(LIMITS)}")
    directory = tempfile.TemporaryDirectory(prefix="tool-server-")
    ready = Path(directory.name) / "ready.json"
    command = [sys.executable, "-m", "verl_ext.tool_server", "--host", host, "--port", str(port)]
    command += ["--ready-file", str(ready), "--parent-pid", str(os.getpid()), "--isolation", isolation]
    command += ["--unsafe-no-isolation"] if unsafe_no_isolation else []
    command += ["--workers", str(workers)] if workers is not None else []
    for name, value in (limits or {}).items():
        command += ["--" + name.replace("_", "-"), str(value)] if value is not None else []
    command += ["--packages", ",".join(packages)] if packages is not None else []
    command += extra_arguments
    # Found from any working directory: this package's own parent comes first.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([_package_parent(), os.environ.get("PYTHONPATH", "")])}
    with open(Path(directory.name) / "stderr", "wb") as stderr:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr
        )
    told = 0
    try:
        deadline = time.monotonic() + ready_seconds
        while not ready.exists():
            lines = (Path(directory.name) / "stderr").read_text(errors="replace").split("\n")[:-1] if progress else []
            for line in lines[told:]:
                assert progress is not None
                progress(line)
            told = len(lines)
            if process.poll() is not None:
                raise ServerStartError(f"tool server ended with status {process.returncode}:\n{_tail(directory.name)}")
            if building_mark(ready).exists():
                deadline = time.monotonic() + ready_seconds
            if time.monotonic() > deadline:
                late = f"tool server not ready after {ready_seconds:g} s (ready_seconds)"
                raise ServerStartError(f"{late}:\n{_tail(directory.name)}")
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
