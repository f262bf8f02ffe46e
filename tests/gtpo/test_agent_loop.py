"""Protects the rollout: what is recorded of a trajectory is exactly what the policy sampled and what became of it.

What is real in these rollouts and what is a fake: tests/helpers/scripted.py.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os

import pytest
from composition import compose
from scripted import (
    CALL,
    MULTI_TURN,
    QUESTION,
    RIGHT,
    WRONG,
    FakePython,
    Rollout,
    ScriptedServer,
    assert_leaves_the_loop,
    make_loop,
)
from verl.tools.function_tool import FunctionTool
from verl.tools.schemas import OpenAIFunctionToolSchema

from recipe.gtpo.dataset import FILE_ROW
from recipe.gtpo.method.turns import Finish, FormatReason
from recipe.gtpo.parsing import as_data, encode_data
from recipe.gtpo.tasks.arithmetic.policy import train_tokenizer

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer([CALL, RIGHT], vocab_size=300, directory=tmp_path_factory.mktemp("tokenizer"))


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_turns(tokenizer):
    return Rollout(tokenizer, ["Let me see. " + CALL, RIGHT], FakePython("5\n"))


def test_a_span_holds_exactly_what_the_server_generated(two_turns):
    spans = [(turn.start, turn.end) for turn in two_turns.trajectory.turns]
    assert [two_turns.output.response_ids[a:b] for a, b in spans] == two_turns.server.said
    assert [turn.text for turn in two_turns.trajectory.turns] == ["Let me see. " + CALL, RIGHT]


def test_the_mask_is_one_exactly_on_generated_tokens(two_turns):
    inside = {t for turn in two_turns.trajectory.turns for t in range(turn.start, turn.end)}
    output = two_turns.output
    assert output.response_mask == [int(t in inside) for t in range(len(output.response_ids))]


def test_log_probs_are_the_servers_and_zero_on_the_context(two_turns):
    first, second = two_turns.server.said
    gap = two_turns.trajectory.turns[1].start - len(first)
    expected = [-i / 1000 for i in range(1, len(first) + 1)] + [0.0] * gap
    expected += [-1 - i / 1000 for i in range(1, len(second) + 1)]
    assert two_turns.output.response_logprobs == expected


def test_tokens_are_only_ever_appended(two_turns):
    """The prompt of each turn starts with all that was sampled before, token for token."""
    output, (first, second) = two_turns.output, two_turns.server.requests
    assert output.prompt_ids == first["prompt_ids"]
    start = two_turns.trajectory.turns[1].start
    assert second["prompt_ids"] == output.prompt_ids + output.response_ids[:start]


def test_what_was_appended_is_the_conversation_as_the_chat_template_renders_it(two_turns):
    conversation = [
        *QUESTION,
        {"role": "assistant", "content": "Let me see. " + CALL},
        {"role": "tool", "content": "5\n"},
    ]
    schemas = [two_turns.tool.tool_schema.model_dump(exclude_none=True)]
    rendered = two_turns.tokenizer.apply_chat_template(
        conversation, tools=schemas, add_generation_prompt=True, tokenize=False
    )
    assert two_turns.decode(two_turns.server.requests[1]["prompt_ids"]) == rendered
    assert two_turns.context[1] == ""  # nothing follows the last turn


def test_each_turn_may_use_what_is_left_of_the_response(two_turns):
    limits = [request["max_tokens"] for request in two_turns.server.requests]
    assert limits == [256, 256 - two_turns.trajectory.turns[1].start]


def test_an_answered_trajectory(two_turns):
    assert two_turns.trajectory.finish is Finish.ANSWER
    assert two_turns.outcomes == [["ok"], []] and two_turns.broken == [None, None]
    assert (two_turns.trajectory.acc, two_turns.trajectory.pred) == (1.0, "5")
    assert two_turns.output.reward_score == 1.0 and two_turns.output.num_turns == 2
    assert two_turns.tool.ran == ["2+3"] and two_turns.tool.open == 0


def test_weight_versions_span_the_trajectory(two_turns):
    """verl's staleness control drops rows by these; turn k was sampled with version k + 3."""
    fields = two_turns.output.extra_fields
    assert (fields["min_global_steps"], fields["max_global_steps"]) == (3, 4)
    assert [turn.weights for turn in two_turns.trajectory.turns] == [(3, 3), (4, 4)]


