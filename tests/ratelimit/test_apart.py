"""Servers behind one address that are several: every count is exact,
and no batch of the neighbours' is an outage.
"""

import asyncio
from collections import Counter
from typing import Any

import pytest
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from redis_asgi import RateLimiter, RateLimitMiddleware, RedisManager, Rule, Settings, by_header
from redis_asgi.errors import Failure
from redis_asgi.ratelimit.limits.charge import Charge, Charges
from redis_asgi.ratelimit.limits.policy import Policy, PolicySet, make_partition
from redis_asgi.ratelimit.transport.check import Check
from redis_asgi.ratelimit.transport.cluster_batcher import make_batcher

from ..conftest import StartServer
from ..kit.inside import manager_of
from ..kit.logs import event_of
from ..kit.servers import Server
from ..kit.sharding import ShardingProxy
from .harness import Spy, drive, http_scope

pytestmark = [pytest.mark.anyio, pytest.mark.server]


def clients_of(server: Server, *, given: bool, **settings: Any) -> list[Any]:
    """Two workers' ``redis=``: managers of their own, or clients that the user made."""
    if given:
        return [aioredis.Redis.from_url(server.url, retry=Retry(NoBackoff(), 0)) for _ in range(2)]
    return [RedisManager(Settings(REDIS_URL=server.url, **settings)) for _ in range(2)]


async def end(clients: list[Any]) -> None:
    """Close what `clients_of` gave."""
    for each in clients:
        await (each.close() if isinstance(each, RedisManager) else each.aclose())


@pytest.mark.parametrize("given", [False, True], ids=["ours", "given"])
@pytest.mark.parametrize("strategy", ["fixed-window", "moving-window"])
async def test_counts_are_exact_where_slots_are_enforced(
    slots_server: Server, caplog: pytest.LogCaptureFixture, strategy: Any, given: bool
) -> None:
    """One endpoint that refuses keys of several slots:
    two workers admit the quota of each client, from the start.
    """
    clients = clients_of(slots_server, given=given)
    limiters = [RateLimiter(client, strategy=strategy) for client in clients]
    admitted: Counter[str] = Counter()
    sources = set()
    for _ in range(8):
        asked = [(f"client-{n}", limiter) for n in range(30) for limiter in limiters]
        for (who, _limiter), decision in zip(
            asked, await asyncio.gather(*(limiter.consume(who, "10/minute") for who, limiter in asked)), strict=True
        ):
            admitted[who] += decision.allowed
            sources.add(decision.source)
    states = {manager_of(limiter).breaker_state for limiter in limiters}
    await end(clients)

    assert {10} == set(admitted.values())
    assert {"redis"} == sources
    assert {"closed"} == states
    assert {"redis_asgi.slots_enforced"} == {event_of(record) for record in caplog.records}


async def test_rules_of_several_partitions_are_decided_together(slots_server: Server) -> None:
    """A request that one of its rules refuses is charged to none of them, slots enforced or not."""
    rules = [Rule("5/minute", name="address"), Rule("2/minute", name="key", partition_by=by_header("x-api-key"))]
    app = RateLimitMiddleware(Spy(), rules=rules, redis=RedisManager(Settings(REDIS_URL=slots_server.url)))
    statuses = []
    for key in (b"a", b"a", b"a", b"b", b"b", b"c", b"d"):
        sent = await drive(app, http_scope(headers=[(b"x-api-key", key)]))
        statuses.append(sent[0]["status"])
    state = manager_of(app).breaker_state
    await manager_of(app).close()

    assert [200, 200, 429, 200, 200, 200, 429] == statuses
    assert "closed" == state


async def test_key_asks_so_from_the_start(slots_server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """With ``REDIS_BATCH=key`` no command has keys of several partitions."""
    (manager, other) = clients_of(slots_server, given=False, REDIS_BATCH="key")
    limiter = RateLimiter(manager)
    decisions = await asyncio.gather(*(limiter.consume(f"client-{n}", "10/minute") for n in range(30)))
    await end([manager, other])

    assert {("redis", True)} == {(decision.source, decision.allowed) for decision in decisions}
    assert [] == caplog.records
    assert 30 == slots_server.command("DBSIZE")


async def test_refused_batch_goes_again_within_its_deadline_only(slots_server: Server) -> None:
    """What nobody waits for any more when the refusal comes is not asked again, nor charged."""
    manager = RedisManager(Settings(REDIS_URL=slots_server.url))
    batcher = manager.per_client(make_batcher)
    policies = PolicySet((Policy("default", 5, 60, "fixed-window"),))
    checks = [
        Check(batcher.loop, "consume", Charges((Charge(policies, make_partition("ip", who)),)), 1.0)
        for who in ("192.0.2.1", "192.0.2.2", "192.0.2.3")
    ]
    for check in checks:
        batcher.submit(check)
    while not checks[0].written:
        await asyncio.sleep(0)
    checks[1].future.cancel()
    outcomes = [await checks[0].future, await checks[2].future]
    await manager.close()

    assert [1, 1] == [outcome[0] for outcome in outcomes]
    keys = {check.asked[0].partition.key for check in (checks[0], checks[2])}
    assert keys == set(slots_server.command("KEYS", "*"))


async def test_one_slot_that_nobody_serves_is_an_outage_of_its_own_clients(private_server: StartServer) -> None:
    """Kept apart, a partition that Redis has no place for fails alone."""
    server = private_server("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no")
    server.own_all_slots()
    manager = RedisManager(Settings(REDIS_URL=server.url, REDIS_BATCH="key"))
    batcher = manager.per_client(make_batcher)
    policies = PolicySet((Policy("default", 5, 60, "fixed-window"),))
    partitions = [make_partition("ip", who) for who in ("192.0.2.1", "192.0.2.2", "192.0.2.3")]
    slot = server.command("CLUSTER", "KEYSLOT", partitions[1].key)
    server.command("CLUSTER", "DELSLOTS", slot)
    checks = [Check(batcher.loop, "consume", Charges((Charge(policies, each),)), 1.0) for each in partitions]
    for check in checks:
        batcher.submit(check)
    outcomes = [await check.future for check in checks]
    await manager.close()

    assert [1, Failure.CLUSTER, 1] == [each if isinstance(each, Failure) else each[0] for each in outcomes]


async def test_counts_are_exact_behind_a_sharding_proxy_with_key(private_server: StartServer) -> None:
    """A proxy that goes by the first key puts each client where it belongs once no command has
    another's.
    """
    servers = [private_server() for _ in range(3)]
    async with ShardingProxy([server.port for server in servers]) as proxy:
        manager = RedisManager(Settings(REDIS_URL=proxy.url, REDIS_BATCH="key", RATE_LIMIT_TIMEOUT=2))
        limiter = RateLimiter(manager)
        admitted: Counter[str] = Counter()
        for turn in range(6):
            # Another order each time, so that each has been the first.
            who = [f"client-{(n + turn) % 12}" for n in range(12)]
            for name, decision in zip(
                who, await asyncio.gather(*(limiter.consume(each, "4/minute") for each in who)), strict=True
            ):
                admitted[name] += decision.allowed
        await manager.close()

    assert {4} == set(admitted.values())
    assert 12 == sum(server.command("DBSIZE") for server in servers)
