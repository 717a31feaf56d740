"""Credentials: nobody is served what the app would not have answered him."""

import time
from typing import Any

import pytest
import redis as sync_redis
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from redis_asgi.connection.manager import RedisManager
from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.settings import Settings

from ..kit.embedding_apps import Spy, cache_status, respond, server
from ..kit.inside import shared_of
from .requests import ask

pytestmark = pytest.mark.anyio


def guarded(app: ASGIApp, keys: set[str]) -> ASGIApp:
    """*app* behind an API key."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        key = dict(scope["headers"]).get(b"authorization", b"").decode()
        if key in keys:
            await app(scope, receive, send)
        else:
            await respond(send, b'{"error":"unauthorized"}', 401 if key != "known" else 403)

    return checked


async def test_an_unknown_key_never_gets_an_answer_from_the_cache(any_settings: Settings) -> None:
    """With the middleware outside the app's authentication the app's own 401 is the answer."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(guarded(server(spy), {"good"}), settings=any_settings, share=True)
    await ask(app, "a", authorization="good")
    for wrong in ({"authorization": "bad"}, {}, {"x-api-key": "good"}, {"authorization": "known"}):
        refused = await ask(app, "a", **wrong)
        assert refused.status_code in (401, 403)
        assert "stored" not in cache_status(refused)
    assert "hit" in cache_status(await ask(app, "a", authorization="good"))


@pytest.mark.parametrize("local", [0, 64 * 1024 * 1024])
async def test_a_revoked_key_is_served_no_longer_than_the_lease(local: int, redis_url: str) -> None:
    """A lease ends ``LEASE`` seconds after the app's own answer; hits meanwhile do not renew it."""
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_LEASE=60, EMBEDDING_CACHE_L1_BYTES=local)
    keys, now = {"key"}, [time.time()]
    app = EmbeddingCacheMiddleware(guarded(server(Spy()), keys), settings=settings)
    shared_of(app).clock.wall = lambda: now[0]
    await ask(app, "a", authorization="key")
    keys.clear()
    for passed in (20, 20, 13):  # in the last tenth of it the app is asked early
        now[0] += passed
        assert 200 == (await ask(app, "a", authorization="key")).status_code
    now[0] += 2
    assert 401 == (await ask(app, "a", authorization="key")).status_code


async def test_of_two_with_the_same_records_the_outer_one_caches(any_settings: Settings) -> None:
    """What the inner one answers is no answer of the app, which alone renews a lease."""
    keys, now = {"key"}, [time.time()]
    inner = EmbeddingCacheMiddleware(guarded(server(Spy()), keys), settings=any_settings, lease=300)
    outer = EmbeddingCacheMiddleware(inner, settings=any_settings, lease=10)
    shared_of(inner).clock.wall = shared_of(outer).clock.wall = lambda: now[0]
    assert "redis-asgi; fwd=miss; stored" == cache_status(await ask(outer, "a", authorization="key"))
    keys.clear()
    now[0] += 11
    assert 401 == (await ask(outer, "a", authorization="key")).status_code


async def test_two_with_records_of_their_own_both_cache(any_settings: Settings) -> None:
    """Another namespace parts them as if there was only one."""
    spy = Spy()
    inner = EmbeddingCacheMiddleware(server(spy), settings=any_settings, namespace="inner")
    outer = EmbeddingCacheMiddleware(inner, settings=any_settings, namespace="outer")
    assert "redis-asgi; fwd=miss; stored, redis-asgi; fwd=miss; stored" == cache_status(await ask(outer, "a"))
    assert "hit" in cache_status(await ask(inner, "a"))
    assert "hit" in cache_status(await ask(outer, "a"))
    assert 1 == spy.calls


async def test_a_refusal_ends_the_lease_at_once(any_settings: Settings) -> None:
    """After one 401 the same caller's stored inputs are the app's to refuse, too."""
    keys = {"key"}
    app = EmbeddingCacheMiddleware(guarded(server(Spy()), keys), settings=any_settings)
    await ask(app, "a", authorization="key")
    keys.clear()
    assert 200 == (await ask(app, "a", authorization="key")).status_code
    assert 401 == (await ask(app, "b", authorization="key")).status_code
    assert 401 == (await ask(app, "a", authorization="key")).status_code


async def test_without_a_lease_the_shortest_input_is_forwarded(any_settings: Settings) -> None:
    """A second credential under ``share`` is let in by the app, for the price of one input."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=any_settings, share=True)
    await ask(app, "long text", "b", "longer text", authorization="one")
    other = await ask(app, "long text", "b", "longer text", authorization="two")
    assert "redis-asgi; fwd=stale; detail=lease; stored" == cache_status(other)
    assert ["b"] == spy.seen[3:]
    assert "hit" in cache_status(await ask(app, "long text", authorization="two"))


async def test_a_lease_of_zero_shows_the_app_every_request(any_settings: Settings) -> None:
    """``LEASE=0``: no full hits."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=any_settings, lease=0)
    for calls in (1, 2, 3):
        await ask(app, "aa", "b")
        assert calls == spy.calls
    assert ["aa", "b", "b", "b"] == spy.seen


