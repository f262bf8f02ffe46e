"""What reward shaping costs, by similarity backend, and as a share of a training step.

    python benchmarks/shaping.py --step-seconds 60 [--backends token_jaccard tfidf sentence] [--device cpu]

64 groups x 16 trajectories, half of them solved, each with a program of its own of 600 tokens (words and punctuation
marks), nothing cached: the dearest step there is, since every group needs every comparison. `--step-seconds` is the
time of one training step *you* measured; without it the share is not shown. A backend with a model is timed on fewer
groups and scaled up (its time is proportional to the texts); the table says on how many. The `http` backend costs what
its server costs: give `--url` and `--model` to time it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from recipe.gtpo.method.options import SimilarityOptions
from recipe.gtpo.method.shaping import shape_outcomes
from recipe.gtpo.method.similarity import make_similarity

GROUPS, SIZE, TOKENS = 64, 16, 600
#: Groups timed, where all of them would take minutes on a CPU.
SAMPLE = {"sentence": 2}


def make_programs(groups: int) -> tuple[torch.Tensor, list[str], list[str]]:
    """Outcomes, codes and group ids. The programs of a group are one program with a tenth of its lines rewritten."""
    rng = random.Random(0)
    names = [f"{stem}{i}" for stem in ("x", "total", "count", "value", "step") for i in range(20)]

    def line() -> str:  # 10 tokens
        a, b, c = rng.choices(names, k=3)
        return f"{a} = ({b} + {rng.randrange(100)}) {rng.choice('+-*')} {c}"

    outcomes, codes, group_ids = [], [], []
    for g in range(groups):
        common = [line() for _ in range(TOKENS // 9)]
        for i in range(SIZE):
            codes.append("\n".join(line() if rng.random() < 0.1 else same for same in common))
            outcomes.append(float(i % 2))
            group_ids.append(f"prompt-{g}")
    return torch.tensor(outcomes), codes, group_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-seconds", type=float, help="seconds of one training step, measured by you")
    parser.add_argument("--backends", nargs="+", default=["token_jaccard", "tfidf", "sentence"])
    parser.add_argument("--device", default="cpu", help="of the sentence backend")
    parser.add_argument("--model", default=SimilarityOptions.model)
    parser.add_argument("--url", default="", help="of the http backend")
    parser.add_argument("--all-groups", action="store_true", help="time every backend on all groups")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    share = f" | best / a {args.step_seconds:g} s step" if args.step_seconds else ""
    print(f"{GROUPS} groups x {SIZE} programs of {TOKENS} tokens, {args.rounds} rounds\n")
    print(f"| backend | groups timed | best s | median s{share} |")
    print("|---|---|---|---|" + ("---|" if share else ""))
    for name in args.backends:
        groups = GROUPS if args.all_groups else SAMPLE.get(name, GROUPS)
        outcomes, codes, group_ids = make_programs(groups)
        options = SimilarityOptions(backend=name, device=args.device, model=args.model, url=args.url)
        seconds = []
        for _ in range(args.rounds):
            similarity = make_similarity(options)  # loading a model is not the step's, and the cache starts empty
            began = time.perf_counter()
            shape_outcomes(outcomes, outcomes == 1, codes, group_ids, similarity, alpha=0.5)
            seconds.append(time.perf_counter() - began)
        best, median = (f(seconds) * GROUPS / groups for f in (min, statistics.median))
        last = f" {best / args.step_seconds:.2%} |" if share else ""
        print(f"| {name} | {groups} | {best:.2f} | {median:.2f} |{last}", flush=True)


if __name__ == "__main__":
    main()
