"""Concurrency limits: at most so many requests in flight, over all processes, whatever gets lost on the way."""

import asyncio
import random
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any, cast

import pytest
import redis
import redis.asyncio as aioredis
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redis_asgi import RateLimit, RateLimiter, RateLimitMiddleware, RedisManager, Rule, Settings, by_header
from redis_asgi.connection.open_client import PROCESS
from redis_asgi.errors import ConfigurationError
from redis_asgi.inspection.quotas import look
from redis_asgi.inspection.rights import CONCURRENCY, rights_of
from redis_asgi.ratelimit.answers.request_decision import RequestDecision
from redis_asgi.ratelimit.counting.heartbeat import Heart, Hearts
from redis_asgi.ratelimit.counting.in_flight import Ids
from redis_asgi.ratelimit.counting.local_engine import LocalEngine
from redis_asgi.ratelimit.limits.policy import make_partition
from redis_asgi.ratelimit.transport.script import _say_denied

from ..conftest import StartServer
from ..kit.logs import event_of
from ..kit.patience import until
from ..kit.processes import clean_environment
from ..kit.proxy import FaultProxy
from ..kit.servers import Cluster, ExternalServer
from .harness import Spy, all_answered, drive, header, http_scope, memory, statuses, websocket_scope

pytestmark = pytest.mark.anyio
on_redis = pytest.mark.server


@pytest.fixture(params=["redis", "memory"])
def either(request: pytest.FixtureRequest) -> RedisManager:
    """A manager of the shared server, and one of ``memory://``."""
    url = request.getfixturevalue("redis_url") if request.param == "redis" else "memory://"
    return RedisManager(Settings(REDIS_URL=url, RATE_LIMIT_TIMEOUT=5.0))


@pytest.fixture
def patient(redis_url: str) -> RedisManager:
    """A manager of the shared server that waits for it on a busy machine."""
    return RedisManager(Settings(REDIS_URL=redis_url, RATE_LIMIT_TIMEOUT=5.0))


def heart_of(manager: RedisManager) -> Heart:
    """What beats in the running loop."""
    return manager.per_process(Hearts.from_settings).heart(manager)


def running(manager: RedisManager) -> int:
    """How many requests are in flight in this process."""
    return sum(manager.per_process(LocalEngine.from_settings).in_flight().values())


def members(server: redis.Redis) -> list[bytes]:
    """The ids of all that is in flight for Redis."""
    keys = cast("list[bytes]", server.keys("rate_limit:*:c0:1"))
    return [member for key in keys for member in cast("list[bytes]", server.zrange(key, 0, -1))]


async def settled(manager: RedisManager) -> None:
    """Wait until all that was sent has been answered, and a heartbeat after that."""
    await all_answered(manager)
    await heart_of(manager).beat()


class Stream:
    """An app whose answers end when they are told to, and a way to open some."""

    def __init__(self, *, after: Callable[[], Awaitable[None]] | None = None) -> None:
        self.opened = 0
        self.ends: list[asyncio.Event] = []
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        end = asyncio.Event()
        self.ends.append(end)
        self.opened += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await end.wait()
        await send({"type": "http.response.body", "body": b"b"})
        if self._after is not None:
            await self._after()


class Opened:
    """One request on its way: what was sent of its answer, until it is let end."""

    def __init__(self, app: ASGIApp, scope: Scope | None = None) -> None:
        self.sent: list[Message] = []
        self._came = asyncio.Event()
        self._gone = asyncio.Event()
        self.task = asyncio.create_task(self._run(app, scope or http_scope()))

    async def _run(self, app: ASGIApp, scope: Scope) -> None:
        async def receive() -> Message:
            await self._gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            self.sent.append(message)
            self._came.set()

        try:
            await app(scope, receive, send)
        finally:
            self._came.set()

    async def status(self) -> int:
        """What it was answered."""
        await self._came.wait()
        status: int = self.sent[0]["status"]
        return status


async def opened(app: ASGIApp, count: int, **scope: Any) -> list[Opened]:
    """*count* requests that are answered, at least with a start."""
    requests = [Opened(app, http_scope(**scope)) for _ in range(count)]
    for request in requests:
        await request.status()
    return requests


async def ended(requests: list[Opened]) -> None:
    """Cancel what still runs of *requests*."""
    for request in requests:
        request.task.cancel()
    await asyncio.gather(*(request.task for request in requests), return_exceptions=True)


def streams(number: Any = 2, **rule: Any) -> Rule:
    """The rule of most of these tests."""
    return Rule(concurrency=number, **{"name": "streams", **rule})


# What is admitted, and what the answer says


async def test_so_many_are_in_flight_and_no_more(either: RedisManager) -> None:
    """The third of two is refused, and told so; when one ends the next one comes in."""
    app = Stream()
    limited = RateLimitMiddleware(app, rules=[streams(), Rule("100/minute", name="requests")], redis=either)
    first = await opened(limited, 2)
    (refused,) = await opened(limited, 1)
    app.ends[0].set()
    await first[0].task
    again = await opened(limited, 2)

    assert [200, 200, 429] == [await request.status() for request in (*first, refused)]
    assert [200, 429] == sorted([await request.status() for request in again])
    assert [b'"streams";r=1, "requests";r=99;t=60', b'"streams";r=0, "requests";r=98;t=60'] == [
        header(request.sent[0], b"ratelimit") for request in first
    ]
    start = refused.sent[0]
    assert b'"streams";q=2;qu="concurrent-requests", "requests";q=100;w=60' == header(start, b"ratelimit-policy")
    assert b"1" == header(start, b"retry-after")
    assert b"2 requests in flight. Retry in 1 s." in refused.sent[1]["body"]
    await ended([*first, *again])
    assert 0 == running(either)


