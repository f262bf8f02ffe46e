"""The warm start of the embedded policy: supervised fine-tuning on an imperfect expert, once, then from a cache.

    python -m recipe.gtpo.tasks.warm_start --out outputs/warm_start --seed 1

A random model never emits a valid call, so reinforcement learning would have nothing to reinforce. After this the
policy copies numbers reliably and knows the format, and it repeats the expert's mistakes at the expert's rates.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from recipe.gtpo.tasks.arithmetic import (
    HORIZON,
    MAX_CODE_LENGTH,
    SYSTEM_MESSAGE,
    check_horizon,
    sample_problems,
    tool_schema,
)
from recipe.gtpo.tasks.experts import FAULT_MIX, Demonstration, FaultMix, demonstrate, scale_faults
from recipe.gtpo.tasks.policy import CHAT_TEMPLATE, TOOL_TAGS, TokenStream, build_model, train_tokenizer

IGNORE = -100  # label of a token that is not trained on


@dataclass(frozen=True)
class WarmStartOptions:
    """All that decides the warm start. Two equal sets of options share one cache entry."""

    seed: int = 1
    horizon: Mapping[int, float] = field(default_factory=lambda: dict(HORIZON))
    fault_mix: FaultMix = field(default_factory=lambda: FAULT_MIX)
    fault_scale: float = 1.0  # times every probability of fault_mix: the knob of the success rate
    # model
    vocab_size: int = 512
    hidden_size: int = 64  # narrow and deep: at 96 x 3 and 128 x 3 copying took 1.5 to 3 times the steps, dearer ones
    layers: int = 4
    heads: int = 2  # of 32; heads of 16 took twice the steps
    intermediate_size: int = 128
    # supervised fine-tuning
    steps: int = 1300
    drill_steps: int = 200  # so many of the steps, every other one from the first on, drill copying
    clean_steps: int = 900  # until this step the expert makes no mistake: the skill first, then the habits
    batch_size: int = (
        8  # conversations, or twice as many drills: many small steps find copying sooner than few large ones
    )
    learning_rate: float = 4e-3

    def __post_init__(self) -> None:
        # Plain containers, whatever the caller's config library uses; malformed ones are refused before any work.
        object.__setattr__(self, "horizon", check_horizon(self.horizon))
        object.__setattr__(self, "fault_mix", scale_faults(self.fault_mix, 1.0))
        scale_faults(self.fault_mix, self.fault_scale)

    @property
    def key(self) -> str:
        """Cache key: the options, the code that turns them into weights, and the libraries that run it."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for name in ("arithmetic.py", "calculator.py", "experts.py", "policy.py", "warm_start.py", "../parsing.py"):
            digest.update((Path(__file__).parent / name).read_bytes())
        digest.update(CHAT_TEMPLATE.read_bytes())
        digest.update(f"{torch.__version__} {transformers.__version__}".encode())
        return digest.hexdigest()[:16]


def demonstrations(options: WarmStartOptions, fault_scale: float) -> Iterator[Demonstration]:
    """Endless demonstrations on problems of the train split, with the option's faults times `fault_scale`."""
    rng = random.Random(f"demonstrations/{options.seed}/{fault_scale}")
    mix = scale_faults(options.fault_mix, fault_scale)
    for problem in sample_problems("train", options.seed, options.horizon):
        yield demonstrate(problem, mix, rng)


