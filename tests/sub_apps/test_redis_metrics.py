"""`RedisMetrics`: the figures of a Redis, well or not, in every deployment."""

import asyncio
from typing import Any
from urllib.parse import urlsplit

import fakeredis
import pytest
import redis
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from redis_asgi import (
    ConfigurationError,
    RedisManager,
    RedisMetrics,
    Settings,
    metrics_app,
)
from redis_asgi.connection.client_factory import build_client
from redis_asgi.connection.server_info import Health

from ..kit.certificates import Certificates
from ..kit.fair_time import fair_time
from ..kit.patience import PATIENCE
from ..kit.proxy import FaultProxy
from ..kit.servers import Cluster, ExternalServer, SentinelTrio, Server
from .probes import DEADLINE
from .scrapes import KEYS, MEMORY, StartServer, samples, scraped

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("counted")]


CLOSED_PORT = "redis://127.0.0.1:1"


async def test_figures_of_a_fresh_server(private_server: StartServer) -> None:
    """All names are there, memory is in bytes, and without a lookup the hit rate is 0.0."""
    async with aioredis.Redis.from_url(private_server().url) as client:
        figures = await RedisMetrics(client).collect_metrics()

    assert KEYS == list(figures)
    assert (0, 0, 0.0) == (figures["hits"], figures["misses"], figures["hit_rate"])
    assert isinstance(figures["hit_rate"], float)
    assert 100_000 < figures["memory_used"] <= figures["peak_memory"] < 100_000_000
    assert 1 <= figures["clients"] <= 3
    assert ["commands_processed", "expired_keys", "evicted_keys"] == list(figures["operations"])


@pytest.mark.parametrize("options", [{}, {"decode_responses": True}, {"protocol": 3}, {"protocol": 2}], ids=str)
async def test_figures_are_redis_own(redis_server: ExternalServer, options: dict[str, Any]) -> None:
    """Hits, misses and the rate are what the server counted, whatever the client decodes or speaks."""
    looker = redis_server.client()
    looker.set("a", 1)
    for key in ("a", "a", "a", "b"):
        looker.get(key)
    async with aioredis.Redis.from_url(redis_server.url, retry=Retry(NoBackoff(), 0), **options) as client:
        before = await client.info("stats")
        figures = await RedisMetrics(client).collect_metrics()

    assert (3, 1, 0.75) == (figures["hits"], figures["misses"], figures["hit_rate"])
    # What the server counts after the INFO is its connections' own commands.
    assert 0 < figures["operations"]["commands_processed"] - before["total_commands_processed"] < 10
    assert (0, 0) == (figures["operations"]["expired_keys"], figures["operations"]["evicted_keys"])


async def test_figures_of_a_cluster_are_sums(cluster: Cluster) -> None:
    """Over its primaries, however many nodes the client was told of."""
    keys = [next(f"k{i}" for i in range(99) if cluster.node_of(f"k{i}") is node) for node in cluster.nodes]
    for i, (node, key) in enumerate(zip(cluster.nodes, keys, strict=True), 1):
        node.client().set(key, 1)
        for _ in range(i):
            node.client().get(key)
    manager = RedisManager(Settings(REDIS_URL=cluster.url, REDIS_CLUSTER=True))
    await (await manager.get_connection()).initialize()  # as its first command does: it learns of the nodes
    figures = await RedisMetrics(manager).collect_metrics()
    gauges = await samples(metrics_app(redis=manager))

    assert (6, 0, 1.0) == (figures["hits"], figures["misses"], figures["hit_rate"])
    memory = sum(node.client().info("memory")["used_memory"] for node in cluster.nodes)
    assert figures["memory_used"] == pytest.approx(memory, rel=0.2)
    assert 6 == gauges["server_keyspace_hits_total"]
    assert 1 == gauges["redis_up"]
    assert 90 == gauges['redis_pool_connections{state="max"}']


async def test_cluster_that_lost_a_node_gives_no_figures(private_cluster: Cluster) -> None:
    """Sums over the rest would look like counters that were reset."""
    manager = RedisManager(Settings(REDIS_URL=private_cluster.url, REDIS_CLUSTER=True))
    metrics = RedisMetrics(manager)
    assert KEYS == list(await metrics.collect_metrics())
    private_cluster.nodes[2].kill()

    assert {} == await metrics.collect_metrics()


