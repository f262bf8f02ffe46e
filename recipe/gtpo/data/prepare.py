"""From published rows to the files of a run: what `python -m recipe.gtpo.data prepare` does.

The folder has `train.parquet`, one file for each evaluation set, `dropped.parquet` (every row that was left out, with
its line and the reason) and `manifest.json`. It appears by one rename, whole or not at all.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from recipe.gtpo.data.overlap import Known, key
from recipe.gtpo.data.sources import SUFFIXES, SourceError, local_file, read_file, read_hub, read_hub_training
from recipe.gtpo.tasks.prepared import MANIFEST, TRAIN_FILE, DataSet, Example, PreparedTask, Unusable
from recipe.gtpo.tasks.unit_tests import close_client

Say = Callable[[str], None]

DROPPED_FILE = "dropped.parquet"
_AT_ONCE = 256  # rows that are checked side by side
_LINES_SHOWN = 8


@dataclass
class Counts:
    """What became of the rows of one set."""

    read: int = 0
    kept: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)  # reason -> the first lines that have it
    totals: dict[str, int] = field(default_factory=dict)  # reason -> how many
    doubtful: dict[str, list[int]] = field(default_factory=dict)  # reason -> lines that are kept all the same

    def drop(self, reason: str, line: int) -> None:
        self.totals[reason] = self.totals.get(reason, 0) + 1
        lines = self.dropped.setdefault(reason, [])
        if len(lines) <= _LINES_SHOWN:
            lines.append(line)


def prepare(
    task: PreparedTask,
    out: Path,
    *,
    source: str | None = None,
    local: Path | None = None,
    evaluation: Sequence[str] | None = None,
    say: Say = lambda text: None,
    progress: bool = False,
) -> None:
    """Write the task's files into the folder `out`, which appears whole or not at all.

    Args:
        source: training problems from elsewhere: a file, or a data set of the hub (its split `train`), with
            `:CONFIG` after its id where it has several.
        local: a folder with copies of the sets (`sources.local_file`); what is not there is left out, and said.
        evaluation: names of evaluation sets; None: all of the task's.

    Raises SourceError or ValueError where rows cannot be had, or where `out` is something else.
    """
    names = [one.name for one in task.evaluation]
    if unknown := set(evaluation or ()) - set(names):
        raise ValueError(f"evaluation={min(unknown)}: task={task.name} has {', '.join(names)}")
    if out.exists() and not (out / MANIFEST).is_file():
        raise ValueError(f"out={out} exists and was not made by this command: give another folder, or remove it")
    tests = [one for one in task.evaluation if evaluation is None or one.name in evaluation]
    with _whole_or_nothing(out) as folder:
        asyncio.run(_prepare(task, folder, tests, source, local, say, progress))
    say(f"written: {out}")


def prepare_evaluation(
    task: PreparedTask,
    name: str,
    file: Path,
    *,
    local: Path | None = None,
    say: Say = lambda text: None,
    progress: bool = False,
) -> None:
    """Write one evaluation set of the task, without any training problems, as the parquet file `file`: whole or not.

    Args:
        local: as for `prepare`.

    Raises SourceError or ValueError where rows cannot be had.
    """
    source = next(one for one in task.evaluation if one.name == name)
    found = _rows(task, source, local, training=False)
    if found is None:
        raise SourceError(f"local={local} has no {name}/{source.split}.jsonl (or test.jsonl, or .json, .parquet)")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".evaluation.", dir=file.parent) as folder:
        made = Path(folder) / file.name
        counts = asyncio.run(_write_evaluation(task, source, found, made, progress))
        say_counts(name, found[0], counts, source.sizes, say)
        if not counts.kept:
            raise ValueError(f"no problem of {name} is left of {counts.read} rows")
        os.replace(made, file)


async def _write_evaluation(task: PreparedTask, source: DataSet, found: Found, file: Path, progress: bool) -> Counts:
    try:
        with _Table(file) as table, _Table(file.with_name(DROPPED_FILE)) as dropped:
            return await _write(task, [(source, found)], None, None, table, dropped, progress)
    finally:
        await close_client()


async def _prepare(
    task: PreparedTask,
    folder: Path,
    tests: Sequence[DataSet],
    source: str | None,
    local: Path | None,
    say: Say,
    progress: bool,
) -> None:
    trains = _training(task, source, local)  # before anything is read: what cannot be had is said at once
    known = Known(partial=not task.templated)
    manifest: dict[str, Any] = {"task": task.name, "settings": task.settings, "evaluation": {}}
    try:
        with _Table(folder / DROPPED_FILE) as dropped:
            for test in tests:
                found = _rows(task, test, local, training=False)
                if found is None:
                    say(f"{test.name}: not in {local}, left out")
                    continue
                with _Table(folder / f"{test.name}.parquet") as table:
                    counts = await _write(task, [(test, found)], None, known, table, dropped, progress)
                say_counts(test.name, found[0], counts, test.sizes, say)
                if counts.kept:
                    manifest["evaluation"][test.name] = {"rows": counts.kept, "samples": test.samples}
            with _Table(folder / TRAIN_FILE) as table:
                counts = await _write(task, trains, known, None, table, dropped, progress)
            where = " and ".join(one for _, (one, _) in trains)
            sizes = trains[0][0].sizes if len(trains) == 1 else {}
            if source is not None and counts.read not in sizes:  # of any size
                sizes = {}
            say_counts("training problems", where, counts, sizes, say)
            manifest["train"] = {"rows": counts.kept}
    finally:
        await close_client()
    if not counts.kept:
        raise ValueError(f"no training problem is left of {counts.read} rows: nothing is written")
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


Found = tuple[str, Iterable[Mapping[str, Any]]]  # where rows are from, and the rows


def _rows(task: PreparedTask, source: DataSet, local: Path | None, *, training: bool) -> Found | None:
    """The rows of one of the task's sets; None where `local` has no copy."""
    made = task.rows(source)
    if made is not None:
        return "generated", made
    if local is None:
        return source.hub, read_hub(source.hub, source.split, source.config)
    file = local_file(local, source, training=training)
    return None if file is None else (str(file), read_file(file))


