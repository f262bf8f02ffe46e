"""The picture of the README: its numbers are those that the run recorded, and it can be drawn from any run."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from trajectories import trajectory, turn
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from recipe.gtpo.experiments import draw_credit
from recipe.gtpo.method.turns import Finish, FormatReason, ToolCall, ToolOutcome, Trajectory, Turn

pytestmark = pytest.mark.unit

ROWS = [json.loads(line) for line in draw_credit.EXAMPLE.read_text().splitlines()]
GROUP = [Trajectory.from_dict(row) for row in ROWS]


def test_the_advantages_are_those_that_the_run_recorded():
    assert len({row["group"] for row in ROWS}) == 1 and len(ROWS) == 8
    for drawn, row in zip(draw_credit.gtpo_advantages(GROUP), ROWS, strict=True):
        assert drawn == pytest.approx(row["advantages"], abs=1e-6)


def test_the_advantage_of_a_trajectory_is_verls_grpo():
    rewards = torch.tensor([[t.acc - 0.1 * sum(turn.broken is not None for turn in t.turns)] for t in GROUP])
    expected, _ = compute_grpo_outcome_advantage(rewards, torch.ones_like(rewards), np.zeros(len(GROUP)))
    assert draw_credit.grpo_advantages(GROUP) == pytest.approx(expected.squeeze(1).tolist(), abs=1e-6)


def test_the_example_shows_what_the_picture_is_for():
    broken = [(t.acc, k) for t in GROUP for k, turn in enumerate(t.turns) if turn.broken]
    assert (1.0, 0) in broken and (0.0, 1) in broken
    assert 0 < sum(t.acc for t in GROUP) < len(GROUP)
    assert {len(t.turns) for t in GROUP} == {2, 3, 4}
    assert any(row["turn_rewards"][-1] > 0 for row in ROWS if not row["acc"])  # shaped credit


def call(text: str, code: str | None, *outcomes: str) -> Turn:
    arguments = {} if code is None else {"code": code}
    outputs = tuple(ToolOutcome(outcome, "5\n", 0.0) for outcome in outcomes)
    return Turn(0, 1, text, calls=(ToolCall("python", arguments),), outcomes=outputs)


ANSWER, WORDS = Turn(0, 1, r"It is \boxed{5}."), Turn(0, 1, "Well.", broken=FormatReason.NO_ANSWER)


@pytest.mark.parametrize(
    ("last", "finish", "acc", "expected"),
    [
        (call("", "2+3", "ok"), Finish.TURN_LIMIT, 0.0, ("2+3", "tool: 5\n")),
        (call("", "2+", "syntax_error"), Finish.TURN_LIMIT, 0.0, ("2+", "✗ syntax error")),
        (call('{"code": "2+3"', None, "malformed"), Finish.TURN_LIMIT, 0.0, ("2+3", "✗ malformed call")),
        (call("no JSON", None, "malformed"), Finish.TURN_LIMIT, 0.0, ("no JSON", "✗ malformed call")),
        (call("", "2+3"), Finish.LENGTH, 0.0, ("2+3", "✗ cut off")),
        (ANSWER, Finish.ANSWER, 1.0, ("= 5", "✓ right answer")),
        (ANSWER, Finish.ANSWER, 0.0, ("= 5", "✗ wrong answer")),
        (WORDS, Finish.ANSWER, 0.0, ("Well.", "✗ no answer")),
    ],
)
def test_a_cell_says_what_the_turn_did_and_what_came_of_it(last, finish, acc, expected):
    pred = "5" if last is ANSWER else ""
    assert draw_credit.describe(Trajectory((ANSWER, last), finish, acc, pred), 1) == expected


def test_an_answer_without_a_call_says_so():
    guess = Turn(0, 1, r"\boxed{5}", broken=FormatReason.FIRST_TURN_NO_CALL)
    assert draw_credit.describe(Trajectory((guess,), Finish.ANSWER, 1.0, "5"), 0) == ("= 5", "✓ right, no call")


def test_the_group_that_shows_most_is_chosen():
    solved, failed = trajectory(turn(0, 2, "a"), turn(2, 4), acc=1.0), trajectory(turn(0, 2))
    assert draw_credit.choose({"quiet": [solved, solved], "mixed": [solved, failed]}) == "mixed"


def test_a_run_is_drawn_at_twice_the_size_of_the_page(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run" / "trajectories"
    folder.mkdir(parents=True)
    shutil.copy(draw_credit.EXAMPLE, folder / "3.jsonl")
    other = [ROWS[0] | {"group": "other"}, ROWS[1] | {"group": "gone", "dropped": True}]
    (folder / "10.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    out = tmp_path / "docs" / "credit.png"

    draw_credit.main([str(tmp_path / "run"), "--step", "3", "--group", ROWS[0]["group"][:6], "-o", str(out)])
    with Image.open(out) as image:
        assert image.width == 1760
    assert out.stat().st_size < 200_000
    draw_credit.main([str(tmp_path / "run"), "-o", str(out)])  # the last step
    monkeypatch.chdir(tmp_path)
    draw_credit.main([str(tmp_path / "run")])  # and not over the picture of the example
    assert (tmp_path / "credit.png").is_file()
    assert capsys.readouterr().out.splitlines()[-1].endswith("group other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no recorded trajectories"),
        (["run", "--step", "4"], "recorded: 3"),
        (["run", "--group", "xyz"], "0 groups begin with 'xyz'"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run" / "trajectories"
    folder.mkdir(parents=True)
    shutil.copy(draw_credit.EXAMPLE, folder / "3.jsonl")
    with pytest.raises(SystemExit, match=message):
        draw_credit.main(arguments)
