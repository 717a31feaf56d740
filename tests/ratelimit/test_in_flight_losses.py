"""What holds a place and gets lost on the way, and how it is mended: heartbeats, releases, outages."""

import asyncio
import random
from contextlib import AsyncExitStack, suppress
from typing import Any, cast

import pytest
import redis
from starlette.types import Receive, Scope, Send

from redis_asgi import RateLimiter, RateLimitMiddleware, RedisManager, Rule, Settings, by_header
from redis_asgi.ratelimit.limits.policy import make_partition

from ..conftest import StartServer
from ..kit.inside import engine_of
from ..kit.patience import until
from ..kit.proxy import FaultProxy
from ..kit.servers import Cluster, ExternalServer
from .concurrency import Stream, ended, heart_of, members, on_redis, opened, running, server_time, settled, streams
from .harness import Spy, drive, http_scope

pytestmark = pytest.mark.anyio


@on_redis
async def test_a_heartbeat_says_again_what_runs(patient: RedisManager, redis_client: redis.Redis) -> None:
    """After FLUSHALL, and after a reset, it is all back: in two keys,
    of two policies of one client.
    """
    app = Stream()
    limited = RateLimitMiddleware(app, rules=[streams(3), streams(5, name="all")], redis=patient)
    requests = await opened(limited, 3)
    keys = set(cast("list[bytes]", redis_client.keys("*:c0:1")))
    assert 2 == len(keys)

    for forget in (redis_client.flushall, None):
        if forget is not None:
            forget()
        else:
            partition = make_partition("ip", "203.0.113.7", plain=True)
            assert await engine_of(limited).reset(partition, None)
        assert [] == members(redis_client)
        await heart_of(patient).beat()
        assert keys == set(cast("list[bytes]", redis_client.keys("*:c0:1")))
        assert 6 == len(members(redis_client))
        assert 429 == (await opened(limited, 1))[0].sent[0]["status"]
        await asyncio.sleep(0.11)  # for which a refusal is remembered
    leases = [
        score - server_time(redis_client)
        for _, score in cast(Any, redis_client.zrange(next(iter(keys)), 0, -1, withscores=True))
    ]
    assert all(29e6 < lease <= 30e6 for lease in leases)
    await ended(requests)
    await settled(patient)
    assert [] == members(redis_client)


@on_redis
async def test_one_reset_by_name_leaves_the_other(patient: RedisManager, redis_client: redis.Redis) -> None:
    """A name's set is found through its field."""
    limited = RateLimitMiddleware(Stream(), rules=[streams(3), streams(5, name="all")], redis=patient)
    requests = await opened(limited, 2)
    assert await engine_of(limited).reset(make_partition("ip", "203.0.113.7", plain=True), "all")

    assert 2 == len(members(redis_client))
    await ended(requests)


@on_redis
async def test_a_heartbeat_is_one_command(patient: RedisManager, redis_client: redis.Redis) -> None:
    """However many run; and none beats when nothing does."""
    limiter = RateLimiter(patient, timeout=5)
    heart = heart_of(patient)
    assert heart._timer is None
    async with AsyncExitStack() as stack:
        for i in range(300):
            decision = await stack.enter_async_context(limiter.slot(f"client-{i % 3}", 200))
            assert decision.allowed
        assert heart._timer is not None
        redis_client.config_resetstat()
        await heart.beat()
        stats: Any = redis_client.info("commandstats")
        assert 1 == stats["cmdstat_evalsha"]["calls"]
        assert 300 == stats["cmdstat_zadd"]["calls"]
    await heart.beat()
    assert heart._timer is None
    assert (0, 0) == (len(heart), heart.owes)


@on_redis
async def test_it_beats_by_itself(patient: RedisManager, redis_client: redis.Redis) -> None:
    """Every ten seconds while something runs;
    one that failed is followed by another after a second.
    """
    heart = heart_of(patient)
    loop = asyncio.get_running_loop()
    async with RateLimiter(patient, timeout=5).slot("a", 1):
        timer = heart._timer
        assert timer is not None
        assert 9 < timer.when() - loop.time() <= 10
        redis_client.flushall()
        timer._run()
        timer.cancel()
        assert heart._under_way is not None
        await heart._under_way
        assert 1 == len(members(redis_client))
        heart._has_failed = True
        heart._timer.cancel()  # type: ignore[union-attr]  # it is planned
        heart._timer = None
        heart._has_beaten()
        assert 0 < heart._timer.when() - loop.time() <= 1  # type: ignore[attr-defined]  # likewise


