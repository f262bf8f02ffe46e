"""From the recorded trajectories of a batch to the reward of every turn: the one pure function the trainer calls.

    recorded trajectories -> shaped outcomes (`shaping.py`) -> turn rewards (`rewards.py`) -> Credit

The trainer writes `Credit.token_rewards` where verl looks for scores and runs verl's own advantage computation inside
`estimator.recorded_turns(credit.turn_ids(length), ...)`. Rows are those of the batch, in its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.method.rewards import TurnRewards, assign_turn_rewards
from recipe.gtpo.method.shaping import shape_outcomes
from recipe.gtpo.method.similarity import Similarity, make_similarity
from recipe.gtpo.method.tokens import scatter_to_tokens, turn_ids_of_spans
from recipe.gtpo.method.turns import FAILED, FormatReason, Trajectory

#: The order of `Credit.reasons`.
REASONS = tuple(FormatReason)


@dataclass(frozen=True)
class Credit:
    """The reward of every turn of a batch of B rows, T turns at most. Tensors are on the CPU.

    A row is a padding row, or dropped, or valid; only valid rows have turns here.
    """

    group_ids: tuple[str, ...]  # B prompts
    valid: torch.Tensor  # (B,) bool: takes part in the update
    dropped: torch.Tensor  # (B,) bool: a real trajectory left out of everything; its response_mask must become 0
    outcomes: torch.Tensor  # (B,) float32: raw, never shaped; 0 in rows that are not valid
    solved: torch.Tensor  # (B,) bool
    turn_mask: torch.Tensor  # (B, T) bool
    spans: torch.Tensor  # (B, T, 2) int64: the tokens [start, end) of each turn in the response
    reasons: torch.Tensor  # (B, T) int64: index in REASONS of why the turn breaks the format, -1 when it does not
    states: torch.Tensor  # (B, T) int64: equal in turns of one prompt that have seen the same tool outputs; -1: no turn
    rewards: TurnRewards  # (B, T), by part
    shaped: torch.Tensor  # (B,) float32: `outcomes` after shaping
    partners: tuple[tuple[tuple[int, float], ...], ...]  # B: whom a failed row's code was compared with, how similar

    @property
    def well_formed(self) -> torch.Tensor:
        """(B,) bool: no turn breaks the format. True also for a row without turns."""
        return (self.reasons < 0).all(dim=1)

    @property
    def trajectory_rewards(self) -> torch.Tensor:
        """(B,) what the rewards of a row's turns add up to."""
        return self.rewards.combined.sum(dim=1)

    @property
    def reward_parts(self) -> dict[str, torch.Tensor]:
        """The parts that GDPO normalises apart, (B,) float32 each; 0 in rows that are not valid."""
        outcome = (self.rewards.outcome + self.rewards.shaping).sum(dim=1)
        return {"outcome": outcome, "well_formed": (self.well_formed & self.valid).float()}

    @property
    def turn_lengths(self) -> torch.Tensor:
        """(B, T) int64: generated tokens of each turn, 0 where there is none."""
        return self.spans.diff(dim=2).squeeze(2)

    def token_rewards(self, lengths: Sequence[int]) -> list[torch.Tensor]:
        """One 1-D float32 tensor of `lengths[i]` tokens a row: each turn's reward on the turn's last token."""
        return scatter_to_tokens(self.rewards.combined, self.turn_mask, self.spans, lengths)

    def turn_ids(self, length: int) -> torch.Tensor:
        """(B, length) int16: the turn each token was generated in, -1 elsewhere."""
        return turn_ids_of_spans(self.turn_mask, self.spans, length)


