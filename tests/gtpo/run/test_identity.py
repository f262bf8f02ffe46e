"""A run folder belongs to one config: what makes another run, what does not, and what is said of a mismatch."""

from __future__ import annotations

import pytest
from composition import compose
from omegaconf import OmegaConf

from recipe.gtpo.run.identity import FREE, claim, flatten, same_overrides, variant
from recipe.gtpo.run.record import RecordError, RunRecord

pytestmark = pytest.mark.unit


def test_the_readmes_own_next_commands_get_folders_of_their_own():
    """They used to print the first run's numbers."""
    names = {variant([one]) for one in ("algorithm.gtpo.baseline=turn", "actor_rollout_ref.actor.optim.lr=2e-4", "x=1")}
    names |= {variant([f"experiment={name}"]) for name in ("horizon4", "horizon6")}  # which used to share the default's
    assert len(names) == 5 and all(len(name) == 7 and name.startswith("-") for name in names)


def test_what_is_named_anyway_or_only_prolongs_a_run_is_no_variant():
    free = ["trainer.total_training_steps=9", "tool_server.workers=4", "run_dir=x", "watchdog.poll_seconds=2"]
    assert variant(["method=grpo", "seed=2", "task=arithmetic", "hardware=cpu", "rollout=transformers", *free]) == ""
    assert variant(["a=1", "b=2"]) == variant(["b=2", "a=1", "seed=3"]) != variant(["a=1"])


def test_every_free_key_is_one_of_the_config():
    """A free key that the config does not know would be a typo that lets a difference through."""
    config = compose()
    assert [key for key in FREE if key != "matrix" and not known(config, key)] == []


def known(config, key):
    parent, _, name = key.rpartition(".")
    return name in (OmegaConf.select(config, parent) if parent else config)


def config_of(**changes):
    return OmegaConf.merge({"seed": 1, "actor": {"lr": 5e-4}, "trainer": {"total_training_steps": 2}}, changes)


def test_the_same_config_may_go_on_and_go_on_for_longer(tmp_path):
    record = RunRecord(tmp_path / "run")
    claim(record, config_of())
    claim(record, config_of())
    claim(record, config_of(trainer={"total_training_steps": 9}))
    assert record.read_config()["trainer.total_training_steps"] == 2  # the first start's


ROLLOUT = "actor_rollout_ref.rollout"
ACTOR = "actor_rollout_ref.actor"


@pytest.mark.parametrize(
    "less",
    [
        f"{ROLLOUT}.gpu_memory_utilization=0.4",
        f"{ROLLOUT}.max_num_seqs=8",
        f"{ROLLOUT}.max_num_batched_tokens=512",
        f"{ROLLOUT}.enforce_eager=true",
        f"{ACTOR}.ppo_max_token_len_per_gpu=2048",
        f"{ACTOR}.fsdp_config.param_offload=true",
        f"{ACTOR}.fsdp_config.optimizer_offload=true",
        f"{ACTOR}.fsdp_config.offload_policy=true",
        "actor_rollout_ref.ref.fsdp_config.param_offload=true",
        f"{ROLLOUT}.log_prob_max_token_len_per_gpu=2048",
    ],
)
def test_a_run_that_died_of_its_memory_goes_on_with_less(tmp_path, less):
    """By the same command with one word more: it had begun anew, in a folder of another name."""
    claim(RunRecord(tmp_path), compose())
    claim(RunRecord(tmp_path), compose(less))
    assert variant([less]) == "" and same_overrides([], [less])


@pytest.mark.parametrize("other", [f"{ROLLOUT}.max_model_len=99", f"{ACTOR}.ppo_mini_batch_size=2", f"{ROLLOUT}.n=3"])
def test_what_a_trajectory_or_an_update_is_makes_another_run(tmp_path, other):
    claim(RunRecord(tmp_path), compose())
    with pytest.raises(RecordError, match=f"{other.partition('=')[0]}="):
        claim(RunRecord(tmp_path), compose(other))
    assert variant([other]) != ""


