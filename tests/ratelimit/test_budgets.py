"""Budgets in tokens: what is charged is what was used, whatever the ending."""

import asyncio
import gc
import json
import random
from typing import Any

import pytest
import redis
from fastapi import Depends, FastAPI, Request
from starlette.types import Message, Receive, Scope, Send

from redis_asgi import (
    RateLimit,
    RateLimiter,
    RateLimitMiddleware,
    RedisManager,
    Rule,
    Settings,
    by_header,
    by_json,
    client_ip,
    tokens,
)
from redis_asgi.testing import RateLimitClock

from ..conftest import StartServer
from ..kit.inside import engine_of, manager_of
from ..kit.logs import event_of
from .concurrency import members
from .harness import client_of, drive, header, http_scope, websocket_scope
from .routers import started
from .spending import (
    ESTIMATE,
    JSON,
    READ,
    STREAM,
    Ending,
    answer,
    endings,
    event,
    limited,
    playing,
    remaining,
    request,
    usage,
)

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("strategy", ["fixed-window", "sliding-window-counter"])
@pytest.mark.parametrize("rounds", [2, pytest.param(100, marks=pytest.mark.slow)])
async def test_what_is_charged_is_what_was_used_whatever_the_ending(
    any_settings: Settings, strategy: Any, rounds: int
) -> None:
    """Many requests at once end in every way, and the counter is the sum of what each has cost."""
    rng = random.Random(rounds)
    app = limited(any_settings, "100000000/hour", strategy=strategy)
    cost = 0
    for _ in range(rounds):
        all_of_them = [endings(rng) for _ in range(100)]
        await asyncio.gather(*(request(app, ending) for ending in all_of_them))
        cost += sum(ending.cost for ending in all_of_them)

    assert 100_000_000 - cost == await remaining(app)
    assert {} == engine_of(app).in_flight._held


class Oracle:
    """A fixed window as one would write it down."""

    def __init__(self, quota: int, window: int) -> None:
        self._quota, self._window = quota, window
        self._opened: float | None = None
        self._used = 0

    def take(self, units: int, now: float) -> float | None:
        """Charge *units*; when the window opened that they were taken from,
        ``None`` when they are refused.
        """
        if self.left(now) < units:
            return None
        self.charge(units, now)
        return self._opened

    def charge(self, units: int, now: float) -> None:
        """Charge *units* whatever is left."""
        if self._is_over(now):
            self._opened, self._used = now, 0
        self._used = min(self._used + units, 10 * self._quota)

    def settle(self, difference: int, opened: float, now: float) -> None:
        """What a request has used more, now, or less, of the window that it was taken from."""
        if difference > 0:
            self.charge(difference, now)
        elif not self._is_over(now) and opened == self._opened:
            self._used += difference

    def left(self, now: float) -> int:
        """What remains."""
        return self._quota if self._is_over(now) else max(0, self._quota - self._used)

    def _is_over(self, now: float) -> bool:
        return self._opened is None or now >= self._opened + self._window


@pytest.mark.parametrize("steps", [200, pytest.param(5000, marks=pytest.mark.slow)])
async def test_ledger_equals_an_oracle_through_many_windows(
    any_settings: Settings, rate_limit_clock: RateLimitClock, steps: int
) -> None:
    """What was taken too much goes back to its own window or nowhere;
    a surplus counts when it is known.
    """
    rng = random.Random(steps)
    quota, window = 20 * ESTIMATE, 60
    app = limited(any_settings, f"{quota}/minute")
    oracle = Oracle(quota, window)
    running: list[tuple[asyncio.Task[Any], asyncio.Event, Ending, float]] = []
    admitted = refused = 0
    for _ in range(steps):
        action = rng.random()
        if action < 0.5:
            gate, arrived = asyncio.Event(), asyncio.Event()
            ending = endings(rng)
            task = asyncio.ensure_future(request(app, ending, gate=gate, arrived=arrived))
            arriving = asyncio.ensure_future(arrived.wait())
            await asyncio.wait({task, arriving}, return_when="FIRST_COMPLETED")
            opened = oracle.take(ESTIMATE, rate_limit_clock.now)
            assert (opened is not None) == arrived.is_set()
            arriving.cancel()
            if opened is None:
                assert 429 == (await task)[0]["status"]
                refused += 1
            else:
                admitted += 1
                running.append((task, gate, ending, opened))
        elif action < 0.8 and running:
            task, gate, ending, opened = running.pop(rng.randrange(len(running)))
            gate.set()
            await task
            oracle.settle(ending.cost - ESTIMATE, opened, rate_limit_clock.now)
            assert oracle.left(rate_limit_clock.now) == await remaining(app)
        else:
            rate_limit_clock.advance(rng.choice([0.5, 3, 3, 20, 59]))
            assert oracle.left(rate_limit_clock.now) == await remaining(app)
    for task, gate, *_ in running:
        gate.set()
        await task

    assert min(admitted, refused) > steps // 100


