"""One update of a policy of a given shape, as verl's engine has it, on a GPU or, to try this code, on the CPU."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, Qwen2Config
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.workers.config import FSDPEngineConfig

from recipe.gtpo.run.memory import Shape
from recipe.gtpo.tasks.arithmetic.policy import train_tokenizer


@dataclass
class Measured:
    """Of the second update, with Adam's state in memory."""

    peak_bytes: int  # 0 on the CPU, which does not count
    seconds: float
    first_loss: float
    second_loss: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def qwen2(shape: Shape, attention: str, tokens: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=max(tokens, 32),
        tie_word_embeddings=shape.tied,
        attn_implementation=attention,
        architectures=["Qwen2ForCausalLM"],
    )


def save_random(shape: Shape, folder: Path, length: int = 4096) -> Path:
    """A model of this shape with random weights and the embedded task's kind of tokenizer: a folder to train from."""
    tokenizer = train_tokenizer(["2+3", "<tool_call>"], vocab_size=300, directory=folder)
    config = qwen2(shape, "sdpa", length)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    return folder


def measure_update(shape: Shape, tokens: int, device: str, engine_class: type, attention: str = "sdpa") -> Measured:
    """Two updates on `tokens` tokens, two sequences packed into one row. A process group must be there.

    float32 masters, bfloat16 for computing, gradient checkpointing, AdamW: what `memory.update` adds up, without what
    else lies in a GPU in a run (contexts, the sleeping engine).
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(qwen2(shape, attention, tokens), dtype=torch.float32)
    apply_monkey_patch(model, use_remove_padding=True, use_fused_kernels=True, fused_kernels_backend="torch")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    engine = object.__new__(engine_class)
    engine.engine_config = FSDPEngineConfig(strategy="fsdp2")
    engine.model_config = SimpleNamespace(
        use_fused_kernels=True, use_remove_padding=True, lora_rank=0, enable_activation_offload=False
    )
    engine.device_mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    model = engine._build_fsdp_module(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, shape.vocabulary, (1, tokens), device=device)
    half = tokens // 2
    positions = torch.cat([torch.arange(half), torch.arange(tokens - half)])[None].to(device)
    losses, seconds, peak = [], 0.0, 0
    for _ in range(2):
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        output = model(input_ids=ids, position_ids=positions, use_cache=False, temperature=1.0, return_dict=True)
        loss = -output.log_probs.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if device == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        seconds = time.perf_counter() - began
    return Measured(peak, seconds, *losses)
