"""Protects what is done of an evaluation: a sample is there once, whenever a kill comes, and the viewer can read it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.gtpo.dataset import FILE_ROW
from recipe.gtpo.evaluate.samples import Samples
from recipe.gtpo.method.turns import Finish, ToolCall, ToolOutcome, Trajectory, Turn
from recipe.gtpo.run.record import RunRecord
from verl_ext.records import Reader
from verl_ext.viewer.index import Index

pytestmark = pytest.mark.unit

ROW = {
    "index": 1,
    "data_source": "gsm8k",
    "raw_prompt": [{"role": "user", "content": "What is 2+3?"}],
    "reward_model": {"ground_truth": "5"},
}
CALL = Turn(0, 2, "call", (ToolCall("python", {"code": "2+3"}),), (ToolOutcome("ok", "5", 0.1),))
RIGHT = Trajectory((CALL, Turn(3, 5, r"\boxed{5}")), Finish.ANSWER, 1.0, "5")
IDS = [7, 8, 9, 10, 11]


def fill(samples, *jobs, trajectory=RIGHT):
    for index, session in jobs:
        samples.add("gsm8k", ROW | {"index": index}, session, trajectory, IDS)


@pytest.fixture
def record(tmp_path):
    return RunRecord(tmp_path)


def opened(record, step=40):
    samples = Samples(record, step, seed=1)
    return samples, samples.load()


def test_a_second_start_goes_on_with_what_is_missing(record):
    first, _ = opened(record)
    assert first.missing("gsm8k", 2, 2) == [(0, 0), (1, 0), (0, 1), (1, 1)]  # all problems once before any twice
    fill(first, (0, 0), (1, 1))
    second, again = opened(record)
    assert again == 0 and second.missing("gsm8k", 2, 2) == [(1, 0), (0, 1)]
    assert second.missing("aime24", 1, 1) == [(0, 0)]
    assert second.of("gsm8k", 2) == first.of("gsm8k", 2)


def test_where_rows_are_left_out_a_second_start_goes_on_too(record):
    """Problems are numbered without them; a record has the row of the data files."""
    first, _ = opened(record)
    first.add("gsm8k", ROW | {"index": 1, FILE_ROW: 1400}, 0, RIGHT, IDS)
    second, _ = opened(record)
    assert second.missing("gsm8k", 2, 1) == first.missing("gsm8k", 2, 1) == [(0, 0)]
    (line,) = record.read_whole_lines(40, split="validation")
    assert (line["group"], line["index"]) == ("gsm8k-1", 1400)


def test_more_samples_are_more_and_fewer_are_the_first_ones(record):
    samples, _ = opened(record)
    fill(samples, (0, 0), (0, 1))
    assert samples.missing("gsm8k", 1, 3) == [(0, 2)]
    assert list(samples.of("gsm8k", 1)[0]) == [0]


@given(cut=st.integers(1, 400))
def test_a_kill_in_the_middle_of_a_line_costs_that_sample_only(tmp_path_factory, cut):
    record = RunRecord(tmp_path_factory.mktemp("killed"))
    samples, _ = opened(record)
    fill(samples, (0, 0), (1, 0))
    path = record.dir / "validation/40.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    second, _ = opened(record)
    assert second.missing("gsm8k", 2, 1) == ([(1, 0)] if cut > 1 else [])
    fill(second, *second.missing("gsm8k", 2, 1))
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize("finish", [Finish.INFRA, Finish.FAULT])
def test_what_failed_on_our_side_is_done_again(record, finish):
    samples, _ = opened(record)
    fill(samples, (0, 0))
    fill(samples, (1, 0), trajectory=replace(RIGHT, finish=finish, acc=0.0))
    assert not samples.of("gsm8k", 1)[1][0].scored and samples.missing("gsm8k", 2, 1) == []
    second, again = opened(record)
    assert again == 1 and second.missing("gsm8k", 2, 1) == [(1, 0)]
    fill(second, (1, 0))
    assert [line["finish"] for line in record.read_whole_lines(40, split="validation")] == ["answer", "answer"]


def test_the_steps_of_two_models_are_apart(record):
    for step in (0, 40):
        fill(opened(record, step)[0], (0, 0))
    assert record.trajectory_steps(split="validation") == [0, 40]
    assert opened(record, 0)[0].missing("gsm8k", 1, 1) == []


def test_other_programs_read_the_records(record):
    samples, _ = opened(record)
    fill(samples, (0, 0), (0, 1), (1, 0))
    reader = Reader(record.dir)
    found = list(reader.read(40, "validation"))
    assert reader.skipped == 0 and [(r.group, r.session, r.index) for r in found] == [
        ("gsm8k-0", 0, 0),
        ("gsm8k-0", 1, 0),
        ("gsm8k-1", 0, 1),
    ]
    one = found[0]
    assert (one.split, one.step, one.seed, one.weights, one.gold, one.acc) == ("validation", 40, 1, [40, 40], "5", 1.0)
    assert [turn.token_ids for turn in one.turns] == [[7, 8], [10, 11]]
    assert one.prompt[0].content == "What is 2+3?" and one.turns[0].reward is None


def test_the_viewer_follows_a_file_that_grows(record, tmp_path):
    samples, _ = opened(record)
    index = Index(record.dir, tmp_path / "index")
    fill(samples, (0, 0))
    index.update()
    fill(samples, (0, 1), (1, 0))
    index.update()
    with index.connect() as db:
        groups = [tuple(row) for row in db.execute("SELECT label, size, solved FROM groups ORDER BY label")]
    assert groups == [("gsm8k-0", 2, 2), ("gsm8k-1", 1, 1)]


def test_the_tokens_and_turns_of_a_sample(record):
    samples, _ = opened(record)
    fill(samples, (0, 0))
    sample = samples.of("gsm8k", 1)[0][0]
    assert (sample.tokens, sample.info["turns"], sample.info["first_turn_call"]) == (4, 2.0, 1.0)
    assert json.loads((record.dir / "validation/40.jsonl").read_text())["group"] == "gsm8k-0"
