"""Health checks: true, in time, cheap, and silent about where Redis is; against real servers in every trouble."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import fakeredis
import httpx
import pytest
import redis.asyncio as aioredis
from fastapi import FastAPI
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp

from redis_asgi import (
    ConfigurationError,
    RateLimiter,
    RateLimitMiddleware,
    RedisManager,
    RedisMetrics,
    Settings,
    check_redis_health,
    health_app,
)
from redis_asgi.asgi.sub_app import SubApp
from redis_asgi.connection import health_cache as watch_module
from redis_asgi.connection.health_cache import Watch
from redis_asgi.connection.health_check import Checkup, _slots
from redis_asgi.errors import Failure
from redis_asgi.sub_apps.health import HealthApp, human_bytes
from redis_asgi.telemetry import fresh_telemetry

from ..kit.certificates import Certificates
from ..kit.documents import section
from ..kit.fair_time import fair_time
from ..kit.patience import PATIENCE
from ..kit.processes import run_python
from ..kit.proxy import FaultProxy
from ..kit.servers import Cluster, ExternalServer, SentinelTrio, Server, wait_until

pytestmark = pytest.mark.anyio

StartServer = Callable[..., Server]
NOWHERE = "redis://someuser:somesecret@127.0.0.1:1"
FIELDS = [
    "status",
    "error",
    "breaker",
    "mode",
    "latency_ms",
    "connected_clients",
    "used_memory",
    "last_save_time",
]


@asynccontextmanager
async def client_of(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client in front of *app*."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


async def probe(app: ASGIApp, path: str = "/ready") -> tuple[int, dict[str, Any], float]:
    """Status, body and seconds of one probe."""
    async with client_of(app) as client:
        started = fair_time()
        response = await client.get(path)
        return response.status_code, response.json(), fair_time() - started


def app_on(url: str, *, require_redis: bool | None = None, **settings: Any) -> SubApp:
    """A health app on a manager of its own."""
    manager = RedisManager(Settings(REDIS_URL=url, **settings))
    return health_app(redis=manager, require_redis=require_redis)


def app_manager(app: SubApp) -> RedisManager:
    """The manager of a health app."""
    assert isinstance(app, HealthApp)
    return app._target.own


def forget(app: SubApp) -> None:
    """Let a second pass: the next probe checks again."""
    app_manager(app).per_client(Watch)._last = None


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks with all the time that a busy machine may take for what is well."""
    monkeypatch.setattr(watch_module, "DEADLINE", 10)
    monkeypatch.setitem(cast("dict[str, object]", Checkup.__init__.__kwdefaults__), "deadline", 10)


async def assert_ill(app: ASGIApp, error: str, *, status: int = 200) -> None:
    """``/ready`` and ``/`` name *error* within 0.6 s, ``/live`` does not mind, and nothing is given away."""
    ready, body, seconds = await probe(app)
    assert (status, "unhealthy" if status == 503 else "degraded", error) == (ready, body["status"], body["error"])
    assert seconds < 0.6
    overview, full, seconds = await probe(app, "/")
    assert (status, body["status"], error) == (overview, full["status"], full["error"])
    assert seconds < 0.6
    live, alive, seconds = await probe(app, "/live")
    assert (200, {"status": "alive"}) == (live, alive)
    assert seconds < 0.1
    for text in (str(body), str(full)):
        assert re.search(r":\d{4,5}|127\.0|localhost|some|user|password|Error|Exception|\(", text) is None, text


# well


async def test_overview_says_how_redis_is(redis_server: ExternalServer) -> None:
    """Every field, in the units promised, when all is well."""
    status, body, _ = await probe(app_on(redis_server.url), "/")
    said = redis_server.client().info()

    assert (200, FIELDS) == (status, list(body))
    assert ("healthy", None, "closed", "standalone") == tuple(body[name] for name in FIELDS[:4])
    assert 0 < body["latency_ms"] < 500
    assert body["connected_clients"] == said["connected_clients"]
    assert re.fullmatch(r"\d+(\.\d\d)?[BKMG]", body["used_memory"])
    assert body["last_save_time"].endswith("Z")
    saved = datetime.fromisoformat(body["last_save_time"])
    assert saved == datetime.fromtimestamp(said["rdb_last_save_time"], UTC)
    assert timedelta(0) <= datetime.now(UTC) - saved < timedelta(days=1)


async def test_used_memory_is_what_redis_calls_it(redis_server: ExternalServer) -> None:
    """The human form is Redis's own."""
    said = redis_server.client().info("memory")

    assert said["used_memory_human"] == human_bytes(said["used_memory"])
    assert ["0B", "1023B", "1.00K", "1.50M", "2048.00T"] == [human_bytes(n) for n in (0, 1023, 1024, 1572864, 2**51)]


async def test_ready_says_no_more_than_it_must(redis_url: str) -> None:
    """A status, and the code of what is wrong."""
    assert (200, {"status": "healthy", "error": None}) == (await probe(app_on(redis_url)))[:2]


