"""How an evaluation ends: its last line, and what stands in its folder then.

Real: the command from its arguments to its last line, with all that it looks at and writes. Fake: the rollouts.
"""

from __future__ import annotations

import json
import signal
import time

import pytest

from recipe.gtpo.evaluate import command
from recipe.gtpo.evaluate.evaluation import TooManyLost
from recipe.gtpo.run.errors import ConfigError
from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.status import describe
from verl_ext.tool_server.launch import ServerStartError

pytestmark = pytest.mark.unit

ROW = {
    "data_source": "sums",
    "prompt": [{"role": "user", "content": "What is 2+3?"}],
    "reward_model": {"ground_truth": "5"},
}
GOES_ON = "; what is done is kept, and the same command goes on"


@pytest.fixture
def evaluated(toy_policy, tmp_path, monkeypatch, capsys):
    """A start of the command, whose rollouts end by an error: (exit status, last line)."""
    file = tmp_path / "sums.jsonl"
    file.write_text(json.dumps(ROW) + "\n")
    given = [f"model={toy_policy}", f"benchmarks={file}", f"run_dir={tmp_path}/out", "task=arithmetic"]
    given += [f"task.cache={tmp_path}/cache", "task.train_problems=1", "task.validation_problems=1"]
    handler = signal.getsignal(signal.SIGTERM)

    def start(error, *arguments):
        def rollouts(*_):
            raise error

        monkeypatch.setattr(command, "run", rollouts)
        status = command.evaluate([*given, *arguments])
        return status, capsys.readouterr().err.strip().splitlines()[-1]

    yield start
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def record(tmp_path):
    return RunRecord(tmp_path / "out")


def test_whatever_ends_a_start_stands_in_its_folder(evaluated, record):
    for error, status, cause, then in (
        (ConfigError("the endpoint serves another model"), 1, "the endpoint serves another model", ""),
        (ServerStartError("the tool server did not start\nno room"), 1, "the tool server did not start no room", ""),
        (KeyboardInterrupt(), 130, "interrupted", GOES_ON),
        (TooManyLost("5 of 8 samples were lost"), 1, "5 of 8 samples were lost", GOES_ON),
        (RuntimeError("boom"), 1, "RuntimeError: boom", f" (whole report: {record.dir}/logs/4){GOES_ON}"),
    ):
        assert evaluated(error) == (status, f"evaluate: error: {cause}{then}")
        screen, ended = describe(record, time.time())
        assert ended and screen[1].endswith(f"ended early: {cause}")  # and a watch ends


def test_a_command_that_is_refused_changes_nothing_of_the_evaluation_that_is_there(evaluated, record):
    evaluated(RuntimeError("boom"))
    assert record.read_cause() == "RuntimeError: boom"
    before = {path: path.read_bytes() for path in record.dir.rglob("*") if path.is_file()}
    for argument, said in (
        ("temperature=0.5", "belongs to a run with another config"),
        ("task.no_such_key=1", "no_such_key"),
        ("trajectory_keep=0", "at least 1"),
    ):
        status, line = evaluated(AssertionError("it started"), argument)
        assert status == 1 and said in line
        assert {path: path.read_bytes() for path in record.dir.rglob("*") if path.is_file()} == before


def test_a_run_on_gpus_is_refused_before_its_shards_are_merged(tmp_path, capsys):
    actor = tmp_path / "run/checkpoints/global_step_3/actor"
    actor.mkdir(parents=True)
    (actor / "fsdp_config.json").write_text("{}")
    (tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").write_text("3")
    RunRecord(tmp_path / "run").write_config({"trainer.device": "cuda"})
    handler = signal.getsignal(signal.SIGTERM)
    assert command.evaluate([f"model={tmp_path}/run", "benchmarks=gsm8k", f"run_dir={tmp_path}/out"]) == 1
    signal.signal(signal.SIGTERM, handler)
    assert "trainer.device=cuda" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (actor.parent / "merged").exists()
