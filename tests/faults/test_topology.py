"""Redis as several servers: a failover of sentinels, and nodes and slots of a cluster,
as every part's users see them.

The bounds of the time that a request waits are `test_table`'s;
here servers of other tests' making share the machine.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from redis.crc import key_slot
from starlette.types import ASGIApp

from redis_asgi import RedisManager, Settings
from redis_asgi.connection.health_cache import Watch
from redis_asgi.ratelimit.limits.policy import make_partition
from redis_asgi.telemetry import fresh_telemetry

from ..kit.logs import event_of
from ..kit.servers import Cluster, SentinelTrio, Server
from .asking import Answer, Exchange, assert_right, embedding, limited
from .service import MODES, Endpoints, build

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

CREDENTIAL = "Bearer one"
QUOTA = 5
HOLDS = {"local": (200, 429), "open": (200,), "closed": (503,)}  # what a limit answers without Redis


@dataclass
class Service:
    """The app under test."""

    app: ASGIApp
    manager: RedisManager

    async def ask(self, mode: str, client: str) -> Answer:
        """One limited request."""
        return await limited(self.app, mode, client).run()

    async def admitted(self, mode: str, client: str) -> int:
        """How many of some more than the quota came through, all decided by Redis."""
        answers = [await self.ask(mode, client) for _ in range(QUOTA + 2)]
        assert {"redis"} == {answer.headers["x-source"] for answer in answers if answer.status == 200}
        assert {200, 429} == {answer.status for answer in answers}
        return sum(answer.status == 200 for answer in answers)

    async def embed(self, *texts: str) -> str:
        """What the cache did about *texts*, whose vectors were right."""
        answer = await embedding(self.app, CREDENTIAL, *texts).run()
        assert 200 == answer.status
        assert_right(answer.body, CREDENTIAL, texts)
        return answer.headers["cache-status"]

    async def health(self) -> tuple[int, str, str | None]:
        """Of an app that needs Redis, as it is now."""
        self.manager.per_client(Watch)._last = None
        answer = await Exchange(self.app, "/health/ready").run()
        return answer.status, answer.json["status"], answer.json["error"]

    async def until(self, truth: Callable[[], Awaitable[bool]]) -> None:
        """Ask until it holds; whatever comes meanwhile is an answer, and says so."""
        async with asyncio.timeout(30):
            while not await truth():
                await self.embed("while it lasts", "stored")
                for mode in MODES:
                    answer = await self.ask(mode, "10.9.9.9")
                    assert answer.status in (*HOLDS[mode], 200, 429), mode
                    assert answer.status != 503 or answer.headers["retry-after"] == "1"
                assert 200 == (await Exchange(self.app, "/health/live").run()).status
                await asyncio.sleep(0.02)


@asynccontextmanager
async def service(**settings: Any) -> AsyncIterator[Service]:
    """The app on a Redis of *settings*."""
    fixed = {"EMBEDDING_CACHE_NAMESPACE": "faults", "EMBEDDING_CACHE_L1_BYTES": 0, "RATE_LIMIT_TIMEOUT": 1}
    with fresh_telemetry():
        manager = RedisManager(Settings(**fixed, **settings))
        yield Service(build(manager, Endpoints(), quota=QUOTA), manager)
        await manager.close()


def outages(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """The lines about them, each with its node."""
    said = [record for record in caplog.records if record.name.startswith("redis_asgi")]
    return [(event_of(record).removeprefix("redis_asgi."), getattr(record, "node", "")) for record in said]


async def test_a_failover(sentinels: SentinelTrio, caplog: pytest.LogCaptureFixture) -> None:
    """Until the replica is the master every mode does what it says;
    then that one counts and stores.
    """
    old = sentinels.primary()
    async with service(
        REDIS_SENTINELS=sentinels.addresses, REDIS_SENTINEL_MASTER=SentinelTrio.MASTER, REDIS_TIMEOUT=1
    ) as served:
        assert [QUOTA] * 3 == [await served.admitted(mode, "10.1.0.1") for mode in MODES]
        await served.embed("stored", "too")
        assert (200, "healthy", None) == await served.health()
        old.kill()
        seen: set[str | None] = set()

        async def is_used() -> bool:
            seen.add((await served.health())[2])
            return (await served.ask("open", "10.1.0.2")).headers["x-source"] == "redis"

        await served.until(is_used)
        assert sentinels.primary() is not old
        assert seen - {None} <= {"redis_connection", "redis_cluster", "redis_timeout", "redis_readonly", "breaker_open"}
        assert seen - {None}
        assert [QUOTA] * 3 == [await served.admitted(mode, "10.1.0.3") for mode in MODES]
        assert "stored" in await served.embed("after it")
        assert "hit" in await served.embed("after it")
        assert (200, "healthy", None) == await served.health()

    assert [("redis_unavailable", "")] == outages(caplog)[:1]
    assert {"redis_unavailable", "redis_back"} >= {event for event, _ in outages(caplog)}
    assert len(outages(caplog)) <= 2


def client_on(cluster: Cluster, node: Server) -> str:
    """An address whose counters are on *node*."""
    addresses = (f"10.2.{number // 250}.{number % 250}" for number in range(1000))
    return next(each for each in addresses if cluster.node_of(f"rate_limit:{{{each}}}") is node)


async def test_a_lost_node(private_cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """Whose counters it has is decided as without Redis, and nobody else;
    it is used again when it is back.
    """
    lost, *others = private_cluster.nodes
    away, *here = (client_on(private_cluster, node) for node in private_cluster.nodes)
    async with service(REDIS_URL=others[0].url, REDIS_CLUSTER=True, REDIS_TIMEOUT=1) as served:
        assert "redis" == (await served.ask("open", away)).headers["x-source"]
        await served.embed("stored", "too")
        lost.kill()

        async def is_lost() -> bool:
            return (await served.ask("open", away)).headers["x-source"] == "none"

        await served.until(is_lost)
        assert 503 == (await served.ask("closed", away)).status
        assert "local" == (await served.ask("local", away)).headers["x-source"]
        for client in here:
            assert [QUOTA] * 3 == [await served.admitted(mode, client) for mode in MODES]
        assert (200, "degraded", "redis_cluster") == await served.health()
        lost.launch()

        async def is_back() -> bool:
            return (await served.ask("open", away)).headers["x-source"] == "redis"

        await served.until(is_back)
        assert QUOTA == await served.admitted("closed", away)

    name = f"{lost.host}:{lost.port}"
    assert {name} == {node for event, node in outages(caplog) if event in ("redis_unavailable", "redis_back")}
    assert 1 == [event for event, _ in outages(caplog)].count("redis_unavailable")


async def test_a_slot_that_moves(private_cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """Counts go on where it is now, in the middle of the move too,
    and not one request is decided without Redis.
    """
    source, target, _ = private_cluster.nodes
    client = client_on(private_cluster, source)
    slot = key_slot(make_partition("ip", client).key)
    async with service(REDIS_URL=source.url, REDIS_CLUSTER=True) as served:
        first = [await served.ask("closed", client) for _ in range(2)]
        moving = asyncio.create_task(asyncio.to_thread(private_cluster.move_slot, slot, target))
        during = []
        while not moving.done():
            during.append(await served.ask("open", client))
        await moving
        last = [await served.ask("closed", client) for _ in range(QUOTA)]
        answers = [*first, *during, *last]

        assert {"redis"} == {answer.headers["x-source"] for answer in answers if answer.status == 200}
        assert QUOTA == sum(answer.status == 200 for answer in (*first, *last))
        assert min(QUOTA, len(during)) == sum(answer.status == 200 for answer in during)
        assert private_cluster.node_of(make_partition("ip", client).key) is target
    assert [] == outages(caplog)
