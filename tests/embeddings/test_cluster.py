"""Vectors on a cluster: what happens to a node costs its own keys only,
and what is unknown is never taken for none.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.asyncio as aioredis
from redis.crc import key_slot

from redis_asgi import EmbeddingCache, EmbeddingCacheMiddleware, Settings
from redis_asgi.connection.manager import RedisManager
from redis_asgi.connection.redis_argument import resolve_manager
from redis_asgi.embeddings.storage.operations import UNKNOWN, VectorStore, Write, WriteResult
from redis_asgi.embeddings.storage.store import vectors_of
from redis_asgi.errors import Failure

from ..kit.embedding_apps import Spy, cache_status, client, server
from ..kit.fair_time import fair_time
from ..kit.logs import event_of
from ..kit.patience import PATIENCE
from ..kit.servers import Cluster, Server
from .test_faults import ask, settings_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def settings(private_cluster: Cluster) -> Settings:
    """Of a cluster that may be harmed, without the in-process layer, which would hide it."""
    return settings_of(private_cluster.url, REDIS_CLUSTER=True, EMBEDDING_CACHE_TIMEOUT=0.2)


@pytest.fixture
async def manager(settings: Settings) -> AsyncIterator[RedisManager]:
    """One of the test's own."""
    manager = RedisManager(settings)
    yield manager
    await manager.close()


def names_of(cluster: Cluster, node: Server, count: int, prefix: str = "k") -> list[bytes]:
    """Keys that *node* serves."""
    found: list[bytes] = []
    number = 0
    while len(found) < count:
        name = b"%s%d" % (prefix.encode(), number)
        number += 1
        if cluster.node_of(name) is node:
            found.append(name)
    return found


def harm(node: Server, how: str) -> None:
    """Let *node* answer no more."""
    if how == "hung":
        node.pause()
    else:
        node.kill()


async def filled(cluster: Cluster, store: VectorStore) -> dict[Server, list[bytes]]:
    """Twenty keys of each node, all written."""
    names = {node: names_of(cluster, node, 20) for node in cluster.nodes}
    every = [name for each in names.values() for name in each]
    assert WriteResult(60) == await store.write([Write(name, b"of " + name, 60) for name in every], 5)
    assert [b"of " + name for name in every] == await store.lookup(every, 5)
    return names


@pytest.mark.parametrize("how", ["hung", "dead"])
async def test_a_node_that_does_not_answer_costs_its_own_keys_only(
    private_cluster: Cluster, manager: RedisManager, how: str
) -> None:
    """Unknown, not written and not deleted there; the others as ever, and soon nobody waits for it."""
    store = vectors_of(manager)
    names = await filled(private_cluster, store)
    lost, *well = private_cluster.nodes
    every = [name for three in zip(*names.values(), strict=True) for name in three]
    harm(lost, how)
    expected = [UNKNOWN if name in names[lost] else b"of " + name for name in every]
    waits = []
    for _ in range(12):
        began = fair_time()
        assert expected == await store.lookup(every, 0.2)
        waits.append(fair_time() - began)
    assert sorted(waits)[5] < 0.1
    began = fair_time()
    done = await store.write([Write(name, b"new", 60) for name in every])
    assert 40 == done.count
    assert done.failure in (Failure.TIMEOUT, Failure.CONNECTION)
    assert fair_time() - began < 1
    assert store.writable
    assert b"new" == await store.claim(Write(names[well[0]][0], b"1", 60, "absent"), 0.2)
    assert await store.claim(Write(names[lost][0], b"1", 60, "absent"), 0.2) is None
    assert 40 == (await store.delete(every, 0.2)).count
    assert isinstance(await store.lookup(names[lost], 0.2), Failure)


async def test_a_node_is_not_written_to_right_after_it_has_not_answered(
    private_cluster: Cluster, manager: RedisManager
) -> None:
    """A write has a longer deadline than a lookup, and the neighbours' would wait for it."""
    store = vectors_of(manager)
    names = await filled(private_cluster, store)
    lost = private_cluster.nodes[0]
    lost.pause()
    assert UNKNOWN in await store.lookup([each[0] for each in names.values()], 0.05)
    began = fair_time()
    assert 2 == (await store.write([Write(each[0], b"new", 60) for each in names.values()], 10)).count
    assert fair_time() - began < 1
    lost.resume()
    async with asyncio.timeout(PATIENCE):
        while await store.write([Write(names[lost][0], b"new", 60)]) != WriteResult(1):
            await asyncio.sleep(0.05)


