"""Backend ``ray``: one actor per node of a Ray cluster, each with the dispatcher of a tool server.

A request goes to the caller's own node while that has a free worker, else to the least loaded node. When a node is lost
its unanswered requests are sent to another. A node that does not start, or cannot run code safely, is left out and
tried again; only where there is no other do calls wait for it, and fail with what it says. Model-written code never
runs in a Ray worker: the actor's zygotes are separate programs, started by exec.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl_ext.tool_server.backends import BackendUnavailable, RequestRejected
from verl_ext.tool_server.types import ExecutionRequest, ExecutionResult

logger = logging.getLogger(__name__)

NAMESPACE = "tool_server"
REFRESH_SECONDS = 10.0  # how soon a node that joined is used
START_SECONDS = 180.0  # building the tool runtime on a fresh node included
SPREAD_SECONDS = 1.0  # how long the first calls wait for the other nodes when the first one is there
# What a call of an actor raises that is gone: Ray has another error for one that it killed for its memory.
_GONE = (RayActorError, OutOfMemoryError)


class NodeExecutor:
    """The actor: one per node, shared by all clients of the cluster."""

    def __init__(self, options: dict[str, Any]) -> None:
        from verl_ext.tool_server.backends.local import LocalBackend

        self._backend = LocalBackend(**options)

    async def ready(self) -> int:
        """Start. Returns the number of executions this node runs at once."""
        await self._backend.dispatcher()
        return self._backend.workers

    async def run(self, request: dict[str, Any]) -> tuple[str, Any, int]:
        """Returns ("result" | "busy" | "rejected", content, load of this node)."""
        try:
            (result,) = await self._backend.run([ExecutionRequest.from_dict(request)])
        except BackendUnavailable as error:
            return "busy", (str(error), error.retry_after), self._backend.load
        except RequestRejected as error:
            return "rejected", str(error), self._backend.load
        return "result", result.to_dict(), self._backend.load

    async def health(self) -> dict[str, Any]:
        return await self._backend.health()


@dataclass
class _Node:
    """What this client knows of one node."""

    node_id: str
    actor: Any
    workers: int = 1
    mine: int = 0  # requests of this client under way there
    others: int = 0  # the rest of its load, when it last answered

    @property
    def fullness(self) -> float:
        return (self.mine + self.others) / self.workers


class RayBackend:
    """Uses the cluster this process is connected to (``ray.init`` was called).

    Args:
        options: for each node's :class:`~verl_ext.tool_server.backends.local.LocalBackend` (isolation, workers, ...).
            The first client to reach a node decides.
    """

    def __init__(self, **options: Any) -> None:
        if not ray.is_initialized():
            raise RuntimeError("the ray backend needs a connected process: call ray.init() first")
        self._options = options
        self._nodes: dict[str, _Node] = {}
        self._starting: dict[str, asyncio.Task[None]] = {}  # by node
        self._left_out: dict[str, BaseException] = {}  # why, by node
        self._refreshed = 0.0
        self._refreshing = asyncio.Lock()
        self._own_node = ray.get_runtime_context().get_node_id()

    async def run(self, requests: Sequence[ExecutionRequest]) -> list[ExecutionResult]:
        return list(await asyncio.gather(*map(self._run, requests)))

    async def _run(self, request: ExecutionRequest) -> ExecutionResult:
        if request.session_id is not None:
            raise RequestRejected("the ray backend offers no sessions; use a tool server's URL")
        full: set[str] = set()
        retry_after = 1.0
        while True:
            await self._refresh()
            node = self._choose(full)
            if node is None:
                raise BackendUnavailable("every node's queue is full", retry_after, busy=True)
            node.mine += 1
            try:
                kind, content, load = await node.actor.run.remote(request.to_dict())
            except _GONE:
                # The node or its actor is gone. A stateless request may simply go elsewhere.
                self._nodes.pop(node.node_id, None)
                self._refreshed = 0.0
                continue
            except RayTaskError as error:
                raise BackendUnavailable(f"node {node.node_id}: {error}") from error
            finally:
                node.mine -= 1
            node.others = max(0, load - node.mine)
            if kind == "result":
                return ExecutionResult.from_dict(content)
            if kind == "rejected":
                raise RequestRejected(content)
            full.add(node.node_id)
            retry_after = content[1]

    def _choose(self, full: set[str]) -> _Node | None:
        """The own node while it has a free worker, else the least loaded; never one whose queue is full."""
        own = self._nodes.get(self._own_node)
        if own is not None and own.node_id not in full and own.fullness < 1:
            return own
        candidates = [node for node in self._nodes.values() if node.node_id not in full]
        return min(candidates, key=lambda node: node.fullness, default=None)

    async def _refresh(self) -> None:
        """Have every living node start its actor. Waits for them only where there is no node to use.

        Raises what a node says that cannot run code safely, else BackendUnavailable, where no node can be used.
        """
        async with self._refreshing:
            due = time.monotonic() - self._refreshed >= REFRESH_SECONDS
            if due or not (self._nodes or self._starting):
                # This asks the cluster's head and may block; the event loop must go on meanwhile.
                alive = {node["NodeID"] for node in await asyncio.to_thread(ray.nodes) if node["Alive"]}
                self._nodes = {node_id: node for node_id, node in self._nodes.items() if node_id in alive}
                self._left_out = {node_id: why for node_id, why in self._left_out.items() if node_id in alive}
                for node_id in alive - self._nodes.keys() - self._starting.keys():
                    self._start(node_id)
                self._refreshed = time.monotonic()
        if not self._nodes:
            await self._wait_for_nodes()

    async def _wait_for_nodes(self) -> None:
        starting = set(self._starting.values())  # not those that are tried again meanwhile: that might never end
        while starting and not self._nodes:
            _, starting = await asyncio.wait(starting, return_when=asyncio.FIRST_COMPLETED)
        if starting:
            await asyncio.wait(starting, timeout=SPREAD_SECONDS)
        if self._nodes:
            return
        for why in self._left_out.values():
            if isinstance(why, RayTaskError):  # asking again would not help
                raise why
        reasons = "".join(f"; {node_id}: {_reason(why)}" for node_id, why in self._left_out.items())
        raise BackendUnavailable(f"no node of the Ray cluster runs code{reasons}")

    def _start(self, node_id: str) -> None:
        task = self._starting[node_id] = asyncio.create_task(self._add(node_id))
        task.add_done_callback(lambda task: self._started(node_id, task))

    def _started(self, node_id: str, task: asyncio.Task[None]) -> None:
        del self._starting[node_id]
        if task.cancelled():
            return
        why = task.exception()
        if why is None:
            self._left_out.pop(node_id, None)
            return
        if node_id not in self._left_out:  # once, however often it is tried
            logger.warning("node %s is left out, and tried again: %s", node_id, _reason(why))
        self._left_out[node_id] = why

    async def _add(self, node_id: str) -> None:
        """Use the node from when its actor is ready. Raises why it is not."""
        actor = await asyncio.to_thread(self._actor, node_id)
        try:
            workers = await asyncio.wait_for(actor.ready.remote(), START_SECONDS)
        except RayTaskError:
            # It cannot run code safely, and says why. It must not keep the name from one that can.
            await asyncio.to_thread(ray.kill, actor)
            raise
        except asyncio.TimeoutError:
            raise BackendUnavailable(f"not ready after {START_SECONDS:.0f} s") from None
        self._nodes[node_id] = _Node(node_id, actor, workers)

    def _actor(self, node_id: str) -> Any:
        """Get or create the node's actor. It needs no Ray resources: executions are bounded by its own workers."""
        return (
            ray.remote(NodeExecutor)
            .options(
                name=f"node-{node_id}",
                namespace=NAMESPACE,
                get_if_exists=True,
                num_cpus=0,
                max_concurrency=4096,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            )
            .remote(self._options)
        )

    async def open_session(self) -> str:
        raise RequestRejected("the ray backend offers no sessions; use a tool server's URL")

    async def close_session(self, session_id: str) -> None:
        raise RequestRejected("the ray backend offers no sessions; use a tool server's URL")

    async def health(self) -> dict[str, Any]:
        """Health of every node, and why others are left out, by node id. Waits for those that are starting."""
        await self._refresh()
        if self._starting:
            await asyncio.wait(self._starting.values())
        nodes = dict(self._nodes)  # others may come while these answer
        reports = await asyncio.gather(*(node.actor.health.remote() for node in nodes.values()))
        left_out = {node_id: _reason(why) for node_id, why in self._left_out.items()}
        return {"status": "ok", "nodes": dict(zip(nodes, reports, strict=True)), "left_out": left_out}

    async def close(self) -> None:
        """Let go of the actors; each ends when the process that created it ends."""
        starting = list(self._starting.values())
        for task in starting:
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        self._nodes.clear()


def _reason(why: BaseException) -> str:
    """In one line; Ray's own has the other process's traceback."""
    cause = why.cause if isinstance(why, RayTaskError) else why
    line, _, _ = str(cause).partition("\n")
    return f"{type(cause).__name__}: {line}"
