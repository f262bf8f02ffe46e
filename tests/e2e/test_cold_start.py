"""The cold start on the CPU: verl's own SFT trainer, on transcripts in a file, with a toy policy."""

from __future__ import annotations

import json
import re

import pytest
from composition import compose
from safetensors.torch import load_file

from recipe.gtpo.run.errors import ConfigError
from recipe.gtpo.sft.cold_start import cold_start
from recipe.gtpo.sft.transcripts import call_text
from recipe.gtpo.tasks.arithmetic.warm_start import ensure_warm_start
from recipe.gtpo.tasks.task import make_row, write_parquet

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    from toy import TOY

    folder = tmp_path_factory.mktemp("cold")
    policy = ensure_warm_start(TOY, folder, progress=False)
    with (folder / "transcripts.jsonl").open("w") as file:
        for a in range(8):
            messages = [
                {"role": "user", "content": f"What is {a} + 2?"},
                {"role": "assistant", "content": call_text("python", {"code": f"{a}+2"})},
                {"role": "tool", "content": f"{a + 2}\n"},
                {"role": "assistant", "content": f"\\boxed{{{a + 2}}}"},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    held_out = write_parquet([make_row("sums", 0, "What is 7 + 2?", "9")], folder / "val.parquet")
    sft = "{data: {train_batch_size: 2, max_token_len_per_gpu: 1024}, optim: {lr: 0.01}, trainer: {total_epochs: 4}}"
    return compose(
        "task=verl_data",
        f"actor_rollout_ref.model.path={policy}",
        f"data.val_files={held_out}",
        f"sft.source={folder / 'transcripts.jsonl'}",
        f"sft.out={folder / 'sft'}",
        f"sft.verl={sft}",
    )


def test_the_policy_learns_its_transcripts_once_and_keeps_its_precision(config):
    said: list[str] = []
    made = cold_start(config, said.append)
    assert said[0] == "7 transcripts (1 left out: its problem is, exactly, one of the held-out ones)"
    losses = [float(x) for x in re.findall(r"train/loss:([\d.]+)", (made / "sft.log").read_text())]
    assert len(losses) == 4 * (7 // 2) and losses[-1] < losses[0] / 2
    before = load_file(f"{config.actor_rollout_ref.model.path}/model.safetensors")
    after = load_file(made / "model.safetensors")
    assert {str(t.dtype) for t in after.values()} == {"torch.float32"}
    assert any((after[name] != before[name]).any() for name in after)
    assert not (made / "work").exists() and (made / "tokenizer_config.json").is_file()
    told: list[str] = []
    assert cold_start(config, told.append) == made
    assert len(told) == 1  # nothing was trained


def test_a_key_that_verl_has_not_got_is_named(config):
    config = config.copy()
    config.sft.verl = {"optim": {"learning_rate": 1}}
    with pytest.raises(ConfigError, match=r"sft\.verl: .*learning_rate"):
        cold_start(config, lambda line: None)


def test_fewer_transcripts_than_a_batch_are_refused_before_anything_is_trained(config, tmp_path):
    config = config.copy()
    config.sft.verl, config.sft.out = {"data": {"train_batch_size": 8}}, str(tmp_path)
    with pytest.raises(ConfigError, match=r"has 7 transcripts, fewer than one batch of 8: .* with N of 7 or less$"):
        cold_start(config, lambda line: None)
    assert not list(tmp_path.iterdir())


def test_without_a_source_the_command_says_what_there_is(config):
    config = config.copy()
    config.sft.source = None
    with pytest.raises(ConfigError, match=r"sft\.source is not set: teacher"):
        cold_start(config, lambda line: None)
