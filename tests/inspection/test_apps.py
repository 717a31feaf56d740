"""What limits an app: told without a request, and the same as requests find."""

from collections.abc import Iterable
from typing import Annotated

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Host, Mount, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from redis_asgi import RateLimit, RateLimitMiddleware, RedisManager, Rule, Settings, health_app, rate_limit
from redis_asgi.inspection.apps import LimitedApp

MEMORY = RedisManager(Settings(REDIS_URL="memory://"))
OTHER = RedisManager(Settings(REDIS_URL="memory://", REDIS_KEY_PREFIX="other:"))


class Wrapper:
    """A middleware of somebody's."""

    def __init__(self, app: ASGIApp) -> None:
        self.wrapped = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.wrapped(scope, receive, send)


async def plain(request: Request) -> Response:
    return PlainTextResponse("plain")


@rate_limit("21/minute")
@rate_limit("22/minute", name="story")
async def decorated(request: Request) -> Response:
    return PlainTextResponse("decorated")


class Endpoint(HTTPEndpoint):
    @rate_limit("23/minute", name="post")
    async def post(self, request: Request) -> Response:
        return PlainTextResponse("post")

    async def get(self, request: Request) -> Response:
        return PlainTextResponse("get")


def limiting(*rules: Rule, exempt: str | None = None) -> Middleware:
    return Middleware(RateLimitMiddleware, rules=rules, redis=MEMORY, exempt=exempt)


def rule(name: str, paths: str | None = None, methods: str | Iterable[str] | None = None) -> Rule:
    return Rule("50/minute", name=name, paths=paths, methods=methods)


def starlette_app() -> ASGIApp:
    """Mounts, routes and routers, with limits wherever Starlette takes a middleware."""
    inner = Starlette(
        routes=[Route("/deep/{x}", decorated), Route("/deep/{x}/plain", plain)],
        middleware=[limiting(rule("inner", "/deep/*"))],
    )
    router = Router(routes=[Route("/r", plain)], middleware=[limiting(rule("router"))])
    app = Starlette(
        routes=[
            Route("/", plain),
            Route("/decorated", decorated, methods=["GET", "POST"]),
            Route("/class", Endpoint),
            Route("/one", plain, middleware=[limiting(rule("one"))]),
            Mount("/t/{tenant}", inner),
            Mount("/mounted", Wrapper(router)),
            Mount("/more", routes=[Route("/x", plain)], middleware=[limiting(rule("mount"))]),
            Mount("/health", health_app(redis=MEMORY)),
            Host("other.test", Starlette(routes=[Route("/h", decorated)])),
            Route("/{rest:path}", plain, middleware=[limiting(rule("late"))]),
        ],
        middleware=[
            Middleware(Wrapper),
            limiting(rule("all"), rule("posts", "/*", "POST"), rule("sub", "/t/*"), exempt="/more/*"),
        ],
    )
    return Wrapper(app)


def fastapi_app() -> ASGIApp:
    """Dependencies of an app, of routers within routers, and of routes."""
    deep = APIRouter(prefix="/deep", dependencies=[Depends(RateLimit("31/minute", name="deep"))])
    api = APIRouter(prefix="/api", dependencies=[Depends(RateLimit("32/minute"))])
    app = FastAPI(dependencies=[Depends(RateLimit("33/minute", name="app"))])
    app.add_middleware(RateLimitMiddleware, limits="50/minute", redis=MEMORY)

    @deep.get("/{x}")
    async def leaf(x: int) -> str:
        return "leaf"

    async def behind(limited: Annotated[None, Depends(RateLimit("35/minute", name="behind"))]) -> str:
        return "behind"

    @api.post("/items")
    async def items(said: Annotated[str, Depends(behind)]) -> str:
        return said

    @app.get("/own", dependencies=[Depends(RateLimit("34/minute")), Depends(RateLimit("36/minute"))])
    async def own() -> str:
        return "own"

    @app.websocket("/ws")
    async def socket(websocket: WebSocket) -> None: ...

    api.add_route("/raw", decorated)
    api.include_router(deep)
    app.include_router(api)
    return app


