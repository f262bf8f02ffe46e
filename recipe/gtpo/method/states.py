"""Credit by state: what siblings that stood in the same place got from there on. (8) and (9) of recipe/gtpo/README.md.

A state is a prompt and all that the tools have said so far (`turns.Trajectory.states`, `Credit.states`). A trajectory
is in a state at most once, and whoever is in a state has come through the same states before: the states of a prompt
are a tree. GiGPO (`rivals.gigpo`) compares within the same states.

    (8)  V[i,j] = (sum of R over the others in the state + prior * V[i,j-1]) / (others + prior)     `state_values`
    (9)  T[i,j] = r[i,j] + gamma * ((1 - b) * T[i,j+1] + b * mean of R in the state j led to)       `bootstrap_returns`

Why (8) without the row's own return adds no bias: given what a row has done before turn j, the others' returns do not
depend on what it does in j, nor does the choice of the pool. Why (9) adds none where the state tells all that matters
for the future: the mean of the returns of those who are in a state has the expectation of each of them. Where the
model's own words matter beside what the tools said, (9) is biased, by as much as they do.

Shapes: B rows, T turns; `turn_mask` is (B, T) bool, `states` (B, T) integers, equal in turns of one prompt taken in the
same state and different between prompts. All in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from recipe.gtpo.method.options import LoneState


def bootstrap_returns(
    returns: torch.Tensor, turn_mask: torch.Tensor, states: torch.Tensor, *, gamma: float, bootstrap: float
) -> torch.Tensor:
    """(B, T) float64: the target of each turn, (9). `returns` are the sampled ones, (4).

    A state that nobody else reached has its row's own return as mean, so the target is the sampled return there,
    exactly; so it is with `bootstrap=0`. Over the rows in any one state the targets add up to the returns.
    """
    wide = torch.where(turn_mask, returns.double(), 0.0)
    correction = torch.zeros(len(wide), dtype=torch.float64)  # T - R of the turn after
    targets = wide.clone()
    for turn, rows, place, count in reversed(list(_by_turn(turn_mask, states))):
        at = wide[rows, turn]
        mean = _sums(at, place, count)[place] / count[place]
        targets[rows, turn] += correction[rows]
        correction[rows] = gamma * ((1 - bootstrap) * correction[rows] + bootstrap * (mean - at))
    return targets


def state_values(
    returns: torch.Tensor,
    turn_mask: torch.Tensor,
    states: torch.Tensor,
    *,
    leave_one_out: bool,
    prior: float,
    lone_state: LoneState = "parent",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) float64 what the returns of each turn's state are worth, (8), and (B, T) int64 of how many it is the mean.

    Args:
        returns: what is compared, (B, T). A first turn's state is the prompt: its value is a plain mean.
        leave_one_out: without the row's own returns, in the state and in those before it.
        prior: how many returns the value of the state before counts as; 0 or more.
        lone_state: in a state that nobody else is in, `parent` is (8) as it stands: the value of the state before.
            `lone` is the mean over the others' turns in such states of the prompt, with `leave_one_out=False` over
            all of them, the own too; where there is none, `parent`.

    The number is that of the others in the state, or with `leave_one_out=False` of all. Where nobody is left to compare
    with, at the prompt, both are 0.
    """
    wide = torch.where(turn_mask, returns.double(), 0.0)
    values, counts = torch.zeros_like(wide), torch.zeros(wide.shape, dtype=torch.long)
    own = 1 if leave_one_out else 0
    lone = _lone_means(wide, turn_mask, states, own) if lone_state == "lone" and wide.shape[1] else None
    before = torch.zeros(len(wide), dtype=torch.float64)
    for turn, rows, place, count in _by_turn(turn_mask, states):
        at = wide[rows, turn]
        others = count[place] - own
        total = _sums(at, place, count)[place] - own * at
        weight = 0.0 if turn == 0 else prior
        mean = total / others.clamp_min(1)
        shrunk = (total + weight * before[rows]) / (others + weight).clamp_min(1e-300)
        value = torch.where(others > 0, shrunk if weight else mean, before[rows])
        if lone is not None and turn > 0:
            found, exists = lone
            value = torch.where((count[place] == 1) & exists[rows], found[rows], value)
        values[rows, turn], counts[rows, turn] = value, others
        before[rows] = value
    return values, counts


def _by_turn(
    turn_mask: torch.Tensor, states: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Turn by turn: its index, the rows that have it, which of its states each is in, how many rows each state has."""
    for turn in range(turn_mask.shape[1]):
        rows = turn_mask[:, turn].nonzero().squeeze(1)
        _, place, count = torch.unique(states[rows, turn], return_inverse=True, return_counts=True)
        yield turn, rows, place, count


def _sums(values: torch.Tensor, place: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(count), dtype=torch.float64).index_add_(0, place, values)


def _lone_means(
    returns: torch.Tensor, turn_mask: torch.Tensor, states: torch.Tensor, own: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) the mean return over turns of the prompt in states that one row is in, and (B,) whether there is any.

    `own` 1: without the row's own turns. What a row does from turn j on cannot change what this is for turn j, if j is
    in such a state: its later states have no one else either.
    """
    alone = torch.zeros_like(turn_mask)
    for turn, rows, place, count in _by_turn(turn_mask, states):
        alone[rows, turn] = (count[place] == 1) & (turn > 0)
    prompts, place = torch.unique(states[:, 0], return_inverse=True)
    size = torch.zeros(len(prompts), dtype=torch.float64)
    mine, number = torch.where(alone, returns, 0.0).sum(dim=1), alone.sum(dim=1).double()
    total = size.clone().index_add_(0, place, mine)[place] - own * mine
    count = size.clone().index_add_(0, place, number)[place] - own * number
    return total / count.clamp_min(1), count > 0
