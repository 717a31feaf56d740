"""`RateLimiter`: consume, peek and reset, in Redis and in memory."""

import asyncio
import gc
import logging
import time
from typing import Any, cast

import pytest
import redis

from redis_asgi import ConfigurationError, Decision, PolicyState, RateLimiter, RedisManager, Settings
from redis_asgi.ratelimit.limits.policy import STRATEGIES, make_partition
from redis_asgi.settings import StrategyName

from ..kit.fair_time import fair_time
from ..kit.proxy import FaultProxy
from ..kit.servers import ExternalServer, free_port
from .limiters import in_memory, verdicts

pytestmark = pytest.mark.anyio


every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


async def test_check_rate_limit_admits_the_limit(limiter: RateLimiter) -> None:
    """Three requests a minute: the fourth is refused, and another client is not."""
    assert [True, True, True, False] == [await limiter.check_rate_limit("a", limit=3) for _ in range(4)]
    assert await limiter.check_rate_limit("b", limit=3)


async def test_check_rate_limit_defaults_to_a_hundred_a_minute(limiter: RateLimiter) -> None:
    """Named so in its signature."""
    await limiter.consume("a", "100/minute", cost=99)

    assert [True, False] == [await limiter.check_rate_limit("a") for _ in range(2)]


async def test_check_rate_limit_admits_again_after_its_window() -> None:
    """A window of a second is over after a second."""
    limiter = in_memory()
    story = [await limiter.check_rate_limit("a", 1, 1) for _ in range(2)]
    await asyncio.sleep(1.01)

    assert [True, False, True] == [*story, await limiter.check_rate_limit("a", 1, 1)]


async def test_check_rate_limit_is_a_fixed_window_whatever_the_limiters_strategy(
    redis_url: str, redis_client: redis.Redis
) -> None:
    """Its numbers mean what they say under every limiter."""
    await RateLimiter(redis_url, strategy="gcra").check_rate_limit("a")

    (key,) = cast("list[bytes]", redis_client.keys("*"))
    assert [b"default:f60:1"] == redis_client.hkeys(key.decode())


async def test_decision_says_everything(limiter: RateLimiter) -> None:
    """Verdict, who decided, and per policy the quota, the window, what remains and when."""
    first = await limiter.consume("a", "2/minute; 3/hour", name="search", cost=2)
    second = await limiter.consume("a", "2/minute; 3/hour", name="search", cost=2)

    assert (True, None, ()) == (first.allowed, first.retry_after, first.violated)
    assert first.source in ("redis", "memory")
    assert not first.degraded
    assert [("search-60s", 2, 60, 0, False), ("search-3600s", 3, 3600, 1, False)] == [
        (p.name, p.quota, p.window, p.remaining, p.shadow) for p in first.policies
    ]
    assert [60.0, 3600.0] == [pytest.approx(p.reset, abs=5) for p in second.policies]
    assert (False, ("search-60s", "search-3600s")) == (second.allowed, second.violated)
    assert second.retry_after == pytest.approx(3600, abs=5)
    assert [60.0, 3600.0] == [pytest.approx(cast(float, p.retry_after), abs=5) for p in second.policies]


async def test_decision_and_its_states_are_frozen(limiter: RateLimiter) -> None:
    """Nobody edits a verdict that others read."""
    decision = await limiter.consume("a")

    for frozen, field in ((decision, "allowed"), (decision.policies[0], "remaining")):
        with pytest.raises(AttributeError):
            setattr(frozen, field, 7)


async def test_one_limit_bears_the_name_alone(limiter: RateLimiter) -> None:
    """With one limit the policy is of the given name, ``default`` if none was."""
    assert ["default"] == [p.name for p in (await limiter.consume("a")).policies]
    assert ["x"] == [p.name for p in (await limiter.consume("a", name="x")).policies]


@every_strategy
async def test_every_strategy_admits_its_quota(limiter: RateLimiter, strategy: StrategyName) -> None:
    """Five at once, and the sixth is told when to come back."""
    assert [True] * 5 + [False] == await verdicts(limiter, 6, "a", "5/hour", strategy=strategy)
    refused = await limiter.peek("a", "5/hour", strategy=strategy)
    assert refused.retry_after is not None
    assert 0 < refused.retry_after <= 7200


