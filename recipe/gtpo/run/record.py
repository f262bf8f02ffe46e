"""What a run leaves on disk, and the only code that knows the layout.

    run_dir/
        config.json                the config of its first start, flat: the folder belongs to it (identity.py)
        versions.json              packages, commit, machine, seed, command: one entry a start
        metrics.jsonl              one line a step: {"step": n, "metrics": {...}}; validation before training is step 0;
                               a number that JSON has not: "not_finite": {"actor/grad_norm": "nan"} in that line
        trajectories/<step>.jsonl  every training trajectory of the step (schema: verl_ext/records); .jsonl.zst where
                                   trajectory_zstd is set; the latest trajectory_keep of them, where that is set
        validation/<step>.jsonl    the same of every validation
        checkpoint_metrics.json    the latest checkpoint's step and its metrics before validation: where a run died
                                   between the checkpoint and the step's line, the next start makes the line of them
        rollout.json               how far the rollout of the present step or validation is, in prompts
        logs/<start>/              by start (0, 1, ... as in versions.json): output of Ray's workers (Ray's names), and
                                   driver.txt, the traceback of a command that failed
        evaluations.jsonl          trainer.val_only: one line an evaluation, {"step": n, "metrics": {...}}
        cause.txt                  why the latest start ended early, in one line
        summary.json               what the last lines of the terminal said

    and what others write there:
        hydra/<time>/, main.log    hydra: the composed config and the overrides of every start, also of one that is then
                               refused; its log
        checkpoints/               verl (trainer.default_local_dir)
        tensorboard/               verl: the curves
        evaluation.json, data/     evaluate: what came of an evaluation, whose folder this is; its problems, and of what
                               they were made
        terminal.log               experiments/compare.py: the command's output, where a comparison started it

The trainer writes, on the node where it runs; the command that started it reads, to show progress.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from verl_ext.records.files import COMPRESSED, PLAIN, open_lines, step_of, write_lines
from verl_ext.records.reader import FOLDERS, Reader, Split

logger = logging.getLogger(__name__)

_PACKAGES = ("verl", "torch", "transformers", "ray", "tensordict", "TransferQueue", "hydra-core", "vllm", "sglang")


def last_line(text: str) -> str:
    """What a process said last, for a message about its end."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it left no message"


class RecordError(ValueError):
    """A file that cannot be used as it is. The message is one line: which, and what to do."""


