"""verl's tool over a real server: what the model reads, what the metrics say, and which configurations are refused."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from lab import Server

pytest.importorskip("verl", reason="the tool is for verl")
from verl_ext.tools.python_tool import PythonTool

pytestmark = pytest.mark.e2e


def execute(config: dict[str, Any], *codes: str) -> list[tuple[str, dict[str, Any]]]:
    async def go() -> list[tuple[str, dict[str, Any]]]:
        tool = PythonTool(config)
        instance, _ = await tool.create()
        answers = [await tool.execute(instance, {"code": code}) for code in codes]
        await tool.release(instance)
        await tool.client.close()
        return [(response.text, metrics) for response, _, metrics in answers]

    return asyncio.run(go())


@pytest.mark.parametrize("backend", ["http", "sandbox_fusion"])
def test_the_model_reads_the_output(strong_server: Server, backend: str) -> None:
    (good, good_metrics), (bad, bad_metrics) = execute(
        {"type": "native", "backend": backend, "url": strong_server.url}, "print(6 * 7)", "1 / 0"
    )
    assert good == "42\n" and good_metrics["outcome"] == "ok"
    assert "ZeroDivisionError" in bad and bad_metrics["outcome"] == "error"


@pytest.mark.parametrize("backend", ["http", "sandbox_fusion"])
def test_a_server_that_is_away_is_infra(backend: str) -> None:
    ((text, metrics),) = execute({"url": "http://127.0.0.1:9", "backend": backend, "away_seconds": 0}, "1")
    assert metrics["outcome"] == "infra" and "not your code" in text


@pytest.mark.parametrize("backend", PythonTool._BACKENDS)
def test_the_model_is_told_of_an_echo_where_there_is_one(backend: str) -> None:
    schema = PythonTool({"url": "http://127.0.0.1:9", "backend": backend}).tool_schema
    told = schema.function.description
    assert told == "Run Python code and see what it prints" + (
        "." if backend == "sandbox_fusion" else "; the value of a last expression is shown too."
    )


@pytest.mark.parametrize("config", [{}, {"url": ""}, {"url": "x", "typo": 1}, {"url": "x", "backend": "exec"}])
def test_a_wrong_configuration_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="PythonTool"):
        PythonTool(config)
