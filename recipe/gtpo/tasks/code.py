"""task=code: write a Python function. Trains on MBPP (Austin et al. 2021), evaluates on HumanEval (Chen et al. 2021)
and MBPP's test problems; scored by unit tests on the tool server (`unit_tests.py`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipe.gtpo.tasks.prepared import DataSet, Example, PreparedTask, Unusable
from recipe.gtpo.tasks.unit_tests import NoCalls, UnitTests, run_tests

#: A line that opens or closes a block, with its language: not ```code``` in a line of prose.
_FENCE = re.compile(r"^[ \t]*```+[ \t]*([^\s`]*)[^\n`]*$", re.MULTILINE)
_PYTHON = frozenset({"", "python", "py", "python3"})


@dataclass(frozen=True, kw_only=True)
class Programs(PreparedTask):
    """The answer is the last fenced block of Python in the last turn."""

    training = (
        DataSet("mbpp", "google-research-datasets/mbpp", "train", config="full", sizes={374: "the training problems"}),
    )
    evaluation = (
        DataSet("humaneval", "openai/openai_humaneval", "test", samples=4, sizes={164: "HumanEval"}),
        DataSet(
            "mbpp",
            "google-research-datasets/mbpp",
            "test",
            config="full",
            samples=4,
            sizes={500: "the test problems", 257: "the test problems of the sanitized config"},
        ),
    )

    def extract_answer(self, text: str) -> str | None:
        program = opened = None
        for fence in _FENCE.finditer(text):
            if opened is not None and opened[1].lower() in _PYTHON:
                program = text[opened.end() + 1 : fence.start()]
            # a language opens a block also where the one before was never closed
            opened = fence if opened is None or fence[1] else None
        return program

    def read(self, row: Mapping[str, Any], source: DataSet) -> Example:
        if "entry_point" in row:  # HumanEval
            name, prompt = row["entry_point"], row["prompt"]
            tests = UnitTests(name, prompt, f"{row['test']}\ncheck({name})")
            return Example(
                f"Complete this function; give the whole of it.\n\n```python\n{prompt.strip()}\n```",
                tests.to_json(),
                statement=prompt,
                reference=prompt + row["canonical_solution"],
            )
        asserts = [*(row["test_list"] or []), *(row.get("challenge_test_list") or [])]
        name = function_under_test(row["code"], asserts)
        setup = "\n".join([*(row.get("test_imports") or []), row.get("test_setup_code") or ""])
        task = (row.get("text") or row.get("prompt") or "").strip()  # the sanitized config's name is `prompt`
        return Example(
            f"{task}\nThe function's name is `{name}`. For example: `{row['test_list'][0].strip()}`",
            UnitTests(name, setup, "\n".join(asserts)).to_json(),
            statement=task,
            reference=row["code"],
        )

    async def check(self, example: Example) -> None:
        try:
            verdict = await run_tests(example.reference, UnitTests.from_json(example.answer))
        except NoCalls as e:
            raise Unusable("its tests do not run") from e
        if not verdict.passed:
            raise Unusable("its own solution does not pass its tests")

    async def score(
        self, data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        program = self.extract_answer(solution_str)
        if program is None:
            return {"acc": 0.0, "pred": ""}
        verdict = await run_tests(program, UnitTests.from_json(ground_truth))
        return {"acc": float(verdict.passed), "pred": program}


def function_under_test(code: str, asserts: Sequence[str]) -> str:
    """The function of `code` that the assertions call. Raises Unusable."""
    try:
        defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
        calls = [node.func for text in asserts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    except SyntaxError as e:
        raise Unusable("a solution or a test that is no Python") from e
    named = [call.id for call in calls if isinstance(call, ast.Name) and call.id in defined]
    if not named:
        raise Unusable("tests that call no function of the solution")
    return named[0]
