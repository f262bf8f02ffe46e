"""Read the records of a run folder: `RUN_DIR/trajectories/<step>.jsonl` and `RUN_DIR/validation/<step>.jsonl`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from verl_ext.records.files import open_lines, step_files
from verl_ext.records.schema import NewerRecordError, Record, upgrade

logger = logging.getLogger(__name__)

Split = Literal["train", "validation"]
FOLDERS: dict[Split, str] = {"train": "trajectories", "validation": "validation"}


class Reader:
    """The records of one run. `skipped` counts the lines that were none; each is named in a warning.

    Args:
        run_dir: a run folder. It may be of a run that goes on, and of one that was killed.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        self.dir = Path(run_dir)
        self.skipped = 0

    def files(self, split: Split = "train") -> dict[int, Path]:
        """step -> file, ascending."""
        return step_files(self.dir / FOLDERS[split])

    def steps(self, split: Split = "train") -> list[int]:
        return list(self.files(split))

    def read(self, step: int, split: Split = "train") -> Iterator[Record]:
        """The records of a step, one at a time. Raises ValueError, with the steps that there are, if it is not one."""
        files = self.files(split)
        if step not in files:
            raise ValueError(f"{self.dir}: no step {step} of {split}; recorded: {', '.join(map(str, files)) or 'none'}")
        yield from self.read_file(files[step], step, split)

    def read_file(self, path: Path, step: int, split: Split) -> Iterator[Record]:
        """As `read`. Raises NewerRecordError where a newer release wrote the file: its lines are not torn."""
        for number, text in enumerate(open_lines(path), start=1):
            try:
                line = {"step": step, "split": split, **json.loads(text)}
                yield Record.model_validate(upgrade(line))
            except NewerRecordError as e:
                raise NewerRecordError(f"{path}, line {number}: {e}") from None
            except (ValueError, KeyError, TypeError, ValidationError) as e:
                self.skipped += 1
                said = str(e).splitlines()[0]
                logger.warning(f"{path}, line {number} is no record ({said}): skipped; was its writer killed?")


def read_run(run_dir: str | os.PathLike[str], split: Split = "train") -> Iterator[Record]:
    """All records of a run, step by step; never more than one in memory."""
    reader = Reader(run_dir)
    for step, path in reader.files(split).items():
        yield from reader.read_file(path, step, split)
