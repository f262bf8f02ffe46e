"""The runs of a report, as their own records have them, and which of them may be compared."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

from scipy import integrate

from recipe.gtpo.run.identity import differences
from recipe.gtpo.run.progress import validation_accuracy, validation_mean
from recipe.gtpo.run.record import RunRecord

#: Methods that read the summed reward before there was `algorithm.gtpo.trajectory_reward`, and another one now.
_ONCE_SUMMED = ("grpo", "dr_grpo", "rloo")
_REWARD = "algorithm.gtpo.trajectory_reward"
_SHAPING = "algorithm.gtpo.shaping.enable"  # False in all rivals
#: How the report names the reward that a method compares, by `trajectory_reward`, or by the estimator that reads parts.
_REWARD_NAMES = {
    "sum": "outcome + format penalties",
    "min": "min(outcome, well-formed)",
    "outcome": "the outcome",
    "recorded_gdpo": "outcome and well-formed apart",
}
#: What has to be equal in the runs of one method, of whatever machine: keys, or how they begin.
_TRAINING = (
    *("algorithm.", "actor_rollout_ref.actor.optim.", "actor_rollout_ref.actor.clip_ratio", "data.train_batch_size"),
    *("actor_rollout_ref.actor.ppo_mini_batch_size", "actor_rollout_ref.rollout.n", "actor_rollout_ref.rollout.temp"),
)
_STEPS = "actor_rollout_ref.actor.optim.total_training_steps"


def todays_name(method: str, config: Mapping[str, Any] | None) -> str:
    """The method that a run of the recorded `config` (config.json; None: none was recorded) is by today's names."""
    return f"{method}_sum" if method in _ONCE_SUMMED and _REWARD not in (config or {}) else method


def _reward_name(config: Mapping[str, Any]) -> str:
    kind = str(config.get(_REWARD, "sum"))
    if kind == "sum" and config.get("algorithm.gtpo.format_penalty") == 0:
        kind = "outcome"
    name = _REWARD_NAMES.get(str(config.get("algorithm.adv_estimator"))) or _REWARD_NAMES[kind]
    return name.replace("outcome", "shaped outcome", 1) if config.get(_SHAPING) is True else name


