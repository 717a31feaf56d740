"""Redis gone, hung, full, foreign, sharded: the app's own answer, in time."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, cast

import hiredis
import httpx
import orjson
import pytest
import redis as sync_redis
import redis.asyncio as aioredis
from starlette.types import Message, Receive, Scope, Send

from redis_asgi.connection.manager import RedisManager
from redis_asgi.embeddings.cache import EmbeddingCache
from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.embeddings.storage.pipeline import execute
from redis_asgi.embeddings.storage.store import MemoryVectors, RedisVectors, Write
from redis_asgi.errors import Failure
from redis_asgi.maintenance import FlushError, flush_model
from redis_asgi.settings import Settings

from ..kit.embedding_apps import FORMATS, Spy, cache_status, client, respond, server
from ..kit.fair_time import fair_time
from ..kit.logs import event_of
from ..kit.servers import Cluster, Server

pytestmark = pytest.mark.anyio


def settings_of(url: str, **more: Any) -> Settings:
    """Settings without the in-process layer, which would hide Redis."""
    return Settings(REDIS_URL=url, EMBEDDING_CACHE_L1_BYTES=0, **more)


async def ask(c: httpx.AsyncClient, *items: str) -> httpx.Response:
    """One request, whose answer must be right."""
    response = await c.post("/v1/embeddings", json={"model": "m", "input": list(items)})
    assert 200 == response.status_code
    assert FORMATS["openai"][2]({"model": "m"}, list(items), Spy())["data"] == response.json()["data"]
    return response


@pytest.mark.parametrize(
    "where",
    ["redis_asgi.connection.manager.build_client", "redis_asgi.connection.client_factory.QueueingPool.make_connection"],
)
async def test_with_a_defect_the_app_answers(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """What no Redis causes is a bypass, and one line with a traceback."""
    monkeypatch.setattr("redis_asgi.errors._said", set())

    def raise_it(*_given: object, **_options: object) -> None:
        raise TypeError("got an unexpected keyword argument")

    monkeypatch.setattr(where, raise_it)
    app = EmbeddingCacheMiddleware(server(Spy()), redis=RedisManager(settings_of(redis_url)))
    async with client(app) as c:
        for _ in range(3):
            assert "redis-asgi; fwd=bypass; detail=redis-down" == cache_status(await ask(c, "a", "b"))
    cache = EmbeddingCache(RedisManager(settings_of(redis_url)))

    assert {} == await cache.get_many(["x"])
    assert ["redis_asgi.defect"] == [event_of(each) for each in caplog.records if each.levelname == "ERROR"]


async def test_vectors_under_one_anothers_keys_are_misses(redis_url: str, redis_client: sync_redis.Redis) -> None:
    """Whatever mixed them up, they are computed anew, and the others are hits as before."""
    app = EmbeddingCacheMiddleware(server(Spy()), settings=settings_of(redis_url))
    async with client(app) as c:
        await ask(c, "a", "b", "c")
        first, second, _ = redis_client.keys("embedding_input:*")
        redis_client.rename(first, "aside")
        redis_client.rename(second, first)
        redis_client.rename("aside", second)
        assert 'redis-asgi; fwd=partial; stored; detail="hit=1 miss=2"' == cache_status(await ask(c, "a", "b", "c"))
        assert "hit" in cache_status(await ask(c, "a", "b", "c"))


async def test_redis_may_go_between_lookup_and_write(own_server: Server) -> None:
    """It hangs while the app computes: the answer has gone out before the write is given up."""

    async def hang(_scope: object) -> None:
        own_server.pause()

    app = EmbeddingCacheMiddleware(server(Spy(), before=hang), settings=settings_of(own_server.url))
    async with client(app) as c:
        began = fair_time()
        await ask(c, "a")
        assert fair_time() - began < 3
        own_server.resume()


async def test_a_full_redis_pauses_writing_and_goes_on_reading(
    own_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """OOM: what is stored is still served, what is not is computed,
    one log line, no write for 10 s.
    """
    app = EmbeddingCacheMiddleware(server(Spy()), settings=settings_of(own_server.url))
    async with client(app) as c:
        await ask(c, "a")
        own_server.client().config_set("maxmemory", "1")
        for _ in range(5):
            assert "fwd=miss" in cache_status(await ask(c, "new"))
            assert "hit" in cache_status(await ask(c, "a"))
        own_server.client().config_set("maxmemory", "0")
        assert "redis-asgi; fwd=miss" == cache_status(await ask(c, "b"))
    assert 1 == sum(event_of(r) == "redis_asgi.embedding_writes_paused" for r in caplog.records)
    assert not [r for r in caplog.records if event_of(r) == "redis_asgi.redis_unavailable"]


def kill(server: Server) -> None:
    """Redis is gone."""
    server.kill()


def hang(server: Server) -> None:
    """Redis hangs."""
    server.pause()


def fill(server: Server) -> None:
    """Redis is full."""
    server.client().config_set("maxmemory", "1")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("trip", ["lookup", "claim", "write"])
@pytest.mark.parametrize("harm", [kill, hang, fill], ids=lambda harm: harm.__name__)
@pytest.mark.usefixtures("shipped_deadlines")
async def test_whatever_happens_to_redis_at_any_point_the_app_answers_in_time(
    harm: Callable[[Server], None], trip: str, when: str, own_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a trip's commands are sent,
    or when they have been done and no reply has come: a whole answer, once.
    """
    trips, last = {"lookup": 1, "claim": 2, "write": 3}, [0.0]
    trips_made = [0]

    async def harmed(pool: Any, commands: Any, within: float) -> Any:
        trips_made[0] += 1
        if trips_made[0] == trips[trip]:
            if when == "after":
                await execute(pool, commands, within)
            harm(own_server)
        return await execute(pool, commands, within)

    async def send(message: Message) -> None:
        sent.append(message)
        last[0] = fair_time()

    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=settings_of(own_server.url))
    async with client(app) as c:
        # Connections are open, and the model is new.
        await c.post("/v1/embeddings", json={"model": "other", "input": ["a"]})
    spy.bodies.clear()
    monkeypatch.setattr("redis_asgi.embeddings.storage.redis_store.execute", harmed)
    body = orjson.dumps({"model": "m", "input": ["a", "b"]})
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "query_string": b"", "headers": headers}
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])
    sent: list[Message] = []

    async def receive() -> Message:
        for message in messages:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    began = fair_time()
    await app(scope, receive, send)
    assert last[0] - began < 2 * 0.25
    assert fair_time() - began < 3
    assert 200 == sent[0]["status"]
    answer = orjson.loads(b"".join(message.get("body", b"") for message in sent[1:]))
    assert FORMATS["openai"][2]({"model": "m"}, ["a", "b"], Spy()) == answer
    assert 1 == spy.calls
    assert trips_made[0] <= 3
    if harm is hang:
        own_server.resume()


