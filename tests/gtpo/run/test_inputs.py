"""What a run is given is looked at before it starts: a fault is one line with its cause and its remedy.

The machine, words that verl looks up late, the reward function, the data. The model: test_model.py.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from composition import compose, compose_with_choices
from omegaconf import DictConfig, OmegaConf, open_dict

from recipe.gtpo.run.checks import check
from recipe.gtpo.run.errors import ConfigError
from recipe.gtpo.run.inputs import ask_reward, check_data, check_machine, check_reward, expand_paths
from recipe.gtpo.tasks.task import OwnData, load_task, make_row, write_parquet

pytestmark = pytest.mark.unit


def refusal(function, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    return str(caught.value)


# -- the machine ------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch, tmp_path):
    ray = ("RAY_TMPDIR", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    for name in (*ray, "TMPDIR", "HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def test_a_machine_as_it_should_be_passes(machine):
    check_machine(compose())


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_too_long_for_rays_sockets_is_refused(machine, variable):
    with tempfile.TemporaryDirectory(dir="/tmp") as base:
        folder = Path(base) / ("x" * 60)
        folder.mkdir()
        machine.setenv(variable, str(folder))
        message = refusal(check_machine, compose())
    assert message.startswith(f"Ray's temporary folder {folder}/ray is ")
    assert message.endswith(
        " bytes too long for its sockets: set RAY_TMPDIR to a short folder, for example RAY_TMPDIR=/tmp"
    )


def test_the_length_is_counted_as_ray_counts_it(machine):
    """The longest folder that passes makes the longest socket that Ray accepts."""
    from ray._private.utils import validate_socket_filepath

    session = f"session_2026-12-31_23-59-59_123456_{os.getpid()}"

    def socket(folder: str) -> str:
        return f"{folder}/ray/{session}/sockets/plasma_store"

    longest = "/tmp/".ljust(107 - len(socket("")), "y")
    validate_socket_filepath(socket(longest))
    with pytest.raises(OSError, match="AF_UNIX path length"):
        validate_socket_filepath(socket(longest + "y"))
    machine.setenv("TMPDIR", longest)
    check_machine(compose())
    machine.setenv("TMPDIR", longest + "y")
    assert "is 1 bytes too long" in refusal(check_machine, compose())


def test_a_running_cluster_has_its_own_folder(machine, tmp_path):
    machine.setenv("TMPDIR", "/tmp/" + "x" * 90)
    check_machine(compose("hardware=multi_node", "rollout=vllm", "tool_server.url=http://tools:8000"))
    machine.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_machine(compose())


def test_a_home_that_cannot_be_written_to_is_refused(machine, tmp_path):
    (tmp_path / "file").touch()
    home = tmp_path / "file" / "home"  # permissions do not stop root, this does
    machine.setenv("HOME", str(home))
    assert refusal(check_machine, compose()) == (
        f"the folder of the token that Ray makes, {home}/.ray, is not writable (Not a directory): set HOME to a folder "
        "that is, or RAY_AUTH_MODE=disabled"
    )
    machine.setenv("RAY_AUTH_MODE", "disabled")
    message = refusal(check_machine, compose())
    assert message == (
        f"the folder in which Hugging Face's datasets are cached, {home}/.cache/huggingface/datasets, is not writable "
        "(Not a directory): set HF_HOME to a folder that is, or HOME"
    )
    machine.setenv("HF_HOME", str(tmp_path / "cache"))
    check_machine(compose())
    machine.setenv("TMPDIR", "/proc")
    assert refusal(check_machine, compose()).startswith("Ray's temporary folder, /proc/ray, is not writable (")


# -- words that verl looks up late ------------------------------------------------------------------------------------


@pytest.mark.parametrize("override", ["trainer.test_freq=ten", "data.train_batch_size=4.5", "seed=true"])
def test_a_count_that_is_no_whole_number_is_refused(override):
    key, value = override.split("=")
    shown = {"true": "True"}.get(value, value)
    assert refusal(check, *compose_with_choices(override)) == f"{key}={shown}: a whole number is needed"


@pytest.mark.parametrize(
    ("key", "values", "remedy"),
    [
        ("trajectory_freq", (0, -1, None, True), "; one above the last step records none"),  # -1: verl's word for never
        ("trajectory_keep", (0, -1, "all"), ", or null, which keeps all"),
    ],
)
def test_how_many_trajectories_are_recorded_is_at_least_one(key, values, remedy):
    """Before anything starts: a freq of 0 divides by it after the first rollouts, a keep of 0 would keep all."""
    config, choices = compose_with_choices()
    for value in values:
        config[key] = value
        assert refusal(check, config, choices) == f"{key}={value}: a whole number, at least 1{remedy}"
    config[key] = 1
    check(config, choices)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "algorithm.adv_estimator=gtop",
            "algorithm.adv_estimator=gtop is none that verl has. Did you mean gtpo? Valid: gae, ",
        ),
        (
            "trainer.logger=[console,tensorbord]",
            "trainer.logger=tensorbord is none that verl has. Did you mean tensorboard? Valid: clearml, console, ",
        ),
        ("trainer.logger=wanbd", "trainer.logger=wanbd is none that verl has. Did you mean wandb? Valid: clearml, "),
        (
            "trainer.resume_mode=never",
            "trainer.resume_mode=never is none that verl has. Valid: auto, disable, resume_path",
        ),
    ],
)
def test_a_typo_is_refused_with_the_valid_words(override, message):
    assert refusal(check, *compose_with_choices(override)).startswith(message)


def test_a_logger_whose_package_is_absent_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal(check, *compose_with_choices("trainer.logger=[console,wandb]")) == (
        "trainer.logger=wandb: the package wandb is not installed; pip install it"
    )
    check(*compose_with_choices("trainer.logger=console"))


# -- the reward function ----------------------------------------------------------------------------------------------

REWARD = """
import os

