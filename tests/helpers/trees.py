"""A small tree of tool calls with a tabular policy, and everything about it by enumeration: no sampling, no error."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from recipe.gtpo.method.advantage import compare_turns
from recipe.gtpo.method.options import GTPOOptions

#: node -> action -> (reward, the node that the tool's answer leads to, None: the end). `x` is the way, which two
#: wordings of one call lead to; `y` is a fault that can be mended; `z` and `w` look the same to the policy, and share
#: their probabilities.
TREE = {
    "root": {"call": (0.0, "x"), "reworded": (0.0, "x"), "malformed": (-0.1, "y"), "stop": (0.3, None)},
    "x": {"answer": (1.0, None), "guess": (0.0, None), "call": (0.0, "z")},
    "y": {"answer": (0.2, None), "call": (0.0, "w")},
    "z": {"answer": (1.0, None), "guess": (0.0, None)},
    "w": {"answer": (1.0, None), "guess": (0.0, None)},
}
PLACES = {"root": "root", "x": "x", "y": "y", "z": "late", "w": "late"}  # whose probabilities a node uses
PROBABILITIES = {
    "root": {"call": 0.3, "reworded": 0.2, "malformed": 0.3, "stop": 0.2},
    "x": {"answer": 0.2, "guess": 0.3, "call": 0.5},
    "y": {"answer": 0.6, "call": 0.4},
    "late": {"answer": 0.7, "guess": 0.3},
}
PARAMETERS = [(place, action) for place, row in PROBABILITIES.items() for action in row]

Steps = tuple[tuple[str, str], ...]


def trajectories(node: str = "root") -> list[Steps]:
    """All of them: (node, action) by turn."""
    found = []
    for action, (_, then) in TREE[node].items():
        found += [((node, action), *rest) for rest in (trajectories(then) if then else [()])]
    return found


def probability(steps: Steps) -> float:
    product = 1.0
    for node, action in steps:
        product *= PROBABILITIES[PLACES[node]][action]
    return product


def score(node: str, action: str) -> torch.Tensor:
    """(len(PARAMETERS),) gradient of log softmax at the node by the logits."""
    place = PLACES[node]
    values = [(p == place) * ((a == action) - PROBABILITIES[p][a]) for p, a in PARAMETERS]
    return torch.tensor(values, dtype=torch.float64)


def value(node: str) -> float:
    return sum(PROBABILITIES[PLACES[node]][a] * worth(node, a) for a in TREE[node])


def worth(node: str, action: str) -> float:
    """Q: expected reward from here on."""
    reward, then = TREE[node][action]
    return reward + (value(then) if then else 0.0)


def exact_gradient() -> torch.Tensor:
    """Of the expected sum of rewards, by the logits."""
    total = torch.zeros(len(PARAMETERS), dtype=torch.float64)
    for steps in trajectories():
        reward = sum(TREE[node][action][0] for node, action in steps)
        total += probability(steps) * reward * sum(score(node, action) for node, action in steps)
    return total


@dataclass
class Groups:
    """All groups of `size` trajectories, in order: N of them, `size` rows each."""

    size: int
    members: list[tuple[Steps, ...]]
    weight: torch.Tensor  # (N,) their probabilities
    rewards: torch.Tensor  # (N * size, T)
    mask: torch.Tensor
    states: torch.Tensor
    labels: torch.Tensor  # (N * size,) the group of a row

    @classmethod
    def all(cls, size: int) -> Groups:
        members = list(itertools.product(trajectories(), repeat=size))
        weight = torch.tensor([[probability(t) for t in group] for group in members], dtype=torch.float64).prod(dim=1)
        rows = [steps for group in members for steps in group]
        turns = max(map(len, rows))
        rewards, states = torch.zeros(len(rows), turns), torch.full((len(rows), turns), -1)
        nodes = list(TREE)  # of a tree: a node is reached on one way only
        for i, steps in enumerate(rows):
            for k, (node, action) in enumerate(steps):
                rewards[i, k] = TREE[node][action][0]
                states[i, k] = i // size * len(nodes) + nodes.index(node)
        labels = torch.arange(len(members)).repeat_interleave(size)
        return cls(size, members, weight, rewards, states >= 0, states, labels)

    def compare(self, **options):
        """`compare_turns`: returns or targets (N * size, T), and what became of them."""
        full = GTPOOptions.from_config({"gamma": 1.0, "scale": "none", "leave_one_out": True, **options})
        return compare_turns(self.rewards, self.mask, self.labels, full, None, self.states)

    def gradients(self, advantages: torch.Tensor) -> torch.Tensor:
        """(N, len(PARAMETERS)) what each group would move the logits by, the mean over its rows."""
        scores = torch.zeros(*self.mask.shape, len(PARAMETERS), dtype=torch.float64)
        for i, steps in enumerate(steps for group in self.members for steps in group):
            for k, (node, action) in enumerate(steps):
                scores[i, k] = score(node, action)
        by_row = (advantages.double()[..., None] * scores).sum(dim=1)
        return by_row.view(len(self.members), self.size, -1).mean(dim=1)

    def mean_and_variance(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Over the groups, of (N, ...) values."""
        weight = self.weight.view(-1, *[1] * (values.ndim - 1))
        mean = (weight * values.double()).sum(dim=0)
        return mean, (weight * (values.double() - mean).square()).sum(dim=0)
