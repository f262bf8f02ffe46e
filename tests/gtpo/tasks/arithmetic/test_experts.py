"""Every fault earns exactly the verdict it is named for, at the rate the table says."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from recipe.gtpo.conversation import Conversation, judge_format
from recipe.gtpo.method.turns import FormatReason, ToolCall, ToolOutcome
from recipe.gtpo.tasks.arithmetic.calculator import run_call
from recipe.gtpo.tasks.arithmetic.experts import (
    FAULT_MIX,
    FAULTS,
    FIRST_CALL_DECIDES,
    MODE,
    REMARKS,
    RULES,
    STAGES,
    demonstrate,
    faults_for,
    problem_class,
    scale_faults,
    write_answer,
    write_turn,
)
from recipe.gtpo.tasks.arithmetic.problems import (
    SYMBOLS,
    Problem,
    Step,
    compute_score,
    sample_problems,
    step_mix,
    take,
)
from recipe.gtpo.tasks.task import boxed

pytestmark = pytest.mark.unit

STEPS = (Step("add", 6789), Step("mul", 321))
PROBLEM = Problem(12345, STEPS, wording=0)


def mix_of(**faults: float):
    return {stage: {operation: dict(faults) for operation in SYMBOLS} for stage in STAGES}


def answered(text: str) -> tuple[tuple[ToolCall, ...], tuple[ToolOutcome, ...]]:
    """The calls of one turn and what a rollout answers."""
    conversation = Conversation(RULES)
    calls = conversation.end_turn(0, 1, text, cut=False)
    if conversation.finish is None:
        conversation.hear(tuple(map(run_call, calls)))
    return conversation.turns[0].calls, conversation.turns[0].outcomes


def verdict(text: str, *, is_first: bool, is_last: bool) -> FormatReason | None:
    calls, _ = answered(text)
    has_answer = boxed(text) is not None
    return judge_format(
        is_first=is_first, is_last=is_last, truncated=False, cut=False, calls=calls, has_answer=has_answer
    )


@pytest.mark.parametrize(
    ("fault", "reason", "outcome"),
    [
        (None, None, "ok"),
        ("bad_json", FormatReason.INVALID_JSON, "malformed"),
        ("open_tag", FormatReason.UNBALANCED_TAG, "malformed"),
        ("one_call", FormatReason.BAD_ARGUMENT, "malformed"),
        ("syntax_error", None, "syntax_error"),
        ("wrong_operator", None, "ok"),
    ],
)
def test_fault_gets_its_verdict_and_its_outcome(fault, reason, outcome):
    text = write_turn(fault, 12345, STEPS)
    assert verdict(text, is_first=True, is_last=False) is reason
    _, outcomes = answered(text)
    assert [o.outcome for o in outcomes] == [outcome]
    right = outcomes[0].output.strip() == str(PROBLEM.values[1])
    assert right == (fault is None)


def test_early_answer_breaks_the_format_in_the_first_turn_only():
    text = write_turn("early_answer", 12345, STEPS)
    assert verdict(text, is_first=True, is_last=True) is FormatReason.FIRST_TURN_NO_CALL
    assert verdict(text, is_first=False, is_last=True) is None
    assert compute_score("arithmetic", text, str(PROBLEM.answer))["acc"] == 0.0


def test_one_call_needs_two_steps():
    assert write_turn("one_call", 12345, STEPS[1:]) == write_turn(None, 12345, STEPS[1:])


@pytest.mark.parametrize("operation", SYMBOLS)
def test_wrong_operator_is_wrong_for_every_operation(operation):
    steps = (Step(operation, 456),)
    assert write_turn("wrong_operator", 12345, steps) != write_turn(None, 12345, steps)
    _, outcomes = answered(write_turn("wrong_operator", 12345, steps))
    assert outcomes[0].outcome == "ok"


def test_without_faults_the_expert_solves_everything_in_one_call_a_step():
    rng = random.Random(1)
    for problem in take(sample_problems("train", 1, dict.fromkeys(range(1, 7), 1.0)), 300):
        shown = demonstrate(problem, scale_faults(FAULT_MIX, 0.0), rng)
        assert len(shown.turns) == len(problem.steps) + 1
        assert compute_score("arithmetic", shown.turns[-1], str(problem.answer))["acc"] == 1.0
        for k, text in enumerate(shown.turns):
            assert verdict(text, is_first=k == 0, is_last=k == len(problem.steps)) is None


def test_a_failed_call_is_repaired_in_the_next_turn():
    mix = mix_of(syntax_error=1.0) | {"repair": {operation: {} for operation in SYMBOLS}}
    shown = demonstrate(PROBLEM, mix, random.Random(1))
    assert shown.faults == ("syntax_error", None, "syntax_error", None, None)
    assert [reply[0] for reply in shown.replies[:2]] == ["SyntaxError: invalid syntax", "19134\n"]
    assert compute_score("arithmetic", shown.turns[-1], str(PROBLEM.answer))["acc"] == 1.0


def test_an_early_answer_ends_the_conversation_with_the_value_at_hand():
    mix = mix_of() | {"later": {operation: {"early_answer": 1.0} for operation in SYMBOLS}}
    shown = demonstrate(PROBLEM, mix, random.Random(1))
    assert shown.faults == (None, "early_answer")
    assert boxed(shown.turns[-1]) == "19134"


def test_faults_come_at_the_rates_of_the_table():
    rng = random.Random(1)
    mix = scale_faults(FAULT_MIX, 1.0)
    firsts: dict[str, Counter] = {operation: Counter() for operation in SYMBOLS}
    for problem in take(sample_problems("train", 1), 3000):
        firsts[problem.steps[0].operation][demonstrate(problem, mix, rng).faults[0]] += 1
    for operation, counts in firsts.items():
        for fault in FAULTS:
            share = counts[fault] / counts.total()
            assert share == pytest.approx(mix["first"][operation].get(fault, 0.0), abs=0.05)


def test_default_mix_has_faults_that_are_the_mode_and_faults_that_are_not():
    rows = [row for stage in ("first", "later") for row in FAULT_MIX[stage].values()]
    assert any(max(row.values()) >= MODE for row in rows)
    assert any(0 < max(row.values()) <= 0.25 for row in rows)


@pytest.mark.parametrize("horizon", [1, 2, 6])
def test_a_problem_class_says_where_the_most_likely_expert_fails(horizon):
    likeliest = {
        stage: {operation: {f: 1.0 for f, p in row.items() if p >= MODE} for operation, row in rows.items()}
        for stage, rows in FAULT_MIX.items()
    }
    seen = set()
    for problem in take(sample_problems("train", 3, step_mix(horizon)), 500):
        shown = demonstrate(problem, likeliest, random.Random(0))
        name = problem_class(problem)
        seen.add(name)
        assert (shown.turns[-1] == write_answer(problem.answer)) == (name == "no modal fault")
        assert (shown.faults[0] is not None) == name.startswith("first")
        if name == "later turn":
            assert shown.faults[-1] is not None and len(shown.turns) > 1
    assert len(seen) == (2 if horizon == 1 else 4)


@pytest.mark.parametrize("horizon", [3, 4, 6])
def test_minor_faults_get_rarer_until_the_expert_succeeds_as_often_as_asked(horizon):
    mix = faults_for(0.2, step_mix(horizon))
    rng = random.Random(5)
    shown = [demonstrate(problem, mix, rng) for problem in take(sample_problems("train", 7, step_mix(horizon)), 2000)]
    solved = sum(d.turns[-1] == write_answer(d.problem.answer) for d in shown) / len(shown)
    assert solved == pytest.approx(0.2, abs=0.03)
    # the modal faults are untouched, the others have shrunk by one factor
    factors = set()
    for stage, rows in FAULT_MIX.items():
        for operation, row in rows.items():
            for fault, p in row.items():
                if max(row.values()) >= MODE:
                    assert mix[stage][operation][fault] == p
                else:
                    factors.add(round(mix[stage][operation][fault] / p, 9))
    assert len(factors) == 1 and factors.pop() < 1


def test_where_the_first_call_decides_an_expert_that_talks_says_what_does_not_matter():
    """Remarks before every turn, each as often; faults mostly in the first call; about 13% of the attempts right."""
    rng = random.Random(3)
    mix = scale_faults(FIRST_CALL_DECIDES, 1.0)
    shown = [
        demonstrate(problem, mix, rng, REMARKS) for problem in take(sample_problems("train", 7, step_mix(6)), 1000)
    ]
    assert faults_for(0.1, step_mix(6), FIRST_CALL_DECIDES) == FIRST_CALL_DECIDES
    said = Counter(turn.split("\n")[0] for d in shown for turn in d.turns)
    assert set(said) == set(REMARKS) and max(said.values()) < 1.3 * min(said.values())
    right = [d.turns[-1].endswith("\n" + write_answer(d.problem.answer)) for d in shown]
    assert sum(right) / len(right) == pytest.approx(0.13, abs=0.03)
    firsts = Counter(d.faults[0] for d in shown)
    assert firsts["wrong_operator"] / len(shown) == pytest.approx(0.55, abs=0.05)
    later = [fault for d in shown for fault in d.faults[1:]]
    assert set(later) == {None, "early_answer"} and later.count("early_answer") / len(later) < 0.05
    # what follows a wrong call is as well-formed as what follows a right one
    gone_on = [d for d in shown if d.faults[0] == "wrong_operator" and set(d.faults[1:]) == {None}]
    assert all(len(d.turns) == len(d.problem.steps) + 1 for d in gone_on) and len(gone_on) > 300


def test_faults_never_get_more_frequent_than_the_table_and_modal_ones_bound_the_success():
    assert faults_for(0.2, step_mix(1)) == FAULT_MIX
    with pytest.raises(ValueError, match=r"success=0\.9 is out of reach"):
        faults_for(0.9, step_mix(2))


@pytest.mark.parametrize(
    ("mix", "factor", "message"),
    [
        (mix_of(typo=0.1), 1.0, "unknown fault 'typo' in first/add"),
        (mix_of(bad_json=0.6), 2.0, "must be >= 0 and sum to <= 1"),
        (mix_of(bad_json=-0.1), 1.0, "must be >= 0 and sum to <= 1"),
        ({"first": {}}, 1.0, "no row first/add"),
    ],
)
def test_malformed_mix_raises(mix, factor, message):
    with pytest.raises(ValueError, match=message):
        scale_faults(mix, factor)
