"""Protects what an evaluation is made with: which benchmark is whose, and which settings come from where."""

from __future__ import annotations

import pytest
from composition import compose_with_choices
from omegaconf import OmegaConf

from recipe.gtpo.evaluate.request import Request, check_task_keys, find_benchmarks, known, overrides_of, task_of
from recipe.gtpo.run.checks import check
from recipe.gtpo.run.environment import CONFIG_DIR
from recipe.gtpo.run.errors import ConfigError

pytestmark = pytest.mark.unit

NAMED = ("model=m", "benchmarks=aime24,gsm8k")


def test_a_command_line_is_read():
    request = Request.parse(
        [*NAMED, "samples=8", "compare=base", "temperature=0.6", "top_p=0.9", "rollout=vllm", "local=data", "seed=2"]
    )
    assert (request.model, request.benchmarks, request.samples, request.compare) == (
        "m",
        ("aime24", "gsm8k"),
        8,
        "base",
    )
    assert str(request.local) == "data"
    assert request.overrides == (
        "actor_rollout_ref.rollout.val_kwargs.temperature=0.6",
        "actor_rollout_ref.rollout.val_kwargs.top_p=0.9",
        "rollout=vllm",
        "seed=2",
    )


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (["benchmarks=aime24"], "model= is missing: a run's folder"),
        (["model=m"], "benchmarks= is missing: names with commas between them: arithmetic, .*aime24"),
        ([*NAMED, "samples=0"], "samples=0: a whole number, 1 or more"),
        ([*NAMED, "samples=many"], "samples=many: a whole number"),
        ([*NAMED, "concurrency=-1"], "concurrency=-1: a whole number"),
        ([*NAMED, "temperature=hot"], "temperature=hot: a number, 0 .* or more"),
        ([*NAMED, "temperature=-1"], "temperature=-1: a number"),
        ([*NAMED, "top_p=0"], "top_p=0: a number above 0, at most 1"),
        ([*NAMED, "top_p="], "top_p=: a number"),
        ([*NAMED, "compare="], "compare= has no value"),
        ([*NAMED, "samples"], "samples: samples= has no value"),
        ([*NAMED, "quickly"], "quickly: no KEY=VALUE"),
        (["model=m", "benchmarks=gsm8k,gsm8k"], "benchmarks=gsm8k,gsm8k: a name is there twice"),
        ([*NAMED, "compare=base", "endpoint=http://x/v1"], "an endpoint serves one model"),
        ([*NAMED, "served_model=x"], "served_model= and api_key_env= are of an endpoint"),
    ],
)
def test_a_command_line_that_means_nothing_is_refused_in_a_line(arguments, refusal):
    with pytest.raises(ConfigError, match=refusal) as e:
        Request.parse(arguments)
    assert "\n" not in str(e.value)


# -- benchmarks -------------------------------------------------------------------------------------------------------


def test_every_set_of_the_shipped_tasks_has_its_name():
    math = {"aime24": 32, "aime25": 32, "amc23": 32, "math500": 4, "olympiadbench": 4, "svamp": 1, "mawps": 1}
    others = {"gsm8k", "strategyqa", "commonsenseqa", "humaneval", "mbpp", "reasoning_gym", "arithmetic"}
    generators = {"chain_sum", "products", "lcm", "simple_equations"}
    found = known()
    assert found.keys() == math.keys() | others | generators
    assert {name: found[name].samples for name in math} == math and {found[name].task for name in math} == {"math"}
    assert found["mbpp"].task == found["humaneval"].task == "code" and found["strategyqa"].task == "commonsense"


def test_a_file_is_a_benchmark_of_the_runs_task(tmp_path):
    file = tmp_path / "mine.parquet"
    file.touch()
    (mine,) = find_benchmarks([str(file)], "gsm8k")
    assert (mine.name, mine.task, mine.file) == ("mine", "gsm8k", file)
    assert find_benchmarks([str(file)], None)[0].task == "verl_data"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.jsonl").touch()
    with pytest.raises(ConfigError, match="two benchmarks have the same name"):
        find_benchmarks([str(file), str(tmp_path / "other/mine.jsonl")], None)


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"benchmarks=aime23 is none: arithmetic, .*, or a \.parquet"):
        find_benchmarks(["aime23"], "math")
    with pytest.raises(ConfigError, match=r"benchmarks=/gone\.parquet does not exist"):
        find_benchmarks(["/gone.parquet"], None)