async def test_decided_together_with_rates(either: RedisManager) -> None:
    """All or none: what a rate refuses holds no place, and what has no place costs nothing."""
    app = Stream()
    rules = [streams(), Rule("3/hour", name="requests")]
    limited = RateLimitMiddleware(app, rules=rules, redis=either)
    first = await opened(limited, 4)
    for end in app.ends:
        end.set()
    await asyncio.gather(*(request.task for request in first))
    second = await opened(limited, 2)
    for end in app.ends:
        end.set()

    assert [200, 200, 429, 429] == sorted([await request.status() for request in first])
    # The third of three an hour is still there, the fourth is not.
    assert [200, 429] == sorted([await request.status() for request in second])
    await asyncio.gather(*(request.task for request in second))
    assert 0 == running(either)


async def test_a_legacy_answer_says_one_second(either: RedisManager) -> None:
    """Limit, remaining and a reset that is a guess."""
    limited = RateLimitMiddleware(Stream(), rules=[streams(1)], headers="legacy", redis=either)
    first, second = await opened(limited, 1), await opened(limited, 1)

    assert b"1" == header(first[0].sent[0], b"x-ratelimit-limit")
    assert (b"0", b"1") == tuple(header(second[0].sent[0], name) for name in (b"x-ratelimit-remaining", b"retry-after"))
    await ended(first)


async def test_a_callable_says_how_many(either: RedisManager) -> None:
    """Sync or async, by plan; ``None`` is not limited, and 0 is nothing at all."""
    plans = {"pro": 3, "free": 1, "none": 0}

    async def number(conn: HTTPConnection) -> int | None:
        return plans.get(conn.headers.get("plan", ""))

    for concurrency in (number, lambda conn: plans.get(conn.headers.get("plan", ""))):
        limited = RateLimitMiddleware(Stream(), rules=[streams(concurrency)], redis=either)
        found = {}
        for plan in ("pro", "free", "none", "unlimited"):
            scope = {"client": (f"192.0.2.{len(plan)}", 1), "headers": [(b"plan", plan.encode())]}
            requests = await opened(limited, 5, **scope)
            found[plan] = [await request.status() for request in requests].count(200)
            await ended(requests)
        assert {"pro": 3, "free": 1, "none": 0, "unlimited": 5} == found


async def test_a_place_for_those_who_pay(either: RedisManager) -> None:
    """One limit, two numbers: the last place of four is for who pays."""
    limited = RateLimitMiddleware(
        Stream(), rules=[streams(lambda conn: 4 if "pays" in conn.headers else 3)], redis=either
    )
    free = await opened(limited, 4)
    paying = await opened(limited, 2, headers=[(b"pays", b"1")])

    assert [3, 1] == [[await r.status() for r in requests].count(200) for requests in (free, paying)]
    await ended([*free, *paying])


@pytest.mark.parametrize("said", ["4", 4.0, -1, True, 10**9 + 1, [4]])
async def test_a_callable_that_says_no_number_is_an_error(said: object) -> None:
    """Of the app, with the rule and the value; nothing is held."""
    limited = RateLimitMiddleware(Spy(), rules=[streams(lambda conn: said)], settings=memory())
    with pytest.raises(ValueError, match=r"rule 'streams': concurrency=.* not a whole number .* None for no limit"):
        await drive(limited, http_scope())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"concurrency": 0}, "concurrency=0 is not a whole number of requests in flight, 1 to"),
        ({"concurrency": "4"}, "concurrency='4' is not"),
        ({"concurrency": True}, "concurrency=True is not"),
        ({"concurrency": 2.5}, "concurrency=2.5 is not"),
        ({"concurrency": lambda: 4}, r"is called with \(conn\)"),
        ({"limits": "5/minute", "concurrency": 4}, "given together. Write two rules"),
        ({"concurrency": 4, "strategy": "gcra"}, "strategy='gcra' is for limits"),
        ({"concurrency": 4, "cost": 2}, "cost=2 is for limits"),
        ({"concurrency": 4, "cost": lambda request: 1}, "cost=.* is for limits"),
        ({"concurrency": 4, "count_if": lambda status: True}, "count_if=.* is for limits"),
        ({}, "needs limits or concurrency"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(arguments: dict[str, Any], text: str) -> None:
    """While it is built, with the argument and its value."""
    with pytest.raises(ConfigurationError, match=text):
        Rule(**arguments)


def test_a_route_of_its_own_has_none() -> None:
    """Nothing there sees the answer's end; the error says what does."""
    with pytest.raises(ConfigurationError, match=r"concurrency.*Rule\(concurrency=4, paths='/chat'\)"):
        RateLimit(concurrency=4)  # type: ignore[call-arg]  # that is the point


async def test_a_shadow_refuses_nobody(either: RedisManager) -> None:
    """It counts up to its number, and says whom it would refuse; so does a dry run."""
    limited = RateLimitMiddleware(Stream(), rules=[streams(1, shadow=True)], redis=either)
    requests = await opened(limited, 3)

    assert [200] * 3 == [await request.status() for request in requests]
    assert 1 == running(either)
    await ended(requests)
    assert 0 == running(either)

    settings = Settings(REDIS_URL="memory://", RATE_LIMIT_DRY_RUN=True)
    dry = await opened(RateLimitMiddleware(Stream(), rules=[streams(1)], settings=settings), 3)
    assert [200] * 3 == [await request.status() for request in dry]
    await ended(dry)


async def test_what_an_app_charges_is_for_rates(either: RedisManager) -> None:
    """More units of all policies are those of rates; a name that is none of them is an error."""
    found: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        decision: RequestDecision = scope["state"]["rate_limit"]
        decision.charge(5)
        decision.charge(-9)
        with pytest.raises(ValueError, match=r"policy='streams' does not apply .* \['requests'\]"):
            decision.charge(1, "streams")
        found.append(await decision.reset("streams"))
        await Spy()(scope, receive, send)

    limited = RateLimitMiddleware(app, rules=[streams(1), Rule("50/hour", name="requests")], redis=either)
    for _ in range(3):
        assert 200 == (await drive(limited, http_scope()))[0]["status"]

    assert 0 == running(either)
    if either.has_redis:
        await settled(either)
    assert (await statuses(limited, 1)) == [200]


# When it ends


async def _body(scope: Scope, receive: Receive, send: Send, after: Callable[[], Awaitable[None]]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"a"})
    await after()