async def test_first_request_of_a_small_plan_is_admitted_whatever_it_asks_for(any_settings: Settings) -> None:
    """Also when little of the budget is used:
    the output alone is taken for a quarter of it at most.
    """
    app = limited(any_settings, "1000/hour", cost=tokens())
    asks = json.dumps({"prompt": "hi", "max_tokens": 10**9, "n": 10**9}).encode()
    told = Ending(answer(json.dumps(usage(1, 9)).encode()), 10)

    for left in (990, 980, 970):
        assert 200 == (await request(app, told, body=asks))[0]["status"]
        assert left == await remaining(app)


@pytest.mark.parametrize(
    "body",
    [b"[" * 5000, b'{"prompt": 1e400}', b"\xff", b"not json", b'{"max_tokens": -5, "prompt": [1, 2.5, "3", null]}',
     b'{"max_tokens": ["a"], "n": {}}', b'{"max_tokens": "100", "n": 1e300}', b"[[1, 2], [3]]", b"5"],
    ids=range(9),
)  # fmt: skip
async def test_hostile_requests_cost_something_and_are_no_errors(any_settings: Settings, body: bytes) -> None:
    """At least a unit and at most the quota, and what they used in the end."""
    app = limited(any_settings, "1000/hour", cost=tokens())
    sent = await request(app, Ending(answer(b"{}"), 0), body=body)

    assert 200 == sent[0]["status"]
    assert 0 <= await remaining(app) < 1000


async def test_body_that_nobody_can_read_costs_by_its_length(any_settings: Settings) -> None:
    """A quarter of a token for each byte, at most a quarter of the quota;
    what was used decides in the end.
    """
    app = limited(any_settings, "1000/hour", cost=tokens())
    length = [(b"content-length", b"400"), (b"x-key", b"k")]
    sent = await request(app, Ending(answer(b"{}"), 0), body=b"x" * 400, headers=length)
    assert b'"tokens";r=900;t=3600' == header(sent[0], b"ratelimit")

    sent = await request(app, Ending(answer(json.dumps(usage(1, 1)).encode()), 0), body=b"x" * 40_000)
    assert b'"tokens";r=650;t=3600' == header(sent[0], b"ratelimit")
    assert 898 == await remaining(app)


async def test_spent_budget_refuses_no_request_without_a_body(redis_url: str) -> None:
    """It is not covered, whatever is remembered of its key."""
    app = limited(Settings(REDIS_URL=redis_url, RATE_LIMIT_TIMEOUT=5), "500/hour")
    told = Ending(answer(json.dumps(usage(0, 500)).encode()), 500)
    empty = [(b"x-key", b"k"), (b"content-length", b"0")]
    statuses = [(await request(app, told))[0]["status"] for _ in range(3)]

    assert [200, 429, 429] == statuses
    assert 200 == (await request(app, Ending(answer(b"{}"), 0), body=b"", headers=empty))[0]["status"]


