"""Starting and ending: refuses to start unsafe, drains, and leaves nothing behind whichever way it dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from lab import REPOSITORY, USER_UID, OrdinaryUser, descendants, process_table

from verl_ext.tool_server import ToolClient, start_server
from verl_ext.tool_server.isolation import Tier, TierUnavailable, ZygoteCommand
from verl_ext.tool_server.launch import ServerStartError
from verl_ext.tool_server.probe import attack, reach_tier
from verl_ext.tool_server.runtime import RuntimeBuildError, ensure_runtime
from verl_ext.tool_server.types import Isolation

pytestmark = pytest.mark.e2e
SMALL = ("--packages", "numpy")


def gone(pids: set[int], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while pids & set(process_table()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def family(pid: int) -> set[int]:
    return {pid} | descendants(process_table(), pid)


async def run_slowly(url: str, seconds: float) -> str:
    async with ToolClient.from_url(url, attempts=1, away_seconds=0) as client:
        return (await client.run(f"import time; time.sleep({seconds}); print('done')")).output


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import verl_ext.tool_server;"
        "print(time.perf_counter() - start, sorted({'aiohttp', 'numpy', 'ray', 'torch', 'verl'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60).stdout
    seconds, heavy = output.split(" ", 1)
    assert float(seconds) < 0.2 and heavy == "[]\n"


def test_stop_ends_every_process_and_removes_its_files() -> None:
    with start_server(isolation="strong", workers=1, extra_arguments=SMALL) as server:
        everything = family(server.pid)
        files = Path(server._directory.name)
        assert len(everything) > 3 and files.exists()
    assert gone(everything) and not files.exists()


def test_sigterm_drains_running_work() -> None:
    with start_server(isolation="strong", workers=1, extra_arguments=SMALL) as server:

        async def go() -> str:
            running = asyncio.ensure_future(run_slowly(server.url, 1.5))
            await asyncio.sleep(0.7)
            os.kill(server.pid, signal.SIGTERM)
            return await running

        everything = family(server.pid)
        assert asyncio.run(go()) == "done\n"
        assert gone(everything, 10)


@pytest.mark.parametrize("doing", ["attacking isolation tier", "loading interpreter 2 of 3"])
def test_sigterm_ends_a_start_at_once(doing: str) -> None:
    command = [sys.executable, "-m", "verl_ext.tool_server", "--port", "0", *SMALL]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as server:
        try:
            while doing not in server.stderr.readline():
                assert server.poll() is None
            everything = family(server.pid)
            server.terminate()
            said = server.communicate(timeout=20)[1]
        finally:
            server.kill()
    assert server.returncode == 0 and said.endswith("stopping before it serves: signal\n")
    assert gone(everything)


def test_a_killed_server_takes_everything_with_it() -> None:
    with start_server(isolation="strong", workers=1, extra_arguments=SMALL) as server:

        async def go() -> set[int]:
            running = asyncio.ensure_future(run_slowly(server.url, 14))
            await asyncio.sleep(0.7)
            everything = family(server.pid)
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.wait([running], timeout=10)
            return everything

        assert gone(asyncio.run(go()))


@pytest.mark.parametrize("isolation", ["strong", "standard"])
def test_a_server_whose_parent_dies_ends(isolation: str, tmp_path: Path) -> None:
    code = (
        "import json, sys, time; from verl_ext.tool_server import start_server;"
        f"s = start_server(isolation={isolation!r}, workers=1, extra_arguments={SMALL!r});"
        "print(json.dumps([s.pid, s.url]), flush=True); time.sleep(60)"
    )
    # A killed launcher cannot remove its temporary directory; this one is removed with the test's.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE)
    try:
        pid, url = json.loads(parent.stdout.readline())
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            running = loop.create_task(run_slowly(url, 14))
            loop.run_until_complete(asyncio.sleep(0.7))
            everything = family(pid)
            parent.kill()
            loop.run_until_complete(asyncio.wait([running], timeout=10))
        assert len(everything) > 3 and gone(everything)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


def test_a_server_that_cannot_start_says_why_on_one_line() -> None:
    with pytest.raises(ServerStartError, match="status 3") as caught:
        start_server(isolation="strong", extra_arguments=("--packages", "no-such-package-here"))
    assert "pip install" in str(caught.value).splitlines()[-1]


def test_an_address_for_all_the_world_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOOL_SERVER_TOKEN", raising=False)
    with pytest.raises(ServerStartError, match="TOOL_SERVER_TOKEN"):
        start_server(isolation="strong", host="0.0.0.0")


@pytest.mark.parametrize("missing", ["seccomp", "landlock"])
def test_the_start_up_attacks_notice_a_missing_layer(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = Tier.command

    def without_layer(self: Tier, kind: str, control_fd: int, index: int) -> ZygoteCommand:
        made = command(self, kind, control_fd, index)
        made.config[missing] = None if missing == "seccomp" else False
        return made

    monkeypatch.setattr(Tier, "command", without_layer)
    tier = Tier(Isolation.STANDARD, ensure_runtime(packages=("numpy",)))
    with pytest.raises(TierUnavailable, match="a start-up attack succeeded"):
        asyncio.run(attack(tier))


def test_auto_falls_back_to_standard_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Tier, "_bubblewrap", lambda self, libraries: ["/bin/false"])
    runtime = ensure_runtime(packages=("numpy",))
    tier = asyncio.run(reach_tier("auto", runtime))
    assert tier.isolation is Isolation.STANDARD
    assert "isolation tier 'strong' is not reachable" in caplog.text
    with pytest.raises(TierUnavailable, match="user namespaces"):
        asyncio.run(reach_tier("strong", runtime))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it becomes an ordinary user in a container of its own")
def test_where_user_namespaces_are_forbidden(ordinary_user: OrdinaryUser, capfd: pytest.CaptureFixture[str]) -> None:
    """As in a container of default settings: `strong` is an error with a remedy, `auto` is `standard` and works."""
    bwrap = str(ensure_runtime(packages=("numpy",)).bwrap)
    container = [bwrap, "--unshare-user", "--disable-userns", "--dev-bind", "/", "/"]
    # In there root's files seem to be nobody's, so it needs a runtime of its own; without packages it is soon built.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as cache:
        os.chown(cache, USER_UID, USER_UID)
        options = {"workers": 1, "extra_arguments": ("--packages", "", "--runtime-dir", cache)}
        with ordinary_user.server(container, isolation="auto", **options) as server:
            assert server.isolation == "standard"
            assert asyncio.run(run_slowly(server.url, 0)) == "done\n"
        with pytest.raises(RuntimeError, match="did not start"):
            with ordinary_user.server(container, isolation="strong", **options):
                pass
    assert "It needs unprivileged user namespaces" in capfd.readouterr().err


def test_a_cache_others_can_write_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(RuntimeBuildError, match="writable by nobody else"):
        ensure_runtime(tmp_path / "cache")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: only then is the payload another user")
def test_a_runtime_the_payload_cannot_enter_is_refused(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    runtime = ensure_runtime(closed / "cache", packages=())
    with pytest.raises(TierUnavailable, match="closed to other users"):
        asyncio.run(reach_tier("auto", runtime))
