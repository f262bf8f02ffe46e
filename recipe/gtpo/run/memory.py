"""Whether a training fits its GPUs, by adding up what lies in their memory: pure arithmetic, in bytes.

A step has two peaks on a GPU that trains and generates in turn. In the *update* the trainer has all it needs (weights,
gradients, Adam) and the sleeping vLLM next to nothing; in *generation* vLLM has the share that it was given, and the
trainer what it does not offload. (`rollout=transformers` has no share: its weights, keys and values take what they
need.) `choose` finds settings with which both fit; `proposals` says what to change where there are none.

Weights are float32 masters and bfloat16 for computing (verl's FSDP2 engine and its defaults), the optimizer is AdamW,
gradient checkpointing is on. The constants that no formula gives are at the top; the tests compare with the sizes that
verl publishes for its own scripts. Nothing of this was measured on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

GB = 1e9

#: Of a GPU in the update: CUDA contexts, NCCL, and what an engine keeps while it sleeps; SGLang's weights come on top.
ASLEEP = 3 * GB
#: Of a GPU in generation: the trainer's context, its buffers for the weight sync, what the allocator cannot use.
SYNC = 4 * GB
#: Sampling a token takes so many bytes of each logit in rollout=transformers: float32 and, added up, float64.
SAMPLED_BYTES = 24
#: Of vLLM's share: CUDA graphs, sampling and activations; and so much of its weights again.
VLLM_FIXED, VLLM_OF_WEIGHTS = 3 * GB, 0.13
#: The part of a GPU that may be planned for.
USABLE = 0.95
#: The rows that verl's fused head works on at a time, and the bytes that it has of each logit in its backward pass.
CHUNK, FUSED_BYTES = 512, 24
#: Without the fused head: verl's pass for log-probs and entropy holds so many bfloat16 copies of all logits.
COPIES = 4
#: Longest trajectories that vLLM's cache has to hold at once, for the rollouts not to crawl.
AT_ONCE = 8
#: What is trained where nobody says: the largest of these that fits in full, and the first where none does.
DEFAULTS = ("0.5B", "1.5B", "3B", "7B")
#: Numbers of trajectories at once that are proposed to rollout=transformers.
ROWS = (512, 256, 128, 64, 32, 16)
#: vLLM's share of a GPU is looked for in these steps.
SHARES = tuple(share / 100 for share in range(70, 5, -5))
#: Keys of a config.json by which a layer is more than one block of three matrices: a mixture of experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer of the Llama and Qwen2 kind."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head: int  # size of one
    vocabulary: int
    tied: bool  # the embedding is the head
    bias: bool = True  # of query, key and value, as Qwen2 has them

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape | None:
        """Of a `config.json`; None for an architecture that this arithmetic does not know."""
        config = config.get("text_config") or config
        if any(config.get(key) not in (None, 0, 1) for key in EXPERTS):
            return None
        try:
            heads = config["num_attention_heads"]
            return cls(
                hidden=config["hidden_size"],
                layers=config["num_hidden_layers"],
                intermediate=config["intermediate_size"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head=config.get("head_dim") or config["hidden_size"] // heads,
                vocabulary=config["vocab_size"],
                tied=bool(config.get("tie_word_embeddings", False)),
                bias=config.get("model_type") == "qwen2" or bool(config.get("attention_bias", False)),
            )
        except KeyError:
            return None

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of a layer's matrices."""
        wide, narrow = self.heads * self.head, self.kv_heads * self.head
        attention = ((self.hidden, wide), (self.hidden, narrow), (self.hidden, narrow), (wide, self.hidden))
        return (*attention, *((self.hidden, self.intermediate),) * 2, (self.intermediate, self.hidden))

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        biases = (self.heads + 2 * self.kv_heads) * self.head if self.bias else 0
        return sum(a * b for a, b in self.linears) + biases + 2 * self.hidden

    @property
    def root(self) -> int:
        """Parameters outside the layers: embedding, head, last norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.root

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA with this rank on every matrix of the layers."""
        return self.layers * rank * sum(a + b for a, b in self.linears)

    @property
    def cache(self) -> int:
        """Bytes of a token's keys and values, in bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head

    @property
    def activations(self) -> int:
        """Bytes of a token in one layer: residuals, norms in float32, rotations; gate, up and two products."""
        return 2 * (12 * self.hidden + 4 * self.intermediate)


def _qwen(hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, tied: bool) -> Shape:
    return Shape(hidden, layers, intermediate, heads, kv_heads, hidden // heads, vocabulary, tied)


#: Qwen2.5 by its size, as in the name of the model; of the published config.json files.
QWEN25 = {
    "0.5B": _qwen(896, 24, 4864, 14, 2, 151936, tied=True),
    "1.5B": _qwen(1536, 28, 8960, 12, 2, 151936, tied=True),
    "3B": _qwen(2048, 36, 11008, 16, 2, 151936, tied=True),
    "7B": _qwen(3584, 28, 18944, 28, 4, 152064, tied=False),
    "14B": _qwen(5120, 48, 13824, 40, 8, 152064, tied=False),
}


def by_name(model: str) -> Shape | None:
    """Of a hub name that says which Qwen2.5 it is, as Qwen/Qwen2.5-7B-Instruct does."""
    found = re.search(r"Qwen2\.5-(?:Math-|Coder-)?(\d+(?:\.\d+)?B)(?:-|$)", model)
    return QWEN25.get(found[1]) if found else None


@dataclass(frozen=True)
class Machines:
    """What the training runs on: `nodes` of `gpus` each."""

    gpus: int
    memory: float  # bytes of one GPU
    nodes: int = 1
    host: float | None = None  # bytes of a node's own memory; None where nobody knows

    @property
    def all_gpus(self) -> int:
        return self.gpus * self.nodes

    def __str__(self) -> str:
        nodes = f"{self.nodes} x " if self.nodes > 1 else ""
        return f"{nodes}{self.gpus} x {self.memory / GB:.0f} GB"


@dataclass(frozen=True)
class Settings:
    """What of the config decides on memory. The first two are for `choose` to find, unless they are given."""

    tokens: int  # of one micro-batch: actor.ppo_max_token_len_per_gpu
    longest: int  # prompt and response together
    offload: bool = False  # weights and Adam of the trainer go to the host while vLLM generates
    cpu_adam: bool = False  # they are there always, and the optimizer runs there: fsdp_config.offload_policy
    share: float = 0.6  # of a GPU, for vLLM: rollout.gpu_memory_utilization
    lora_rank: int = 0
    merged: bool = False  # the adapter reaches the rollout inside the weights: model.lora.merge
    sglang: bool = False  # generates, in the place of vLLM
    tensor_parallel: int = 1  # GPUs that share one copy of vLLM's weights
    ulysses: int = 1  # GPUs that share the tokens of one trajectory in the update
    fused: bool = True  # no logits of a whole micro-batch: model.use_fused_kernels
    flash: bool = False  # flash-attn's kernels; without them attention reads a mask of tokens x tokens
    rows: int = 0  # trajectories that rollout=transformers has at once: rollout.max_num_seqs; 0: vLLM or SGLang
    prompt: int = 0  # of `longest`
    context: int = 0  # tokens of a request that vLLM has to have room for, where that is set: rollout.max_model_len
    apart: bool = False  # rollouts have GPUs of their own, beside those of the training: mode=separate_async
    old_log_probs: bool = True  # are worked out: algorithm.rollout_correction.bypass_mode takes the rollouts' instead
    reference: bool = False  # a KL term asks for a model to compare with; with LoRA that is the base of the trained one

    @property
    def serves_adapter(self) -> bool:
        """Whether the rollout has the adapter beside weights that never change."""
        return bool(self.lora_rank) and not self.merged

    @property
    def tokens_of_one(self) -> int:
        """Of the longest trajectory, on one GPU."""
        return -(-self.longest // self.ulysses)


def trainable(shape: Shape, settings: Settings) -> int:
    return shape.adapter(settings.lora_rank) if settings.lora_rank else shape.parameters


def rollout_weights(shape: Shape, settings: Settings) -> float:
    """Bytes of the engine's weights on one GPU."""
    return 2 * shape.parameters / settings.tensor_parallel


