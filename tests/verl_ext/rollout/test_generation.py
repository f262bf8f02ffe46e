"""Protects the transformers rollout's sampler: its tokens and log-probs are the model's, whatever shares the batch.

The reference continues one prompt at a time, without a KV cache, without padding, in a plain loop.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

from verl_ext.rollout.generation import ContinuousBatch, Request, generate

pytestmark = pytest.mark.unit

VOCAB = 23  # tokens with a name; the embedding has more rows
STOP = 7
PROMPTS = [[1, 2, 3], [4], [5, 6, 8, 9, 10, 11], [3, 2, 1]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(qwen2(torch.float32)).eval()


def qwen2(dtype):
    return Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.5,  # sharp distributions: a wrong position or mask shows
        attn_implementation="sdpa",
        dtype=dtype,
    )


@torch.no_grad()
def next_log_probs(model, ids, temperature=1.0, top_k=0, top_p=1.0):
    """log p(next token), by the textbook: temperature, then the k best, then the smallest set with mass >= p."""
    log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1, :VOCAB] / temperature, -1).tolist()
    best = sorted(range(VOCAB), key=lambda i: -log_probs[i])
    kept, mass = [], 0.0
    for rank, token in enumerate(best):
        if kept and (rank >= (top_k or VOCAB) or mass >= top_p):
            break
        kept.append(token)
        mass += math.exp(log_probs[token])
    return [log_probs[i] - math.log(mass) if i in kept else -math.inf for i in range(VOCAB)]


def scores_of(model, prompt, tokens, **filters):
    """The log-prob of each token after what came before it."""
    return [next_log_probs(model, prompt + tokens[:i], **filters)[token] for i, token in enumerate(tokens)]


def run(model, requests, **kwargs):
    return generate(model, requests, vocab_size=VOCAB, **kwargs)


def test_greedy_is_the_mode_at_every_step(model):
    samples = run(model, [Request(prompt, 12, temperature=0) for prompt in PROMPTS])
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        ids = list(prompt)
        for token in sample.token_ids:
            log_probs = next_log_probs(model, ids)
            assert token == max(range(VOCAB), key=log_probs.__getitem__)
            ids.append(token)
        assert sample.log_probs == pytest.approx(scores_of(model, prompt, sample.token_ids), abs=1e-5)
        assert len(sample.token_ids) == 12 and sample.stop_reason == "length"


@pytest.mark.parametrize(
    "filters",
    [{}, {"temperature": 0.7}, {"temperature": 1.5}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.8}],
    ids=str,
)
def test_log_probs_are_those_of_the_distribution_that_was_sampled(model, filters):
    samples = run(model, [Request(p, 10, seed=i, **filters) for i, p in enumerate(PROMPTS)])
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        assert sample.log_probs == pytest.approx(scores_of(model, prompt, sample.token_ids, **filters), abs=1e-5)
        assert all(math.isfinite(lp) for lp in sample.log_probs)


def test_filters_are_each_rows_own(model):
    """Rows with and without filters share a batch."""
    requests = [
        Request(PROMPTS[0], 8, seed=1, top_k=2),
        Request(PROMPTS[0], 8, seed=1),
        Request(PROMPTS[1], 8, temperature=0),
    ]
    for request, sample in zip(requests, run(model, requests), strict=True):
        filters = {"top_k": max(request.top_k, 0)}
        assert sample.log_probs == pytest.approx(
            scores_of(model, request.prompt_ids, sample.token_ids, **filters), abs=1e-5
        )


def test_top_k_of_one_is_greedy_with_probability_one(model):
    one, greedy = run(model, [Request(PROMPTS[2], 8, top_k=1, seed=5), Request(PROMPTS[2], 8, temperature=0)])
    assert one.token_ids == greedy.token_ids
    assert one.log_probs == pytest.approx([0.0] * 8, abs=1e-6)


def test_a_seeded_sample_does_not_depend_on_its_batch(model):
    alone = run(model, [Request(PROMPTS[0], 10, seed=42)])[0]
    others = [Request(PROMPTS[2], 15, seed=1), Request(PROMPTS[1], 2), Request(PROMPTS[3], 10, temperature=0)]
    torch.manual_seed(123)  # what unseeded rows draw
    for batch in ([Request(PROMPTS[0], 10, seed=42), *others], [*others, Request(PROMPTS[0], 10, seed=42)]):
        shared = run(model, batch)[batch.index(Request(PROMPTS[0], 10, seed=42))]
        assert shared.token_ids == alone.token_ids
        assert shared.log_probs == pytest.approx(alone.log_probs, abs=1e-5)


def test_another_seed_is_another_sample(model):
    first, second = run(model, [Request(PROMPTS[0], 20, seed=1), Request(PROMPTS[0], 20, seed=2)])
    assert first.token_ids != second.token_ids


def test_sampling_hits_every_token_as_often_as_its_probability(model):
    """Chi-square of 4000 first tokens; the 0.999 quantile for 22 degrees of freedom is 48.3."""
    draws = 4000
    torch.manual_seed(7)
    samples = run(model, [Request(PROMPTS[0], 1, temperature=1.3) for _ in range(draws)])
    expected = [draws * math.exp(lp) for lp in next_log_probs(model, PROMPTS[0], temperature=1.3)]
    counts = [0] * VOCAB
    for sample in samples:
        counts[sample.token_ids[0]] += 1
    # the usual rule: cells below 5 are one cell
    common = [i for i in range(VOCAB) if expected[i] >= 5]
    cells = [(counts[i], expected[i]) for i in common]
    cells.append((draws - sum(c for c, _ in cells), draws - sum(e for _, e in cells)))
    assert len(common) >= 5
    assert sum((count - mean) ** 2 / mean for count, mean in cells if mean > 0) < 48.3


def test_ids_that_no_token_names_are_never_sampled(model):
    """Rows of the embedding beyond the tokenizer: even when the model wants nothing else."""
    with torch.no_grad():
        saved = model.lm_head.weight.clone()
        model.lm_head.weight[VOCAB:] *= 100
    try:
        wanted = model(torch.tensor([PROMPTS[0]])).logits[0, -1].argmax()
        samples = run(
            model, [Request(PROMPTS[0], 20, seed=s) for s in range(20)] + [Request(PROMPTS[0], 20, temperature=0)]
        )
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(saved)
    assert wanted >= VOCAB
    assert max(token for sample in samples for token in sample.token_ids) < VOCAB


def test_a_stop_token_is_kept_and_ends_its_row_only(model):
    requests = [Request(p, 60, seed=s, temperature=1.5, stop_ids=frozenset({STOP})) for s, p in enumerate(PROMPTS * 3)]
    samples = run(model, requests)
    stopped = [s for s in samples if s.stop_reason == "stop"]
    assert stopped and len({len(s.token_ids) for s in stopped}) > 1  # rows left the batch at different times
    for request, sample in zip(requests, samples, strict=True):
        assert STOP not in sample.token_ids[:-1]
        assert (sample.token_ids[-1] == STOP) == (sample.stop_reason == "stop")
        expected = scores_of(model, request.prompt_ids, sample.token_ids, temperature=1.5)
        assert sample.log_probs == pytest.approx(expected, abs=1e-5)  # also after others have left


def test_every_row_has_its_own_limit(model):
    samples = run(model, [Request(PROMPTS[0], n, seed=n) for n in (1, 5, 3)])
    assert [len(s.token_ids) for s in samples] == [len(s.log_probs) for s in samples] == [1, 5, 3]
    assert {s.stop_reason for s in samples} == {"length"}


def test_a_stop_token_on_the_last_allowed_place_is_a_stop(model):
    first = run(model, [Request(PROMPTS[0], 1, temperature=0)])[0].token_ids[0]
    (sample,) = run(model, [Request(PROMPTS[0], 1, temperature=0, stop_ids=frozenset({first}))])
    assert sample.stop_reason == "stop"


def test_rows_join_and_leave_between_any_two_tokens(model):
    """Each row's tokens are those it has alone, whoever came before it, came after it, or left its slot to it."""
    torch.manual_seed(11)
    batch = ContinuousBatch(model, vocab_size=VOCAB)
    requests, samples = [], []
    for step in range(40):
        joining = [
            Request(PROMPTS[(step + i) % 4], 1 + (step * 7 + i) % 13, seed=step * 10 + i) for i in range(step % 3)
        ]
        if joining:
            requests += joining
            samples += batch.add(joining)
        if len(batch):
            batch.step()
    while len(batch):
        batch.step()
    assert len(samples) > 30 and all(s.stop_reason == "length" for s in samples)
    for request, sample in zip(requests, samples, strict=True):
        (alone,) = run(model, [request])
        assert sample.token_ids == alone.token_ids
        assert sample.log_probs == pytest.approx(alone.log_probs, abs=1e-5)


