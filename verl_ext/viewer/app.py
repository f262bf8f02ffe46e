"""The viewer's HTTP face: the page, its two assets, and JSON. Reads only; there is nothing to change.

Model text is hostile until shown otherwise. The page makes no HTML out of text (`Trusted Types: none` lets the browser
refuse it), loads nothing from elsewhere, and may be asked for only under a name of this machine: a foreign web page
that points its own name at 127.0.0.1 (DNS rebinding) is answered 421.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from verl_ext.viewer import queries
from verl_ext.viewer.runs import Run

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
RUNS = web.AppKey("runs", list)
HOSTS = web.AppKey("hosts", frozenset)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(runs: Sequence[Run], hosts: Sequence[str]) -> web.Application:
    """Return the application. `hosts` are the names, without port, under which it may be asked for."""
    app = web.Application(middlewares=[_guard])
    app[RUNS], app[HOSTS] = list(runs), frozenset(hosts)
    app.router.add_get("/", _page)
    app.router.add_get("/static/{name}", _asset)
    app.router.add_get("/api/overview", _answer(lambda runs, get: queries.overview(runs)))
    app.router.add_get("/api/curves", _answer(lambda runs, get: queries.curves(runs, get.getall("name", []))))
    app.router.add_get("/api/prompt", _answer(lambda runs, get: queries.same_prompt(runs, get["key"])))
    app.router.add_get("/api/{run}/groups", _answer(_groups))
    app.router.add_get("/api/{run}/group", _answer(_group))
    app.router.add_get("/api/{run}/whatif", _answer(_what_if))
    app.router.add_get("/api/{run}/conversation", _answer(lambda run, get: queries.conversation(run, int(get["id"]))))
    app.router.add_get("/api/{run}/gradient", _answer(lambda run, get: queries.gradient(run)))
    app.router.add_get("/api/{run}/text", _text)
    return app


@web.middleware
async def _guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The Host header, the headers of every answer, and one line of JSON for every refusal."""
    try:
        if urlsplit(f"//{request.headers.get('Host', '')}").hostname not in request.app[HOSTS]:
            raise web.HTTPMisdirectedRequest(reason="this viewer answers to the names it was started with only")
        answer = await handler(request)
    except web.HTTPException as error:
        answer = web.json_response({"error": error.reason}, status=error.status)
    except KeyError as error:
        answer = web.json_response({"error": f"not there: {error}"}, status=404)
    except (ValueError, RuntimeError) as error:
        answer = web.json_response({"error": str(error)}, status=400)
    except FileNotFoundError as error:  # trajectory_keep, or somebody who makes room
        answer = web.json_response({"error": f"no longer there: {error.filename}"}, status=404)
    except Exception as error:
        logger.exception(f"viewer: {request.path_qs}")
        answer = web.json_response({"error": f"{type(error).__name__}: {error}"}, status=500)
    answer.headers.update(HEADERS)
    return answer


def _answer(query: Callable[[Any, Any], Any]) -> Handler:
    """A handler of a query of `(run, parameters)`, or of all runs where the path names none; off the event loop."""

    async def handler(request: web.Request) -> web.Response:
        value = await asyncio.to_thread(query, _runs(request), request.query)
        text = json.dumps(value, allow_nan=False)  # a browser reads no NaN: an error here, not a page that is dead
        return web.Response(text=text, content_type="application/json")

    return handler


def _runs(request: web.Request) -> Any:
    runs, number = request.app[RUNS], request.match_info.get("run")
    if number is None:
        return runs
    if not number.isdecimal() or int(number) >= len(runs):
        raise KeyError(f"run {number}")
    return runs[int(number)]


def _groups(run: Run, get: Any) -> dict[str, Any]:
    return queries.groups(
        run,
        split=get.get("split", "train"),
        step=int(get["step"]) if get.get("step") else None,
        flags=get.getall("flag", []),
        text=get.get("q", ""),
        prompt=get.get("prompt", ""),
        sort=get.get("sort", "step"),
        offset=int(get.get("offset", 0)),
    )


def _group(run: Run, get: Any) -> dict[str, Any]:
    number = int(get["id"])
    return queries.group(run, number, get.get("q", "")) | queries.neighbours(run, number)


def _what_if(run: Run, get: Any) -> dict[str, Any]:
    return queries.what_if(run, int(get["id"]), json.loads(get["settings"]))


async def _text(request: web.Request) -> web.Response:
    """One text, whole, as plain text that no browser takes for a page."""
    run, get = _runs(request), request.query
    text = await asyncio.to_thread(queries.full_text, run, int(get["id"]), get["path"])
    return web.Response(body=text.encode("utf-8", "replace"), content_type="text/plain", charset="utf-8")


async def _page(request: web.Request) -> web.Response:
    return _file("index.html")


async def _asset(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    if name not in {path.name for path in STATIC.iterdir()}:
        raise KeyError(name)
    return _file(name)


def _file(name: str) -> web.Response:
    kind = _TYPES.get(Path(name).suffix, "text/plain")
    return web.Response(body=(STATIC / name).read_bytes(), content_type=kind, charset="utf-8")