def update(shape: Shape, machines: Machines, settings: Settings) -> dict[str, float]:
    """Bytes on one GPU at the peak of the update, by what they are."""
    tokens, trained = settings.tokens, trainable(shape, settings)
    shards = machines.all_gpus
    kept = 0 if settings.cpu_adam else 1
    logits = tokens * shape.vocabulary * 2 * COPIES
    if settings.fused:
        head = shape.vocabulary * shape.hidden * 2  # its gradient, and a chunk's part of it
        logits = min(CHUNK, tokens) * shape.vocabulary * FUSED_BYTES + (0 if settings.lora_rank else 2 * head)
    activations = tokens * (2 * shape.layers * shape.hidden + shape.activations)
    mask = 0 if settings.flash else 3 * tokens**2  # as truth values, and as the bfloat16 that the kernel adds
    # when the backward pass is at the root, the activations are gone: its gradient, and the float32 copy to be reduced
    root_gradient = 0 if settings.lora_rank else 6 * shape.root
    # verl's SGLang server gives up the cache alone where it gets nothing but adapters (async_sglang_server.py, sleep)
    stays = rollout_weights(shape, settings) if settings.sglang and settings.serves_adapter else 0
    return {
        "weights": kept * 4 * (shape.parameters + (trained if settings.lora_rank else 0)) / shards,
        "gradients": kept * 4 * trained / shards,
        "Adam": kept * 8 * trained / shards,
        "gathered layers": 2 * (2 * shape.layer + shape.root),
        "activations and logits": max(activations + mask + logits, root_gradient),
        "SGLang's weights": stays,
        "contexts": ASLEEP,
    }


