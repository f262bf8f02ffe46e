"""Where transcripts come from: the task's teacher, the record of a run, a file, or a data set of the hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from recipe.gtpo.data.overlap import Known, key
from recipe.gtpo.data.sources import SUFFIXES, read_file, read_hub_training
from recipe.gtpo.sft.transcripts import Message, NoTranscriptError, check, from_record, question, read, with_system
from recipe.gtpo.tasks.task import Task
from verl_ext.records.reader import FOLDERS, read_run

Say = Callable[[str], None]
RunCode = Callable[[str], str]

TEACHER = "teacher"


def open_source(source: str, task: Task, run_code: RunCode) -> Iterator[Callable[[], list[Message]]]:
    """The transcripts of a source, each as a function that reads it or raises NoTranscriptError with the reason.

    Args:
        source: `teacher`; the folder of a run; a file (`data.sources.SUFFIXES`); else a data set of the hub, with
            `:CONFIG` after its id where it has several.
        run_code: what the tool python says to a program.

    Raises ValueError for a source that there is not.
    """
    path = Path(source)
    if source == TEACHER:
        yield from ((lambda one=one: _taught(task, one, run_code)) for one in task.training_rows())  # type: ignore[misc]
    elif path.is_dir():
        if not any((path / folder).is_dir() for folder in FOLDERS.values()):
            raise ValueError(f"sft.source={source} is a folder without a run's records ({', '.join(FOLDERS.values())})")
        for split in FOLDERS:
            yield from ((lambda one=one: from_record(one)) for one in read_run(path, split))  # type: ignore[misc]
    elif path.is_file():
        yield from ((lambda one=one: read(one)) for one in read_file(path))  # type: ignore[misc]
    elif source.startswith(("/", "./", "../")) or source.endswith(SUFFIXES):
        raise ValueError(f"sft.source={source} is not there")
    else:
        yield from ((lambda one=one: read(one)) for one in read_hub_training(source))  # type: ignore[misc]


def _taught(task: Task, row: Mapping[str, Any], run_code: RunCode) -> list[Message]:
    try:
        return task.demonstrate(row, run_code)
    except ValueError as e:
        raise NoTranscriptError(str(e)) from e


def collect(
    found: Iterable[Callable[[], list[Message]]],
    *,
    count: int | None,
    system: str | None,
    held_out: Known,
    say: Say,
) -> list[list[Message]]:
    """The first `count` transcripts (None: all), one a problem, and none of a held-out problem; says what it left out.

    Args:
        system: for transcripts that have no system message.
        held_out: the problems that a run validates on.

    Raises ValueError where none is left.
    """
    kept: list[list[Message]] = []
    seen: set[str] = set()
    dropped: Counter[str] = Counter()
    for read_one in found:
        if count is not None and len(kept) >= count:
            break
        try:
            messages = with_system(read_one(), system)
            check(messages)
        except NoTranscriptError as e:
            dropped[str(e)] += 1
            continue
        asked = question(messages)
        if known := held_out.find(asked):
            dropped[f"its problem is, {known[0]}, one of the held-out ones"] += 1
        elif key(asked) in seen:
            dropped["another transcript of the same problem"] += 1
        else:
            seen.add(key(asked))
            kept.append(messages)
    reasons = "; ".join(f"{number} left out: {reason}" for reason, number in dropped.most_common())
    say(f"{len(kept)} transcripts" + (f" ({reasons})" if reasons else ""))
    if not kept:
        raise ValueError(f"sft.source has no transcript{f' ({reasons})' if reasons else ''}")
    return kept
