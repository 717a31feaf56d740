"""TLS where there are several servers:
every connection to every one of them is encrypted and verified.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from redis_asgi import RateLimiter, RateLimitMiddleware, RedisManager, Settings, by_header, health_app, metrics_app

from ..kit.certificates import Certificates
from ..kit.patience import PATIENCE
from ..kit.servers import Cluster, SentinelTrio, wait_until

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[tuple[RedisManager, httpx.AsyncClient]]:
    """An app with a limit of two, its health and its metrics; its manager and a client of it."""
    manager = RedisManager(Settings(RATE_LIMIT_TIMEOUT=2, **settings))
    app = Starlette(routes=[Route("/", lambda _: PlainTextResponse("here"))])
    app.mount("/health", health_app(redis=manager))
    app.mount("/metrics", metrics_app(redis=manager))
    app.add_middleware(RateLimitMiddleware, limits="2/hour", partition_by=by_header("x-client"), redis=manager)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield manager, client
    await manager.close()


async def assert_well(manager: RedisManager, client: httpx.AsyncClient, mode: str) -> None:
    """Clients on whichever server are limited in Redis, and all that looks at it sees it."""
    for name in "abcdefgh":
        answers = [await client.get("/", headers={"x-client": name}) for _ in range(3)]
        assert [200, 200, 429] == [answer.status_code for answer in answers]
        assert "redis" == (await RateLimiter(manager).peek(name)).source
    health = (await client.get("/health/")).json()
    assert ("healthy", mode, None) == (health["status"], health["mode"], health["error"])
    assert "redis_asgi_redis_up 1.0" in (await client.get("/metrics/")).text


async def test_cluster(tls_cluster: Cluster, certificates: Certificates) -> None:
    """Every node is reached and its certificate checked; one of another authority's is refused."""
    where = {"REDIS_URL": tls_cluster.url, "REDIS_CLUSTER": True}
    async with serving(**where, **certificates.settings()) as (manager, client):
        await assert_well(manager, client, "cluster")
        for node in tls_cluster.nodes:
            assert node.client().dbsize()
    distrustful = certificates.settings() | {"REDIS_SSL_CA_CERTS": certificates.other_ca.cert}
    async with serving(**where, **distrustful) as (_, client):
        health = (await client.get("/health/")).json()
        assert ("degraded", "redis_connection") == (health["status"], health["error"])
        assert 200 == (await client.get("/", headers={"x-client": "a"})).status_code


async def test_sentinel(tls_sentinels: SentinelTrio, certificates: Certificates) -> None:
    """The sentinels are asked and the master is used over TLS,
    and so is the next one after a failover.
    """
    where = {"REDIS_SENTINELS": tls_sentinels.addresses, "REDIS_SENTINEL_MASTER": SentinelTrio.MASTER}
    async with serving(**where, **certificates.settings()) as (manager, client):
        await assert_well(manager, client, "sentinel")
        old = tls_sentinels.primary()
        assert 8 == old.client().dbsize()
        old.kill()
        wait_until(lambda: tls_sentinels.primary() is not old, "a failover")
    async with serving(**where, **certificates.settings()) as (manager, client):
        # A sentinel that has not heard of the failover yet may be the first to answer.
        async with asyncio.timeout(PATIENCE):
            while "redis" != (await RateLimiter(manager).peek("a")).source:
                await asyncio.sleep(0.05)
            while "healthy" != (await client.get("/health/")).json()["status"]:
                await asyncio.sleep(0.05)
    distrustful = certificates.settings() | {"REDIS_SSL_CA_CERTS": certificates.other_ca.cert}
    async with serving(**where, **distrustful) as (_, client):
        health = (await client.get("/health/")).json()
        assert ("degraded", "redis_cluster") == (health["status"], health["error"])
