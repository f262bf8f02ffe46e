"""Run a matrix of methods x seeds: `python -m recipe.gtpo.compare methods=gtpo,grpo seeds=0..4 [hydra overrides]`.

A cell is one run in a folder of its own, `OUT/<method>-seed<seed>`. Cells that are complete are skipped, so the same
command goes on where it was stopped; a cell that fails is started once more and then reported. Then:
`python -m recipe.gtpo.report OUT -o OUT/report`.

Keys of this command; everything else goes to each run as it is:
    methods   comma-separated files of recipe/gtpo/config/method          (gtpo,grpo)
    seeds     comma-separated, or a range FIRST..LAST with both ends      (0..4)
    steps     training steps of a cell                                    (the task's own)
    out       folder of all cells                                         (outputs/compare)
    engine    verl: recipe.gtpo.main; twin: benchmarks/twin.py            (verl)
    parallel  cells that run at once                                      (1)
    ray       address of a Ray cluster's job server (http://HOST:8265): cells become Ray jobs; OUT is a path that all
              nodes share                                                 (none: processes on this machine)
    hours     limit of a cell                                             (24)
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from recipe.gtpo.compose import method_file
from recipe.gtpo.run_record import RunRecord, last_line

ROOT = Path(__file__).parents[2]
DEFAULTS = {
    "methods": "gtpo,grpo",
    "seeds": "0..4",
    "steps": "",
    "out": "outputs/compare",
    "engine": "verl",
    "parallel": "1",
    "ray": "",
    "hours": "24",
}
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Cell:
    """One run of the matrix."""

    method: str
    seed: int
    dir: Path
    command: tuple[str, ...]
    steps: int | None  # None: the task's own number

    @property
    def name(self) -> str:
        return self.dir.name

    @property
    def complete(self) -> bool:
        """Whether the run has said its last word, at the wanted number of steps."""
        summary = self.dir / "summary.json"
        if not summary.exists():
            return False
        return self.steps is None or json.loads(summary.read_text())["steps"][1] >= self.steps


def parse_seeds(text: str) -> list[int]:
    """`0..4` or `1,2,7`. Raises ValueError."""
    if ".." in text:
        first, last = (int(part) for part in text.split("..", 1))
        seeds = list(range(first, last + 1))
    else:
        seeds = [int(part) for part in text.split(",")]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={text}: at least one, each once")
    return seeds


def parse(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """This command's own keys with their defaults, and what goes to the runs."""
    own, rest = dict(DEFAULTS), []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in own:
            own[key] = value
        else:
            rest.append(argument)
    return own, rest


def matrix(own: Mapping[str, str], overrides: Sequence[str]) -> list[Cell]:
    """All cells, seed by seed, so that an early look compares methods on the same seeds.

    Raises:
        ValueError: an unknown method or engine, malformed seeds, or an override that a cell sets itself.
    """
    methods = own["methods"].split(",")
    for method in methods:
        method_file(method)
    if own["engine"] not in ("verl", "twin"):
        raise ValueError(f"unknown engine {own['engine']!r}; engines: verl, twin")
    for override in overrides:
        if override.split("=", 1)[0].lstrip("+") in ("method", "seed", "run_dir", "trainer.total_training_steps"):
            raise ValueError(f"{override}: a cell sets this itself; use methods=, seeds=, out=, steps=")
    steps = int(own["steps"]) if own["steps"] else None
    cells = []
    for seed in parse_seeds(own["seeds"]):
        for method in methods:
            run_dir = Path(own["out"]).resolve() / f"{method}-seed{seed}"
            cells.append(
                Cell(method, seed, run_dir, _command(own["engine"], method, seed, run_dir, steps, overrides), steps)
            )
    return cells


def _command(
    engine: str, method: str, seed: int, run_dir: Path, steps: int | None, overrides: Sequence[str]
) -> tuple[str, ...]:
    limit: tuple[str, ...]
    if engine == "twin":
        limit = () if steps is None else ("--steps", str(steps))
        command = ("benchmarks/twin.py", "--method", method, "--seed", str(seed), "--run-dir", str(run_dir), *limit)
    else:
        limit = () if steps is None else (f"trainer.total_training_steps={steps}",)
        command = ("-m", "recipe.gtpo.main", f"method={method}", f"seed={seed}", f"run_dir={run_dir}", *limit)
    return (sys.executable, *command, *overrides)


class Job(Protocol):
    """A started cell."""

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""

    def stop(self) -> None:
        """End it and all it started."""


