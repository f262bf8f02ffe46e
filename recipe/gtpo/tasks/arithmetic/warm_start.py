"""The warm start of the embedded policy: supervised fine-tuning on an imperfect expert, once, then from a cache.

    python -m recipe.gtpo.tasks.arithmetic.warm_start --out outputs/warm_start --seed 1

A random model never emits a valid call, so reinforcement learning would have nothing to reinforce. Two parts:

1. The *base*: a faultless expert is imitated until the policy's own greedy decoding solves what it is shown, however
   many steps that takes. One base serves every seed of a horizon; other horizons than the default start from its base,
   and are a running mean of the weights.
2. The *habits*: from the base, a fixed number of steps on an expert that errs. The policy comes to repeat its mistakes
   at the expert's rates; which ones, is the seed's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
import transformers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from recipe.gtpo import conversation, parsing
from recipe.gtpo.models.cache import make_once
from recipe.gtpo.tasks.arithmetic import calculator, experts, policy, problems
from recipe.gtpo.tasks.arithmetic.experts import (
    FAULT_MIX,
    FAULT_MIXES,
    REMARKS,
    Demonstration,
    FaultMix,
    demonstrate,
    faults_for,
    scale_faults,
)
from recipe.gtpo.tasks.arithmetic.policy import CHAT_TEMPLATE, TOOL_TAGS, TokenStream, build_model, train_tokenizer
from recipe.gtpo.tasks.arithmetic.problems import (
    HORIZON,
    MAX_CODE_LENGTH,
    SYSTEM_MESSAGE,
    sample_problems,
    step_mix,
    tool_schema,
)

IGNORE = -100  # label of a token that is not trained on
_FAULTLESS = scale_faults(FAULT_MIX, 0.0)
_SKILL_SAMPLE = 128  # conversations behind one measurement of the skill
#: What a step leaves of the running mean of weights. At horizon 6 the mean solves 95% after two thirds of the steps
#: that the weights need, whose errors the rate keeps alive; at the default horizon both do after as many
#: (benchmarks/README.md).
_AVERAGING = 0.98


class SkillNotReachedError(RuntimeError):
    """The base did not learn its task within its limit of steps."""


@dataclass(frozen=True)
class BaseOptions:
    """All that decides the base."""

    horizon: int = HORIZON
    # model
    vocab_size: int = 512
    hidden_size: int = 64  # narrow and deep: at 96 x 3 and 128 x 3 copying took 1.5 to 3 times the steps, dearer ones
    layers: int = 4
    heads: int = 2  # of 32; heads of 16 took twice the steps
    intermediate_size: int = 128
    # training
    skill: float = 0.95  # share of held-out problems that greedy decoding must solve
    check_every: int = 100  # steps
    max_steps: int = 4000
    decay_steps: int = 1300  # the learning rate falls to a tenth over these and stays there
    drill_steps: int = 200  # so many of the steps, every other one from the first on, drill copying
    batch_size: int = 8  # conversations, or twice as many drills: many small steps beat few big ones
    learning_rate: float = 4e-3

    def __post_init__(self) -> None:
        step_mix(self.horizon)  # refused before any work

    @property
    def key(self) -> str:
        return _key(asdict(self))


@dataclass(frozen=True)
class WarmStartOptions:
    """All that decides the warm start. Two equal sets of options share one cache entry."""

    seed: int = 1  # of the habits; the base has none of its own
    success: float = 0.2  # of the expert (`experts.faults_for`): the knob of the success rate
    faults_in: str = "everywhere"  # the expert's faults, by name (`experts.FAULT_MIXES`)
    talks: bool = False  # the expert says one of `experts.REMARKS` before every call and answer
    steps: int = 400
    batch_size: int = 8
    learning_rate: float = 1.3e-3  # at the first step, falling to almost 0
    base: BaseOptions = BaseOptions()

    def __post_init__(self) -> None:
        if self.faults_in not in FAULT_MIXES:
            raise ValueError(f"faults_in={self.faults_in!r} is not one of {', '.join(FAULT_MIXES)}")
        _ = self.faults  # refused before any work

    @property
    def key(self) -> str:
        return _key(asdict(self))

    @cached_property
    def faults(self) -> FaultMix:
        """Raises ValueError where `success` is out of reach."""
        return faults_for(self.success, step_mix(self.base.horizon), FAULT_MIXES[self.faults_in])


def _key(options: dict) -> str:
    """Cache key: the options, the code that turns them into weights, and the libraries that run it."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for module in (problems, calculator, experts, policy, parsing, conversation):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    digest.update(CHAT_TEMPLATE.read_bytes())
    digest.update(f"{torch.__version__} {transformers.__version__}".encode())
    return digest.hexdigest()[:16]


def demonstrations(
    horizon: int, faults: FaultMix, seed: int, split: str = "train", remarks: Sequence[str] = ()
) -> Iterator[Demonstration]:
    """Endless demonstrations of an expert with the given faults, who says one of `remarks` before every turn."""
    rng = random.Random(f"demonstrations/{seed}")
    for problem in sample_problems(split, seed, step_mix(horizon)):
        yield demonstrate(problem, faults, rng, remarks)


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


