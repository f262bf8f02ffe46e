"""Protects the table: nothing is scored in silence, and votes are counted as the task compares answers."""

from __future__ import annotations

import asyncio
import json

import pytest

from recipe.gtpo.data.__main__ import make_task
from recipe.gtpo.evaluate.measures import Attempts
from recipe.gtpo.evaluate.results import Result, count_votes, difference_table, results_table, show
from recipe.gtpo.evaluate.samples import Sample
from recipe.gtpo.method.turns import Finish, Trajectory, Turn
from recipe.gtpo.tasks.task import OwnData

pytestmark = pytest.mark.unit


def sample(acc=0.0, pred="", finish=Finish.ANSWER):
    return Sample.of(Trajectory((Turn(0, 3, "..."),), finish, acc, pred))


def votes(samples, task):
    return asyncio.run(count_votes(samples, task.same))


@pytest.mark.parametrize(
    ("task", "preds", "groups"),
    [
        ("math", ["1/2", "0.5", r"\frac{1}{2}", "2", "1/2"], (4, 1)),
        ("gsm8k", ["1,000", "1000", "1000.0", "100"], (3, 1)),
        ("commonsense", ["B", "(b)", "B. a dog", r"\text{B}", "A", "yes"], (4, 1, 1)),
        ("arithmetic", ["5", " 5", "6"], (2, 1)),
    ],
)
def test_answers_are_one_as_the_task_compares_them(task, preds, groups):
    found = votes([sample(1.0, preds[0]), *(sample(0.0, pred) for pred in preds[1:])], make_task(task))
    assert tuple(count for count, _ in found.answers) == groups


def test_an_answer_that_is_none_votes_for_nothing():
    found = votes([sample(1.0, "5"), sample(0.0, ""), sample(0.0, "  "), sample(0.0, "7")], OwnData(name="x"))
    assert found == Attempts((1.0, 0.0, 0.0, 0.0), ((1, 1.0), (1, 0.0)))


def test_what_failed_on_our_side_is_neither_scored_nor_a_vote():
    samples = [sample(1.0, "5"), sample(0.0, "6", Finish.INFRA), sample(0.0, "", Finish.FAULT)]
    assert votes(samples, OwnData(name="x")) == Attempts((1.0,), ((1, 1.0),))


@pytest.fixture
def result():
    """Three problems, two samples each: one is lost, one failed by the tool server, one cut off and wrong."""
    done = {
        0: {0: sample(1.0, "5"), 1: sample(0.0, "", Finish.LENGTH)},
        1: {0: sample(0.0, "4"), 1: sample(0.0, "", Finish.INFRA)},
        2: {0: sample(1.0, "5"), 1: sample(0.0, "", Finish.FAULT)},
    }
    return asyncio.run(Result.of(done, 3, 2, 4, OwnData(name="x").same))


def test_every_sample_is_counted_once(result):
    assert result.counts == {
        "problems": 3,
        "problems_too_long": 4,
        "samples": 6,
        "scored": 4,
        "truncated": 1,
        "truncated_by_length": 1,
        "infra": 1,
        "lost": 1,
        "not_done": 0,
    }
    assert result.values["mean@2"] == {0: 0.5, 1: 0.0, 2: 1.0}  # not 0.5 for the one that lost a sample
    assert result.values["pass@2"] == {0: 1.0}
    assert result.means["turns"] == 1.0 and result.means["tokens"] == 3.0


def test_the_table_says_what_the_numbers_leave_out(result):
    head, row, *notes = results_table({"gsm8k": result})
    assert head.split() == "benchmark problems samples mean@n pass@n maj@n turns cut off infra lost".split()
    assert row.split()[:4] == ["gsm8k", "3", "2", "0.500"] and row.split()[-3:] == ["1", "1", "1"]
    assert notes == [
        "gsm8k: 2 samples failed on our side and are not scored; the same command tries again",
        "gsm8k: 1 samples were cut off by a limit; they are scored as they stand",
        "gsm8k: 4 problems are left out, longer than data.max_prompt_length",
        "gsm8k: pass@k and maj@k are over the problems with at least k scored samples",
    ]


