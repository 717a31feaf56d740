"""One shared round trip: batches, their isolation, their deadlines, and the real Redis they go to."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, cast

import httpx
import pytest
import redis
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from redis_asgi import RateLimiter, RateLimitMiddleware, RedisManager, Rule, Settings
from redis_asgi.errors import Failure
from redis_asgi.ratelimit.limits.charge import Charge, Charges
from redis_asgi.ratelimit.limits.policy import Policy, PolicySet, make_partition
from redis_asgi.ratelimit.transport.batcher import MANY, MAX_COUNTERS, Batcher
from redis_asgi.ratelimit.transport.check import Check, Outcome
from redis_asgi.ratelimit.transport.cluster_batcher import make_batcher
from redis_asgi.ratelimit.transport.pooled_transport import PooledTransport
from redis_asgi.ratelimit.transport.script import Call

from ..kit.fair_time import fair_time
from ..kit.inside import manager_of
from ..kit.logs import event_of
from ..kit.patience import PATIENCE, leave_unread
from ..kit.proxy import FaultProxy
from ..kit.servers import ExternalServer, Server
from .harness import Spy, all_answered, client_of, drive, http_scope

pytestmark = [pytest.mark.anyio, pytest.mark.server]

HUNDRED = PolicySet((Policy("default", 100, 60),))
THREE = PolicySet((Policy("a", 1000, 1), Policy("b", 1000, 60), Policy("c", 1000, 3600)))


def charge(client: str = "203.0.113.7", policies: PolicySet = HUNDRED, cost: int = 1) -> Charge:
    """A charge of one client."""
    return Charge(policies, make_partition("ip", client, plain=True), cost)


def submit(batcher: Batcher, *charges: Charge, timeout: float = 5.0) -> "asyncio.Future[Outcome]":
    """Queue a check; its future."""
    check = Check(batcher.loop, "consume", Charges(charges or (charge(),)), timeout)
    batcher.submit(check)
    return check.future


async def batcher_of(manager: RedisManager) -> Batcher:
    """The batcher of a manager's client in this loop."""
    batcher = manager.per_client(make_batcher)
    assert isinstance(batcher, Batcher)
    return batcher


def trips(server: ExternalServer) -> int:
    """Script calls the server has run."""
    return server.calls("evalsha") + server.calls("eval")


@pytest.mark.parametrize("limits", ["100000/minute", "10000/second; 100000/minute; 1000000/hour"], ids=["one", "three"])
async def test_concurrent_requests_share_trips(redis_server: ExternalServer, limits: str) -> None:
    """1,000 requests from 32 connections take at most 0.1 script calls each,
    with three limits as with one.
    """
    app = RateLimitMiddleware(Spy(), limits, settings=Settings(REDIS_URL=redis_server.url))
    await drive(app, http_scope())
    before = trips(redis_server)

    async def connection(number: int) -> None:
        for _ in range(1000 // 32 + 1):
            sent = await drive(app, http_scope(client=(f"203.0.113.{number}", 1)))
            assert 200 == sent[0]["status"]

    await asyncio.gather(*(connection(number) for number in range(32)))

    assert (trips(redis_server) - before) / 1000 <= 0.1


async def test_lone_request_takes_exactly_one_trip(redis_server: ExternalServer) -> None:
    """A request alone costs one script call, whatever its rules, and that before the app."""
    rules = [Rule("9/second; 99/minute", name="a"), Rule("9/hour", name="b", partition_by=lambda conn: "everybody")]
    spy = Spy()
    app = RateLimitMiddleware(spy, rules=rules, settings=Settings(REDIS_URL=redis_server.url))
    await drive(app, http_scope())
    before = trips(redis_server)
    for _ in range(5):
        await drive(app, http_scope())

    assert 5 == trips(redis_server) - before
    assert 6 == spy.calls


async def test_flood_of_a_refused_client_costs_no_trips(redis_server: ExternalServer) -> None:
    """After its first refusal a client is refused from memory, for a second at a time."""
    app = RateLimitMiddleware(Spy(), "1/hour", settings=Settings(REDIS_URL=redis_server.url))
    for _ in range(2):
        await drive(app, http_scope())
    before = trips(redis_server)
    started = time.monotonic()
    statuses = {(await drive(app, http_scope()))[0]["status"] for _ in range(500)}

    assert {429} == statuses
    assert trips(redis_server) - before <= 1 + (time.monotonic() - started)


async def test_odd_key_costs_only_its_own_request(
    redis_server: ExternalServer, redis_client: redis.Redis, manager: RedisManager
) -> None:
    """A key of another type in a batch loses its request the verdict;
    its neighbours keep theirs, before and after.
    """
    redis_client.set("rate_limit:{192.0.2.2}", "not a hash")
    redis_client.hset("rate_limit:{192.0.2.3}", "default:f60:1", "garbage")
    batcher = await batcher_of(manager)
    futures = [submit(batcher, charge(f"192.0.2.{i}")) for i in range(1, 6)]
    outcomes = await asyncio.gather(*futures)

    assert [Failure.REPLY, Failure.REPLY] == outcomes[1:3]
    assert [99, 99, 99] == [outcome[2] for outcome in outcomes if isinstance(outcome, list)]
    assert 1 == trips(redis_server) or 2 == trips(redis_server)  # the first loads the script


async def test_hostile_callable_and_cancelled_request_cost_no_neighbour(redis_server: ExternalServer) -> None:
    """One request whose callable raises and one that is cancelled leave the others of their batch
    alone.
    """

    def partition(conn: HTTPConnection) -> str:
        if conn.headers.get("x") == "bad":
            raise LookupError
        return conn.headers["x"]

    app = RateLimitMiddleware(Spy(), "1/minute", partition_by=partition, settings=Settings(REDIS_URL=redis_server.url))

    async def request(name: bytes) -> int:
        return int((await drive(app, http_scope(headers=[(b"x", name)])))[0]["status"])

    tasks = [asyncio.create_task(request(name)) for name in (b"a", b"bad", b"c", b"d", b"d")]
    await asyncio.sleep(0)
    tasks[2].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)

    assert 200 == results[0]
    assert isinstance(results[1], LookupError)
    assert isinstance(results[2], asyncio.CancelledError)
    assert {200, 429} == set(results[3:])


