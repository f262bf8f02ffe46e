"""A rollout backend named "transformers": verl's server mode without vLLM or SGLang.

One async Ray actor a replica, on the device that is trained on, with continuous batching: a request joins the running
batch at its next token. Slow beside a real engine on a GPU, and meant for small models: it starts in seconds and
installs nothing. On a GPU: not run.

- `TransformersServer`: the actor.
- `TransformersReplica`: verl's handle on it (`RolloutReplica`).
- `TransformersAdapter`: lives in the training worker and pushes new weights (`BaseRollout`).

`verl_ext.plugin` makes them known to verl.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.plugin.platform import get_platform
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import get_device_name, get_resource_name, get_torch_device, get_visible_devices_keyword
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput
from verl.workers.rollout.utils import ensure_async_iterator

from verl_ext.rollout.generation import ContinuousBatch, Request, Sample

NAME = "transformers"
logger = logging.getLogger(__name__)


def server_actor_name(replica_rank: int) -> str:
    return f"{NAME}_server_{replica_rank}"


def torch_dtype(config: RolloutConfig) -> torch.dtype:
    """Of the server's weights. Raises ValueError for one that it has not got."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.dtype)
    if dtype is None:
        raise ValueError(f"rollout.dtype={config.dtype!r}: the transformers rollout has float32 and bfloat16")
    return dtype


