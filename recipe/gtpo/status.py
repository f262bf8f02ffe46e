"""How a run is doing, while it goes on or after: `python -m recipe.gtpo.status RUN_DIR [--watch]`."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from recipe.gtpo.run.progress import validation_accuracy
from recipe.gtpo.run.record import RecordError, RunRecord

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40  # characters of a curve
_WATCH_SECONDS = 2.0

#: label -> metric of a training step, drawn as a curve.
_CURVES = {
    "training accuracy": "gtpo/acc/mean",
    "turns a trajectory": "gtpo/turns/mean",
    "tool calls that fail": "gtpo/tool/error_rate",
    "gradient norm": "actor/grad_norm",
    "log-prob gap": "gtpo/log_prob_gap/mean",
}
#: label -> metric counted over all steps; each should be 0.
_COUNTS = {
    "lost": "gtpo/rows/lost_total",
    "failed by the tool server": "gtpo/rows/infra_total",
    "dropped": "gtpo/rows/dropped_total",
}


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """The values from left to right, lowest to highest bar; means of neighbours where there are more than `width`."""
    if not values:
        return ""
    edges = [round(i * len(values) / min(width, len(values))) for i in range(min(width, len(values)) + 1)]
    means = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def describe(record: RunRecord, now: float | None = None) -> str:
    """The page. `now`: seconds since the epoch, to say how old the last line is; None: the present.

    Raises RecordError for a folder that holds no run, or a file that cannot be read.
    """
    config, starts, lines = record.read_config() or {}, record.read_starts(), record.read_metrics()
    if not starts:
        raise RecordError(f"{record.dir} holds no run: it has no versions.json")
    steps = [line for line in lines if "timing_s/step" in line["metrics"]]
    total = config.get("trainer.total_training_steps")
    known = record.read_summary() or {}  # of a run that is too old for a config.json
    method = config.get("method", known.get("method", "?"))
    task = config.get("task.name", known.get("task", "?"))
    return "\n".join(
        [
            f"{method} on {task}, seed {starts[-1]['seed']}: {record.dir}",
            _state(record, lines, steps, total, time.time() if now is None else now),
            *_curves(lines, steps),
            _counts(steps),
            *_not_finite(lines),
        ]
    )


def _state(
    record: RunRecord, lines: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]], total: Any, now: float
) -> str:
    at = lines[-1]["step"] if lines else 0
    done = f"step {at}" + (f" of {total}" if total else "")
    if (summary := record.read_summary()) is not None and (not total or summary["steps"][1] >= total):
        return f"{done}: complete"
    if (cause := record.read_cause()) is not None:
        return f"{done}: ended early: {cause}"
    if not steps:
        return f"{done}: no training step yet"
    seconds = statistics.median(line["metrics"]["timing_s/step"] for line in steps[-10:])
    left = f", about {_span((total - at) * seconds)} left" if total else ""
    age = now - record.metrics_path.stat().st_mtime
    return f"{done}, {seconds:.3g} s a step{left}; the last line is {_span(age)} old"


def _span(seconds: float) -> str:
    return str(timedelta(seconds=max(0, round(seconds))))


def _curves(lines: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> list[str]:
    held_out = [acc for line in lines if (acc := validation_accuracy(line["metrics"])) is not None]
    curves = {"held-out accuracy": held_out} | {
        label: [line["metrics"][key] for line in steps if key in line["metrics"]] for label, key in _CURVES.items()
    }
    return [
        f"  {label:22} {values[0]:9.3g}  {sparkline(values)}  {values[-1]:.3g}"
        for label, values in curves.items()
        if values
    ]


def _counts(steps: Sequence[Mapping[str, Any]]) -> str:
    counted = {label: sum(line["metrics"].get(key, 0.0) for line in steps) for label, key in _COUNTS.items()}
    return "  trajectories " + ", ".join(f"{label}: {count:.0f}" for label, count in counted.items())


def _not_finite(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [(line["step"], key, what) for line in lines for key, what in line.get("not_finite", {}).items()]
    if not found:
        return []
    step, key, what = found[-1]
    return [f"  not finite: {len(found)} numbers, the last one {key}={what} in step {step}"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipe.gtpo.status", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="a run folder, outputs/<experiment>")
    parser.add_argument("--watch", action="store_true", help="draw it anew every two seconds, until Ctrl-C")
    given = parser.parse_args(arguments)
    try:
        while True:
            page = describe(RunRecord(given.run_dir))
            print(f"\x1b[2J\x1b[H{page}" if given.watch else page, flush=True)
            if not given.watch:
                return 0
            time.sleep(_WATCH_SECONDS)
    except RecordError as e:
        print(f"status: error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
