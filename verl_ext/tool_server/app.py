"""The HTTP face of a :class:`Dispatcher`: native /v1 API, SandboxFusion's /run_code, health and metrics.

Every answer has a JSON body, errors included: ``{"error": "..."}`` with 400 (malformed), 401 (token), 413 and 422
(refused), 429 + Retry-After (queue full), 500 (a bug here; logged).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from verl_ext.tool_server.channel import WorkerLost
from verl_ext.tool_server.dispatcher import Dispatcher, Overloaded
from verl_ext.tool_server.metrics import render_metrics
from verl_ext.tool_server.sessions import RequestRefused
from verl_ext.tool_server.types import MAX_ID, ExecutionRequest, ExecutionResult, Limits, Outcome, check_seconds

logger = logging.getLogger(__name__)
MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_BATCH = 1024
DISPATCHER = web.AppKey("dispatcher", Dispatcher)
TOKEN = web.AppKey("token", str)
_RUN_CODE_FIELDS = frozenset(
    {"code", "language", "stdin", "run_timeout", "compile_timeout", "memory_limit_MB", "files", "fetch_files"}
    | {"echo", "session_id", "request_id"}  # ours
)
_OPEN_PATHS = ("/healthz",)  # probes of an orchestrator carry no token; the answer tells nothing worth one
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(dispatcher: Dispatcher, token: str | None) -> web.Application:
    """Return the application. With a ``token``, every path but /healthz wants ``Authorization: Bearer <token>``."""
    app = web.Application(middlewares=[_errors, _authorise], client_max_size=MAX_BODY_BYTES)
    app[DISPATCHER] = dispatcher
    app[TOKEN] = token or ""
    app.router.add_post("/v1/run", run)
    app.router.add_post("/v1/batch", batch)
    app.router.add_post("/v1/sessions", open_session)
    app.router.add_delete("/v1/sessions/{session_id}", close_session)
    app.router.add_post("/run_code", run_code)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/metrics", metrics)
    return app


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every way to fail into a status code and a JSON body."""
    try:
        return await handler(request)
    except Overloaded as error:
        headers = {"Retry-After": str(math.ceil(error.retry_after))}
        return web.json_response({"error": str(error)}, status=429, headers=headers)
    except RequestRefused as error:
        return web.json_response({"error": str(error)}, status=422)
    except ValueError as error:
        return web.json_response({"error": str(error)}, status=400)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        return web.json_response({"error": error.reason}, status=error.status, headers=allow)
    except (asyncio.CancelledError, ConnectionError):
        raise  # the client is gone: nobody to answer
    except Exception as error:
        logger.exception("unhandled error on %s %s", request.method, request.path)
        return web.json_response({"error": f"internal error: {type(error).__name__}"}, status=500)


@web.middleware
async def _authorise(request: web.Request, handler: Handler) -> web.StreamResponse:
    token = request.app[TOKEN]
    if token and request.path not in _OPEN_PATHS:
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), f"Bearer {token}".encode()):
            return web.json_response({"error": "missing or wrong token"}, status=401)
    return await handler(request)


async def _json_body(request: web.Request) -> Any:
    """Parse the body. Raises ``ValueError`` on anything that is not JSON."""
    try:
        return json.loads(await request.read())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {type(error).__name__}") from error


async def run(request: web.Request) -> web.Response:
    """POST /v1/run: one :class:`ExecutionRequest`, one :class:`ExecutionResult`."""
    order = ExecutionRequest.from_dict(await _json_body(request))
    result = await request.app[DISPATCHER].execute(order)
    return web.json_response(result.to_dict())


async def batch(request: web.Request) -> web.Response:
    """POST /v1/batch: ``{"requests": [...]}`` to ``{"results": [...]}`` in order; admitted as a whole or not at all."""
    body = await _json_body(request)
    if not isinstance(body, dict) or not isinstance(body.get("requests"), list):
        raise ValueError("the body must be an object with a list 'requests'")
    orders = [ExecutionRequest.from_dict(item) for item in body["requests"]]
    dispatcher = request.app[DISPATCHER]
    if len(orders) > min(MAX_BATCH, dispatcher.queue_size):
        raise RequestRefused(f"a batch may have at most {min(MAX_BATCH, dispatcher.queue_size)} requests")
    if len({order.request_id for order in orders}) < len(orders):
        raise RequestRefused("request ids within a batch must differ")
    dispatcher.check_room(len(orders))
    tasks = [asyncio.ensure_future(dispatcher.execute(order)) for order in orders]
    try:
        results = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()  # no effect on those that are done
    return web.json_response({"results": [result.to_dict() for result in results]})


