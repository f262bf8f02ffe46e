"""On an NVIDIA GPU (`bash tests/gpu.sh`): the method, the fused head and its memory, runs with transformers and vLLM.

Not run so far: nobody had a GPU. What these tests are made of is tried on the CPU by tests/gpu/test_gpu_lane.py.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.distributed as dist
from jobs import (
    ATTENTIONS,
    METHODS,
    ROLLOUTS,
    evaluation_arguments,
    evaluation_job,
    job_overrides,
    main_job,
    real_model,
)
from measure import measure_update, save_random

from recipe.gtpo.method.advantage import turn_advantages
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.models.smollm2 import SmolLM2
from recipe.gtpo.run.gpu import attention
from recipe.gtpo.run.memory import GB, QWEN25, Machines, Settings, update
from verl_ext.fused_head import FusedHeadInRoot

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def needs(implementation: str, rollout: str = "transformers") -> None:
    if rollout == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    if implementation == "flash_attention_2" and attention()[0] != implementation:
        pytest.skip(attention()[1])


@pytest.mark.parametrize("method", ["gtpo", "gtpo_turn_batch_std", "gtpo_batch"])
def test_the_method_gives_the_same_on_the_gpu(method):
    options = {
        "gtpo": GTPOOptions(),
        "gtpo_turn_batch_std": GTPOOptions(baseline="turn", scale="batch_std"),
        "gtpo_batch": GTPOOptions(baseline="batch"),
    }[method]
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(64, 5, generator=generator).round(decimals=1)
    mask = torch.arange(5) < torch.randint(1, 6, (64, 1), generator=generator)
    groups = torch.arange(64) // 8
    here = turn_advantages(rewards * mask, mask, groups, options, None)
    there = turn_advantages((rewards * mask).cuda(), mask.cuda(), groups.cuda(), options, None)
    for a, b in zip(here, there, strict=True):
        assert torch.allclose(a, b.cpu(), atol=1e-5)


@pytest.fixture
def one_process(tmp_path):
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("implementation", ATTENTIONS)
@pytest.mark.parametrize(("size", "tokens"), [("0.5B", 4096), ("0.5B", 18432), ("1.5B", 9216)])
def test_an_update_takes_the_memory_that_was_added_up(one_process, results, size, tokens, implementation):
    """A random model of Qwen2.5's shape. The arithmetic may promise too little by a tenth, never more."""
    needs(implementation)
    memory = torch.cuda.get_device_properties(0).total_memory
    settings = Settings(tokens=tokens, longest=tokens, flash=implementation == "flash_attention_2")
    parts = update(QWEN25[size], Machines(1, memory), settings)
    planned = sum(parts.values()) - parts["contexts"]
    if sum(parts.values()) > memory:
        pytest.skip(f"{size} needs {sum(parts.values()) / GB:.0f} GB")
    found = measure_update(QWEN25[size], tokens, "cuda", FusedHeadInRoot, implementation)
    name = f"update {size} {tokens} {implementation}"
    results[name] = found.to_dict() | {"planned_bytes": planned, "planned": parts}
    assert found.second_loss < found.first_loss
    assert 0.5 * planned < found.peak_bytes < 1.1 * planned


def every_job(test):
    """Which engine samples, whose advantage, whose attention."""
    names = {"rollout": ROLLOUTS, "method": METHODS, "implementation": ATTENTIONS}
    for name, values in reversed(names.items()):
        test = pytest.mark.parametrize(name, values)(test)
    return test


@every_job
def test_the_main_job_runs(tmp_path, results, rollout, method, implementation):
    needs(implementation, rollout)
    found = main_job(job_overrides(rollout, method, implementation, tmp_path))
    results[f"main {rollout} {method} {implementation}"] = found
    assert found["training/rollout_probs_diff_mean"] < 1e-2  # rollout and trainer in bfloat16
    assert any(key.startswith("timing_s/") for key in found)


@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_a_checkpoint_is_evaluated(tmp_path, results, rollout):
    needs("sdpa", rollout)
    main_job(job_overrides(rollout, "gtpo", "sdpa", tmp_path))
    report = evaluation_job(evaluation_arguments(rollout, tmp_path / "run", tmp_path / "evaluation"))
    results[f"evaluation {rollout}"] = report["benchmarks"]["arithmetic"]["results"]
    for result in results[f"evaluation {rollout}"]:
        assert result["counts"]["scored"] == result["counts"]["samples"] > 0


@pytest.fixture(scope="session")
def half_a_billion(tmp_path_factory):
    """Random weights: it learns nothing, and shows what a real size takes."""
    return save_random(QWEN25["0.5B"], tmp_path_factory.mktemp("half_a_billion"))


@every_job
def test_the_main_job_runs_with_a_model_of_half_a_billion(
    tmp_path, results, half_a_billion, rollout, method, implementation
):
    needs(implementation, rollout)
    overrides = job_overrides(rollout, method, implementation, tmp_path)
    found = main_job([*overrides, f"actor_rollout_ref.model.path={half_a_billion}"])
    results[f"main {rollout} {method} {implementation} Qwen2.5-0.5B"] = found
    assert found["training/rollout_probs_diff_mean"] < 1e-2
    added_up = max(found["planned/update_gb"], found["planned/generation_gb"])
    assert 0 < found["card/peak_gb"] - found["card/before_gb"] < 1.1 * added_up


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    try:
        return SmolLM2(cache=str(tmp_path_factory.mktemp("smollm2"))).prepare()
    except ValueError as e:
        pytest.skip(str(e))


@every_job
def test_the_main_job_runs_with_a_small_real_model(tmp_path, results, smollm2, rollout, method, implementation):
    needs(implementation, rollout)
    found = main_job([*job_overrides(rollout, method, implementation, tmp_path), *real_model(smollm2)])
    results[f"main {rollout} {method} {implementation} SmolLM2-135M"] = found
    assert found["training/rollout_probs_diff_mean"] < 1e-2


def test_vllm_has_what_the_watch_asks_it():
    """Public names of its engine; recipe/gtpo/run/watchdog.py."""
    module = pytest.importorskip("vllm.v1.engine.async_llm")
    for name in ("errored", "dead_error", "is_sleeping"):
        assert hasattr(module.AsyncLLM, name)
