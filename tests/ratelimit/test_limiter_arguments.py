"""Arguments of `RateLimiter`: bad ones are named, any client is limited,
any client of Redis used as it is.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import fakeredis
import pytest
import redis
import redis.asyncio as aioredis
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from redis_asgi import ConfigurationError, RateLimiter, Settings
from redis_asgi.ratelimit.limits.policy import make_partition
from redis_asgi.ratelimit.transport.batcher import MAX_IN_FLIGHT

from .limiters import in_memory, verdicts

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        pytest.param({"cost": -1}, ValueError, "cost=-1 is not a whole number", id="negative cost"),
        pytest.param({"cost": 1.0}, ValueError, "cost=1.0", id="fractional cost"),
        pytest.param({"cost": "1"}, ValueError, "cost='1'", id="cost in text"),
        pytest.param({"cost": True}, ValueError, "cost=True", id="cost of truth"),
        pytest.param({"limits": "often"}, ConfigurationError, "Try '100/minute'", id="not in the notation"),
        pytest.param({"limits": "0/minute"}, ConfigurationError, "quota 0", id="quota of 0"),
        pytest.param({"limits": "5/0 minutes"}, ConfigurationError, "window of 0", id="window of 0"),
        pytest.param({"limits": "5/minute; 9/60 seconds"}, ConfigurationError, "same window", id="equal windows"),
        pytest.param({"limits": None}, ConfigurationError, "limits=None", id="no limits"),
        pytest.param({"limits": 5}, ConfigurationError, "limits=5", id="a number for limits"),
        pytest.param({"limits": ["5/minute"]}, ConfigurationError, "is not notation", id="a list of limits"),
        pytest.param({"limits": b"5/minute"}, ConfigurationError, "is not notation", id="limits in bytes"),
        pytest.param({"name": ""}, ConfigurationError, "name=''", id="empty name"),
        pytest.param({"name": "a:b"}, ConfigurationError, "name='a:b'", id="colon in the name"),
        pytest.param({"name": "x" * 41}, ConfigurationError, "1 to 40", id="long name"),
        pytest.param({"name": None}, ConfigurationError, "name=None", id="no name"),
        pytest.param({"strategy": "fast"}, ConfigurationError, "fixed-window", id="unknown strategy"),
        pytest.param(
            {"limits": "10001/minute", "strategy": "moving-window"},
            ConfigurationError,
            "sliding-window-counter",
            id="moving window too wide",
        ),
    ],
)
async def test_bad_argument_is_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    """It says which argument, what it was and what would work; nothing is counted."""
    limiter = in_memory()
    for method in (limiter.consume, limiter.peek):
        with pytest.raises(error, match=text):
            await method("a", **arguments)


@pytest.mark.parametrize("client_id", [None, b"a", 7, ("a",)])
async def test_client_that_is_no_string_is_a_type_error(client_id: Any) -> None:
    """Bytes and text that look alike would not share a counter."""
    limiter = in_memory()
    for method in (limiter.consume, limiter.peek, limiter.reset, limiter.check_rate_limit):
        with pytest.raises(TypeError, match=f"not {type(client_id).__name__}"):
            await cast(Any, method)(client_id)


@pytest.mark.parametrize(
    ("limit", "window", "text"),
    [
        (0, 60, "quota 0"),
        (-1, 60, "limits='-1/60"),
        (1.5, 60, "limit=1.5"),
        ("5", 60, "limit='5'"),
        (True, 60, "limit=True"),
        (None, 60, "limit=None"),
        (5, 0, "window of 0"),
        (5, 0.5, "window=0.5"),
        (5, None, "window=None"),
        (10**10, 60, "1000000000"),
        (5, 10**9, "366 days"),
    ],
)
async def test_bad_limit_or_window_is_named(limit: Any, window: Any, text: str) -> None:
    """Both are whole numbers in range."""
    with pytest.raises(ConfigurationError, match=text):
        await in_memory().check_rate_limit("a", limit, window)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"strategy": "fast"}, "strategy='fast'"),
        ({"on_redis_error": "ignore"}, "on_redis_error='ignore'"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": 61}, "timeout=61"),
        ({"timeout": "1"}, "timeout='1'"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": True}, "timeout=True"),
        ({"redis": 6379}, "not a RedisManager"),
        ({"redis": "http://localhost"}, "redis://"),
    ],
)
async def test_what_cannot_work_fails_at_construction(arguments: dict[str, Any], text: str) -> None:
    """With the argument, its value and one that works."""
    with pytest.raises(ConfigurationError, match=text):
        RateLimiter(**arguments)


async def test_synchronous_client_is_refused() -> None:
    """It would block the loop."""
    with redis.Redis() as client, pytest.raises(ConfigurationError, match=r"redis\.asyncio"):
        RateLimiter(cast(Any, client))


@asynccontextmanager
async def given_client(kind: str, url: str) -> AsyncIterator[aioredis.Redis]:
    """A client as a user might have it."""
    options: dict[str, Any] = {"retry": Retry(NoBackoff(), 0)}
    if kind == "fakeredis":
        client: aioredis.Redis = fakeredis.FakeAsyncRedis(**options)
    else:
        more: dict[str, dict[str, Any]] = {
            "plain": {},
            "decoding": {"decode_responses": True},
            "single connection": {"single_connection_client": True},
            "RESP3": {"protocol": 3},
            "small pool": {"max_connections": MAX_IN_FLIGHT},
        }
        options |= more[kind]
        client = aioredis.Redis.from_url(url, **options)
    try:
        yield client
    finally:
        await client.aclose()


@pytest.mark.parametrize("kind", ["plain", "decoding", "single connection", "RESP3", "fakeredis"])
async def test_client_of_the_user_is_used_as_it_is(redis_url: str, kind: str) -> None:
    """Whatever it decodes or speaks: the same decisions, and it stays open."""
    async with given_client(kind, redis_url) as client:
        limiter = RateLimiter(client, timeout=5)
        decisions = [await limiter.consume("a", "2/minute; 5/hour", strategy="moving-window") for _ in range(3)]

        assert [(True, "redis"), (True, "redis"), (False, "redis")] == [(d.allowed, d.source) for d in decisions]
        assert [0, 3] == [
            p.remaining for p in (await limiter.peek("a", "2/minute; 5/hour", strategy="moving-window")).policies
        ]
        assert await limiter.reset("a", name="default")
        assert not await limiter.reset("a")
        assert await client.ping()


async def test_many_tasks_share_a_small_pool(redis_url: str) -> None:
    """A thousand requests at once over as many connections as there may be batches: all are decided
    by Redis.
    """
    async with given_client("small pool", redis_url) as client:
        limiter = RateLimiter(client, timeout=5)
        decisions = await asyncio.gather(*(limiter.consume("a", "750/minute") for _ in range(1000)))

    assert ({"redis"}, 750) == ({d.source for d in decisions}, sum(d.allowed for d in decisions))


async def test_retries_of_a_given_client_are_warned_about(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Once per client, with a code and what to do: a lost reply would be counted again."""
    client = aioredis.Redis.from_url(redis_url, retry=Retry(NoBackoff(), 3))
    with caplog.at_level(logging.WARNING, "redis_asgi"):
        RateLimiter(client)
        RateLimiter(client)
    await client.aclose()

    (record,) = caplog.records
    assert ("client_retries", 3) == (record.__dict__["code"], record.__dict__["retries"])
    assert "Retry(NoBackoff(), 0)" in record.__dict__["fix"]


