"""Apps of several frameworks with the same routes,
and the spellings of a path that a client may try on them.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from hypothesis import strategies as st
from starlette.types import ASGIApp, Message

from redis_asgi import RateLimitMiddleware, RedisManager, Rule, Settings

# Endpoint to (a path that leads to it, the pattern of the rule for it).
ROUTES = {
    "login": ("/login", "/login"),
    "buy": ("/v1/items/5/buy", "/v1/items/*/buy"),
    "top": ("/", "/"),
}
PIECES = (
    "/", "//", "///", "/.", "/..", "/./", "/x/../", ".", "..", "%2F", "%2f", "%5C", "\\", "%2E", "%2e%2e/", "%252F",
    "%0A", "%0a%0A", "%0D", "%0D%0A", "%00", "%09", "%0B", "%0C", "%1C", "%20", "+", "%7F", "%C2%85", "%C2%A0",
    "%E2%80%A8", "%FF", ";", ";a=b", "%3Ba", "?", "%3F", "%3Fq", "#", "#x", "%23", "%23x", ":", "@", "*", "%25", "%",
    "x", "/x", "x/", "api", "/api", "/api/", "api/", "/foo/api",
)  # fmt: skip
BEFORE = (
    "", "http://x", "https://u@x:1", "HTTP://x", "http:", "http:/", "http:///", "ws://x", "//x", "x:", "x:80", "*",
    "http://x%2F", "http://x%3F", "%20", "%0A", "?", "#", ".", "\\", "/api", "/api/", "/foo/api", "/api/api", "api",
)  # fmt: skip


@st.composite
def targets(draw: st.DrawFn, path: str) -> str:
    """*path* with up to three changes, as a client may write it in a request line."""
    target = path
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(target)))
        kind = draw(st.integers(0, 5))
        if kind <= 2:
            target = target[:at] + draw(st.sampled_from(PIECES)) + target[at:]
        elif kind == 3:  # one character by its number
            target = target[:at] + "".join(f"%{ord(char):02x}" for char in target[at : at + 1]) + target[at + 1 :]
        elif kind == 4:
            target = target[:at] + target[at : at + 1].swapcase() + target[at + 1 :]
        else:
            target = target[:at] + target[at + 1 :]
    return draw(st.sampled_from(BEFORE)) + target if draw(st.booleans()) else target


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: the status, the endpoint that answered, whether a rule counted the request."""

    status: int
    endpoint: str
    counted: bool


async def ask(app: ASGIApp, target: str, *, root: str = "", method: str = "GET", path: str | None = None) -> Answer:
    """Ask *app* as a server does that passes a request line's *target* on without looking at it."""
    raw = target.partition("?")[0].encode()
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
        "method": method, "path": unquote(raw.decode()) if path is None else path, "raw_path": raw,
        "query_string": target.partition("?")[2].encode(), "root_path": root, "headers": [(b"host", b"x")],
        "client": ("203.0.113.7", 1), "server": ("x", 80), "state": {},
    }  # fmt: skip
    sent: list[Message] = []
    waiting: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Message:
        return waiting.pop() if waiting else await asyncio.Event().wait()  # type: ignore[return-value]  # never

    async def send(message: Message) -> None:
        sent.append(message)

    # An app that fails on a spelling has served nothing;
    # the limiter itself is asked without such an app elsewhere.
    with contextlib.suppress(Exception):
        await asyncio.wait_for(app(scope, receive, send), 5)
    starts = [message for message in sent if message["type"] == "http.response.start"]
    fields = {bytes(name).lower() for message in starts for name, _ in message["headers"]}
    body = b"".join(message.get("body", b"") for message in sent)
    return Answer(starts[0]["status"] if starts else 0, body.decode("utf-8", "replace"), b"ratelimit" in fields)


