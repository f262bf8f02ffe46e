"""Protects an evaluation in the making: its problems, what its folder belongs to, and the failures that end it.

Real: config, data sets, agent loop, tools, records. Fake: the server that continues a conversation.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from omegaconf import OmegaConf
from published import gsm8k, write_jsonl
from scripted import CALL, RIGHT
from verl.workers.rollout.replica import TokenOutput

from recipe.gtpo.data.sources import SourceError
from recipe.gtpo.evaluate.entries import (
    check_entry,
    check_hardware,
    describe,
    fill,
    identity,
    make_entries,
    make_record,
)
from recipe.gtpo.evaluate.evaluation import Evaluation, TooManyLost
from recipe.gtpo.evaluate.models import Model, find_model
from recipe.gtpo.evaluate.report import settings_line
from recipe.gtpo.evaluate.request import Request
from recipe.gtpo.evaluate.rollout import in_parallel
from recipe.gtpo.run.checks import CONFIG_DIR
from recipe.gtpo.run.errors import ConfigError
from recipe.gtpo.run.identity import claim
from recipe.gtpo.run.record import RecordError, RunRecord
from recipe.gtpo.run.scoring import SPECIMEN
from recipe.gtpo.run.tools import environment
from recipe.gtpo.tasks.arithmetic.policy import TURN_END

pytestmark = pytest.mark.unit

ROW = {"data_source": "x", "prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": "5"}}
SUMS = [gsm8k("What is 2+3?", 5), gsm8k("What is 3+3?", 6), gsm8k("What is 2+3?", 5)]

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return 0.0 if {passes} else {{}}["no gold"]
"""


@pytest.fixture
def copies(tmp_path):
    """A folder as `local=` takes it."""
    write_jsonl(tmp_path / "copies/gsm8k/test.jsonl", SUMS)
    return tmp_path / "copies"


@pytest.fixture
def others(tmp_path):
    """Another one."""
    write_jsonl(tmp_path / "others/gsm8k/test.jsonl", [gsm8k("What is 4+4?", 8)])
    return tmp_path / "others"


def prepared(toy_policy, folder, *arguments):
    """The entries and everything around them, as the command makes them."""
    request = Request.parse([f"model={toy_policy}", f"run_dir={folder}", *arguments])
    model = find_model(request.model)
    entries = make_entries(request, model)
    record = make_record(request, model, entries)
    for entry in entries:
        fill(entry, record, request)
        check_entry(entry, [model], request)
        OmegaConf.resolve(entry.config)
    return entries, model, record, request


# -- the machine ------------------------------------------------------------------------------------------------------


def model_of_a_run_on(device, folder):
    RunRecord(folder).write_config({"trainer.device": device})
    return Model("run", str(folder / "merged"), folder / "checkpoints/global_step_3", folder)


@pytest.mark.parametrize(
    ("device", "given", "passes"),
    [
        ("cuda", [], False),
        ("cuda", ["rollout=vllm"], False),
        ("cuda", ["hardware=single_node", "rollout=vllm"], True),
        ("cuda", ["hardware=cpu"], True),
        ("cuda", ["endpoint=http://127.0.0.1:8000/v1"], True),
        ("cpu", [], True),
    ],
)
def test_a_run_on_gpus_is_not_evaluated_on_the_cpu_by_default(tmp_path, device, given, passes):
    trained = model_of_a_run_on(device, tmp_path / "run")
    request = Request.parse(["model=run", "benchmarks=gsm8k", *given])
    if passes:
        check_hardware([trained], request)
        return
    for models in ([trained], [trained, Model("base", "m")]):
        with pytest.raises(ConfigError, match=r"trainer\.device=cuda.*: give hardware=single_node rollout=vllm"):
            check_hardware(models, request)


def test_a_model_of_no_run_here_is_evaluated_on_the_default_hardware():
    check_hardware([Model("m", "Qwen/Qwen2.5-0.5B")], Request.parse(["model=m", "benchmarks=gsm8k"]))


# -- problems ---------------------------------------------------------------------------------------------------------


def test_a_set_is_written_for_the_evaluation_alone(toy_policy, tmp_path, copies, capsys):
    (entry,), _, record, _ = prepared(toy_policy, tmp_path / "out", "benchmarks=gsm8k", f"local={copies}")
    assert entry.files == [str(record.dir / "data/gsm8k.parquet")] and entry.samples == 4
    said = capsys.readouterr().out
    assert "gsm8k: 3 rows of" in said and "1 left out, the same problem as an earlier line: line 3" in said
    made = ["gsm8k.made_of.json", "gsm8k.parquet"]  # and no training set
    assert sorted(path.name for path in (record.dir / "data").iterdir()) == made
    (again,), _, _, _ = prepared(toy_policy, tmp_path / "out", "benchmarks=gsm8k", f"local={copies}")
    assert again.files == entry.files and "rows of" not in capsys.readouterr().out


