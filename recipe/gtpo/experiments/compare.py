"""Run a matrix of methods x seeds (x horizons), then write the report.

    python -m recipe.gtpo.experiments.compare methods=fair seeds=0..4 [hydra overrides]
    python -m recipe.gtpo.experiments.compare experiment=horizon6            a published result, in a word

A cell is one run in a folder of its own, `OUT/<method>-seed<seed>`, or with horizons=
`OUT/<method>-h<horizon>-seed<seed>`. Cells that are complete are skipped, so the same command goes on where it was
stopped; a cell that fails is started once more and then reported. The report is `OUT/report/index.html`, of the cells
of this command (`recipe.gtpo.experiments.report` makes one of any runs).

Keys of this command; everything else goes to each run as it is, and both engines read the same overrides:
    methods     comma-separated files of recipe/gtpo/config/method; `fair` stands for GTPO as published, its
                recommended setting, and its rivals, each on the reward of its source: gtpo, gtpo_turn_batch_std,
                grpo, grpo_outcome, dr_grpo, rloo, reinforce_plus_plus, gdpo, mt_grpo, gigpo       (fair)
    seeds       comma-separated, or a range FIRST..LAST with both ends      (0..4)
    horizons    the same, of the task's longest chain of dependent calls    (the task's own)
    steps       training steps of a cell                                    (the task's own)
    out         folder of all cells             (outputs/compare, or outputs/EXPERIMENT where there is one)
    engine      verl: recipe.gtpo.main; twin: recipe.gtpo.experiments.twin  (verl)
    parallel    cells that run at once                                      (1; with ray= it has to be given)
    ray         job server of a Ray cluster (http://HOST:8265): cells become its jobs (none: processes on this machine)
    hours       limit of a cell, from its start                             (24)
    stack       overrides for this machine, where the engine is verl: examples/compare_baselines.sh works them out
    experiment  a file of recipe/gtpo/config/experiment: its `matrix` gives the keys above that the command line leaves
                out, and the file goes to each run                          (none)

On a cluster `parallel` cells are submitted at a time, the next one when one ends. Set it to the cells that the GPUs
hold at once: free GPUs / (trainer.nnodes x trainer.n_gpus_per_node), so 4 on 4 idle nodes of 8 GPUs for cells of one
node. With more, a cell does not wait for GPUs: verl ends it at its start ("Total available GPUs ... is less than
..."), and after a second attempt it counts as failed. With less, GPUs stay idle. Cells take hardware=multi_node,
also with trainer.nnodes=1: Ray chooses the node of their workers. The folder that
this command is given in, its Python environment and OUT are paths that all nodes share; the drivers of the cells run
where Ray runs jobs, on the head node by default.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf
from tqdm import tqdm

from recipe.gtpo.experiments.report import show_report
from recipe.gtpo.experiments.report.runs import finished_runs, todays_name
from recipe.gtpo.run.checks import ConfigError, config_file
from recipe.gtpo.run.errors import TERMINATED, TERMINATED_STATUS, one_line
from recipe.gtpo.run.identity import edited_reward, same_overrides
from recipe.gtpo.run.record import RunRecord, last_line
from recipe.gtpo.run.signals import signals_wait

MODULES = {"verl": "recipe.gtpo.main", "twin": "recipe.gtpo.experiments.twin"}
#: What `fair` in methods= stands for. Not in it: rivals on the sum of outcome and all format penalties (grpo_sum,
#: dr_grpo_sum), which nobody else runs, and the ablations of GTPO.
FAIR = (
    *("gtpo", "gtpo_turn_batch_std", "grpo", "grpo_outcome", "dr_grpo", "rloo", "reinforce_plus_plus", "gdpo"),
    *("mt_grpo", "gigpo"),
)
DEFAULTS = {
    "methods": "fair",
    "seeds": "0..4",
    "horizons": "",
    "steps": "",
    "out": "outputs/compare",
    "engine": "verl",
    "parallel": "",
    "ray": "",
    "hours": "24",
    "stack": "",
    "experiment": "",
}
#: Keys of the config that a cell sets itself, by the name of what it sets them to.
_CELL_SETS = {
    "method": "method",
    "seed": "seed",
    "run_dir": "run_dir",
    "steps": "trainer.total_training_steps",
    "horizon": "task.horizon",
}
#: The flag of hydra that a cell may be given, with its folder in the next argument.
_CONFIG_DIR = "--config-dir"
_POLL_SECONDS = 1.0
#: What Ray's job client raises where its server is away, or answers with an error (requests' errors are OSErrors).
_UNANSWERED = (OSError, RuntimeError)
_SILENT_SECONDS = 600.0  # that a job server may be away, as while its head node is busy


@dataclass(frozen=True)
class Cell:
    """One run of the matrix."""

    method: str
    seed: int
    dir: Path
    command: tuple[str, ...]
    steps: int | None  # None: the task's own number
    horizon: int | None = None  # None: the task's own

    @property
    def name(self) -> str:
        return self.dir.name

    @property
    def engine(self) -> str:
        return next(name for name, module in MODULES.items() if module in self.command)

    @property
    def overrides(self) -> tuple[str, ...]:
        """What its program is given: the command behind `python -m MODULE`."""
        return self.command[3:]

    @property
    def complete(self) -> bool:
        """Whether the run has said its last word, at the wanted number of steps."""
        summary = RunRecord(self.dir).read_summary()
        return summary is not None and (self.steps is None or summary["steps"][1] >= self.steps)


def refuse_others(cells: Sequence[Cell]) -> None:
    """Raise ValueError where a cell's folder holds a run of other overrides, or of a method that has another meaning
    now: counted as done, it would be reported as what it is not."""
    for cell in cells:
        record = RunRecord(cell.dir)
        starts = record.read_starts()
        if starts and (name := todays_name(cell.method, record.read_config())) != cell.method:
            raise ValueError(
                f"{cell.dir} was made when method={cell.method} compared the sum of outcome and format penalties: by "
                f"today's names it is {name}. Give this matrix another out="
            )
        if (edited := edited_reward(record.read_config() or {})) is not None:
            raise ValueError(
                f"the reward function {edited} has changed since {cell.dir} was begun with it. Give this matrix "
                "another out=, or the file as it was"
            )
        config = record.read_config() or {"algorithm.gtpo.format_rule": "unknown"}
        published = any(override.startswith("experiment=") for override in cell.overrides)  # it says strict
        if "algorithm.gtpo.format_rule" not in config and not published:
            raise ValueError(
                f"{cell.dir} was made when every break of the format was charged, which is "
                "algorithm.gtpo.format_rule=strict now and not the default. Give this matrix another out="
            )
        before = starts[-1]["command"][1:] if starts else cell.overrides
        if not same_overrides(before, cell.overrides):
            raise ValueError(
                f"{cell.dir} was made by other overrides: {' '.join(before)}; here: {' '.join(cell.overrides)}. "
                "Give this matrix another out="
            )
        if starts and (engine := _engine(record)) != cell.engine:
            raise ValueError(f"{cell.dir} was made by engine={engine}. Give this matrix another out=")
        shorter = [override for override in before if override.startswith(f"{_CELL_SETS['steps']}=")]
        if cell.steps is None and shorter:  # how many the task's own are, only the run knows
            raise ValueError(
                f"{cell.dir} was made with steps={shorter[-1].partition('=')[2]}, and here steps= is not given: "
                "give it, and the run goes on to that, or give this matrix another out="
            )


def _engine(record: RunRecord) -> str:
    """That of a started run: by its summary or, where it has none or does not say, by its program."""
    program = Path(record.read_starts()[-1]["command"][0])
    return (record.read_summary() or {}).get("engine") or ("twin" if program.parent.name == "twin" else "verl")


def parse_integers(key: str, text: str) -> list[int]:
    """`0..4` or `1,2,7`. Raises ValueError, which names `key`."""
    try:
        if ".." in text:
            first, last = (int(part) for part in text.split("..", 1))
            integers = list(range(first, last + 1))
        else:
            integers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{key}={text}: no integers, neither as A,B,C nor as FIRST..LAST") from None
    if not integers or len(set(integers)) < len(integers):
        raise ValueError(f"{key}={text}: at least one, each once")
    return integers


def parse_count(key: str, text: str) -> int:
    """A whole number from 1. Raises ValueError, which names `key`."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"{key}={text}: a whole number, at least 1")
    return count


