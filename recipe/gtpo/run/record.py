"""What a run leaves on disk, and the only code that knows the layout.

    run_dir/
        versions.json            packages, commit, machine, seed, command: one entry a start
        hydra/                   the composed config and the overrides (written by hydra)
        metrics.jsonl            one line a step: {"step": n, "metrics": {...}}; validation before training is step 0
        trajectories/<step>.jsonl  every training trajectory of the step with its turn rewards and advantages
        checkpoints/             verl's
        logs/<start>/            output of Ray's workers, by start (0, 1, ... as in versions.json)
        summary.json             what the last lines of the terminal said

The trainer writes, on the node where it runs; the command that started it reads, to show progress.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("verl", "torch", "transformers", "ray", "tensordict", "TransferQueue", "hydra-core", "vllm", "sglang")


def last_line(text: str) -> str:
    """What a process said last, for a message about its end."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it left no message"


class RunRecord:
    """Reads and writes one run folder."""

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.dir = Path(run_dir)
        self.metrics_path = self.dir / "metrics.jsonl"

    def write_start(self, seed: int) -> None:
        """Add this start's versions to versions.json (a resumed run has several)."""
        self.dir.mkdir(parents=True, exist_ok=True)
        path = self.dir / "versions.json"
        starts = json.loads(path.read_text()) if path.exists() else []
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
        _replace(path, json.dumps(starts, indent=2))

    @property
    def logs(self) -> Path:
        """The folder for the logs of the latest start."""
        path = self.dir / "versions.json"
        start = len(json.loads(path.read_text())) - 1 if path.exists() else 0
        return self.dir / "logs" / str(start)

    def write_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line. Values that are no numbers are left out: they belong to other records."""
        numbers = {k: float(v) for k, v in metrics.items() if _is_number(v)}
        with self.metrics_path.open("a") as f:
            f.write(json.dumps({"step": step, "metrics": numbers}) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines so far, the latest for each step (a resumed run repeats steps after its checkpoint)."""
        by_step = {line["step"]: line for line in self._lines(self.metrics_path)}
        return [by_step[step] for step in sorted(by_step)]

    def write_trajectories(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        folder = self.dir / "trajectories"
        folder.mkdir(exist_ok=True)
        _replace(folder / f"{step}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        _replace(self.dir / "summary.json", json.dumps(summary, indent=2))

    @staticmethod
    def _lines(path: Path) -> Iterator[dict[str, Any]]:
        if not path.exists():
            return
        with path.open() as f:
            for line in f:
                if line.endswith("\n"):  # the writer may be in the middle of the last one
                    yield json.loads(line)


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, (bool, str)) and float(value) == float(value)
    except (TypeError, ValueError):
        return False


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