def compute_score(data_source, solution_str, ground_truth, extra_info=None, strict=False):
    return 1.0

THRESHOLD = 3
"""


@pytest.fixture
def reward(tmp_path):
    """(code of the file, name, further keys) -> config."""

    def write(code=REWARD, name="compute_score", **kwargs) -> DictConfig:
        (tmp_path / "my_reward.py").write_text(code)
        config = compose("task=verl_data")
        section = {"path": f"{tmp_path}/my_reward.py", "name": name}
        with open_dict(config):
            config.reward.custom_reward_function = section | ({"reward_kwargs": kwargs} if kwargs else {})
        return config

    return write


def check_own(config):
    check_reward(config, OwnData(name="verl_data"))


def test_a_reward_function_passes(reward):
    check_own(reward())
    check_own(reward(strict=True))
    check_own(reward("compute_score = max"))  # of a built-in function nothing is known
    check_reward(compose(), load_task(compose()))  # task=arithmetic scores itself


def test_no_reward_function_is_named_by_its_key():
    assert refusal(check_own, compose("task=verl_data")).startswith("reward.custom_reward_function.path is not set")


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("def compute_score(:\n", "compute_score", "{path}, line 1, is no Python: "),
        ("\n\nx = = 3\n", "compute_score", "{path}, line 3, is no Python: invalid syntax"),
        (REWARD, "compute_scor", "{path} has no such function; it has compute_score"),
        ("x = 1", "compute_score", "{path} has no such function; it has none"),
        (
            "import no_such_package",
            "compute_score",
            "{path} cannot be loaded: ModuleNotFoundError: No module",
        ),
        (
            "import os\nos.nothing()",
            "f",
            "{path} cannot be loaded: AttributeError: module 'os' has no",
        ),
        ("raise SystemExit('no GPU')", "compute_score", "{path} cannot be loaded: SystemExit: no GPU"),
        (REWARD, "THRESHOLD", "in {path}: THRESHOLD is no function, but of type int"),
        (
            "def compute_score(text): ...",
            "compute_score",
            "reward.custom_reward_function: compute_score cannot be called with data_source, solution_str, "
            "ground_truth, extra_info by keyword: ",
        ),
        (
            "def compute_score(data_source, solution_str, ground_truth): ...",
            "compute_score",
            "by keyword: got an unexpected keyword argument 'extra_info'",
        ),
    ],
)
def test_a_reward_function_that_cannot_be_asked_is_refused(reward, tmp_path, code, name, message):
    assert message.format(path=f"{tmp_path}/my_reward.py") in refusal(check_own, reward(code, name))


def test_an_argument_that_the_reward_function_has_not_got_is_refused(reward):
    assert refusal(check_own, reward(stric=True)).endswith("got an unexpected keyword argument 'stric'")


def test_a_reward_file_that_is_not_there_is_refused(reward, tmp_path):
    config = reward()
    (tmp_path / "my_reward.py").unlink()
    assert refusal(check_own, config) == f"reward.custom_reward_function.path={tmp_path}/my_reward.py does not exist"


def test_of_a_relative_path_it_is_said_where_it_was_looked_for(reward, data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = reward()
    config.reward.custom_reward_function.path = "absent.py"
    assert refusal(check_own, config).endswith(f"absent.py does not exist in {tmp_path}: give an absolute path")
    config = data()
    config.data.train_files = "absent.parquet"
    said = f"data.train_files: absent.parquet does not exist in {tmp_path}: give an absolute path; its columns: "
    assert data_refusal(config).startswith(said)


ASKED = """
import asyncio

