"""What there is to imitate: every published form becomes the same chat messages, and what cannot be learned from is
left out with its reason."""

from __future__ import annotations

import json

import pytest
from composition import compose

from recipe.gtpo.data.overlap import Known
from recipe.gtpo.parsing import parse_calls
from recipe.gtpo.sft import cold_start
from recipe.gtpo.sft.sources import collect, open_source
from recipe.gtpo.sft.transcripts import NoTranscriptError, call_text, check, from_record, question, read, with_system
from recipe.gtpo.tasks.task import OwnData, load_task
from verl_ext.records.schema import Record
from verl_ext.tools.schema import python_schema

pytestmark = pytest.mark.unit

SCHEMAS = {"python": python_schema()["function"]["parameters"]}
SOLVED = """First I add.
<code>
```python
s = 3 + 4
print(s)
```
</code>
<interpreter>
7
</interpreter>
Then I double it.
<code>print(2 * 7)</code><interpreter>14</interpreter>
<answer>
The answer is \\boxed{14}.
</answer>"""
RETOOL = {
    "messages": [
        {"role": "user", "content": "Solve step by step.\n\n*user question:*\nTwice 3+4? Answer in <answer></answer>."},
        {"role": "assistant", "content": SOLVED},
    ]
}


def test_retool_s_text_becomes_turns_and_tool_messages():
    messages = read(RETOOL)
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert messages[0]["content"] == "Twice 3+4? Answer in ."
    assert [m["content"] for m in messages if m["role"] == "tool"] == ["7", "14"]
    assert messages[-1]["content"] == "The answer is \\boxed{14}."
    first, second = (parse_calls(messages[i]["content"], SCHEMAS, cut=False) for i in (1, 3))
    assert first[0].arguments == {"code": "s = 3 + 4\nprint(s)"} and first[0].error is None
    assert second[0].arguments == {"code": "print(2 * 7)"}
    assert messages[1]["content"].startswith("First I add.\n<tool_call>")
    check(messages)


def test_retool_without_an_interpreter_is_no_transcript():
    broken = {"messages": [RETOOL["messages"][0], {"role": "assistant", "content": "<code>print(1)</code> and so on"}]}
    with pytest.raises(NoTranscriptError, match="without an <interpreter>"):
        read(broken)


def test_structured_calls_become_what_the_policy_writes_and_nulls_of_parquet_go():
    call = {"type": "function", "function": {"name": "python", "arguments": {"code": "1+1", "other": None}}}
    row = {
        "messages": [
            {"role": "user", "content": "1+1?", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "\\boxed{2}"},
        ]
    }
    messages = read(row)
    assert messages[1]["content"] == call_text("python", {"code": "1+1"})
    assert messages[1]["content"] == '<tool_call>\n{"name": "python", "arguments": {"code": "1+1"}}\n</tool_call>'
    as_text = {"name": "python", "arguments": '{"code": "1+1"}'}  # as OpenAI's API has it
    row["messages"][1] = {"role": "assistant", "content": "", "tool_calls": [as_text]}
    assert read(row) == messages


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "1+1?", "answer": "2"}, r"no column `messages` .*question, answer"),
        ({"messages": []}, "no column"),
        ({"messages": [{"role": "ipython", "content": "2"}]}, "role 'ipython'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "no text"),
        ({"messages": ["1+1?"]}, "not as chat messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "python"}]}]}, "not as chat messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "python", "arguments": "{"}]}]}, "not as chat"),
    ],
)
def test_other_rows_are_refused_with_the_reason(row, reason):
    with pytest.raises(NoTranscriptError, match=reason):
        read(row)


def test_sharegpt_s_words_are_read():
    turns = [("system", "s"), ("human", "1+1?"), ("gpt", "2"), ("observation", "3")]
    messages = read({"conversations": [{"from": who, "value": text} for who, text in turns]})
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "s"),
        ("user", "1+1?"),
        ("assistant", "2"),
        ("tool", "3"),
    ]
    with pytest.raises(NoTranscriptError, match="role 'function_call'"):
        read({"conversations": [{"from": "function_call", "value": "{}"}]})


def said(*roles: str, call: bool = True) -> list[dict[str, str]]:
    texts = {"assistant": call_text("python", {"code": "1"}) if call else "2"}
    return [{"role": role, "content": texts.get(role, role)} for role in roles]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (said("user", "assistant", "tool"), "last message"),
        (said("assistant"), "no message of the user"),
        (said("user", "assistant", call=False), "no tool call"),
        (said("user", "tool", "assistant"), "did not ask"),
        (said("user", "assistant", "tool", "tool", "assistant"), "did not ask"),
        ([*said("user", "assistant", "tool"), *said("assistant", "tool", "assistant", call=False)], "did not ask"),
    ],
)
def test_what_is_no_conversation_with_a_tool_is_left_out(messages, reason):
    with pytest.raises(NoTranscriptError, match=reason):
        check(messages)


def record(acc: float = 1.0, finish: str = "answer", **first) -> Record:
    call = {"name": "python", "arguments": {"code": "1+1"}}
    outcome = {"outcome": "ok", "output": "2\n", "seconds": 0.1}
    turn = {"start": 0, "end": 5, "text": call_text("python", {"code": "1+1"}), "calls": [call], "outcomes": [outcome]}
    return Record.model_validate(
        {
            "group": "a",
            "prompt": [{"role": "user", "content": "1+1?"}],
            "turns": [turn | first, {"start": 9, "end": 12, "text": "\\boxed{2}"}],
            "finish": finish,
            "acc": acc,
        }
    )


