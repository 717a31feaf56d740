"""Health behind sentinels and of a cluster."""

import asyncio
from datetime import UTC, datetime

import pytest
import redis.asyncio as aioredis
from redis.asyncio.cluster import ClusterNode

from redis_asgi import (
    RedisManager,
    Settings,
    check_redis_health,
    health_app,
)
from redis_asgi.asgi.sub_app import SubApp
from redis_asgi.connection.health_check import Checkup, _slots

from ..kit.patience import PATIENCE
from ..kit.servers import Cluster, SentinelTrio, Server, wait_until
from .probes import DEADLINE, assert_ill, forget, hurry, probe

pytestmark = pytest.mark.anyio


async def test_sentinel(sentinels: SentinelTrio) -> None:
    """The master is asked; what it has become after a failover is asked too;
    no master is ``redis_cluster``.
    """
    manager = RedisManager(Settings(REDIS_SENTINELS=sentinels.addresses, REDIS_SENTINEL_MASTER=SentinelTrio.MASTER))
    app = health_app(redis=manager)
    status, body, _ = await probe(app, "/")
    assert (200, "healthy", "sentinel") == (status, body["status"], body["mode"])
    old = sentinels.primary()
    old.kill()
    await assert_soon(app, "degraded")
    wait_until(lambda: sentinels.primary() is not old, "a failover")
    await assert_soon(app, "healthy")
    for sentinel in sentinels.sentinels:
        sentinel.kill()
    await manager.close()
    await assert_ill(health_app(redis=manager), "redis_cluster")


async def assert_soon(app: SubApp, status: str) -> None:
    """*app* says *status* within a few seconds."""
    async with asyncio.timeout(PATIENCE):
        while (await probe(app))[1]["status"] != status:
            await asyncio.sleep(0.1)
            forget(app)


@pytest.mark.parametrize("connected", [False, True], ids=["from the start", "once connected"])
@pytest.mark.usefixtures("shipped_deadlines")
async def test_hung_sentinels(sentinels: SentinelTrio, *, connected: bool) -> None:
    """One of them is not waited for; without any,
    whoever has to find the master first cannot, in time.
    """
    manager = RedisManager(Settings(REDIS_SENTINELS=sentinels.addresses, REDIS_SENTINEL_MASTER=SentinelTrio.MASTER))
    app = health_app(redis=manager)
    if connected:
        assert "healthy" == (await probe(app))[1]["status"]
    sentinels.sentinels[0].pause()
    try:
        if not connected:
            assert "healthy" == (await probe(app))[1]["status"]
            await manager.close()
        for sentinel in sentinels.sentinels[1:]:
            sentinel.pause()
        if connected:
            forget(app)
            assert "healthy" == (await probe(app))[1]["status"]
        else:
            await assert_ill(app, "redis_timeout")
    finally:
        for sentinel in sentinels.sentinels:
            sentinel.resume()


