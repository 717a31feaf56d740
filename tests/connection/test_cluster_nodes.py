"""Where a cluster is: of several addresses the first to answer is believed,
and what was given is never forgotten.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis.asyncio as aioredis
from redis.crc import key_slot
from redis.exceptions import AuthenticationError, RedisClusterException, RedisError

from redis_asgi import RateLimiter, RedisManager, Settings, check_redis_health
from redis_asgi.connection.cluster_nodes import Nodes
from redis_asgi.embeddings.storage.store import vectors_of
from redis_asgi.errors import Failure
from redis_asgi.inspection.diagnosis import diagnose
from redis_asgi.ratelimit.limits.policy import make_partition

from ..conftest import StartServer
from ..kit.fair_time import fair_time
from ..kit.logs import event_of
from ..kit.patience import PATIENCE
from ..kit.proxy import FaultProxy
from ..kit.servers import Cluster, Server

pytestmark = pytest.mark.anyio

NOBODY = "127.0.0.1:1"


@asynccontextmanager
async def cluster_of(*addresses: str, **more: Any) -> AsyncIterator[RedisManager]:
    """A manager of the cluster that has nodes at *addresses*."""
    manager = RedisManager(Settings(REDIS_CLUSTER=True, REDIS_CLUSTER_NODES=addresses, **more))
    try:
        yield manager
    finally:
        await manager.close()


def address_of(server: Server) -> str:
    """Where *server* listens."""
    return f"{server.host}:{server.port}"


def client_on(cluster: Cluster, node: Server) -> str:
    """A client whose counters are on *node*."""
    names = (f"client-{i}" for i in range(1000))
    return next(name for name in names if cluster.node_of(make_partition("custom", name).key) is node)


async def until_redis(limiter: RateLimiter, name: str) -> None:
    """Ask until Redis decides about *name*."""
    async with asyncio.timeout(2 * PATIENCE):
        while (await limiter.consume(name, "1000/minute")).source != "redis":
            await asyncio.sleep(0.02)


async def test_one_address_that_answers_is_enough(cluster: Cluster) -> None:
    """Others may refuse, or be no node of a cluster; IPv6 addresses stand in brackets."""
    async with cluster_of(NOBODY, "[::1]:1", address_of(cluster.nodes[2])) as manager:
        client = await manager.get_connection()
        assert isinstance(client, aioredis.RedisCluster)
        assert await client.set("a", b"1")
        assert {node.port for node in cluster.nodes} == {node.port for node in client.get_primaries()}


async def test_a_single_server_among_the_addresses_is_passed_over(
    cluster: Cluster, private_server: StartServer
) -> None:
    """It says that it is no cluster, and the next one is asked;
    when nobody is, that is what is told.
    """
    other = private_server()
    async with cluster_of(address_of(other), address_of(cluster.nodes[0])) as manager:
        assert await (await manager.get_connection()).set("a", b"1")
    async with cluster_of(address_of(other), NOBODY) as manager:
        with pytest.raises(RedisClusterException, match="not enabled"):
            await (await manager.get_connection()).set("a", b"1")


@pytest.mark.parametrize("arguments", [(), ("--rename-command", "CLUSTER", "")], ids=["disabled", "renamed"])
async def test_the_only_address_that_tells_nothing_of_a_cluster_has_all_keys(
    private_server: StartServer, caplog: pytest.LogCaptureFixture, arguments: tuple[str, ...]
) -> None:
    """Such as an endpoint for several shards: counts and vectors are right there,
    and one line says what to set.
    """
    server = private_server(*arguments)
    async with cluster_of(address_of(server)) as manager:
        limiter = RateLimiter(manager)
        names = [f"client-{i % 5}" for i in range(20)]
        decisions = await asyncio.gather(*(limiter.consume(name, "3/minute") for name in names))
        assert ({"redis"}, 15) == ({each.source for each in decisions}, sum(each.allowed for each in decisions))
        client = await manager.get_connection()
        assert isinstance(client, aioredis.RedisCluster)
        await client.nodes_manager.initialize()
        assert await client.set("a", b"1")
        assert 6 == len(server.client().keys())
        assert (await check_redis_health(client))["status"] == "healthy"

    said = [record for record in caplog.records if record.levelname == "WARNING"]
    assert ["redis_asgi.no_cluster"] == [event_of(record) for record in said]
    assert "Unset REDIS_CLUSTER" in said[0].getMessage()


async def test_a_right_to_the_slot_table_that_lacks_is_told(private_cluster: Cluster) -> None:
    """As what it is, also where redis-py says that there is no cluster."""
    for node in private_cluster.nodes:
        node.add_user("app", ">secret", "~*", "+@all", "-cluster|slots")
    more = {"REDIS_USERNAME": "app", "REDIS_PASSWORD": "secret"}
    async with cluster_of(address_of(private_cluster.nodes[0]), **more) as manager:
        decision = await RateLimiter(manager).consume("somebody")
        assert ("local", "open", Failure.PERMISSION) == (
            decision.source,
            manager.breaker_state,
            manager.breaker_reason,
        )


async def test_nobody_answers() -> None:
    """What the nodes raise is raised, and not waited for."""
    async with cluster_of(NOBODY, "127.0.0.1:2") as manager:
        with pytest.raises(RedisError, match=r"refused|connecting"):
            await (await manager.get_connection()).set("a", b"1")


async def test_a_refused_login_is_told_before_all_else(private_cluster: Cluster) -> None:
    """As it is what can be mended."""
    for node in private_cluster.nodes:
        node.command("CONFIG", "SET", "requirepass", "of-the-nodes")
    async with cluster_of(NOBODY, address_of(private_cluster.nodes[0])) as manager:
        with pytest.raises(AuthenticationError):
            await (await manager.get_connection()).set("a", b"1")


@pytest.mark.parametrize("which", [0, 1, 2])
async def test_a_hung_node_does_not_keep_a_cluster_off(private_cluster: Cluster, which: int) -> None:
    """Whichever it is: limits and vectors of the others are in Redis from the first request on."""
    hung = private_cluster.nodes[which]
    names = {node: client_on(private_cluster, node) for node in private_cluster.nodes}
    hung.pause()
    try:
        addresses = [address_of(node) for node in (hung, *private_cluster.nodes)]
        async with cluster_of(*addresses, EMBEDDING_CACHE_TIMEOUT=5) as manager:
            began = fair_time()
            limiter = RateLimiter(manager, timeout=5)
            well = [name for node, name in names.items() if node is not hung]
            assert ["redis"] * 2 == [(await limiter.consume(name)).source for name in well]
            keys = [make_partition("custom", name).key for name in well]
            assert [None, None] == await vectors_of(manager).lookup([b"x" + key for key in keys], 5)
            assert fair_time() - began < 5  # REDIS_TIMEOUT is 10
            quick = RateLimiter(manager, timeout=0.1)
            assert "local" == (await quick.consume(names[hung])).source
            assert "redis" == (await limiter.consume(well[0])).source
    finally:
        hung.resume()


async def test_the_log_has_one_line_per_outage_and_node(
    private_cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """It names the node, and so does the line when it is back; the limiter and the cache share it."""
    lost, well, _ = private_cluster.nodes
    async with cluster_of(address_of(well), EMBEDDING_CACHE_TIMEOUT=1) as manager:
        limiter = RateLimiter(manager, timeout=1)
        name = client_on(private_cluster, lost)
        await until_redis(limiter, name)
        caplog.clear()
        lost.pause()
        asked: list[asyncio.Task[Any]] = []
        # A deadline that the machine keeps, and still a short test:
        # the next are sent while others wait for theirs.
        for _ in range(10):
            asked.append(asyncio.create_task(limiter.consume(name, "1000/minute")))
            key = make_partition("custom", name).key
            asked.append(asyncio.create_task(vectors_of(manager).lookup([key], 1)))
            await asyncio.sleep(0.11)
        await asyncio.gather(*asked)
        assert "open" == manager.breaker_state
        lost.resume()
        async with asyncio.timeout(2 * PATIENCE):
            while "redis_asgi.redis_back" not in map(event_of, caplog.records):
                await limiter.consume(name, "1000/minute")
                await asyncio.sleep(0.02)
    told = [(event_of(record), record.__dict__.get("node")) for record in caplog.records]
    assert [("redis_asgi.redis_unavailable", address_of(lost)), ("redis_asgi.redis_back", address_of(lost))] == told


async def test_a_cluster_that_comes_late_is_said_to_be_back(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """One line for all of it when nobody is there at the start, and one when it is,
    which no request has to bring.
    """
    node = cluster.nodes[0]
    async with FaultProxy(node.host, node.port) as proxy, cluster_of(f"127.0.0.1:{proxy.port}") as manager:
        await proxy.set("refuse")
        limiter = RateLimiter(manager, timeout=0.1)
        for _ in range(10):
            assert "local" == (await limiter.consume("a", "1000/minute")).source
        await proxy.set("pass")
        await until_redis(RateLimiter(manager), "a")
        async with asyncio.timeout(2 * PATIENCE):
            while len(caplog.messages) < 2:
                await asyncio.sleep(0.02)
        assert "closed" == manager.breaker_state
    told = [(event_of(record), record.__dict__.get("node")) for record in caplog.records]
    assert [("redis_asgi.redis_unavailable", None), ("redis_asgi.redis_back", None)] == told


async def test_slots_of_a_hung_node_are_followed(private_cluster: Cluster) -> None:
    """When others have taken them over, that is found out though the hung node says nothing."""
    hung, taker, third = private_cluster.nodes
    name = client_on(private_cluster, hung)
    slot = key_slot(make_partition("custom", name).key)
    async with cluster_of(*map(address_of, private_cluster.nodes)) as manager:
        limiter = RateLimiter(manager, timeout=0.1)
        await until_redis(limiter, name)
        hung.pause()
        try:
            for node in (taker, third):
                node.command("CLUSTER", "SETSLOT", slot, "NODE", str(taker.client().cluster("myid"), "utf-8"))
            await until_redis(limiter, name)
        finally:
            hung.resume()


@pytest.mark.slow
async def test_what_was_given_is_not_forgotten(private_server: StartServer) -> None:
    """A cluster that comes back with other addresses is found again by the one that was set."""
    old, new = (private_server("--cluster-enabled", "yes") for _ in range(2))
    for server in (old, new):
        server.own_all_slots()
    async with FaultProxy(old.host, old.port) as proxy, cluster_of(f"127.0.0.1:{proxy.port}") as manager:
        limiter = RateLimiter(manager, timeout=0.2)
        await until_redis(limiter, "a")
        proxy.lead_to(new.host, new.port)
        old.kill()
        await until_redis(limiter, "a")
        assert 1 == new.client().dbsize()
        assert "closed" == manager.breaker_state


async def test_nodes_that_stay_keep_their_connections(cluster: Cluster) -> None:
    """Reading the slot table again makes none anew but its own."""
    async with cluster_of(address_of(cluster.nodes[0])) as manager:
        client = await manager.get_connection()
        assert isinstance(client, aioredis.RedisCluster)
        await client.ping(target_nodes=client.get_primaries())
        before = {node.name: list(node._connections) for node in client.get_primaries()}
        assert isinstance(client.nodes_manager, Nodes)
        await client.nodes_manager.initialize()
        assert before == {node.name: list(node._connections) for node in client.get_primaries()}
        assert not any(connection.should_reconnect() for each in before.values() for connection in each)


async def test_check_names_the_addresses(cluster: Cluster) -> None:
    """``redis-asgi check`` says where it has looked, whether it is there or not."""
    well = Settings(REDIS_CLUSTER=True, REDIS_CLUSTER_NODES=[NOBODY, address_of(cluster.nodes[0])])
    ill = Settings(REDIS_CLUSTER=True, REDIS_CLUSTER_NODES=[NOBODY])
    (found,) = [each async for each in diagnose(well) if each.check == "connection"]
    (missed,) = [each async for each in diagnose(ill) if each.check == "connection"]

    assert (True, "ok") == (address_of(cluster.nodes[0]) in found.text, found.level)
    assert ("fail", True) == (missed.level, f"cluster {NOBODY} refuses connections" in missed.text)
