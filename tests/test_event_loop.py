"""An event loop that is not asyncio's is refused at start, in so many words."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message

from redis_asgi import EmbeddingCacheMiddleware, RateLimit, RateLimiter, RateLimitMiddleware, RedisManager, Settings

from .ratelimit.harness import Spy, drive, http_scope

MEMORY = Settings(REDIS_URL="memory://")
REDIS = Settings(REDIS_URL="redis://127.0.0.1:9")
stores = pytest.mark.parametrize("settings", [MEMORY, REDIS], ids=["memory", "redis"])


def limited(settings: Settings) -> ASGIApp:
    """An app as a framework builds it."""
    app = Starlette()
    app.add_middleware(RateLimitMiddleware, limits="2/minute", settings=settings)
    return app


def cached(settings: Settings) -> ASGIApp:
    """The same with the other middleware alone."""
    app = Starlette()
    app.add_middleware(EmbeddingCacheMiddleware, settings=settings)
    return app


@stores
@pytest.mark.parametrize("make", [limited, cached])
def test_app_on_trio_does_not_start(make: Callable[[Settings], ASGIApp], settings: Settings) -> None:
    """The server hears that the startup failed, and why, before any request."""
    waiting: list[Message] = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[Message] = []

    async def receive() -> Message:
        return waiting.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    async def start() -> None:
        await make(settings)({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)

    with pytest.raises(RuntimeError, match="trio is not supported"):
        trio.run(start)

    assert ["lifespan.startup.failed"] == [message["type"] for message in sent]
    assert "asyncio" in sent[0]["message"]


@stores
def test_request_on_trio_is_refused_in_the_same_words(settings: Settings) -> None:
    """Where a server has no lifespan,
    the first request and every one after it say so; none reaches the app.
    """
    spy = Spy()
    limiting = RateLimitMiddleware(spy, "2/minute", settings=settings, exempt="/*")
    caching = EmbeddingCacheMiddleware(spy, settings=settings)

    for app in (limiting, caching, limiting, caching):
        with pytest.raises(RuntimeError, match="trio is not supported"):
            trio.run(drive, app, http_scope())

    assert 0 == spy.calls


async def _route(settings: Settings) -> None:
    await RateLimit("2/minute", settings=settings).check(HTTPConnection(http_scope()), _route)


@stores
@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda settings: RateLimiter(settings=settings).consume("a"), id="consume"),
        pytest.param(lambda settings: RateLimiter(settings=settings).peek("a"), id="peek"),
        pytest.param(lambda settings: RateLimiter(settings=settings).reset("a"), id="reset"),
        pytest.param(_route, id="a route's limit"),
    ],
)
def test_every_door_of_the_limiter_says_so(settings: Settings, use: Callable[[Settings], Awaitable[Any]]) -> None:
    """Whatever is used without the middleware, with Redis or without it."""

    async def using() -> None:
        await use(settings)

    with pytest.raises(RuntimeError, match="trio is not supported"):
        trio.run(using)


def test_manager_says_so() -> None:
    """All other parts ask it for their client."""
    with pytest.raises(RuntimeError, match="trio is not supported"):
        trio.run(RedisManager(REDIS).get_connection)
