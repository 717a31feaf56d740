"""Flushes and lost epochs: what was stored before is a miss."""

import json
from typing import Any

import pytest
import redis as sync_redis
from starlette.types import Scope

from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.maintenance import flush_model
from redis_asgi.settings import Settings

from ..kit.embedding_apps import Spy, cache_status, client, server
from ..kit.inside import shared_of
from .requests import ask

pytestmark = pytest.mark.anyio


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
    shared_of(app).clock.monotonic = lambda: now[0]
    await ask(app, "a")
    await ask(app, "a")
    await flush_model("m", settings=settings)
    now[0] = 4.9
    assert "hit" in cache_status(await ask(app, "a"))
    now[0] = 5.1
    assert "fwd=miss" in cache_status(await ask(app, "a"))


@pytest.mark.parametrize("has_lease", [True, False])
async def test_a_flush_makes_no_second_worker_compute_again(redis_url: str, has_lease: bool) -> None:
    """What one worker has computed since a flush another finds in Redis,
    though it still has the old vectors itself.
    """
    settings = Settings(REDIS_URL=redis_url)
    spies, now = [Spy(), Spy()], [0.0]
    workers = [EmbeddingCacheMiddleware(server(spy), settings=settings) for spy in spies]
    for worker in workers:
        shared_of(worker).clock.monotonic = lambda: now[0]
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
