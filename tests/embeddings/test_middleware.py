"""What a request through the middleware gets: headers, directives, credentials, tenants, flushes."""

import asyncio
import gzip
import json
import time
from typing import Any

import httpx
import orjson
import pytest
import redis as sync_redis
import redis.asyncio as aioredis
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from redis_asgi.connection.manager import RedisManager
from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.errors import ConfigurationError
from redis_asgi.maintenance import flush_model
from redis_asgi.settings import Settings

from ..kit.embedding_apps import FORMATS, Spy, cache_status, client, respond, server
from ..kit.logs import event_of
from ..kit.patience import PATIENCE

pytestmark = pytest.mark.anyio


def body(*items: Any, **fields: Any) -> dict[str, Any]:
    """An OpenAI request."""
    return {"model": "m", "input": list(items), **fields}


async def ask(app: ASGIApp, *items: Any, path: str = "/v1/embeddings", **headers: str) -> httpx.Response:
    """One request."""
    async with client(app, **headers) as c:
        return await c.post(path, json=body(*items))


def guarded(app: ASGIApp, keys: set[str]) -> ASGIApp:
    """*app* behind an API key."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        key = dict(scope["headers"]).get(b"authorization", b"").decode()
        if key in keys:
            await app(scope, receive, send)
        else:
            await respond(send, b'{"error":"unauthorized"}', 401 if key != "known" else 403)

    return checked


async def test_cold_then_warm_on_every_format(any_settings: Settings) -> None:
    """The second request never reaches the app, whatever dialect it speaks."""
    for name, (path, field, _) in FORMATS.items():
        spy = Spy()
        app = EmbeddingCacheMiddleware(server(spy), settings=any_settings)
        items: Any = "a" if name == "ollama_prompt" else ["a", "b"]
        async with client(app) as c:
            cold, warm = [await c.post(path, json={"model": "m", field: items}) for _ in range(2)]
        assert "redis-asgi; fwd=miss; stored" == cache_status(cold)
        assert cache_status(warm).startswith("redis-asgi; hit; ttl=")
        assert 1 == spy.calls, name


async def test_each_input_is_computed_once(any_settings: Settings) -> None:
    """Duplicates are forwarded once, and of a partly stored batch only the rest."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=any_settings)
    await ask(app, "a", "b", "a")
    partial = await ask(app, "c", "a", "d", "c", "b")
    assert ["a", "b", "c", "d"] == spy.seen
    assert 'redis-asgi; fwd=partial; stored; detail="hit=2 miss=2"' == cache_status(partial)


