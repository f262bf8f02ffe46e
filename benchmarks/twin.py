"""What decoding costs in the plain-PyTorch engine, beside the same decoder without its layout in memory.

    python benchmarks/twin.py outputs/embedded/policies/KEY [horizon]

Processor seconds of one thread for the rollouts of a training step (16 problems x 8), of a validation on the way (256)
and of the last one (1024), each measured with both decoders in turn; the least of `ROUNDS`. Says whether both sampled
the same tokens with the same log-probs, bit for bit, and how much arithmetic a second decoding does, beside what a
large matrix product does in the same run: no order of the work can make it faster than that.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from any folder, installed or not
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from plain_decoder import PlainDecoder

from recipe.gtpo.conversation import Rules
from recipe.gtpo.experiments.twin import rollout
from recipe.gtpo.experiments.twin.decoder import Decoder
from recipe.gtpo.tasks.arithmetic.policy import TokenStream
from recipe.gtpo.tasks.arithmetic.problems import Limits, sample_problems, step_mix, take, tool_schema
from recipe.gtpo.tasks.task import boxed

ROUNDS = 2
SIZES = {"training step, 16 x 8": (16, 8), "validation, 256": (256, 1), "last validation, 1024": (1024, 1)}


def main() -> None:
    policy, horizon = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 6
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    stream = TokenStream(AutoTokenizer.from_pretrained(policy), [tool_schema()])
    limits = Limits.of(horizon)
    schemas = {"python": tool_schema()["function"]["parameters"]}
    rules = Rules(schemas, boxed, response_length=limits.response, max_turns=limits.turns)
    for name, (prompts, rollouts) in SIZES.items():
        problems = take(sample_problems("validation", 0, step_mix(horizon)), prompts)
        problems = [problem for problem in problems for _ in range(rollouts)]
        seconds: dict[type, list[float]] = {Decoder: [], PlainDecoder: []}
        said = {}
        for _ in range(ROUNDS):
            for decoder in (PlainDecoder, Decoder):
                torch.manual_seed(0)
                rollout.Decoder = decoder
                began = time.process_time()
                rows = rollout.roll_out(model, stream, problems, rules)
                seconds[decoder].append(time.process_time() - began)
                said[decoder] = [(row.ids, row.log_probs) for row in rows]
        plain, ours = min(seconds[PlainDecoder]), min(seconds[Decoder])
        equal = "equal" if said[Decoder] == said[PlainDecoder] else "DIFFERENT"
        print(f"{name}: plain {plain:.2f} s, laid out {ours:.2f} s, ratio {plain / ours:.2f}, {equal}", flush=True)
        print(
            f"    {operations(model, rows) / ours / 1e9:.0f} GFLOP/s; a matrix product {product() / 1e9:.0f}",
            flush=True,
        )


def operations(model: PreTrainedModel, rows: Sequence[rollout.Row]) -> float:
    """That the responses need: two a weight and token, four a channel, layer, token and key that it attends to."""
    weights = sum(one.numel() for one in model.parameters() if one.dim() == 2)  # the head's are the embedding's
    channels = model.config.hidden_size * model.config.num_hidden_layers
    lengths = [(row.prompt_length, row.response_length) for row in rows]
    return sum(2 * weights * n + 4 * channels * (prompt * n + n * n / 2) for prompt, n in lengths)


def product(size: int = 1024) -> float:
    """Operations a second of a square matrix product of one thread: the best of ten."""
    one = torch.randn(size, size)
    seconds = []
    for _ in range(10):
        began = time.process_time()
        one @ one
        seconds.append(time.process_time() - began)
    return 2 * size**3 / min(seconds)


if __name__ == "__main__":
    main()
