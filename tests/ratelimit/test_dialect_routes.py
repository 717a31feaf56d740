"""Refusals of routes, in the dialect of the middleware outside."""

from typing import Any

import httpx
import orjson
import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Mount, Route

from redis_asgi import (
    RateLimit,
    RateLimitExceeded,
    RateLimitMiddleware,
    Rule,
    Settings,
    by_header,
    rate_limit,
)
from redis_asgi.ratelimit.answers.dialects import (
    Refused,
)
from redis_asgi.ratelimit.answers.rewording import rewording_in

from .harness import client_of
from .tool_calls import CALL

ELSEWHERE = [Rule("9/minute", name="elsewhere", paths="/elsewhere")]


def fastapi_app(settings: Settings, dialect: Any, **limit: Any) -> FastAPI:
    """One endpoint with a limit of its own, below a middleware without rules."""
    app = FastAPI()
    app.add_middleware(RateLimitMiddleware, rules=ELSEWHERE, dialect=dialect, settings=settings)

    @app.post("/v1/chat", dependencies=[Depends(RateLimit("1/minute", name="requests", **limit))])
    async def chat(request: Request) -> Any:
        return await request.json()

    return app


def starlette_app(settings: Settings, dialect: Any, **limit: Any) -> Starlette:
    """The same, by the decorator."""

    @rate_limit("1/minute", name="requests", **limit)
    async def chat(request: Request) -> JSONResponse:
        return JSONResponse(await request.json())

    app = Starlette(routes=[Route("/v1/chat", chat, methods=["POST"])])
    app.add_middleware(RateLimitMiddleware, rules=ELSEWHERE, dialect=dialect, settings=settings)
    return app


@pytest.mark.anyio
@pytest.mark.parametrize("make", [fastapi_app, starlette_app])
async def test_a_route_answers_in_the_dialect_outside(memory_settings: Settings, make: Any) -> None:
    """Its refusal has the fields and the body of the middleware's dialect, whichever framework
    tells it.
    """
    async with client_of(make(memory_settings, "openai")) as client:
        admitted = await client.post("/v1/chat", json={})
        refused = await client.post("/v1/chat", json={})

    assert "0" == admitted.headers["x-ratelimit-remaining-requests"]
    assert (429, "application/json") == (refused.status_code, refused.headers["content-type"])
    assert ["0"] == refused.headers.get_list("x-ratelimit-remaining-requests")
    assert ["application/json"] == refused.headers.get_list("content-type")
    assert "retry-after-ms" in refused.headers
    assert ("requests", "rate_limit_exceeded") == (refused.json()["error"]["type"], refused.json()["error"]["code"])
    assert str(len(refused.content)) == refused.headers["content-length"]


@pytest.mark.anyio
@pytest.mark.parametrize("make", [fastapi_app, starlette_app])
async def test_a_route_of_mcp_names_the_request(memory_settings: Settings, make: Any) -> None:
    """With the status that the client can read."""
    async with client_of(make(memory_settings, "mcp")) as client:
        await client.post("/v1/chat", json=CALL)
        older = await client.post("/v1/chat", json=CALL)
        newer = await client.post("/v1/chat", json=CALL, headers={"mcp-protocol-version": "2026-07-28"})

    assert (200, 429) == (older.status_code, newer.status_code)
    assert ("call-1", "call-1") == (older.json()["id"], newer.json()["id"])


@pytest.mark.anyio
@pytest.mark.parametrize("make", [fastapi_app, starlette_app])
async def test_a_route_that_cannot_be_decided_says_so(make: Any) -> None:
    """503 and 400 of a route, in the dialect too."""
    gone = Settings(REDIS_URL="redis://127.0.0.1:1", RATE_LIMIT_MISSING_IDENTITY="refuse")
    app = make(gone, "anthropic", on_redis_error="closed", partition_by=by_header("x-api-key"))
    async with client_of(app) as client:
        unavailable = await client.post("/v1/chat", json={}, headers={"x-api-key": "k"})
        missing = await client.post("/v1/chat", json={})

    assert (503, "api_error") == (unavailable.status_code, unavailable.json()["error"]["type"])
    assert "1000" == unavailable.headers["retry-after-ms"]
    assert (400, "invalid_request_error") == (missing.status_code, missing.json()["error"]["type"])


@pytest.mark.anyio
async def test_the_apps_own_handler_wins(memory_settings: Settings) -> None:
    """What it answers is not touched, in one part or in several."""
    app = fastapi_app(memory_settings, "openai")
    app.add_exception_handler(RateLimitExceeded, lambda request, error: JSONResponse({"mine": "x" * 5000}, 429))
    async with client_of(app) as client:
        await client.post("/v1/chat", json={})
        refused = await client.post("/v1/chat", json={})

    assert {"mine"} == set(refused.json())


@pytest.mark.anyio
async def test_a_route_without_a_dialect_is_as_it_was(memory_settings: Settings) -> None:
    """Elsewhere the framework's own body stays."""
    async with client_of(fastapi_app(memory_settings, {"/v2/*": "openai"})) as client:
        await client.post("/v1/chat", json={})
        refused = await client.post("/v1/chat", json={})

    assert {"detail"} == set(refused.json())
    assert [] == [name for name in refused.headers if name.endswith(("-requests", "-ms"))]


@pytest.mark.anyio
async def test_a_refusal_that_the_app_swallows_is_no_answer(memory_settings: Settings) -> None:
    """The app may catch what a limit raises,
    and answer something else with the same status, or another one.
    """

    @rate_limit("1/minute", name="requests")
    async def limited(request: Request) -> JSONResponse:
        return JSONResponse({})

    async def endpoint(request: Request) -> JSONResponse:
        try:
            return await limited(request)
        except HTTPException as error:
            status = int(request.query_params["status"])
            return JSONResponse({"detail": f"not {error.detail}"}, status)

    app = Starlette(routes=[Mount("/v1", routes=[Route("/chat", endpoint)])])
    limits = RateLimitMiddleware(app, rules=ELSEWHERE, dialect="openai", settings=memory_settings)
    async with client_of(limits) as client:
        await client.get("/v1/chat?status=200")
        found = [await client.get("/v1/chat", params={"status": status}) for status in (200, 429)]

    assert [200, 429] == [answer.status_code for answer in found]
    assert all(answer.json()["detail"].startswith("not ") for answer in found)


@pytest.mark.anyio
@pytest.mark.parametrize("chunks", [1, 3, 40])
async def test_a_body_in_parts_is_told_apart_too(memory_settings: Settings, chunks: int) -> None:
    """Some middleware may cut a body: the framework's is known at its end, any other passes whole."""
    detail = "d" * 90

    async def app(scope: Any, receive: Any, send: Any) -> None:
        rewording = rewording_in(scope)
        assert rewording is not None
        rewording.offer(Refused(429, detail, "requests", 1.0), Request(scope), None)
        body = orjson.dumps({"detail": detail}) if chunks < 40 else b"y" * 2000
        size = -(-len(body) // chunks)
        await send({"type": "http.response.start", "status": 429, "headers": []})
        for at in range(0, len(body), size):
            await send({"type": "http.response.body", "body": body[at : at + size], "more_body": True})
        await send({"type": "http.response.body"})

    async with client_of(
        RateLimitMiddleware(app, rules=ELSEWHERE, dialect="openai", settings=memory_settings)
    ) as client:
        answer: httpx.Response = await client.get("/")

    assert (b"y" * 2000 == answer.content) is (chunks == 40)
    assert chunks == 40 or "requests" == answer.json()["error"]["type"]
