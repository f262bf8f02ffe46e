"""Run folders with a checkpoint as verl's FSDP2 writes it, in float32."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

_SAVE = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

model, weights, target, rank = sys.argv[1:4] + [int(sys.argv[4])]
dist.init_process_group("gloo", init_method=f"file://{target}/rendezvous", rank=rank, world_size=2)
made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
made.load_state_dict(torch.load(weights), strict=False)
fully_shard(made, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",)))
state = made.state_dict()
state.pop("lm_head.weight", None)  # tied: verl leaves it out
torch.save(state, f"{target}/model_world_size_2_rank_{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def write_sharded(run: Path, step: int, model: Path, weights: Mapping[str, torch.Tensor]) -> Path:
    """Of two ranks, of `model` with other `weights`. Returns the folder `global_step_N`."""
    folder = _around(run, step, model, ranks=2)
    actor = folder / "actor"
    torch.save(dict(weights), actor / "weights.pt")
    ranks = [
        subprocess.Popen([sys.executable, "-c", _SAVE, str(model), str(actor / "weights.pt"), str(actor), str(rank)])
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    (actor / "weights.pt").unlink()
    (actor / "rendezvous").unlink(missing_ok=True)
    return folder


def write_whole(run: Path, step: int, model: Path, weights: Mapping[str, torch.Tensor]) -> Path:
    """Of one rank, with tensors that nothing is sharded of."""
    folder = _around(run, step, model, ranks=1)
    torch.save(dict(weights), folder / "actor" / "model_world_size_1_rank_0.pt")
    return folder


def _around(run: Path, step: int, model: Path, ranks: int) -> Path:
    folder = run / "checkpoints" / f"global_step_{step}"
    actor = folder / "actor"
    actor.mkdir(parents=True)
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": ranks}))
    shutil.copytree(model, actor / "huggingface", ignore=shutil.ignore_patterns("*.safetensors"))
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(step))
    (run / "config.json").write_text(json.dumps({"actor_rollout_ref.model.path": str(model)}))
    return folder
