"""How a run goes, on one screen: `python -m recipe.gtpo.status RUN_DIR [--watch]`.

Reads what the run leaves on disk (recipe/gtpo/run/record.py) and nothing else, so it works beside a run, after one, and
on a copy of its folder. Both engines leave the same.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from recipe.gtpo.run.progress import validation_accuracy
from recipe.gtpo.run.record import RecordError, RunRecord

Line = Mapping[str, Any]  # of metrics.jsonl

#: Curves: what it is called -> metric. One that the run has not got is left out. docs/metrics.md explains them.
CURVES = {
    "accuracy, training": "gtpo/acc/mean",
    "reward": "gtpo/reward/mean",
    "turns": "gtpo/turns/mean",
    "first turn calls": "gtpo/tool/first_turn_call",
    "failing calls": "gtpo/tool/error_rate",
    "cut off": "gtpo/truncated",
    "flat pools": "gtpo/pools/zero_spread",
    "entropy": "actor/entropy",
    "gradient": "actor/grad_norm",
    "log-prob gap": "gtpo/log_prob_gap/mean",
    "seconds a step": "timing_s/step",
}
_OUTCOMES = "gtpo/tool/outcome_total/"
_ROWS = {"trained on": "valid", "dropped": "dropped", "failed by the tool server": "infra", "lost": "lost"}
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40  # columns of a curve
_RECENT = 10  # steps that say how long the next ones take
_QUIET = 600.0  # seconds without a sign of life that are normal in any run: starting, saving, validating
_PAUSE = 2.0  # seconds between two looks


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """`values` as bars between their least (▁) and their greatest (█); the means of neighbours where they are many."""
    count = min(width, len(values))
    parts = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means, default=0.0), max(means, default=0.0)
    spread = high - low
    places = [(mean - low) / spread * (len(_BARS) - 1) if spread > 0 else 0 for mean in means]
    return "".join(_BARS[round(place)] for place in places)


def total_steps(starts: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> int | None:
    """How far the run goes: what the latest command says, else the folder's config; None where neither does."""
    key = "trainer.total_training_steps"
    said = [word.split("=", 1)[1] for word in (starts[-1]["command"] if starts else []) if word.startswith(f"{key}=")]
    total = str(said[-1] if said else config.get(key))
    return int(total) if total.isdecimal() else None


def seconds_a_step(lines: Sequence[Line]) -> float | None:
    """Mean of the latest steps, the validations among them included where the engine times them (verl's does)."""
    took = [
        line["metrics"]["timing_s/step"] + line["metrics"].get("timing_s/testing", 0.0)
        for line in lines[-_RECENT:]
        if "timing_s/step" in line["metrics"]
    ]
    return sum(took) / len(took) if took else None


def state(
    step: int, total: int | None, summary: object, cause: str | None, silent: float, pace: float | None
) -> tuple[str, bool]:
    """What to say of the run's life, and whether it has ended.

    Args:
        step: the last one recorded. total: the last one planned, None: not known.
        summary: of a run that ended well, else None. cause: why it ended early, else None.
        silent: seconds since it wrote anything. pace: seconds a step, None before the first.
    """
    if cause is not None:
        return f"ended early: {cause}", True
    if summary is not None and (total is None or step >= total):
        return "done", True
    if silent > max(_QUIET, 10 * (pace or 0.0)):
        usual = f", where a step takes {_duration(pace)}" if pace else ""
        return f"silent for {_duration(silent)}{usual}: killed, or stuck", False
    left = f", about {_duration((total - step) * pace)} left" if pace and total is not None and total > step else ""
    return f"running{left}; wrote {_duration(silent)} ago", False