class Interrupted(ScriptedServer):
    """verl's client where an answer was begun with the weights of one step and ended with those of the next."""

    async def generate(self, **kwargs):
        output = await super().generate(**kwargs)
        output.extra_fields["max_global_steps"] += 1
        return output


class Silent(ScriptedServer):
    """A server that says nothing of its weights."""

    async def generate(self, **kwargs):
        output = await super().generate(**kwargs)
        output.extra_fields = dict.fromkeys(output.extra_fields)
        return output


@pytest.mark.parametrize(
    ("server", "turns", "whole"),
    [(Interrupted, [(3, 4), (4, 5)], (3, 5)), (Silent, [None, None], (None, None))],
)
def test_every_turn_says_which_weights_sampled_it_as_far_as_its_server_does(tokenizer, server, turns, whole):
    rollout = Rollout(tokenizer, [CALL, RIGHT], FakePython("5\n"), server=server)
    assert [turn.weights for turn in rollout.trajectory.turns] == turns
    fields = rollout.output.extra_fields
    assert (fields["min_global_steps"], fields["max_global_steps"]) == whole


def test_without_log_probs_none_are_asked_for_and_none_come_back(tokenizer):
    changes = {"actor_rollout_ref.rollout.calculate_log_probs": False}
    rollout = Rollout(tokenizer, [CALL, RIGHT], FakePython("5\n"), changes)
    assert rollout.output.response_logprobs is None and rollout.trajectory.acc == 1.0
    assert "rollout_log_probs" not in rollout.output.as_dict()


def test_a_server_that_generates_nothing_loses_the_trajectory_with_a_word(tokenizer):
    rollout = Rollout(tokenizer, [[]])
    assert rollout.trajectory.finish is Finish.FAULT and rollout.trajectory.turns == ()
    assert rollout.trajectory.fault.startswith(
        "row 4 of the data files (arithmetic): RuntimeError: the rollout server generated no token"
    )
    assert (
        rollout.output.response_mask == [0] and len(rollout.output.response_ids) == 1
    )  # what verl needs; nothing trains


def test_a_lost_trajectory_names_the_row_as_the_data_files_have_it(tokenizer):
    rollout = Rollout(tokenizer, [[]], **{FILE_ROW: 1400})
    assert rollout.trajectory.fault.startswith("row 1400 of the data files (arithmetic): ")


# -- calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "reason", "told"),
    [
        ("<tool_call>{2+3}</tool_call>", FormatReason.INVALID_JSON, "Error: the tool call is not valid JSON"),
        (CALL.removesuffix("</tool_call>"), FormatReason.UNBALANCED_TAG, "Error: <tool_call> is not closed by"),
        (CALL.replace("python", "bash"), FormatReason.UNKNOWN_TOOL, "Error: unknown tool 'bash'; tools: python"),
        (CALL.replace("code", "program"), FormatReason.MISSING_ARGUMENT, "Error: missing argument 'code'"),
        (CALL.replace('"2+3"', "5"), FormatReason.BAD_ARGUMENT, "Error: argument 'code' must be of type string"),
    ],
)
def test_a_malformed_call_is_told_what_is_wrong_and_the_loop_goes_on(tokenizer, said, reason, told):
    rollout = Rollout(tokenizer, [said, CALL, RIGHT], FakePython("5\n"))
    assert f"<tool_response>\n{told}" in rollout.context[0]
    assert rollout.outcomes == [["malformed"], ["ok"], []] and rollout.broken == [reason, None, None]
    assert rollout.trajectory.finish is Finish.ANSWER and rollout.trajectory.acc == 1.0
    assert rollout.trajectory.code == "2+3" and rollout.tool.ran == ["2+3"]


def test_calls_beyond_the_allowed_number_are_answered_and_not_run(tokenizer):
    calls = [CALL.replace("2+3", code) for code in ("1", "2", "3")]
    malformed = "<tool_call>{}</tool_call>"
    tool = FakePython("one\n", "two\n")
    said = calls[0] + malformed + "".join(calls[1:])
    changes = {f"{MULTI_TURN}.max_parallel_calls": 2, "actor_rollout_ref.rollout.response_length": 1024}
    rollout = Rollout(tokenizer, [said, RIGHT], tool, changes)
    assert rollout.outcomes == [["ok", "malformed", "ok", "over_limit"], []]
    assert tool.ran == ["1", "2"] and rollout.trajectory.code == "1\n2"
    assert rollout.context[0].count("<tool_response>") == 4
    assert "Error: not run: at most 2 tool call(s) a turn" in rollout.context[0]


