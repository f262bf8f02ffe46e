"""Credit, update, validation and the loop around them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from recipe.gtpo.experiments.twin.rollout import Row, draw, roll_out
from recipe.gtpo.experiments.twin.settings import Settings
from recipe.gtpo.method.credit import Credit, assign_credit
from recipe.gtpo.method.estimators import turn_values
from recipe.gtpo.method.metrics import credit_metrics
from recipe.gtpo.method.similarity import make_similarity
from recipe.gtpo.method.tokens import find_runs, spread_to_tokens
from recipe.gtpo.method.turns import Trajectory, validation_info
from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.run.trajectories import Numbers, training_lines
from recipe.gtpo.run.trajectories import Row as Source
from recipe.gtpo.tasks.arithmetic.experts import problem_class
from recipe.gtpo.tasks.arithmetic.policy import TokenStream
from recipe.gtpo.tasks.arithmetic.problems import DATA_SOURCE, Problem, sample_problems, step_mix, take, tool_schema
from recipe.gtpo.tasks.arithmetic.warm_start import pad


def turn_advantages(
    trajectories: Sequence[Trajectory], groups: Sequence[str], settings: Settings, similarity: Any
) -> tuple[torch.Tensor, torch.Tensor, Credit]:
    """(B, T) return and advantage of every turn, and the credit they came from."""
    credit = assign_credit(trajectories, groups, settings.options, similarity)
    returns, advantages = turn_values(settings.estimator, credit, settings.options, divide=settings.scale_by_std)
    return returns, advantages, credit


def spread(rows: Sequence[Row], advantages: torch.Tensor, credit: Credit) -> tuple[list[torch.Tensor], int]:
    """The advantage of every response token, one tensor a row, and how many tokens were generated."""
    turn_ids = credit.turn_ids(max(row.response_length for row in rows))
    by_token = spread_to_tokens(advantages, find_runs(turn_ids >= 0, turn_ids))
    return [by_token[i, : row.response_length] for i, row in enumerate(rows)], int((turn_ids >= 0).sum())


def update(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    token_advantages: Sequence[torch.Tensor],
    generated: int,
    pad_id: int,
    settings: Settings,
) -> float:
    """One optimiser step on the clipped policy-gradient loss, mean over all `generated` tokens; the gradient's norm."""
    optimizer.zero_grad()
    loud = [i for i, advantages in enumerate(token_advantages) if bool(advantages.any())]
    loud.sort(key=lambda i: len(rows[i].ids))  # rows of like length share a micro-batch: less padding
    while loud:
        size = max(1, settings.micro_batch_tokens // len(rows[loud[-1]].ids))
        loud, micro = loud[:-size], loud[-size:]
        ids = pad([rows[i].ids for i in micro], pad_id)
        # Position t of these belongs to the token at t + 1, which is what position t predicts.
        old, advantage = torch.zeros(ids[:, 1:].shape), torch.zeros(ids[:, 1:].shape)
        for at, i in enumerate(micro):
            span = slice(rows[i].prompt_length - 1, len(rows[i].ids) - 1)
            old[at, span] = torch.tensor(rows[i].log_probs)
            advantage[at, span] = token_advantages[i]
        used = advantage != 0
        hidden = model.model(ids[:, :-1]).last_hidden_state[used]
        log_probs = -torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][used], reduction="none")
        ratio = (log_probs - old[used]).exp()
        clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        gain = torch.minimum(ratio * advantage[used], clipped * advantage[used])
        (-gain.sum() / generated).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
    optimizer.step()
    return float(norm)


def load_policy(settings: Settings) -> tuple[PreTrainedModel, TokenStream]:
    """The policy in float32 and the token stream of its conversations."""
    stream = TokenStream(AutoTokenizer.from_pretrained(settings.policy), [tool_schema()])
    # The policy has no dropout: eval trains as well.
    return AutoModelForCausalLM.from_pretrained(settings.policy, dtype=torch.float32).eval(), stream


def make_optimizer(model: PreTrainedModel, settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )


def evaluate(
    model: PreTrainedModel, stream: TokenStream, problems: Sequence[Problem], settings: Settings
) -> dict[str, float]:
    """Held-out metrics by the names of a run under verl: sampled at temperature 1, also by problem class."""
    infos = [validation_info(row.trajectory()) for row in roll_out(model, stream, problems, settings.rules)]
    metrics = {}
    for key in [key for key, value in infos[0].items() if isinstance(value, float)]:
        section = "val-core" if key == "acc" else "val-aux"
        metrics[f"{section}/{DATA_SOURCE}/{key}/mean@1"] = sum(float(info[key]) for info in infos) / len(infos)
    by_class: dict[str, list[float]] = defaultdict(list)
    for problem, info in zip(problems, infos, strict=True):
        by_class[problem_class(problem)].append(float(info["acc"]))
    return metrics | {f"val-class/{name}/acc": sum(v) / len(v) for name, v in sorted(by_class.items())}


