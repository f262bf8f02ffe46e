"""What a step looked like, by turn index and overall: pure functions from the credit of a batch to named numbers.

Names: `gtpo/<what>/mean` overall, `gtpo/by_turn/<what>/mean/t<k>` for turn k. Overall reward parts are per trajectory
(they add up to its reward); by turn they are per turn that exists. A quantity without a case in the batch (the
advantage in all-solved groups when there is none) is left out rather than reported as 0. verl averages a name over the
iterations of one update weighted by samples, and adds up the names that contain "total": only counts do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from recipe.gtpo.method.credit import REASONS, Credit
from recipe.gtpo.method.options import Baseline
from recipe.gtpo.method.pools import zero_spread_share
from recipe.gtpo.method.tokens import dense, mean_by_turn
from recipe.gtpo.method.turns import NOT_EXECUTED, Finish, Trajectory


def credit_metrics(
    credit: Credit,
    trajectories: Sequence[Trajectory | None],
    returns: torch.Tensor,
    advantages: torch.Tensor,
    baseline: Baseline = "group",
) -> dict[str, float]:
    """All metrics of a batch that need no token.

    Args:
        trajectories: what `assign_credit` was given, in its order.
        returns, advantages: (B, T), by turn; read where `credit.turn_mask` is true.
        baseline: the pools of `gtpo/pools/zero_spread`, the share of them whose returns are all equal.
    """
    metrics = _rows(credit, trajectories)
    if bool(credit.valid.any()):
        metrics |= _trajectories(credit, trajectories)
        metrics |= _turns(credit, returns, advantages)
        metrics |= _groups(credit, advantages)
        metrics["gtpo/pools/zero_spread"] = zero_spread_share(
            returns, credit.turn_mask, credit.group_ids, baseline, credit.states
        )
    return metrics


def log_prob_gap_by_turn(
    actor_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, turn_ids: torch.Tensor
) -> dict[str, float]:
    """Mean |log p_actor - log p_rollout| over generated tokens: how far the sampler is from the policy that learns.

    Args:
        actor_log_probs, rollout_log_probs: (B, L), or nested tensors whose longest row is L.
        turn_ids: (B, L), -1 on tokens that were not generated.
    """
    gap = (dense(actor_log_probs) - dense(rollout_log_probs)).abs()
    by_turn, counts = mean_by_turn(gap, turn_ids)
    if not len(counts):
        return {}
    mean = float(gap[turn_ids >= 0].double().mean())
    return {"gtpo/log_prob_gap/mean": mean} | _by_turn("log_prob_gap/mean", by_turn, counts)


# -- parts ------------------------------------------------------------------------------------------------------------


def _rows(credit: Credit, trajectories: Sequence[Trajectory | None]) -> dict[str, float]:
    real = [t for t in trajectories if t is not None]
    metrics = {
        "gtpo/rows/valid_total": float(credit.valid.sum()),
        "gtpo/rows/dropped_total": float(credit.dropped.sum()),
        "gtpo/rows/infra_total": float(sum(t.finish is Finish.INFRA for t in real)),
    }
    if real:
        metrics["gtpo/truncated"] = sum(t.truncated for t in real) / len(real)
    return metrics


def _trajectories(credit: Credit, trajectories: Sequence[Trajectory | None]) -> dict[str, float]:
    """Per valid trajectory."""
    members = [t for t, valid in zip(trajectories, credit.valid.tolist(), strict=True) if t is not None and valid]
    count = len(members)
    executed = Counter(o.outcome for t in members for turn in t.turns for o in turn.outcomes)
    metrics = {
        "gtpo/acc/mean": float(credit.solved[credit.valid].float().mean()),
        "gtpo/reward/mean": float(credit.rewards.combined.sum()) / count,
        "gtpo/reward/outcome/mean": float(credit.rewards.outcome.sum()) / count,
        "gtpo/reward/format/mean": float(credit.rewards.format.sum()) / count,
        "gtpo/reward/shaping/mean": float(credit.rewards.shaping.sum()) / count,
        "gtpo/turns/mean": float(credit.turn_mask.sum()) / count,
        "gtpo/tool/calls/mean": sum(len(turn.calls) for t in members for turn in t.turns) / count,
        "gtpo/tool/first_turn_call": sum(bool(t.turns[0].calls) for t in members) / count,
    }
    runs = sum(n for outcome, n in executed.items() if outcome not in NOT_EXECUTED)
    if runs:
        metrics["gtpo/tool/error_rate"] = 1 - executed["ok"] / runs  # of the calls that reached the tool
    return metrics | {f"gtpo/tool/outcome_total/{name}": float(n) for name, n in sorted(executed.items())}


def _turns(credit: Credit, returns: torch.Tensor, advantages: torch.Tensor) -> dict[str, float]:
    """Per turn, overall and by index."""
    mask = credit.turn_mask
    counts = mask.sum(dim=0)
    present = counts.clamp_min(1)
    metrics = {
        "gtpo/return/mean": float(returns[mask].double().mean()),
        "gtpo/advantage/mean": float(advantages[mask].double().mean()),
        "gtpo/advantage/std": float(advantages[mask].double().std(correction=0)),
    } | _by_turn("survivors", counts / int(credit.valid.sum()), counts)
    by_index = {
        "reward/mean": credit.rewards.combined,
        "reward/outcome/mean": credit.rewards.outcome,
        "reward/format/mean": credit.rewards.format,
        "reward/shaping/mean": credit.rewards.shaping,
        "return/mean": returns,
        "advantage/mean": advantages,
    }
    means = {name: torch.where(mask, v.double(), 0.0).sum(dim=0) / present for name, v in by_index.items()}
    for name, values in means.items():
        metrics |= _by_turn(name, values, counts)
    deviation = torch.where(mask, advantages.double() - means["advantage/mean"], 0.0)
    metrics |= _by_turn("advantage/std", (deviation.square().sum(dim=0) / present).sqrt(), counts)
    wrong = mask & ~credit.solved[:, None]  # what has an advantage above 0 is made more likely
    failed = wrong.sum(dim=0)
    sums = {"advantage/mean": torch.where(wrong, advantages.double(), 0.0), "above_zero": wrong & (advantages > 0)}
    for name, values in sums.items():
        metrics |= _by_turn(f"wrong/{name}", values.sum(dim=0) / failed.clamp_min(1), failed)
    for i, reason in enumerate(REASONS):
        broken = (credit.reasons == i).sum(dim=0)
        metrics[f"gtpo/format/{reason.value}"] = float(broken.sum()) / int(counts.sum())
        metrics |= _by_turn(f"format/{reason.value}", broken / present, counts)
    return metrics


def _groups(credit: Credit, advantages: torch.Tensor) -> dict[str, float]:
    """Groups nobody solved (P is empty: no shaping) and groups all solved (nothing to learn: they should be quiet)."""
    labels = {name: i for i, name in enumerate(dict.fromkeys(credit.group_ids))}
    group = torch.tensor([labels[name] for name in credit.group_ids])
    members = torch.bincount(group[credit.valid], minlength=len(labels))
    solved = torch.bincount(group[credit.solved], minlength=len(labels))
    exists = members > 0
    unsolved, all_solved = exists & (solved == 0), exists & (solved == members)
    metrics = {
        "gtpo/groups/unsolved": float(unsolved.sum() / exists.sum()),
        "gtpo/groups/all_solved": float(all_solved.sum() / exists.sum()),
    }
    mask = credit.turn_mask
    size = torch.where(mask, advantages.abs(), 0.0)
    if unsolved.any():
        loud = torch.zeros(len(labels)).index_add_(0, group, size.sum(dim=1)) > 0
        metrics["gtpo/groups/unsolved_with_signal"] = float((loud & unsolved).sum() / unsolved.sum())
        metrics["gtpo/groups/unsolved_signal/mean"] = float(size[mask & unsolved[group][:, None]].mean())
    rows = credit.valid & all_solved[group]
    if rows.any():
        last = mask.sum(dim=1, keepdim=True)[rows] - 1
        metrics["gtpo/groups/all_solved_first_turn_advantage/mean"] = float(advantages[rows, 0].mean())
        metrics["gtpo/groups/all_solved_last_turn_advantage/mean"] = float(advantages[rows].gather(1, last).mean())
    return metrics


def _by_turn(name: str, values: torch.Tensor, counts: torch.Tensor) -> dict[str, float]:
    """`values` (T,) as one metric a turn that exists."""
    pairs = zip(values.tolist(), counts.tolist(), strict=True)
    return {f"gtpo/by_turn/{name}/t{k}": float(value) for k, (value, count) in enumerate(pairs) if count}
