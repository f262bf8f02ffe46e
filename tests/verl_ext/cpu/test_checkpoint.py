"""Protects the way of new weights to rollout workers of their own: every tensor arrives at each, as it was sent."""

from __future__ import annotations

import asyncio

import pytest
import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngineRegistry

from verl_ext.cpu.checkpoint import BACKEND, GlooCheckpointEngine, Meeting

pytestmark = pytest.mark.unit

WEIGHTS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "odd bytes": torch.tensor([True, False, True]),  # what follows begins where its type may not
    "b": torch.linspace(-1, 1, 7, dtype=torch.float64),
    "scalar": torch.tensor(2.5),
    "none": torch.empty(0, 3),
    "half": torch.full((5,), 0.1, dtype=torch.bfloat16),
    "large": torch.arange(100, dtype=torch.int64),
    "turned": torch.arange(6.0).reshape(2, 3).T,
}


@pytest.fixture(autouse=True)
def loopback(monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")


def group(trainers: int, rollouts: int, bucket: int):
    """As verl's `CheckpointEngineManager.build_process_group` puts them together, in one process."""
    actors = [GlooCheckpointEngine(bucket, is_master=rank == 0) for rank in range(trainers)]
    receivers = [GlooCheckpointEngine(bucket) for _ in range(rollouts)]
    return actors, receivers


async def sync(actors, receivers, weights):
    metadata = [engine.prepare() for engine in [*actors, *receivers]]
    places = GlooCheckpointEngine.build_topology(len(actors), len(receivers), metadata)
    calls = [
        asyncio.to_thread(engine.init_process_group, **{key: value[i] for key, value in kwargs.items()})
        for engines, kwargs in zip((actors, receivers), places, strict=True)
        for i, engine in enumerate(engines)
    ]
    await asyncio.gather(*calls)

    async def receive(engine):
        return [(name, tensor) async for name, tensor in engine.receive_weights(global_steps=1)]

    sends = [engine.send_weights(iter(weights.items()), global_steps=1) for engine in actors]
    _, *rest = await asyncio.gather(*sends, *map(receive, receivers))
    for engine in [*actors, *receivers]:
        engine.finalize()
    return rest[len(actors) - 1 :]


@pytest.mark.parametrize("bucket", [1, 40, 1 << 20])
def test_every_tensor_arrives_as_it_was_sent_at_every_receiver_every_time(bucket):
    actors, receivers = group(trainers=2, rollouts=2, bucket=bucket)
    for again in range(2):
        sent = {name: tensor + again if tensor.is_floating_point() else tensor for name, tensor in WEIGHTS.items()}
        for got in asyncio.run(sync(actors, receivers, sent)):
            assert [name for name, _ in got] == list(sent)
            for name, tensor in got:
                assert tensor.dtype == sent[name].dtype and torch.equal(tensor, sent[name])


def test_training_workers_that_do_not_send_still_make_every_tensor():
    """Each is gathered from all of them: one that stayed away would leave the others waiting."""
    made = []
    actors, receivers = group(trainers=2, rollouts=1, bucket=1 << 20)

    class Watched(dict):
        def items(self):
            for name, tensor in WEIGHTS.items():
                made.append(name)
                yield name, tensor

    asyncio.run(sync(actors, receivers, Watched()))
    assert sorted(made) == sorted(2 * list(WEIGHTS))


def test_ranks_are_one_sender_then_the_receivers():
    meeting = Meeting("127.0.0.1", 1)
    actors, receivers = GlooCheckpointEngine.build_topology(3, 2, [meeting, None, None, None, None])
    assert actors == {"rank": [0, -1, -1], "size": [3] * 3, "meeting": [meeting] * 3}
    assert receivers == {"rank": [1, 2], "size": [3] * 2, "meeting": [meeting] * 2}


def test_verl_makes_it_by_name_with_what_it_knows():
    sender = CheckpointEngineRegistry.new(BACKEND, is_master=True, bucket_size=8)
    assert isinstance(sender, GlooCheckpointEngine) and sender.is_master
    assert not CheckpointEngineRegistry.new(BACKEND, bucket_size=8).is_master
