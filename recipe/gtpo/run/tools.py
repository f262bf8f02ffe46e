"""The tools of a run: one call of each start goes the way that every call of a rollout will go.

A tool server that answers `/healthz` may still refuse every call: a wrong token, a wrong value in the tool's YAML. Then
no trajectory is worth anything, and it takes a step to find out.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig

from recipe.gtpo.run.errors import ConfigError, one_line
from recipe.gtpo.run.inputs import Say
from verl_ext.tool_server.client import ToolClient, is_ray

_SECONDS = 60.0  # for the first calls; a server answers in milliseconds, on a busy machine in seconds
_MULTI_TURN = "actor_rollout_ref.rollout.multi_turn"
#: What is tried, and what must come of it.
_PROGRAMS = (("1+1", "ok"), ("1/0", "error"))


async def call_tool(tool: Any, arguments: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """What a tool of either of verl's kinds answers, and its metrics: a class with a life cycle, or a function.

    A class says by its metrics that a program failed. A function can only raise for it: what it raises is a result
    that the model sees, like a program's traceback, unless it is a connection or a time limit that failed.

    Raises what a class raises, and ConnectionError or TimeoutError of a function: the tool is broken.
    """
    from verl.tools.function_tool import FunctionTool, normalize_function_tool_return

    if isinstance(tool, FunctionTool):
        try:
            returned = await tool.call(dict(arguments))
        except (ConnectionError, TimeoutError, asyncio.TimeoutError):
            raise
        except Exception as e:
            return f"Error: {one_line(e)}", {"outcome": "error"}
        response, _, metrics = normalize_function_tool_return(returned)
        return response.text or "", metrics or {}
    instance_id, _ = await tool.create()
    try:
        response, _, metrics = await tool.execute(instance_id, dict(arguments))
    finally:
        await tool.release(instance_id)
    return response.text or "", metrics or {}


def check_tools(config: DictConfig, variables: Mapping[str, Any], say: Say) -> None:
    """Load the tools as a rollout worker will, and call the one named `python`.

    Args:
        variables: the environment that the run gives its workers.

    Raises ConfigError when a tool cannot be loaded, or the call fails for a reason that is not the program's.
    """
    with environment(variables):
        tools = {tool.name: tool for tool in load_tools(config)}
        if not tools:
            raise ConfigError(f"there is no tool: set {_MULTI_TURN}.tool_config_path, or function_tool_path")
        called = "python" in tools and _takes_code(tools["python"])
        if called:
            asyncio.run(_try(tools["python"], config))
    say("tools: " + ", ".join(f"{name} (answers)" if called and name == "python" else name for name in tools))


def start_executors(url: str) -> tuple[ToolClient, str]:
    """Start an executor on every node of the Ray cluster that this process is in, and have each run a program.

    Returns the client, which has to be kept: with its last handle an executor ends; and a line on what there is.
    Where no node can run code, raises what one of them says that cannot do so safely, else BackendUnavailable.
    """

    async def ask() -> tuple[ToolClient, dict[str, Any]]:
        client = ToolClient.from_url(url)
        return client, await client.health()

    client, found = asyncio.run(ask())
    tiers = sorted({node["isolation"] for node in found["nodes"].values()})
    left_out = "".join(f"; node {node} is left out: {why}" for node, why in found["left_out"].items())
    line = f"tool server: an executor on each of {len(found['nodes'])} nodes, isolation: {', '.join(tiers)}{left_out}"
    return client, line


def schema_of(tool: Any) -> dict[str, Any]:
    """What a chat template shows of a tool, as a plain dict."""
    # serialize_as_any: a tool's schema may be a subclass that says more than verl's (maxLength)
    return tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True, serialize_as_any=True)


def tool_schemas(config: DictConfig) -> list[dict[str, Any]]:
    """Of all tools of a run. Their servers need not run."""
    nowhere = {"GTPO_TOOL_SERVER_URL": "http://127.0.0.1:9"}
    with environment(nowhere):
        return [schema_of(tool) for tool in load_tools(config)]


def load_tools(config: DictConfig) -> list[Any]:
    """As a rollout worker loads them. Raises ConfigError."""
    from verl.tools.tool_registry import load_all_tools
    from verl.utils.import_utils import resolve_config_path

    section = config.actor_rollout_ref.rollout.multi_turn
    paths = {key: section.get(key) for key in ("tool_config_path", "function_tool_path")}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # verl prints the schema of every tool
            return load_all_tools(**{key: resolve_config_path(path) if path else None for key, path in paths.items()})
    except Exception as e:
        named = ", ".join(f"{_MULTI_TURN}.{key}={path}" for key, path in paths.items() if path)
        raise ConfigError(f"the tools cannot be loaded ({named}): {one_line(e)}") from e


def _takes_code(tool: Any) -> bool:
    """Whether it can be called with a program alone. A tool that starts with Ray's workers has to wait for them."""
    about = getattr(tool, "config", None) or {}
    if about.get("backend") == "ray" or is_ray(about.get("url")):
        return False
    parameters = tool.tool_schema.function.parameters
    return "code" in parameters.properties and set(parameters.required or ()) <= {"code"}


async def _try(tool: Any, config: DictConfig) -> None:
    from verl_ext.tools.python_tool import PythonTool

    section = config.actor_rollout_ref.rollout.multi_turn
    named = section.get("tool_config_path") or section.get("function_tool_path")
    if isinstance(tool, PythonTool):
        tool.config["away_seconds"] = 0.0  # at a start it is not between two lives: the address is wrong
    longest = getattr(tool.tool_schema.function.parameters.properties["code"], "maxLength", None)
    if longest is not None and longest < 1:
        raise ConfigError(f"the tool 'python' ({named}) takes no code: its longest is {longest} characters")
    try:
        for code, wanted in _PROGRAMS:
            if longest is not None and longest < len(code):
                code, wanted = "1", "ok"
            outcome = await asyncio.wait_for(_call(tool, code, wanted, named), _SECONDS)
            if outcome is None:  # a tool of somebody else's: what it makes of a failing program is its own affair
                break
    except asyncio.TimeoutError as e:
        raise ConfigError(f"the tool 'python' ({named}) did not answer a first call within {_SECONDS:g} s") from e
    finally:
        await close_tool(tool)


async def close_tool(tool: Any) -> None:
    """End what a tool of ours holds in this event loop."""
    if (client := getattr(tool, "_client", None)) is not None:  # of our PythonTool
        await client.close()


async def _call(tool: Any, code: str, wanted: str, named: str) -> str | None:
    """The outcome that the tool reports, None for one that reports none."""
    where = f"the tool 'python' ({named}) failed a first call, of `{code}`"
    remedy = "see tool_server.url, tool_server.token and that file"
    try:
        text, metrics = await call_tool(tool, {"code": code})
    except Exception as e:
        raise ConfigError(f"{where}: {one_line(e)}; {remedy}") from e
    outcome = metrics.get("outcome")
    if outcome is not None and outcome != wanted:
        detail = metrics.get("detail") or (text.strip().splitlines() or [""])[-1]
        raise ConfigError(f"{where}: the outcome is {outcome}, not {wanted}: {detail}; {remedy}")
    return outcome


@contextlib.contextmanager
def environment(variables: Mapping[str, Any]) -> Iterator[None]:
    """Variables that hold while the block runs; those that are None are left as they are."""
    before = dict(os.environ)
    os.environ.update({key: str(value) for key, value in variables.items() if value is not None})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
