"""What GTPO's advantage costs, beside verl's GRPO and a loop over rows: seconds, ratios and peak memory.

    python benchmarks/advantage.py [--rounds 5] [--threads N]

All four run on the same batch, in turns, in one process (the row loop in the first two rounds only). Ratios are of the
best times, which other work on the machine disturbs least; medians stand beside them. The batch: 8 trajectories a
prompt, 1 to 16 turns each, rows padded to the longest, verl's dtypes (rewards float32, mask int64), turn ids int16 as
`Credit.turn_ids` makes them, the outcome on the last response token.

Memory is what one call adds to the process's peak resident set (Linux: VmHWM, reset before the call), in units of one
(batch, length) float32 buffer, with every buffer mapped and unmapped on its own so that nothing freed is reused unseen.
The two results count: advantages and returns are one unit each (verl's GRPO returns one tensor twice).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from recipe.gtpo.estimator import compute_gtpo_advantage

SIZES = ((512, 4096), (2048, 16384))
TURNS = 16
GROUP = 8


def make_batch(batch: int, length: int) -> dict:
    """A ragged batch, filled in place: building it leaves no larger footprint than the tensors themselves."""
    rng = np.random.default_rng(0)
    rewards = torch.zeros(batch, length)
    mask = torch.zeros(batch, length, dtype=torch.long)
    turn_ids = torch.full((batch, length), -1, dtype=torch.int16)
    for i in range(batch):
        turns = int(rng.integers(1, TURNS + 1)) if i else TURNS
        end = length if i == 0 else int(rng.integers(length // 4, length + 1))
        cuts = np.linspace(0, end, turns + 1).astype(int)
        for k in range(turns):
            generated = max(1, (cuts[k + 1] - cuts[k]) * 3 // 4)  # the rest is what the tool answered
            mask[i, cuts[k] : cuts[k] + generated] = 1
            turn_ids[i, cuts[k] : cuts[k] + generated] = k
        rewards[i, end - 1] = float(rng.random() < 0.5)
    uids = np.array([f"prompt-{i // GROUP}" for i in range(batch)], dtype=object)
    return {"token_level_rewards": rewards, "response_mask": mask, "index": uids, "turn_ids": turn_ids}


def row_loop(token_level_rewards, response_mask, index, turn_ids, gamma: float = 0.9):
    """The same result as paper code writes it: walk every row's mask for its turns, then every turn of every row."""
    batch, length = response_mask.shape
    spans, returns, pools = [], [], defaultdict(list)
    for i in range(batch):
        row = response_mask[i].tolist()
        starts = [t for t in range(length) if row[t] and (t == 0 or not row[t - 1])]
        ends = [t + 1 for t in range(length) if row[t] and (t == length - 1 or not row[t + 1])]
        spans.append(list(zip(starts, ends, strict=True)))
        edges = [0, *starts[1:], length]
        rewards = [float(token_level_rewards[i, a:b].sum()) for a, b in itertools.pairwise(edges)]
        total, discounted = 0.0, []
        for reward in reversed(rewards):
            total = reward + gamma * total
            discounted.append(total)
        returns.append(discounted[::-1])
        pools[index[i]].extend(returns[i])
    advantages, token_returns = torch.zeros(batch, length), torch.zeros(batch, length)
    for i in range(batch):
        pool = torch.tensor(pools[index[i]])
        mean, std = pool.mean(), pool.std()
        for (start, end), value in zip(spans[i], returns[i], strict=True):
            token_returns[i, start:end] = value
            advantages[i, start:end] = (value - mean) / (std + 1e-6)
    return advantages, token_returns


def verl_grpo(token_level_rewards, response_mask, index, turn_ids):
    return compute_grpo_outcome_advantage(token_level_rewards, response_mask, index)


def gtpo_from_mask(token_level_rewards, response_mask, index, turn_ids):
    return compute_gtpo_advantage(token_level_rewards, response_mask, index)


CONTENDERS: dict[str, Callable] = {
    "verl GRPO": verl_grpo,
    "GTPO, recorded turns": compute_gtpo_advantage,
    "GTPO, turns from the mask": gtpo_from_mask,
    "row loop": row_loop,
}


def compare(batch: int, length: int, rounds: int) -> None:
    inputs = make_batch(batch, length)
    expected, actual = row_loop(**inputs), compute_gtpo_advantage(**inputs)
    for a, b in zip(expected, actual, strict=True):  # equal work, or the ratio means nothing
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    seconds = defaultdict(list)
    for round_ in range(rounds + 1):
        for name, contender in CONTENDERS.items():
            if contender is row_loop and round_ > 2:
                continue
            began = time.perf_counter()
            result = contender(**inputs)
            if round_:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
            del result
    buffers = extra_buffers(batch, length)
    best = {name: min(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(
            f"| {batch} x {length} | {name} | {best[name] * 1e3:.1f} | {statistics.median(values) * 1e3:.1f} "
            f"| {best[name] / best['verl GRPO']:.2f} | {best['row loop'] / best[name]:.1f} | {buffers[name]:.2f} |",
            flush=True,
        )


def extra_buffers(batch: int, length: int) -> dict[str, float]:
    """Peak memory of one call of each beyond its inputs, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", str(batch), str(length)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(answer.splitlines()[-1])


def measure_memory(batch: int, length: int) -> None:
    inputs, buffers = make_batch(batch, length), {}
    for name, contender in CONTENDERS.items():
        contender(**make_batch(16, 64))  # what the first call of anything allocates
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
        before = _status("VmRSS")
        result = contender(**inputs)
        buffers[name] = (_status("VmHWM") - before) / (batch * length * 4)
        del result
    print(json.dumps(buffers))


def _status(field: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--memory-of", nargs=2, type=int, metavar=("BATCH", "LENGTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        measure_memory(*args.memory_of)
        return
    print(f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds\n")
    print("| batch x length | | best ms | median ms | time / verl GRPO | row loop / time | extra buffers |")
    print("|---|---|---|---|---|---|---|")
    for batch, length in SIZES:
        compare(batch, length, args.rounds)


if __name__ == "__main__":
    main()