def test_a_set_that_is_not_there_is_named(toy_policy, tmp_path, copies):
    with pytest.raises(ConfigError, match=r"svamp: local=.*copies has no svamp/test\.jsonl"):
        prepared(toy_policy, tmp_path / "out", "benchmarks=svamp", f"local={copies}")
    assert issubclass(SourceError, ValueError) and not (tmp_path / "out/data").exists()


def test_prepared_data_of_the_same_prompt_are_taken(toy_policy, tmp_path, copies):
    from recipe.gtpo.data.__main__ import run

    write_jsonl(copies / "gsm8k/train.jsonl", [gsm8k("What is 9+9?", 18)])
    folder = tmp_path / "prepared"
    run(["prepare", "task=gsm8k", f"local={copies}", f"out={folder}"])
    given = ("benchmarks=gsm8k", "task=gsm8k", f"task.folder={folder}")
    (entry,), _, _, _ = prepared(toy_policy, tmp_path / "out", *given)
    assert entry.files == [str(folder / "gsm8k.parquet")]
    (other,), _, record, _ = prepared(
        toy_policy, tmp_path / "other", *given, "task.system=Be quick.", f"local={copies}"
    )
    assert other.files == [str(record.dir / "data/gsm8k.parquet")]


def test_problems_that_an_earlier_start_made_of_something_else_are_made_again(toy_policy, tmp_path, copies, others):
    """That start got no further: with the first claim of the folder they stay (the next section)."""
    given = (toy_policy, tmp_path / "out", "benchmarks=gsm8k")
    prepared(*given, f"local={copies}", "task.system=Be slow.")
    for arguments, system, question in (
        ((f"local={copies}", "task.system=Be quick."), "Be quick.", "What is 2+3?"),
        ((f"local={others}", "task.system=Be quick."), "Be quick.", "What is 4+4?"),
    ):
        entries, model, record, request = prepared(*given, *arguments)
        Evaluation(entries, model, 0, record, request).load()
        about = describe(entries[0])
        assert about["system_message"] == system and about["first_prompt"][-1]["content"] == question


def test_the_embedded_task_needs_no_policy_of_its_own(toy_policy, tmp_path):
    """Making it takes minutes."""
    (entry,), _, _, _ = prepared(
        toy_policy,
        tmp_path / "out",
        "benchmarks=arithmetic",
        f"task.cache={tmp_path}/cache",
        "task.validation_problems=3",
    )
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["data"]
    assert entry.config.data.max_response_length and entry.config.actor_rollout_ref.model.path == str(toy_policy)


def test_a_system_message_may_be_a_list_of_parts(toy_policy, tmp_path, copies):
    entries, model, record, request = prepared(toy_policy, tmp_path / "out", "benchmarks=gsm8k", f"local={copies}")
    Evaluation(entries, model, 0, record, request).load()
    (entry,) = entries
    parts = [{"type": "text", "text": "Be quick."}]
    rows = [{"raw_prompt": [{"role": "system", "content": parts}]}] * 2
    assert json.loads(describe(replace(entry, rows=rows))["system_message"]) == parts


def test_what_a_benchmark_was_evaluated_with(toy_policy, tmp_path, copies):
    entries, model, record, request = prepared(
        toy_policy,
        tmp_path / "out",
        "benchmarks=gsm8k",
        f"local={copies}",
        "temperature=0.6",
        "data.max_prompt_length=900",
    )
    Evaluation(entries, model, 0, record, request).load()
    about = describe(entries[0])
    assert about["system_message"].startswith("Solve the problem step by step.")
    assert about["first_prompt"][-1] == {"role": "user", "content": "What is 2+3?"}
    assert (about["temperature"], about["turns"], about["task"]) == (0.6, 4, "gsm8k")
    assert settings_line({"gsm8k": about}, 1) == (
        "temperature 0.6, top_p 1, top_k -1, at most 4 turns and 2048 tokens; seed 1; 95% intervals over problems"
    )