def test_failing_code_is_a_result(tokenizer):
    rollout = Rollout(tokenizer, [CALL, WRONG], FakePython(("NameError: x", "error")))
    assert rollout.outcomes == [["error"], []] and "NameError: x" in rollout.context[0]
    assert rollout.trajectory.finish is Finish.ANSWER and rollout.info["tool_error"] == 1.0


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (("connection refused", "infra"), "connection refused"),
        (("[tool unavailable]", "infra", "connection refused"), "connection refused"),
        (RuntimeError("no such pool"), "RuntimeError: no such pool"),
    ],
)
def test_a_tool_that_fails_by_itself_voids_the_trajectory(tokenizer, answer, cause):
    short = {f"{MULTI_TURN}.max_tool_response_length": 12}  # holds for messages
    rollout = Rollout(tokenizer, ["No. " + RIGHT + CALL], FakePython(answer), short)
    assert rollout.trajectory.finish is Finish.INFRA
    assert rollout.trajectory.infra_outputs == [cause]  # for the record and the line that ends a run
    assert rollout.context == [""] and cause not in tokenizer.decode(rollout.output.response_ids)  # not for the model
    assert rollout.outcomes == [["infra"]] and rollout.broken == [None]
    assert rollout.trajectory.acc == 0.0  # it is dropped, not scored
    assert rollout.info["infra"] == 1.0 and rollout.info["tool_error"] == 0.0
    assert rollout.tool.open == 0  # what was created is released


def run_code(code):
    if code == "server":
        raise ConnectionError("no such pool")
    return str(1 / int(code))


async def run_code_later(code):
    return run_code(code)


@pytest.mark.parametrize("function", [run_code, run_code_later])
@pytest.mark.parametrize(
    ("code", "outcome", "text"),
    [("2", "ok", "0.5"), ("0", "error", "Error: ZeroDivisionError: division by zero"), ("server", "infra", None)],
)
def test_verls_function_tools_run_and_what_they_raise_is_a_result(tokenizer, function, code, outcome, text):
    tool = FunctionTool("python", function, FakePython().tool_schema, is_async=inspect.iscoroutinefunction(function))
    said = f"<tool_call>{json.dumps({'name': 'python', 'arguments': {'code': code}})}</tool_call>"
    rollout = Rollout(tokenizer, [said, RIGHT], tool)
    assert rollout.outcomes[0] == [outcome]
    assert (rollout.trajectory.finish is Finish.INFRA) == (text is None)
    if text is not None:
        assert text in rollout.context[0]


def test_a_tool_that_cannot_be_created_voids_the_trajectory(tokenizer):
    class Exhausted(FakePython):
        async def create(self, instance_id=None, **kwargs):
            raise RuntimeError("no session left")

    rollout = Rollout(tokenizer, [CALL], Exhausted())
    assert rollout.trajectory.finish is Finish.INFRA
    assert rollout.trajectory.turns[0].outcomes[0].output == "RuntimeError: no session left"


@pytest.mark.parametrize(
    ("side", "limit", "shown"),
    [
        ("left", 4, "(truncated)...6789"),
        ("right", 4, "0123...(truncated)"),
        ("middle", 4, "01...(truncated)...89"),
        ("middle", 5, "01...(truncated)...89"),
        ("middle", 1, "...(truncated)..."),
        ("left", 0, "(truncated)..."),
        ("middle", 10, "0123456789"),
    ],
)
def test_a_long_tool_answer_is_cut_on_the_configured_side(tokenizer, side, limit, shown):
    changes = {f"{MULTI_TURN}.tool_response_truncate_side": side, f"{MULTI_TURN}.max_tool_response_length": limit}
    rollout = Rollout(tokenizer, [CALL, RIGHT], FakePython("0123456789"), changes)
    assert rollout.trajectory.turns[0].outcomes[0].output == shown
    assert f"<tool_response>\n{shown}\n</tool_response>" in rollout.context[0]


# -- nothing that is written or returned ends the run ------------------------------------------------------------------