async def test_strategy_of_a_call_wins_over_the_limiters(redis_url: str, redis_client: redis.Redis) -> None:
    """Strategies do not share counters, so one client may have several."""
    limiter = RateLimiter(redis_url, strategy="gcra")
    await limiter.consume("a")
    await limiter.consume("a", strategy="sliding-window-counter")

    (key,) = cast("list[bytes]", redis_client.keys("*"))
    assert {b"default:g60:1", b"default:s60:1"} == set(cast("list[bytes]", redis_client.hkeys(key.decode())))


async def test_refused_request_is_charged_to_no_limit(limiter: RateLimiter) -> None:
    """The hour is not spent by what the second refuses."""
    await verdicts(limiter, 5, "a", "2/second; 10/hour")

    assert 8 == (await limiter.peek("a", "2/second; 10/hour", cost=0)).policies[1].remaining


async def test_names_keep_counters_apart_and_equal_ones_share(limiter: RateLimiter) -> None:
    """A counter belongs to client and name."""
    assert [True, False] == await verdicts(limiter, 2, "a", "1/minute", name="one")
    assert [True, False] == await verdicts(limiter, 2, "a", "1/minute", name="other")


async def test_changed_quota_keeps_the_count(limiter: RateLimiter) -> None:
    """A new limit applies to what was counted under the old one."""
    await verdicts(limiter, 5, "a", "10/minute")

    assert [False, True, False] == [
        (await limiter.consume("a", limits)).allowed for limits in ("5/minute", "6/minute", "6/minute")
    ]


@pytest.mark.parametrize("cost", [0, 1, 7, 10])
async def test_cost_is_charged(limiter: RateLimiter, cost: int) -> None:
    """A request takes as many units as it costs; nothing for 0."""
    decision = await limiter.consume("a", "10/minute", cost=cost)

    assert (True, 10 - cost) == (decision.allowed, decision.policies[0].remaining)


@pytest.mark.parametrize("cost", [11, 10**12, 10**30])
async def test_cost_above_the_quota_can_never_fit(limiter: RateLimiter, cost: int) -> None:
    """It is refused with no time to come back, and charges nothing."""
    decision = await limiter.consume("a", "10/minute", cost=cost)

    assert (False, None, ("default",)) == (decision.allowed, decision.retry_after, decision.violated)
    assert (None, 10) == (decision.policies[0].retry_after, decision.policies[0].remaining)


async def test_cost_of_nothing_is_admitted_by_a_full_counter(limiter: RateLimiter) -> None:
    """To look at the numbers one may consume nothing."""
    await verdicts(limiter, 2, "a", "1/minute")

    assert (await limiter.consume("a", "1/minute", cost=0)).allowed


async def test_peek_says_what_consume_would_and_charges_nothing(limiter: RateLimiter) -> None:
    """As often as you like."""
    for expected in (True, True, False):
        peeked = [await limiter.peek("a", "2/minute") for _ in range(3)]
        assert [expected] * 3 == [decision.allowed for decision in peeked]
        assert expected == (await limiter.consume("a", "2/minute")).allowed


async def test_peek_writes_no_key(redis_url: str, redis_client: redis.Redis) -> None:
    """Not even an empty one."""
    await RateLimiter(redis_url).peek("a")

    assert [] == redis_client.keys("*")


@every_strategy
async def test_reset_gives_the_full_quota_back(limiter: RateLimiter, strategy: StrategyName) -> None:
    """True when there was something to forget, the logs of moving windows included."""
    await verdicts(limiter, 3, "a", "2/minute", strategy=strategy)
    await limiter.consume("b", "2/minute", strategy=strategy)

    assert [True, False] == [await limiter.reset("a") for _ in range(2)]
    assert 2 == (await limiter.peek("a", "2/minute", strategy=strategy)).policies[0].remaining
    assert 1 == (await limiter.peek("b", "2/minute", strategy=strategy)).policies[0].remaining