def generation(shape: Shape, machines: Machines, settings: Settings) -> dict[str, float]:
    """Bytes on one GPU while the rollout generates."""
    trained = trainable(shape, settings)
    weights = shape.parameters + (trained if settings.lora_rank else 0)
    away = settings.offload or settings.cpu_adam
    vllm = {"vLLM": settings.share * machines.memory}
    return {
        **({"rollout": _transformers(shape, settings)} if settings.rows else vllm),
        "trainer": 0 if away else (4 * weights + 8 * trained) / machines.all_gpus,
        "contexts and weight sync": SYNC,
    }


def _transformers(shape: Shape, settings: Settings) -> float:
    """Bytes of verl_ext/rollout with all its rows: weights, keys and values, and reading all prompts at once."""
    rows, prompt = settings.rows, settings.prompt
    # when its buffers grow, the old ones are there while the new ones are filled
    cache = 2 * rows * settings.longest * shape.cache
    reading = rows * (prompt * shape.activations + 3 * prompt**2)
    return 2 * shape.parameters + cache + max(reading, rows * shape.vocabulary * SAMPLED_BYTES)


def cache_tokens(shape: Shape, machines: Machines, settings: Settings) -> int:
    """Tokens whose keys and values vLLM has room for, in one replica."""
    copies = settings.tensor_parallel
    weights = rollout_weights(shape, settings)
    left = settings.share * machines.memory - weights * (1 + VLLM_OF_WEIGHTS) - VLLM_FIXED
    return max(0, int(left * copies / shape.cache))


def host(shape: Shape, machines: Machines, settings: Settings) -> dict[str, float]:
    """Bytes of a node's own memory, by what they are."""
    trained = trainable(shape, settings)
    weights = 4 * (shape.parameters + (trained if settings.lora_rank else 0))
    away = weights + 8 * trained if settings.offload else weights + 12 * trained if settings.cpu_adam else 0
    # verl's FSDP keeps it there whatever its param_offload says, in float32 (ref.fsdp_config.model_dtype)
    reference = 4 * shape.parameters if settings.reference and not settings.lora_rank else 0
    # As float32. Where the embedding is the head, verl has no process begin with empty weights (use_meta_tensor).
    readers = machines.gpus if shape.tied else 1
    return {
        "offloaded": away / machines.nodes,
        "KL reference": reference / machines.nodes,
        "weights for old log-probs": _copies(settings) * weights / machines.nodes,
        "weights of sleeping rollouts": machines.gpus * rollout_weights(shape, settings) if _kept(settings) else 0,
        "weights that are read": readers * weights,
    }