async def test_lease_off_trusts_the_apps_own_authentication_outside(any_settings: Settings) -> None:
    """``LEASE=off``: any caller who reaches the cache gets full hits."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=any_settings, lease="off", share=True)
    await ask(app, "a", authorization="one")
    assert "hit" in cache_status(await ask(app, "a", authorization="two"))
    assert 1 == spy.calls


async def test_two_credentials_never_see_each_others_vectors(any_settings: Settings) -> None:
    """By default keys are per credential, whichever header carries it."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=any_settings)
    for headers in (
        {},
        {"authorization": "one"},
        {"authorization": "two"},
        {"x-api-key": "one"},
        {"cookie": "one"},
    ):
        assert "fwd=miss" in cache_status(await ask(app, "a", **headers))
        assert "hit" in cache_status(await ask(app, "a", **headers))
    assert 5 == spy.calls


async def test_partition_by_replaces_the_credential(any_settings: Settings) -> None:
    """A tenant's callers share vectors, each with its own lease; ``None`` passes through untouched."""

    async def tenant(conn: HTTPConnection) -> str | None:
        return conn.headers.get("x-tenant")

    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=any_settings, partition_by=tenant)
    await ask(app, "aa", "b", **{"x-tenant": "t", "authorization": "token 1"})
    rotated = await ask(app, "aa", "b", **{"x-tenant": "t", "authorization": "token 2"})
    assert "detail=lease" in cache_status(rotated)
    assert "fwd=miss" in cache_status(await ask(app, "aa", **{"x-tenant": "u", "authorization": "token 1"}))
    outside = await ask(app, "aa", authorization="token 1")
    assert "redis-asgi; fwd=bypass; detail=partition" == cache_status(outside)


async def test_what_partition_by_raises_is_the_apps_to_handle(settings: Settings) -> None:
    """A user's mistake is not swallowed."""

    def broken(_conn: HTTPConnection) -> str:
        raise KeyError("tenant")

    app = EmbeddingCacheMiddleware(server(Spy()), settings=settings, partition_by=broken)
    with pytest.raises(KeyError):
        await ask(app, "a")


async def test_cors_headers_are_those_of_the_origin(any_settings: Settings) -> None:
    """A full hit outside ``CORSMiddleware`` repeats what the app said to this origin, and to no
    other.
    """
    inner = CORSMiddleware(server(Spy()), allow_origins=["https://a", "https://b"])
    app = EmbeddingCacheMiddleware(inner, settings=any_settings)
    for origin in ("https://a", "https://b", "https://a", "https://b"):
        response = await ask(app, "a", origin=origin)
        assert origin == response.headers["access-control-allow-origin"]
    assert "hit" in cache_status(response)
    assert "origin" in response.headers["vary"].lower()


async def test_set_cookie_is_never_stored(settings: Settings, redis_url: str) -> None:
    """Whoever asks gets the app's cookie; a hit has none, and Redis neither."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def with_cookie(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"set-cookie", b"session=5ec1e7")]}
            await send(message)

        await server(Spy())(scope, receive, with_cookie)

    cached = EmbeddingCacheMiddleware(app, settings=settings)
    cold, warm = [await ask(cached, "a") for _ in range(2)]
    assert "set-cookie" in cold.headers
    assert "set-cookie" not in warm.headers
    store = sync_redis.Redis.from_url(redis_url)
    assert not [key for key in store.scan_iter() if b"5ec1e7" in (store.dump(key) or b"")]
    store.close()


async def test_other_headers_can_carry_the_credential_and_part_the_keys(redis_url: str) -> None:
    """``CREDENTIAL_HEADERS`` replaces the default;
    ``IGNORED_HEADERS`` leave the key, all others part it.
    """
    spy = Spy()
    settings = Settings(
        REDIS_URL=redis_url,
        EMBEDDING_CACHE_CREDENTIAL_HEADERS="x-token",
        EMBEDDING_CACHE_IGNORED_HEADERS="authorization,x-pod-*",
        EMBEDDING_CACHE_KEYED_HEADERS="user-agent",
    )
    app = EmbeddingCacheMiddleware(guarded(server(spy), {"key", "other"}), settings=settings)
    base = {"authorization": "key", "x-token": "t", "x-version": "1", "user-agent": "one"}
    for change in ({}, {"x-token": "u"}, {"x-version": "2"}, {"user-agent": "two"}):
        assert "fwd=miss" in cache_status(await ask(app, "a", **(base | change)))
        assert "; hit" in cache_status(await ask(app, "a", **(base | change)))
    for change in ({"authorization": "other"}, {"x-pod-name": "p"}, {"traceparent": "c"}):
        assert "; hit" in cache_status(await ask(app, "a", **(base | change)))
    assert 4 == spy.calls


async def test_a_refusal_in_one_worker_ends_the_lease_in_all(redis_url: str) -> None:
    """What the app says to one process counts for every other: at once in Redis,
    after ``L1_SECONDS`` everywhere.
    """
    keys, now = {"key"}, [0.0]
    apps = []
    for local in (0, 64 * 1024 * 1024):
        settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_L1_BYTES=local)
        apps.append(
            EmbeddingCacheMiddleware(guarded(server(Spy()), keys), settings=settings, redis=RedisManager(settings))
        )
        shared_of(apps[-1]).clock.monotonic = lambda: now[0]
        for _ in range(2):
            assert 200 == (await ask(apps[-1], "a", authorization="key")).status_code
    without, within = apps
    keys.clear()
    refusing = EmbeddingCacheMiddleware(guarded(server(Spy()), keys), settings=Settings(REDIS_URL=redis_url))
    assert 401 == (await ask(refusing, "new", authorization="key")).status_code
    assert 401 == (await ask(without, "a", authorization="key")).status_code
    now[0] = 5.1
    assert 401 == (await ask(within, "a", authorization="key")).status_code
