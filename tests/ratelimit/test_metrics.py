"""What is counted is what happened: each request once, each policy's decision,
each fallback; and no identity.
"""

import asyncio
import threading
from collections.abc import Iterator

import pytest
from fastapi import Depends, FastAPI
from starlette.requests import HTTPConnection

from redis_asgi import RateLimit, RateLimiter, RateLimitMiddleware, RedisManager, Rule, Settings, by_header
from redis_asgi.telemetry import Telemetry, fresh_telemetry, telemetry

from ..kit.inside import manager_of
from ..kit.servers import ExternalServer
from .harness import Spy, client_of, drive, http_scope

pytestmark = pytest.mark.anyio

CLOSED_PORT = "redis://127.0.0.1:1"


@pytest.fixture
def counted() -> Iterator[Telemetry]:
    """A telemetry that starts at zero."""
    with fresh_telemetry() as mine:
        yield mine


def read(metric: object) -> dict[tuple[str, ...], int]:
    """A counter's values above zero, by label values in the order of their names; up to date."""
    telemetry().buffer.flush()
    return {
        tuple(sample.labels[name] for name in sorted(sample.labels)): int(sample.value)
        for family in metric.collect()  # type: ignore[attr-defined]
        for sample in family.samples
        if sample.name.endswith(("_total", "_count")) and sample.value
    }


def test_notes_of_a_loop_that_ends_are_told(counted: Telemetry, redis_url: str) -> None:
    """Its timer ends with it: a worker that another one answers for would keep them to itself."""
    app = RateLimitMiddleware(Spy(), "9/minute", settings=Settings(REDIS_URL=redis_url))

    async def main() -> None:
        await drive(app, http_scope())

    asyncio.run(main())

    assert 0 == len(counted.buffer._counted) + len(counted.buffer._added)


async def test_each_request_is_counted_once_by_outcome_and_source(
    counted: Telemetry, redis_server: ExternalServer
) -> None:
    """Admitted, refused by Redis, refused from memory, exempt."""
    settings = Settings(REDIS_URL=redis_server.url)
    app = RateLimitMiddleware(Spy(), "3/minute", exempt="/free", settings=settings)
    for _ in range(6):
        await drive(app, http_scope())
    await drive(app, http_scope(path="/free"))

    assert {
        ("allowed", "redis"): 3,
        ("refused", "redis"): 1,
        ("refused", "refusal_memory"): 2,
        ("exempt", "none"): 1,
    } == read(counted.ratelimit_requests)
    assert {("allowed", "default"): 3, ("refused", "default"): 3} == read(counted.ratelimit_policy)
    assert {("redis",): 4} == read(counted.ratelimit_check_duration)
    assert {("check", "ok"): 4} == read(counted.redis_commands)
    assert {(): 4} == read(counted.redis_batch_size)
    assert {(): 1} == read(counted.redis_script_loads)
    assert {} == read(counted.ratelimit_fallback)


@pytest.mark.parametrize(
    ("on_redis_error", "requests", "policies"),
    [
        ("local", {("allowed", "local"): 1, ("refused", "local"): 2}, {("allowed", "all"): 1, ("refused", "all"): 2}),
        ("open", {("allowed", "none"): 3}, {}),
        ("closed", {("unavailable", "none"): 3}, {}),
    ],
)
async def test_fallbacks_are_counted_with_mode_and_reason(
    counted: Telemetry,
    on_redis_error: object,
    requests: dict[tuple[str, ...], int],
    policies: dict[tuple[str, ...], int],
) -> None:
    """Without Redis."""
    rules = [Rule("1/minute", name="all", on_redis_error=on_redis_error)]  # type: ignore[arg-type]
    app = RateLimitMiddleware(Spy(), rules=rules, redis=RedisManager(Settings(REDIS_URL=CLOSED_PORT)))
    for _ in range(3):
        await drive(app, http_scope())

    assert requests == read(counted.ratelimit_requests)
    assert policies == read(counted.ratelimit_policy)
    assert {(str(on_redis_error), "connection"): 3} == read(counted.ratelimit_fallback)
    assert {("check", "connection"): 3} == read(counted.redis_commands)
    assert manager_of(app).fails_closed == (on_redis_error == "closed")
    await manager_of(app).close()


async def test_transitions_of_the_breaker_are_counted(counted: Telemetry) -> None:
    """Five failures open it, once."""
    app = RateLimitMiddleware(Spy(), "99/minute", redis=RedisManager(Settings(REDIS_URL=CLOSED_PORT)))
    for _ in range(12):
        await drive(app, http_scope())
    assert {("open",): 1} == read(counted.breaker_transitions)
    assert {("check", "connection"): 5} == read(counted.redis_commands)
    assert {("local", "connection"): 12} == read(counted.ratelimit_fallback)
    await manager_of(app).close()