HOSTILE = [
    pytest.param("", id="empty"),
    pytest.param("\0", id="nul"),
    pytest.param("a\0b", id="nul inside"),
    pytest.param("{a}", id="braces"),
    pytest.param("}{", id="braces the wrong way round"),
    pytest.param("a\r\nSET x y\r\n", id="newlines"),
    pytest.param("\ud800", id="lone surrogate"),
    pytest.param("\udcff\udc80", id="bytes that were no UTF-8"),
    pytest.param("größe 名前 🦊", id="not ascii"),
    pytest.param("a" * 1_000_000, id="a megabyte"),
    pytest.param("*" * 300, id="pattern"),
    pytest.param("203.0.113.7", id="looks like an address"),
]


@pytest.mark.parametrize("client_id", HOSTILE)
async def test_hostile_client_is_limited_like_any_other(
    redis_url: str, redis_client: redis.Redis, client_id: str
) -> None:
    """Whatever a client calls itself: two are admitted, the third is not,
    and its key is short and plain.
    """
    limiter = RateLimiter(redis_url, timeout=5)
    decisions = [await limiter.consume(client_id, "2/minute") for _ in range(3)]

    assert [(True, "redis"), (True, "redis"), (False, "redis")] == [(d.allowed, d.source) for d in decisions]
    (key,) = cast("list[bytes]", redis_client.keys("*"))
    assert len(key) == len("rate_limit:{}") + 22
    assert await limiter.reset(client_id)


@pytest.mark.parametrize("client_id", HOSTILE)
async def test_hostile_client_is_limited_in_memory_too(client_id: str) -> None:
    """The twin takes the same names."""
    limiter = in_memory()

    assert [True, True, False] == await verdicts(limiter, 3, client_id, "2/minute")
    assert await limiter.reset(client_id)


any_text = st.text(st.characters(), max_size=20)


@example_settings(deadline=None)
@given(one=any_text, other=any_text)
def test_two_clients_never_share_a_counter(one: str, other: str) -> None:
    """Different names, however alike, have different keys; the same name always the same."""
    keys = [make_partition("custom", name).key for name in (one, other)]

    assert (one == other) == (keys[0] == keys[1])


@pytest.mark.parametrize(
    ("values", "address_key"),
    [
        pytest.param({}, True, id="plain"),
        pytest.param({"REDIS_KEY_SECRET": "s3cret"}, False, id="with a secret"),
    ],
)
async def test_address_stands_in_its_key_unless_there_is_a_secret(
    redis_url: str, redis_client: redis.Redis, values: dict[str, Any], address_key: bool
) -> None:
    """An operator can find a client in redis-cli, or, with a secret, nobody can."""
    settings = Settings(REDIS_URL=redis_url, **values)
    address = make_partition("ip", "203.0.113.7", plain=True, secret=settings.key_secret)
    await RateLimiter(redis_url, settings=settings).consume(address)

    (key,) = cast("list[bytes]", redis_client.keys("*"))
    assert address_key == (key == b"rate_limit:{203.0.113.7}")
    assert address_key == (b"203.0.113.7" in key)


async def test_prefix_stands_before_every_key(redis_url: str, redis_client: redis.Redis) -> None:
    """Several services on one Redis do not meet."""
    settings = Settings(REDIS_URL=redis_url, REDIS_KEY_PREFIX="shop:")
    await RateLimiter(settings=settings).consume("a", strategy="moving-window")

    keys = cast("list[bytes]", redis_client.keys("*"))
    assert 2 == len(keys)
    assert all(key.startswith(b"shop:rate_limit:{") for key in keys)