async def test_memory_is_healthy() -> None:
    """``memory://`` has nothing that could be gone."""
    status, body, _ = await probe(app_on("memory://", require_redis=True), "/")

    assert (200, "healthy", "memory") == (status, body["status"], body["mode"])
    assert [None] * 5 == [body[name] for name in ("error", *FIELDS[4:])]


@pytest.mark.parametrize("options", [{}, {"decode_responses": True}, {"protocol": 3, "decode_responses": True}])
async def test_a_users_client_is_used_in_any_form(redis_url: str, options: dict[str, Any]) -> None:
    """Decoding, RESP3 and retries of a given client make no difference, and it is left open."""
    async with aioredis.Redis.from_url(redis_url, **options) as client:
        checked = await check_redis_health(client)
        status, body, _ = await probe(health_app(redis=client), "/")

        assert await client.ping()
    assert ("healthy", "healthy", 200) == (checked["status"], body["status"], status)
    assert None not in (checked["connected_clients"], checked["used_memory"], checked["last_save_time"])


async def test_fake_server_without_info_is_healthy() -> None:
    """Where INFO is not known, PING decides and the rest is null."""
    async with fakeredis.FakeAsyncRedis() as client:
        checked = await check_redis_health(client)

    assert ("healthy", None, None) == (checked["status"], checked["error"], checked["used_memory"])
    assert checked["latency_ms"] is not None


async def test_forbidden_info_is_null(private_server: StartServer) -> None:
    """A user who may only PING: healthy, without details."""
    server = private_server()
    server.add_user("someuser", ">somesecret", "+ping")
    status, body, _ = await probe(app_on(server.url.replace("//", "//someuser:somesecret@")), "/")

    assert (200, "healthy", None) == (status, body["status"], body["error"])
    assert [None] * 3 == [body[name] for name in FIELDS[5:]]
    assert body["latency_ms"] is not None


@pytest.mark.usefixtures("shipped_deadlines")
async def test_slow_info_is_null(private_server: StartServer) -> None:
    """PING has been answered and INFO has not by the deadline: healthy, in time, without details."""
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        # The first reply comes, and all that follow it on this connection are kept back.
        app = app_on(proxy.url)
        checkup_replies = 0
        write = proxy._write

        async def first_line_only(writer: asyncio.StreamWriter, data: bytes) -> None:
            nonlocal checkup_replies
            if data.startswith(b"+PONG"):
                checkup_replies += 1
                data = data[:7]
            await write(writer, data)

        proxy._write = first_line_only  # type: ignore[method-assign]  # a fault that nothing else needs
        status, body, seconds = await probe(app, "/")

    assert (1, 200, "healthy", None) == (checkup_replies, status, body["status"], body["used_memory"])
    assert seconds < 0.6


# the table of failures


async def test_refused() -> None:
    """Nothing listens: known at once; required, it is unhealthy."""
    await assert_ill(app_on(NOWHERE), "redis_connection")
    await assert_ill(app_on(NOWHERE, require_redis=True), "redis_connection", status=503)


async def test_name_that_does_not_resolve() -> None:
    """A host that is not there."""
    await assert_ill(app_on("redis://no-such-host.invalid"), "redis_connection")


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        ("reset", "redis_connection"),
        ("refuse", "redis_connection"),
        ("cut_replies", "redis_connection"),
        ("blackhole", "redis_timeout"),
        ("drop_replies", "redis_timeout"),
    ],
)
@pytest.mark.parametrize("connected", [False, True], ids=["from the start", "once connected"])
@pytest.mark.usefixtures("shipped_deadlines")
async def test_fault_on_the_way(redis_server: Server, mode: Any, error: str, *, connected: bool) -> None:
    """Silence, resets and refusals, on a new connection and on one that an earlier check has left."""
    async with FaultProxy("127.0.0.1", int(redis_server.url.rpartition(":")[2])) as proxy:
        app = app_on(proxy.url)
        if connected:
            assert 200 == (await probe(app))[0]
            forget(app)
        await proxy.set(mode)
        await assert_ill(app, error)
        await proxy.set("pass")


@pytest.mark.usefixtures("shipped_deadlines")
async def test_slow_and_chunked_is_healthy(redis_server: ExternalServer) -> None:
    """An answer in single bytes, or 0.3 s late, is an answer; one 2 s late is none."""
    async with FaultProxy("127.0.0.1", int(redis_server.url.rpartition(":")[2])) as proxy:
        await proxy.set("chunk")
        assert "healthy" == (await probe(app_on(proxy.url), "/"))[1]["status"]
        app = app_on(proxy.url)
        await app_manager(app).get_connection()
        await proxy.set("delay", seconds=0.1)
        assert "healthy" == (await probe(app))[1]["status"]
        await proxy.set("delay", seconds=2)
        await assert_ill(app_on(proxy.url), "redis_timeout")


