"""Rows in the columns of published data sets, with problems of our own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FRAME = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
#: Published form -> a row in it. The problem is always "What is 2+3?", the answer 5.
MATH_FORMS: dict[str, dict[str, Any]] = {
    "DAPO-Math-17k": {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": FRAME.format("What is 2+3?")}],
        "ability": "MATH",
        "reward_model": {"ground_truth": "5", "style": "rule"},
        "extra_info": {"index": "x"},
    },
    "DAPO-Math-17k-Processed": {"prompt": "What is 2+3?", "solution": "5", "source_prompt": []},
    "DeepScaleR": {"problem": "What is 2+3?", "answer": "5", "solution": ""},
    "MATH-500": {"problem": "What is 2+3?", "solution": r"\boxed{5}", "answer": "5", "subject": "", "unique_id": ""},
    "AIME 2024, HuggingFaceH4": {"id": 1, "problem": "What is 2+3?", "solution": "", "answer": "5", "year": "2024"},
    "AIME 2024, Maxwell-Jia": {"ID": "2024-I-1", "Problem": "What is 2+3?", "Solution": "", "Answer": 5},
    "AIME 2024, math-ai": {"id": 1, "problem": "What is 2+3?", "solution": r"\boxed{5}", "url": ""},
    "AIME 2025, opencompass": {"question": "What is 2+3?", "answer": "5"},
    "AMC 2023, math-ai": {"id": 1, "question": "What is 2+3?", "answer": 5.0, "url": "2023_AMC_12A_Problems"},
    "OlympiadBench": {"question": "What is 2+3?", "final_answer": ["$5$"], "unit": None, "answer_type": "Numerical"},
    "OlympiadBench, one text": {"question": "What is 2+3?", "final_answer": "5"},
    "SVAMP": {"Body": "What is", "Question": "2+3?", "Answer": "5.0", "Equation": "", "question_concat": ""},
    "MAWPS": {"input": "What is 2+3?", "target": 5.0},
    "MAWPS, its authors'": {"iIndex": 1, "sQuestion": "What is 2+3?", "lEquations": ["X=2+3"], "lSolutions": [5.0]},
    "Calc-MAWPS": {"id": "1", "question": "What is 2+3?", "chain": "", "result": "5", "equation": ""},
    "GSM8K": {"question": "What is 2+3?", "answer": "2+3=<<2+3=5>>5\n#### 5"},
}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gsm8k(question: str, answer: int) -> dict[str, str]:
    return {"question": question, "answer": f"So it is.\n#### {answer}"}
