"""Limits of single routes: FastAPI dependencies and decorated endpoints."""

import asyncio
import functools
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, cast

import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI
from fastapi import HTTPException as FastAPIHTTPException
from fastapi.responses import StreamingResponse
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import Message
from starlette.websockets import WebSocket

from redis_asgi import (
    ConfigurationError,
    Decision,
    PolicyState,
    RateLimit,
    RateLimitExceeded,
    RateLimitMiddleware,
    Rule,
    Settings,
    by_header,
    rate_limit,
)
from redis_asgi.ratelimit.rules.endpoints import endpoint_name
from redis_asgi.ratelimit.rules.policies import fit_name

from ..kit.inside import engine_of
from .harness import client_of, drive, memory, statuses, websocket_scope

pytestmark = pytest.mark.anyio


async def test_dependency_limits_one_route(memory_settings: Settings) -> None:
    """Over quota the route answers 429 by itself, with the fields; its neighbour does not notice."""
    app = FastAPI()
    limit = RateLimit("2/minute", settings=memory_settings)

    @app.get("/report", dependencies=[Depends(limit)])
    async def report() -> dict[str, str]:
        return {"report": "ok"}

    @app.get("/free")
    async def free() -> str:
        return "free"

    async with client_of(app) as client:
        responses = [await client.get("/report") for _ in range(3)]
        other = await client.get("/free")

    assert [200, 200, 429] == [response.status_code for response in responses]
    assert responses[0].headers["ratelimit"].endswith(";r=1;t=60")
    assert "application/json" == responses[2].headers["content-type"]
    assert {"detail": "Rate limit exceeded: 2 per 60 s. Retry in 60 s."} == responses[2].json()
    assert ("60", "no-store") == (responses[2].headers["retry-after"], responses[2].headers["cache-control"])
    assert "ratelimit" not in other.headers


async def test_limits_of_one_redis_share_the_room_for_what_they_keep(memory_settings: Settings) -> None:
    """Each client may ask for each endpoint,
    so that a room for each limit would be one for each pair of them.
    """
    limits = [RateLimit("9/minute", name=f"limit-{i}", settings=memory_settings) for i in range(3)]
    app = FastAPI()
    for i, limit in enumerate(limits):
        app.get(f"/{i}", dependencies=[Depends(limit)])(lambda: None)

    for i in range(3):
        assert [200] == await statuses(app, 1, f"/{i}")
    kept = limits[0].engine_for({}).plans.charges
    outside = RateLimitMiddleware(app, "9/minute", settings=memory_settings)
    assert all(kept is limit.engine_for({}).plans.charges for limit in limits)
    assert kept is engine_of(outside).plans.charges
    assert ["limit-0", "limit-1", "limit-2"] == [
        name for charges in list(kept.young.values())[-3:] for name in charges.names
    ]


async def test_each_endpoint_of_a_router_has_its_own_counter(memory_settings: Settings) -> None:
    """One dependency on a router counts per endpoint;
    under two prefixes the same endpoint shares by its name.
    """
    router = APIRouter(dependencies=[Depends(RateLimit("1/minute", settings=memory_settings))])

    @router.get("/a")
    async def a() -> str:
        return "a"

    @router.get("/b")
    async def b() -> str:
        return "b"

    outer = APIRouter()
    outer.include_router(router, prefix="/inner")
    app = FastAPI()
    app.include_router(outer, prefix="/outer")

    assert [200, 429] == await statuses(app, 2, "/outer/inner/a")
    assert [200, 429] == await statuses(app, 2, "/outer/inner/b")


async def test_same_template_under_two_prefixes_is_two_counters(memory_settings: Settings) -> None:
    """Two routers with the same template and different endpoints never share a bucket by accident."""

    def make(name: str) -> APIRouter:
        router = APIRouter()

        async def items() -> str:
            return name

        items.__qualname__ = f"{name}.items"
        router.get("/items", dependencies=[Depends(RateLimit("1/minute", settings=memory_settings))])(items)
        return router

    app = FastAPI()
    app.include_router(make("one"), prefix="/one")
    app.include_router(make("two"), prefix="/two")

    assert [200] == await statuses(app, 1, "/one/items")
    assert [200] == await statuses(app, 1, "/two/items")
    assert [429] == await statuses(app, 1, "/one/items")


