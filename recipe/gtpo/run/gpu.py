"""What a training on GPUs needs of the machine, looked at before Ray starts: each function takes what was read
(`machine.py`) and raises ConfigError with the cause and a remedy. What fits a GPU's memory is `memory.py`'s arithmetic.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from recipe.gtpo.run import machine, memory
from recipe.gtpo.run.errors import ConfigError, one_line
from recipe.gtpo.run.inputs import Say, fill_open, ray_starts_here
from recipe.gtpo.run.machine import GB, Gpu
from recipe.gtpo.run.memory import Machines, Settings, Shape
from recipe.gtpo.run.model import context_of, read_config
from verl_ext.tool_server.machine import processors

_CPUS_KEY = "ray_kwargs.ray_init.num_cpus"
_UNITS = "transfer_queue.backend.SimpleStorage.num_data_storage_units"
_FSDP = "actor_rollout_ref.actor.fsdp_config"
_TOKENS = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
_SHARE = "actor_rollout_ref.rollout.gpu_memory_utilization"
_CONTEXT = "actor_rollout_ref.rollout.max_model_len"
_LORA = "actor_rollout_ref.model.lora_rank"
_RATE = "actor_rollout_ref.actor.optim.lr"
#: Up to here a learning rate is one of full training; common advice for an adapter is about ten times that.
_FULL_RATE, _ADAPTER_RATE = 2e-6, "1e-5"


Check = Callable[[Say], None]


def machine_checks(config: DictConfig) -> dict[str, Check]:
    """The checks below that this config needs on this machine, by what they look at; on the CPU these are few."""
    checks: dict[str, Check] = {"processors": lambda say: check_processors(config, processors())}
    if config.trainer.device == "cpu":
        if config.actor_rollout_ref.rollout.name == "vllm":
            checks["packages"] = lambda say: check_engine("vllm", "vllm_cpu")
        return checks
    checks["batch"] = lambda say: check_batch(config)
    if ray_starts_here(config):
        checks["GPUs"] = lambda say: check_gpus(config, machine.gpus(), say, machine.slices())
        checks["shared memory"] = lambda say: check_shared_memory(config, machine.shared_memory())
    checks["packages"] = lambda say: check_packages(config, say)
    if ray_starts_here(config):
        engine = config.actor_rollout_ref.rollout.name
        if engine in _COMPILING:
            checks["compiler"] = lambda say: check_compiler(engine, machine.c_compiler(), machine.python_header())
        checks["CUDA"] = lambda say: check_cuda(machine.driver_cuda(), torch_cuda(), machine.gpus(), say)
    return checks


# -- processors and batches -------------------------------------------------------------------------------------------


def needed_processors(config: DictConfig) -> dict[str, int]:
    """CPUs in Ray's books, by what asks for them: verl's bundles ask for some beside each GPU."""
    from verl.single_controller.ray.base import ResourcePoolManager

    trainer, rollout, backend = config.trainer, config.actor_rollout_ref.rollout, config.transfer_queue.backend
    needed = {
        "GPU bundles": ResourcePoolManager.max_colocate_count * trainer.nnodes * trainer.n_gpus_per_node,
        "storage units": backend.SimpleStorage.num_data_storage_units
        if backend.storage_backend == "SimpleStorage"
        else 0,
        "controller": 1,
        "starting the rest": 1,
    }
    if _samples_apart(config):
        needed["rollout bundles"] = 2 * rollout.nnodes * rollout.n_gpus_per_node
    return needed


def needed_gpus(config: DictConfig) -> int:
    """In Ray's books, of all nodes: those that train, and those of servers that stand alone."""
    rollout = config.actor_rollout_ref.rollout
    apart = rollout.nnodes * rollout.n_gpus_per_node if _samples_apart(config) else 0
    return config.trainer.nnodes * config.trainer.n_gpus_per_node + apart


def _samples_apart(config: DictConfig) -> bool:
    """On devices of their own, beside those that train."""
    return config.trainer.v1.trainer_mode == "gtpo_separate_async"


def check_processors(config: DictConfig, here: int) -> None:
    """Without these, Ray waits for ever and says nothing."""
    if not ray_starts_here(config):
        return
    needed = needed_processors(config)
    total, has = sum(needed.values()), OmegaConf.select(config, _CPUS_KEY) or here
    if has >= total:
        return
    parts = ", ".join(f"{what} {count}" for what, count in needed.items() if count)
    fewer = f", or {_UNITS}=1" if total - needed["storage units"] + 1 <= has else ""
    raise ConfigError(
        f"Ray has {has} CPUs and this run asks it for {total} ({parts}): it would wait for ever. Set "
        f"{_CPUS_KEY}={total} (a number in Ray's books, nothing is reserved){fewer}"
    )