def assign_credit(
    trajectories: Sequence[Trajectory | None],
    group_ids: Sequence[str],
    options: GTPOOptions,
    similarity: Similarity | None = None,
) -> Credit:
    """Shape the outcomes inside each group and put every reward on its turn.

    Args:
        trajectories: B records; None for a padding row.
        group_ids: B labels, equal for rows of one prompt (verl's uid). Groups may be ragged and scattered.
        options: `algorithm.gtpo`.
        similarity: what compares programs; None makes the one that the options name. Keep one across steps: it
            remembers embeddings.

    Dropped are trajectories that a failure of ours ended, and with `truncated=drop` those that a limit cut.
    Raises ValueError, naming the row, on a record whose spans are empty, overlap, or are missing.
    """
    if len(trajectories) != len(group_ids):
        raise ValueError(f"{len(trajectories)} trajectories for {len(group_ids)} group ids")
    dropped = [t is not None and _is_dropped(t, options) for t in trajectories]
    members = {i: t for i, t in enumerate(trajectories) if t is not None and not dropped[i]}
    batch, turns = len(trajectories), max((len(t.turns) for t in members.values()), default=0)

    turn_mask = torch.zeros(batch, turns, dtype=torch.bool)
    spans = torch.zeros(batch, turns, 2, dtype=torch.long)
    reasons = torch.full((batch, turns), -1, dtype=torch.long)
    states = torch.full((batch, turns), -1, dtype=torch.long)
    known: dict[tuple, int] = {}
    for row, trajectory in members.items():
        _check_spans(row, trajectory)
        count = len(trajectory.turns)
        turn_mask[row, :count] = True
        spans[row, :count] = torch.tensor([(turn.start, turn.end) for turn in trajectory.turns])
        reasons[row, :count] = torch.tensor([_REASON_INDEX[turn.broken] for turn in trajectory.turns])
        seen = ((group_ids[row], state) for state in trajectory.states)
        states[row, :count] = torch.tensor([known.setdefault(state, len(known)) for state in seen])

    valid = torch.zeros(batch, dtype=torch.bool)
    outcomes = torch.zeros(batch)
    rows = list(members)
    valid[rows] = True
    outcomes[rows] = torch.tensor([t.raw_outcome for t in members.values()])
    solved = torch.zeros(batch, dtype=torch.bool)
    solved[rows] = torch.tensor([t.acc == 1 for t in members.values()], dtype=torch.bool)
    shaped = outcomes
    partners: list[tuple[tuple[int, float], ...]] = [()] * batch
    if options.shaping.enable:
        shaped = outcomes.clone()
        found = shape_outcomes(
            outcomes[rows],
            solved[rows],
            [t.code for t in members.values()],
            [group_ids[row] for row in rows],
            make_similarity(options.shaping.similarity) if similarity is None else similarity,
            options.shaping.alpha,
        )
        shaped[rows] = found.outcomes
        for row, compared in zip(rows, found.partners, strict=True):
            partners[row] = tuple((rows[other], close) for other, close in compared)
    return Credit(
        group_ids=tuple(group_ids),
        valid=valid,
        dropped=torch.tensor(dropped, dtype=torch.bool),
        outcomes=outcomes,
        solved=solved,
        turn_mask=turn_mask,
        spans=spans,
        reasons=reasons,
        shaped=shaped,
        partners=tuple(partners),
        states=states,
        rewards=assign_turn_rewards(
            outcomes,
            shaped,
            reasons >= 0,
            turn_mask,
            format_penalty=options.format_penalty,
            turn_rewards=options.turn_rewards,
            trajectory_reward=options.trajectory_reward,
        ),
    )


_REASON_INDEX: dict[FormatReason | None, int] = {None: -1} | {reason: i for i, reason in enumerate(REASONS)}


def _is_dropped(trajectory: Trajectory, options: GTPOOptions) -> bool:
    return trajectory.finish in FAILED or (options.truncated == "drop" and trajectory.truncated)


def _check_spans(row: int, trajectory: Trajectory) -> None:
    if not trajectory.turns:
        raise ValueError(f"row {row}: a trajectory that ended by {trajectory.finish.value!r} has no turn to reward")
    previous_end = 0
    for k, turn in enumerate(trajectory.turns):
        if not previous_end <= turn.start < turn.end:
            raise ValueError(
                f"row {row}: turn {k} has the tokens [{turn.start}, {turn.end}) after a turn that ends at "
                f"{previous_end}; turns need at least one token each, in order"
            )
        previous_end = turn.end
