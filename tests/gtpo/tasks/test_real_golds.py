"""Every gold answer of the real sets is found right when it is given as the answer: the shares in docs/tasks.md."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from recipe.gtpo.data.__main__ import make_task
from recipe.gtpo.data.sources import read_file
from recipe.gtpo.tasks.equality import is_checkable, same_answer
from recipe.gtpo.tasks.prepared import DataSet

SHARED = Path(__file__).parents[4] / "shared" / "data"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data, real data sets, is not beside this repository"),
]

#: File -> rows, and how many of their answers are no LaTeX, so that only the same text is right.
SETS = {
    "gsm8k/train": (7473, 0),
    "gsm8k/test": (1319, 0),
    "math500/test": (500, 0),
    "aime24/test": (30, 0),
    "aime25/test": (30, 0),
    "amc23/test": (40, 0),
    "mawps/test": (2065, 0),
    "olympiadbench/test": (675, 3),
}


@pytest.mark.parametrize("name", SETS)
def test_the_gold_answers_are_found_right(name):
    task = make_task("math")
    golds = [task.read(row, DataSet(name, "", "")).answer for row in read_file(SHARED / f"{name}.jsonl")]

    async def ask():
        same = await asyncio.gather(*(same_answer(gold, gold) for gold in golds))
        return all(same), await asyncio.gather(*map(is_checkable, golds))

    same, checkable = asyncio.run(ask())
    assert same and (len(golds), checkable.count(False)) == SETS[name]
