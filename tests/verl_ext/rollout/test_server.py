"""Protects the transformers rollout: one server, many requests, weights that change between batches, aborts.

The server is the class inside the Ray actor, run in an event loop of the test's own, with a real (tiny) model on disk.
"""

from __future__ import annotations

import asyncio
import functools
import shutil
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.workers.config import RolloutConfig
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, get_rollout_class
from verl.workers.rollout.replica import RolloutReplicaRegistry

from recipe.gtpo.tasks.arithmetic.policy import train_tokenizer
from verl_ext.cpu.platform import CPUPlatform
from verl_ext.rollout.generation import Request, generate
from verl_ext.rollout.server import TransformersAdapter, TransformersReplica, TransformersServer, _buckets

pytestmark = pytest.mark.unit

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
GREEDY = {"temperature": 0.0, "max_tokens": 6, "logprobs": True}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = train_tokenizer(["1 + 1"], vocab_size=270, directory=folder)
    save_model(folder, tokenizer, seed=0)
    return str(folder)


def save_model(folder, tokenizer, seed):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.25,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def rollout_config(**changes):
    return RolloutConfig(
        **{"name": "transformers", "prompt_length": 8, "response_length": 40, "dtype": "float32", "max_num_seqs": 64}
        | {"free_cache_engine": False}
        | changes
    )


def model_config(path):
    return OmegaConf.create({"_target_": "verl.workers.config.HFModelConfig", "path": path})


class Server(TransformersServer):
    """The real one, which notes who joins together and goes on when the gate is open.

    `async with` stands for the life of its actor.
    """

    def __init__(self, path, **changes):
        super().__init__(rollout_config(**changes), model_config(path), replica_rank=0)
        self.batches: list[list[list[int]]] = []
        self.largest = 0
        self.gate = threading.Event()
        self.gate.set()

    async def __aenter__(self):
        self._loop_task = asyncio.create_task(self._serve())  # what `ready` does in an actor
        return self

    async def __aexit__(self, *exc):
        self.gate.set()
        self._loop_task.cancel()

    def _advance(self, joining):
        if joining:
            self.batches.append([r.prompt_ids for r in joining])
        self.largest = max(self.largest, len(self._running) + len(joining))
        self.gate.wait()
        return super()._advance(joining)

    async def held_batch(self, prompt):
        """A request whose batch has begun and waits at the gate."""
        self.gate.clear()
        task = asyncio.create_task(self.ask(prompt, max_tokens=40))
        while not self.batches:
            await asyncio.sleep(0.001)
        return task

    def ask(self, prompt, **params):
        return self.generate(prompt, {**GREEDY, **params}, request_id="any")


def served(test):
    """Run a test of one server inside an event loop."""

    @functools.wraps(test)
    def run(path):
        async def body():
            async with Server(path) as server:
                await asyncio.wait_for(test(server, path), timeout=60)

        asyncio.run(body())

    del run.__wrapped__  # pytest reads the parameters: path, not server
    return run


def reference(server, prompt, **request):
    (sample,) = generate(
        server.model, [Request(prompt, **{"max_tokens": 6, "temperature": 0.0, "stop_ids": server.stop_ids} | request)],
        vocab_size=len(server.tokenizer),
    )  # fmt: skip
    return sample


def test_verl_s_registries_hold_the_transformers_rollout():
    """`_ROLLOUT_REGISTRY` is private: this breaks when it moves."""
    assert _ROLLOUT_REGISTRY["transformers", "async"] == "verl_ext.rollout.server.TransformersAdapter"
    assert get_rollout_class("transformers", "async") is TransformersAdapter
    assert RolloutReplicaRegistry.get("transformers") is TransformersReplica


# -- requests ---------------------------------------------------------------------------------------------------------


@served
async def test_every_request_gets_its_own_answer(server, path):
    outputs = await asyncio.gather(*(server.ask(prompt) for prompt in PROMPTS))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = reference(server, prompt)
        assert output.token_ids == expected.token_ids
        assert output.log_probs == pytest.approx(expected.log_probs, abs=1e-5)


def test_no_more_than_max_num_seqs_run_at_once(path):
    async def body():
        async with Server(path, max_num_seqs=2) as server:
            outputs = await asyncio.gather(*(server.ask(prompt) for prompt in PROMPTS * 3))
            assert server.largest == 2
            assert [o.token_ids for o in outputs] == [reference(server, p).token_ids for p in PROMPTS] * 3

    asyncio.run(body())


