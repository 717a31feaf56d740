"""Limits of routes within a middleware: one decision, one header, one Redis."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi import HTTPException as FastAPIHTTPException
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from redis_asgi import (
    Decision,
    RateLimit,
    RateLimitMiddleware,
    Rule,
    Settings,
)
from redis_asgi.telemetry import fresh_telemetry

from .harness import client_of, drive, http_scope, statuses

pytestmark = pytest.mark.anyio


async def test_route_joins_the_middleware(memory_settings: Settings) -> None:
    """With the middleware, the route's policies stand beside its own in one header and one
    decision.
    """
    app = FastAPI()
    seen: list[Any] = []

    @app.get("/r", dependencies=[Depends(RateLimit("2/minute", name="r"))])
    async def r(request: Request) -> str:
        seen.append(request.state.rate_limit)
        return "r"

    limited = RateLimitMiddleware(app, "9/minute", settings=memory_settings)
    async with client_of(limited) as client:
        responses = [await client.get("/r") for _ in range(3)]

    assert '"default";q=9;w=60, "r";q=2;w=60' == responses[0].headers["ratelimit-policy"]
    assert '"default";r=8;t=60, "r";r=1;t=60' == responses[0].headers["ratelimit"]
    assert ["default", "r"] == [state.name for state in seen[0].policies]
    assert isinstance(seen[0], Decision)
    assert 429 == responses[2].status_code
    assert '"default";r=6;t=60, "r";r=0;t=60' == responses[2].headers["ratelimit"]


async def test_decision_looked_at_early_sees_what_joins_later(memory_settings: Settings) -> None:
    """Reading the decision before a route's limit has joined does not freeze it."""
    limit = RateLimit("5/minute", name="late")
    seen: list[tuple[str, ...]] = []

    async def endpoint(request: Request) -> Response:
        decision = request.state.rate_limit
        seen.append(tuple(state.name for state in decision.policies))
        await limit.check(request, endpoint)
        seen.append(tuple(state.name for state in decision.policies))
        return PlainTextResponse("ok")

    app = RateLimitMiddleware(Starlette(routes=[Route("/", endpoint)]), "9/minute", settings=memory_settings)
    await statuses(app, 1)

    assert [("default",), ("default", "late")] == seen


async def test_route_speaks_the_middlewares_dialect(memory_settings: Settings) -> None:
    """Under a middleware that sends no fields, or legacy ones, a route's refusal sends the same."""
    app = FastAPI()
    app.get("/", dependencies=[Depends(RateLimit("1/minute", name="r"))])(lambda: "x")
    silent = RateLimitMiddleware(app, "9/minute", headers="none", settings=memory_settings)
    async with client_of(silent) as client:
        responses = [await client.get("/") for _ in range(2)]

    assert 429 == responses[1].status_code
    assert not [name for response in responses for name in response.headers if "ratelimit" in name]


