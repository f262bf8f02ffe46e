"""Protects the doctor: it goes through all the checks of a run, names each, goes on after a failure, starts no Ray, and
its status says whether a run would start.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest
import ray
from gpus import nvidia_smi
from published import gsm8k, write_jsonl

from recipe.gtpo import doctor, main
from recipe.gtpo.data.__main__ import make_task
from recipe.gtpo.data.prepare import prepare
from recipe.gtpo.run import checks
from recipe.gtpo.run.machine import driver_cuda, gpus
from recipe.gtpo.tasks.task import make_row, write_parquet

NOWHERE = "tool_server.url=http://127.0.0.1:9"  # nothing answers there, and at once
FIRST = ["config", "folders", "processors"]
GIVEN = ["data", "the reward function's answers", "model and tokenizer", "context", "memory", "disk"]
REST = ["reward function", *GIVEN, "verl's own checks", "tools"]


def report(output: str) -> dict[str, str]:
    """name of a check -> its line"""
    lines = [line for line in output.splitlines() if line.startswith(("ok  ", "FAIL"))]
    return {line[6:].split(":")[0]: line for line in lines}


@pytest.mark.unit
def test_every_check_is_named_and_a_failure_does_not_end_it(capsys):
    assert doctor.main([NOWHERE, "algorithm.gtpo.gamma=2"]) == 1
    output = capsys.readouterr().out
    found = report(output)
    assert list(found) == FIRST + REST
    failed = {name for name, line in found.items() if line.startswith("FAIL")}
    assert failed == {"config", "tools"}
    assert found["config"] == "FAIL  config: algorithm.gtpo.gamma: 2.0 must be in [0, 1]"
    assert found["tools"].startswith("FAIL  tools: tool_server.url=http://127.0.0.1:9 does not answer")
    assert found["data"] == "ok    data: made when a run starts, not looked at"
    assert output.splitlines()[-1] == "2 of the checks failed" and not ray.is_initialized()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """With two GPUs of 80 GB, a driver too old for CUDA 13, no package for them, and no headers of Python."""
    nvidia_smi(tmp_path, 2, cuda="12.4")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for module in (checks, doctor):
        monkeypatch.setattr(module, "host_memory", lambda: 500e9)
    monkeypatch.setattr("recipe.gtpo.run.machine.c_compiler", lambda: "/usr/bin/gcc")
    monkeypatch.setattr("recipe.gtpo.run.machine.python_header", lambda: None)
    for read in (gpus, driver_cuda):
        read.cache_clear()
    yield
    for read in (gpus, driver_cuda):
        read.cache_clear()


@pytest.mark.unit
def test_on_gpus_it_looks_at_them_and_shows_what_fits(machine, tmp_path, capsys):
    rows = [make_row("sums", i, f"What is {i}+1?", str(i + 1)) for i in range(128)]
    files = write_parquet(rows, tmp_path / "rows.parquet")
    (tmp_path / "reward.py").write_text("def compute_score(data_source, solution_str, ground_truth, extra_info): ...\n")
    asked = [
        *("hardware=single_node", "rollout=vllm", "task=verl_data", NOWHERE),
        *(f"data.train_files={files}", f"data.val_files={files}"),
        f"reward.custom_reward_function.path={tmp_path}/reward.py",
        "actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct",
        "ray_kwargs.ray_init.num_cpus=32",
    ]
    assert doctor.main(asked) == 1
    output = capsys.readouterr().out
    found = report(output)
    assert list(found) == [*FIRST, "batch", "GPUs", "shared memory", "packages", "compiler", "CUDA", *REST]
    assert found["GPUs"] == "ok    GPUs: 2 x NVIDIA H100, 86 GB, driver 580.65.06"
    assert found["packages"].startswith("FAIL  packages: rollout=vllm: the package vllm is not installed")
    assert found["compiler"].startswith("FAIL  compiler: rollout=vllm: its engine compiles when it starts, and there ")
    assert found["CUDA"].startswith("FAIL  CUDA: torch is a build without CUDA")  # that of the tests
    assert found["data"] == "ok    data: 128 training rows, 128 validation rows"
    assert "a model of 7.6 B parameters on 2 x 86 GB" in found["memory"]
    assert "\n2 x 86 GB        trained" in output and "\nQwen2.5-14B      LoRA, 32" in output


@pytest.mark.unit
@pytest.mark.parametrize("argument", ["hardware=nonsense", "algorithm.gtpo.gama=1"])
def test_a_config_that_cannot_be_composed_is_the_only_line(capsys, argument):
    assert doctor.main([argument]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("FAIL  config: ")


@pytest.mark.unit
def test_what_is_not_set_is_missing_where_the_task_makes_nothing(capsys):
    doctor.main(["task=verl_data", NOWHERE])
    found = report(capsys.readouterr().out)
    assert found["data"].startswith("FAIL  data: data.train_files is not set")
    assert found["model and tokenizer"].startswith("FAIL  model and tokenizer: actor_rollout_ref.model.path is not set")


@pytest.mark.unit
def test_what_needs_the_model_is_left_out_where_there_is_none(tmp_path, capsys):
    files = write_parquet([make_row("sums", i, "What is 1+1?", "2") for i in range(128)], tmp_path / "rows.parquet")
    doctor.main(["task=verl_data", NOWHERE, f"data.train_files={files}", f"data.val_files={files}"])
    found = report(capsys.readouterr().out)
    assert found["data"] == "ok    data: 128 training rows, 128 validation rows"
    assert found["model and tokenizer"].startswith("FAIL  model and tokenizer: actor_rollout_ref.model.path is not set")
    for name in ("context", "memory", "disk"):
        assert found[name] == f"ok    {name}: not looked at without a model"


@pytest.mark.unit
def test_files_of_ones_own_are_looked_at_though_the_run_makes_the_model(tmp_path, capsys):
    doctor.main(
        ["model=smollm2", "task=verl_data", NOWHERE, "data.train_files=t.parquet", f"data.val_files={tmp_path}"]
    )
    found = report(capsys.readouterr().out)
    assert found["data"].startswith("FAIL  data: data.train_files: t.parquet does not exist in ")
    assert found["model and tokenizer"] == "ok    model and tokenizer: made when a run starts, not looked at"
    assert found["disk"] == "ok    disk: made when a run starts, not looked at"


@pytest.mark.unit
def test_prepared_data_are_looked_at_and_their_absence_has_its_remedy(tmp_path, capsys):
    asked = ["task=gsm8k", f"task.folder={tmp_path}/out", NOWHERE, "data.train_batch_size=2"]
    assert doctor.main(asked) == 1
    found = report(capsys.readouterr().out)
    assert found["prepared data"] == (
        f"FAIL  prepared data: task.folder={tmp_path}/out has no prepared data; make them first: "
        f"python -m recipe.gtpo.data prepare task=gsm8k out={tmp_path}/out"
    )
    assert found["data"] == "ok    data: not looked at without data"
    assert found["model and tokenizer"].startswith("FAIL  model and tokenizer: actor_rollout_ref.model.path is not set")
    for split, sums in {"train": range(4), "test": range(10, 12)}.items():
        write_jsonl(tmp_path / f"gsm8k/{split}.jsonl", [gsm8k(f"What is {i}+1?", i + 1) for i in sums])
    prepare(make_task("gsm8k"), tmp_path / "out", local=tmp_path)
    capsys.readouterr()
    doctor.main(asked)
    found = report(capsys.readouterr().out)
    assert found["prepared data"] == "ok    prepared data"
    assert found["data"] == "ok    data: 4 training rows, 2 validation rows"


@pytest.mark.unit
def test_a_task_that_makes_its_data_is_not_asked_to(tmp_path, capsys):
    doctor.main(["task=reasoning_gym", f"task.folder={tmp_path}/out", "model=smollm2", NOWHERE])
    found = report(capsys.readouterr().out)
    assert "prepared data" not in found and found["data"] == "ok    data: made when a run starts, not looked at"
    assert not (tmp_path / "out").exists()


@pytest.mark.unit
def test_a_run_begins_with_the_same_checks():
    """They are not listed twice: each goes through what these functions return."""
    for user in (main.run, doctor.examinations):
        assert "first_checks(" in inspect.getsource(user)
    for user in (checks.prepare, doctor.examinations):
        assert "given_checks(" in inspect.getsource(user)


@pytest.mark.e2e
def test_the_command_passes_where_a_run_would_start(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "recipe.gtpo.doctor", f"run_dir={tmp_path}/run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(report(done.stdout)) == FIRST + REST
    assert report(done.stdout)["tools"] == "ok    tools: python (answers)"
    assert done.stdout.splitlines()[-1] == "all checks passed"
    assert not (tmp_path / "run").exists()
