r"""What a task brings: data, answer format, score. Examples to copy: `tasks/gsm8k.py`, a task on published problems
(its base is in `prepared.py`), and `tasks/arithmetic/task.py`, whose problems and policy are made here.

A task of your own is two files: a class that extends `Task`, and a file of `config/task` whose `task` section names it.
Every other key of that section is a field of the class:

    task: {_target_: my_task.MyTask, name: my_task, level: 3}

The rest of that file is verl's own keys: limits (`data.max_response_length`, `multi_turn.max_assistant_turns`), the
tool set (`multi_turn.tool_config_path`), batch, steps. The prompt, with its system message, is in the rows that
`prepare` writes.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

Scored = Mapping[str, Any] | float


@dataclass(frozen=True, kw_only=True)
class Task:
    r"""Base of all tasks: nothing to prepare, answers in `\boxed{}`, scored by the config's own reward function."""

    name: str

    finds: ClassVar[bool] = False  # whether `prepare` only looks for files that are there: the doctor asks it, too

    def prepare(self) -> dict[str, Any]:
        """Make or find what a run needs, before anything starts: data, maybe a policy.

        Returns:
            verl key -> value, for the keys that the config leaves open (null). What the user sets stays.

        Raises ValueError, which ends the run with its message.
        """
        return {}

    def prepare_evaluation(self) -> dict[str, Any]:
        """As `prepare`, where a model is given and nothing is trained: `data.val_files`, limits."""
        return self.prepare()

    def extract_answer(self, text: str) -> str | None:
        """The final answer that an assistant turn states, or None. A last turn without one breaks the format."""
        return boxed(text)

    async def same(self, one: str, other: str) -> bool:
        """Whether two answers (`pred`, as `score` gives it) are votes for the same: maj@k of an evaluation."""
        return one.strip() == other.strip()

    def score(
        self, data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None
    ) -> Scored | Awaitable[Scored]:
        """The outcome of a trajectory, 0 or 1, or a mapping with `acc` and `pred` (the answer as a string, for maj@k).

        A method that takes longer than a millisecond is `async` and leaves the work to others (`run/processes.py`,
        the tool server): all trajectories of a worker wait while it works.

        Args:
            solution_str: text of the *final assistant turn*, never what a tool printed.
            data_source, ground_truth, extra_info: the row's, as verl hands them to a reward function.

        `reward.custom_reward_function`, where the config sets one, is asked instead.
        """
        raise NotImplementedError

    def training_rows(self) -> Iterable[Mapping[str, Any]]:
        """The problems that `demonstrate` can be asked about. Raises ValueError for a task without a teacher."""
        raise ValueError(
            f"sft.source=teacher: task={self.name} has no teacher; give transcripts (a file, a hub id, a run)"
        )

    def demonstrate(self, row: Mapping[str, Any], run_code: Callable[[str], str]) -> list[dict[str, str]]:
        """A transcript that solves a problem, as chat messages (`sft/transcripts.py`).

        Args:
            row: one of `training_rows`.
            run_code: what the tool python says to a program.

        Raises ValueError, with the reason, for a problem that the teacher does not solve.
        """
        raise NotImplementedError

    @property
    def scores(self) -> bool:
        """Whether the class brings a score of its own."""
        return type(self).score is not Task.score


@dataclass(frozen=True, kw_only=True)
class OwnData(Task):
    r"""task=verl_data: your parquet files and your reward function (`reward.custom_reward_function`).

    Args:
        answer: how a final answer looks: `boxed` for `\boxed{...}`, `any` for any text, else a regular expression with
            one group, whose last match counts, such as `#### (.+)`. It decides the format verdict of the last turn.
    """

    answer: str = "boxed"

    def __post_init__(self) -> None:
        if self.answer in ("boxed", "any"):
            return
        try:
            groups = re.compile(self.answer).groups
        except re.error as e:
            raise ValueError(f"task.answer={self.answer!r} is no regular expression ({e}); or use boxed, or any") from e
        if groups != 1:
            raise ValueError(f"task.answer={self.answer!r} needs one group, the answer; it has {groups}")

    def extract_answer(self, text: str) -> str | None:
        if self.answer == "boxed":
            return boxed(text)
        if self.answer == "any":
            return text.strip() or None
        found = re.findall(self.answer, text)
        return found[-1].strip() if found else None


#: Of LaTeX, what decides where a box begins and ends: not an escaped brace, \{ or \}, but one after \\, a line break.
_MARKS = re.compile(
    r"(?P<box>\\{1,2}boxed\s*\{)|\\{1,2}boxed(?:\s*(?=\d)|\s+)(?P<alone>[A-Za-z\d])(?![^\s\w]*\w)"
    r"|\\.|(?P<open>\{)|(?P<close>\})",
    re.DOTALL,
)


def boxed(text: str) -> str | None:
    r"""The content of the last balanced `\boxed{...}` in `text`, or None. Nested braces are kept. One pass.

    `\boxed 7` is a box, too, where a digit or letter stands alone: of `\boxed 72`, LaTeX would box the 7.
    """
    starts: list[int | None] = []  # of the open braces: where the content begins, None for a plain brace
    answer: tuple[int, int] | None = None
    for mark in _MARKS.finditer(text):
        if mark["alone"]:
            answer = mark.span("alone")
        elif mark["box"] or mark["open"]:
            starts.append(mark.end() if mark["box"] else None)
        elif mark["close"] and starts and (start := starts.pop()) is not None and (answer is None or start > answer[0]):
            answer = (start, mark.start())
    return None if answer is None else text[answer[0] : answer[1]].strip()


def make_row(
    data_source: str, index: int, messages: str | Sequence[Mapping[str, str]], ground_truth: str, **extra_info: Any
) -> dict[str, Any]:
    """One row in the columns that verl's RLHFDataset and our agent loop read.

    Args:
        data_source: name of the data, by which verl groups validation metrics.
        index: unique in a file.
        messages: the prompt as chat messages, or the text of a single user message.
        ground_truth: what `Task.score` compares an answer with.
        extra_info: whatever else is to go with the row.
    """
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages),
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"index": index, **extra_info},
    }


def write_parquet(rows: Sequence[Mapping[str, Any]], path: str | Path) -> str:
    """Write rows as a parquet file, whole or not at all, in a folder that is made if need be; the absolute path."""
    import pyarrow  # only who writes files pays for the import
    import pyarrow.parquet

    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), partial)
    os.replace(partial, path)
    return str(path)


def load_task(config: DictConfig) -> Task:
    """The task that the config's `task` section names; `OwnData` where a recipe of somebody else's has no such section.

    Raises hydra's InstantiationException, whose cause says what is wrong with the section.
    """
    section = OmegaConf.select(config, "task")
    if section is None:
        return OwnData(name="own data")
    return _make(json.dumps(OmegaConf.to_container(section, resolve=True), sort_keys=True))


@functools.lru_cache(maxsize=8)  # an agent loop is made for every trajectory
def _make(section: str) -> Task:
    return instantiate(json.loads(section), _convert_="all")
