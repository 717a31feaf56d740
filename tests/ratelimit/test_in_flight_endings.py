"""The end of a request in flight: its last byte, its error, its client's going,
or the end of a block of code.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest
import redis
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from redis_asgi import RateLimiter, RateLimitMiddleware, RedisManager, Rule
from redis_asgi.errors import ConfigurationError

from .concurrency import Stream, ended, members, opened, running, settled, streams
from .harness import Spy, drive, header, http_scope, memory, websocket_scope

pytestmark = pytest.mark.anyio


async def _body(scope: Scope, receive: Receive, send: Send, after: Callable[[], Awaitable[None]]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"a"})
    await after()


async def _path(scope: Scope, receive: Receive, send: Send, after: Callable[[], Awaitable[None]]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.pathsend", "path": "/x"})
    await after()


async def _file(scope: Scope, receive: Receive, send: Send, after: Callable[[], Awaitable[None]]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"a", "more_body": True})
    await send({"type": "http.response.zerocopysend", "file": 0})
    await after()


async def _denied(scope: Scope, receive: Receive, send: Send, after: Callable[[], Awaitable[None]]) -> None:
    await send({"type": "websocket.http.response.start", "status": 403, "headers": []})
    await send({"type": "websocket.http.response.body", "body": b"no"})
    await after()


async def _closing(scope: Scope, receive: Receive, send: Send, after: Callable[[], Awaitable[None]]) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.close", "code": 1000})
    await after()


async def _closed(scope: Scope, receive: Receive, send: Send, after: Callable[[], Awaitable[None]]) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    assert (await receive())["type"] == "websocket.disconnect"
    await after()


@pytest.mark.parametrize(
    ("answer", "scope"),
    [
        pytest.param(_body, http_scope(), id="last body byte"),
        pytest.param(_path, http_scope(), id="pathsend"),
        pytest.param(_file, http_scope(), id="zerocopysend"),
        pytest.param(_denied, websocket_scope(), id="denial"),
        pytest.param(_closing, websocket_scope(), id="websocket closed by the app"),
        pytest.param(_closed, websocket_scope(), id="websocket closed by the client"),
    ],
)
async def test_over_before_the_app_returns(either: RedisManager, answer: Any, scope: Scope) -> None:
    """Background tasks run in nobody's place."""
    seen: list[int] = []

    async def look_on() -> None:
        seen.append(running(either))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(running(either))
        await answer(scope, receive, send, look_on)

    limited = RateLimitMiddleware(app, rules=[streams(1)], redis=either)
    first = {"type": "websocket.connect"} if scope["type"] == "websocket" else {"type": "http.request"}
    await drive(limited, dict(scope), first)

    assert [1, 0] == seen


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    pass


async def _fails(scope: Scope, receive: Receive, send: Send) -> None:
    raise LookupError


async def _fails_late(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"a", "more_body": True})
    raise LookupError


async def _cancelled(scope: Scope, receive: Receive, send: Send) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


@pytest.mark.parametrize("app", [_nothing, _fails, _fails_late, _cancelled])
async def test_over_when_the_app_is(either: RedisManager, app: ASGIApp) -> None:
    """It returns, raises or is cancelled."""
    limited = RateLimitMiddleware(app, rules=[streams(1)], redis=either)
    for _ in range(3):
        task = asyncio.ensure_future(drive(limited, http_scope()))
        with suppress(LookupError, asyncio.CancelledError):
            await task
        assert 0 == running(either)

    if either.has_redis:
        await settled(either)
        assert [] == members(redis.Redis.from_url(either.settings.REDIS_URL.get_secret_value()))  # type: ignore[union-attr]


async def test_an_inner_instance_holds_until_the_outer_answer_ends(either: RedisManager) -> None:
    """Each has its place, and one limit on both has one."""
    for outer, held in ((streams(2, name="both"), 2), (Rule("9/hour", name="rate"), 1)):
        app = Stream()
        both = [streams(1, name="inner"), *([outer] if held == 2 else [])]
        limited = RateLimitMiddleware(RateLimitMiddleware(app, rules=both, redis=either), rules=[outer], redis=either)
        first, second = await opened(limited, 1), await opened(limited, 1)

        assert (200, 429) == (await first[0].status(), await second[0].status())
        assert held == running(either)
        app.ends[0].set()
        while len(first[0].sent) < 3:
            await asyncio.sleep(0)
        assert 0 == running(either)
        await first[0].task
        third = await opened(limited, 1)
        assert 200 == await third[0].status()
        await ended(third)


