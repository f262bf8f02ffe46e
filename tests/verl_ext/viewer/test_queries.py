"""What the page asks: filters, search, order, neighbours, what-if; and what it may not ask."""

from __future__ import annotations

import json

import pytest
from viewer_runs import EQUAL, FAULTY, MIXED, call, say, trajectory, write

from verl_ext.viewer import queries, records
from verl_ext.viewer.runs import Run

pytestmark = pytest.mark.unit


class Doubler:
    """A method that knows one option; what-if answers with twice the recorded advantage times it."""

    @staticmethod
    def settings_of(config):
        return {"factor": (config or {}).get("factor", 1.0)}

    @staticmethod
    def controls():
        return [{"name": "factor", "label": "factor", "low": 0, "high": 4, "step": 1}]

    @staticmethod
    def uncontrolled(config):
        return {}

    @staticmethod
    def presets():
        return {"double": {"factor": 2.0}}

    @staticmethod
    def recompute(rows, settings, config, codes):
        if settings["factor"] < 0:
            raise ValueError("factor: -1 must be 0 or above")
        return [
            {
                "dropped": row["dropped"],
                "turns": [
                    {
                        "advantage": 2 * settings["factor"] * (turn["advantage"] or 0),
                        "advantage_parts": {"outcome": 1.0},
                    }
                    for turn in row["turns"]
                ],
                "code": code,
            }
            for row, code in zip(rows, codes(), strict=True)
        ]


@pytest.fixture
def run(tmp_path) -> Run:
    folder = write(tmp_path / "run", {1: MIXED, 2: [*FAULTY, *EQUAL]})
    made = Run(folder, Doubler, tmp_path / "cache")
    made.update()
    return made


def labels(run: Run, **question) -> list[str]:
    return [group["label"] for group in queries.groups(run, **question)["groups"]]


def number(run: Run, label: str) -> int:
    (found,) = [group["id"] for group in queries.groups(run)["groups"] if group["label"] == label]
    return found


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ({}, ["apples", "pears", "plums"]),
        ({"step": 2}, ["pears", "plums"]),
        ({"split": "validation"}, []),
        ({"flags": ["timeout"]}, ["pears"]),
        ({"flags": ["no first call"]}, ["pears", "plums"]),
        ({"flags": ["no first call", "all equal"]}, ["plums"]),
        ({"flags": ["tool error"]}, []),
        ({"sort": "spread"}, ["apples", "pears", "plums"]),
        ({"sort": "latest"}, ["pears", "plums", "apples"]),
        ({"sort": "least solved"}, ["pears", "plums", "apples"]),
        ({"offset": 1}, ["pears", "plums"]),
        ({"limit": 1}, ["apples"]),
        ({"text": "boxed"}, ["apples", "plums"]),
        ({"text": "BOXED apples"}, ["apples"]),
        ({"text": '"it is"'}, ["apples"]),
        ({"text": '"is it"'}, []),
        ({"text": "app"}, ["apples"]),  # the last word may be a beginning
        ({"text": "app "}, []),  # unless it was ended
        ({"text": "  "}, ["apples", "pears", "plums"]),
        ({"text": "+ - *"}, []),  # nothing that an index of words could find
    ],
)
def test_groups_are_found(run, question, expected):
    assert labels(run, **question) == expected


@pytest.mark.parametrize(
    "typed", ['"', "'", "a OR b", "NEAR(", "content:x", "^z", "z* y*", "-x", '""', "\x00", "😀", "(" * 50]
)
def test_whatever_is_typed_is_words_to_search_for_and_no_error(run, typed):
    assert queries.groups(run, text=typed)["total"] == 0


@pytest.mark.parametrize(
    ("question", "message"),
    [({"flags": ["nonsense"]}, "'nonsense' is not one of no first call"), ({"sort": "id; DROP"}, "is not one of step")],
)
def test_a_question_that_cannot_be_is_refused_by_name(run, question, message):
    with pytest.raises(ValueError, match=message):
        queries.groups(run, **question)


def test_code_is_found_word_by_word_though_a_turn_has_it_as_json(run):
    code = trajectory("figs", call("total = 3\nprint(total)"), say("x"))
    write(run.path, {3: [code]})
    run.update()
    assert "\\nprint" in code["turns"][0]["text"] and labels(run, text="print ", step=3) == ["figs"]


def test_a_prompt_is_found_however_often_it_was_given(tmp_path):
    steps = {step: [trajectory("figs", say("x"))] for step in range(1, 131)}
    run = Run(write(tmp_path, steps), None, tmp_path / "cache")
    run.update()
    found = queries.same_prompt([run], queries.group(run, queries.groups(run)["groups"][0]["id"])["prompt_key"])
    assert [one["step"] for one in found] == list(steps)


def test_an_opened_group_says_which_siblings_have_the_words(run):
    apples = number(run, "apples")
    assert [row["found"] for row in queries.group(run, apples, "so boxed")["rows"]] == [False, True, False]
    assert not any(row["found"] for row in queries.group(run, apples)["rows"])


