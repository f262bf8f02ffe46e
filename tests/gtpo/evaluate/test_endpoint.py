"""Protects an evaluation over an endpoint: the agent loop gets what verl's servers would give it, and what it does not
get is said. The endpoint is a fake on loopback; client, agent loop and tokenizer are the real ones.
"""

from __future__ import annotations

import asyncio

import pytest
from composition import compose
from endpoint import FakeEndpoint
from scripted import CALL, QUESTION, RIGHT, FakePython, Rollout, make_loop

from recipe.gtpo.agent_loop import turn_end
from recipe.gtpo.evaluate import servers
from recipe.gtpo.evaluate.servers import Endpoint
from recipe.gtpo.method.turns import TRAJECTORY, Finish, Trajectory
from recipe.gtpo.run.errors import ConfigError
from recipe.gtpo.tasks.arithmetic.policy import train_tokenizer

pytestmark = pytest.mark.unit

TURNS = ["Let me see. " + CALL, RIGHT]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer([CALL, RIGHT], vocab_size=300, directory=tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(servers, "_WAITS", (0.01, 0.01, 0.01))


@pytest.fixture(scope="module")
def with_verls_server(tokenizer):
    return Rollout(tokenizer, TURNS, FakePython("5\n"))


def talk(fake, tokenizer, model=None, key_env=None, **sampling):
    """One trajectory over the endpoint; its record, and the client."""
    config = compose("data.max_prompt_length=256", "data.max_response_length=256")
    config.actor_rollout_ref.rollout.full_determinism = True
    config.actor_rollout_ref.rollout.calculate_log_probs = False
    row = {"raw_prompt": QUESTION, "data_source": "arithmetic", "reward_model": {"ground_truth": "5"}, "index": 4}

    async def run():
        async with fake.running() as url, Endpoint(url, model, tokenizer, turn_end(tokenizer), key_env) as client:
            loop = make_loop(config, tokenizer, client, [FakePython("5\n")])
            params = {"temperature": 0.5, "top_p": 0.9, "top_k": -1, "logprobs": False} | sampling
            output = await loop.run(params, **row, session_id=1, global_steps=9)
            return output, client

    output, client = asyncio.run(run())
    return output, Trajectory.from_dict(output.extra_fields[TRAJECTORY]), client


def say(turn):
    return TURNS[turn]


def spoken(trajectory):
    return [(turn.text, turn.start, turn.end) for turn in trajectory.turns], trajectory.finish, trajectory.acc


def test_with_tokens_a_trajectory_is_the_one_that_verls_server_gives(tokenizer, with_verls_server):
    fake = FakeEndpoint(tokenizer, say)
    output, trajectory, client = talk(fake, tokenizer)
    theirs = with_verls_server
    assert output.response_ids == theirs.output.response_ids and output.prompt_ids == theirs.output.prompt_ids
    assert spoken(trajectory) == spoken(theirs.trajectory) and client.lost == []
    assert [request["prompt"] for request in fake.requests] == [r["prompt_ids"] for r in theirs.server.requests]
    assert (trajectory.finish, trajectory.acc) == (Finish.ANSWER, 1.0)


def test_sampling_reaches_the_endpoint_with_a_seed_a_turn(tokenizer):
    fake = FakeEndpoint(tokenizer, say)
    talk(fake, tokenizer, top_k=20)
    first, second = fake.requests
    assert (first["temperature"], first["top_p"], first["top_k"], first["model"]) == (0.5, 0.9, 20, "toy")
    assert first["seed"] != second["seed"] and isinstance(first["seed"], int)
    assert first["max_tokens"] > second["max_tokens"]
    again = FakeEndpoint(tokenizer, say)
    talk(again, tokenizer)
    assert [request["seed"] for request in again.requests] == [first["seed"], second["seed"]]


def test_texts_are_made_into_tokens_and_what_that_loses_is_said(tokenizer, with_verls_server):
    """Here the tokens happen to be the same."""
    _, trajectory, client = talk(FakeEndpoint(tokenizer, say, ids=False), tokenizer)
    assert spoken(trajectory) == spoken(with_verls_server.trajectory)
    assert len(client.lost) == 1 and client.lost[0].startswith("it answers in text, which is made into tokens again")


def test_a_text_that_was_cut_is_cut(tokenizer):
    fake = FakeEndpoint(tokenizer, lambda turn: "and so on " * 200, ids=False)
    _, trajectory, _ = talk(fake, tokenizer)
    assert trajectory.finish is Finish.LENGTH and trajectory.turns[0].ended_by == ""


def test_an_endpoint_that_takes_texts_gets_the_rendered_prompt(tokenizer, with_verls_server):
    fake = FakeEndpoint(tokenizer, say, prompts="text", ids=False, strict=True)
    _, trajectory, client = talk(fake, tokenizer)
    ids = [request["prompt_ids"] for request in with_verls_server.server.requests]
    assert [request["prompt"] for request in fake.requests] == [tokenizer.decode(one) for one in ids]
    assert trajectory.acc == 1.0 and len(client.lost) == 3


def test_words_that_it_refuses_are_left_out(tokenizer):
    fake = FakeEndpoint(tokenizer, say, strict=True)
    _, trajectory, client = talk(fake, tokenizer, top_k=20)
    assert trajectory.acc == 1.0 and "top_k" not in fake.requests[0]
    assert [lost.split(":")[0] for lost in client.lost] == ["it refuses words beyond OpenAI's"]


def test_a_busy_endpoint_is_asked_again(tokenizer):
    _, trajectory, _ = talk(FakeEndpoint(tokenizer, say, busy=3), tokenizer)
    assert trajectory.acc == 1.0


def test_one_that_stays_busy_loses_the_sample_with_its_words(tokenizer):
    _, trajectory, _ = talk(FakeEndpoint(tokenizer, say, busy=9), tokenizer)
    assert trajectory.finish is Finish.FAULT and "Refused: 503 busy" in trajectory.fault


def test_a_key_comes_from_the_environment(tokenizer, monkeypatch):
    monkeypatch.setenv("MY_KEY", "open sesame")
    fake = FakeEndpoint(tokenizer, say, key="open sesame")
    assert talk(fake, tokenizer, key_env="MY_KEY")[1].acc == 1.0
    with pytest.raises(ConfigError, match="does not serve POST /completions for toy: 401"):
        talk(FakeEndpoint(tokenizer, say, key="open sesame"), tokenizer)
    with pytest.raises(ConfigError, match="api_key_env=NO_KEY: this environment variable is not set"):
        talk(fake, tokenizer, key_env="NO_KEY")


def test_which_of_several_models_has_to_be_said(tokenizer):
    with pytest.raises(ConfigError, match="serves a, b: served_model=NAME says which"):
        talk(FakeEndpoint(tokenizer, say, models=("a", "b")), tokenizer)
    fake = FakeEndpoint(tokenizer, say, models=("a", "b"))
    talk(fake, tokenizer, model="b")
    assert {request["model"] for request in fake.requests} == {"b"}


def test_an_address_where_nobody_is_is_refused_at_once(tokenizer):
    async def run(model):
        async with Endpoint("http://127.0.0.1:9/v1", model, tokenizer, None):
            raise AssertionError

    with pytest.raises(ConfigError, match=r"endpoint=http://127.0.0.1:9/v1 does not answer GET /models"):
        asyncio.run(run(None))
    with pytest.raises(ConfigError, match=r"endpoint=http://127.0.0.1:9/v1 does not answer: "):
        asyncio.run(run("toy"))
