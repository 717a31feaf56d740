"""The clock that is held: what it moves, and what it leaves behind."""

import asyncio
import math
import time
from typing import Any, get_args

import pytest
import redis
import redis.asyncio as aioredis
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from redis_asgi import RateLimiter, RateLimitMiddleware, RedisManager, Rule, Settings, rate_limit
from redis_asgi.ratelimit.limits.clock import CLOCK
from redis_asgi.settings import StrategyName
from redis_asgi.testing import RateLimitClock, held_clock, start_anew

from ..kit.servers import Cluster
from ..ratelimit.harness import Spy, client_of
from .conftest import MakeApp

pytestmark = pytest.mark.anyio
every_strategy = pytest.mark.parametrize("strategy", get_args(StrategyName))


@every_strategy
async def test_clock_decides(rate_limit_clock: RateLimitClock, make_app: MakeApp, strategy: StrategyName) -> None:
    """Nothing comes back while it stands still,
    and all of it when the windows have passed, in Redis as in memory.
    """
    async with client_of(make_app("10/minute", strategy=strategy)) as client:
        first = [(await client.get("/")).status_code for _ in range(11)]
        rate_limit_clock.advance(5 * 60)
        second = [(await client.get("/")).status_code for _ in range(11)]

    assert [200] * 10 + [429] == first == second


async def test_fields_count_down(rate_limit_clock: RateLimitClock, make_app: MakeApp) -> None:
    """``t``, ``Retry-After`` and ``X-RateLimit-Reset`` are those of the clock, of remembered
    refusals too.
    """
    told = []
    async with client_of(make_app("1/minute", headers="both")) as client:
        await client.get("/")
        for passed in (0, 0.5, 0.5, 0.25, 28.75, 29):
            rate_limit_clock.advance(passed)
            refused = await client.get("/")
            assert refused.status_code == 429
            fields = refused.headers
            told.append((fields["ratelimit"], int(fields["retry-after"])))
            assert math.ceil(rate_limit_clock.now + int(fields["retry-after"])) - 1 <= int(fields["x-ratelimit-reset"])
            assert int(fields["x-ratelimit-reset"]) <= math.ceil(rate_limit_clock.now + int(fields["retry-after"]))

    assert [(f'"default";r=0;t={left}', left) for left in (60, 60, 59, 59, 30, 1)] == told


async def test_refusal_is_remembered_by_the_clock(
    rate_limit_clock: RateLimitClock, redis_url: str, redis_client: redis.Redis
) -> None:
    """A refusal answers for a second of the clock, however long that lasts, and not for more."""
    settings = Settings(REDIS_URL=redis_url, RATE_LIMIT_TIMEOUT=20)
    async with client_of(RateLimitMiddleware(Spy(), "1/minute", settings=settings)) as client:
        await client.get("/")
        await client.get("/")
        redis_client.flushdb()
        kept = (await client.get("/")).status_code
        rate_limit_clock.advance(1)
        gone = (await client.get("/")).status_code

    assert (429, 200) == (kept, gone)


async def test_moment_of_a_batch_is_of_the_clock(
    rate_limit_clock: RateLimitClock, redis_url: str, redis_client: redis.Redis
) -> None:
    """A refusal that was under way when the clock was moved says nothing of later."""
    settings = Settings(REDIS_URL=redis_url, RATE_LIMIT_TIMEOUT=20)
    app = RateLimitMiddleware(Spy(), "1/minute", settings=settings)
    async with client_of(app) as client:
        await client.get("/")
        redis_client.client_pause(200)
        under_way = asyncio.create_task(client.get("/"))
        batcher: Any = app._engine._last_batcher
        while not batcher._sent:
            await asyncio.sleep(0)
        rate_limit_clock.advance(60)
        answers = [(await under_way).status_code, (await client.get("/")).status_code]

    assert [429, 200] == answers


