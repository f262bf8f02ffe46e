"""Our advantage estimators, as verl's registry calls them: token rewards in, advantages and returns of tokens out.

    token rewards -> turn rewards (`tokens.py`) -> returns, advantages (`advantage.py`) -> tokens (`tokens.py`)

The registry passes neither turns nor outcomes, so a trainer that has recorded them hands them over with
`recorded_turns`; without a record GTPO's turns are the runs of the response mask. `ESTIMATORS` has the names: GTPO, and
those that it is compared with which verl lacks or cannot feed. The latter need the record.

Shapes: B rows (trajectories), L response tokens. `turn_ids` is (B, L) integer: the turn a token was generated in, -1
for every other token. A row whose ids are all -1 (padding, a dropped trajectory) takes part in nothing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from recipe.gtpo.method import rivals
from recipe.gtpo.method.advantage import turn_advantages
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.method.pools import GroupIds
from recipe.gtpo.method.tokens import Runs, find_runs, spread_to_tokens, sum_rewards_by_turn, turn_starts

logger = logging.getLogger(__name__)


class _Record(NamedTuple):
    turn_ids: torch.Tensor
    solved: torch.Tensor | None
    states: torch.Tensor | None
    parts: Mapping[str, torch.Tensor] | None


_RECORDED: ContextVar[_Record | None] = ContextVar("gtpo_recorded_turns", default=None)


@contextmanager
def recorded_turns(
    turn_ids: torch.Tensor,
    solved: torch.Tensor | None = None,
    states: torch.Tensor | None = None,
    parts: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[None]:
    """Hand the recorded turns to the estimator of ours that verl calls inside the `with` block.

    Args:
        turn_ids: (B, L), rows in the order of the batch. Another width than the rewards' is accepted when no turn is
            cut: missing columns count as -1, surplus ones must all be -1.
        solved: (B,) bool, the raw outcomes; needed only for `unsolved_groups=zero`.
        states: (B, T), `Credit.states`; needed only for GiGPO, and by GTPO with `baseline=state` or `bootstrap`.
        parts: name -> (B,), `Credit.reward_parts`; needed only for GDPO.
    """
    token = _RECORDED.set(_Record(turn_ids, solved, states, parts))
    try:
        yield
    finally:
        _RECORDED.reset(token)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Apart from the passes over all tokens everything here is small, and there are some fifty operations: with several
    threads each waits at a barrier, for milliseconds when the host is busy. Measured so: 7 times faster with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
@_one_thread()
def compute_gtpo_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: GroupIds,
    config: Mapping[str, Any] | None = None,
    turn_ids: torch.Tensor | None = None,
    solved: torch.Tensor | None = None,
    states: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GTPO's advantages and returns, both (B, L) float32 and exactly 0 outside unmasked generated tokens.

    Args:
        token_level_rewards: (B, L). A turn's reward is what lies on its tokens and on the tokens after it up to the
            next turn; rows without a turn are ignored.
        response_mask: (B, L), non-zero on tokens that are trained on.
        index: (B,) the prompt of each row (verl's uid), as any labels that are hashable; 1 and "1" are two.
        config: verl's `config.algorithm`; our options are its key `gtpo` (absent: the defaults).
        turn_ids: (B, L); without it those of `recorded_turns`; without those the runs of `response_mask` are the
            turns. A masked token inside a recorded turn (rollout correction rejects tokens) gets 0 and changes nothing
            else; a row whose tokens are all rejected still counts in its pool, as in verl's GRPO.
        solved: (B,) bool, the raw outcomes, as for `recorded_turns`.
        states: (B, T), as for `recorded_turns`.

    Raises ValueError, naming the row, when turns and mask disagree, a reward is not finite, or a row has no group id;
    and when an option needs a record that is not there.
    """
    options = GTPOOptions.from_config(None if config is None else config.get("gtpo"))
    record = _RECORDED.get()
    if turn_ids is None and record is not None:
        turn_ids, solved, states = record.turn_ids, record.solved, record.states
    if turn_ids is None:
        _check_runs_on_the_mask(config, options, solved)
    if options.needs_states and states is None:
        raise ValueError(
            "algorithm.gtpo.baseline=state and bootstrap need recorded tool outputs: run it with recipe.gtpo's trainer "
            "(trainer.v1.trainer_mode=gtpo_sync), which records them, or set baseline=group and bootstrap=0"
        )
    runs, turn_rewards, turn_mask = _rewards_by_turn(token_level_rewards, response_mask, turn_ids)
    solved, states = (None if given is None else given.cpu() for given in (solved, states))
    returns, advantages = turn_advantages(turn_rewards, turn_mask, index, options, solved, states)
    device = token_level_rewards.device
    return spread_to_tokens(advantages, runs).to(device), spread_to_tokens(returns, runs).to(device)