@dataclass(frozen=True)
class Run:
    """One finished run, read from its folder."""

    dir: Path
    method: str  # by today's name
    ours: bool  # GTPO, in any setting; else one of its rivals
    reward: str  # what the method compares, in words
    task: str
    engine: str
    horizon: int | None  # None: the task has none, or the record is older than the knob
    seed: int
    lines: list[dict[str, Any]]  # metrics.jsonl
    start: dict[str, Any]  # the last entry of versions.json
    config: dict[str, Any]  # of training, flat; empty where the run is older than config.json

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Raises ValueError for a run that has not finished, or without a validation before and after training."""
        record = RunRecord(folder)
        config = record.read_config() or {}
        summary, starts = record.read_summary(), record.read_starts()
        if summary is None or not starts:
            raise ValueError(f"{folder}: a finished run has a summary.json and a versions.json")
        run = cls(
            dir=folder,
            method=todays_name(summary["method"], config),
            # A run older than config.json goes by its name.
            ours=config.get("algorithm.adv_estimator", summary["method"].split("_")[0]) == "gtpo",
            reward=_reward_name(config),
            task=summary["task"],
            engine=summary.get("engine", "verl"),
            horizon=summary.get("horizon"),
            seed=summary["seed"],
            lines=record.read_metrics(),
            start=starts[-1],
            config={key: value for key, value in config.items() if key.startswith(_TRAINING) and key != _STEPS},
        )
        if len(run.curve) < 2:
            raise ValueError(f"{folder}: no validation before and after training; set trainer.test_freq")
        return run

    @cached_property
    def curve(self) -> dict[int, float]:
        """Step -> held-out accuracy."""
        pairs = ((line["step"], validation_accuracy(line["metrics"])) for line in self.lines)
        return {step: accuracy for step, accuracy in pairs if accuracy is not None}

    @property
    def final(self) -> float:
        return self.curve[max(self.curve)]

    @property
    def area(self) -> float:
        """Mean height of the learning curve (trapezoid rule over steps)."""
        steps, heights = list(self.curve), list(self.curve.values())
        return float(integrate.trapezoid(heights, steps) / (steps[-1] - steps[0]))

    def reached(self, threshold: float) -> float | None:
        """The first validated step at or above `threshold`."""
        return next((float(step) for step, accuracy in self.curve.items() if accuracy >= threshold), None)

    def last(self, name: str) -> float | None:
        """A quantity of the last validation."""
        return validation_mean(self.lines[-1]["metrics"], name)

    def series(self, metric: str) -> dict[int, float]:
        return {line["step"]: line["metrics"][metric] for line in self.lines if metric in line["metrics"]}

    def median(self, metric: str) -> float | None:
        """Over training steps; the first one warms caches up and is left out."""
        values = list(self.series(metric).values())[1:]
        return median(values) if values else None

    def mean(self, metric: str) -> float | None:
        """Over the steps that have it."""
        values = list(self.series(metric).values())
        return fmean(values) if values else None

    @property
    def classes(self) -> dict[str, float]:
        """Final accuracy by problem class, where the run recorded it."""
        found = {}
        for key, value in self.lines[-1]["metrics"].items():
            parts = key.split("/")
            if parts[0] == "val-class" and parts[-1] == "acc":
                found[parts[1]] = value
        return found

    @property
    def commit(self) -> str:
        return str(self.start.get("commit"))

    @property
    def machine(self) -> str:
        return f"{self.start.get('machine')}, {self.start.get('cores')} cores"

    @property
    def command(self) -> str:
        """What made the run, to be given in the repository again; OUT is the folder that the run's is in."""
        _, *arguments = self.start["command"]
        module = "recipe.gtpo.experiments.twin" if self.engine == "twin" else "recipe.gtpo.main"
        return f"python -m {module} {shlex.join(arguments)}".replace(str(self.dir.resolve().parent), "OUT")


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """All finished runs in the given folders.

    Raises:
        ValueError: there is none, one is given twice, or they are not comparable (task, engine, number of steps, steps
            that were validated; some name a horizon and some do not), or runs of one method differ in their training.
    """
    runs = [Run.load(folder) for path in paths for folder in _finished(path)]
    seen: dict[tuple[str, int | None, int], Run] = {}
    firsts: dict[tuple[str, int | None], Run] = {}
    for run in runs:
        other = seen.setdefault((run.method, run.horizon, run.seed), run)
        if other is not run:
            at = "" if run.horizon is None else f" at horizon {run.horizon}"
            raise ValueError(f"{run.dir} and {other.dir} are both {run.method} with seed {run.seed}{at}")
        _check_comparable(run, runs[0])
        first = firsts.setdefault((run.method, run.horizon), run)
        both = run.config.keys() & first.config.keys()  # a record from before an option does not have it
        if differs := differences({k: first.config[k] for k in both}, {k: run.config[k] for k in both}):
            raise ValueError(
                f"{run.dir} is not another seed of {first.dir}: {differs}. Give the report runs of one setting"
            )
    return runs


def finished_runs(path: Path) -> list[Path]:
    """The run folder itself, or those in a folder of run folders."""
    if RunRecord(path).read_summary() is not None:
        return [path]
    return sorted(folder for folder in path.glob("*") if RunRecord(folder).read_summary() is not None)


def _finished(path: Path) -> list[Path]:
    """`finished_runs`. Raises ValueError where there is none."""
    if not (found := finished_runs(path)):
        raise ValueError(f"{path}: no finished run (no summary.json in it or in its folders)")
    return found


def _check_comparable(run: Run, first: Run) -> None:
    """Raises ValueError where the two cannot stand in one report."""
    if (run.horizon is None) != (first.horizon is None):
        without, known = sorted((run, first), key=lambda r: r.horizon is not None)
        raise ValueError(f"{without.dir} does not say its horizon, {known.dir} does: they cannot be compared")
    for what in ("task", "engine"):
        if getattr(run, what) != getattr(first, what):
            raise ValueError(f"{run.dir} and {first.dir} differ in {what}: they cannot be compared")
    if max(run.curve) != max(first.curve):
        raise ValueError(f"{run.dir} ends at step {max(run.curve)}, {first.dir} at {max(first.curve)}: not comparable")
    # The area of a curve depends on where it was looked at, the accuracy at its start too.
    if differing := sorted(run.curve.keys() ^ first.curve.keys()):
        raise ValueError(
            f"of {run.dir} and {first.dir} only one was validated at step {', '.join(map(str, differing))}: not "
            "comparable (trainer.test_freq and trainer.val_before_train have to be the same)"
        )


def by_horizon(runs: Sequence[Run]) -> dict[int | None, list[Run]]:
    """The runs that may be compared with each other, shortest horizon first."""
    groups: dict[int | None, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda r: r.horizon or 0):
        groups[run.horizon].append(run)
    return dict(groups)