@every_strategy
async def test_reset_of_a_name_leaves_the_others(limiter: RateLimiter, strategy: StrategyName) -> None:
    """All windows of the one rule, and nothing of any other, alike as they may be called."""
    names = ("api", "api2", "ap", "api-60", "xapi")
    for name in names:
        await limiter.consume("a", "3/minute; 9/hour", name=name, strategy=strategy)

    assert [True, False, False] == [await limiter.reset("a", name=name) for name in ("api", "api", "never")]
    left = {
        name: [
            p.remaining for p in (await limiter.peek("a", "3/minute; 9/hour", name=name, strategy=strategy)).policies
        ]
        for name in names
    }
    assert {"api": [3, 9], "api2": [2, 8], "ap": [2, 8], "api-60": [2, 8], "xapi": [2, 8]} == left


async def test_reset_leaves_no_key(redis_url: str, redis_client: redis.Redis) -> None:
    """Neither hash nor list, under a name and under all."""
    limiter = RateLimiter(redis_url, strategy="moving-window")
    await limiter.consume("a", "3/minute; 9/hour", name="api")
    await limiter.consume("a", name="other")
    assert 4 == redis_client.dbsize()

    await limiter.reset("a", name="api")
    assert 2 == redis_client.dbsize()
    await limiter.reset("a")
    assert 0 == redis_client.dbsize()


async def test_reset_of_a_bad_name_is_an_error(limiter: RateLimiter) -> None:
    """A typing error is not "there was nothing"."""
    with pytest.raises(ConfigurationError, match="name="):
        await limiter.reset("a", name="no such name")


async def test_memory_is_the_source_on_memory() -> None:
    """Not degraded: nobody meant it to be Redis."""
    limiter = RateLimiter("memory://")
    decision = await limiter.consume("source-of-memory")

    assert ("memory", False) == (decision.source, decision.degraded)


async def test_limiters_on_one_url_share_their_counters() -> None:
    """``memory://`` belongs to the manager, and equal settings share one."""
    one, other = RateLimiter("memory://"), RateLimiter("memory://")

    assert [True, False] == [
        (await limiter.consume("shared-on-memory", "1/minute")).allowed for limiter in (one, other)
    ]


@pytest.mark.parametrize(
    ("limiters", "calls", "said"),
    [
        ("sliding-window-counter", None, ["jobs"]),
        ("fixed-window", "sliding-window-counter", ["jobs"]),
        ("sliding-window-counter", "gcra", []),
    ],
)
async def test_small_quotas_of_the_sliding_counter_are_warned_about(
    caplog: pytest.LogCaptureFixture, limiters: StrategyName, calls: StrategyName | None, said: list[str]
) -> None:
    """As the middleware does it, at the first call that names one, and once:
    a name may be new with each call.
    """
    limiter = RateLimiter(RedisManager(Settings(REDIS_URL="memory://")), strategy=limiters)
    with caplog.at_level(logging.WARNING, "redis_asgi"):
        for name, limits in [("wide", "10/minute"), ("jobs", "9/minute"), ("jobs", "9/minute"), ("more", "8/minute")]:
            await limiter.consume("a", limits, name=name, strategy=calls)
        assert await limiter.check_rate_limit("a", 5)

    assert said == [record.__dict__["policy"] for record in caplog.records]
    assert all(record.__dict__["code"] == "small_sliding_quota" for record in caplog.records)


def closed_port(**values: Any) -> RedisManager:
    """A manager of a Redis that is not there."""
    return RedisManager(Settings(REDIS_URL=f"redis://127.0.0.1:{free_port()}", **values))


@pytest.mark.parametrize(
    ("mode", "allowed", "source", "retry_after"),
    [
        ("local", [True, True, False], "local", 60),
        ("open", [True, True, True], "none", None),
        ("closed", [False, False, False], "none", 1),
    ],
)
async def test_without_redis_on_redis_error_decides(
    mode: Any, allowed: list[bool], source: str, retry_after: float | None
) -> None:
    """Nothing is raised, and the decision says that Redis had no part in it."""
    limiter = RateLimiter(closed_port(), on_redis_error=mode)
    decisions = [await limiter.consume("a", "2/minute") for _ in range(3)]

    assert allowed == [decision.allowed for decision in decisions]
    assert {(source, True)} == {(decision.source, decision.degraded) for decision in decisions}
    waits = decisions[-1].retry_after
    assert retry_after == (None if waits is None else pytest.approx(waits, abs=2))
    assert (mode == "local") == bool(decisions[0].policies)