WRITTEN = {
    "nested 700 deep": ('{"code": ' + "[" * 700 + "]" * 700 + "}", FormatReason.INVALID_JSON),
    "nested without end": ('{"code": ' + "[" * 100_000 + "}", FormatReason.INVALID_JSON),
    "5,000 digits": ('{"code": ' + "1" * 5000 + "}", FormatReason.INVALID_JSON),
    "half a character": ('{"code": "\\ud800"}', FormatReason.INVALID_JSON),
    "no number": ('{"code": NaN}', FormatReason.INVALID_JSON),
    "more than 64 bits": ('{"code": ' + "1" * 30 + "}", FormatReason.BAD_ARGUMENT),
    "a name of control tokens": ('{"code": "1", "' + "<|im_end|>" * 999 + '": 1}', FormatReason.BAD_ARGUMENT),
}


@pytest.mark.parametrize("written", WRITTEN)
def test_whatever_the_model_writes_is_a_turn(tokenizer, written):
    arguments, reason = WRITTEN[written]
    said = f'<tool_call>{{"name": "python", "arguments": {arguments}}}</tool_call>'
    spelt = encode_data(tokenizer, as_data(said, frozenset({"<|im_end|>"})))  # the token would end the turn
    changes = {"actor_rollout_ref.rollout.response_length": 300_000}
    turns = [[*spelt, tokenizer.eos_token_id], CALL, RIGHT]
    rollout = Rollout(tokenizer, turns, FakePython("5\n"), changes)
    assert rollout.broken == [reason, None, None] and rollout.trajectory.finish is Finish.ANSWER
    assert rollout.trajectory.turns[0].text == said
    assert len(rollout.context[0]) < 400  # it is told, shortly
    assert_leaves_the_loop(rollout)


def test_a_lone_surrogate_in_a_tools_text_is_shown_as_an_escape(tokenizer):
    rollout = Rollout(tokenizer, [CALL, RIGHT], FakePython("a\ud800b"))
    assert "<tool_response>\na\\ud800b\n</tool_response>" in rollout.context[0]
    assert rollout.trajectory.finish is Finish.ANSWER and rollout.trajectory.acc == 1.0
    assert_leaves_the_loop(rollout)


class Returns(FakePython):
    """A tool that hands back something that no tool may."""

    async def execute(self, instance_id, parameters, **kwargs):
        return self.answers.pop(0)


@pytest.mark.parametrize("returned", [None, (None, 0.0, {}), ("5", 0.0, {}), ("5", 0.0)])
def test_a_tool_that_breaks_verls_contract_voids_the_trajectory(tokenizer, returned):
    rollout = Rollout(tokenizer, [CALL], Returns(returned))
    assert rollout.trajectory.finish is Finish.INFRA
    assert_leaves_the_loop(rollout)


def test_a_tool_that_raises_with_half_a_character_voids_the_trajectory(tokenizer):
    rollout = Rollout(tokenizer, [CALL], FakePython(RuntimeError("a\ud800b")))
    assert rollout.trajectory.finish is Finish.INFRA
    assert rollout.trajectory.turns[0].outcomes[0].output == r"RuntimeError: a\ud800b"
    assert_leaves_the_loop(rollout)


@pytest.mark.parametrize(("value", "reason"), [("3", None), ("0.5", None), ('"3"', FormatReason.BAD_ARGUMENT)])
def test_an_argument_may_have_several_types(tokenizer, value, reason):
    """What verl's function tools make of `int | float`."""
    parameters = {"type": "object", "properties": {"code": {"type": ["integer", "number"]}}, "required": ["code"]}
    function = {"name": "python", "description": "Run.", "parameters": parameters}
    schema = OpenAIFunctionToolSchema.model_validate({"type": "function", "function": function})
    rollout = Rollout(tokenizer, [CALL.replace('"2+3"', value), RIGHT], FakePython("5\n", schema=schema))
    assert rollout.broken == [reason, None]


def test_a_tool_without_parameters_takes_none(tokenizer):
    function = {"name": "python", "description": "Run."}
    schema = OpenAIFunctionToolSchema.model_validate({"type": "function", "function": function})
    loop = asyncio.run(started(compose(), tokenizer, [FakePython(schema=schema)]))
    assert loop.rules.argument_schemas == {"python": {}}


# -- limits -----------------------------------------------------------------------------------------------------------


