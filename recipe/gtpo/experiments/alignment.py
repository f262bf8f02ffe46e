"""How far a method's gradient points where the outcome's does: cosines on the embedded policy, method by method.

    python -m recipe.gtpo.experiments.alignment --seeds 501,502 --after 0,15 task.horizon=4 [hydra overrides]

The outcome's gradient is that of the success rate alone: raw outcome minus the mean of its group, no scale, no format
penalty, no shaping, averaged over `--reference` batches. A method's gradient is that of one other batch; the row
"outcome" is that same estimate from one batch, so it is what sampling noise alone leaves. All methods read the same
batches. `--after`: steps of GRPO on the summed reward before the measurement.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from recipe.gtpo.experiments.twin import training
from recipe.gtpo.experiments.twin.rollout import Row, draw
from recipe.gtpo.experiments.twin.settings import Settings, refuse_unread
from recipe.gtpo.method.similarity import make_similarity
from recipe.gtpo.run.checks import ConfigError, compose, prepare
from recipe.gtpo.run.environment import settle
from recipe.gtpo.tasks.arithmetic.problems import sample_problems, step_mix

METHODS = ("gtpo", "grpo", "grpo_sum", "gtpo_no_shaping", "gtpo_undiscounted", "gtpo_no_turn_reward", "gtpo_turn",
           "gtpo_batch", "gtpo_batch_std", "gtpo_turn_batch_std", "gtpo_state", "gtpo_bootstrap",
           "gtpo_within_state", "grpo_outcome", "rloo", "gigpo", "mt_grpo")  # fmt: skip
#: The success rate's own gradient, in overrides.
OUTCOME = ("method=dr_grpo",)


def gradient(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    drawn: tuple[list[Row], list[str]],
    settings: Settings,
    pad_id: int,
) -> torch.Tensor:
    """(parameters,) the gradient that `optimizer` was given for its step on one batch (of `rollout.draw`)."""
    rows, groups = drawn
    shaping = settings.options.shaping
    similarity = make_similarity(shaping.similarity) if shaping.enable else None
    _, advantages, credit = training.turn_advantages([r.trajectory() for r in rows], groups, settings, similarity)
    training.update(model, optimizer, rows, *training.spread(rows, advantages, credit), pad_id, settings)
    # A parameter that got no gradient (no advantage anywhere) counts as 0.
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


def load(seed: int, methods: Sequence[str], overrides: Sequence[str]) -> dict[str, Settings]:
    """The settings of every method and of the outcome, on one seed. Raises ConfigError."""
    settings = {}
    for name, own in [("outcome", OUTCOME), *((name, (f"method={name}",)) for name in methods)]:
        config, _ = compose(f"seed={seed}", *overrides, *own)
        settings[name] = Settings.of(config, prepare(config))
    return settings


def _ascending(text: str) -> list[int]:
    """One training goes on from one number of steps to the next. Raises argparse.ArgumentTypeError."""
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: no numbers of steps, as in 0,20") from None
    if steps != sorted(set(steps)) or steps[0] < 0:
        raise argparse.ArgumentTypeError(f"{text}: each number of steps has to be larger than the one before")
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="501,502", help="of the warm starts and the problems")
    parser.add_argument("--after", type=_ascending, default=[0, 20], help="steps of grpo_sum, as 0,20")
    parser.add_argument("--methods", default=",".join(METHODS), help="of the config, comma-separated")
    parser.add_argument("--batches", type=int, default=6, help="measured, one cosine each")
    parser.add_argument("--reference", type=int, default=24, help="batches behind the outcome's gradient")
    args, overrides = parser.parse_known_args()
    named = args.methods.split(",")
    settle(overrides)
    torch.set_num_threads(1)
    cosines: dict[tuple[str, int], list[float]] = defaultdict(list)
    for seed in map(int, args.seeds.split(",")):
        try:
            refuse_unread(overrides)
            methods = load(seed, named, overrides)
        except ConfigError as e:
            print(f"alignment: error: {e}", file=sys.stderr)
            return 1
        torch.manual_seed(seed)
        grpo = load(seed, ["grpo_sum"], overrides)["grpo_sum"]
        model, stream = training.load_policy(grpo)
        still = torch.optim.SGD(model.parameters(), lr=0.0)
        adam = training.make_optimizer(model, grpo)
        source = sample_problems("train", seed, step_mix(grpo.task.horizon))

        def batch() -> tuple[list[Row], list[str]]:
            return draw(model, stream, source, grpo.rules, prompts=grpo.prompts, rollouts=grpo.rollouts)  # noqa: B023

        trained = 0
        for after in args.after:
            for _ in range(after - trained):
                gradient(model, adam, batch(), grpo, stream.pad_id)
            trained = after
            references = (
                gradient(model, still, batch(), methods["outcome"], stream.pad_id) for _ in range(args.reference)
            )
            reference = torch.stack(list(references)).mean(dim=0)
            for _ in range(args.batches):
                drawn = batch()
                for name, settings in methods.items():
                    found = gradient(model, still, drawn, settings, stream.pad_id)
                    cosines[name, after].append(float(torch.cosine_similarity(found, reference, dim=0)))
            print(f"seed {seed}, after {after} steps: done", file=sys.stderr, flush=True)
    print("| method | " + " | ".join(f"cosine after {n} steps" for n in args.after) + " |")
    print("| --- |" + " --- |" * len(args.after))
    for name in ("outcome", *named):
        shown = [f"{statistics.fmean(cosines[name, n]):.2f}" for n in args.after]
        print(f"| {name} | " + " | ".join(shown) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