async def timed(metrics: RedisMetrics) -> tuple[dict[str, Any], float]:
    """Figures, and how long they took in seconds."""
    began = fair_time()
    return await metrics.collect_metrics(), fair_time() - began


async def test_dead_redis_gives_no_figures() -> None:
    """Nobody listens: nothing, at once."""
    figures, seconds = await timed(RedisMetrics(CLOSED_PORT))

    assert {} == figures
    assert seconds < DEADLINE


@pytest.mark.usefixtures("shipped_deadlines")
async def test_hung_redis_gives_no_figures_in_time(private_server: StartServer) -> None:
    """The kernel accepts the connection and nobody answers; later it does."""
    server = private_server()
    metrics = RedisMetrics(server.url)
    assert KEYS == list(await metrics.collect_metrics())
    server.pause()
    try:
        figures, seconds = await timed(metrics)
    finally:
        server.resume()

    assert {} == figures
    assert seconds < DEADLINE + 0.4
    assert KEYS == list(await metrics.collect_metrics())


@pytest.mark.parametrize("mode", ["blackhole", "reset", "cut_replies", "drop_replies"])
@pytest.mark.usefixtures("shipped_deadlines")
async def test_broken_network_gives_no_figures_in_time(redis_server: ExternalServer, mode: Any) -> None:
    """Whatever the network does with the question or the answer."""
    async with FaultProxy("127.0.0.1", int(redis_server.url.rpartition(":")[2])) as proxy:
        await proxy.set(mode)
        figures, seconds = await timed(RedisMetrics(proxy.url))
        assert {} == figures
        assert seconds < DEADLINE + 0.4
        await proxy.set("pass")
        assert KEYS == list((await timed(RedisMetrics(proxy.url)))[0])


@pytest.mark.parametrize(
    ("user", "is_up"),
    [("", 0), ("nobody:wrong@", 0), ("blind:secret@", 1), ("mute:secret@", 0)],
    ids=["password missing", "password wrong", "INFO forbidden", "PING forbidden"],
)
async def test_redis_that_refuses(private_server: StartServer, user: str, is_up: int) -> None:
    """No figures, no error, and nothing of the server in the answer; up is who answers a PING."""
    server = private_server()
    server.add_user("blind", ">secret", "~*", "+@all", "-info")
    server.add_user("mute", ">secret", "~*", "+@all", "-info", "-ping")
    # The connection that looks from outside stays what it is.
    server.command("ACL", "SETUSER", "default", "resetpass", ">secret")
    url = f"redis://{user}127.0.0.1:{server.port}"
    app = metrics_app(redis=url)
    answer = await scraped(app, "/json")

    assert {} == await RedisMetrics(url).collect_metrics()
    assert [None] * 6 == [answer.json()[key] for key in KEYS[:6]]
    assert {"commands_processed": None, "expired_keys": None, "evicted_keys": None} == answer.json()["operations"]
    text = (await scraped(app)).text
    assert f"redis_asgi_redis_up {is_up}.0" in text
    assert "redis_asgi_server_" not in text
    for secret in ("secret", "127.0.0.1", f":{server.port}", "blind", "nobody", "Error", "WRONGPASS", "NOPERM"):
        assert secret not in answer.text + text


@pytest.mark.usefixtures("shipped_deadlines")
async def test_figures_over_tls(tls_server: Server, certificates: Certificates) -> None:
    """With the certificates of the settings, as every other connection."""
    settings = Settings(
        REDIS_URL=tls_server.url,
        REDIS_SSL_CA_CERTS=certificates.ca.cert,
        REDIS_SSL_CERTFILE=certificates.client.cert,
        REDIS_SSL_KEYFILE=certificates.client.key,
    )

    metrics = RedisMetrics(RedisManager(settings))
    assert KEYS == list(await metrics.collect_metrics())

    tls_server.pause()
    try:
        figures, seconds = await timed(metrics)
    finally:
        tls_server.resume()
    assert {} == figures
    assert seconds < DEADLINE + 0.4


