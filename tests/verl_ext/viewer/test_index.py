"""The index says what the run folder says, whatever happens to the folder."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard
from viewer_runs import EQUAL, FAULTY, HOSTILE, MIXED, call, hostile, say, trajectory, write

from verl_ext.viewer import queries
from verl_ext.viewer.index import Index
from verl_ext.viewer.runs import Run

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).parents[3] / "docs" / "credit_group.jsonl"


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(write(tmp_path / "run", {1: MIXED, 2: [*FAULTY, *EQUAL]}), None, tmp_path / "cache")


def labels(run: Run, **question) -> list[str]:
    return [group["label"] for group in queries.groups(run, **question)["groups"]]


def test_groups_have_their_trajectories_in_the_order_of_the_record(run):
    assert run.update() == 9
    assert run.update() == 0
    apples, pears, plums = queries.groups(run)["groups"]
    assert (apples["label"], apples["step"], apples["size"], apples["solved"], apples["tokens"]) == (
        "apples",
        1,
        3,
        2,
        60,
    )
    assert apples["top"] == 1.4 and apples["spread"] == pytest.approx(2.3)
    assert pears["flags"] == ["no first call", "malformed", "timeout", "truncated", "dropped", "no answer"]
    assert plums["flags"] == ["no first call", "all equal"]
    rows = queries.group(run, apples["id"])["rows"]
    assert [[turn["advantage"] for turn in row["turns"]] for row in rows] == [[0.4, 0.9], [0.4, 0.9], [-1.2, -1.4]]
    assert [row["position"] for row in rows] == [0, 1, 2]


def test_a_line_is_read_once_its_end_is_there(run):
    run.update()
    path = run.path / "trajectories" / "2.jsonl"
    line = json.dumps(trajectory("late"))
    with path.open("a") as file:
        file.write(line[:50])
    assert run.update() == 0
    assert queries.overview([run])["runs"][0]["torn"] == ["trajectories/2.jsonl"]
    with path.open("a") as file:
        file.write(line[50:] + "\n")
    assert run.update() == 1
    assert labels(run, step=2) == ["pears", "plums", "late"]
    assert queries.overview([run])["runs"][0]["torn"] == []


def test_two_viewers_of_one_run_read_every_line_once(run, tmp_path):
    others = [Run(run.path, None, tmp_path / "cache") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda other: other.index.update(), others)) == 9
    assert queries.overview([run])["runs"][0]["trajectories"] == 9


def numbers(run: Run) -> dict[str, int]:
    return {group["label"]: group["id"] for group in queries.groups(run)["groups"]}


def test_a_link_shows_the_same_group_in_an_index_that_was_filled_in_another_order(run, tmp_path):
    run.update()
    first = (run.path / "trajectories" / "1.jsonl").rename(tmp_path / "1.jsonl")
    late = Run(run.path, None, tmp_path / "other cache")
    late.update()
    shutil.move(first, run.path / "trajectories")
    late.update()
    assert numbers(late) == numbers(run) and labels(late) == labels(run) == ["apples", "pears", "plums"]
    assert max(numbers(run).values()) < 2**53  # what a page's numbers hold


def test_a_group_of_a_step_that_was_done_again_keeps_its_number(run):
    run.update()
    before = numbers(run)
    write(run.path, {1: [EQUAL[0], *MIXED]})
    run.update()
    assert labels(run, step=1) == ["plums", "apples"] and numbers(run)["apples"] == before["apples"]


def test_a_sibling_that_comes_later_joins_its_group(run):
    run.update()
    with (run.path / "trajectories" / "1.jsonl").open("a") as file:
        file.write(json.dumps(MIXED[0]) + "\n")
    run.update()
    (apples,) = queries.groups(run, step=1)["groups"]
    assert (apples["size"], apples["solved"]) == (4, 3)
    assert len(queries.group(run, apples["id"])["rows"]) == 4


def test_a_line_that_is_no_record_is_counted_and_hides_no_other(run):
    path = run.path / "trajectories" / "1.jsonl"
    newer = json.dumps({"version": 10**6})
    path.write_text(f'{newer}\n{{"group": "torn\n{{"no": "record"}}\n[]\n{path.read_text()}')
    run.update()
    (said,) = queries.overview([run])["runs"]
    assert (said["skipped"], said["trajectories"]) == (4, 9)
    assert said["why"].startswith("trajectories/1.jsonl, line 1: a record of version 1000000")
    assert queries.groups(run, step=1)["groups"][0]["size"] == 3
    talk = queries.conversation(run, run.rows("train", 1)[0]["id"])
    assert talk["turns"][1]["text"] == r"It is \boxed{7}."


@pytest.mark.parametrize("same_length", [False, True])
def test_a_step_that_was_done_again_replaces_what_was_read(run, same_length):
    run.update()
    again = [row | {"group": "grapes" if same_length else "pineapples"} for row in MIXED]
    write(run.path, {1: again})  # "grapes" is as long as "apples"
    run.update()
    assert labels(run, step=1) == [again[0]["group"]]
    assert labels(run, text="sum of apples") == ["grapes" if same_length else "pineapples"]  # the prompt did not change
    assert queries.overview([run])["runs"][0]["trajectories"] == 9


def test_what_a_resumed_run_deletes_is_gone(run):
    run.update()
    (run.path / "trajectories" / "2.jsonl").unlink()
    run.update()
    assert labels(run) == ["apples"] and labels(run, text="seven") == []
    assert queries.overview([run])["runs"][0]["steps"] == {"train": [1]}


def test_validation_is_a_split_of_its_own(run):
    (run.path / "validation").mkdir()
    (run.path / "validation" / "1.jsonl").write_text(json.dumps(MIXED[0]) + "\n")
    run.update()
    assert queries.overview([run])["runs"][0]["steps"] == {"train": [1, 2], "validation": [1]}
    assert labels(run, split="validation") == ["apples"]


def test_a_compressed_file_is_read_like_a_plain_one(run):
    run.update()
    plain = [queries.conversation(run, row["id"]) for row in run.rows("train", 1)]
    path = run.path / "trajectories" / "1.jsonl"
    path.with_suffix(".jsonl.zst").write_bytes(zstandard.compress(path.read_bytes()))
    path.unlink()
    run.update()
    assert [queries.conversation(run, row["id"]) for row in run.rows("train", 1)] == plain
    assert queries.overview([run])["runs"][0]["trajectories"] == 9


def test_a_record_of_before_this_schema_is_shown(tmp_path):
    (tmp_path / "trajectories").mkdir()
    shutil.copy(EXAMPLE, tmp_path / "trajectories" / "3.jsonl")
    run = Run(tmp_path, None, tmp_path / "cache")
    run.update()
    recorded = [json.loads(line) for line in EXAMPLE.read_text().splitlines()]
    rows = run.rows("train", 3)
    for row, record in zip(rows, recorded, strict=True):
        assert [turn["advantage"] for turn in row["turns"]] == record["advantages"]
        assert [turn["reward"] for turn in row["turns"]] == record["turn_rewards"]


def test_whom_shaping_compared_with_is_named_by_the_place_in_the_step(tmp_path):
    rows = [
        trajectory("other", say("x"), session=0),
        trajectory("mine", call("1"), say("x"), session=1, acc=1.0),
        trajectory("mine", call("2"), say("x"), session=0, partners=[{"session": 1, "similarity": 0.25}]),
        trajectory(
            "mine", call("3"), say("x"), session=2, partners=[{"session": 7, "similarity": 0.5}]
        ),  # not recorded
    ]
    run = Run(write(tmp_path, {1: rows}), None, tmp_path / "cache")
    run.update()
    assert [row["similar"] for row in run.rows("train", 1)] == [None, None, {1: 0.25}, None]


def test_tokens_are_shown_with_their_gap_by_number_where_no_tokenizer_is_at_hand(tmp_path):
    turn = say("ab") | {"token_ids": [5, 7], "log_prob_gaps": [0.0, -0.25]}
    run = Run(write(tmp_path, {1: [trajectory("a", turn, say("c"))]}), None, tmp_path / "cache")
    run.update()
    first, second = queries.conversation(run, 1)["turns"]
    assert first["tokens"] == [("5 ", 0.0), ("7 ", -0.25)] and second["tokens"] is None


def test_a_folder_that_is_only_beginning_is_an_empty_run(tmp_path):
    run = Run(tmp_path, None, tmp_path / "cache")
    assert run.update() == 0
    assert queries.groups(run) == {"total": 0, "groups": []}
    write(tmp_path, {1: MIXED})
    assert run.update() == 3


def test_an_index_is_found_again_and_one_of_another_version_is_made_anew(run, tmp_path, monkeypatch):
    run.update()
    assert Run(run.path, None, tmp_path / "cache").update() == 0
    monkeypatch.setattr("verl_ext.viewer.index.VERSION", "other")
    assert Run(run.path, None, tmp_path / "cache").update() == 9
    run.index.path.write_bytes(b"no database")
    assert Index(run.path, tmp_path / "cache").update() == 9


def test_every_hostile_text_is_read_and_comes_back_as_it_was(tmp_path):
    run = Run(write(tmp_path, {1: hostile()}), None, tmp_path / "cache")
    assert run.update() == len(HOSTILE)
    rows = run.rows("train", 1)
    for row, text in zip(rows, HOSTILE, strict=True):
        assert queries.full_text(run, row["id"], "turns/0/calls/0/output") == text
    cut = queries.conversation(run, rows[-1]["id"])["turns"][0]["calls"][0]["output"]
    assert cut == {"text": "A" * queries.TEXT_LIMIT, "length": 10_000_000}


def test_where_the_gradient_goes_is_worked_out_anew_when_a_step_is_done_again_grows_or_goes(run):
    def of_step(step: int) -> float:
        run.update()
        return sum(one["weight"] for one in queries.gradient(run) if one["step"] == step)

    assert of_step(1) == pytest.approx(52.0)
    write(run.path, {1: MIXED[:1]})
    assert of_step(1) == pytest.approx(13.0)
    with (run.path / "trajectories" / "1.jsonl").open("a") as file:
        file.write(json.dumps(MIXED[2]) + "\n")
    assert of_step(1) == pytest.approx(39.0)
    (run.path / "trajectories" / "1.jsonl").unlink()
    assert of_step(1) == 0.0


def test_where_the_gradient_goes_is_advantage_times_tokens_of_the_update(run):
    cut = MIXED[0] | {
        "group": "masked",
        "turns": [MIXED[0]["turns"][0] | {"masked": 4}, MIXED[0]["turns"][1] | {"masked": 10}],
    }
    write(run.path, {3: [cut]})
    run.update()
    found = {(one["step"], one["turn"], one["kind"]): one["weight"] for one in queries.gradient(run)}
    assert found == pytest.approx(
        {
            (1, 0, "mixed"): 20.0,
            (1, 1, "mixed"): 32.0,
            (2, 0, "unsolved"): 12.5,
            (2, 1, "unsolved"): 5.0,
            (3, 0, "all solved"): 2.4,
        }
    )
