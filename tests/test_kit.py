"""The test kit itself: a fault that does not happen would let every test of it pass."""

import asyncio
import time

import pytest
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from redis_asgi import RateLimiter, Settings
from redis_asgi.connection import health_cache
from redis_asgi.connection.health_check import Checkup

from .conftest import StartServer, _missing
from .kit.patience import PATIENCE
from .kit.processes import run_python
from .kit.proxy import FaultProxy, Mode
from .kit.servers import Cluster, SentinelTrio, Server, wait_until

pytestmark = pytest.mark.anyio


def _client(url: str) -> aioredis.Redis:
    return aioredis.Redis.from_url(url, socket_timeout=0.2, protocol=2, retry=Retry(NoBackoff(), 0))


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        pytest.param("drop_replies", RedisTimeoutError, id="replies swallowed"),
        pytest.param("cut_replies", RedisConnectionError, id="connection closed instead of the reply"),
        pytest.param("begun_replies", RedisTimeoutError, id="one byte of the reply"),
        pytest.param("torn_replies", RedisConnectionError, id="one byte of the reply, then a reset"),
        pytest.param("reset", RedisConnectionError, id="reset"),
        pytest.param("blackhole", RedisTimeoutError, id="black hole"),
        pytest.param("refuse", RedisConnectionError, id="refused"),
    ],
)
@pytest.mark.parametrize("connected", [pytest.param(True, id="connected"), pytest.param(False, id="not connected")])
async def test_fault_is_felt_and_passes(
    private_server: StartServer, mode: Mode, error: type[Exception], connected: bool
) -> None:
    """Every fault shows on open and new connections as the error it stands for, and ends with
    "pass".
    """
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy, _client(proxy.url) as client:
        if connected:
            await client.ping()
        await proxy.set(mode)
        with pytest.raises(error):
            await client.incr("counter")
        await proxy.set("pass")

        assert await client.ping()


async def test_answer_is_told_once_for_each_command(private_server: StartServer) -> None:
    """``answer`` gives as many replies as there are commands in what was written, and the server
    hears none.
    """
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy, _client(proxy.url) as client:
        await client.ping()
        await proxy.set("answer", reply=b":42\r\n")
        pipeline = client.pipeline(transaction=False)
        for _ in range(3):
            pipeline.incr("counter")

        assert [42] * 3 == await pipeline.execute()
        assert server.client().get("counter") is None


async def test_lost_reply_is_still_counted_by_the_server(private_server: StartServer) -> None:
    """``cut_replies`` loses the answer, not the command; ``blackhole`` loses both."""
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy, _client(proxy.url) as client:
        await client.ping()
        await proxy.set("cut_replies")
        with pytest.raises(RedisConnectionError):
            await client.incr("counter")
        await proxy.set("pass")
        await client.ping()
        await proxy.set("blackhole")
        with pytest.raises(RedisTimeoutError):
            await client.incr("counter")

    assert b"1" == server.client().get("counter")


async def test_delay_and_chunks_change_no_byte(private_server: StartServer) -> None:
    """A delayed reply takes its time; one in pieces arrives whole."""
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy, _client(proxy.url) as client:
        await client.ping()
        await proxy.set("delay", seconds=0.1)
        started = time.monotonic()
        await client.ping()
        assert time.monotonic() - started >= 0.1

        await proxy.set("chunk")
        await client.set("key", b"x\r\ny" * 50)
        assert b"x\r\ny" * 50 == await client.get("key")


async def test_server_pauses_resumes_and_restarts_on_its_port(private_server: StartServer) -> None:
    """A paused server times out, a resumed one answers,
    a restarted one is empty and in the same place.
    """
    server = private_server()
    async with _client(server.url) as client:
        await client.set("key", "value")
        server.pause()
        with pytest.raises(RedisTimeoutError):
            await client.ping()
        server.resume()
        assert b"value" == await client.get("key")
        server.restart()
        await asyncio.sleep(0.01)  # the loop has to see that the old connection is gone
        assert await client.get("key") is None


def test_cluster_serves_every_slot_and_moves_one(private_cluster: Cluster) -> None:
    """A moved slot is served by its new node, keys included."""
    source = private_cluster.node_of("key")
    source.client().set("key", "value")
    target = next(node for node in private_cluster.nodes if node is not source)
    private_cluster.move_slot(12539, target)

    assert target is private_cluster.node_of("key")
    assert b"value" == target.client().get("key")


def test_sentinels_promote_the_replica(sentinels: SentinelTrio) -> None:
    """When the primary dies the sentinels name the replica."""
    before, after = sentinels.servers
    assert before is sentinels.primary()
    before.kill()
    wait_until(lambda: sentinels.primary() is after, "failover")


def test_replica_refuses_writes(replica: Server) -> None:
    """The replica is in step and read-only."""
    assert "slave" == replica.client().info("replication")["role"]


@pytest.mark.parametrize("variable", ["CI", "REDIS_ASGI_REQUIRE_SERVER"])
def test_missing_server_fails_where_one_is_required(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """Without a server a developer's run skips and says so; one that requires a server fails."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("REDIS_ASGI_REQUIRE_SERVER", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"no server: NOT TESTED against a real server\. Install one\."):
        _missing("no server", "Install one.")

    monkeypatch.setenv(variable, "1")
    with pytest.raises(pytest.fail.Exception, match="no server"):
        _missing("no server", "Install one.")


def _deadlines() -> tuple[object, ...]:
    settings = Settings()
    limiter = RateLimiter(settings=settings)
    return (settings.RATE_LIMIT_TIMEOUT, settings.EMBEDDING_CACHE_TIMEOUT, limiter._engine._timeout)


def test_whatever_is_given_no_deadline_is_patient() -> None:
    """Settings, limiters and health checks, those of other processes too."""
    assert (PATIENCE,) * 3 == _deadlines()
    assert PATIENCE == Checkup(aioredis.Redis())._deadline == vars(health_cache)["DEADLINE"]
    done = run_python("from redis_asgi import Settings; print(Settings().RATE_LIMIT_TIMEOUT)")
    assert f"{PATIENCE}\n" == done.stdout


@pytest.mark.usefixtures("shipped_deadlines")
def test_shipped_deadlines_are_those_of_the_package() -> None:
    """A test that asks for them meets what users do."""
    assert (0.25,) * 3 == _deadlines()
    assert 0.5 == Checkup(aioredis.Redis())._deadline == vars(health_cache)["DEADLINE"]


def test_fair_time_stands_while_the_process_does() -> None:
    """A process that is stopped for a while is not charged for it; one that runs is."""
    script = """
import os, signal, subprocess, sys, time
from tests.kit.fair_time import fair_time, stop_fair_time
began, fairly = time.monotonic(), fair_time()
waker = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -CONT {os.getpid()}"])
os.kill(os.getpid(), signal.SIGSTOP)
stopped = fair_time() - fairly
time.sleep(0.2)
print(time.monotonic() - began >= 0.7, stopped < 0.4, 0 < fair_time() - fairly <= time.monotonic() - began)
waker.wait()
stop_fair_time()
"""
    done = run_python(script)

    assert ("", "True True True\n") == (done.stderr, done.stdout)
