"""A tool server under attack, and the world around it that an escape would touch.

Nothing a program prints about itself counts as evidence: :meth:`World.damage` looks at files, sockets, processes and
memory from outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_ext.tool_server.isolation import FIRST_UID, UID_COUNT
from verl_ext.tool_server.launch import start_server
from verl_ext.tool_server.runtime import default_cache_dir, ensure_runtime

REPOSITORY = Path(__file__).resolve().parents[2]
USER_UID = 64123  # the ordinary user that tests become when they run as root
SERVER_PACKAGES = ("aiohttp", "pyseccomp", "numpy")
START_SECONDS = 120.0
FLAGS = ("--wall-seconds", "10", "--cpu-seconds", "2", "--memory-mib", "256", "--packages", "numpy")

_LAUNCHER = """
import json, sys
from verl_ext.tool_server.launch import start_server
with start_server(**json.loads(sys.argv[1])) as server:
    print(json.dumps({"url": server.url, "pid": server.pid, "isolation": server.isolation}), flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Server:
    url: str
    pid: int
    isolation: str


class OrdinaryUser:
    """An interpreter, packages and this source tree where a user other than root can read them."""

    def __init__(self) -> None:
        # Kept in root's cache between runs: half a gigabyte takes long to write, and on some disks longer to delete.
        self.tree = ensure_runtime(packages=SERVER_PACKAGES).root
        self._home = Path(tempfile.mkdtemp(prefix="tool-server-user-", dir="/var/tmp"))
        shutil.copytree(
            REPOSITORY / "verl_ext" / "tool_server",
            self._home / "code" / "verl_ext" / "tool_server",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        (self._home / "code" / "verl_ext" / "__init__.py").touch()
        for path in (self._home, *self._home.rglob("*")):
            path.chmod(0o755)
        self.environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": "/nonexistent",
            "PYTHONPATH": f"{self._home / 'code'}:{self.tree / 'site'}",
            "LD_LIBRARY_PATH": str(self.tree / "lib"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PLANTED_ANSWER": os.environ["PLANTED_ANSWER"],
        }
        # The runtime of that interpreter, built by root for everybody.
        build = "from verl_ext.tool_server.runtime import *; ensure_runtime(packages=('numpy',))"
        subprocess.run([self.python, "-c", build], env=self.environment, cwd="/", check=True, timeout=START_SECONDS)

    @property
    def python(self) -> str:
        return str(self.tree / "bin" / "python")

    def remove(self) -> None:
        shutil.rmtree(self._home)

    @contextlib.contextmanager
    def server(self, wrapper: Sequence[str] = (), **options: object) -> Iterator[Server]:
        """Like ``start_server``, as the ordinary user; ``wrapper``: a command to run it under."""
        arguments = options.get("extra_arguments", ())
        options["extra_arguments"] = ("--runtime-dir", str(default_cache_dir()), *arguments)
        process = subprocess.Popen(
            [*wrapper, self.python, "-c", _LAUNCHER, json.dumps(options)],
            env=self.environment,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            user=USER_UID,
            group=USER_UID,
            extra_groups=[],
        )
        try:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server did not start as uid {USER_UID}: status {process.wait(10)}")
            yield Server(**json.loads(line))
        finally:
            process.stdin.close()
            try:
                process.wait(30)
            finally:
                process.kill()
                process.wait()
                process.stdout.close()


@contextlib.contextmanager
def own_server(**options: object) -> Iterator[Server]:
    with start_server(**options) as handle:
        yield Server(handle.url, handle.pid, handle.isolation)


class World:
    """Everything around the server that a program must not be able to touch or learn."""

    def __init__(self, server: Server, as_root: bool, server_uid: int) -> None:
        self.server, self.as_root, self.server_uid = server, as_root, server_uid
        self.lair = Path(tempfile.mkdtemp(prefix="tool-server-lair-", dir="/tmp"))
        self.lair.chmod(0o755)
        self.secret = secrets.token_hex(12)
        self.planted = os.environ["PLANTED_ANSWER"]
        self._write("secret", self.secret, 0o644)
        self._write("open", "whole", 0o666)
        (self.lair / "drop").mkdir()
        (self.lair / "drop").chmod(0o777)
        self.tcp = self._listener(socket.socket(), ("127.0.0.1", 0))
        self.unix = self._listener(socket.socket(socket.AF_UNIX), str(self.lair / "socket"))
        (self.lair / "socket").chmod(0o777)
        self.abstract = self._listener(socket.socket(socket.AF_UNIX), f"\0lair-{self.secret[:8]}")
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.datagram.bind(f"\0lair-datagram-{self.secret[:8]}")
        for quiet in (self.udp, self.datagram):
            quiet.setblocking(False)
        victim_uid = FIRST_UID if as_root else server_uid
        identity = {"user": victim_uid, "group": victim_uid, "extra_groups": []} if os.geteuid() == 0 else {}
        self.victim = subprocess.Popen(["/bin/sleep", "900"], stdin=subprocess.DEVNULL, cwd="/", **identity)
        self.baseline_rss = self._rss()
        self.core_pattern = Path("/proc/sys/kernel/core_pattern").read_text()

    def _write(self, name: str, text: str, mode: int) -> None:
        (self.lair / name).write_text(text)
        (self.lair / name).chmod(mode)

    @staticmethod
    def _listener(listener: socket.socket, address: object) -> socket.socket:
        listener.bind(address)
        listener.listen()
        listener.setblocking(False)
        return listener

    def facts(self) -> dict[str, object]:
        """What an attacker is told: everything but the secrets."""
        return {
            "lair": str(self.lair),
            "tcp": self.tcp.getsockname()[1],
            "udp": self.udp.getsockname()[1],
            "abstract": self.abstract.getsockname()[1:].decode(),
            "datagram": self.datagram.getsockname()[1:].decode(),
            "victim": self.victim.pid,
            "server": self.server.pid,
        }

    def damage(self, text: str) -> list[str]:
        """What a program changed or learned, empty when it was contained. ``text``: all it was answered."""
        found = []
        if self.secret in text or self.planted in text:
            found.append("read a secret")
        if any((self.lair / "drop").iterdir()):
            found.append("wrote outside")
        target = (self.lair / "open").stat()
        if (self.lair / "open").read_text() != "whole" or target.st_mode & 0o777 != 0o666 or target.st_mtime < 1e9:
            found.append("changed a file outside")
        if target.st_nlink != 1 or len(list(self.lair.iterdir())) != 4:
            found.append("changed a directory outside")
        for name in ("tcp", "unix", "abstract"):
            with contextlib.suppress(BlockingIOError):
                getattr(self, name).accept()[0].close()
                found.append(f"connected to {name}")
        for name in ("udp", "datagram"):
            with contextlib.suppress(BlockingIOError):
                getattr(self, name).recv(100)
                found.append(f"sent to {name}")
        if self.victim.poll() is not None or _state(self.victim.pid) != "S":
            found.append("disturbed another process")
        if Path("/proc/sys/kernel/core_pattern").read_text() != self.core_pattern:
            found.append("changed a kernel setting")
        if self._rss() > self.baseline_rss + 128 * 2**20:
            found.append("made the server grow")
        found += [f"left process {line}" for line in self.strays().values()]
        return found

    def end_strays(self) -> None:
        """Kill what attacks on an unconfined server left behind."""
        for pid in self.strays(0):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def strays(self, seconds: float = 3.0) -> dict[int, str]:
        """Processes that should not be there, once ``seconds`` have passed in which they may still be dying."""
        deadline = time.monotonic() + seconds
        while (left := self._strays_now()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left

    def _strays_now(self) -> dict[int, str]:
        table = process_table()
        family = descendants(table, self.server.pid)
        found = {}
        for pid, (parent, uid, command) in table.items():
            zygote_child = pid in family and "zygote.main()" in command and "zygote.main()" in table[parent][2]
            payload_uid = self.as_root and FIRST_UID <= uid < FIRST_UID + UID_COUNT
            if self.as_root:
                orphan = (
                    payload_uid and pid not in family and pid != self.victim.pid and not _of_other_server(table, pid)
                )
            else:
                orphan = parent == 1 and uid == self.server_uid and "zygote.main()" in command
            if (zygote_child and "bwrap" not in table[parent][2].split("\0")[0]) or orphan:
                found[pid] = f"{pid} (parent {parent}, uid {uid}): {command[:80]!r}"
        return found

    def _rss(self) -> int:
        table = process_table()
        return sum(_rss_of(pid) for pid in descendants(table, self.server.pid) | {self.server.pid})

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        for listener in (self.tcp, self.unix, self.abstract, self.udp, self.datagram):
            listener.close()
        shutil.rmtree(self.lair)


def process_table() -> dict[int, tuple[int, int, str]]:
    """pid -> (parent, uid, command line) of everything alive; zombies left out."""
    table = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rsplit(")", 1)[1].split()
            if fields[0] != "Z":
                command = Path(f"/proc/{name}/cmdline").read_bytes().decode(errors="replace")
                table[int(name)] = (int(fields[1]), os.stat(f"/proc/{name}").st_uid, command)
        except OSError:
            continue
    return table


def descendants(table: dict[int, tuple[int, int, str]], root: int) -> set[int]:
    """All processes below ``root``."""
    found: set[int] = set()
    grown = True
    while grown:
        more = {pid for pid, (parent, _, _) in table.items() if parent == root or parent in found} - found
        found |= more
        grown = bool(more)
    return found


def _of_other_server(table: dict[int, tuple[int, int, str]], pid: int) -> bool:
    """Whether ``pid`` is a zygote, bwrap or victim that some other living process of this machine keeps."""
    parent, _, command = table[pid]
    return parent != 1 and ("zygote.main()" in command or "sleep" in command)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def _rss_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0