async def test_hung_master(sentinels: SentinelTrio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ill in time while nobody has noticed,
    and well with the next master, though the old one hangs on.
    """
    manager = RedisManager(Settings(REDIS_SENTINELS=sentinels.addresses, REDIS_SENTINEL_MASTER=SentinelTrio.MASTER))
    app = health_app(redis=manager)
    assert "healthy" == (await probe(app))[1]["status"]
    old = sentinels.primary()
    old.pause()
    hurry(app, monkeypatch)
    try:
        forget(app)
        await assert_ill(app, "redis_timeout")
        wait_until(lambda: sentinels.primary() is not old, "a failover")
        await assert_soon(app, "healthy")
    finally:
        old.resume()


async def test_demoted_master_is_left(sentinels: SentinelTrio) -> None:
    """A master that was made a replica, with the connection still open, is asked for no longer."""
    manager = RedisManager(Settings(REDIS_SENTINELS=sentinels.addresses, REDIS_SENTINEL_MASTER=SentinelTrio.MASTER))
    app = health_app(redis=manager)
    assert 200 == (await probe(app))[0]
    old = sentinels.primary()
    sentinels.sentinels[0].command("SENTINEL", "FAILOVER", SentinelTrio.MASTER)
    wait_until(lambda: sentinels.primary() is not old, "a failover")
    # The sentinels would do it too, ten seconds later.
    old.command("REPLICAOF", sentinels.primary().host, sentinels.primary().port)
    await assert_soon(app, "healthy")


async def test_cluster_is_summed_over_its_primaries(cluster: Cluster) -> None:
    """Clients and memory are sums, the save the oldest;
    asked through one node, before and after it is used.
    """
    manager = RedisManager(Settings(REDIS_URL=cluster.url, REDIS_CLUSTER=True))
    status, body, _ = await probe(health_app(redis=manager), "/")
    infos = [node.client().info() for node in cluster.nodes]
    async with aioredis.RedisCluster.from_url(cluster.url, decode_responses=True) as client:
        await client.get("x")
        checked = await check_redis_health(client)

    assert (200, "healthy", "cluster") == (status, body["status"], body["mode"])
    assert body["connected_clients"] == sum(info["connected_clients"] for info in infos)
    memory = sum(info["used_memory"] for info in infos) / 2**20
    assert float(body["used_memory"].rstrip("M")) == pytest.approx(memory, rel=0.2)
    oldest = datetime.fromtimestamp(min(info["rdb_last_save_time"] for info in infos), UTC)
    assert datetime.fromisoformat(body["last_save_time"]) == oldest
    assert ("healthy", "cluster") == (checked["status"], checked["mode"])


async def test_cluster_that_lost_a_node_is_degraded(private_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three nodes serve: degraded, even where Redis is required,
    since most requests are answered.
    """
    manager = RedisManager(Settings(REDIS_URL=private_cluster.url, REDIS_CLUSTER=True))
    app = health_app(redis=manager, require_redis=True)
    assert "healthy" == (await probe(app))[1]["status"]
    private_cluster.nodes[1].kill()
    forget(app)
    await assert_ill(app, "redis_cluster")
    private_cluster.nodes[2].pause()
    hurry(app, monkeypatch)
    try:
        forget(app)
        status, body, seconds = await probe(app)
    finally:
        private_cluster.nodes[2].resume()

    assert "redis_cluster" == body["error"]
    assert status in (200, 503)  # as soon as the last node knows that it is alone, it says so
    assert seconds < DEADLINE + 0.4


@pytest.mark.parametrize("connected", [False, True], ids=["from the start", "once connected"])
@pytest.mark.usefixtures("shipped_deadlines")
async def test_hung_cluster(private_cluster: Cluster, *, connected: bool) -> None:
    """All nodes are asked at the same time: the answer is no later than that of one."""
    app = health_app(redis=RedisManager(Settings(REDIS_URL=private_cluster.url, REDIS_CLUSTER=True)))
    if connected:
        assert "healthy" == (await probe(app))[1]["status"]
        forget(app)
    for node in private_cluster.nodes:
        node.pause()
    try:
        await assert_ill(app, "redis_timeout")
    finally:
        for node in private_cluster.nodes:
            node.resume()


async def test_slot_that_moves_is_no_matter(private_cluster: Cluster) -> None:
    """While an operator moves slots, and after, every one of them is served by somebody."""
    app = health_app(redis=RedisManager(Settings(REDIS_URL=private_cluster.url, REDIS_CLUSTER=True)))
    source, target = private_cluster.nodes[:2]
    target.command("CLUSTER", "SETSLOT", 1, "IMPORTING", source.command("CLUSTER", "MYID"))
    source.command("CLUSTER", "SETSLOT", 1, "MIGRATING", target.command("CLUSTER", "MYID"))
    private_cluster.wait()
    during = (await probe(app))[1]["status"]
    private_cluster.move_slot(1, target)
    private_cluster.wait()
    forget(app)
    after = (await probe(app))[1]["status"]

    assert ["healthy", "healthy"] == [during, after]


async def test_cluster_that_serves_nothing_is_unhealthy(server_binary: str) -> None:
    """With full coverage required, one lost node ends the service;
    nobody at all is a refused connection.
    """
    cluster = Cluster.start(server_binary)
    try:
        manager = RedisManager(Settings(REDIS_URL=cluster.url, REDIS_CLUSTER=True))
        cluster.nodes[2].kill()
        wait_until(lambda: b"cluster_state:fail" in _raw_info(cluster.nodes[0]), "the cluster fails")
        await assert_ill(health_app(redis=manager, require_redis=True), "redis_cluster", status=503)
        await assert_ill(health_app(redis=manager, require_redis=False), "redis_cluster")
        for node in cluster.nodes:
            node.kill()
        app = health_app(redis=manager, require_redis=True)
        forget(app)
        await assert_ill(app, "redis_connection", status=503)
    finally:
        cluster.stop()


def _raw_info(node: Server) -> bytes:
    reply = node.command("CLUSTER", "INFO")
    return reply if isinstance(reply, bytes) else str(reply).replace("'", "").replace(": ", ":").encode()


async def test_cluster_whose_known_primaries_are_gone(private_cluster: Cluster) -> None:
    """The client has not heard of an election:
    the nodes it takes for replicas are asked who serves now.
    """
    async with aioredis.RedisCluster.from_url(private_cluster.url) as client:
        await client.initialize()
        for node in private_cluster.nodes[1:]:
            known = client.get_node(node.host, node.port)
            assert known is not None
            known.server_type = "replica"
        private_cluster.nodes[0].kill()
        checked = await check_redis_health(client)

    assert ("degraded", "redis_cluster") == (checked["status"], checked["error"])


async def test_cluster_that_tells_nothing_of_itself(private_cluster: Cluster) -> None:
    """Where the ACL forbids all but PING, the nodes that are known answer for the cluster."""
    for node in private_cluster.nodes:
        node.add_user("app", ">pw", "+ping")
    nodes = [ClusterNode(node.host, node.port) for node in private_cluster.nodes]
    client = aioredis.RedisCluster(startup_nodes=nodes, username="app", password="pw")
    well = await check_redis_health(client)
    private_cluster.nodes[0].kill()
    ill = await check_redis_health(client)
    await client.aclose()

    assert ("healthy", None, None) == (well["status"], well["error"], well["connected_clients"])
    assert ("degraded", "redis_cluster") == (ill["status"], ill["error"])


async def test_node_that_left_is_forgotten(cluster: Cluster) -> None:
    """A connection to a node that is no longer known is closed with the next check."""
    async with aioredis.RedisCluster.from_url(cluster.url) as client:
        checkup = Checkup(client)
        before = await checkup.run()
        checkup._connections["127.0.0.1", 1] = checkup._connections.pop(next(iter(checkup._connections)))
        after = await checkup.run()
        left = set(checkup._connections)
        await checkup.aclose()

    assert (None, None) == (before.failure, after.failure)
    assert {(node.host, node.port) for node in cluster.nodes} == left


def test_node_without_an_address_is_the_one_that_was_asked() -> None:
    """``CLUSTER SLOTS`` of a node that does not know its own address; slots add up by node."""
    reply = [[0, 9, [b"", 7001, b"id"]], [10, 19, [None, 7001, b"id"]], [20, 24, [b"10.0.0.2", 7002, b"id"], [b"r", 1]]]

    assert {("10.0.0.1", 7001): 20, ("10.0.0.2", 7002): 5} == _slots(reply, "10.0.0.1")
    assert _slots(None, "10.0.0.1") is None