def greedy_accuracy(
    model: PreTrainedModel, stream: TokenStream, problems: Sequence[Problem], settings: Settings
) -> dict[str, float]:
    """Held-out accuracy of greedy decoding: 1 where the mode is right, whatever else the policy may say."""
    solved = [row.trajectory().acc for row in roll_out(model, stream, problems, settings.rules, greedy=True)]
    return {f"val-aux/{DATA_SOURCE}/greedy_acc/mean@1": sum(solved) / len(solved)}


def pad_log_probs(rows: Sequence[Row]) -> torch.Tensor:
    """(B, L) of the response tokens, 0 where a row has ended."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row.log_probs) for row in rows], batch_first=True)


def describe(row: Row, group: str, session: int, step: int) -> Source:
    """Where a row comes from, for its record."""
    return Source(
        group=group,
        session=session,
        data_source=DATA_SOURCE,
        prompt=row.problem.messages,
        gold=str(row.problem.answer),
        weights=(step - 1, step - 1),
        token_ids=row.ids[row.prompt_length :],
    )


def train(settings: Settings) -> None:
    """Train and record. Everything random follows from `settings.seed`, except the policy."""
    torch.manual_seed(settings.seed)
    torch.set_num_threads(1)  # the batches are too small for more, and runs of several seeds use the other cores
    record = RunRecord(settings.run_dir, compress=settings.compress, keep=settings.keep)
    record.write_start(settings.seed)
    record.forget_after(-1)  # no checkpoints: a run of this engine starts over
    model, stream = load_policy(settings)
    optimizer = make_optimizer(model, settings)
    shaping = settings.options.shaping
    similarity = make_similarity(shaping.similarity) if shaping.enable else None
    task = settings.task
    mix = step_mix(task.horizon)
    source = sample_problems("train", settings.seed, mix)
    held_out = take(sample_problems("validation", 0, mix), max(task.final_problems, task.validation_problems))
    on_the_way, final = held_out[: task.validation_problems], held_out[: task.final_problems]

    before = evaluate(model, stream, on_the_way, settings)
    record.write_metrics(0, before)
    bar = tqdm(range(1, settings.steps + 1), desc=f"{settings.method} seed {settings.seed}", unit="step")
    for step in bar:
        began = time.perf_counter()
        rows, groups = draw(model, stream, source, settings.rules, prompts=settings.prompts, rollouts=settings.rollouts)
        sampled = time.perf_counter()
        trajectories = [row.trajectory() for row in rows]
        returns, advantages, credit = turn_advantages(trajectories, groups, settings, similarity)
        credited = time.perf_counter()
        by_token, generated = spread(rows, advantages, credit)
        norm = update(model, optimizer, rows, by_token, generated, stream.pad_id, settings)
        ended = time.perf_counter()
        if step % settings.trajectory_freq == 0:
            numbers = Numbers.of(credit, advantages, settings.estimator, settings.options, pad_log_probs(rows))
            sources = [describe(row, groups[i], i % settings.rollouts, step) for i, row in enumerate(rows)]
            record.write_trajectories(step, training_lines(step, settings.seed, trajectories, sources, numbers))
        metrics = credit_metrics(credit, trajectories, returns, advantages, settings.options.baseline) | {
            "actor/grad_norm": norm,
            "timing_s/gen": sampled - began,
            "timing_s/adv": credited - sampled,
            "timing_s/update_actor": ended - credited,
            "timing_s/step": ended - began,
        }
        if step == settings.steps:
            after = evaluate(model, stream, final, settings)
            metrics |= after | greedy_accuracy(model, stream, on_the_way, settings)
        elif step % settings.test_freq == 0:
            metrics |= evaluate(model, stream, on_the_way, settings)
        record.write_metrics(step, metrics)
        bar.set_postfix(acc=f"{metrics['gtpo/acc/mean']:.2f}", refresh=False)
    accuracy = f"val-core/{DATA_SOURCE}/acc/mean@1"
    record.write_summary(
        {
            "method": settings.method,
            "task": DATA_SOURCE,
            "engine": "twin",
            "horizon": task.horizon,
            "seed": settings.seed,
            "steps": [0, settings.steps],
            "accuracy": [before[accuracy], after[accuracy]],
        }
    )