def check_cluster(config: DictConfig, nodes: Sequence[Mapping[str, float]]) -> None:
    """The same of a Ray that runs: each of `nodes` is what one living node has in its books, by Ray's words.

    verl takes a node's GPUs from one node, with the CPUs that its bundles ask for beside them. Servers of their own it
    starts last, and finds only then that no GPU is left for them.
    """
    from verl.single_controller.ray.base import ResourcePoolManager

    gpus = config.trainer.n_gpus_per_node
    cpus = ResourcePoolManager.max_colocate_count * gpus
    fit = sum(node.get("GPU", 0) >= gpus and node.get("CPU", 0) >= cpus for node in nodes)
    all_gpus, all_cpus = needed_gpus(config), sum(needed_processors(config).values())
    has_gpus, has_cpus = (sum(node.get(name, 0) for node in nodes) for name in ("GPU", "CPU"))
    if fit >= config.trainer.nnodes and has_gpus >= all_gpus and has_cpus >= all_cpus:
        return
    apart = " (with those that sample: actor_rollout_ref.rollout.nnodes, .n_gpus_per_node)"
    books = ", ".join(f"{node.get('GPU', 0):g} GPUs and {node.get('CPU', 0):g} CPUs" for node in nodes)
    raise ConfigError(
        f"this run asks Ray for {config.trainer.nnodes} nodes of {gpus} GPUs and {cpus} CPUs, and for {all_gpus} GPUs"
        f"{apart if _samples_apart(config) else ''} and {all_cpus} CPUs in all; it would wait for ever, or fail late. "
        f"The cluster's books say: {books}. Set trainer.nnodes and trainer.n_gpus_per_node, or give more CPUs to "
        "`ray start` (--num-cpus: a number in its books, nothing is reserved)"
    )


def check_batch(config: DictConfig) -> None:
    """verl divides an update's trajectories among the GPUs, and fails after the first rollouts if a rest is left."""
    actor, n = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout.n
    together = OmegaConf.select(config, f"{_FSDP}.ulysses_sequence_parallel_size") or 1
    parts = config.trainer.nnodes * config.trainer.n_gpus_per_node // together
    if parts == 0 or actor.ppo_mini_batch_size * n % parts == 0:
        return
    step = parts // math.gcd(parts, n)
    prompts = max(step, round(actor.ppo_mini_batch_size / step) * step)
    raise ConfigError(
        f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size} x actor_rollout_ref.rollout.n={n} "
        f"trajectories cannot be divided among {parts} GPUs: set it and data.train_batch_size to {prompts}, or "
        "trainer.n_gpus_per_node to a divisor"
    )


def gpus_of_a_node(config: DictConfig) -> int:
    """That the run asks Ray for; on the CPU, one stands for a training process."""
    apart = config.actor_rollout_ref.rollout.n_gpus_per_node if _samples_apart(config) else 0
    return config.trainer.n_gpus_per_node + apart


def fill_logical_gpus(config: DictConfig) -> None:
    """What Ray is told of GPUs on a machine without: as many as the run asks for. Another's Ray has its own number."""
    if config.trainer.device == "cpu" and ray_starts_here(config):
        fill_open(config, {"ray_kwargs.ray_init.num_gpus": gpus_of_a_node(config)})


# -- GPUs, driver, packages -------------------------------------------------------------------------------------------

_IN_USE = 2 * GB  # of a GPU, by others; a desktop takes less


