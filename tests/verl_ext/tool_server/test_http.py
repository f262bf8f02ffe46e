"""The HTTP interface: semantics of execution end to end, the SandboxFusion client unchanged, and bad requests."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab import Server, own_server

from verl_ext.tool_server import ExecutionRequest, ExecutionResult, Isolation, Outcome, ToolClient
from verl_ext.tool_server.backends import BackendUnavailable, RequestRejected
from verl_ext.tool_server.backends.http import HttpBackend
from verl_ext.tool_server.backends.sandbox_fusion import SandboxFusionBackend

pytestmark = pytest.mark.e2e
SMALL = ("--packages", "numpy")  # starts faster than with scipy and sympy


def with_client(server: Server, use: Callable[[ToolClient], Awaitable[Any]], **options: Any) -> Any:
    async def go() -> Any:
        async with ToolClient.from_url(server.url, **options) as client:
            return await use(client)

    return asyncio.run(go())


def run(server: Server, code: str, **options: Any) -> ExecutionResult:
    return with_client(server, lambda client: client.run(code, **options))


def fetch(server: Server, method: str, path: str, **options: Any) -> tuple[int, Any, Any]:
    async def go() -> tuple[int, Any, Any]:
        async with aiohttp.ClientSession() as session, session.request(method, server.url + path, **options) as answer:
            return answer.status, await answer.text(), answer.headers

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("code", "outcome", "output"),
    [
        ("print('a')\n1 + 1", "ok", "a\n2\n"),
        ("def f(:\n    pass", "syntax_error", "SyntaxError"),
        ("x = 1\n\nraise ValueError('v')", "error", 'File "<code>", line 3, in <module>\n    raise ValueError'),
        ("import sys; sys.exit(3)", "error", "[exit status 3]"),
        ("import sys; sys.exit('bye')", "error", "bye"),
        ("import sys; sys.exit()", "ok", ""),
        ("raise SystemExit(0)", "ok", ""),
        ("import ctypes; ctypes.string_at(0)", "crash", "[crash: killed by SIGSEGV]"),
        ("x = bytearray(2**31)", "memory", "MemoryError"),
        ("while True: pass", "timeout", "[timeout: stopped after 2 s of CPU time]"),
        ("while True: print('x' * 1000)", "output_limit", "[output limit: "),
        ("x = 1\x00", "syntax_error", ""),
        ("input('name? ')", "error", "EOFError"),
        ("import numpy as np\nnp.arange(6).reshape(2, 3).sum(axis=0)", "ok", "array([3, 5, 7])\n"),
        ("from sympy import *\nx = symbols('x')\nsolve(x**2 - 4, x)", "ok", "[-2, 2]\n"),
        ("from scipy.optimize import brentq\nround(brentq(lambda x: x * x - 2, 0, 2), 6)", "ok", "1.414214\n"),
        ("import asyncio\nasyncio.run(asyncio.sleep(0.01, 7))", "ok", "7\n"),
        ("from concurrent.futures import ThreadPoolExecutor as P\nlist(P(4).map(abs, [-1, 2]))", "ok", "[1, 2]\n"),
        ("import tempfile\ntempfile.TemporaryFile().write(b'x')\nopen('/tmp/a', 'w').write('abc')", "ok", "3\n"),
        ("import warnings; warnings.warn('w')", "ok", "<code>:1: UserWarning: w"),
        ("import threading\nthreading.Thread(target=lambda: print('late')).start()", "ok", "late\n"),
        ("import pickle\nclass A:\n    x = 1\npickle.loads(pickle.dumps(A())).x", "ok", "1\n"),
        ("import multiprocessing, subprocess\nsubprocess.run(['ls'])", "error", "PermissionError"),
        ("print(__name__, __file__ if '__file__' in globals() else None)", "ok", "__main__ <code>\n"),
    ],
)  # fmt: skip
def test_outcome_and_text(strong_server: Server, code: str, outcome: str, output: str) -> None:
    result = run(strong_server, code)
    assert result.outcome.value == outcome, result
    assert output in result.output
    assert result.isolation.value == "strong" and result.attempts == 1


def test_standard_input(strong_server: Server) -> None:
    assert run(strong_server, "input() + '|' + input()", stdin="a\nbé\n").output == "'a|bé'\n"


@pytest.mark.parametrize("stdin", [None, "x"])
def test_the_streams_are_what_the_descriptors_are(strong_server: Server, stdin: str | None) -> None:
    """They are opened before the fork, over other files of the same kind: input that can be rewound, pipes."""
    code = """
