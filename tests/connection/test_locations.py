"""Ways to reach a server: parts, URLs, sockets, TLS, clusters, sentinels."""

import asyncio
from typing import Any

import pytest
from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import (
    RedisError,
)

from redis_asgi import RedisManager, Settings
from redis_asgi.errors import Failure, classify

from ..conftest import StartServer
from ..kit.certificates import Certificates
from ..kit.fair_time import fair_time
from ..kit.logs import event_of
from ..kit.servers import Cluster, ExternalServer, SentinelTrio, Server, wait_until
from .managers import SECRET, ask, managed

pytestmark = pytest.mark.anyio


async def test_parts_name_the_server(redis_server: ExternalServer, private_server: StartServer) -> None:
    """Host, port and database are enough."""
    server = private_server()
    async with managed(REDIS_HOST=server.host, REDIS_PORT=server.port, REDIS_DB=3) as manager:
        await ask(await manager.get_connection(), "SET", "key", "value")

    assert server.command("SELECT", 3)
    assert server.command("GET", "key") == b"value"


async def test_url_names_user_password_and_database(private_server: StartServer) -> None:
    """A URL may carry everything, and wins over the parts."""
    server = private_server()
    server.add_user("app", f">{SECRET}", "~*", "+@all")
    url = f"redis://app:{SECRET}@{server.host}:{server.port}/2"
    async with managed(REDIS_URL=url, REDIS_HOST="no.such.host.test", REDIS_PORT=1, REDIS_DB=9) as manager:
        client = await manager.get_connection()

        assert await ask(client, "ACL", "WHOAMI") == b"app"
        assert "db=2" in str(await ask(client, "CLIENT", "INFO")) or "'db': '2'" in str(
            await ask(client, "CLIENT", "INFO")
        )


async def test_unix_socket(private_server: StartServer) -> None:
    """``unix://`` reaches a server that listens on a socket file only."""
    server = private_server(unix=True)
    async with managed(REDIS_URL=server.url) as manager:
        assert await ask(await manager.get_connection(), "PING")


def tls(certificates: Certificates, **more: Any) -> dict[str, Any]:
    """Settings of a client that has a certificate."""
    pair = certificates.client
    names = {"REDIS_SSL_CERTFILE": pair.cert, "REDIS_SSL_KEYFILE": pair.key}
    return {"REDIS_SSL_CA_CERTS": certificates.ca.cert, "REDIS_TIMEOUT": 2, **names, **more}


@pytest.mark.parametrize("how", ["URL", "parts"])
async def test_tls_with_a_client_certificate(tls_server: Server, certificates: Certificates, how: str) -> None:
    """``rediss://`` and ``REDIS_SSL`` speak TLS with our CA and show our certificate."""
    url = {"REDIS_URL": tls_server.url}
    parts = {"REDIS_SSL": True, "REDIS_HOST": "127.0.0.1", "REDIS_PORT": tls_server.port}
    async with managed(**tls(certificates, **(url if how == "URL" else parts))) as manager:
        assert await ask(await manager.get_connection(), "PING")


@pytest.mark.parametrize("how", ["URL", "parts"])
async def test_tls_with_an_unknown_authority_fails(tls_server: Server, certificates: Certificates, how: str) -> None:
    """A server whose certificate our CA has not signed is not talked to."""
    url: dict[str, Any] = {"REDIS_URL": tls_server.url}
    parts = {"REDIS_SSL": True, "REDIS_HOST": "127.0.0.1", "REDIS_PORT": tls_server.port}
    values = tls(certificates, **(url if how == "URL" else parts), REDIS_SSL_CA_CERTS=certificates.other_ca.cert)
    async with managed(**values) as manager:
        with pytest.raises(RedisConnectionError, match="CERTIFICATE_VERIFY_FAILED") as caught:
            await ask(await manager.get_connection(), "PING")

    assert Failure.CONNECTION is classify(caught.value)