async def test_requests_without_a_body_are_not_covered(any_settings: Settings) -> None:
    """No model is asked by a GET, an empty POST or a handshake."""
    app = limited(any_settings)
    scopes = [http_scope(), http_scope(method="POST"), http_scope(method="POST", headers=[(b"content-length", b"0")])]
    for scope in scopes:
        sent = await drive(app, {**scope, "ending": Ending(answer(b"{}"), 0)})
        assert header(sent[0], b"ratelimit") is None

    async def accepting(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept", "headers": []})

    sent = await drive(limited(any_settings, app=accepting), websocket_scope())
    assert header(sent[0], b"ratelimit") is None


async def test_requests_leave_nothing_to_the_collector() -> None:
    """What is settled after an answer is gone with its request;
    one cycle in each would be thousands of objects.
    """
    app = limited(Settings(REDIS_URL="memory://"))
    told = answer(json.dumps(usage(300, 300)).encode())
    for _ in range(5):
        await request(app, Ending(told, 600))
    gc.collect()
    gc.disable()
    try:
        for _ in range(300):
            await request(app, Ending(told, 600))

        assert gc.collect() < 300
    finally:
        gc.enable()


async def test_charges_of_the_app_come_on_top(any_settings: Settings) -> None:
    """``charge`` adds to what was used."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["rate_limit"].charge(25)
        await playing(scope, receive, send)

    limited_app = limited(any_settings, app=app)
    await request(limited_app, Ending(answer(json.dumps(usage(1, 4)).encode()), 0))
    assert 1_000_000 - 30 == await remaining(limited_app)


async def test_shadow_budget_watches(any_settings: Settings) -> None:
    """It is settled as any other, and refuses nobody."""
    app = limited(any_settings, "1200/hour", shadow=True)
    told = Ending(answer(json.dumps(usage(300, 300)).encode()), 600)
    statuses = [(await request(app, told))[0]["status"] for _ in range(4)]

    assert [200] * 4 == statuses
    assert 0 == await remaining(app)


async def test_dry_run_settles(any_settings: Settings) -> None:
    """Every policy is a shadow then."""
    app = limited(any_settings.model_copy(update={"RATE_LIMIT_DRY_RUN": True}))
    await request(app, Ending(answer(json.dumps(usage(1, 4)).encode()), 0))

    assert 1_000_000 - 5 == await remaining(app)


async def test_known_refusal_reads_no_body(redis_url: str) -> None:
    """Of a key whose budget is spent nothing is read,
    and the refusal says what requests in flight hold.
    """
    app = limited(Settings(REDIS_URL=redis_url, RATE_LIMIT_TIMEOUT=5), "1000/hour")
    gate, arrived = asyncio.Event(), asyncio.Event()
    told = Ending(answer(json.dumps(usage(0, 500)).encode()), 500)
    running = asyncio.ensure_future(request(app, told, gate=gate, arrived=arrived))
    await arrived.wait()
    await request(app, told)
    refused = await request(app, told)

    async def unread() -> Message:
        raise AssertionError("somebody read the body")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await app(http_scope(method="POST", headers=[(b"x-key", b"k")]), unread, send)
    gate.set()
    await running

    for start, body in (refused, sent):
        assert 429 == start["status"]
        assert "Requests in flight in this process hold 500 of it." in json.loads(body["body"])["detail"]


async def test_estimates_learn_from_answers_of_their_bucket(any_settings: Settings) -> None:
    """Once 20 answers are known, a model is taken to write what nine of ten did, others what they
    ask for.
    """
    model = by_json("model", ["small", "large"])
    app = limited(any_settings, "100000/hour", partition_by=[by_header("x-key"), model], cost=tokens())

    async def first_left(name: str, key: str) -> Any:
        asks = json.dumps({"model": name, "max_tokens": 9000}).encode()
        sent = await request(app, Ending(answer(json.dumps(usage(2, 50)).encode()), 0), body=asks, key=key)
        return header(sent[0], b"ratelimit")

    for n in range(20):
        await first_left("small", f"k{n}")

    assert b'"tokens";r=99948;t=3600' == await first_left("small", "new")
    assert b'"tokens";r=90998;t=3600' == await first_left("large", "new")


async def test_estimate_of_the_user(any_settings: Settings) -> None:
    """A callable is given the request and may read it; weights are not applied to what it says."""

    async def estimated(request: Request) -> int:
        return len((await request.json())["prompt"])

    app = limited(any_settings, cost=tokens(estimated, weights={"output": 4}))
    sent = await request(app, Ending(answer(json.dumps(usage(2, 50)).encode()), 0))

    assert b'"tokens";r=999960;t=3600' == header(sent[0], b"ratelimit")
    assert 1_000_000 - 202 == await remaining(app)


@pytest.mark.parametrize("said", ["5", 5.5, None, -1, True])
async def test_estimate_that_is_no_number_is_called_one(any_settings: Settings, said: Any) -> None:
    """The error names the argument that it is about."""
    with pytest.raises(ValueError, match=rf"^estimate={said!r} is not a whole number of units"):
        await request(limited(any_settings, cost=tokens(lambda request: said)), Ending(answer(b"{}"), 0))


async def test_compression_inside_is_told_once(any_settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """What nobody here can read keeps its estimate."""
    app = limited(any_settings)
    brotli = Ending(answer(b"\x0b", headers=[*JSON, (b"content-encoding", b"br")]), 0)
    for _ in range(2):
        await request(app, brotli)

    assert 1_000_000 - 2 * ESTIMATE == await remaining(app)
    assert ["redis_asgi.usage_unreadable"] == [event_of(record) for record in caplog.records]


async def test_undeclared_answers_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """A model may have written them: they keep their estimate, unless the app says what they used."""
    app = limited(Settings(REDIS_URL="memory://", REDIS_KEY_PREFIX="undeclared"))
    forged = answer(event(usage(0, 0)), headers=[])
    await request(app, Ending(forged, 9, used=9))
    await request(app, Ending(answer(headers=[]), ESTIMATE))  # nothing to read
    await request(app, Ending(answer(b"Found", status=302, headers=[]), ESTIMATE))
    assert [] == [event_of(record) for record in caplog.records]
    for _ in range(2):
        await request(app, Ending(forged, ESTIMATE))

    assert 1_000_000 - 9 - 4 * ESTIMATE == await remaining(app)
    assert ["redis_asgi.usage_undeclared"] == [event_of(record) for record in caplog.records]


async def test_stacked_instances_settle_once(any_settings: Settings) -> None:
    """Of an inner one's own budget the outer one settles too."""
    manager = RedisManager(any_settings)
    told = Ending(answer(json.dumps(usage(1, 4)).encode()), 5)
    both = Rule("1000/hour", name="tokens", partition_by=by_header("x-key"), cost=tokens(ESTIMATE))
    own = Rule("1000/hour", name="own", partition_by=by_header("x-key"), cost=tokens(ESTIMATE))
    inner = RateLimitMiddleware(playing, rules=[both, own], redis=manager, settings=any_settings)
    outer = RateLimitMiddleware(inner, rules=[both], redis=manager, settings=any_settings)
    await request(outer, told)

    assert 995 == await remaining(outer)
    assert 995 == await remaining(inner, name="own")


async def test_budget_of_a_route(any_settings: Settings) -> None:
    """Behind a middleware its answers are read;
    without one it is charged what the app says, or the estimate.
    """
    limit = RateLimit("1000/hour", name="tokens", cost=tokens(ESTIMATE), partition_by=client_ip, settings=any_settings)
    app = FastAPI()

    @app.post("/", dependencies=[Depends(limit)])
    async def chat(request: Request, content: dict[str, Any]) -> Any:
        if "used" in content:
            request.state.rate_limit.used(content["used"])
        return usage(1, 4)

    manager = RedisManager(any_settings)
    around = RateLimitMiddleware(app, "100/hour", redis=manager, settings=any_settings)
    async with client_of(around) as client:
        seen = [(await client.post("/", json={"a": 1})).headers["ratelimit"] for _ in range(2)]
    assert ['"default";r=99;t=3600, "tokens";r=500;t=3600', '"default";r=98;t=3600, "tokens";r=495;t=3600'] == seen

    async with client_of(app, address="203.0.113.8") as client:
        seen = []
        for content in ({"used": 20}, {"used": 30}, {"a": 1}, {"a": 1}):
            seen.append((await client.post("/", json=content)).headers.get("ratelimit"))
            await asyncio.sleep(0.05)
    assert ['"tokens";r=500;t=3600', '"tokens";r=480;t=3600', '"tokens";r=450;t=3600', '"tokens";r=450;t=3600'] == seen


async def test_surplus_of_an_outage_is_charged_in_the_process(private_server: StartServer) -> None:
    """Redis that dies between answer and settlement loses no charge;
    what was to come back is lost with it.
    """
    server = private_server()
    settings = Settings(REDIS_URL=server.url)
    app = limited(settings, "10000/hour")
    gates = [(asyncio.Event(), asyncio.Event()) for _ in range(2)]
    dear, cheap = (Ending(answer(json.dumps(usage(0, used)).encode()), used) for used in (5500, 1))
    running = [
        asyncio.ensure_future(request(app, ending, key=key, gate=gate, arrived=arrived))
        for ending, key, (gate, arrived) in zip((dear, cheap), "ab", gates, strict=True)
    ]
    for _, arrived in gates:
        await arrived.wait()
    server.kill()
    for gate, _ in gates:
        gate.set()
    await asyncio.gather(*running)
    for _ in range(50):
        sent = [await request(app, Ending(answer(b"{}", status=400), 0), key=key) for key in "ab"]
        left = [header(start, b"ratelimit") for start, _ in ([s[0], s[-1]] for s in sent)]
        if b"r=4500" in (left[0] or b""):
            break
        await asyncio.sleep(0.1)

    assert b'"tokens";r=4500;t=3600' == left[0]
    assert b'"tokens";r=9500;t=3600' == left[1]


async def test_cancelled_request_is_settled(any_settings: Settings) -> None:
    """A server that cancels before the answer gives all back;
    in its middle, what was sent is charged.
    """
    for begun, cost in ((False, 0), (True, READ + 1)):
        started = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send, begun: bool = begun, started: Any = started) -> None:
            if begun:
                for message in answer(event({"a": 1}), headers=STREAM, whole=False):
                    await send(message)
            started.set()
            await asyncio.Event().wait()

        limited_app = limited(any_settings, app=app)
        task = asyncio.ensure_future(request(limited_app, Ending([], 0), key=f"k{begun}"))
        await started.wait()
        task.cancel()
        await asyncio.wait({task})

        assert 1_000_000 - cost == await remaining(limited_app, key=f"k{begun}")
        assert {} == engine_of(limited_app).in_flight._held