import os, sys
for stream in (sys.stdin, sys.stdout, sys.stderr):
    try:
        os.lseek(stream.fileno(), 0, os.SEEK_CUR)
        seekable = True
    except OSError:
        seekable = False
    assert stream.seekable() == stream.buffer.seekable() == seekable, stream
    assert stream.mode == ("r" if stream is sys.stdin else "w") and not stream.isatty(), stream
assert sys.stdin.fileno() == 0 and sys.stdout is sys.__stdout__ and sys.stdout.line_buffering
print(sys.stdin.tell(), repr(sys.stdin.read()), file=sys.stderr)
"""
    result = run(strong_server, code, stdin=stdin)
    assert result.output == f"0 {stdin or ''!r}\n", result


def test_wall_limit_is_kept_within_100_ms(strong_server: Server) -> None:
    late = [run(strong_server, "import time; time.sleep(60)", timeout=0.5).seconds - 0.5 for _ in range(5)]
    assert sorted(late)[2] < 0.1, late  # the median: the machine may be busy with other things for a moment


def test_a_request_cannot_raise_the_wall_limit(strong_server: Server) -> None:
    assert run(strong_server, "1", timeout=10**6).timeout == 15.0


def test_output_keeps_head_and_tail(strong_server: Server) -> None:
    result = run(strong_server, "print('HEAD' + 'x' * 10**6 + 'TAIL')")
    assert result.outcome is Outcome.OK and result.truncated
    assert result.output.startswith("HEADx") and result.output.endswith("xTAIL\n")
    assert "cut ...]" in result.output and len(result.output) < 66_000


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("print('so far')", "so far\n"),
        ("print('so far', end='')", "so far\n"),
        ("for i in range(3): print(i, end=' ')", "0 1 2 \n"),
        ("import sys\nsys.stdout.buffer.write(b'so far')", "so far\n"),
        ("import threading\nprint('so', end='')\nthreading.Thread(target=print).start()", "so\n"),
    ],
)
@pytest.mark.parametrize("in_session", [False, True])
def test_partial_output_of_a_killed_program_is_shown(
    strong_server: Server, code: str, shown: str, in_session: bool
) -> None:
    async def use(client: ToolClient) -> ExecutionResult:
        session = await client.open_session() if in_session else None
        result = await client.run(f"{code}\nwhile True: pass", timeout=0.5, session_id=session)
        if session is not None:
            await client.close_session(session)
        return result

    output = with_client(strong_server, use).output
    assert output == f"{shown}[timeout: stopped after 0.5 s of wall time]"


def test_lines_of_threads_stay_whole(strong_server: Server) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda i: print("line", i), range(500)))
"""
    lines = run(strong_server, code, echo=False).stdout.splitlines()
    assert sorted(lines) == sorted(f"line {i}" for i in range(500))


def test_executions_do_not_share_random_state_or_hash_seed(strong_server: Server) -> None:
    code = "import random, numpy\nprint(random.random(), numpy.random.rand(), hash('a'))"
    lines = [run(strong_server, code).stdout.split() for _ in range(3)]
    assert len({line[0] for line in lines}) == len({line[1] for line in lines}) == 3
    assert len({line[2] for line in lines}) == 1


def test_a_batch_answers_in_order(strong_server: Server) -> None:
    codes = [f"import time; time.sleep({0.05 * (i % 3)}); print({i})" for i in range(30)]
    results = with_client(strong_server, lambda client: client.run_batch(codes))
    assert [result.stdout for result in results] == [f"{i}\n" for i in range(30)]


def test_the_same_id_runs_once(strong_server: Server) -> None:
    async def use(client: ToolClient) -> list[ExecutionResult]:
        request = ExecutionRequest("import uuid; uuid.uuid4()")
        both = await asyncio.gather(client.run_batch([request]), client.run_batch([request]))
        return [*both[0], *both[1], *await client.run_batch([request])]

    results = with_client(strong_server, use)
    assert len({result.output for result in results}) == 1


