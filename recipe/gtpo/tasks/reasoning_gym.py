"""task=reasoning_gym: problems that the package reasoning-gym generates, scored by its own verifiers. Needs no data.

Problem i of a generator is made of `seed + i`, so that seeds which look different can give the same problems (1 and
1001, with 2000 problems each): ranges that overlap are refused.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import logging
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe.gtpo.run.processes import Processes
from recipe.gtpo.tasks import teacher
from recipe.gtpo.tasks.prepared import MANIFEST, DataSet, Example, PreparedTask, Unusable
from recipe.gtpo.tasks.task import boxed

logger = logging.getLogger(__name__)

REMEDY = "pip install --no-deps -r requirements/reasoning_gym.txt"
#: Their verifiers evaluate the answer as Python: whatever the model writes would run in the trainer's processes.
EVALUATE_ANSWERS = frozenset(
    "binary_matrix countdown intermediate_integration n_queens number_sorting polynomial_multiplication puzzle24 "
    "simple_integration spiral_matrix string_insertion".split()
)
_NEED_PYCOSAT = frozenset({"zebra_puzzles"})
_SECONDS = 10.0  # of one verdict
_ROW_FORM = 2  # 1: metadata without _TUPLE and _PAIRS
_TUPLE, _PAIRS = "__tuple__", "__pairs__"


@dataclass(frozen=True, kw_only=True)
class ReasoningGym(PreparedTask):
    r"""Answers in `\boxed{}`. A verifier that gives partial credit counts only when it gives all of it.

    Args:
        generators: name -> settings of that generator; null: it is left out, which a config cannot say otherwise.
        train_problems, validation_problems: of all generators together, in equal parts.
        train_seed, validation_seed: of the first problem of each generator.
    """

    generators: Mapping[str, Mapping[str, Any] | None] = field(hash=False)
    train_problems: int
    validation_problems: int
    train_seed: int
    validation_seed: int

    training = (DataSet("reasoning_gym", "", "train"),)
    evaluation = (DataSet("reasoning_gym", "", "test"),)
    templated = True
    finds = False

    def __post_init__(self) -> None:
        wanted = {name: settings for name, settings in self.generators.items() if settings is not None}
        object.__setattr__(self, "generators", wanted)
        if not self.generators:
            raise ValueError("task.generators is empty: at least one, such as chain_sum")
        known = _package().factory.DATASETS
        for name in self.generators:
            if name not in known:
                raise ValueError(f"task.generators.{name} is no generator of reasoning-gym; it has {', '.join(known)}")
            if name in EVALUATE_ANSWERS:
                raise ValueError(f"task.generators.{name}: its verifier runs the answer as Python; take another one")
            if name in _NEED_PYCOSAT and importlib.util.find_spec("pycosat") is None:
                raise ValueError(f"task.generators.{name} needs the package pycosat: pip install pycosat")
            self._generator(name, range(1))
        ranges = {key: self._range(key) for key in ("train", "validation")}
        train, validation = ranges["train"], ranges["validation"]
        if min(len(train), len(validation)) < 1:
            raise ValueError("task.train_problems and task.validation_problems: at least one for each generator")
        if train.start < validation.stop and validation.start < train.stop:
            raise ValueError(
                f"task.train_seed={train.start} and task.validation_seed={validation.start} share problems: problem i "
                f"is made of seed + i, so put them at least {max(len(train), len(validation))} apart"
            )

    def _range(self, split: str) -> range:
        """The seeds of the problems of each generator."""
        count = {"train": self.train_problems, "validation": self.validation_problems}[split]
        start = {"train": self.train_seed, "validation": self.validation_seed}[split]
        return range(start, start + count // len(self.generators))

    def _generator(self, name: str, seeds: range) -> Sequence[Mapping[str, Any]]:
        try:
            settings = {**(self.generators[name] or {}), "seed": seeds.start, "size": max(1, len(seeds))}
            return _package().create_dataset(name, **settings)
        except (TypeError, AssertionError) as e:  # how generators refuse a setting
            raise ValueError(f"task.generators.{name}: {e}") from e

    @property
    def settings(self) -> dict[str, Any]:
        """With the form of the rows, so that files in an older form are made again, too."""
        return {**super().settings, "row_form": _ROW_FORM}

    def prepare(self) -> dict[str, Any]:
        file = Path(self.folder) / MANIFEST
        if not file.is_file() or json.loads(file.read_text()).get("settings") != self.settings:
            from recipe.gtpo.data.prepare import prepare  # it imports this package's tasks

            prepare(self, Path(self.folder), say=lambda text: print(f"gtpo: data: {text}", flush=True))
        return super().prepare()

    def rows(self, source: DataSet) -> Iterator[Mapping[str, Any]]:
        """The problems of a split, the generators taking turns."""
        seeds = self._range("train" if source.split == "train" else "validation")
        made = {name: self._generator(name, seeds) for name in self.generators}
        for i in range(len(seeds)):
            for name, problems in made.items():
                yield {"generator": name, **problems[i]}

    def training_rows(self) -> Iterator[Mapping[str, Any]]:
        return self.rows(self.training[0])

    def demonstrate(self, row: Mapping[str, Any], run_code: Callable[[str], str]) -> list[dict[str, str]]:
        example = self.read(row, self.training[0])
        code = teacher.program(row["generator"], row["metadata"])
        said = run_code(code).strip()
        if said != example.answer:
            raise ValueError(f"the teacher's program for {row['generator']} does not print the answer")
        return [*self.messages(example), *teacher.turns(code, said)]

    def read(self, row: Mapping[str, Any], source: DataSet) -> Example:
        if row["generator"] not in self.generators:  # a file's: settings unknown, verifier perhaps refused
            raise Unusable("a generator that is not in task.generators")
        metadata = _to_json(row["metadata"])
        if row["answer"] is None and _from_json(metadata) != row["metadata"]:
            raise Unusable("no answer, and metadata that cannot be written")
        return Example(row["question"], str(row["answer"]), {"generator": row["generator"], "metadata": metadata})

    async def check(self, example: Example) -> None:
        """In this process, where the problem was made: no model wrote the answer.

        Where several answers are right, as of a Rubik's cube, there is none to ask with. Their verifiers read metadata
        alone, which `read` has compared.
        """
        if example.answer == str(None):
            return
        answer = boxed(rf"\boxed{{{example.answer}}}")
        if answer is None or _verify(*self._case(answer, example.answer, example.extra)) != 1.0:
            raise Unusable("its own answer counts as wrong")

    def row(self, example: Example, source: DataSet, index: int) -> dict[str, Any]:
        """Validation metrics are grouped by generator."""
        return super().row(example, source, index) | {"data_source": example.extra["generator"]}

    async def score(
        self, data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        answer = boxed(solution_str)
        if answer is None or extra_info is None:
            return {"acc": 0.0, "pred": ""}
        case = self._case(answer, ground_truth, extra_info)
        try:
            reward = await _processes().call(_verify, *case, seconds=_SECONDS)
        except TimeoutError:
            logger.warning("an answer takes too long to verify and counts as wrong: %.80r", answer)
            reward = 0.0
        return {"acc": float(reward == 1.0), "pred": answer}

    def _case(self, answer: str, gold: str, extra: Mapping[str, Any]) -> tuple[str, ...]:
        """The arguments of `_verify`."""
        name = extra["generator"]
        settings = json.dumps(self.generators.get(name) or {}, sort_keys=True)
        return name, settings, answer, gold, extra["metadata"]


def _to_json(metadata: Any) -> str:
    """Some verifiers compare metadata with what they make of an answer: there a tuple is no list, and 1 no "1"."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return {_TUPLE: [plain(one) for one in value]}
        if isinstance(value, list):
            return [plain(one) for one in value]
        if isinstance(value, Mapping):
            if all(isinstance(key, str) for key in value):
                return {key: plain(one) for key, one in value.items()}
            return {_PAIRS: [[plain(key), plain(one)] for key, one in value.items()]}
        return value

    return json.dumps(plain(metadata), default=str)


