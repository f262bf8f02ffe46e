"""A record says all of a trajectory, in any version; readers pass over what is torn, and say so."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from verl_ext.records import VERSION, Reader, Record, json_schema, read_run, to_dataframe, write_parquet
from verl_ext.records import schema as module
from verl_ext.records.__main__ import main
from verl_ext.records.export import COLUMNS
from verl_ext.records.files import open_lines, write_lines
from verl_ext.records.schema import NewerRecordError, Turn, upgrade

pytestmark = pytest.mark.unit

CALL = {"name": "python", "arguments": {"code": "print(1)"}, "error": None, "detail": ""}
RAN = {"outcome": "ok", "output": "1\n", "seconds": 0.1}
OLD = {
    "group": "p",
    "dropped": False,
    "turn_rewards": [0.0, 1.0],
    "advantages": [-0.5, 0.5],
    "turns": [
        {"start": 0, "end": 4, "text": "call", "calls": [CALL], "outcomes": [RAN], "broken": None},
        {"start": 6, "end": 9, "text": "answer", "calls": [], "outcomes": [], "broken": "no_answer"},
    ],
    "finish": "answer",
    "acc": 1.0,
    "pred": "1",
}
NEW = {
    "version": 1,
    "step": 3,
    "split": "train",
    "group": "p",
    "session": 0,
    "index": 7,
    "data_source": "sums",
    "prompt": [{"role": "user", "content": "What is 1?"}],
    "gold": "1",
    "seed": 1,
    "weights": [2, 2],
    "turns": [
        {
            **OLD["turns"][0],
            "ended_by": "<|im_end|>",
            "overrun": 0,
            "weights": [1, 2],
            "token_ids": [5, 6, 7, 2],
            "rewards": {"outcome": 0.0, "shaping": 0.25, "format": -0.1},
            "reward": 0.15,
            "return": 0.9,
            "pool_mean": 0.5,
            "pool_std": 0.4,
            "divisor": 0.400001,
            "advantage": 1.0,
            "masked": 1,
            "log_prob": -0.5,
            "log_prob_gap": 1e-7,
            "log_prob_gaps": [0.0, 1e-7, -1e-7, 0.0],
        }
    ],
    "finish": "answer",
    "acc": 0.0,
    "pred": "1",
    "outcome": 0.0,
    "shaped": 0.25,
    "partners": [{"session": 1, "similarity": 0.5}],
    "fault": "",
    "dropped": False,
    "update": 1,
}


def run_of(folder: Path, lines: dict[int, list[dict]], name="trajectories", suffix=".jsonl") -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    for step, some in lines.items():
        write_lines(folder / name / f"{step}{suffix}", map(json.dumps, some))
    return folder


def test_a_record_read_and_written_is_the_same():
    record = Record.model_validate(NEW)
    assert record.model_dump(by_alias=True) == NEW
    assert record.turns[0].return_ == 0.9 and VERSION == 1


def test_a_record_of_the_first_version_has_its_numbers_in_its_turns(tmp_path):
    (record,) = Reader(run_of(tmp_path, {5: [OLD]})).read(5)
    assert (record.version, record.step, record.split) == (0, 5, "train")
    assert [(turn.reward, turn.advantage) for turn in record.turns] == [(0.0, -0.5), (1.0, 0.5)]
    assert record.prompt is None and record.turns[0].return_ is None and record.turns[0].rewards is None


def test_a_group_that_an_older_release_recorded_is_read(tmp_path):
    old = Path(__file__).parents[3] / "docs" / "credit_group.jsonl"
    lines = [json.loads(text) for text in old.read_text().splitlines()]
    assert len(lines) == 8 and not any("version" in line for line in lines)
    records = list(Reader(run_of(tmp_path, {9: lines})).read(9))
    for record, line in zip(records, lines, strict=True):
        assert [turn.advantage for turn in record.turns] == line["advantages"]
        assert [turn.reward for turn in record.turns] == line["turn_rewards"]
        assert (record.step, record.group, record.acc) == (9, line["group"], line["acc"])


def test_a_dropped_trajectory_has_no_numbers_which_is_not_zero(tmp_path):
    (record,) = Reader(run_of(tmp_path, {5: [OLD | {"dropped": True, "turn_rewards": [], "advantages": []}]})).read(5)
    assert record.dropped and {turn.advantage for turn in record.turns} == {None}


def test_keys_that_a_later_writer_adds_are_passed_over_and_a_later_version_is_refused():
    assert Record.model_validate(upgrade(NEW | {"mood": "good"})) == Record.model_validate(NEW)
    with pytest.raises(ValueError, match="a record of version 2, and this reader knows 1: install a newer one"):
        upgrade(NEW | {"version": 2})


def test_a_run_of_a_newer_release_is_refused_which_is_no_torn_line(tmp_path, capsys):
    reader = Reader(run_of(tmp_path, {1: [NEW, NEW | {"version": 2}]}))
    with pytest.raises(NewerRecordError, match=r"1\.jsonl, line 2: a record of version 2"):
        list(reader.read(1))
    assert reader.skipped == 0
    assert main([str(tmp_path), str(tmp_path / "t.parquet")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("this reader knows 1: install a newer one")
    assert not (tmp_path / "t.parquet").exists()


def test_what_every_version_needs_is_asked_for():
    with pytest.raises(ValidationError, match="turns"):
        Record.model_validate({key: value for key, value in NEW.items() if key != "turns"})


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_writer_killed_at_any_byte_of_its_last_line_costs_that_line_alone(tmp_path, cut, caplog):
    file = run_of(tmp_path, {1: [NEW, NEW, NEW]}) / "trajectories" / "1.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    reader = Reader(tmp_path)
    whole = cut == 1  # only the end of the line is missing
    assert len(list(reader.read(1))) == 2 + whole and reader.skipped == 1 - whole
    assert ("1.jsonl, line 3 is no record" in caplog.text) != whole


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst"])
def test_files_are_read_compressed_or_not(tmp_path, suffix):
    text = "a line\u2028that is one, with \u00e9 and \U0001f600"
    record = NEW | {"pred": text}
    run_of(tmp_path, {10: [record], 2: [NEW, NEW]}, suffix=suffix)
    reader = Reader(tmp_path)
    assert reader.steps() == [2, 10] and len(list(read_run(tmp_path))) == 3
    assert [one.pred for one in reader.read(10)] == [text]
    (tmp_path / "trajectories" / f"11{suffix}.tmp").write_bytes(b"half")  # of a writer at work
    assert reader.steps() == [2, 10]


def test_a_compressed_file_that_was_cut_off_gives_what_is_there(tmp_path):
    rows = [NEW | {"pred": str(i * 7919)} for i in range(5000)]
    file = run_of(tmp_path, {1: rows}, suffix=".jsonl.zst") / "trajectories" / "1.jsonl.zst"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 3 // 4])
    found = list(Reader(tmp_path).read(1))
    assert 0 < len(found) < 5000 and [one.pred for one in found] == [str(i * 7919) for i in range(len(found))]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    def fails():
        yield "{}"
        raise RuntimeError("disk full")

    write_lines(tmp_path / "1.jsonl", ["[]"])
    with pytest.raises(RuntimeError):
        write_lines(tmp_path / "1.jsonl", fails())
    assert list(open_lines(tmp_path / "1.jsonl")) == ["[]"]


def test_validation_is_apart_and_a_step_that_is_not_there_is_named(tmp_path):
    run_of(tmp_path, {0: [NEW | {"split": "validation"}]}, name="validation")
    reader = Reader(tmp_path)
    assert reader.steps() == [] and reader.steps("validation") == [0]
    assert next(reader.read(0, "validation")).split == "validation"
    with pytest.raises(ValueError, match="no step 0 of train; recorded: none"):
        next(reader.read(0))


def test_a_table_has_a_row_a_turn(tmp_path):
    records = [Record.model_validate(upgrade(OLD)), Record.model_validate(NEW | {"pred": "half \ufffd"})]
    table = to_dataframe(records)
    assert table["text"].tolist() == ["call", "answer", "call"] and table["turn"].tolist() == [0, 1, 0]
    assert table["code"].tolist() == ["print(1)", "", "print(1)"] and table["tokens"].tolist() == [4, 3, 4]
    assert table["advantage"].tolist() == [-0.5, 0.5, 1.0]
    assert pandas.isna(table["return"][0]) and table["return"][2] == 0.9
    assert table["outputs"].map(list).tolist() == [["1\n"], [], ["1\n"]] and table["seconds"][0].tolist() == [0.1]
    parts = [f"reward_{part}" for part in NEW["turns"][0]["rewards"]]
    assert pandas.isna(table["reward_outcome"][0]) and table[parts].sum(axis=1)[2] == pytest.approx(table["reward"][2])
    assert (table["divisor"][2], table["masked"][2], table["seed"][2]) == (0.400001, 1, 1)
    assert write_parquet(records * 3000, tmp_path / "t.parquet") == 9000
    assert pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pandas()[:3].equals(table)


def test_a_table_has_every_number_of_a_record_but_those_by_token():
    of_turn = set(Turn.model_fields) - {"calls", "rewards", "overrun", "start", "end", "token_ids", "log_prob_gaps"}
    of_record = set(Record.model_fields) - {"version", "turns", "partners", "fault", "weights"}
    of_turn = {field.removesuffix("_") for field in of_turn}
    assert (of_turn | of_record) <= set(COLUMNS), "a new field of the record has no column"


def test_a_gold_answer_that_is_no_text_is_json():
    table = to_dataframe([Record.model_validate(NEW | {"gold": gold}) for gold in ("1", ["a", "b"], 2)])
    assert table["gold"].tolist() == ["1", '["a", "b"]', "2"]


def test_the_command_exports_a_run_or_says_that_there_is_nothing(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "t.parquet")]) == 1
    assert "trajectories: no recorded step" in capsys.readouterr().err
    run_of(tmp_path, {3: [NEW], 4: [NEW | {"step": 4}, OLD]})
    assert main([str(tmp_path), str(tmp_path / "t.parquet")]) == 0
    assert "4 turns of 2 steps, 0 lines skipped" in capsys.readouterr().out
    assert pyarrow.parquet.read_table(tmp_path / "t.parquet")["step"].to_pylist() == [3, 4, 4, 4]


def test_every_field_says_what_it_is():
    schema = json_schema()
    parts = {"Record": schema, **schema["$defs"]}
    said = {
        f"{part}.{name}"
        for part, of in parts.items()
        for name, field in of["properties"].items()
        if "description" in field
    }
    assert {f"{part}.{name}" for part, of in parts.items() for name in of["properties"]} - said == set()


def test_the_schema_that_is_shipped_is_the_codes():
    shipped = json.loads(Path(module.__file__).with_name("schema.json").read_text())
    assert shipped == json_schema(), "python -m verl_ext.records --schema > verl_ext/records/schema.json"
