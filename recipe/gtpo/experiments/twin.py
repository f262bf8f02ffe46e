"""A plain-PyTorch twin of the embedded training run: no verl, no Ray, a second a step on one core.

    python -m recipe.gtpo.experiments.twin --method gtpo --seed 1 --run-dir outputs/twin/gtpo-seed1
    python -m recipe.gtpo.experiments.twin --method gtpo --seed 1 --run-dir outputs/twin/other gtpo.gamma=1.0

For questions that take many seeds. What decides the result is the recipe's own: problems, warm start, parser, format
verdicts, shaping, turn rewards, advantages, and the method files of `recipe/gtpo/config/method`. What differs from the
run under verl:

1. One process samples and trains, so there is no weight transfer and no rollout-vs-actor gap.
2. The tool is `recipe.gtpo.tasks.arithmetic.calculator`; no code is executed.
3. Decoding is written out (`Decoder`); a tool message is fed through it token by token like a sampled turn.
4. Rows whose advantages are all 0 skip the backward pass. Their gradient is 0; the loss still divides by their tokens.

Leaves metrics.jsonl and summary.json as a run under verl does, with the same names (recipe/gtpo/run/record.py), so that
the report reads both. Only here: `val-class/<problem class>/...`, and `val-aux/.../greedy_acc/...`.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from recipe.gtpo.method import advantage as equations
from recipe.gtpo.method.credit import Credit, assign_credit
from recipe.gtpo.method.metrics import credit_metrics
from recipe.gtpo.method.options import GTPOOptions, Scale
from recipe.gtpo.method.similarity import make_similarity
from recipe.gtpo.method.tokens import find_runs, spread_to_tokens
from recipe.gtpo.method.turns import TRUNCATED, Finish, Trajectory, Turn, validation_info
from recipe.gtpo.parsing import extract_answer, judge_format
from recipe.gtpo.run.checks import method_file
from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.tasks.arithmetic.calculator import respond
from recipe.gtpo.tasks.arithmetic.experts import problem_class
from recipe.gtpo.tasks.arithmetic.policy import TokenStream
from recipe.gtpo.tasks.arithmetic.problems import (
    DATA_SOURCE,
    HORIZON,
    Limits,
    Problem,
    compute_score,
    sample_problems,
    step_mix,
    take,
    tool_schema,
)
from recipe.gtpo.tasks.arithmetic.warm_start import BaseOptions, WarmStartOptions, ensure_warm_start, pad

SCHEMAS = {"python": tool_schema()["function"]["parameters"]}

PROMPTS, ROLLOUTS = 16, 8
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
MICRO_BATCH_TOKENS = 4096
LIMITS = Limits.of(HORIZON)


# ---------------------------------------------------------------------------------------------------------------------
# Rollout


@dataclass
class Conversation:
    """One conversation while it happens: `ids` from `prompt_length` on are the response."""

    problem: Problem
    ids: list[int]
    prompt_length: int
    limits: Limits = LIMITS
    turns: list[Turn] = field(default_factory=list)
    turn_start: int = 0  # in the response
    log_probs: list[float] = field(default_factory=list)  # one a response token, 0.0 where it was not sampled
    forced: deque[int] = field(default_factory=deque)  # tool tokens still to be fed
    finish: Finish | None = None

    @property
    def response_length(self) -> int:
        return len(self.ids) - self.prompt_length

    def advance(self, sampled: int, log_prob: float, stream: TokenStream) -> None:
        """Append the next token: a forced one if there is one, else the sampled one, which may end the turn."""
        if self.forced:
            self.ids.append(self.forced.popleft())
            self.log_probs.append(0.0)
            self.turn_start = self.response_length
            return
        self.ids.append(sampled)
        self.log_probs.append(log_prob)
        ended = sampled == stream.eos_id
        if ended or self.response_length >= self.limits.response:
            self._end_turn(stream, cut=not ended)

    def _end_turn(self, stream: TokenStream, cut: bool) -> None:
        """The order of the decisions is that of the agent loop."""
        response = self.ids[self.prompt_length :]
        text = stream.tokenizer.decode(response[self.turn_start :], skip_special_tokens=True)
        calls, outcomes = respond(text, SCHEMAS)
        if cut:
            self.finish, outcomes = Finish.LENGTH, ()
        elif not calls:
            self.finish = Finish.ANSWER
        elif len(self.turns) + 1 >= self.limits.turns:
            self.finish, outcomes = Finish.TURN_LIMIT, ()
        else:
            self.forced.extend(stream.observation(tuple(o.output for o in outcomes)))
            if self.response_length + len(self.forced) >= self.limits.response:
                self.finish = Finish.LENGTH
        self.turns.append(Turn(self.turn_start, len(response), text, calls, outcomes))

    def trajectory(self) -> Trajectory:
        """The finished conversation as the record that credit assignment reads."""
        assert self.finish is not None
        last = len(self.turns) - 1
        judged = tuple(
            replace(
                turn,
                broken=judge_format(
                    is_first=k == 0,
                    is_last=k == last,
                    truncated=k == last and self.finish in TRUNCATED,
                    calls=turn.calls,
                    has_answer=extract_answer(turn.text) is not None,
                ),
            )
            for k, turn in enumerate(self.turns)
        )
        scored = compute_score(DATA_SOURCE, self.turns[-1].text, str(self.problem.answer))
        return Trajectory(judged, self.finish, acc=float(scored["acc"]), pred=str(scored["pred"]))


class Decoder:
    """`Qwen2ForCausalLM` written out for one token a row, after a prompt that rows may share.

    transformers' own forward spends more time between its operations than in them at this size, and it keeps the
    prompt's keys and values once a row; rollouts of one problem have the same.

    Shapes: B running rows, G distinct prompts of P tokens at most, S rows a prompt at most, H heads of D.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], room: int, pad_id: int) -> None:
        """`room`: response tokens a row at most."""
        config = model.config
        if config.num_key_value_heads != config.num_attention_heads:
            raise ValueError("the decoder is for the embedded policy: as many key-value heads as heads")
        self._model, self._heads, self._eps = model, config.num_attention_heads, config.rms_norm_eps
        self._layers = [
            (
                layer.input_layernorm.weight,
                torch.cat(
                    [part.weight for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)]
                ),
                torch.cat(
                    [part.bias for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)]
                ),
                layer.self_attn.o_proj.weight,
                layer.post_attention_layernorm.weight,
                torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
                layer.mlp.down_proj.weight,
            )
            for layer in model.model.layers
        ]
        places = {prompt: g for g, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        group = [places[tuple(prompt)] for prompt in prompts]
        self._slots = max(Counter(group).values())
        seen: Counter[int] = Counter()
        slot = []
        for g in group:
            slot.append(g * self._slots + seen[g])
            seen[g] += 1
        self._slot = torch.tensor(slot)  # (B,) where a row stands in (G, S)
        self._groups = len(places)
        lengths = torch.tensor([len(prompt) for prompt in places])
        self._position = lengths[torch.tensor(group)]  # (B,) of the next token
        ids = pad([list(prompt) for prompt in places], pad_id)
        cache = DynamicCache()
        # Right padding and causal attention: no prompt token attends to padding.
        hidden = model.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        self._prompt = [(layer.keys, layer.values) for layer in cache.layers]  # (G, H, P, D)
        padding = torch.arange(ids.shape[1]) >= lengths[:, None]
        self._bias = torch.zeros(padding.shape).masked_fill(padding, float("-inf"))[:, None, None]
        # (B, vocabulary) logits of the first response token
        self.first = model.lm_head(hidden[torch.arange(len(places)), lengths - 1])[torch.tensor(group)]
        shape = (len(prompts), self._heads, room, hidden.shape[-1] // self._heads)
        self._response = [(torch.empty(shape), torch.empty(shape)) for _ in self._layers]
        self._length = 0
        positions = torch.arange(ids.shape[1] + room)[None]
        self._cos, self._sin = (table[0] for table in model.model.rotary_emb(hidden, positions))

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only."""
        self._slot, self._position = self._slot[rows], self._position[rows]
        self._response = [(keys[rows], values[rows]) for keys, values in self._response]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B,) the newest token of every row -> (B, vocabulary) logits of the next."""
        batch, t, heads = len(tokens), self._length, self._heads
        norm = torch.nn.functional.rms_norm
        h = self._model.model.embed_tokens(tokens)
        size = h.shape[-1] // heads
        cos, sin = self._cos[self._position][:, None, None], self._sin[self._position][:, None, None]
        for (norm1, qkv, bias, o, norm2, gate_up, down), (pk, pv), (rk, rv) in zip(
            self._layers, self._prompt, self._response, strict=True
        ):
            x = torch.nn.functional.linear(norm(h, h.shape[-1:], norm1, self._eps), qkv, bias)
            x = x.view(batch, 3, heads, size)
            qk = x[:, :2]
            qk = qk * cos + torch.cat((-qk[..., size // 2 :], qk[..., : size // 2]), dim=-1) * sin
            q = qk[:, 0] * size**-0.5
            rk[:, :, t], rv[:, :, t] = qk[:, 1], x[:, 2]
            to_prompt = self._by_prompt(q) @ pk.transpose(2, 3) + self._bias
            to_response = q[:, :, None] @ rk[:, :, : t + 1].transpose(2, 3)
            width = to_prompt.shape[-1]
            weight = torch.cat((self._by_row(to_prompt), to_response[:, :, 0]), dim=-1).softmax(-1)
            read = self._by_row(self._by_prompt(weight[..., :width]) @ pv)
            read = read + (weight[:, :, None, width:] @ rv[:, :, : t + 1])[:, :, 0]
            h = h + torch.nn.functional.linear(read.reshape(batch, -1), o)
            gate, up = torch.nn.functional.linear(norm(h, h.shape[-1:], norm2, self._eps), gate_up).chunk(2, dim=-1)
            h = h + torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down)
        self._length += 1
        self._position = self._position + 1
        return self._model.lm_head(norm(h, h.shape[-1:], self._model.model.norm.weight, self._eps))

    def _by_prompt(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, N) -> (G, H, S, N); 0 where a slot has no running row."""
        slots = x.new_zeros(self._groups * self._slots, *x.shape[1:])
        slots[self._slot] = x
        return slots.view(self._groups, self._slots, *x.shape[1:]).transpose(1, 2)

    def _by_row(self, x: torch.Tensor) -> torch.Tensor:
        """(G, H, S, N) -> (B, H, N)"""
        return x.transpose(1, 2).reshape(self._groups * self._slots, x.shape[1], x.shape[3])[self._slot]


def _sample(log_probs: torch.Tensor) -> torch.Tensor:
    """(rows, 1) a token a row, by inverting the distribution function: one random number a row, not one a token."""
    reached = log_probs.exp().cumsum(-1)
    return torch.searchsorted(reached, torch.rand(len(reached), 1) * reached[:, -1:], right=True).clamp_max(
        log_probs.shape[1] - 1
    )


@torch.inference_mode()
def roll_out(
    model: PreTrainedModel,
    stream: TokenStream,
    problems: Sequence[Problem],
    temperature: float = 1.0,
    limits: Limits = LIMITS,
) -> list[Conversation]:
    """One finished conversation a problem. Temperature 0 decodes greedily; sampling draws from torch's generator."""
    conversations = []
    for problem in problems:
        prompt = stream.prompt(problem.messages)
        conversations.append(Conversation(problem, prompt, len(prompt), limits))
    running = conversations
    decoder = Decoder(model, [c.ids for c in conversations], limits.response, stream.pad_id)
    logits = decoder.first
    while True:
        log_probs = torch.log_softmax(logits / temperature if temperature > 0 else logits, dim=-1)
        tokens = _sample(log_probs) if temperature > 0 else log_probs.argmax(-1, keepdim=True)
        chosen = log_probs.gather(1, tokens)
        for c, token, log_prob in zip(running, tokens[:, 0].tolist(), chosen[:, 0].tolist(), strict=True):
            if c.finish is None:
                c.advance(token, log_prob, stream)
        keep = [row for row, c in enumerate(running) if c.finish is None]
        if not keep:
            return conversations
        # Compact only when it pays: it copies the cache.
        if len(keep) <= 0.8 * len(running):
            running = [running[row] for row in keep]
            decoder.keep(torch.tensor(keep))
        logits = decoder.step(torch.tensor([c.ids[-1] for c in running]))


def draw(
    model: PreTrainedModel, stream: TokenStream, source: Iterator[Problem], limits: Limits
) -> tuple[list[Conversation], list[str]]:
    """One training batch: `ROLLOUTS` conversations for each of the next `PROMPTS` problems, and their group labels."""
    problems = [problem for problem in take(source, PROMPTS) for _ in range(ROLLOUTS)]
    return roll_out(model, stream, problems, limits=limits), [str(i // ROLLOUTS) for i in range(len(problems))]


# ---------------------------------------------------------------------------------------------------------------------
# Credit and update


@dataclass(frozen=True)
class Method:
    """One file of `config/method`, with overrides."""

    estimator: str
    options: GTPOOptions
    scale_by_std: bool  # of GRPO

    @classmethod
    def load(cls, name: str, overrides: Sequence[str]) -> Method:
        """Raises ValueError for a method that is unknown or has no twin, and for a malformed override."""
        config = OmegaConf.merge(OmegaConf.load(method_file(name)).algorithm, OmegaConf.from_dotlist(list(overrides)))
        if config.adv_estimator not in ("gtpo", "grpo"):
            raise ValueError(f"method {name!r} uses the estimator {config.adv_estimator!r}; the twin has gtpo and grpo")
        return cls(
            config.adv_estimator,
            GTPOOptions.from_config(config.get("gtpo")),
            config.get("norm_adv_by_std_in_grpo", True),
        )


def turn_advantages(
    trajectories: Sequence[Trajectory], groups: Sequence[str], method: Method, similarity: Any
) -> tuple[torch.Tensor, torch.Tensor, Credit]:
    """(B, T) return and advantage of every turn, and the credit they came from."""
    options = method.options
    credit = assign_credit(trajectories, groups, options, similarity)
    rewards = credit.rewards.combined
    if method.estimator == "grpo":
        # One return a trajectory, compared within the group: tests/gtpo proves that this is verl's GRPO.
        one_turn = credit.turn_mask.any(dim=1, keepdim=True)
        scale: Scale = "std" if method.scale_by_std else "none"
        total = rewards.sum(dim=1, keepdim=True)
        advantage = equations.normalize_returns(total, one_turn, groups, scale=scale)
        return total * credit.turn_mask, advantage * credit.turn_mask, credit
    returns, advantage = equations.turn_advantages(rewards, credit.turn_mask, groups, options, credit.solved)
    return returns, advantage, credit


def spread(
    conversations: Sequence[Conversation], advantages: torch.Tensor, credit: Credit
) -> tuple[list[torch.Tensor], int]:
    """The advantage of every response token, one tensor a conversation, and how many tokens were generated."""
    turn_ids = credit.turn_ids(max(c.response_length for c in conversations))
    by_token = spread_to_tokens(advantages, find_runs(turn_ids >= 0, turn_ids))
    return [by_token[i, : c.response_length] for i, c in enumerate(conversations)], int((turn_ids >= 0).sum())


def update(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    conversations: Sequence[Conversation],
    token_advantages: Sequence[torch.Tensor],
    generated: int,
    pad_id: int,
) -> float:
    """One optimiser step on the clipped policy-gradient loss, mean over all `generated` tokens; the gradient's norm."""
    optimizer.zero_grad()
    rows = [i for i, advantages in enumerate(token_advantages) if bool(advantages.any())]
    rows.sort(key=lambda i: len(conversations[i].ids))  # rows of like length share a micro-batch: less padding
    while rows:
        size = max(1, MICRO_BATCH_TOKENS // len(conversations[rows[-1]].ids))
        rows, micro = rows[:-size], rows[-size:]
        ids = pad([conversations[i].ids for i in micro], pad_id)
        # Position t of these belongs to the token at t + 1, which is what position t predicts.
        old, advantage = torch.zeros(ids[:, 1:].shape), torch.zeros(ids[:, 1:].shape)
        for row, i in enumerate(micro):
            span = slice(conversations[i].prompt_length - 1, len(conversations[i].ids) - 1)
            old[row, span] = torch.tensor(conversations[i].log_probs)
            advantage[row, span] = token_advantages[i]
        used = advantage != 0
        hidden = model.model(ids[:, :-1]).last_hidden_state[used]
        log_probs = -torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][used], reduction="none")
        ratio = (log_probs - old[used]).exp()
        gain = torch.minimum(ratio * advantage[used], ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage[used])
        (-gain.sum() / generated).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(norm)


# ---------------------------------------------------------------------------------------------------------------------
# Measurement


def evaluate(
    model: PreTrainedModel, stream: TokenStream, problems: Sequence[Problem], limits: Limits
) -> dict[str, float]:
    """Held-out metrics by the names of a run under verl: sampled at temperature 1, also by problem class."""
    infos = [validation_info(c.trajectory()) for c in roll_out(model, stream, problems, limits=limits)]
    metrics = {}
    for key in [key for key, value in infos[0].items() if isinstance(value, float)]:
        section = "val-core" if key == "acc" else "val-aux"
        metrics[f"{section}/{DATA_SOURCE}/{key}/mean@1"] = sum(float(info[key]) for info in infos) / len(infos)
    by_class: dict[str, list[float]] = defaultdict(list)
    for problem, info in zip(problems, infos, strict=True):
        by_class[problem_class(problem)].append(float(info["acc"]))
    return metrics | {f"val-class/{name}/acc": sum(v) / len(v) for name, v in sorted(by_class.items())}


def greedy_accuracy(
    model: PreTrainedModel, stream: TokenStream, problems: Sequence[Problem], limits: Limits
) -> dict[str, float]:
    """Held-out accuracy of greedy decoding: 1 where the mode is right, whatever else the policy may say."""
    solved = [c.trajectory().acc for c in roll_out(model, stream, problems, temperature=0.0, limits=limits)]
    return {f"val-aux/{DATA_SOURCE}/greedy_acc/mean@1": sum(solved) / len(solved)}


def train(
    *,
    name: str,
    method: Method,
    policy: Path,
    seed: int,
    steps: int,
    learning_rate: float,
    horizon: int,
    eval_problems: int,
    eval_every: int,
    run_dir: Path,
) -> None:
    """Train and record. Everything random follows from `seed`, except the policy."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # the batches are too small for more, and runs of several seeds use the other cores
    record = RunRecord(run_dir)
    record.write_start(seed)
    record.metrics_path.unlink(missing_ok=True)  # no checkpoints: a twin starts over
    tokenizer = AutoTokenizer.from_pretrained(policy)
    stream = TokenStream(tokenizer, [tool_schema()])
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()  # no dropout: eval trains as well
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    similarity = make_similarity(method.options.shaping.similarity) if method.options.shaping.enable else None
    limits = Limits.of(horizon)
    source = sample_problems("train", seed, step_mix(horizon))
    held_out = take(sample_problems("validation", 0, step_mix(horizon)), eval_problems)
    on_the_way = held_out[: max(1, eval_problems // 4)]  # the last point carries the claim, the others only the curve

    before = evaluate(model, stream, on_the_way, limits)
    record.write_metrics(0, before)
    bar = tqdm(range(1, steps + 1), desc=f"{name} seed {seed}", unit="step")
    for step in bar:
        began = time.perf_counter()
        conversations, groups = draw(model, stream, source, limits)
        sampled = time.perf_counter()
        trajectories = [c.trajectory() for c in conversations]
        returns, advantages, credit = turn_advantages(trajectories, groups, method, similarity)
        credited = time.perf_counter()
        by_token, generated = spread(conversations, advantages, credit)
        norm = update(model, optimizer, conversations, by_token, generated, stream.pad_id)
        ended = time.perf_counter()
        metrics = credit_metrics(credit, trajectories, returns, advantages, method.options.baseline) | {
            "actor/grad_norm": norm,
            "timing_s/gen": sampled - began,
            "timing_s/adv": credited - sampled,
            "timing_s/update_actor": ended - credited,
            "timing_s/step": ended - began,
        }
        if step == steps:
            after = evaluate(model, stream, held_out, limits)
            metrics |= after | greedy_accuracy(model, stream, on_the_way, limits)
        elif step % eval_every == 0:
            metrics |= evaluate(model, stream, on_the_way, limits)
        record.write_metrics(step, metrics)
        bar.set_postfix(acc=f"{metrics['gtpo/acc/mean']:.2f}", refresh=False)
    accuracy = f"val-core/{DATA_SOURCE}/acc/mean@1"
    record.write_summary(
        {
            "method": name,
            "task": DATA_SOURCE,
            "engine": "twin",
            "horizon": horizon,
            "seed": seed,
            "steps": [0, steps],
            "accuracy": [before[accuracy], after[accuracy]],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="gtpo", help="a file of recipe/gtpo/config/method")
    parser.add_argument("--seed", type=int, default=1, help="of the problems and the sampling")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--horizon", type=int, default=HORIZON, help="the longest number of dependent calls, 1 to 6")
    parser.add_argument("--warm-start-seed", type=int, help="default: --seed, as under verl")
    parser.add_argument("--success", type=float, default=WarmStartOptions.success, help="of the warm start's expert")
    parser.add_argument("--eval-problems", type=int, default=1024, help="at the end; a quarter of them on the way")
    parser.add_argument("--eval-every", type=int, default=10, help="steps")
    parser.add_argument("--run-dir", type=Path, required=True, help="gets metrics.jsonl, versions.json, summary.json")
    parser.add_argument("--cache", type=Path, default=Path("outputs/embedded/policies"), help="of warm starts")
    parser.add_argument("overrides", nargs="*", help="of the method's algorithm section, such as gtpo.gamma=1.0")
    args = parser.parse_args()
    try:
        method = Method.load(args.method, args.overrides)
        warm_seed = args.seed if args.warm_start_seed is None else args.warm_start_seed
        options = WarmStartOptions(seed=warm_seed, success=args.success, base=BaseOptions(horizon=args.horizon))
    except ValueError as e:
        parser.error(str(e))
    train(
        name=args.method,
        method=method,
        policy=ensure_warm_start(options, args.cache),
        seed=args.seed,
        steps=args.steps,
        learning_rate=args.lr,
        horizon=args.horizon,
        eval_problems=args.eval_problems,
        eval_every=args.eval_every,
        run_dir=args.run_dir,
    )


if __name__ == "__main__":
    main()