async def test_cancelled_before_it_is_written_is_never_charged(
    redis_client: redis.Redis, manager: RedisManager
) -> None:
    """A request that goes away while its check waits in the queue leaves no trace in Redis."""
    batcher = await batcher_of(manager)
    stays, goes = submit(batcher, charge("192.0.2.1")), submit(batcher, charge("192.0.2.2"))
    goes.cancel()
    await stays

    assert [b"rate_limit:{192.0.2.1}"] == redis_client.keys()


async def test_late_check_is_withdrawn_and_never_charged(private_server: Callable[..., Server]) -> None:
    """A deadline that passes before the batch is written: a failure in time,
    and nothing counted in Redis after.
    """
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        manager = RedisManager(Settings(REDIS_URL=proxy.url, REDIS_TIMEOUT=5))
        batcher = await batcher_of(manager)
        await proxy.set("delay", seconds=0.3)  # every reply of the handshake
        started, fairly = time.monotonic(), fair_time()
        outcome = await submit(batcher, timeout=0.1)
        waited, seconds = time.monotonic() - started, fair_time() - fairly
        patient = await submit(batcher, charge("192.0.2.9"))
        await manager.close()

    assert Failure.TIMEOUT is outcome
    assert waited >= 0.09
    assert seconds < 0.2
    assert isinstance(patient, list)
    assert [b"rate_limit:{192.0.2.9}"] == server.client().keys()


async def test_lost_reply_is_charged_once_and_never_sent_again(private_server: Callable[..., Server]) -> None:
    """A check whose reply is lost is counted at most once in Redis, and then decided here."""
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        limiter = RateLimiter(proxy.url, timeout=0.1)
        await limiter.consume("warm")
        await proxy.set("drop_replies")
        decision = await limiter.consume("a", "10/minute")
        await asyncio.sleep(0.3)
        await proxy.set("pass")
        assert ("local", True, 9) == (decision.source, decision.allowed, decision.policies[0].remaining)
        count = {key: value for key in server.client().keys() for value in server.client().hgetall(key).values()}
        assert all(value.split()[1] == b"1" for value in count.values())


async def test_checks_of_one_turn_leave_together(redis_server: ExternalServer, manager: RedisManager) -> None:
    """What arrives in one turn of an idle loop shares its trip, the first check included."""
    batcher = await batcher_of(manager)
    await submit(batcher)
    before = trips(redis_server)
    outcomes = await asyncio.gather(*(submit(batcher, charge(f"192.0.2.{i}", THREE)) for i in range(MANY - 1)))

    assert {1} == {outcome[0] for outcome in outcomes if isinstance(outcome, list)}
    assert 1 == trips(redis_server) - before


