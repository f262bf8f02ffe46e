"""Protects what is evaluated: the weights that were trained, bit for bit, of the run that was named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from checkpoints import write_sharded, write_whole
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from verl.model_merger.base_model_merger import ModelMergerConfig
from verl.model_merger.fsdp_model_merger import FSDPModelMerger

from recipe.gtpo.evaluate.models import find_base, find_model, fingerprint, merge, run_overrides
from recipe.gtpo.evaluate.request import task_of
from recipe.gtpo.run.errors import ConfigError
from recipe.gtpo.run.record import RecordError, RunRecord

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def base(toy_policy):
    return toy_policy


@pytest.fixture(scope="module")
def trained(base):
    """The weights after some steps at a small learning rate: each has moved by a ten-thousandth of itself."""
    state = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    return {name: tensor * 1.0001 for name, tensor in state.items()}


@pytest.fixture(scope="module")
def run(base, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    write_sharded(folder, 3, base, trained)
    return folder


def test_the_merged_weights_are_the_trained_ones_bit_for_bit(run, trained):
    model = find_model(str(run))
    merge(model)
    merged = AutoModelForCausalLM.from_pretrained(model.path, dtype="auto").state_dict()
    assert merged.keys() == trained.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, trained[name]), name
    assert json.loads((run / "checkpoints/global_step_3/merged/config.json").read_text())["dtype"] == "float32"


def test_verls_own_merger_would_lose_what_was_trained(run, base, trained, tmp_path):
    """Why there is one of ours. When this fails, verl keeps the type, and `merge_shards` can be verl's command."""
    shards = run / "checkpoints/global_step_3/actor"
    config = ModelMergerConfig(
        operation="merge",
        backend="fsdp",
        local_dir=str(shards),
        target_dir=str(tmp_path),
        hf_model_config_path=str(shards / "huggingface"),
    )
    FSDPModelMerger(config).merge_and_save()
    merged = load_file(tmp_path / "model.safetensors")
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    moved = [bool(torch.any(merged[n].float() != before[n].bfloat16().float())) for n in merged]
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    same = sum(int((merged[n] == before[n].bfloat16()).sum()) for n in merged) / sum(t.numel() for t in merged.values())
    assert same > 0.9, (same, moved)


def test_a_checkpoint_is_merged_once_and_again_when_it_is_another(base, trained, tmp_path):
    weights = {name: tensor for name, tensor in trained.items() if name != "lm_head.weight"}  # tied
    folder = write_whole(tmp_path / "run", 1, base, weights)
    model = find_model(str(folder))
    before = fingerprint(model)
    assert merge(model) and not merge(model) and fingerprint(model) == before
    shutil.rmtree(folder / "actor")
    twice = write_whole(tmp_path / "again", 1, base, {name: tensor * 2 for name, tensor in weights.items()})
    shutil.copytree(twice / "actor", folder / "actor")
    assert merge(model) and fingerprint(model) != before
    name = "model.norm.weight"
    assert torch.equal(load_file(folder / "merged/model.safetensors")[name], trained[name] * 2)


def _copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("merged"))
    return find_model(str(tmp_path / "run"))


def test_a_merge_that_fails_leaves_nothing(run, tmp_path):
    model = _copy(run, tmp_path)
    (model.checkpoint / "actor/model_world_size_2_rank_1.pt").write_bytes(b"half of a shar")
    with pytest.raises(ConfigError, match=r"actor cannot be merged: .*; was its saving cut off\?"):
        merge(model)
    assert sorted(path.name for path in model.checkpoint.iterdir()) == ["actor"]


def test_a_missing_shard_is_named(run, tmp_path):
    model = _copy(run, tmp_path)
    (model.checkpoint / "actor/model_world_size_2_rank_1.pt").unlink()
    with pytest.raises(ConfigError, match=r"actor lacks the shard of rank 1: on several nodes each keeps its own"):
        merge(model)


ALPHA, RANK = 6, 3


