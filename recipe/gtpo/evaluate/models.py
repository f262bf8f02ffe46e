"""The model that is evaluated: a hub name, a folder, or what a run has trained, with its weights as they were trained.

A checkpoint of verl holds shards. verl's merger makes a model of them and rounds it to bfloat16 on the way, in which
most of what a small learning rate has changed is gone. Here the same merger keeps the type that was trained in, so
that the merged weights are those of the shards bit for bit. (A rollout engine then loads them in
`actor_rollout_ref.rollout.dtype`, as it does while a run trains.)
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from recipe.gtpo.doctor import read_overrides
from recipe.gtpo.run.errors import ConfigError, one_line
from recipe.gtpo.run.record import RunRecord, latest_checkpoint

#: Folder of a checkpoint that holds the merged model, and the file in it that says of which shards.
MERGED, SOURCE = "merged", "merged_from.json"
_PATH = "actor_rollout_ref.model.path"


@dataclass(frozen=True)
class Model:
    """Args:
    name: as the user named it.
    path: a hub name or a folder; of a checkpoint that of the merged model, which `merge` makes.
    checkpoint: folder of verl's `global_step_N`; None for a model that is one already.
    run: folder of the run that wrote it.
    """

    name: str
    path: str
    checkpoint: Path | None = None
    run: Path | None = None

    @property
    def step(self) -> int:
        """Of training; 0 for a model that no run here has trained."""
        return 0 if self.checkpoint is None else _step(self.checkpoint)

    @property
    def label(self) -> str:
        """For the name of a folder."""
        if self.run is not None:
            return f"{self.run.name}-step{self.step}"
        return Path(self.path).name

    def __str__(self) -> str:
        return self.name if self.checkpoint is None else f"{self.run}, checkpoint of step {self.step}"


def find_model(name: str) -> Model:
    """What `model=` names: a run's folder (its last checkpoint), one of its checkpoints, a model's folder, a hub name.

    Raises ConfigError / RecordError.
    """
    path = Path(os.path.expanduser(name))
    if not path.is_dir():
        if name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise ConfigError(f"model={name} is no folder: a run's, a checkpoint's or a model's folder, or a hub name")
        return Model(name, name)
    path = path.resolve()
    if path.name == "actor" and path.parent.name.startswith("global_step_"):
        path = path.parent
    if path.name.startswith("global_step_"):
        return _of_checkpoint(name, path, path.parent.parent)
    if (path / "checkpoints").is_dir():
        step = latest_checkpoint(path / "checkpoints")
        if step is None:
            raise ConfigError(f"model={name}: this run has no checkpoint yet")
        return _of_checkpoint(name, path / "checkpoints" / f"global_step_{step}", path)
    if (path / "versions.json").is_file():
        raise ConfigError(f"model={name}: this run kept no checkpoint (trainer.save_freq), so there is no model")
    return Model(name, str(path))


def _of_checkpoint(name: str, checkpoint: Path, run: Path) -> Model:
    if not (checkpoint / "actor" / "fsdp_config.json").is_file():
        raise ConfigError(f"model={name}: {checkpoint}/actor has no fsdp_config.json: no whole FSDP checkpoint of verl")
    if not (run / "config.json").is_file():
        raise ConfigError(f"model={name}: {run} has no config.json, so it is no folder of a run")
    return Model(name, str(checkpoint / MERGED), checkpoint, run)


def find_base(model: Model) -> Model:
    """The model that a run began with. Raises ConfigError."""
    if model.run is None:
        raise ConfigError(
            "compare=base needs model= to be a run's folder or checkpoint: compare=MODEL names another one"
        )
    path = run_config(model).get(_PATH)
    if path is None:
        raise ConfigError(f"{model.run}/config.json does not say what the run began with: compare=MODEL")
    if os.path.isabs(path) and not Path(path).is_dir():
        raise ConfigError(f"compare=base: the run began with {path}, which is gone: compare=MODEL names another copy")
    return Model(f"{model.run} before training", path)


def run_config(model: Model) -> dict[str, Any]:
    """Full key -> value of the run that trained it; empty without one."""
    return {} if model.run is None else RunRecord(model.run).read_config() or {}


def run_overrides(model: Model) -> list[str]:
    """What was on the command line of the run's latest start.

    Not the latest that hydra has kept: it writes its folder also for a command that the run then refuses.
    """
    starts = [] if model.run is None else RunRecord(model.run).read_starts()
    return read_overrides(starts[-1]["command"][1:]) if starts else []


def fingerprint(model: Model) -> str:
    """A hash by which a second start knows that the files are the same; "" for a hub name.

    Names, sizes and times: reading every byte of a large model takes minutes.
    """
    folder = Path(model.path) if model.checkpoint is None else model.checkpoint / "actor"
    if not folder.is_dir():
        return ""
    return hashlib.sha256(json.dumps(_files(folder)).encode()).hexdigest()[:16]


def _files(folder: Path) -> list[tuple[str, int, int]]:
    patterns = ("*.safetensors", "*.bin", "model_world_size_*.pt")
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("global_step_"))


# -- merging ----------------------------------------------------------------------------------------------------------


def merge(model: Model) -> bool:
    """Make the merged model of a checkpoint, whole or not at all; False where it is there already.

    Raises ConfigError for half of a LoRA checkpoint, and for a shard that is missing or torn.
    """
    assert model.checkpoint is not None
    shards, target = model.checkpoint / "actor", Path(model.path)
    facts = json.dumps(_files(shards))
    if (target / SOURCE).is_file() and (target / SOURCE).read_text() == facts:
        return False
    ranks = json.loads((shards / "fsdp_config.json").read_text())["world_size"]
    missing = [i for i in range(ranks) if not (shards / f"model_world_size_{ranks}_rank_{i}.pt").is_file()]
    if missing:
        raise ConfigError(
            f"{shards} lacks the shard of rank {missing[0]}: on several nodes each keeps its own; copy them"
        )
    partial = Path(tempfile.mkdtemp(prefix=".merged.", dir=model.checkpoint))
    try:
        merge_shards(shards, partial)
        (partial / SOURCE).write_text(facts)
        shutil.rmtree(target, ignore_errors=True)
        os.chmod(partial, 0o755)  # mkdtemp makes it private
        os.replace(partial, target)
    except (ConfigError, OSError):
        raise
    except Exception as e:  # of torch, of pickle, of the model's class
        raise ConfigError(f"{shards} cannot be merged: {one_line(e)}; was its saving cut off?") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def merge_shards(shards: Path, target: Path) -> None:
    """verl's merger (`python -m verl.model_merger merge --backend fsdp`), without its rounding to bfloat16.

    verl puts a LoRA adapter beside the model; here it is added to the weights, in their own type.
    """
    import torch
    from verl.model_merger.base_model_merger import ModelMergerConfig
    from verl.model_merger.fsdp_model_merger import FSDPModelMerger

    class Merger(FSDPModelMerger):
        types: set[torch.dtype]
        adapted: bool

        def _load_and_merge_state_dicts(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            # verl has no switch: it calls bfloat16() of every shard, in this thread. Which types there are is noted
            # for config.json; tests/gtpo/evaluate/test_models.py breaks when the merger works otherwise.
            with mock.patch.object(torch.Tensor, "bfloat16", lambda tensor: tensor):
                state = super()._load_and_merge_state_dicts(*args, **kwargs)
            self.adapted = any("lora_" in name for name in state)
            if self.adapted and (why := _no_adapter(shards, state)):
                raise ConfigError(f"{shards} is a LoRA checkpoint {why}")
            self.types = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
            return state

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):  # a dozen lines, and a bar
        merger = Merger(
            ModelMergerConfig(
                operation="merge",
                backend="fsdp",
                local_dir=str(shards),
                target_dir=str(target),
                hf_model_config_path=str(shards / "huggingface"),
            )
        )
        merger.merge_and_save()
        file, widest = target / "config.json", max(merger.types, key=lambda one: one.itemsize)
        config = json.loads(file.read_text()) | {"dtype": str(widest).removeprefix("torch.")}  # it wrote bfloat16
        file.write_text(json.dumps(config, indent=2) + "\n")
        if merger.adapted:
            _add_adapter(target)


def _no_adapter(shards: Path, state: Mapping[str, Any]) -> str:
    """Why the adapter of a checkpoint cannot be added to its model; "" where it can."""
    if all("lora_" in name for name in state):
        return (
            "of the adapter alone: save the model too (actor.checkpoint), or merge them with peft and give that folder"
        )
    meta = shards / "lora_train_meta.json"
    if not meta.is_file() or not json.loads(meta.read_text()).get("lora_alpha"):  # verl would take 0
        return f"whose {meta.name} does not say lora_alpha: what the adapter was multiplied with is not known"
    return ""


def _add_adapter(folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = folder / "lora_adapter"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    merged.save_pretrained(folder)
    shutil.rmtree(adapter)
