"""Concurrency limits: at most so many requests in flight, what the answer says, and who sees it."""

import asyncio
from typing import Any

import pytest
import redis
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from redis_asgi import RateLimit, RateLimiter, RateLimitMiddleware, RedisManager, Rule, Settings, by_header
from redis_asgi.errors import ConfigurationError
from redis_asgi.inspection.quotas import look
from redis_asgi.inspection.rights import CONCURRENCY, rights_of
from redis_asgi.ratelimit.answers.request_decision import RequestDecision
from redis_asgi.ratelimit.limits.policy import make_partition
from redis_asgi.ratelimit.transport.script import _say_denied

from ..conftest import StartServer
from ..kit.inside import engine_of
from ..kit.logs import event_of
from ..kit.servers import Cluster
from .concurrency import Stream, ended, heart_of, members, on_redis, opened, running, settled, streams
from .harness import Spy, drive, header, http_scope, memory, statuses

pytestmark = pytest.mark.anyio


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


@pytest.mark.parametrize("said", ["4", 4.0, float("nan"), -1, True, 10**9 + 1, [4]])
async def test_a_callable_that_says_no_number_is_an_error(said: object) -> None:
    """Of the app, with the rule and the value; nothing is held."""
    limited = RateLimitMiddleware(Spy(), rules=[streams(lambda conn: said)], settings=memory())
    words = r"rule 'streams', whose .* callable: concurrency=.* not a whole number .* None for no limit"
    with pytest.raises(ConfigurationError, match=words):
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
    (held,) = engine_of(limited).refusals.partitions.values()
    ((field, refusal),) = held.items()

    assert b"streams:c0:1" == field
    assert 0 < refusal.until - refusal.at < 0.1001
    await ended([first])


# Cluster, rights, and who looks


async def test_parts_of_a_cluster_leave_nothing(cluster: Cluster) -> None:
    """What one slot admits and another refuses is given back:
    too much is counted for a moment, never too little.
    """
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
    """Without the rights that came with concurrency such rules are decided here,
    others go on, and the log says so.
    """
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
