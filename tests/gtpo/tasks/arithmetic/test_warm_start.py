"""The cache and the training loop at toy size. What the full size learns, an experiment measures."""

from __future__ import annotations

import json
import random
import threading
import time
from dataclasses import replace
from itertools import islice

import pytest
import torch
from toy import TOY, TOY_BASE
from transformers import AutoModelForCausalLM

from recipe.gtpo.models.cache import FACTS
from recipe.gtpo.tasks.arithmetic import warm_start
from recipe.gtpo.tasks.arithmetic.experts import FAULT_MIX, FIRST_CALL_DECIDES, faults_for
from recipe.gtpo.tasks.arithmetic.problems import step_mix
from recipe.gtpo.tasks.arithmetic.task import Arithmetic
from recipe.gtpo.tasks.arithmetic.warm_start import (
    _FAULTLESS,
    IGNORE,
    BaseOptions,
    SkillNotReachedError,
    WarmStartOptions,
    demonstrations,
    drill,
    encode,
    ensure_warm_start,
    skill,
    train_base,
)

pytestmark = pytest.mark.unit


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def test_equal_seeds_give_equal_weights_to_the_last_bit(toy_policy, tmp_path):
    threads = torch.get_num_threads()
    again = ensure_warm_start(TOY, tmp_path, progress=False)
    first, second = weights(toy_policy), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (toy_policy / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()
    assert torch.get_num_threads() == threads, "training must give the thread count back"


def test_seeds_differ_in_their_habits_and_share_the_base(tmp_path):
    found = [ensure_warm_start(replace(TOY, seed=seed), tmp_path, progress=False) for seed in (3, 4)]
    first, second = map(weights, found)
    assert not all(torch.equal(first[name], second[name]) for name in first)
    assert len(list(tmp_path.glob("base-*"))) == 1


def test_another_horizon_starts_from_the_default_ones_base(tmp_path):
    ensure_warm_start(replace(TOY, base=replace(TOY_BASE, horizon=3)), tmp_path, progress=False)
    facts = [json.loads((folder / FACTS).read_text()) for folder in tmp_path.glob("base-*")]
    assert sorted(fact["horizon"] for fact in facts) == [2, 3]
    assert len({(folder / "tokenizer.json").read_bytes() for folder in tmp_path.glob("base-*")}) == 1


def test_skill_is_the_share_of_conversations_that_greedy_decoding_would_say(toy_policy, stream):
    model = AutoModelForCausalLM.from_pretrained(toy_policy).eval()
    shown = [encode(d, stream) for d in islice(demonstrations(2, _FAULTLESS, seed=1), 2)]
    assert skill(model, shown, stream.pad_id) == 0.0
    # what the model itself would say, one labelled token after the prompt, and the same with a wrong second label
    prompt = shown[0][0][:20]
    with torch.inference_mode():
        said = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    right = ([*prompt, said], [IGNORE] * 20 + [said])
    wrong = ([*prompt, said + 1], [IGNORE] * 20 + [said + 1])
    assert skill(model, [right], stream.pad_id) == 1.0
    assert skill(model, [wrong, right, shown[1], right], stream.pad_id) == 0.5


def test_a_base_that_does_not_learn_says_so_and_leaves_nothing(tmp_path):
    hopeless = replace(TOY, base=replace(TOY_BASE, skill=0.9, max_steps=4))
    with pytest.raises(SkillNotReachedError, match=r"solves 0.00 of its problems after 4 steps, not 0.9: .*max_steps"):
        ensure_warm_start(hopeless, tmp_path, progress=False)
    assert not [folder for folder in tmp_path.iterdir() if folder.is_dir()]


def test_training_of_the_base_ends_where_the_skill_is(tmp_path, monkeypatch):
    """Whatever number of steps that takes: here the third measurement is good enough."""
    measured = iter([0.1, 0.94, 0.96])
    asked = []
    monkeypatch.setattr(warm_start, "skill", lambda *args: asked.append(1) or next(measured))
    steps = []
    monkeypatch.setattr(warm_start, "_fit", lambda *args: steps.append(1) or 0.0)
    train_base(replace(TOY_BASE, skill=0.95), None, tmp_path, progress=False)
    assert (len(asked), len(steps)) == (3, 9)


def test_a_base_that_starts_from_another_is_the_running_mean_of_the_weights(tmp_path, toy_policy, monkeypatch):
    steps, fit = [], warm_start._fit

    def fit_and_look(model, *rest):
        loss = fit(model, *rest)
        steps.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
        return loss

    monkeypatch.setattr(warm_start, "_fit", fit_and_look)
    train_base(replace(TOY_BASE, horizon=3), toy_policy, tmp_path, progress=False)
    assert len(steps) == 3
    saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    for name, first in steps[0].items():
        mean = 0.98 * (0.98 * first + 0.02 * steps[1][name]) + 0.02 * steps[2][name]
        torch.testing.assert_close(saved[name].detach(), mean)
    assert not torch.equal(steps[0][name], steps[2][name])


def test_demonstrations_are_of_the_split_and_follow_the_horizon():
    shown = list(islice(demonstrations(3, FAULT_MIX, seed=1), 50))
    assert {c.problem.split for c in shown} == {"train"}
    assert {len(c.problem.steps) for c in shown} == {2, 3}
    assert {c.problem.split for c in islice(demonstrations(3, FAULT_MIX, 1, split="validation"), 50)} == {"validation"}


def test_the_base_learns_from_an_expert_without_faults_and_the_habits_from_one_with_them():
    assert all(set(c.faults) == {None} for c in islice(demonstrations(2, _FAULTLESS, seed=1), 50))
    assert TOY.faults == faults_for(TOY.success, step_mix(TOY.base.horizon))
    assert any(set(c.faults) != {None} for c in islice(demonstrations(2, TOY.faults, seed=1), 50))


def test_faults_go_by_a_name_and_an_unknown_one_is_refused():
    assert WarmStartOptions(faults_in="first_call", success=0.1).faults == FIRST_CALL_DECIDES
    with pytest.raises(ValueError, match="faults_in='last_call' is not one of everywhere, first_call"):
        WarmStartOptions(faults_in="last_call")


def test_drill_trains_on_the_second_saying_only(stream):
    ids, labels = drill(stream, random.Random(1))
    half = len(ids) // 2
    assert ids[:half] == ids[half:]
    assert labels == [IGNORE] * half + ids[half:]


def test_cache_hit_does_not_train_again(tmp_path, monkeypatch):
    path = ensure_warm_start(TOY, tmp_path, progress=False)
    assert json.loads((path / FACTS).read_text())["seed"] == TOY.seed
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in path.iterdir()}

    def never(*args, **kwargs):
        raise AssertionError("trained although the cache has it")

    monkeypatch.setattr(warm_start, "_fit", never)
    assert ensure_warm_start(replace(TOY), tmp_path, progress=False) == path


