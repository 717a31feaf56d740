"""Redis far away: what a round trip may take of the deadline,
and when a batch leaves while others are under way.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import redis.asyncio as aioredis

from redis_asgi import RateLimiter, RedisManager, Settings
from redis_asgi.connection.breaker import Breaker
from redis_asgi.errors import Failure
from redis_asgi.ratelimit.limits.charge import Charge, Charges
from redis_asgi.ratelimit.limits.decision import Decision
from redis_asgi.ratelimit.limits.policy import Policy, PolicySet, make_partition
from redis_asgi.ratelimit.transport.batcher import MANY, MAX_COUNTERS, MAX_IN_FLIGHT, Batcher
from redis_asgi.ratelimit.transport.check import Check, SubmittedBatch

from ..kit.patience import PATIENCE
from ..kit.proxy import FaultProxy
from ..kit.servers import Server

pytestmark = pytest.mark.anyio

HUNDRED = PolicySet((Policy("default", 100, 60),))
DEADLINE = 0.5  # seconds
FAR = 0.6 * DEADLINE  # a trip; two in turn would be late


class Hold:
    """A transport that sends at once and is never answered, unless told to.

    Args:
        is_ready: Whether there is a connection.
    """

    def __init__(self, *, is_ready: bool = True) -> None:
        self.is_ready = is_ready
        self.under_way: deque[SubmittedBatch] = deque()
        self.preparing = 0

    @property
    def busy(self) -> int:
        return len(self.under_way) + self.preparing

    def start(self, batcher: Batcher) -> None:
        if not self.is_ready:
            self.preparing = 1
            return
        batch = batcher.take()
        if batch is not None:
            self.under_way.append(batch)

    def answer(self, batcher: Batcher) -> None:
        """Fail the oldest batch, which for the one that waits behind it is as good as any answer."""
        batcher.completed(self.under_way.popleft(), Failure.REPLY)
        batcher.start_if_due()

    def read(self) -> None:
        pass

    def abort(self, batch: SubmittedBatch) -> None:
        self.under_way.remove(batch)

    def renew(self) -> None:
        pass

    def timeout_cause(self) -> Failure:
        return Failure.TIMEOUT

    async def aclose(self) -> None:
        pass


async def _nothing() -> None:
    pass


@asynccontextmanager
async def held(transport: Hold) -> AsyncIterator[Batcher]:
    """A batcher on *transport*."""
    batcher = Batcher(transport, Breaker(_nothing, _nothing))
    yield batcher
    for batch in transport.under_way:
        batcher.completed(batch, Failure.CONNECTION)
    await batcher.aclose()


def submit(batcher: Batcher, *, timeout: float = 1.0, counters: int = 1) -> Check:
    """Queue a check of so many counters."""
    each = Charge(HUNDRED, make_partition("ip", "192.0.2.1", plain=True), 1)
    check = Check(batcher.loop, "consume", Charges([each] * counters), timeout)
    batcher.submit(check)
    return check


async def written(check: Check) -> float:
    """When the batch of *check* was written, once it is."""
    async with asyncio.timeout(PATIENCE):
        while not check.written:
            await asyncio.sleep(0.001)
    return check.written


async def test_a_batch_leaves_a_tenth_of_the_deadline_after_the_last() -> None:
    """An idle limiter sends at the end of the turn;
    behind a batch under way the next waits a tenth, and shares.
    """
    async with held(Hold()) as batcher:
        first = submit(batcher)
        await asyncio.sleep(0)
        assert first.written
        second, third = submit(batcher), submit(batcher)
        assert 0.1 <= await written(second) - first.written
        assert second.written == third.written
        await asyncio.sleep(0.11)
        fourth = submit(batcher)  # the last one was written longer ago than that
        await asyncio.sleep(0.02)
        assert fourth.written


async def test_an_answer_sends_what_waits_before_its_time() -> None:
    """A reply that leaves nothing in flight sends the next batch at once;
    one that leaves others sends none early.
    """
    transport = Hold()
    async with held(transport) as batcher:
        submit(batcher, timeout=50)
        await asyncio.sleep(0)
        submit(batcher, timeout=50, counters=MAX_COUNTERS)
        waiting = submit(batcher, timeout=50)
        assert [2, 0.0] == [transport.busy, waiting.written]
        transport.answer(batcher)
        await asyncio.sleep(0.01)
        assert [1, 0.0] == [transport.busy, waiting.written]
        transport.answer(batcher)
        assert [1, True] == [transport.busy, waiting.written > 0]


@pytest.mark.parametrize("counters", [1, MAX_COUNTERS], ids=["small", "full"])
async def test_ten_at_most_are_under_way(counters: int) -> None:
    """Neither the time nor a full batch sends an eleventh; the next answer does."""
    transport = Hold()
    async with held(transport) as batcher:
        for _ in range(MAX_IN_FLIGHT):
            await written(submit(batcher, timeout=0.3, counters=counters) if transport.busy else submit(batcher))
        more = submit(batcher, timeout=0.3 if counters == 1 else 5, counters=counters)
        await asyncio.sleep(0.05)
        assert [MAX_IN_FLIGHT, 0.0] == [transport.busy, more.written]
        transport.answer(batcher)
        await written(more)
        assert MAX_IN_FLIGHT == transport.busy


async def test_nothing_is_started_beside_a_connection_that_is_made() -> None:
    """What waits for a connection goes with it, however long that takes:
    there is not a second one every tenth.
    """
    transport = Hold(is_ready=False)
    async with held(transport) as batcher:
        first = submit(batcher, timeout=0.5)
        await asyncio.sleep(0.06)
        transport.is_ready = True
        second = submit(batcher, timeout=0.5)
        await asyncio.sleep(0.06)
        assert [1, 0.0, 0.0] == [transport.busy, first.written, second.written]


async def test_who_is_in_a_hurry_takes_the_patient_along() -> None:
    """Parts of one process may have deadlines of their own:
    the shortest of those that wait says when they leave.
    """
    async with held(Hold()) as batcher:
        first = submit(batcher, timeout=50)
        await asyncio.sleep(0)
        patient, hurried = submit(batcher, timeout=50), submit(batcher, timeout=0.2)
        assert 0.02 <= await written(hurried) - first.written
        assert patient.written == hurried.written


async def everybody(arrivals: str, ask: Callable[[int], "asyncio.Future[None]"]) -> None:
    """Requests as clients send them: *n* that each wait for their answer,
    or 200 a second whatever the answers do.
    """
    if arrivals == "open":
        async with asyncio.TaskGroup() as group:
            for n in range(200):
                group.create_task(_one(ask, n))
                await asyncio.sleep(0.005)
        return

    async def client(n: int) -> None:
        await asyncio.sleep(0.01 * n)
        for _ in range(3):
            await ask(n)

    await asyncio.gather(*(client(n) for n in range(int(arrivals))))


async def _one(ask: Callable[[int], "asyncio.Future[None]"], n: int) -> None:
    await ask(n % 50)


@pytest.mark.parametrize("arrivals", ["1", "4", "32", "open"])
async def test_a_long_trip_is_still_decided_by_redis(private_server: Callable[..., Server], arrivals: str) -> None:
    """Of a trip that takes more than half of the deadline nobody waits for two:
    all decided by Redis, each once.
    """
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        manager = RedisManager(Settings(REDIS_URL=proxy.url))
        limiter = RateLimiter(manager, timeout=DEADLINE)
        await limiter.consume("warm", "1/hour")
        await proxy.set("delay", seconds=FAR)
        decisions: list[Decision] = []

        async def ask(n: int) -> None:
            decisions.append(await limiter.consume(f"client-{n}", "1000/hour", name="far"))

        await everybody(arrivals, lambda n: asyncio.ensure_future(ask(n)))
        assert {"redis"} == {decision.source for decision in decisions}
        assert "closed" == manager.breaker_state
        look = server.client()
        counts = [value.split()[1] for key in look.keys() for value in look.hgetall(key).values()]
        assert len(decisions) == sum(map(int, counts)) - 1
        assert 1 == len(server.connections())
        await manager.close()


async def test_a_check_that_had_no_time_for_a_trip_tells_nothing() -> None:
    """Late for having waited for a connection, it is no failure of the server,
    until its batch's own limit passes.
    """
    transport = Hold(is_ready=False)
    async with held(transport) as batcher:
        check = submit(batcher, timeout=0.2)
        await asyncio.sleep(0.1)
        transport.preparing = 0
        transport.is_ready = True
        batcher.start_if_due()
        assert Failure.TIMEOUT is await check.future
        assert 0 == batcher.breaker._failures
        async with asyncio.timeout(PATIENCE):
            while transport.under_way:
                await asyncio.sleep(0.01)
        assert 1 == batcher.breaker._failures


async def test_redis_is_found_again_far_away(private_server: Callable[..., Server]) -> None:
    """Where no connection can be made within a probe's limit,
    nor a trial's deadline, an outage ends all the same.
    """
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        manager = RedisManager(Settings(REDIS_URL=proxy.url))
        limiter = RateLimiter(manager, timeout=0.3)
        await limiter.consume("warm")
        await proxy.set("refuse")
        while (await limiter.consume("a")).source == "redis" or manager.breaker().admits():
            pass
        await proxy.set("delay", seconds=0.2)  # a greeting, and then a PING or a check
        async with asyncio.timeout(PATIENCE):
            while (await limiter.consume("b", "1000/hour")).source != "redis":
                await asyncio.sleep(0.05)
        assert "closed" == manager.breaker_state
        await manager.close()


async def test_a_users_pool_of_one_is_not_asked_all_the_time(private_server: Callable[..., Server]) -> None:
    """Where the only connection of a given client is under way,
    it is asked for now and then, not every turn.
    """
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        client = aioredis.Redis.from_url(proxy.url, max_connections=1)
        limiter = RateLimiter(client, timeout=DEADLINE)
        await limiter.consume("warm")
        await proxy.set("delay", seconds=0.2 * DEADLINE)
        tries = 0
        pool = client.connection_pool
        give = pool.get_connection

        async def counted() -> object:
            nonlocal tries
            tries += 1
            return await give()

        pool.get_connection = counted  # type: ignore[assignment,method-assign]  # the same, counted
        first = asyncio.ensure_future(limiter.consume("a"))
        await asyncio.sleep(0.01)
        seven = "; ".join(f"1000/{n} seconds" for n in range(1, 8))  # so that few checks fill more than a batch
        full = [asyncio.ensure_future(limiter.consume(f"b{n}", seven, name="b")) for n in range(MANY - 2)]
        decisions = await asyncio.gather(first, *full)
        assert {"redis"} == {decision.source for decision in decisions}
        assert tries < 50
        await client.aclose()