def test_every_call_of_a_turn_has_its_tool_message():
    calls = [{"name": "python", "arguments": {"code": code}} for code in ("1+1", "2+2")]
    outcomes = [{"outcome": "ok", "output": output, "seconds": 0.1} for output in ("2\n", "4\n")]
    text = "\n".join(call_text(call["name"], call["arguments"]) for call in calls)
    messages = from_record(record(text=text, calls=calls, outcomes=outcomes))
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    check(messages)
    asked = {"role": "assistant", "content": None, "tool_calls": calls}
    check(read({"messages": [messages[0], asked, *messages[2:]]}))


def test_rejection_sampling_keeps_what_solved_its_problem_without_a_fault():
    messages = from_record(record())
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[2]["content"] == "2\n"
    check(messages)
    for unfit, reason in (
        (record(acc=0.0), "not solved"),
        (record(finish="length"), "not solved"),
        (record(broken="unknown_tool"), "breaks the format"),
        (record(calls=[]), "no tool call"),
    ):
        with pytest.raises(NoTranscriptError, match=reason):
            from_record(unfit)


def test_one_transcript_a_problem_none_of_a_held_out_one_and_every_loss_is_said():
    def transcript(asked):
        return [{"role": "user", "content": asked}, *said("assistant", "tool", "assistant")]

    def raising():
        raise NoTranscriptError("not solved")

    found = [lambda a=a: transcript(a) for a in ("A?", "a", "B", "C", "D")] + [raising]
    lines: list[str] = []
    held_out = Known()
    held_out.add(" b ", "mine")
    kept = collect(found, count=None, system="Be brief.", held_out=held_out, say=lines.append)
    assert [question(one) for one in kept] == ["A?", "C", "D"]
    assert all(one[0] == {"role": "system", "content": "Be brief."} for one in kept)
    assert lines == [
        "3 transcripts (1 left out: another transcript of the same problem; 1 left out: its problem is, exactly, one "
        "of the held-out ones; 1 left out: not solved)"
    ]
    assert len(collect(found, count=2, system=None, held_out=Known(), say=lines.append)) == 2
    with pytest.raises(ValueError, match=r"no transcript.*not solved"):
        collect([raising], count=None, system=None, held_out=Known(), say=lines.append)


HELD_OUT = "A train leaves at noon and goes 60 miles an hour for 3 hours: how many miles has it gone by then?"
FRAMED = f"Answer the following Math Problem and box it. *user question:*\n{HELD_OUT}\nThink step by step, please."


@pytest.mark.parametrize("task", ["task=math task.folder=somewhere", "task=arithmetic"])
def test_a_held_out_problem_in_a_frame_of_instructions_is_known(task, tmp_path):
    """Only where problems are published ones: own prompts may share most of their words."""
    config = compose(*task.split())
    rows = tmp_path / "held_out.jsonl"
    rows.write_text(json.dumps({config.data.prompt_key: [{"role": "user", "content": HELD_OUT}]}) + "\n")
    config.data.val_files = [str(rows)]
    known = cold_start._held_out(config, load_task(config))
    transcript = [{"role": "user", "content": FRAMED}, *said("assistant", "tool", "assistant")]

    def collected():
        return collect([lambda: transcript], count=None, system=None, held_out=known, say=lambda _: None)

    if "math" in task:
        with pytest.raises(ValueError, match="its problem is, in part, one of the held-out ones"):
            collected()
    else:
        assert len(collected()) == 1
    transcript[0] = {"role": "user", "content": HELD_OUT.upper()}
    with pytest.raises(ValueError, match="its problem is, exactly, one of the held-out ones"):
        collected()


def test_a_system_message_of_the_transcript_s_own_stays():
    own = [{"role": "system", "content": "Mine."}, *said("user", "assistant")]
    assert with_system(own, "Yours.") == own


def test_sources_that_there_are_not(tmp_path):
    task = OwnData(name="own")
    for source, reason in (
        (str(tmp_path), "without a run's records"),
        ("/nowhere/at.jsonl", "is not there"),
        ("nowhere.parquet", "is not there"),
        ("teacher", "task=own has no teacher"),
    ):
        with pytest.raises(ValueError, match=reason):
            list(open_source(source, task, str))


def test_a_set_of_the_hub_may_have_a_config(monkeypatch):
    asked = []

    def load(name, config, split, streaming):
        asked.append((name, config, split))
        return [{"messages": said("user", "assistant")}]

    monkeypatch.setattr("datasets.load_dataset", load)
    for source in ("owner/name", "owner/name-1.5:tools"):
        (one,) = open_source(source, None, None)
        assert [message["role"] for message in one()] == ["user", "assistant"]
    assert asked == [("owner/name", None, "train"), ("owner/name-1.5", "tools", "train")]


def test_a_local_file_and_a_run_s_folder_are_read(tmp_path):
    import json

    (tmp_path / "retool.jsonl").write_text(json.dumps(RETOOL) + "\n")
    (one,) = open_source(str(tmp_path / "retool.jsonl"), OwnData(name="own"), str)
    assert one() == read(RETOOL)
    (tmp_path / "trajectories").mkdir()
    (tmp_path / "trajectories" / "1.jsonl").write_text(record().model_dump_json(by_alias=True) + "\n")
    (one,) = open_source(str(tmp_path), OwnData(name="own"), str)
    assert one() == from_record(record())
