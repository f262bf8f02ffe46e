"""Protects the configuration: what makes sense composes and passes verl's own checks without a GPU, what does not is
refused in one line before anything starts, and a baseline differs from GTPO in its method and nothing else.
"""

from __future__ import annotations

import inspect
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from composition import (
    EVERYTHING,
    METHODS,
    STACKS,
    assert_can_start,
    compose,
    compose_with_choices,
    composed,
    names,
)
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from verl.tools.tool_registry import load_all_tools

from recipe.gtpo.agent_loop import GTPOAgentLoop
from recipe.gtpo.main import validate
from recipe.gtpo.method.options import GTPOOptions
from recipe.gtpo.run.checks import CONFIG_DIR, ROLLOUTS, ConfigError, check, prepare, short_context
from recipe.gtpo.run.errors import one_line
from recipe.gtpo.run.gpu import fill_logical_gpus
from recipe.gtpo.run.tool_server import ray_executors
from recipe.gtpo.tasks.arithmetic.problems import MAX_CODE_LENGTH

pytestmark = pytest.mark.unit


# -- what makes sense -------------------------------------------------------------------------------------------------


def test_every_file_of_every_group_is_covered_below():
    assert set(ROLLOUTS) == set(names("hardware"))
    assert {rollout for _, rollout in STACKS} == set(names("rollout"))
    assert set(METHODS) == set(METHOD_KEYS)


#: Composing takes half a second. Methods, tasks and stacks set different keys, so here every task meets every stack
#: with one method, and every method one of them; the tasks on published problems, which share their keys with
#: verl_data, meet one hardware. The slow lane takes all (test_all_compositions.py).
SOME = [
    c
    for c in EVERYTHING
    if (c[0] == "gtpo" and (c[1] in ("arithmetic", "verl_data") or c[2] == "single_node"))
    or c[1:3] == ("arithmetic", "cpu")
]


@pytest.mark.parametrize(("method", "task", "hardware", "rollout"), SOME)
def test_a_composition_passes_our_checks_and_verls(method, task, hardware, rollout):
    assert_can_start(method, task, hardware, rollout)


def flat(config: DictConfig) -> dict[str, object]:
    leaves: dict[str, object] = {}

    def walk(node: object, path: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else str(key))
        else:
            leaves[path] = node

    walk(OmegaConf.to_container(config, resolve=True), "")
    return leaves


