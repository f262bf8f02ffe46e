r"""task=commonsense: StrategyQA (yes or no; Geva et al. 2021) and CommonsenseQA (five choices; Talmor et al. 2019)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipe.gtpo.tasks.prepared import DataSet, Example, PreparedTask, Unusable, text
from recipe.gtpo.tasks.task import boxed

_YES_OR_NO = {"true": "yes", "yes": "yes", "false": "no", "no": "no"}
_CHOICE = re.compile(r"\(?([a-z])\)?[.:]?(?:\s+(.*))?", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Commonsense(PreparedTask):
    r"""Answers in `\boxed{}`: yes or no, or the letter of a choice (or its text)."""

    training = (
        DataSet("commonsenseqa", "tau/commonsense_qa", "train", sizes={9741: "the training questions"}),
        DataSet("strategyqa", "ChilleD/StrategyQA", "train", sizes={1603: "the training questions"}),
    )
    evaluation = (
        DataSet("strategyqa", "ChilleD/StrategyQA", "test", sizes={687: "the test questions"}),
        DataSet("commonsenseqa", "tau/commonsense_qa", "validation", sizes={1221: "the validation questions"}),
    )

    def read(self, row: Mapping[str, Any], source: DataSet) -> Example:
        asked: Any = row.get("question")
        given: Any = row.get("choices")
        if isinstance(asked, Mapping):  # CommonsenseQA as its authors publish it
            asked, given = asked.get("stem"), asked.get("choices")
        question = text(asked)
        if not question:
            raise Unusable("no question")
        if given is None:
            answer = _YES_OR_NO.get(text(row.get("answer")).lower())
            if answer is None:
                raise Unusable("an answer that is neither true nor false")
            return Example(f"{question}\nAnswer yes or no.", answer, {"choice": ""}, question)
        if not isinstance(given, Mapping):
            given = {key: [choice[key] for choice in given] for key in ("label", "text")}
        labels, texts = given["label"], given["text"]
        if len(labels) != len(texts):
            raise Unusable("not as many choices as letters")
        if row.get("answerKey") not in labels:
            raise Unusable("no answer")
        choices = "\n".join(f"{label}. {words}" for label, words in zip(labels, texts, strict=True))
        right = texts[labels.index(row["answerKey"])]
        return Example(f"{question}\n{choices}", row["answerKey"], {"choice": right})

    def score(
        self, data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        answer = boxed(solution_str) or ""
        return {"acc": float(is_right(ground_truth, (extra_info or {}).get("choice") or "", answer)), "pred": answer}

    async def same(self, one: str, other: str) -> bool:
        return _plain(one) == _plain(other)


def _plain(answer: str) -> str:
    """`(B)`, `b.` and `B. its text` are b."""
    said = _bare(answer)
    choice = _CHOICE.fullmatch(said)
    marked = choice is not None and (choice[2] is None or said[:1] == "(" or said[1:2] in (")", ".", ":"))
    return choice[1] if choice is not None and marked else said


def is_right(gold: str, words: str, answer: str) -> bool:
    """Whether an answer is yes or no, or the letter of the right choice, its text, or both.

    Args:
        gold: yes, no, or a letter. words: the text of the right choice; "" for yes and no.
    """
    said = _bare(answer)
    if not words:
        return said in ({"yes": ("yes", "true"), "no": ("no", "false")}[gold])
    right = _bare(words)  # which may end in a period, as an answer may
    if said == right:
        return True
    choice = _CHOICE.fullmatch(said)
    return choice is not None and choice[1] == gold.lower() and choice[2] in (None, right)


def _bare(answer: str) -> str:
    return re.sub(r"\\(?:text|textbf|mathrm)\s*\{([^{}]*)\}", r"\1", answer).strip().lower().rstrip(".")
