"""What the report says about runs in numbers: means over seeds, their intervals, and differences paired by seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

import numpy as np
from scipy import stats

from recipe.gtpo.experiments.report.runs import Run, by_horizon

#: Every method is compared with the first of these that a report has, and those of GTPO with the best rival too.
BASELINES = ("grpo", "grpo_sum", "grpo_outcome")
_CONFIDENCE = 0.95
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean over seeds; `low` and `high` are None for a single one."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both, or None for a single seed."""
        return None if self.low is None or self.high is None else (self.low, self.high)


def t_interval(values: Sequence[float]) -> Interval:
    """Student's 95% interval of the mean."""
    mean, count = fmean(values), len(values)
    if count < 2:
        return Interval(mean, None, None, count)
    half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, count - 1)) * stdev(values) / count**0.5
    return Interval(mean, mean - half, mean + half, count)


def bootstrap_interval(values: Sequence[float]) -> Interval:
    """Percentile bootstrap of the mean; the resampling is seeded."""
    mean, count = fmean(values), len(values)
    if count < 2:
        return Interval(mean, None, None, count)
    found = stats.bootstrap(
        (np.array(values),),
        np.mean,
        confidence_level=_CONFIDENCE,
        n_resamples=_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), count)


def baseline_of(methods: Iterable[str]) -> str:
    known = set(methods)
    return next((name for name in BASELINES if name in known), BASELINES[0])


@dataclass(frozen=True)
class Paired:
    """A method minus another on the same seeds."""

    by_seed: dict[int, float]
    interval: Interval
    wins: int
    losses: int
    p_value: float  # sign test, two-sided; 1.0 where nothing differs


def paired(runs: Sequence[Run], method: str, other: str, value: Callable[[Run], float]) -> Paired | None:
    """`method` minus `other`. None without a common seed, and for a method and itself."""
    if method == other:
        return None
    ours = {r.seed: value(r) for r in runs if r.method == method}
    base = {r.seed: value(r) for r in runs if r.method == other}
    by_seed = {seed: ours[seed] - base[seed] for seed in sorted(ours.keys() & base.keys())}
    if not by_seed:
        return None
    differences = list(by_seed.values())
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    p_value = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return Paired(by_seed, bootstrap_interval(differences), wins, losses, p_value)


@dataclass(frozen=True)
class BestRival:
    """The rival that a method of GTPO gains least over, in final accuracy, on the seeds that the two share.

    It is chosen on the data that it is then compared on. Of several rivals alike the luckiest is chosen, so the
    difference understates the method.
    """

    method: str
    reward: str
    final: Paired
    area: Paired


def best_rival(runs: Sequence[Run], method: str) -> BestRival | None:
    """None for a rival, and where no rival shares a seed. One that shares a single seed counts where none shares more.

    Args:
        runs: of one horizon.
    """
    if any(run.method == method and not run.ours for run in runs):
        return None
    found = []
    for rival in sorted({run.method for run in runs if not run.ours}):
        final = paired(runs, method, rival, lambda r: r.final)
        area = paired(runs, method, rival, lambda r: r.area)
        if final is not None and area is not None:
            found.append(BestRival(rival, rewards_of(runs, rival), final, area))
    return min(found, key=lambda one: (one.final.interval.count < 2, one.final.interval.mean), default=None)


def rewards_of(runs: Sequence[Run], method: str) -> str:
    return " or ".join(sorted({run.reward for run in runs if run.method == method}))


@dataclass(frozen=True)
class Row:
    """One method at one horizon in the table."""

    method: str
    reward: str
    horizon: int | None
    seeds: list[int]
    final: Interval
    area: Interval
    start: float
    reached: float | None  # median step, None when fewer than half of the seeds got there
    turns: float | None
    tool_error: float | None
    first_turn_call: float | None
    step_seconds: float | None
    step_cost: float | None  # median over common seeds of this method's step time / the baseline's
    adv_cost: float | None  # the same for the advantage phase alone: (its seconds - the baseline's) / baseline's step
    baseline: str
    baseline_reward: str
    final_difference: Paired | None  # over the baseline
    area_difference: Paired | None
    best_rival: BestRival | None


def make_rows(runs: Sequence[Run], threshold: float) -> list[Row]:
    """One row a method and horizon; within a horizon the best mean of final accuracy and area first."""
    baseline = baseline_of(run.method for run in runs)
    return [row for members in by_horizon(runs).values() for row in _rows(members, baseline, threshold)]


def _rows(runs: Sequence[Run], baseline: str, threshold: float) -> list[Row]:
    """Of one horizon."""
    by_method: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda r: r.seed):
        by_method[run.method].append(run)
    base = {run.seed: run for run in by_method.get(baseline, [])}
    rows = []
    for method, members in by_method.items():
        step_cost, adv_cost = _costs(members, base)
        rows.append(
            Row(
                method=method,
                reward=rewards_of(runs, method),
                horizon=runs[0].horizon,
                seeds=[r.seed for r in members],
                final=t_interval([r.final for r in members]),
                area=t_interval([r.area for r in members]),
                start=fmean(r.curve[min(r.curve)] for r in members),
                reached=_median_reached(members, threshold),
                turns=mean_of_known([r.last("turns") for r in members]),
                tool_error=mean_of_known([r.last("tool_error") for r in members]),
                first_turn_call=mean_of_known([r.last("first_turn_call") for r in members]),
                step_seconds=mean_of_known([r.median("timing_s/step") for r in members]),
                step_cost=step_cost,
                adv_cost=adv_cost,
                baseline=baseline,
                baseline_reward=rewards_of(runs, baseline),
                final_difference=paired(runs, method, baseline, lambda r: r.final),
                area_difference=paired(runs, method, baseline, lambda r: r.area),
                best_rival=best_rival(runs, method),
            )
        )
    return sorted(rows, key=lambda row: -(row.final.mean + row.area.mean))


def _median_reached(runs: Sequence[Run], threshold: float) -> float | None:
    """The upper median of the step at `threshold`; a run that never gets there comes after all that do."""
    steps = (run.reached(threshold) for run in runs)
    middle = sorted(float("inf") if step is None else step for step in steps)[len(runs) // 2]
    return None if middle == float("inf") else middle


def _costs(runs: Sequence[Run], base: Mapping[int, Run]) -> tuple[float | None, float | None]:
    """`step_cost` and `adv_cost` of a row; `base` is seed -> the baseline's run. None where no seed has the times."""
    steps, advantages = [], []
    for run in runs:
        other = base.get(run.seed)
        if other is None:
            continue
        ours, theirs = (r.median("timing_s/step") for r in (run, other))
        our_adv, their_adv = (r.median("timing_s/adv") for r in (run, other))
        if ours and theirs:
            steps.append(ours / theirs)
            if our_adv is not None and their_adv is not None:
                advantages.append((our_adv - their_adv) / theirs)
    return (median(steps) if steps else None), (median(advantages) if advantages else None)


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """The mean of those that are not None; None where all are."""
    known = [v for v in values if v is not None]
    return fmean(known) if known else None
