"""What a caller may pass as ``redis=``, and what is shown of it."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import redis
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from redis_asgi import ConfigurationError, RedisManager, Settings
from redis_asgi.connection.client_factory import Client
from redis_asgi.connection.redis_argument import resolve_manager

from ..kit.logs import event_of
from .managers import SECRET, ask, managed

pytestmark = pytest.mark.anyio


def test_equal_settings_share_one_manager() -> None:
    """Parts that are given nothing, or equal settings,
    or the same URL share a manager; others do not.
    """
    default, ours = resolve_manager(None, None)

    assert ours
    assert default is resolve_manager(None, Settings())[0]
    by_url, ours = resolve_manager("redis://redis.test", None)
    assert ours
    assert by_url is resolve_manager("redis://redis.test", None)[0]
    assert by_url is resolve_manager(None, Settings(REDIS_URL="redis://redis.test"))[0]
    assert by_url is not default
    assert by_url is not resolve_manager("redis://redis.test/1", None)[0]


def test_url_keeps_the_other_settings() -> None:
    """``redis=URL`` changes where Redis is and nothing else."""
    manager, _ = resolve_manager("redis://redis.test", Settings(REDIS_POOL_SIZE=3, REDIS_PASSWORD=SECRET))

    assert manager.settings.REDIS_POOL_SIZE == 3
    assert manager.settings.REDIS_PASSWORD is not None
    assert manager.settings.REDIS_PASSWORD.get_secret_value() == SECRET


def test_given_manager_is_used_as_it_is() -> None:
    """A manager of the user's is the one that is used, and its life is the user's business."""
    manager = RedisManager(Settings())

    assert (manager, False) == resolve_manager(manager, None)


async def test_given_client_is_never_closed_or_changed(redis_url: str) -> None:
    """A client of the user's is handed out as it is and survives ``close()`` with its connection."""
    async with aioredis.Redis.from_url(redis_url, protocol=2, decode_responses=True) as client:
        manager, ours = resolve_manager(client, None)
        before = await ask(client, "CLIENT", "ID")

        assert not ours
        assert client is await manager.get_connection()
        assert manager.pool is client.connection_pool
        await manager.close()
        assert before == await ask(client, "CLIENT", "ID")
        assert client is await manager.get_connection()


def _retry_warnings(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if event_of(record) == "redis_asgi.client_retries"]


@pytest.mark.parametrize(
    ("make", "warnings"),
    [
        pytest.param(lambda: aioredis.Redis(), 1, id="the library's ten retries"),
        pytest.param(lambda: aioredis.Redis(retry=Retry(NoBackoff(), 1)), 1, id="one retry"),
        pytest.param(lambda: aioredis.Redis(retry=Retry(NoBackoff(), 0)), 0, id="no retry"),
        pytest.param(lambda: aioredis.Redis.from_url("redis://redis.test"), 0, id="from a URL"),
        pytest.param(lambda: aioredis.RedisCluster(host="redis.test"), 1, id="cluster's own retries"),
        pytest.param(
            lambda: aioredis.RedisCluster(host="redis.test", retry=Retry(NoBackoff(), 0)), 0, id="cluster, no retry"
        ),
    ],
)
async def test_client_that_retries_is_warned_about_once(
    caplog: pytest.LogCaptureFixture, make: Callable[[], Client], warnings: int
) -> None:
    """However many parts are given a client,
    one line says that its retries may count twice, and the fix.
    """
    client = make()
    for _ in range(3):
        resolve_manager(client, None)

    found = _retry_warnings(caplog)
    assert warnings == len(found)
    for record in found:
        assert vars(record)["code"] == "client_retries"
        assert "Retry(NoBackoff(), 0)" in vars(record)["fix"]
    if isinstance(client, aioredis.RedisCluster):
        await client.aclose()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: redis.Redis(), "is synchronous", id="sync client"),
        pytest.param(lambda: aioredis.Redis().pipeline(), "is a pipeline", id="pipeline"),
        pytest.param(lambda: redis.Redis().pipeline(), "is synchronous", id="sync pipeline"),
        pytest.param(lambda: 6379, "is not a RedisManager", id="number"),
        pytest.param(lambda: "localhost:6379", "REDIS_URL='localhost:6379'", id="not a URL"),
        pytest.param(lambda: f"http://:{SECRET}@x", "REDIS_URL=", id="wrong scheme"),
    ],
)
async def test_unfit_redis_argument_is_refused(make: Callable[[], Any], message: str) -> None:
    """What cannot work is a ``ConfigurationError`` at construction that says what to pass instead."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        resolve_manager(make(), None)

    assert SECRET not in str(caught.value)


async def test_memory_has_no_client() -> None:
    """On ``memory://`` there is nothing to connect to; the error says how to get one."""
    manager = RedisManager(Settings(REDIS_URL="memory://"))

    assert not manager.has_redis
    assert manager.pool is None
    for call in (manager.get_connection, manager.initialize_pool):
        with pytest.raises(ConfigurationError, match="Set REDIS_URL=redis://"):
            await call()
    manager.retain()
    await manager.release()


@pytest.mark.parametrize(
    "values",
    [
        {"REDIS_PASSWORD": SECRET, "REDIS_USERNAME": SECRET, "REDIS_KEY_SECRET": SECRET},
        {"REDIS_URL": f"redis://app:{SECRET}@redis.test:6379/0"},
        {"REDIS_URL": f"redis://redis.test:6379/0?password={SECRET}"},
        {"REDIS_SENTINEL_PASSWORD": SECRET, "REDIS_SENTINELS": "a:1", "REDIS_SENTINEL_MASTER": "mymaster"},
    ],
    ids=["parts", "URL", "query", "sentinel"],
)
async def test_manager_shows_where_but_no_secret(values: dict[str, Any]) -> None:
    """``repr`` of a manager says where it points, and neither it nor its pool shows a password."""
    async with managed(**values) as manager:
        await manager.get_connection()
        shown = f"{manager!r} {manager!s} {manager.pool!r}"

        assert SECRET not in shown
        assert any(place in repr(manager) for place in ("redis.test", "localhost:6379/0", "mymaster"))


async def test_a_given_client_is_one_manager(redis_url: str) -> None:
    """Two parts given the same client share its batches, refusals and local counters."""
    client = aioredis.Redis.from_url(redis_url)
    first, _ = resolve_manager(client, None)
    second, _ = resolve_manager(client, None)
    other, _ = resolve_manager(aioredis.Redis.from_url(redis_url), None)
    await client.aclose()

    assert first is second
    assert first is not other