def test_the_same_id_for_other_code_is_refused(strong_server: Server) -> None:
    async def use(client: ToolClient) -> None:
        await client.run_batch([ExecutionRequest("1", request_id="reused")])
        await client.run_batch([ExecutionRequest("2", request_id="reused")])

    with pytest.raises(RequestRejected, match="different request"):
        with_client(strong_server, use)


def test_too_large_is_the_programs_error_not_an_exception(strong_server: Server) -> None:
    for result in (run(strong_server, "#" * (256 * 1024 + 1)), run(strong_server, "1", stdin="é" * 600_000)):
        assert result.outcome is Outcome.ERROR and "is larger than" in result.output
    assert run(strong_server, "#" * (256 * 1024 - 2) + "\n1").outcome is Outcome.OK


# --- SandboxFusion ---------------------------------------------------------------------------------------------------


def test_the_published_sandbox_fusion_client_works_unchanged(strong_server: Server) -> None:
    from sandbox_fusion import RunCodeRequest, RunStatus, run_code

    def call(**fields: Any) -> Any:
        return run_code(RunCodeRequest(language="python", **fields), endpoint=strong_server.url, max_attempts=1)

    good = call(code="print(input())\n1 + 1", stdin="hello")
    assert good.status is RunStatus.Success
    assert good.run_result.stdout == "hello\n" and good.run_result.return_code == 0, "a script echoes nothing"
    bad = call(code="1/0")
    assert bad.status is RunStatus.Failed and bad.run_result.return_code == 1
    assert "ZeroDivisionError" in bad.run_result.stderr
    slow = call(code="while True: pass", run_timeout=0.5)
    assert slow.status is RunStatus.Failed and slow.run_result.status.value == "TimeLimitExceeded"


def test_the_published_asynchronous_client_too(strong_server: Server) -> None:
    from sandbox_fusion import RunCodeRequest, run_code_async

    async def go() -> list[Any]:
        requests = [RunCodeRequest(language="python", code=f"print({i})") for i in range(8)]
        return await asyncio.gather(*(run_code_async(r, endpoint=strong_server.url, max_attempts=1) for r in requests))

    assert [answer.run_result.stdout for answer in asyncio.run(go())] == [f"{i}\n" for i in range(8)]


def test_our_own_sandbox_fusion_backend(strong_server: Server) -> None:
    async def go() -> list[ExecutionResult]:
        async with ToolClient.sandbox_fusion(strong_server.url) as client:
            assert (await client.health())["status"] == "ok"
            return await client.run_batch(["print(1)", "1/0", ExecutionRequest("while True: pass", timeout=0.5)])

    good, bad, slow = asyncio.run(go())
    assert (good.outcome.value, good.output) == ("ok", "1\n")
    assert bad.outcome is Outcome.ERROR and "ZeroDivisionError" in bad.output
    assert slow.outcome is Outcome.TIMEOUT and slow.isolation.value == "unknown"


@pytest.mark.parametrize("extra", [{"language": "cpp"}, {"files": {"a": "eA=="}}, {"fetch_files": ["a"]}])
def test_what_is_not_served_is_refused(strong_server: Server, extra: dict[str, Any]) -> None:
    status, body, _ = fetch(strong_server, "POST", "/run_code", json={"code": "1", "language": "python"} | extra)
    assert status == 422 and "not served" in json.loads(body)["error"]


@pytest.mark.parametrize(
    ("extra", "status", "named"),
    [
        ({"run_timeout": 0}, 400, "'run_timeout' must be a positive number of seconds"),
        ({"run_timeout": "5"}, 400, "'run_timeout'"),
        ({"run_timeout": True}, 400, "'run_timeout'"),
        ({"compile_timeout": -1}, 400, "'compile_timeout'"),
        ({"stdin": 5}, 400, "'stdin'"),
        ({"code": None}, 400, "'code'"),
        ({"echo": 1}, 400, "'echo'"),
        ({"memory_limit_MB": "64"}, 400, "'memory_limit_MB' must be a number"),
        ({"memory_limit_MB": 64}, 422, "'memory_limit_MB' below this server's own 268 is not served here"),
        ({"timeout": 1}, 400, "unknown field 'timeout'; known: code"),  # ignored, it would be no limit at all
        ({"language": None}, 422, "language None"),
    ],
)
def test_the_fields_of_run_code_are_named(
    strong_server: Server, extra: dict[str, Any], status: int, named: str
) -> None:
    got, body, _ = fetch(strong_server, "POST", "/run_code", json={"code": "1", "language": "python"} | extra)
    assert (got, named in json.loads(body)["error"]) == (status, True), body


