"""What checking an answer to a maths problem costs: checks a second.

    python benchmarks/answers.py ../shared/data/math500/test.jsonl [more files]

The gold answers of the files (any form that task=math reads) are compared with answers as a model would write them:
half of them right (in other words: `\\dfrac` for `\\frac`, no space after a comma), half wrong (another digit).
First each answer once, then as the rollouts of a group, which often agree; with as many checks in flight as a worker
has trajectories, after the processes have started. On a busy machine the seconds say little; the CPU seconds say what
the checks cost.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from recipe.gtpo.data.__main__ import make_task
from recipe.gtpo.data.sources import read_file
from recipe.gtpo.tasks import equality
from recipe.gtpo.tasks.equality import same_answer, settle
from recipe.gtpo.tasks.prepared import DataSet, PreparedTask

IN_FLIGHT = 128


def golds(files: list[Path]) -> list[str]:
    task = make_task("math")
    assert isinstance(task, PreparedTask)
    return [task.read(row, DataSet(file.parent.name, "", "test")).answer for file in files for row in read_file(file)]


def answers_once(golds: list[str]) -> Iterator[tuple[str, str]]:
    """Each gold answer in other words, and a wrong answer of the same kind."""
    for gold in golds:
        yield gold, other_words(gold)
        yield gold, wrong(gold, 1)


def groups(golds: list[str]) -> Iterator[tuple[str, str]]:
    """The eight rollouts of each problem: four agree on the right answer, four are wrong, each in its own way."""
    for gold in golds:
        for i in range(1, 5):
            yield gold, other_words(gold)
            yield gold, wrong(gold, i)


def other_words(gold: str) -> str:
    return gold.replace(r"\frac", r"\dfrac").replace(", ", ",") + "."


def wrong(gold: str, by: int) -> str:
    """Another first digit; where there is none, something more."""
    changed = re.sub(r"\d", lambda digit: str((int(digit[0]) + by) % 10), gold, count=1)
    return changed if changed != gold else f"{gold}+{by}"


async def check_all(asked: list[tuple[str, str]]) -> tuple[float, int]:
    """The seconds that it takes to check each pair once, and how many are the same."""
    left = iter(asked)
    same = 0

    async def ask() -> None:
        nonlocal same
        for pair in left:
            verdict = await same_answer(*pair)
            same += verdict
            await asyncio.sleep(0)  # what is settled at once never waits

    began = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(IN_FLIGHT)))
    return time.perf_counter() - began, same


def cpu_seconds() -> float:
    """Of this process and of those that compare, as the kernel has counted it so far."""
    spent = time.process_time()
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        spent += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return spent


async def measure(golds: list[str]) -> None:
    print(f"{len(golds)} gold answers, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")
    print("| answers | checks | need algebra | the same | seconds | checks/s | CPU seconds | checks/s of one CPU |")
    print("|---|---|---|---|---|---|---|---|")
    for name, make in (("each once", answers_once), ("groups of 8", groups)):
        equality.forget()  # what the measurement before this one asked
        await asyncio.gather(*(same_answer(r"\frac{x}{2}", rf"\frac{{x}}{{{i}}}") for i in range(3, 11)))  # they start
        asked = list(make(golds))
        algebra = sum(settle(*pair) is None for pair in asked)
        before = cpu_seconds()
        took, same = await check_all(asked)
        cpu = cpu_seconds() - before
        rates = f"{took:.1f} | {len(asked) / took:.0f} | {cpu:.1f} | {len(asked) / cpu:.0f}"
        print(f"| {name} | {len(asked)} | {algebra} | {same} | {rates} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="published sets, .jsonl, .json or .parquet")
    asyncio.run(measure(golds(parser.parse_args().files)))


if __name__ == "__main__":
    main()