def test_the_turn_limit_ends_a_trajectory_before_its_last_call_runs(tokenizer):
    rollout = Rollout(tokenizer, [CALL, CALL], FakePython("5\n"), {f"{MULTI_TURN}.max_assistant_turns": 2})
    assert rollout.trajectory.finish is Finish.TURN_LIMIT
    assert rollout.outcomes == [["ok"], []] and len(rollout.trajectory.turns[1].calls) == 1
    assert rollout.broken == [None, None]  # no answer, but the limit is ours
    assert rollout.trajectory.code == "2+3" and rollout.info["truncated"] == 1.0


def test_the_response_limit_cuts_a_turn_without_a_format_charge(tokenizer):
    tool_turn = Rollout(tokenizer, [CALL, RIGHT], FakePython("5\n")).trajectory.turns[1].start
    changes = {"actor_rollout_ref.rollout.response_length": tool_turn + 3}
    rollout = Rollout(tokenizer, [CALL, RIGHT], FakePython("5\n"), changes)
    assert rollout.trajectory.finish is Finish.LENGTH
    assert rollout.broken == [None, None] and rollout.trajectory.acc == 0.0
    assert rollout.trajectory.turns[1].end - rollout.trajectory.turns[1].start == 3
    assert len(rollout.output.response_ids) == tool_turn + 3


def test_a_call_that_the_limit_left_unclosed_is_not_charged(tokenizer):
    size = len(tokenizer.encode(CALL, add_special_tokens=False))
    rollout = Rollout(tokenizer, [CALL], changes={"actor_rollout_ref.rollout.response_length": size - 1})
    assert rollout.trajectory.finish is Finish.LENGTH
    assert rollout.trajectory.turns[0].calls[0].error is FormatReason.UNBALANCED_TAG
    assert rollout.broken == [None]
    assert rollout.tool.ran == []


def test_a_turn_that_ends_by_itself_on_the_last_token_is_not_cut(tokenizer):
    size = len(tokenizer.encode(RIGHT, add_special_tokens=False)) + 1
    rollout = Rollout(tokenizer, [RIGHT], changes={"actor_rollout_ref.rollout.response_length": size})
    assert rollout.trajectory.finish is Finish.ANSWER and rollout.broken == [FormatReason.FIRST_TURN_NO_CALL]


def test_a_tool_answer_that_does_not_fit_ends_the_trajectory_at_the_turn(tokenizer):
    fits = Rollout(tokenizer, [CALL, RIGHT], FakePython("5\n")).trajectory.turns[1].start
    for length in (fits, fits - 1):  # no token left, not even room for the answer
        changes = {"actor_rollout_ref.rollout.response_length": length}
        rollout = Rollout(tokenizer, [CALL, RIGHT], FakePython("5\n"), changes)
        assert rollout.trajectory.finish is Finish.LENGTH and rollout.broken == [None]
        assert rollout.outcomes == [["ok"]] and rollout.trajectory.code == "2+3"  # it did run
        assert len(rollout.output.response_ids) == rollout.trajectory.turns[0].end  # its answer is not in the response


# -- outcome ----------------------------------------------------------------------------------------------------------


def test_an_answer_that_the_tool_printed_does_not_score(tokenizer):
    rollout = Rollout(tokenizer, [CALL, "Done."], FakePython(r"\boxed{5}"))
    assert r"\boxed{5}" in rollout.context[0]
    assert rollout.trajectory.acc == 0.0 and rollout.broken == [None, FormatReason.NO_ANSWER]
    assert rollout.info["no_answer"] == 1.0


def test_an_answer_of_an_earlier_turn_does_not_score(tokenizer):
    rollout = Rollout(tokenizer, [RIGHT + CALL, WRONG], FakePython("5\n"))
    assert (rollout.trajectory.acc, rollout.trajectory.pred) == (0.0, "6")


def test_a_right_answer_without_a_call_scores_and_breaks_the_format(tokenizer):
    rollout = Rollout(tokenizer, [RIGHT])
    assert rollout.trajectory.acc == 1.0 and rollout.broken == [FormatReason.FIRST_TURN_NO_CALL]
    assert rollout.info["first_turn_call"] == 0.0


