"""When Redis is not well: every request is answered in time, by the policy that was chosen."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import request_response

from redis_asgi import RateLimiter, RateLimitMiddleware, RedisManager, Rule, Settings
from redis_asgi.errors import Failure
from redis_asgi.telemetry import telemetry

from ..kit.fair_time import fair_time
from ..kit.inside import manager_of
from ..kit.logs import event_of
from ..kit.patience import until
from ..kit.proxy import FaultProxy
from ..kit.servers import Server
from .harness import Spy, client_of, drive, header, http_scope

pytestmark = [pytest.mark.anyio, pytest.mark.server]

StartServer = Callable[..., Server]
CLOSED_PORT = "redis://127.0.0.1:1"


async def timed(app: RateLimitMiddleware, **scope: Any) -> tuple[int, float]:
    """A request's status, and how long it took in seconds."""
    started = fair_time()
    sent = await drive(app, http_scope(**scope))
    return sent[0]["status"], fair_time() - started


async def test_redis_down_at_start_changes_nothing_but_the_engine() -> None:
    """The app boots without Redis and holds the same limit in the process, headers included."""
    app = RateLimitMiddleware(Spy(), "3/minute", settings=Settings(REDIS_URL=CLOSED_PORT))
    async with client_of(app) as client:
        responses = [await client.get("/") for _ in range(4)]

    assert [200, 200, 200, 429] == [response.status_code for response in responses]
    assert '"default";r=2;t=60' == responses[0].headers["ratelimit"]


async def test_each_rule_fails_its_own_way() -> None:
    """Local rules go on counting beside open ones;
    one closed rule that covers the request closes it.
    """
    rules = [
        Rule("2/minute", name="local"),
        Rule("1/minute", name="open", on_redis_error="open"),
        Rule("9/minute", name="closed", on_redis_error="closed", paths="/pay"),
    ]
    app = RateLimitMiddleware(Spy(), rules=rules, settings=Settings(REDIS_URL=CLOSED_PORT))
    free = [(await timed(app))[0] for _ in range(3)]
    paid, _ = await timed(app, path="/pay")

    assert [200, 200, 429] == free
    assert 503 == paid


@pytest.mark.parametrize("beside", [[], [Rule("9/minute", name="local")]], ids=["alone", "beside a local rule"])
async def test_charging_a_rule_that_fails_open_is_no_error(beside: list[Rule]) -> None:
    """An app that charges a policy by its name answers as ever while nobody decides about it."""

    async def words(request: Request) -> Response:
        request.state.rate_limit.charge(7, policy="words")
        request.state.rate_limit.charge(-3, policy="words")
        return Response()

    rules = [Rule("50/minute", name="words", on_redis_error="open"), *beside]
    app = RateLimitMiddleware(request_response(words), rules=rules, settings=Settings(REDIS_URL=CLOSED_PORT))

    assert 200 == (await timed(app))[0]


async def test_fallback_divisor_shares_the_quota() -> None:
    """Each of three workers admits a third of the quota, rounded up, while Redis is gone."""
    settings = Settings(REDIS_URL=CLOSED_PORT, RATE_LIMIT_FALLBACK_DIVISOR=3)
    app = RateLimitMiddleware(Spy(), "10/minute", settings=settings)

    assert [200] * 4 + [429] == [(await timed(app))[0] for _ in range(5)]


async def test_restarted_redis_is_used_within_half_a_second(private_server: StartServer) -> None:
    """A kill and a restart cost no 5xx and no wait,
    and half a second later verdicts come from Redis again.
    """
    server = private_server()
    app = RateLimitMiddleware(Spy(), "50/minute", settings=Settings(REDIS_URL=server.url))
    await asyncio.gather(*(timed(app) for _ in range(10)))
    server.kill()
    down = [await timed(app) for _ in range(5)]
    server.restart()
    began = fair_time()
    await until(lambda: manager_of(app).breaker_state != "open")
    took = fair_time() - began
    up = await timed(app, client=("192.0.2.3", 1))

    assert {200} == {status for status, _ in [*down, up]}
    assert max(seconds for _, seconds in down) < 0.1
    assert took < 0.5
    assert b"rate_limit:{192.0.2.3}" in server.client().keys()


async def test_open_breaker_spares_everybody_the_wait(private_server: StartServer) -> None:
    """A hung Redis costs few requests their deadline,
    then none waits at all; it is asked by probes only.
    """
    server = private_server()
    app = RateLimitMiddleware(Spy(), "500/minute", settings=Settings(REDIS_URL=server.url, RATE_LIMIT_TIMEOUT=0.2))
    await timed(app)
    server.pause()
    slow = 0
    while manager_of(app).breaker().admits():
        await timed(app)
        slow += 1
    fast = [seconds for _, seconds in [await timed(app) for _ in range(100)]]
    server.resume()
    before, began = server.calls("evalsha"), fair_time()
    await until(lambda: manager_of(app).breaker_state != "open")
    half_open, took = manager_of(app).breaker_state, fair_time() - began
    answers = await asyncio.gather(*(timed(app, client=("192.0.2.5", 1)) for _ in range(10)))

    assert slow <= 10
    assert took < 0.5
    assert max(fast) < 0.02
    assert ("half_open", "closed") == (half_open, manager_of(app).breaker_state)
    assert 200 == answers[0][0]
    assert 1 <= server.calls("evalsha") - before <= 2
    assert [b"1"] == [value.split()[1] for value in server.client().hgetall("rate_limit:{192.0.2.5}").values()]


