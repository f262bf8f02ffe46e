"""Backend ``ray``: one actor per node of a Ray cluster, each with the dispatcher of a tool server.

A request goes to the caller's own node while that has a free worker, else to the least loaded node. When a node is lost
its unanswered requests are sent to another. Model-written code never runs in a Ray worker: the actor's zygotes are
separate programs, started by exec.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl_ext.tool_server.backends import BackendUnavailable, RequestRejected
from verl_ext.tool_server.types import ExecutionRequest, ExecutionResult

NAMESPACE = "tool_server"
REFRESH_SECONDS = 10.0  # how soon a node that joined is used
START_SECONDS = 180.0  # building the tool runtime on a fresh node included
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
                if full:
                    raise BackendUnavailable("every node's queue is full", retry_after, busy=True)
                raise BackendUnavailable("no node of the Ray cluster runs code")
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
        """Make sure every living node has its actor. Nodes whose actor does not start are left out until next time."""
        async with self._refreshing:
            if time.monotonic() - self._refreshed < REFRESH_SECONDS and self._nodes:
                return
            # Both calls ask the cluster's head and may block; the event loop must go on meanwhile.
            alive = {node["NodeID"] for node in await asyncio.to_thread(ray.nodes) if node["Alive"]}
            self._nodes = {node_id: node for node_id, node in self._nodes.items() if node_id in alive}
            await asyncio.gather(*(self._add(node_id) for node_id in alive - set(self._nodes)))
            self._refreshed = time.monotonic()

    async def _add(self, node_id: str) -> None:
        actor = await asyncio.to_thread(self._actor, node_id)
        try:
            workers = await asyncio.wait_for(actor.ready.remote(), START_SECONDS)
        except (*_GONE, asyncio.TimeoutError):
            return  # it left again, or is too slow to be of use
        except RayTaskError:
            # It cannot run code safely, and says why. It must not keep the name from one that can.
            await asyncio.to_thread(ray.kill, actor)
            raise
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
        """Health of every node, by node id."""
        await self._refresh()
        if not self._nodes:
            raise BackendUnavailable("no node of the Ray cluster runs code")
        reports = await asyncio.gather(*(node.actor.health.remote() for node in self._nodes.values()))
        return {"status": "ok", "nodes": dict(zip(self._nodes, reports, strict=True))}

    async def close(self) -> None:
        """Let go of the actors; each ends when the process that created it ends."""
        self._nodes.clear()
