"""What credit assignment costs in a real run: its parts, timed on the trajectories that the run recorded.

    python benchmarks/credit.py outputs/arithmetic-gtpo-seed1

The share is of the median step of that run (metrics.jsonl). `glue` is what the trainer measured of the whole
(`gtpo/credit_seconds`): these parts, TransferQueue's round trips, and writing the trajectories to disk.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from any folder, installed or not

from recipe.gtpo.estimator import compute_gtpo_advantage
from recipe.gtpo.method.credit import assign_credit
from recipe.gtpo.method.metrics import credit_metrics
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.method.shaping import shape_outcomes
from recipe.gtpo.method.similarity import make_similarity
from recipe.gtpo.method.turns import Trajectory
from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.run.trajectories import Numbers, Row, training_lines

ROUNDS = 7


def median_ms(call: Callable[[], object]) -> float:
    """Median wall time of `call` in milliseconds, after one call that does not count."""
    call()
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def main() -> None:
    record = RunRecord(sys.argv[1])
    steps = [line["metrics"] for line in record.read_metrics() if "timing_s/step" in line["metrics"]]
    step_ms = statistics.median(m["timing_s/step"] for m in steps) * 1000
    recorded = record.trajectory_steps()
    rows = record.read_trajectories(recorded[len(recorded) // 2])
    trajectories, groups = [Trajectory.from_dict(row) for row in rows], [row["group"] for row in rows]
    options = GTPOOptions()
    similarity = make_similarity(options.shaping.similarity)
    credit = assign_credit(trajectories, groups, options, similarity)
    length = int(credit.spans.max())
    turn_ids = credit.turn_ids(length)
    rewards = torch.stack(credit.token_rewards([length] * len(rows)))
    mask = (turn_ids >= 0).long()
    codes = [t.code for t in trajectories]
    by_turn = torch.zeros(credit.turn_mask.shape)
    gaps = [torch.zeros(length)] * len(rows)
    numbers = Numbers.of(credit, by_turn, "gtpo", options, torch.zeros(len(rows), length), gaps)
    prompt = [{"role": "user", "content": "x" * 500}]
    sources = [Row(group, 0, prompt=prompt, token_ids=range(length)) for group in groups]
    scratch = RunRecord(tempfile.mkdtemp())

    def write_records() -> None:
        scratch.write_trajectories(1, training_lines(1, 1, trajectories, sources, numbers))

    parts: dict[str, Callable[[], object]] = {
        "shaping": lambda: shape_outcomes(
            credit.outcomes, credit.solved, codes, groups, similarity, options.shaping.alpha
        ),
        "credit (shaping included)": lambda: assign_credit(trajectories, groups, options, similarity),
        "advantage": lambda: compute_gtpo_advantage(rewards, mask, groups, turn_ids=turn_ids),
        "metrics": lambda: credit_metrics(credit, trajectories, by_turn, by_turn),
        "records (in a thread of their own)": write_records,
    }
    print(f"{len(rows)} trajectories, median step {step_ms:.0f} ms, {len(steps)} steps\n")
    print("| part | ms | share of the step |\n|---|---|---|")
    for name, call in parts.items():
        ms = median_ms(call)
        print(f"| {name} | {ms:.1f} | {ms / step_ms:.2%} |")
    glue = statistics.median(m["gtpo/credit_seconds"] for m in steps) * 1000
    print(f"| glue, as the trainer measured it | {glue:.1f} | {glue / step_ms:.2%} |")


if __name__ == "__main__":
    main()