async def _path(scope: Scope, receive: Receive, send: Send, after: Callable[[], Awaitable[None]]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.pathsend", "path": "/x"})
    await after()


async def _closing(scope: Scope, receive: Receive, send: Send, after: Callable[[], Awaitable[None]]) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.close", "code": 1000})
    await after()


async def _closed(scope: Scope, receive: Receive, send: Send, after: Callable[[], Awaitable[None]]) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    assert (await receive())["type"] == "websocket.disconnect"
    await after()


@pytest.mark.parametrize(
    ("answer", "scope"),
    [
        pytest.param(_body, http_scope(), id="last body byte"),
        pytest.param(_path, http_scope(), id="pathsend"),
        pytest.param(_closing, websocket_scope(), id="websocket closed by the app"),
        pytest.param(_closed, websocket_scope(), id="websocket closed by the client"),
    ],
)
async def test_over_before_the_app_returns(either: RedisManager, answer: Any, scope: Scope) -> None:
    """Background tasks run in nobody's place."""
    seen: list[int] = []

    async def look_on() -> None:
        seen.append(running(either))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(running(either))
        await answer(scope, receive, send, look_on)

    limited = RateLimitMiddleware(app, rules=[streams(1)], redis=either)
    first = {"type": "websocket.connect"} if scope["type"] == "websocket" else {"type": "http.request"}
    await drive(limited, dict(scope), first)

    assert [1, 0] == seen


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    pass


async def _fails(scope: Scope, receive: Receive, send: Send) -> None:
    raise LookupError


async def _fails_late(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"a", "more_body": True})
    raise LookupError


async def _cancelled(scope: Scope, receive: Receive, send: Send) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


@pytest.mark.parametrize("app", [_nothing, _fails, _fails_late, _cancelled])
async def test_over_when_the_app_is(either: RedisManager, app: ASGIApp) -> None:
    """It returns, raises or is cancelled."""
    limited = RateLimitMiddleware(app, rules=[streams(1)], redis=either)
    for _ in range(3):
        task = asyncio.ensure_future(drive(limited, http_scope()))
        with suppress(LookupError, asyncio.CancelledError):
            await task
        assert 0 == running(either)

    if either.has_redis:
        await settled(either)
        assert [] == members(redis.Redis.from_url(either.settings.REDIS_URL.get_secret_value()))  # type: ignore[union-attr]


async def test_an_inner_instance_holds_until_the_outer_answer_ends(either: RedisManager) -> None:
    """Each has its place, and one limit on both has one."""
    for outer, held in ((streams(2, name="both"), 2), (Rule("9/hour", name="rate"), 1)):
        app = Stream()
        both = [streams(1, name="inner"), *([outer] if held == 2 else [])]
        limited = RateLimitMiddleware(RateLimitMiddleware(app, rules=both, redis=either), rules=[outer], redis=either)
        first, second = await opened(limited, 1), await opened(limited, 1)

        assert (200, 429) == (await first[0].status(), await second[0].status())
        assert held == running(either)
        app.ends[0].set()
        while len(first[0].sent) < 3:
            await asyncio.sleep(0)
        assert 0 == running(either)
        await first[0].task
        third = await opened(limited, 1)
        assert 200 == await third[0].status()
        await ended(third)


# A block of code


async def test_a_slot_is_held_for_a_block(either: RedisManager) -> None:
    """By name and client; the block runs whatever was decided, and its end frees the place."""
    limiter = RateLimiter(either, timeout=5)
    async with AsyncExitStack() as stack:
        held = [await stack.enter_async_context(limiter.slot("a", 2)) for _ in range(3)]
        other = await stack.enter_async_context(limiter.slot("b", 2))
        named = await stack.enter_async_context(limiter.slot("a", 2, name="jobs"))
        assert [True, True, False] == [decision.allowed for decision in held]
        assert (1.0, ("default",)) == (held[2].retry_after, held[2].violated)
        assert other.allowed
        assert named.allowed
        (state,) = held[0].policies
        assert ("default", 2, 0, 1, "concurrency") == (
            state.name,
            state.quota,
            state.window,
            state.remaining,
            state.strategy,
        )
    assert 0 == running(either)
    with suppress(LookupError):
        async with limiter.slot("a", 1) as decision:
            assert decision.allowed
            raise LookupError
    async with limiter.slot("a", 1) as decision:
        assert decision.allowed