def test_a_task_of_ones_own_may_have_any_set():
    (own, itself) = find_benchmarks(["my_set", "products_task"], "products_task")
    assert (own.task, own.chosen, itself.chosen) == ("products_task", "my_set", None)


# -- settings ---------------------------------------------------------------------------------------------------------

RUN = (
    "task=gsm8k",
    "task.system=Think.",
    "method=grpo",
    "seed=7",
    "data.max_response_length=999",
    "actor_rollout_ref.model.path=Qwen/Qwen2.5-3B-Instruct",
    "actor_rollout_ref.model.trust_remote_code=true",
    "actor_rollout_ref.model.lora_rank=16",
    "actor_rollout_ref.actor.optim.lr=1e-5",
    "actor_rollout_ref.rollout.multi_turn.max_assistant_turns=3",
    "tool_server.packages=[numpy]",
    "tool_server.url=http://gone:1",
    "hardware=single_node",
    "rollout=vllm",
    "trainer.total_training_steps=5",
    "run_dir=outputs/x",
)


def composed(benchmark, *given, run=RUN, run_task="gsm8k"):
    request = Request.parse(["model=m", f"benchmarks={benchmark}", *given])
    (one,) = find_benchmarks(request.benchmarks, run_task)
    return compose_with_choices(*overrides_of(one, request, run, run_task))


def test_the_runs_own_task_keeps_the_runs_settings():
    config, _ = composed("gsm8k")
    assert (config.task.system, config.data.max_response_length, config.seed) == ("Think.", 999, 7)
    assert config.actor_rollout_ref.rollout.multi_turn.max_assistant_turns == 3
    assert (config.method, list(config.tool_server.packages)) == ("grpo", ["numpy"])
    assert config.actor_rollout_ref.model.trust_remote_code is True


def test_what_belongs_to_the_machine_or_to_training_stays_behind():
    config, choices = composed("gsm8k")
    assert (choices["hardware"], choices["rollout"]) == ("cpu", "transformers")
    assert config.tool_server.url is None and config.trainer.total_training_steps == 200
    model = config.actor_rollout_ref.model
    assert (model.path, model.lora_rank) == (None, 0) and config.actor_rollout_ref.actor.optim.lr == 1e-6


def test_another_task_has_its_own_settings_and_the_runs_model():
    config, choices = composed("math500")
    assert choices["task"] == "math" and config.task.system.startswith("Solve the problem step by step.")
    assert (config.data.max_response_length, config.method, config.seed) == (8192, "gtpo", 7)
    assert config.actor_rollout_ref.model.trust_remote_code is True and list(config.tool_server.packages) == ["numpy"]


def test_the_command_line_has_the_last_word():
    config, _ = composed("gsm8k", "seed=1", "data.max_response_length=64", "temperature=0", "task.system=No.")
    assert (config.seed, config.data.max_response_length, config.task.system) == (1, 64, "No.")
    assert config.actor_rollout_ref.rollout.val_kwargs.temperature == 0


def test_a_tasks_keys_are_for_that_task():
    given = ("task=gsm8k", "task.system=No.")
    request = Request.parse(["model=m", "benchmarks=gsm8k,math500", *given])
    both = find_benchmarks(request.benchmarks, "arithmetic")
    systems = [compose_with_choices(*overrides_of(one, request, (), "arithmetic"))[0].task.system for one in both]
    assert systems[0] == "No." and systems[1].startswith("Solve the problem")
    check_task_keys(both, request, "arithmetic")
    for run_task, of_nobody in (("arithmetic", "task.horizon=3"), ("gsm8k", "task.system=No.")):
        request = Request.parse(["model=m", "benchmarks=math500", of_nobody])
        with pytest.raises(ConfigError, match=rf"{of_nobody} is a key of task={run_task}, which no benchmark is of"):
            check_task_keys(find_benchmarks(request.benchmarks, run_task), request, run_task)


def test_a_generator_that_the_run_deleted_can_be_a_benchmark_or_stay_away():
    run = ("task=reasoning_gym", "~task.generators.lcm")
    for one in ("chain_sum", "lcm"):
        config, _ = composed(one, run=run, run_task="reasoning_gym")
        assert [name for name, value in config.task.generators.items() if value is not None] == [one]


