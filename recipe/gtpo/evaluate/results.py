"""What the samples of an evaluation come to: `evaluation.json`, and the table in the terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from recipe.gtpo.evaluate.measures import Attempts, Estimate, by_problem, difference, estimate
from recipe.gtpo.evaluate.samples import Sample
from recipe.gtpo.method.turns import Finish

Same = Callable[[str, str], Awaitable[bool]]
#: Means over the scored samples: name in the output -> name in `validation_info`.
_MEANS = ("turns", "first_turn_call", "malformed_call", "tool_error", "no_answer")


async def count_votes(samples: Sequence[Sample], same: Same) -> Attempts:
    """The scored samples of one problem. Answers are one where the task says so of the first that was given of each."""
    scored = [sample for sample in samples if sample.scored]
    groups: list[tuple[str, list[float]]] = []
    known: dict[str, list[float]] = {}
    for sample in scored:
        if not sample.pred.strip():
            continue
        if sample.pred not in known:
            known[sample.pred] = await _votes_for(sample.pred, groups, same)
        known[sample.pred].append(sample.acc)
    return Attempts(tuple(s.acc for s in scored), tuple((len(votes), fmean(votes)) for _, votes in groups))


async def _votes_for(answer: str, groups: list[tuple[str, list[float]]], same: Same) -> list[float]:
    for first, votes in groups:
        if await same(first, answer):
            return votes
    groups.append((answer, []))
    return groups[-1][1]


@dataclass(frozen=True)
class Result:
    """One model on one benchmark.

    Args:
        values: measure -> problem -> value. Without maj@k where answers are right of which none was stated.
        counts: of problems and samples, by what became of them.
        means: over the scored samples.
    """

    samples: int
    values: Mapping[str, Mapping[int, float]]
    counts: Mapping[str, int]
    means: Mapping[str, float]

    @classmethod
    async def of(
        cls, done: Mapping[int, Mapping[int, Sample]], problems: int, samples: int, too_long: int, same: Same
    ) -> Result:
        """Args: `done`: problem -> number -> sample; `too_long`: rows that are left out of the `problems`."""
        votes = await asyncio.gather(*(count_votes(list(of.values()), same) for of in done.values()))
        every = [sample for of in done.values() for sample in of.values()]
        scored = [sample for sample in every if sample.scored]
        counts = {
            "problems": problems,
            "problems_too_long": too_long,
            "samples": problems * samples,
            "scored": len(scored),
            "truncated": sum(sample.finish in (Finish.LENGTH, Finish.TURN_LIMIT) for sample in scored),
            "truncated_by_length": sum(sample.finish is Finish.LENGTH for sample in scored),
            "infra": sum(sample.finish is Finish.INFRA for sample in every),
            "lost": sum(sample.finish is Finish.FAULT for sample in every),
            "not_done": problems * samples - len(every),
        }
        means = {name: fmean(sample.info[name] for sample in scored) for name in _MEANS if scored}
        if scored:
            means["tokens"] = fmean(sample.tokens for sample in scored)
        values = by_problem(dict(zip(done, votes, strict=True)), samples)
        # A model that states no answer is never right. Where it is, the reward function does not say what it read (a
        # number, or no `pred`): there is nothing to count votes by, and 0 would be made up.
        if any(sample.acc >= 1 for sample in scored) and not any(of.answers for of in votes):
            values = {name: of for name, of in values.items() if not name.startswith("maj@")}
        return cls(samples, values, counts, means)

    @property
    def estimates(self) -> dict[str, Estimate]:
        return {name: estimate(list(values.values())) for name, values in self.values.items() if values}

    @property
    def main(self) -> tuple[str, str, str]:
        """The measures that the table shows; of one sample a problem they are all the same."""
        return f"mean@{self.samples}", f"pass@{self.samples}", f"maj@{self.samples}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "counts": dict(self.counts),
            "means": dict(self.means),
            "measures": {name: found.to_dict() for name, found in self.estimates.items()},
        }

    def minus(self, other: Result) -> dict[str, Estimate]:
        """Measure -> this minus the other, paired by problem."""
        found = {name: difference(self.values[name], other.values.get(name, {})) for name in self.values}
        return {name: one for name, one in found.items() if one is not None}

    def metrics(self, benchmark: str) -> dict[str, float]:
        """As verl names those of a validation: the viewer and the status draw them."""
        return {f"val-core/{benchmark}/acc/{name}": found.value for name, found in self.estimates.items()}


# -- the terminal -----------------------------------------------------------------------------------------------------


def show(found: Estimate | None, signed: bool = False) -> str:
    if found is None:
        return "-"
    sign = "+" if signed else ""
    ends = "" if found.low is None else f" [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"
    return f"{found.value:{sign}.3f}{ends}"


def results_table(results: Mapping[str, Result]) -> list[str]:
    """Benchmark -> result, one line each."""
    head = ("benchmark", "problems", "samples", "mean@n", "pass@n", "maj@n", "turns", "cut off", "infra", "lost")
    rows = []
    for name, result in results.items():
        estimates, counts = result.estimates, result.counts
        turns = f"{result.means['turns']:.2f}" if result.means else "-"
        measures = (show(estimates.get(measure)) for measure in result.main)
        rows.append(
            (
                *(name, str(counts["problems"]), str(result.samples), *measures, turns),
                *(str(counts[key]) for key in ("truncated", "infra", "lost")),
            )
        )
    return _columns([head, *rows]) + _notes(results)


def _notes(results: Mapping[str, Result]) -> list[str]:
    """What the table would leave unsaid."""
    said = []
    for name, result in results.items():
        counts = result.counts
        if failed := counts["infra"] + counts["lost"]:
            said.append(f"{name}: {failed} samples failed on our side and are not scored; the same command tries again")
        if counts["truncated"]:
            said.append(f"{name}: {counts['truncated']} samples were cut off by a limit; they are scored as they stand")
        if counts["problems_too_long"]:
            said.append(
                f"{name}: {counts['problems_too_long']} problems are left out, longer than data.max_prompt_length"
            )
        if counts["not_done"]:
            said.append(f"{name}: {counts['not_done']} samples are not done")
        if result.main[2] not in result.values:
            said.append(
                f"{name}: maj@k is left out: the reward function states no answer (`pred`), also where it is right"
            )
        short = sum(name.startswith("pass@") and len(of) < counts["problems"] for name, of in result.values.items())
        if short and not counts["not_done"]:
            said.append(f"{name}: pass@k and maj@k are over the problems with at least k scored samples")
    return said


def difference_table(before: Mapping[str, Result], after: Mapping[str, Result], names: tuple[str, str]) -> list[str]:
    rows: list[tuple[str, ...]] = [("benchmark", "measure", *names, "difference, paired by problem")]
    for benchmark, result in after.items():
        other = before[benchmark]
        differences, ours, theirs = result.minus(other), result.estimates, other.estimates
        for measure in result.main[: None if result.samples > 1 else 1]:
            found = (show(theirs.get(measure)), show(ours.get(measure)), show(differences.get(measure), signed=True))
            rows.append((benchmark, measure, *found))
    return _columns(rows)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