def _copies(settings: Settings) -> int:
    """How often separate_async has the trained weights on the host besides: at every step it takes a copy for the old
    log-probs, and lets go of the one before when it is whole. What lies there already is not copied."""
    if not settings.apart or not settings.old_log_probs or settings.cpu_adam:
        return 0
    return 1 if settings.offload else 2


def _kept(settings: Settings) -> bool:
    """Whether the rollouts' weights go to the host for the update, to come back from there. vLLM does so where it gets
    adapters alone, and else drops them; SGLang then leaves them where they are, and else does so."""
    return not settings.rows and settings.serves_adapter != settings.sglang


def lacking(shape: Shape, machines: Machines, settings: Settings) -> str | None:
    """What does not fit, in words with numbers; None where all does."""
    usable = USABLE * machines.memory
    for phase, parts in (
        ("the update", update(shape, machines, settings)),
        ("generation", generation(shape, machines, settings)),
    ):
        total = sum(parts.values())
        if total > usable:
            return f"{phase} needs about {total / GB:.0f} GB of each GPU's {machines.memory / GB:.0f} ({_shown(parts)})"
    tokens, wanted = cache_tokens(shape, machines, settings), AT_ONCE * settings.longest
    room = f"vLLM's share of {settings.share:g} has room for {tokens} tokens beside the weights, and"
    if tokens < wanted and not settings.rows:
        return f"{room} {AT_ONCE} of the longest trajectories are {wanted}"
    if tokens < settings.context:  # vLLM does not start
        return f"{room} one request of actor_rollout_ref.rollout.max_model_len has {settings.context}"
    parts = host(shape, machines, settings)
    needed = sum(parts.values())
    if machines.host is not None and needed > machines.host:
        has = machines.host / GB
        return f"the host needs about {needed / GB:.0f} GB of memory and has {has:.0f} ({_shown(parts)})"
    return None


