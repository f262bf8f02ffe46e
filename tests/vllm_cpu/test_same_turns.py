"""verl's vLLM server and the transformers server say the same, turn by turn, in the recipe's agent loop.

Greedily both take the likeliest token: tokens, turns, finishes and log-probs can be compared one by one. Samples
cannot, for each engine draws its own random numbers: there the log-probs that an engine reports are compared with those
that the model itself gives the same tokens.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from dataclasses import dataclass

import pytest
import ray
import torch
from composition import compose
from omegaconf import OmegaConf
from scripted import FakePython, make_loop
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.tools.schemas import ToolResponse
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig
from verl.workers.rollout.replica import RolloutMode, RolloutReplicaRegistry

from recipe.gtpo.method.turns import TRAJECTORY, Finish, Trajectory
from recipe.gtpo.run.gpu import fill_logical_gpus
from recipe.gtpo.tasks.arithmetic import calculator
from recipe.gtpo.tasks.arithmetic.policy import TURN_END
from recipe.gtpo.tasks.arithmetic.problems import (
    MAX_CODE_LENGTH,
    Limits,
    sample_problems,
    step_mix,
    take,
    to_row,
)
from recipe.gtpo.tasks.arithmetic.warm_start import BaseOptions, WarmStartOptions, ensure_warm_start
from verl_ext.tools.python_tool import PythonTool

pytestmark = pytest.mark.vllm

ROLLOUTS = ("transformers", "vllm_cpu")
GAP = 1e-5  # of log-probs, both engines in float32
UNLIKELY = 5e-5  # of a single token that is sampled against the odds: rounding counts for more there
HORIZON = 2
LIMITS = Limits.of(HORIZON)
PROBLEMS = [to_row(problem, i) for i, problem in enumerate(take(sample_problems("train", 1, step_mix(HORIZON)), 24))]

GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "logprobs": True}
SAMPLED = GREEDY | {"temperature": 1.0}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """One that calls and answers, often wrongly: its turns end in every way there is."""
    options = WarmStartOptions(steps=60, base=BaseOptions(skill=0.0, check_every=240))
    return str(ensure_warm_start(options, tmp_path_factory.mktemp("policies"), progress=False))


@pytest.fixture(scope="module")
def tokenizer(policy):
    return AutoTokenizer.from_pretrained(policy)


def config_of(rollout, policy, **changes):
    config = compose(
        f"rollout={rollout}",
        f"actor_rollout_ref.model.path={policy}",
        f"data.max_prompt_length={LIMITS.prompt}",
        f"data.max_response_length={LIMITS.response}",
        f"actor_rollout_ref.rollout.multi_turn.max_assistant_turns={LIMITS.turns}",
        # fewer tokens than the prompts of PROBLEMS have, so that vLLM needs several steps to read them
        *("actor_rollout_ref.rollout.max_model_len=320", "actor_rollout_ref.rollout.max_num_batched_tokens=320"),
    )
    for key, value in changes.items():
        OmegaConf.update(config, f"actor_rollout_ref.rollout.{key}", value)
    fill_logical_gpus(config)
    return config


@ray.remote(num_gpus=1)
class Neighbour:
    """In a training worker's place: a replica asks it where it is, and starts the server beside it."""


@pytest.fixture(scope="module")
def servers(policy):
    """rollout -> its server, as verl starts it."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes do not know this module
    ray.init(**OmegaConf.to_container(config_of("vllm_cpu", policy).ray_kwargs.ray_init, resolve=True))
    handles, neighbour = {}, Neighbour.remote()
    for rollout in ROLLOUTS:
        parts = config_of(rollout, policy).actor_rollout_ref
        model = omega_conf_to_dataclass(parts.model, dataclass_type=HFModelConfig)
        replica = RolloutReplicaRegistry.get(parts.rollout.name)(0, parts.rollout, model, gpus_per_node=1)
        replica.rollout_mode = RolloutMode.HYBRID
        replica.workers = [neighbour]
        asyncio.run(asyncio.wait_for(replica.launch_servers(), timeout=600))
        handles[rollout] = replica.server_handle
        if rollout == "vllm_cpu":
            assert replica.server_address.startswith("127.0.0.1:")  # its HTTP server is this machine's only
    yield handles
    ray.shutdown()


@dataclass
class Client:
    """What the agent loop asks, without verl's balancer between."""

    server: ray.actor.ActorHandle

    async def generate(self, **request):
        return await self.server.generate.remote(**request)


class Calculator(FakePython):
    async def execute(self, instance_id, parameters, **kwargs):
        outcome = calculator.run_code(parameters["code"])
        return ToolResponse(text=outcome.output), 0.0, {"outcome": outcome.outcome}


