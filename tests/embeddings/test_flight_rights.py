"""Joining a flight gives nobody what the app has not: flushes, leases, refusals and directives."""

import asyncio
from collections.abc import Sequence

import pytest
from starlette.types import Receive, Scope, Send

from redis_asgi.connection.manager import RedisManager
from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.embeddings.storage.operations import WRITE_TIMEOUT, Write, WriteResult
from redis_asgi.embeddings.storage.store import RedisVectors
from redis_asgi.maintenance import flush_model
from redis_asgi.settings import Settings

from ..kit.embedding_apps import Spy, read, respond, server
from ..kit.patience import until
from .callers import Caller, Gate, quiet_of

pytestmark = pytest.mark.anyio


async def test_a_flush_is_not_outrun_by_joining(redis_url: str) -> None:
    """Who asks after a flush does not join a computation begun before it."""
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_L1_BYTES=0)
    spy, gate = Spy(), Gate()
    app = EmbeddingCacheMiddleware(server(spy, before=gate), settings=settings)
    before = Caller(app, "a")
    await gate.reached.wait()
    await flush_model("m", settings=settings)
    after = Caller(app, "a")
    await until(lambda: spy.calls == 2)
    gate.open.set()
    await asyncio.gather(before.task, after.task)
    assert 2 == spy.calls


async def test_under_share_a_follower_without_a_lease_asks_the_app_itself(any_settings: Settings) -> None:
    """A flight lets in nobody but its own caller: an unknown key gets the app's 401."""
    spy, gate = Spy(), Gate()
    inner = server(spy, before=gate)
    refused: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if dict(scope["headers"])[b"authorization"] != b"good":
            refused.append(await read(receive))
            await respond(send, b"{}", 401)
            return
        await inner(scope, receive, send)

    cached = EmbeddingCacheMiddleware(app, settings=any_settings, share=True)
    first = Caller(cached, "aa", "b", authorization="good")
    await gate.reached.wait()
    same, other = (
        Caller(cached, "aa", "b", authorization="good"),
        Caller(cached, "aa", "b", authorization="bad"),
    )
    await other.task
    gate.open.set()
    await asyncio.gather(first.task, same.task)
    assert (200, 200, 401) == (first.status, same.status, other.status)
    assert [b'{"model":"m","input":["b"]}'] == refused
    assert 1 == spy.calls


async def test_a_refused_caller_does_not_join_what_was_asked_before(any_settings: Settings) -> None:
    """The app has answered 401 since: whoever comes then meets it, not an older request's answer."""
    gate, keys, calls = Gate(), {b"good"}, [0]
    inner = server(Spy(), before=gate)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        calls[0] += 1
        if dict(scope["headers"])[b"authorization"] not in keys:
            await read(receive)
            await respond(send, b"{}", 401)
            return
        await inner(scope, receive, send)

    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    older = Caller(cached, "a", authorization="good")
    await gate.reached.wait()
    joined = Caller(cached, "a", authorization="good")
    await quiet_of(cached)
    assert 1 == calls[0]
    keys.clear()
    refused = Caller(cached, "b", authorization="good")
    await refused.task
    later = Caller(cached, "a", authorization="good")
    await quiet_of(cached)
    gate.open.set()
    await asyncio.gather(older.task, joined.task, later.task)
    assert [200, 200, 401, 401] == [caller.status for caller in (older, joined, refused, later)]


async def test_a_later_2xx_of_an_older_request_does_not_undo_a_refusal(any_settings: Settings) -> None:
    """An answer asked for before a 401 grants no lease after it."""
    spy, gate, keys = Spy(), Gate(), {"key"}
    inner, held = server(spy), server(spy, before=gate)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if headers[b"authorization"].decode() not in keys:
            await read(receive)
            await respond(send, b"{}", 401)
            return
        await (held if b"x-slow" in headers else inner)(scope, receive, send)

    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    slow = Caller(cached, "slow", authorization="key", x_slow="1")
    await gate.reached.wait()
    keys.clear()
    assert 401 == await _status(Caller(cached, "b", authorization="key"))
    gate.open.set()
    await slow.task
    assert 200 == slow.status
    assert 401 == await _status(Caller(cached, "slow", authorization="key"))


async def _status(caller: Caller) -> int:
    await caller.task
    return caller.status


async def test_a_refusal_during_a_write_ends_the_lease_for_every_worker(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 401 may overtake the 2xx whose lease is on its way to Redis;
    the lease does not outlive it there.
    """
    writing, go = asyncio.Event(), asyncio.Event()
    write = RedisVectors.write

    async def slowly(store: RedisVectors, writes: Sequence[Write], within: float = WRITE_TIMEOUT) -> WriteResult:
        if not writing.is_set():  # that of the answer; a refusal's own record is written at once
            writing.set()
            await go.wait()
        return await write(store, writes, within)

    monkeypatch.setattr(RedisVectors, "write", slowly)
    inner, keys = server(Spy()), {"key"}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        known = dict(scope["headers"])[b"authorization"].decode() in keys
        await (inner(scope, receive, send) if known else respond(send, b"{}", 401))

    settings = Settings(REDIS_URL=redis_url)
    here, elsewhere = (EmbeddingCacheMiddleware(app, redis=RedisManager(settings)) for _ in range(2))
    first = Caller(here, "a", authorization="key")
    await writing.wait()
    keys.clear()
    assert 401 == await _status(Caller(here, "b", authorization="key"))
    go.set()
    await first.task
    assert 200 == first.status
    assert 401 == await _status(Caller(elsewhere, "a", authorization="key"))


async def test_no_store_is_not_joined_and_joins_nobody(any_settings: Settings) -> None:
    """Its answer is its own."""
    spy, gate = Spy(), Gate()
    app = EmbeddingCacheMiddleware(server(spy, before=gate), settings=any_settings)
    callers = [Caller(app, "a", cache_control="no-store") for _ in range(3)]
    await until(lambda: spy.calls == 3)
    gate.open.set()
    await asyncio.gather(*(caller.task for caller in callers))
    assert {"redis-asgi; fwd=bypass; detail=no-store"} == {caller.said for caller in callers}