async def open_session(request: web.Request) -> web.Response:
    """POST /v1/sessions: ``{"session_id": optional}`` to ``{"session_id"}``; then use the id in requests."""
    body = await _json_body(request) if request.can_read_body else {}
    wanted = body.get("session_id") if isinstance(body, dict) else body
    if wanted is not None and not (isinstance(wanted, str) and 0 < len(wanted) <= MAX_ID):
        raise ValueError(f"'session_id' must be a string of 1 to {MAX_ID} characters")
    return web.json_response({"session_id": request.app[DISPATCHER].open_session(wanted)})


async def close_session(request: web.Request) -> web.Response:
    """DELETE /v1/sessions/ID: end a session and free what it holds."""
    session_id = request.match_info["session_id"]
    await request.app[DISPATCHER].sessions.close(session_id)
    return web.json_response({"session_id": session_id})


async def run_code(request: web.Request) -> web.Response:
    """POST /run_code as SandboxFusion defines it. Extra answer field ``result``: the native result.

    Script semantics as there: no echo of a last expression unless the extra field ``echo`` asks for it.
    """
    body = await _json_body(request)
    dispatcher = request.app[DISPATCHER]
    result = await dispatcher.execute(sandbox_fusion_request(body, dispatcher.limits))
    if result.busy:  # to its clients an error in the answer is final
        raise Overloaded(dispatcher.retry_after(), result.detail)
    return web.json_response(sandbox_fusion_answer(result))


def sandbox_fusion_request(body: object, limits: Limits) -> ExecutionRequest:
    """Read SandboxFusion's ``RunCodeRequest``.

    Raises:
        ValueError: a field is wrong or unknown; the message names it.
        RequestRefused: a field asks for what this server does not do.
    """
    if not isinstance(body, dict):
        raise ValueError("the body must be a JSON object")
    unknown = sorted(set(body) - _RUN_CODE_FIELDS)
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; known: {', '.join(sorted(_RUN_CODE_FIELDS))}")
    if body.get("language", "python") != "python":
        raise RequestRefused(f"language {body.get('language')!r} is not served here, only 'python'")
    for name in ("files", "fetch_files"):
        if body.get(name):
            raise RequestRefused(f"{name!r} is not served here")
    check_seconds("run_timeout", body.get("run_timeout"))
    check_seconds("compile_timeout", body.get("compile_timeout"))  # nothing is compiled, so any will do
    megabytes = body.get("memory_limit_MB")
    if megabytes is not None and (isinstance(megabytes, bool) or not isinstance(megabytes, int | float)):
        raise ValueError("'memory_limit_MB' must be a number")
    if megabytes is not None and 0 <= megabytes < limits.memory_bytes / 1e6:  # a negative one: none
        raise RequestRefused(
            f"'memory_limit_MB' below this server's own {limits.memory_bytes / 1e6:.0f} is not served here; "
            "its --memory-mib lowers it for all"
        )
    fields = {"code": body.get("code"), "stdin": body.get("stdin"), "timeout": body.get("run_timeout")}
    fields |= {"echo": body.get("echo", False)}
    fields |= {name: body.get(name) for name in ("session_id", "request_id")}
    return ExecutionRequest.from_dict(fields)


def sandbox_fusion_answer(result: ExecutionResult) -> dict[str, Any]:
    """Map a result to SandboxFusion's ``RunCodeResponse``."""
    if result.outcome is Outcome.INFRA:
        status, run_result = "SandboxError", None
    else:
        status = "Success" if result.ok else "Failed"
        stopped = result.outcome is Outcome.TIMEOUT
        return_code = result.exit_code if result.exit_code is not None else -(result.signal or 0)
        run_result = {
            "status": "TimeLimitExceeded" if stopped else "Finished",
            "execution_time": result.seconds,
            "return_code": None if stopped else return_code,
            "stdout": result.stdout,
            "stderr": result.stderr,
        }
    return {
        "status": status,
        "message": result.detail,
        "compile_result": None,
        "run_result": run_result,
        "executor_pod_name": None,
        "files": {},
        "result": result.to_dict(),
    }


async def healthz(request: web.Request) -> web.Response:
    """GET /healthz: 200 once a program has just been run correctly, 503 otherwise."""
    dispatcher = request.app[DISPATCHER]
    answer: dict[str, Any] = {
        "isolation": dispatcher.tier.isolation.value,
        "workers": dispatcher.workers,
        "running": dispatcher.running,
        "waiting": dispatcher.waiting,
        "sessions": len(dispatcher.sessions),
        "draining": dispatcher.draining,
    }
    try:
        await dispatcher.canary()
    except WorkerLost as error:
        return web.json_response({"status": "failing", "error": str(error), **answer}, status=503)
    return web.json_response({"status": "draining" if dispatcher.draining else "ok", **answer})


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics in Prometheus' text format."""
    text = render_metrics(request.app[DISPATCHER])
    return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})
