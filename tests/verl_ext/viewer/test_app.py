"""The HTTP face: who may ask, what every answer says to the browser, what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from viewer_runs import DIVERGED, MIXED, hostile, write

from verl_ext.viewer import queries
from verl_ext.viewer.app import POLICY, STATIC, build_app
from verl_ext.viewer.runs import Run

pytestmark = pytest.mark.unit


@pytest.fixture
def ask(tmp_path) -> Callable[..., tuple[int, Any, str]]:
    """A GET of a viewer of one run: status, headers, body."""
    folder = write(tmp_path / "run", {1: [*MIXED, *hostile()[:3]], 2: DIVERGED})
    (folder / "config.json").write_text('{"limit": Infinity}')
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "metrics": {"loss": NaN}}\n{"step": 2, "metrics": {"loss": 0.5}}\n'
    )
    run = Run(folder, None, tmp_path / "cache")
    run.update()

    async def get(path: str, **headers: str) -> tuple[int, Any, str]:
        server = TestServer(build_app([run], ["localhost", "127.0.0.1", "::1"]))
        async with TestClient(server) as client:
            answer = await client.get(path, headers=headers)
            return answer.status, answer.headers, await answer.text()

    return lambda path, **headers: asyncio.run(get(path, **headers))


PATHS = (
    "/",
    "/static/app.js",
    "/api/overview",
    "/api/0/groups",
    "/api/9/groups",
    "/nowhere",
    "/api/0/text?id=4&path=turns/0/text",
)


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_tells_the_browser_to_run_and_load_nothing_else(ask, path):
    _, headers, _ = ask(path)
    assert headers["Content-Security-Policy"] == POLICY
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in headers


def test_the_policy_lets_no_inline_script_and_no_html_out_of_text():
    assert "unsafe" not in POLICY and "default-src 'none'" in POLICY and "script-src 'self'" in POLICY
    assert "require-trusted-types-for 'script'; trusted-types 'none'" in POLICY


@pytest.mark.parametrize("host", ["localhost", "localhost:8686", "127.0.0.1:1", "[::1]:8686", "LOCALHOST"])
def test_this_machines_names_are_answered(ask, host):
    assert ask("/api/overview", Host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8686", "localhost.evil.example", "127.0.0.1.nip.io", "", "[::2]", "@"]
)
@pytest.mark.parametrize("path", ["/", "/api/0/groups", "/static/app.js"])
def test_other_names_are_not(ask, host, path):
    status, _, body = ask(path, Host=host)
    assert status == 421 and "error" in json.loads(body)


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/api/9/groups", 404, "run 9"),
        ("/api/x/groups", 404, "run x"),
        ("/api/0/group?id=999", 404, "999"),
        ("/api/0/group", 404, "id"),
        ("/api/0/groups?flag=x", 400, "flag 'x'"),
        ("/api/0/groups?step=x", 400, "'x'"),
        ("/api/0/whatif?id=1&settings={", 400, "Expecting"),
        ("/api/0/text?id=1&path=turns/7/text", 404, "turns/7/text"),
        ("/static/..%2Fapp.py", 404, "app.py"),
        ("/static/nothing.js", 404, "nothing.js"),
    ],
)
def test_a_refusal_is_one_line_of_json(ask, path, status, said):
    found, _, body = ask(path)
    assert found == status and said in json.loads(body)["error"]


def test_a_file_that_the_run_has_removed_is_said_to_be_gone(ask, tmp_path):
    (tmp_path / "run" / "trajectories" / "1.jsonl").unlink()
    status, headers, body = ask("/api/0/conversation?id=1")
    assert (status, headers["Content-Security-Policy"]) == (404, POLICY)
    assert json.loads(body)["error"].startswith("no longer there: ")


def test_a_fault_of_the_viewer_is_an_answer_too_and_in_its_log(ask, monkeypatch, caplog):
    monkeypatch.setattr(queries, "gradient", lambda run: 1 / 0)
    status, headers, body = ask("/api/0/gradient")
    assert (status, headers["Content-Security-Policy"]) == (500, POLICY)
    assert json.loads(body)["error"] == "ZeroDivisionError: division by zero"
    assert "/api/0/gradient" in caplog.text


def read(body: str) -> Any:
    """As a browser reads JSON, which has no NaN."""
    return json.loads(body, parse_constant=lambda name: pytest.fail(f"{name} in {body[:200]}"))


def test_a_number_that_is_not_finite_is_null_in_every_answer(ask):
    (group,) = read(ask("/api/0/groups?step=2")[2])["groups"]
    assert (group["size"], group["solved"], group["top"]) == (2, 0, 0.0)
    first, second = read(ask(f"/api/0/group?id={group['id']}")[2])["rows"]
    assert [first[name] for name in ("acc", "outcome", "shaped")] == [None] * 3
    lost = ("log_prob", "gap", "advantage", "return", "divisor", "rewards")
    assert [first["turns"][0][name] for name in lost] == [None] * 6
    assert (second["acc"], second["similar"]) == (0.0, None)
    turn = read(ask(f"/api/0/conversation?id={first['id']}")[2])["turns"][0]
    assert turn["tokens"] == [["5 ", None], ["7 ", -0.25]] and turn["calls"][0]["seconds"] is None
    assert read(ask("/api/curves?name=loss")[2])["curves"] == {"loss": [[[2, 0.5]]]}
    for path in ("overview", "0/gradient"):
        read(ask(f"/api/{path}")[2])


def test_a_number_that_slipped_through_is_an_error_and_not_a_page_that_stops(ask, monkeypatch):
    monkeypatch.setattr(queries, "gradient", lambda run: float("nan"))
    status, _, body = ask("/api/0/gradient")
    assert status == 400 and "JSON" in read(body)["error"]


def test_a_text_of_the_model_is_never_a_page(ask):
    status, headers, body = ask("/api/0/text?id=4&path=turns/0/text")
    assert status == 200 and body.startswith("<script>")
    assert headers["Content-Type"].startswith("text/plain")


def test_the_page_holds_no_inline_script_and_names_nothing_elsewhere():
    page = (STATIC / "index.html").read_text()
    assert page.count("<script") == 1 and '<script src="static/app.js" defer></script>' in page
    assert "http" not in page and "style=" not in page
