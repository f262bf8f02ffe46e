"""task=arithmetic: generated problems and a warm-started policy, made once and found again by later runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe.gtpo.tasks.arithmetic.problems import (
    Limits,
    compute_score,
    sample_problems,
    step_mix,
    take,
    to_row,
)
from recipe.gtpo.tasks.arithmetic.warm_start import BaseOptions, WarmStartOptions, ensure_warm_start
from recipe.gtpo.tasks.task import Task, write_parquet


@dataclass(frozen=True, kw_only=True)
class Arithmetic(Task):
    r"""Chains of dependent tool calls, a policy that has learnt to call, answers in `\boxed{}`.

    Args:
        seed: of the problems and of the warm start.
        horizon: the longest number of dependent calls; the limits of a conversation follow from it.
        success: of the expert that the warm start imitates.
        train_problems, validation_problems: rows of the two parquet files.
        final_problems: held-out problems of the last validation in the plain-PyTorch engine (`experiments/twin`).
        cache: folder shared by runs; entries are named by what made them.
        warm_start: further fields of `WarmStartOptions`, `base` with those of `BaseOptions`.
    """

    seed: int
    horizon: int
    success: float
    train_problems: int
    validation_problems: int
    final_problems: int
    cache: str
    warm_start: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def limits(self) -> Limits:
        return Limits.of(self.horizon)

    def prepare(self) -> dict[str, Any]:
        return {"actor_rollout_ref.model.path": str(self.policy().resolve()), **self.prepare_evaluation()}

    def prepare_evaluation(self) -> dict[str, Any]:
        files = self.write_data()
        return {
            "data.train_files": files["train"],
            "data.val_files": files["validation"],
            "data.max_prompt_length": self.limits.prompt,
            "data.max_response_length": self.limits.response,
            "actor_rollout_ref.rollout.multi_turn.max_assistant_turns": self.limits.turns,
        }

    def policy(self) -> Path:
        """The folder of the warm-started policy, trained now if it is not there yet."""
        further = dict(self.warm_start or {})
        base = BaseOptions(horizon=self.horizon, **further.pop("base", {}))
        options = WarmStartOptions(seed=self.seed, success=self.success, base=base, **further)
        return ensure_warm_start(options, Path(self.cache) / "policies")

    def write_data(self) -> dict[str, str]:
        """The parquet file of each split, written now if it is not there yet."""
        facts = json.dumps([self.seed, self.train_problems, self.validation_problems, self.horizon])
        folder = Path(self.cache).resolve() / "data" / hashlib.sha256(facts.encode()).hexdigest()[:16]
        files = {}
        for split, count in (("train", self.train_problems), ("validation", self.validation_problems)):
            file = folder / f"{split}.parquet"
            if not file.exists():
                problems = take(sample_problems(split, self.seed, step_mix(self.horizon)), count)
                write_parquet([to_row(problem, index) for index, problem in enumerate(problems)], file)
            files[split] = str(file)
        return files

    def score(
        self, data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        return compute_score(data_source, solution_str, ground_truth, extra_info)