async def test_a_single_text_and_a_list_of_it_are_one_input(any_settings: Settings) -> None:
    """What was stored for ``"a"`` answers ``["a"]``; what is forwarded keeps its shape."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=any_settings)
    async with client(app) as c:
        await c.post("/v1/embeddings", json={"model": "m", "input": "a"})
        assert "hit" in cache_status(await c.post("/v1/embeddings", json={"model": "m", "input": ["a"]}))
    assert b'{"model":"m","input":"a"}' == spy.bodies[0]


async def test_images_inside_of_a_request_are_cached(any_settings: Settings) -> None:
    """As objects, and as the strings of a request that says that they are images."""
    spy, url = Spy(), "data:image/png;base64,iVBORw0KGgo="
    app = EmbeddingCacheMiddleware(server(spy), settings=any_settings)
    async with client(app) as c:
        for fields in (body({"image": url}), body({"bytes": url}), body(url, modality="image")):
            last = [await c.post("/v1/embeddings", json=fields) for _ in range(2)][1]
            assert "; hit" in cache_status(last)
    assert 3 == spy.calls


async def test_values_in_redis_are_small_and_end(settings: Settings, redis_url: str) -> None:
    """Every key has a TTL within the jitter; a vector is its header and its numbers."""
    app = EmbeddingCacheMiddleware(server(Spy(dims=1536)), settings=settings)
    await ask(app, *"abcdef")
    store = sync_redis.Redis.from_url(redis_url)
    keys = list(store.scan_iter())
    inputs = [key for key in keys if key.startswith(b"embedding_input:v1:")]
    assert (8, 6) == (len(keys), len(inputs))
    assert all(3600 * 0.9 - 2 <= store.ttl(key) <= 3600 for key in inputs)
    assert 1 < len({store.ttl(key) for key in inputs})
    assert all(store.ttl(key) > 0 for key in keys)
    assert {32 + 4 * 1536} == {store.strlen(key) for key in inputs}
    assert all((store.memory_usage(key) or 0) <= 7.5 * 1024 for key in inputs)
    store.close()


async def test_the_stated_ttl_is_the_one_in_redis(settings: Settings, redis_url: str) -> None:
    """``ttl=N`` of a hit is what Redis still gives the vector."""
    app = EmbeddingCacheMiddleware(server(Spy()), settings=settings)
    await ask(app, "a")
    said = int(cache_status(await ask(app, "a")).partition("ttl=")[2])
    store = sync_redis.Redis.from_url(redis_url)
    [key] = store.scan_iter("embedding_input:*")
    assert abs(said - store.ttl(key)) <= 1
    store.close()


# Credentials.


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
    app._shared.clock.wall = lambda: now[0]
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
    inner._shared.clock.wall = outer._shared.clock.wall = lambda: now[0]
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
    """A full hit outside ``CORSMiddleware`` repeats what the app said to this origin, and to no other."""
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


# Invalidation.


async def test_a_flush_makes_every_vector_of_the_model_a_miss(redis_url: str) -> None:
    """One written key, no scan; other models keep theirs."""
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_L1_BYTES=0)
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=settings)
    async with client(app) as c:
        for model in ("m", "n"):
            await c.post("/v1/embeddings", json={"model": model, "input": ["a", "b"]})
        await flush_model("m", settings=settings)
        said = [
            cache_status(await c.post("/v1/embeddings", json={"model": model, "input": ["a", "b"]})) for model in "mn"
        ]
    assert "fwd=miss" in said[0]
    assert "hit" in said[1]


async def test_a_computation_under_way_is_flushed_too(redis_url: str) -> None:
    """What was asked before a flush and answered after it is never served later."""
    apps = []
    for settled in (False, True):
        settings = Settings(REDIS_URL=redis_url, REDIS_KEY_PREFIX=f"{settled}:", EMBEDDING_CACHE_L1_BYTES=0)

        async def flush(_scope: Scope, settings: Settings = settings) -> None:
            await flush_model("m", settings=settings)

        spy = Spy()
        if settled:  # the model has an epoch already
            apps.append(EmbeddingCacheMiddleware(server(Spy()), settings=settings))
            await ask(apps[-1], "other")
        apps.append(EmbeddingCacheMiddleware(server(spy, before=flush), settings=settings))
        await ask(apps[-1], "a")
        apps.append(EmbeddingCacheMiddleware(server(spy), settings=settings))
        after = await ask(apps[-1], "a")
        assert "fwd=miss" in cache_status(after)
        assert 2 == spy.calls


async def test_a_lost_epoch_never_brings_flushed_vectors_back(redis_url: str) -> None:
    """An evicted epoch makes vectors misses, also those written before the flush."""
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_L1_BYTES=0)
    app = EmbeddingCacheMiddleware(server(Spy()), settings=settings)
    await ask(app, "a")
    await flush_model("m", settings=settings)
    store = sync_redis.Redis.from_url(redis_url)
    [epoch] = store.scan_iter("embedding_epoch:*")
    store.delete(epoch)
    store.close()
    assert "fwd=miss" in cache_status(await ask(app, "a"))
    assert "hit" in cache_status(await ask(app, "a"))


async def test_a_flush_is_complete_in_the_process_after_its_seconds(redis_url: str) -> None:
    """The in-process layer answers without Redis for ``L1_SECONDS`` and not longer."""
    settings = Settings(REDIS_URL=redis_url)
    app = EmbeddingCacheMiddleware(server(Spy()), settings=settings)
    now = [0.0]
    app._shared.clock.monotonic = lambda: now[0]
    await ask(app, "a")
    await ask(app, "a")
    await flush_model("m", settings=settings)
    now[0] = 4.9
    assert "hit" in cache_status(await ask(app, "a"))
    now[0] = 5.1
    assert "fwd=miss" in cache_status(await ask(app, "a"))


@pytest.mark.parametrize("has_lease", [True, False])
async def test_a_flush_makes_no_second_worker_compute_again(redis_url: str, has_lease: bool) -> None:
    """What one worker has computed since a flush another finds in Redis, though it still has the old vectors itself."""
    settings = Settings(REDIS_URL=redis_url)
    spies, now = [Spy(), Spy()], [0.0]
    workers = [EmbeddingCacheMiddleware(server(spy), settings=settings) for spy in spies]
    for worker in workers:
        worker._shared.clock.monotonic = lambda: now[0]
        await ask(worker, "a", "bb", "ccc")
    assert [1, 0] == [spy.calls for spy in spies]
    await flush_model("m", settings=settings)
    now[0] = 5.1
    await ask(workers[0], "a", "bb", "ccc")
    if not has_lease:
        store = sync_redis.Redis.from_url(redis_url)
        store.delete(*store.scan_iter("embedding_lease:*"))
        store.close()
        now[0] = 10.2

    again = await ask(workers[1], "a", "bb", "ccc", "dddd")

    assert "hit=3 miss=1" in cache_status(again)
    assert [["dddd"]] == [json.loads(body)["input"] for body in spies[1].bodies]


async def test_the_in_process_layer_answers_without_redis(own_server: Any) -> None:
    """A hit from the process sends no command at all."""
    app = EmbeddingCacheMiddleware(server(Spy()), settings=Settings(REDIS_URL=own_server.url))
    for _ in range(3):
        await ask(app, "a")
    before = own_server.client().info("stats")["total_commands_processed"]
    for _ in range(5):
        assert "hit" in cache_status(await ask(app, "a"))
    assert 1 == own_server.client().info("stats")["total_commands_processed"] - before


# Cache-Control and Cache-Status.


async def test_another_representation_counts_in_the_process_at_once(redis_url: str) -> None:
    """Vectors that came as base64 and are asked for as floats take more room, and others go."""
    limit = 100_000
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_L1_BYTES=limit)
    app = EmbeddingCacheMiddleware(server(Spy(dims=100)), settings=settings)
    items, local = [str(number) for number in range(60)], app._shared.vectors.local
    async with client(app) as c:
        await c.post("/v1/embeddings", json=body(*items, encoding_format="base64"))
        assert 60 == len(local._values)
        assert "hit" in cache_status(await c.post("/v1/embeddings", json=body(*items)))
    values = [value for value, _ in local._values.values()]
    assert 0 < len(values) < 60
    assert local.bytes == sum(500 + len(v.raw) + sum(map(len, v.texts.values())) for v in values) <= limit


async def test_request_directives(any_settings: Settings) -> None:
    """``no-cache`` and ``max-age=0`` refresh, ``no-store`` leaves no trace, ``only-if-cached`` never calls."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=any_settings)

    async def say(directive: str, text: str) -> tuple[int, str, int]:
        before = spy.calls
        response = await ask(app, text, **{"cache-control": directive})
        return response.status_code, cache_status(response).removeprefix("redis-asgi; "), spy.calls - before

    assert (504, "detail=only-if-cached", 0) == await say("only-if-cached", "a")
    assert (200, "fwd=bypass; detail=no-store", 1) == await say("no-store", "a")
    assert (504, "detail=only-if-cached", 0) == await say("only-if-cached", "a")
    assert (200, "fwd=request; stored", 1) == await say("no-cache", "a")
    assert 200 == (await say("only-if-cached", "a"))[0]
    assert (200, "fwd=request; stored", 1) == await say("max-age=0", "a")
    assert (200, "fwd=bypass; detail=no-store", 1) == await say("No-Store, max-age=5", "a")
    app._shared.clock.wall = lambda: time.time() + 100
    assert (200, "fwd=miss; stored", 1) == await say("max-age=50", "a")
    assert 0 == (await say("max-age=50", "a"))[2]
    assert 0 == (await say("max-age=nonsense", "a"))[2]
    app._shared.clock.wall = time.time
    old = await ask(app, "a", pragma="no-cache")
    assert "redis-asgi; fwd=request; stored" == cache_status(old)
    assert "; hit" in cache_status(await ask(app, "a", **{"pragma": "no-cache", "cache-control": "max-age=60"}))


