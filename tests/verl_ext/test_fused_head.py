"""Protects the fused head under FSDP2: the same log-probs and gradients as from the whole logits, for a head of its own
too, which verl alone cannot do. One process and two, over gloo.
"""

from __future__ import annotations

import copy
import os
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, Qwen2Config
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_ext.cpu.engine import CPUFSDP2Engine, wanted
from verl_ext.fused_head import FusedHeadInRoot

TOKENS = 1100  # more than two of verl's chunks
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


def tiny(tied: bool, lora: bool):
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(**sizes, **heads, tie_word_embeddings=tied, attn_implementation="sdpa")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def shard(model, engine_class, mesh, packed=True):
    """As the engine does it, after verl's patch of the model's forward."""
    return build(model, engine_class, mesh, packed)[1]


def build(model, engine_class, mesh, packed=True):
    """The engine, as far as it is needed here, and its module."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    apply_monkey_patch(base, use_remove_padding=packed, use_fused_kernels=True, fused_kernels_backend="torch")
    engine = object.__new__(engine_class)
    engine.engine_config = FSDPEngineConfig(strategy="fsdp2", mixed_precision=FP32)
    engine.model_config = SimpleNamespace(
        use_fused_kernels=True, lora_rank=0, enable_activation_offload=False, use_remove_padding=packed
    )
    engine.device_mesh = mesh
    return engine, engine._build_fsdp_module(model)


def differences(tied: bool, lora: bool, world: int) -> tuple[float, float]:
    """(of log-probs, of gradients relative to the largest) between the fused head and the whole logits.

    Two sequences packed into one row, as verl packs a micro-batch without padding.
    """
    plain = tiny(tied, lora)
    fused = copy.deepcopy(plain)
    ids = torch.randint(0, 300, (1, TOKENS))
    positions = torch.cat([torch.arange(700), torch.arange(TOKENS - 700)])[None]
    weights = torch.linspace(0, 1, TOKENS)
    logits = plain(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    wanted = logits.log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None])[0, :, 0]
    (wanted * weights).sum().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    del plain
    fused = shard(fused, CPUFSDP2Engine, init_device_mesh("cpu", (world,)))
    assert fused.config.tie_word_embeddings is tied
    found = fused(input_ids=ids, position_ids=positions, use_cache=False, temperature=1.0, return_dict=True).log_probs[
        0
    ]
    (found * weights).sum().backward()
    far = [
        float((p.grad.full_tensor() - gradients[name]).abs().max() / gradients[name].abs().max())
        for name, p in fused.named_parameters()
        if p.grad is not None
    ]
    assert len(far) == len(gradients)
    return float((found - wanted).detach().abs().max()), max(far)


@pytest.fixture
def one_process(tmp_path, monkeypatch):
    from transformers.models.qwen2 import Qwen2ForCausalLM

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", Qwen2ForCausalLM.forward)  # verl replaces it for good
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.unit
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
def test_the_fused_head_is_the_whole_logits(one_process, tied, lora):
    log_probs, gradients = differences(tied, lora, world=1)
    assert log_probs < 1e-6 and gradients < 1e-5


def nested(*rows: list[int]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


@pytest.mark.unit
def test_on_padded_rows_the_head_looks_at_the_tokens_that_count_and_nothing_else(one_process):
    """Two trajectories of two and three tokens of prompt; a tool's token, and padding, in between."""
    plain = tiny(tied=True, lora=False)
    fused = copy.deepcopy(plain)
    rows = [[5, 6, 10, 11, 12, 13], [7, 8, 9, 14, 15]]
    batch = {
        "input_ids": nested(*rows),
        "position_ids": nested(*(list(range(len(row))) for row in rows)),
        "prompts": nested(rows[0][:2], rows[1][:3]),
        "response_mask": nested([1, 0, 1, 1], [1, 1]),
    }
    settings = {"use_remove_padding": False, "use_fused_kernels": True, "temperature": 1.0, "pad_token_id": 0}
    batch = tu.get_tensordict(batch, settings)
    counted = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    ids = torch.tensor([rows[0], [*rows[1], 0]])
    logits = plain(input_ids=ids, attention_mask=(ids > 0).int(), use_cache=False).logits.float()
    truth = logits.log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None])[..., 0]
    engine, module = build(fused, CPUFSDP2Engine, init_device_mesh("cpu", (1,)), packed=False)
    engine.pad_to_length = False
    inputs, _ = engine.prepare_model_inputs(batch)
    assert inputs["wanted"].tolist() == counted.tolist() and inputs["input_ids"].tolist() == ids.tolist()
    found = module(**inputs, use_cache=False).log_probs
    assert torch.allclose(found[counted], truth[counted], atol=1e-6) and not found[~counted].any()
    weights = torch.linspace(1, 2, counted.numel()).view(counted.shape) * counted
    (found * weights).sum().backward()
    (truth * weights).sum().backward()
    for (name, p), (_, q) in zip(module.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.allclose(p.grad.full_tensor(), q.grad, atol=1e-5), name


@pytest.mark.unit
def test_what_counts_in_supervised_training_is_said_of_the_whole_row():
    batch = tu.get_tensordict({"loss_mask": nested([0, 0, 1, 1], [0, 1, 0])}, {})
    assert wanted(batch, 4).tolist() == [[False, True, True, False], [True, False, False, False]]
    assert wanted(tu.get_tensordict({"input_ids": nested([1, 2])}, {}), 2) is None  # nobody says: all of them


@pytest.mark.unit
def test_verl_alone_cannot_fuse_a_head_of_its_own(one_process, monkeypatch):
    """Once it can, verl_ext/fused_head.py is needed no longer."""
    fused = shard(tiny(tied=False, lora=False), FSDPEngineWithLMHead, init_device_mesh("cpu", (1,)))
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        fused(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=False, temperature=1.0, return_dict=True)


@pytest.mark.unit
def test_a_gpu_run_that_imports_the_module_gets_the_engine(monkeypatch):
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    monkeypatch.setenv("VERL_ENGINE_VENDOR", "nvidia")
    assert EngineRegistry.get_engine_cls("language_model", "fsdp2") is FusedHeadInRoot
    assert EngineRegistry.get_engine_cls("language_model", "fsdp") is FSDPEngineWithLMHead


def _rank(rank: int, folder: str) -> None:
    os.environ["VERL_PLATFORM"] = "cpu"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    log_probs, gradients = differences(tied=False, lora=False, world=2)
    dist.destroy_process_group()
    sys.exit(0 if log_probs < 1e-6 and gradients < 1e-5 else f"{log_probs=}, {gradients=}")


@pytest.mark.slow
def test_two_processes_have_the_same(tmp_path):
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