async def test_shadows_and_several_policies(counted: Telemetry) -> None:
    """A shadow's refusal is its own outcome;
    a policy that admits what another refuses has admitted it.
    """
    rules = [Rule("9/minute", name="wide"), Rule("1/minute", name="watch", shadow=True), Rule("2/minute", name="tight")]
    app = RateLimitMiddleware(Spy(), rules=rules, redis=RedisManager(Settings(REDIS_URL="memory://")))
    for _ in range(3):
        await drive(app, http_scope())

    assert {("allowed", "memory"): 2, ("refused", "memory"): 1} == read(counted.ratelimit_requests)
    assert {
        ("allowed", "wide"): 3,
        ("allowed", "watch"): 1,
        ("shadow_refused", "watch"): 2,
        ("allowed", "tight"): 2,
        ("refused", "tight"): 1,
    } == read(counted.ratelimit_policy)


async def test_a_route_that_refuses_makes_its_request_a_refused_one(counted: Telemetry) -> None:
    """Under the middleware, and once; alone, by the route's own limit."""
    for middleware in (True, False):
        app = FastAPI()
        manager = RedisManager(Settings(REDIS_URL="memory://"))
        if middleware:
            app.add_middleware(RateLimitMiddleware, limits="99/minute", redis=manager)
        limit = RateLimit("1/minute", name="route", redis=None if middleware else manager)
        app.add_api_route("/", lambda: "", dependencies=[Depends(limit)])
        async with client_of(app) as client:
            assert [200, 429] == [(await client.get("/")).status_code for _ in range(2)]
    await asyncio.sleep(0)

    assert {("allowed", "memory"): 2, ("refused", "memory"): 2} == read(counted.ratelimit_requests)
    assert {("allowed", "default"): 2, ("allowed", "route"): 2, ("refused", "route"): 2} == read(
        counted.ratelimit_policy
    )


async def test_no_label_grows_with_the_traffic(counted: Telemetry) -> None:
    """Hostile identities, dynamic limits and a limiter's own names leave no trace in any label."""
    hostile = ['"} evil 1', "sk-secret", "\n# HELP", "10.9.8.7"]

    def plan(conn: HTTPConnection) -> str:
        return f"{len(conn.headers['x-api-key'])}/minute; 5/{len(conn.headers['x-api-key']) + 60} seconds"

    manager = RedisManager(Settings(REDIS_URL="memory://"))
    rules = [Rule(plan, name="plan", partition_by=by_header("x-api-key"))]
    app = RateLimitMiddleware(Spy(), rules=rules, redis=manager)
    limiter = RateLimiter(manager)
    for identity in hostile:
        await drive(app, http_scope(headers=[(b"x-api-key", identity.encode())], client=("10.9.8.7", 1)))
        await limiter.consume(identity, name="of-client-4711")
    labels = {
        value
        for family in counted.registry.collect()
        for sample in family.samples
        for name, value in sample.labels.items()
        if name != "le"
    }

    assert {"plan"} == {name for _, name in read(counted.ratelimit_policy)}
    assert not [label for label in labels if any(each.strip() in label for each in [*hostile, "4711"])]


async def test_the_inner_of_two_does_not_count_again(counted: Telemetry) -> None:
    """A middleware within a middleware is the same request."""
    manager = RedisManager(Settings(REDIS_URL="memory://"))
    inner = RateLimitMiddleware(Spy(), rules=[Rule("1/minute", name="inner")], redis=manager)
    app = RateLimitMiddleware(inner, rules=[Rule("9/minute", name="outer")], redis=manager)
    statuses = [(await drive(app, http_scope()))[0]["status"] for _ in range(2)]

    assert [200, 429] == statuses
    assert {("allowed", "memory"): 1, ("refused", "memory"): 1} == read(counted.ratelimit_requests)


async def test_requests_make_history(counted: Telemetry) -> None:
    """Each request ticks, so that the page of an operator has something to show."""
    app = RateLimitMiddleware(Spy(), "1/minute", redis=RedisManager(Settings(REDIS_URL="memory://")))
    for _ in range(3):
        await drive(app, http_scope())

    (sample,) = counted.history(counted._due)
    assert (1, 2, {"default": (1, 2, 0)}) == (sample.allowed, sample.refused, dict(sample.policies))


def test_a_loop_that_ends_before_it_has_told_loses_nothing(counted: Telemetry) -> None:
    """What was noted in a loop that was closed is told in the next one."""
    app = RateLimitMiddleware(Spy(), "9/minute", redis=RedisManager(Settings(REDIS_URL="memory://")))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(drive(app, http_scope()))
    loop.close()
    asyncio.run(drive(app, http_scope()))

    assert {("allowed", "memory"): 2} == read(counted.ratelimit_requests)


def test_loops_of_several_threads_count_exactly(counted: Telemetry) -> None:
    """One engine, four threads with a loop each."""
    app = RateLimitMiddleware(Spy(), "1000000/minute", redis=RedisManager(Settings(REDIS_URL="memory://")))

    async def requests() -> None:
        for _ in range(500):
            await drive(app, http_scope())

    threads = [threading.Thread(target=lambda: asyncio.run(requests())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {("allowed", "memory"): 2000} == read(counted.ratelimit_requests)
