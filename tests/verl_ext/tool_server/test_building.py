"""Building the tool runtime takes as long as it takes: nobody gives up on it, whoever starts it can end it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import REPOSITORY

from verl_ext.tool_server import launch, runtime, start_server
from verl_ext.tool_server.runtime import ensure_runtime

# A process whose build says that it has begun, and does not end.
ENDLESS = """
import sys, threading
from verl_ext.tool_server import runtime

def build(work, distributions):
    (work / "half").touch()
    print("building", flush=True)
    threading.Event().wait()

runtime._build = build
"""
BUILD = "from pathlib import Path\nruntime.ensure_runtime(Path(sys.argv[1]), ())"
SERVE = "from verl_ext.tool_server.__main__ import main\nsys.exit(main())"


@contextlib.contextmanager
def endless(then: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process that builds, from when it has begun."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS + then, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout.readline() == "building\n", process.stderr.read()
            yield process
        finally:
            process.kill()


def half_built(cache: Path) -> list[str]:
    return [path.name for path in cache.glob(".building-*/half")]


@pytest.mark.unit
def test_a_second_builder_waits_for_the_first_and_clears_away_what_it_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtime, "_build", lambda work, distributions: (work / "whole").touch())
    caplog.set_level("INFO")
    with endless(BUILD, str(tmp_path)) as first, concurrent.futures.ThreadPoolExecutor() as pool:
        second = pool.submit(ensure_runtime, tmp_path, ())
        try:
            while "waiting for another process" not in caplog.text:
                assert not second.done()
                time.sleep(0.01)
            assert not second.done() and half_built(tmp_path) == ["half"]
        finally:
            first.kill()
        root = second.result(60).root
    assert (root / "whole").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".lock", root.name])


@pytest.mark.unit
def test_who_waited_for_a_build_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[Path] = []
    monkeypatch.setattr(runtime, "_build", lambda work, distributions: builds.append(work))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with open(tmp_path / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            both = [pool.submit(ensure_runtime, tmp_path, ()) for _ in range(2)]
        assert len({future.result(60).root for future in both}) == len(builds) == 1


@pytest.mark.unit
def test_where_files_cannot_be_locked_nothing_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError("Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(runtime, "_build", lambda work, distributions: None)
    (tmp_path / ".building-by-somebody").mkdir()
    assert ensure_runtime(tmp_path, ()).root.exists() and (tmp_path / ".building-by-somebody").exists()


@pytest.mark.e2e
@pytest.mark.parametrize("ends", ["SIGTERM", "SIGINT", "its parent's end"])
def test_a_server_that_builds_ends_at_once(ends: str, tmp_path: Path) -> None:
    arguments = ["--port", "0", "--packages", "", "--runtime-dir", str(tmp_path)]
    with subprocess.Popen(["/bin/sleep", "900"]) as parent:
        try:
            with endless(SERVE, *arguments, "--parent-pid", str(parent.pid)) as server:
                if ends.startswith("SIG"):
                    server.send_signal(getattr(signal, ends))
                else:
                    parent.kill()
                said = server.communicate(timeout=20)[1]
                assert server.returncode == 0 and "Traceback" not in said
                reason = "signal" if ends.startswith("SIG") else "parent process ended"
                assert said.splitlines()[-1].endswith(f"stopping before it serves: {reason}")
        finally:
            parent.kill()


class Clock:
    """The launcher's: an hour passes when the server says that it waits for a build, and then that build ends."""

    def __init__(self, lock: int) -> None:
        self.passed, self.naps, self.lock = 0.0, 0, lock

    def hear(self, line: str) -> None:
        if "waiting for another process" in line:
            self.passed = 3600.0

    def monotonic(self) -> float:
        return time.monotonic() + self.passed

    def sleep(self, seconds: float) -> None:
        self.naps += self.passed > 0
        if self.naps == 3:
            fcntl.flock(self.lock, fcntl.LOCK_UN)
        time.sleep(seconds)


@pytest.mark.e2e
def test_a_launcher_waits_for_a_build_that_takes_longer_than_a_start_may(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as cache, open(Path(cache, ".lock"), "w") as lock:
        os.chmod(cache, 0o755)  # as root the programs are another user's
        fcntl.flock(lock, fcntl.LOCK_EX)
        clock = Clock(lock.fileno())
        monkeypatch.setattr(launch, "time", types.SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep))
        arguments = ("--packages", "", "--runtime-dir", cache)
        with start_server(workers=1, progress=clock.hear, extra_arguments=arguments) as server:
            assert server.alive and clock.naps > 3
            assert not launch.building_mark(Path(server._directory.name) / "ready.json").exists()
