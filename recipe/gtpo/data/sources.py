"""The rows of a data set, one after the other: from a local file, or streamed from the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recipe.gtpo.tasks.prepared import DataSet

SUFFIXES = (".jsonl", ".json", ".parquet")


class SourceError(ValueError):
    """Rows that cannot be had: which, why, and what to do."""


def local_file(folder: Path, source: DataSet, *, training: bool) -> Path | None:
    """Where `folder` has a set: FOLDER/<name>/<split>.jsonl (or .json, .parquet).

    Hubs call the one split of an evaluation set `train` or `validation`; copies of it are mostly called `test`.
    """
    if training:
        names: tuple[str, ...] = (source.split,)
    else:
        names = ("test", "train") if source.split == "train" else (source.split, "test")
    files = (folder / source.name / f"{name}{suffix}" for name in names for suffix in SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def read_file(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet or JSON file. Raises SourceError with the line."""
    if file.suffix == ".parquet":
        yield from _read_parquet(file)
        return
    with file.open(encoding="utf-8") as lines:
        if lines.read(1) == "[":
            lines.seek(0)
            yield from json.load(lines)
            return
        lines.seek(0)
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise SourceError(f"{file}, line {number}, is no JSON: {e.msg}, at character {e.pos}") from e
            if not isinstance(row, dict):
                raise SourceError(f"{file}, line {number}, is no JSON object, but of type {type(row).__name__}")
            yield row


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(1000):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as e:
        raise SourceError(f"{file} is no parquet file: {e}") from e


def read_hub(name: str, split: str, config: str | None) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set of the hub, streamed. Raises SourceError where there is no hub, or no such set."""
    import datasets  # only who reads from a hub pays for the import

    datasets.disable_progress_bars()
    where = f"{name}, {config}, {split}" if config else f"{name}, {split}"
    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as e:  # of a dozen kinds, from four packages
        reason = " ".join(str(e).split())[:200]
        raise SourceError(
            f"the data set {where} cannot be read from the hub ({type(e).__name__}: {reason}): give a local copy, "
            "source=FILE for the training problems or local=FOLDER with FOLDER/<set>/<split>.jsonl for all sets"
        ) from e