async def test_a_redis_that_takes_no_writes_keeps_requests_together(own_server: Server) -> None:
    """Full before the model has an epoch: nothing is stored or said to be,
    and one computation serves all at once.
    """
    own_server.client().config_set("maxmemory", "1")
    spy, begun = Spy(), asyncio.Event()

    async def pause(_scope: object) -> None:
        begun.set()
        await asyncio.sleep(0.05)

    app = EmbeddingCacheMiddleware(server(spy, before=pause), settings=settings_of(own_server.url))
    async with client(app) as c:
        first = asyncio.ensure_future(ask(c, "a"))
        await begun.wait()
        rest = await asyncio.gather(*(ask(c, "a") for _ in range(5)))
        assert ["redis-asgi; fwd=miss", *["redis-asgi; fwd=miss; collapsed"] * 5] == [
            cache_status(answer) for answer in (await first, *rest)
        ]
    assert 1 == spy.calls
    assert not own_server.client().keys("*")


async def test_an_unknown_model_leaves_little_in_redis(redis_url: str) -> None:
    """Whoever names models that the app does not have leaves one short key of ten minutes for each."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, b"{}", 404)

    app = EmbeddingCacheMiddleware(refuse, settings=settings_of(redis_url))
    store = sync_redis.Redis.from_url(redis_url)
    body = {"model": "none", "input": ["a"]}
    async with client(app) as c:
        stored_only = {"cache-control": "only-if-cached"}
        assert 504 == (await c.post("/v1/embeddings", json=body, headers=stored_only)).status_code
        assert not store.keys("*")
        assert 404 == (await c.post("/v1/embeddings", json=body)).status_code
    [epoch] = store.scan_iter()
    assert epoch.startswith(b"embedding_epoch:v1:")
    assert 0 < store.ttl(epoch) <= 600
    store.close()


async def test_a_foreign_type_under_our_key_is_the_apps_answer(redis_url: str) -> None:
    """MGET gives nothing for a hash: a miss, and the write replaces it."""
    app = EmbeddingCacheMiddleware(server(Spy()), settings=settings_of(redis_url))
    store = sync_redis.Redis.from_url(redis_url)
    async with client(app) as c:
        await ask(c, "a")
        [key] = store.scan_iter("embedding_input:*")
        for damage in (
            b"",
            b"\x45\x31\xc0\x7f",
            b"x" * 48,
            cast("bytes", store.getrange(key, 0, -5)) + b"\x00\x00\xc0\x7f",
        ):
            store.set(key, damage)
            assert "fwd=miss; stored" in cache_status(await ask(c, "a"))
        store.delete(key)
        store.hset(key, "a", "b")
        assert "fwd=miss; stored" in cache_status(await ask(c, "a"))
        assert "hit" in cache_status(await ask(c, "a"))
        [lease] = store.scan_iter("embedding_lease:*")
        for damage in (b"", b"null", b'{"v":1}', b'{"v":1,"at":"x","headers":[["a"]],"frame":{}}', b"\xff"):
            store.set(lease, damage)
            assert "detail=lease" in cache_status(await ask(c, "a"))
        [epoch] = store.scan_iter("embedding_epoch:*")
        store.set(epoch, b"short")
        assert "fwd=miss" in cache_status(await ask(c, "a"))
    store.close()


async def test_a_key_that_a_proxy_cannot_reach_is_a_miss() -> None:
    """Envoy puts an error into MGET's reply for each value whose server is gone, epoch and lease
    among them.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        commands = hiredis.Reader()
        while sent := await reader.read(65536):
            commands.feed(sent)
            while (command := commands.gets()) is not False:
                keys = command[1:] if command[0] == b"MGET" else []
                writer.write(b"*%d\r\n" % len(keys) + b"-upstream failure\r\n" * len(keys) if keys else b"+OK\r\n")
        writer.close()

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0)
    manager = RedisManager(settings_of(f"redis://127.0.0.1:{proxy.sockets[0].getsockname()[1]}/0"))
    async with client(EmbeddingCacheMiddleware(server(Spy()), redis=manager)) as c:
        for _ in range(2):
            assert "redis-asgi; fwd=miss" == cache_status(await ask(c, "a"))
    assert await EmbeddingCache(manager).get_embedding("a") is None
    await manager.close()
    proxy.close()
    await proxy.wait_closed()