async def test_vectors_of_two_lengths_are_no_full_hit(settings: Settings) -> None:
    """``only-if-cached`` makes no call for them either; the next request starts over."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=settings)
    async with client(app) as c:
        for spy.dims in (6, 7):
            await c.post("/v1/embeddings", json={"model": "m", "input": [str(spy.dims)]})
        both = {"model": "m", "input": ["6", "7"]}
        response = await c.post("/v1/embeddings", json=both, headers={"cache-control": "only-if-cached"})
        assert (504, 2) == (response.status_code, spy.calls)
        assert "fwd=miss" in cache_status(await c.post("/v1/embeddings", json=both))


async def test_504_is_a_problem_document(settings: Settings) -> None:
    """``only-if-cached`` without a full hit says so in problem+json and makes no call."""
    spy = Spy()
    response = await ask(
        EmbeddingCacheMiddleware(server(spy), settings=settings), "a", **{"cache-control": "only-if-cached"}
    )
    assert "application/problem+json" == response.headers["content-type"]
    assert 504 == response.json()["status"]
    assert 0 == spy.calls


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({b"cache-control": b"no-store"}, "fwd=bypass; detail=response-no-store"),
        ({b"cache-control": b"private, max-age=9"}, "fwd=bypass; detail=response-no-store"),
        ({b"cache-control": b"max-age=0"}, "fwd=bypass; detail=response-no-store"),
        ({b"cache-control": b"max-age=-1"}, "fwd=bypass; detail=response-no-store"),
        ({b"cache-control": b"max-age"}, "fwd=bypass; detail=response-no-store"),
        ({b"cache-control": b"s-maxage=soon, max-age=60"}, "fwd=bypass; detail=response-no-store"),
        ({b"cache-control": b"max-age=" + b"9" * 30}, "fwd=miss; stored"),
        ({b"vary": b"Accept"}, "fwd=bypass; detail=vary"),
        ({b"vary": b"accept-language, user-agent"}, "fwd=bypass; detail=vary"),
        ({b"vary": b"*"}, "fwd=bypass; detail=vary"),
        ({b"vary": b"accept-language, X-Anything"}, "fwd=miss; stored"),
        ({b"vary": b"Origin, Accept-Encoding, Authorization, OpenAI-Project"}, "fwd=miss; stored"),
        ({b"cache-control": b"public, max-age=60"}, "fwd=miss; stored"),
    ],
    ids=repr,
)
async def test_response_directives(headers: dict[bytes, bytes], said: str, settings: Settings) -> None:
    """What the app forbids to store is not stored, nor given to anybody else."""
    calls = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        calls.append(1)
        await respond(send, orjson.dumps(FORMATS["openai"][2]({"model": "m"}, ["a"], Spy())), 200, *headers.items())

    cached = EmbeddingCacheMiddleware(app, settings=settings)
    first, second = [await ask(cached, "a") for _ in range(2)]
    assert f"redis-asgi; {said}" == cache_status(first)
    assert ("stored" in said) == (len(calls) == 1)
    if "stored" in said:
        assert "hit" in cache_status(second)


async def test_a_smaller_max_age_of_the_app_caps_the_ttl(settings: Settings, redis_url: str) -> None:
    """The vector ends when the app says, and a hit does not promise more."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        answer = orjson.dumps(FORMATS["openai"][2]({"model": "m"}, ["a"], Spy()))
        await respond(send, answer, 200, (b"cache-control", b"max-age=60"))

    cached = EmbeddingCacheMiddleware(app, settings=settings)
    await ask(cached, "a")
    assert "redis-asgi; hit" == cache_status(await ask(cached, "a"))
    store = sync_redis.Redis.from_url(redis_url)
    [key] = store.scan_iter("embedding_input:*")
    assert 58 <= store.ttl(key) <= 60
    store.close()