@pytest.fixture
def lora(base, tmp_path):
    """A run whose policy is `base` and a LoRA adapter, as verl saves it; its shards' folder and the whole state."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"]))
    state = {name: tensor.clone() for name, tensor in adapted.state_dict().items() if "lm_head" not in name}
    for name in state:
        if "lora_B" in name:  # which begins as zeros
            torch.nn.init.normal_(state[name])
    actor = write_whole(tmp_path / "lora", 1, base, state) / "actor"
    (actor / "lora_train_meta.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "task_type": "CAUSAL_LM"}))
    return actor, state


def test_a_lora_adapter_is_part_of_the_merged_weights(lora, base):
    actor, state = lora
    model = find_model(str(actor))
    merge(model)
    merged = AutoModelForCausalLM.from_pretrained(model.path, dtype="auto").state_dict()
    for name, before in AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict().items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.default.weight" in state:
            down, up = (state[f"{stem}.lora_{matrix}.default.weight"] for matrix in "AB")
            assert torch.allclose(merged[name], before + ALPHA / RANK * up @ down, atol=1e-6)
            assert not torch.allclose(merged[name], before, atol=1e-2)
        else:
            assert torch.equal(merged[name], before), name
    assert not list((model.checkpoint / "merged").glob("*adapter*"))


def test_half_of_a_lora_checkpoint_is_refused(lora):
    actor, state = lora
    model = find_model(str(actor))
    (actor / "lora_train_meta.json").unlink()
    with pytest.raises(ConfigError, match=r"lora_train_meta\.json does not say lora_alpha"):
        merge(model)
    only = {name: tensor for name, tensor in state.items() if "lora_" in name}
    torch.save(only, actor / "model_world_size_1_rank_0.pt")
    with pytest.raises(ConfigError, match="is a LoRA checkpoint of the adapter alone"):
        merge(model)
    assert not (model.checkpoint / "merged").exists()


# -- which model ------------------------------------------------------------------------------------------------------


def test_a_run_its_checkpoint_and_its_shards_are_the_same_model(run):
    folder = run / "checkpoints/global_step_3"
    for name in (run, folder, folder / "actor"):
        model = find_model(str(name))
        assert (model.checkpoint, model.run, model.step, model.label) == (folder, run, 3, "run-step3")
    assert str(find_model(str(run))) == f"{run}, checkpoint of step 3"


def test_a_model_is_one_already(base):
    for name in (str(base), "Qwen/Qwen2.5-3B-Instruct"):
        model = find_model(name)
        assert (model.path, model.checkpoint, model.step, run_overrides(model)) == (name, None, 0, [])
    assert find_model("Qwen/Qwen2.5-3B-Instruct").label == "Qwen2.5-3B-Instruct"
    assert fingerprint(find_model("Qwen/Qwen2.5-3B-Instruct")) == "" != fingerprint(find_model(str(base)))


def test_the_base_of_a_run_is_what_it_began_with(run, base):
    assert find_base(find_model(str(run))).path == str(base)
    with pytest.raises(ConfigError, match="compare=base needs model= to be a run's folder"):
        find_base(find_model(str(base)))


def test_a_base_that_is_gone_is_named(run, tmp_path):
    model = _copy(run, tmp_path)
    (model.run / "config.json").write_text(json.dumps({"actor_rollout_ref.model.path": "/gone"}))
    with pytest.raises(ConfigError, match="the run began with /gone, which is gone: compare=MODEL"):
        find_base(model)


@pytest.fixture
def started(run, tmp_path, monkeypatch):
    """A run whose folder has the starts that are given, each by its arguments."""
    model = _copy(run, tmp_path)

    def start(*arguments):
        monkeypatch.setattr("sys.argv", ["recipe/gtpo/main.py", *arguments])
        RunRecord(model.run).write_start(seed=1)
        return model

    return start


def test_the_latest_start_says_how_it_was_run(started):
    started("seed=1")
    assert run_overrides(started("seed=2", "task.system=Be quick, please.")) == [
        "seed=2",
        "task.system=Be quick, please.",
    ]


def test_a_folder_of_ones_own_configs_is_no_override_whatever_its_name(started):
    overrides = run_overrides(started("--config-dir", "task", "seed=2"))
    assert overrides[0] == "seed=2" and task_of(overrides, "arithmetic") == "arithmetic"


def test_a_command_that_the_run_has_refused_says_nothing_of_it(started):
    """Its folder of hydra is written before the run's own is found to belong to another config."""
    model = started("task.system=Be quick.")
    (model.run / "hydra/20990101-000000").mkdir(parents=True)
    (model.run / "hydra/20990101-000000/overrides.yaml").write_text("- task=gsm8k\n")
    assert run_overrides(model) == ["task.system=Be quick."]


@pytest.mark.parametrize("name", ["/no/such/folder", "./gone", "a/b/c"])
def test_a_folder_that_is_none_is_refused(name):
    with pytest.raises(ConfigError, match=f"model={name} is no folder"):
        find_model(name)


def test_runs_without_a_checkpoint_are_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        find_model(str(tmp_path))
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "versions.json").write_text("[]")
    with pytest.raises(ConfigError, match="kept no checkpoint"):
        find_model(str(tmp_path))


def test_a_checkpoint_that_is_half_there_is_refused(tmp_path):
    (tmp_path / "checkpoints/global_step_2").mkdir(parents=True)
    with pytest.raises(ConfigError, match="no whole FSDP checkpoint of verl"):
        find_model(str(tmp_path / "checkpoints/global_step_2"))
    (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").write_text("4")
    with pytest.raises(RecordError, match="no global_step_4"):
        find_model(str(tmp_path))
