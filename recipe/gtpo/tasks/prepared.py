r"""A task on published problems: `python -m recipe.gtpo.data prepare task=NAME` writes its files, a run reads them.

A task of this kind says which sets there are (`training`, `evaluation`), how a row of any published form of them is
read (`read`), and how an answer is scored. `gsm8k.py` is the shortest one. What is the same for all is in
`recipe/gtpo/data`: finding the rows, leaving out duplicates and problems of an evaluation set, writing the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from recipe.gtpo.tasks.task import Task, make_row

MANIFEST = "manifest.json"
TRAIN_FILE = "train.parquet"


@dataclass(frozen=True)
class DataSet:
    """A published set of problems.

    Args:
        name: the `data_source` of its rows, by which validation metrics are grouped.
        hub: its id on the Hugging Face hub; other forms of the same problems have others.
        split, config: as `datasets.load_dataset` takes them.
        samples: attempts a problem that an evaluation should average over: few problems need many.
        sizes: how many rows the published forms have, and what is in them.
    """

    name: str
    hub: str
    split: str
    config: str | None = None
    samples: int = 1
    sizes: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """One problem, whatever form it was published in."""

    problem: str
    answer: str  # the row's ground truth
    extra: Mapping[str, Any] = field(default_factory=dict)  # goes to `extra_info`
    statement: str = ""  # what problems are compared by, where `problem` has words of ours that all problems have
    reference: str = ""  # a solution, for `check`; not written anywhere


class Unusable(ValueError):
    """A row that cannot be a problem of the task: its message is the reason, the same for all rows that have it."""


@dataclass(frozen=True, kw_only=True)
class PreparedTask(Task):
    """Base of the tasks on published problems.

    Args:
        folder: what `prepare` of `recipe.gtpo.data` wrote.
        system: the system message of every prompt; written into the files.
        validation: the evaluation sets that a run validates on; None takes all that are in the folder.
    """

    folder: str
    system: str
    validation: Sequence[str] | None = field(default=None, hash=False)

    finds = True
    training: ClassVar[tuple[DataSet, ...]]
    evaluation: ClassVar[tuple[DataSet, ...]]
    templated: ClassVar[bool] = False  # problems share their words by design: only equal ones are the same

    def rows(self, source: DataSet) -> Iterable[Mapping[str, Any]] | None:
        """The rows of a set that the task makes itself; None for a published one."""
        return None

    def read(self, row: Mapping[str, Any], source: DataSet) -> Example:
        """A row of any published form. Raises Unusable with the reason."""
        raise NotImplementedError

    async def check(self, example: Example) -> None:
        """Raise Unusable where not even the right answer could be found right."""

    def messages(self, example: Example) -> list[dict[str, str]]:
        """The prompt."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": example.problem}]

    def row(self, example: Example, source: DataSet, index: int) -> dict[str, Any]:
        """A row of the written file."""
        return make_row(source.name, index, self.messages(example), example.answer, **example.extra)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what is in the folder, as JSON has it."""
        others = {"folder", "validation"}
        return json.loads(
            json.dumps({one.name: getattr(self, one.name) for one in fields(self) if one.name not in others})
        )

    def prepare(self) -> dict[str, Any]:
        remedy = f"make them first: python -m recipe.gtpo.data prepare task={self.name} out={self.folder}"
        folder = Path(self.folder).resolve()
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"task.folder={self.folder} has no prepared data; {remedy}")
        sets = json.loads((folder / MANIFEST).read_text())
        if sets["task"] != self.name:
            raise ValueError(f"task.folder={self.folder} holds data of task={sets['task']}; {remedy}")
        for key, value in self.settings.items():
            if sets["settings"].get(key) != value:
                raise ValueError(f"task.{key} is not what {self.folder} was made with; {remedy} task.{key}=...")
        wanted = list(self.validation) if self.validation is not None else list(sets["evaluation"])
        for name in wanted:
            if name not in sets["evaluation"]:
                known = ", ".join(sets["evaluation"]) or "none"
                raise ValueError(f"task.validation: {name!r} is not in {self.folder}, which has {known}; {remedy}")
        if not wanted:
            raise ValueError(f"task.folder={self.folder} has no evaluation set to validate on; {remedy}")
        return {
            "data.train_files": str(folder / TRAIN_FILE),
            "data.val_files": [str(folder / f"{name}.parquet") for name in wanted],
        }


def text(value: Any) -> str:
    """A number or a text of a published row as the text that a solver would write; "" where there is none.

    Raises Unusable for anything else.
    """
    if not isinstance(value, str | int | float | None):
        raise Unusable(f"a {type(value).__name__} where a text or a number should be")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None or value != value else re.sub(r"^(-?\d+)\.0+$", r"\1", str(value).strip())