REQUESTS = [
    (starlette_app, method, path)
    for method in ("GET", "POST", "HEAD")
    for path in (
        "/",
        "/decorated",
        "/class",
        "/one",
        "/t/a/deep/1",
        "/t/a/deep/1/plain",
        "/t/a/x",
        "/mounted/r",
        "/more/x",
        "/health/live",
        "/absent",
    )
] + [
    (fastapi_app, method, path)
    for method in ("GET", "POST")
    for path in ("/own", "/api/items", "/raw", "/api/deep/3", "/api/deep", "/absent", "/openapi.json")
]


@pytest.mark.anyio
@pytest.mark.parametrize(("make", "method", "path"), REQUESTS, ids=[f"{m.__name__} {v} {p}" for m, v, p in REQUESTS])
async def test_what_is_told_is_what_requests_find(make: type, method: str, path: str) -> None:
    """The policies told for a request are those in the fields of its answer."""
    app = make()
    limits, _ = LimitedApp(app).limits_of(method, path)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        answer = await client.request(method, path)
    fields = answer.headers.get("ratelimit-policy", "")
    found = {each.partition(";")[0].strip(' "') for each in fields.split(",")} - {""}

    told = {policy.name for limit in limits for policy in limit.policies}

    # That a method is not allowed is answered from further outside,
    # without the fields of a mount's own middleware.
    assert told == found | (told & {"mount"} if answer.status_code == 405 else set()), answer.status_code


def test_a_websocket_is_a_route() -> None:
    """Handshakes have a method of their own."""
    app = FastAPI()

    @app.websocket("/ws", dependencies=[Depends(RateLimit("5/minute", name="ws", redis=MEMORY))])
    async def socket(websocket: WebSocket) -> None: ...

    limited = LimitedApp(app)

    assert [("ws", ("/ws",), ("WEBSOCKET",))] == [(each.name, each.paths, each.methods) for each in limited.limits]
    assert (["ws"], []) == tuple([each.name for each in limited.limits_of(m, "/ws")[0]] for m in ("WEBSOCKET", "GET"))


def test_where_a_routes_limit_counts() -> None:
    """In the outermost middleware's Redis, unless it has its own."""
    app = FastAPI(dependencies=[Depends(RateLimit("5/minute", name="theirs", redis=OTHER))])
    app.add_middleware(RateLimitMiddleware, limits="5/minute", redis=MEMORY)

    @app.get("/", dependencies=[Depends(RateLimit("5/minute", name="shared"))])
    async def home() -> None: ...

    where = {limit.name: limit.manager for limit in LimitedApp(app).limits}

    assert {"default": MEMORY, "theirs": OTHER, "shared": MEMORY} == where


def test_places_are_told_from_outside() -> None:
    """What is mounted has paths as a client writes them."""
    paths = {limit.name: limit.paths for limit in LimitedApp(starlette_app()).limits}

    assert {
        "all": None,
        "inner": ("/t/{tenant}/deep/*",),
        "router": ("/mounted/*",),
        "one": ("/one",),
        "mount": ("/more/*",),
        "post": ("/class",),
    }.items() <= paths.items()


def test_a_wrapper_that_holds_itself_ends() -> None:
    """Nothing that an app may be keeps us for ever."""
    loop = Wrapper(plain)  # type: ignore[arg-type]  # nothing is called
    loop.wrapped = loop
    app = Starlette()
    app.mount("/again", app)

    assert [] == LimitedApp(loop).limits
    assert [] == LimitedApp(app).limits


def test_no_callable_of_the_users_is_called() -> None:
    """What a callable would say is not asked; its limits are unknown, not absent."""

    def never(*_: object) -> str:
        raise AssertionError

    app = RateLimitMiddleware(
        Starlette(),
        rules=[Rule(never, name="plan", partition_by=never, cost=never)],  # type: ignore[arg-type]  # never called
        exempt=never,  # type: ignore[arg-type]  # the same
        redis=MEMORY,
    )
    (limit,), is_exempt = LimitedApp(app).limits_of("GET", "/")

    assert (None, "custom", None, (), False) == (limit.limits, limit.by, limit.cost, limit.policies, is_exempt)