def roll_out(servers, rollout, policy, tokenizer, sampling, **changes):
    """The outputs of all PROBLEMS, at once, in their order."""
    config = config_of(rollout, policy, **changes)

    async def converse():
        schema = PythonTool._schema(MAX_CODE_LENGTH)
        tasks = []
        for row in PROBLEMS:
            loop = make_loop(config, tokenizer, Client(servers[rollout]), [Calculator(schema=schema)])
            given = {
                "raw_prompt": row["prompt"],
                "index": row["extra_info"]["index"],
                "session_id": 0,
                "global_steps": 1,
            }
            tasks.append(loop.run(dict(sampling), **row, **given))
        return await asyncio.gather(*tasks)

    return asyncio.run(asyncio.wait_for(converse(), timeout=300))


def record(output):
    """As it is written down, but for the clock."""
    found = output.extra_fields[TRAJECTORY]
    for turn in found["turns"]:
        for outcome in turn["outcomes"]:
            outcome["seconds"] = 0.0
    return found


def trajectories(outputs):
    return [Trajectory.from_dict(output.extra_fields[TRAJECTORY]) for output in outputs]


#: How far a conversation may go, and the finishes that this must bring.
ROOMS = {
    "whole": ({}, {Finish.ANSWER}),
    "short response": ({"response_length": 60}, {Finish.LENGTH}),
    "short context": ({"max_model_len": LIMITS.prompt + 40}, {Finish.LENGTH}),
}


@pytest.mark.parametrize("room", ROOMS)
def test_greedily_both_servers_say_the_same(servers, policy, tokenizer, room):
    changes, finishes = ROOMS[room]
    ours, vllms = (roll_out(servers, rollout, policy, tokenizer, GREEDY, **changes) for rollout in ROLLOUTS)
    found = trajectories(vllms)
    print(room, Counter(t.finish.value for t in found), Counter(len(t.turns) for t in found))
    assert finishes <= {t.finish for t in found} and max(len(t.turns) for t in found) > 1
    for one, other in zip(ours, vllms, strict=True):
        assert record(one) == record(other)
        assert (one.prompt_ids, one.response_ids, one.response_mask) == (
            *(other.prompt_ids, other.response_ids, other.response_mask),
        )
        assert one.response_logprobs == pytest.approx(other.response_logprobs, abs=GAP)


@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_a_sample_has_the_log_probs_that_the_model_gives_it(servers, policy, tokenizer, rollout):
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    outputs = roll_out(servers, rollout, policy, tokenizer, SAMPLED)
    gaps = []
    for output in outputs:
        ids = torch.tensor([output.prompt_ids + output.response_ids])
        with torch.inference_mode():
            log_probs = model(ids).logits[0].log_softmax(-1)
        first = len(output.prompt_ids)
        for t, (token, sampled) in enumerate(zip(output.response_ids, output.response_mask, strict=True)):
            if sampled:
                gaps.append(abs(log_probs[first + t - 1, token].item() - output.response_logprobs[t]))
    print(rollout, len(gaps), "tokens, gap: mean", sum(gaps) / len(gaps), "largest", max(gaps))
    assert len(gaps) > 500 and sum(gaps) / len(gaps) < GAP / 10 and max(gaps) < UNLIKELY


def test_a_request_has_its_own_seed(servers, policy, tokenizer):
    """The same sample again, whoever shares the batch; greedily it would be another."""
    first, second = (roll_out(servers, "vllm_cpu", policy, tokenizer, SAMPLED) for _ in range(2))
    assert [output.response_ids for output in first] == [output.response_ids for output in second]
    greedy = roll_out(servers, "vllm_cpu", policy, tokenizer, GREEDY)
    assert [output.response_ids for output in first] != [output.response_ids for output in greedy]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_turn_that_ended_has_its_end_token_once_and_a_turn_that_was_cut_has_none(
    servers, policy, tokenizer, sampling
):
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    outputs = roll_out(servers, "vllm_cpu", policy, tokenizer, sampling, response_length=60)
    counts = Counter()
    for output, trajectory in zip(outputs, trajectories(outputs), strict=True):
        for turn in trajectory.turns:
            ids = output.response_ids[turn.start : turn.end]
            ended = turn.ended_by == TURN_END
            assert ids.count(end) == ended and (ids[-1] == end) == ended and turn.overrun == 0
            assert ended or (turn is trajectory.turns[-1] and trajectory.finish is Finish.LENGTH)
            counts[ended] += 1
    assert counts[True] > 20 and counts[False] > 2
