"""Decoding of the embedded policy, written out: one token a row at a time, after prompts that rows may share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from recipe.gtpo.tasks.arithmetic.warm_start import pad

#: Tokens that the response cache makes room for at a time. Rows must lie close together: without the gaps that room for
#: all later tokens would leave between them, memory is read up to three times as fast.
_GROWTH = 4


class Decoder:
    """`Qwen2ForCausalLM` written out for one token a row, after a prompt that rows may share.

    transformers' own forward spends more time between its operations than in them at this size, and it keeps the
    prompt's keys and values once a row; rollouts of one problem have the same. What is left is the time to read the
    cache. What a row gets does not depend, to the last bit, on where its cache lies, nor on which rows and prompts that
    have ended are still in the batch (tests/gtpo/experiments/test_twin_decoder.py).

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
        self._response = _Cache(len(self._layers), len(prompts), self._heads, room, hidden.shape[-1] // self._heads)
        self._length = 0
        positions = torch.arange(ids.shape[1] + room)[None]
        self._cos, self._sin = (table[0] for table in model.model.rotary_emb(hidden, positions))

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only."""
        self._slot, self._position = self._slot[rows], self._position[rows]
        self._response.keep(rows, self._length)
        left, group = torch.unique(self._slot // self._slots, return_inverse=True)
        if len(left) < self._groups:  # prompts whose rows have all ended
            self._slot = group * self._slots + self._slot % self._slots
            self._prompt = [(keys[left], values[left]) for keys, values in self._prompt]
            self._bias, self._groups = self._bias[left], len(left)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B,) the newest token of every row -> (B, vocabulary) logits of the next."""
        batch, t, heads = len(tokens), self._length, self._heads
        norm = torch.nn.functional.rms_norm
        h = self._model.model.embed_tokens(tokens)
        size = h.shape[-1] // heads
        cos, sin = self._cos[self._position][:, None, None], self._sin[self._position][:, None, None]
        for (norm1, qkv, bias, o, norm2, gate_up, down), (pk, pv), (rk, rv) in zip(
            self._layers, self._prompt, self._response.up_to(t + 1), strict=True
        ):
            x = torch.nn.functional.linear(norm(h, h.shape[-1:], norm1, self._eps), qkv, bias)
            x = x.view(batch, 3, heads, size)
            qk = x[:, :2]
            qk = qk * cos + torch.cat((-qk[..., size // 2 :], qk[..., : size // 2]), dim=-1) * sin
            q = qk[:, 0] * size**-0.5
            rk[:, :, t], rv[:, :, t] = qk[:, 1], x[:, 2]
            to_prompt = self._by_prompt(q) @ pk.transpose(2, 3) + self._bias
            to_response = q[:, :, None] @ rk.transpose(2, 3)
            width = to_prompt.shape[-1]
            weight = torch.cat((self._by_row(to_prompt), to_response[:, :, 0]), dim=-1).softmax(-1)
            read = self._by_row(self._by_prompt(weight[..., :width]) @ pv)
            read = read + (weight[:, :, None, width:] @ rv)[:, :, 0]
            h = h + torch.nn.functional.linear(read.reshape(batch, -1), o)
            gate, up = torch.nn.functional.linear(norm(h, h.shape[-1:], norm2, self._eps), gate_up).chunk(2, dim=-1)
            h = h + torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down)
        self._length += 1
        self._position = self._position + 1
        return self._model.lm_head(norm(h, h.shape[-1:], self._model.model.norm.weight, self._eps))

    def _by_prompt(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, N) -> (G, H, S, N); 0 where a slot has no running row."""
        if self._slots == 1:  # then the rows are the prompts, in order
            return x[:, :, None]
        slots = x.new_zeros(self._groups * self._slots, *x.shape[1:])
        slots[self._slot] = x
        return slots.view(self._groups, self._slots, *x.shape[1:]).transpose(1, 2)

    def _by_row(self, x: torch.Tensor) -> torch.Tensor:
        """(G, H, S, N) -> (B, H, N)"""
        if self._slots == 1:
            return x[:, :, 0]
        return x.transpose(1, 2).reshape(self._groups * self._slots, x.shape[1], x.shape[3])[self._slot]


class _Cache:
    """Keys and values of the response of B rows, (B, H, t, D) a layer, laid out anew as they grow: see `_GROWTH`."""

    def __init__(self, layers: int, rows: int, heads: int, room: int, size: int) -> None:
        self._rows, self._heads, self._room, self._size = rows, heads, room, size
        self._stride = 0  # tokens that a row has room for at present
        self._memory = [torch.empty(rows * heads * room * size) for _ in range(2 * layers)]
        self._spare = torch.empty(rows * heads * room * size)  # where the next one is laid out

    def up_to(self, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(B, H, tokens, D) keys and values a layer: views to be read, and written at the last token."""
        if tokens > self._stride:
            self._lay_out(min(tokens - 1 + _GROWTH, self._room), tokens - 1)
        found = [self._view(memory, self._rows, self._stride)[:, :, :tokens] for memory in self._memory]
        return list(zip(found[::2], found[1::2], strict=True))

    def keep(self, rows: torch.Tensor, tokens: int) -> None:
        """Go on with these rows and their first `tokens` tokens."""
        self._lay_out(min(tokens + _GROWTH, self._room), tokens, rows)

    def _lay_out(self, stride: int, tokens: int, rows: torch.Tensor | None = None) -> None:
        count = self._rows if rows is None else len(rows)
        for i, memory in enumerate(self._memory):
            old = self._view(memory, self._rows, self._stride)[:, :, :tokens]
            self._view(self._spare, count, stride)[:, :, :tokens] = old if rows is None else old[rows]
            self._memory[i], self._spare = self._spare, memory
        self._rows, self._stride = count, stride

    def _view(self, memory: torch.Tensor, rows: int, stride: int) -> torch.Tensor:
        shape = (rows, self._heads, stride, self._size)
        return memory[: rows * self._heads * stride * self._size].view(shape)
