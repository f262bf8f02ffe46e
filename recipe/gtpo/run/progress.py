"""What the user sees of a run: one bar while it trains, a few lines at the end. Both read the run's own record."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from recipe.gtpo.run.record import RunRecord

#: Shown beside the bar: name -> metric of a training step.
_SHOWN = {
    "acc": "gtpo/acc/mean",
    "turns": "gtpo/turns/mean",
    "tool_errors": "gtpo/tool/error_rate",
    "infra": "gtpo/rows/infra_total",  # trajectories that the tool server failed: should be 0
    "lost": "gtpo/rows/lost_total",  # trajectories that something else of ours failed: should be 0
}
#: Said once, where there are any: rows whose prompt is longer than data.max_prompt_length (`dataset.py`).
_TOO_LONG = {"training": "gtpo/data/too_long_total", "validation": "gtpo/validation/too_long_total"}
_POLL_SECONDS = 0.5
_SAY_SECONDS = 15.0  # between two words on a validation that goes on


class Progress:
    """A context manager: follows metrics.jsonl in a thread and draws a bar (on a terminal) or a line a step."""

    def __init__(self, record: RunRecord, total_steps: int | None, out: TextIO = sys.stderr) -> None:
        self._record = record
        self._total = total_steps
        self._out = out
        self._began = time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._bar: tqdm | None = None
        self._warned = False
        self._rollout, self._said_at = record.read_rollout(), time.monotonic()  # of an earlier start
        before = record.read_metrics()
        self._seen = before[-1]["step"] if before else -1

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        self._draw()
        if self._bar is not None:
            self._bar.close()

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self._draw()

    def _draw(self) -> None:
        lines = self._record.read_metrics()
        # Fewer than before: the trainer dropped what came after its checkpoint, and does these steps again.
        self._seen = min(self._seen, lines[-1]["step"] if lines else -1)
        for line in lines:
            step, metrics = line["step"], line["metrics"]
            if step <= self._seen:
                continue
            self._seen = step
            if "not_finite" in line:
                named = ", ".join(f"{key} is {what}" for key, what in line["not_finite"].items())
                self._print(f"warning: step {step}: {named}")
            validation = validation_accuracy(metrics)
            if validation is not None:
                self._print(f"step {step}: held-out accuracy {validation:.3f}")
            shown = {name: metrics[key] for name, key in _SHOWN.items() if key in metrics}
            if not shown:
                continue
            self._warn(metrics)
            if self._bar is None:
                self._bar = tqdm(total=self._total, initial=step - 1, desc="training", unit="step", file=self._out)
            self._bar.set_postfix_str(" ".join(f"{k}={v:.3g}" for k, v in shown.items()), refresh=False)
            self._bar.update(step - self._bar.n)
        self._say_validation()

    def _say_validation(self) -> None:
        """One takes minutes where a model is large, and has no line until it is done."""
        rollout = self._record.read_rollout()
        if rollout is None or rollout == self._rollout or time.monotonic() < self._said_at + _SAY_SECONDS:
            return
        self._rollout, self._said_at = rollout, time.monotonic()
        if rollout["split"] == "validation" and rollout["done"] < rollout["of"]:
            self._print(f"step {rollout['step']}: validation, {rollout['done']} of {rollout['of']} prompts done")

    def _warn(self, metrics: Mapping[str, float]) -> None:
        left_out = [f"{metrics[key]:.0f} {what} rows" for what, key in _TOO_LONG.items() if metrics.get(key)]
        if left_out and not self._warned:
            self._print(f"warning: {' and '.join(left_out)} are left out: prompts longer than data.max_prompt_length")
        self._warned = True

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._out)
        else:
            print(text, file=self._out, flush=True)


def validation_accuracy(metrics: Mapping[str, float]) -> float | None:
    """Mean of the raw outcome over all validation sets, or None when the step did not validate."""
    values = [v for k, v in metrics.items() if k.startswith("val-core/") and "/acc/mean@" in k]
    return sum(values) / len(values) if values else None


def validation_mean(metrics: Mapping[str, float], name: str) -> float | None:
    """The same for another quantity of `recipe.gtpo.method.turns.validation_info`."""
    values = [v for k, v in metrics.items() if k.startswith("val-aux/") and f"/{name}/mean@" in k]
    return sum(values) / len(values) if values else None


def summarize(record: RunRecord, config: DictConfig, seconds: float | None = None) -> dict[str, Any]:
    """Write summary.json and print it: validation before and after, and where everything is."""
    lines = record.read_metrics()
    validated = [line for line in lines if validation_accuracy(line["metrics"]) is not None]
    if not validated:
        bare = _about(config) | {"steps": [0, lines[-1]["step"] if lines else 0], "accuracy": [None, None]}
        record.write_summary(bare)
        print(f"gtpo: done, without validation; outputs in {record.dir}")
        return bare
    first, last = validated[0], validated[-1]
    names = ("first_turn_call", "malformed_call", "tool_error", "turns")
    summary: dict[str, Any] = _about(config) | {
        "steps": [first["step"], last["step"]],
        "accuracy": [validation_accuracy(first["metrics"]), validation_accuracy(last["metrics"])],
        **{name: [validation_mean(line["metrics"], name) for line in (first, last)] for name in names},
    }
    if seconds is not None:
        summary["seconds"] = round(seconds, 1)
    record.write_summary(summary)
    rows = {
        "held-out accuracy": "accuracy",
        "first turn calls the tool": "first_turn_call",
        "has a malformed call": "malformed_call",
        "has failing code": "tool_error",
        "turns": "turns",
    }
    print(f"\n{config.method} on {config.task.name}, seed {config.seed}")
    print(f"{'':28}{'step ' + str(first['step']):>10}{'step ' + str(last['step']):>10}")
    for label, key in rows.items():
        before, after = summary[key]
        if before is not None and after is not None:
            print(f"{label:28}{before:10.3f}{after:10.3f}")
    print(f"outputs: {record.dir}", flush=True)
    return summary


def _about(config: DictConfig) -> dict[str, Any]:
    return {
        "method": config.method,
        "task": config.task.name,
        "horizon": OmegaConf.select(config, "task.horizon"),
        "seed": config.seed,
    }