def limited(app: ASGIApp, pattern: str, **options: Any) -> RateLimitMiddleware:
    """*app* behind one rule, for *pattern*, that nobody exceeds."""
    settings = Settings(REDIS_URL="memory://")
    rule = Rule("1000000000/minute", name="one", paths=pattern, **options)
    return RateLimitMiddleware(app, rules=[rule], redis=RedisManager(settings))


@contextlib.asynccontextmanager
async def started(app: Any) -> AsyncIterator[None]:
    """An app between the two halves of its lifespan."""
    inbox: asyncio.Queue[Message] = asyncio.Queue()
    outbox: asyncio.Queue[Message] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    task = asyncio.create_task(app(scope, inbox.get, outbox.put))
    await inbox.put({"type": "lifespan.startup"})
    await asyncio.wait_for(outbox.get(), 10)
    try:
        yield
    finally:
        await inbox.put({"type": "lifespan.shutdown"})
        await asyncio.wait([task], timeout=5)
        task.cancel()


def starlette_app() -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse
    from starlette.routing import Mount, Route

    def named(name: str) -> Callable[[Request], PlainTextResponse]:
        return lambda _request: PlainTextResponse(name)

    items = [Route("/{item}/buy", named("buy"))]
    return Starlette(
        routes=[
            Route("/login", named("login")),
            Mount("/v1", routes=[Mount("/items", routes=items)]),
            Route("/", named("top")),
        ]
    )


def fastapi_app(root: str = "") -> Any:
    from fastapi import APIRouter, FastAPI
    from fastapi.responses import PlainTextResponse

    app = FastAPI(default_response_class=PlainTextResponse, openapi_url=None)
    app.root_path = root  # what FastAPI(root_path=...) does, without its warning
    app.add_api_route("/login", lambda: "login")
    app.add_api_route("/", lambda: "top")
    inner = APIRouter(prefix="/items")
    inner.add_api_route("/{item}/buy", lambda item: "buy")
    outer = APIRouter(prefix="/v1")
    outer.include_router(inner)
    app.include_router(outer)
    return app


def litestar_app() -> Any:
    from litestar import Litestar, get

    async def login() -> str:
        return "login"

    async def buy(item: str) -> str:
        return "buy"

    async def top() -> str:
        return "top"

    routes = (("/login", login), ("/v1/items/{item:str}/buy", buy), ("/", top))
    handlers = [get(path, media_type="text/plain")(handler) for path, handler in routes]
    return Litestar(handlers, openapi_config=None, logging_config=None)


def quart_app() -> Any:
    from quart import Quart

    app = Quart("trial")

    async def view(**_values: Any) -> str:
        from quart import request

        return str(request.endpoint)

    for name, path in (("login", "/login"), ("buy", "/v1/items/<item>/buy"), ("top", "/")):
        app.add_url_rule(path, name, view)
    return app


def falcon_app() -> Any:
    import falcon.asgi

    class Named:
        def __init__(self, name: str) -> None:
            self._name = name

        async def on_get(self, req: Any, resp: Any, **_values: Any) -> None:
            resp.text = self._name

    app = falcon.asgi.App()
    for name, path in (("login", "/login"), ("buy", "/v1/items/{item}/buy"), ("top", "/")):
        app.add_route(path, Named(name))
    return app


def sanic_app() -> Any:
    from sanic import Sanic, text

    app = Sanic(f"trial-{os.urandom(4).hex()}", configure_logging=False)
    app.add_route(lambda _request: text("login"), "/login", name="login")
    app.add_route(lambda _request, item: text("buy"), "/v1/items/<item>/buy", name="buy")
    app.add_route(lambda _request: text("top"), "/", name="top")
    return app


def blacksheep_app() -> Any:
    from blacksheep import Application, Router, text

    router = Router()
    app = Application(router=router)

    async def login() -> Any:
        return text("login")

    async def buy(item: str) -> Any:
        return text("buy")

    async def top() -> Any:
        return text("top")

    router.add_get("/login", login)
    router.add_get("/v1/items/{item}/buy", buy)
    router.add_get("/", top)
    return app