# A block of code


@pytest.mark.parametrize("status", [200, 503])
async def test_what_is_answered_in_place_of_a_refusal_ends_too(either: RedisManager, status: int) -> None:
    """``on_exceeded`` may answer with an app that has limits of its own."""
    kept = Rule("9/minute", name="failures", count_if=lambda status: status >= 500)
    spare = RateLimitMiddleware(PlainTextResponse("later", status), rules=[streams(1), kept], redis=either)
    limited = RateLimitMiddleware(Spy(), "1/minute", on_exceeded=lambda _conn, _decision: spare, redis=either)
    sent = [await drive(limited, http_scope()) for _ in range(4)]
    await settled(either)
    counted = await drive(spare, http_scope())

    assert [200] + [status] * 3 == [each[0]["status"] for each in sent]
    assert 0 == running(either)
    left = 8 if status < 500 else 5
    assert f'"failures";r={left};t=60'.encode() in (header(counted[0], b"ratelimit") or b"").split(b", ")


async def test_a_slot_is_held_for_a_block(either: RedisManager) -> None:
    """By name and client; the block runs whatever was decided, and its end frees the place."""
    limiter = RateLimiter(either, timeout=5)
    async with AsyncExitStack() as stack:
        held = [await stack.enter_async_context(limiter.slot("a", 2)) for _ in range(3)]
        other = await stack.enter_async_context(limiter.slot("b", 2))
        named = await stack.enter_async_context(limiter.slot("a", 2, name="jobs"))
        assert [True, True, False] == [decision.allowed for decision in held]
        assert (1.0, ("default",)) == (held[2].retry_after, held[2].violated)
        assert other.allowed
        assert named.allowed
        (state,) = held[0].policies
        assert ("default", 2, 0, 1, "concurrency") == (
            state.name,
            state.quota,
            state.window,
            state.remaining,
            state.strategy,
        )
    assert 0 == running(either)
    with suppress(LookupError):
        async with limiter.slot("a", 1) as decision:
            assert decision.allowed
            raise LookupError
    async with limiter.slot("a", 1) as decision:
        assert decision.allowed


async def test_a_slot_can_be_looked_at(either: RedisManager) -> None:
    """As often as one likes: nothing is held by it, and its answer is that of a slot."""
    limiter = RateLimiter(either, timeout=5)
    seen = [await limiter.peek("a", concurrency=2) for _ in range(5)]
    async with limiter.slot("a", 2), limiter.slot("a", 2):
        full = await limiter.peek("a", concurrency=2)
        more = await limiter.peek("a", concurrency=3)
        other = await limiter.peek("a", concurrency=2, name="jobs")
    again = await limiter.peek("a", concurrency=2)

    assert [(True, 2)] * 5 == [(each.allowed, each.policies[0].remaining) for each in seen]
    assert (False, 0, 1.0, ("default",)) == (full.allowed, full.policies[0].remaining, full.retry_after, full.violated)
    assert [(True, 1), (True, 2)] == [(each.allowed, each.policies[0].remaining) for each in (more, other)]
    assert (True, 0) == (again.allowed, running(either))


@pytest.mark.parametrize(
    "arguments", [{"concurrency": 0}, {"concurrency": 4, "cost": 2}, {"concurrency": 4, "limits": "5/minute"}]
)
async def test_a_slot_that_cannot_be_is_not_looked_at(arguments: dict[str, Any]) -> None:
    """A limit by rate is another one."""
    with pytest.raises(ConfigurationError, match=r"concurrency="):
        await RateLimiter(settings=memory()).peek("a", **arguments)


@pytest.mark.parametrize(("number", "name"), [(0, "a"), ("4", "a"), (4, "a b"), (None, "a")])
async def test_a_slot_that_cannot_be_is_refused(number: Any, name: str) -> None:
    """At the door of its block."""
    with pytest.raises(ConfigurationError, match=r"concurrency=|name="):
        async with RateLimiter(settings=memory()).slot("a", number, name=name):
            pass