def encode(demonstration: Demonstration, stream: TokenStream) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation, both of the same length. Labels are IGNORE outside assistant turns."""
    ids = stream.prompt(demonstration.problem.messages)
    labels = [IGNORE] * len(ids)
    for text, replies in zip(demonstration.turns, demonstration.replies, strict=True):
        turn = stream.turn(text)
        ids += turn
        labels += turn
        if replies:
            observation = stream.observation(replies)
            ids += observation
            labels += [IGNORE] * len(observation)
    return ids, labels


def corpus(conversations: list[Demonstration]) -> Iterator[str]:
    """Text for the tokenizer: what users, tools and the assistant say, and what the template adds to it."""
    for c in conversations:
        yield f"system\n{SYSTEM_MESSAGE}\n<tools>\npython(code: string[{MAX_CODE_LENGTH}])\n</tools>"
        yield f"user\n{c.problem.question}"
        for text, replies in zip(c.turns, c.replies, strict=True):
            for tag in TOOL_TAGS:
                text = text.replace(tag, "\n")
            yield f"assistant\n{text}"
            for reply in replies:
                yield f"user\n<tool_response>\n{reply}\n</tool_response>"


def train(options: WarmStartOptions, directory: str | Path, *, progress: bool = True) -> None:
    """Build tokenizer and model, train, and save both into `directory`, which must exist."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # batches this small gain nothing from a second thread, and the result stays reproducible
    try:
        _train(options, Path(directory), progress)
    finally:
        torch.set_num_threads(threads)


def _train(options: WarmStartOptions, directory: Path, progress: bool) -> None:
    torch.manual_seed(options.seed)
    clean, faulty = demonstrations(options, 0.0), demonstrations(options, options.fault_scale)
    rng = random.Random(f"drill/{options.seed}")
    tokenizer = train_tokenizer(corpus(list(islice(faulty, 1000))), options.vocab_size, directory)
    stream = TokenStream(tokenizer, [tool_schema()])
    model = build_model(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        layers=options.layers,
        heads=options.heads,
        intermediate_size=options.intermediate_size,
        eos_id=stream.eos_id,
        pad_id=stream.pad_id,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1.02 - step / options.steps)
    )
    bar = tqdm(range(options.steps), desc="warm start", unit="step", disable=not progress)
    for step in bar:
        if step % 2 == 0 and step < 2 * options.drill_steps:
            batch = [drill(stream, rng) for _ in range(2 * options.batch_size)]
        else:
            source = clean if step < options.clean_steps else faulty
            batch = [encode(next(source), stream) for _ in range(options.batch_size)]
        ids = pad([x for x, _ in batch], stream.pad_id)
        labels = pad([y for _, y in batch], IGNORE)
        # Right padding and causal attention: no token attends to padding, so no mask is needed (and sdpa is faster).
        hidden = model.model(ids[:, :-1]).last_hidden_state
        wanted = labels[:, 1:] != IGNORE
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), labels[:, 1:][wanted])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.save_pretrained(directory)


def drill(stream: TokenStream, rng: random.Random) -> tuple[list[int], list[int]]:
    """Token ids and labels of a line of three random numbers, said twice; the second time is trained on.

    Without it the policy needs several times the tokens to find out that numbers can be copied: in a conversation few
    tokens are copies, and each needs its source to be found first.
    """
    numbers = [rng.randrange(10 ** (digits - 1), 10**digits) for digits in rng.choices(range(2, 7), k=3)]
    line = stream.encode(" " + " ".join(map(str, numbers)) + ".")
    return line + line, [IGNORE] * len(line) + line


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """Rows of different lengths as one right-padded (len(rows), longest) tensor."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def ensure_warm_start(options: WarmStartOptions, cache_directory: str | Path, *, progress: bool = True) -> Path:
    """The directory of a trained policy (model, tokenizer, `warm_start.json`), trained now or found in the cache.

    An entry appears by one rename, so a killed or a concurrent run never leaves half of one behind.
    """
    target = Path(cache_directory) / options.key
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        train(options, partial, progress=progress)
        (partial / "warm_start.json").write_text(json.dumps(asdict(options), indent=1))
        os.chmod(partial, 0o755)  # mkdtemp makes it private
        try:
            partial.rename(target)
        except OSError:
            if not target.exists():  # anything but a concurrent run that was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="cache directory; the policy lands in OUT/<key>")
    parser.add_argument("--seed", type=int, default=WarmStartOptions.seed)
    parser.add_argument("--fault-scale", type=float, default=WarmStartOptions.fault_scale)
    args = parser.parse_args()
    print(ensure_warm_start(WarmStartOptions(seed=args.seed, fault_scale=args.fault_scale), args.out))


if __name__ == "__main__":
    main()