def test_what_a_slot_held_before_is_never_read(model):
    """A row that takes a used slot in a wide batch attends to nothing of the row before: its log-probs are exact."""
    batch = ContinuousBatch(model, vocab_size=VOCAB)
    batch.add([Request([1] * 30, 2, seed=1), Request([2] * 30, 40, seed=2)])
    batch.step()  # the first row leaves; the second moves to its slot
    assert len(batch) == 1
    (late,) = batch.add([Request(PROMPTS[1], 10, seed=3)])
    while late.stop_reason is None:
        batch.step()
    assert late.log_probs == pytest.approx(scores_of(model, PROMPTS[1], late.token_ids), abs=1e-5)


@pytest.mark.parametrize("kept_bytes", [0, 8000, 1 << 20], ids=["nothing", "a_few", "all"])
def test_what_is_kept_of_a_conversation_changes_nothing(model, kept_bytes):
    """Turns that go on from a kept row give what a fresh batch gives, also when several share or lose their prefix."""
    batch = ContinuousBatch(model, vocab_size=VOCAB, kept_bytes=kept_bytes)
    conversations = [list(PROMPTS[i % 4]) for i in range(8)]
    for turn in range(3):
        # even and odd conversations have the same seed in the first turn: some prefixes are shared
        requests = [Request(ids, 5 + i % 3, seed=turn * (i + 1) + i % 2) for i, ids in enumerate(conversations)]
        samples = batch.add(requests[:3])
        batch.step()
        samples += batch.add(requests[3:])
        while len(batch):
            batch.step()
        for i, (request, sample) in enumerate(zip(requests, samples, strict=True)):
            (alone,) = run(model, [request])
            assert sample.token_ids == alone.token_ids
            assert sample.log_probs == pytest.approx(alone.log_probs, abs=1e-5)
            conversations[i] = [*request.prompt_ids, *sample.token_ids, *range(2, 2 + i % 4)]
    assert (batch.prefix_hits == 0) == (kept_bytes == 0)
    assert batch.prefix_hits >= 16 or kept_bytes < 1 << 20


