"""Sampling from a causal LM with continuous batching and exact log-probs, on the model's device. No verl, no Ray.

Rows join and leave a `ContinuousBatch` between any two tokens, so a short answer never waits for a long one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


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

    `stop_reason` is "stop" (a stop id, kept as the last token), "length" or "aborted"; None while it goes on.
    """

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    stop_reason: str | None = None


@dataclass
class _Row:
    request: Request
    sample: Sample
    uniforms: list[float]  # one a token to come: they depend on the row's own seed only
    cached: int = 0  # tokens whose keys and values are in the row's slot

    @property
    def ids(self) -> list[int]:
        return self.request.prompt_ids + self.sample.token_ids


class ContinuousBatch:
    """The rows that are generating now, and the keys and values of those that may go on.

    A row that ended is kept, so that a prompt which begins with it (the next turn of a conversation) only costs its new
    tokens. Change the weights only between rows, and `forget` afterwards.

    Args:
        model: a causal LM in eval mode whose attention takes boolean 4-d masks ("sdpa").
        vocab_size: ids from here on are never sampled (rows of the embedding that no token names).
        pad_id: any valid id; its positions are masked.
        kept_bytes: the longest unused of the kept rows are dropped beyond this.
        most_rows: of those that run at once, where that is known: slots are made in advance, and no more than that.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        vocab_size: int,
        pad_id: int = 0,
        kept_bytes: int = 128 << 20,
        most_rows: int | None = None,
    ) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.pad_id = pad_id
        self.kept_bytes = kept_bytes
        self.prefix_hits = 0  # rows that began from a kept one
        self._rows: list[_Row] = []
        self._kept: OrderedDict[tuple[int, ...], torch.Tensor] = (
            OrderedDict()
        )  # ids -> (layers, 2, heads, columns, size)
        self._kept_size = 0
        self._layers = [_SlotLayer(model, most_rows) for _ in range(model.config.num_hidden_layers)]
        self._cache = DynamicCache()
        self._cache.layers = self._layers

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, requests: Sequence[Request]) -> list[Sample]:
        """Let requests join, with the first token of each.

        Returns the samples, in order. They grow with each `step` until their `stop_reason` is set.
        """
        rows = [_Row(r, Sample(), _uniforms(r)) for r in requests]
        first = len(self._rows)
        self._rows += rows
        columns = max(len(r.prompt_ids) + r.max_tokens for r in requests)
        for layer in self._layers:
            layer.reserve(len(self._rows), columns)
        for slot, row in enumerate(rows, start=first):
            kept = self._longest_prefix(row.request.prompt_ids)
            if kept is not None:
                row.cached = kept.shape[3]
                for layer, states in zip(self._layers, kept, strict=True):
                    layer.buffer[:, slot, :, : row.cached] = states
        self._extend(first)
        return [row.sample for row in rows]

    def step(self) -> None:
        """One more token for every row."""
        self._extend(0)

    @torch.inference_mode()
    def _extend(self, first: int) -> None:
        """Feed the rows from `first` on what is not cached of them (left-padded), and sample a token for each."""
        rows = self._rows[first:]
        fed = [row.ids[row.cached :] for row in rows]
        width = max(map(len, fed))
        device = self.model.device
        ids = torch.tensor([[self.pad_id] * (width - len(new)) + new for new in fed], device=device)
        for row, new in zip(rows, fed, strict=True):
            row.cached += len(new)
        ends = torch.tensor([[row.cached] for row in rows], device=device)
        places = torch.arange(width, device=device)
        positions = ends - width + places
        padding = places < width - torch.tensor([[len(new)] for new in fed], device=device)
        seen = max(row.cached for row in rows)
        for layer in self._layers:
            layer.aim(first, torch.where(padding, -1, positions), seen)
        positions = positions.clamp_min(0)
        logits = self.model(
            input_ids=ids,
            attention_mask=(torch.arange(seen, device=device) <= positions[..., None])[:, None],
            position_ids=positions,
            past_key_values=self._cache,
            logits_to_keep=1,
        ).logits[:, -1]
        self._append(first, logits)

    def abort(self) -> None:
        """Every row ends as "aborted" and keeps its tokens."""
        for row in self._rows:
            row.sample.stop_reason = "aborted"
        self._rows.clear()

    def _append(self, first: int, logits: torch.Tensor) -> None:
        """Sample a token for the rows from `first` on; rows that end leave."""
        rows = self._rows[first:]
        temperature = torch.tensor([row.request.temperature for row in rows], device=logits.device)
        uniforms = torch.tensor([row.uniforms[len(row.sample.token_ids)] for row in rows], device=logits.device)
        log_probs = _distribution(logits[:, : self.vocab_size].float(), temperature, [row.request for row in rows])
        tokens = _pick(log_probs, uniforms, temperature)
        chosen = log_probs.gather(1, tokens[:, None])
        for row, token, log_prob in zip(rows, tokens.tolist(), chosen[:, 0].tolist(), strict=True):
            row.sample.token_ids.append(token)
            row.sample.log_probs.append(log_prob)
            if token in row.request.stop_ids:
                row.sample.stop_reason = "stop"
            elif len(row.sample.token_ids) >= row.request.max_tokens:
                row.sample.stop_reason = "length"
        for slot in reversed(range(len(self._rows))):
            if self._rows[slot].sample.stop_reason is not None:
                self._leave(slot)

    def _leave(self, slot: int) -> None:
        row, last = self._rows[slot], self._rows.pop()
        self._keep(tuple(row.ids), torch.stack([layer.buffer[:, slot, :, : row.cached] for layer in self._layers]))
        if slot < len(self._rows):  # the last row takes the free slot: rows stay without gaps
            self._rows[slot] = last
            for layer in self._layers:
                layer.buffer[:, slot] = layer.buffer[:, len(self._rows)]

    def _keep(self, ids: tuple[int, ...], states: torch.Tensor) -> None:
        if ids in self._kept:
            return
        self._kept[ids] = states
        self._kept_size += states.nbytes
        while self._kept_size > self.kept_bytes:
            self._kept_size -= self._kept.popitem(last=False)[1].nbytes

    def _longest_prefix(self, prompt_ids: list[int]) -> torch.Tensor | None:
        """Keys and values of the longest kept row that `prompt_ids` begin with."""
        for length in sorted({len(ids) for ids in self._kept if len(ids) <= len(prompt_ids)}, reverse=True):
            ids = tuple(prompt_ids[:length])
            if ids in self._kept:
                self._kept.move_to_end(ids)
                self.prefix_hits += 1
                return self._kept[ids]
        return None

    def forget(self) -> None:
        """Drop the kept rows: the weights have changed."""
        self._kept.clear()
        self._kept_size = 0


class _SlotLayer(DynamicLayer):
    """Keys and values of the running rows in one buffer: row i in slot i, its token t in column t.

    transformers' own layer copies the whole cache for every token, and all its rows end at the same column.
    """

    def __init__(self, model: PreTrainedModel, most_slots: int | None) -> None:
        super().__init__()
        self.most_slots = most_slots
        c = model.config
        size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        #: (keys and values, slots, heads, columns, head size). Zeros: a masked column still enters the product of
        #: probabilities and values, and 0 * nan is nan.
        self.buffer = torch.zeros(2, 0, c.num_key_value_heads, 0, size, dtype=model.dtype, device=model.device)

    def reserve(self, slots: int, columns: int) -> None:
        """Room for so many, and a last column for padding; what is there stays."""
        _, have_slots, heads, have_columns, size = self.buffer.shape
        if slots <= have_slots and columns < have_columns:
            return
        twice = 2 * have_slots if self.most_slots is None else min(2 * have_slots, self.most_slots)
        old, shape = self.buffer, (2, max(slots, twice), heads, max(columns + 1, have_columns), size)
        self.buffer = old.new_zeros(shape)
        self.buffer[:, :have_slots, :, :have_columns] = old

    def aim(self, first: int, columns: torch.Tensor, seen: int) -> None:
        """Where the next `update` writes: (rows, width) `columns` of the slots from `first` on, -1 for padding.

        It returns the first `seen` columns of these slots.
        """
        self._slots = slice(first, first + len(columns))
        self._rows = torch.arange(first, first + len(columns), device=columns.device)[:, None]
        self._into = columns
        self._seen = seen

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        for buffer, states in zip(self.buffer, (key_states, value_states), strict=True):
            buffer[self._rows, :, self._into] = states.transpose(1, 2)
        keys, values = self.buffer[:, self._slots, :, : self._seen]
        return keys, values


def generate(model: PreTrainedModel, requests: Sequence[Request], *, vocab_size: int, pad_id: int = 0) -> list[Sample]:
    """Continue every request until its stop id or limit; one `Sample` a request, in order."""
    batch = ContinuousBatch(model, vocab_size=vocab_size, pad_id=pad_id)
    samples = batch.add(requests)
    while len(batch):
        batch.step()
    return samples


def _uniforms(request: Request) -> list[float]:
    """Drawn on the CPU, wherever the model is: a seed has the same numbers everywhere."""
    generator = None if request.seed is None else torch.Generator().manual_seed(request.seed)
    return torch.rand(request.max_tokens, generator=generator, device="cpu").tolist()


def _distribution(logits: torch.Tensor, temperature: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """(batch, vocab) log-probs after temperature, then top-k, then top-p; greedy rows keep temperature 1."""
    log_probs = torch.log_softmax(logits / torch.where(temperature > 0, temperature, 1.0)[:, None], dim=-1)
    if all(r.top_k <= 0 and r.top_p >= 1.0 for r in requests):
        return log_probs
    order = log_probs.argsort(dim=-1, descending=True)
    ranked = log_probs.gather(1, order)
    device = logits.device
    top_k = torch.tensor([r.top_k if r.top_k > 0 else ranked.shape[1] for r in requests], device=device)
    top_p = torch.tensor([r.top_p for r in requests], device=device)
    before = ranked.exp().cumsum(1) - ranked.exp()  # mass of the better tokens
    dropped = (torch.arange(ranked.shape[1], device=device) >= top_k[:, None]) | (before >= top_p[:, None])
    dropped[:, 0] = False
    filtered = log_probs.scatter(1, order, ranked.masked_fill(dropped, float("-inf")))
    return torch.log_softmax(filtered, dim=-1)


def _pick(log_probs: torch.Tensor, uniform: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Inverse CDF: the first token whose cumulative mass exceeds `uniform`; the mode where temperature is 0."""
    cumulative = log_probs.exp().cumsum(1, dtype=torch.float64)
    # scale by the true total so that rounding can never push the index past the last token
    sampled = torch.searchsorted(cumulative, (uniform.double() * cumulative[:, -1])[:, None], right=True).squeeze(1)
    return torch.where(temperature > 0, sampled.clamp_max(log_probs.shape[1] - 1), log_probs.argmax(1))