async def test_tls_without_a_ca_uses_the_systems(tls_server: Server) -> None:
    """Without ``REDIS_SSL_CA_CERTS`` a private CA is not trusted: verification is never off."""
    async with managed(REDIS_URL=tls_server.url, REDIS_TIMEOUT=2) as manager:
        with pytest.raises(RedisConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            await ask(await manager.get_connection(), "PING")


async def test_tls_verifies_the_host_name(stranger_server: Server, certificates: Certificates) -> None:
    """A good certificate for another host is refused."""
    async with managed(**tls(certificates, REDIS_URL=stranger_server.url)) as manager:
        with pytest.raises(RedisConnectionError, match=r"[Hh]ostname mismatch"):
            await ask(await manager.get_connection(), "PING")


@pytest.mark.parametrize("how", ["URL", "parts"])
async def test_cluster_serves_keys_of_every_node(cluster: Cluster, how: str) -> None:
    """``REDIS_CLUSTER`` finds all nodes from one and closes cleanly; it has no single pool."""
    node = cluster.nodes[1]
    where = {"REDIS_URL": node.url} if how == "URL" else {"REDIS_HOST": node.host, "REDIS_PORT": node.port}
    async with managed(REDIS_CLUSTER=True, **where) as manager:
        client = await manager.get_connection()
        for i in range(20):
            await ask(client, "SET", f"key-{i}", str(i))
        assert manager.pool is None

    sizes = [int(each.command("DBSIZE")) for each in cluster.nodes]
    assert sum(sizes) == 20
    assert all(sizes)


async def test_cluster_callers_wait_for_a_turn(cluster: Cluster) -> None:
    """More callers than ``REDIS_POOL_SIZE`` wait;
    the nodes' pools never say "Too many connections".
    """
    async with managed(REDIS_CLUSTER=True, REDIS_URL=cluster.url, REDIS_POOL_SIZE=2) as manager:
        client = await manager.get_connection()
        replies = await asyncio.gather(*(ask(client, "INCR", "counter") for _ in range(200)))

        assert list(range(1, 201)) == sorted(replies)


async def test_cluster_client_follows_a_moved_slot(private_cluster: Cluster) -> None:
    """A slot that moves to another node is found there, and nothing is counted twice."""
    async with managed(REDIS_CLUSTER=True, REDIS_URL=private_cluster.url) as manager:
        client = await manager.get_connection()
        assert await ask(client, "INCR", "key") == 1
        source = private_cluster.node_of("key")
        private_cluster.move_slot(12539, next(node for node in private_cluster.nodes if node is not source))

        assert await ask(client, "INCR", "key") == 2


async def test_sentinel_finds_the_master_and_the_next_one(sentinels: SentinelTrio) -> None:
    """Through sentinels the master is reached, and after a failover the promoted replica."""
    async with managed(
        REDIS_SENTINELS=sentinels.addresses, REDIS_SENTINEL_MASTER=sentinels.MASTER, REDIS_TIMEOUT=1
    ) as manager:
        client = await manager.get_connection()
        assert await ask(client, "SET", "key", "value")
        assert manager.pool is not None
        before, after = sentinels.servers
        assert before.client().get("key") == b"value"
        before.kill()
        await asyncio.to_thread(wait_until, lambda: sentinels.primary() is after, "failover")

        deadline = fair_time() + 5
        while True:
            try:
                await ask(client, "SET", "key", "again")
                break
            except (RedisError, OSError):
                assert fair_time() < deadline
                await asyncio.sleep(0.02)
        assert after.client().get("key") == b"again"


async def test_hung_sentinel_is_not_waited_for(sentinels: SentinelTrio) -> None:
    """All are asked at once: the one that answers is enough; when none does,
    the reason is that there is no master.
    """
    async with managed(
        REDIS_SENTINELS=sentinels.addresses, REDIS_SENTINEL_MASTER=sentinels.MASTER, REDIS_TIMEOUT=1
    ) as manager:
        for sentinel in sentinels.sentinels[:2]:
            sentinel.pause()
        try:
            client = await manager.get_connection()
            began = fair_time()
            assert await ask(client, "PING")
            assert fair_time() - began < 0.5
        finally:
            for sentinel in sentinels.sentinels[:2]:
                sentinel.resume()
        await manager.close()
        for sentinel in sentinels.sentinels:
            sentinel.kill()
        with pytest.raises(MasterNotFoundError):
            await ask(await manager.get_connection(), "PING")


async def test_sentinel_that_knows_no_master_is_passed_over(
    sentinels: SentinelTrio, redis_server: ExternalServer
) -> None:
    """One that watches others, and one that is none at all."""
    stranger = redis_server.url.rpartition("/")[2]
    settings: dict[str, Any] = {"REDIS_SENTINELS": (stranger, *sentinels.addresses), "REDIS_TIMEOUT": 1}
    async with managed(**settings, REDIS_SENTINEL_MASTER=sentinels.MASTER) as manager:
        assert await ask(await manager.get_connection(), "PING")
    async with managed(**settings, REDIS_SENTINEL_MASTER="another") as manager:
        with pytest.raises(MasterNotFoundError, match="'another'"):
            await ask(await manager.get_connection(), "PING")


async def test_unverified_tls_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    """A URL that turns certificate checks off logs a warning with the fix, and no password."""
    manager = RedisManager(Settings(REDIS_URL="valkeys://:hunter2@localhost:6380?ssl_check_hostname=no"))
    await manager.get_connection()
    await manager.close()
    (record,) = [record for record in caplog.records if event_of(record) == "redis_asgi.tls_unverified"]

    assert "REDIS_SSL_CA_CERTS" in record.__dict__["fix"]
    assert "hunter2" not in str(record.__dict__)