async def test_equal_names_share(memory_settings: Settings) -> None:
    """Two routes that name the same limit spend the same quota."""
    app = FastAPI()
    for path in ("/a", "/b"):
        app.get(path, dependencies=[Depends(RateLimit("2/minute", name="shared", settings=memory_settings))])(
            lambda: "x"
        )

    assert [200] == await statuses(app, 1, "/a")
    assert [200] == await statuses(app, 1, "/b")
    assert [429] == await statuses(app, 1, "/a")


async def test_everything_fastapi_answers_is_limited(memory_settings: Settings) -> None:
    """Nested routers, mounted apps, 404s, 422s,
    raised HTTPExceptions and streams count and carry the fields.
    """
    inner = APIRouter()

    @inner.get("/items/{item}")
    async def item(item: int) -> int:
        return item

    @inner.get("/gone")
    async def gone() -> None:
        raise FastAPIHTTPException(410)

    @inner.get("/events")
    async def events() -> StreamingResponse:
        async def chunks() -> AsyncIterator[str]:
            yield "data: 1\n\n"
            yield "data: 2\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    middle = APIRouter()
    middle.include_router(inner, prefix="/v1")
    app = FastAPI()
    app.include_router(middle, prefix="/api")
    sub = FastAPI()
    sub.get("/deep")(lambda: "deep")
    app.mount("/sub", sub)
    app.add_middleware(RateLimitMiddleware, limits="6/minute", settings=memory_settings)
    paths = [
        "/api/v1/items/1",
        "/api/v1/items/x",
        "/api/v1/gone",
        "/api/v1/events",
        "/sub/deep",
        "/nowhere",
        "/sub/deep",
    ]
    async with client_of(app) as client:
        responses = [await client.get(path) for path in paths]

    assert [200, 422, 410, 200, 200, 404, 429] == [response.status_code for response in responses]
    assert [5, 4, 3, 2, 1, 0, 0] == [
        int(response.headers["ratelimit"].split("r=")[1].split(";")[0]) for response in responses
    ]
    assert "data: 1\n\ndata: 2\n\n" == responses[3].text


async def test_decorator_on_every_kind_of_endpoint(memory_settings: Settings) -> None:
    """Async and sync functions and methods keep their answers, are limited,
    and say so in their own headers.
    """

    @rate_limit("1/minute", settings=memory_settings)
    async def coroutine(request: Request) -> Response:
        return PlainTextResponse("async")

    @rate_limit("1/minute", settings=memory_settings)
    def plain(request: Request) -> Response:
        return PlainTextResponse("sync")

    class Endpoint(HTTPEndpoint):
        @rate_limit("1/minute", settings=memory_settings)
        async def get(self, request: Request) -> Response:
            return PlainTextResponse("method")

    app = Starlette(routes=[Route("/async", coroutine), Route("/sync", plain), Route("/method", Endpoint)])
    async with client_of(app) as client:
        for path in ("async", "sync", "method"):
            first, second = await client.get(f"/{path}"), await client.get(f"/{path}")

            assert (200, path) == (first.status_code, first.text)
            assert first.headers["ratelimit"].endswith(";r=0;t=60")
            assert 429 == second.status_code
    assert "coroutine" == coroutine.__name__


async def test_decorator_on_a_websocket(memory_settings: Settings) -> None:
    """A refused handshake is a 429 through the extension,
    else a close with 1008; neither is a server error.
    """

    @rate_limit("1/minute", settings=memory_settings)
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/", endpoint)])
    connect: Message = {"type": "websocket.connect"}
    admitted = await drive(app, websocket_scope(), connect)
    answered = await drive(app, websocket_scope(extensions={"websocket.http.response": {}}), connect)
    closed = await drive(app, websocket_scope(), connect)

    assert "websocket.accept" == admitted[0]["type"]
    assert ("websocket.http.response.start", 429) == (answered[0]["type"], answered[0]["status"])
    assert ("websocket.close", 1008) == (closed[0]["type"], closed[0]["code"])