def parse(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """This command's own keys with their defaults, and what goes to the runs.

    Raises ValueError for an unknown experiment, for one whose `matrix` has a key that is none of this command's, and
    for an argument that a cell cannot be given.
    """
    given: dict[str, str] = {}
    rest: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in DEFAULTS:
            given[key] = value.strip()
            continue
        if key in ("-m", "--multirun", "hydra.mode"):
            raise ValueError(f"{argument}: the matrix is methods=, seeds= and horizons=; hydra's own is not for cells")
        if not equals and not argument.startswith("~") and _CONFIG_DIR not in (argument, *rest[-1:]):
            raise ValueError(f"{argument}: no KEY=VALUE (in a list, write A,B without a space)")
        rest.append(argument)
    own = DEFAULTS | given
    if own["experiment"]:
        published = OmegaConf.load(config_file("experiment", own["experiment"])).get("matrix", {})
        if unknown := published.keys() - DEFAULTS.keys():
            raise ValueError(f"experiment={own['experiment']}: its matrix has the unknown key {min(unknown)!r}")
        own = DEFAULTS | {"out": f"outputs/{own['experiment']}"} | {k: str(v) for k, v in published.items()} | given
        rest.insert(0, f"experiment={own['experiment']}")
    return own, rest


def matrix(own: Mapping[str, str], overrides: Sequence[str]) -> list[Cell]:
    """All cells, seed by seed and then by horizon: an early look compares methods on the same seeds and horizons.

    Raises:
        ValueError: an unknown method or engine, malformed seeds or horizons, an override that a cell sets itself or
            that the engine does not read.
    """
    given_methods = [method.strip() for method in own["methods"].split(",")]
    methods = [one for method in given_methods for one in (FAIR if method == "fair" else (method,))]
    for method in methods:
        config_file("method", method)
    if len(set(methods)) < len(methods):
        raise ValueError(f"methods={own['methods']}: each once")
    if own["engine"] not in MODULES:
        raise ValueError(f"unknown engine {own['engine']!r}; engines: {', '.join(MODULES)}")
    horizons: Sequence[int | None] = parse_integers("horizons", own["horizons"]) if own["horizons"] else [None]
    for override in overrides:
        name = override.split("=", 1)[0].lstrip("+")
        if name in _CELL_SETS.values() and (name != _CELL_SETS["horizon"] or own["horizons"]):
            raise ValueError(f"{override}: a cell sets this itself; use methods=, seeds=, horizons=, out=, steps=")
    if own["engine"] == "twin":
        from recipe.gtpo.experiments.twin.settings import refuse_unread  # only who uses the engine imports torch

        try:
            refuse_unread(overrides)
        except ConfigError as e:
            raise ValueError(str(e)) from e
        stack = []
    else:
        stack = own["stack"].split()
    steps = parse_count("steps", own["steps"]) if own["steps"] else None
    cells = []
    for seed in parse_integers("seeds", own["seeds"]):
        for horizon in horizons:
            for method in methods:
                name = f"{method}-seed{seed}" if horizon is None else f"{method}-h{horizon}-seed{seed}"
                run_dir = out_folder(own) / name
                settings = {"method": method, "seed": seed, "run_dir": run_dir, "steps": steps, "horizon": horizon}
                given = [f"{_CELL_SETS[key]}={value}" for key, value in settings.items() if value is not None]
                command = (sys.executable, "-m", MODULES[own["engine"]], *stack, *given, *overrides)
                cells.append(Cell(method, seed, run_dir, command, steps, horizon))
    return cells


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


class ClusterError(Exception):
    """The job server of a Ray cluster does not answer, or refuses a job. The message is one line."""


class RayJob:
    """A job of a Ray cluster (Ray's job API). Its output stays with the job: `ray job logs ID`."""

    def __init__(self, command: Sequence[str], log: Path, address: str) -> None:
        from ray.job_submission import JobSubmissionClient

        self._address = address
        self._silent_since: float | None = None  # while the server does not answer
        entrypoint = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(command)}"
        try:
            self._client = JobSubmissionClient(address)
            self._id = submit(self._client, entrypoint)
        except _UNANSWERED as e:
            raise ClusterError(f"no job at ray={address}: {one_line(e)}") from e
        with log.open("a") as out:
            out.write(f"Ray job {self._id} at {address}\n")

    def poll(self) -> int | None:
        """Its exit status, None while it runs, or as long as the server may come back.

        Raises ClusterError where it has not for `_SILENT_SECONDS`.
        """
        try:
            status = self._client.get_job_status(self._id)
        except _UNANSWERED as e:
            now = time.monotonic()
            self._silent_since = self._silent_since or now
            if now - self._silent_since < _SILENT_SECONDS:
                return None
            raise ClusterError(f"ray={self._address} does not answer: {one_line(e)}") from e
        self._silent_since = None
        return None if not status.is_terminal() else int(status != "SUCCEEDED")

    def stop(self) -> None:
        try:
            if not self._client.get_job_status(self._id).is_terminal():
                self._client.stop_job(self._id)
        except _UNANSWERED as e:
            print(
                f"compare: Ray job {self._id} may still run, ray={self._address} does not answer ({one_line(e)}): "
                f"ray job stop --address {self._address} {self._id}",
                file=sys.stderr,
            )