def test_servers_hold_the_longest_trajectory_of_all_benchmarks(toy_policy, tmp_path, copies):
    names = ("benchmarks=arithmetic,gsm8k", f"local={copies}", "task=arithmetic", f"task.cache={tmp_path}/cache")
    entries, model, record, request = prepared(toy_policy, tmp_path / "out", *names)
    parts = [entry.config.actor_rollout_ref.rollout for entry in entries]
    server = Evaluation(entries, model, 0, record, request).server_config.actor_rollout_ref.rollout
    assert parts[0].prompt_length < parts[1].prompt_length and parts[0].response_length < parts[1].response_length
    assert (server.prompt_length, server.response_length) == (parts[1].prompt_length, parts[1].response_length)
    assert [part.multi_turn.max_assistant_turns for part in parts] == [5, 4]  # and each keeps its own limits


@pytest.mark.parametrize(
    ("engine", "limits", "context", "served"),
    [
        ("vllm", (None, None), 262144, "the longest"),
        ("vllm", (None, None), 50, 50),
        ("vllm", (None, 99), 262144, "that of the first"),
        ("vllm", (40, 99), 262144, 99),
        ("sglang", (None, None), 262144, None),
    ],
)
def test_servers_hold_no_more_than_a_trajectory_takes(toy_policy, tmp_path, copies, engine, limits, context, served):
    """vLLM's cache need not hold a model's whole context."""
    names = ("benchmarks=arithmetic,gsm8k", f"local={copies}", "task=arithmetic", f"task.cache={tmp_path}/cache")
    entries, model, record, request = prepared(toy_policy, tmp_path / "out", *names)
    parts = [entry.config.actor_rollout_ref.rollout for entry in entries]
    for part, limit in zip(parts, limits, strict=True):
        part.max_model_len, part.name = limit, engine
    for entry in entries:
        entry.config.trainer.device = "cuda"
        OmegaConf.update(
            entry.config, "actor_rollout_ref.model.override_config.max_position_embeddings", context, force_add=True
        )
    lengths = [part.prompt_length + part.response_length for part in parts]
    words = {"the longest": max(lengths), "that of the first": lengths[0]}
    server = Evaluation(entries, model, 0, record, request).server_config.actor_rollout_ref.rollout
    assert lengths[0] > 99 and server.max_model_len == words.get(served, served)


# -- the folder -------------------------------------------------------------------------------------------------------


def claimed(toy_policy, folder, *arguments):
    entries, model, record, request = prepared(toy_policy, folder, *arguments)
    claim(record, identity(entries, [model], request))
    return record


def test_the_folder_belongs_to_what_is_asked_for(toy_policy, tmp_path, copies):
    given = ("benchmarks=gsm8k", f"local={copies}", "data.max_prompt_length=900")
    record = claimed(toy_policy, tmp_path / "out", *given)
    claimed(toy_policy, tmp_path / "out", *given, "samples=9", "concurrency=3")  # more of the same
    claimed(toy_policy, tmp_path / "out", *given, "actor_rollout_ref.rollout.max_num_seqs=8")  # or with less memory
    assert record.read_config()["actor_rollout_ref.model.path"] == str(toy_policy)  # the viewer's tokenizer
    for other, named in (
        (["temperature=0.5"], "temperature=1.0 there, 0.5 here"),
        (["seed=2"], "seed=1 there, 2 here"),
    ):
        with pytest.raises(RecordError, match=named):
            claimed(toy_policy, tmp_path / "out", *given, *other)


def test_the_problems_of_a_claimed_folder_are_never_made_of_something_else(toy_policy, tmp_path, copies, others):
    """Samples may have been drawn on them. What is refused costs nothing: the first command still goes on."""
    given = (toy_policy, tmp_path / "out", "benchmarks=gsm8k")
    record = claimed(*given, f"local={copies}")
    file = record.dir / "data/gsm8k.parquet"
    before = file.read_bytes()
    for other, named in (
        ((f"local={others}",), f"local={copies} there, {others} here"),
        ((f"local={copies}", "task.system=Be quick."), r"settings\.system=Solve .* there, Be quick\. here"),
    ):
        with pytest.raises(ConfigError, match=rf"gsm8k\.parquet was made of something else: {named}\. Give this "):
            claimed(*given, *other)
        assert file.read_bytes() == before
    claimed(*given, f"local={copies}")
    (record.dir / "data/gsm8k.made_of.json").unlink()  # as it was before this was written down
    with pytest.raises(
        ConfigError, match=r"gsm8k\.parquet was made of something that is not written down\. Give this "
    ):
        claimed(*given, f"local={copies}")


