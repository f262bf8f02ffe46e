"""The ray backend on a real local cluster: several raylets on one machine, one of which dies at work."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from lab import REPOSITORY, process_table

from verl_ext.tool_server import ExecutionRequest, ToolClient
from verl_ext.tool_server.backends import RequestRejected
from verl_ext.tool_server.runtime import RuntimeBuildError

pytestmark = pytest.mark.e2e
ray = pytest.importorskip("ray", reason="the ray backend needs ray")
OPTIONS = {"isolation": "strong", "workers": 2, "packages": ("numpy",)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        environment = {"env_vars": {"PYTHONPATH": str(REPOSITORY)}}
        ray.init(address=made.address, runtime_env=environment, log_to_driver=False, configure_logging=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def test_without_a_cluster_it_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"ray\.init"):
        ToolClient.from_ray()


def test_a_node_that_cannot_run_code_is_an_error_and_does_not_keep_its_name(cluster: Any) -> None:
    async def go() -> None:
        async with ToolClient.from_ray(**(OPTIONS | {"packages": ("no-such-package-here",)})) as client:
            with pytest.raises(RuntimeBuildError, match="pip install"):
                await client.run("1")
        async with ToolClient.from_ray(**OPTIONS) as client:
            assert (await client.run("1")).ok

    asyncio.run(go())


def test_work_is_spread_and_a_lost_node_loses_nothing(cluster: Any) -> None:
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()

    async def go() -> None:
        async with ToolClient.from_ray(**OPTIONS) as client:
            health = await client.health()
            assert len(health["nodes"]) == 2 and all(n["isolation"] == "strong" for n in health["nodes"].values())
            backend = client._backend

            # Alone, a request stays on the caller's own node.
            own = backend._own_node
            chosen = Counter(await watch(client, backend, [f"print({i})" for i in range(4)], one_by_one=True))
            assert chosen == {own: 4}

            # Many at once fill it and go on to the other.
            chosen = Counter(await watch(client, backend, [f"import time; time.sleep(0.3); {i}" for i in range(8)]))
            assert len(chosen) == 2 and min(chosen.values()) >= 2, chosen

            # A node is lost with work on it: every answer arrives, each to its own question.
            requests = [ExecutionRequest(f"import time; time.sleep(1); print({i})") for i in range(12)]
            running = asyncio.ensure_future(client.run_batch(requests))
            while not any(node.mine for node_id, node in backend._nodes.items() if node_id != own):
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.5)
            await asyncio.to_thread(cluster.remove_node, second, allow_graceful=False)
            results = await running
            assert [result.output for result in results] == [f"{i}\n" for i in range(12)]
            assert (await client.run("1")).ok

            with pytest.raises(RequestRejected, match="no sessions"):
                await client.open_session()

    asyncio.run(go())


async def watch(client: ToolClient, backend: Any, codes: list[str], one_by_one: bool = False) -> list[str]:
    """Run ``codes`` and return the node each went to."""
    chosen: list[str] = []
    choose = backend._choose

    def spy(full: set[str]) -> Any:
        node = choose(full)
        chosen.append(node.node_id)
        return node

    backend._choose = spy
    try:
        results = [await client.run(code) for code in codes] if one_by_one else await client.run_batch(codes)
    finally:
        del backend._choose
    assert all(result.ok for result in results)
    return chosen


def test_code_never_runs_in_a_ray_worker(cluster: Any) -> None:
    async def go() -> str:
        async with ToolClient.from_ray(**OPTIONS) as client:
            running = asyncio.ensure_future(client.run("import time; time.sleep(2); print('own process')"))
            while not (found := [c for _, _, c in process_table().values() if "zygote.main()" in c]):
                await asyncio.sleep(0.05)
            assert not any("ray" in command.split("\0")[0] for command in found)
            return (await running).output

    assert asyncio.run(go()) == "own process\n"


def test_verls_tool_runs_code_on_the_cluster_it_is_in(cluster: Any) -> None:
    pytest.importorskip("verl", reason="the tool is for verl")
    from verl_ext.tools.python_tool import PythonTool

    async def go() -> None:
        tool = PythonTool({"type": "native", "backend": "ray"})  # no URL
        instance, _ = await tool.create()
        answers = [await tool.execute(instance, {"code": code}) for code in ("6 * 7", "1 / 0")]
        await tool.release(instance)
        await tool.client.close()
        (good, _, good_metrics), (bad, _, bad_metrics) = answers
        assert (good.text, good_metrics["outcome"]) == ("42\n", "ok")
        assert "ZeroDivisionError" in bad.text and bad_metrics["outcome"] == "error"

    asyncio.run(go())