def submit(client: Any, entrypoint: str, pauses: Sequence[float] = (1, 2, 4, 8, 16, 32)) -> str:
    """The job's id. A cluster that has just started has no agent yet and says so: asked again after each pause."""
    for pause in pauses:
        try:
            return client.submit_job(entrypoint=entrypoint)
        except RuntimeError as e:
            if "No available agent" not in str(e):
                raise
            time.sleep(pause)
    return client.submit_job(entrypoint=entrypoint)


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
    unit = "step" if total else "cell"
    # miniters=0: also where no cell has ended since, else the bar stands still for minutes
    bar = tqdm(total=total or len(queue), unit=unit, desc="matrix", file=out, smoothing=0, miniters=0)
    try:
        while queue or running:
            while queue and len(running) < parallel:
                cell, attempt = queue.pop(0)
                cell.dir.mkdir(parents=True, exist_ok=True)
                with signals_wait():  # a cell that is started is noted, and so ended below
                    job = start(cell.command, cell.dir / "terminal.log")
                    running.append(_Started(cell, job, time.monotonic(), attempt))
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
            steps = {s.cell.name: _step(s.cell.dir) for s in running}
            if total:
                settled = [c for c in cells if c.name in outcome.complete or c.name in outcome.failed]
                done = sum(c.steps or 0 for c in settled) + sum(steps.values())
            bar.set_postfix_str(", ".join(f"{name} step {step}" for name, step in steps.items()), refresh=False)
            bar.update(done - bar.n)
    finally:
        with signals_wait(), ExitStack() as ends:  # all, also where one cannot be ended or a second signal comes
            for started in running:
                ends.callback(started.job.stop)
        bar.close()
    return outcome