#: Keys whose value contains the method's name, so that runs do not overwrite each other.
NAMED = {
    "method",
    "run_dir",
    "trainer.experiment_name",
    "trainer.default_local_dir",
    "actor_rollout_ref.rollout.trace.experiment_name",
}
RIVAL, REWARD = {"algorithm.adv_estimator", "algorithm.gtpo.shaping.enable"}, "algorithm.gtpo.trajectory_reward"
#: Keys that make the method.
UNBIASED = {
    f"algorithm.gtpo.{key}"
    for key in ("gamma", "trajectory_reward", "baseline", "leave_one_out", "scale", "shaping.enable")
}
METHOD_KEYS = {
    "gtpo": set(),
    "gtpo_batch": {"algorithm.gtpo.baseline"},
    "gtpo_batch_std": {"algorithm.gtpo.scale"},
    "gtpo_undiscounted": {"algorithm.gtpo.gamma"},
    "gtpo_no_turn_reward": {"algorithm.gtpo.turn_rewards"},
    "gtpo_no_shaping": {"algorithm.gtpo.shaping.enable"},
    "gtpo_turn": {"algorithm.gtpo.baseline"},
    "gtpo_turn_batch_std": {"algorithm.gtpo.baseline", "algorithm.gtpo.scale"},
    "gtpo_state": UNBIASED,
    "gtpo_bootstrap": {*UNBIASED, "algorithm.gtpo.bootstrap"},
    "gtpo_within_state": {*UNBIASED, "algorithm.gtpo.bootstrap", "algorithm.gtpo.state_prior"}
    - {"algorithm.gtpo.leave_one_out"},
    "grpo": {*RIVAL, REWARD},
    "grpo_outcome": {*RIVAL, REWARD},
    "grpo_sum": RIVAL,
    "dr_grpo": {*RIVAL, REWARD, "algorithm.norm_adv_by_std_in_grpo"},
    "dr_grpo_sum": {*RIVAL, "algorithm.norm_adv_by_std_in_grpo"},
    "rloo": {*RIVAL, REWARD},
    "reinforce_plus_plus": {*RIVAL, REWARD},
    "gdpo": RIVAL,
    "mt_grpo": RIVAL,
    "gigpo": {*RIVAL, REWARD, "algorithm.gtpo.gamma", "algorithm.gtpo.scale"},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_baseline_differs_from_gtpo_in_the_keys_of_its_method_only(method):
    ours, theirs = (flat(composed(m, "arithmetic", "cpu", "transformers")[0]) for m in ("gtpo", method))
    assert ours.keys() == theirs.keys()
    different = {key for key in ours if ours[key] != theirs[key]}
    assert different - NAMED == METHOD_KEYS[method]
    for key in NAMED:
        assert (
            str(theirs[key]).replace(f"arithmetic-{method}-", "arithmetic-gtpo-").replace(method, "gtpo") == ours[key]
        )


def test_any_key_of_verl_stays_overridable():
    config = compose("actor_rollout_ref.actor.clip_ratio_high=0.3", "algorithm.gtpo.gamma=0.5", "seed=9")
    assert config.actor_rollout_ref.actor.clip_ratio_high == 0.3 and config.algorithm.gtpo.gamma == 0.5
    # one number reaches all that draws
    assert config.data.seed == config.actor_rollout_ref.rollout.seed == config.task.seed == 9
    assert config.actor_rollout_ref.actor.data_loader_seed == config.actor_rollout_ref.actor.fsdp_config.seed == 9


def test_the_composed_options_are_the_dataclass_defaults():
    """Every option is in the config, so that hydra's command line knows it and refuses others."""
    assert GTPOOptions.from_config(compose().algorithm.gtpo) == GTPOOptions()


@pytest.mark.parametrize("seeded", [False, True])
def test_sglang_is_told_to_mind_the_seeds_of_requests(seeded):
    key = "actor_rollout_ref.rollout.full_determinism"
    config = compose("hardware=single_gpu", "rollout=sglang", f"{key}={seeded}")
    assert config.actor_rollout_ref.rollout.engine_kwargs.sglang == {"enable_deterministic_inference": seeded}


# -- files that the config points at ----------------------------------------------------------------------------------


def test_the_agent_loop_that_the_config_names_is_ours():
    rollout = compose().actor_rollout_ref.rollout
    (entry,) = OmegaConf.load(rollout.agent.agent_loop_config_path)
    assert entry.name == rollout.agent.default_agent_loop
    assert get_class(entry["_target_"]) is GTPOAgentLoop


def test_the_calculator_allows_the_code_length_that_its_task_rests_on():
    tools = OmegaConf.load(CONFIG_DIR / "tools" / "calculator.yaml").tools
    assert tools[0].config.max_code_chars == MAX_CODE_LENGTH


@pytest.mark.parametrize(("file", "limit"), [("calculator.yaml", MAX_CODE_LENGTH), ("python.yaml", None)])
def test_verl_loads_the_tool_files_with_the_run_s_server(monkeypatch, file, limit):
    monkeypatch.setenv("GTPO_TOOL_SERVER_URL", "http://tools:8000")
    (tool,) = load_all_tools(tool_config_path=str(CONFIG_DIR / "tools" / file), function_tool_path=None)
    assert tool.name == "python" and tool.config["url"] == "http://tools:8000" and tool.config["token"] is None
    assert tool.tool_schema.function.parameters.properties["code"].maxLength == limit


def test_a_tool_file_without_a_server_in_the_environment_says_which_variable_is_missing(monkeypatch):
    monkeypatch.delenv("GTPO_TOOL_SERVER_URL", raising=False)
    with pytest.raises(OmegaConfBaseException, match="GTPO_TOOL_SERVER_URL"):
        load_all_tools(tool_config_path=str(CONFIG_DIR / "tools" / "python.yaml"), function_tool_path=None)


# -- what is refused --------------------------------------------------------------------------------------------------


def refusal(config: DictConfig, choices: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        check(config, choices)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def default():
    return compose_with_choices()


NONSENSE = [pair for pair in itertools.product(names("hardware"), names("rollout")) if pair not in STACKS]


@pytest.mark.parametrize(("hardware", "rollout"), NONSENSE)
def test_a_rollout_that_the_hardware_cannot_run_is_refused_with_one_that_it_can(default, hardware, rollout):
    config, choices = default
    message = refusal(config, choices | {"hardware": hardware, "rollout": rollout})
    wanted = f"rollout={rollout} does not run on hardware={hardware}; use rollout={ROLLOUTS[hardware][0]}"
    assert message == wanted


def test_the_refusal_reads_the_choices_that_hydra_made():
    assert refusal(*compose_with_choices("rollout=vllm")).startswith("rollout=vllm does not run on hardware=cpu")


@pytest.mark.parametrize("group", ["method", "hardware", "task", "rollout"])
def test_an_unknown_choice_names_the_valid_ones(group):
    with pytest.raises(MissingConfigException) as caught:
        compose(f"{group}=zzz")
    assert f"{group}/zzz" in str(caught.value)
    head, _, valid = one_line(caught.value).partition(" Valid: ")
    assert head == f"{group}=zzz: there is no such choice."
    assert set(names(group)) <= set(valid.split(", "))  # verl has a file in some of the groups, too


@pytest.mark.parametrize(
    ("override", "key", "meant"),
    [
        ("data.trian_batch_size=8", "data.trian_batch_size", "data.train_batch_size"),
        ("train_batch_size=8", "train_batch_size", "data.train_batch_size"),  # without its section
        ("actor_rollout_ref.rollot.n=8", "actor_rollout_ref.rollot", "actor_rollout_ref.rollout"),
        ("methd=grpo", "methd", "method"),
    ],
)
def test_a_typo_in_a_key_names_the_nearest_one_and_no_plus_to_copy(override, key, meant):
    with pytest.raises(ConfigCompositionException) as caught:
        compose(override)
    message = one_line(caught.value)
    assert message.startswith(f"{key}: there is no such key. Did you mean {meant}? A + in front adds a key, ")
    assert f"+{key}" not in message


def test_a_key_that_resembles_none_gets_no_hint():
    with pytest.raises(ConfigCompositionException) as caught:
        compose("zzz=1")
    assert one_line(caught.value).startswith("zzz: there is no such key. A + in front ")


@pytest.mark.parametrize(("module", "name"), [("recipe.gtpo.main", "gtpo"), ("recipe.gtpo.experiments.twin", "twin")])
def test_the_command_ends_a_typo_with_one_line(module, name, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", module, f"run_dir={tmp_path}", "method=gtop"]
    ended = subprocess.run(command, cwd=CONFIG_DIR.parents[2], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1 and ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"{name}: error: method=gtop: there is no such choice. Did you mean gtpo? Valid: ")
    assert list(tmp_path.iterdir()) == []


def test_keys_that_verl_reads_and_its_config_lacks_can_be_added():
    added = {"data.gen_batch_size": 8, "actor_rollout_ref.model.override_config.rope_theta": 10, "ray_kwargs.own": 1}
    config = compose(*(f"+{key}={value}" for key, value in added.items()))
    assert {key: OmegaConf.select(config, key) for key in added} == added


def test_a_typo_in_an_option_is_refused_by_hydra_and_a_forced_one_by_us(default):
    with pytest.raises(ConfigCompositionException, match=r"algorithm\.gtpo\.gama"):
        compose("algorithm.gtpo.gama=0.5")
    config, choices = default
    OmegaConf.update(config, "algorithm.gtpo.gama", 0.5, force_add=True)  # what +algorithm.gtpo.gama=0.5 does
    message = refusal(config, choices)
    assert message.startswith("algorithm.gtpo: unknown option 'gama'. Did you mean 'gamma'? Valid options: gamma, ")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("algorithm.gtpo.shaping.alpha", 1.0, "algorithm.gtpo.shaping.alpha: 1.0 must be in [0, 1)"),
        ("algorithm.gtpo.gamma", 1.5, "algorithm.gtpo.gamma: 1.5 must be in [0, 1]"),
        ("algorithm.gtpo.baseline", "prompt", "algorithm.gtpo.baseline: 'prompt' is not one of group, turn, batch"),
        ("algorithm.gtpo.trajectory_reward", "max", "algorithm.gtpo.trajectory_reward: 'max' is not one of sum, min, "),
        (
            "algorithm.adv_estimator",
            "gdpo",
            "algorithm.adv_estimator=gdpo: verl's V1 trainers do not hand it the parts of the reward; method=gdpo",
        ),
        (
            "algorithm.adv_estimator",
            "tir_optimal_token_baseline",
            "algorithm.adv_estimator=tir_optimal_token_baseline: verl's V1 trainers do not hand it sum_pi_squared",
        ),
        (
            "actor_rollout_ref.rollout.multi_turn.format",
            "qwen3_coder",
            "actor_rollout_ref.rollout.multi_turn.format=qwen3_coder: this recipe reads hermes calls only",
        ),
        ("trainer.use_v1", False, "trainer.use_v1=false: GTPO runs on verl's V1 trainer only"),
        ("trainer.v1.trainer_mode", "sync", "trainer.v1.trainer_mode=sync: this recipe has gtpo_sync, gtpo_colocate"),
        ("trainer.total_epochs", 15, "trainer.total_epochs=15 with trainer.total_training_steps=40: a run whose "),
        (
            "actor_rollout_ref.rollout.val_kwargs.do_sample",
            False,
            "actor_rollout_ref.rollout.val_kwargs.do_sample=false with actor_rollout_ref.rollout.val_kwargs.temp",
        ),
        ("reward.reward_manager.name", "dapo", "reward.reward_manager.name=dapo would change no reward: answers are "),
        ("reward.reward_manager.source", "importlib", "reward.reward_manager.source=importlib would change no reward"),
        ("reward.reward_model.enable", True, "reward.reward_model.enable=True would change no reward"),
        ("reward.sandbox_fusion.url", "http://x", "reward.sandbox_fusion.url=http://x would change no reward"),
        # verl's older keys
        (
            "custom_reward_function.path",
            "x.py",
            "custom_reward_function.path=x.py would change no reward: answers ",
        ),
        ("reward_model.enable", True, "reward_model.enable=True would change no reward"),
        ("reward_model.model.path", "x", "reward_model.model.path=x would change no reward"),
    ],
)
def test_a_value_that_cannot_run_is_refused_by_its_key(default, key, value, message):
    config, choices = default
    OmegaConf.update(config, key, value)
    assert refusal(config, choices).startswith(message)


def test_the_epochs_decide_where_no_steps_do():
    config, choices = compose_with_choices("trainer.total_epochs=15", "trainer.total_training_steps=null")
    check(config, choices)


def test_to_validate_only_without_the_validation_before_training_would_train_and_is_refused():
    config, choices = compose_with_choices("trainer.val_only=true")
    check(config, choices)
    config.trainer.val_before_train = False
    assert refusal(config, choices).endswith("without it verl trains; leave trainer.val_before_train out")
    config.trainer.val_only = False
    check(config, choices)


def test_a_greedy_validation_is_one_at_temperature_0():
    temperature = "actor_rollout_ref.rollout.val_kwargs.temperature=0"
    for overrides in ([temperature], [temperature, "actor_rollout_ref.rollout.val_kwargs.do_sample=false"]):
        config, choices = compose_with_choices(*overrides)
        check(config, choices)
        validate(config)


def refused_until_merged(*overrides: str) -> str:
    """The refusal of an adapter of rank 8, which passes with `model.lora.merge=true`."""
    config, choices = compose_with_choices(*overrides)
    model = config.actor_rollout_ref.model
    model.lora_rank = 8
    refused = refusal(config, choices)
    model.lora.merge = True
    check(config, choices)
    return refused


@pytest.mark.parametrize("hardware", ["cpu", "single_gpu"])
def test_an_adapter_that_would_reach_no_rollout_is_refused(hardware):
    assert refused_until_merged(f"hardware={hardware}", "rollout=transformers").startswith(
        "actor_rollout_ref.model.lora_rank=8: rollout=transformers takes whole weights and no adapter; set "
    )


@pytest.mark.parametrize(("hardware", "rollout"), [("cpu", "transformers"), ("single_node", "vllm")])
def test_an_adapter_that_would_reach_no_server_of_its_own_is_refused(hardware, rollout):
    assert refused_until_merged(f"hardware={hardware}", f"rollout={rollout}", "mode=separate_async").startswith(
        "actor_rollout_ref.model.lora_rank=8 with mode=separate_async: verl sends servers of their own whole weights"
    )
    config, choices = compose_with_choices("hardware=single_node", "rollout=vllm")
    config.actor_rollout_ref.model.lora_rank = 8  # in verl's sync mode the adapter goes to the engine as one
    check(config, choices)


def test_verl_still_sends_no_adapter_to_servers_of_their_own():
    """What the refusal rests on; once verl sends it, this breaks and the refusal can go."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine
    from verl.workers.engine_workers import ActorRolloutRefWorker

    sent = inspect.getsource(inspect.unwrap(ActorRolloutRefWorker.update_weights))
    assert "per_tensor_param, _ = self.actor.engine.get_per_tensor_param()" in sent
    taken = inspect.getsource(FSDPEngine.get_per_tensor_param)
    assert "return self._merged_lora_per_tensor_param(), None" in taken  # with lora.merge: whole, with the adapter


# -- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", names("mode"))
def test_every_mode_can_start_on_the_cpu(mode):
    config, choices = compose_with_choices(f"mode={mode}")
    check(config, choices)
    assert config.trainer.v1.trainer_mode == f"gtpo_{mode}"
    assert config.actor_rollout_ref.rollout.full_determinism == (mode == "sync")  # the others go by the clock
    fill_logical_gpus(config)
    assert config.ray_kwargs.ray_init.num_gpus == (2 if mode == "separate_async" else 1)


def test_rollouts_apart_get_their_weights_by_what_the_device_has():
    for hardware, backend in (("cpu", "gloo"), ("single_node", "nccl")):
        rollout = "transformers" if hardware == "cpu" else "vllm"
        config, choices = compose_with_choices("mode=separate_async", f"hardware={hardware}", f"rollout={rollout}")
        check(config, choices)
        engine = config.actor_rollout_ref.rollout.checkpoint_engine
        assert (engine.backend, engine.custom_backend_module) == (
            backend,
            "verl_ext.cpu.checkpoint" if hardware == "cpu" else None,
        )


def test_a_ray_of_somebody_else_s_is_told_no_number_of_gpus():
    config = compose("ray_kwargs.ray_init.address=127.0.0.1:6379")
    fill_logical_gpus(config)
    assert config.ray_kwargs.ray_init.num_gpus is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.v1.trainer_mode=gtpo_colocate_async"], "full_determinism=true: which weights a turn meets depends"),
        (["mode=colocate_async", "actor_rollout_ref.rollout.full_determinism=true"], "or take mode=colocate_async"),
        (
            ["trainer.v1.trainer_mode=gtpo_separate_async", "actor_rollout_ref.rollout.full_determinism=false"],
            "samples on devices of its own: take mode=separate_async",
        ),
        (
            ["mode=separate_async", "actor_rollout_ref.rollout.checkpoint_engine.backend=naive"],
            "samples on devices of its own",
        ),
        (
            ["mode=separate_async", "trainer.v1.separate_async.parameter_sync_step=2"],
            "data.train_batch_size=16 is not trainer.v1.separate_async.parameter_sync_step=2 x "
            "actor_rollout_ref.actor.ppo_mini_batch_size=16",
        ),
    ],
)
def test_a_mode_that_could_not_start_is_refused(overrides, message):
    config, choices = compose_with_choices(*overrides)
    refused = refusal(config, choices)
    assert refused.startswith("trainer.v1.trainer_mode=gtpo_") and message in refused


def test_what_gdpo_would_ignore_is_refused(default):
    config, choices = default
    OmegaConf.update(config, "algorithm.gdpo_reward_weights", [1.0, 2.0], force_add=True)
    check(config, choices)  # which GTPO does not
    config.algorithm.adv_estimator = "recorded_gdpo"
    assert refusal(config, choices).startswith("algorithm.gdpo_reward_weights")


@pytest.mark.parametrize("estimator", ["gtpo", "grpo", "recorded_gdpo"])
def test_a_kl_term_in_the_reward_is_refused_since_no_record_would_show_it(default, estimator):
    config, choices = default
    config.algorithm.adv_estimator = estimator
    config.algorithm.use_kl_in_reward = True
    refused = refusal(config, choices)
    assert refused.startswith("algorithm.use_kl_in_reward=true") and "actor.use_kl_loss=true" in refused


def test_group_filtering_is_refused_unless_it_filters_on_the_raw_outcome(default):
    config, choices = default
    OmegaConf.update(config, "algorithm.filter_groups", {"enable": True, "metric": "seq_final_reward"}, force_add=True)
    assert "filter on acc" in refusal(config, choices)
    config.algorithm.filter_groups.metric = "acc"
    assert check(config, choices) == GTPOOptions()


def test_several_nodes_need_a_tool_server_that_all_can_reach():
    config, choices = compose_with_choices("hardware=multi_node", "rollout=vllm")
    assert config.tool_server.url == "ray"  # an executor on each
    check(config, choices)
    config.tool_server.url = None
    assert refusal(config, choices).startswith("tool_server.url is not set: other nodes cannot reach")


def test_executors_on_the_nodes_of_a_cluster_need_a_cluster():
    config, choices = compose_with_choices("tool_server.url=ray")
    assert refusal(config, choices).startswith("tool_server.url=ray is for a Ray cluster that runs")
    config.ray_kwargs.ray_init.address = "127.0.0.1:6379"
    check(config, choices)


def test_executors_isolate_as_the_config_asks():
    config = compose("tool_server.url=ray")
    assert ray_executors(config) == "ray"
    config.tool_server.isolation = "strong"
    assert ray_executors(config) == "ray://strong"
    config.tool_server.url = "ray://standard"
    assert ray_executors(config) == "ray://standard"
    for key, value in (("unsafe_no_isolation", True), ("workers", 2)):
        refused = compose("tool_server.url=ray")
        refused.tool_server[key] = value
        with pytest.raises(ConfigError, match="every node isolates programs"):
            ray_executors(refused)


def test_what_verl_refuses_is_refused_before_anything_starts(default):
    config, _ = default
    config.actor_rollout_ref.rollout.temperature = 0  # greedy, while validation samples
    with pytest.raises(ConfigError, match="temperature should be greater than 0"):
        validate(config)


# -- what a task refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.horizon=7", "task=arithmetic: horizon=7: the task has 1 to 6 dependent calls"),
        ("task.success=0.9", "task=arithmetic: success=0.9 is out of reach"),
    ],
)
def test_a_task_that_cannot_be_made_is_refused_with_its_own_reason(override, message):
    with pytest.raises(ConfigError) as refused:
        prepare(compose(override))
    assert str(refused.value).startswith(message)


# -- warnings ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def paths(default, tmp_path):
    config, _ = default
    (tmp_path / "model").mkdir()
    config.actor_rollout_ref.model.path = str(tmp_path / "model")
    return config


@pytest.mark.parametrize(
    ("limit", "source"),
    [
        ({"actor_rollout_ref.rollout.max_model_len": 99}, "actor_rollout_ref.rollout.max_model_len=99"),
        ({"model": {"max_position_embeddings": 99}}, "the model's max_position_embeddings=99"),
        ({"model": {"text_config": {"max_position_embeddings": 99}}}, "the model's max_position_embeddings=99"),
    ],
)
def test_a_context_shorter_than_prompt_and_response_is_told_in_a_line(paths, limit, source):
    limit = dict(limit)
    Path(paths.actor_rollout_ref.model.path, "config.json").write_text(json.dumps(limit.pop("model", {})))
    for key, value in limit.items():
        OmegaConf.update(paths, key, value)
    paths.data.max_prompt_length, paths.data.max_response_length = 40, 60
    assert short_context(paths) == (
        f"{source} is below data.max_prompt_length + data.max_response_length = 100: a trajectory that gets so long "
        "ends there, cut by length and not charged"
    )
    paths.data.max_prompt_length = 39
    assert short_context(paths) is None


def test_a_context_that_is_known_to_the_servers_only_is_not_told(paths):
    paths.data.max_prompt_length, paths.data.max_response_length = 40, 60
    assert short_context(paths) is None  # no config.json in the folder
    paths.actor_rollout_ref.model.path = "Qwen/Qwen2.5-7B-Instruct"
    assert short_context(paths) is None


def test_an_overridden_context_is_the_models(paths):
    Path(paths.actor_rollout_ref.model.path, "config.json").write_text('{"max_position_embeddings": 50}')
    paths.data.max_prompt_length, paths.data.max_response_length = 40, 60
    OmegaConf.update(paths, "actor_rollout_ref.model.override_config.max_position_embeddings", 100, force_add=True)
    assert short_context(paths) is None


def test_the_warning_is_given_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_DIR", "unused")  # `prepare` sets it
    config = compose(
        "task.warm_start={steps: 1, base: {skill: 0.0, check_every: 3}}",
        *(f"task.cache={tmp_path}", "task.train_problems=64", "task.validation_problems=4"),
        "actor_rollout_ref.rollout.max_model_len=99",
    )
    said: list[str] = []
    prepare(config, said.append)
    assert [line for line in said if line.startswith("warning: actor_rollout_ref.rollout.max_model_len=99 is below")]