@served
async def test_requests_that_come_while_others_run_join_them(server, path):
    first = await server.held_batch(PROMPTS[0])
    others = [asyncio.create_task(server.ask(prompt, max_tokens=2)) for prompt in PROMPTS[1:]]
    await asyncio.sleep(0.02)
    assert server.batches == [PROMPTS[:1]]
    server.gate.set()
    await asyncio.gather(*others)
    assert server.batches == [PROMPTS[:1], PROMPTS[1:]]
    assert not first.done()  # the short answers did not wait for the long one
    assert (await first).token_ids == reference(server, PROMPTS[0], max_tokens=40).token_ids


@served
async def test_the_limit_is_what_was_asked_for_or_what_fits(server, path):
    """A prompt and its answer share prompt_length + response_length = 48 tokens."""
    short, filled, default = await asyncio.gather(
        server.ask([5] * 4, max_tokens=3, stop_token_ids=None),
        server.ask([5] * 44, max_tokens=40),
        server.generate([5] * 4, {"temperature": 1.0, "seed": 3}, request_id="any"),
    )
    assert len(short.token_ids) == 3 and short.stop_reason == "length"
    assert len(filled.token_ids) <= 4
    assert len(default.token_ids) <= 40
    with pytest.raises(ValueError, match="a prompt of 48 tokens leaves no room"):
        await server.ask([5] * 48)


@served
async def test_a_stop_token_completes_a_request(server, path):
    token = reference(server, PROMPTS[0]).token_ids[2]
    output = await server.ask(PROMPTS[0], stop_token_ids=[token])
    assert output.stop_reason == "completed" and output.token_ids[-1] == token and len(output.token_ids) <= 3
    assert server.stop_ids == {server.tokenizer.eos_token_id}


@pytest.mark.parametrize("ends", [3, [3, 4]])
def test_the_generation_configs_end_tokens_stop_too(path, tmp_path, ends):
    """A base model's tokenizer ends with another token than its instruction-tuned turns do."""
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    GenerationConfig(eos_token_id=ends).save_pretrained(tmp_path)
    server = Server(str(tmp_path))
    assert server.stop_ids == {server.tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends)}


def test_a_turn_ends_at_the_generation_configs_end_token(path, tmp_path):
    async def body():
        async with Server(path) as server:
            token = reference(server, PROMPTS[0]).token_ids[2]
        shutil.copytree(path, tmp_path, dirs_exist_ok=True)
        GenerationConfig(eos_token_id=token).save_pretrained(tmp_path)
        async with Server(str(tmp_path)) as server:
            output = await server.ask(PROMPTS[0])
            assert output.stop_reason == "completed" and output.token_ids[-1] == token

    asyncio.run(body())


def test_max_model_len_limits_a_request_where_it_is_smaller(path):
    async def body():
        async with Server(path, max_model_len=20) as server:
            output = await server.ask([5] * 17, max_tokens=40)
            assert len(output.token_ids) == 3 and output.stop_reason == "length"
            with pytest.raises(ValueError, match="a prompt of 20 tokens leaves no room in 20 tokens"):
                await server.ask([5] * 20)

    asyncio.run(body())


@served
async def test_a_seed_fixes_the_sample_whatever_shares_the_batch(server, path):
    alone = await server.ask(PROMPTS[0], temperature=1.0, seed=11)
    shared, *_ = await asyncio.gather(
        server.ask(PROMPTS[0], temperature=1.0, seed=11), *(server.ask(p, temperature=1.0) for p in PROMPTS)
    )
    assert shared.token_ids == alone.token_ids


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"min_p": 0.1}, r"does not know: \['min_p'\]"),
        ({"presence_penalty": 1.0, "best_of": 2}, r"does not know: \['best_of', 'presence_penalty'\]"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2: the transformers rollout has none"),
    ],
)
def test_a_sampling_parameter_that_would_be_ignored_is_refused(path, params, message):
    @served
    async def body(server, path):
        with pytest.raises(ValueError, match=message):
            await server.ask(PROMPTS[0], **params)
        assert server.batches == []
        await server.ask(PROMPTS[0], repetition_penalty=1.0)  # verl always sends this one

    body(path)


@pytest.mark.parametrize("media", ["image_data", "video_data"])
def test_images_and_videos_are_refused(path, media):
    @served
    async def body(server, path):
        with pytest.raises(ValueError, match="is for text"):
            await server.generate(PROMPTS[0], dict(GREEDY), request_id="any", **{media: [object()]})

    body(path)


