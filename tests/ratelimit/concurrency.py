"""Requests that are held in flight, and looks at what holds them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
import redis
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redis_asgi import RedisManager, Rule
from redis_asgi.ratelimit.counting.heartbeat import Heart, Hearts
from redis_asgi.ratelimit.counting.local_engine import LocalEngine

from .harness import all_answered, http_scope

on_redis = pytest.mark.server


def heart_of(manager: RedisManager) -> Heart:
    """What beats in the running loop."""
    return manager.per_process(Hearts.from_settings).heart(manager)


def running(manager: RedisManager) -> int:
    """How many requests are in flight in this process."""
    return sum(manager.per_process(LocalEngine.from_settings).in_flight().values())


def members(server: redis.Redis) -> list[bytes]:
    """The ids of all that is in flight for Redis."""
    keys = cast("list[bytes]", server.keys("rate_limit:*:c0:1"))
    return [member for key in keys for member in cast("list[bytes]", server.zrange(key, 0, -1))]


async def settled(manager: RedisManager) -> None:
    """Wait until all that was sent has been answered, and a heartbeat after that."""
    await all_answered(manager)
    await heart_of(manager).beat()


class Stream:
    """An app whose answers end when they are told to, and a way to open some."""

    def __init__(self, *, after: Callable[[], Awaitable[None]] | None = None) -> None:
        self.opened = 0
        self.ends: list[asyncio.Event] = []
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        end = asyncio.Event()
        self.ends.append(end)
        self.opened += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await end.wait()
        await send({"type": "http.response.body", "body": b"b"})
        if self._after is not None:
            await self._after()


class Opened:
    """One request on its way: what was sent of its answer, until it is let end."""

    def __init__(self, app: ASGIApp, scope: Scope | None = None) -> None:
        self.sent: list[Message] = []
        self._came = asyncio.Event()
        self._gone = asyncio.Event()
        self.task = asyncio.create_task(self._run(app, scope or http_scope()))

    async def _run(self, app: ASGIApp, scope: Scope) -> None:
        async def receive() -> Message:
            await self._gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            self.sent.append(message)
            self._came.set()

        try:
            await app(scope, receive, send)
        finally:
            self._came.set()

    async def status(self) -> int:
        """What it was answered."""
        await self._came.wait()
        status: int = self.sent[0]["status"]
        return status


async def opened(app: ASGIApp, count: int, **scope: Any) -> list[Opened]:
    """*count* requests that are answered, at least with a start."""
    requests = [Opened(app, http_scope(**scope)) for _ in range(count)]
    for request in requests:
        await request.status()
    return requests


async def ended(requests: list[Opened]) -> None:
    """Cancel what still runs of *requests*."""
    for request in requests:
        request.task.cancel()
    await asyncio.gather(*(request.task for request in requests), return_exceptions=True)


def streams(number: Any = 2, **rule: Any) -> Rule:
    """The rule of most of these tests."""
    return Rule(concurrency=number, **{"name": "streams", **rule})


def server_time(server: redis.Redis) -> int:
    seconds, micros = server.time()
    return seconds * 1_000_000 + micros