async def judge(data_source, solution_str, ground_truth, extra_info):
    if data_source == "slow":
        await asyncio.Event().wait()
    return {"score": 0.5} if ground_truth else [solution_str]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if data_source == "slow":
        while True: pass
    return float(ground_truth) * extra_info["weight"] if data_source == "numbers" else ground_truth
"""


@pytest.fixture
def ask(reward, data):
    """(rows, name of the function, further keys of the config) -> None; asks as a run does."""

    def run(rows, name="compute_score", **keys) -> None:
        config = reward(ASKED, name)
        for key in ("train_files", "val_files"):
            config.data[key] = data(rows, "asked.jsonl").data.train_files
        for key, value in keys.items():
            config[key] = value
        ask_reward(config, check_data(config, lambda text: None))

    return run


def rows_of(source, gold, count=200):
    prompt = [{"role": "user", "content": "?"}]
    asked = {"data_source": source, "reward_model": {"ground_truth": gold}, "extra_info": {"weight": 2}}
    return [{"prompt": prompt, **asked}] * count


@pytest.mark.parametrize("name", ["compute_score", "judge"])
def test_a_reward_function_that_answers_with_an_outcome_passes(ask, name):
    ask(rows_of("numbers", "3") + rows_of("words", 1.0), name)


@pytest.mark.parametrize(
    ("rows", "name", "cause"),
    [
        (
            rows_of("numbers", "3") + rows_of("words", "three"),
            "compute_score",
            "the reward function returned 'three': an outcome is a finite number, .* [(]asked about row 200 of data",
        ),
        (
            rows_of("numbers", "three"),
            "compute_score",
            "the reward function compute_score raised ValueError: could not convert string to float: 'three' "
            "[(]asked about row 0 of data.train_files: .*asked.jsonl with solution_str='I am not sure",
        ),
        (
            rows_of("any", ""),
            "judge",
            r"the reward function returned \['I am not sure. .* [(]asked about row 0 of data",
        ),
    ],
)
def test_one_that_would_lose_trajectories_is_refused_before_a_run(ask, rows, name, cause):
    with pytest.raises(ConfigError, match=f"^reward.custom_reward_function: {cause}"):
        ask(rows, name)


def test_a_row_without_reward_model_is_named_where_the_reward_function_fails(ask):
    with pytest.raises(ConfigError, match=r"'NoneType'.*; the row has no reward_model, so ground_truth was None[)]$"):
        ask([{"prompt": row["prompt"], "data_source": "numbers"} for row in rows_of("numbers", "3")])


@pytest.mark.parametrize("name", ["compute_score", "judge"])
def test_a_reward_function_that_hangs_is_ended_and_named(ask, name):
    with pytest.raises(ConfigError, match=r"took longer than reward_timeout_seconds=0\.5 and was ended"):
        ask(rows_of("slow", "1"), name, reward_timeout_seconds=0.5)


# -- paths ------------------------------------------------------------------------------------------------------------


def test_the_home_folder_and_a_slash_at_the_end_are_understood(reward, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = reward()
    config.reward.custom_reward_function.path = "~/my_reward.py"
    config.actor_rollout_ref.model.path = "~/model//"
    config.actor_rollout_ref.rollout.multi_turn.tool_config_path = "~/tools.yaml"
    config.data.train_files, config.data.val_files = "~/train.parquet", ["~/a.parquet", "/b.parquet"]
    expand_paths(config)
    check_own(config)
    assert config.actor_rollout_ref.model.path == f"{tmp_path}/model"
    assert config.actor_rollout_ref.rollout.multi_turn.tool_config_path == f"{tmp_path}/tools.yaml"
    assert config.data.train_files == f"{tmp_path}/train.parquet"
    assert config.data.val_files == [f"{tmp_path}/a.parquet", "/b.parquet"]


def test_a_hub_name_and_what_is_not_set_stay(reward):
    config = compose("task=verl_data", "actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct/")
    expand_paths(config)
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen2.5-7B-Instruct"
    assert config.data.train_files is None and config.reward.custom_reward_function.path is None


# -- data -------------------------------------------------------------------------------------------------------------

ROWS = [make_row("sums", i, f"What is {i}+1?", str(i + 1)) for i in range(200)]


@pytest.fixture
def data(tmp_path):
    """(rows, file name, overrides) -> config, with the same rows for both keys."""

    def write(rows=ROWS, name="rows.parquet", *overrides) -> DictConfig:
        file = tmp_path / name
        if isinstance(rows, (str, bytes)):
            file.write_bytes(rows.encode() if isinstance(rows, str) else rows)
        elif name.endswith(".parquet"):
            write_parquet(rows, file)
        elif name.endswith(".jsonl"):
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            file.write_text(json.dumps(rows))
        return compose("task=verl_data", f"data.train_files={file}", f"data.val_files={file}", *overrides)

    return write


def data_refusal(config) -> str:
    return refusal(check_data, config, lambda text: None)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.json"])
def test_the_number_of_rows_is_said_and_the_prompts_are_handed_on(data, name):
    said = []
    prompts = check_data(data(ROWS, name), said.append)
    assert said == ["200 training rows, 200 validation rows"]
    assert len(prompts) == 400 and prompts[3].messages == ROWS[3]["prompt"] and prompts[3].roles == ("user",)


def test_what_verl_counts_is_counted(data, tmp_path):
    config = data(ROWS, "rows.parquet", "data.train_max_samples=150")
    config.data.val_files = [config.data.val_files, write_parquet(ROWS[:9], tmp_path / "more.parquet")]
    said = []
    check_data(config, said.append)
    assert said == ["150 training rows, 209 validation rows"]


@pytest.mark.parametrize("overrides", [[], ["data.train_max_samples=100"]], ids=["few", "limited"])
def test_fewer_rows_than_a_batch_are_refused(data, overrides):
    config = data(ROWS[:100] if not overrides else ROWS, "rows.jsonl", *overrides)
    assert data_refusal(config) == (
        "data.train_files has 100 rows, fewer than one batch of data.train_batch_size=128: give more rows, or set "
        "data.train_batch_size and actor_rollout_ref.actor.ppo_mini_batch_size to 100 or less"
    )


def test_files_without_a_row_or_no_file_are_refused(data, tmp_path):
    config = data()
    config.data.val_files = str(tmp_path / "none.jsonl")
    Path(config.data.val_files).write_text("\n")
    assert data_refusal(config).startswith("data.val_files has no row; ")
    config.data.train_files = []
    assert data_refusal(config).startswith("data.train_files is empty: at least one parquet or jsonl file")
    config.data.train_files = None
    assert data_refusal(config).startswith("data.train_files is not set: a parquet or jsonl file")


@pytest.mark.parametrize("key", ["train_files", "val_files"])
def test_a_missing_data_file_is_named_with_its_key(data, tmp_path, key):
    config = data()
    config.data[key] = [config.data.train_files, str(tmp_path / "absent.parquet")]
    assert data_refusal(config).startswith(f"data.{key}: {tmp_path}/absent.parquet does not exist; its columns: README")


@pytest.mark.parametrize(
    ("rows", "name", "message"),
    [
        ("question,answer\n1,2\n", "rows.csv", "is neither .parquet nor .jsonl or .json, and verl goes by the name"),
        ("question,answer\n1,2\n", "rows.parquet", "is no parquet file: ArrowInvalid: Parquet magic bytes not found"),
        ("", "rows.parquet", "is no parquet file: ArrowInvalid: Parquet file size is 0 bytes"),
        ('{"prompt": []}\n{"prompt": [}\n', "rows.jsonl", ", line 2, is no JSON: Expecting value, at character 12"),
        ("[1, 2", "rows.json", "is no JSON: Expecting ',' delimiter, at character 5"),
        ("3\n", "rows.jsonl", ", line 1, is no JSON object, but of type int"),
        (b"\xff\xfe{}", "rows.jsonl", "is no text in UTF-8: "),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(data, tmp_path, rows, name, message):
    said = data_refusal(data(rows, name))
    assert said.startswith(f"data.train_files: {tmp_path / name}") and message in said


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
def test_a_missing_prompt_column_is_refused_with_those_that_there_are(data, tmp_path, name):
    message = data_refusal(data([{"question": "1+1?", "answer": "2"}] * 200, name))
    assert message.startswith(f"data.train_files: {tmp_path / name} has no column 'prompt' (data.prompt_key); it has ")
    assert "question" in message and "answer" in message
    renamed = [{"chat": row["prompt"], "reward_model": row["reward_model"]} for row in ROWS]
    check_data(data(renamed, name, "data.prompt_key=chat"), lambda text: None)


def test_a_missing_reward_model_column_is_a_warning(data, tmp_path):
    said = []
    check_data(data([{"prompt": row["prompt"]} for row in ROWS]), said.append)
    assert said == [
        f"warning: data.{key}: {tmp_path}/rows.parquet has no column 'reward_model': the reward function gets "
        "ground_truth=None"
        for key in ("train_files", "val_files")
    ] + ["200 training rows, 200 validation rows"]


@pytest.mark.parametrize(
    ("prompt", "found"),
    [("What is 1+1?", "a str"), ([], "an empty list"), (None, "a NoneType"), (["hello"], "a list of str")],
)
def test_a_prompt_that_is_no_list_of_messages_is_refused_by_its_row(data, tmp_path, prompt, found):
    message = data_refusal(data([ROWS[0], ROWS[1], {**ROWS[2], "prompt": prompt}, *ROWS[3:]], "rows.jsonl"))
    assert message == (
        f"row 2 of data.train_files: {tmp_path}/rows.jsonl: its prompt is {found}, not a list of chat messages: "
        '[{"role": "user", "content": "..."}]'
    )


PICTURE = [{"bytes": b"png".hex(), "path": None}]
SHOWN = [{"type": "text", "text": "What is this?"}, {"type": "image", "image": "a.png"}]


@pytest.mark.parametrize(
    ("row", "overrides", "what"),
    [
        ({"images": PICTURE}, [], "images"),
        ({"videos": PICTURE}, [], "videos"),
        ({"audios": PICTURE}, [], "audios"),
        ({"picture": PICTURE}, ["data.image_key=picture"], "picture"),
        ({"prompt": [{"role": "user", "content": SHOWN}]}, [], "image"),
    ],
)
def test_rows_with_more_than_text_are_refused_since_the_policy_would_not_see_it(data, tmp_path, row, overrides, what):
    for name in ("rows.jsonl", "rows.parquet") if "prompt" not in row else ("rows.jsonl",):
        rows = [dict.fromkeys(row) | ROWS[0], {**ROWS[1], **row}, *ROWS[2:]]
        message = data_refusal(data(rows, name, *overrides))
        assert message == (
            f"row 1 of data.train_files: {tmp_path}/{name} has '{what}': this recipe's agent loop is for text; leave "
            "such rows out"
        )


def test_empty_media_columns_and_text_in_parts_are_text(data):
    said = [{"type": "text", "text": "1+1?"}]
    rows = [{**row, "images": [], "videos": None, "prompt": [{"role": "user", "content": said}]} for row in ROWS]
    assert len(check_data(data(rows, "rows.jsonl"), lambda text: None)) == 2 * len(ROWS)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl"])
@pytest.mark.parametrize("agent", ["tool_agent", "single_turn_agent", None])
def test_rows_that_ask_for_another_agent_loop_are_refused(data, tmp_path, name, agent):
    own = [{**row, "agent_name": "gtpo_agent"} for row in ROWS]
    check_data(data(own, name), lambda text: None)
    own[150]["agent_name"] = agent
    assert data_refusal(data(own, name)) == (
        f"data.train_files: {tmp_path / name}: its column 'agent_name' asks for the agent loop {str(agent)!r}, and the "
        "turns that GTPO needs are recorded by 'gtpo_agent' alone; drop the column, or set it to 'gtpo_agent' in every "
        "row"
    )


def test_of_a_data_class_of_ones_own_only_the_files_are_looked_for(data, tmp_path):
    config = data("a,b\n", "rows.csv")
    OmegaConf.update(config, "data.custom_cls.path", "/my/dataset.py")
    assert check_data(config, lambda text: None) == []
    Path(config.data.val_files).unlink()
    assert "does not exist" in data_refusal(config)