@pytest.mark.parametrize(("number", "name"), [(0, "a"), ("4", "a"), (4, "a b"), (None, "a")])
async def test_a_slot_that_cannot_be_is_refused(number: Any, name: str) -> None:
    """At the door of its block."""
    with pytest.raises(ConfigurationError, match=r"concurrency=|name="):
        async with RateLimiter(settings=memory()).slot("a", number, name=name):
            pass


# Never more than so many, seen from outside


class Observer:
    """Counts what is in a block, and the most there ever was."""

    def __init__(self) -> None:
        self.now = self.most = self.came = 0

    def __enter__(self) -> None:
        self.now += 1
        self.came += 1
        self.most = max(self.most, self.now)

    def __exit__(self, *_: object) -> None:
        self.now -= 1


@on_redis
@pytest.mark.parametrize("client", ["own", "the user's"])
async def test_never_more_than_so_many(redis_server: ExternalServer, redis_url: str, client: str) -> None:
    """Two workers, many tasks, releases that come twice and out of order, renewals between, and SCRIPT FLUSH."""
    settings = Settings(REDIS_URL=redis_url, RATE_LIMIT_TIMEOUT=20.0)
    managers: list[Any] = [RedisManager(settings) for _ in range(2)]
    users = [aioredis.Redis.from_url(redis_url) for _ in range(2)] if client != "own" else []
    limiters = [RateLimiter(each, timeout=20, settings=settings) for each in (users or managers)]
    hearts = [heart_of(limiter._engine.manager) for limiter in limiters]
    outside, chance, refused = Observer(), random.Random(7), 0
    working = 24

    async def work(limiter: RateLimiter) -> None:
        nonlocal refused, working
        for _ in range(50):
            async with limiter.slot("shared", 4) as decision:
                if decision.allowed:
                    with outside:
                        await asyncio.sleep(chance.random() / 500)
                else:
                    refused += 1
                    await asyncio.sleep(chance.random() / 100)
            if chance.random() < 0.02:
                redis_server.command("SCRIPT", "FLUSH")
        working -= 1

    async def beat() -> None:
        while working:
            for heart in hearts:
                for slot in list(heart._running.values()) if chance.random() < 0.3 else ():
                    # Sent once more, ahead of its own release.
                    heart._tell(_ghost(slot))
                await heart.beat()
            await asyncio.sleep(0.005)

    await asyncio.gather(beat(), *(work(limiter) for _ in range(12) for limiter in limiters))
    for limiter in limiters:
        await settled(limiter._engine.manager)

    assert 4 == outside.most
    assert 24 * 50 == outside.came + refused
    assert outside.came > 20
    assert [] == members(redis_server.client())
    for user in users:
        await user.aclose()


def _ghost(slot: Any) -> Any:
    """One that has ended long ago: what is said of it says nothing about *slot*."""
    ghost = object.__new__(type(slot))
    ghost.holder, ghost.holders, ghost.charges, ghost.is_doubtful = b"ghost", (b"ghost",), slot.charges, False
    return ghost


@on_redis
async def test_two_loops_of_one_process_share_the_limit(patient: RedisManager, redis_client: redis.Redis) -> None:
    """Each has ids of its own, and renews what runs in it alone."""
    app = Stream()
    limited = RateLimitMiddleware(app, rules=[streams(3)], redis=patient)
    here = await opened(limited, 2)
    there: list[list[int]] = []

    async def other_loop() -> None:
        requests = await opened(limited, 2)
        there.append([await request.status() for request in requests])
        await heart_of(patient).beat()
        there.append([running(patient), len(heart_of(patient))])
        await ended(requests)
        await heart_of(patient).beat()
        await patient.close()

    thread = threading.Thread(target=lambda: asyncio.run(other_loop()))
    thread.start()
    while thread.is_alive():
        await asyncio.sleep(0.01)
    await heart_of(patient).beat()

    assert [200, 429] == sorted(there[0])
    assert [3, 1] == there[1]
    assert 2 == len(members(redis_client)) == running(patient)
    await ended(here)


async def test_a_loop_that_died_holds_nothing_here() -> None:
    """What ran in it is not counted in this process any more; Redis forgets it with its lease."""
    manager = RedisManager(memory())
    limiter = RateLimiter(manager)
    left: list[Any] = []

    async def dies() -> None:
        held = limiter.slot("a", 4)
        left.append(held)
        await held.__aenter__()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(dies()))
    thread.start()
    while thread.is_alive():
        await asyncio.sleep(0.01)
    assert 1 == running(manager)
    loop.close()
    async with limiter.slot("a", 4):
        assert 1 == running(manager)


def test_ids_are_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two are alike, and a fork has others than its parent."""
    ids, others = Ids(), Ids()
    mine = [ids.next() for _ in range(100)]
    monkeypatch.setattr(PROCESS, "forks", PROCESS.forks + 1)
    after = [ids.next() for _ in range(100)]

    assert 201 == len({*mine, *after, others.next()})
    assert mine[0][:12] == mine[1][:12] != after[0][:12]
    assert not any(each.split() != [each] for each in (*mine, *after))


async def test_a_fork_holds_nothing_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its parent has in flight is its parent's."""
    manager = RedisManager(memory())
    limiter = RateLimiter(manager)
    async with limiter.slot("a", 4):
        assert 1 == running(manager)
        monkeypatch.setattr(PROCESS, "forks", PROCESS.forks + 1)
        async with limiter.slot("a", 4):
            assert 1 == running(manager)


# What is lost, and mended


