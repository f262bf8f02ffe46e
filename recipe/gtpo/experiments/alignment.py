"""How far a method's gradient points where the outcome's does: cosines on the embedded policy, method by method.

    python -m recipe.gtpo.experiments.alignment --seeds 501,502 --horizon 4 --after 0 15

The outcome's gradient is that of the success rate alone: raw outcome minus the mean of its group, no scale, no format
penalty, no shaping, averaged over `--reference` batches. A method's gradient is that of one other batch; the row
"outcome" is that same estimate from one batch, so it is what sampling noise alone leaves. All methods read the same
batches. `--after`: steps of GRPO before the measurement.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from recipe.gtpo.experiments import twin
from recipe.gtpo.method.options import GTPOOptions, ShapingOptions
from recipe.gtpo.method.similarity import make_similarity
from recipe.gtpo.tasks.arithmetic.policy import TokenStream
from recipe.gtpo.tasks.arithmetic.problems import HORIZON, Limits, sample_problems, step_mix, tool_schema
from recipe.gtpo.tasks.arithmetic.warm_start import BaseOptions, WarmStartOptions, ensure_warm_start

METHODS = ("gtpo", "grpo", "gtpo_no_shaping", "gtpo_no_return", "gtpo_no_turn_reward", "gtpo_turn", "gtpo_batch",
           "gtpo_batch_std", "gtpo_turn_batch_std")  # fmt: skip
OUTCOME = twin.Method(
    "grpo", replace(GTPOOptions(), format_penalty=0.0, shaping=ShapingOptions(enable=False)), scale_by_std=False
)


def gradient(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    drawn: tuple[list[twin.Conversation], list[str]],
    method: twin.Method,
    pad_id: int,
) -> torch.Tensor:
    """(parameters,) the gradient that `optimizer` was given for its step on one batch (of `twin.draw`)."""
    conversations, groups = drawn
    shaping = method.options.shaping
    similarity = make_similarity(shaping.similarity) if shaping.enable else None
    trajectories = [c.trajectory() for c in conversations]
    _, advantages, credit = twin.turn_advantages(trajectories, groups, method, similarity)
    twin.update(model, optimizer, conversations, *twin.spread(conversations, advantages, credit), pad_id)
    # A parameter that got no gradient (no advantage anywhere) counts as 0.
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="501,502", help="of the warm starts and the problems")
    parser.add_argument("--horizon", type=int, default=HORIZON, help="the longest number of dependent calls, 1 to 6")
    parser.add_argument("--after", type=int, nargs="+", default=[0, 20], help="steps of GRPO, ascending")
    parser.add_argument("--lr", type=float, default=5e-4, help="of those steps")
    parser.add_argument("--batches", type=int, default=6, help="measured, one cosine each")
    parser.add_argument("--reference", type=int, default=24, help="batches behind the outcome's gradient")
    parser.add_argument("--cache", type=Path, default=Path("outputs/embedded/policies"), help="of warm starts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    limits = Limits.of(args.horizon)
    methods = {"outcome": OUTCOME} | {name: twin.Method.load(name, []) for name in METHODS}
    cosines: dict[tuple[str, int], list[float]] = defaultdict(list)
    for seed in map(int, args.seeds.split(",")):
        torch.manual_seed(seed)
        policy = ensure_warm_start(WarmStartOptions(seed=seed, base=BaseOptions(horizon=args.horizon)), args.cache)
        stream = TokenStream(AutoTokenizer.from_pretrained(policy), [tool_schema()])
        model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
        still = torch.optim.SGD(model.parameters(), lr=0.0)
        adam = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
        source = sample_problems("train", seed, step_mix(args.horizon))
        trained = 0
        for after in args.after:
            for _ in range(after - trained):
                gradient(model, adam, twin.draw(model, stream, source, limits), methods["grpo"], stream.pad_id)
            trained = after
            reference = torch.stack(
                [
                    gradient(model, still, twin.draw(model, stream, source, limits), OUTCOME, stream.pad_id)
                    for _ in range(args.reference)
                ]
            ).mean(dim=0)
            for _ in range(args.batches):
                drawn = twin.draw(model, stream, source, limits)
                for name, method in methods.items():
                    found = gradient(model, still, drawn, method, stream.pad_id)
                    cosines[name, after].append(float(torch.cosine_similarity(found, reference, dim=0)))
            print(f"seed {seed}, after {after} steps: done", file=sys.stderr, flush=True)
    print("| method | " + " | ".join(f"cosine after {n} steps" for n in args.after) + " |")
    print("| --- |" + " --- |" * len(args.after))
    for name in methods:
        shown = [f"{statistics.fmean(cosines[name, n]):.2f}" for n in args.after]
        print(f"| {name} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