async def test_our_member_is_appended_once_and_can_be_switched_off(redis_url: str) -> None:
    """A ``Cache-Status`` of the app stays first; ``STATUS=false`` adds none."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        answer = orjson.dumps(FORMATS["openai"][2]({"model": "m"}, ["a"], Spy()))
        await respond(send, answer, 200, (b"cache-status", b"inner; hit"))

    cached = EmbeddingCacheMiddleware(app, settings=Settings(REDIS_URL=redis_url))
    assert ["inner; hit", "redis-asgi; fwd=miss; stored"] == (await ask(cached, "a")).headers.get_list("cache-status")
    quiet = EmbeddingCacheMiddleware(app, settings=Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_STATUS=False))
    assert ["inner; hit"] == (await ask(quiet, "b")).headers.get_list("cache-status")


async def test_created_and_id_are_fresh_on_a_hit(settings: Settings) -> None:
    """A hit is not a replay of an old answer's identity."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        answer = FORMATS["openai"][2]({"model": "m"}, ["a"], Spy())
        await respond(send, orjson.dumps({**answer, "id": "embd-0", "created": 5}))

    cached = EmbeddingCacheMiddleware(app, settings=settings)
    cold, *warm = [(await ask(cached, "a")).json() for _ in range(3)]
    assert ("embd-0", 5) == (cold["id"], cold["created"])
    assert 3 == len({answer["id"] for answer in (cold, *warm)})
    assert all(answer["id"].startswith("embd-") and answer["created"] > 5 for answer in warm)


# Around the app.


async def test_the_app_sees_what_was_found(settings: Settings) -> None:
    """``request.state`` has the cache, and the result for the endpoint and for what stands outside."""
    results: list[Any] = []

    async def endpoint(request: Request) -> JSONResponse:
        results.append(request.state.embedding_cache_result)
        fields = await request.json()
        await request.state.embedding_cache.set_embedding("x", [1.0])
        return JSONResponse(FORMATS["openai"][2](fields, fields["input"], Spy()))

    inner = Starlette(routes=[Route("/v1/embeddings", endpoint, methods=["POST"])])
    cached = EmbeddingCacheMiddleware(inner, settings=settings)

    async def outside(scope: Scope, receive: Receive, send: Send) -> None:
        await cached(scope, receive, send)
        results.append(scope["state"]["embedding_cache_result"])

    await ask(outside, [1], [2, 3])
    await ask(outside, [1], [4])
    await ask(outside, [1], [1], [4])
    shown = [(r.outcome, r.hits, r.misses, r.tokens, r.billed_tokens) for r in results]
    assert [
        ("miss", 0, 2, 0, 0),
        ("miss", 0, 2, 3, 3),
        ("partial", 1, 1, 0, 0),
        ("partial", 1, 1, 2, 1),
        ("hit", 2, 0, 3, 0),
    ] == shown


async def test_a_mounted_app_is_cached(settings: Settings) -> None:
    """Under a mount the path less its root is the endpoint."""
    spy = Spy()

    async def unmounted(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        await server(spy)({**scope, "path": path}, receive, send)

    app = Starlette(routes=[Mount("/models", app=EmbeddingCacheMiddleware(unmounted, settings=settings))])
    for _ in range(2):
        last = await ask(app, "a", path="/models/v1/embeddings")
    assert "hit" in cache_status(last)
    assert 1 == spy.calls


async def test_other_requests_are_not_touched(settings: Settings) -> None:
    """GET, other paths, and other bodies pass with the very messages of the server."""
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope["path"], receive, send))

    async def receive() -> Any:
        raise AssertionError

    async def send(_message: Any) -> None:
        raise AssertionError

    cached = EmbeddingCacheMiddleware(app, settings=settings)
    for kind, method, path in (
        ("http", "GET", "/v1/embeddings"),
        ("http", "POST", "/v1/models"),
        ("websocket", "", "/v1/embeddings"),
    ):
        await cached({"type": kind, "method": method, "path": path, "headers": []}, receive, send)
    assert [(path, receive, send) for path in ("/v1/embeddings", "/v1/models", "/v1/embeddings")] == seen