@pytest.mark.usefixtures("shipped_deadlines")
async def test_hung_tls_peer_is_not_waited_for(tls_server: Server, certificates: Certificates) -> None:
    """One that hangs after the handshake gets no goodbye, which TLS would wait 30 s for."""
    url = urlsplit(tls_server.url)
    async with FaultProxy("127.0.0.1", url.port or 0) as proxy:
        settings = Settings(
            REDIS_URL=f"rediss://localhost:{proxy.port}",
            REDIS_SSL_CA_CERTS=certificates.ca.cert,
            REDIS_SSL_CERTFILE=certificates.client.cert,
            REDIS_SSL_KEYFILE=certificates.client.key,
        )
        client = build_client(settings).client
        assert isinstance(client, aioredis.Redis)
        connection = client.connection_pool.make_connection()
        await connection.connect()
        client.connection_pool.make_connection = lambda: connection  # type: ignore[method-assign]  # connected before
        await proxy.set("blackhole")
        figures, seconds = await timed(RedisMetrics(client))
        assert {} == figures
        assert seconds < DEADLINE + 0.4
        async with asyncio.timeout(PATIENCE):
            while proxy.open:
                await asyncio.sleep(0.01)
        await client.aclose()


async def test_figures_behind_sentinels(sentinels: SentinelTrio) -> None:
    """Those of the primary that the sentinels name now."""
    sentinels.servers[0].client().get("absent")
    addresses = ",".join(f"{server.host}:{server.port}" for server in sentinels.sentinels)
    settings = Settings(REDIS_SENTINELS=addresses, REDIS_SENTINEL_MASTER=sentinels.MASTER)

    assert 1 == (await RedisMetrics(RedisManager(settings)).collect_metrics())["misses"]


async def test_fake_redis_has_no_figures() -> None:
    """A fake without ``INFO`` is no error either."""
    async with fakeredis.FakeAsyncRedis(retry=Retry(NoBackoff(), 0)) as client:
        assert {} == await RedisMetrics(client).collect_metrics()


async def test_memory_has_no_figures() -> None:
    """On ``memory://`` there is no server to ask, and none that could be down."""
    app = metrics_app(settings=MEMORY)
    text = (await scraped(app)).text

    assert {} == await RedisMetrics(RedisManager(MEMORY)).collect_metrics()
    assert "redis_asgi_redis_up" not in text
    assert "redis_asgi_server_" not in text
    assert 'server="memory"' in text


def test_only_clients_are_taken() -> None:
    """A sync client is told at construction."""
    with pytest.raises(ConfigurationError, match="synchronous"):
        RedisMetrics(redis.Redis())  # type: ignore[arg-type]  # what is tested


async def test_users_client_is_left_as_it_was(private_server: StartServer) -> None:
    """None of its connections is used, one question leaves none of ours,
    many share one, and it is not closed.
    """
    redis_server = private_server()
    async with aioredis.Redis.from_url(redis_server.url, retry=Retry(NoBackoff(), 0)) as client:
        await RedisMetrics(client).collect_metrics()
        assert [] == redis_server.connections()
        app = metrics_app(redis=client)
        await scraped(app)
        pool = client.connection_pool
        assert (0, 0) == (len(pool._available_connections), len(pool._in_use_connections))
        assert 1 == len(redis_server.connections())
        await app._target.own.close()
        assert await client.ping()


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"redis_version": "7.0.15"}, "redis 7.0.15"),
        ({"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "8.1.1"}, "valkey 8.1.1"),
        ({"redis_version": "7.4.0", "dragonfly_version": "df-v1.30"}, "dragonfly df-v1.30"),
        ({}, "unknown"),
    ],
)
def test_server_is_named(said: dict[str, str], named: str) -> None:
    """By its own name: they all claim to be some Redis."""
    assert named == Health(servers=(said,)).server


def test_unknown_of_one_is_unknown_of_all() -> None:
    """A field that one primary lacks, or that is no number, has no sum."""
    health = Health(servers=({"a": "1", "b": "2"}, {"a": "3", "b": "many"}))

    assert (4.0, 3.0, None, None) == (
        health.number("a"),
        health.number("a", max),
        health.number("b"),
        health.number("c"),
    )