def of_preds(*problems):
    """Of the samples of each problem, (acc, pred)."""
    done = {i: {j: sample(*one) for j, one in enumerate(samples)} for i, samples in enumerate(problems)}
    return asyncio.run(Result.of(done, len(problems), len(problems[0]), 0, OwnData(name="x").same))


def test_a_reward_function_that_states_no_answer_leaves_maj_out():
    """It was 0.000, with an interval, where three of four samples were right."""
    unstated = of_preds([(1.0, ""), (1.0, "")], [(1.0, ""), (0.0, "")])
    assert unstated.to_dict()["measures"].keys() == {"mean@2", "pass@1", "pass@2"}
    assert not any("maj@" in name for name in unstated.metrics("x"))
    head, row, note = results_table({"x": unstated})
    assert row[head.index("maj@n") :].split()[0] == "-" and row[head.index("mean@n") :].startswith("0.750 [")
    assert note == "x: maj@k is left out: the reward function states no answer (`pred`), also where it is right"
    stated = of_preds([(1.0, "5"), (1.0, "5")], [(1.0, "5"), (0.0, "6")])
    for before, after in ((unstated, stated), (stated, unstated)):
        assert after.minus(before).keys() == {"mean@2", "pass@1", "pass@2"}
        *_, maj = difference_table({"x": before}, {"x": after}, ("before", "after"))
        assert maj.split()[1] == "maj@2" and maj.split()[-1] == "-"


def test_a_model_that_never_gives_an_answer_has_no_majority_that_is_right():
    """As a base model's that does not know the form: what training adds is measured from there."""
    before, after = of_preds([(0.0, ""), (0.0, "")]), of_preds([(1.0, "5"), (0.0, "")])
    assert before.estimates["maj@2"].value == 0.0
    assert after.values["maj@2"] == {0: 1.0} and after.values["maj@1"] == {0: 0.5}  # one that states none votes not
    assert after.minus(before)["maj@2"].value == 1.0


def test_an_evaluation_that_was_stopped_says_so():
    result = asyncio.run(Result.of({0: {0: sample(1.0, "5")}}, 2, 2, 0, OwnData(name="x").same))
    assert results_table({"x": result})[-1] == "x: 3 samples are not done"


def test_the_output_is_json_with_every_k(result):
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["measures"].keys() == {"mean@2", "pass@1", "pass@2", "maj@1", "maj@2"}
    assert written["measures"]["pass@2"] == {"value": 1.0, "low": None, "high": None, "problems": 1}
    assert result.metrics("gsm8k")["val-core/gsm8k/acc/mean@2"] == 0.5


def test_before_and_after_are_paired_by_problem():
    same = OwnData(name="x").same
    before = {i: {0: sample(0.0, "1")} for i in range(4)}
    after = before | {0: {0: sample(1.0, "5")}, 1: {0: sample(1.0, "5")}}
    results = [asyncio.run(Result.of(done, 4, 1, 0, same)) for done in (before, after)]
    difference = results[1].minus(results[0])["mean@1"]
    assert difference.value == 0.5 and difference.low >= 0.0
    _, *rows = difference_table({"x": results[0]}, {"x": results[1]}, ("before", "after"))
    assert len(rows) == 1  # of one sample, all measures are the same
    assert rows[0].split()[:3] == ["x", "mean@1", "0.000"] and "+0.500 [" in rows[0]


def test_a_number_without_an_interval():
    result = asyncio.run(Result.of({0: {0: sample(1.0, "5")}}, 1, 1, 0, OwnData(name="x").same))
    assert show(result.estimates["mean@1"]) == "1.000" and show(None) == "-"
