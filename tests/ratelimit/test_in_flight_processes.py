"""Concurrency limits over loops, forks and processes: never more than so many, seen from outside."""

import asyncio
import random
import subprocess
import sys
import threading
from typing import Any

import pytest
import redis
import redis.asyncio as aioredis

from redis_asgi import RateLimiter, RateLimitMiddleware, RedisManager, Settings
from redis_asgi.connection.open_client import PROCESS
from redis_asgi.ratelimit.counting.in_flight import Ids
from redis_asgi.ratelimit.limits.policy import make_partition

from ..kit.inside import manager_of
from ..kit.processes import clean_environment
from ..kit.servers import ExternalServer
from .concurrency import Stream, ended, heart_of, members, on_redis, opened, running, server_time, settled, streams
from .harness import memory

pytestmark = pytest.mark.anyio


class Observer:
    """Counts what is in a block, and the most there ever was."""

    def __init__(self) -> None:
        self.now = self.most = self.came = 0

    def __enter__(self) -> None:
        self.now += 1
        self.came += 1
        self.most = max(self.most, self.now)

    def __exit__(self, *_: object) -> None:
        self.now -= 1


@on_redis
@pytest.mark.parametrize("client", ["own", "the user's"])
async def test_never_more_than_so_many(redis_server: ExternalServer, redis_url: str, client: str) -> None:
    """Two workers, many tasks, releases that come twice and out of order,
    renewals between, and SCRIPT FLUSH.
    """
    settings = Settings(REDIS_URL=redis_url, RATE_LIMIT_TIMEOUT=20.0)
    managers: list[Any] = [RedisManager(settings) for _ in range(2)]
    users = [aioredis.Redis.from_url(redis_url) for _ in range(2)] if client != "own" else []
    limiters = [RateLimiter(each, timeout=20, settings=settings) for each in (users or managers)]
    hearts = [heart_of(manager_of(limiter)) for limiter in limiters]
    outside, chance, refused = Observer(), random.Random(7), 0
    working = 24

    async def work(limiter: RateLimiter) -> None:
        nonlocal refused, working
        for _ in range(50):
            async with limiter.slot("shared", 4) as decision:
                if decision.allowed:
                    with outside:
                        await asyncio.sleep(chance.random() / 500)
                else:
                    refused += 1
                    await asyncio.sleep(chance.random() / 100)
            if chance.random() < 0.02:
                redis_server.command("SCRIPT", "FLUSH")
        working -= 1

    async def beat() -> None:
        while working:
            for heart in hearts:
                for slot in list(heart._running.values()) if chance.random() < 0.3 else ():
                    # Sent once more, ahead of its own release.
                    heart._tell(_ghost(slot))
                await heart.beat()
            await asyncio.sleep(0.005)

    await asyncio.gather(beat(), *(work(limiter) for _ in range(12) for limiter in limiters))
    for limiter in limiters:
        await settled(manager_of(limiter))

    assert 4 == outside.most
    assert 24 * 50 == outside.came + refused
    assert outside.came > 20
    assert [] == members(redis_server.client())
    for user in users:
        await user.aclose()


def _ghost(slot: Any) -> Any:
    """One that has ended long ago: what is said of it says nothing about *slot*."""
    ghost = object.__new__(type(slot))
    ghost.holder, ghost.holders, ghost.charges, ghost.is_doubtful = b"ghost", (b"ghost",), slot.charges, False
    return ghost


@on_redis
async def test_two_loops_of_one_process_share_the_limit(patient: RedisManager, redis_client: redis.Redis) -> None:
    """Each has ids of its own, and renews what runs in it alone."""
    app = Stream()
    limited = RateLimitMiddleware(app, rules=[streams(3)], redis=patient)
    here = await opened(limited, 2)
    there: list[list[int]] = []

    async def other_loop() -> None:
        requests = await opened(limited, 2)
        there.append([await request.status() for request in requests])
        await heart_of(patient).beat()
        there.append([running(patient), len(heart_of(patient))])
        await ended(requests)
        await heart_of(patient).beat()
        await patient.close()

    thread = threading.Thread(target=lambda: asyncio.run(other_loop()))
    thread.start()
    while thread.is_alive():
        await asyncio.sleep(0.01)
    await heart_of(patient).beat()

    assert [200, 429] == sorted(there[0])
    assert [3, 1] == there[1]
    assert 2 == len(members(redis_client)) == running(patient)
    await ended(here)