@every_strategy
async def test_without_redis_each_process_admits_its_share(strategy: StrategyName) -> None:
    """``ceil(10 / 4)`` is 3; the policy still says 10."""
    limiter = RateLimiter(closed_port(RATE_LIMIT_FALLBACK_DIVISOR=4))
    assert [True] * 3 + [False] * 2 == await verdicts(limiter, 5, "a", "10/hour", strategy=strategy)

    (state,) = (await limiter.peek("a", "10/hour", strategy=strategy)).policies
    assert (10, 0) == (state.quota, state.remaining)


async def test_without_redis_nothing_waits_beyond_the_timeout(redis_server: ExternalServer) -> None:
    """A server that swallows everything costs a request its timeout, no more."""
    where = redis_server.client().connection_pool.connection_kwargs
    async with FaultProxy(where["host"], where["port"]) as proxy:
        await proxy.set("blackhole")
        manager = RedisManager(Settings(REDIS_URL=proxy.url))
        limiter = RateLimiter(manager, timeout=0.1)
        started, fairly = time.monotonic(), fair_time()
        decision = await limiter.consume("a")
        waited, seconds = time.monotonic() - started, fair_time() - fairly
        await manager.close()

    assert ("local", True) == (decision.source, decision.allowed)
    assert waited >= 0.05
    assert seconds < 0.5


async def test_without_redis_reset_says_false() -> None:
    """Nothing that Redis holds was forgotten; what this process counts meanwhile is."""
    limiter = RateLimiter(closed_port())
    assert [True, False] == await verdicts(limiter, 2, "a", "1/minute")

    assert not await limiter.reset("a")
    assert (await limiter.consume("a", "1/minute")).allowed


async def test_error_of_redis_never_escapes(redis_server: ExternalServer, redis_url: str) -> None:
    """A key of somebody else's under our name: decided in this process."""
    limiter = RateLimiter(redis_url)
    key = make_partition("custom", "a").key
    redis_server.client().set(key, "odd")

    assert ("local", True) == ((await limiter.consume("a")).source, (await limiter.peek("a")).allowed)
    assert not await limiter.reset("a")


async def test_concurrent_requests_are_admitted_exactly(limiter: RateLimiter) -> None:
    """Three hundred tasks at once against two hundred: two hundred are admitted, in few trips."""
    decisions = await asyncio.gather(*(limiter.consume("a", "200/hour") for _ in range(300)))

    assert 200 == sum(decision.allowed for decision in decisions)
    assert set(range(200)) == {d.policies[0].remaining for d in decisions if d.allowed}


async def test_states_are_the_public_type(limiter: RateLimiter) -> None:
    """What is documented is what comes back."""
    decision = await limiter.consume("a")

    assert (Decision, PolicyState) == (type(decision), type(decision.policies[0]))


def test_limiter_works_in_one_loop_after_another(redis_url: str) -> None:
    """A module-level limiter outlives the loops it is used in."""
    limiter = RateLimiter(redis_url)

    async def once() -> bool:
        return (await limiter.consume("a", "2/minute")).allowed

    assert [True, True, False] == [asyncio.run(once()) for _ in range(3)]


async def test_limiter_built_per_call_still_counts() -> None:
    """Who builds a limiter for each call shares the default's counters all the same."""
    seen = []
    for _ in range(3):
        seen.append((await RateLimiter("memory://").consume("built per call", "2/minute")).allowed)
        gc.collect()

    assert [True, True, False] == seen


async def test_log_left_behind_by_a_reset_is_not_read(redis_url: str, redis_client: redis.Redis) -> None:
    """A moving window whose hash is gone starts anew, whatever its list still holds."""
    limiter = RateLimiter(redis_url, strategy="moving-window")
    before = [(await limiter.consume("a", "2/hour")).allowed for _ in range(3)]
    (key,) = [key for key in redis_client.keys() if redis_client.type(key) == b"hash"]
    redis_client.delete(key)
    await limiter.reset("a")
    after = [(await limiter.consume("a", "2/hour")).allowed for _ in range(3)]

    assert [True, True, False] == before == after