async def test_decorator_without_a_request_says_what_is_missing(memory_settings: Settings) -> None:
    """An endpoint that takes no request cannot be limited, and the error says how to mend it."""

    @rate_limit("1/minute", settings=memory_settings)
    async def endpoint() -> None:
        return None

    with pytest.raises(RuntimeError, match="request: Request"):
        await endpoint()


async def test_route_fails_closed_with_503() -> None:
    """A route that fails closed while Redis is gone answers 503 with Retry-After."""
    app = FastAPI()
    limit = RateLimit("1/minute", on_redis_error="closed", redis="redis://127.0.0.1:1")
    app.get("/", dependencies=[Depends(limit)])(lambda: "x")
    async with client_of(app) as client:
        response = await client.get("/")

    assert (503, "1") == (response.status_code, response.headers["retry-after"])


async def test_missing_identity_of_a_route() -> None:
    """Where an identity is required and missing, the route answers 400."""
    app = FastAPI()
    settings = memory(RATE_LIMIT_MISSING_IDENTITY="refuse", REDIS_KEY_PREFIX="mi:")
    limit = RateLimit("1/minute", partition_by=by_header("x-api-key"), settings=settings)
    app.get("/", dependencies=[Depends(limit)])(lambda: "x")

    assert [400] == await statuses(app, 1)
    assert [200, 429] == await statuses(app, 2, headers={"x-api-key": "k"})


async def test_dynamic_limits_and_cost_of_a_route(memory_settings: Settings) -> None:
    """Limits and cost may be callables of the connection, async or not."""
    app = FastAPI()

    async def plan(conn: Any) -> str | None:
        return cast("str | None", conn.headers.get("x-plan"))

    limit = RateLimit(plan, name="plan", cost=lambda conn: int(conn.headers.get("x-cost", 1)), settings=memory_settings)
    app.get("/", dependencies=[Depends(limit)])(lambda: "x")

    assert [200] * 3 == await statuses(app, 3)
    assert [200, 429] == await statuses(app, 2, headers={"x-plan": "5/minute", "x-cost": "3"})


def test_exceeded_answers_itself() -> None:
    """RateLimitExceeded is a 429 with a detail that does not name the client;
    str() does; never a content type.
    """
    bare = RateLimitExceeded("203.0.113.7", 100, 60)
    state = PolicyState("default", 5, 60, 0, 12.5, 12.5, False, "fixed-window")
    full = RateLimitExceeded("203.0.113.7", 5, 60, decision=Decision(False, "redis", 12.5, (state,), ("default",)))

    assert "Rate limit exceeded for 203.0.113.7: 100 requests per 60 seconds" == str(bare)
    assert (429, "60") == (bare.status_code, (bare.headers or {})["retry-after"])
    assert "203.0.113.7" not in f"{bare.detail} {full.detail}"
    assert {
        "ratelimit-policy": '"default";q=5;w=60',
        "ratelimit": '"default";r=0;t=13',
        "cache-control": "no-store",
        "retry-after": "13",
    } == full.headers


def test_credentials_are_never_the_clients_name(memory_settings: Settings) -> None:
    """What the package raises itself names a credential's partition by kind and 8 hex digits."""
    from redis_asgi.ratelimit.limits.policy import make_partition

    label = make_partition("header:x-api-key", "sk-secret").label

    assert label.startswith("header:x-api-key:")
    assert 8 == len(label.rpartition(":")[2])
    assert "secret" not in repr(make_partition("header:x-api-key", "sk-secret"))


def test_misuse_fails_at_construction() -> None:
    """Bad notation and bad names fail where the limit is written, without reading the environment."""
    with pytest.raises(ConfigurationError, match="limits='5'"):
        RateLimit("5")
    with pytest.raises(ConfigurationError, match="name='a b'"):
        RateLimit("5/minute", name="a b")
    with pytest.raises(ConfigurationError, match="cost=-1"):
        rate_limit("5/minute", cost=-1)