@served
async def test_a_batch_that_fails_tells_its_callers_and_the_server_goes_on(server, path):
    bad = [10_000]  # no such token
    with pytest.raises(RuntimeError, match="transformers rollout: IndexError"):
        await server.ask(bad)
    assert (await server.ask(PROMPTS[0])).token_ids == reference(server, PROMPTS[0]).token_ids


def test_a_precision_that_it_has_not_got_is_refused(path):
    with pytest.raises(ValueError, match=r"rollout\.dtype='float16'"):
        Server(path, dtype="float16")


def test_a_sharded_replica_is_refused(path):
    replica = TransformersReplica.__new__(TransformersReplica)  # its __init__ reads a whole trainer's config
    replica.world_size = 2
    with pytest.raises(ValueError, match="set tensor_model_parallel_size=1"):
        asyncio.run(replica.launch_servers())


# -- the device -------------------------------------------------------------------------------------------------------


def test_model_and_cache_are_on_the_device_that_is_trained_on(path, monkeypatch):
    """Without a GPU: "meta" is the other device."""
    monkeypatch.setattr("verl_ext.rollout.server.get_device_name", lambda: "meta")
    server = Server(path, dtype="bfloat16")
    tensors = [*server.parameters.values(), *server.model.buffers(), *(one.buffer for one in server._batch._layers)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.dtype for tensor in server.parameters.values()} == {torch.bfloat16}
    name, value = next(iter(server.parameters.items()))
    server._copy([(name, torch.ones(value.shape))])  # as a bucket brings it


NODE = "ab" * 28  # in Ray's form


class Handed:
    """What the adapter asks of a worker's handle; `device` is the one that Ray gave the worker."""

    def __init__(self, device):
        self.context = SimpleNamespace(get_node_id=lambda: NODE, get_accelerator_ids=lambda: {"GPU": [device]})
        self.__ray_call__ = SimpleNamespace(remote=self.call)

    async def call(self, function):
        return function(self)


@pytest.mark.parametrize("platform", [CPUPlatform, PlatformCUDA])
def test_the_server_sees_the_device_of_its_worker_and_no_other(monkeypatch, platform):
    """Before its process imports anything: verl's import asks CUDA for the devices, and CUDA looks once."""
    asked = {}

    def options(**given):
        asked.update(given)

        async def ready():
            return "address"

        return SimpleNamespace(remote=lambda **kwargs: SimpleNamespace(ready=SimpleNamespace(remote=ready)))

    worker = Handed("3")
    monkeypatch.setattr("verl.utils.device.get_platform", platform)
    monkeypatch.setattr("verl_ext.rollout.server.get_platform", platform)
    monkeypatch.setattr("ray.get_runtime_context", lambda: worker.context)
    monkeypatch.setattr("ray.remote", lambda cls: SimpleNamespace(options=options))
    replica = TransformersReplica.__new__(TransformersReplica)  # its __init__ reads a whole trainer's config
    replica.world_size, replica.replica_rank, replica.workers = 1, 3, [worker]
    replica.config, replica.model_config = rollout_config(), None
    asyncio.run(replica.launch_servers())
    assert asked["runtime_env"] == {
        "env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "3"}
    }
    assert "num_gpus" not in asked and asked["scheduling_strategy"].node_id == NODE


@served
async def test_while_it_sleeps_it_holds_no_keys_and_values(server, path):
    expected = await server.ask(PROMPTS[0])
    buffers = [weakref.ref(layer.buffer) for layer in server._batch._layers]
    assert server._batch._kept
    await server.sleep()
    assert not any(buffer() is not None for buffer in buffers) and not server._batch._kept
    await server.wake_up()
    assert await server.ask(PROMPTS[0]) == expected


@pytest.mark.parametrize("name", ["sleep", "clear_kv_cache", "release_kv_cache"])
def test_keys_and_values_never_go_under_a_running_batch(path, name):
    @served
    async def body(server, path):
        expected = reference(server, PROMPTS[0], max_tokens=40).token_ids
        running = await server.held_batch(PROMPTS[0])
        sleeping = asyncio.create_task(getattr(server, name)())
        await asyncio.sleep(0.02)
        assert not sleeping.done()
        server.gate.set()
        assert (await running).token_ids == expected
        await sleeping
        assert not server._batch._kept

    body(path)


# -- weights ----------------------------------------------------------------------------------------------------------


