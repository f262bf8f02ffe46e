"""At the start one call goes through the real tool, the way of a rollout: what would void every trajectory is named."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator

import pytest
from aiohttp import web
from composition import compose
from omegaconf import OmegaConf
from verl.tools import function_tool

from recipe.gtpo.run import tools
from recipe.gtpo.run.errors import ConfigError
from recipe.gtpo.run.tools import call_tool, check_tools
from verl_ext.tool_server.types import ExecutionRequest, ExecutionResult, Isolation, Outcome

pytestmark = pytest.mark.unit


class Server:
    """A tool server whose answers are made up, in a thread of its own; what it was sent is kept."""

    def __init__(self) -> None:
        self.url = ""
        self.token = "secret"
        self.codes: list[str] = []
        self.outcomes = {"1+1": "ok", "1": "ok", "1/0": "error"}

    async def run(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.json_response({"error": "missing or wrong token"}, status=401)
        try:
            order = ExecutionRequest.from_dict(await request.json())
        except ValueError as e:
            return web.json_response({"error": str(e)}, status=400)
        self.codes.append(order.code)
        outcome = Outcome(self.outcomes[order.code])
        detail = "the worker was lost" if outcome is Outcome.INFRA else ""
        result = ExecutionResult(outcome, "2\n", "2\n", "", order.request_id, Isolation.STRONG, detail=detail)
        return web.json_response(result.to_dict())


@pytest.fixture
def server() -> Iterator[Server]:
    one, loop, ready = Server(), asyncio.new_event_loop(), threading.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/run", one.run)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        one.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()

    def work() -> None:
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(10)
    yield one
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("verl_ext.tool_server.client._FIRST_PAUSE_SECONDS", 0.01)
    for name in ("GTPO_TOOL_SERVER_URL", "GTPO_TOOL_SERVER_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def config_of(*overrides: str):
    return compose(*(f"actor_rollout_ref.rollout.multi_turn.{one}" for one in overrides))


def accepted(config, server=None, token="secret") -> list[str]:
    variables = {} if server is None else {"GTPO_TOOL_SERVER_URL": server.url, "GTPO_TOOL_SERVER_TOKEN": token}
    before, said = dict(os.environ), []
    check_tools(config, variables, said.append)
    assert dict(os.environ) == before
    return said


def refusal(config, server=None, token="secret") -> str:
    with pytest.raises(ConfigError) as caught:
        accepted(config, server, token)
    message = str(caught.value)
    assert "\n" not in message
    return message


def yaml_of(tmp_path, **values):
    config = {
        "type": "native",
        "url": "${oc.env:GTPO_TOOL_SERVER_URL}",
        "token": "${oc.env:GTPO_TOOL_SERVER_TOKEN,null}",
    }
    tool = {"class_name": "verl_ext.tools.python_tool.PythonTool", "config": config | values}
    OmegaConf.save(OmegaConf.create({"tools": [tool]}), tmp_path / "tools.yaml")
    return config_of(f"tool_config_path={tmp_path}/tools.yaml")


@pytest.mark.parametrize("name", ["python", "calculator"])
def test_the_tool_of_the_config_answers_and_is_named(server, name, capsys):
    assert accepted(config_of(f"tool_config_path=${{gtpo_config:tools/{name}.yaml}}"), server) == [
        "tools: python (answers)"
    ]
    assert server.codes == ["1+1", "1/0"]
    assert capsys.readouterr().out == ""  # verl prints every schema


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_missing_or_wrong_token_is_refused_with_the_server_s_words(server, token):
    message = refusal(compose(), server, token)
    assert "failed a first call, of `1+1`: RequestRejected: " in message and "(401)" in message
    assert "missing or wrong token" in message
    assert message.endswith("; see tool_server.url, tool_server.token and that file")
    assert server.codes == []


def test_a_server_that_is_away_is_refused(server):
    server.url = "http://127.0.0.1:9"
    assert "the outcome is infra, not ok: http://127.0.0.1:9" in refusal(compose(), server)


def test_a_server_that_cannot_run_a_program_is_refused_with_its_detail(server):
    server.outcomes["1+1"] = "infra"
    assert "the outcome is infra, not ok: the worker was lost" in refusal(compose(), server)


def test_a_server_that_is_too_slow_is_refused(server, monkeypatch):
    monkeypatch.setattr(tools, "_SECONDS", 0.01)
    monkeypatch.setattr(tools, "call_tool", lambda *_: asyncio.sleep(5))
    assert "did not answer a first call within 0.01 s" in refusal(compose(), server)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"timeuot": 5}, "PythonTool: unknown config key 'timeuot'; known: "),
        ({"backend": "htpp"}, "PythonTool: unknown backend 'htpp'"),
        ({"timeout": "soon"}, "failed a first call, of `1+1`: "),
        ({"error_lines": "all"}, "failed a first call, of `1/0`: TypeError: "),
        ({"max_code_chars": 0}, "takes no code: its longest is 0 characters"),
        ({"token": "${oc.env:NO_SUCH_TOKEN}"}, "NO_SUCH_TOKEN"),
        ({"type": "mcp"}, "ValueError: 'mcp' is not a valid ToolType"),
    ],
    ids=str,
)
def test_wrong_values_in_the_tool_file_are_refused(server, tmp_path, values, message):
    assert message in refusal(yaml_of(tmp_path, **values), server)


def test_a_schema_that_allows_one_character_gets_one(server, tmp_path):
    assert accepted(yaml_of(tmp_path, max_code_chars=1), server) == ["tools: python (answers)"]
    assert server.codes == ["1", "1"]


def test_a_file_that_is_not_there_and_no_tool_at_all_are_refused(tmp_path):
    path = "actor_rollout_ref.rollout.multi_turn.tool_config_path"
    message = refusal(config_of(f"tool_config_path={tmp_path}/absent.yaml"))
    assert f"{path}={tmp_path}/absent.yaml" in message and "FileNotFoundError" in message
    assert refusal(config_of("tool_config_path=null")) == (f"there is no tool: set {path}, or function_tool_path")


# -- verl's function tools --------------------------------------------------------------------------------------------

SEARCH = '''
from verl.tools.function_tool import function_tool

@function_tool
def search(query: str, most: int = 3):
    """Look something up.

    Args:
        query: what
        most: results
    """
    return {"found": query, "most": most}

@function_tool("python")
async def run(code: str):
    """Run code.

    Args:
        code: Python
    """
    CODE
'''


@pytest.fixture
def functions(tmp_path, monkeypatch):
    monkeypatch.setattr(function_tool, "FUNCTION_TOOL_REGISTRY", {})
    monkeypatch.setattr(function_tool, "_LOADED_FUNCTION_TOOL_PATHS", {})

    def write(code: str):
        (tmp_path / "my_tools.py").write_text(SEARCH.replace("CODE", code))
        return config_of("tool_config_path=null", f"function_tool_path={tmp_path}/my_tools.py")

    return write


def test_function_tools_are_loaded_named_and_called(functions):
    assert accepted(functions("return str(eval(code))")) == ["tools: python (answers), search"]


def test_a_function_tool_that_raises_is_refused(functions, tmp_path):
    message = refusal(functions("raise RuntimeError('no backend')"))
    assert (
        f"the tool 'python' ({tmp_path}/my_tools.py) failed a first call, of `1+1`: the outcome is error, not ok: "
        "Error: RuntimeError: no backend" in message
    )


def test_a_function_file_that_is_no_python_is_refused(functions):
    assert "the tools cannot be loaded" in refusal(functions("return (")) and "SyntaxError" in refusal(functions("("))


@pytest.mark.parametrize(
    ("answer", "text", "metrics"),
    [
        ("'a'", "a", {}),
        ("7", "7", {}),
        ("{'found': 1}", '{"found": 1}', {}),
        ("('a', 0.5, {'outcome': 'error'})", "a", {"outcome": "error"}),
        ("None", "None", {}),
    ],
)
def test_a_function_tool_s_answer_is_read_as_verl_reads_it(functions, answer, text, metrics):
    config = functions(f"return {answer}")
    (tool, _) = tools.load_tools(config)
    assert asyncio.run(call_tool(tool, {"code": "1"})) == (text, metrics)


def test_a_run_that_starts_without_a_node_names_it(monkeypatch):
    class Executors:
        async def health(self):
            return {"nodes": {"a": {"isolation": "strong"}}, "left_out": {"b": "TierUnavailable: no user namespaces"}}

    monkeypatch.setattr(tools.ToolClient, "from_url", lambda url: Executors())
    _, line = tools.start_executors("ray")
    assert line.endswith("1 nodes, isolation: strong; node b is left out: TierUnavailable: no user namespaces")