@on_redis
async def test_a_heartbeat_says_again_what_runs(patient: RedisManager, redis_client: redis.Redis) -> None:
    """After FLUSHALL, and after a reset, it is all back: in two keys, of two policies of one client."""
    app = Stream()
    limited = RateLimitMiddleware(app, rules=[streams(3), streams(5, name="all")], redis=patient)
    requests = await opened(limited, 3)
    keys = set(cast("list[bytes]", redis_client.keys("*:c0:1")))
    assert 2 == len(keys)

    for forget in (redis_client.flushall, None):
        if forget is not None:
            forget()
        else:
            partition = make_partition("ip", "203.0.113.7", plain=True)
            assert await limited._engine.reset(partition, None)
        assert [] == members(redis_client)
        await heart_of(patient).beat()
        assert keys == set(cast("list[bytes]", redis_client.keys("*:c0:1")))
        assert 6 == len(members(redis_client))
        assert 429 == (await opened(limited, 1))[0].sent[0]["status"]
        await asyncio.sleep(0.11)  # for which a refusal is remembered
    leases = [
        score - _now(redis_client)
        for _, score in cast(Any, redis_client.zrange(next(iter(keys)), 0, -1, withscores=True))
    ]
    assert all(29e6 < lease <= 30e6 for lease in leases)
    await ended(requests)
    await settled(patient)
    assert [] == members(redis_client)


def _now(server: redis.Redis) -> int:
    seconds, micros = server.time()
    return seconds * 1_000_000 + micros


@on_redis
async def test_one_reset_by_name_leaves_the_other(patient: RedisManager, redis_client: redis.Redis) -> None:
    """A name's set is found through its field."""
    limited = RateLimitMiddleware(Stream(), rules=[streams(3), streams(5, name="all")], redis=patient)
    requests = await opened(limited, 2)
    assert await limited._engine.reset(make_partition("ip", "203.0.113.7", plain=True), "all")

    assert 2 == len(members(redis_client))
    await ended(requests)


@on_redis
async def test_a_heartbeat_is_one_command(patient: RedisManager, redis_client: redis.Redis) -> None:
    """However many run; and none beats when nothing does."""
    limiter = RateLimiter(patient, timeout=5)
    heart = heart_of(patient)
    assert heart._timer is None
    async with AsyncExitStack() as stack:
        for i in range(300):
            decision = await stack.enter_async_context(limiter.slot(f"client-{i % 3}", 200))
            assert decision.allowed
        assert heart._timer is not None
        redis_client.config_resetstat()
        await heart.beat()
        stats: Any = redis_client.info("commandstats")
        assert 1 == stats["cmdstat_evalsha"]["calls"]
        assert 300 == stats["cmdstat_zadd"]["calls"]
    await heart.beat()
    assert heart._timer is None
    assert (0, 0) == (len(heart), heart.owes)


@on_redis
async def test_it_beats_by_itself(patient: RedisManager, redis_client: redis.Redis) -> None:
    """Every ten seconds while something runs; one that failed is followed by another after a second."""
    heart = heart_of(patient)
    loop = asyncio.get_running_loop()
    async with RateLimiter(patient, timeout=5).slot("a", 1):
        timer = heart._timer
        assert timer is not None
        assert 9 < timer.when() - loop.time() <= 10
        redis_client.flushall()
        timer._run()
        timer.cancel()
        assert heart._under_way is not None
        await heart._under_way
        assert 1 == len(members(redis_client))
        heart._has_failed = True
        heart._timer.cancel()  # type: ignore[union-attr]  # it is planned
        heart._timer = None
        heart._has_beaten()
        assert 0 < heart._timer.when() - loop.time() <= 1  # type: ignore[attr-defined]  # likewise


@on_redis
async def test_a_release_waits_for_the_renewal_under_way(patient: RedisManager, redis_client: redis.Redis) -> None:
    """Whichever of the two Redis carries out first over two connections, the place is free in the end."""
    heart = heart_of(patient)
    async with RateLimiter(patient, timeout=5).slot("a", 1):
        beating = heart.beat()
        (slot,) = heart._running.values()
        slot.release()
        assert 1 == heart.owes
    await beating
    await settled(patient)

    assert [] == members(redis_client)
    assert 0 == heart.owes