async def test_a_right_that_is_missing_opens_at_once_and_is_probed_slowly(private_server: StartServer) -> None:
    """NOPERM will not pass by itself: one failure is enough,
    and the server's ACL log is not filled.
    """
    server = private_server()
    server.command("ACL", "SETUSER", "default", "-evalsha")
    app = RateLimitMiddleware(Spy(), "50/minute", settings=Settings(REDIS_URL=server.url))
    await timed(app)
    opened = manager_of(app).breaker_state
    await asyncio.sleep(0.5)

    assert "open" == opened == manager_of(app).breaker_state
    assert Failure.PERMISSION is manager_of(app).breaker().reason


@pytest.mark.parametrize("right", ["evalsha", "time", "hset", "pexpire", "pttl"])
async def test_right_that_is_missing_in_the_script_is_one_too(any_server: StartServer, right: str) -> None:
    """On every version a right that only the script needs opens the breaker at once, for what it
    is.
    """
    server = any_server()
    server.command("ACL", "SETUSER", "default", f"-{right}")
    app = RateLimitMiddleware(Spy(), "50/minute", settings=Settings(REDIS_URL=server.url))
    await timed(app)
    await timed(app)
    state, reason = manager_of(app).breaker_state, manager_of(app).breaker().reason
    await manager_of(app).close()

    assert ("open", Failure.PERMISSION) == (state, reason)


async def test_failover_behind_a_name_is_followed_on_every_version(any_server: StartServer) -> None:
    """The node the limiter is connected to becomes a replica:
    the next connection finds who took over.
    """
    first, second = any_server(), any_server()
    async with FaultProxy(first.host, first.port) as proxy:
        app = RateLimitMiddleware(Spy(), "50/minute", settings=Settings(REDIS_URL=proxy.url))
        await timed(app)
        proxy.lead_to(second.host, second.port)
        first.command("REPLICAOF", second.host, str(second.port))
        deadline = asyncio.get_running_loop().time() + 5
        while not second.client().exists("rate_limit:{192.0.2.9}") and asyncio.get_running_loop().time() < deadline:
            await timed(app, client=("192.0.2.9", 1))
            await asyncio.sleep(0.02)
        await manager_of(app).close()

    assert 1 == second.client().exists("rate_limit:{192.0.2.9}")


async def test_replica_that_takes_over_is_used(private_server: StartServer) -> None:
    """READONLY: connections are dropped and made anew,
    so that a name that leads elsewhere now is asked again.
    """
    server = private_server()
    app = RateLimitMiddleware(Spy(), "50/minute", settings=Settings(REDIS_URL=server.url))
    await timed(app)
    (before,) = {each["id"] for each in server.connections()}
    server.command("REPLICAOF", "127.0.0.1", "1")
    down = [await timed(app) for _ in range(8)]
    opened = manager_of(app).breaker_state
    server.command("REPLICAOF", "NO", "ONE")
    began = fair_time()
    await until(lambda: manager_of(app).breaker_state != "open")
    took = fair_time() - began
    await timed(app, client=("192.0.2.9", 1))

    assert {200} == {status for status, _ in down}
    assert "open" == opened
    assert took < 0.5
    assert 1 == server.client().exists("rate_limit:{192.0.2.9}")
    assert before not in {each["id"] for each in server.connections()}


async def test_storm_of_cancelled_requests_serves_nobody_wrongly(private_server: StartServer) -> None:
    """A thousand requests cancelled at random: nobody gets another's numbers,
    and no counter exceeds its requests.
    """
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        app = RateLimitMiddleware(Spy(), "1000000/minute", settings=Settings(REDIS_URL=proxy.url))
        await timed(app)
        await proxy.set("delay", seconds=0.002)
        admitted = dict.fromkeys(range(20), 0)
        asked = dict.fromkeys(range(20), 0)

        async def request(number: int) -> None:
            asked[number] += 1
            sent = await drive(app, http_scope(client=(f"10.1.1.{number}", 1)))
            value = header(sent[0], b"ratelimit") or b""
            admitted[number] += 1
            assert 1_000_000 - asked[number] <= int(value.split(b"r=")[1].split(b";")[0]) <= 999_999

        for step in range(50):
            tasks = [asyncio.create_task(request(number)) for number in range(20)]
            await asyncio.sleep(0.0005 * (step % 4))
            for task in tasks[step % 3 :: 3]:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is None or isinstance(result, asyncio.CancelledError)
        await proxy.set("pass")
        await manager_of(app).close()
    for number in range(20):
        (stored,) = server.client().hgetall(f"rate_limit:{{10.1.1.{number}}}").values()

        assert admitted[number] <= int(stored.split()[1]) <= asked[number]