def test_neighbours_follow_the_record(run):
    apples, pears, plums = (number(run, label) for label in ("apples", "pears", "plums"))
    assert queries.neighbours(run, apples) == {"before": None, "after": pears}
    assert queries.neighbours(run, pears) == {"before": apples, "after": plums}
    assert queries.neighbours(run, plums) == {"before": pears, "after": None}
    with pytest.raises(KeyError):
        queries.neighbours(run, 99)


def test_what_if_is_asked_of_the_whole_step_and_answers_for_the_group(run):
    pears = number(run, "pears")
    answers = queries.what_if(run, pears, {"factor": 3.0})
    rows = queries.group(run, pears)["rows"]
    assert list(answers) == [str(row["id"]) for row in rows]
    assert [turn["advantage"] for turn in answers[str(rows[1]["id"])]["turns"]] == [3.0, -3.0]
    assert answers[str(rows[1]["id"])]["code"] == "while True: pass"
    assert answers[str(rows[2]["id"])]["code"] == ""  # a malformed call never ran
    with pytest.raises(ValueError, match="factor"):
        queries.what_if(run, pears, {"factor": -1})


def test_without_a_method_what_if_says_so(run, tmp_path):
    run = Run(run.path, None, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"verl_ext\.viewer"):
        queries.what_if(run, number(run, "apples"), {})


def test_the_same_prompt_is_found_in_other_runs_and_steps(run, tmp_path):
    later = Run(write(tmp_path / "later", {7: MIXED, 9: [*EQUAL, MIXED[0]]}), None, tmp_path / "cache")
    later.update()
    key = queries.group(run, number(run, "apples"))["prompt_key"]
    found = queries.same_prompt([run, later], key)
    assert [(one["name"], one["step"], one["size"]) for one in found] == [
        ("run", 1, 3),
        ("later", 7, 3),
        ("later", 9, 1),
    ]


def test_runs_of_one_name_are_told_apart_by_the_folders_above(run, tmp_path):
    runs = [Run(write(tmp_path / name, {}), None, tmp_path / "cache") for name in ("a/seed1", "b/seed1")]
    assert queries.run_names(runs) == ["a/seed1", "b/seed1"]
    assert queries.run_names([run, runs[0]]) == ["run", "seed1"]
    assert queries.run_names([run, run]) == ["run", "run"]  # the same folder twice


def test_configs_are_compared_by_key(run, tmp_path):
    others = []
    for name, config in {"a": {"seed": 1, "lr": 0.1}, "b": {"seed": 2, "lr": 0.1, "new": True}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        others.append(Run(tmp_path / name, Doubler, tmp_path / "cache"))
    assert queries.config_differences([run, *others]) == [
        {"key": "new", "values": [None, None, True]},
        {"key": "seed", "values": [None, 1, 2]},
    ]


def test_a_config_that_comes_after_the_viewer_is_read(run):
    assert run.settings == {"factor": 1.0}
    (run.path / "config.json").write_text(json.dumps({"factor": 3.0}))
    assert run.settings == {"factor": 3.0}


def test_curves_are_the_metrics_of_every_run_and_torn_lines_are_passed_over(run):
    lines = [
        {"step": 1, "metrics": {"a": 0.5}},
        {"step": 2, "metrics": {"a": 0.6, "b": 1.0}},
        {"step": 1, "metrics": {"a": 0.7}},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.path / "metrics.jsonl").write_text('{"step": 0, "met\n' + text + '{"step": 3')
    assert queries.curves([run], ["a", "c"]) == {
        "names": ["a", "b"],
        "curves": {"a": [[[1, 0.7], [2, 0.6]]], "c": [[]]},
    }


def test_the_overview_says_when_metrics_were_written_also_without_a_new_trajectory(run, tmp_path):
    """A step's line comes after its trajectories: the revision of these does not say that curves have grown."""
    other = Run(write(tmp_path / "other", {1: MIXED}), None, tmp_path / "cache")
    line = '{"step": 1, "metrics": {"a": 0.5}}\n'
    seen = []
    for text in ("", line, 2 * line):
        if text:
            (run.path / "metrics.jsonl").write_text(text)
        run.update()
        seen.append([(one["revision"], one["metrics"]) for one in queries.overview([run, other])["runs"]])
    assert len({before for (before, _), _ in seen}) == 1
    assert seen[0][0][1] is None and len({metrics for (_, metrics), _ in seen}) == 3
    assert {metrics for _, (_, metrics) in seen} == {None}


def test_a_text_is_given_by_its_path_and_nothing_else_is(run):
    first = queries.group(run, number(run, "apples"))["rows"][0]["id"]
    assert queries.full_text(run, first, "turns/0/calls/0/output") == "7\n"
    for path in ("turns", "turns/9/text", "turns/x/text", "nothing", "", "turns/0/text/0"):
        with pytest.raises(KeyError):
            queries.full_text(run, first, path)


def test_every_flag_has_a_bit_of_its_own():
    bits = list(records.FLAGS.values())
    assert sum(bits) == 2 ** len(bits) - 1


def test_a_trajectory_without_an_advantage_is_not_called_equal(tmp_path):
    run = Run(write(tmp_path, {1: [trajectory("new", say("x"))]}), None, tmp_path / "cache")
    run.update()
    group = queries.group(run, number(run, "new"))
    assert group["flags"] == ["no first call"]
    assert group["rows"][0]["turns"][0]["advantage"] is None  # unassigned is not zero
