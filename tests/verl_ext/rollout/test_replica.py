"""The transformers rollout's server as a real Ray actor: it sees its worker's device, of several, and answers."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest
import ray
import torch
from omegaconf import OmegaConf
from verl.workers.config import RolloutConfig
from verl.workers.rollout.replica import RolloutMode

from recipe.gtpo.tasks.arithmetic.policy import build_model, train_tokenizer
from verl_ext.rollout.server import TransformersReplica

pytestmark = pytest.mark.e2e


@ray.remote(num_cpus=0, num_gpus=1)
class Worker:
    """In a training worker's place."""

    def device(self):
        return ray.get_runtime_context().get_accelerator_ids()["GPU"]


@pytest.fixture(scope="module", autouse=True)
def _ray():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors' processes do not know this module
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = train_tokenizer(["1 + 1"], vocab_size=270, directory=folder)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32}
    build_model(**shape, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id).save_pretrained(folder)
    return str(folder)


def environment(server):
    return {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "VERL_PLATFORM")}


def test_each_server_sees_the_device_of_its_worker_and_answers(policy):
    workers = [Worker.remote(), Worker.remote()]
    devices = ray.get([worker.device.remote() for worker in workers])
    assert sorted(devices) == [["0"], ["1"]]
    lengths = {"prompt_length": 8, "response_length": 8}
    config = RolloutConfig(name="transformers", **lengths, dtype="float32", tensor_model_parallel_size=1)
    model = OmegaConf.create({"_target_": "verl.workers.config.HFModelConfig", "path": policy})
    for rank, worker in enumerate(workers):
        replica = TransformersReplica(rank, config, model, gpus_per_node=2)
        replica.rollout_mode, replica.workers = RolloutMode.HYBRID, [worker]
        asyncio.run(asyncio.wait_for(replica.launch_servers(), timeout=300))
        server = replica.server_handle
        seen = ray.get(server.__ray_call__.remote(environment))
        assert seen == {"CUDA_VISIBLE_DEVICES": devices[rank][0], "VERL_PLATFORM": "cpu"}
        weights = ray.get(server.__ray_call__.remote(lambda server: list(server.parameters.items())))
        ray.get([server.sleep.remote(), server.release_kv_cache.remote(), server.wake_up.remote()])
        ray.get(server.load_weights.remote([(name, torch.zeros_like(value)) for name, value in weights]))
        asked = server.generate.remote([5, 6], {"temperature": 0.0, "max_tokens": 3}, request_id="any")
        output = ray.get(asked, timeout=300)
        assert len(output.token_ids) <= 3 and isinstance(output.log_probs[0], float)
