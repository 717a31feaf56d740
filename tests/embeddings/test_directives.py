"""``Cache-Control``, ``Vary`` and ``Cache-Status`` of requests and answers."""

import time
from typing import Any

import orjson
import pytest
import redis as sync_redis
from starlette.types import Receive, Scope, Send

from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.settings import Settings

from ..kit.embedding_apps import FORMATS, Spy, cache_status, client, respond, server
from ..kit.inside import shared_of
from ..kit.logs import event_of
from .requests import ask, body

pytestmark = pytest.mark.anyio


async def test_another_representation_counts_in_the_process_at_once(redis_url: str) -> None:
    """Vectors that came as base64 and are asked for as floats take more room, and others go."""
    limit = 100_000
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_L1_BYTES=limit)
    app = EmbeddingCacheMiddleware(server(Spy(dims=100)), settings=settings)
    items, local = [str(number) for number in range(60)], shared_of(app).vectors.local
    async with client(app) as c:
        await c.post("/v1/embeddings", json=body(*items, encoding_format="base64"))
        assert 60 == len(local._values)
        assert "hit" in cache_status(await c.post("/v1/embeddings", json=body(*items)))
    values = [value for value, _ in local._values.values()]
    assert 0 < len(values) < 60
    assert local.bytes == sum(500 + len(v.raw) + sum(map(len, v.texts.values())) for v in values) <= limit


async def test_request_directives(any_settings: Settings) -> None:
    """``no-cache`` and ``max-age=0`` refresh, ``no-store`` leaves no trace,
    ``only-if-cached`` never calls.
    """
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
    shared_of(app).clock.wall = lambda: time.time() + 100
    assert (200, "fwd=miss; stored", 1) == await say("max-age=50", "a")
    assert 0 == (await say("max-age=50", "a"))[2]
    assert 0 == (await say("max-age=nonsense", "a"))[2]
    shared_of(app).clock.wall = time.time
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