@pytest.mark.usefixtures("shipped_deadlines")
async def test_hung(private_server: StartServer) -> None:
    """SIGSTOP: the kernel accepts and nobody answers; 200 probes wait for the same 0.5 s."""
    server = private_server()
    app = app_on(server.url, require_redis=True)
    server.pause()
    try:
        async with client_of(app) as client:
            started = fair_time()
            live = client.get("/live")
            answers = await asyncio.gather(live, *(client.get("/ready") for _ in range(200)))
            seconds = fair_time() - started
        await assert_ill(app, "redis_timeout", status=503)
    finally:
        server.resume()

    assert [200] + [503] * 200 == [answer.status_code for answer in answers]
    assert seconds < 1  # of which the 200 take some themselves


async def test_dies_and_comes_back(private_server: StartServer) -> None:
    """Killed: degraded. Restarted: healthy with the next check, though its old connection is dead."""
    server = private_server()
    app = app_on(server.url)
    before = (await probe(app))[1]["status"]
    server.restart()
    forget(app)
    restarted = (await probe(app))[1]["status"]
    server.kill()
    forget(app)
    await assert_ill(app, "redis_connection")

    assert ["healthy", "healthy"] == [before, restarted]


@pytest.mark.parametrize(
    ("credentials", "error"),
    [
        ("", "redis_auth"),
        (":somesecret@", "redis_auth"),
        ("someuser:somesecret@", "redis_auth"),
        ("app:pw@", "redis_permission"),
    ],
    ids=["NOAUTH", "WRONGPASS", "unknown user", "NOPERM"],
)
async def test_credentials(private_server: StartServer, credentials: str, error: str) -> None:
    """What the server says of the credentials is a code, and no word of them."""
    server = private_server()
    server.add_user("app", ">pw", "+get")
    server.command("CONFIG", "SET", "requirepass", "right")
    app = app_on(server.url.replace("//", f"//{credentials}"))
    await assert_ill(app, error)
    async with aioredis.Redis.from_url(server.url.replace("//", f"//{credentials}")) as client:
        checked = await check_redis_health(client)

    assert ("unhealthy", error) == (checked["status"], checked["error"])