def _training(task: PreparedTask, source: str | None, local: Path | None) -> list[tuple[DataSet, Found]]:
    first = task.training[0]
    if source is not None:
        if Path(source).is_file():
            return [(first, (source, read_file(Path(source))))]
        if Path(source).exists() or source.count("/") != 1 or source.endswith(SUFFIXES):
            raise SourceError(f"source={source} is no file ({', '.join(SUFFIXES)}) and no hub id (OWNER/NAME)")
        return [(first, (source, read_hub_training(source)))]
    found = [(train, _rows(task, train, local, training=True)) for train in task.training]
    there = [(train, rows) for train, rows in found if rows is not None]
    if not there:
        raise SourceError(f"local={local} has no {first.name}/{first.split}.jsonl to train on: give source=FILE, or it")
    return there


async def _write(
    task: PreparedTask,
    sources: Sequence[tuple[DataSet, Found]],
    avoid: Known | None,
    remember: Known | None,
    table: _Table,
    dropped: _Table,
    progress: bool,
) -> Counts:
    """Write the usable rows of these sets, each problem once.

    Args:
        avoid: evaluation problems, which no training problem may be.
        remember: where the problems of an evaluation set are noted.
    """
    counts, seen = Counts(), dict[str, str]()
    for source, (where, rows) in sources:
        lines = enumerate(tqdm(rows, desc=source.name, unit="row", disable=not progress), start=1)
        for batch in _batches(lines, _AT_ONCE):
            counts.read += len(batch)
            verdicts = [_read(task, source, row, seen, avoid) for _, row in batch]
            doubts = await asyncio.gather(*(_doubt(task, verdict) for verdict in verdicts))
            kept = []
            for (line, _), verdict, doubt in zip(batch, verdicts, doubts, strict=True):
                if isinstance(verdict, str) or (doubt and avoid is not None):
                    reason = verdict if isinstance(verdict, str) else doubt
                    counts.drop(reason, line)
                    dropped.write([{"set": source.name, "from": where, "line": line, "reason": reason}])
                    continue
                if doubt:  # an evaluation set stays whole, to be comparable with what others report of it
                    counts.doubtful.setdefault(doubt, []).append(line)
                kept.append(task.row(verdict, source, counts.kept))
                counts.kept += 1
                if remember is not None:
                    remember.add(verdict.statement or verdict.problem, source.name)
            table.write(kept)
    return counts


def _read(
    task: PreparedTask, source: DataSet, row: Mapping[str, Any], seen: dict[str, str], avoid: Known | None
) -> Example | str:
    """The problem, or the reason why it is left out, as far as no other process has to be asked."""
    try:
        example = task.read(row, source)
    except Unusable as e:
        return str(e)
    except KeyError as e:
        return f"no column {e}"
    except (AttributeError, IndexError, TypeError, ValueError) as e:
        return f"not as the columns of its form are ({type(e).__name__})"
    statement = example.statement or example.problem
    same = key(statement)
    if same in seen:
        return "the same problem as an earlier line" + ("" if seen[same] == example.answer else ", with another answer")
    seen[same] = example.answer
    if avoid is not None and (found := avoid.find(statement)) is not None:
        how, name = found
        return f"a problem of {name}" if how == "exactly" else f"half of the text of a problem of {name}"
    return example


async def _doubt(task: PreparedTask, verdict: Example | str) -> str:
    """Why a right answer to a problem could not be found right; "" where it could, or where there is no problem."""
    if not isinstance(verdict, str):
        try:
            await task.check(verdict)
        except Unusable as e:
            return str(e)
    return ""


def _batches(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, size)):
        yield batch


def say_counts(name: str, where: str, counts: Counts, sizes: Mapping[int, str], say: Say) -> None:
    """What was read, kept and left out, and whether the number of rows is one that is known."""
    known = f" ({sizes[counts.read]})" if counts.read in sizes else ""
    say(f"{name}: {counts.read} rows of {where}{known}, {counts.kept} kept")
    if sizes and not known:
        forms = "; ".join(f"{rows}: {what}" for rows, what in sizes.items())
        say(f"  note: not a number of rows that is known of it ({forms})")
    for reason, total in sorted(counts.totals.items(), key=lambda item: -item[1]):
        say(f"  {total} left out, {reason}: {_lines(counts.dropped[reason])}")
    for reason, lines in counts.doubtful.items():
        say(f"  {len(lines)} kept all the same, {reason}: {_lines(lines)}")


def _lines(lines: Sequence[int]) -> str:
    more = ", ..." if len(lines) > _LINES_SHOWN else ""
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(map(str, lines[:_LINES_SHOWN]))}{more}"


# -- files ------------------------------------------------------------------------------------------------------------


class _Table:
    """A parquet file that grows; none where no row is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pyarrow.parquet.ParquetWriter | None = None
        self._rows: list[Mapping[str, Any]] = []

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows += rows
        if len(self._rows) >= 1000:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        table = pyarrow.Table.from_pylist(self._rows, schema=self._writer.schema if self._writer else None)
        if self._writer is None:
            self._writer = pyarrow.parquet.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)
        self._rows = []


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end, or goes."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield partial
        os.chmod(partial, 0o755)  # mkdtemp makes it private
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            os.replace(out, old)  # onto an empty folder
            os.replace(partial, out)
            shutil.rmtree(old)
        else:
            os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
