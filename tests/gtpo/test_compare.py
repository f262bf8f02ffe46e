"""The matrix: which cells there are, what is skipped, tried again, reported, and ended.

Cells are small Python programs in place of trainings; processes are real.
"""

from __future__ import annotations

import io
import json
import signal
import sys
import time

import psutil
import pytest

from recipe.gtpo import compare
from recipe.gtpo.compare import Cell, LocalJob, matrix, parse, parse_seeds, run_matrix

pytestmark = pytest.mark.unit

#: Counts its attempts in a file; leaves a summary from the attempt in argv[2] on.
PROGRAM = """
import json, pathlib, sys
folder, good_from = pathlib.Path(sys.argv[1]), int(sys.argv[2])
tries = folder / "tries"
count = len(tries.read_text()) + 1 if tries.exists() else 1
tries.write_text("x" * count)
print("attempt", count)
if count < good_from:
    sys.exit("no luck")
(folder / "summary.json").write_text(json.dumps({"steps": [0, 3]}))
"""


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch):
    monkeypatch.setattr(compare, "_POLL_SECONDS", 0.02)


def cell(folder, name, good_from=1, steps=3):
    run_dir = folder / name
    return Cell("gtpo", 1, run_dir, (sys.executable, "-c", PROGRAM, str(run_dir), str(good_from)), steps)


def run(cells, parallel=1, hours=1.0):
    out = io.StringIO()
    return run_matrix(cells, LocalJob, parallel=parallel, hours=hours, out=out), out.getvalue()


def test_the_matrix_is_methods_x_seeds_with_one_folder_each(tmp_path):
    own, rest = parse(["methods=gtpo,grpo", "seeds=3..4", f"out={tmp_path}", "steps=7", "task=arithmetic", "+a.b=1"])
    cells = matrix(own, rest)
    assert [c.name for c in cells] == ["gtpo-seed3", "grpo-seed3", "gtpo-seed4", "grpo-seed4"]
    assert all(c.dir.parent == tmp_path for c in cells)
    command = cells[1].command[1:]
    assert command[:4] == ("-m", "recipe.gtpo.main", "method=grpo", "seed=3")
    assert command[-3:] == ("trainer.total_training_steps=7", "task=arithmetic", "+a.b=1")
    # a pair differs in its method and its folder, in nothing else
    assert [a for a, b in zip(cells[0].command, cells[1].command, strict=True) if a != b] == [
        "method=gtpo",
        f"run_dir={cells[0].dir}",
    ]


def test_the_twin_takes_the_same_cells(tmp_path):
    own, rest = parse(["methods=gtpo_turn", "seeds=5", "engine=twin", f"out={tmp_path}", "gtpo.gamma=1.0"])
    (one,) = matrix(own, rest)
    assert one.command[1:] == (
        "benchmarks/twin.py", "--method", "gtpo_turn", "--seed", "5", "--run-dir", str(one.dir), "gtpo.gamma=1.0",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods=gtpo,gppo"], "unknown method 'gppo'; methods: .*grpo"),
        (["engine=slime"], "unknown engine 'slime'"),
        (["seeds=1,1"], "each once"),
        (["seeds=4..2"], "at least one"),
        (["trainer.total_training_steps=5"], "a cell sets this itself"),
        (["seed=5"], "a cell sets this itself"),
    ],
)
def test_a_wrong_matrix_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        matrix(*parse(arguments))


def test_seeds_are_a_list_or_a_range_with_both_ends():
    assert parse_seeds("0..3") == [0, 1, 2, 3]
    assert parse_seeds("7,2") == [7, 2]


def test_what_is_complete_is_skipped_and_what_is_short_is_not(tmp_path):
    done, short = cell(tmp_path, "done"), cell(tmp_path, "short")
    for one, steps in ((done, 3), (short, 2)):
        one.dir.mkdir()
        (one.dir / "summary.json").write_text(json.dumps({"steps": [0, steps]}))
    outcome, _ = run([done, short])
    assert (outcome.skipped, outcome.complete, outcome.failed) == (["done"], ["short"], [])
    assert not (done.dir / "tries").exists()


def test_a_failed_cell_gets_one_more_attempt_then_is_reported_and_the_others_go_on(tmp_path):
    cells = [cell(tmp_path, "bad", good_from=9), cell(tmp_path, "lucky", good_from=2), cell(tmp_path, "good")]
    outcome, said = run(cells, parallel=2)
    assert sorted(outcome.complete) == ["good", "lucky"] and outcome.failed == ["bad"]
    assert (cells[0].dir / "tries").read_text() == "xx"
    assert "bad: failed twice: no luck" in said
    assert (cells[0].dir / "terminal.log").read_text().count("attempt") == 2  # nothing overwritten
    again, _ = run(cells)  # the same command again: only what is not complete
    assert sorted(again.skipped) == ["good", "lucky"] and (cells[0].dir / "tries").read_text() == "xxxx"


def test_an_exit_status_of_zero_without_a_summary_is_a_failure(tmp_path):
    silent = Cell("gtpo", 1, tmp_path / "silent", (sys.executable, "-c", ""), 3)
    outcome, _ = run([silent])
    assert outcome.failed == ["silent"]


@pytest.fixture
def in_the_background():
    """A matrix that a script starts with `&` ignores SIGINT; a cell that inherited it would live for another minute."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_cell_beyond_its_limit_is_ended_by_its_id(tmp_path, in_the_background):
    program = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    folder = tmp_path / "slow"
    command = (sys.executable, "-c", f"import os; os.chdir({str(folder)!r}); " + program)
    began = time.monotonic()
    outcome, _ = run([Cell("gtpo", 1, folder, command, 3)], hours=0.5 / 3600)
    assert outcome.failed == ["slow"] and time.monotonic() - began < 30
    assert not psutil.pid_exists(int((folder / "pid").read_text()))


def test_an_interrupt_ends_what_runs(tmp_path):
    jobs = []

    class Interrupted(LocalJob):
        def __init__(self, command, log):
            super().__init__(command, log)
            jobs.append(self)
            self.polls = 0

        def poll(self):
            self.polls += 1
            if self.polls == 3:
                raise KeyboardInterrupt
            return super().poll()

    command = (sys.executable, "-c", "import time; time.sleep(600)")
    with pytest.raises(KeyboardInterrupt):
        run_matrix([Cell("gtpo", 1, tmp_path / "on", command, 3)], Interrupted, parallel=1, hours=1, out=io.StringIO())
    assert jobs[0].poll() is not None


def test_an_unknown_method_ends_the_command_with_one_line(capsys):
    assert compare.main(["methods=nope"]) == 1
    assert capsys.readouterr().err.startswith("compare: error: unknown method 'nope'")
