"""The end of an evaluation: `evaluation.json`, points for the curves, the tables in the terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from recipe.gtpo.evaluate.entries import describe
from recipe.gtpo.evaluate.evaluation import Evaluation
from recipe.gtpo.evaluate.measures import INTERVALS
from recipe.gtpo.evaluate.models import fingerprint
from recipe.gtpo.evaluate.results import Result, difference_table, results_table


def report(evaluations: Sequence[Evaluation], endpoint: Mapping[str, Any] | None) -> dict[str, Any]:
    """Write evaluation.json and the curves' points; print the table."""
    entries, record = evaluations[0].entries, evaluations[0].record

    async def all_results() -> list[dict[str, Result]]:
        return [await one.results() for one in evaluations]

    results = asyncio.run(all_results())
    start, config = record.read_starts()[-1], evaluations[0].server_config
    written: dict[str, Any] = {
        "models": [
            {"model": str(one.model), "path": one.model.path, "step": one.step, "files": fingerprint(one.model)}
            for one in evaluations
        ],
        "rollout": {"endpoint": endpoint}
        if endpoint is not None
        else {"engine": config.actor_rollout_ref.rollout.name, "dtype": config.actor_rollout_ref.rollout.dtype},
        "seed": config.seed,
        "intervals": INTERVALS,
        "versions": {key: start[key] for key in ("commit", "python", "packages", "machine")},
        "command": start["command"],
        "benchmarks": {},
    }
    for entry in entries:
        found: dict[str, Any] = describe(entry)
        found["results"] = [of[entry.name].to_dict() for of in results]
        if len(results) == 2:
            found["difference"] = {
                n: d.to_dict() for n, d in results[1][entry.name].minus(results[0][entry.name]).items()
            }
        written["benchmarks"][entry.name] = found
    record.write_evaluation_report(written)
    for one, of in zip(evaluations, results, strict=True):
        record.write_metrics(one.step, {k: v for name, result in of.items() for k, v in result.metrics(name).items()})
        print(f"\n{one.model}")
        print("\n".join(results_table(of)))
    if len(results) == 2:
        print()
        print("\n".join(difference_table(results[0], results[1], ("before", "after"))))
    print(f"\n{settings_line(written['benchmarks'], config.seed)}\noutputs: {record.dir}", flush=True)
    return written


def settings_line(about: Mapping[str, Mapping[str, Any]], seed: int) -> str:
    """In words, what the numbers depend on. `about`: benchmark -> what `describe` says."""
    lines: dict[str, list[str]] = {}
    for name, known in about.items():
        words = [f"{key} {known[key]:g}" for key in ("temperature", "top_p", "top_k")]
        words.append(f"at most {known['turns']} turns and {known['response_tokens']} tokens")
        lines.setdefault(", ".join(words), []).append(name)
    parts = [f"{', '.join(names)}: {line}" if len(lines) > 1 else line for line, names in lines.items()]
    return "; ".join(parts) + f"; seed {seed}; 95% intervals over problems"