async def test_the_sub_request_fits_its_body(settings: Settings) -> None:
    """It has its own length, asks for no compression, and keeps every other header."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=settings)
    await ask(app, "a")
    await ask(app, "a", "b", **{"x-request-id": "7", "expect": "100-continue"})
    headers = spy.headers[1]
    assert b'{"model":"m","input":["b"]}' == spy.bodies[1]
    assert (b"27", b"identity", b"7") == tuple(
        headers[n] for n in (b"content-length", b"accept-encoding", b"x-request-id")
    )
    assert b"expect" not in headers


async def test_a_custom_wire_format_can_be_routed(settings: Settings) -> None:
    """Anything with the names of the Protocol speaks for a path of the user's."""
    spy = Spy()
    inner = server(spy)

    async def moved(scope: Scope, receive: Receive, send: Send) -> None:
        await inner({**scope, "path": "/embed"}, receive, send)

    app = EmbeddingCacheMiddleware(moved, settings=settings, routes={"/mine": "tei"})
    async with client(app) as c:
        for _ in range(2):
            last = await c.post("/mine", json={"inputs": ["a"]})
    assert "hit" in cache_status(last)


async def test_configured_by_the_environment_alone(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> None:
    """``EmbeddingCacheMiddleware(app)`` works, as vLLM's ``--middleware`` builds it."""
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("EMBEDDING_CACHE_REDIS_URL", redis_url)
    monkeypatch.setenv("EMBEDDING_CACHE_ROUTES", "openai:/mine, tei")
    monkeypatch.setenv("EMBEDDING_CACHE_TTL", "100")
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy))
    async with client(app) as c:
        said = [cache_status(await c.post("/embed", json={"inputs": ["a"]})) for _ in range(2)]
        assert "" == cache_status(await c.post("/v1/embeddings", json=body("a")))
    assert "hit" in said[1]
    assert 89 <= int(said[1].partition("ttl=")[2]) <= 100


async def test_a_decoding_client_of_the_users_is_fine(redis_url: str) -> None:
    """``decode_responses=True`` does not break vectors, and the client is left open."""
    user_client = aioredis.Redis.from_url(redis_url, decode_responses=True)
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), redis=user_client, settings=Settings(EMBEDDING_CACHE_L1_BYTES=0))
    for _ in range(2):
        last = await ask(app, "a", "b")
    assert "hit" in cache_status(last)
    assert await user_client.ping()
    await user_client.aclose()


@pytest.mark.parametrize(
    "arguments",
    [
        {"routes": {"/x": "nope"}},
        {"routes": {"x": "openai"}},
        {"routes": {"/x": 5}},
        {"ttl": 0},
        {"ttl": True},
        {"ttl": "60"},
        {"lease": -1},
        {"lease": "never"},
        {"namespace": 5},
        {"partition_by": "tenant"},
        {"redis": "http://x"},
    ],
    ids=repr,
)
def test_misuse_is_found_at_construction(arguments: dict[str, Any]) -> None:
    """Every argument is checked before the first request."""
    with pytest.raises(ConfigurationError, match="Try "):
        EmbeddingCacheMiddleware(server(Spy()), settings=Settings(), **arguments)


def test_unknown_wire_formats_in_the_environment_are_found_at_construction() -> None:
    """``EMBEDDING_CACHE_ROUTES`` with a typo names itself and what would work."""
    with pytest.raises(ConfigurationError, match=r"EMBEDDING_CACHE_ROUTES='opanai'.*openai"):
        EmbeddingCacheMiddleware(server(Spy()), settings=Settings(EMBEDDING_CACHE_ROUTES="opanai"))


async def test_the_shared_client_is_held_while_the_app_lives(settings: Settings) -> None:
    """The lifespan opens it, and closes it before the server hears of the end; the app's own events pass."""
    app = EmbeddingCacheMiddleware(Starlette(), settings=settings)
    manager = app._shared.vectors.manager
    events = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    sent = []

    async def receive() -> Any:
        return next(events)

    async def send(message: Any) -> None:
        sent.append((message["type"], manager.pool is not None))

    await app({"type": "lifespan", "state": {}}, receive, send)
    assert ["lifespan.startup.complete", "lifespan.shutdown.complete"] == [kind for kind, _ in sent]
    assert [True, False] == [is_open for _, is_open in sent]


async def test_the_shared_client_is_held_before_the_app_starts(settings: Settings) -> None:
    """An app whose start uses the client, and whose other user ends meanwhile, keeps it."""
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert "lifespan.startup" == (await receive())["type"]
        await manager.initialize_pool()
        manager.retain()
        await manager.release()
        seen.append(manager.pool is not None)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    cached = EmbeddingCacheMiddleware(app, settings=settings)
    manager = cached._shared.vectors.manager
    events = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> Any:
        return next(events)

    async def send(message: Any) -> None:
        seen.append(manager.pool is not None)

    await cached({"type": "lifespan", "state": {}}, receive, send)
    assert [True, True, False] == seen


