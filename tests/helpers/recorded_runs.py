"""Run folders as finished runs leave them, with hand-made numbers."""

from __future__ import annotations

from pathlib import Path

from recipe.gtpo.run.record import RunRecord


def make_run(
    folder: Path,
    method: str,
    seed: int,
    curve: dict[int, float],
    *,
    task: str = "arithmetic",
    horizon: int | None = None,
    reward: str | None = "min",
    seconds: float = 2.0,
    adv: float = 0.1,
    **extra: float,
) -> Path:
    """A run in a folder of its own in `folder`: `curve` is step -> held-out accuracy.

    Old records name no horizon (None) and no `algorithm.gtpo.trajectory_reward` (`reward=None`).

    Returns the run's folder.
    """
    record = RunRecord(folder / (f"{method}-seed{seed}" if horizon is None else f"{method}-h{horizon}-seed{seed}"))
    record.write_start(seed)
    if reward is not None:
        estimator = "gtpo" if method.startswith("gtpo") else method
        record.write_config({"algorithm.adv_estimator": estimator, "algorithm.gtpo.trajectory_reward": reward})
    for step in range(max(curve) + 1):
        metrics = {"timing_s/step": seconds, "timing_s/adv": adv, "gtpo/by_turn/advantage/mean/t0": 0.1 * step}
        if step in curve:
            metrics |= {"val-core/arithmetic/acc/mean@1": curve[step], "val-aux/arithmetic/turns/mean@1": 2.0}
        record.write_metrics(step, metrics | extra)
    known = {} if horizon is None else {"horizon": horizon}
    record.write_summary({"method": method, "task": task, **known, "seed": seed, "steps": [0, max(curve)]})
    return record.dir