@on_redis
async def test_each_request_is_two_trips_at_most(patient: RedisManager, redis_client: redis.Redis) -> None:
    """One to ask, one to release, whatever else it says of itself, and however often it ends."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["rate_limit"].charge(5)
        await Spy()(scope, receive, send)
        raise LookupError

    limited = RateLimitMiddleware(app, rules=[streams(1)], redis=patient)
    await RateLimiter(patient, timeout=5).consume("warm")
    redis_client.config_resetstat()
    with suppress(LookupError):
        await drive(limited, http_scope())
    await settled(patient)
    stats: Any = redis_client.info("commandstats")

    named = ("evalsha", "zadd", "hset", "zrem")
    assert [2, 1, 1, 1] == [stats[f"cmdstat_{name}"]["calls"] for name in named]

    redis_client.config_resetstat()
    async with RateLimiter(patient, timeout=5).slot("a", 1):
        (slot,) = heart_of(patient)._running.values()
        for _ in range(3):
            slot.release()
            await settled(patient)
    stats = redis_client.info("commandstats")
    assert [2, 1, 1, 1] == [stats[f"cmdstat_{name}"]["calls"] for name in named]


@on_redis
async def test_what_redis_never_heard_of_is_owed_to_nobody(private_server: StartServer) -> None:
    """Requests that come and go while it is away leave nothing to say when it is back."""
    server = private_server()
    manager = RedisManager(Settings(REDIS_URL=server.url))
    limiter = RateLimiter(manager)
    await limiter.consume("warm")
    server.kill()
    while manager.breaker_state == "closed":
        await limiter.consume("warm")
    for _ in range(50):
        async with limiter.slot("a", 1) as decision:
            assert ("local", True) == (decision.source, decision.allowed)
    await asyncio.sleep(0.01)
    assert 0 == heart_of(manager).owes
    await manager.close()


@on_redis
async def test_much_that_is_owed_leaves_in_parts(patient: RedisManager, redis_client: redis.Redis) -> None:
    """A batch at a time, so that no request waits behind all of it."""
    limiter = RateLimiter(patient, timeout=5)
    async with AsyncExitStack() as stack:
        for i in range(300):
            await stack.enter_async_context(limiter.slot(f"client-{i}", 1))
        heart = heart_of(patient)
        beating = heart.beat()
        assert 128 == heart._checks_left
        await beating
        for slot in heart._running.values():
            slot.is_doubtful = True
    await settled(patient)
    assert 0 == heart.owes
    assert [] == members(redis_client)


@pytest.mark.slow
async def test_a_node_that_is_gone_takes_no_place_along(private_cluster: Cluster) -> None:
    """Decided here because of one node, a request keeps its place at another, and gives it back there."""
    settings = Settings(REDIS_URL=private_cluster.url, REDIS_CLUSTER=True)
    manager = RedisManager(settings)
    address = make_partition("ip", "203.0.113.7", plain=True)
    gone = private_cluster.node_of(address.key)
    keys = (f"key-{i}" for i in range(1000))
    key = next(k for k in keys if private_cluster.node_of(make_partition("header:x-api-key", k).key) is not gone)
    there = private_cluster.node_of(make_partition("header:x-api-key", key).key)
    app = Stream()
    rules = [streams(2, partition_by=by_header("x-api-key")), Rule("5/hour", name="requests")]
    limited = RateLimitMiddleware(app, rules=rules, redis=manager, settings=settings)
    headers = [(b"x-api-key", key.encode())]
    before = await opened(limited, 1, headers=headers)
    gone.kill()
    after = await opened(limited, 2, headers=headers)
    assert [200, 200, 429] == sorted([await request.status() for request in (*before, *after)])
    assert 2 == running(manager)
    await heart_of(manager).beat()
    assert 2 == len(members(there.client()))
    await ended([*before, *after])
    for _ in range(100):
        await heart_of(manager).beat()
        if not members(there.client()):
            break
        await asyncio.sleep(0.05)
    assert [] == members(there.client())
    await manager.close()


@on_redis
async def test_a_lost_reply_keeps_its_place(private_server: StartServer) -> None:
    """Redis has admitted it, nobody was told, and the process decides: it goes on under the same id."""
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        manager = RedisManager(Settings(REDIS_URL=proxy.url, RATE_LIMIT_TIMEOUT=0.2))
        limiter = RateLimiter(manager, timeout=0.2)
        await RateLimiter(manager).consume("warm")
        await proxy.set("drop_replies", times=1)
        async with limiter.slot("a", 1) as decision:
            assert ("local", True) == (decision.source, decision.allowed)
            assert 1 == len(members(server.client())) == running(manager)
            await _beats(manager)
            assert 1 == len(members(server.client()))
        await _beats(manager)
        assert [] == members(server.client())
        assert 0 == heart_of(manager).owes
        await manager.close()


async def _beats(manager: RedisManager) -> None:
    """Beat until one has been answered, as Redis is back."""
    for _ in range(200):
        await heart_of(manager).beat()
        if not heart_of(manager)._has_failed:
            return
        await asyncio.sleep(0.05)
    pytest.fail("Redis does not come back")


@on_redis
async def test_a_late_check_that_is_refused_here_is_released(private_server: StartServer) -> None:
    """Redis had a place for it, the process has none: its id does not stay."""
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        settings = Settings(REDIS_URL=proxy.url, RATE_LIMIT_TIMEOUT=0.2, RATE_LIMIT_FALLBACK_DIVISOR=4)
        manager = RedisManager(settings)
        limiter = RateLimiter(manager, timeout=0.2, settings=settings)
        async with RateLimiter(manager, settings=settings).slot("a", 4) as first:
            await proxy.set("drop_replies", times=1)
            async with limiter.slot("a", 4) as second:
                assert [("redis", True), ("local", False)] == [(d.source, d.allowed) for d in (first, second)]
                await _beats(manager)
                assert 1 == len(members(server.client()))
        await _beats(manager)
        assert [] == members(server.client())
        await manager.close()


@on_redis
async def test_a_lost_release_is_said_again(private_server: StartServer) -> None:
    """The next heartbeat removes what Redis was not told of."""
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        manager = RedisManager(Settings(REDIS_URL=proxy.url))
        async with RateLimiter(manager).slot("a", 1) as decision:
            assert decision.source == "redis"
            await proxy.set("reset")
        await until(lambda: heart_of(manager).owes)
        assert 1 == len(members(server.client())) == heart_of(manager).owes
        await proxy.set("pass")
        await _beats(manager)
        assert [] == members(server.client())
        assert 0 == heart_of(manager).owes
        await manager.close()


@on_redis
async def test_what_is_owed_is_forgotten_in_the_end(private_server: StartServer) -> None:
    """When its leases have long ended, so that nothing beats for ever because of a Redis that never comes back."""
    server = private_server()
    manager = RedisManager(Settings(REDIS_URL=server.url))
    async with RateLimiter(manager).slot("a", 1) as decision:
        assert "redis" == decision.source
        server.kill()
    heart = heart_of(manager)
    while not heart.owes:
        await asyncio.sleep(0.01)
    await heart.beat()
    assert (1, True) == (heart.owes, heart._timer is not None)
    heart._owed_until = 0.0
    await heart.beat()
    assert (0, None) == (heart.owes, heart._timer)
    await manager.close()


@on_redis
async def test_without_redis_all_that_runs_counts(private_server: StartServer) -> None:
    """Whoever admitted it, against this process's share; nothing is cut; and Redis is told of it when it is back."""
    server = private_server()
    settings = Settings(REDIS_URL=server.url, RATE_LIMIT_FALLBACK_DIVISOR=2)
    manager = RedisManager(settings)
    app = Stream()
    limited = RateLimitMiddleware(app, rules=[streams(5)], redis=manager, settings=settings)
    first = await opened(limited, 2)
    server.kill()
    second = await opened(limited, 3)
    assert [200, 429, 429] == sorted([await request.status() for request in second])
    assert not any(request.task.done() for request in first)
    server.restart()
    await _beats(manager)

    assert 3 == len(members(server.client())) == running(manager)
    third = await opened(limited, 3)
    assert [200, 200, 429] == sorted([await request.status() for request in third])
    await ended([*first, *second, *third])
    await settled(manager)
    assert [] == members(server.client())
    await manager.close()