async def test_what_the_app_sets_in_its_scope_is_seen_outside(settings: Settings) -> None:
    """A middleware around the cache finds the route, as without it, when the answer starts and afterwards."""
    seen: list[tuple[str, Any]] = []

    async def embeddings(request: Request) -> JSONResponse:
        body = await request.json()
        return JSONResponse(FORMATS["openai"][2](body, body["input"], Spy()))

    inner = Starlette(routes=[Mount("/{team}", routes=[Route("/v1/embeddings", embeddings, methods=["POST"])])])
    cached = EmbeddingCacheMiddleware(inner, settings=settings, routes={"/one/v1/embeddings": "openai"})

    async def outside(scope: Scope, receive: Receive, send: Send) -> None:
        async def watch(message: Any) -> None:
            seen.append((message["type"], scope.get("path_params")))
            await send(message)

        before = {name: scope[name] for name in ("path", "headers")}
        await cached(scope, receive, watch)
        seen.append(("after", scope.get("endpoint") is embeddings))
        assert before == {name: scope[name] for name in before}

    await ask(outside, "a", path="/one/v1/embeddings")
    assert ("http.response.start", {"team": "one"}) == seen[0]
    assert ("after", True) == seen[-1]


@pytest.mark.parametrize("where", ["scope", "state"])
async def test_a_replay_finds_nothing_of_the_first_call(where: str, settings: Settings) -> None:
    """An app that keeps a parsed body in its scope or state reads the one of the call that it answers."""
    calls = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        kept = scope if where == "scope" else scope["state"]
        if "parsed" not in kept:
            kept["parsed"] = orjson.loads((await receive())["body"])
        items = kept["parsed"]["input"]
        calls.append(items)
        answer = FORMATS["openai"][2]({"model": "m"}, items, Spy())
        await respond(send, orjson.dumps(answer), 200 if len(items) > 1 else 422)

    seen: list[Any] = []

    async def outside(scope: Scope, receive: Receive, send: Send) -> None:
        await EmbeddingCacheMiddleware(app, settings=settings)(scope, receive, send)
        seen.append((scope if where == "scope" else scope["state"])["parsed"]["input"])
        seen.append(scope["state"]["embedding_cache_result"].outcome)

    answer = await ask(outside, "x", "x")
    assert (200, 2) == (answer.status_code, len(answer.json()["data"]))
    assert [["x"], ["x", "x"]] == calls
    assert [["x", "x"], "bypass"] == seen


async def test_a_replay_is_routed_as_the_first_call_was(settings: Settings) -> None:
    """What a mount has set for the smaller request does not lead the whole one elsewhere."""
    calls = []

    async def embeddings(request: Request) -> JSONResponse:
        body = await request.json()
        calls.append(body["input"])
        if len(body["input"]) < 2:
            return JSONResponse({"error": "two"}, 422)
        return JSONResponse(FORMATS["openai"][2](body, body["input"], Spy()))

    inner = Starlette(routes=[Mount("/a", routes=[Route("/v1/embeddings", embeddings, methods=["POST"])])])
    cached = EmbeddingCacheMiddleware(inner, settings=settings, routes={"/a/v1/embeddings": "openai"})
    answer = await ask(cached, "x", "x", path="/a/v1/embeddings")
    assert 200 == answer.status_code
    assert [["x"], ["x", "x"]] == calls