def test_another_config_is_refused_with_what_differs(tmp_path):
    record = RunRecord(tmp_path)
    claim(record, config_of())
    with pytest.raises(RecordError) as refused:
        claim(record, config_of(actor={"lr": 2e-4}, data={"train_files": "other.parquet"}))
    message = str(refused.value)
    assert "actor.lr=0.0005 there, 0.0002 here; data.train_files=None there, other.parquet here" in message
    assert "run_dir=" in message and "\n" not in message


# -- the reward function ----------------------------------------------------------------------------------------------

KEY = "reward.custom_reward_function"


def rewarded(path):
    return config_of(reward={"custom_reward_function": {"path": path, "name": "compute_score"}})


@pytest.fixture
def reward(tmp_path):
    (tmp_path / "my_reward.py").write_text("def compute_score(**_):\n    return 0\n")
    return tmp_path / "my_reward.py"


def test_an_edited_reward_function_is_refused_and_the_old_one_goes_on(tmp_path, reward):
    """Its path, name and arguments are the same: a finished run printed the old numbers, another mixed both."""
    record, before = RunRecord(tmp_path / "run"), reward.read_text()
    claim(record, rewarded(reward))
    claim(record, rewarded(reward))
    reward.write_text(before.replace("0", "1"))
    with pytest.raises(RecordError) as refused:
        claim(record, rewarded(f"{reward}"))
    message = str(refused.value)
    assert message.startswith(f"the reward function {reward} has changed since {record.dir} was begun with it. Give ")
    assert "run_dir=" in message and "\n" not in message
    claim(RunRecord(tmp_path / "another"), rewarded(reward))
    reward.write_text(before)
    claim(record, rewarded(reward))


def test_another_file_is_named_by_its_path(tmp_path, reward):
    claim(RunRecord(tmp_path / "run"), rewarded(reward))
    (other := tmp_path / "other.py").write_text("another = 1")
    for config in (rewarded(other), rewarded(None)):
        with pytest.raises(RecordError, match=rf"{KEY}\.path=.*my_reward\.py there") as refused:
            claim(RunRecord(tmp_path / "run"), config)
        assert "sha256" not in str(refused.value)


def test_a_folder_from_before_the_hash_goes_on_and_notes_it(tmp_path, reward):
    record = RunRecord(tmp_path / "run")
    record.write_config(old := flatten(OmegaConf.to_container(rewarded(reward))))
    claim(record, rewarded(reward))
    noted = record.read_config()
    assert noted.pop(f"{KEY}.sha256") and noted == old
    reward.write_text("edited = 1")
    with pytest.raises(RecordError, match="has changed since"):
        claim(record, rewarded(reward))


@pytest.mark.parametrize("named", ["file://{}/my_reward.py", "pkg://my_reward"])
def test_a_reward_function_is_found_however_it_is_named(tmp_path, reward, named, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    config = rewarded(named.format(tmp_path))
    claim(RunRecord(tmp_path / "run"), config)
    reward.write_text("edited = 1")
    with pytest.raises(RecordError, match="has changed since"):
        claim(RunRecord(tmp_path / "run"), config)


def test_a_config_is_flat_and_survives_its_file(tmp_path):
    record = RunRecord(tmp_path)
    record.write_config(flat := flatten({"a": {"b": 1, "c": [1, 2], "d": {}}, "e": None, "f": True}))
    assert record.read_config() == flat == {"a.b": 1, "a.c": "[1, 2]", "a.d": "{}", "e": None, "f": True}


def test_command_lines_are_the_same_run_in_any_order_and_for_any_length():
    assert same_overrides(["a=1", "b=2", "run_dir=x"], ["b=2", "a=1", "trainer.total_training_steps=9"])
    assert not same_overrides(["a=1"], ["a=2"])
