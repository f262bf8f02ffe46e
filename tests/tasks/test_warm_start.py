"""The cache and the training loop at toy size. What the full size learns is measured with benchmarks/twin.py."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import replace
from itertools import islice

import pytest
import torch
from omegaconf import OmegaConf
from toy import TOY
from transformers import AutoModelForCausalLM

from recipe.gtpo.tasks import warm_start
from recipe.gtpo.tasks.warm_start import IGNORE, WarmStartOptions, demonstrations, drill, ensure_warm_start, train

pytestmark = pytest.mark.unit


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def test_equal_seeds_give_equal_weights_to_the_last_bit(toy_policy, tmp_path):
    threads = torch.get_num_threads()
    train(TOY, tmp_path, progress=False)
    first, second = weights(toy_policy), weights(tmp_path)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (toy_policy / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert torch.get_num_threads() == threads, "training must give the thread count back"


def test_seeds_differ(toy_policy, tmp_path):
    train(replace(TOY, seed=4), tmp_path, progress=False)
    first, second = weights(toy_policy), weights(tmp_path)
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_demonstrations_are_of_the_train_split_and_follow_the_horizon():
    options = WarmStartOptions(horizon={3: 1.0})
    shown = list(islice(demonstrations(options, 1.0), 50))
    assert {c.problem.split for c in shown} == {"train"}
    assert {len(c.problem.steps) for c in shown} == {3}


def test_fault_scale_zero_is_a_perfect_expert():
    assert all(set(c.faults) == {None} for c in islice(demonstrations(TOY, 0.0), 50))
    assert any(set(c.faults) != {None} for c in islice(demonstrations(TOY, 1.0), 50))


def test_drill_trains_on_the_second_saying_only(stream):
    ids, labels = drill(stream, random.Random(1))
    half = len(ids) // 2
    assert ids[:half] == ids[half:]
    assert labels == [IGNORE] * half + ids[half:]


def test_cache_hit_does_not_train_again(tmp_path, monkeypatch):
    path = ensure_warm_start(TOY, tmp_path, progress=False)
    assert json.loads((path / "warm_start.json").read_text())["seed"] == TOY.seed
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in path.iterdir()}

    def never(*args, **kwargs):
        raise AssertionError("trained although the cache has it")

    monkeypatch.setattr(warm_start, "train", never)
    assert ensure_warm_start(replace(TOY), tmp_path, progress=False) == path


def test_options_are_the_key():
    assert TOY.key == replace(TOY).key
    others = [
        replace(TOY, seed=9),
        replace(TOY, steps=9),
        replace(TOY, horizon={1: 1.0}),
        replace(TOY, fault_scale=0.5),
    ]
    assert len({TOY.key, *(other.key for other in others)}) == 5


def test_options_from_a_config_library_have_the_same_key():
    config = OmegaConf.create({"horizon": {1: 1, 2: 2}, "fault_mix": TOY.fault_mix})
    assert WarmStartOptions(**config).key == WarmStartOptions(horizon={1: 1.0, 2: 2.0}).key


def test_malformed_options_are_refused_before_any_work():
    with pytest.raises(ValueError, match="horizon must map step counts"):
        WarmStartOptions(horizon={9: 1.0})
    with pytest.raises(ValueError, match="must be >= 0 and sum to <= 1"):
        WarmStartOptions(fault_scale=3.0)


def test_a_failed_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def fails(options, directory, *, progress):
        (directory / "config.json").write_text("half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(warm_start, "train", fails)
    with pytest.raises(KeyboardInterrupt):
        ensure_warm_start(TOY, tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_concurrent_runs_agree_on_one_entry(tmp_path, monkeypatch):
    """Both miss the cache, both train, the second to finish takes what the first one left."""
    both_training = threading.Barrier(2, timeout=20)

    def slow(options, directory, *, progress):
        both_training.wait()
        (directory / "config.json").write_text("whole")

    monkeypatch.setattr(warm_start, "train", slow)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(ensure_warm_start(TOY, tmp_path, progress=False)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / TOY.key] * 2
    assert [entry.name for entry in tmp_path.iterdir()] == [TOY.key]
