"""A Ray cluster of several raylets on this machine, on loopback; all of it is gone after the block, by its ids."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent

#: Ray asks for a token as soon as some earlier start on this machine has left one; a test may not have it.
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Node:
    """`ray start --block`, which ends its raylet and workers when it is asked to."""

    process: subprocess.Popen
    log: Path
    seen: dict[int, psutil.Process] = field(default_factory=dict)

    def look(self) -> None:
        """Note its processes: what its death orphans is still to be found afterwards."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.seen.setdefault(child.pid, child)

    def raylet(self) -> psutil.Process:
        self.look()
        for process in self.seen.values():
            with suppress(psutil.NoSuchProcess):
                if "raylet/raylet" in " ".join(process.cmdline()):
                    return process
        raise AssertionError(f"no raylet:\n{self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        self.look()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        for process in self.seen.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()


@dataclass
class Cluster:
    address: str
    folder: Path
    nodes: list[Node]
    environment: dict[str, str]

    def living(self) -> set[str]:
        """Ids of the nodes that the cluster's head takes for alive."""
        try:
            return set(self.ask("print(*(node['NodeID'] for node in ray.nodes() if node['Alive']))").split())
        except subprocess.CalledProcessError:  # no head yet
            return set()

    def ask(self, program: str) -> str:
        """The last line that a program prints which is connected to the cluster."""
        program = f"import ray; ray.init({self.address!r}, log_to_driver=False)\n{program}"
        command = [sys.executable, "-W", "ignore", "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=self.environment, check=True)
        return done.stdout.strip().splitlines()[-1]

    def add(self, **resources: int) -> Node:
        """Start a raylet with so many logical CPUs and GPUs, and wait until the cluster has it."""
        head = not self.nodes
        place = ["--head", f"--port={self.address.rpartition(':')[2]}", f"--temp-dir={self.folder}"]
        place = [*place, "--include-dashboard=false"] if head else [f"--address={self.address}"]
        log = self.folder / f"{len(self.nodes)}.log"
        command = [BIN / "ray", "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats", *place]
        command += [f"--num-{kind}={count}" for kind, count in resources.items()]
        before = set() if head else self.living()
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, "--object-store-memory=200000000"],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        node = Node(process, log)
        self.nodes.append(node)
        until = time.monotonic() + 90
        while not self.living() - before:
            node.look()
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
        return node


@contextmanager
def cluster(*nodes: Mapping[str, int], **environment: str) -> Iterator[Cluster]:
    """One raylet for each of `nodes`, which are its logical cpus and gpus; the first is the head."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # pytest's own is too long a path for Ray's sockets
    variables = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **ENVIRONMENT, **environment}
    variables.pop("RAY_ADDRESS", None)
    made = Cluster(f"127.0.0.1:{free_port()}", folder, [], variables)
    try:
        for resources in nodes:
            made.add(**resources)
        yield made
    finally:
        for node in reversed(made.nodes):
            node.stop()
        shutil.rmtree(folder, ignore_errors=True)