class RunRecord:
    """Reads and writes one run folder. Reading a file that was cut off raises RecordError."""

    def __init__(self, run_dir: str | os.PathLike[str], *, compress: bool = False, keep: int | None = None) -> None:
        self.dir = Path(run_dir)
        self._keep = keep  # trajectories of the latest steps only, when it is a number
        self._suffix = COMPRESSED if compress else PLAIN  # of trajectories that are written; both are read
        self.metrics_path = self.dir / "metrics.jsonl"
        self._config = self.dir / "config.json"
        self._versions = self.dir / "versions.json"
        self._evaluations = self.dir / "evaluations.jsonl"
        self._summary = self.dir / "summary.json"
        self._evaluation_report = self.dir / "evaluation.json"
        self._cause = self.dir / "cause.txt"
        self._checkpoint_metrics = self.dir / "checkpoint_metrics.json"
        self._rollout = self.dir / "rollout.json"
        self._unwritten_cause: str | None = None  # of a start that ended on a full disk
        self._said: set[str] = set()

    # -- starts ------------------------------------------------------------------------------------------------------

    def write_start(self, seed: int) -> None:
        """Add this start's versions to versions.json (a resumed run has several)."""
        self.dir.mkdir(parents=True, exist_ok=True)
        starts = self.read_starts()
        starts.append(
            {
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "command": sys.argv,
                "seed": seed,
                "python": platform.python_version(),
                "machine": platform.platform(),
                "cores": os.cpu_count(),
                "commit": _commit(),
                "packages": {name: version for name in _PACKAGES if (version := _version(name))},
            }
        )
        _replace(self._versions, _json(starts, indent=2))

    def write_config(self, config: Mapping[str, Any]) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        _replace(self._config, _json(config, indent=1))

    def read_config(self) -> dict[str, Any] | None:
        """None before the first start."""
        return _read_json(self._config, dict)

    def read_starts(self) -> list[dict[str, Any]]:
        return _read_json(self._versions, list) or []

    @property
    def logs(self) -> Path:
        """The folder for the logs of the latest start."""
        return self.dir / "logs" / str(max(0, len(self.read_starts()) - 1))

    def keep_logs(self, folder: str | os.PathLike[str]) -> None:
        """Copy what the workers of the latest start wrote."""
        shutil.copytree(folder, self.logs, dirs_exist_ok=True, ignore_dangling_symlinks=True)

    def write_traceback(self, text: str) -> None:
        """Of the latest start's command."""
        self.logs.mkdir(parents=True, exist_ok=True)
        (self.logs / "driver.txt").write_text(text, errors="backslashreplace")

    def write_cause(self, cause: str) -> str:
        """Keep the first cause only: what follows it is a consequence. Returns the one that is kept.

        Whoever writes one is ending a run and has to get on with it: on a disk that takes nothing it is kept here.
        """
        try:
            if self.read_cause() is None:
                self._put_cause(cause)
            return self.read_cause() or cause
        except OSError:
            self._unwritten_cause = cause
            return cause

    def _put_cause(self, cause: str) -> None:
        """Whole or not at all, and never over another: a signal, a watch and the trainer's process may write theirs."""
        handle, name = tempfile.mkstemp(prefix=".cause.", dir=self.dir)
        partial = Path(name)
        try:
            with open(handle, "w", errors="backslashreplace") as f:
                f.write(cause + "\n")
            os.chmod(partial, 0o644)  # mkstemp makes it private
            try:
                os.link(partial, self._cause)
            except FileExistsError:
                return
            except OSError:  # a file system without hard links
                if not self._cause.exists():
                    partial.replace(self._cause)
        finally:
            partial.unlink(missing_ok=True)

    def drop_cause(self) -> None:
        """At the next start, once the folder is its own: it has not ended."""
        self._unwritten_cause = None
        self._cause.unlink(missing_ok=True)

    def read_cause(self) -> str | None:
        return self._cause.read_text().strip() if self._cause.exists() else self._unwritten_cause

    def last_write(self) -> float:
        """When the run last wrote anything of its own, in seconds since the epoch; 0.0 before its first start."""
        files = [self.metrics_path, self._versions, self._checkpoint_metrics, self._rollout, self._summary, self._cause]
        folders = [self.dir / name for name in FOLDERS.values()]  # a file that is replaced changes its folder's time
        return max((path.stat().st_mtime for path in files + folders if path.exists()), default=0.0)

    # -- steps -------------------------------------------------------------------------------------------------------

    def write_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line. Values that are no numbers are left out: they belong to other records."""
        line = _json(_line(step, metrics)) + "\n"
        with self.metrics_path.open("ab+") as f:
            if f.tell() > 0:
                f.seek(-1, os.SEEK_END)
                if f.read(1) != b"\n":  # a writer was killed in the middle of its line
                    line = "\n" + line
            f.write(line.encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines so far by step, the latest for each. What is left of a killed writer's line is passed over."""
        by_step = {line["step"]: line for line in self._lines(self.metrics_path)}
        return [by_step[step] for step in sorted(by_step)]

    def write_evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the validation of a run that only validates: its step has its line in metrics.jsonl already."""
        with self._evaluations.open("a") as f:
            f.write(_json(_line(step, metrics)) + "\n")

    def read_evaluations(self) -> list[dict[str, Any]]:
        return list(self._lines(self._evaluations))

    def write_checkpoint_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """What is known of a step when it is saved: `complete` makes the line of it if the run dies before it does."""
        self.dir.mkdir(parents=True, exist_ok=True)
        _replace(self._checkpoint_metrics, _json(_line(step, metrics)))

    def write_rollout(self, step: int, split: Split, done: int, of: int) -> None:
        """How many prompts of a step's rollout are done: all their trajectories have ended."""
        self.dir.mkdir(parents=True, exist_ok=True)
        _replace(self._rollout, _json({"step": step, "split": split, "done": done, "of": of}))

    def read_rollout(self) -> dict[str, Any] | None:
        """The latest; None before the first."""
        return _read_json(self._rollout, dict)

    def forget_after(self, step: int) -> None:
        """Drop the lines and trajectories of later steps (-1: of all): a resumed run does these steps again.

        And the summary of a run that was done and now goes on: stopped on its way, it would be taken for one that is
        done, at a step that was not its last. Afterwards metrics.jsonl has exactly one line a step, and no torn one.
        """
        if self.metrics_path.exists():
            lines = [line for line in self.read_metrics() if line["step"] <= step]
            _replace(self.metrics_path, "".join(_json(line) + "\n" for line in lines))
        for folder in FOLDERS.values():
            for path in (self.dir / folder).glob("*.jsonl*"):
                recorded = step_of(path)
                if path.suffix == ".tmp" or (recorded is not None and recorded > step):
                    path.unlink()
        if self._read_checkpoint_metrics()[0] > step:
            self._checkpoint_metrics.unlink()
        self._summary.unlink(missing_ok=True)

    def complete(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Give the step that a run starts from its line, unless it has one.

        Args:
            step: 0, or the checkpoint's.
            metrics: of the validation before training.
        """
        saved, known = self._read_checkpoint_metrics()
        line = {**(known if saved == step else {}), **metrics}
        if line and all(other["step"] != step for other in self.read_metrics()):
            self.write_metrics(step, line)

    def has_validation(self, step: int) -> bool:
        """Whether both are there: the numbers of a validation in the step's line, and its trajectories."""
        lines = (line["metrics"] for line in self.read_metrics() if line["step"] == step)
        validated = any(name.startswith("val-core/") for metrics in lines for name in metrics)
        return validated and step in Reader(self.dir).files("validation")

    def _read_checkpoint_metrics(self) -> tuple[int, dict[str, float]]:
        saved = _read_json(self._checkpoint_metrics, dict)
        if saved is None:
            return -1, {}
        return saved["step"], saved["metrics"] | {k: float(v) for k, v in saved.get("not_finite", {}).items()}

    def write_trajectories(
        self, step: int, rows: Iterable[Mapping[str, Any]], *, split: Split = "train", more: bool = False
    ) -> None:
        """Write the file of `step`, or add `more` rows to it."""
        folder = self.dir / FOLDERS[split]
        folder.mkdir(exist_ok=True)
        before = Reader(self.dir).files(split).get(step)
        kept = open_lines(before) if more and before is not None else ()
        path = folder / f"{step}{self._suffix}"
        write_lines(path, itertools.chain(kept, map(_json, rows)))
        if before not in (None, path):  # of a start that wrote them in the other form
            before.unlink()  # type: ignore[union-attr]
        if self._keep is not None:
            self._drop_all_but(self._keep, split)

    def _drop_all_but(self, keep: int, split: Split) -> None:
        files = Reader(self.dir).files(split)
        for step in list(files)[:-keep]:
            logger.info(f"{files[step]} is removed: trajectory_keep={keep}")
            files[step].unlink()

    def append_trajectory(self, step: int, row: Mapping[str, Any], *, split: Split = "train") -> None:
        """Add one line to the plain file of `step`: it is whole on disk, or torn at the end, whenever a kill comes."""
        folder = self.dir / FOLDERS[split]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{step}{PLAIN}").open("ab") as f:
            f.write(f"{_json(row)}\n".encode())

    def read_whole_lines(self, step: int, *, split: Split = "train") -> Iterator[dict[str, Any]]:
        """The lines of `step` so far, none where there is no file; a torn one is passed over, with a word."""
        path = Reader(self.dir).files(split).get(step)
        for number, text in enumerate(open_lines(path) if path is not None else (), 1):
            try:
                yield json.loads(text)
            except ValueError:
                self._say_once(f"{path}: line {number} is no JSON, passed over: its writer was killed")

    def trajectory_steps(self, *, split: Split = "train") -> list[int]:
        """The steps whose trajectories were recorded, ascending."""
        return Reader(self.dir).steps(split)

    def read_trajectories(self, step: int) -> list[dict[str, Any]]:
        """What was written for `step`. Raises ValueError, with the steps that there are, when it is not one of them."""
        files = Reader(self.dir).files()
        if not files:
            raise ValueError(f"{self.dir / FOLDERS['train']}: no recorded trajectories")
        if step not in files:
            steps = ", ".join(map(str, files))
            raise ValueError(f"{self.dir / FOLDERS['train']}: no step {step}; recorded: {steps}")
        return [json.loads(line) for line in open_lines(files[step])]

    # -- the end -----------------------------------------------------------------------------------------------------

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        _replace(self._summary, _json(summary, indent=2))

    def write_evaluation_report(self, report: Mapping[str, Any]) -> None:
        """What came of an evaluation (recipe/gtpo/evaluate)."""
        _replace(self._evaluation_report, _json(report, indent=2) + "\n")

    def read_evaluation_report(self) -> dict[str, Any] | None:
        """None where the folder is no evaluation's, or it has not ended."""
        return _read_json(self._evaluation_report, dict)

    def read_summary(self) -> dict[str, Any] | None:
        """None until the run has ended well."""
        return _read_json(self._summary, dict)

    def _lines(self, path: Path) -> Iterator[dict[str, Any]]:
        if not path.exists():
            return
        with path.open() as f:
            for number, line in enumerate(f, 1):
                if not line.endswith("\n"):  # the writer may be in the middle of it
                    return
                try:
                    yield json.loads(line)
                except ValueError:
                    self._say_once(f"{path}: line {number} is no JSON, passed over: its writer was killed")

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning(text)


def latest_checkpoint(folder: str | os.PathLike[str]) -> int | None:
    """The step of the checkpoint that verl goes on from with trainer.resume_mode=auto, None where there is none.

    verl empties its tracker file before it writes the step, and does so when all else of the checkpoint is written. So
    where a kill left it empty, the checkpoint written last is whole, and its step is put into the file.

    Args:
        folder: trainer.default_local_dir.

    Raises:
        RecordError: the tracker names a checkpoint that is not there (verl would start over), or nothing at all.
    """
    tracker = Path(folder) / "latest_checkpointed_iteration.txt"
    if not tracker.exists():
        return None
    text = tracker.read_text(errors="replace")
    remedy = "put the checkpoint back, or delete this file to start over"
    if text.strip().isdecimal():
        if not tracker.with_name(f"global_step_{int(text)}").is_dir():
            raise RecordError(f"{tracker} names step {int(text)}, but there is no global_step_{int(text)}: {remedy}")
        return int(text)
    written = {path.parent.name: path.stat().st_mtime for path in tracker.parent.glob("global_step_*/data.pt")}
    if not written:
        raise RecordError(f"{tracker} names no step, and there is no checkpoint: {remedy}")
    step = int(max(written, key=lambda name: written[name]).removeprefix("global_step_"))
    logger.warning(f"{tracker} was cut off; its checkpoint is that of step {step}")
    _replace(tracker, str(step))
    return step


def _read_json(path: Path, kind: type) -> Any:
    """What the file holds, None when it is not there. Raises RecordError."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(errors="replace"))
    except ValueError:
        found = None
    if not isinstance(found, kind):
        raise RecordError(f"{path} is no JSON {kind.__name__}, its writing was cut off: delete it")
    return found


def _line(step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A step's line: its numbers, and the names of those that are not finite, which JSON cannot write."""
    numbers = {key: number for key, value in metrics.items() if (number := _number(value)) is not None}
    finite = {key: number for key, number in numbers.items() if math.isfinite(number)}
    line: dict[str, Any] = {"step": step, "metrics": finite}
    if len(finite) < len(numbers):
        line["not_finite"] = {key: str(number) for key, number in numbers.items() if key not in finite}
    return line


def _number(value: Any) -> float | None:
    if isinstance(value, (bool, str)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # torch: a tensor of several numbers
        return None


def _json(value: Any, indent: int | None = None) -> str:
    """Strict JSON, in ASCII: readers of other languages take it, and no text fails to be written.

    Numpy's and torch's numbers and arrays become plain ones. A float that is not finite becomes its name.

    Raises TypeError for an object of another class.
    """
    try:
        text = json.dumps(value, indent=indent, allow_nan=False)
    except (TypeError, ValueError):  # numpy, torch, not finite
        text = None
    if text is None or "\\ud" in text:  # perhaps half a character
        text = json.dumps(_plain(value), indent=indent, allow_nan=False)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, str):  # half a character (a lone surrogate) is no text for readers of other languages
        return value if value.isascii() else value.encode(errors="replace").decode()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))  # numpy's float64 is a float too
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # installed from a wheel


def _replace(path: Path, text: str) -> None:
    """Write whole or not at all: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