def test_a_published_experiment_goes_with_its_task_only():
    run = ("experiment=horizon6",)
    config, _ = composed("arithmetic", run=run, run_task="arithmetic")
    assert config.task.horizon == 6
    _, choices = composed("gsm8k", run=run, run_task="arithmetic")
    assert choices["experiment"] is None


#: Keys that the files of model=smollm2 set, and an evaluation has to have as the run had them.
SET_BY_SMOLLM2 = (
    *("task", "tool_server.packages", "data.max_prompt_length", "data.max_response_length", "algorithm.gtpo"),
    *(f"actor_rollout_ref.rollout.{key}" for key in ("dtype", "multi_turn", "val_kwargs", "max_num_seqs")),
    *("actor_rollout_ref.model.override_config", "actor_rollout_ref.model.custom_chat_template", "reward"),
)
SMOLLM2_RUN = ("model=smollm2", "task=reasoning_gym", "trainer.save_freq=10")


def values(config):
    return {key: OmegaConf.select(config, key) for key in SET_BY_SMOLLM2}


@pytest.mark.parametrize("task", ["reasoning_gym", "verl_data"])
def test_a_run_of_model_smollm2_is_evaluated_with_all_that_this_sets(tmp_path, task):
    (own := tmp_path / "own.jsonl").touch()
    run = ("model=smollm2", f"task={task}", "trainer.save_freq=10")
    config, choices = composed(task if task == "reasoning_gym" else own, run=run, run_task=task)
    trained, _ = compose_with_choices(*run)
    assert (choices["model"], choices["model_task"]) == ("smollm2", f"smollm2_{task}")
    assert values(config) == values(trained)
    assert config.actor_rollout_ref.model.path is None  # filled with the checkpoint's


def test_the_group_model_goes_to_a_benchmark_of_another_task_too():
    config, choices = composed("gsm8k", run=SMOLLM2_RUN, run_task="reasoning_gym")
    trained, _ = compose_with_choices("model=smollm2", "task=gsm8k")
    assert choices["model"] == "smollm2" and values(config) == values(trained)
    config, choices = composed("gsm8k", run=(), run_task=None)
    assert choices["model"] is None  # `model=` of the evaluation's own command line is no group


def test_the_chat_template_of_a_run_is_kept():
    for benchmark in ("gsm8k", "math500"):
        config, choices = composed(benchmark, run=("task=gsm8k", "chat_template=qwen2_5"))
        template = (CONFIG_DIR / "chat_template/qwen2_5.jinja").read_text()
        assert config.actor_rollout_ref.model.custom_chat_template == template and choices["chat_template"] == "qwen2_5"


def test_a_group_of_the_users_own_is_found_where_the_run_found_it(tmp_path):
    """`model=mine --config-dir ...`: of such a command the run keeps the folder (`doctor.read_overrides`)."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("# @package _global_\ndata: {max_response_length: 77}\n")
    run = ("model=mine", "task=gsm8k", f"hydra.searchpath=[pkg://verl.trainer.config,file://{tmp_path}]")
    config, _ = composed("gsm8k", run=run)
    assert config.data.max_response_length == 77


def generators(config):
    """Those that make problems."""
    return [name for name, settings in config.task.generators.items() if settings is not None]


def test_one_generator_of_reasoning_gym():
    config, _ = composed("products", run=(), run_task=None)
    assert generators(config) == ["products"]
    config, _ = composed("reasoning_gym", run=(), run_task=None)
    assert generators(config) == ["chain_sum", "products", "lcm", "simple_equations"]


def test_one_generator_of_a_run_that_leaves_some_out():
    """model=smollm2 has no lcm: named as a benchmark, it is evaluated all the same."""
    for name in ("products", "lcm"):
        assert generators(composed(name, run=SMOLLM2_RUN, run_task="reasoning_gym")[0]) == [name]
    run = ("task=reasoning_gym", "task.generators.lcm=null", "+task.generators.products.min_digits=2")
    config, _ = composed("products", run=run, run_task="reasoning_gym")
    assert generators(config) == ["products"] and config.task.generators.products == {"min_digits": 2}


def test_all_benchmarks_compose_and_pass_the_checks_of_a_run():
    for name in known():
        config, choices = composed(name, run=(), run_task=None)
        config.actor_rollout_ref.model.path = "m"
        check(config, choices)
        OmegaConf.resolve(config)


def test_the_task_of_a_run():
    assert task_of(RUN, "arithmetic") == "gsm8k" and task_of(("seed=1",), "arithmetic") == "arithmetic"
