"""Health of a Redis that is not well: each failure has its code, in time."""

import asyncio
from typing import Any

import pytest
import redis.asyncio as aioredis

from redis_asgi import (
    RateLimiter,
    RedisManager,
    RedisMetrics,
    Settings,
    check_redis_health,
    health_app,
)
from redis_asgi.connection.health_cache import Watch

from ..kit.certificates import Certificates
from ..kit.fair_time import fair_time
from ..kit.patience import until
from ..kit.proxy import FaultProxy
from ..kit.servers import ExternalServer, Server
from .probes import NOWHERE, StartServer, app_manager, app_on, assert_ill, client_of, forget, hurry, probe

pytestmark = pytest.mark.anyio


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
    """A PING is answered, and yet no limit can be counted there,
    which is said before the first request is one.
    """
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


@pytest.mark.parametrize(
    ("inject", "error"),
    [
        (("ACL", "SETUSER", "default", "-hset"), "redis_permission"),
        (("CONFIG", "SET", "min-replicas-to-write", 1), "redis_readonly"),
    ],
)
async def test_what_only_commands_are_told(
    private_server: StartServer, monkeypatch: pytest.MonkeyPatch, inject: tuple[str | int, ...], error: str
) -> None:
    """It shows when limits are counted, and is told while they cannot be,
    and no longer than anybody tries.
    """
    monkeypatch.setattr("redis_asgi.connection.breaker._SLOW_PROBE_EVERY", 0.02)
    server = private_server()
    server.command(*inject)
    app = app_on(server.url)
    assert "healthy" == (await probe(app))[1]["status"]
    limiter = RateLimiter(app_manager(app))
    while app_manager(app).breaker_state != "open":
        await limiter.consume("somebody")
    await assert_ill(app, error)
    await until(lambda: app_manager(app).breaker_state == "half_open")
    await assert_ill(app, error)
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
    """It answers a PING itself, and everything else with words of its own:
    degraded, whoever needs Redis.
    """
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


async def test_hung_tls_is_hung_up_on(
    tls_server: Server, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that hangs is not asked for its part of a TLS goodbye, which may take 30 s."""
    tls: dict[str, Any] = {"REDIS_SSL_CERTFILE": certificates.client.cert, "REDIS_SSL_KEYFILE": certificates.client.key}
    async with FaultProxy("127.0.0.1", tls_server.port) as proxy:
        app = app_on(proxy.url.replace("redis:", "rediss:"), REDIS_SSL_CA_CERTS=certificates.ca.cert, **tls)
        assert "healthy" == (await probe(app))[1]["status"]
        hurry(app, monkeypatch)
        await proxy.set("blackhole")
        forget(app)
        await assert_ill(app, "redis_timeout")
        await until(lambda: not proxy.open)


async def test_full_server_is_degraded(private_server: StartServer) -> None:
    """OOM is no answer to a PING, but what INFO says of the memory tells it; one that evicts goes
    on.
    """
    server = private_server("--maxmemory", "1")
    app = app_on(server.url)
    await assert_ill(app, "redis_oom")

    server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    forget(app)
    assert (200, {"status": "healthy", "error": None}) == (await probe(app))[:2]


async def test_exhausted_pool_is_no_matter(redis_server: ExternalServer) -> None:
    """A check has a connection of its own: not one of the pool, in ours and in a user's."""
    manager = RedisManager(Settings(REDIS_URL=redis_server.url, REDIS_POOL_SIZE=1))
    look = redis_server.client()
    async with aioredis.Redis.from_url(redis_server.url, max_connections=1) as given:
        for redis, client in ((manager, await manager.get_connection()), (given, given)):
            block: Any = client.execute_command
            waiting = asyncio.create_task(block("BLPOP", "never", 0))
            await until(lambda: look.info("clients")["blocked_clients"])
            status, body, seconds = await probe(health_app(redis=redis))

            assert (200, "healthy", False) == (status, body["status"], waiting.done())
            assert seconds < 5  # REDIS_TIMEOUT is 10
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await until(lambda: not look.info("clients")["blocked_clients"])


async def test_client_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """No client, no answer, and no 500."""

    def nowhere(_manager: RedisManager) -> None:
        raise OSError("a certificate in /etc cannot be read")

    monkeypatch.setattr(RedisManager, "_connect", nowhere)
    await assert_ill(app_on(NOWHERE), "redis_connection")
