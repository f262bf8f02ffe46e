"""Which nodes the ray backend uses, on a made-up cluster: a node that is slow or unfit costs the others nothing.

On real raylets: test_ray.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="the ray backend needs ray")

from ray.exceptions import RayTaskError

from verl_ext.tool_server import ExecutionRequest, ToolClient
from verl_ext.tool_server.backends import BackendUnavailable
from verl_ext.tool_server.backends import ray as backend
from verl_ext.tool_server.runtime import RuntimeBuildError
from verl_ext.tool_server.types import ExecutionResult, Isolation

pytestmark = pytest.mark.unit
SECONDS = 20  # for what a busy machine may take; a call that hangs fails the test


class Actor:
    """A node's executor. It is ready when the test says so, unless it is unfit; whatever it runs, it says "ran"."""

    def __init__(self, *, ready: bool = True, unfit: bool = False) -> None:
        self.go_on, self.asked, self.unfit = asyncio.Event(), asyncio.Event(), unfit
        if ready:
            self.go_on.set()
        self.ready, self.run, self.health = (
            SimpleNamespace(remote=method) for method in (self._ready, self._run, self._health)
        )

    async def _ready(self) -> int:
        self.asked.set()
        if self.unfit:
            raise RayTaskError("ready", "a traceback", RuntimeBuildError("no gcc here\nat all")).as_instanceof_cause()
        await self.go_on.wait()
        return 2

    async def _run(self, request: dict[str, Any]) -> tuple[str, Any, int]:
        answer = ExecutionResult.infra(ExecutionRequest.from_dict(request).request_id, "ran", Isolation.STRONG)
        return "result", answer.to_dict(), 0

    async def _health(self) -> dict[str, Any]:
        return {"isolation": "strong"}


class Cluster:
    """What the backend asks of ray, with these actors as its nodes."""

    def __init__(self, **actors: Actor) -> None:
        self.actors, self.killed = actors, list[Actor]()

    def is_initialized(self) -> bool:
        return True

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "elsewhere")

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": node_id, "Alive": True} for node_id in self.actors]

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor)


@pytest.fixture
def on(monkeypatch) -> Callable[..., None]:
    """Run a coroutine function on a cluster of these nodes (name: keywords of `Actor`); no task of it outlives it."""

    def run(test: Callable[[Cluster, backend.RayBackend], Awaitable[None]], **nodes: dict[str, bool]) -> None:
        async def go() -> None:
            cluster = Cluster(**{name: Actor(**keywords) for name, keywords in nodes.items()})
            monkeypatch.setattr(backend, "ray", cluster)
            made = backend.RayBackend()
            monkeypatch.setattr(made, "_actor", cluster.actors.__getitem__)
            async with ToolClient(made):
                await asyncio.wait_for(test(cluster, made), SECONDS)
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(go())

    return run


async def call(made: backend.RayBackend) -> None:
    (result,) = await made.run([ExecutionRequest("1")])
    assert result.detail == "ran"


def test_a_node_that_is_not_ready_holds_up_no_call_and_is_used_once_it_is(on):
    async def test(cluster, made):
        await call(made)
        await call(made)
        assert set(made._nodes) == {"good"}
        cluster.actors["slow"].go_on.set()
        assert set((await made.health())["nodes"]) == {"good", "slow"}

    on(test, good={}, slow={"ready": False})


def test_a_node_that_joins_holds_up_no_call_and_is_started_once(on, monkeypatch):
    monkeypatch.setattr(backend, "REFRESH_SECONDS", 0.0)

    async def test(cluster, made):
        await call(made)
        joined = cluster.actors["joined"] = Actor(ready=False)
        await call(made)
        await joined.asked.wait()
        joined.asked.clear()
        await call(made)
        assert not joined.asked.is_set() and set(made._nodes) == {"good"}

    on(test, good={})


def test_a_node_that_cannot_run_code_fails_no_call_and_is_named_once(on, monkeypatch, caplog):
    monkeypatch.setattr(backend, "REFRESH_SECONDS", 0.0)

    async def test(cluster, made):
        for _ in range(3):
            await call(made)
            health = await made.health()
            assert set(health["nodes"]) == {"good"}
            assert health["left_out"] == {"unfit": "RuntimeBuildError: no gcc here"}
        assert len(cluster.killed) > 1 and set(cluster.killed) == {cluster.actors["unfit"]}  # the name is free again

    on(test, good={}, unfit={"unfit": True})
    assert caplog.messages == ["node unfit is left out, and tried again: RuntimeBuildError: no gcc here"]


def test_a_node_that_was_left_out_is_used_when_it_can_be(on, monkeypatch):
    monkeypatch.setattr(backend, "REFRESH_SECONDS", 0.0)

    async def test(cluster, made):
        await made.health()
        cluster.actors["mended"].unfit = False
        health = await made.health()
        assert set(health["nodes"]) == {"good", "mended"} and health["left_out"] == {}

    on(test, good={}, mended={"unfit": True})


def test_where_no_node_can_run_code_its_own_error_is_raised(on):
    async def test(cluster, made):
        for _ in range(2):
            with pytest.raises(RuntimeBuildError, match="a traceback"):
                await call(made)

    on(test, unfit={"unfit": True})


def test_where_no_node_is_ready_in_time_the_error_names_it(on, monkeypatch):
    monkeypatch.setattr(backend, "START_SECONDS", 0.0)

    async def test(cluster, made):
        with pytest.raises(BackendUnavailable, match=r"no node .*; slow: BackendUnavailable: not ready after 0 s"):
            await call(made)

    on(test, slow={"ready": False})


def test_a_call_that_waits_for_the_only_node_gets_it(on):
    async def test(cluster, made):
        waiting = asyncio.ensure_future(call(made))
        await cluster.actors["slow"].asked.wait()
        cluster.actors["slow"].go_on.set()
        await waiting

    on(test, slow={"ready": False})