@pytest.mark.parametrize("said", [b":42", b"+OK", b"$-1", b"*-1", b"*0"])
async def test_a_ping_answered_oddly(said: bytes) -> None:
    """Whatever answers a PING with anything else than PONG is no Redis to rely on."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(said + b"\r\n" if b"PING" in data else b"+OK\r\n" * data.count(b"CLIENT"))
        writer.close()

    listener = await asyncio.start_server(talk, "127.0.0.1", 0)
    app = app_on(f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
    await assert_ill(app, "redis_reply")
    await app_manager(app).close()
    listener.close()


async def test_info_answered_oddly() -> None:
    """A PONG, and then a number where INFO belongs: degraded, with no figures made of it."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(b"+PONG\r\n:42\r\n" if b"PING" in data else b"+OK\r\n" * data.count(b"CLIENT"))
        writer.close()

    listener = await asyncio.start_server(talk, "127.0.0.1", 0)
    manager = RedisManager(Settings(REDIS_URL=f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}"))
    await assert_ill(health_app(redis=manager), "redis_reply")
    figures = await RedisMetrics(manager).collect_metrics()
    await manager.close()
    listener.close()

    assert {} == figures


async def test_a_missing_right_to_call_the_script_is_permission(private_server: StartServer) -> None:
    """A PING is answered, and yet no limit can be counted there, which is said before the first request is one."""
    server = private_server()
    server.command("ACL", "SETUSER", "default", "-evalsha")
    app = app_on(server.url)
    assert "healthy" == (await probe(app))[1]["status"]  # nobody needs it
    RateLimiter(app_manager(app), on_redis_error="closed")
    forget(app)
    await assert_ill(app, "redis_permission", status=503)
    server.command("ACL", "SETUSER", "default", "+evalsha")
    forget(app)
    assert "healthy" == (await probe(app))[1]["status"]


async def test_a_missing_right_within_the_script_is_permission(
    private_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows when limits are counted, and is told while they cannot be, and no longer than anybody tries."""
    monkeypatch.setattr("redis_asgi.connection.breaker._SLOW_PROBE_EVERY", 0.02)
    server = private_server()
    server.command("ACL", "SETUSER", "default", "-hset")
    app = app_on(server.url)
    assert "healthy" == (await probe(app))[1]["status"]
    await RateLimiter(app_manager(app)).consume("somebody")
    await assert_ill(app, "redis_permission")
    async with asyncio.timeout(PATIENCE):
        while app_manager(app).breaker_state != "half_open":
            await asyncio.sleep(0.01)
    await assert_ill(app, "redis_permission")
    app_manager(app).breaker()._last_trouble -= 10
    assert "healthy" == (await probe(app))[1]["status"]


async def test_a_renamed_command_of_the_script_is_reply(private_server: StartServer) -> None:
    """Said before any request is counted, on a cluster too, and what needs no script minds nothing."""
    for arguments in ((), ("--cluster-enabled", "yes")):
        server = private_server("--rename-command", "EVALSHA", "", *arguments)
        if arguments:
            server.own_all_slots()
        app = app_on(server.url, REDIS_CLUSTER=bool(arguments))
        assert "healthy" == (await probe(app))[1]["status"]
        RateLimiter(app_manager(app))
        forget(app)
        await assert_ill(app, "redis_reply")
        await app_manager(app).close()


@pytest.mark.parametrize("said", [b"no upstream host", b"ERR handle response, backend conn reset"])
async def test_a_proxy_that_has_lost_its_servers(said: bytes) -> None:
    """It answers a PING itself, and everything else with words of its own: degraded, whoever needs Redis."""
    talks: set[asyncio.Task[Any]] = set()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.update(filter(None, [asyncio.current_task()]))
        while data := await reader.read(65536):
            if b"PING" in data:
                writer.write(b"+PONG\r\n" + b"-%b\r\n" % said * 2)
            elif b"EVALSHA" in data:
                writer.write(b"-%b\r\n" % said)
            else:
                writer.write(b"+OK\r\n" * data.count(b"CLIENT"))
        writer.close()

    listener = await asyncio.start_server(talk, "127.0.0.1", 0)
    app = app_on(f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
    limiter = RateLimiter(app_manager(app), on_redis_error="closed")
    assert ["none"] * 20 == [(await limiter.consume("somebody")).source for _ in range(20)]
    assert (200, "degraded", "redis_reply") == (*(await probe(app))[:1], *list((await probe(app))[1].values())[:2])
    await app_manager(app).close()
    listener.close()
    await asyncio.wait(talks)


async def test_needing_the_script_leaves_no_error_behind(redis_server: ExternalServer) -> None:
    """Once limits are counted, a look is no error that the server would count."""
    app = app_on(redis_server.url)
    await RateLimiter(app_manager(app)).consume("somebody")
    await probe(app)
    redis_server.command("CONFIG", "RESETSTAT")
    forget(app)
    await probe(app)

    assert {} == redis_server.client().info("errorstats")
    assert 1 == redis_server.calls("evalsha")


async def test_a_refused_login_is_tried_every_five_seconds(private_server: StartServer) -> None:
    """However often probes come, the server's log of refusals is not filled."""
    server = private_server("--requirepass", "right")
    app = app_on(server.url.replace("redis://", "redis://:wrong@"))
    watch = app_manager(app).per_client(Watch)
    await assert_ill(app, "redis_auth")
    watch._last_at -= 4.9
    await assert_ill(app, "redis_auth")
    first = watch._flight
    watch._last_at -= 0.2
    await assert_ill(app, "redis_auth")

    assert first is not watch._flight
    assert first is not None
    assert first.done()


async def test_too_many_clients(private_server: StartServer) -> None:
    """maxclients: a new connection is refused, while a check that has one goes on."""
    server = private_server("--maxclients", "3")
    early = app_on(server.url)
    assert "healthy" == (await probe(early))[1]["status"]
    async with aioredis.Redis.from_url(server.url) as other:
        await other.ping()
        await assert_ill(app_on(server.url), "redis_connection")
        forget(early)

        assert "healthy" == (await probe(early))[1]["status"]


async def test_stranger_with_a_good_certificate(stranger_server: Server, certificates: Certificates) -> None:
    """TLS to another host than the certificate's."""
    await assert_ill(app_on(stranger_server.url, REDIS_SSL_CA_CERTS=certificates.ca.cert), "redis_connection")


@pytest.mark.usefixtures("patient")
async def test_tls(tls_server: Server, certificates: Certificates) -> None:
    """TLS with certificates on both sides; plain text to it, and TLS that trusts somebody else."""
    tls: dict[str, Any] = {"REDIS_SSL_CERTFILE": certificates.client.cert, "REDIS_SSL_KEYFILE": certificates.client.key}
    good = app_on(tls_server.url, REDIS_SSL_CA_CERTS=certificates.ca.cert, **tls)
    assert "healthy" == (await probe(good, "/"))[1]["status"]
    await assert_ill(app_on(tls_server.url, REDIS_SSL_CA_CERTS=certificates.other_ca.cert, **tls), "redis_connection")
    await assert_ill(app_on(tls_server.url.replace("rediss", "redis")), "redis_connection")


@pytest.mark.usefixtures("shipped_deadlines")
async def test_tls_to_a_server_that_has_none(redis_url: str) -> None:
    """It takes the greeting for the beginning of a command, and waits for the rest."""
    await assert_ill(app_on(redis_url.replace("redis:", "rediss:")), "redis_timeout")


async def test_database_that_is_not_there(redis_url: str) -> None:
    """The server answers, with an error that is none of the others."""
    await assert_ill(app_on(f"{redis_url}/99"), "redis_reply")


@pytest.mark.usefixtures("shipped_deadlines")
async def test_hung_tls_is_hung_up_on(tls_server: Server, certificates: Certificates) -> None:
    """A peer that hangs is not asked for its part of a TLS goodbye, which may take 30 s."""
    tls: dict[str, Any] = {"REDIS_SSL_CERTFILE": certificates.client.cert, "REDIS_SSL_KEYFILE": certificates.client.key}
    async with FaultProxy("127.0.0.1", tls_server.port) as proxy:
        app = app_on(proxy.url.replace("redis:", "rediss:"), REDIS_SSL_CA_CERTS=certificates.ca.cert, **tls)
        assert "healthy" == (await probe(app))[1]["status"]
        await proxy.set("blackhole")
        forget(app)
        await assert_ill(app, "redis_timeout")
        await asyncio.sleep(0.1)

        assert 0 == proxy.open


async def test_full_server_is_degraded(private_server: StartServer) -> None:
    """OOM is no answer to a PING, but what INFO says of the memory tells it; one that evicts goes on."""
    server = private_server("--maxmemory", "1")
    app = app_on(server.url)
    await assert_ill(app, "redis_oom")

    server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    forget(app)
    assert (200, {"status": "healthy", "error": None}) == (await probe(app))[:2]


async def test_exhausted_pool_is_no_matter(redis_url: str) -> None:
    """A check has a connection of its own: not one of the pool, in ours and in a user's."""
    manager = RedisManager(Settings(REDIS_URL=redis_url, REDIS_POOL_SIZE=1))
    async with aioredis.Redis.from_url(redis_url, max_connections=1, socket_timeout=5) as given:
        for redis, client in ((manager, await manager.get_connection()), (given, given)):
            block: Any = client.execute_command
            waiting = asyncio.create_task(block("BLPOP", "never", 0.5))
            await asyncio.sleep(0.05)
            status, body, seconds = await probe(health_app(redis=redis))

            assert (200, "healthy") == (status, body["status"])
            assert seconds < 0.2
            await waiting


async def test_client_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """No client, no answer, and no 500."""

    def nowhere(_manager: RedisManager) -> None:
        raise OSError("a certificate in /etc cannot be read")

    monkeypatch.setattr(RedisManager, "_connect", nowhere)
    await assert_ill(app_on(NOWHERE), "redis_connection")


# sentinel and cluster


async def test_sentinel(sentinels: SentinelTrio) -> None:
    """The master is asked; what it has become after a failover is asked too; no master is ``redis_cluster``."""
    manager = RedisManager(Settings(REDIS_SENTINELS=sentinels.addresses, REDIS_SENTINEL_MASTER=SentinelTrio.MASTER))
    app = health_app(redis=manager)
    status, body, _ = await probe(app, "/")
    assert (200, "healthy", "sentinel") == (status, body["status"], body["mode"])
    old = sentinels.primary()
    old.kill()
    await assert_soon(app, "degraded")
    wait_until(lambda: sentinels.primary() is not old, "a failover")
    await assert_soon(app, "healthy")
    for sentinel in sentinels.sentinels:
        sentinel.kill()
    await manager.close()
    await assert_ill(health_app(redis=manager), "redis_cluster")


async def assert_soon(app: SubApp, status: str) -> None:
    """*app* says *status* within a few seconds."""
    async with asyncio.timeout(PATIENCE):
        while (await probe(app))[1]["status"] != status:
            await asyncio.sleep(0.1)
            forget(app)


@pytest.mark.parametrize("connected", [False, True], ids=["from the start", "once connected"])
@pytest.mark.usefixtures("shipped_deadlines")
async def test_hung_sentinels(sentinels: SentinelTrio, *, connected: bool) -> None:
    """One of them is not waited for; without any, whoever has to find the master first cannot, in time."""
    manager = RedisManager(Settings(REDIS_SENTINELS=sentinels.addresses, REDIS_SENTINEL_MASTER=SentinelTrio.MASTER))
    app = health_app(redis=manager)
    if connected:
        assert "healthy" == (await probe(app))[1]["status"]
    sentinels.sentinels[0].pause()
    try:
        if not connected:
            assert "healthy" == (await probe(app))[1]["status"]
            await manager.close()
        for sentinel in sentinels.sentinels[1:]:
            sentinel.pause()
        if connected:
            forget(app)
            assert "healthy" == (await probe(app))[1]["status"]
        else:
            await assert_ill(app, "redis_timeout")
    finally:
        for sentinel in sentinels.sentinels:
            sentinel.resume()


@pytest.mark.usefixtures("shipped_deadlines")
async def test_hung_master(sentinels: SentinelTrio) -> None:
    """Ill in time while nobody has noticed, and well with the next master, though the old one hangs on."""
    manager = RedisManager(Settings(REDIS_SENTINELS=sentinels.addresses, REDIS_SENTINEL_MASTER=SentinelTrio.MASTER))
    app = health_app(redis=manager)
    assert "healthy" == (await probe(app))[1]["status"]
    old = sentinels.primary()
    old.pause()
    try:
        forget(app)
        await assert_ill(app, "redis_timeout")
        wait_until(lambda: sentinels.primary() is not old, "a failover")
        await assert_soon(app, "healthy")
    finally:
        old.resume()


async def test_demoted_master_is_left(sentinels: SentinelTrio) -> None:
    """A master that was made a replica, with the connection still open, is asked for no longer."""
    manager = RedisManager(Settings(REDIS_SENTINELS=sentinels.addresses, REDIS_SENTINEL_MASTER=SentinelTrio.MASTER))
    app = health_app(redis=manager)
    assert 200 == (await probe(app))[0]
    old = sentinels.primary()
    sentinels.sentinels[0].command("SENTINEL", "FAILOVER", SentinelTrio.MASTER)
    wait_until(lambda: sentinels.primary() is not old, "a failover")
    # The sentinels would do it too, ten seconds later.
    old.command("REPLICAOF", sentinels.primary().host, sentinels.primary().port)
    await assert_soon(app, "healthy")


async def test_cluster_is_summed_over_its_primaries(cluster: Cluster) -> None:
    """Clients and memory are sums, the save the oldest; asked through one node, before and after it is used."""
    manager = RedisManager(Settings(REDIS_URL=cluster.url, REDIS_CLUSTER=True))
    status, body, _ = await probe(health_app(redis=manager), "/")
    infos = [node.client().info() for node in cluster.nodes]
    async with aioredis.RedisCluster.from_url(cluster.url, decode_responses=True) as client:
        await client.get("x")
        checked = await check_redis_health(client)

    assert (200, "healthy", "cluster") == (status, body["status"], body["mode"])
    assert body["connected_clients"] == sum(info["connected_clients"] for info in infos)
    memory = sum(info["used_memory"] for info in infos) / 2**20
    assert float(body["used_memory"].rstrip("M")) == pytest.approx(memory, rel=0.2)
    oldest = datetime.fromtimestamp(min(info["rdb_last_save_time"] for info in infos), UTC)
    assert datetime.fromisoformat(body["last_save_time"]) == oldest
    assert ("healthy", "cluster") == (checked["status"], checked["mode"])


async def test_cluster_that_lost_a_node_is_degraded(private_cluster: Cluster) -> None:
    """Two of three nodes serve: degraded, even where Redis is required, since most requests are answered."""
    manager = RedisManager(Settings(REDIS_URL=private_cluster.url, REDIS_CLUSTER=True))
    app = health_app(redis=manager, require_redis=True)
    assert "healthy" == (await probe(app))[1]["status"]
    private_cluster.nodes[1].kill()
    forget(app)
    await assert_ill(app, "redis_cluster")
    private_cluster.nodes[2].pause()
    try:
        forget(app)
        status, body, seconds = await probe(app)
    finally:
        private_cluster.nodes[2].resume()

    assert "redis_cluster" == body["error"]
    assert status in (200, 503)  # as soon as the last node knows that it is alone, it says so
    assert seconds < 0.6


@pytest.mark.parametrize("connected", [False, True], ids=["from the start", "once connected"])
async def test_hung_cluster(private_cluster: Cluster, *, connected: bool) -> None:
    """All nodes are asked at the same time: the answer is no later than that of one."""
    app = health_app(redis=RedisManager(Settings(REDIS_URL=private_cluster.url, REDIS_CLUSTER=True)))
    if connected:
        assert "healthy" == (await probe(app))[1]["status"]
        forget(app)
    for node in private_cluster.nodes:
        node.pause()
    try:
        await assert_ill(app, "redis_timeout")
    finally:
        for node in private_cluster.nodes:
            node.resume()


@pytest.mark.usefixtures("patient")
async def test_slot_that_moves_is_no_matter(private_cluster: Cluster) -> None:
    """While an operator moves slots, and after, every one of them is served by somebody."""
    app = health_app(redis=RedisManager(Settings(REDIS_URL=private_cluster.url, REDIS_CLUSTER=True)))
    source, target = private_cluster.nodes[:2]
    target.command("CLUSTER", "SETSLOT", 1, "IMPORTING", source.command("CLUSTER", "MYID"))
    source.command("CLUSTER", "SETSLOT", 1, "MIGRATING", target.command("CLUSTER", "MYID"))
    private_cluster.wait()
    during = (await probe(app))[1]["status"]
    private_cluster.move_slot(1, target)
    private_cluster.wait()
    forget(app)
    after = (await probe(app))[1]["status"]

    assert ["healthy", "healthy"] == [during, after]


async def test_cluster_that_serves_nothing_is_unhealthy(server_binary: str) -> None:
    """With full coverage required, one lost node ends the service; nobody at all is a refused connection."""
    cluster = Cluster.start(server_binary)
    try:
        manager = RedisManager(Settings(REDIS_URL=cluster.url, REDIS_CLUSTER=True))
        cluster.nodes[2].kill()
        wait_until(lambda: b"cluster_state:fail" in _raw_info(cluster.nodes[0]), "the cluster fails")
        await assert_ill(health_app(redis=manager, require_redis=True), "redis_cluster", status=503)
        await assert_ill(health_app(redis=manager, require_redis=False), "redis_cluster")
        for node in cluster.nodes:
            node.kill()
        app = health_app(redis=manager, require_redis=True)
        forget(app)
        await assert_ill(app, "redis_connection", status=503)
    finally:
        cluster.stop()


def _raw_info(node: Server) -> bytes:
    reply = node.command("CLUSTER", "INFO")
    return reply if isinstance(reply, bytes) else str(reply).replace("'", "").replace(": ", ":").encode()


async def test_cluster_whose_known_primaries_are_gone(private_cluster: Cluster) -> None:
    """The client has not heard of an election: the nodes it takes for replicas are asked who serves now."""
    async with aioredis.RedisCluster.from_url(private_cluster.url) as client:
        await client.initialize()
        for node in private_cluster.nodes[1:]:
            known = client.get_node(node.host, node.port)
            assert known is not None
            known.server_type = "replica"
        private_cluster.nodes[0].kill()
        checked = await check_redis_health(client)

    assert ("degraded", "redis_cluster") == (checked["status"], checked["error"])


async def test_cluster_that_tells_nothing_of_itself(private_cluster: Cluster) -> None:
    """Where the ACL forbids all but PING, the nodes that are known answer for the cluster."""
    for node in private_cluster.nodes:
        node.add_user("app", ">pw", "+ping")
    nodes = [ClusterNode(node.host, node.port) for node in private_cluster.nodes]
    client = aioredis.RedisCluster(startup_nodes=nodes, username="app", password="pw")
    well = await check_redis_health(client)
    private_cluster.nodes[0].kill()
    ill = await check_redis_health(client)
    await client.aclose()

    assert ("healthy", None, None) == (well["status"], well["error"], well["connected_clients"])
    assert ("degraded", "redis_cluster") == (ill["status"], ill["error"])


async def test_node_that_left_is_forgotten(cluster: Cluster) -> None:
    """A connection to a node that is no longer known is closed with the next check."""
    async with aioredis.RedisCluster.from_url(cluster.url) as client:
        checkup = Checkup(client)
        before = await checkup.run()
        checkup._connections["127.0.0.1", 1] = checkup._connections.pop(next(iter(checkup._connections)))
        after = await checkup.run()
        left = set(checkup._connections)
        await checkup.aclose()

    assert (None, None) == (before.failure, after.failure)
    assert {(node.host, node.port) for node in cluster.nodes} == left


def test_node_without_an_address_is_the_one_that_was_asked() -> None:
    """``CLUSTER SLOTS`` of a node that does not know its own address; slots add up by node."""
    reply = [[0, 9, [b"", 7001, b"id"]], [10, 19, [None, 7001, b"id"]], [20, 24, [b"10.0.0.2", 7002, b"id"], [b"r", 1]]]

    assert {("10.0.0.1", 7001): 20, ("10.0.0.2", 7002): 5} == _slots(reply, "10.0.0.1")
    assert _slots(None, "10.0.0.1") is None


# what it costs


@pytest.mark.parametrize("gone", [False, True], ids=["all stay", "most go away"])
async def test_two_hundred_probes_are_one_ping(redis_server: ExternalServer, *, gone: bool) -> None:
    """One check in flight, shared by all, and not ended by those that go away; its result is kept for a second."""
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
    """A check is one ``ping`` among the commands, with its outcome, and with its time when it was answered."""
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


# the breaker, and who needs Redis


async def test_open_breaker_is_degraded(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis answers, the limits do not ask it yet: degraded, and unhealthy where it is required."""
    monkeypatch.setattr(RedisManager, "breaker_state", "open")
    for required, expected in ((False, (200, "degraded")), (True, (503, "unhealthy"))):
        status, body, _ = await probe(app_on(redis_url, require_redis=required), "/")

        assert (*expected, "breaker_open", "open") == (status, body["status"], body["error"], body["breaker"])
    monkeypatch.setattr(RedisManager, "breaker_state", "half_open")
    assert "healthy" == (await probe(app_on(redis_url)))[1]["status"]


async def test_failing_closed_requires_redis() -> None:
    """Without an argument, Redis is required as soon as a part on the manager fails closed, whichever is made first."""
    app = app_on(NOWHERE)
    assert (200, "degraded") == ((found := await probe(app))[0], found[1]["status"])
    RateLimitMiddleware(app, on_redis_error="closed", redis=app_manager(app))
    assert (503, "unhealthy") == ((found := await probe(app))[0], found[1]["status"])
    optional = health_app(redis=app_manager(app), require_redis=False)
    assert (200, "degraded") == ((found := await probe(optional))[0], found[1]["status"])


@pytest.mark.usefixtures("shipped_deadlines")
async def test_app_with_a_hung_redis(private_server: StartServer) -> None:
    """An app whose breaker has opened under load tells so, is alive, and is well again soon after Redis is."""
    server = private_server()
    manager = RedisManager(Settings(REDIS_URL=server.url))
    app = Starlette()
    app.mount("/health", health_app(redis=manager))
    app.add_middleware(RateLimitMiddleware, limits="1000/minute", redis=manager)
    server.pause()
    try:
        async with client_of(app) as client:
            while manager.breaker_state != "open":
                await asyncio.gather(*(client.get("/") for _ in range(5)))
        live, _, fast = await probe(app, "/health/live")
        status, body, seconds = await probe(app, "/health/")
    finally:
        server.resume()

    assert (200, 200, "degraded", "redis_timeout", "open") == (live, status, *(body[name] for name in FIELDS[:3]))
    assert fast < 0.1
    assert seconds < 0.6
    async with asyncio.timeout(PATIENCE), client_of(app) as client:
        while (await probe(app, "/health/"))[1]["error"] is not None:
            await client.get("/")
            await asyncio.sleep(0.05)
    await manager.close()


# check_redis_health


@pytest.mark.parametrize("url", [NOWHERE, "redis://no-such-host.invalid"])
async def test_check_of_a_server_that_is_gone(url: str) -> None:
    """Unhealthy with a code, everything else null, nothing raised; the client's own retries are not waited for."""
    async with aioredis.Redis.from_url(url, retry=Retry(ExponentialBackoff(cap=10, base=1), 3)) as client:
        started = fair_time()
        checked = await check_redis_health(client)

    assert fair_time() - started < 0.6
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
    """Several loops, a fork, checks in flight at the end, no lifespan: not a warning under ``-W error``."""
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


def _in_starlette(app: SubApp) -> ASGIApp:
    outer = Starlette()
    outer.mount("/health", app)
    return outer


def _in_fastapi(app: SubApp) -> ASGIApp:
    outer = FastAPI()
    outer.mount("/health", app)
    return outer


@pytest.mark.parametrize("wrap", [_in_starlette, _in_fastapi])
async def test_documented_urls(wrap: Callable[[SubApp], ASGIApp]) -> None:
    """``/health/live``, ``/health/ready``, ``/health/``; anything else below is 404, any other method 405."""
    outer = wrap(app_on("memory://"))
    async with client_of(outer) as client:
        answers = [await client.get(f"/health{path}") for path in ("/live", "/ready", "/", "/nothing")]
        posted = await client.post("/health/ready")
        head = await client.head("/health/")

    assert [200, 200, 200, 404] == [answer.status_code for answer in answers]
    assert {"no-store"} == {answer.headers["cache-control"] for answer in [*answers, posted, head]}
    assert (405, "GET, HEAD", 200, b"") == (posted.status_code, posted.headers["allow"], head.status_code, head.content)


async def test_authorize_guards_what_can_be_read() -> None:
    """``/`` and ``/ready`` ask; ``/live`` answers anybody, since a restart would help nobody."""

    def operator(connection: HTTPConnection) -> bool:
        return connection.headers.get("x-token") == "good"

    app = health_app(settings=Settings(REDIS_URL="memory://"), authorize=operator)
    async with client_of(app) as client:
        strangers = [(await client.get(path)).status_code for path in ("/", "/ready", "/live")]
        operators = [(await client.get(path, headers={"x-token": "good"})).status_code for path in ("/", "/ready")]

    assert [403, 403, 200] == strangers
    assert [200, 200] == operators


async def test_what_authorize_raises_is_the_apps() -> None:
    """An exception reaches the app's error handling."""

    def ask(_connection: HTTPConnection) -> bool:
        raise HTTPException(401, headers={"WWW-Authenticate": "Bearer"})

    async with client_of(_in_starlette(health_app(settings=Settings(REDIS_URL="memory://"), authorize=ask))) as client:
        assert 401 == (await client.get("/health/")).status_code


def test_sync_client_is_refused(redis_server: ExternalServer) -> None:
    """What would block the loop is told at construction."""
    with pytest.raises(ConfigurationError, match="synchronous"):
        health_app(redis=redis_server.client())  # type: ignore[arg-type]  # what is tested


# the guide

GUIDE = section("## Health checks")


async def test_guide_shows_what_is_answered(private_server: StartServer) -> None:
    """The two answers side by side are those with Redis and without, but for the numbers."""
    (block,) = re.findall(r"^\$ curl -s localhost:8000/health/ .*?^```$", GUIDE, re.MULTILINE | re.DOTALL)
    middle = block.splitlines()[0].rindex("$ curl")
    lines = block.splitlines()[1:-1]
    shown = [json.loads("".join(line[part] for line in lines)) for part in (slice(middle), slice(middle, None))]
    server = private_server()
    app = app_on(server.url)
    well = (await probe(app, "/"))[1]
    server.kill()
    forget(app)
    gone = (await probe(app, "/"))[1]

    for told, really in zip(shown, (well, gone), strict=True):
        assert list(really) == list(told)
        for name, value in told.items():
            assert type(really[name]) is type(value), name
            assert value == really[name] or name in FIELDS[4:], name


async def test_guide_names_urls_and_codes_that_exist() -> None:
    """Probes in the manifest lead to pages, and every code named is one of a failure."""
    paths = re.findall(r"httpGet: \{path: ([^,]+), port: 8000\}", section("## Kubernetes"))
    async with client_of(_in_starlette(app_on("memory://"))) as client:
        assert [200, 200] == [(await client.get(path)).status_code for path in paths]
    codes = set(re.findall(r"`redis_(\w+)`", re.findall(r"^`error` is a code: .*$", GUIDE, re.MULTILINE)[0]))

    assert codes < set(Failure)
    assert {"timeout", "connection", "auth", "permission", "readonly", "loading", "busy", "cluster"} <= codes
