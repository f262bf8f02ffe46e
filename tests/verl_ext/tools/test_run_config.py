"""What a run's configuration says about the tool server that it starts."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("verl", reason="a run needs verl")
from composition import compose

from recipe.gtpo.main import ConfigError, ServerStartError, tool_server
from recipe.gtpo.run.tools import check_tools
from verl_ext.tool_server import ToolClient
from verl_ext.tool_server.launch import LIMITS
from verl_ext.tool_server.machine import processors


@pytest.mark.unit
def test_every_limit_can_be_set_and_is_left_to_the_server_by_default() -> None:
    options = compose().tool_server
    assert dict(options.limits) == dict.fromkeys(LIMITS) and options.packages is None and options.workers is None


@pytest.mark.e2e
def test_the_server_follows_the_machine_and_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        "tool_server.limits.wall_seconds=2.5",
        "tool_server.limits.memory_mib=64",
        "tool_server.packages=[numpy]",
    ]
    config = compose(*overrides)

    async def ask(url: str) -> None:
        async with ToolClient.from_url(url) as client:
            assert (await client.health())["workers"] == processors()
            slow, large, unknown = await client.run_batch(["1", "x = bytearray(2**27)", "import numpy, sympy"])
            assert slow.timeout == 2.5 and large.outcome.value == "memory"
            assert "No module named 'sympy'" in unknown.output

    with tool_server(config) as handle:
        assert handle is not None and config.tool_server.url == handle.url
        asyncio.run(ask(handle.url))
    said = capsys.readouterr().out
    assert said.startswith("gtpo: starting the tool server\ngtpo: tool server: starting: isolation auto,"), said
    assert "gtpo: tool server at http://127.0.0.1:" in said


@pytest.mark.e2e
def test_a_senseless_limit_is_named() -> None:
    with pytest.raises(ServerStartError, match="argument --wall-seconds: 0 is not above 0"):
        with tool_server(compose("tool_server.limits.wall_seconds=0")):
            pass


@pytest.mark.unit
@pytest.mark.parametrize("override", ["tool_server.limits.threads=5", "tool_server.packages=[numpy]"])
def test_settings_for_a_server_that_is_there_already_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"its own: give them on its command line"):
        with tool_server(compose("tool_server.url=http://127.0.0.1:9", override)):
            pass


@pytest.mark.unit
def test_executors_on_the_nodes_are_no_server_to_start_or_to_ask(capsys: pytest.CaptureFixture[str]) -> None:
    config = compose("tool_server.url=ray", "tool_server.isolation=strong")
    with tool_server(config) as handle:
        assert handle is None and config.tool_server.url == "ray://strong"  # what the tool's client gets
    assert "gtpo: the tool server is an executor on every node of the Ray cluster" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="give them on its command line"):
        with tool_server(compose("tool_server.url=ray", "tool_server.limits.threads=5")):
            pass


@pytest.mark.unit
def test_executors_are_not_called_before_there_is_a_ray() -> None:
    said: list[str] = []
    check_tools(compose(), {"GTPO_TOOL_SERVER_URL": "ray"}, said.append)
    assert said == ["tools: python"]  # and no "(answers)"
