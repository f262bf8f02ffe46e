"""The command that evaluates, at toy size: a checkpoint and its base model by real servers, a kill in the middle, and
an endpoint. What it must be: what a run's own validation is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import threading
import time

import pytest
import torch
from endpoint import FakeEndpoint
from runs import launch, start
from safetensors.torch import load_file
from scripted import CALL, RIGHT
from transformers import AutoTokenizer

from recipe.gtpo.run.record import RunRecord
from verl_ext.records import Reader

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder after two steps."""
    folder = tmp_path_factory.mktemp("evaluate")
    with start(folder, "trainer.total_training_steps=2") as training:
        assert training.wait(400) == 0, training.text()[-3000:]
    return folder / "run"


@contextlib.contextmanager
def evaluating(folder, *arguments):
    command = [sys.executable, "-m", "recipe.gtpo.evaluate", f"run_dir={folder}", *arguments]
    folder.parent.mkdir(exist_ok=True)
    with launch(command, folder, folder.parent / f"{time.monotonic_ns()}.log") as process:
        yield process


def evaluated(folder, *arguments, status=0):
    """The output of the whole command."""
    with evaluating(folder, *arguments) as process:
        assert process.wait(300) == status, process.text()[-3000:]
        assert process.left_behind() == []
        return process.text()


def tokens(folder, step):
    """Problem -> what the policy wrote, of the first sample of each."""
    found = Reader(folder).read(step, "validation")
    return {one.index: [turn.token_ids for turn in one.turns] for one in found if one.session == 0}


@pytest.fixture(scope="module")
def before_and_after(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs") / "evaluation"
    said = evaluated(folder, f"model={run}", "benchmarks=arithmetic", "samples=2", "compare=base")
    return folder, said


def test_what_is_evaluated_is_what_was_trained_as_the_run_validated_it(run, before_and_after):
    """Token for token: the same weights, prompts, limits, tools and seeds, and the same way through them."""
    folder, _ = before_and_after
    for step in (0, 2):
        own = tokens(run, step)
        assert len(own) == 4 and tokens(folder, step) == own
    checkpoint = run / "checkpoints/global_step_2"
    shards = torch.load(checkpoint / "actor/model_world_size_1_rank_0.pt", weights_only=False)
    merged = load_file(checkpoint / "merged/model.safetensors")
    assert merged.keys() == shards.keys() - {"lm_head.weight"}
    assert all(torch.equal(merged[name], shards[name].to_local()) for name in merged)


def test_the_output_says_what_was_done(run, before_and_after):
    folder, said = before_and_after
    report = json.loads((folder / "evaluation.json").read_text())
    assert [(one["model"], one["step"]) for one in report["models"]] == [
        (f"{run} before training", 0),
        (f"{run}, checkpoint of step 2", 2),
    ]
    assert (report["rollout"], report["seed"]) == ({"engine": "transformers", "dtype": "float32"}, 1)
    assert report["versions"]["packages"]["verl"] and "benchmarks=arithmetic" in report["command"]
    about = report["benchmarks"]["arithmetic"]
    assert (about["temperature"], about["top_p"], about["samples"], about["response_tokens"]) == (1.0, 1.0, 2, 32)
    assert about["turns"] and about["first_prompt"][-1]["role"] == "user"
    for result in about["results"]:
        assert result["counts"]["scored"] == result["counts"]["samples"] == 8
        assert result["measures"].keys() == {"mean@2", "pass@1", "pass@2", "maj@1", "maj@2"}
    assert about["difference"]["mean@2"]["problems"] == 4
    assert "difference, paired by problem" in said and said.strip().splitlines()[-1] == f"outputs: {folder}"
    curve = [line["step"] for line in RunRecord(folder).read_metrics()]
    assert curve == [0, 2]


def test_the_same_command_again_has_nothing_to_do(run, before_and_after):
    folder, said = before_and_after
    again = evaluated(folder, f"model={run}", "benchmarks=arithmetic", "samples=2", "compare=base")
    assert "starting" not in again
    assert [line for line in again.splitlines() if line.startswith("arithmetic  ")] == [
        line for line in said.splitlines() if line.startswith("arithmetic  ")
    ]


def test_another_config_is_refused_in_a_line(run, before_and_after):
    folder, _ = before_and_after
    said = evaluated(
        folder, f"model={run}", "benchmarks=arithmetic", "compare=base", "samples=2", "temperature=0.5", status=1
    )
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"evaluate: error: {folder} belongs to a run with another config: ")
    assert "temperature=1.0 there, 0.5 here" in last