@contextmanager
def _one_thread() -> Iterator[None]:
    """Batches this small gain nothing from a second thread; the result stays reproducible."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def train_base(options: BaseOptions, start: Path | None, directory: Path, *, progress: bool = True) -> None:
    """Train until the skill is there, from the policy in `start` or from scratch; save into `directory`, which exists.

    Raises SkillNotReachedError after `max_steps`.
    """
    torch.manual_seed(0)
    if start is None:
        spoken = islice(demonstrations(options.horizon, FAULT_MIX, seed=0), 1000)
        tokenizer = train_tokenizer(corpus(list(spoken)), options.vocab_size, directory)
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
    else:
        model, stream = _load(start, directory)
    source = demonstrations(options.horizon, _FAULTLESS, seed=0)
    held_out = demonstrations(options.horizon, _FAULTLESS, seed=0, split="validation")
    unseen = [encode(shown, stream) for shown in islice(held_out, _SKILL_SAMPLE)]
    rng = random.Random("drill/0")
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 64, max(1.0 - step / options.decay_steps, 0.1))
    )
    average = None if start is None else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(_AVERAGING))
    reached = 0.0
    with tqdm(total=options.max_steps, desc="base policy", unit="step", disable=not progress) as bar:
        for step in range(options.max_steps):
            if start is None and step % 2 == 0 and step < 2 * options.drill_steps:
                batch = [drill(stream, rng) for _ in range(2 * options.batch_size)]
            else:
                batch = [encode(shown, stream) for shown in islice(source, options.batch_size)]
            loss = _fit(model, optimizer, schedule, batch, stream.pad_id)
            if average is not None:
                average.update_parameters(model)
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", solved=f"{reached:.2f}", refresh=False)
            if (step + 1) % options.check_every == 0:
                base = model if average is None else average.module
                reached = skill(base, unseen, stream.pad_id)
                if reached >= options.skill:
                    base.save_pretrained(directory)
                    return
    raise SkillNotReachedError(
        f"the base policy solves {reached:.2f} of its problems after {options.max_steps} steps, not {options.skill}: "
        "give it more (task.warm_start={base: {max_steps: ...}})"
    )


@_one_thread()
def train_habits(options: WarmStartOptions, base: Path, directory: Path, *, progress: bool = True) -> None:
    """Train the base on the imperfect expert and save the policy into `directory`, which must exist."""
    torch.manual_seed(options.seed)
    model, stream = _load(base, directory)
    remarks = REMARKS if options.talks else ()
    source = demonstrations(options.base.horizon, options.faults, options.seed, remarks=remarks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1.0 - step / options.steps, 0.02))
    with tqdm(range(options.steps), desc="warm start", unit="step", disable=not progress) as bar:
        for _ in bar:
            batch = [encode(shown, stream) for shown in islice(source, options.batch_size)]
            loss = _fit(model, optimizer, schedule, batch, stream.pad_id)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    model.save_pretrained(directory)


def _load(policy: Path, directory: Path) -> tuple[PreTrainedModel, TokenStream]:
    """A saved policy, to be trained further; its tokenizer goes into `directory` unchanged."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32), TokenStream(tokenizer, [tool_schema()])


def _fit(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    batch: list[tuple[list[int], list[int]]],
    pad_id: int,
) -> float:
    """One step on (ids, labels) pairs; returns the loss."""
    logits, wanted = _predict(model, batch, pad_id)
    loss = torch.nn.functional.cross_entropy(logits, wanted)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    return loss.item()


def _predict(
    model: PreTrainedModel, batch: list[tuple[list[int], list[int]]], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, vocabulary) logits and (N,) labels of the batch's N labelled tokens, row by row."""
    ids = pad([x for x, _ in batch], pad_id)
    labels = pad([y for _, y in batch], IGNORE)[:, 1:]
    # Right padding and causal attention: no token attends to padding, so no mask is needed (and sdpa is faster).
    hidden = model.model(ids[:, :-1]).last_hidden_state
    return model.lm_head(hidden[labels != IGNORE]), labels[labels != IGNORE]


@torch.inference_mode()
def skill(model: PreTrainedModel, conversations: list[tuple[list[int], list[int]]], pad_id: int) -> float:
    """The share of conversations whose every labelled token is the model's first choice.

    For a faultless expert that is the share that greedy decoding solves: it would say the same, token by token.
    """
    logits, wanted = _predict(model, conversations, pad_id)
    wrong = (logits.argmax(-1) != wanted).tolist()
    at, solved = 0, 0
    for _, labels in conversations:
        count = sum(label != IGNORE for label in labels[1:])
        solved += not any(wrong[at : at + count])
        at += count
    return solved / len(conversations)


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
    """The directory of a trained policy (model, tokenizer, `made_of.json`), trained now or found in the cache."""
    cache = Path(cache_directory)

    def base(wanted: BaseOptions) -> Path:
        def make(directory: Path) -> None:
            start = None if wanted.horizon == HORIZON else base(replace(wanted, horizon=HORIZON))
            train_base(wanted, start, directory, progress=progress)

        return make_once(cache / f"base-{wanted.key}", asdict(wanted), make)

    def make(directory: Path) -> None:
        train_habits(options, base(options.base), directory, progress=progress)

    return make_once(cache / options.key, asdict(options), make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="cache directory; the policy lands in OUT/<key>")
    parser.add_argument("--seed", type=int, default=WarmStartOptions.seed)
    parser.add_argument("--horizon", type=int, default=HORIZON, help="the longest number of dependent calls")
    parser.add_argument("--success", type=float, default=WarmStartOptions.success, help="of the expert")
    args = parser.parse_args()
    options = WarmStartOptions(seed=args.seed, success=args.success, base=BaseOptions(horizon=args.horizon))
    print(ensure_warm_start(options, args.out))


if __name__ == "__main__":
    main()
