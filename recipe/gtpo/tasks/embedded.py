"""task=arithmetic: make the data and the warm-started policy, or find them from an earlier run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from recipe.gtpo.tasks.arithmetic import HORIZON, write_splits
from recipe.gtpo.tasks.warm_start import WarmStartOptions, ensure_warm_start


def prepare(
    seed: int,
    train_problems: int,
    validation_problems: int,
    cache: str,
    horizon: dict[int, float] | None = None,
    warm_start: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What the config's open keys get: verl key -> value.

    Args:
        seed: of the problems and of the warm start.
        cache: folder shared by runs; entries are named by what made them.
        horizon: number of dependent calls -> weight; default: `arithmetic.HORIZON`.
        warm_start: further fields of `WarmStartOptions`.
    """
    mix = {int(k): float(v) for k, v in (horizon or HORIZON).items()}
    options = WarmStartOptions(seed=seed, horizon=mix, **(warm_start or {}))
    policy = ensure_warm_start(options, Path(cache) / "policies")
    facts = json.dumps([seed, train_problems, validation_problems, sorted(mix.items())])
    data = Path(cache) / "data" / hashlib.sha256(facts.encode()).hexdigest()[:16]
    files = {split: data / f"{split}.parquet" for split in ("train", "validation")}
    if not all(file.exists() for file in files.values()):
        write_splits(data, seed=seed, train=train_problems, validation=validation_problems, horizon=mix)
    return {
        "actor_rollout_ref.model.path": str(policy.resolve()),
        "data.train_files": str(files["train"].resolve()),
        "data.val_files": str(files["validation"].resolve()),
    }
