"""The rows of a data set, one after the other: from a local file, or streamed from the Hugging Face hub."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recipe.gtpo.tasks.prepared import DataSet

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".parquet")


class SourceError(ValueError):
    """Rows that cannot be had: which, why, and what to do."""


def local_file(folder: Path, source: DataSet, *, training: bool) -> Path | None:
    """Where `folder` has a set: FOLDER/<name>/<split>.jsonl (or another of SUFFIXES).

    Hubs call the one split of an evaluation set `train` or `validation`; copies of it are mostly called `test`.
    """
    if training:
        names: tuple[str, ...] = (source.split,)
    else:
        names = ("test", "train") if source.split == "train" else (source.split, "test")
    files = (folder / source.name / f"{name}{suffix}" for name in names for suffix in SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def read_file(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet or JSON file: an object a line, or one list. Raises SourceError with the line."""
    if file.suffix == ".parquet":
        yield from _read_parquet(file)
        return
    opened = gzip.open(file) if file.suffix == ".gz" else file.open("rb")
    with opened as lines:
        try:
            is_list = lines.read(4096).removeprefix(_BYTE_ORDER_MARK).lstrip()[:1] == b"["
            lines.seek(0)
            found = enumerate([lines.read()] if is_list else lines, start=1)
            for number, line in found:
                if not line.strip():
                    continue
                where = str(file) if is_list else f"{file}, line {number},"
                rows = _parse(line, where)
                for at, row in enumerate(rows if is_list else [rows], start=1):
                    if not isinstance(row, dict):
                        one = f"{file}, entry {at}," if is_list else where
                        raise SourceError(f"{one} is no JSON object, but of type {type(row).__name__}")
                    yield row
        except (gzip.BadGzipFile, EOFError) as e:
            raise SourceError(f"{file} is no whole gzip file: {e}") from e


_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # what some programs begin a text with


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.removeprefix(_BYTE_ORDER_MARK).decode())
    except json.JSONDecodeError as e:
        raise SourceError(
            f"{where} is no JSON: {e.msg}, at character {e.pos} (what is read: {', '.join(SUFFIXES)})"
        ) from e
    except UnicodeDecodeError as e:
        raise SourceError(f"{where} is no text in UTF-8: byte {e.start} is {e.object[e.start]:#x}") from e
    except (ValueError, RecursionError) as e:  # a number of thousands of digits; brackets without end
        raise SourceError(f"{where} cannot be read: {e}") from e


def _read_parquet(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(1000):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as e:
        raise SourceError(f"{file} is no parquet file: {e}") from e


def read_hub_training(source: str) -> Iterator[Mapping[str, Any]]:
    """The split `train` of OWNER/NAME, or of OWNER/NAME:CONFIG where a data set has several configurations."""
    name, _, config = source.partition(":")
    return read_hub(name, "train", config or None)


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