async def test_the_log_says_which_node_is_lost_and_back(
    private_cluster: Cluster, manager: RedisManager, caplog: pytest.LogCaptureFixture
) -> None:
    """One line for each, however many commands met it."""
    store = vectors_of(manager)
    names = await filled(private_cluster, store)
    lost = private_cluster.nodes[2]
    every = [name for each in names.values() for name in each]
    lost.pause()
    for _ in range(10):
        await store.lookup(every, 0.05)
    lost.resume()
    async with asyncio.timeout(PATIENCE):
        while "redis_asgi.redis_back" not in map(event_of, caplog.records):
            await store.lookup(every, 0.2)
            await asyncio.sleep(0.05)
    told = [(event_of(record), record.__dict__["node"]) for record in caplog.records]
    node = f"{lost.host}:{lost.port}"
    assert [("redis_asgi.redis_unavailable", node), ("redis_asgi.redis_back", node)] == told


async def test_all_nodes_gone_is_a_failure(private_cluster: Cluster, manager: RedisManager) -> None:
    """As one server that is gone is."""
    store = vectors_of(manager)
    names = await filled(private_cluster, store)
    for node in private_cluster.nodes:
        node.pause()
    every = [each[0] for each in names.values()]
    assert Failure.TIMEOUT == await store.lookup(every, 0.1)
    assert WriteResult(0, Failure.TIMEOUT) == await store.delete(every, 0.1)
    for node in private_cluster.nodes:
        node.resume()


async def test_without_a_slot_table_nobody_waits_longer_than_he_may(
    private_cluster: Cluster, manager: RedisManager
) -> None:
    """It is read in the background, once for all, and no deadline of a request begins it anew."""
    store = vectors_of(manager)
    for node in private_cluster.nodes:
        node.pause()
    began = fair_time()
    results = await asyncio.gather(*(store.lookup([b"a"], 0.05) for _ in range(3)))
    assert [Failure.TIMEOUT] * 3 == results
    assert await store.claim(Write(b"a", b"1", 60, "absent"), 0.05) is None
    assert fair_time() - began < 1
    for node in private_cluster.nodes:
        node.resume()
    async with asyncio.timeout(PATIENCE):
        while await store.lookup([b"a"], 1) != [None]:
            await asyncio.sleep(0.05)


async def test_closing_while_the_slot_table_is_read_cancels_nobody_else() -> None:
    """Whoever waits for it is told that there is none."""
    reached, left = asyncio.Event(), asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.set()
        await reader.read()
        writer.close()
        await writer.wait_closed()
        left.set()

    listener = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    manager = RedisManager(settings_of(url, REDIS_CLUSTER=True))
    lookup = asyncio.ensure_future(vectors_of(manager).lookup([b"a"], 10))
    await reached.wait()
    await manager.close()
    assert Failure.CONNECTION == await lookup
    async with asyncio.timeout(PATIENCE):
        await left.wait()
    listener.close()


@pytest.mark.parametrize("whose", ["ours", "the user's"])
async def test_a_slot_that_moves_is_followed(cluster: Cluster, whose: str) -> None:
    """A key that another node serves now is read, written and deleted there."""
    settings = settings_of(cluster.url, REDIS_CLUSTER=True)
    theirs = aioredis.RedisCluster.from_url(cluster.url, decode_responses=True)
    manager = RedisManager(settings) if whose == "ours" else resolve_manager(theirs, Settings())[0]
    store = vectors_of(manager)
    name = names_of(cluster, cluster.nodes[0], 1)[0]
    try:
        for turn, to in enumerate((cluster.nodes[1], cluster.nodes[0])):
            value = b"\xff%d" % turn
            assert WriteResult(1) == await store.write([Write(name, value, 60)], 5)
            cluster.move_slot(key_slot(name), to)
            if turn == 1:
                assert WriteResult(1) == await store.write([Write(name, value, 60)], 5)
            assert [value] == await store.lookup([name], 5)
        assert WriteResult(1) == await store.delete([name], 5)
    finally:
        await manager.close()
        await theirs.aclose()