@on_redis
@pytest.mark.parametrize("answer", ["open", "closed"])
async def test_without_redis_a_rule_may_fail_otherwise(private_server: StartServer, answer: Any) -> None:
    """Open: what runs is told to Redis when it is back. Closed: nothing runs."""
    server = private_server()
    manager = RedisManager(Settings(REDIS_URL=server.url))
    limited = RateLimitMiddleware(Stream(), rules=[streams(1, on_redis_error=answer)], redis=manager)
    server.kill()
    requests = await opened(limited, 2)
    assert [200 if answer == "open" else 503] * 2 == [await request.status() for request in requests]
    server.restart()
    if answer == "open":
        await _beats(manager)
        assert 2 == len(members(server.client()))
    await ended(requests)
    assert 0 == running(manager)
    await manager.close()


@on_redis
async def test_gone_at_any_moment(patient: RedisManager, redis_client: redis.Redis) -> None:
    """Two thousand requests that are cancelled anywhere between the door and the end leave nothing behind."""
    chance = random.Random(11)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
        if chance.random() < 0.1:
            raise LookupError
        await send({"type": "http.response.body", "body": b"b"})

    limited = RateLimitMiddleware(app, rules=[streams(50), Rule("9/second", name="rate", shadow=True)], redis=patient)
    heart = heart_of(patient)
    for _ in range(40):
        tasks = [asyncio.ensure_future(drive(limited, http_scope())) for _ in range(50)]
        for turn in range(12):
            for task in tasks:
                if chance.random() < 0.1:
                    task.cancel()
            await asyncio.sleep(0 if turn < 8 else 0.001)
            if chance.random() < 0.1:
                heart.beat()
        for task in tasks:
            if chance.random() < 0.5:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await settled(patient)
    await settled(patient)

    assert 0 == running(patient)
    assert [] == members(redis_client)
    assert (0, 0) == (len(heart), heart.owes)


@on_redis
async def test_cancelled_in_the_moment_of_its_answer(patient: RedisManager, redis_client: redis.Redis) -> None:
    """The verdict has come, and nobody takes it: the place is given back."""
    limited = RateLimitMiddleware(Spy(), rules=[streams(1)], redis=patient)
    engine = limited._engine
    ask = engine.ask
    asked: list[Any] = []
    engine.ask = lambda *args: asked.append(ask(*args)) or asked[-1]  # type: ignore[method-assign, func-returns-value]
    task = asyncio.ensure_future(drive(limited, http_scope()))
    while not asked or not asked[-1].future.done():
        await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await settled(patient)

    assert asked[-1].allowed
    assert 0 == running(patient)
    assert [] == members(redis_client)


# Refused


@on_redis
async def test_refused_retries_block_nobody(patient: RedisManager, redis_client: redis.Redis) -> None:
    """They leave nothing behind, and are known without Redis until a place is free here."""
    app = Stream()
    limited = RateLimitMiddleware(app, rules=[streams(1)], redis=patient)
    (first,) = await opened(limited, 1)
    redis_client.config_resetstat()
    retries = [(await opened(limited, 1))[0].sent[0]["status"] for _ in range(30)]
    stats: Any = redis_client.info("commandstats")
    asked = stats.get("cmdstat_evalsha", {"calls": 0})["calls"]
    app.ends[0].set()
    await first.task
    (again,) = await opened(limited, 1)

    assert [429] * 30 == retries
    assert asked < 30
    # At once, although the refusal was remembered a moment ago.
    assert 200 == await again.status()
    assert 1 == len(members(redis_client))
    await ended([again])


@on_redis
async def test_a_refusal_is_remembered_for_a_tenth_of_a_second(patient: RedisManager) -> None:
    """Who ends elsewhere is not told of here."""
    app = Stream()
    limited = RateLimitMiddleware(app, rules=[streams(1), Rule("9/hour", name="rate")], redis=patient)
    (first,) = await opened(limited, 1)
    await opened(limited, 1)
    (held,) = limited._engine.refusals.partitions.values()
    ((field, refusal),) = held.items()

    assert b"streams:c0:1" == field
    assert 0 < refusal.until - refusal.at < 0.1001
    await ended([first])