def test_a_copy_in_the_place_of_prepared_problems_is_refused(toy_policy, tmp_path, copies, others):
    """Though the folder has no file of its own that could be compared."""
    from recipe.gtpo.data.__main__ import run

    write_jsonl(copies / "gsm8k/train.jsonl", [gsm8k("What is 9+9?", 18)])
    run(["prepare", "task=gsm8k", f"local={copies}", f"out={tmp_path}/prepared"])
    given = (toy_policy, tmp_path / "out", "benchmarks=gsm8k", "task=gsm8k", f"task.folder={tmp_path}/prepared")
    claimed(*given)
    with pytest.raises(RecordError, match=rf"evaluation\.local=None there, {others} here"):
        claimed(*given, f"local={others}")
    claimed(*given)


def test_other_problems_in_the_same_file_are_refused(toy_policy, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(ROW) + "\n")
    given = (f"benchmarks={file}", "task=arithmetic", f"task.cache={tmp_path}/cache", "task.validation_problems=1")
    claimed(toy_policy, tmp_path / "out", *given)
    file.write_text(2 * (json.dumps(ROW) + "\n"))
    with pytest.raises(RecordError, match=r"evaluation\.benchmarks\.mine\.problems="):
        claimed(toy_policy, tmp_path / "out", *given)


def test_an_edited_reward_function_is_refused(toy_policy, tmp_path, copies):
    """Also that of a benchmark which is not the first one: its samples would be scored by two functions."""
    (file := tmp_path / "mine.jsonl").write_text(json.dumps(ROW) + "\n")
    (reward := tmp_path / "reward.py").write_text(REWARD.format(passes="True"))
    given = (f"benchmarks=gsm8k,{file}", f"local={copies}", f"reward.custom_reward_function.path={reward}")
    record = claimed(toy_policy, tmp_path / "out", *given)
    hashed = [key for key in record.read_config() if key.endswith("custom_reward_function.sha256")]
    assert [key.partition("reward")[0] for key in hashed] == [
        "", "evaluation.benchmarks.gsm8k.", "evaluation.benchmarks.mine.",
    ]  # fmt: skip
    claimed(toy_policy, tmp_path / "out", *given, "samples=9")
    reward.write_text(REWARD.format(passes="1 == 1"))
    with pytest.raises(RecordError, match=rf"the reward function {reward} has changed since {record.dir} was begun"):
        claimed(toy_policy, tmp_path / "out", *given)


def test_without_a_folder_it_is_named_by_what_is_asked_for(toy_policy, tmp_path, monkeypatch, copies, others):
    monkeypatch.chdir(tmp_path)

    def named(*arguments):
        request = Request.parse([f"model={toy_policy}", *arguments])
        model = find_model(request.model)
        return make_record(request, model, make_entries(request, model)).dir

    plain = named("benchmarks=gsm8k")
    assert plain == tmp_path / f"outputs/evaluations/{toy_policy.name}-gsm8k"
    other = ("seed=2", "temperature=0.5", f"compare={toy_policy}", f"local={copies}", f"local={others}")
    assert len({plain, *(named("benchmarks=gsm8k", one) for one in other)}) == 6
    assert named("benchmarks=gsm8k", "samples=3") == plain
    assert named("benchmarks=gsm8k", "local=copies") == named("benchmarks=gsm8k", f"local={copies}")


# -- failures of ours -------------------------------------------------------------------------------------------------


class Server:
    """Says the same in every turn."""

    def __init__(self, tokenizer, text):
        self.ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.convert_tokens_to_ids(TURN_END)]

    async def generate(self, **_):
        return TokenOutput(token_ids=self.ids, stop_reason="completed")


@pytest.fixture
def evaluation(toy_policy, tmp_path):
    tools = OmegaConf.load(CONFIG_DIR / "tools" / "calculator.yaml")
    tools.tools[0].config.away_seconds = 0  # that nobody is there is said at once
    OmegaConf.save(tools, tmp_path / "tools.yaml")

    def make(*arguments):
        cache = (
            f"task.cache={tmp_path}/cache",
            "task.validation_problems=8",
            "data.max_response_length=256",
            f"actor_rollout_ref.rollout.multi_turn.tool_config_path={tmp_path}/tools.yaml",
        )
        made = prepared(toy_policy, tmp_path / "out", "benchmarks=arithmetic", *cache, *arguments)
        evaluation = Evaluation(made[0], made[1], 0, made[2], made[3])
        evaluation.load()
        return evaluation

    return make


def rolled_out(evaluation, text):
    async def run():
        await evaluation._all(Server(evaluation.model_config.tokenizer, text), 2)
        return await evaluation.results()

    with environment({"GTPO_TOOL_SERVER_URL": "http://127.0.0.1:9"}):  # where nobody is
        return asyncio.run(run())["arithmetic"]


