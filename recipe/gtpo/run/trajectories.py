"""What is recorded of a step, training or validation, by both engines: lines in the schema of `verl_ext.records`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from recipe.gtpo.method.advantage import Compared, compare_turns
from recipe.gtpo.method.credit import Credit
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.method.tokens import mean_of_turns
from recipe.gtpo.method.turns import Trajectory
from recipe.gtpo.run.record import RunRecord
from verl_ext.records import VERSION
from verl_ext.records.reader import Split


@dataclass(frozen=True)
class Row:
    """What is known of a trajectory beside itself: where it comes from."""

    group: str
    session: int
    index: int | None = None
    data_source: str = ""
    prompt: Sequence[Mapping[str, Any]] | None = None
    gold: Any = None
    weights: Sequence[int] = ()  # the first and last step whose weights sampled it
    token_ids: Sequence[int] | None = None  # of the response

    def line(self, trajectory: Trajectory) -> dict[str, Any]:
        line = trajectory.to_dict()
        alike = list(self.weights) if len(set(self.weights)) == 1 else None  # then every turn was sampled with them
        for turn in line["turns"]:
            turn["weights"] = turn["weights"] or alike
            turn["token_ids"] = None if self.token_ids is None else list(self.token_ids[turn["start"] : turn["end"]])
        known = {name: value for name, value in vars(self).items() if name != "token_ids"}
        if self.prompt is not None:
            known["prompt"] = [{"role": m["role"], "content": m["content"]} for m in self.prompt]
        return line | known | {"version": VERSION}


@dataclass(frozen=True)
class Numbers:
    """What training made of B trajectories of T turns at most. Tensors are (B, T) float32, or None: not known."""

    credit: Credit
    returns: torch.Tensor | None  # GTPO's; None with another estimator
    compared: Compared | None
    advantages: torch.Tensor
    log_probs: torch.Tensor | None  # mean over a turn's tokens, of the policy that is updated
    gaps: Sequence[torch.Tensor] | None  # B x (L,): the rollout's log-probs minus these, token by token
    masked: Sequence[torch.Tensor] | None  # B x (L,): 1 where rollout correction left a token out of the update

    @classmethod
    def of(
        cls,
        credit: Credit,
        advantages: torch.Tensor,
        estimator: str,
        options: GTPOOptions,
        log_probs: torch.Tensor | None = None,
        gaps: Sequence[torch.Tensor] | None = None,
        masked: Sequence[torch.Tensor] | None = None,
    ) -> Numbers:
        """Args: `estimator` as in `algorithm.adv_estimator`; `log_probs` (B, L), a number a token."""
        returns, compared = None, None
        if estimator == "gtpo":
            returns, compared = compare_turns(
                credit.rewards.combined, credit.turn_mask, credit.group_ids, options, credit.solved, credit.states
            )
        if log_probs is not None:
            turns = credit.turn_mask.shape[1]
            log_probs = mean_of_turns(log_probs, credit.turn_ids(log_probs.shape[1]), turns)
        return cls(credit, returns, compared, advantages, log_probs, gaps, masked)

    def of_turn(self, row: int, k: int, start: int, end: int) -> dict[str, Any]:
        """Everything of a turn that takes part in the update."""
        rewards = self.credit.rewards
        parts = {"outcome": rewards.outcome, "shaping": rewards.shaping, "format": rewards.format}
        found: dict[str, Any] = {
            "rewards": {name: float(part[row, k]) for name, part in parts.items()},
            "reward": float(rewards.combined[row, k]),
            "advantage": float(self.advantages[row, k]),
        }
        if self.returns is not None:
            found["return"] = float(self.returns[row, k])
        if self.compared is not None:
            found["pool_mean"] = float(self.compared.mean[row, k])
            found["pool_std"] = float(self.compared.std[row, k])
            found["divisor"] = float(self.compared.divisor[row, k])
        if self.masked is not None:
            found["masked"] = int(self.masked[row][start:end].sum())
        if self.log_probs is not None:
            found["log_prob"] = float(self.log_probs[row, k])
        if self.gaps is not None:
            gaps = self.gaps[row][start:end]
            found["log_prob_gap"] = float(gaps.abs().mean())
            found["log_prob_gaps"] = [float(f"{gap:.3g}") for gap in gaps.tolist()]
        return found


def training_lines(
    step: int,
    seed: int,
    trajectories: Sequence[Trajectory | None],
    rows: Sequence[Row],
    numbers: Numbers,
    update: int = 0,
) -> Iterator[dict[str, Any]]:
    """The lines of an update of a training step, from 0; none for padding rows (None)."""
    credit = numbers.credit
    same = {"step": step, "split": "train", "seed": seed, "update": update}
    for i, (trajectory, row) in enumerate(zip(trajectories, rows, strict=True)):
        if trajectory is None:
            continue
        line = row.line(trajectory) | same | {"dropped": bool(credit.dropped[i])}
        if credit.valid[i]:
            line["shaped"] = float(credit.shaped[i])
            line["partners"] = [
                {"session": rows[other].session, "similarity": close} for other, close in credit.partners[i]
            ]
            for k, turn in enumerate(line["turns"]):
                turn |= numbers.of_turn(i, k, turn["start"], turn["end"])
        yield line


def validation_lines(
    step: int, seed: int, trajectories: Sequence[Trajectory], rows: Sequence[Row]
) -> Iterator[dict[str, Any]]:
    """The lines of a validation: nothing of it is shaped, and its turns have no rewards."""
    for trajectory, row in zip(trajectories, rows, strict=True):
        yield row.line(trajectory) | {"step": step, "split": "validation", "seed": seed}


class Writer:
    """Makes and writes lines in a thread of its own, while training goes on: one step at a time, in order."""

    def __init__(self, record: RunRecord) -> None:
        self._record = record
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trajectories")
        self._last: Future | None = None

    def write(self, step: int, lines: Iterator[dict[str, Any]], *, split: Split = "train", more: bool = False) -> None:
        """Raises what the write before this one raised."""
        self.wait()
        self._last = self._thread.submit(self._record.write_trajectories, step, lines, split=split, more=more)

    def wait(self) -> None:
        """Until everything is on disk. Raises what its writing raised."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()
