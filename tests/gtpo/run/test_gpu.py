"""Protects what is refused before Ray starts where GPUs are asked for, each in a line with its remedy, and what the
start fills in so that the model fits.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from composition import compose, compose_with_choices
from omegaconf import OmegaConf

from recipe.gtpo.run.checks import first_checks, given_checks
from recipe.gtpo.run.errors import ConfigError
from recipe.gtpo.run.gpu import (
    attention,
    check_batch,
    check_cluster,
    check_compiler,
    check_cuda,
    check_disk,
    check_gpus,
    check_packages,
    check_processors,
    check_shared_memory,
    check_ulysses,
    fill_model,
    fit_memory,
    machine_checks,
    machines_of,
    needed_processors,
    shape_of,
    slow_adapter,
)
from recipe.gtpo.run.machine import GB, Gpu
from recipe.gtpo.run.memory import QWEN25, Machines

pytestmark = pytest.mark.unit

#: Rollouts on four GPUs of their own.
APART = (
    *("trainer.v1.trainer_mode=gtpo_separate_async", "actor_rollout_ref.rollout.nnodes=1"),
    "actor_rollout_ref.rollout.n_gpus_per_node=4",
)
H100 = Gpu("NVIDIA H100", int(85.5 * GB), 0, "580.65.06")


@pytest.fixture(autouse=True)
def no_gpus_here(monkeypatch):
    """Whatever the machine of the tests has; single_node then means eight."""
    monkeypatch.setattr("recipe.gtpo.run.checks.gpus", tuple)


def on(hardware, *overrides):
    """Composed once for each hardware file; the overrides are set afterwards."""
    config = compose(f"hardware={hardware}", "rollout=vllm", "task=verl_data")
    for key, value in (override.split("=", 1) for override in overrides):
        OmegaConf.update(config, key, yaml.safe_load(value), force_add=True)
    return config


def refusal(check, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        check(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def silent(line):
    raise AssertionError(f"said: {line}")


# -- processors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        (["cpu"], 3 + 1 + 1 + 1),
        (["single_gpu"], 3 + 1 + 1 + 1),
        (["single_node", "trainer.n_gpus_per_node=8"], 8 * 3 + 8 + 1 + 1),
        (["single_node", "trainer.n_gpus_per_node=2"], 2 * 3 + 8 + 1 + 1),
        (["single_node", "trainer.n_gpus_per_node=4", *APART], 4 * 3 + 8 + 1 + 1 + 4 * 2),
    ],
)
def test_the_processors_in_ray_s_books_are_counted(overrides, needed):
    config = compose() if overrides == ["cpu"] else on(*overrides)
    assert sum(needed_processors(config).values()) == needed


def test_the_count_is_what_verl_and_its_queue_ask_ray_for():
    """Ours adds up what these say; each breaks this test when it moves."""
    from transfer_queue import controller
    from transfer_queue.storage import simple_storage
    from verl.single_controller.ray.base import RayResourcePool, ResourcePoolManager
    from verl.workers.rollout import replica

    assert ResourcePoolManager.max_colocate_count == 3
    assert 'bundle = {"CPU": self.max_colocate_count}' in inspect.getsource(RayResourcePool)
    for module in (controller, simple_storage):
        assert re.search(r"@ray\.remote\(num_cpus=1\)", inspect.getsource(module))
    assert "max_colocate_count=2" in inspect.getsource(replica)  # of servers that stand alone


def test_too_few_processors_are_refused_where_ray_would_wait_for_ever(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = on("single_node")
    assert refusal(check_processors, config, 32) == (
        "Ray has 32 CPUs and this run asks it for 34 (GPU bundles 24, storage units 8, controller 1, starting the rest "
        "1): it would wait for ever. Set ray_kwargs.ray_init.num_cpus=34 (a number in Ray's books, nothing is "
        "reserved), or transfer_queue.backend.SimpleStorage.num_data_storage_units=1"
    )
    assert refusal(check_processors, config, 26).endswith("nothing is reserved)")  # one unit would not do either
    check_processors(config, 34)
    OmegaConf.update(config, "ray_kwargs.ray_init.num_cpus", 34)
    check_processors(config, 2)
    check_processors(compose(), 1)  # the CPU's file has a number of its own
    check_processors(on("multi_node"), 1)  # of a cluster that runs, only Ray knows


def test_a_cluster_is_asked_for_what_ray_would_wait_for():
    config, node = on("multi_node"), {"GPU": 8.0, "CPU": 64.0}  # two nodes; 48 CPUs for bundles and 10 more
    check_cluster(config, [node, node])
    check_cluster(config, [{"CPU": 10.0}, {"GPU": 8.0, "CPU": 24.0}, {"GPU": 8.0, "CPU": 24.0}])
    assert refusal(check_cluster, config, [node, {"GPU": 4.0, "CPU": 64.0}]) == (
        "this run asks Ray for 2 nodes of 8 GPUs and 24 CPUs, and for 16 GPUs and 58 CPUs in all; it would wait for "
        "ever, or fail late. The cluster's books say: 8 GPUs and 64 CPUs, 4 GPUs and 64 CPUs. Set trainer.nnodes and "
        "trainer.n_gpus_per_node, or give more CPUs to `ray start` (--num-cpus: a number in its books, nothing is "
        "reserved)"
    )
    for nodes in ([node], [node, {}], [node, {"GPU": 8.0, "CPU": 23.0}], 2 * [{"GPU": 8.0, "CPU": 24.0}]):
        refusal(check_cluster, config, nodes)


def test_a_cluster_has_to_hold_those_that_sample_too():
    """verl's own servers ask for their GPUs when the model is loaded already, and fail there."""
    from verl.single_controller.ray.base import ResourcePoolManager
    from verl.workers.rollout.replica import RolloutReplica

    assert "ResourcePoolManager(" in inspect.getsource(RolloutReplica.init_standalone)
    assert "raise ValueError" in inspect.getsource(ResourcePoolManager._check_resource_available)
    apart = on("multi_node", *APART, "actor_rollout_ref.rollout.n_gpus_per_node=8")  # 2 x 8 train, 8 sample
    node = {"GPU": 8.0, "CPU": 64.0}
    assert "and for 24 GPUs (with those that sample: " in refusal(check_cluster, apart, [node, node])
    check_cluster(apart, [node] * 3)
    check_cluster(apart, [{"GPU": 12.0, "CPU": 64.0}] * 2)
    check_cluster(on("multi_node"), [node, node])  # sampling on those that train