async def test_a_header_that_the_app_varies_by_is_named(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """The log says which, and the setting that puts it into the key lets the answer be stored."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        answer = FORMATS["openai"][2]({"model": "m"}, ["a"], Spy())
        await respond(send, orjson.dumps(answer), 200, (b"vary", b"Origin, Accept"))

    for _ in range(2):
        assert "detail=vary" in cache_status(await ask(EmbeddingCacheMiddleware(app, settings=settings), "a"))
    line = next(r.__dict__ for r in caplog.records if event_of(r) == "redis_asgi.embedding_response_varies")
    assert ("accept", True) == (line["header"], "EMBEDDING_CACHE_KEYED_HEADERS" in line["fix"])
    keyed = settings.model_copy(update={"EMBEDDING_CACHE_KEYED_HEADERS": ("accept",)})
    assert "stored" in cache_status(await ask(EmbeddingCacheMiddleware(app, settings=keyed), "a"))


@pytest.mark.parametrize("share", [True, False])
async def test_vary_by_a_credential_is_stored_only_where_it_parts_the_keys(share: bool, settings: Settings) -> None:
    """Under ``share`` one caller's answer would be another's."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        answer = FORMATS["openai"][2]({"model": "m"}, ["a"], Spy())
        await respond(send, orjson.dumps(answer), 200, (b"vary", b"Authorization"))

    said = cache_status(await ask(EmbeddingCacheMiddleware(app, share=share, settings=settings), "a"))
    assert ("detail=vary" if share else "stored") in said


async def test_every_answer_says_what_the_cache_did(settings: Settings) -> None:
    """The header and the state are there for a partition of nobody and for a 504, too."""
    app = EmbeddingCacheMiddleware(server(Spy()), settings=settings, partition_by=lambda c: c.headers.get("x-tenant"))
    for headers, said in (
        ({}, "redis-asgi; fwd=bypass; detail=partition"),
        ({"x-tenant": "t", "cache-control": "only-if-cached"}, "redis-asgi; detail=only-if-cached"),
        ({"x-tenant": "t"}, "redis-asgi; fwd=miss; stored"),
    ):
        states: list[Any] = []

        async def outside(scope: Scope, receive: Receive, send: Send, states: list[Any] = states) -> None:
            await app(scope, receive, send)
            states.append(scope["state"]["embedding_cache_result"].outcome)

        response = await ask(outside, "a", **headers)
        assert [said] == response.headers.get_list("cache-status")
        assert ["bypass" if "partition" in said else "miss"] == states


async def test_a_body_may_ask_for_no_cache(settings: Settings) -> None:
    """LiteLLM's ``{"cache": {"no-cache": true}}`` is heeded: the app answers each time."""
    spy = Spy()
    async with client(EmbeddingCacheMiddleware(server(spy), settings=settings)) as c:
        for _ in range(2):
            response = await c.post("/v1/embeddings", json=body("a", cache={"no-cache": True}))
            assert "redis-asgi; fwd=bypass; detail=no-store" == cache_status(response)
    assert 2 == spy.calls


@pytest.mark.parametrize("accepts", ["gzip", "br, gzip;q=0.5", "gzip;q=0", "br", "*", ""])
async def test_a_compressed_miss_stays_compressed_and_is_stored(accepts: str, any_settings: Settings) -> None:
    """What compresses inside of the cache does so for a client that asks for it, as without the cache."""
    bare = GZipMiddleware(server(Spy()), minimum_size=1)
    cached = EmbeddingCacheMiddleware(bare, settings=any_settings)
    expected = await ask(bare, "a", "b", **{"accept-encoding": accepts})
    cold = await ask(cached, "a", "b", **{"accept-encoding": accepts})
    assert "redis-asgi; fwd=miss; stored" == cache_status(cold)
    if accepts not in ("*", "gzip;q=0"):  # Starlette looks for the word alone
        assert expected.headers.get("content-encoding") == cold.headers.get("content-encoding")
    assert expected.json() == cold.json()
    warm = await ask(cached, "a", "b", **{"accept-encoding": accepts})
    assert "; hit" in cache_status(warm)
    assert (expected.json(), None) == (warm.json(), warm.headers.get("content-encoding"))
    partial = await ask(cached, "a", "c", **{"accept-encoding": accepts})
    assert "fwd=partial" in cache_status(partial)


@pytest.mark.parametrize("spoil", [lambda b: b[:-9], lambda b: b + b"more", lambda b: b"{}", lambda b: b""])
async def test_an_answer_that_is_not_the_gzip_it_says_is_passed_on(spoil: Any, settings: Settings) -> None:
    """To the byte, and nothing of it is stored."""
    answer = orjson.dumps(FORMATS["openai"][2]({"model": "m"}, ["a"], Spy()))
    sent = spoil(gzip.compress(answer))
    seen: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, sent, 200, (b"content-encoding", b"gzip"))

    async def outside(scope: Scope, receive: Receive, send: Send) -> None:
        async def watch(message: Any) -> None:
            seen.append(message.get("body", b""))
            await send({**message, "headers": []} if message["type"] == "http.response.start" else message)

        await EmbeddingCacheMiddleware(app, settings=settings)(scope, receive, watch)

    await ask(outside, "a", **{"accept-encoding": "gzip"})
    assert sent == b"".join(seen)


async def test_a_compressed_answer_that_is_too_large_is_passed_on(settings: Settings) -> None:
    """A megabyte of zeros in a thousand bytes takes no more memory than one that is not compressed may."""
    body = gzip.compress(b" " * 1_000_000 + orjson.dumps(FORMATS["openai"][2]({"model": "m"}, ["a"], Spy())))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, body, 200, (b"content-encoding", b"gzip"))

    small = settings.model_copy(update={"EMBEDDING_CACHE_MAX_RESPONSE_BYTES": 500_000})
    cached = EmbeddingCacheMiddleware(app, settings=small)
    before = cached._shared.budget._left
    said = await ask(cached, "a", **{"accept-encoding": "gzip"})
    assert "redis-asgi; fwd=bypass; detail=not-understood" == cache_status(said)
    assert before == cached._shared.budget._left