@on_redis
async def test_a_release_waits_for_the_renewal_under_way(patient: RedisManager, redis_client: redis.Redis) -> None:
    """Whichever of the two Redis carries out first over two connections, the place is free in the
    end.
    """
    heart = heart_of(patient)
    async with RateLimiter(patient, timeout=5).slot("a", 1):
        beating = heart.beat()
        (slot,) = heart._running.values()
        slot.release()
        assert 1 == heart.owes
    await beating
    await settled(patient)

    assert [] == members(redis_client)
    assert 0 == heart.owes


@on_redis
async def test_each_request_is_two_trips_at_most(patient: RedisManager, redis_client: redis.Redis) -> None:
    """One to ask, one to release, whatever else it says of itself, and however often it ends."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["rate_limit"].charge(5)
        await Spy()(scope, receive, send)
        raise LookupError

    limited = RateLimitMiddleware(app, rules=[streams(1)], redis=patient)
    await RateLimiter(patient, timeout=5).consume("warm")
    redis_client.config_resetstat()
    with suppress(LookupError):
        await drive(limited, http_scope())
    await settled(patient)
    stats: Any = redis_client.info("commandstats")

    named = ("evalsha", "zadd", "hset", "zrem")
    assert [2, 1, 1, 1] == [stats[f"cmdstat_{name}"]["calls"] for name in named]

    redis_client.config_resetstat()
    async with RateLimiter(patient, timeout=5).slot("a", 1):
        (slot,) = heart_of(patient)._running.values()
        for _ in range(3):
            slot.release()
            await settled(patient)
    stats = redis_client.info("commandstats")
    assert [2, 1, 1, 1] == [stats[f"cmdstat_{name}"]["calls"] for name in named]


@on_redis
async def test_what_redis_never_heard_of_is_owed_to_nobody(private_server: StartServer) -> None:
    """Requests that come and go while it is away leave nothing to say when it is back."""
    server = private_server()
    manager = RedisManager(Settings(REDIS_URL=server.url))
    limiter = RateLimiter(manager)
    await limiter.consume("warm")
    server.kill()
    while manager.breaker_state == "closed":
        await limiter.consume("warm")
    for _ in range(50):
        async with limiter.slot("a", 1) as decision:
            assert ("local", True) == (decision.source, decision.allowed)
    await asyncio.sleep(0.01)
    assert 0 == heart_of(manager).owes
    await manager.close()


@on_redis
async def test_much_that_is_owed_leaves_in_parts(patient: RedisManager, redis_client: redis.Redis) -> None:
    """A batch at a time, so that no request waits behind all of it."""
    limiter = RateLimiter(patient, timeout=5)
    async with AsyncExitStack() as stack:
        for i in range(300):
            await stack.enter_async_context(limiter.slot(f"client-{i}", 1))
        heart = heart_of(patient)
        beating = heart.beat()
        assert 128 == heart._checks_left
        await beating
        for slot in heart._running.values():
            slot.is_doubtful = True
    await settled(patient)
    assert 0 == heart.owes
    assert [] == members(redis_client)


@pytest.mark.slow
async def test_a_node_that_is_gone_takes_no_place_along(private_cluster: Cluster) -> None:
    """Decided here because of one node,
    a request keeps its place at another, and gives it back there.
    """
    settings = Settings(REDIS_URL=private_cluster.url, REDIS_CLUSTER=True)
    manager = RedisManager(settings)
    address = make_partition("ip", "203.0.113.7", plain=True)
    gone = private_cluster.node_of(address.key)
    keys = (f"key-{i}" for i in range(1000))
    key = next(k for k in keys if private_cluster.node_of(make_partition("header:x-api-key", k).key) is not gone)
    there = private_cluster.node_of(make_partition("header:x-api-key", key).key)
    app = Stream()
    rules = [streams(2, partition_by=by_header("x-api-key")), Rule("5/hour", name="requests")]
    limited = RateLimitMiddleware(app, rules=rules, redis=manager, settings=settings)
    headers = [(b"x-api-key", key.encode())]
    before = await opened(limited, 1, headers=headers)
    gone.kill()
    after = await opened(limited, 2, headers=headers)
    assert [200, 200, 429] == sorted([await request.status() for request in (*before, *after)])
    assert 2 == running(manager)
    await heart_of(manager).beat()
    assert 2 == len(members(there.client()))
    await ended([*before, *after])
    for _ in range(100):
        await heart_of(manager).beat()
        if not members(there.client()):
            break
        await asyncio.sleep(0.05)
    assert [] == members(there.client())
    await manager.close()


@on_redis
async def test_a_lost_reply_keeps_its_place(private_server: StartServer) -> None:
    """Redis has admitted it, nobody was told,
    and the process decides: it goes on under the same id.
    """
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        manager = RedisManager(Settings(REDIS_URL=proxy.url, RATE_LIMIT_TIMEOUT=0.2))
        limiter = RateLimiter(manager, timeout=0.2)
        await RateLimiter(manager).consume("warm")
        await proxy.set("drop_replies", times=1)
        async with limiter.slot("a", 1) as decision:
            assert ("local", True) == (decision.source, decision.allowed)
            assert 1 == len(members(server.client())) == running(manager)
            await _beats(manager)
            assert 1 == len(members(server.client()))
        await _beats(manager)
        # A release of its own is under way, perhaps, which no heartbeat says again.
        await until(lambda: not members(server.client()))
        assert 0 == heart_of(manager).owes
        await manager.close()


async def _beats(manager: RedisManager) -> None:
    """Beat until one has been answered, as Redis is back."""
    for _ in range(200):
        await heart_of(manager).beat()
        if not heart_of(manager)._has_failed:
            return
        await asyncio.sleep(0.05)
    pytest.fail("Redis does not come back")


@on_redis
async def test_a_late_check_that_is_refused_here_is_released(private_server: StartServer) -> None:
    """Redis had a place for it, the process has none: its id does not stay."""
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        settings = Settings(REDIS_URL=proxy.url, RATE_LIMIT_TIMEOUT=0.2, RATE_LIMIT_FALLBACK_DIVISOR=4)
        manager = RedisManager(settings)
        limiter = RateLimiter(manager, timeout=0.2, settings=settings)
        async with RateLimiter(manager, settings=settings).slot("a", 4) as first:
            await proxy.set("drop_replies", times=1)
            async with limiter.slot("a", 4) as second:
                assert [("redis", True), ("local", False)] == [(d.source, d.allowed) for d in (first, second)]
                await _beats(manager)
                assert 1 == len(members(server.client()))
        await _beats(manager)
        # A release of its own is under way, perhaps, which no heartbeat says again.
        await until(lambda: not members(server.client()))
        await manager.close()


@on_redis
async def test_a_lost_release_is_said_again(private_server: StartServer) -> None:
    """The next heartbeat removes what Redis was not told of."""
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        manager = RedisManager(Settings(REDIS_URL=proxy.url))
        async with RateLimiter(manager).slot("a", 1) as decision:
            assert decision.source == "redis"
            await proxy.set("reset")
        await until(lambda: heart_of(manager).owes)
        assert 1 == len(members(server.client())) == heart_of(manager).owes
        await proxy.set("pass")
        await _beats(manager)
        # A release of its own is under way, perhaps, which no heartbeat says again.
        await until(lambda: not members(server.client()))
        assert 0 == heart_of(manager).owes
        await manager.close()


@on_redis
async def test_what_is_owed_is_forgotten_in_the_end(private_server: StartServer) -> None:
    """When its leases have long ended,
    so that nothing beats for ever because of a Redis that never comes back.
    """
    server = private_server()
    manager = RedisManager(Settings(REDIS_URL=server.url))
    async with RateLimiter(manager).slot("a", 1) as decision:
        assert "redis" == decision.source
        server.kill()
    heart = heart_of(manager)
    while not heart.owes:
        await asyncio.sleep(0.01)
    await heart.beat()
    assert (1, True) == (heart.owes, heart._timer is not None)
    heart._owed_until = 0.0
    await heart.beat()
    assert (0, None) == (heart.owes, heart._timer)
    await manager.close()


@on_redis
async def test_without_redis_all_that_runs_counts(private_server: StartServer) -> None:
    """Whoever admitted it, against this process's share; nothing is cut;
    and Redis is told of it when it is back.
    """
    server = private_server()
    settings = Settings(REDIS_URL=server.url, RATE_LIMIT_FALLBACK_DIVISOR=2)
    manager = RedisManager(settings)
    app = Stream()
    limited = RateLimitMiddleware(app, rules=[streams(5)], redis=manager, settings=settings)
    first = await opened(limited, 2)
    server.kill()
    second = await opened(limited, 3)
    assert [200, 429, 429] == sorted([await request.status() for request in second])
    assert not any(request.task.done() for request in first)
    server.restart()
    await _beats(manager)

    assert 3 == len(members(server.client())) == running(manager)
    third = await opened(limited, 3)
    assert [200, 200, 429] == sorted([await request.status() for request in third])
    await ended([*first, *second, *third])
    await settled(manager)
    assert [] == members(server.client())
    await manager.close()


@on_redis
@pytest.mark.parametrize("answer", ["open", "closed"])
async def test_without_redis_a_rule_may_fail_otherwise(private_server: StartServer, answer: Any) -> None:
    """Open: what runs is told to Redis when it is back. Closed: nothing runs."""
    server = private_server()
    manager = RedisManager(Settings(REDIS_URL=server.url))
    limited = RateLimitMiddleware(Stream(), rules=[streams(1, on_redis_error=answer)], redis=manager)
    server.kill()
    requests = await opened(limited, 2)
    assert [200 if answer == "open" else 503] * 2 == [await request.status() for request in requests]
    server.restart()
    if answer == "open":
        await _beats(manager)
        assert 2 == len(members(server.client()))
    await ended(requests)
    assert 0 == running(manager)
    await manager.close()


@on_redis
async def test_gone_at_any_moment(patient: RedisManager, redis_client: redis.Redis) -> None:
    """Two thousand requests that are cancelled anywhere between the door and the end leave nothing
    behind.
    """
    chance = random.Random(11)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
        if chance.random() < 0.1:
            raise LookupError
        await send({"type": "http.response.body", "body": b"b"})

    limited = RateLimitMiddleware(app, rules=[streams(50), Rule("9/second", name="rate", shadow=True)], redis=patient)
    heart = heart_of(patient)
    for _ in range(40):
        tasks = [asyncio.ensure_future(drive(limited, http_scope())) for _ in range(50)]
        for turn in range(12):
            for task in tasks:
                if chance.random() < 0.1:
                    task.cancel()
            await asyncio.sleep(0 if turn < 8 else 0.001)
            if chance.random() < 0.1:
                heart.beat()
        for task in tasks:
            if chance.random() < 0.5:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await settled(patient)
    await settled(patient)

    assert 0 == running(patient)
    assert [] == members(redis_client)
    assert (0, 0) == (len(heart), heart.owes)


@on_redis
async def test_cancelled_in_the_moment_of_its_answer(patient: RedisManager, redis_client: redis.Redis) -> None:
    """The verdict has come, and nobody takes it: the place is given back."""
    limited = RateLimitMiddleware(Spy(), rules=[streams(1)], redis=patient)
    engine = engine_of(limited)
    ask = engine.ask
    asked: list[Any] = []
    engine.ask = lambda *args: asked.append(ask(*args)) or asked[-1]  # type: ignore[method-assign, func-returns-value]
    task = asyncio.ensure_future(drive(limited, http_scope()))
    while not asked or not asked[-1].future.done():
        await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await settled(patient)

    assert asked[-1].allowed
    assert 0 == running(patient)
    assert [] == members(redis_client)


@on_redis
async def test_what_is_owed_during_a_heartbeat_waits_for_a_second(patient: RedisManager) -> None:
    """Not for ten: a release that failed while others were renewed is told by the next heartbeat."""
    limiter = RateLimiter(patient, timeout=5)
    async with limiter.slot("a", 2):
        heart = heart_of(patient)
        (slot,) = heart._running.values()
        beating = heart.beat()
        heart._owe(slot)
        await beating
        assert heart._timer is not None
        soon = heart._timer.when() - heart.loop.time()
        owed = heart.owes
        await heart.beat()
        later = heart._timer.when() - heart.loop.time()

    assert (1, 0) == (owed, heart.owes)
    assert soon <= 1 < later


@on_redis
async def test_a_heart_opens_no_connection_that_was_closed(redis_server: ExternalServer, redis_url: str) -> None:
    """What runs on when its manager was closed ends with its lease, or once that is open again."""
    manager = RedisManager(Settings(REDIS_URL=redis_url, RATE_LIMIT_TIMEOUT=5.0))
    limiter = RateLimiter(manager, timeout=5)
    async with limiter.slot("a", 2):
        heart = heart_of(manager)
        await manager.close()
        await heart.beat()
        assert not manager.is_open
        assert 1 == len(members(redis_server.client()))
    await heart.beat()
    assert not manager.is_open
    assert (await limiter.peek("b", concurrency=2)).allowed
    await heart.beat()

    assert [] == members(redis_server.client())
