"""Backend ``sandbox_fusion``: any service that speaks SandboxFusion's /run_code, this one included.

That interface carries less: no echo of a last expression, no sessions, and no telling a syntax or memory error from
another error. A request without a timeout is stopped after 10 s. How well the service isolates is not ours to say, so
results are stamped ``unknown``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp

from verl_ext.tool_server.backends import BackendUnavailable, RequestRejected
from verl_ext.tool_server.outcome import join_output
from verl_ext.tool_server.types import ExecutionRequest, ExecutionResult, Isolation, Limits, Outcome

_DEFAULT_RUN_SECONDS = 10.0  # SandboxFusion's own default
_MARGIN_SECONDS = 60.0  # for its queue; beyond run_timeout


class SandboxFusionBackend:
    """``url``: the service without /run_code, e.g. ``http://127.0.0.1:8080``."""

    def __init__(self, url: str, connections: int = 64) -> None:
        self.url = url.rstrip("/")
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections))

    async def run(self, requests: Sequence[ExecutionRequest]) -> list[ExecutionResult]:
        return list(await asyncio.gather(*map(self._run, requests)))

    async def _run(self, request: ExecutionRequest) -> ExecutionResult:
        if request.session_id is not None:
            raise RequestRejected("SandboxFusion's interface has no sessions")
        seconds = request.timeout or _DEFAULT_RUN_SECONDS
        body = {"code": request.code, "language": "python", "run_timeout": seconds, "stdin": request.stdin}
        limit = aiohttp.ClientTimeout(total=seconds + _MARGIN_SECONDS)
        try:
            async with self._session.post(f"{self.url}/run_code", json=body, timeout=limit) as response:
                if response.status == 429:
                    raise BackendUnavailable("busy", float(response.headers.get("Retry-After", 1)), busy=True)
                if 400 <= response.status < 500:
                    raise RequestRejected(f"{self.url} refused ({response.status}): {(await response.text())[:300]}")
                response.raise_for_status()
                return result_of(request, await response.json(), seconds)
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            away = isinstance(error, aiohttp.ClientConnectionError)
            raise BackendUnavailable(f"{self.url}: {type(error).__name__}: {error}", away=away) from error

    async def open_session(self) -> str:
        raise RequestRejected("SandboxFusion's interface has no sessions")

    async def close_session(self, session_id: str) -> None:
        raise RequestRejected("SandboxFusion's interface has no sessions")

    async def health(self) -> dict[str, Any]:
        (result,) = await self.run([ExecutionRequest("print(6 * 7)", timeout=10.0)])
        if result.stdout != "42\n":
            raise BackendUnavailable(f"{self.url} does not run code: {result}")
        return {"status": "ok", "isolation": Isolation.UNKNOWN.value}

    async def close(self) -> None:
        await self._session.close()


def result_of(request: ExecutionRequest, answer: dict[str, Any], seconds: float) -> ExecutionResult:
    """Map a ``RunCodeResponse`` to a result."""
    run = answer.get("run_result")
    if answer.get("status") == "SandboxError" or run is None:
        detail = answer.get("message") or "no result"
        return ExecutionResult.infra(request.request_id, f"SandboxFusion: {detail}", Isolation.UNKNOWN)
    stdout, stderr, code = run.get("stdout") or "", run.get("stderr") or "", run.get("return_code")
    note = ""
    if run.get("status") == "TimeLimitExceeded":  # which limit, the service does not say
        after = "" if request.timeout is None else f" after {request.timeout:g} s"
        outcome, note = Outcome.TIMEOUT, f"[timeout: stopped{after}]"
    elif code == 0:
        outcome = Outcome.OK
    else:
        outcome = Outcome.CRASH if code is not None and code < 0 else Outcome.ERROR
    output, cut = join_output(stdout, stderr, note, Limits().output_kept_bytes)
    return ExecutionResult(
        outcome=outcome,
        output=output,
        stdout=stdout,
        stderr=stderr,
        request_id=request.request_id,
        isolation=Isolation.UNKNOWN,
        seconds=run.get("execution_time") or 0.0,
        exit_code=code if code is not None and code >= 0 else None,
        signal=-code if code is not None and code < 0 else None,
        timeout=seconds,
        truncated=cut,
    )