async def test_client_that_cannot_be_built_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster client resolves its host when it is built;
    a name without an address is an outage like any other.
    """

    def nowhere(manager: RedisManager) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(RedisManager, "_connect", nowhere)
    app = RateLimitMiddleware(Spy(), "2/minute", settings=Settings(REDIS_URL="redis://nowhere.invalid"))

    assert [200, 200, 429] == [(await timed(app))[0] for _ in range(3)]


@pytest.mark.parametrize("where", ["building", "connecting"])
@pytest.mark.parametrize(("on", "expected"), [("local", [200, 200, 429]), ("open", [200] * 3), ("closed", [503] * 3)])
async def test_a_defect_is_decided_as_without_redis(
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
    on: Any,
    expected: Any,
) -> None:
    """What no Redis causes, such as an odd version of redis-py, is no 500, no outage,
    and one line with a traceback.
    """
    monkeypatch.setattr("redis_asgi.errors._said", set())

    def raise_it(*_given: object, **_options: object) -> None:
        raise TypeError("__init__() got an unexpected keyword argument 'maint_notifications_config'")

    if where == "building":
        monkeypatch.setattr("redis_asgi.connection.manager.build_client", raise_it)
    else:
        monkeypatch.setattr("redis_asgi.connection.client_factory.QueueingPool.make_connection", raise_it)
    app = RateLimitMiddleware(Spy(), "2/minute", on_redis_error=on, redis=RedisManager(Settings(REDIS_URL=redis_url)))
    statuses = [(await timed(app))[0] for _ in range(3)]
    await manager_of(app).close()

    assert expected == statuses
    assert ["redis_asgi.defect"] == [event_of(each) for each in caplog.records if each.levelname == "ERROR"]
    assert "unexpected keyword argument" in caplog.text


@pytest.mark.parametrize("state", ["open", "closed"])
async def test_a_charge_that_redis_does_not_take_is_made_here(private_server: StartServer, state: str) -> None:
    """What an admitted answer costs in the end is not lost with Redis,
    whether the breaker knows of it or not.
    """
    server = private_server()
    go = asyncio.Event()

    async def tokens(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await go.wait()
        scope["state"]["rate_limit"].charge(7)
        await send({"type": "http.response.body", "body": b"x"})

    app = RateLimitMiddleware(tokens, "10/hour", redis=RedisManager(Settings(REDIS_URL=server.url)))
    manager = manager_of(app)
    answering = asyncio.create_task(drive(app, http_scope()))
    while not server.command("KEYS", "*"):
        await asyncio.sleep(0.01)
    server.kill()
    limiter = RateLimiter(manager)
    while state == "open" and manager.breaker_state != "open":
        await limiter.consume("other")
    settled = telemetry().redis_commands.labels("settle", "connection")
    before = settled._value.get()
    go.set()
    await answering
    while settled._value.get() == before:
        await asyncio.sleep(0.01)
    go.set()
    sent = await drive(app, http_scope())
    await manager.close()

    assert b'"default";r=2;t=3600' == header(sent[0], b"ratelimit")


async def test_a_reset_that_is_answered_oddly_is_none() -> None:
    """HKEYS answered by a number is an odd reply, and no defect."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(b":42\r\n" if b"HKEYS" in data else b"+OK\r\n" * data.count(b"CLIENT"))
        writer.close()

    listener = await asyncio.start_server(talk, "127.0.0.1", 0)
    limiter = RateLimiter(f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
    found = await limiter.reset("somebody")
    await manager_of(limiter).close()
    listener.close()

    assert found is False


async def test_shadow_and_dry_run_never_refuse_even_when_closed() -> None:
    """A rule that only watches has no say while Redis is gone either."""
    dry = Settings(REDIS_URL=CLOSED_PORT, RATE_LIMIT_DRY_RUN=True)
    rules = [Rule("9/minute", name="real"), Rule("1/minute", name="new", shadow=True, on_redis_error="closed")]
    app = RateLimitMiddleware(Spy(), on_redis_error="closed", settings=dry)
    beside = RateLimitMiddleware(Spy(), rules=rules, settings=Settings(REDIS_URL=CLOSED_PORT))

    assert [200] * 3 == [(await timed(app))[0] for _ in range(3)]
    assert [200] * 3 == [(await timed(beside))[0] for _ in range(3)]


async def test_script_that_is_loaded_too_late_charges_nobody(private_server: StartServer) -> None:
    """NOSCRIPT that comes after the deadline:
    the request was answered without Redis, so Redis is not asked again.
    """
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        app = RateLimitMiddleware(Spy(), "5/minute", settings=Settings(REDIS_URL=proxy.url, RATE_LIMIT_TIMEOUT=0.1))
        client = await manager_of(app).get_connection()
        await client.ping()  # connected, and the script not loaded yet
        await proxy.set("delay", seconds=0.15)
        status, seconds = await timed(app)
        await asyncio.sleep(0.3)
        await manager_of(app).close()

    assert 200 == status
    assert seconds < 0.15
    assert [] == server.client().keys()