async def test_many_leave_in_two_halves(redis_server: ExternalServer, manager: RedisManager) -> None:
    """There are answers to work on while Redis decides the second half;
    each half is big, and there is no third.
    """
    batcher = await batcher_of(manager)
    await submit(batcher)
    before = trips(redis_server)
    futures = [submit(batcher, charge(f"192.0.2.{i}")) for i in range(MANY + 1)]
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
    answered = [future.done() for future in futures]
    await asyncio.gather(*futures)

    assert 2 == trips(redis_server) - before
    first = MANY // 2
    assert [True] * first == answered[:first]


async def test_reply_that_came_while_the_loop_was_held_up_counts(manager: RedisManager) -> None:
    """A process that is busy for longer than the deadline reads what has come before it gives up on
    it.
    """
    batcher = await batcher_of(manager)
    await submit(batcher)
    futures = [submit(batcher, charge(f"192.0.2.{i}"), timeout=0.05) for i in range(4)]
    while not batcher._sent:
        await asyncio.sleep(0)
    time.sleep(0.1)  # noqa: ASYNC251 - the loop is held up by somebody
    outcomes = await asyncio.gather(*futures)

    assert [list] * 4 == [type(outcome) for outcome in outcomes]


async def test_full_batches_overlap_and_hold_at_most_their_counters(
    redis_server: ExternalServer, manager: RedisManager
) -> None:
    """More checks than one batch holds go in several, at once; each is answered."""
    batcher = await batcher_of(manager)
    await submit(batcher)
    before = trips(redis_server)
    futures = [submit(batcher, charge(f"10.0.{i // 250}.{i % 250}", THREE)) for i in range(1000)]
    outcomes = await asyncio.gather(*futures)

    assert all(isinstance(outcome, list) and outcome[0] == 1 for outcome in outcomes)
    assert -(-3000 // MAX_COUNTERS) <= trips(redis_server) - before <= 40


async def test_script_flush_is_invisible(redis_client: redis.Redis, manager: RedisManager) -> None:
    """After SCRIPT FLUSH the next batch goes once more in full, and nothing is counted twice."""
    batcher = await batcher_of(manager)
    await submit(batcher)
    redis_client.script_flush()
    outcome = await submit(batcher)

    assert isinstance(outcome, list)
    assert 98 == outcome[2]


async def test_moving_window_and_refunds_go_over_the_wire(redis_client: redis.Redis, manager: RedisManager) -> None:
    """Lists, receipts and several charges of a check survive the packing,
    and equal what redis-py would pack.
    """
    batcher = await batcher_of(manager)
    log = PolicySet((Policy("m", 5, 60, "moving-window"), Policy("f", 9, 60)))
    taken = await submit(batcher, charge("192.0.2.1", log, 3), charge("192.0.2.2", HUNDRED, 2))
    assert isinstance(taken, list)
    back = Check(
        batcher.loop,
        "refund",
        Charges((charge("192.0.2.1", log, 2), charge("192.0.2.2", HUNDRED, 2))),
        5.0,
        [taken[5], taken[10], taken[15]],
    )
    batcher.submit(back)
    given = await back.future

    assert [2, 6, 98] == [taken[2], taken[7], taken[12]]
    assert isinstance(given, list)
    assert [4, 8, 100] == [given[2], given[7], given[12]]
    assert 1 == redis_client.llen("rate_limit:{192.0.2.1}:m:m60:1")


async def test_settled_after_the_response_in_redis(redis_server: ExternalServer) -> None:
    """count_if and charge() change the counters in Redis, by receipt,
    after the response and without delaying it.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/more":
            scope["state"]["rate_limit"].charge(5)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    settings = Settings(REDIS_URL=redis_server.url)
    limited = RateLimitMiddleware(
        app, rules=[Rule("10/minute", count_if=lambda status: status >= 400)], settings=settings
    )
    charged = RateLimitMiddleware(app, rules=[Rule("10/minute")], settings=settings)
    async with client_of(limited) as client:
        first = await client.get("/")
        await all_answered(manager_of(limited))
        second = await client.get("/")
        await all_answered(manager_of(limited))
    async with client_of(charged) as client:
        third = await client.get("/more")
        await all_answered(manager_of(charged))
        fourth = await client.get("/")

    remaining = [int(r.headers["ratelimit"].split("r=")[1].split(";")[0]) for r in (first, second, third, fourth)]
    assert [9, 9, 9, 3] == remaining


async def test_exhausted_pool_is_our_own_load(private_server: Callable[..., Server]) -> None:
    """With every connection taken, a check waits within its deadline and fails as ``pool``, not as
    a dead Redis.
    """
    server = private_server()
    manager = RedisManager(Settings(REDIS_URL=server.url, REDIS_POOL_SIZE=1))
    client = await manager.get_connection()
    blocking = asyncio.create_task(cast("Coroutine[Any, Any, object]", client.blpop("nothing", timeout=1)))
    while not server.calls("blpop") and not manager.pool._in_use_connections:  # type: ignore[union-attr]  # it is open
        await asyncio.sleep(0.001)
    outcome = await submit(await batcher_of(manager), timeout=0.05)
    blocking.cancel()
    await manager.close()

    assert Failure.POOL is outcome


async def test_given_client_is_used_as_it_is(redis_server: ExternalServer) -> None:
    """A decoding client of the user decides too, keeps its settings, and stays open."""
    client = aioredis.Redis.from_url(redis_server.url, decode_responses=True)
    app = RateLimitMiddleware(Spy(), "2/minute", redis=client)
    statuses = [(await drive(app, http_scope()))[0]["status"] for _ in range(3)]

    assert [200, 200, 429] == statuses
    assert await client.ping()
    await client.aclose()


async def test_command_by_hand_equals_that_of_redis_py(redis_server: ExternalServer) -> None:
    """The joined command is byte for byte what the library's own packer makes of the same words."""
    connection = aioredis.Redis.from_url(redis_server.url).connection_pool.make_connection()
    loop = asyncio.get_running_loop()
    checks = [
        Check(loop, "consume", Charges((charge("a"), charge("b", THREE, 7))), 1.0),
        Check(loop, "peek", Charges((charge("c", PolicySet((Policy("m", 5, 60, "moving-window"),))),)), 1.0),
    ]
    for clock in (None, 123_456_789):
        call = Call(checks, 17, clock)

        assert b"".join(connection.pack_command(*call.words())) == call.command()


def test_two_loops_in_turn_and_no_lifespan(redis_server: ExternalServer) -> None:
    """The same app answers in one ``asyncio.run`` after the other,
    without a lifespan and without a warning.
    """
    app = RateLimitMiddleware(Spy(), "100/minute", settings=Settings(REDIS_URL=redis_server.url))

    async def main() -> int:
        return int((await drive(app, http_scope()))[0]["status"])

    assert [200, 200] == [asyncio.run(main()), asyncio.run(main())]


async def test_log_has_one_line_per_transition(
    private_server: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    """A lost Redis is one line for all requests, and its return another."""
    server = private_server()
    limiter = RateLimiter(server.url)
    await limiter.consume("a")
    server.kill()
    with caplog.at_level(logging.WARNING, "redis_asgi"):
        sources = {(await limiter.consume("a")).source for _ in range(20)}
        lost = [event_of(record) for record in caplog.records]
        server.restart()
        async with asyncio.timeout(PATIENCE):
            while "redis_asgi.redis_back" not in map(event_of, caplog.records):
                back = (await limiter.consume("a")).source
                await asyncio.sleep(0.01)

    assert {"local"} == sources
    assert ["redis_asgi.redis_unavailable"] == lost
    assert "redis" == back
    assert ["redis_asgi.redis_unavailable", "redis_asgi.redis_back"] == [event_of(record) for record in caplog.records]


async def test_wire_says_what_a_waiting_check_lacks(manager: RedisManager) -> None:
    """A check still in the queue at its deadline lacked a connection when the pool is empty, else
    time.
    """
    client = await manager.get_connection()
    assert isinstance(client, aioredis.Redis)

    assert Failure.TIMEOUT is PooledTransport(client).timeout_cause()


async def test_http_client_sees_exact_numbers(redis_server: ExternalServer) -> None:
    """Fifty concurrent clients of one address get exactly the quota admitted between them."""
    app = RateLimitMiddleware(Spy(), "20/minute", settings=Settings(REDIS_URL=redis_server.url))
    async with client_of(app) as client:
        responses: list[httpx.Response] = await asyncio.gather(*(client.get("/") for _ in range(50)))

    assert 20 == sum(response.status_code == 200 for response in responses)
    assert 30 == sum(response.status_code == 429 for response in responses)


async def test_a_reply_left_on_a_users_connection_decides_nothing(redis_server: ExternalServer) -> None:
    """The connection is dropped, and the check is decided by Redis over a new one."""
    client = aioredis.Redis.from_url(redis_server.url, max_connections=1, retry=Retry(NoBackoff(), 0))
    limiter = RateLimiter(client)
    assert "redis" == (await limiter.consume("a", "2/minute")).source
    connection = await client.connection_pool.get_connection()
    await leave_unread(connection, "PING")
    await client.connection_pool.release(connection)
    decisions = [await limiter.consume("a", "2/minute") for _ in range(2)]
    assert [("redis", True), ("redis", False)] == [(each.source, each.allowed) for each in decisions]
    await client.aclose()