def describe(record: RunRecord, now: float) -> tuple[list[str], bool]:
    """The screen, line by line, and whether the run has ended. `now`: seconds of the clock that dates files.

    Raises RecordError where there is no run.
    """
    lines, config, starts = record.read_metrics(), record.read_config() or {}, record.read_starts()
    if not (lines or starts):
        raise RecordError(f"{record.dir}: no run's folder (neither metrics.jsonl nor versions.json)")
    total, step = total_steps(starts, config), lines[-1]["step"] if lines else 0
    summary = record.read_summary()
    if record.read_evaluation_report() is not None and record.read_cause() is None:
        said, ended = "evaluated", True
    else:
        said, ended = state(step, total, summary, record.read_cause(), now - record.last_write(), seconds_a_step(lines))
    about = config or summary or {}  # a run may be too old for a config.json
    named = {name: about.get(f"{name}.name", about.get(name, "?")) for name in ("method", "task", "seed")}
    screen = [
        f"{named['method']} on {named['task']}, seed {named['seed']}: {record.dir}",
        f"step {step} of {total or '?'}, {said}",
    ]
    rollout = record.read_rollout()
    if rollout is not None and not ended and rollout["done"] < rollout["of"]:
        what = "validation" if rollout["split"] == "validation" else "rollout"
        screen.append(f"  {what} of step {rollout['step']}: {rollout['done']} of {rollout['of']} prompts done")
    trained = [line for line in lines if "gtpo/acc/mean" in line["metrics"]]
    return screen + list(_curves(lines)) + (list(_health(trained)) if trained else []) + list(_odd(lines)), ended


def _curves(lines: Sequence[Line]) -> Iterator[str]:
    held_out = [(line["step"], acc) for line in lines if (acc := validation_accuracy(line["metrics"])) is not None]
    found = {"accuracy, held out": held_out} | {
        name: [(line["step"], line["metrics"][key]) for line in lines if key in line["metrics"]]
        for name, key in CURVES.items()
    }
    drawn = {name: sparkline([value for _, value in points]) for name, points in found.items() if points}
    width = max(map(len, drawn.values()), default=0)
    for name, curve in drawn.items():
        (first, start), (last, end) = found[name][0], found[name][-1]
        yield f"  {name:18} {curve:{width}} {start:.3g} (step {first}) -> {end:.3g} (step {last})"


def _health(trained: Sequence[Line]) -> Iterator[str]:
    """Tools and rows: the latest step, and the whole run's count of what should not be."""
    latest = trained[-1]["metrics"]
    outcomes = {k.removeprefix(_OUTCOMES): v for k, v in latest.items() if k.startswith(_OUTCOMES)}
    ordered = sorted(outcomes.items(), key=lambda pair: (-pair[1], pair[0]))
    yield f"  calls of step {trained[-1]['step']}: {', '.join(f'{n:.0f} {what}' for what, n in ordered) or 'none'}"
    counts = {
        what: [line["metrics"].get(f"gtpo/rows/{key}_total", 0.0) for line in trained] for what, key in _ROWS.items()
    }
    said = ", ".join(f"{of_steps[-1]:.0f} {what}" for what, of_steps in counts.items())
    bad = [f"{sum(n):.0f} {what}" for what, n in counts.items() if what != "trained on" and sum(n)]
    step, steps = trained[-1]["step"], len(trained)
    yield f"  trajectories of step {step}: {said}; of {steps} steps: {', '.join(bad) or 'none lost'}"


def _odd(lines: Sequence[Line]) -> Iterator[str]:
    named = [(line["step"], key, what) for line in lines for key, what in line.get("not_finite", {}).items()]
    if named:
        step, key, what = named[-1]
        yield f"  warning: {len(named)} metrics are no finite number, the latest {key} = {what} in step {step}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def watch(record: RunRecord, out: TextIO, pause: Callable[[], None]) -> None:
    """Say it again after every `pause`, until the run has ended. Clears the screen in between where it is one."""
    clear = "\x1b[2J\x1b[H" if out.isatty() else ""
    ended = False
    while not ended:
        screen, ended = describe(record, time.time())
        print(clear + "\n".join(screen), file=out, flush=True)
        if not ended:
            pause()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipe.gtpo.status", description="How a run goes, on one screen.")
    parser.add_argument("run_dir", type=Path, help="a run folder (outputs/...)")
    parser.add_argument("--watch", action="store_true", help="say it again every two seconds, until the run has ended")
    given = parser.parse_args(arguments)
    record = RunRecord(given.run_dir)
    try:
        if given.watch:
            watch(record, sys.stdout, lambda: time.sleep(_PAUSE))
        else:
            print("\n".join(describe(record, time.time())[0]), flush=True)
    except RecordError as e:
        print(f"status: error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
    except BrokenPipeError:  # `| head` has seen enough; what is left in the buffer has no reader either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