def test_what_verls_own_sandbox_client_sends_is_served(strong_server: Server) -> None:
    """All its fields, as `verl.utils.reward_score.sandbox_fusion` fills them; also a memory limit that is none."""
    body = {"code": "print(input())", "stdin": "5", "language": "python", "compile_timeout": 10, "run_timeout": 10}
    for megabytes in (1024, -1, None):
        body |= {"memory_limit_MB": megabytes, "files": {}, "fetch_files": []}
        status, text, _ = fetch(strong_server, "POST", "/run_code", json=body)
        assert status == 200 and json.loads(text)["run_result"]["stdout"] == "5\n"


# --- health, metrics, backpressure -----------------------------------------------------------------------------------


def test_health_runs_a_program(strong_server: Server) -> None:
    status, body, _ = fetch(strong_server, "GET", "/healthz")
    assert status == 200 and json.loads(body)["isolation"] == "strong"


def test_metrics_count_outcomes(strong_server: Server) -> None:
    def count(outcome: str) -> float:
        text = fetch(strong_server, "GET", "/metrics")[1]
        label = f'tool_server_executions_total{{isolation="strong",outcome="{outcome}"}} '
        return float(next(line for line in text.splitlines() if line.startswith(label)).rsplit(" ", 1)[1])

    before = count("syntax_error")
    run(strong_server, "(")
    assert count("syntax_error") == before + 1


def test_metrics_are_valid_prometheus_text(strong_server: Server) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    families = list(text_string_to_metric_families(fetch(strong_server, "GET", "/metrics")[1]))
    assert {"tool_server_executions", "tool_server_waiting"} <= {family.name for family in families}


def test_a_full_queue_answers_429_with_retry_after_and_recovers() -> None:
    with own_server(
        isolation="strong", workers=1, extra_arguments=("--queue-size", "2", "--packages", "numpy")
    ) as server:

        async def go() -> tuple[list[int], str]:
            async with aiohttp.ClientSession() as session:

                async def post() -> tuple[int, str]:
                    body = {"code": "import time; time.sleep(0.5)"}
                    async with session.post(server.url + "/v1/run", json=body) as answer:
                        return answer.status, answer.headers.get("Retry-After", "")

                answers = await asyncio.gather(*(post() for _ in range(8)))
                return [status for status, _ in answers], next(after for status, after in answers if status == 429)

        statuses, retry_after = asyncio.run(go())
        assert sorted(statuses) == [200] * 3 + [429] * 5 and int(retry_after) >= 1
        # A patient client gets everything through all the same.
        results = with_client(server, lambda client: asyncio.gather(*(client.run(f"{i}") for i in range(12))))
        assert [result.output for result in results] == [f"{i}\n" for i in range(12)]


def test_work_that_the_queue_gives_up_comes_back_while_the_deadline_lasts() -> None:
    """Twenty one-second programs on one worker whose queue lets nobody wait longer than two."""
    options = ("--queue-seconds", "2", *SMALL)
    with own_server(isolation="strong", workers=1, extra_arguments=options) as server:

        async def use(client: ToolClient) -> list[ExecutionResult]:
            codes = [f"import time; time.sleep(1); print({i})" for i in range(20)]
            one_by_one = asyncio.gather(*(client.run(code) for code in codes[:10]))
            return [*await asyncio.gather(one_by_one, client.run_batch(codes[10:]))]

        alone, together = with_client(server, use, deadline=300)
        assert [result.output for result in (*alone, *together)] == [f"{i}\n" for i in range(20)]

        async def with_little_time(client: ToolClient) -> list[ExecutionResult]:
            return await asyncio.gather(*(client.run("import time; time.sleep(4)") for _ in range(2)))

        late = [result for result in with_client(server, with_little_time, deadline=6) if not result.ok]
        assert [(result.outcome, result.busy) for result in late] == [(Outcome.INFRA, True)], late
        assert "waited longer than 2 s for a free worker" in late[0].detail

        async def over_the_other_interface() -> list[int]:
            async with aiohttp.ClientSession() as session:

                async def post() -> int:
                    body = {"code": "import time; time.sleep(4)", "language": "python"}
                    async with session.post(server.url + "/run_code", json=body) as answer:
                        if answer.status == 429:
                            assert int(answer.headers["Retry-After"]) >= 1 and "waited" in await answer.text()
                        return answer.status

                return sorted(await asyncio.gather(post(), post()))

        assert asyncio.run(over_the_other_interface()) == [200, 429]


