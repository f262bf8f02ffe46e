"""Start the real script at toy size, look at what it leaves, and end whatever a test started - by its pid."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from recipe.gtpo.run.record import RunRecord

ROOT = Path(__file__).resolve().parents[2]

#: The embedded default, as small as it gets: a policy after four steps of warm start, two prompts x two rollouts.
TOY = (
    "task.warm_start={steps: 1, base: {skill: 0.0, check_every: 3}}",
    "task.train_problems=64",
    "task.validation_problems=4",
    "data.train_batch_size=2",
    "data.max_response_length=32",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.rollout.n=2",
    "trainer.test_freq=2",
    "trainer.save_freq=1",
)


@dataclass
class Run:
    """One start of the script. `output` fills while it runs."""

    process: subprocess.Popen
    record: RunRecord
    output: Path
    seen: dict[int, psutil.Process] = field(default_factory=dict)  # every process the run ever had, by pid

    def look(self) -> None:
        """Note the run's processes. Ray's workers leave the tree when their parent dies, so look early and often."""
        try:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self.seen.setdefault(process.pid, process)
        except psutil.NoSuchProcess:
            return

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Poll until `condition` holds; AssertionError with the output when the run ends first or time is up."""
        deadline = time.monotonic() + seconds
        while not condition():
            self.look()
            assert self.process.poll() is None, f"the run ended early:\n{self.text()[-3000:]}"
            assert time.monotonic() < deadline, f"not after {seconds} s:\n{self.text()[-3000:]}"
            time.sleep(0.2)

    def wait_for_step(self, step: int, seconds: float = 400) -> None:
        self.wait_until(lambda: any(line["step"] >= step for line in self.record.read_metrics()), seconds)
        self.look()

    def wait(self, seconds: float) -> int:
        """The exit status. Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            self.look()
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.process.args, seconds, output=self.text()[-3000:])
            time.sleep(0.2)
        return self.process.returncode

    def find(self, title: str) -> psutil.Process:
        """The run's living process with `title` in its command line (Ray titles its workers ray::Class.method)."""
        self.look()
        for process in self.seen.values():
            try:
                if process.is_running() and title in " ".join(process.cmdline()):
                    return process
            except psutil.NoSuchProcess:
                continue
        raise AssertionError(f"no process titled {title}: {sorted(self.titles())}")

    def titles(self) -> set[str]:
        titles = set()
        for process in self.seen.values():
            try:
                titles.add(" ".join(process.cmdline())[:60])
            except psutil.NoSuchProcess:
                continue
        return titles

    def left_behind(self, seconds: float = 20) -> list[str]:
        """Processes of the run that are still there, after giving them time to go."""
        _, alive = psutil.wait_procs(self.seen.values(), timeout=seconds)
        return [f"{p.pid} {' '.join(p.cmdline())[:80]}" for p in alive if p.status() != psutil.STATUS_ZOMBIE]

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def last_line(self) -> str:
        return self.text().strip().splitlines()[-1]


@contextmanager
def start(
    tmp_path: Path, *overrides: str, script: str = "run_gtpo_qwen.sh", environment: Mapping[str, str] | None = None
) -> Iterator[Run]:
    """Run the example script with TOY and `overrides`, outputs under `tmp_path`; all of it is gone after the block."""
    run_dir = tmp_path / "run"
    paths = [f"run_dir={run_dir}", f"task.cache={tmp_path.parent}"]  # the toy policy serves all tests
    command = ["bash", str(ROOT / "examples" / script), *TOY, *paths, *overrides]
    with launch(command, run_dir, tmp_path / f"{time.monotonic_ns()}.log", environment) as run:
        yield run


@contextmanager
def launch(
    command: list[str], run_dir: Path, output: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Run]:
    """Any command of the repository that leaves a run folder; all that it started is gone after the block."""
    variables = {**os.environ, "VENV": sys.prefix, "OMP_NUM_THREADS": "1", "HARDWARE": "cpu", **(environment or {})}
    with output.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=variables,
            start_new_session=True,
            # As a script's `&` starts a run; what holds here holds in a terminal.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
    run = Run(process, RunRecord(run_dir), output)
    try:
        yield run
    finally:
        run.look()
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        for leftover in run.seen.values():
            try:
                leftover.kill()
            except psutil.NoSuchProcess:
                continue