def test_an_evaluation_whose_tool_server_is_gone_ends_with_the_cause(evaluation):
    broken = evaluation()
    said = r"5 of 8 samples of arithmetic were failed by the tool server \(max_dropped_share=0.5\): "
    with pytest.raises(
        TooManyLost, match=said + r"http://127\.0\.0\.1:9: ClientConnectorError: Cannot connect to host"
    ):
        rolled_out(broken, '<tool_call>{"name": "python", "arguments": {"code": "1+1"}}</tool_call>')
    again = evaluation()  # nothing of it was kept
    assert len(again.missing(again.entries[0])) == 8


def test_fewer_failures_are_counted_and_left_out_of_the_scores(evaluation):
    found = rolled_out(evaluation("max_dropped_share=1.0"), CALL)
    assert (found.counts["infra"], found.counts["scored"], found.values["mean@1"]) == (8, 0, {})


def test_a_second_start_is_judged_by_all_samples_and_not_by_what_was_left(evaluation):
    """One program in eight that always fails on our side: no start ends over it, and each has its report."""
    first = evaluation()
    rolled_out(first, RIGHT)
    lines = list(first.record.read_whole_lines(0, split="validation"))
    first.record.write_trajectories(0, lines[:-1], split="validation")  # the eighth failed
    again = evaluation()
    assert len(again.missing(again.entries[0])) == 1
    found = rolled_out(again, CALL)
    assert (found.counts["infra"], found.counts["scored"]) == (1, 7)


@pytest.fixture
def rewarded(evaluation, tmp_path):
    """What the reward function passes, as code -> an evaluation with it."""

    def make(passes: str):
        (tmp_path / "reward.py").write_text(REWARD.format(passes=passes))
        return evaluation(f"reward.custom_reward_function.path={tmp_path}/reward.py")

    return make


def test_a_reward_function_that_raises_ends_it_with_the_row(rewarded):
    with pytest.raises(
        TooManyLost,
        match=r"1 samples are lost \(max_lost_trajectories=0\): row \d of the data files .arithmetic.: .*KeyError",
    ):
        rolled_out(rewarded(f"solution_str == {SPECIMEN!r}"), RIGHT)


def test_a_reward_function_that_always_raises_is_refused_before_anything_is_sampled(rewarded):
    with pytest.raises(ConfigError, match=r"compute_score raised KeyError: 'no gold' \(asked about row 0 of data"):
        rewarded("False")


def test_a_whole_evaluation_with_records(evaluation):
    """The answer is the same for all problems: 5 is right for those whose sum it is."""
    done = evaluation("samples=2")
    found = rolled_out(done, RIGHT)
    lines = list(RunRecord(done.record.dir).read_whole_lines(0, split="validation"))
    assert len(lines) == 16 and found.counts["scored"] == 16 and done.complete
    right = {line["index"] for line in lines if line["gold"] == "5"}
    assert {index for index, value in found.values["mean@2"].items() if value == 1.0} == right


@pytest.mark.parametrize("number", ["3100 + 100 * item", "0"], ids=["numbers of its own", "none"])
def test_samples_go_by_the_place_of_a_row_whatever_its_class_calls_it(evaluation, tmp_path, number):
    (tmp_path / "own.py").write_text(
        "from verl.utils.dataset.rl_dataset import RLHFDataset\n"
        "class Own(RLHFDataset):\n"
        "    def __getitem__(self, item):\n"
        f"        return super().__getitem__(item) | {{'index': {number}}}\n"
    )
    given = ("samples=2", f"data.custom_cls.path={tmp_path}/own.py", "data.custom_cls.name=Own")
    done = evaluation(*given)
    found = rolled_out(done, RIGHT)
    assert found.counts["scored"] == 16 and sorted(found.values["mean@2"]) == list(range(8))
    lines = list(done.record.read_whole_lines(0, split="validation"))
    assert sorted((line["index"], line["session"]) for line in lines) == [(i, j) for i in range(8) for j in range(2)]
    assert done.complete and evaluation(*given).complete  # and a second start finds them


def test_one_that_raises_ends_the_others():
    ended = []

    async def work(job):
        if job == 3:
            raise KeyError(job)
        try:
            await asyncio.sleep(0 if job < 2 else 60)
        finally:
            ended.append(job)

    with pytest.raises(KeyError):
        asyncio.run(in_parallel(range(10), work, 3))
    assert sorted(ended) == [0, 1, 2, 4] or sorted(ended) == [0, 1, 2]
