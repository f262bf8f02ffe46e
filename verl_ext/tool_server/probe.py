"""Finds the isolation tier this machine really reaches, by attacking it. See :func:`reach_tier`.

The programs below try to break out; what counts is what can be seen from outside afterwards (a file, a connection, a
dead process, the kernel's own record of the child), except where the program is only asked how far it got.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_ext.tool_server.channel import RawRun, WorkerLost
from verl_ext.tool_server.isolation import (
    FIRST_UID,
    Tier,
    TierUnavailable,
    runtime_readable_by_payload,
    why_unavailable,
)
from verl_ext.tool_server.runtime import Runtime
from verl_ext.tool_server.types import MIB, ExecutionRequest, Isolation, Limits
from verl_ext.tool_server.worker import Worker

logger = logging.getLogger(__name__)
_LIMITS = Limits(wall_seconds=10, cpu_seconds=5, memory_bytes=128 * MIB, scratch_bytes=4 * MIB)

_BREAK_OUT = """
import os, socket
def attempt(action):
    try:
        action()
    except OSError:
        pass
attempt(lambda: print(open({secret_file!r}).read()))
attempt(lambda: open({drop!r} + "/dropped", "w").close())
attempt(lambda: os.symlink("/", {drop!r} + "/link"))
attempt(lambda: os.open({open_file!r}, os.O_RDONLY | os.O_TRUNC))
attempt(lambda: os.truncate({open_file!r}, 0))
attempt(lambda: os.utime({open_file!r}, (0, 0)))
attempt(lambda: socket.create_connection(("127.0.0.1", {port}), timeout=1))
attempt(lambda: socket.socket(socket.AF_UNIX).connect("\\0" + {abstract!r}))
attempt(lambda: os.kill({victim}, 9))
attempt(lambda: os.fork() == 0 and (os.write(1, b"forked"), os._exit(0)))
print("reached the end", flush=True)
attempt(lambda: os.execv("/bin/echo", ["echo", "executed"]))
"""
_EAT_MEMORY = "hoard = [bytearray(b'x') * 2**20 for _ in range(1024)]"
_FILL_SCRATCH = """
written = 0
try:
    for i in range(64):
        with open(f"f{i}", "wb") as out:
            written += out.write(b"x" * 2**20)
except OSError:
    pass