def test_validation_keys_are_the_same_however_a_trajectory_ends(tokenizer):
    """verl fills a missing key with null and averages it."""
    ends = [
        Rollout(tokenizer, [RIGHT]),
        Rollout(tokenizer, ["<tool_call>", WRONG]),
        Rollout(tokenizer, [CALL], FakePython(("", "infra"))),
        Rollout(tokenizer, [CALL], changes={f"{MULTI_TURN}.max_assistant_turns": 1}),
        Rollout(tokenizer, [CALL], changes={"actor_rollout_ref.rollout.response_length": 3}),
    ]
    ends.append(Rollout(tokenizer, [[]]))  # the server generated nothing
    assert {rollout.trajectory.finish for rollout in ends} == set(Finish)
    keys = [
        "acc",
        "pred",
        "turns",
        "first_turn_call",
        "malformed_call",
        "tool_error",
        "no_answer",
        "truncated",
        "infra",
        "lost",
        "fault",
    ]
    for rollout in ends:
        assert list(rollout.info) == keys
        assert all(isinstance(v, str if k in ("pred", "fault") else float) for k, v in rollout.info.items())


def scored_by(tmp_path, body):
    """The config of a reward function with this body."""
    (tmp_path / "reward.py").write_text(f"import asyncio, time, os, signal, numpy as np\n{body}\n")
    return {"reward.custom_reward_function": {"path": str(tmp_path / "reward.py"), "name": "score"}}


@pytest.mark.parametrize(
    ("said", "outcome", "acc"),
    [
        ("0.5", 0.5, 0.0),
        ("{'score': 1.0}", 1.0, 1.0),
        ("np.array([1.])", 1.0, 1.0),
        ("{'score': -1, 'acc': False}", -1, 0),
    ],
)
def test_every_form_of_an_outcome_counts_and_no_trajectory_disappears(tokenizer, tmp_path, said, outcome, acc):
    rollout = Rollout(tokenizer, [RIGHT], changes=scored_by(tmp_path, f"async def score(**kwargs): return {said}"))
    assert (rollout.trajectory.raw_outcome, rollout.trajectory.acc) == (outcome, acc)
    assert rollout.output.reward_score == outcome and rollout.info["acc"] == acc


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("async def score(**kwargs): return None", "ValueError: the reward function returned None"),
        ("async def score(**kwargs): return float('nan')", "ValueError: the reward function returned nan"),
        ("async def score(**kwargs): return (1.0, 'x')", "ValueError: the reward function returned (1.0, 'x')"),
        ("async def score(**kwargs): raise KeyError('gold')", "the reward function score raised KeyError: 'gold'"),
        ("def score(**kwargs): raise KeyError('gold')", "the reward function score raised KeyError: 'gold'"),
        ("def score(**kwargs): os._exit(3)", "the reward function score raised ProcessExpired: "),
        ("def score(**kwargs): time.sleep(600)", "took longer than reward_timeout_seconds=2 and was ended"),
        (
            "async def score(**kwargs): await asyncio.sleep(600)",
            "took longer than reward_timeout_seconds=2 and was ended",
        ),
        (
            "async def score(**kwargs): raise TimeoutError('judge')",
            "the reward function score raised TimeoutError: judge",
        ),
        ("def score(**kwargs): raise TimeoutError('judge')", "score raised RuntimeError: TimeoutError: judge"),
    ],
)
def test_a_reward_function_that_fails_loses_the_trajectory_and_is_named_with_the_row(tokenizer, tmp_path, body, cause):
    changes = scored_by(tmp_path, body) | {"reward_timeout_seconds": 2}
    rollout = Rollout(tokenizer, [CALL, RIGHT], FakePython("5\n"), changes)
    assert rollout.trajectory.finish is Finish.FAULT
    assert rollout.trajectory.fault.startswith("row 4 of the data files (arithmetic): ")
    assert cause in rollout.trajectory.fault
    assert rollout.info["lost"] == 1.0 and len(rollout.trajectory.turns) == 2  # what it said is on record
    assert rollout.output.extra_fields["min_global_steps"] == 8  # verl's metrics of a step count with it


def test_a_reward_function_runs_in_the_main_thread_of_a_process_of_its_own(tokenizer, tmp_path):
    """As one that guards itself with SIGALRM needs it; the rollouts' event loop goes on meanwhile."""
    body = """
def score(**kwargs):
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(0)
    return {"score": 1.0, "pred": str(os.getpid())}
"""
    rollout = Rollout(tokenizer, [RIGHT], changes=scored_by(tmp_path, body))
    assert rollout.trajectory.acc == 1.0 and rollout.trajectory.pred != str(os.getpid())