def other_weights(path, tmp_path, tokenizer):
    save_model(tmp_path, tokenizer, seed=1)
    return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()


class Handle:
    """What a Ray actor handle looks like to the adapter."""

    def __init__(self, server):
        self.sizes: list[int] = []

        async def load(bucket):
            self.sizes.append(len(bucket))
            await server.load_weights(bucket)

        self.load_weights = SimpleNamespace(remote=load)
        self.set_global_steps = SimpleNamespace(remote=server.set_global_steps)


def adapter_of(path, handle, megabytes):
    checkpoint_engine = {
        "_target_": "verl.workers.config.CheckpointEngineConfig",
        "update_weights_bucket_megabytes": megabytes,
    }
    config = {
        "_target_": "verl.workers.config.RolloutConfig",
        "name": "transformers",
        "dtype": "float32",  # the server's
        "checkpoint_engine": checkpoint_engine,
    }
    adapter = TransformersAdapter(OmegaConf.create(config), model_config(path), None, replica_rank=0)
    adapter._server = handle
    return adapter


@pytest.mark.parametrize("megabytes", [64, 0], ids=["one bucket", "a bucket a tensor"])
def test_after_a_weight_sync_the_server_is_the_trained_model(path, tmp_path, megabytes):
    @served
    async def body(server, path):
        trained = other_weights(path, tmp_path, server.tokenizer)
        handle = Handle(server)
        before = await server.ask(PROMPTS[2])
        # what FSDP hands over: a generator, the tied head included or not
        await adapter_of(path, handle, megabytes).update_weights(trained.state_dict().items(), global_steps=4)
        after = await server.ask(PROMPTS[2])
        (expected,) = generate(trained, [Request(PROMPTS[2], 6, temperature=0.0)], vocab_size=len(server.tokenizer))
        assert after.log_probs == pytest.approx(expected.log_probs, abs=1e-6) and after.token_ids == expected.token_ids
        assert after.log_probs != pytest.approx(before.log_probs, abs=1e-3)
        assert (before.extra_fields["global_steps"], after.extra_fields["global_steps"]) == (None, 4)
        count = len(trained.state_dict())
        assert handle.sizes == ([count] if megabytes else [1] * count)

    body(path)


@served
async def test_weights_never_change_under_a_running_batch(server, path):
    expected = reference(server, PROMPTS[0], max_tokens=40).token_ids
    running = await server.held_batch(PROMPTS[0])
    zeros = [(name, torch.zeros_like(value)) for name, value in server.parameters.items()]
    loading = asyncio.create_task(server.load_weights(zeros))
    await asyncio.sleep(0.02)
    assert not loading.done()
    server.gate.set()
    assert (await running).token_ids == expected
    await loading
    assert not any(value.any() for value in server.parameters.values())


@served
async def test_a_sleeping_server_holds_no_keys_and_values(server, path):
    """verl sends it to sleep after the rollout of a step, and asks again without a wake-up."""

    def held():
        return server._batch._kept_size + sum(layer.buffer.nbytes for layer in server._batch._layers)

    expected = reference(server, PROMPTS[0], max_tokens=40).token_ids
    running = await server.held_batch(PROMPTS[0])
    sleeping = asyncio.create_task(server.sleep())
    await asyncio.sleep(0.02)
    assert not sleeping.done()  # a row is running
    server.gate.set()
    assert (await running).token_ids == expected
    await sleeping
    assert held() == 0
    assert (await server.ask(PROMPTS[0], max_tokens=40)).token_ids == expected
    assert held() > 0


def test_a_sleeping_server_may_drop_its_weights_and_then_waits_for_all_of_them(path):
    async def body():
        async with Server(path, free_cache_engine=True) as server:
            expected = reference(server, PROMPTS[0]).token_ids
            weights = [(name, value.clone()) for name, value in server.parameters.items()]
            assert len(weights) == 1 + len({id(value) for value in server.parameters.values()})  # a tied matrix
            await server.sleep()
            assert sum(value.nbytes for value in server.parameters.values()) == 0
            asked = asyncio.create_task(server.ask(PROMPTS[0]))
            await server.load_weights(weights[2:])
            await asyncio.sleep(0.02)
            assert not asked.done()
            await server.load_weights(weights[:2])
            assert (await asyncio.wait_for(asked, 60)).token_ids == expected
            assert all(torch.equal(server.parameters[name], value) for name, value in weights)

    asyncio.run(body())