print(written)
"""


async def reach_tier(wanted: str, runtime: Runtime) -> Tier:
    """Return a tier that has withstood the start-up attacks.

    ``wanted`` is ``strong``, ``standard``, ``auto`` (strong if it holds here, else standard, said in the log) or
    ``none``, which proves nothing and is only for callers that were told explicitly to do without isolation.

    Raises:
        TierUnavailable: the wanted tier does not hold here; the message says why and what to change.
    """
    runtime_readable_by_payload(runtime.root)
    if wanted == "none":
        logger.warning("NO ISOLATION: executed code has this user's rights on this machine")
        return Tier(Isolation.NONE, runtime)
    candidates = [Isolation.STRONG, Isolation.STANDARD] if wanted == "auto" else [Isolation(wanted)]
    reasons = []
    for isolation in candidates:
        logger.info("attacking isolation tier %r, to see whether it holds here", isolation.value)
        try:
            tier = Tier(isolation, runtime)
            await attack(tier)
        except (TierUnavailable, WorkerLost) as error:
            reasons.append(why_unavailable(isolation, str(error)))
            logger.warning(reasons[-1])
        else:
            return tier
    raise TierUnavailable("; ".join(reasons))


async def attack(tier: Tier) -> None:
    """Run every start-up attack on one zygote of ``tier``.

    Raises:
        TierUnavailable: an attack had an effect, or a harmless program did not run.
        WorkerLost: no zygote could be started.
    """
    worker = Worker(tier, "bare", 0, _LIMITS)
    try:
        await worker.start()
        with _targets() as targets:
            run = await worker.run(ExecutionRequest(targets.program()), _LIMITS.wall_seconds)
            targets.check(run)
        await _check_kernel_record(worker)
        run = await worker.run(ExecutionRequest(_EAT_MEMORY), _LIMITS.wall_seconds)
        _require(run.peak_rss_bytes < 2 * _LIMITS.memory_bytes, "a program exceeded its memory limit")
        run = await worker.run(ExecutionRequest(_FILL_SCRATCH), _LIMITS.wall_seconds)
        written, most = int(run.stdout.text() or -1), _LIMITS.scratch_bytes if tier.namespaces else 0
        _require(written <= most, "a program exceeded its disk limit")
        if written < most // 2:
            raise TierUnavailable(f"the scratch directory cannot be used: {written} of {most} bytes could be written")
    finally:
        worker.close()


def _require(held: bool, otherwise: str) -> None:
    if not held:
        raise TierUnavailable(f"a start-up attack succeeded: {otherwise}")


@dataclass(frozen=True)
class _Targets:
    """Things outside the sandbox that a break-out would touch."""

    secret: str
    secret_file: Path
    drop: Path
    open_file: Path
    tcp: socket.socket
    unix: socket.socket
    victim: subprocess.Popen[bytes]

    def program(self) -> str:
        return _BREAK_OUT.format(
            secret_file=str(self.secret_file),
            drop=str(self.drop),
            open_file=str(self.open_file),
            port=self.tcp.getsockname()[1],
            abstract=self.unix.getsockname()[1:].decode(),
            victim=self.victim.pid,
        )

    def check(self, run: RawRun) -> None:
        output = run.stdout.text()
        if "reached the end" not in output:
            raise TierUnavailable(f"a harmless program did not run: {run.stderr.text()[-300:].strip()}")
        _require(self.secret not in output, "a program read a file outside")
        _require(not any(self.drop.iterdir()), "a program wrote outside")
        _require(self.open_file.read_text() == "whole", "a program emptied a file outside")
        _require(self.open_file.stat().st_mtime > 0, "a program changed the times of a file outside")
        _require(not _connected(self.tcp), "a program reached a TCP port of this machine")
        _require(not _connected(self.unix), "a program reached a unix socket of this machine")
        _require(self.victim.poll() is None, "a program killed another process")
        _require("forked" not in output, "a program forked")
        _require("executed" not in output, "a program executed a file")


@contextmanager
def _targets() -> Iterator[_Targets]:
    # Open to every user, so that only the sandbox can be what keeps the program out; the payload's uid owns the victim.
    with tempfile.TemporaryDirectory(prefix="tool-server-probe-", dir="/tmp") as name:
        os.chmod(name, 0o755)
        secret, secret_file, drop = secrets.token_hex(8), Path(name, "secret"), Path(name, "drop")
        secret_file.write_text(secret)
        secret_file.chmod(0o644)
        drop.mkdir()
        drop.chmod(0o777)
        open_file = Path(name, "open")
        open_file.write_text("whole")
        open_file.chmod(0o666)
        identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            identity = {"user": FIRST_UID, "group": FIRST_UID, "extra_groups": []}
        victim = subprocess.Popen(["/bin/sleep", "60"], stdin=subprocess.DEVNULL, cwd="/", **identity)
        tcp, unix = socket.socket(), socket.socket(socket.AF_UNIX)
        try:
            tcp.bind(("127.0.0.1", 0))
            unix.bind(f"\0tool-server-probe-{secrets.token_hex(8)}")
            for listener in (tcp, unix):
                listener.listen()
                listener.setblocking(False)
            yield _Targets(secret, secret_file, drop, open_file, tcp, unix, victim)
        finally:
            victim.kill()
            victim.wait()
            tcp.close()
            unix.close()


def _connected(listener: socket.socket) -> bool:
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


async def _check_kernel_record(worker: Worker) -> None:
    """While a program sleeps, read from outside what the kernel says about its process."""
    running = asyncio.ensure_future(worker.run(ExecutionRequest("import time; time.sleep(5)"), 5.0))
    try:
        record: dict[str, str] = {}
        for _ in range(200):
            await asyncio.sleep(0.01)
            record = _status_of_child(worker.zygote_pid)
            if record.get("Seccomp", "").strip() == "2":
                break
        _require(record.get("Seccomp", "").strip() == "2", "the system call filter is not in force")
        _require(record["NoNewPrivs"].strip() == "1", "no_new_privs is not set")
        _require("0" not in record["Uid"].split(), "a program runs as root")
        for name in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
            _require(int(record[name], 16) == 0, f"a program has capabilities ({name})")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _status_of_child(parent: int) -> dict[str, str]:
    """/proc/PID/status of the child of ``parent``; empty when there is none."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = dict(line.split(":", 1) for line in Path(f"/proc/{name}/status").read_text().splitlines())
            except (OSError, ValueError):
                continue  # it ended meanwhile
            if int(fields["PPid"]) == parent:
                return fields
    return {}
