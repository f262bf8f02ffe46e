"""Batched sampling from a causal LM on the CPU, with exact log-probs. Plain torch + transformers: no verl, no Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel


@dataclass
class Request:
    """One prompt to continue. `seed` fixes the sample, whatever shares the batch with it."""

    prompt_ids: list[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()


@dataclass
class Sample:
    """What was generated. `log_probs` are those of the distribution that was sampled (after temperature, top-k, top-p).

    `stop_reason` is "stop" (a stop id, kept as the last token), "length" or "aborted".
    """

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    stop_reason: str = "length"


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    vocab_size: int,
    pad_id: int = 0,
    aborted: Callable[[], bool] = lambda: False,
) -> list[Sample]:
    """Continue every request until its stop id or limit; one KV-cached forward a token for the rows still running.

    Args:
        model: a causal LM in eval mode.
        requests: at least one; prompts may differ in length (left-padded here).
        vocab_size: ids from here on are never sampled (rows of the embedding that no token names).
        pad_id: any valid id; its positions are masked.
        aborted: polled once a token; when true, every running row ends with "aborted" and keeps its tokens.

    Returns:
        One `Sample` a request, in order.
    """
    samples = [Sample() for _ in requests]
    rows = torch.arange(len(requests))  # batch row -> request
    width = max(len(r.prompt_ids) for r in requests)
    ids = torch.full((len(requests), width), pad_id)
    mask = torch.zeros((len(requests), width), dtype=torch.long)
    for i, r in enumerate(requests):
        ids[i, width - len(r.prompt_ids) :] = torch.tensor(r.prompt_ids)
        mask[i, width - len(r.prompt_ids) :] = 1
    uniforms = _uniforms(requests)
    temperature = torch.tensor([r.temperature for r in requests])
    position = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache()
    step = 0
    while True:
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1, :vocab_size]
        log_probs = _distribution(logits.float(), temperature[rows], [requests[i] for i in rows.tolist()])
        tokens = _pick(log_probs, uniforms[rows, step], temperature[rows])
        chosen = log_probs.gather(1, tokens[:, None]).squeeze(1)
        step += 1
        stop_all = aborted()
        keep = []
        for b, (i, token, lp) in enumerate(zip(rows.tolist(), tokens.tolist(), chosen.tolist(), strict=True)):
            sample, request = samples[i], requests[i]
            sample.token_ids.append(token)
            sample.log_probs.append(lp)
            if token in request.stop_ids:
                sample.stop_reason = "stop"
            elif len(sample.token_ids) >= request.max_tokens:
                sample.stop_reason = "length"
            elif stop_all:
                sample.stop_reason = "aborted"
            else:
                keep.append(b)
        if not keep:
            return samples
        if len(keep) < len(rows):
            kept = torch.tensor(keep)
            rows, tokens, mask, position = rows[kept], tokens[kept], mask[kept], position[kept]
            cache.batch_select_indices(kept)
        ids = tokens[:, None]
        mask = torch.cat([mask, torch.ones((len(rows), 1), dtype=torch.long)], dim=1)
        position = position[:, -1:] + 1


def _uniforms(requests: Sequence[Request]) -> torch.Tensor:
    """(batch, longest max_tokens) uniform numbers; a row depends on its own seed only."""
    longest = max(r.max_tokens for r in requests)
    uniforms = torch.rand(len(requests), longest)
    for i, r in enumerate(requests):
        if r.seed is not None:
            uniforms[i, : r.max_tokens] = torch.rand(r.max_tokens, generator=torch.Generator().manual_seed(r.seed))
    return uniforms


def _distribution(logits: torch.Tensor, temperature: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """(batch, vocab) log-probs after temperature, then top-k, then top-p; greedy rows keep temperature 1."""
    log_probs = torch.log_softmax(logits / torch.where(temperature > 0, temperature, 1.0)[:, None], dim=-1)
    if all(r.top_k <= 0 and r.top_p >= 1.0 for r in requests):
        return log_probs
    order = log_probs.argsort(dim=-1, descending=True)
    ranked = log_probs.gather(1, order)
    top_k = torch.tensor([r.top_k if r.top_k > 0 else ranked.shape[1] for r in requests])
    top_p = torch.tensor([r.top_p for r in requests])
    before = ranked.exp().cumsum(1) - ranked.exp()  # mass of the better tokens
    dropped = (torch.arange(ranked.shape[1]) >= top_k[:, None]) | (before >= top_p[:, None])
    dropped[:, 0] = False
    filtered = log_probs.scatter(1, order, ranked.masked_fill(dropped, float("-inf")))
    return torch.log_softmax(filtered, dim=-1)


def _pick(log_probs: torch.Tensor, uniform: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Inverse CDF: the first token whose cumulative mass exceeds `uniform`; the mode where temperature is 0."""
    cumulative = log_probs.double().exp().cumsum(1)
    # scale by the true total so that rounding can never push the index past the last token
    sampled = torch.searchsorted(cumulative, (uniform.double() * cumulative[:, -1])[:, None], right=True).squeeze(1)
    return torch.where(temperature > 0, sampled.clamp_max(log_probs.shape[1] - 1), log_probs.argmax(1))