async def test_direct_use(rate_limit_clock: RateLimitClock, manager: RedisManager) -> None:
    """`RateLimiter` goes by it: refused for the minute, and admitted when that has passed."""
    limiter = RateLimiter(manager, timeout=20)
    await limiter.consume("ada", "1/minute")
    refused = await limiter.consume("ada", "1/minute")
    rate_limit_clock.advance(refused.retry_after or 0)

    assert refused.retry_after == 60
    assert (await limiter.consume("ada", "1/minute")).allowed


async def test_dry_run_goes_by_it(rate_limit_clock: RateLimitClock, manager: RedisManager) -> None:
    """What a shadow says is of the clock too."""
    spy = Spy()
    rules = [Rule("2/minute", name="strict", shadow=True)]
    app = RateLimitMiddleware(spy, rules=rules, redis=manager)
    async with client_of(app) as client:
        for passed in (0, 0, 0, 60):
            rate_limit_clock.advance(passed)
            await client.get("/")

    assert [1, 0, 0, 1] == [scope["state"]["rate_limit"].policies[0].remaining for scope in spy.scopes]


async def test_limit_of_a_route_goes_by_it(rate_limit_clock: RateLimitClock, manager: RedisManager) -> None:
    """A decorated endpoint is limited again and again."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    @rate_limit("1/hour", redis=manager)
    async def report(request: Request) -> Response:
        return PlainTextResponse("figures")

    answers = []
    async with client_of(Starlette(routes=[Route("/report", report)])) as client:
        for passed in (0, 3599, 1):
            rate_limit_clock.advance(passed)
            answers.append((await client.get("/report")).status_code)

    assert [200, 429, 200] == answers


async def test_key_lives_as_long_as_the_clock_stands_still(
    rate_limit_clock: RateLimitClock, redis_url: str, redis_client: redis.Redis
) -> None:
    """Redis, whose own time goes on, keeps a counter of a second for minutes."""
    await RateLimiter(redis_url, timeout=20).consume("ada", "1/second")
    [key] = redis_client.keys()

    assert redis_client.ttl(key) > 500


@every_strategy
async def test_nothing_is_left_in_redis(redis_url: str, redis_client: redis.Redis, strategy: StrategyName) -> None:
    """What was counted is removed in the end, logs too,
    whatever the loop does by then; other keys stay.
    """
    limiter = RateLimiter(redis_url, timeout=20)
    await limiter.consume("bob", "5/minute")
    with held_clock() as clock:
        clock.advance(3600)
        await limiter.consume("ada", "5/minute", strategy=strategy)
        assert len(redis_client.keys()) > 1
    kept = redis_client.keys()

    assert 1 == len(kept)
    assert (await limiter.peek("bob", "5/minute")).policies[0].remaining == 4


def test_nothing_is_left_by_a_client_of_the_user(redis_url: str, redis_client: redis.Redis) -> None:
    """Of a client that a loop which has ended had made, the keys are removed too."""

    async def consume() -> None:
        client = aioredis.Redis.from_url(redis_url, retry=Retry(NoBackoff(), 0))
        await RateLimiter(client, timeout=20).consume("ada", "5/minute")
        clients.append(client)
        await client.aclose()

    clients: list[aioredis.Redis] = []
    with held_clock():
        asyncio.run(consume())
        assert len(redis_client.keys()) == 1

    assert [] == redis_client.keys()


async def test_nothing_of_later_is_left_here(manager: RedisManager) -> None:
    """What was counted in the future of the real clock counts no more when that is back."""
    limiter = RateLimiter(manager, timeout=20)
    with held_clock() as clock:
        clock.advance(3600)
        await limiter.consume("ada", "1/minute")
        assert not (await limiter.consume("ada", "1/minute")).allowed

    assert (await limiter.consume("ada", "1/minute")).allowed


async def test_lost_server_does_not_hold_up_the_end() -> None:
    """Keys that cannot be removed are left to expire, without a word."""
    with held_clock():
        decision = await RateLimiter("redis://127.0.0.1:1").consume("ada", "1/minute")

    assert decision.source == "local"


async def test_real_clocks_are_back(rate_limit_clock: RateLimitClock) -> None:
    """Within `held_clock` a second one is refused, and whoever lets go leaves nothing behind."""
    with pytest.raises(RuntimeError, match="held already"), held_clock():
        pass
    assert CLOCK.redis is not None


def test_clock_is_that_of_the_process_again() -> None:
    """After it the limits go by the real clocks, and Redis by its own."""
    with held_clock() as clock:
        clock.advance(3600)
    now = time.monotonic_ns()

    assert CLOCK.redis is None
    assert now <= CLOCK.monotonic_ns() <= now + 60 * 10**9
    assert (time.time, time.monotonic) == (CLOCK.unix, CLOCK.monotonic)


@pytest.mark.parametrize("seconds", [-1, 1e9 + 1, math.nan, math.inf, True, "61"])
def test_time_goes_forward(rate_limit_clock: RateLimitClock, seconds: Any) -> None:
    """What is no time that can pass is refused, and named."""
    now = rate_limit_clock.now
    with pytest.raises(ValueError, match=r"Try 61\.") as refused:
        rate_limit_clock.advance(seconds)

    assert repr(seconds) in str(refused.value)
    assert now == rate_limit_clock.now


@given(up=st.integers(0, 3 * 366 * 86_400 * 10**6), waits=st.lists(st.integers(0, 10**11), min_size=1, max_size=5))
def test_wait_that_has_passed_is_over(up: int, waits: list[int]) -> None:
    """Whatever the machine's uptime (us),
    what was to last so long (us) has, and not a microsecond more.
    """
    with held_clock() as clock:
        clock._began_here = up
        for wait in waits:
            at = CLOCK.monotonic()
            clock.advance(wait / 1e6)

            assert 0 <= CLOCK.monotonic() - (at + wait / 1e6) < 1e-6


def test_clock_begins_at_the_time_of_day(rate_limit_clock: RateLimitClock) -> None:
    """Its time is Unix seconds, and a fraction may pass."""
    began = rate_limit_clock.now
    rate_limit_clock.advance(0.5)

    assert began <= time.time()
    assert 0.5 == pytest.approx(rate_limit_clock.now - began)
    assert repr(rate_limit_clock) == f"RateLimitClock(now={rate_limit_clock.now!r})"


async def test_new_start(manager: RedisManager) -> None:
    """Counters and refusals of the process are forgotten;
    those in Redis are not this process's to forget.
    """
    limiter = RateLimiter(manager, timeout=20)
    await limiter.consume("ada", "1/minute")
    await limiter.consume("ada", "1/minute")
    start_anew()

    assert (await limiter.consume("ada", "1/minute")).allowed is not manager.has_redis


async def test_new_start_of_vectors() -> None:
    """Vectors of ``memory://`` are forgotten too, in whatever layer they are."""
    from redis_asgi import EmbeddingCache

    cache = EmbeddingCache(RedisManager(Settings(REDIS_URL="memory://")))
    await cache.set_embedding("a", [1.0, 2.0])
    start_anew()

    assert await cache.get_embedding("a") is None


def _keys(cluster: Cluster) -> list[Any]:
    return [key for node in cluster.nodes for key in node.client().keys()]


@pytest.mark.parametrize("given", [False, True])
def test_nothing_is_left_in_a_cluster(cluster: Cluster, given: bool) -> None:
    """On every node the clock decides, and what was counted there is removed;
    a client of the user's is one too.
    """

    async def consume() -> list[bool]:
        settings = Settings(REDIS_URL=cluster.url, REDIS_CLUSTER=True)
        client = aioredis.RedisCluster.from_url(cluster.url) if given else None
        limiter = RateLimiter(client if client is not None else RedisManager(settings), timeout=20)
        clients.append(client)
        answers = []
        for passed in (0, 0, 60):
            clock.advance(passed)
            answers += [(await limiter.consume(str(i), "1/minute", strategy="moving-window")).allowed for i in range(6)]
        if client is not None:
            await client.aclose()
        return answers

    clients: list[Any] = []
    with held_clock() as clock:
        assert 6 * [True] + 6 * [False] + 6 * [True] == asyncio.run(consume())
        assert 12 == len(_keys(cluster))

    assert [] == _keys(cluster)
