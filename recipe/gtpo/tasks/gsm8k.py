"""task=gsm8k: grade-school word problems (Cobbe et al. 2021, arXiv 2110.14168), answers are whole numbers. The shortest
example of a task on published problems.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipe.gtpo.tasks.equality import same_answer
from recipe.gtpo.tasks.prepared import DataSet, Example, PreparedTask, Unusable, text
from recipe.gtpo.tasks.task import boxed

SIZES = {7473: "the training problems", 1319: "the test problems"}


@dataclass(frozen=True, kw_only=True)
class GSM8K(PreparedTask):
    r"""Answers in `\boxed{}`, compared as numbers."""

    training = (DataSet("gsm8k", "openai/gsm8k", "train", config="main", sizes=SIZES),)
    evaluation = (DataSet("gsm8k", "openai/gsm8k", "test", config="main", samples=4, sizes=SIZES),)

    def read(self, row: Mapping[str, Any], source: DataSet) -> Example:
        _, marks, answer = text(row["answer"]).rpartition("####")
        if not marks or not answer.strip():
            raise Unusable("no answer after ####")
        question = text(row["question"])
        if not question:
            raise Unusable("no question")
        return Example(question, answer.strip().replace(",", ""))

    async def score(
        self, data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        answer = boxed(solution_str) or ""
        return {"acc": float(await same_answer(ground_truth, answer)), "pred": answer}

    async def same(self, one: str, other: str) -> bool:
        return await same_answer(one, other)