async def test_a_flush_that_redis_did_not_take_is_an_error() -> None:
    """Whoever flushes has to know."""
    with pytest.raises(FlushError, match="connection"):
        await flush_model("m", settings=settings_of("redis://127.0.0.1:1/0"))


async def test_embedding_cache_survives_everything(own_server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Trouble is ``None``, ``False``, ``{}`` and 0, one log line, and everything is computed."""
    patient = EmbeddingCache(settings=settings_of(own_server.url))
    cache = EmbeddingCache(settings=settings_of(own_server.url, EMBEDDING_CACHE_TIMEOUT=0.05))
    assert await patient.set_embedding("a", [1.0])
    own_server.pause()
    caplog.set_level(logging.WARNING)
    assert await cache.get_embedding("a") is None
    assert not await cache.set_embedding("a", [2.0])
    assert not await cache.delete_embedding("a")
    assert {} == await cache.get_many(["a"])
    assert 0 == await cache.set_many({"a": [2.0]})
    assert 0 == await cache.delete_many(["a"])
    assert [[5.0]] == (await cache.get_or_compute(["a"], lambda ids: [[5.0]] * len(ids))).tolist()
    own_server.resume()
    assert 1 == len(caplog.records)


async def test_large_lookups_are_chunked(own_server: Server) -> None:
    """600 keys are three MGETs in one trip, 600 writes ten pipelines."""
    manager = RedisManager(settings_of(own_server.url))
    store = manager.per_client(RedisVectors)
    names = [b"k%d" % n for n in range(600)]
    assert 600 == (await store.write([Write(name, name, 60) for name in names])).count
    own_server.client().config_resetstat()
    found = await store.lookup([*names, b"absent"], 1)
    stats = own_server.client().info("commandstats")
    assert [*names, None] == found
    assert 3 == stats["cmdstat_mget"]["calls"]
    assert 600 == (await store.delete(names, 1)).count
    await manager.close()


@pytest.mark.parametrize("how", ["cancelled", "too late"])
async def test_a_lookup_cut_short_leaves_its_reply_to_nobody(own_server: Server, how: str) -> None:
    """The reply of an abandoned lookup comes when the server goes on:
    whoever asks next gets their own.
    """
    manager = RedisManager(settings_of(own_server.url, REDIS_POOL_SIZE=1))
    store = manager.per_client(RedisVectors)
    assert 2 == (await store.write([Write(b"a", b"of a", 60), Write(b"b", b"of b", 60)])).count
    own_server.pause()
    if how == "cancelled":
        task = asyncio.create_task(store.lookup([b"a"], 60))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        assert Failure.TIMEOUT == await store.lookup([b"a"], 0.01)
    own_server.resume()
    assert [[b"of b"]] * 3 == [await store.lookup([b"b"], 5) for _ in range(3)]
    await manager.close()


@pytest.mark.parametrize(
    "options", [{}, {"decode_responses": True}, {"single_connection_client": True}, {"protocol": 3}]
)
async def test_a_client_of_the_users_may_be_of_any_kind(redis_url: str, options: dict[str, Any]) -> None:
    """Vectors come back as bytes, and its connections are as they were."""
    user_client = aioredis.Redis.from_url(redis_url, socket_timeout=7.5, **options)
    cache = EmbeddingCache(user_client, settings=Settings())
    assert await cache.set_embedding("a", [0.5, 2.0])
    found = await cache.get_embedding("a")
    assert found is not None
    assert [0.5, 2.0] == found.tolist()
    assert await cache.delete_embedding("a")
    connection = await user_client.connection_pool.get_connection()
    assert 7.5 == connection.socket_timeout
    await user_client.connection_pool.release(connection)
    await user_client.aclose()
    await user_client.connection_pool.disconnect()


def test_the_memory_store_is_bounded_and_ends_values() -> None:
    """``memory://``: the least recently used values go, and time ends the others."""

    async def story() -> None:
        now = [0.0]
        store = MemoryVectors(Settings(), lambda: now[0])
        for n in range(100):
            await store.write([Write(b"%d" % n, bytes(1024 * 1024), 60)])
            await store.lookup([b"0"], 1)
        assert store.bytes <= 64 * 1024 * 1024
        assert [True, False, True] == [v is not None for v in await store.lookup([b"0", b"1", b"99"], 1)]
        now[0] = 61.0
        assert [None, None] == await store.lookup([b"0", b"99"], 1)
        assert 0 == (await store.delete([b"0"], 1)).count

    asyncio.run(story())


async def test_a_cluster_keeps_vectors_on_all_its_nodes(cluster: Cluster) -> None:
    """Lookups and writes are one pipeline per node; cold then warm as anywhere."""
    spy = Spy()
    settings = settings_of(cluster.url, REDIS_CLUSTER=True, EMBEDDING_CACHE_TIMEOUT=5)
    app = EmbeddingCacheMiddleware(server(spy), settings=settings)
    items = [f"text {n}" for n in range(300)]
    async with client(app) as c:
        assert "fwd=miss; stored" in cache_status(await ask(c, *items))
        assert "hit" in cache_status(await ask(c, *items))
        assert "hit=300 miss=1" in cache_status(await ask(c, *items, "one more"))
    assert 2 == spy.calls
    user_client = aioredis.RedisCluster.from_url(cluster.url, decode_responses=True)
    await user_client.initialize()
    cache = EmbeddingCache(user_client, settings=Settings())
    assert 50 == await cache.set_many({str(n): [float(n)] for n in range(50)})
    assert 50 == len(await cache.get_many(map(str, range(50))))
    assert 50 == await cache.delete_many(map(str, range(50)))
    await user_client.aclose()


async def test_a_refused_lookup_says_why(redis_url: str) -> None:
    """A failure is a value of a small closed set."""
    manager = RedisManager(settings_of("redis://127.0.0.1:1/0"))
    assert Failure.CONNECTION == await manager.per_client(RedisVectors).lookup([b"a"], 1)
    await manager.close()