def test_weights_that_change_make_the_batch_forget(model):
    batch = ContinuousBatch(model, vocab_size=VOCAB)
    (first,) = batch.add([Request(PROMPTS[2], 3, seed=1)])
    while len(batch):
        batch.step()
    batch.forget()
    batch.add([Request(PROMPTS[2] + first.token_ids, 1, seed=1)])
    assert batch.prefix_hits == 0


@pytest.mark.parametrize(("most_rows", "slots"), [(None, 6), (5, 5), (4, 4)])
def test_slots_are_made_in_advance_up_to_the_most_rows(model, most_rows, slots):
    batch = ContinuousBatch(model, vocab_size=VOCAB, most_rows=most_rows)
    batch.add([Request(PROMPTS[0], 5, seed=seed) for seed in range(3)])
    assert {layer.buffer.shape[1] for layer in batch._layers} == {3}
    batch.add([Request(PROMPTS[0], 5, seed=3)])
    assert {layer.buffer.shape[1] for layer in batch._layers} == {slots}


def test_an_abort_keeps_what_was_generated(model):
    requests = [Request(p, 10, seed=3) for p in PROMPTS] + [Request([1], 2, seed=3)]
    batch = ContinuousBatch(model, vocab_size=VOCAB)
    samples = batch.add(requests)
    batch.step()
    batch.step()
    batch.abort()
    assert len(batch) == 0
    assert [s.stop_reason for s in samples] == ["aborted"] * 4 + ["length"]
    for sample, reference in zip(samples, run(model, requests), strict=True):
        assert sample.token_ids == reference.token_ids[:3] and len(sample.log_probs) == len(sample.token_ids)


class Elsewhere(TorchDispatchMode):
    """Notes the operations that meet a tensor which is not on the device "meta", where no tensor has values."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if not all(tensor.is_meta for tensor in tensors):
            self.seen.add(str(function))
        return result


def test_every_tensor_is_on_the_device_of_the_model(monkeypatch):
    """Without a GPU: "meta" is the other device. A tensor made without a word about its device is on the CPU."""
    in_python = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda some: [0] * len(some) if some.is_meta else in_python(some))
    with torch.device("meta"):
        model = Qwen2ForCausalLM(qwen2(torch.bfloat16)).eval()
    with Elsewhere() as elsewhere:
        batch = ContinuousBatch(model, vocab_size=VOCAB)
        batch.add([Request(PROMPTS[0], 4, seed=1, top_k=3, top_p=0.5), Request(PROMPTS[1], 2)])
        batch.step()
        batch.add([Request([*PROMPTS[1], 0, 0, 3], 3, temperature=0)])
        while len(batch):
            batch.step()
    assert batch.prefix_hits == 1
    assert elsewhere.seen == {"aten.rand.generator"}  # a seed's numbers are those of the CPU, everywhere
