"""The price of health checks, and how they end."""

import asyncio
from contextlib import suppress

import pytest
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from redis_asgi import (
    Settings,
    check_redis_health,
    health_app,
)
from redis_asgi.connection.health_check import Checkup
from redis_asgi.telemetry import fresh_telemetry

from ..kit.fair_time import fair_time
from ..kit.processes import run_python
from ..kit.proxy import FaultProxy
from ..kit.servers import Cluster, ExternalServer, wait_until
from .probes import DEADLINE, NOWHERE, StartServer, app_manager, app_on, assert_ill, probe

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("gone", [False, True], ids=["all stay", "most go away"])
async def test_two_hundred_probes_are_one_ping(redis_server: ExternalServer, *, gone: bool) -> None:
    """One check in flight, shared by all, and not ended by those that go away;
    its result is kept for a second.
    """
    app = app_on(redis_server.url)
    tasks = [asyncio.create_task(probe(app, "/ready" if n % 2 else "/")) for n in range(200)]
    if gone:
        await asyncio.sleep(0)
        for task in tasks[:199]:
            task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    late = await probe(app)

    kept = [answer for answer in answers if not isinstance(answer, BaseException)]
    assert (1 if gone else 200) == len(kept)
    assert {200} == {answer[0] for answer in [*kept, late]}
    assert 1 == redis_server.calls("ping")
    assert 2 == redis_server.calls("info")  # ours, and the one that asks
    await asyncio.sleep(1.05)
    await probe(app)
    assert 2 == redis_server.calls("ping")


async def test_check_survives_its_first_prober(redis_server: ExternalServer) -> None:
    """A prober that gives up after 0.05 s leaves its check to the next one."""
    async with FaultProxy("127.0.0.1", int(redis_server.url.rpartition(":")[2])) as proxy:
        app = app_on(proxy.url)
        await proxy.set("delay", seconds=0.1)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await probe(app)
        status, body, _ = await probe(app)

    assert (200, "healthy", 1) == (status, body["status"], redis_server.calls("ping"))


async def test_apps_on_one_manager_share_their_checks(redis_server: ExternalServer) -> None:
    """Two health apps of one process, one PING."""
    settings = Settings(REDIS_URL=redis_server.url, REDIS_KEY_PREFIX="shared:")
    answers = [await probe(health_app(settings=settings)) for _ in range(2)]

    assert [200, 200] == [answer[0] for answer in answers]
    assert 1 == redis_server.calls("ping")


async def test_checks_are_counted(redis_url: str) -> None:
    """A check is one ``ping`` among the commands, with its outcome,
    and with its time when it was answered.
    """
    with fresh_telemetry() as counted:
        await probe(app_on(redis_url))
        await probe(app_on(NOWHERE))
        command = counted.redis_commands
        seconds = counted.redis_command_duration.labels("ping")

    outcomes = ("ok", "connection", "timeout")
    assert [1, 1, 0] == [command.labels("ping", outcome)._value.get() for outcome in outcomes]
    assert 0 < seconds._sum.get() < 0.5


async def test_live_never_touches_redis() -> None:
    """No client is even made for it."""
    app = app_on(NOWHERE, require_redis=True)

    assert (200, {"status": "alive"}) == (await probe(app, "/live"))[:2]
    assert app_manager(app).pool is None


# check_redis_health


@pytest.mark.parametrize("url", [NOWHERE, "redis://no-such-host.invalid"])
async def test_check_of_a_server_that_is_gone(url: str) -> None:
    """Unhealthy with a code, everything else null, nothing raised;
    the client's own retries are not waited for.
    """
    async with aioredis.Redis.from_url(url, retry=Retry(ExponentialBackoff(cap=10, base=1), 3)) as client:
        started = fair_time()
        checked = await check_redis_health(client)

    assert fair_time() - started < DEADLINE + 0.4
    assert ("unhealthy", "redis_connection") == (checked.pop("status"), checked.pop("error"))
    assert dict.fromkeys(["mode", "latency_ms", "connected_clients", "used_memory", "last_save_time"]) == checked


async def test_check_never_raises() -> None:
    """Not even for what is no client at all; a cancellation passes."""
    checked = await check_redis_health(object())  # type: ignore[arg-type]  # what is tested

    assert "unhealthy" == checked["status"]


async def test_check_can_be_cancelled(private_server: StartServer) -> None:
    """A cancellation is passed on at once, and its connection is closed."""
    server = private_server()
    server.pause()
    async with aioredis.Redis.from_url(server.url) as client:
        task = asyncio.create_task(check_redis_health(client))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    server.resume()
    wait_until(lambda: server.connections() == [], "no connection is left")


async def test_check_of_a_cluster_can_be_cancelled(private_cluster: Cluster) -> None:
    """The same for one that has asked several nodes."""
    for node in private_cluster.nodes:
        node.pause()
    client = aioredis.RedisCluster.from_url(private_cluster.url)
    task = asyncio.create_task(check_redis_health(client))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for node in private_cluster.nodes:
        node.resume()
    await client.aclose()


@pytest.mark.usefixtures("shipped_deadlines")
async def test_check_that_does_not_end_is_not_waited_for(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a check ever break its deadline, a probe keeps it."""

    async def endless(_checkup: Checkup, _needs: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Checkup, "run", endless)
    app = app_on(redis_url)
    await assert_ill(app, "redis_timeout")
    await app_manager(app).close()


# manners


def test_nothing_is_left_open(redis_url: str) -> None:
    """Several loops, a fork, checks in flight at the end, no lifespan:
    not a warning under ``-W error``.
    """
    script = """
import asyncio, os, sys
import httpx
from redis_asgi import Settings, check_redis_health, health_app
import redis.asyncio

app = health_app(settings=Settings(REDIS_URL=sys.argv[1]))
gone = health_app(settings=Settings(REDIS_URL="redis://127.0.0.1:1"))

async def ask(leave=False):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        if leave:
            task = asyncio.create_task(client.get("/"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return task
        first, second = await asyncio.gather(client.get("/"), client.get("/ready"))
        return first.json()["status"], second.json()["status"]

for _ in range(2):
    print(*asyncio.run(ask()), flush=True)
asyncio.run(ask(leave=True))
child = os.fork()
if not child:
    print(*asyncio.run(ask()), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    done = run_python(script, redis_url)

    assert ("healthy healthy\n" * 3, "", 0) == (done.stdout, done.stderr, done.returncode)


async def test_connection_closes_with_the_manager(private_server: StartServer) -> None:
    """After ``close()`` the server has nobody left, not even the connection of the checks."""
    server = private_server()
    app = app_on(server.url)
    await probe(app)
    assert 1 == len(server.connections())
    await app_manager(app).close()
    wait_until(lambda: server.connections() == [], "no connection is left")

    assert 200 == (await probe(app))[0]


async def test_closing_ends_a_check_in_flight(private_server: StartServer) -> None:
    """Who waits for a check while the manager closes gets an answer, and the close does not hang."""
    server = private_server()
    server.pause()
    app = app_on(server.url)
    waiting = asyncio.create_task(probe(app))
    await asyncio.sleep(0.1)
    started = fair_time()
    await app_manager(app).close()
    status, body, _ = await waiting
    server.resume()

    assert fair_time() - started < 0.3
    assert (200, "degraded", "redis_timeout") == (status, body["status"], body["error"])
