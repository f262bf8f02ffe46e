"""Backend ``http``: a tool server by URL, over its native /v1 API."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import aiohttp

from verl_ext.tool_server.backends import BackendUnavailable, RequestRejected
from verl_ext.tool_server.types import ExecutionRequest, ExecutionResult

_CONNECT_SECONDS = 10.0


class HttpBackend:
    """Keeps connections open between calls; made and used within one event loop."""

    def __init__(self, url: str, token: str | None = None, connections: int = 256) -> None:
        self.url = url.rstrip("/")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections),
            headers={"Authorization": f"Bearer {token}"} if token else None,
            # No total limit here: the client's deadline covers the call, and a server may queue it for long.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
        )

    async def run(self, requests: Sequence[ExecutionRequest]) -> list[ExecutionResult]:
        if len(requests) == 1:
            answers = [await self._call("POST", "/v1/run", requests[0].to_dict())]
        else:
            answer = await self._call("POST", "/v1/batch", {"requests": [request.to_dict() for request in requests]})
            answers = answer["results"]
        return [ExecutionResult.from_dict(answer) for answer in answers]

    async def open_session(self) -> str:
        return (await self._call("POST", "/v1/sessions", {}))["session_id"]

    async def close_session(self, session_id: str) -> None:
        await self._call("DELETE", f"/v1/sessions/{quote(session_id, safe='')}", None)

    async def health(self) -> dict[str, Any]:
        return await self._call("GET", "/healthz", None)

    async def close(self) -> None:
        await self._session.close()

    async def _call(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        try:
            async with self._session.request(method, self.url + path, json=body) as response:
                status, headers = response.status, response.headers
                answer = await response.json() if status == 200 else await response.text()
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError) as error:
            away = isinstance(error, aiohttp.ClientConnectionError)
            raise BackendUnavailable(f"{self.url}: {type(error).__name__}: {error}", away=away) from error
        if status == 200:
            return answer
        if status == 429:
            raise BackendUnavailable(f"{self.url} is busy", float(headers.get("Retry-After", 1)), busy=True)
        if status >= 500:
            raise BackendUnavailable(f"{self.url} answered {status}: {answer[:300]}")
        raise RequestRejected(f"{self.url} refused the request ({status}): {answer[:300]}")
