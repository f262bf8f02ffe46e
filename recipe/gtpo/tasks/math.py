r"""task=math: competition mathematics. Trains on DAPO-Math-17k (or DeepScaleR: `source=`), evaluates on seven sets.

The sets are published in many forms; `FORMS` tells a form by its columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from recipe.gtpo.tasks.equality import is_checkable, same_answer
from recipe.gtpo.tasks.prepared import DataSet, Example, PreparedTask, Unusable, text
from recipe.gtpo.tasks.task import boxed

Row = Mapping[str, Any]

#: What DAPO-Math-17k and verl's AIME 2024 put around every problem.
_FRAME = re.compile(
    r"\s*Solve the following math problem step by step\..*?is the answer to the problem\.\s*(.*?)"
    r"\s*Remember to put your answer on its own line after \"Answer:\"\.\s*",
    re.DOTALL,
)


def _in_verls_columns(row: Row) -> tuple[Any, Any]:
    problem = row["prompt"][-1]["content"]
    framed = _FRAME.fullmatch(problem)
    return framed[1] if framed else problem, row["reward_model"]["ground_truth"]


def _olympiad(row: Row) -> tuple[Any, Any]:
    given = row["final_answer"] or []
    answers = [given] if isinstance(given, str) else given
    return row["question"], ", ".join(text(answer).replace("$", "") for answer in answers)


def _mawps(row: Row) -> tuple[Any, Any]:
    if len(row["lSolutions"] or ()) != 1:
        raise Unusable("not one answer")
    return row["sQuestion"], row["lSolutions"][0]


def _after_the_solution(row: Row) -> tuple[Any, Any]:
    """GSM8K's answers stand at the end of a solution."""
    return row["question"], text(row["answer"]).rpartition("####")[2]


#: The columns by which a form is known, whose they are, and how problem and answer are read. The first that fits.
FORMS: tuple[tuple[set[str], str, Callable[[Row], tuple[Any, Any]]], ...] = (
    ({"prompt", "reward_model"}, "DAPO-Math-17k; AIME 2024 of the same authors", _in_verls_columns),
    ({"prompt", "solution"}, "DAPO-Math-17k-Processed", lambda row: (row["prompt"], row["solution"])),
    ({"Body", "Question", "Answer"}, "SVAMP", lambda row: (f"{row['Body']} {row['Question']}", row["Answer"])),
    ({"question", "final_answer"}, "OlympiadBench", _olympiad),
    ({"input", "target"}, "MAWPS", lambda row: (row["input"], row["target"])),
    ({"sQuestion", "lSolutions"}, "MAWPS, its authors' own files", _mawps),
    ({"question", "result"}, "Calc-MAWPS", lambda row: (row["question"], row["result"])),
    (
        {"problem", "answer"},
        "MATH-500, AIME 2024 (HuggingFaceH4), AIME 2025 (math-ai), AMC 2023 (AI-MO), DeepScaleR",
        lambda row: (row["problem"], row["answer"]),
    ),
    ({"Problem", "Answer"}, "AIME 2024 (Maxwell-Jia)", lambda row: (row["Problem"], row["Answer"])),
    ({"problem", "solution"}, "AIME 2024 (math-ai)", lambda row: (row["problem"], boxed(row["solution"] or ""))),
    (
        {"question", "answer"},
        "AMC 2023 (math-ai), AIME 2025 (opencompass), GSM8K",
        _after_the_solution,
    ),
)


@dataclass(frozen=True, kw_only=True)
class CompetitionMath(PreparedTask):
    r"""Answers in `\boxed{}`, compared by `equality.same_answer`."""

    training = (
        DataSet(
            "dapo_math_17k",
            "BytedTsinghua-SIA/DAPO-Math-17k",
            "train",
            sizes={1_791_700: "DAPO-Math-17k, each problem about a hundred times", 40_315: "DeepScaleR"},
        ),
    )
    evaluation = (
        DataSet(
            "aime24",
            "HuggingFaceH4/aime_2024",
            "train",
            samples=32,
            sizes={30: "AIME I and II of 2024", 960: "each of the 30 problems 32 times"},
        ),
        DataSet(
            "aime25",
            "math-ai/aime25",
            "test",
            samples=32,
            sizes={30: "AIME I and II of 2025", 15: "one of the two contests of 2025"},
        ),
        DataSet(
            "amc23",
            "math-ai/amc23",
            "test",
            samples=32,
            sizes={40: "those of 2023 with a whole number as answer", 83: "2022 and 2023"},
        ),
        DataSet("math500", "HuggingFaceH4/MATH-500", "test", samples=4, sizes={500: "MATH-500"}),
        DataSet(
            "olympiadbench",
            "Hothan/OlympiadBench",
            "train",
            config="OE_TO_maths_en_COMP",
            samples=4,
            sizes={674: "open-ended, text only, English, competitions", 675: "the same and one problem more"},
        ),
        DataSet("svamp", "ChilleD/SVAMP", "test", sizes={300: "the test problems", 1000: "all problems"}),
        DataSet("mawps", "MU-NLPC/Calc-mawps", "test", sizes={520: "the test problems", 2065: "four of its parts"}),
    )

    def read(self, row: Row, source: DataSet) -> Example:
        form = next((read for columns, _, read in FORMS if columns <= row.keys()), None)
        if form is None:
            raise Unusable(f"columns of no known form: {', '.join(sorted(row))}")
        problem, answer = (text(value) for value in form(row))
        if source.name == "amc23" and re.search("2022_AMC", text(row.get("url"))):
            raise Unusable("a problem of 2022")
        if not problem:
            raise Unusable("no problem")
        if not answer:
            raise Unusable("no answer")
        return Example(problem, answer)

    async def check(self, example: Example) -> None:
        if not await is_checkable(example.answer):
            raise Unusable("its answer cannot be checked")

    async def score(
        self, data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        answer = boxed(solution_str) or ""
        return {"acc": float(await same_answer(ground_truth, answer)), "pred": answer}

    async def same(self, one: str, other: str) -> bool:
        return await same_answer(one, other)