@torch.no_grad()
@_one_thread()
def compute_mt_grpo_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: GroupIds,
    config: Mapping[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MT-GRPO (`rivals.mt_grpo`) on recorded turns; arguments, results and errors as of `compute_gtpo_advantage`."""
    record = _record_for("mt_grpo")
    runs, turn_rewards, turn_mask = _rewards_by_turn(token_level_rewards, response_mask, record.turn_ids)
    advantages = spread_to_tokens(rivals.mt_grpo(turn_rewards, turn_mask, index), runs)
    return (advantages.to(token_level_rewards.device),) * 2


@torch.no_grad()
@_one_thread()
def compute_gigpo_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: GroupIds,
    config: Mapping[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GiGPO (`rivals.gigpo`) on recorded turns and states, with `gamma` and `scale` of `algorithm.gtpo`; arguments,
    results and errors as of `compute_gtpo_advantage`."""
    record = _record_for("gigpo", "states")
    options = GTPOOptions.from_config(None if config is None else config.get("gtpo"))
    runs, turn_rewards, turn_mask = _rewards_by_turn(token_level_rewards, response_mask, record.turn_ids)
    assert record.states is not None
    found = rivals.gigpo(turn_rewards, turn_mask, index, record.states.cpu(), gamma=options.gamma, scale=options.scale)
    return (spread_to_tokens(found, runs).to(token_level_rewards.device),) * 2


@torch.no_grad()
def compute_recorded_gdpo_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: GroupIds,
    config: Mapping[str, Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's own GDPO on the recorded reward parts, which weigh the same.

    verl's V1 trainers call it without the parts and without `prompts` and `attention_mask`, by which it finds each
    row's last token (KeyError). It only sums a part over the row, so any token will do: the last column stands for it.
    `token_level_rewards` is not read, by verl's function either; a KL term in it is refused at start-up.
    """
    # Not above: whoever imports this module first would then have verl load our plugin, which imports it half made.
    from verl.trainer.ppo.core_algos import compute_gdpo_outcome_advantage

    parts = _record_for("recorded_gdpo", "parts").parts
    assert parts is not None
    rows = {
        "prompts": response_mask.new_zeros(len(response_mask), 0),
        "attention_mask": torch.ones_like(response_mask, dtype=torch.long),
    }
    advantages, returns = compute_gdpo_outcome_advantage(
        token_level_rewards,
        response_mask,
        index,
        config={"gdpo_reward_keys": list(parts)},
        non_tensor_batch={name: part.cpu().numpy() for name, part in parts.items()},
        batch=rows,
    )
    return advantages, returns


#: What `plugin.py` makes known to verl, by the name of `algorithm.adv_estimator`.
ESTIMATORS: Mapping[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "gtpo": compute_gtpo_advantage,
    "mt_grpo": compute_mt_grpo_advantage,
    "gigpo": compute_gigpo_advantage,
    "recorded_gdpo": compute_recorded_gdpo_advantage,
}


def _record_for(estimator: str, field: str = "turn_ids") -> _Record:
    record = _RECORDED.get()
    if record is None or getattr(record, field) is None:
        raise ValueError(
            f"algorithm.adv_estimator={estimator} needs recorded turns: run it with recipe.gtpo's trainer "
            "(trainer.v1.trainer_mode=gtpo_sync), which records them"
        )
    return record


def _rewards_by_turn(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, turn_ids: torch.Tensor | None
) -> tuple[Runs, torch.Tensor, torch.Tensor]:
    """The runs of tokens, and (B, T) rewards and existence of turns.

    verl computes advantages on the CPU, and so do we: what lies on another device is moved here.
    """
    token_level_rewards, response_mask = _plain(token_level_rewards), _plain(response_mask)
    runs = find_runs(response_mask, None if turn_ids is None else _fit(turn_ids.cpu(), response_mask))
    starts, turn_mask = turn_starts(runs)
    _check_mask_inside_turns(runs)
    return runs, sum_rewards_by_turn(token_level_rewards, starts, turn_mask), turn_mask


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, in a type that numpy has: bfloat16 is none."""
    tensor = tensor.cpu()
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _fit(turn_ids: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Turn ids as wide as the mask, when that loses nothing."""
    batch, length = response_mask.shape
    if turn_ids.ndim != 2 or len(turn_ids) != batch:
        raise ValueError(f"turn ids of shape {tuple(turn_ids.shape)} for a batch of shape {(batch, length)}")
    surplus = turn_ids[:, length:] != -1
    if surplus.any():
        row = int(surplus.any(dim=1).nonzero()[0])
        raise ValueError(f"row {row}: a recorded turn goes on after the response's {length} tokens")
    missing = length - turn_ids.shape[1]
    return torch.nn.functional.pad(turn_ids, (0, missing), value=-1) if missing > 0 else turn_ids[:, :length]


def _check_mask_inside_turns(runs: Runs) -> None:
    outside = runs.mask & (runs.turn < 0)
    if outside.any():
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"row {int(runs.row[at])}: response_mask trains on token {int(runs.column[at])}, which is in none of the "
            "row's recorded turns. Either the record is another row's, or a dropped row still has its mask: zero it"
        )


def _check_runs_on_the_mask(
    config: Mapping[str, Any] | None, options: GTPOOptions, solved: torch.Tensor | None
) -> None:
    """Refuse what cannot be right when turns are read off the mask."""
    if options.unsolved_groups == "zero" and solved is None:
        raise ValueError(
            "algorithm.gtpo.unsolved_groups=zero needs recorded outcomes: a positive reward is no proof of success. "
            "Run it with recipe.gtpo's trainer, or set unsolved_groups=keep"
        )
    correction = None if config is None else config.get("rollout_correction")
    # verl's trainers rewrite response_mask before the advantage when rejection sampling is on, except in bypass mode,
    # where the loss rejects. Importance weights (rollout_is) leave the mask alone.
    if correction is not None and correction.get("rollout_rs") is not None and not correction.get("bypass_mode"):
        raise ValueError(
            f"algorithm.rollout_correction.rollout_rs={correction.get('rollout_rs')} rewrites response_mask: without "
            "recorded turns a rejected token would split its turn in two. Use recipe.gtpo's trainer (it records "
            "turns), or set rollout_rs=null, or bypass_mode=true"
        )
    _say_turns_come_from_the_mask()


@functools.cache  # once a process
def _say_turns_come_from_the_mask() -> None:
    logger.warning("gtpo: no recorded turns: turns from the response mask, outcome on the last turn, no shaping")
