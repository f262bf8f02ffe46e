"""What credit assignment costs in a real run: its parts, timed on the trajectories that the run recorded.

    python benchmarks/credit.py outputs/arithmetic-gtpo-seed1

The share is of the median step of that run (metrics.jsonl). `glue` is what the trainer measured of the whole
(`gtpo/credit_seconds`): these parts and TransferQueue's round trips. What the record costs is in two parts: what the
training waits for, and the processor time of a thread of its own while the policy is updated, with its bytes on disk.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
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
from verl_ext.records import Reader, Record

ROUNDS = 7


def median_ms(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Median time of `call` in milliseconds, after one call that does not count."""
    call()
    times = []
    for _ in range(ROUNDS):
        began = clock()
        call()
        times.append(clock() - began)
    return statistics.median(times) * 1000


def row_of(record: Record, length: int) -> Row:
    """Where a recorded trajectory came from, with a response of `length` tokens."""
    token_ids = [0] * length
    for turn in record.turns:
        if turn.token_ids is not None:
            token_ids[turn.start : turn.end] = turn.token_ids
    prompt = None if record.prompt is None else [message.model_dump() for message in record.prompt]
    return Row(record.group, record.session or 0, record.index, record.data_source, prompt, record.gold, (), token_ids)


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
    sources = [row_of(one, length) for one in Reader(sys.argv[1]).read(recorded[len(recorded) // 2])]
    log_probs, gaps = torch.rand(len(rows), length), list(torch.rand(len(rows), length) - 0.5)

    def numbers() -> Numbers:
        return Numbers.of(credit, by_turn, "gtpo", options, log_probs, gaps)

    parts: dict[str, Callable[[], object]] = {
        "shaping": lambda: shape_outcomes(
            credit.outcomes, credit.solved, codes, groups, similarity, options.shaping.alpha
        ),
        "credit (shaping included)": lambda: assign_credit(trajectories, groups, options, similarity),
        "advantage": lambda: compute_gtpo_advantage(rewards, mask, groups, turn_ids=turn_ids),
        "metrics": lambda: credit_metrics(credit, trajectories, by_turn, by_turn),
        "record, while the training waits": numbers,
    }
    print(f"{len(rows)} trajectories, median step {step_ms:.0f} ms, {len(steps)} steps\n")
    print("| part | ms | share of the step |\n|---|---|---|")
    for name, call in parts.items():
        ms = median_ms(call)
        print(f"| {name} | {ms:.1f} | {ms / step_ms:.2%} |")
    with tempfile.TemporaryDirectory() as folder:
        for name, compress in (("record, in its own thread", False), ("the same, compressed", True)):
            out = RunRecord(folder, compress=compress)
            lines = partial(training_lines, 1, 1, trajectories, sources, numbers())
            ms = median_ms(lambda: out.write_trajectories(1, lines()), time.process_time)  # noqa: B023
            size = Reader(folder).files()[1].stat().st_size / len(rows)
            print(f"| {name}: {size:.0f} bytes a trajectory | {ms:.1f} | {ms / step_ms:.2%} |")
    measured = [m["gtpo/credit_seconds"] * 1000 for m in steps if "gtpo/credit_seconds" in m]  # not in plain PyTorch
    if measured:
        glue = statistics.median(measured)
        print(f"| glue, as the trainer measured it | {glue:.1f} | {glue / step_ms:.2%} |")


if __name__ == "__main__":
    main()
