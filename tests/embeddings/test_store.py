"""The store of vectors: what a server may answer,
and what becomes of the rest when part of it is gone.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import hiredis
import pytest
import redis.asyncio as aioredis

from redis_asgi import EmbeddingCache, EmbeddingCacheMiddleware, Settings
from redis_asgi.connection.manager import RedisManager
from redis_asgi.connection.redis_argument import resolve_manager
from redis_asgi.embeddings.storage.operations import VectorStore, Write, WriteResult
from redis_asgi.embeddings.storage.store import vectors_of
from redis_asgi.errors import Failure

from ..kit.embedding_apps import Spy, cache_status, client, server
from ..kit.logs import event_of
from ..kit.servers import ExternalServer, Server
from .test_faults import ask, settings_of

pytestmark = [pytest.mark.anyio, pytest.mark.server]


@asynccontextmanager
async def answering(said: bytes) -> AsyncIterator[str]:
    """The URL of a server that greets well and answers every other command with *said*."""
    talks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.add(cast("asyncio.Task[None]", asyncio.current_task()))
        commands = hiredis.Reader()
        while sent := await reader.read(65536):
            commands.feed(sent)
            while (command := commands.gets()) is not False:
                writer.write(b"+OK\r\n" if command[0] in (b"CLIENT", b"HELLO", b"PING") else said)
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()
        if talks:
            await asyncio.wait(talks, timeout=5)


OPERATIONS: dict[str, Callable[[VectorStore], Awaitable[Any]]] = {
    "lookup": lambda store: store.lookup([b"a", b"b"], 5),
    "claim": lambda store: store.claim(Write(b"a", b"1", 60, "absent"), 5),
    "write": lambda store: store.write([Write(b"a", b"1", 60)], 5),
    "renew": lambda store: store.write([Write(b"a", b"", 60, "renew")], 5),
    "delete": lambda store: store.delete([b"a"], 5),
}
FAILED = {"lookup": Failure.REPLY, "claim": None} | dict.fromkeys(
    ("write", "renew", "delete"), WriteResult(0, Failure.REPLY)
)
ODD = {
    "an integer": (b":42\r\n", {"delete", "renew"}),
    "a status": (b"+OK\r\n", {"write", "claim"}),
    "no list": (b"*-1\r\n", set[str]()),
    "an empty list": (b"*0\r\n", set[str]()),
    "a short list": (b"*1\r\n$1\r\na\r\n", set[str]()),
    "a long list": (b"*3\r\n$-1\r\n$-1\r\n$-1\r\n", set[str]()),
    "integers for values": (b"*2\r\n:1\r\n:2\r\n", set[str]()),
    "lists for values": (b"*2\r\n*1\r\n$1\r\na\r\n$-1\r\n", set[str]()),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", ODD)
@pytest.mark.parametrize("whose", ["ours", "the user's"])
async def test_a_reply_of_another_shape_is_a_failure(operation: str, shape: str, whose: str) -> None:
    """Whatever a command cannot be answered by, and whoever made the client:
    a value that says so, never an error.
    """
    said, fitting = ODD[shape]
    if operation in fitting:
        return
    async with answering(said) as url:
        theirs = aioredis.Redis.from_url(url)
        manager = RedisManager(Settings(REDIS_URL=url)) if whose == "ours" else resolve_manager(theirs, Settings())[0]
        for _ in range(8):
            assert FAILED[operation] == await OPERATIONS[operation](vectors_of(manager))
        await manager.close()
        await theirs.aclose()


@pytest.mark.parametrize("shape", ODD)
async def test_odd_replies_never_reach_a_client(shape: str) -> None:
    """The app's own answers, and what the other cache gives without Redis."""
    async with answering(ODD[shape][0]) as url:
        manager = RedisManager(settings_of(url))
        async with client(EmbeddingCacheMiddleware(server(Spy()), redis=manager)) as c:
            for _ in range(8):
                assert "redis-asgi; fwd=bypass; detail=redis-down" == cache_status(await ask(c, "a", "b"))
        cache = EmbeddingCache(manager)
        assert [[1.0]] == (await cache.get_or_compute(["a"], lambda _: [[1.0]])).tolist()
        assert await cache.get_embedding("a") is None
        await manager.close()


async def test_a_server_that_enforces_slots_has_its_keys_apart(
    slots_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """The refused lookup is sent once more in time;
    the breaker hears nothing, and the log says it once.
    """
    manager = RedisManager(settings_of(slots_server.url))
    spy = Spy()
    async with client(EmbeddingCacheMiddleware(server(spy), redis=manager)) as c:
        assert "redis-asgi; fwd=miss; stored" == cache_status(await ask(c, "a", "b"))
        for _ in range(30):
            assert "redis-asgi; hit" in cache_status(await ask(c, "a", "b"))
    assert 1 == spy.calls
    assert "closed" == manager.breaker_state
    assert manager.keys_apart
    assert ["redis_asgi.slots_enforced"] == [event_of(r) for r in caplog.records if r.name == "redis_asgi.connection"]
    rejected = slots_server.client().info("commandstats")["cmdstat_mget"]["rejected_calls"]
    assert 1 == rejected
    cache = EmbeddingCache(manager)
    assert 300 == await cache.set_many({str(number): [float(number)] for number in range(300)})
    assert 300 == len(await cache.get_many([str(number) for number in range(300)]))
    assert 300 == await cache.delete_many([str(number) for number in range(300)])
    await manager.close()


async def test_a_users_client_of_such_a_server_learns_the_same(slots_server: Server) -> None:
    """redis-py strips the word that says it."""
    theirs = aioredis.Redis.from_url(slots_server.url)
    manager = resolve_manager(theirs, Settings())[0]
    assert [None, None] == await vectors_of(manager).lookup([b"a", b"b"], 5)
    assert manager.keys_apart
    assert "closed" == manager.breaker_state
    await theirs.aclose()


@pytest.mark.parametrize("batch", ["auto", "key"])
async def test_keys_go_together_unless_told_otherwise(redis_server: ExternalServer, batch: str) -> None:
    """One command for up to 256 keys, or one for each in the same trip."""
    manager = RedisManager(settings_of(redis_server.url, REDIS_BATCH=batch))
    store = vectors_of(manager)
    names = [b"k%d" % number for number in range(300)]
    await store.write([Write(name, name, 60) for name in names])
    before = redis_server.calls("mget")
    assert [*names, None] == await store.lookup([*names, b"absent"], 5)
    assert {"auto": 2, "key": 301}[batch] == redis_server.calls("mget") - before
    await manager.close()
