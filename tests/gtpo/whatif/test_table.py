"""The table of `python -m recipe.gtpo.whatif`: its means are those of the record, and its words are exact."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from recipe.gtpo.experiments.draw_credit import EXAMPLE
from recipe.gtpo.whatif import __main__ as command
from recipe.gtpo.whatif.__main__ import Weighed

pytestmark = pytest.mark.unit

RECORD = [json.loads(line) for line in EXAMPLE.read_text().splitlines()]


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run folder with the committed group as its third step, and an index of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    (folder / "trajectories").mkdir(parents=True)
    (folder / "trajectories" / "3.jsonl").write_text(EXAMPLE.read_text())
    return folder


def cells(text: str, row: str) -> list[str]:
    """The cells of a row, as "+0.12(34%)"."""
    line = next(line for line in text.splitlines() if line.startswith(row + " "))
    return re.sub(r" *\( *", "(", line.removeprefix(row)).split()


def test_a_mean_is_that_of_the_advantages_that_the_run_recorded(run_dir, capsys):
    assert command.main([str(run_dir), "--methods", "grpo_outcome"]) == 0
    text = capsys.readouterr().out
    expected = {}
    for record in RECORD:
        for number, advantage in enumerate(record["advantages"], start=1):
            expected.setdefault((record["acc"] != 1, number), []).append(advantage)
    in_order = [expected[place] for place in sorted(expected)]
    assert len(in_order) >= 3
    *means, praise = cells(text, "of the run")
    assert means == [
        f"{sum(some) / len(some):+.2f}({sum(one > 0 for one in some) / len(some):.0%})" for some in in_order
    ]
    assert cells(text, "turns") == [str(len(some)) for some in in_order]
    assert praise.endswith("%")


def test_praise_of_wrong_answers_is_a_share_of_the_weight():
    """A right turn weighs 2 x 3, the wrong ones +0.5 x 4 and -1 x 2: 2 of 10."""
    turns = {(True, 1): [Weighed(2.0, 3)], (False, 1): [Weighed(0.5, 4)], (False, 2): [Weighed(-1.0, 2)]}
    assert command.praise_of_wrong(turns) == pytest.approx(0.2)
    assert command.praise_of_wrong({(False, 1): [Weighed(0.0, 4)]}) is None
    assert command.lines({"gtpo": turns})[1].split()[-1] == "20.0%"
    assert command.lines({"gtpo": {(False, 1): [Weighed(0.0, 4)]}})[1].split()[-1] == "-"


def test_a_method_is_compared_with_the_runs_own_penalty(run_dir, capsys):
    """GRPO on the outcome has none, so on the sum with a penalty of 0 it is the same."""
    config = {"algorithm.gtpo.format_penalty": 0.0, "algorithm.gtpo.shaping.enable": False}
    (run_dir / "config.json").write_text(json.dumps(config))
    assert command.main([str(run_dir), "--methods", "grpo_sum,grpo_outcome"]) == 0
    text = capsys.readouterr().out
    assert cells(text, "grpo_sum") == cells(text, "grpo_outcome")


def test_a_run_with_another_estimator_of_verl_s_has_the_row_that_it_recorded(run_dir, capsys):
    """Every preset has an estimator of its own, so all the others are computed as ever."""
    tables = []
    for estimator in ("gtpo", "opo"):
        (run_dir / "config.json").write_text(json.dumps({"algorithm.adv_estimator": estimator}))
        assert command.main([str(run_dir)]) == 0
        tables.append(capsys.readouterr())
    ours, theirs = (table.out.splitlines() for table in tables)
    of_the_run = next(i for i, line in enumerate(ours) if line.startswith("of the run "))
    assert [*ours[:of_the_run], *ours[of_the_run + 1 :]] == [*theirs[:of_the_run], *theirs[of_the_run + 1 :]]
    first = [record["advantages"][0] for record in RECORD if record["acc"] == 1]
    assert cells(tables[1].out, "of the run")[0].startswith(f"{sum(first) / len(first):+.2f}(")
    assert '"of the run" is what was recorded: opo is no method of the recipe' in tables[1].err
    assert "recorded:" not in tables[0].err


def test_several_runs_are_one_table(run_dir, tmp_path, capsys):
    """The same trajectories twice: the same means and shares, twice the turns."""
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    tables = []
    for folders in ([run_dir], [run_dir, other]):
        assert command.main([*map(str, folders), "--methods", "gtpo,grpo_outcome"]) == 0
        tables.append(capsys.readouterr().out)
    for row in ("of the run", "gtpo", "grpo_outcome"):
        assert cells(tables[0], row) == cells(tables[1], row)
    assert [2 * int(n) for n in cells(tables[0], "turns")] == [int(n) for n in cells(tables[1], "turns")]
    assert f"{run_dir}: " in tables[1] and f"{other}: " in tables[1]


def test_a_rival_gives_every_turn_of_a_right_answer_the_same(run_dir, capsys):
    """GRPO on the plain outcome, n siblings of which k are right: (1 - k/n) / std and -(k/n) / std, std over n - 1."""
    assert command.main([str(run_dir), "--methods", "grpo_outcome"]) == 0
    n, k = len(RECORD), sum(record["acc"] == 1 for record in RECORD)
    assert 0 < k < n
    std = (k * (n - k) / n / (n - 1)) ** 0.5
    right, wrong = f"{(1 - k / n) / std:+.2f}(100%)", f"{-k / n / std:+.2f}(0%)"
    assert set(cells(capsys.readouterr().out, "grpo_outcome")) == {right, wrong, "0.0%"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "4"], "no step 4; recorded: 3 to 3"),
        (["--methods", "gtop"], "--methods: 'gtop' is none of dr_grpo, "),
    ],
)
def test_what_is_not_there_is_one_line(run_dir, capsys, arguments, said):
    assert command.main([str(run_dir), *arguments]) == 1
    assert said in capsys.readouterr().err


def test_a_folder_without_a_record_is_one_line(tmp_path, capsys):
    assert command.main([str(tmp_path / "none")]) == 1
    assert "RUN_DIR is the folder with trajectories/" in capsys.readouterr().err


def test_lines_that_are_no_record_are_counted(run_dir, capsys):
    path = run_dir / "trajectories" / "3.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*whole[:2], whole[2][:40] + "\n", *whole[3:-1], whole[-1][:40]]))
    assert command.main([str(run_dir), "--methods", "grpo_outcome"]) == 0
    said = capsys.readouterr()
    assert "whatif: 2 lines are left out, so groups and numbers are not the run's: trajectories/3.jsonl, " in said.err
    assert "of the run" in said.out


def test_a_record_that_nobody_here_can_read_is_one_line(run_dir, capsys):
    path = run_dir / "trajectories" / "3.jsonl"
    path.write_text("".join(json.dumps(record | {"version": 99}) + "\n" for record in RECORD))
    assert command.main([str(run_dir)]) == 1
    said = capsys.readouterr()
    assert "no trajectory can be read: trajectories/3.jsonl, " in said.err and said.out == ""