def test_an_end_in_the_middle_costs_what_was_not_done(run, tmp_path):
    folder, arguments = tmp_path / "killed", (f"model={run}", "benchmarks=arithmetic", "samples=40", "concurrency=2")
    file = folder / "validation/2.jsonl"

    def done():
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    with evaluating(folder, *arguments) as process:
        process.wait_until(lambda: len(done()) >= 5, 200)
        process.process.send_signal(signal.SIGTERM)  # of a batch system
        assert process.wait(60) == 143
        said = "evaluate: error: terminated (SIGTERM); what is done is kept, and the same command goes on"
        assert process.last_line() == said, process.text()[-2000:]
        assert process.left_behind() == []
    assert RunRecord(folder).read_cause() == "terminated (SIGTERM)"
    before = len(done())
    with evaluating(folder, *arguments) as process:
        process.wait_until(lambda: len(done()) > before, 200)
        process.process.kill()
        process.process.wait(20)
    kept = done()
    assert 5 <= before < len(kept) < 160
    said = evaluated(folder, *arguments)
    lines = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert lines[: len(kept)] == kept
    assert sorted((line["index"], line["session"]) for line in lines) == [(i, k) for i in range(4) for k in range(40)]
    assert tokens(folder, 2) == tokens(run, 2)
    assert f"{len(kept)}/160" in said  # the bar begins there


def test_an_endpoint_in_the_place_of_servers(toy_model, tmp_path):
    """Two problems, one right and one wrong, by a model that says what is written down."""
    rows = [
        {
            "data_source": "arithmetic",
            "prompt": [{"role": "user", "content": "What is 2+3?"}],
            "reward_model": {"ground_truth": gold},
        }
        for gold in ("5", "6")
    ]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fake = FakeEndpoint(AutoTokenizer.from_pretrained(toy_model), lambda turn: (CALL, RIGHT)[turn % 2])
    with served(fake) as url:
        said = evaluated(
            tmp_path / "evaluation",
            *(f"model={toy_model}", f"benchmarks={file}", "samples=2", f"endpoint={url}", "concurrency=1"),
            *("task=arithmetic", f"task.cache={tmp_path}", "task.train_problems=1", "task.validation_problems=1"),
        )
    report = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    assert report["rollout"]["endpoint"] == {"url": url, "model": "toy", "lost": []}
    measures = report["benchmarks"]["sums"]["results"][0]["measures"]
    assert (measures["mean@2"]["value"], measures["pass@2"]["value"], measures["maj@2"]["value"]) == (0.5, 0.5, 0.5)
    records = list(Reader(tmp_path / "evaluation").read(0, "validation"))
    assert len(records) == 4 and {one.turns[0].outcomes[0].output.strip() for one in records} == {"5"}
    assert "starting the rollout servers" not in said and len(fake.requests) == 8


@pytest.fixture(scope="module")
def toy_model(run):
    return RunRecord(run).read_config()["actor_rollout_ref.model.path"]


@contextlib.contextmanager
def served(fake):
    """The endpoint in a thread of its own; its address."""
    loop, up, ended = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def serve():
        async with fake.running():
            up.set()
            await ended.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert up.wait(20)
        yield fake.url
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(20)
        loop.close()
