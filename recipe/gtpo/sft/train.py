"""Transcripts in, the folder of a trained model out: verl's SFT trainer with the run's model, machine and template."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from recipe.gtpo.models.cache import make_once
from recipe.gtpo.run.errors import ConfigError
from recipe.gtpo.run.record import last_line
from recipe.gtpo.run.signals import signals_wait
from recipe.gtpo.sft.sources import Say
from recipe.gtpo.sft.transcripts import Message
from recipe.gtpo.tasks.task import write_parquet

#: Of the run's model section, what verl's SFT trainer has under the same names.
_MODEL = (
    "path",
    "hf_config_path",
    "tokenizer_path",
    "trust_remote_code",
    "custom_chat_template",
    "external_lib",
    "override_config",
    "enable_gradient_checkpointing",
    "use_remove_padding",
    "lora_rank",
    "lora_alpha",
    "target_modules",
    "use_fused_kernels",
    "fused_kernel_options",
)
_ENGINE = ("strategy", "use_torch_compile", "mixed_precision", "model_dtype", "offload_policy")


def train(
    config: DictConfig, transcripts: Sequence[Sequence[Message]], tools: Sequence[dict[str, Any]], say: Say
) -> Path:
    """Train the run's model on the transcripts; the folder of the new model in `sft.out`, made now or found.

    Two calls with equal transcripts and settings share a folder. Raises ConfigError when the training fails, or would
    leave no model.
    """
    rows = [{"messages": list(messages), "tools": list(tools)} for messages in transcripts]
    settings = sft_config(config)
    if len(rows) < settings.data.train_batch_size:  # verl drops a part of a batch, and divides by their number
        raise ConfigError(
            f"the cold start has {len(rows)} transcripts, fewer than one batch of {settings.data.train_batch_size}: "
            f"give more, or set 'sft.verl={{data: {{train_batch_size: N}}}}' with N of {len(rows)} or less"
        )
    if "hf_model" not in settings.checkpoint.save_contents:  # a saved folder then has a tokenizer, but no weights
        raise ConfigError("sft.verl: checkpoint.save_contents has no 'hf_model', which is what a run loads: add it")
    facts = {"transcripts": len(rows), "settings": OmegaConf.to_container(settings, resolve=True)}
    name = hashlib.sha256(json.dumps([rows, facts], sort_keys=True).encode()).hexdigest()[:12]

    def make(folder: Path) -> None:
        work = folder / "work"
        settings.data.train_files = write_parquet(rows, folder / "transcripts.parquet")
        settings.trainer.default_local_dir = str(work)
        OmegaConf.save(settings, folder / "sft.yaml")
        say(f"cold start: {len(rows)} transcripts, {settings.trainer.total_epochs} epoch(s), with verl's SFT trainer")
        _run_worker(settings, folder)
        for file in _last_saved(work).iterdir():
            shutil.move(str(file), folder / file.name)
        shutil.rmtree(work)

    return make_once(Path(config.sft.out) / name, facts, make)


def sft_config(config: DictConfig) -> DictConfig:
    """verl's `sft_trainer_engine` with the run's model, machine and seed, and over it what `sft.verl` says.

    Raises ConfigError for a key that verl's SFT trainer has not got.
    """
    GlobalHydra.instance().clear()  # of the application that may run
    with initialize_config_module("verl.trainer.config", version_base=None):
        made = compose("sft_trainer_engine")
    model = OmegaConf.to_container(config.actor_rollout_ref.model, resolve=True)
    engine = OmegaConf.to_container(config.actor_rollout_ref.actor.fsdp_config, resolve=True)
    assert isinstance(model, dict) and isinstance(engine, dict)
    ours: dict[str, Any] = {
        "model": {key: model[key] for key in _MODEL if key in model},
        "engine": {key: engine[key] for key in _ENGINE if key in engine},
        "checkpoint": {"save_contents": ["hf_model"]},  # what a run loads; a cold start is not resumed
        "data": {"num_workers": 0},
        "trainer": {
            "device": config.trainer.device,
            "nnodes": 1,
            "n_gpus_per_node": config.trainer.n_gpus_per_node,
            "seed": config.sft.seed,
            "logger": ["console"],
            "project_name": config.trainer.project_name,
            "experiment_name": "sft",
            "resume_mode": "disable",
        },
    }
    with open_dict(made):  # override_config and mixed_precision are open mappings
        made = OmegaConf.merge(made, OmegaConf.create(ours))
    OmegaConf.set_struct(made, True)
    try:
        return OmegaConf.merge(made, config.sft.verl or {})  # type: ignore[return-value]
    except OmegaConfBaseException as e:
        raise ConfigError(f"sft.verl: {' '.join(str(e).split())}") from e


def _run_worker(settings: DictConfig, folder: Path) -> None:
    processes = settings.trainer.n_gpus_per_node
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command += ["recipe.gtpo.sft.worker", str(folder / "sft.yaml")]
    environment = os.environ | {"MASTER_PORT": str(_free_port())}
    if settings.trainer.device == "cpu":
        environment["VERL_PLATFORM"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", "1")
    log = folder / "sft.log"
    with log.open("wb") as output:
        worker = None
        try:
            with signals_wait():
                worker = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            status = worker.wait()
        finally:
            if worker is not None and worker.poll() is None:
                worker.terminate()
                worker.wait()
    if status != 0:
        kept = folder.parent / "failed.log"
        shutil.copy(log, kept)
        raise ConfigError(f"the cold start failed: {last_line(log.read_text(errors='replace'))} (all of it: {kept})")


def _last_saved(work: Path) -> Path:
    """The model of the last step that was saved: `trainer.save_freq` saves others before it."""
    saved = {int(path.name.removeprefix("global_step_")): path / "huggingface" for path in work.glob("global_step_*")}
    if not saved:  # verl saves the last of total_training_steps, and ends before it where the epochs have fewer steps
        raise ConfigError(
            "the cold start saved no model: sft.verl's trainer.total_training_steps is more than its epochs have; "
            "leave it out, or set trainer.total_epochs higher"
        )
    return saved[max(saved)]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