@pytest.mark.parametrize("strategy", ["fixed-window", "sliding-window-counter"])
async def test_what_was_forgotten_is_given_back_by_nobody(any_settings: Settings, strategy: Any) -> None:
    """A request that was under way at a reset gives back nothing of what later ones are charged."""
    app = limited(any_settings, strategy=strategy)
    arrived, gate = asyncio.Event(), asyncio.Event()
    early = Ending(answer(json.dumps(usage(1, 1)).encode()), 2)
    task = asyncio.ensure_future(request(app, early, arrived=arrived, gate=gate))
    await arrived.wait()
    await RateLimiter(manager_of(app)).reset(app._rules[0].partition.of("k"))
    await request(app, Ending(answer(json.dumps(usage(100, 200)).encode()), 300))
    gate.set()
    await task

    assert 1_000_000 - 300 == await remaining(app)


async def test_what_was_forgotten_is_given_back_in_no_later_window(
    any_settings: Settings, rate_limit_clock: RateLimitClock
) -> None:
    """Nor when later ones were charged in the window before."""
    app = limited(any_settings, "1000000/minute", strategy="sliding-window-counter")
    arrived, gate = asyncio.Event(), asyncio.Event()
    early = Ending(answer(json.dumps(usage(1, 1)).encode()), 2)
    task = asyncio.ensure_future(request(app, early, arrived=arrived, gate=gate))
    await arrived.wait()
    rate_limit_clock.advance(0.001)
    await RateLimiter(manager_of(app)).reset(app._rules[0].partition.of("k"))
    await request(app, Ending(answer(json.dumps(usage(100, 200)).encode()), 300))
    rate_limit_clock.advance(60)
    await request(app, Ending(answer(json.dumps(usage(10, 20)).encode()), 30))
    left = await remaining(app)
    gate.set()
    await task

    assert left == await remaining(app) < 1_000_000 - 30


async def test_what_a_stopping_server_cancels_is_told(redis_url: str, redis_client: redis.Redis) -> None:
    """Redis hears of it before the client is closed, though the lifespan ends in the same turn."""
    begun = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for event_name in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event_name}.complete"})
            return
        for message in answer(event({"a": 1}), headers=STREAM, whole=False):
            await send(message)
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.02)  # it lets go of what it streams from

    settings = Settings(REDIS_URL=redis_url, RATE_LIMIT_TIMEOUT=5.0)
    rules = [
        Rule("1000000/hour", name="tokens", partition_by=by_header("x-key"), cost=tokens(ESTIMATE)),
        Rule(concurrency=1, name="streams"),
    ]
    limited_app = RateLimitMiddleware(app, rules=rules, settings=settings)
    async with started(limited_app):
        task = asyncio.ensure_future(request(limited_app, Ending([], 0)))
        await begun.wait()
        task.cancel()

    assert [] == members(redis_client)
    assert 1_000_000 - READ - 1 == await remaining(RateLimitMiddleware(app, rules=rules, settings=settings))
    await manager_of(limited_app).close()
