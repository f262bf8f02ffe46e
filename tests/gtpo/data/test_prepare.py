"""Data are written whole or not at all, and everything that is left out is counted, with its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow.parquet
import pytest
from composition import compose
from omegaconf import OmegaConf
from published import gsm8k, write_jsonl
from verl.utils.dataset.rl_dataset import RLHFDataset

from recipe.gtpo.data import prepare as module
from recipe.gtpo.data import sources
from recipe.gtpo.data.__main__ import make_task, run
from recipe.gtpo.data.prepare import prepare
from recipe.gtpo.data.sources import SourceError, local_file, read_file
from recipe.gtpo.run.environment import CONFIG_DIR

pytestmark = pytest.mark.unit

SHARED = Path(__file__).parents[4] / "shared" / "data"
LONG = "A farmer has seven cows and sells three of them at the market for forty dollars each on a Monday morning."


@pytest.fixture
def local(tmp_path):
    """Copies of two sets, with everything that a row can be left out for."""
    write_jsonl(tmp_path / "local/gsm8k/test.jsonl", [gsm8k("What is 1+1?", 2), gsm8k(LONG, 120)])
    training = [
        gsm8k("What is 2+3?", 5),
        gsm8k("What is  2 + 3?", 5),
        gsm8k("What is 2+3?", 6),
        gsm8k("What is 1+1?", 2),
        gsm8k(f"{LONG} How much is that?", 120),
        {"question": "No answer", "answer": "none"},
        {"question": "No column"},
        {"question": ["No text"], "answer": "#### 1"},
        {"question": "No text", "answer": 7},
        gsm8k("What is 2+4?", 6),
    ]
    write_jsonl(tmp_path / "local/gsm8k/train.jsonl", training)
    return tmp_path / "local"


def rows_of(file: Path) -> list[dict]:
    return pyarrow.parquet.read_table(file).to_pylist()


def test_every_row_is_kept_or_left_out_with_its_line_and_reason(local, tmp_path):
    said: list[str] = []
    out = tmp_path / "out"
    prepare(make_task("gsm8k"), out, local=local, say=said.append)
    assert [row["prompt"][-1]["content"] for row in rows_of(out / "train.parquet")] == ["What is 2+3?", "What is 2+4?"]
    assert [row["extra_info"]["index"] for row in rows_of(out / "train.parquet")] == [0, 1]
    assert [(row["line"], row["reason"]) for row in rows_of(out / "dropped.parquet")] == [
        (2, "the same problem as an earlier line"),
        (3, "the same problem as an earlier line, with another answer"),
        (4, "a problem of gsm8k"),
        (5, "half of the text of a problem of gsm8k"),
        (6, "no answer after ####"),
        (7, "no column 'answer'"),
        (8, "a list where a text or a number should be"),
        (9, "no answer after ####"),
    ]
    assert said[0] == f"gsm8k: 2 rows of {local}/gsm8k/test.jsonl, 2 kept"
    assert said[1].startswith("  note: not a number of rows that is known of it (7473: the training problems; 1319")
    assert "  1 left out, a problem of gsm8k: line 4" in said and said[-1] == f"written: {out}"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["evaluation"] == {"gsm8k": {"rows": 2, "samples": 4}} and manifest["train"] == {"rows": 2}


def test_verl_reads_what_is_written_and_a_run_finds_it(local, tmp_path):
    task = make_task("gsm8k", [f"task.folder={tmp_path / 'out'}"])
    prepare(task, tmp_path / "out", local=local)
    files = task.prepare()
    assert files["data.val_files"] == [str(tmp_path / "out/gsm8k.parquet")]
    options = OmegaConf.merge(compose("task=gsm8k").data, {"filter_overlong_prompts": False})
    dataset = RLHFDataset(data_files=files["data.train_files"], tokenizer=None, config=options)
    system, user = dataset[0]["raw_prompt"]
    assert (system["role"], user["content"]) == ("system", "What is 2+3?")
    assert dataset[0]["reward_model"]["ground_truth"] == "5"


def test_a_failure_leaves_nothing_and_what_was_there_before(local, tmp_path, monkeypatch):
    out = tmp_path / "new" / "out"
    prepare(make_task("gsm8k"), out, local=local)
    before = sorted((path.name, path.read_bytes()) for path in out.iterdir())

    def broken(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(module._Table, "_flush", broken)
    with pytest.raises(OSError, match="no space left"):
        prepare(make_task("gsm8k"), out, local=local)
    assert sorted((path.name, path.read_bytes()) for path in out.iterdir()) == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_second_time_replaces_the_first(local, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        prepare(make_task("gsm8k"), out, local=local)
    assert len(rows_of(out / "train.parquet")) == 2


def test_a_task_of_ones_own_is_prepared_out_of_the_folder_that_a_run_is_given(local, tmp_path, capsys):
    (tmp_path / "mine/task").mkdir(parents=True)
    text = (CONFIG_DIR / "task/gsm8k.yaml").read_text().replace("name: gsm8k", "name: sums")
    (tmp_path / "mine/task/sums.yaml").write_text(text)
    given = ["prepare", "task=sums", f"out={tmp_path / 'out'}", f"local={local}"]
    with pytest.raises(ValueError, match=r"unknown task=sums; .*one of yours: config_dir=FOLDER, with"):
        run(given)
    run([*given, f"config_dir={tmp_path / 'mine'}"])
    assert len(rows_of(tmp_path / "out/train.parquet")) == 2
    (tmp_path / "mine/task/gsm8k.yaml").write_text(text)
    assert make_task("gsm8k", config_dir=str(tmp_path / "mine")).name == "gsm8k"  # ours first, as in a run


def test_a_batch_is_no_border(local, tmp_path, monkeypatch):
    """Duplicates are found, and lines counted, across batches."""
    monkeypatch.setattr(module, "_AT_ONCE", 3)
    prepare(make_task("gsm8k"), tmp_path / "out", local=local)
    assert [row["line"] for row in rows_of(tmp_path / "out" / "dropped.parquet")] == [2, 3, 4, 5, 6, 7, 8, 9]
    assert len(rows_of(tmp_path / "out/train.parquet")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command: the command is prepare, with task=NAME"),
        (["prepare"], "task= is missing"),
        (["prepare", "task=maths"], "unknown task=maths; tasks: arithmetic, code, commonsense, gsm8k, math"),
        (["prepare", "task=gsm8k", "split=train"], "split=train: no KEY=VALUE of this command; keys: task, config_dir"),
        (["prepare", "task=arithmetic"], "task=arithmetic needs"),
        (["prepare", "task=gsm8k", "evaluation=aime24"], "evaluation=aime24: task=gsm8k has gsm8k"),
        (["prepare", "task=gsm8k", "task.colour=red"], "task=gsm8k: "),
        (["prepare", "task=gsm8k", "source=nothing.jsonl"], "source=nothing.jsonl is no file"),
        (["prepare", "task=gsm8k", "local=nowhere"], "local=nowhere has no gsm8k/train.jsonl to train on"),
    ],
)
def test_what_cannot_be_prepared_is_refused_in_a_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    if arguments and "task=gsm8k" in arguments and "source" in arguments[-1]:
        arguments = [*arguments, "local=nowhere"]
    with pytest.raises(ValueError) as refused:
        run(arguments)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)
    assert not (tmp_path / "outputs/data/gsm8k").exists()


def test_a_folder_of_somebody_elses_is_not_replaced(local, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="was not made by this command"):
        prepare(make_task("gsm8k"), tmp_path / "mine", local=local)


def test_a_set_that_is_nowhere_local_is_left_out_and_said(local, tmp_path):
    said: list[str] = []
    source = str(local / "gsm8k/train.jsonl")
    write_jsonl(local / "aime24/test.jsonl", [{"problem": "What is 3+3?", "answer": "6"}])
    prepare(
        make_task("math"), tmp_path / "out", local=local, source=source, evaluation=["aime24", "svamp"], say=said.append
    )
    assert f"svamp: not in {local}, left out" in said and "aime24: 1 rows" in said[0]


def test_the_hub_is_asked_for_what_the_task_names_and_its_failure_is_one_line(monkeypatch):
    import datasets

    asked = []

    def load(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(SourceError) as failed:
        list(sources.read_hub("openai/gsm8k", "test", "main"))
    assert asked == [("openai/gsm8k", "main", "test", True)]
    assert str(failed.value).startswith(
        "the data set openai/gsm8k, main, test cannot be read from the hub (ConnectionError: no route to host): give"
    )


def test_a_row_that_is_not_as_its_form_is_costs_that_row_only(tmp_path):
    rows = [
        {"prompt": "a text", "reward_model": {"ground_truth": "1"}},
        {"prompt": [], "reward_model": {"ground_truth": "1"}},
        {"prompt": [{"role": "user"}], "reward_model": {"ground_truth": "1"}},
        {"prompt": [{"role": "user", "content": "What is 2+3?"}], "reward_model": {"ground_truth": 5}},
    ]
    source = write_jsonl(tmp_path / "odd.jsonl", rows)
    prepare(make_task("math"), tmp_path / "out", local=tmp_path, source=str(source))
    assert [row["reason"] for row in rows_of(tmp_path / "out/dropped.parquet")] == [
        "not as the columns of its form are (TypeError)",
        "not as the columns of its form are (IndexError)",
        "no column 'content'",
    ]
    assert [row["reward_model"]["ground_truth"] for row in rows_of(tmp_path / "out/train.parquet")] == ["5"]


def test_training_problems_that_are_not_there_are_said_before_anything_is_read(local, tmp_path):
    said: list[str] = []
    write_jsonl(local / "aime24/test.jsonl", [{"problem": "What is 3+3?", "answer": "6"}])
    with pytest.raises(SourceError, match="to train on"):
        prepare(make_task("math"), tmp_path / "out", local=local, say=said.append)
    assert said == []


def test_a_set_of_the_hub_may_have_a_config_and_a_known_number_of_rows(tmp_path, monkeypatch):
    asked, said = [], []
    write_jsonl(tmp_path / "local/gsm8k/test.jsonl", [gsm8k("What is 1+1?", 2)])

    def load(name, config, split, streaming):
        asked.append((name, config, split))
        return [gsm8k(f"What is {i}+1?", i + 1) for i in range(100, 7573)]

    monkeypatch.setattr("datasets.load_dataset", load)
    prepare(
        make_task("gsm8k"), tmp_path / "out", local=tmp_path / "local", source="openai/gsm8k:socratic", say=said.append
    )
    assert asked == [("openai/gsm8k", "socratic", "train")]
    assert "training problems: 7473 rows of openai/gsm8k:socratic (the training problems), 7473 kept" in said


def test_local_copies_are_found_by_set_and_split(tmp_path):
    aime = make_task("math").evaluation[0]
    (train,) = make_task("gsm8k").training
    assert local_file(tmp_path, aime, training=False) is None
    for name in ("aime24/test.parquet", "aime24/train.jsonl", "gsm8k/test.jsonl"):
        write_jsonl(tmp_path / name, [])
    assert local_file(tmp_path, aime, training=False) == tmp_path / "aime24/test.parquet"
    assert local_file(tmp_path, train, training=True) is None  # never the test problems


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}\n\n{"a": 2}\n',
        '[{"a": 1}, {"a": 2}]',
        ' \n[{"a": 1},\n{"a": 2}]\n',
        '\ufeff{"a": 1}\r\n{"a": 2}',
        '\ufeff[{"a": 1}, {"a": 2}]',
    ],
)
def test_rows_of_a_json_file(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    for name in ("x.json", "x.jsonl.gz"):
        assert [row["a"] for row in read_file(tmp_path / name)] == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "refusal"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a"\n', r"x\.jsonl, line 2, is no JSON: Expecting ':' delimiter, at character 5"),
        ("x.csv", b"a,b\n1,2\n", r"x\.csv, line 1, is no JSON: .*what is read: \.jsonl, \.json"),
        ("x.jsonl", b'{"a": "caf\xe9"}\n', r"x\.jsonl, line 1, is no text in UTF-8: byte 10 is 0xe9"),
        ("x.jsonl", b'{"a": ' + b"9" * 5000 + b"}", r"x\.jsonl, line 1, cannot be read: Exceeds the limit"),
        ("x.jsonl", b"7\n", r"x\.jsonl, line 1, is no JSON object, but of type int"),
        ("x.json", b'[{"a": 1}, 5]', r"x\.json, entry 2, is no JSON object, but of type int"),
        ("x.json", b'[{"a": 1', r"x\.json is no JSON"),
        ("x.jsonl.gz", b'{"a": 1}\n', r"x\.jsonl\.gz is no whole gzip file"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-9], r"x\.jsonl\.gz is no whole gzip file"),
        ("x.parquet", b"a,b", r"x\.parquet is no parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(tmp_path, name, content, refusal):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=refusal):
        list(read_file(tmp_path / name))


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data, real data sets, is not beside this repository")
def test_the_real_gsm8k(tmp_path):
    said: list[str] = []
    prepare(make_task("gsm8k"), tmp_path / "out", local=SHARED, say=said.append)
    assert "7473 rows" in said[1] and "(the training problems), 7471 kept" in said[1]
    assert said[2] == "  2 left out, half of the text of a problem of gsm8k: lines 1315, 5163"