def test_a_client_that_goes_away_frees_its_worker(strong_server: Server) -> None:
    async def go() -> float:
        async with aiohttp.ClientSession() as session:
            for _ in range(2):  # as many as there are workers
                with pytest.raises(asyncio.TimeoutError):
                    timeout = aiohttp.ClientTimeout(total=0.3)
                    body = {"code": "import time; time.sleep(14)"}
                    await session.post(strong_server.url + "/v1/run", json=body, timeout=timeout)
        started = time.monotonic()
        async with ToolClient.from_url(strong_server.url) as client:
            results = await asyncio.gather(*(client.run("1") for _ in range(4)))
            assert all(result.ok for result in results)
            assert (await client.health())["running"] == 0
        return time.monotonic() - started

    assert asyncio.run(go()) < 5


# --- bad requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/run", b"", 400),
        ("POST", "/v1/run", b"{", 400),
        ("POST", "/v1/run", b"\xff\xfe", 400),
        ("POST", "/v1/run", b"[" * 100_000, 400),
        ("POST", "/v1/run", b'"code"', 400),
        ("POST", "/v1/run", b'{"code": 1}', 400),
        ("POST", "/v1/run", b'{"code": "1", "timeout": NaN}', 400),
        ("POST", "/v1/run", b'{"code": "1", "session_id": "nobody"}', 422),
        ("POST", "/v1/batch", b'{"requests": 5}', 400),
        ("POST", "/v1/batch", b'{"requests": [5]}', 400),
        ("POST", "/v1/batch", b'{"requests": [{"code": "", "request_id": ""}]}', 400),
        ("POST", "/v1/batch", b'{"requests": [%s, %s]}' % ((b'{"code": "", "request_id": "a"}',) * 2), 422),
        ("POST", "/run_code", b"[]", 400),
        ("POST", "/v1/sessions", b"[]", 400),
        ("DELETE", "/v1/sessions/nobody", b"", 422),
        ("GET", "/v1/run", b"", 405),
        ("GET", "/nowhere", b"", 404),
    ],
)  # fmt: skip
def test_bad_requests_get_a_status_and_a_json_body(
    strong_server: Server, method: str, path: str, body: bytes, status: int
) -> None:
    got, text, _ = fetch(strong_server, method, path, data=body)
    assert got == status and json.loads(text)["error"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["code", "timeout", "run_timeout", "stdin", "session_id", "request_id", "echo", "requests"])
bodies = st.one_of(
    st.binary(max_size=100),
    st.dictionaries(names, json_values).map(lambda value: json.dumps(value).encode()),
    json_values.map(lambda value: json.dumps(value).encode()),
)


def test_fuzzed_bodies_never_break_the_server(strong_server: Server) -> None:
    async def go() -> None:
        async with aiohttp.ClientSession() as session:
            # One event loop and one connection pool for all examples.
            loop = asyncio.get_running_loop()

            @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(st.sampled_from(["/v1/run", "/v1/batch", "/run_code", "/v1/sessions"]), bodies)
            def fuzz(path: str, body: bytes) -> None:
                asyncio.run_coroutine_threadsafe(post(path, body), loop).result(30)

            async def post(path: str, body: bytes) -> None:
                async with session.post(strong_server.url + path, data=body) as answer:
                    content = json.loads(await answer.text())
                    assert answer.status in (200, 400, 413, 422), (answer.status, content, path, body)
                    if path == "/v1/sessions" and answer.status == 200:
                        quoted = aiohttp.helpers.quote(content["session_id"], safe="")
                        await session.delete(f"{strong_server.url}/v1/sessions/{quoted}")

            await asyncio.to_thread(fuzz)

    asyncio.run(go())
    assert run(strong_server, "1").ok