async def test_a_loop_that_died_holds_nothing_here() -> None:
    """What ran in it is not counted in this process any more; Redis forgets it with its lease."""
    manager = RedisManager(memory())
    limiter = RateLimiter(manager)
    left: list[Any] = []

    async def dies() -> None:
        held = limiter.slot("a", 4)
        left.append(held)
        await held.__aenter__()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(dies()))
    thread.start()
    while thread.is_alive():
        await asyncio.sleep(0.01)
    assert 1 == running(manager)
    loop.close()
    async with limiter.slot("a", 4):
        assert 1 == running(manager)


def test_ids_are_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two are alike, and a fork has others than its parent."""
    ids, others = Ids(), Ids()
    mine = [ids.next() for _ in range(100)]
    monkeypatch.setattr(PROCESS, "forks", PROCESS.forks + 1)
    after = [ids.next() for _ in range(100)]

    assert 201 == len({*mine, *after, others.next()})
    assert mine[0][:12] == mine[1][:12] != after[0][:12]
    assert not any(each.split() != [each] for each in (*mine, *after))


async def test_a_fork_holds_nothing_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its parent has in flight is its parent's."""
    manager = RedisManager(memory())
    limiter = RateLimiter(manager)
    async with limiter.slot("a", 4):
        assert 1 == running(manager)
        monkeypatch.setattr(PROCESS, "forks", PROCESS.forks + 1)
        async with limiter.slot("a", 4):
            assert 1 == running(manager)


WORKER = """
import asyncio, sys
from redis_asgi import RateLimiter, RedisManager, Settings
from redis_asgi.ratelimit.limits import policy

policy.LEASE = 2
limiter = RateLimiter(RedisManager(Settings(REDIS_URL=sys.argv[1], RATE_LIMIT_TIMEOUT=5.0)), timeout=5)

async def main():
    held = [limiter.slot("a", 8) for _ in range(2)]
    for slot in held:
        assert (await slot.__aenter__()).allowed
    print("held", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def started(url: str) -> subprocess.Popen[bytes]:
    """A worker of its own process."""
    return subprocess.Popen([sys.executable, "-c", WORKER, url], stdout=subprocess.PIPE, env=clean_environment())


@on_redis
@pytest.mark.slow
async def test_a_killed_worker_holds_its_places_for_a_lease(redis_url: str, patient: RedisManager) -> None:
    """Four processes hold two each; two are killed,
    and what they held is free when its lease has ended.
    """
    limiter = RateLimiter(patient, timeout=5)
    workers = [started(redis_url) for _ in range(4)]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert b"held\n" == await asyncio.to_thread(worker.stdout.readline)
        async with limiter.slot("a", 8) as decision:
            assert not decision.allowed
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    for _ in range(100):
        await asyncio.sleep(0.1)
        async with limiter.slot("a", 1) as decision:
            if decision.allowed:
                return
    pytest.fail("the dead hold their places")


@on_redis
@pytest.mark.slow
async def test_a_decision_costs_the_same_with_many_workers(patient: RedisManager, redis_client: redis.Redis) -> None:
    """Server time a call with the requests of 200 workers in flight,
    against those of one: at most 1.5 times.
    """
    limiter = RateLimiter(patient, timeout=5)

    async def cost(others: int) -> float:
        key = make_partition("custom", f"of-{others}").key + b":default:c0:1"
        for i in range(others):
            redis_client.zadd(key, {f"worker-{i}": server_time(redis_client) + 25_000_000})
        best = float("inf")
        for _ in range(5):
            redis_client.config_resetstat()
            for _ in range(400):
                async with limiter.slot(f"of-{others}", 1000) as decision:
                    assert decision.allowed
            stats: Any = redis_client.info("commandstats")
            best = min(best, stats["cmdstat_evalsha"]["usec_per_call"])
        return best

    one, many = await cost(1), await cost(200)
    assert many <= 1.5 * one, (one, many)