def _shown(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{part} {size / GB:.1f}" for part, size in parts.items() if size >= 0.05 * GB)


def choose(
    shape: Shape,
    machines: Machines,
    settings: Settings,
    *,
    tokens: int | None = None,
    offload: bool | None = None,
    share: float | None = None,
) -> Settings | None:
    """The settings that fit and cost least time; None where none fits.

    Args:
        settings: what is not chosen here.
        tokens, offload, share: given ones; None: to be chosen. Less offloading comes first, then larger micro-batches,
            then a larger share for vLLM.
    """
    one = settings.tokens_of_one
    for try_tokens in (tokens,) if tokens is not None else (2 * one, one):
        for try_offload in (offload,) if offload is not None else (False, True):
            for try_share in (share,) if share is not None else SHARES:
                tried = replace(settings, tokens=try_tokens, offload=try_offload, share=try_share)
                if lacking(shape, machines, tried) is None:
                    return tried
    return None


def default_size(machines: Machines, settings: Settings, **given: Any) -> str:
    """Of Qwen2.5, by its name. `given`: as `choose` takes it."""
    fitting = [size for size in DEFAULTS if choose(QWEN25[size], machines, settings, **given)]
    return (fitting or list(DEFAULTS[:1]))[-1]


def best(settings: Settings, *, tokens: int, offload: bool, share: float | None) -> Settings:
    """What comes closest to fitting where nothing does: for the numbers of a refusal."""
    return replace(settings, tokens=tokens, offload=offload, share=share or SHARES[len(SHARES) // 2])


def proposals(
    shape: Shape, machines: Machines, settings: Settings, remedies: Mapping[str, str] | None = None, **given: Any
) -> Iterator[str]:
    """What would fit instead, each as something to leave out, set, buy or take.

    Args:
        remedies: how to leave each of `given` to be chosen; and `lora`, how an adapter is trained.
        given: as `choose` takes it. It stays, unless a proposal says otherwise.
    """
    fits: Callable[..., Settings | None] = partial(choose, **given)
    yield from _without(shape, machines, settings, remedies or {}, given)
    if settings.context and fits(shape, machines, replace(settings, context=0)):
        yield "leave out actor_rollout_ref.rollout.max_model_len"
    if settings.rows:
        if fits(shape, machines, replace(settings, rows=0)):
            yield "rollout=vllm"
        fewer = (replace(settings, rows=rows) for rows in ROWS if rows < settings.rows)
        if some := next((one for one in fewer if fits(shape, machines, one)), None):
            yield f"actor_rollout_ref.rollout.max_num_seqs={some.rows}"
    elif not settings.lora_rank and fits(shape, machines, replace(settings, lora_rank=32)):
        yield (remedies or {}).get("lora", "actor_rollout_ref.model.lora_rank=32")
    if settings.sglang and settings.serves_adapter and fits(shape, machines, replace(settings, merged=True)):
        yield "actor_rollout_ref.model.lora.merge=true"
    if settings.reference and fits(shape, machines, replace(settings, reference=False)):
        yield "actor_rollout_ref.actor.use_kl_loss=false"
    on_cpu = replace(settings, cpu_adam=True)
    if not settings.cpu_adam and (chosen := fits(shape, machines, on_cpu, offload=False)):
        yield (
            "actor_rollout_ref.actor.fsdp_config.offload_policy=true (Adam on the CPU: slower, and "
            f"{sum(host(shape, machines, chosen).values()) / GB:.0f} GB of the host's memory)"
        )
    half = replace(settings, longest=settings.longest // 2)
    if fits(shape, machines, half):
        yield f"data.max_prompt_length + data.max_response_length of {half.longest} instead of {settings.longest}"
    if machines.host is not None and (chosen := fits(shape, replace(machines, host=None), settings)):
        needed = sum(host(shape, machines, chosen).values())  # more than there is, as nothing fits with that
        yield f"{needed / GB:.0f} GB of the host's memory instead of {machines.host / GB:.0f}"
    more = (replace(machines, gpus=n) for n in (2, 4, 8) if n > machines.gpus)
    if fitting := next((m for m in more if fits(shape, m, settings)), None):
        yield f"{fitting.gpus} such GPUs"
    smaller = [(name, s) for name, s in QWEN25.items() if s.parameters < shape.parameters]
    if fitting_name := next((name for name, s in reversed(smaller) if fits(s, machines, settings)), None):
        yield f"a model like Qwen2.5-{fitting_name}"


def _without(
    shape: Shape, machines: Machines, settings: Settings, remedies: Mapping[str, str], given: Mapping[str, Any]
) -> Iterator[str]:
    """The remedy of each that is given and without which all fits; where none is the only cause, of all together."""
    names = [name for name, value in given.items() if value is not None]
    causes = [name for name in names if choose(shape, machines, settings, **{**given, name: None})]
    if causes:
        yield from (remedies[name] for name in causes)
    elif names and choose(shape, machines, settings):
        yield " and ".join(remedies[name] for name in names)


def table(machines: Machines, settings: Settings) -> str:
    """Which Qwen2.5 can be trained on these machines, in lines for a terminal."""
    lines = [
        f"{machines!s:<16} {'trained':<12} {'update':>8} {'generation':>11} {'micro-batch':>12} {'vLLM':>6}  offload"
    ]
    for name, shape in QWEN25.items():
        for rank in (0, 32):
            asked = replace(settings, lora_rank=rank)
            found = choose(shape, machines, asked)
            shown = found or replace(asked, tokens=asked.longest, offload=True)
            sizes = [sum(f(shape, machines, shown).values()) / GB for f in (update, generation)]
            what = f"{'Qwen2.5-' + name:<16} {'LoRA, 32' if rank else 'in full':<12}"
            end = f"{shown.tokens:>12} {shown.share:>6.2f}  {'yes' if shown.offload else 'no'}"
            lines.append(f"{what} {sizes[0]:>5.0f} GB {sizes[1]:>8.0f} GB {end if found else '  does not fit'}")
    return "\n".join(lines)