class TransformersServer:
    """Token-in, token-out generation for one replica (an async Ray actor)."""

    def __init__(self, config: RolloutConfig, model_config: Any, replica_rank: int) -> None:
        from transformers import AutoModelForCausalLM

        self.config = config
        model: HFModelConfig = omega_conf_to_dataclass(model_config)
        dtype = torch_dtype(config)
        torch.manual_seed(config.seed + replica_rank)
        self.model = AutoModelForCausalLM.from_pretrained(
            model.local_path, dtype=dtype, attn_implementation="sdpa", trust_remote_code=model.trust_remote_code
        )
        # of several GPUs the actor sees its worker's only
        self.model = self.model.to(get_device_name()).eval()
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.tokenizer = model.tokenizer
        # As vLLM and SGLang do: an instruction-tuned model's end of turn may be in its generation config only.
        ends = [self.tokenizer.eos_token_id, getattr(model.generation_config, "eos_token_id", None)]
        self.stop_ids = frozenset(i for end in ends for i in _as_list(end) if i is not None)
        self.global_steps: int | None = None
        self._batch = self._new_batch()
        self._waiting: list[tuple[Request, asyncio.Future[Sample]]] = []
        self._running: list[tuple[Sample, asyncio.Future[Sample]]] = []
        self._wake = asyncio.Event()
        self._admit = asyncio.Event()  # clear: an abort holds new requests back
        self._admit.set()
        self._rejecting = False  # they are sent away instead: verl has taken this server out of its balancer
        self._drained = asyncio.Event()  # no row is running
        self._drained.set()
        self._changes = 0  # of weights or cache, that wait for the batch to end
        # One thread: torch's own pool has the cores, and nothing else touches the batch or the weights.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._loop_task: asyncio.Task | None = None

    def _new_batch(self) -> ContinuousBatch:
        return ContinuousBatch(
            self.model,
            vocab_size=len(self.tokenizer),
            pad_id=self.tokenizer.pad_token_id or 0,
            most_rows=self.config.max_num_seqs,
        )

    async def ready(self) -> str:
        """Start serving; returns an address-like label (the server speaks Ray, not HTTP)."""
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._serve())
        return ray.get_runtime_context().get_actor_id()

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        image_data: Any = None,
        video_data: Any = None,
    ) -> TokenOutput:
        """Continue `prompt_ids`. `sampling_params` takes vLLM's names; unknown ones raise instead of being ignored."""
        if image_data is not None or video_data is not None:
            raise ValueError("the transformers rollout is for text: it takes neither images nor videos")
        while not self._admit.is_set():
            if self._rejecting:
                return _unserved()
            await self._admit.wait()
        request = self._request(list(prompt_ids), dict(sampling_params))
        future: asyncio.Future[Sample] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._wake.set()
        sample = await future
        if not sample.token_ids:
            return _unserved()
        return TokenOutput(
            token_ids=sample.token_ids,
            log_probs=sample.log_probs,
            stop_reason="completed" if sample.stop_reason == "stop" else sample.stop_reason,
            extra_fields={"global_steps": self.global_steps},
        )

    def _request(self, prompt_ids: list[int], params: dict[str, Any]) -> Request:
        longest = self.config.prompt_length + self.config.response_length
        if self.config.max_model_len is not None:
            longest = min(longest, self.config.max_model_len)
        limit = min(params.pop("max_tokens", self.config.response_length), longest - len(prompt_ids))
        if limit < 1:
            raise ValueError(
                f"a prompt of {len(prompt_ids)} tokens leaves no room in {longest} tokens, the smaller of "
                "prompt_length + response_length and max_model_len"
            )
        params.pop("logprobs", None)  # always returned
        penalty = params.pop("repetition_penalty", 1.0)
        if penalty != 1.0:
            raise ValueError(f"repetition_penalty={penalty}: the transformers rollout has none")
        stop_ids = self.stop_ids | frozenset(params.pop("stop_token_ids", None) or ())
        request = Request(prompt_ids, limit, stop_ids=stop_ids)
        for name in ("temperature", "top_p", "top_k", "seed"):
            if name in params:
                setattr(request, name, params.pop(name))
        if params:
            raise ValueError(f"sampling parameters the transformers rollout does not know: {sorted(params)}")
        return request

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            room = 0 if self._changes or self._lacks_weights() else self.config.max_num_seqs - len(self._running)
            joining, self._waiting = self._waiting[:room], self._waiting[room:]
            if not joining and not self._running:
                self._drained.set()
                self._wake.clear()
                continue
            self._drained.clear()
            try:
                samples = await loop.run_in_executor(self._thread, self._advance, [request for request, _ in joining])
            except Exception as e:  # the batch is lost: its callers must hear of it, the server goes on
                logger.exception("generation failed")
                for _, future in [*joining, *self._running]:
                    if not future.done():
                        future.set_exception(RuntimeError(f"transformers rollout: {type(e).__name__}: {e}"))
                self._running.clear()
                self._batch = self._new_batch()
                continue
            self._running += [(sample, future) for sample, (_, future) in zip(samples, joining, strict=True)]
            for sample, future in self._running:
                if sample.stop_reason is not None and not future.done():
                    future.set_result(sample)
            self._running = [(sample, future) for sample, future in self._running if sample.stop_reason is None]

    def _advance(self, joining: list[Request]) -> list[Sample]:
        """In the thread: let requests join, then generate until a row ends or somebody waits for the event loop."""
        samples = self._batch.add(joining) if joining else []
        size = len(self._running) + len(joining)
        while len(self._batch) == size:
            if not self._admit.is_set():
                self._batch.abort()
                break
            self._batch.step()
            if self._waiting:
                break
        return samples

    # -- weights ------------------------------------------------------------------------------------------------

    async def load_weights(self, bucket: list[tuple[str, torch.Tensor]]) -> None:
        """Copy one bucket of full tensors into the model, once no row is running. Unknown names raise."""
        unknown = [name for name, _ in bucket if name not in self.parameters]
        if unknown:
            raise KeyError(f"weight sync: the rollout model has no parameters {unknown[:3]}")
        await self._between_rows(self._copy, bucket)

    async def _between_rows(self, change: Callable[..., None], *arguments: Any) -> None:
        """Make a change in the thread, once no row is running."""
        self._changes += 1  # nobody joins: a row's cached keys and values must not outlive their weights
        try:
            await self._drained.wait()
            await asyncio.get_running_loop().run_in_executor(self._thread, change, *arguments)
        finally:
            self._changes -= 1
            self._wake.set()

    @torch.no_grad()
    def _copy(self, bucket: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in bucket:
            parameter = self.parameters[name]
            if parameter.numel():
                parameter.copy_(tensor)
            else:  # dropped in sleep
                parameter.data = tensor.to(parameter.device, parameter.dtype, copy=True)
        self._batch.forget()

    async def set_global_steps(self, global_steps: int) -> None:
        """The version of the weights; travels with every output (verl's staleness control reads it)."""
        self.global_steps = global_steps

    # -- life-cycle calls of verl's RolloutReplica ----------------------------------------------------------------

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """Running rows end with what they have ("aborted"); new requests wait for `resume_generation`.

        Args:
            reject_request: new requests end at once, "aborted", and verl's client takes them to another server.
        """
        self._rejecting = reject_request
        self._admit.clear()
        for _, future in self._waiting:
            if not future.done():
                future.set_result(Sample(stop_reason="aborted"))
        self._waiting.clear()

    async def resume_generation(self) -> None:
        self._rejecting = False
        self._admit.set()

    async def sleep(self) -> None:
        """Once no row is running, leave the memory to the trainer's update: drop all keys and values.

        With `free_cache_engine` drop the weights too, as verl's other engines do. Requests then wait until the next
        weight sync has brought all of them.
        """
        await self._between_rows(self._release, self.config.free_cache_engine)

    def _release(self, weights: bool) -> None:
        self._batch = self._new_batch()
        if weights:
            for parameter in self.parameters.values():
                parameter.data = parameter.data.new_empty(0)
        get_torch_device().empty_cache()

    def _lacks_weights(self) -> bool:
        return any(parameter.numel() == 0 for parameter in self.parameters.values())

    async def clear_kv_cache(self) -> None:
        await self._between_rows(self._release, False)

    async def release_kv_cache(self) -> None:
        await self._between_rows(self._release, False)

    # Nothing to restore: the cache grows with the rows that join, and weights come with the next sync.
    async def wake_up(self) -> None: ...

    async def resume_kv_cache(self) -> None: ...


def _unserved() -> TokenOutput:
    """To a request that got no token. No weights have sampled it, so it has no `global_steps`."""
    return TokenOutput(token_ids=[], log_probs=[], stop_reason="aborted", extra_fields={"global_steps": None})


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def where_it_is(worker: Any) -> tuple[str, str]:
    """Node and device of an actor that has one, in Ray's words; runs in the actor."""
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_accelerator_ids()[get_resource_name()][0]


def sees(device: str) -> dict[str, str]:
    """Environment of an actor that asks Ray for no device, and shall see this one.

    verl's other servers set it when they run, for the engine's process that they start. This one has the model in its
    own process, where verl's import has asked CUDA for its devices by then.
    """
    return {**dict.fromkeys(get_platform().ray_noset_envvars(), "1"), get_visible_devices_keyword(): device}


class TransformersReplica(RolloutReplica):
    """verl's handle on one `TransformersServer`."""

    async def launch_servers(self) -> None:
        if self.world_size != 1:
            raise ValueError("the transformers rollout does not shard a model: set tensor_model_parallel_size=1")
        # It asks Ray for nothing, and would come to lie on any node: beside its worker the weights need no network.
        node, device = await self.workers[0].__ray_call__.remote(where_it_is)
        server = (
            ray.remote(TransformersServer)
            .options(
                name=server_actor_name(self.replica_rank),
                num_cpus=0,
                max_concurrency=self.max_concurrency,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
                runtime_env={"env_vars": sees(device)},
            )
            .remote(config=self.config, model_config=self.model_config, replica_rank=self.replica_rank)
        )
        self.servers = [server]
        self._server_handle = server
        self._server_address = await server.ready.remote()


class TransformersAdapter(BaseRollout):
    """In the training worker: sends the engine's weights to this rank's server, bucket by bucket."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        self.replica_rank = torch.distributed.get_rank() if replica_rank == -1 else replica_rank
        self._server: Any = None

    @property
    def server(self) -> Any:
        if self._server is None:  # the server starts after the training worker
            self._server = ray.get_actor(server_actor_name(self.replica_rank))
        return self._server

    async def update_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        if wire_format != "named_tensors":
            raise ValueError(f"the transformers rollout takes full tensors, not wire_format={wire_format!r}")
        limit = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        async for bucket in _buckets(weights, limit, torch_dtype(self.config)):
            await self.server.load_weights.remote(bucket)
        if global_steps is not None:
            await self.server.set_global_steps.remote(global_steps)

    async def resume(self, tags: list[str]) -> None: ...

    async def release(self) -> None: ...


async def _buckets(
    weights: Iterable[tuple[str, torch.Tensor]], limit: int, dtype: torch.dtype
) -> AsyncIterator[list[tuple[str, torch.Tensor]]]:
    """Groups of at most `limit` bytes (a single larger tensor is a group of its own), in the server's precision.

    On the CPU, because they go through Ray's object store; the server's copy brings each to its device.
    """
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    async for name, given in ensure_async_iterator(weights):
        tensor = given.detach().to("cpu", dtype)
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