async def test_route_that_no_rule_covers_uses_the_middlewares_redis(memory_settings: Settings) -> None:
    """And its dialect; the server that the environment names, which is not there, is not asked."""
    app = FastAPI()
    for path in ("/", "/exempt"):
        app.get(path, dependencies=[Depends(RateLimit("1/minute", name=path.strip("/") or "r"))])(lambda: "x")
    rules = [Rule("9/minute", paths="/other")]
    seen: list[Decision] = []

    @app.middleware("http")
    async def look(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        seen.append(request.state.rate_limit)
        return response

    limited = RateLimitMiddleware(app, rules=rules, exempt=["/exempt"], headers="legacy", settings=memory_settings)
    async with client_of(limited) as client:
        responses = [await client.get(path) for path in ("/", "/", "/exempt")]

    assert [200, 429, 200] == [response.status_code for response in responses]
    assert ["memory"] * 3 == [decision.source for decision in seen]
    assert ["1"] * 3 == [response.headers["x-ratelimit-limit"] for response in responses]


async def test_middleware_answers_for_routes_that_no_rule_covers(memory_settings: Settings) -> None:
    """It writes the fields on whatever goes out, settles at the end, and counts each request once."""
    app = FastAPI()
    limit = RateLimit("9/minute", name="r", settings=memory_settings)

    @app.get("/response", dependencies=[Depends(limit)])
    async def own_response(request: Request) -> Response:
        request.state.rate_limit.charge(2)
        return PlainTextResponse("x")

    @app.get("/missing", dependencies=[Depends(limit)])
    async def missing() -> None:
        raise FastAPIHTTPException(404)

    @app.get("/broken", dependencies=[Depends(limit)])
    async def broken(request: Request) -> None:
        request.state.rate_limit.charge(-1)
        raise ZeroDivisionError

    @app.get("/late", dependencies=[Depends(limit)])
    async def late(request: Request, tasks: BackgroundTasks) -> str:
        tasks.add_task(request.state.rate_limit.charge, 1)
        return "x"

    app.get(
        "/refused",
        dependencies=[Depends(limit), Depends(RateLimit("1/minute", cost=lambda _conn: 2, settings=memory_settings))],
    )(lambda: "x")
    app.get("/free")(lambda: "x")
    with fresh_telemetry() as counted:
        limited = RateLimitMiddleware(app, rules=[Rule("9/minute", paths="/other")], settings=memory_settings)
        async with client_of(limited) as client:
            response, free, not_found = [await client.get(path) for path in ("/response", "/free", "/missing")]
            with pytest.raises(ZeroDivisionError):
                await client.get("/broken")
            with pytest.raises(RuntimeError, match="Charge before its last byte"):
                await client.get("/late")
            refused = await client.get("/refused")
        counted.buffer.flush()
    counts = {
        sample.labels["outcome"]: sample.value
        for sample in next(iter(counted.ratelimit_requests.collect())).samples
        if sample.name.endswith("_total") and sample.value
    }

    fields = [r.headers.get("ratelimit") for r in (response, free, not_found)]
    assert ['"r";r=8;t=60', None, '"r";r=5;t=60'] == fields
    # The broken one gave its unit back, and the late one kept it;
    # the refused one is charged nothing.
    assert (429, '"r";r=4;t=60') == (refused.status_code, refused.headers["ratelimit"].partition(", ")[0])
    assert {"allowed": 4, "exempt": 1, "refused": 1} == counts


async def test_broken_app_is_counted_where_nothing_limits_it(memory_settings: Settings) -> None:
    """An app that raises before it answers has been asked all the same."""

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    with fresh_telemetry() as counted:
        limited = RateLimitMiddleware(broken, rules=[Rule("9/minute", paths="/other")], settings=memory_settings)
        with pytest.raises(ZeroDivisionError):
            await drive(limited, http_scope())
        counted.buffer.flush()

    assert 1 == counted.ratelimit_requests.labels("exempt", "none")._value.get()


@pytest.mark.parametrize("covered", ["never", "at first", "in between"])
async def test_route_is_limited_where_a_server_reuses_its_state(memory_settings: Settings, covered: str) -> None:
    """What an earlier request has left in the state,
    with the middleware or without, is not this one's decision.
    """
    app = FastAPI()
    app.get("/r", dependencies=[Depends(RateLimit("2/minute", name="r", settings=memory_settings))])(lambda: "r")
    app.get("/m")(lambda: "m")
    limited = RateLimitMiddleware(app, rules=[Rule("2/minute", name="m", paths="/m")], settings=memory_settings)
    state: dict[str, Any] = {}

    async def server(scope: Scope, receive: Receive, send: Send) -> None:
        await limited({**scope, "state": state}, receive, send)

    paths = {"never": "rrr", "at first": "mmmrrr", "in between": "rmrmrm"}[covered]
    async with client_of(server) as client:
        responses = [await client.get(f"/{path}") for path in paths]

    for path in set(paths):
        mine = [response for response in responses if response.url.path == f"/{path}"]
        assert [200, 200, 429] == [response.status_code for response in mine]
        assert [f'"{path}";r={left};t=60' for left in (1, 0, 0)] == [response.headers["ratelimit"] for response in mine]


async def test_same_name_as_the_middlewares_is_charged_once(memory_settings: Settings) -> None:
    """A route that names the middleware's very own limit does not take from it twice."""
    app = FastAPI()
    app.get("/", dependencies=[Depends(RateLimit("9/minute", name="default"))])(lambda: "x")
    limited = RateLimitMiddleware(app, "9/minute", settings=memory_settings)
    async with client_of(limited) as client:
        response = await client.get("/")

    assert '"default";r=8;t=60' == response.headers["ratelimit"]
