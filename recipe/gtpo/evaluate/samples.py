"""The samples of an evaluation on disk: one line each as it is done, so that a second start goes on with the rest.

They are records of `validation/<step>.jsonl` like those of a training run's validation, and the viewer reads them:
step 0 is the base model or the first of two, a checkpoint's step is its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipe.gtpo.dataset import file_row
from recipe.gtpo.method.turns import FAILED, Finish, Trajectory, validation_info
from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.run.trajectories import Row, validation_lines

Key = tuple[str, int, int]  # benchmark, problem (its number in the data set), number of the sample


@dataclass(frozen=True)
class Sample:
    """What is kept in memory of a trajectory. `info`: the numbers of `method.turns.validation_info`."""

    acc: float
    pred: str
    finish: Finish
    tokens: int  # that the model wrote
    info: Mapping[str, float]

    @classmethod
    def of(cls, trajectory: Trajectory) -> Sample:
        info = {name: value for name, value in validation_info(trajectory).items() if isinstance(value, float)}
        tokens = sum(turn.end - turn.start for turn in trajectory.turns)
        return cls(trajectory.acc, trajectory.pred, trajectory.finish, tokens, info)

    @property
    def scored(self) -> bool:
        """False where something of ours failed: that says nothing of the model."""
        return self.finish not in FAILED


class Samples:
    """All samples of one model."""

    def __init__(self, record: RunRecord, step: int, seed: int) -> None:
        self._record, self._step, self._seed = record, step, seed
        self._done: dict[Key, Sample] = {}

    def load(self) -> int:
        """Read what earlier starts have done. Samples that failed are none: they are taken out, to be done again.

        Returns how many these were.
        """
        again = 0
        for line in self._lines():
            sample = Sample.of(Trajectory.from_dict(line))
            if sample.scored:
                self._done[_key(line)] = sample
            else:
                again += 1
        if self._step in self._record.trajectory_steps(split="validation"):
            # also cuts off a torn line, which the next one would be glued to
            whole = (line for line in self._lines() if Finish(line["finish"]) not in FAILED)
            self._record.write_trajectories(self._step, whole, split="validation")
        return again

    def _lines(self) -> Iterator[dict[str, Any]]:
        return self._record.read_whole_lines(self._step, split="validation")

    def add(
        self, benchmark: str, row: Mapping[str, Any], session: int, trajectory: Trajectory, ids: Sequence[int]
    ) -> Sample:
        """Args: `row`: of the data set; `ids`: tokens of the response."""
        index = int(row["index"])
        known = Row(
            group=f"{benchmark}-{index}",
            session=session,
            index=file_row(row),
            data_source=str(row.get("data_source") or benchmark),
            prompt=list(row["raw_prompt"]),
            gold=(row.get("reward_model") or {}).get("ground_truth"),
            weights=[self._step, self._step],
            token_ids=ids,
        )
        (line,) = validation_lines(self._step, self._seed, [trajectory], [known])
        self._record.append_trajectory(self._step, line, split="validation")
        sample = Sample.of(trajectory)
        self._done[benchmark, index, session] = sample
        return sample

    def of(self, benchmark: str, samples: int) -> dict[int, dict[int, Sample]]:
        """Problem -> number of the sample, below `samples` -> the sample."""
        found: dict[int, dict[int, Sample]] = {}
        for (name, index, session), sample in self._done.items():
            if name == benchmark and session < samples:
                found.setdefault(index, {})[session] = sample
        return {index: dict(sorted(found[index].items())) for index in sorted(found)}

    def missing(self, benchmark: str, problems: int, samples: int) -> list[tuple[int, int]]:
        """(problem, number): every problem's first sample before any second one."""
        wanted = ((index, session) for session in range(samples) for index in range(problems))
        return [one for one in wanted if (benchmark, *one) not in self._done]


def _key(line: Mapping[str, Any]) -> Key:
    benchmark, _, index = line["group"].rpartition("-")
    return benchmark, int(index), int(line["session"])