def at_once(own: Mapping[str, str]) -> int:
    """The number of cells that run at once. Raises ValueError: on a cluster only the user knows how many fit."""
    if own["ray"] and not own["parallel"]:
        raise ValueError(
            f"ray={own['ray']} needs parallel=, the number of cells that the cluster's GPUs hold at once: "
            "free GPUs / (trainer.nnodes x trainer.n_gpus_per_node). A cell that finds fewer fails, it does not wait"
        )
    return parse_count("parallel", own["parallel"] or "1")


def hours_a_cell(own: Mapping[str, str]) -> float:
    """The limit of a cell. Raises ValueError for what is no time."""
    try:
        hours = float(own["hours"])
    except ValueError:
        hours = 0.0
    if not hours > 0:
        raise ValueError(f"hours={own['hours']}: a number above 0, the limit of a cell")
    return hours


def out_folder(own: Mapping[str, str]) -> Path:
    """Where all cells are; the shell leaves the `~` of `out=~/m` alone."""
    return Path(own["out"]).expanduser().resolve()


def _step(run_dir: Path) -> int:
    lines = RunRecord(run_dir).read_metrics()
    return lines[-1]["step"] if lines else 0


def main(arguments: Sequence[str]) -> int:
    if any(a in ("-h", "--help") for a in arguments):
        print(__doc__)
        return 0
    try:
        own, overrides = parse(arguments)
        cells = matrix(own, overrides)
        parallel, hours = at_once(own), hours_a_cell(own)
        refuse_others(cells)
    except ValueError as e:
        print(f"compare: error: {e}", file=sys.stderr)
        return 1
    address = own["ray"]

    def start(command: Sequence[str], log: Path) -> Job:
        return RayJob(command, log, address) if address else LocalJob(command, log)

    try:
        outcome = run_matrix(cells, start, parallel=parallel, hours=hours)
    except (KeyboardInterrupt, SystemExit) as e:  # the second is of SIGTERM, see below
        why, status = ("interrupted", 130) if isinstance(e, KeyboardInterrupt) else (TERMINATED, TERMINATED_STATUS)
        print(f"compare: error: {why}; the same command goes on from here", file=sys.stderr)
        return status
    except ClusterError as e:
        print(f"compare: error: {e}; the same command goes on from here", file=sys.stderr)
        return 1
    out = out_folder(own)
    print(f"compare: {len(outcome.complete)} complete, {len(outcome.skipped)} were, {len(outcome.failed)} failed")
    for name in outcome.failed:
        print(f"compare: failed: {name}, see {out / name / 'terminal.log'}")
    finished = sorted(cell.dir for cell in cells if cell.complete)
    if not finished:
        print("compare: no cell is complete, so there is no report", file=sys.stderr)
        return 1
    # Of this matrix alone: what else is in `out` may be of other settings.
    if others := len(set(finished_runs(out)) - set(finished)):
        print(
            f"compare: {others} other finished runs in {out} are not in the report; all of them, where they can be "
            f"compared: python -m recipe.gtpo.experiments.report {shlex.quote(str(out))} -o REPORT"
        )
    status = show_report(finished, out / "report")
    return 1 if outcome.failed else status


if __name__ == "__main__":
    # Through `finally`, and so what runs is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED_STATUS))
    sys.exit(main(sys.argv[1:]))