@pytest.mark.parametrize(
    "raw",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/run HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/run HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"POST /v1/run HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{}",
        b"POST /v1/run HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        b"\x00" * 100,
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    ],
)
def test_malformed_http_is_answered_or_closed_and_never_a_bare_500(strong_server: Server, raw: bytes) -> None:
    async def go() -> bytes:
        host, port = strong_server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(raw)
        writer.write_eof()
        try:
            return await asyncio.wait_for(reader.read(), 10)
        except ConnectionError:
            return b""
        finally:
            writer.close()

    answer = asyncio.run(go())
    assert not answer or answer.split(b" ")[1].startswith(b"4"), answer
    assert not answer or answer.partition(b"\r\n\r\n")[2], "an error has a body"
    assert run(strong_server, "1").ok


def test_a_token_guards_everything_but_health(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOL_SERVER_TOKEN", "s3cret")
    with own_server(isolation="strong", workers=1, extra_arguments=SMALL) as server:
        for path in ("/v1/run", "/v1/batch", "/run_code", "/v1/sessions"):
            assert fetch(server, "POST", path, json={"code": "1"})[0] == 401
        assert fetch(server, "GET", "/metrics", headers={"Authorization": "Bearer wrong"})[0] == 401
        assert fetch(server, "GET", "/healthz")[0] == 200
        assert with_client(server, lambda client: client.run("1"), token="s3cret").ok
        with pytest.raises(RequestRejected, match="401"):
            with_client(server, lambda client: client.run("1"), token="wrong")
        assert (
            "s3cret"
            not in with_client(server, lambda client: client.run("import os; print(os.environ)"), token="s3cret").output
        )


def test_nobody_at_the_address_is_infra_and_unhealthy() -> None:
    gone = Server("http://127.0.0.1:9", 0, "")
    assert with_client(gone, lambda client: client.run("1"), away_seconds=0).outcome is Outcome.INFRA
    with pytest.raises(BackendUnavailable):
        with_client(gone, lambda client: client.health())


@pytest.mark.parametrize("interface", [HttpBackend, SandboxFusionBackend])
def test_a_server_that_starts_again_loses_no_call(interface: Any) -> None:
    """Neither one that finds nobody there, nor the one that the server died with. That it fails is an answer."""
    first, missed = asyncio.Event(), asyncio.Semaphore(0)

    class Watched(interface):
        async def run(self, requests: Sequence[ExecutionRequest]) -> list[ExecutionResult]:
            try:
                return await super().run(requests)
            except BackendUnavailable:
                missed.release()
                raise

    async def answer(request: web.Request) -> web.Response:
        if first.is_set():
            code = (await request.json())["code"]
            result = ExecutionResult(Outcome.OK, code, code, "", "same id", Isolation.STRONG).to_dict()
            if request.path == "/run_code":
                result = {"run_result": {"stdout": code, "return_code": 0}}
            return web.json_response(result, status=500 if code == "fails" else 200)
        first.set()
        request.transport.abort()
        return web.Response()

    async def serve(port: int) -> tuple[web.AppRunner, int]:
        app = web.Application()
        app.add_routes([web.post(path, answer) for path in ("/v1/run", "/run_code")])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return runner, runner.addresses[0][1]

    async def go() -> None:
        runner, port = await serve(0)
        async with ToolClient(Watched(f"http://127.0.0.1:{port}"), attempts=1) as client:
            broken = asyncio.create_task(client.run_batch([ExecutionRequest("a", request_id="same id")]))
            await first.wait()
            await runner.cleanup()
            refused = asyncio.create_task(client.run_batch([ExecutionRequest("b", request_id="same id")]))
            for _ in range(6):  # by either
                await missed.acquire()
            runner, _ = await serve(port)
            try:
                assert [(await one)[0].output for one in (broken, refused)] == ["a", "b"]
                failed = await client.run("fails")
                assert failed.outcome is Outcome.INFRA and "500" in failed.detail
            finally:
                await runner.cleanup()

    asyncio.run(asyncio.wait_for(go(), 30))
