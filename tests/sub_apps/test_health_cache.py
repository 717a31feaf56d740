"""Whose Redis the mounted parts look at: their own argument's,
else that of the middlewares outside them.
"""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount
from starlette.types import ASGIApp

from redis_asgi import (
    EmbeddingCacheMiddleware,
    RateLimitMiddleware,
    RedisManager,
    Settings,
    health_app,
    metrics_app,
    status_app,
)

from ..kit.servers import ExternalServer, wait_until

pytestmark = pytest.mark.anyio

NOWHERE = "redis://127.0.0.1:1/14"  # a part of its own: one that fails closed elsewhere says so here too
MEMORY = "memory://"

Part = Callable[..., ASGIApp]
PARTS = pytest.mark.parametrize("part", [health_app, metrics_app, status_app])


def app_with(part: ASGIApp, *middleware: Middleware) -> Starlette:
    """An app with *part* at ``/part``; the first of *middleware* is the outermost."""
    return Starlette(routes=[Mount("/part", part)], middleware=list(middleware))


def limiter(**options: Any) -> Middleware:
    return Middleware(RateLimitMiddleware, limits="100/minute", **options)


async def read(app: ASGIApp, path: str = "/part/", **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.get(path, headers=headers)


async def seen(app: ASGIApp) -> str:
    """What the part at ``/part`` of *app* looks at: ``memory``, ``up`` or ``down``."""
    answer = await read(app)
    if "memory" in answer.text and answer.headers["content-type"] == "application/json":
        return {"memory": "memory"}.get(answer.json()["mode"], "up" if answer.json()["error"] is None else "down")
    if answer.headers["content-type"].startswith("text/plain"):
        lines = answer.text.splitlines()
        up = next((line.split()[-1] for line in lines if line.startswith("redis_asgi_redis_up ")), None)
        server = next(line for line in lines if line.startswith("redis_asgi_build_info"))
        return "memory" if 'server="memory"' in server else {"1.0": "up", "0.0": "down"}[up or ""]
    if "Counted in this process" in answer.text:
        return "memory"
    return "down" if "degraded" in answer.text.lower() or "unhealthy" in answer.text.lower() else "up"


def in_memory() -> RedisManager:
    return RedisManager(Settings(REDIS_URL=MEMORY))


@PARTS
async def test_alone_it_looks_at_the_default(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a middleware that says more there is only the environment."""
    monkeypatch.setenv("REDIS_URL", NOWHERE)

    assert ["down", "down"] == [await seen(app_with(part())), await seen(app_with(part(), limiter()))]


@PARTS
@pytest.mark.parametrize("kind", ["manager", "url", "settings"])
@pytest.mark.parametrize("middleware", [RateLimitMiddleware, EmbeddingCacheMiddleware])
async def test_below_a_middleware_it_looks_at_that_ones(
    part: Part, kind: str, middleware: Any, redis_server: ExternalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the middleware was told where its Redis is, on ``memory://`` too."""
    monkeypatch.setenv("REDIS_URL", NOWHERE)
    for url, expected in ((MEMORY, "memory"), (redis_server.url, "up")):
        settings = Settings(REDIS_URL=url)
        given: dict[str, dict[str, Any]] = {
            "manager": {"redis": RedisManager(settings)},
            "url": {"redis": url},
            "settings": {"settings": settings},
        }

        assert expected == await seen(app_with(part(), Middleware(middleware, **given[kind])))


@PARTS
async def test_an_argument_of_its_own_wins(part: Part, redis_server: ExternalServer) -> None:
    """``redis=`` and ``settings=`` of the part say more than where it is mounted."""
    for given in ({"redis": redis_server.url}, {"settings": Settings(REDIS_URL=redis_server.url)}):
        assert "up" == await seen(app_with(part(**given), limiter(redis=in_memory())))


@PARTS
async def test_of_several_the_worst_is_told(part: Part, redis_server: ExternalServer) -> None:
    """Health and status tell the one that the app stands worst with,
    metrics those of the outermost.
    """
    well, gone = limiter(redis=redis_server.url), Middleware(EmbeddingCacheMiddleware, redis=NOWHERE)
    worst = part is not metrics_app

    assert ("down" if worst else "up") == await seen(app_with(part(), well, gone))
    assert "down" == await seen(app_with(part(), gone, well))


async def test_ready_says_what_the_app_does(monkeypatch: pytest.MonkeyPatch, redis_server: ExternalServer) -> None:
    """An app whose limits fail closed on a Redis that is gone is not ready,
    whatever the default Redis is doing.
    """
    monkeypatch.setenv("REDIS_URL", redis_server.url)
    # A manager is shared by equal settings, and remembers that one of its users fails closed.
    app = app_with(health_app(), limiter(redis=RedisManager(Settings(REDIS_URL=NOWHERE)), on_redis_error="closed"))

    assert [503, 503, 200] == [(await read(app, path)).status_code for path in ("/", "/part/ready", "/part/live")]


async def test_all_have_to_be_there_where_redis_is_required(redis_server: ExternalServer) -> None:
    """``require_redis=True`` is about each of them, ``False`` about none."""
    outside = (limiter(redis=redis_server.url), Middleware(EmbeddingCacheMiddleware, redis=NOWHERE))
    codes = [
        (await read(app_with(health_app(require_redis=required), *outside), "/part/ready")).status_code
        for required in (True, False, None)
    ]

    assert [503, 200, 200] == codes


async def test_no_request_says_whose(redis_server: ExternalServer) -> None:
    """What a client sends changes nothing about it."""
    app = app_with(health_app(), limiter(redis=redis_server.url))
    name = "redis_asgi.offer"
    answer = await read(app, f"/part/?{name}={MEMORY}&redis={MEMORY}", **{name: MEMORY, "redis": MEMORY})

    assert "standalone" == answer.json()["mode"]


async def test_ends_with_the_lifespan_of_the_middleware(redis_server: ExternalServer) -> None:
    """What a mounted part opened on the middleware's Redis is closed when the app ends."""
    app = app_with(health_app(), limiter(redis=f"{redis_server.url}/3"))
    sent: list[str] = []
    messages = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> dict[str, Any]:
        kind = next(messages)
        if kind == "lifespan.shutdown":
            assert "up" == await seen(app)
            assert 1 <= len(redis_server.connections())
        return {"type": kind}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)

    assert ["lifespan.startup.complete", "lifespan.shutdown.complete"] == sent
    wait_until(lambda: redis_server.connections() == [], "no connection is left")
