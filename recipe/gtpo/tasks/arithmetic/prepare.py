"""task=arithmetic: make the data and the warm-started policy, or find them from an earlier run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from recipe.gtpo.tasks.arithmetic.problems import Limits, step_mix, write_splits
from recipe.gtpo.tasks.arithmetic.warm_start import BaseOptions, WarmStartOptions, ensure_warm_start


def prepare(
    seed: int,
    horizon: int,
    success: float,
    train_problems: int,
    validation_problems: int,
    cache: str,
    warm_start: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What the config's open keys get: verl key -> value.

    Args:
        seed: of the problems and of the warm start.
        horizon: the longest number of dependent calls; the limits of a conversation follow from it.
        success: of the expert that the warm start imitates.
        cache: folder shared by runs; entries are named by what made them.
        warm_start: further fields of `WarmStartOptions`, `base` with those of `BaseOptions`.
    """
    further = dict(warm_start or {})
    base = BaseOptions(horizon=horizon, **further.pop("base", {}))
    options = WarmStartOptions(seed=seed, success=success, base=base, **further)
    policy = ensure_warm_start(options, Path(cache) / "policies")
    facts = json.dumps([seed, train_problems, validation_problems, horizon])
    data = Path(cache) / "data" / hashlib.sha256(facts.encode()).hexdigest()[:16]
    files = {split: data / f"{split}.parquet" for split in ("train", "validation")}
    if not all(file.exists() for file in files.values()):
        write_splits(data, seed=seed, train=train_problems, validation=validation_problems, mix=step_mix(horizon))
    limits = Limits.of(horizon)
    return {
        "actor_rollout_ref.model.path": str(policy.resolve()),
        "data.train_files": str(files["train"].resolve()),
        "data.val_files": str(files["validation"].resolve()),
        "data.max_prompt_length": limits.prompt,
        "data.max_response_length": limits.response,
        "actor_rollout_ref.rollout.multi_turn.max_assistant_turns": limits.turns,
    }