def test_the_remedies_of_the_refusal_help(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    units = "transfer_queue.backend.SimpleStorage.num_data_storage_units"
    check_processors(on("single_node", f"{units}=1"), 27)
    check_processors(on("single_node", "ray_kwargs.ray_init.num_cpus=34"), 2)


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_a_batch_that_divides_among_the_gpus_passes(gpus):
    check_batch(on("single_node", f"trainer.n_gpus_per_node={gpus}"))


@pytest.mark.parametrize(("gpus", "prompts"), [(3, 129), (5, 130), (6, 129), (7, 126)])
def test_one_that_does_not_is_refused_with_the_nearest_that_does(gpus, prompts):
    config = on("single_node", f"trainer.n_gpus_per_node={gpus}")
    message = refusal(check_batch, config)
    assert f"trajectories cannot be divided among {gpus} GPUs: set it and data.train_batch_size to {prompts}" in message
    config.actor_rollout_ref.actor.ppo_mini_batch_size = prompts
    check_batch(config)


# -- GPUs, driver, packages -------------------------------------------------------------------------------------------


def test_missing_gpus_are_refused():
    assert refusal(check_gpus, on("single_gpu"), [], silent).startswith(
        "this run asks for 1 GPUs of a machine, and nvidia-smi shows 0 here: install or repair the NVIDIA driver, "
    )
    apart = on("single_node", "trainer.n_gpus_per_node=4", *APART)
    assert refusal(check_gpus, apart, [H100] * 7, silent).startswith("this run asks for 8 GPUs")


def test_a_slice_of_a_gpu_is_refused_as_what_it_is(monkeypatch):
    """The driver is well, and to install it again would change nothing."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5f7a")
    monkeypatch.setattr("recipe.gtpo.run.machine.gpus", tuple)
    message = refusal(machine_checks(on("single_gpu"))["GPUs"], silent)
    assert message.startswith("CUDA_VISIBLE_DEVICES names MIG-5f7a, a MIG slice of a GPU") and "driver" not in message


def test_gpus_that_stay_idle_are_told():
    said = []
    check_gpus(on("single_gpu"), [H100] * 3, said.append)
    assert said == ["GPUs: 1 x NVIDIA H100, 86 GB, driver 580.65.06; 2 more stay idle (trainer.n_gpus_per_node)"]


def test_a_gpu_that_others_use_is_refused():
    busy = Gpu("NVIDIA H100", int(85.5 * GB), int(30 * GB), "580.65.06")
    message = refusal(check_gpus, on("single_node", "trainer.n_gpus_per_node=2"), [H100, busy], silent)
    assert message.startswith("GPU 1 (NVIDIA H100, 86 GB) has 30 GB in use by other processes: end them")


@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_node_s_gpus_are_all_used(monkeypatch, count):
    monkeypatch.setattr("recipe.gtpo.run.checks.gpus", lambda: (H100,) * count)
    assert OmegaConf.create(OmegaConf.to_container(on("single_node").trainer, resolve=True)).n_gpus_per_node == count


@pytest.mark.parametrize(
    ("driver", "built", "words"),
    [
        (
            (12, 8),
            (13, 0),
            "the driver serves CUDA up to 12.8, and torch was built with 13.0: update the NVIDIA driver",
        ),
        (None, (13, 0), "nvidia-smi names no CUDA version"),
        ((13, 0), None, "torch is a build without CUDA: make an environment for GPUs"),
    ],
)
def test_a_driver_that_does_not_serve_torch_is_refused(driver, built, words):
    gpus = [] if driver is None else [H100]
    assert refusal(check_cuda, driver, built, gpus, silent).startswith(words)


@pytest.mark.parametrize(("driver", "built"), [((13, 0), (13, 0)), ((13, 0), (12, 8)), ((12, 2), (12, 8))])
def test_a_driver_of_the_same_major_version_or_newer_passes(driver, built):
    check_cuda(driver, built, [H100], silent)


def test_a_driver_that_shows_gpus_and_names_no_cuda_is_warned_of_and_passes():
    said = []
    check_cuda(None, (13, 0), [H100], said.append)
    assert said == [
        "warning: nvidia-smi names no CUDA version; whether driver 580.65.06 serves CUDA 13, which torch was built "
        "with, is not known"
    ]


HEADER = Path("/usr/include/python3/Python.h")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_that_compiles_when_it_starts_needs_a_compiler_and_python_s_header(engine):
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    check_compiler(engine, "/usr/bin/gcc", HEADER)
    assert refusal(check_compiler, engine, None, None) == (
        f"rollout={engine}: its engine compiles when it starts, and there is no C compiler (gcc, clang, or what CC "
        f"names) and no Python.h of Python {version} here; Debian, Ubuntu: apt-get install build-essential "
        f"python{version}-dev"
    )
    assert f"there is no Python.h of Python {version} here" in refusal(check_compiler, engine, "/usr/bin/gcc", None)
    assert "there is no C compiler (gcc, clang, or what CC names) here" in refusal(check_compiler, engine, None, HEADER)


def test_the_compiler_is_looked_for_where_an_engine_needs_it(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("recipe.gtpo.run.machine.c_compiler", lambda: None)
    monkeypatch.setattr("recipe.gtpo.run.machine.python_header", lambda: HEADER)
    for engine in ("vllm", "sglang"):
        checks = machine_checks(on("single_gpu", f"actor_rollout_ref.rollout.name={engine}"))
        assert refusal(checks["compiler"], silent).startswith(f"rollout={engine}: its engine compiles")
    for config in (on("single_gpu", "actor_rollout_ref.rollout.name=transformers"), compose("rollout=vllm_cpu")):
        assert "compiler" not in machine_checks(config)


@pytest.fixture
def packages(monkeypatch):
    """Packages that are there, by name; a None cannot be imported."""

    def have(**modules):
        monkeypatch.setattr(
            "recipe.gtpo.run.gpu.importlib.util.find_spec",
            lambda name: SimpleNamespace() if name in modules else None,
        )
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        attention.cache_clear()

    yield have
    attention.cache_clear()


def test_without_flash_attn_attention_is_torch_s_and_the_cost_is_said(packages):
    packages(vllm=ModuleType("vllm"))
    config = on("single_gpu")
    assert config.actor_rollout_ref.model.override_config.attn_implementation == "sdpa"
    said = []
    check_packages(config, said.append)
    assert said == [
        "attention: sdpa (flash-attn is not installed): slower, and a mask of a micro-batch's tokens by its tokens in "
        "memory"
    ]
    config.actor_rollout_ref.model.override_config.attn_implementation = "flash_attention_2"
    assert refusal(check_packages, config, silent).startswith(
        "attn_implementation=flash_attention_2: flash-attn is not installed; leave actor_rollout_ref.model."
    )


def test_with_flash_attn_it_is_taken(packages):
    flash_attn = ModuleType("flash_attn")
    flash_attn.flash_attn_varlen_func = print
    packages(vllm=ModuleType("vllm"), flash_attn=flash_attn)
    assert attention() == ("flash_attention_2", "flash-attn is installed")
    config = on("single_gpu")
    assert OmegaConf.to_container(config, resolve=True)["actor_rollout_ref"]["model"]["override_config"] == {
        "attn_implementation": "flash_attention_2"
    }
    check_packages(config, silent)


@pytest.mark.parametrize("module", [None, ModuleType("flash_attn")], ids=["broken", "flash-attn-4"])
def test_a_flash_attn_that_cannot_be_imported_is_none(packages, module):
    """flash-attn-4 has a folder of that name, and other things in it."""
    packages(flash_attn=module)
    implementation, why = attention()
    assert implementation == "sdpa" and why.startswith("flash-attn cannot be imported: ")


def test_an_engine_that_is_not_installed_is_refused(packages):
    packages()
    assert refusal(check_packages, on("single_gpu"), silent) == (
        "rollout=vllm: the package vllm is not installed; make an environment with it, `VENV=.venv-vllm bash "
        "examples/setup_env.sh vllm`"
    )


def test_the_transformers_rollout_needs_no_engine_and_says_that_it_is_slow(packages):
    packages(transformers=ModuleType("transformers"))
    said = []
    check_packages(on("single_gpu", "actor_rollout_ref.rollout.name=transformers"), said.append)
    assert said[0] == "rollout: transformers, which is slow and meant for small models; for others rollout=vllm"


def test_weights_over_nccl_need_cupy(packages):
    """verl passes over its engine for NCCL where cupy is missing, and says so after Ray has started."""
    from verl.checkpoint_engine.base import CheckpointEngineRegistry

    packages(vllm=ModuleType("vllm"))
    apart = on("single_node", "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl")
    assert "pip install cupy-cuda13x" in refusal(check_packages, apart, silent)
    assert "cupy" in str(CheckpointEngineRegistry._import_errors["nccl_checkpoint_engine"])
    packages(vllm=ModuleType("vllm"), cupy=ModuleType("cupy"))
    check_packages(apart, lambda line: None)


VLLM_CPU = "make an environment with it, `VENV=.venv-vllm_cpu bash examples/setup_env.sh vllm_cpu`"


def test_on_the_cpu_vllm_is_looked_for_where_it_is_asked_for(packages):
    packages()
    look = machine_checks(compose("rollout=vllm_cpu"))["packages"]
    assert refusal(look, silent) == f"rollout=vllm_cpu: the package vllm is not installed; {VLLM_CPU}"


@pytest.mark.parametrize(
    ("version", "fits"), [("0.27.1+cpu", True), ("0.24.0", False), (None, False)], ids=["cpu", "cuda", "unnamed"]
)
def test_a_vllm_of_another_build_is_refused_on_the_cpu(packages, monkeypatch, version, fits):
    """Its engine would find no device, minutes later, in a process of its own."""
    packages(vllm=ModuleType("vllm"))

    def version_of(name):
        assert name == "vllm"
        if version is None:
            raise PackageNotFoundError(name)
        return version

    monkeypatch.setattr("recipe.gtpo.run.gpu.importlib.metadata.version", version_of)
    look = machine_checks(compose("rollout=vllm_cpu"))["packages"]
    if fits:
        look(silent)
    else:
        build = version or "of no known version"
        assert refusal(look, silent) == f"rollout=vllm_cpu: the vLLM here, {build}, is no build for the CPU; {VLLM_CPU}"


def test_a_library_of_ones_own_comes_beside_the_fused_head_s(packages, tmp_path):
    from verl.utils.config import omega_conf_to_dataclass

    packages(vllm=ModuleType("vllm"))
    key = "actor_rollout_ref.model.external_lib"
    assert refusal(check_packages, on("single_gpu", f"{key}=json"), silent) == (
        f"{key}=json leaves out verl_ext.fused_head, without which verl's fused head fails on models with untied "
        "embeddings: set it to [json, verl_ext.fused_head]"
    )
    check_packages(
        on("single_gpu", f"{key}=json", "actor_rollout_ref.model.use_fused_kernels=false"), lambda line: None
    )
    config = on("single_gpu", f"{key}=[json,colorsys,verl_ext.fused_head]")
    check_packages(config, lambda line: None)
    # verl imports every one of a list when a worker reads the section
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    model = config.actor_rollout_ref.model
    model.path = str(tmp_path)
    OmegaConf.update(model, "load_tokenizer", False, force_add=True)
    sys.modules.pop("colorsys", None)
    omega_conf_to_dataclass(model)
    assert "colorsys" in sys.modules


def test_little_shared_memory_is_refused_where_several_gpus_talk_through_it():
    message = refusal(check_shared_memory, on("single_node"), 64 * 2**20)
    assert message.startswith("/dev/shm has 0.07 GB, ") and "--shm-size=16g" in message
    for config, size in ((on("single_gpu"), 64 * 2**20), (on("single_node"), 2 * GB), (on("single_node"), None)):
        check_shared_memory(config, size)


def test_the_cpu_is_asked_for_processors_only():
    assert list(machine_checks(compose())) == ["processors"]
    assert list(machine_checks(on("single_gpu"))) == [
        *("processors", "batch", "GPUs", "shared memory", "packages", "compiler", "CUDA"),
    ]
    assert list(machine_checks(on("multi_node"))) == ["processors", "batch", "packages"]  # its driver may have no GPU


# -- the model --------------------------------------------------------------------------------------------------------


def test_the_head_of_every_gpu_config_is_fused_and_its_engine_known():
    for hardware in ("single_gpu", "single_node", "multi_node"):
        model = on(hardware).actor_rollout_ref.model
        assert model.use_fused_kernels and model.fused_kernel_options.impl_backend == "torch"
        assert model.use_remove_padding and model.external_lib == "verl_ext.fused_head"


def test_the_shape_is_the_model_s_or_its_name_s(tmp_path):
    config = on("single_gpu")
    assert shape_of(config) is None
    config.actor_rollout_ref.model.path = "Qwen/Qwen2.5-3B-Instruct"
    assert shape_of(config) is QWEN25["3B"]
    three = QWEN25["3B"]
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                **{"hidden_size": three.hidden, "num_hidden_layers": 1, "intermediate_size": three.intermediate},
                **{"num_attention_heads": three.heads, "num_key_value_heads": three.kv_heads},
                **{"vocab_size": three.vocabulary, "tie_word_embeddings": True, "model_type": "qwen2"},
            }
        )
    )
    config.actor_rollout_ref.model.path = str(tmp_path)
    assert shape_of(config).parameters == three.root + three.layer


KEYS = {
    "tokens": "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "param_offload": "actor_rollout_ref.actor.fsdp_config.param_offload",
    "optimizer_offload": "actor_rollout_ref.actor.fsdp_config.optimizer_offload",
    "share": "actor_rollout_ref.rollout.gpu_memory_utilization",
}


def filled(config):
    return {name: OmegaConf.select(config, key) for name, key in KEYS.items()}


def fit(config, size, gpus, memory=80):
    said = []
    fit_memory(config, Machines(gpus, memory * GB), QWEN25[size] if size else None, said.append)
    (line,) = said or [None]
    return line


def test_what_the_hardware_file_leaves_open_is_filled_and_told():
    config = on("single_node", "trainer.n_gpus_per_node=2")
    assert set(filled(config).values()) == {None}
    assert fit(config, "7B", 2) == (
        "memory: a model of 7.6 B parameters on 2 x 80 GB, trained in full: about 75 GB of a GPU in the update, 60 GB "
        "in generation; micro-batches of 9216 tokens, vLLM's share 0.7, with offloading"
    )
    assert filled(config) == {"tokens": 9216, "param_offload": True, "optimizer_offload": True, "share": 0.7}


CONTEXT = "actor_rollout_ref.rollout.max_model_len"


def of_context(tmp_path, tokens):
    """A model's folder, as far as that is read of it."""
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": tokens}))
    return f"actor_rollout_ref.model.path={tmp_path}"


@pytest.mark.parametrize(("model_reads", "served"), [(262144, 9216), (9216, 9216), (4096, 4096)])
def test_vllm_s_longest_request_is_prompt_and_response_as_far_as_the_model_reads(tmp_path, model_reads, served):
    """By itself it is all that the model reads, and vLLM does not start where that does not fit its cache."""
    config = on("single_gpu", of_context(tmp_path, model_reads))
    fit(config, "3B", 1)
    assert OmegaConf.select(config, CONTEXT) == served


def test_a_model_that_reads_less_than_a_trajectory_is_told_as_the_model_s_limit(tmp_path):
    config, said = on("single_gpu", of_context(tmp_path, 4096)), []
    checks = given_checks(config)
    for name in (name for name in checks if name in ("context", "memory")):
        checks[name](said.append)
    assert said[0].startswith("warning: the model's max_position_embeddings=4096 is below data.max_prompt_length + ")
    assert OmegaConf.select(config, CONTEXT) == 4096


def test_of_a_model_that_is_not_here_yet_no_less_is_served_than_a_trajectory_takes():
    config = on("single_gpu", "actor_rollout_ref.model.path=Qwen/Qwen3-4B-Instruct-2507")
    fit(config, None, 1)
    assert OmegaConf.select(config, CONTEXT) == 9216


@pytest.mark.parametrize("engine", ["sglang", "transformers"])
def test_the_longest_request_of_another_engine_stays_the_model_s(tmp_path, engine):
    """SGLang starts all the same, and verl would take the last token of what is set from the last turn."""
    rollout = (f"actor_rollout_ref.rollout.{key}" for key in (f"name={engine}", "max_num_seqs=16"))
    config = on("single_gpu", of_context(tmp_path, 262144), *rollout)
    fit(config, "0.5B", 1)
    assert OmegaConf.select(config, CONTEXT) is None


def test_a_longest_request_that_is_set_stays_and_has_to_fit_vllm_s_cache(tmp_path):
    model = of_context(tmp_path, 10**7)
    config = on("single_gpu", model, f"{CONTEXT}=20000")
    fit(config, "3B", 1)
    assert OmegaConf.select(config, CONTEXT) == 20000
    message = refusal(fit, on("single_gpu", model, f"{CONTEXT}=2000000"), "7B", 1)
    assert f"leave out {CONTEXT}" not in message  # a 7B does not fit anyway
    message = refusal(fit, on("single_gpu", model, f"{CONTEXT}=2000000"), "3B", 1)
    assert f"tokens beside the weights, and one request of {CONTEXT} has 2000000; what would fit: " in message
    assert f"leave out {CONTEXT}; or " in message


def test_the_transformers_rollout_has_rows_in_the_place_of_a_share():
    rollout = "actor_rollout_ref.rollout"
    changes = (f"{rollout}.name=transformers", f"{rollout}.max_num_seqs=16")
    line = fit(on("single_gpu", *changes), "0.5B", 1)
    assert line.endswith("micro-batches of 18432 tokens, 16 trajectories at once, no offloading")
    message = refusal(fit, on("single_gpu", changes[0]), "0.5B", 1)  # verl's default: 1024
    assert f"; what would fit: rollout=vllm; or {rollout}.max_num_seqs=" in message


def test_what_the_user_sets_stays_and_has_to_fit():
    config = on("single_gpu", f"{KEYS['tokens']}=9216", f"{KEYS['share']}=0.3", f"{KEYS['optimizer_offload']}=true")
    fit(config, "3B", 1)
    assert filled(config) == {"tokens": 9216, "param_offload": True, "optimizer_offload": True, "share": 0.3}
    message = refusal(fit, on("single_gpu", f"{KEYS['share']}=0.95"), "3B", 1)
    assert message.startswith("a model of 3.1 B parameters does not fit 1 x 80 GB: generation needs about 80 GB")


def test_a_model_that_does_not_fit_is_refused_with_what_would():
    message = refusal(fit, on("single_gpu"), "7B", 1)
    assert message.startswith("a model of 7.6 B parameters does not fit 1 x 80 GB: the update needs about 136 GB of ")
    assert message.endswith(
        "; what would fit: actor_rollout_ref.model.lora_rank=32 and actor_rollout_ref.actor.optim.lr=1e-5; or "
        "actor_rollout_ref.actor.fsdp_config.offload_policy=true (Adam on the CPU: slower, and 152 GB of the host's "
        "memory); or 2 such GPUs; or a model like Qwen2.5-3B"
    )
    fit(on("single_gpu", "actor_rollout_ref.model.lora_rank=32"), "7B", 1)
    fit(on("single_gpu", "actor_rollout_ref.actor.fsdp_config.offload_policy=true"), "7B", 1)


RATE = "actor_rollout_ref.actor.optim.lr"


def test_an_adapter_at_a_rate_of_full_training_is_told():
    lora = "actor_rollout_ref.model.lora_rank=32"
    assert slow_adapter(on("single_gpu", lora)).startswith(f"{RATE}=1e-06 is a rate of full training, and {lora} ")
    for fine in ([], [lora, f"{RATE}=1.0e-5"]):
        assert slow_adapter(on("single_gpu", *fine)) is None
    said = []
    config, choices = compose_with_choices("hardware=single_gpu", "rollout=vllm", "task=verl_data", lora)
    first_checks(config, choices)["config"](said.append)
    assert said == [f"warning: {slow_adapter(config)}"]


def test_a_rate_that_the_user_has_chosen_for_more_is_not_proposed_away():
    message = refusal(fit, on("single_gpu", f"{RATE}=5.0e-5"), "7B", 1)
    assert "; what would fit: actor_rollout_ref.model.lora_rank=32; or " in message


def test_the_reference_of_a_kl_term_is_counted_and_proposed_to_be_left_out():
    """verl keeps its weights in the host's memory, where what is offloaded lies, too."""
    key = "actor_rollout_ref.actor.use_kl_loss"

    def fit_7b(*changes):
        config = on("single_node", "trainer.n_gpus_per_node=2", *changes)
        fit_memory(config, Machines(2, 80 * GB, host=128 * GB), QWEN25["7B"], lambda line: None)

    message = refusal(fit_7b, f"{key}=true")
    assert "the host needs about 152 GB of memory and has 128 (offloaded 91.4, KL reference 30.5, " in message
    assert f"{key}=false" in message
    fit_7b()
    for adapter in ("lora_rank=32", "lora_adapter_path=mine"):  # verl then asks the model without it
        fit_7b(f"{key}=true", f"actor_rollout_ref.model.{adapter}")


LEAVE_OUT_SHARE = f"leave out {KEYS['share']} (or null, where a file sets it)"
LEAVE_OUT_OFFLOAD = f"leave out {KEYS['param_offload']} (or null, where a file sets it)"


@pytest.mark.parametrize(
    ("changes", "remedies"),
    [
        ([f"{KEYS['share']}=0.95"], [LEAVE_OUT_SHARE]),
        ([f"{KEYS['param_offload']}=false", f"{KEYS['share']}=0.9"], [LEAVE_OUT_OFFLOAD, LEAVE_OUT_SHARE]),
        (
            [
                "actor_rollout_ref.actor.use_dynamic_bsz=false",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
            ],
            [f"actor_rollout_ref.actor.use_dynamic_bsz=true with {KEYS['tokens']}=null"],
        ),
    ],
    ids=["share", "share or offloading", "micro-batch"],
)
def test_a_setting_of_the_user_that_is_the_cause_is_named_first(changes, remedies):
    """The model as it was asked for fits without it."""
    message = refusal(fit, on("single_node", *changes), "7B", 8)
    assert message.split("; what would fit: ")[1].split("; or ")[: len(remedies)] == remedies
    fit(on("single_node"), "7B", 8)


def test_settings_of_the_user_that_are_the_cause_together_are_named_together():
    offloads = [f"{KEYS[name]}=false" for name in ("param_offload", "optimizer_offload")]
    message = refusal(fit, on("single_node", *offloads), "7B", 2)
    assert (
        f"; what would fit: leave out {KEYS['param_offload']} and {KEYS['optimizer_offload']} (or null, where a file "
        "sets them); or "
    ) in message


@pytest.mark.parametrize(
    ("hardware", "count", "gigabytes", "size"),
    [
        ("single_gpu", 1, 24, "0.5B"),
        ("single_gpu", 1, 80, "3B"),
        ("single_node", 2, 80, "7B"),
        ("single_node", 8, 80, "7B"),
        ("single_gpu", 1, 6, "0.5B"),  # nothing fits: the check of the memory then says what would
    ],
)
def test_where_nobody_names_a_model_the_largest_of_qwen_that_fits_is_taken_and_told(hardware, count, gigabytes, size):
    config, said = compose(f"hardware={hardware}", "rollout=vllm", "task=math"), []
    config.trainer.n_gpus_per_node = count
    machines = Machines(count, gigabytes * GB)
    fill_model(config, machines, said.append)
    assert said == [
        f"model: Qwen/Qwen2.5-{size}-Instruct, the largest of Qwen2.5 up to 7B for {machines}, trained in full; "
        "another: actor_rollout_ref.model.path=..."
    ]
    if gigabytes >= 24:
        fit_memory(config, machines, shape_of(config), said.append)  # it does fit


def test_a_model_that_somebody_names_stays_and_the_cpu_has_none_by_default():
    config = on("single_gpu", "actor_rollout_ref.model.path=mine")
    fill_model(config, Machines(1, 80 * GB), silent)
    fill_model(compose(), Machines(1, 80 * GB), silent)
    assert config.actor_rollout_ref.model.path == "mine"


def test_lora_has_a_larger_default():
    config, said = on("single_gpu", "actor_rollout_ref.model.lora_rank=32"), []
    fill_model(config, Machines(1, 80 * GB), said.append)
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen2.5-7B-Instruct" and "by LoRA" in said[0]


ULYSSES = "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size"
ATTENTION = "actor_rollout_ref.model.override_config.attn_implementation"


def test_gpus_share_a_trajectory_under_flash_attention_only():
    """verl patches that kernel's call; sdpa would be right on each part and wrong on the whole."""
    import inspect

    from verl.models.transformers import monkey_patch

    patched = inspect.getsource(monkey_patch)
    assert "flash_attention._flash_attention_forward = _ulysses_flash_attention_forward" in patched
    assert "sdpa_attention_forward" not in patched
    two, seven = f"{ULYSSES}=2", QWEN25["7B"]
    sdpa, flash = (f"{ATTENTION}={kernel}" for kernel in ("sdpa", "flash_attention_2"))
    assert refusal(check_ulysses, on("single_node", sdpa, two), seven).startswith(f"{two}: verl exchanges the tokens")
    check_ulysses(on("single_node", flash, two), seven)
    check_ulysses(on("single_node", sdpa), seven)
    three = on("single_node", flash, f"{ULYSSES}=3")
    assert refusal(check_ulysses, three, seven).endswith(
        "28 attention heads of the model: set it to 2 or 4 or 7 or 14 or 28"
    )
    check_ulysses(three, None)


def test_an_adapter_beside_sglang_s_weights_is_counted_unless_it_is_merged():
    asked = ("actor_rollout_ref.rollout.name=sglang", "actor_rollout_ref.model.lora_rank=32")
    merged = "actor_rollout_ref.model.lora.merge=true"
    message = refusal(fit, on("single_gpu", *asked), "3B", 1, 24)
    assert "SGLang's weights 6.2, " in message and f"{merged}; or " in message
    fit(on("single_gpu", *asked, merged), "3B", 1, 24)


def test_the_host_of_rollouts_apart_is_asked_for_more():
    def fit_7b(*changes):
        fit_memory(on("single_node", *changes), Machines(8, 80 * GB, host=64 * GB), QWEN25["7B"], lambda line: None)

    fit_7b()
    message = refusal(fit_7b, *APART)
    assert ", weights for old log-probs 30.5, " in message and "91 GB of the host's memory instead of 64" in message
    fit_7b(*APART, "algorithm.rollout_correction.bypass_mode=true")  # verl then takes the rollouts' own


def test_gpus_that_share_a_trajectory_need_a_part_of_its_tokens_each():
    flash = f"{ATTENTION}=flash_attention_2"
    alone = on("single_node", flash, "trainer.n_gpus_per_node=4")
    shared = on("single_node", flash, "trainer.n_gpus_per_node=4", f"{ULYSSES}=4")
    assert "micro-batches of 18432 tokens" in fit(alone, "7B", 4)  # two of the longest trajectories
    assert "micro-batches of 4608 tokens" in fit(shared, "7B", 4)  # on each, of two of them together


def test_a_model_of_unknown_size_is_not_refused_and_that_is_told():
    config = on("single_gpu")
    assert fit(config, None, 1).startswith("memory: a model of unknown size, taken for 7 B parameters on 1 x 80 GB")
    assert None not in filled(config).values()


def test_on_the_cpu_only_the_micro_batch_is_open():
    config = compose("task=verl_data")
    assert fit(config, None, 1) is None
    assert OmegaConf.select(config, KEYS["tokens"]) == 2 * (1024 + 8192)


def test_the_gpus_are_as_large_as_the_smallest():
    config = on("multi_node")
    small = Gpu("NVIDIA L4", int(24 * GB), 0, "580.65.06")
    assert machines_of(config, [H100, small], 100 * GB) == Machines(8, 24 * GB, 2, 100 * GB)
    assert machines_of(config, [], 100 * GB) == Machines(8, 80 * GB, 2, None)  # this node has none, the others do


def test_a_disk_without_room_for_the_checkpoints_is_refused(tmp_path, monkeypatch):
    config = on("single_gpu", f"trainer.default_local_dir={tmp_path}/a/b")
    room = 3 * 12 * 3_085_938_688
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=room))
    check_disk(config, QWEN25["3B"])
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=room - 1))
    assert refusal(check_disk, config, QWEN25["3B"]) == (
        f"{tmp_path} has 111 GB free, and 3 checkpoints of this model take about 111 GB: set run_dir to a larger disk, "
        "or trainer.max_actor_ckpt_to_keep"
    )
    check_disk(config, None)
    config.trainer.save_freq = -1
    check_disk(config, QWEN25["3B"])


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A run of 200 steps that saves every 20, its folder of checkpoints, and a disk with as much free as is said."""
    config = on("single_gpu", f"trainer.default_local_dir={tmp_path}")
    assert (config.trainer.total_training_steps, config.trainer.save_freq) == (200, 20)

    def have(*steps, free):
        """Checkpoints of these steps lie there, and as many as `free` would have room."""
        for step in steps:
            (tmp_path / f"global_step_{step}" / "actor").mkdir(parents=True, exist_ok=True)
            (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(step))
        size = int(free * 12 * QWEN25["3B"].parameters) + 1
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size))
        return config

    return have


def test_a_start_needs_room_for_what_it_writes_itself_and_no_more(disk, tmp_path):
    """Three fit at first; two of the next start do beside the two that are there, which verl will not touch."""
    check_disk(disk(free=4.05), QWEN25["3B"])
    check_disk(disk(20, 40, free=2.05), QWEN25["3B"])
    assert refusal(check_disk, disk(free=1.9), QWEN25["3B"]) == (
        f"{tmp_path} has 70 GB free, and 2 more checkpoints of this model take about 74 GB: make room there. verl "
        "deletes none that an earlier start wrote: of the 2 there only the one that latest_checkpointed_iteration.txt "
        "names is gone on from"
    )


@pytest.mark.parametrize(("step", "total", "left"), [(160, 200, 2), (180, 200, 1), (180, 190, 1), (200, 200, 0)])
def test_no_more_is_needed_than_is_still_to_be_saved(disk, step, total, left):
    config = disk(step, free=left)
    config.trainer.total_training_steps = total
    check_disk(config, QWEN25["3B"])
    if left:
        refusal(check_disk, disk(free=left - 0.1), QWEN25["3B"])


@pytest.mark.parametrize(("keep", "at_once"), [(1, 2), (2, 2), (3, 3)])
def test_a_start_has_as_many_checkpoints_at_once_as_verl_s_manager_leaves(disk, tmp_path, keep, at_once):
    """verl's own bookkeeping, from an empty list as every start has it, on folders with nothing in them."""
    from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

    manager = BaseCheckpointManager.__new__(BaseCheckpointManager)
    manager.previous_saved_paths = []
    config, most = disk(20, free=at_once), 0
    for step in range(40, 201, 20):
        manager.ensure_checkpoint_capacity(keep)
        folder = tmp_path / f"global_step_{step}" / "actor"
        folder.mkdir(parents=True)
        most = max(most, len(list(tmp_path.glob("global_step_*/actor"))))
        manager.register_checkpoint(str(folder), keep)
    assert most == 1 + at_once  # that of the earlier start stays
    config.trainer.max_actor_ckpt_to_keep = keep
    check_disk(config, QWEN25["3B"])
    refusal(check_disk, disk(free=at_once - 0.1), QWEN25["3B"])