@served
async def test_an_unknown_weight_is_refused_and_none_of_its_bucket_is_loaded(server, path):
    name, value = next(iter(server.parameters.items()))
    before = value.clone()
    with pytest.raises(KeyError, match="no parameters"):
        await server.load_weights([(name, torch.zeros_like(value)), ("model.layers.9.weight", torch.zeros(1))])
    assert torch.equal(server.parameters[name], before)


def test_a_wire_format_that_is_not_full_tensors_is_refused(path):
    with pytest.raises(ValueError, match="wire_format='delta'"):
        asyncio.run(adapter_of(path, None, 64).update_weights([], wire_format="delta"))


def test_buckets_keep_the_order_and_the_limit_and_a_large_tensor_goes_alone():
    async def collect():
        weights = [(str(n), torch.zeros(n)) for n in (1, 2, 3, 9, 1, 1)]  # 4 bytes each
        return [[name for name, _ in bucket] async for bucket in _buckets(iter(weights), limit, dtype)]

    limit, dtype = 12, torch.float32
    assert asyncio.run(collect()) == [["1", "2"], ["3"], ["9"], ["1", "1"]]
    dtype = torch.bfloat16  # sent as the server will have them: half the bytes
    assert asyncio.run(collect()) == [["1", "2", "3"], ["9"], ["1", "1"]]


class OnAGPU:
    """A tensor of the trainer's, as far as the adapter handles it."""

    def __init__(self, value):
        self.value = value

    def detach(self):
        return self

    def to(self, device, dtype):
        assert device == "cpu"
        return self.value.to(dtype)


def test_weights_of_a_gpu_travel_in_ordinary_memory():
    async def collect():
        return [bucket async for bucket in _buckets(iter([("w", OnAGPU(torch.ones(2)))]), 8, torch.bfloat16)]

    ((name, tensor),) = asyncio.run(collect())[0]
    assert name == "w" and tensor.dtype == torch.bfloat16 and tensor.tolist() == [1.0, 1.0]


# -- aborts -----------------------------------------------------------------------------------------------------------


@served
async def test_an_abort_hands_back_what_was_generated_and_holds_new_requests(server, path):
    whole = reference(server, PROMPTS[0], max_tokens=40)
    assert len(whole.token_ids) > 1
    running = await server.held_batch(PROMPTS[0])
    waiting = asyncio.create_task(server.ask(PROMPTS[1]))
    await asyncio.sleep(0)
    await server.abort_all_requests()
    server.gate.set()
    cut, unserved = await asyncio.gather(running, waiting)
    assert (cut.stop_reason, cut.token_ids) == ("aborted", whole.token_ids[:1]) and len(cut.log_probs) == 1
    assert (unserved.stop_reason, unserved.token_ids) == ("aborted", [])
    assert unserved.extra_fields == {"global_steps": None}  # no weights have sampled it

    held = asyncio.create_task(server.ask(PROMPTS[2]))
    await asyncio.sleep(0.05)
    assert not held.done() and len(server.batches) == 1
    await server.resume_generation()
    assert (await held).token_ids == reference(server, PROMPTS[2]).token_ids


@served
async def test_a_server_that_verl_takes_out_of_its_balancer_sends_late_requests_away(server, path):
    """One that waited here would wait until verl takes the server back: for ever, at the end of a run."""
    await server.abort_all_requests(reject_request=True)
    sent_away = await asyncio.wait_for(server.ask(PROMPTS[0]), 5)
    assert (sent_away.stop_reason, sent_away.token_ids) == ("aborted", [])
    await server.abort_all_requests()  # a plain one, as of a weight sync, makes them wait again
    held = asyncio.create_task(server.ask(PROMPTS[0]))
    await asyncio.sleep(0.05)
    assert not held.done()
    await server.resume_generation()
    assert (await held).token_ids == reference(server, PROMPTS[0]).token_ids


@served
async def test_an_aborted_request_goes_on_where_it_stopped(server, path):
    """What verl's client does: the same prompt with the tokens it has got."""
    whole = reference(server, PROMPTS[0], max_tokens=40)
    running = await server.held_batch(PROMPTS[0])
    await server.abort_all_requests()
    server.gate.set()
    cut = await running
    await server.resume_generation()
    rest = await server.ask(PROMPTS[0] + cut.token_ids, max_tokens=40 - len(cut.token_ids))
    assert cut.token_ids + rest.token_ids == whole.token_ids