def check_gpus(config: DictConfig, gpus: Sequence[Gpu], say: Say, slices: Sequence[str] = ()) -> None:
    """Whether the GPUs are there and free.

    Args:
        slices: ids of MIG devices that the environment names, of which nvidia-smi tells no memory.
    """
    wanted = gpus_of_a_node(config)
    if slices:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES names {slices[0]}, a MIG slice of a GPU, and a run here knows whole GPUs only: ask "
            "the scheduler for whole ones, or set CUDA_VISIBLE_DEVICES to the number or the id (GPU-...) of one that "
            "is not divided (`nvidia-smi -L` lists them)"
        )
    if len(gpus) < wanted:
        raise ConfigError(
            f"this run asks for {wanted} GPUs of a machine, and nvidia-smi shows {len(gpus)} here: install or repair "
            "the NVIDIA driver, look at CUDA_VISIBLE_DEVICES, set trainer.n_gpus_per_node, or take hardware=cpu"
        )
    for i, gpu in enumerate(gpus[:wanted]):
        if gpu.used > _IN_USE:
            raise ConfigError(
                f"GPU {i} ({gpu}) has {gpu.used / GB:.0f} GB in use by other processes: end them (nvidia-smi names "
                "them), or choose other GPUs with CUDA_VISIBLE_DEVICES"
            )
    idle = f"; {len(gpus) - wanted} more stay idle (trainer.n_gpus_per_node)" if len(gpus) > wanted else ""
    say(f"GPUs: {wanted} x {gpus[0]}, driver {gpus[0].driver}{idle}")


def torch_cuda() -> tuple[int, int] | None:
    """The CUDA that torch was built with; None for a build without."""
    import torch

    if torch.version.cuda is None:
        return None
    major, minor = torch.version.cuda.split(".")[:2]
    return int(major), int(minor)


def check_cuda(driver: tuple[int, int] | None, built: tuple[int, int] | None, gpus: Sequence[Gpu], say: Say) -> None:
    """Within one major version an older driver serves a newer toolkit; across them it does not.

    Where nvidia-smi shows GPUs the driver works, and a version that could not be read is no reason to end a run.
    """
    if built is None:
        raise ConfigError(
            "torch is a build without CUDA: make an environment for GPUs, "
            "`VENV=.venv-vllm bash examples/setup_env.sh vllm`"
        )
    if driver is None and not gpus:
        raise ConfigError("nvidia-smi names no CUDA version: install or repair the NVIDIA driver")
    if driver is None:
        say(
            f"warning: nvidia-smi names no CUDA version; whether driver {gpus[0].driver} serves CUDA {built[0]}, which "
            "torch was built with, is not known"
        )
    elif driver[0] < built[0]:
        raise ConfigError(
            f"the driver serves CUDA up to {driver[0]}.{driver[1]}, and torch was built with {built[0]}.{built[1]}: "
            f"update the NVIDIA driver to one for CUDA {built[0]}"
        )


#: Engines whose kernels Triton makes as they start: it compiles a module of Python's on the spot.
_COMPILING = ("vllm", "sglang")