def test_a_reward_function_may_start_processes_of_its_own(tokenizer, tmp_path):
    body = """
import multiprocessing

def work(said):
    said.put(1.0)

def score(**kwargs):
    said = multiprocessing.Queue()
    one = multiprocessing.Process(target=work, args=(said,))
    one.start()
    try:
        return said.get(timeout=30)
    finally:
        one.join()
"""
    rollout = Rollout(tokenizer, [RIGHT], changes=scored_by(tmp_path, body))
    assert (rollout.trajectory.fault, rollout.trajectory.acc) == ("", 1.0)


def test_a_row_without_the_keys_of_a_reward_gives_it_none(tokenizer, tmp_path):
    body = "async def score(data_source, ground_truth, **kwargs): return data_source is None and ground_truth is None"
    row = {"data_source": None, "reward_model": None}
    assert Rollout(tokenizer, [RIGHT], changes=scored_by(tmp_path, body), **row).trajectory.acc == 1.0


def test_a_reward_function_may_be_async_or_return_a_bare_number(tokenizer, tmp_path):
    changes = scored_by(tmp_path, "async def score(**kwargs):\n    return 1")
    rollout = Rollout(tokenizer, [WRONG], changes=changes)
    assert (rollout.trajectory.acc, rollout.trajectory.pred) == (1.0, "")


def test_the_tasks_answer_format_decides_whether_the_last_turn_answers(tokenizer, tmp_path):
    """A task whose answers look like `#### 42` is not fined for having no box."""
    (tmp_path / "hashes.py").write_text("def score(solution_str, **kwargs):\n    return '#### 5' in solution_str\n")
    reward = {"reward.custom_reward_function": {"path": str(tmp_path / "hashes.py"), "name": "score"}}
    own = {"task": {"_target_": "recipe.gtpo.tasks.task.OwnData", "name": "mine", "answer": "#### (.+)"}}
    rollout = Rollout(tokenizer, [CALL, "#### 5"], FakePython("5\n"), reward | own)
    assert rollout.broken == [None, None] and rollout.trajectory.acc == 1.0
    boxed = Rollout(tokenizer, [CALL, RIGHT], FakePython("5\n"), reward | own)
    assert boxed.broken == [None, FormatReason.NO_ANSWER]


def test_a_task_whose_score_is_a_coroutine_is_waited_for(tokenizer):
    gsm8k = {"_target_": "recipe.gtpo.tasks.gsm8k.GSM8K", "name": "gsm8k", "folder": "unused", "system": ""}
    right, wrong = (Rollout(tokenizer, [said], changes={"task": gsm8k}) for said in (RIGHT, WRONG))
    assert (right.trajectory.acc, right.trajectory.pred, wrong.trajectory.acc) == (1.0, "5", 0.0)


# -- seeds ------------------------------------------------------------------------------------------------------------


def seeds(tokenizer, determinism=True, **row):
    changes = {"actor_rollout_ref.rollout.full_determinism": determinism}
    rollout = Rollout(tokenizer, [CALL, RIGHT], FakePython("5\n"), changes, **row)
    return [request.get("seed") for request in rollout.server.requests]


def test_the_same_row_gets_the_same_seeds_one_a_turn(tokenizer):
    first, second = seeds(tokenizer)
    assert [first, second] == seeds(tokenizer) and first != second
    assert [first, second] == seeds(tokenizer, **{FILE_ROW: 1400})  # whatever its place in the files


@pytest.mark.parametrize("other", [{"session_id": 2}, {"index": 5}, {"global_steps": 10}])
def test_another_session_row_or_step_gets_other_seeds(tokenizer, other):
    assert not set(seeds(tokenizer)) & set(seeds(tokenizer, **other))


def test_without_full_determinism_no_seed_is_sent(tokenizer):
    assert seeds(tokenizer, determinism=False) == [None, None]


# -- start-up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tools", [None, []])
def test_no_tool_is_refused_by_the_key_that_sets_one(tokenizer, tools):
    with pytest.raises(ValueError, match=r"set actor_rollout_ref\.rollout\.multi_turn\.tool_config_path"):
        asyncio.run(started(compose(), tokenizer, tools))


def test_no_reward_function_is_refused_by_the_key_that_sets_one(tokenizer):
    config = compose("task=verl_data")
    with pytest.raises(ValueError, match=r"needs reward.custom_reward_function.path"):
        asyncio.run(started(config, tokenizer, [FakePython()]))


async def started(config, tokenizer, tools):
    return make_loop(config, tokenizer, None, tools)