def test_options_are_the_key():
    assert TOY.key == replace(TOY).key
    others = [
        replace(TOY, seed=9),
        replace(TOY, steps=9),
        replace(TOY, success=0.1),
        replace(TOY, base=replace(TOY_BASE, horizon=1)),
    ]
    assert len({TOY.key, *(other.key for other in others)}) == 5


def test_malformed_options_are_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="horizon=9: the task has 1 to 6"):
        BaseOptions(horizon=9)
    with pytest.raises(ValueError, match=r"success=0\.99 is out of reach"):
        WarmStartOptions(success=0.99)
    with pytest.raises(ValueError, match=r"success=0\.99 is out of reach"):
        arithmetic(tmp_path, horizon=2, success=0.99).prepare()


def test_a_failed_run_leaves_no_entry_behind(tmp_path, monkeypatch):
    def fails(options, start, directory, *, progress):
        (directory / "config.json").write_text("half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(warm_start, "train_base", fails)
    with pytest.raises(KeyboardInterrupt):
        ensure_warm_start(TOY, tmp_path, progress=False)
    assert not [entry for entry in tmp_path.iterdir() if entry.is_dir()]


def test_of_concurrent_runs_one_trains_and_the_other_waits(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(warm_start, "train_base", lambda options, start, directory, *, progress: None)

    def slow(options, base, directory, *, progress):
        trained.append(1)
        time.sleep(0.3)  # the other thread must not get past the lock meanwhile
        (directory / "config.json").write_text("whole")

    monkeypatch.setattr(warm_start, "train_habits", slow)
    found = []
    one, other = (
        threading.Thread(target=lambda: found.append(ensure_warm_start(TOY, tmp_path, progress=False)))
        for _ in range(2)
    )
    one.start()
    while not trained:
        one.join(timeout=0.01)
    other.start()
    for thread in (one, other):
        thread.join()
    assert found == [tmp_path / TOY.key] * 2 and trained == [1]


def test_the_task_sets_the_limits_that_its_horizon_needs(tmp_path):
    toy = {"steps": 1, "batch_size": 2, "base": {"skill": 0.0, "check_every": 1, "batch_size": 2, "hidden_size": 16}}
    made = arithmetic(tmp_path, horizon=3, success=0.2, warm_start=toy).prepare()
    assert made["data.max_response_length"] == 256 and made["data.max_prompt_length"] == 112
    assert made["actor_rollout_ref.rollout.multi_turn.max_assistant_turns"] == 6


def arithmetic(tmp_path, **fields):
    sizes = {"train_problems": 8, "validation_problems": 8, "final_problems": 8}
    return Arithmetic(name="arithmetic", seed=1, cache=str(tmp_path), **sizes, **fields)