def _from_json(text: str) -> Any:
    def made(found: dict[str, Any]) -> Any:
        if found.keys() == {_TUPLE}:
            return tuple(found[_TUPLE])
        return dict(found[_PAIRS]) if found.keys() == {_PAIRS} else found

    return json.loads(text, object_hook=made)


@functools.lru_cache(maxsize=1)
def _processes() -> Processes:
    return Processes(_warm_up, at_most=1)  # a verdict takes less than a millisecond, a process 120 MB


def _warm_up() -> None:
    _package()


@functools.lru_cache(maxsize=1)
def _package() -> types.ModuleType:
    """reasoning_gym, also where one of its dependencies is missing that only `_NEED_PYCOSAT` use.

    pycosat has to be compiled, and not every machine has a compiler; the package imports it in any case.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError(f"the package reasoning-gym is not installed: {REMEDY}")
    missing = importlib.util.find_spec("pycosat") is None
    if missing:
        sys.modules["pycosat"] = types.ModuleType("pycosat")
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as e:
        raise ValueError(f"the package reasoning-gym cannot be imported ({e}): {REMEDY}") from e
    finally:
        if missing:
            del sys.modules["pycosat"]


def _verify(generator: str, settings: str, answer: str, gold: str, metadata: str) -> float:
    """What the generator's verifier gives an answer, 0 for one that it cannot read."""
    verifier, entry = _verifier(generator, settings), {"answer": gold, "metadata": _from_json(metadata)}
    try:
        return float(verifier(answer, entry))
    except Exception:  # verifiers parse answers, each in its own way, and raise in as many
        return 0.0


@functools.cache  # some read a file of their package, which takes up to a second
def _verifier(generator: str, settings: str) -> Callable[[str, Mapping[str, Any]], float]:
    """With the settings that the problems were made with: tolerances and the form of an answer may depend on them."""
    return _package().create_dataset(generator, **json.loads(settings)).score_answer