# Cluster, rights, and who looks


async def test_parts_of_a_cluster_leave_nothing(cluster: Cluster) -> None:
    """What one slot admits and another refuses is given back: too much is counted for a moment, never too little."""
    manager = RedisManager(Settings(REDIS_URL=cluster.url, REDIS_CLUSTER=True, RATE_LIMIT_TIMEOUT=5.0))
    app = Stream()
    rules = [
        streams(2, partition_by=by_header("x-api-key")),
        Rule("5/hour", name="requests"),
    ]
    limited = RateLimitMiddleware(app, rules=rules, redis=manager)
    statuses = []
    requests = []
    for key in ("a", "a", "a", "b", "b", "c", "c", "c"):
        requests += await opened(limited, 1, headers=[(b"x-api-key", key.encode())])
        statuses.append(await requests[-1].status())
    # Five an hour from this address; of key c nobody is in flight any more.
    assert [200, 200, 429, 200, 200, 200, 429, 429] == statuses
    await settled(manager)
    assert 5 == sum(len(members(node.client())) for node in cluster.nodes) == running(manager)
    await heart_of(manager).beat()
    assert 5 == sum(len(members(node.client())) for node in cluster.nodes)
    await ended(requests)
    await settled(manager)
    assert 0 == sum(len(members(node.client())) for node in cluster.nodes) == heart_of(manager).owes
    await manager.close()


@on_redis
async def test_an_old_user_keeps_redis_for_the_other_limits(
    private_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the rights that came with concurrency such rules are decided here, others go on, and the log says so."""
    _say_denied.cache_clear()
    server = private_server()
    settings = Settings(REDIS_URL=server.url, REDIS_USERNAME="old", REDIS_PASSWORD="secret", RATE_LIMIT_TIMEOUT=5.0)
    line = rights_of(settings).line("old", "secret")
    server.command(*[word for word in line.split(" ") if word.lstrip("+") not in CONCURRENCY])
    manager = RedisManager(settings)
    limiter = RateLimiter(manager, timeout=5)
    for _ in range(2):
        async with limiter.slot("a", 1) as decision:
            assert ("local", True) == (decision.source, decision.allowed)
            await heart_of(manager).beat()
        assert "redis" == (await limiter.consume("a")).source
    await settled(manager)

    assert (0, "closed") == (heart_of(manager).owes, manager.breaker_state)
    assert ["redis_asgi.concurrency_denied"] == [event_of(record) for record in caplog.records]
    await manager.close()


@on_redis
async def test_an_operator_sees_what_is_in_flight(patient: RedisManager) -> None:
    """How many, of how many where that is known."""
    limiter = RateLimiter(patient, timeout=5)
    partition = make_partition("custom", "a")
    async with limiter.slot("a", 4), limiter.slot("a", 4):
        (unknown,) = await look(patient, partition, ())
        assert ("default", "concurrency", 0, None, 2) == (
            unknown.policy,
            unknown.strategy,
            unknown.window,
            unknown.quota,
            unknown.used,
        )
    await settled(patient)
    (unknown,) = await look(patient, partition, ())
    assert 0 == unknown.used


WORKER = """
import asyncio, sys
from redis_asgi import RateLimiter, RedisManager, Settings
from redis_asgi.ratelimit.limits import policy

policy.LEASE = 2
limiter = RateLimiter(RedisManager(Settings(REDIS_URL=sys.argv[1], RATE_LIMIT_TIMEOUT=5.0)), timeout=5)

async def main():
    held = [limiter.slot("a", 8) for _ in range(2)]
    for slot in held:
        assert (await slot.__aenter__()).allowed
    print("held", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def started(url: str) -> subprocess.Popen[bytes]:
    """A worker of its own process."""
    return subprocess.Popen([sys.executable, "-c", WORKER, url], stdout=subprocess.PIPE, env=clean_environment())


@on_redis
@pytest.mark.slow
async def test_a_killed_worker_holds_its_places_for_a_lease(redis_url: str, patient: RedisManager) -> None:
    """Four processes hold two each; two are killed, and what they held is free when its lease has ended."""
    limiter = RateLimiter(patient, timeout=5)
    workers = [started(redis_url) for _ in range(4)]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert b"held\n" == await asyncio.to_thread(worker.stdout.readline)
        async with limiter.slot("a", 8) as decision:
            assert not decision.allowed
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    for _ in range(100):
        await asyncio.sleep(0.1)
        async with limiter.slot("a", 1) as decision:
            if decision.allowed:
                return
    pytest.fail("the dead hold their places")


@on_redis
@pytest.mark.slow
async def test_a_decision_costs_the_same_with_many_workers(patient: RedisManager, redis_client: redis.Redis) -> None:
    """Server time a call with the requests of 200 workers in flight, against those of one: at most 1.5 times."""
    limiter = RateLimiter(patient, timeout=5)

    async def cost(others: int) -> float:
        key = make_partition("custom", f"of-{others}").key + b":default:c0:1"
        for i in range(others):
            redis_client.zadd(key, {f"worker-{i}": _now(redis_client) + 25_000_000})
        best = float("inf")
        for _ in range(5):
            redis_client.config_resetstat()
            for _ in range(400):
                async with limiter.slot(f"of-{others}", 1000) as decision:
                    assert decision.allowed
            stats: Any = redis_client.info("commandstats")
            best = min(best, stats["cmdstat_evalsha"]["usec_per_call"])
        return best

    one, many = await cost(1), await cost(200)
    assert many <= 1.5 * one, (one, many)
