"""Sentinels that ask who we are: they are told, and when they refuse, it is they who are blamed."""

import asyncio
import logging
from typing import Any

import pytest
from redis.asyncio.sentinel import MasterNotFoundError

from redis_asgi import RateLimiter, RedisManager, Settings, check_redis_health
from redis_asgi.connection.sentinels import SentinelRefusal
from redis_asgi.errors import Failure, classify
from redis_asgi.inspection.diagnosis import diagnose
from redis_asgi.inspection.findings import Finding
from redis_asgi.inspection.trouble import explain

from ..kit.logs import event_of
from ..kit.servers import SentinelTrio

pytestmark = pytest.mark.anyio

PASSWORD = "sentinel-secret"


def settings_for(trio: SentinelTrio, password: str | None, **more: Any) -> Settings:
    """Settings that lead to *trio*, with that *password* for its sentinels."""
    where: dict[str, Any] = {"REDIS_SENTINELS": trio.addresses, "REDIS_SENTINEL_MASTER": SentinelTrio.MASTER}
    return Settings(**where, **{"REDIS_SENTINEL_PASSWORD": password, **more})


async def health_of(settings: Settings) -> dict[str, Any]:
    """What a health check finds."""
    manager = RedisManager(settings)
    try:
        return dict(await check_redis_health(await manager.get_connection()))
    finally:
        await manager.close()


async def of_sentinels(settings: Settings) -> Finding:
    """What ``redis-asgi check`` says of the sentinels."""
    (found,) = [finding async for finding in diagnose(settings) if finding.check == "sentinels"]
    return found


async def test_password(locked_sentinels: SentinelTrio) -> None:
    """With it the master is found, although it has another or none;
    its own is not what the sentinels are told.
    """
    settings = settings_for(locked_sentinels, PASSWORD)
    manager = RedisManager(settings)

    assert "redis" == (await RateLimiter(manager, timeout=5).consume("a")).source
    assert "healthy" == (await health_of(settings))["status"]
    assert "ok" == (await of_sentinels(settings)).level
    await manager.close()


@pytest.mark.parametrize(
    ("password", "said", "fix"),
    [
        (None, "wants a password, and we have none", "Set REDIS_SENTINEL_PASSWORD"),
        ("wrong-secret", "refuses the user name or the password", "Check REDIS_SENTINEL_USERNAME"),
    ],
    ids=["none", "wrong"],
)
async def test_refused_login(
    locked_sentinels: SentinelTrio, caplog: pytest.LogCaptureFixture, password: str | None, said: str, fix: str
) -> None:
    """A missing and a wrong password are ``auth`` in every part,
    and the words name the sentinels and the setting.
    """
    settings = settings_for(locked_sentinels, password, REDIS_PASSWORD="of-the-master")
    assert "redis_auth" == (await health_of(settings))["error"]

    found = await of_sentinels(settings)
    assert ("fail", True, True) == (found.level, said in found.text, fix in found.fix)
    assert "sentinel" in found.text

    manager = RedisManager(settings)
    caplog.clear()
    limiter = RateLimiter(manager, timeout=5)
    assert ["local"] * 10 == [(await limiter.consume("a")).source for _ in range(10)]
    assert ("open", Failure.AUTH) == (manager.breaker_state, manager.breaker().reason)
    with pytest.raises(SentinelRefusal) as raised:
        await (await manager.get_connection()).ping()
    trouble = await explain(raised.value, settings)
    assert (True, True) == (trouble.text.startswith("the sentinels"), fix in trouble.fix)
    await manager.close()
    lines = [(event_of(record), getattr(record, "reason", "")) for record in caplog.records]
    assert [("redis_asgi.sentinels_refuse", "auth"), ("redis_asgi.redis_unavailable", "auth")] == lines
    assert "secret" not in " ".join(repr(vars(record)) for record in caplog.records)


async def test_password_for_sentinels_without(sentinels: SentinelTrio) -> None:
    """A password too many is told as that."""
    settings = settings_for(sentinels, PASSWORD)
    found = await of_sentinels(settings)

    assert "redis_auth" == (await health_of(settings))["error"]
    assert (True, "Unset REDIS_SENTINEL_PASSWORD.") == ("has no password, and we send one" in found.text, found.fix)


async def test_user(sentinels: SentinelTrio) -> None:
    """A user of an ACL needs one right; without it, the right is named."""
    for sentinel in sentinels.sentinels:
        sentinel.add_user("app", f">{PASSWORD}", "+sentinel|master")
        sentinel.add_user("nobody", f">{PASSWORD}")
    well = settings_for(sentinels, PASSWORD, REDIS_SENTINEL_USERNAME="app")
    ill = settings_for(sentinels, PASSWORD, REDIS_SENTINEL_USERNAME="nobody")
    found = await of_sentinels(ill)

    assert "healthy" == (await health_of(well))["status"]
    assert "ok" == (await of_sentinels(well)).level
    assert "redis_auth" == (await health_of(ill))["error"]
    assert (True, True) == ("sentinel|master" in found.text, "SETUSER nobody +sentinel|master" in found.fix)


async def test_some_refuse(sentinels: SentinelTrio, caplog: pytest.LogCaptureFixture) -> None:
    """One that lets us in is enough, and is believed;
    where it knows no master, that is the trouble.
    """
    caplog.set_level(logging.ERROR, "redis_asgi")
    for sentinel in sentinels.sentinels[:2]:
        sentinel.command("ACL", "SETUSER", "default", "resetpass", ">another")
    settings = settings_for(sentinels, None)
    found = await of_sentinels(settings)

    assert "healthy" == (await health_of(settings))["status"]
    assert ("warn", True) == (found.level, sentinels.addresses[0] in found.text)
    assert "REDIS_SENTINEL_PASSWORD" in found.fix
    assert [] == caplog.records

    manager = RedisManager(Settings(REDIS_SENTINELS=sentinels.addresses, REDIS_SENTINEL_MASTER="other"))
    with pytest.raises(MasterNotFoundError) as raised:
        await (await manager.get_connection()).ping()
    await manager.close()
    assert Failure.CLUSTER is classify(raised.value)


async def test_ipv6_address() -> None:
    """The brackets around an IPv6 address are no part of the host that is connected to."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.set()
        writer.close()

    came = asyncio.Event()
    try:
        server = await asyncio.start_server(serve, "::1", 0)
    except OSError:
        pytest.skip("no IPv6 here")
    async with server:
        port = server.sockets[0].getsockname()[1]
        settings = Settings(REDIS_SENTINELS=f"[::1]:{port}", REDIS_SENTINEL_MASTER="m")
        assert "unhealthy" == (await health_of(settings))["status"]
        assert came.is_set()
