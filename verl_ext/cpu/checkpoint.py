"""New weights for rollout servers that have no training process beside them: a broadcast over gloo.

verl's separate_async trainer samples on GPUs of their own and sends the weights there by a "checkpoint engine"; those
that it has need CUDA, an NPU or RDMA. This one does the same over TCP: training rank 0 sends, every rollout worker
receives. verl imports this module where `rollout.checkpoint_engine.custom_backend_module` names it.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch
from torch.distributed import BroadcastOptions, ProcessGroupGloo, Store, TCPStore
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.utils.distributed import create_tcp_store
from verl.workers.rollout.utils import ensure_async_iterator

BACKEND = "gloo"
_SECONDS = timedelta(seconds=60)  # for a peer to come, or to take a tensor


@dataclass(frozen=True)
class Meeting:
    """Where the workers of one weight sync find each other."""

    host: str
    port: int


@CheckpointEngineRegistry.register(BACKEND)
class GlooCheckpointEngine(CheckpointEngine):
    """One group a weight sync: it costs milliseconds, and a replica that came or went needs no more.

    Args:
        bucket_size: of a message, in bytes; a larger tensor is a message of its own.
        is_master: whether this is the worker that sends.
    """

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.bucket_size = bucket_size
        self.is_master = is_master
        self._store: Store | None = None
        self._group: ProcessGroupGloo | None = None

    def prepare(self) -> Meeting | None:
        """Of the sender: open the store and say where it is."""
        if not self.is_master:
            return None
        host = ray.util.get_node_ip_address().strip("[]")
        listening = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        port = listening.getsockname()[1]
        self._store = create_tcp_store(host, port, listening, is_master=True, wait_for_workers=False, timeout=_SECONDS)
        return Meeting(host, port)

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Rank 0 sends, ranks from 1 on receive; the other training workers (-1) stay out."""
        size = 1 + rollout_world_size

        def each(ranks: list[int]) -> dict[str, list[Any]]:
            return {"rank": ranks, "size": [size] * len(ranks), "meeting": [metadata[0]] * len(ranks)}

        return each([0] + [-1] * (actor_wg_world_size - 1)), each(list(range(1, size)))

    def init_process_group(self, rank: int, size: int, meeting: Meeting) -> None:
        if rank < 0:
            return
        if self._store is None:
            self._store = TCPStore(meeting.host, meeting.port, is_master=False, timeout=_SECONDS)
        self._group = ProcessGroupGloo(self._store, rank, size, _SECONDS)

    def finalize(self) -> None:
        self._group = self._store = None

    async def send_weights(self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None) -> None:
        bucket: list[tuple[str, torch.Tensor]] = []
        size = 0
        async for name, tensor in ensure_async_iterator(weights):  # making a tensor takes all training workers
            if self._group is None:
                continue
            if bucket and size + tensor.nbytes > self.bucket_size:
                await self._send(bucket)
                bucket, size = [], 0
            bucket.append((name, tensor.detach().contiguous()))
            size += tensor.nbytes
        if self._group is not None:
            await self._send(bucket)
            await self._send(None)

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        while (bucket := await self._receive()) is not None:
            for name, tensor in bucket:
                yield name, tensor

    # A bucket is its description (length, then a pickle of names, shapes and types) and its bytes; None ends.

    async def _send(self, bucket: list[tuple[str, torch.Tensor]] | None) -> None:
        about = None if bucket is None else [(name, tensor.shape, tensor.dtype) for name, tensor in bucket]
        words = torch.frombuffer(bytearray(pickle.dumps(about)), dtype=torch.uint8)
        await self._broadcast(torch.tensor([len(words)]))
        await self._broadcast(words)
        if bucket:
            await self._broadcast(torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in bucket]))

    async def _receive(self) -> list[tuple[str, torch.Tensor]] | None:
        length = await self._broadcast(torch.zeros(1, dtype=torch.int64))
        words = await self._broadcast(torch.zeros(int(length), dtype=torch.uint8))
        about = pickle.loads(words.numpy().tobytes())
        if not about:
            return about
        sizes = [shape.numel() * dtype.itemsize for _, shape, dtype in about]
        data = await self._broadcast(torch.empty(sum(sizes), dtype=torch.uint8))
        # a piece of its own each: a view into the message need not begin where its type may
        parts = (part.clone() for part in data.split(sizes))
        return [(name, part.view(dtype).view(shape)) for (name, shape, dtype), part in zip(about, parts, strict=True)]

    async def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self._group is not None, "init_process_group comes first"
        options = BroadcastOptions()
        options.rootRank = 0
        work = self._group.broadcast([tensor], options)
        await asyncio.to_thread(work.wait)  # the worker's event loop stays free
        return tensor