async def test_a_slot_that_nobody_serves_is_unknown(private_cluster: Cluster, manager: RedisManager) -> None:
    """The rest of the cluster goes on."""
    store = vectors_of(manager)
    names = await filled(private_cluster, store)
    gone, there = names[private_cluster.nodes[0]][0], names[private_cluster.nodes[1]][0]
    client = await manager.get_connection()
    assert isinstance(client, aioredis.RedisCluster)
    del client.nodes_manager.slots_cache[key_slot(gone)]
    assert [UNKNOWN, b"of " + there] == await store.lookup([gone, there], 5)


async def test_a_value_of_another_type_is_its_own_keys_trouble(private_cluster: Cluster, manager: RedisManager) -> None:
    """Unknown, as whoever needs to know that there is none must not take it for that."""
    store = vectors_of(manager)
    names = await filled(private_cluster, store)
    odd, good = names[private_cluster.nodes[0]][:2]
    private_cluster.nodes[0].command("DEL", odd)
    private_cluster.nodes[0].command("HSET", odd, "a", "b")
    assert [UNKNOWN, b"of " + good] == await store.lookup([odd, good], 5)


@pytest.mark.parametrize("whose", ["ours", "the user's"])
async def test_the_middleware_goes_on_with_the_other_nodes(
    private_cluster: Cluster, settings: Settings, whose: str
) -> None:
    """What the hung node has is computed; the rest are hits; when it is back, so is everything."""
    theirs = aioredis.RedisCluster.from_url(private_cluster.url)
    redis: Any = RedisManager(settings) if whose == "ours" else theirs
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), redis=redis, settings=settings)
    items = [f"text {number}" for number in range(60)]
    async with client(app) as c:
        await ask(c, *items)
        assert "hit" in cache_status(await ask(c, *items))
        records = {
            node: [str(name) for name in node.client().keys("embedding_[el]*")] for node in private_cluster.nodes
        }
        lost = next(node for node, names in records.items() if not names)
        lost.pause()
        before = spy.calls
        for _ in range(10):
            assert "redis-asgi; fwd=partial" in cache_status(await ask(c, *items))
        assert 10 == spy.calls - before
        lost.resume()
        async with asyncio.timeout(PATIENCE):
            while "redis-asgi; hit" not in cache_status(await ask(c, *items)):
                await asyncio.sleep(0.05)
    await theirs.aclose()


async def test_without_its_epoch_nothing_of_a_model_is_used_or_stored(
    private_cluster: Cluster, settings: Settings
) -> None:
    """An epoch that is unknown is none, and the app is asked for everything."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=settings)
    items = [f"text {number}" for number in range(30)]
    async with client(app) as c:
        await ask(c, *items)
        lost = next(node for node in private_cluster.nodes if node.client().keys("embedding_epoch:*"))
        others = [node for node in private_cluster.nodes if node is not lost]
        lost.pause()
        for node in others:
            node.flush()
        for _ in range(8):
            status = cache_status(await ask(c, *items))
            assert "hit" not in status
            assert "stored" not in status
        assert [0, 0] == [node.client().dbsize() for node in others]
        lost.resume()


async def test_vectors_by_id_go_on_with_the_other_nodes(private_cluster: Cluster, manager: RedisManager) -> None:
    """Found and kept where there is a node; computed where there is none."""
    cache = EmbeddingCache(manager)
    ids = [str(number) for number in range(30)]
    assert 30 == await cache.set_many({name: [float(name)] for name in ids})
    lost = private_cluster.nodes[1]
    theirs = [name for name in ids if private_cluster.node_of(f"embedding:{name}") is lost]
    lost.pause()
    assert {name for name in ids if name not in theirs} == set(await cache.get_many(ids))
    asked: list[str] = []

    async def compute(missing: list[str]) -> list[list[float]]:
        asked.extend(missing)
        return [[float(name)] for name in missing]

    assert [[float(name)] for name in ids] == (await cache.get_or_compute(ids, compute)).tolist()
    assert theirs == asked
    assert 30 - len(theirs) == await cache.delete_many(ids)
    lost.resume()