async def test_a_computation_that_does_not_end_holds_up_no_shutdown(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for, but not for ever; the client is closed under it."""
    monkeypatch.setattr("redis_asgi.embeddings.middleware._SETTLES_WITHIN", 0.01)
    app = EmbeddingCacheMiddleware(Starlette(), settings=settings)
    endless = asyncio.create_task(asyncio.sleep(60))
    app._shared.flights._tasks.add(endless)
    events = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    sent = []

    async def receive() -> Any:
        return next(events)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async with asyncio.timeout(PATIENCE):
        await app({"type": "lifespan", "state": {}}, receive, send)
    endless.cancel()

    assert ["lifespan.startup.complete", "lifespan.shutdown.complete"] == sent
    assert app._shared.vectors.manager.pool is None


async def test_other_middlewares_may_stand_outside_and_inside(settings: Settings) -> None:
    """``BaseHTTPMiddleware`` and compression around it, compression within: misses, partial and full hits."""
    spy = Spy()

    async def passing(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["x-outside"] = "yes"
        return response

    inner = GZipMiddleware(server(spy), minimum_size=10)
    app = Starlette(
        routes=[Mount("/", app=EmbeddingCacheMiddleware(inner, settings=settings))],
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=passing),
            Middleware(GZipMiddleware, minimum_size=10),
        ],
    )
    for items in (["a", "b"], ["b", "c"], ["c", "a", "b"]):
        response = await ask(app, *items)
        assert FORMATS["openai"][2]({"model": "m"}, items, Spy())["data"] == response.json()["data"]
        assert "yes" == response.headers["x-outside"]
        assert "gzip" == response.headers["content-encoding"]
    assert ["a", "b", "c"] == spy.seen
    assert "hit" in cache_status(response)


# Settings that say what is in a key, and where vectors are.


async def test_an_empty_namespace_is_said_once_at_the_first_store(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Not at start, not when nothing is stored, and never with one."""
    said = "redis_asgi.embedding_namespace_empty"
    named = EmbeddingCacheMiddleware(server(Spy()), settings=Settings(REDIS_URL=redis_url), namespace="model@1")
    unnamed = EmbeddingCacheMiddleware(server(Spy()), settings=Settings(REDIS_URL=redis_url))
    await ask(named, "a")
    await ask(unnamed, "a", **{"cache-control": "no-store"})
    assert not [record for record in caplog.records if event_of(record) == said]
    for text in "abc":
        await ask(unnamed, text)
    [record] = [record for record in caplog.records if event_of(record) == said]
    assert "EMBEDDING_CACHE_NAMESPACE" in record.fix  # type: ignore[attr-defined]  # an extra


async def test_other_headers_can_carry_the_credential_and_part_the_keys(redis_url: str) -> None:
    """``CREDENTIAL_HEADERS`` replaces the default; ``IGNORED_HEADERS`` leave the key, all others part it."""
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


async def test_vectors_can_have_a_server_of_their_own(own_server: Any, redis_url: str) -> None:
    """``EMBEDDING_CACHE_REDIS_URL``: nothing of the cache is on the shared server, and its death is no matter."""
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_REDIS_URL=own_server.url, EMBEDDING_CACHE_L1_BYTES=0)
    app = EmbeddingCacheMiddleware(server(Spy()), settings=settings)
    await ask(app, "a")
    assert "; hit" in cache_status(await ask(app, "a"))
    shared = sync_redis.Redis.from_url(redis_url)
    assert (0, 3) == (shared.dbsize(), own_server.client().dbsize())
    shared.close()
    elsewhere = Settings(REDIS_URL="redis://127.0.0.1:1", EMBEDDING_CACHE_REDIS_URL=own_server.url)
    assert "; hit" in cache_status(await ask(EmbeddingCacheMiddleware(server(Spy()), settings=elsewhere), "a"))


async def test_a_refusal_in_one_worker_ends_the_lease_in_all(redis_url: str) -> None:
    """What the app says to one process counts for every other: at once in Redis, after ``L1_SECONDS`` everywhere."""
    keys, now = {"key"}, [0.0]
    apps = []
    for local in (0, 64 * 1024 * 1024):
        settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_L1_BYTES=local)
        apps.append(
            EmbeddingCacheMiddleware(guarded(server(Spy()), keys), settings=settings, redis=RedisManager(settings))
        )
        apps[-1]._shared.clock.monotonic = lambda: now[0]
        for _ in range(2):
            assert 200 == (await ask(apps[-1], "a", authorization="key")).status_code
    without, within = apps
    keys.clear()
    refusing = EmbeddingCacheMiddleware(guarded(server(Spy()), keys), settings=Settings(REDIS_URL=redis_url))
    assert 401 == (await ask(refusing, "new", authorization="key")).status_code
    assert 401 == (await ask(without, "a", authorization="key")).status_code
    now[0] = 5.1
    assert 401 == (await ask(within, "a", authorization="key")).status_code


async def test_a_changed_model_is_logged_once(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """However often lengths differ, the operator reads it once, with what to do."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=settings)
    for dims in (5, 6, 7):
        spy.dims = dims
        await ask(app, "a", f"new {dims}")
        await ask(app, "a", f"newer {dims}")
    records = [r for r in caplog.records if event_of(r) == "redis_asgi.embedding_lengths_differ"]
    assert 1 == len(records)
    assert "EMBEDDING_CACHE_NAMESPACE" in records[0].fix  # type: ignore[attr-defined]  # an extra
