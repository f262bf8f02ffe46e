"""Fifty kills: every process of a training run in turn, at random moments, without notice (SIGKILL).

Each run then ends with the cause within a minute, or goes on. The last start trains to the end, and leaves what a run
that nobody touched leaves. About an hour on two cores: `bash tests/run.sh -m slow tests/e2e/test_kills.py -s`.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass

import psutil
import pytest
from runs import Run, start

from recipe.gtpo.run.record import RunRecord, latest_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]

KILLS = 50
SECONDS = 60  # in which a run ends with the cause, or shows that it goes on
START = 240  # more, to show it, where the kill came before its first step: a start takes its time
LATEST = 15.0  # a kill comes so many seconds after its process was first seen, at most
GOES_ON = 12  # steps after a kill that show it: longer than the run's own watch takes to look


@dataclass(frozen=True)
class Part:
    """A kind of process: how its command line is told, and what the run's last line names when it ends of its death.

    While a run starts, nothing watches its parts yet: the last line then has Ray's word for it, the class, and of the
    tool server that it ended.
    """

    name: str
    title: str
    named: str


#: In the order in which they are killed, again and again. Ray titles its workers ray::Class.method.
PARTS = (
    Part("command", "", ""),  # killed itself, it says nothing
    Part("trainer", "ray::TaskRunnerV1", "the trainer's process died"),
    Part("training worker", "ray::WorkerDict", "the training worker died"),
    Part("rollout server", "ray::TransformersServer", "the rollout server died"),
    Part("agent loop worker", "ray::AgentLoopWorkerTQ", "the agent loop worker died"),
    Part("reward worker", "ray::RewardLoopWorker", "the reward worker died"),
    Part(
        "balancer of the rollout servers", "ray::GlobalRequestLoadBalancer", "the balancer of the rollout servers died"
    ),
    Part("storage of TransferQueue", "ray::SimpleStorageUnit", "the storage of TransferQueue died"),
    Part("controller of TransferQueue", "ray::TransferQueueController", "the controller of TransferQueue died"),
    Part("tool server", "-m verl_ext.tool_server", "the tool server died"),
    Part("process of the tool server", "zygote.main(", ""),
    Part("raylet", "raylet/raylet", "Ray's raylet died"),
    Part("Ray's control store", "gcs_server", "Ray's control store (gcs_server) died"),
    Part("Ray's log monitor", "log_monitor.py", ""),
)


@dataclass(frozen=True)
class Kill:
    part: str
    seconds: float
    end: str  # the last line, or "goes on"


def test_whatever_dies_the_run_ends_with_the_cause_or_goes_on_and_comes_to_the_same(tmp_path):
    chance = random.Random(1)
    record = RunRecord(tmp_path / "run")
    kills: list[Kill] = []
    faults: list[str] = []
    while len(kills) < KILLS:
        with start(tmp_path, "trainer.total_training_steps=100000", "watchdog.poll_seconds=2") as run:
            began_at = last_step(record)
            while run.process.poll() is None and len(kills) < KILLS:
                part = PARTS[len(kills) % len(PARTS)]
                kill = kill_one(run, part, began_at, chance.uniform(0, LATEST), faults)
                if kill is None:
                    continue
                kills.append(kill)
                print(
                    f"{len(kills):3} step {last_step(record):4} {kill.part:28} {kill.seconds:5.1f} s  {kill.end}",
                    flush=True,
                )
    print(table(kills))
    assert not faults, "\n".join(faults)

    total = (latest_checkpoint(record.dir / "checkpoints") or 0) + 1
    whole = tmp_path / "whole"
    whole.mkdir()
    for folder in (tmp_path, whole):
        with start(folder, f"trainer.total_training_steps={total}") as run:
            assert run.wait(3600) == 0, run.text()[-3000:]
    resumed, untouched = contents(record), contents(RunRecord(whole / "run"))
    assert resumed.keys() == untouched.keys()
    for step, (numbers, rows) in untouched.items():
        assert resumed[step][1] == rows, step
        # A line made of what the checkpoint was saved with lacks what verl works out after it.
        assert {key: numbers[key] for key in resumed[step][0] if key in numbers}.items() <= resumed[step][0].items(), (
            step
        )


def kill_one(run: Run, part: Part, began_at: int, delay: float, faults: list[str]) -> Kill | None:
    """Kill the part when it is there, and see what comes of it; what should not come goes to `faults`.

    `began_at`: the step from which this start goes on.
    """
    run.wait_until(lambda: find(run, part) is not None, 300)
    deadline = time.monotonic() + delay
    while time.monotonic() < deadline:
        run.look()
        time.sleep(0.1)
    step = last_step(run.record)
    patience = SECONDS + (0 if step > began_at else START)
    process = find(run, part)
    if process is None:  # one that ended by itself in the meantime
        return None
    process.kill()
    began = time.monotonic()
    while run.process.poll() is None and last_step(run.record) < step + GOES_ON:
        run.look()
        if time.monotonic() - began > patience:
            faults.append(f"{part.name}: neither an end nor a step after {patience} s:\n{run.text()[-1500:]}")
            run.process.kill()
            run.process.wait(10)
            break
        time.sleep(0.1)
    seconds = time.monotonic() - began
    if run.process.poll() is None:
        return Kill(part.name, seconds, "goes on")
    if seconds > SECONDS:
        faults.append(f"{part.name}: the end took {seconds:.0f} s")
    if left := run.left_behind(SECONDS):
        faults.append(f"{part.name}: left behind: {left}")
    line = run.last_line() if run.text().strip() else ""
    named = part.named in line or part.title.removeprefix("ray::") in line or f"{part.name} ended" in line
    if part.name != "command" and not (line.startswith("gtpo: error: ") and named):
        faults.append(f"{part.name}: the last line is {line!r}")
    return Kill(part.name, seconds, "ends" if part.name == "command" else line)


def find(run: Run, part: Part) -> psutil.Process | None:
    if part.name == "command":
        return psutil.Process(run.process.pid)
    try:
        return run.find(part.title)
    except AssertionError:
        return None


def last_step(record: RunRecord) -> int:
    lines = record.read_metrics()
    return lines[-1]["step"] if lines else -1


def table(kills: list[Kill]) -> str:
    by_part = defaultdict(list)
    for kill in kills:
        by_part[kill.part].append(kill)
    rows = [
        "| killed | times | the run ended | went on | seconds to the end: median, longest |",
        "|---|---|---|---|---|",
    ]
    for part, some in by_part.items():
        ended = [kill.seconds for kill in some if kill.end != "goes on"]
        seconds = f"{statistics.median(ended):.0f}, {max(ended):.0f}" if ended else ""
        went_on = sum(kill.end == "goes on" for kill in some)
        rows.append(f"| {part} | {len(some)} | {len(ended)} | {went_on} | {seconds} |")
    return "\n".join(rows)


#: Costs, and how far the sampler's own log-probs are from the policy's: they depend on who shared its batch.
_CHANCE = ("timing", "perf", "seconds", "share_of_step", "throughput", "mfu", "log_prob_gap", "rollout_")


def contents(record: RunRecord) -> dict[int, tuple[dict, list]]:
    """What must be equal, by step: the curve, and all trajectories with their numbers."""
    found = {}
    for line in record.read_metrics():
        numbers = {k: v for k, v in line["metrics"].items() if not any(word in k for word in _CHANCE)}
        rows = record.read_trajectories(line["step"]) if line["step"] else []
        for row in rows:
            row.pop("group")  # a number that verl draws
            for turn in row["turns"]:
                for key in ("log_prob_gap", "log_prob_gaps"):
                    turn.pop(key)
                for outcome in turn["outcomes"]:
                    outcome.pop("seconds")
        found[line["step"]] = (numbers, rows)
    return found