def check_compiler(engine: str, compiler: str | None, header: Path | None) -> None:
    """Packages bring neither, and without them the engine dies minutes later, in a process of its own."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    lacking = [
        *(["C compiler (gcc, clang, or what CC names)"] if compiler is None else []),
        *([f"Python.h of Python {version}"] if header is None else []),
    ]
    if lacking:
        raise ConfigError(
            f"rollout={engine}: its engine compiles when it starts, and there is no {' and no '.join(lacking)} here; "
            f"Debian, Ubuntu: apt-get install build-essential python{version}-dev"
        )


_FUSED_HEAD = "verl_ext.fused_head"


def check_engine(engine: str, stack: str) -> None:
    """Whether the environment has the rollout's engine, of the build that the stack is about."""
    remedy = f"make an environment with it, `VENV=.venv-{stack} bash examples/setup_env.sh {stack}`"
    if importlib.util.find_spec(engine) is None:
        raise ConfigError(f"rollout={stack}: the package {engine} is not installed; {remedy}")
    if stack == "vllm_cpu" and "cpu" not in (build := _version(engine)):  # what vLLM itself looks for
        raise ConfigError(f"rollout={stack}: the vLLM here, {build}, is no build for the CPU; {remedy}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of no known version"


def check_packages(config: DictConfig, say: Say) -> None:
    rollout = config.actor_rollout_ref.rollout
    check_engine(rollout.name, rollout.name)
    if rollout.name == "transformers":
        say("rollout: transformers, which is slow and meant for small models; for others rollout=vllm")
    if rollout.checkpoint_engine.backend == "nccl" and importlib.util.find_spec("cupy") is None:
        raise ConfigError(
            "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl (mode=separate_async): verl sends weights over "
            "NCCL with the package cupy, which is not installed; pip install cupy-cuda13x==14.0.1"
        )
    model = config.actor_rollout_ref.model
    given = [model.external_lib] if isinstance(model.external_lib, str) else list(model.external_lib or [])
    if model.use_fused_kernels and _FUSED_HEAD not in given:
        raise ConfigError(
            f"actor_rollout_ref.model.external_lib={model.external_lib} leaves out {_FUSED_HEAD}, without which verl's "
            f"fused head fails on models with untied embeddings: set it to [{', '.join([*given, _FUSED_HEAD])}]"
        )
    asked = model.override_config.get("attn_implementation", "flash_attention_2")
    found, why = attention()
    if asked == "flash_attention_2" and found != asked:
        raise ConfigError(
            f"attn_implementation=flash_attention_2: {why}; leave actor_rollout_ref.model.override_config."
            "attn_implementation out, and the run takes sdpa"
        )
    if asked == "sdpa":
        say(f"attention: sdpa ({why}): slower, and a mask of a micro-batch's tokens by its tokens in memory")


@functools.cache
def attention() -> tuple[str, str]:
    """(attn_implementation, why): flash-attn's where it can be imported, else torch's own."""
    if importlib.util.find_spec("flash_attn") is None:
        return "sdpa", "flash-attn is not installed"
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except Exception as e:  # built for another torch; or flash-attn-4, which SGLang brings, in the same folder
        return "sdpa", f"flash-attn cannot be imported: {one_line(e)}"
    return "flash_attention_2", "flash-attn is installed"


_SHARED = 1 * GB  # NCCL's buffers and more; Docker's own size is 64 MB


def check_shared_memory(config: DictConfig, size: int | None) -> None:
    if size is not None and size < _SHARED and config.trainer.n_gpus_per_node > 1:
        raise ConfigError(
            f"/dev/shm has {size / GB:.2f} GB, and processes on several GPUs talk through it: start the container with "
            "--shm-size=16g or --ipc=host"
        )


# -- what depends on the model ----------------------------------------------------------------------------------------


def shape_of(config: DictConfig) -> Shape | None:
    """Of the model that is trained: of its config.json, or of its name where it is yet to be downloaded."""
    model = config.actor_rollout_ref.model
    if model.path is None:
        return None
    known = read_config(model)
    return Shape.of(known) if known is not None else memory.by_name(model.path)


def check_disk(config: DictConfig, shape: Shape | None) -> None:
    """Room for the checkpoints that this start is going to have at once, beside those of earlier ones.

    verl counts from nothing at every start: it deletes what this one wrote, and never what an earlier one did.
    """
    trainer = config.trainer
    if shape is None or trainer.save_freq <= 0:
        return
    trained = shape.adapter(config.actor_rollout_ref.model.lora_rank) or shape.parameters
    one = 4 * shape.parameters + 8 * trained
    folder = Path(trainer.default_local_dir).resolve()
    earlier = len(list(folder.glob("global_step_*/actor")))
    kept = trainer.max_actor_ckpt_to_keep or 1
    # A single one goes only when the next is whole. A first start needs one more, for another to go on from.
    needed = max(2, kept) if earlier else kept + 1
    if (total := trainer.total_training_steps) is not None:
        steps = range(_saved_step(folder) + 1, total + 1)
        needed = min(needed, sum(step % trainer.save_freq == 0 or step == total for step in steps))
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free >= needed * one / trainer.nnodes:
        return
    more, remedy = "", "set run_dir to a larger disk, or trainer.max_actor_ckpt_to_keep"
    if earlier:
        more, remedy = " more", "make room there"
    if earlier > 1:
        remedy += (
            f". verl deletes none that an earlier start wrote: of the {earlier} there only the one that "
            "latest_checkpointed_iteration.txt names is gone on from"
        )
    raise ConfigError(
        f"{there} has {free / GB:.0f} GB free, and {needed}{more} checkpoints of this model take about "
        f"{needed * one / GB:.0f} GB: {remedy}"
    )


def _saved_step(folder: Path) -> int:
    """That the run goes on from, as verl's tracker file has it; 0 where it has none."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    text = tracker.read_text(errors="replace").strip() if tracker.exists() else ""
    return int(text) if text.isdecimal() else 0


def machines_of(config: DictConfig, gpus: Sequence[Gpu], host: float | None) -> Machines:
    """The GPUs of the config, as large as the smallest that was found here; of 80 GB where none was."""
    trainer = config.trainer
    sizes = [gpu.memory for gpu in gpus if gpu.memory]
    size = min(sizes) if sizes else 80 * GB
    return Machines(trainer.n_gpus_per_node, size, trainer.nnodes, host if sizes else None)


def asked_for(config: DictConfig) -> tuple[Settings, dict[str, Any]]:
    """What the config has of a training's settings; and what it may leave to `memory.choose`, None where it does."""
    from verl.trainer.ppo.utils import need_reference_policy

    longest = config.data.max_prompt_length + config.data.max_response_length
    parts = config.actor_rollout_ref
    model, rollout, fsdp = parts.model, parts.rollout, parts.actor.fsdp_config
    settings = Settings(
        tokens=longest,
        longest=longest,
        cpu_adam=bool(fsdp.offload_policy),
        lora_rank=model.lora_rank,
        merged=bool(model.lora.merge),
        sglang=rollout.name == "sglang",
        tensor_parallel=rollout.tensor_model_parallel_size,
        ulysses=fsdp.ulysses_sequence_parallel_size,
        fused=bool(model.use_fused_kernels),
        flash=_attention_of(config) == "flash_attention_2",
        rows=rollout.max_num_seqs if rollout.name == "transformers" else 0,
        prompt=config.data.max_prompt_length,
        context=rollout.max_model_len or 0 if rollout.name == "vllm" else 0,
        apart=_samples_apart(config),
        old_log_probs=not OmegaConf.select(config, "algorithm.rollout_correction.bypass_mode", default=False),
        # with an adapter verl asks the trained model without it
        reference=bool(need_reference_policy(config)) and model.lora_adapter_path is None,
    )
    tokens = parts.actor.ppo_max_token_len_per_gpu
    if not parts.actor.use_dynamic_bsz:
        tokens = longest * (parts.actor.ppo_micro_batch_size_per_gpu or 1)
    both = [value for value in (fsdp.param_offload, fsdp.optimizer_offload) if value is not None]
    return settings, {
        "tokens": tokens,
        "offload": all(both) if both else None,
        "share": rollout.gpu_memory_utilization,
    }


def _remedies(config: DictConfig) -> dict[str, str]:
    """How to leave to `memory.choose` what this config sets of it, by the names of `asked_for`; and how to train an
    adapter, `lora`."""
    actor = config.actor_rollout_ref.actor
    offloads = [key for key in ("param_offload", "optimizer_offload") if actor.fsdp_config.get(key) is not None]
    together = "actor_rollout_ref.actor.use_dynamic_bsz=true"
    return {
        "tokens": _left_out(_TOKENS) if actor.use_dynamic_bsz else f"{together} with {_TOKENS}=null",
        "offload": _left_out(*(f"{_FSDP}.{key}" for key in offloads)),
        "share": _left_out(_SHARE),
        "lora": f"{_LORA}=32" + (f" and {_RATE}={_ADAPTER_RATE}" if is_full_rate(config) else ""),
    }


def is_full_rate(config: DictConfig) -> bool:
    """Whether the learning rate is one with which an adapter hardly moves."""
    return config.actor_rollout_ref.actor.optim.lr <= _FULL_RATE


def slow_adapter(config: DictConfig) -> str | None:
    """A warning where an adapter is trained with the learning rate of full training, else None."""
    rank, rate = config.actor_rollout_ref.model.lora_rank, config.actor_rollout_ref.actor.optim.lr
    if not rank or not is_full_rate(config):
        return None
    return (
        f"{_RATE}={rate:g} is a rate of full training, and {_LORA}={rank} trains an adapter, which begins at zero and "
        f"hardly moves with it: about ten times that is usual ({_RATE}={_ADAPTER_RATE}; not measured here)"
    )


def _left_out(*keys: str) -> str:
    return f"leave out {' and '.join(keys)} (or null, where a file sets {'it' if len(keys) == 1 else 'them'})"


def served_context(config: DictConfig, longest: int) -> int | None:
    """What `rollout.max_model_len` has to be where it is left open and no trajectory gets longer than `longest`; None
    where it stays open.

    verl would take the model's whole context, and vLLM does not start unless one request of that length fits its
    cache. No trajectory is cut by this one: verl cuts a prompt to `data.max_prompt_length`, and vLLM samples up to its
    last token. SGLang starts whatever the context, of which verl keeps the last token back. A model that is yet to be
    downloaded is taken for one that reads so much; verl refuses a longer context than the model's, with both numbers.
    """
    if config.trainer.device == "cpu" or config.actor_rollout_ref.rollout.name != "vllm":
        return None
    own = context_of(config.actor_rollout_ref.model)
    return longest if own is None else min(own, longest)


def _attention_of(config: DictConfig) -> str:
    return config.actor_rollout_ref.model.override_config.get("attn_implementation", "flash_attention_2")


def fill_model(config: DictConfig, machines: Machines, say: Say) -> None:
    """On GPUs, where nobody says which model: the largest Qwen2.5 that they train, up to 7B."""
    if config.trainer.device == "cpu" or config.actor_rollout_ref.model.path is not None:
        return
    settings, given = asked_for(config)
    size = memory.default_size(machines, settings, **given)
    config.actor_rollout_ref.model.path = f"Qwen/Qwen2.5-{size}-Instruct"
    say(
        f"model: {config.actor_rollout_ref.model.path}, the largest of Qwen2.5 up to 7B for {machines}, trained "
        f"{'by LoRA' if settings.lora_rank else 'in full'}; another: actor_rollout_ref.model.path=..."
    )


def check_ulysses(config: DictConfig, shape: Shape | None) -> None:
    """Under sdpa, GPUs that share a trajectory would each attend to their own part of it alone, without a word."""
    together = config.actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size
    if together == 1:
        return
    key = f"{_FSDP}.ulysses_sequence_parallel_size={together}"
    if _attention_of(config) == "sdpa":
        raise ConfigError(
            f"{key}: verl exchanges the tokens of a trajectory around flash-attn's kernel only, and with sdpa each GPU "
            f"would attend to its own part alone ({attention()[1]}): install requirements/flash_attn.txt, or set it to "
            "1"
        )
    if shape is not None and shape.heads % together:
        fitting = " or ".join(str(n) for n in range(2, shape.heads + 1) if shape.heads % n == 0)
        raise ConfigError(f"{key} does not divide the {shape.heads} attention heads of the model: set it to {fitting}")


def fit_memory(config: DictConfig, machines: Machines, shape: Shape | None, say: Say) -> None:
    """Fill what the hardware file leaves open, by arithmetic: micro-batch, offloading, vLLM's share of a GPU, the
    length of its longest request.

    Raises ConfigError with the sums and with what would fit, where nothing does. With gtpo_separate_async, which
    generates on other GPUs, the sum for generation says too much.
    """
    longest = config.data.max_prompt_length + config.data.max_response_length
    if config.trainer.device == "cpu":
        fill_open(config, {_TOKENS: 2 * longest})
        return
    settings, given = asked_for(config)
    taken = shape or memory.QWEN25["7B"]
    found = memory.choose(taken, machines, settings, **given)
    if found is None:
        tried = {
            "tokens": given["tokens"] or settings.tokens_of_one,
            "offload": given["offload"] is not False,
            "share": given["share"],
        }
        if shape is not None:
            shown = memory.best(settings, **tried)
            raise ConfigError(_refusal(shape, machines, shown, _remedies(config), given))
        found = memory.best(settings, **tried)
    fill_open(
        config,
        {
            _TOKENS: found.tokens,
            f"{_FSDP}.param_offload": found.offload,
            f"{_FSDP}.optimizer_offload": found.offload,
            _SHARE: found.share,
            _CONTEXT: served_context(config, longest),
        },
    )
    engine = f"{found.rows} trajectories at once" if found.rows else f"vLLM's share {found.share:g}"
    update, generation = (sum(f(taken, machines, found).values()) / GB for f in (memory.update, memory.generation))
    name = "a model of unknown size, taken for 7 B" if shape is None else f"a model of {taken.parameters / 1e9:.1f} B"
    say(
        f"memory: {name} parameters on {machines}, trained {'by LoRA' if found.lora_rank else 'in full'}: about "
        f"{update:.0f} GB of a GPU in the update, {generation:.0f} GB in generation; micro-batches of {found.tokens} "
        f"tokens, {engine}, {'with' if found.offload else 'no'} offloading"
    )


def _refusal(
    shape: Shape, machines: Machines, settings: Settings, remedies: Mapping[str, str], given: Mapping[str, Any]
) -> str:
    what = memory.lacking(shape, machines, settings)
    would = "; or ".join(memory.proposals(shape, machines, settings, remedies, **given))
    remedy = f"what would fit: {would}" if would else "nothing that this arithmetic knows would make it fit"
    return f"a model of {shape.parameters / 1e9:.1f} B parameters does not fit {machines}: {what}; {remedy}"