def _long() -> None:
    return None


def test_endpoint_names_fit_and_stay_apart() -> None:
    """A name that is too long or odd is cut and keeps a digest,
    so that two endpoints never share by accident.
    """
    _long.__qualname__ = "Very.Long.Qualified.Name.Of.An.Endpoint.That.Goes.On"
    endpoints: list[object] = [functools.partial(_long), lambda: None, Rule, RateLimit]
    names = {fit_name(endpoint_name(endpoint)) for endpoint in endpoints}

    assert 4 == len(names)
    assert all(len(name) <= 40 for name in names)
    assert "redis_asgi.ratelimit.rules.rule.Rule" == endpoint_name(Rule)


async def test_annotated_dependency(memory_settings: Settings) -> None:
    """It works as an annotated parameter too."""
    app = FastAPI()
    limit = RateLimit("1/minute", settings=memory_settings)

    @app.get("/")
    async def root(_: Annotated[None, Depends(limit)]) -> str:
        return "x"

    assert [200, 429] == await statuses(app, 2)


async def test_charge_without_the_middleware_knows_no_end(redis_url: str) -> None:
    """Nobody sees the response end, so a background task may charge too;
    with the middleware that is an error.
    """
    app = FastAPI()
    limit = RateLimit("9/minute", name="late", settings=Settings(REDIS_URL=redis_url))

    @app.get("/", dependencies=[Depends(limit)])
    async def endpoint(request: Request, tasks: BackgroundTasks) -> str:
        tasks.add_task(request.state.rate_limit.charge, 3)
        return "x"

    async with client_of(app) as client:
        fields = [(await client.get("/")).headers["ratelimit"] for _ in range(2)]
    assert ['"late";r=8;t=60', '"late";r=4;t=60'] == fields

    async with client_of(RateLimitMiddleware(app, "9/minute", settings=Settings(REDIS_URL=redis_url))) as client:
        with pytest.raises(RuntimeError, match="Charge before its last byte"):
            await client.get("/")


async def test_sync_endpoint_charges_without_the_middleware(redis_url: str) -> None:
    """A charge from an endpoint that runs in a thread reaches Redis."""
    app = FastAPI()
    limit = RateLimit("9/minute", name="sync", settings=Settings(REDIS_URL=redis_url))

    @app.get("/", dependencies=[Depends(limit)])
    def endpoint(request: Request) -> str:
        request.state.rate_limit.charge(3)
        return "x"

    async with client_of(app) as client:
        first = await client.get("/")
        second = await client.get("/")

    assert ['"sync";r=8;t=60', '"sync";r=4;t=60'] == [r.headers["ratelimit"] for r in (first, second)]


@pytest.mark.parametrize("store", ["memory", "redis"])
async def test_route_gives_back_no_more_than_it_took_however_often(store: str, request: pytest.FixtureRequest) -> None:
    """Without the middleware each `charge` is applied at once;
    together they free nothing that others have used.
    """
    url = "memory://" if store == "memory" else request.getfixturevalue("redis_url")
    app = FastAPI()
    limit = RateLimit("10/minute", name=f"{store}-{uuid.uuid4().hex[:8]}", settings=Settings(REDIS_URL=url))

    @app.get("/", dependencies=[Depends(limit)])
    async def give(request: Request, more: int = 0, back: int = 0) -> str:
        request.state.rate_limit.charge(more)
        for _ in range(back):
            request.state.rate_limit.charge(-1)
        await asyncio.sleep(0)  # changes are applied in the loop's next turn
        return "ok"

    async def left(client: httpx.AsyncClient, query: str = "") -> str:
        return (await client.get(f"/{query}")).headers["ratelimit"].partition(";r=")[2]

    async with client_of(app) as client:
        for _ in range(3):
            await left(client)
        # In turn: 6 left and the one is given back; the same with two more,
        # of which three in all are given back.
        seen = [await left(client, "?back=5"), await left(client, "?more=2&back=5"), await left(client)]

    assert ["6;t=60"] * 3 == seen
