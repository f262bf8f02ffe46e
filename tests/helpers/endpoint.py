"""An OpenAI-compatible endpoint on loopback that says what a test wrote down, and that can be as poor as a real one."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from aiohttp import web

from recipe.gtpo.tasks.arithmetic.policy import TURN_END

#: What a request may hold at an endpoint that knows OpenAI's words only.
OPENAI = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "n", "stop", "logprobs"}


class FakeEndpoint:
    """`POST /v1/completions`, `GET /v1/models`.

    Args:
        tokenizer: of the model that it would serve.
        say: the turns so far (requests, without the probe) -> what is said next; a turn that ends by itself.
        ids: hands out the tokens, as vLLM does; else the text only.
        prompts: what it takes a prompt as: "ids", "text", or "any".
        strict: refuses words that are not OpenAI's.
        busy: answers the first so many turns with 503.
        models: that it serves.
    """

    def __init__(
        self,
        tokenizer: Any,
        say: Callable[[int], str],
        *,
        ids: bool = True,
        prompts: str = "any",
        strict: bool = False,
        busy: int = 0,
        models: tuple[str, ...] = ("toy",),
        key: str | None = None,
    ) -> None:
        self.tokenizer, self.say, self.ids, self.prompts, self.strict = tokenizer, say, ids, prompts, strict
        self.busy, self.models, self.key = busy, models, key
        self.requests: list[dict[str, Any]] = []  # of turns
        self.probes: list[dict[str, Any]] = []
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application()
        app.add_routes([web.post("/v1/completions", self._complete), web.get("/v1/models", self._models)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self.url = f"http://127.0.0.1:{port}/v1"
        try:
            yield self.url
        finally:
            await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in self.models]})

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "who are you?"}, status=401)
        if self.strict and (unknown := body.keys() - OPENAI):
            return web.json_response({"error": f"unknown: {sorted(unknown)}"}, status=400)
        kind = "text" if isinstance(body["prompt"], str) else "ids"
        if self.prompts not in ("any", kind):
            return web.json_response({"error": f"prompt must be {self.prompts}"}, status=422)
        if body["max_tokens"] == 1 and "temperature" not in body:
            self.probes.append(body)
            return web.json_response({"choices": [self._choice("1", 1, True)]})
        if self.busy:
            self.busy -= 1
            return web.Response(status=503, text="busy")
        self.requests.append(body)
        return web.json_response({"choices": [self._choice(self.say(len(self.requests) - 1), body["max_tokens"])]})

    def _choice(self, text: str, room: int, cut: bool = False) -> dict[str, Any]:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        ids.append(self.tokenizer.convert_tokens_to_ids(TURN_END))
        cut = cut or len(ids) > room
        said = ids[:room] if cut else ids[:-1]
        choice = {"text": self.tokenizer.decode(said), "finish_reason": "length" if cut else "stop"}
        return choice | ({"token_ids": ids[:room]} if self.ids else {})