class LocalJob:
    """A process on this machine, with its output in a file."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        with log.open("a") as out:
            self._process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
                # A matrix that a script starts with `&` ignores SIGINT; its cells must not, it ends them that way.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        # The run shuts its own Ray and tool server down on SIGINT; what does not listen is killed with its session.
        for how, seconds in ((signal.SIGINT, 60), (signal.SIGKILL, 10)):
            if self._process.poll() is None:
                os.killpg(self._process.pid, how)
                try:
                    self._process.wait(seconds)
                except subprocess.TimeoutExpired:
                    continue


class RayJob:
    """A job of a Ray cluster (Ray's job API). Its output stays with the job: `ray job logs ID`."""

    def __init__(self, command: Sequence[str], log: Path, address: str) -> None:
        from ray.job_submission import JobSubmissionClient

        self._client = JobSubmissionClient(address)
        entrypoint = f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(command)}"
        self._id = self._client.submit_job(entrypoint=entrypoint)
        with log.open("a") as out:
            out.write(f"Ray job {self._id} at {address}\n")

    def poll(self) -> int | None:
        status = self._client.get_job_status(self._id)
        return None if not status.is_terminal() else int(status != "SUCCEEDED")

    def stop(self) -> None:
        if self.poll() is None:
            self._client.stop_job(self._id)


@dataclass
class _Started:
    cell: Cell
    job: Job
    began: float
    attempt: int


@dataclass
class Outcome:
    """What became of the matrix."""

    complete: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def run_matrix(cells: Sequence[Cell], start: Any, *, parallel: int, hours: float, out: Any = sys.stderr) -> Outcome:
    """Run what is not complete, at most `parallel` at once. A failed cell gets a second attempt.

    Args:
        start: (command, log path) -> Job.
    """
    outcome = Outcome(skipped=[c.name for c in cells if c.complete])
    queue = [(cell, 1) for cell in cells if not cell.complete]
    running: list[_Started] = []
    total = sum(cell.steps or 0 for cell, _ in queue)
    bar = tqdm(total=total or len(queue), unit="step" if total else "cell", desc="matrix", file=out, smoothing=0.05)
    try:
        while queue or running:
            while queue and len(running) < parallel:
                cell, attempt = queue.pop(0)
                cell.dir.mkdir(parents=True, exist_ok=True)
                running.append(
                    _Started(cell, start(cell.command, cell.dir / "terminal.log"), time.monotonic(), attempt)
                )
            time.sleep(_POLL_SECONDS)
            for started in list(running):
                status = started.job.poll()
                if status is None:
                    if time.monotonic() - started.began < hours * 3600:
                        continue
                    started.job.stop()
                running.remove(started)
                cell = started.cell
                if status == 0 and cell.complete:
                    outcome.complete.append(cell.name)
                elif started.attempt == 1:
                    bar.write(
                        f"{cell.name}: exit status {status}, once more (see {cell.dir / 'terminal.log'})", file=out
                    )
                    queue.append((cell, 2))
                else:
                    outcome.failed.append(cell.name)
                    said = last_line((cell.dir / "terminal.log").read_text(errors="replace"))
                    bar.write(f"{cell.name}: failed twice: {said}", file=out)
            done = len(outcome.complete) + len(outcome.failed)
            if total:
                settled = [c for c in cells if c.name in outcome.complete or c.name in outcome.failed]
                done = sum(c.steps or 0 for c in settled) + sum(_step(s.cell.dir) for s in running)
            bar.set_postfix_str(" ".join(s.cell.name for s in running), refresh=False)
            bar.update(done - bar.n)
    finally:
        for started in running:
            started.job.stop()
        bar.close()
    return outcome


def _step(run_dir: Path) -> int:
    lines = RunRecord(run_dir).read_metrics()
    return lines[-1]["step"] if lines else 0


def main(arguments: Sequence[str]) -> int:
    if any(a in ("-h", "--help") for a in arguments):
        print(__doc__)
        return 0
    own, overrides = parse(arguments)
    try:
        cells = matrix(own, overrides)
        parallel, hours = int(own["parallel"]), float(own["hours"])
    except ValueError as e:
        print(f"compare: error: {e}", file=sys.stderr)
        return 1
    address = own["ray"]

    def start(command: Sequence[str], log: Path) -> Job:
        return RayJob(command, log, address) if address else LocalJob(command, log)

    try:
        outcome = run_matrix(cells, start, parallel=parallel, hours=hours)
    except KeyboardInterrupt:
        print("compare: error: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    out = Path(own["out"])
    print(f"compare: {len(outcome.complete)} complete, {len(outcome.skipped)} were, {len(outcome.failed)} failed")
    for name in outcome.failed:
        print(f"compare: failed: {name}, see {out / name / 'terminal.log'}")
    print(f"compare: now python -m recipe.gtpo.report {out} -o {out / 'report'}")
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so through `finally`: what runs is ended
    sys.exit(main(sys.argv[1:]))
