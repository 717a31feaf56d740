"""Budgets in tokens: estimated before the answer, settled after it, whatever becomes of it."""

import asyncio
import gc
import gzip
import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi import Depends, FastAPI, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redis_asgi import (
    RateLimit,
    RateLimitMiddleware,
    RedisManager,
    Rule,
    Settings,
    by_header,
    by_json,
    client_ip,
    tokens,
)
from redis_asgi.ratelimit.limits.charge import Charge, Charges
from redis_asgi.testing import RateLimitClock

from ..conftest import StartServer
from ..kit.logs import event_of
from .harness import client_of, drive, header, http_scope, websocket_scope

pytestmark = pytest.mark.anyio
_counter = itertools.count()
ESTIMATE, READ = 500, 10
ASK = json.dumps({"prompt": "x" * (4 * READ)}).encode()
JSON = [(b"content-type", b"application/json")]
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


@pytest.fixture(params=["memory", "redis"])
def settings(request: pytest.FixtureRequest) -> Settings:
    """Counters of this test's own, in either store."""
    url = "memory://" if request.param == "memory" else request.getfixturevalue("redis_url")
    return Settings(REDIS_URL=url, REDIS_KEY_PREFIX=f"t{next(_counter)}:", RATE_LIMIT_TIMEOUT=5)


@dataclass
class Ending:
    """How an answer goes: its messages, whether the app raises behind them, and what that costs.

    Attributes:
        used: What the app says that it used.
        leaves: Whether the client is gone after the messages, so that sending fails.
    """

    messages: Sequence[Message]
    cost: int
    raises: bool = False
    leaves: bool = False
    used: int | None = None


def answer(*chunks: bytes, status: int = 200, headers: Any = JSON, whole: bool = True) -> list[Message]:
    """An answer in these chunks, or the beginning of one."""
    start: Message = {"type": "http.response.start", "status": status, "headers": list(headers)}
    last = {"type": "http.response.body", "body": b"", "more_body": False}
    bodies: list[Message] = [{"type": "http.response.body", "body": chunk, "more_body": True} for chunk in chunks]
    return [start, *bodies, *([last] if whole else [])]


def event(value: Any) -> bytes:
    """An event of a stream."""
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def usage(read: int, written: int) -> dict[str, Any]:
    """As OpenAI says it."""
    return {"usage": {"prompt_tokens": read, "completion_tokens": written}}


def endings(rng: random.Random) -> Ending:  # noqa: C901 - one way after the other
    """One way of ending."""
    read, written = rng.choice([0, 1, 40, 700]), rng.choice([0, 3, 90, 2000])
    told = usage(read, written)
    texts = [event({"choices": [{"delta": {"content": "y" * rng.randrange(30)}}]}) for _ in range(rng.randrange(6))]
    sizes = [len(text) for text in texts]
    guess = math.ceil(READ + max(len(sizes), (sum(sizes) - len(sizes) * min(sizes, default=0)) / 4))
    kind = rng.randrange(15)
    if kind == 0:
        return Ending(answer(json.dumps(told).encode()), read + written)
    if kind == 1:
        document = json.dumps({"a": {"usage": {"prompt_tokens": 9}}, **told}).encode()
        return Ending(answer(*(document[i : i + 3] for i in range(0, len(document), 3))), read + written)
    if kind == 2:
        return Ending(answer(*texts, event(told), event(b"[DONE]"), headers=STREAM), read + written)
    if kind == 3:  # in every frame, cumulative
        frames = [event({"choices": [{}], **usage(read, n)}) for n in range(0, written + 1, max(1, written // 3))]
        return Ending(answer(*frames, event(told), headers=STREAM), read + written)
    if kind == 4:  # and with line ends of another kind, cut anywhere
        stream = b"".join([*texts, event(told)]).replace(b"\n", b"\r\n")
        return Ending(answer(*(stream[i : i + 7] for i in range(0, len(stream), 7)), headers=STREAM), read + written)
    if kind == 5:
        return Ending(answer(b'{"no": "usage"}'), ESTIMATE)
    if kind == 6:
        return Ending(answer(*texts, headers=STREAM), ESTIMATE)
    if kind == 7:
        return Ending(answer(b'{"error": "no"}', status=rng.choice([400, 404, 429, 500])), 0)
    if kind == 8:
        return Ending([], 0, raises=True)
    if kind == 9:
        return Ending(answer(*texts, headers=STREAM, whole=False), min(ESTIMATE, guess), raises=rng.random() < 0.5)
    if kind == 10:
        return Ending(answer(*texts, headers=STREAM, whole=False), min(ESTIMATE, guess), leaves=True)
    if kind == 11:
        return Ending(answer(b"{}"), read + written, used=read + written)
    if kind == 12:
        packed = gzip.compress(json.dumps(told).encode())
        return Ending(answer(packed, headers=[*JSON, (b"content-encoding", b"gzip")]), read + written)
    if kind == 13:
        hidden = {"choices": [{"tool": json.dumps(usage(1, 1)), "input": usage(1, 2)}]}
        return Ending(answer(json.dumps({**hidden, **told}).encode()), read + written)
    large = {"type": "response.completed", "response": {"tools": ["z" * 300_000], "usage": _responses(read, written)}}
    return Ending(answer(event({"type": "response.created"}), event(large), headers=STREAM), read + written)


def _responses(read: int, written: int) -> dict[str, int]:
    return {"input_tokens": read, "output_tokens": written}


class Boom(Exception):
    """Raised by an app."""


async def request(app: ASGIApp, ending: Ending, *, key: str = "k", body: bytes = ASK, **changes: Any) -> list[Message]:
    """A request that ends so; what its client got."""
    sent: list[Message] = []
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message.get("body") == b"never":
            raise OSError("gone")
        sent.append(message)

    scope = http_scope(method="POST", ending=ending, **{"headers": [(b"x-key", key.encode())], **changes})
    try:
        await app(scope, receive, send)
    except (Boom, OSError):
        assert ending.raises or ending.leaves
    return sent


async def playing(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that ends each request as its scope says, once its ``gate`` is open."""
    await receive()
    ending: Ending = scope["ending"]
    if "gate" in scope:
        scope["arrived"].set()
        await scope["gate"].wait()
    if ending.used is not None:
        scope["state"]["rate_limit"].used(ending.used)
    for message in ending.messages:
        await send(message)
    if ending.leaves:
        await send({"type": "http.response.body", "body": b"never", "more_body": True})
    if ending.raises:
        raise Boom


async def remaining(app: RateLimitMiddleware, *, key: str = "k", name: str = "tokens") -> int:
    """What *key* has left under a rule, when all that was settled so far has been."""
    rule = next(rule for rule in app._rules if rule.name == name)
    assert rule.policies is not None
    charges = Charges((Charge(rule.policies, rule.partition.of(key), 1),))
    return (await app._engine.decide(charges, "peek")).decision.policies[0].remaining


def limited(
    settings: Settings, limits: str = "1000000/hour", app: ASGIApp = playing, **rule: Any
) -> RateLimitMiddleware:
    """A budget of each key's own."""
    rule = {"name": "tokens", "partition_by": by_header("x-key"), "cost": tokens(ESTIMATE), **rule}
    return RateLimitMiddleware(app, rules=[Rule(limits, **rule)], settings=settings)


@pytest.mark.parametrize("strategy", ["fixed-window", "sliding-window-counter"])
@pytest.mark.parametrize("rounds", [2, pytest.param(100, marks=pytest.mark.slow)])
async def test_what_is_charged_is_what_was_used_whatever_the_ending(
    settings: Settings, strategy: Any, rounds: int
) -> None:
    """Many requests at once end in every way, and the counter is the sum of what each has cost."""
    rng = random.Random(rounds)
    app = limited(settings, "100000000/hour", strategy=strategy)
    cost = 0
    for _ in range(rounds):
        all_of_them = [endings(rng) for _ in range(100)]
        await asyncio.gather(*(request(app, ending) for ending in all_of_them))
        cost += sum(ending.cost for ending in all_of_them)

    assert 100_000_000 - cost == await remaining(app)
    assert {} == app._engine.in_flight._held


class Oracle:
    """A fixed window as one would write it down."""

    def __init__(self, quota: int, window: int) -> None:
        self._quota, self._window = quota, window
        self._opened: float | None = None
        self._used = 0

    def take(self, units: int, now: float) -> float | None:
        """Charge *units*; when the window opened that they were taken from, ``None`` when they are refused."""
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
    settings: Settings, rate_limit_clock: RateLimitClock, steps: int
) -> None:
    """What was taken too much goes back to its own window or nowhere; a surplus counts when it is known."""
    rng = random.Random(steps)
    quota, window = 20 * ESTIMATE, 60
    app = limited(settings, f"{quota}/minute")
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


async def test_first_request_of_a_small_plan_is_admitted_whatever_it_asks_for(settings: Settings) -> None:
    """Also when little of the budget is used: the output alone is taken for a quarter of it at most."""
    app = limited(settings, "1000/hour", cost=tokens())
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
async def test_hostile_requests_cost_something_and_are_no_errors(settings: Settings, body: bytes) -> None:
    """At least a unit and at most the quota, and what they used in the end."""
    app = limited(settings, "1000/hour", cost=tokens())
    sent = await request(app, Ending(answer(b"{}"), 0), body=body)

    assert 200 == sent[0]["status"]
    assert 0 <= await remaining(app) < 1000


async def test_body_that_nobody_can_read_costs_by_its_length(settings: Settings) -> None:
    """A quarter of a token for each byte, at most a quarter of the quota; what was used decides in the end."""
    app = limited(settings, "1000/hour", cost=tokens())
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


async def test_requests_without_a_body_are_not_covered(settings: Settings) -> None:
    """No model is asked by a GET, an empty POST or a handshake."""
    app = limited(settings)
    scopes = [http_scope(), http_scope(method="POST"), http_scope(method="POST", headers=[(b"content-length", b"0")])]
    for scope in scopes:
        sent = await drive(app, {**scope, "ending": Ending(answer(b"{}"), 0)})
        assert header(sent[0], b"ratelimit") is None

    async def accepting(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept", "headers": []})

    sent = await drive(limited(settings, app=accepting), websocket_scope())
    assert header(sent[0], b"ratelimit") is None


async def test_requests_leave_nothing_to_the_collector() -> None:
    """What is settled after an answer is gone with its request; one cycle in each would be thousands of objects."""
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


@pytest.mark.parametrize("status", [204, 304])
async def test_answer_without_a_body_keeps_the_estimate(settings: Settings, status: int) -> None:
    """It is complete, and says nothing."""
    app = limited(settings)
    await request(app, Ending(answer(status=status), ESTIMATE))

    assert 1_000_000 - ESTIMATE == await remaining(app)


async def test_file_that_the_server_sends_keeps_the_estimate(settings: Settings) -> None:
    """A path in place of a body is a complete answer."""
    app = limited(settings)
    await request(app, Ending([*answer(whole=False), {"type": "http.response.pathsend", "path": "/x"}], ESTIMATE))

    assert 1_000_000 - ESTIMATE == await remaining(app)


@pytest.mark.parametrize("seed", range(5))
async def test_streams_are_untouched(settings: Settings, seed: int) -> None:
    """Every message of an answer passes as it is and when it is, but for the fields at its start."""
    rng = random.Random(seed)
    for ending in [endings(rng) for _ in range(20)]:
        with_budget = await request(limited(settings), ending)
        without = await request(RateLimitMiddleware(playing, "900/hour", settings=settings), _silent(ending))

        assert without[1:] == with_budget[1:]
        assert all(one["body"] is other["body"] for one, other in zip(without[1:], with_budget[1:], strict=True))
        assert [] == [each for each in ending.messages[:1] if each["status"] != with_budget[0]["status"]]


def _silent(ending: Ending) -> Ending:
    return Ending(ending.messages, 0, raises=ending.raises, leaves=ending.leaves)


@pytest.mark.parametrize("kind", [memoryview, bytearray])
@pytest.mark.parametrize("content_type", ["text/event-stream", "application/x-ndjson", "application/json", "text/x"])
async def test_chunks_of_any_kind_are_read(settings: Settings, kind: Any, content_type: str) -> None:
    """Starlette passes a ``memoryview`` on as it is, and servers take it."""
    line = json.dumps(usage(7, 8))
    whole = f"data: {line}\n\n" if content_type == "text/event-stream" else f"{line}\n"
    ending = Ending(answer(*[kind(whole[i : i + 9].encode()) for i in range(0, len(whole), 9)]), 0)
    ending.messages[0]["headers"] = [(b"content-type", content_type.encode())]
    app = limited(settings)
    await request(app, ending)

    assert 1_000_000 - (15 if content_type != "text/x" else ESTIMATE) == await remaining(app)


@pytest.mark.parametrize("status", [200, 302])
async def test_headers_that_can_be_read_once_reach_the_client(settings: Settings, status: int) -> None:
    """ASGI wants an iterable, of which a list is one."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        start, *bodies = answer(json.dumps(usage(7, 8)).encode())
        await send({**start, "status": status, "headers": iter([(b"x-own", b"1"), *start["headers"]])})
        for each in bodies:
            await send(each)

    costs: list[Any] = [1, tokens()]
    for name, cost in zip(("requests", "tokens"), costs, strict=True):
        limiting = RateLimitMiddleware(app, rules=[Rule("9000/hour", name=name, cost=cost)], settings=settings)
        asked = {"type": "http.request", "body": ASK}
        start = [(await drive(limiting, http_scope(method="POST"), asked))[0] for _ in range(2)][-1]
        start["headers"] = [*start["headers"]]
        assert (b"1", JSON[0][1]) == (header(start, b"x-own"), header(start, b"content-type"))
    if status == 200:
        # What the first has used, and the estimate of the second.
        assert b"r=%d;" % (9000 - 15 - (READ + 1000)) in (header(start, b"ratelimit") or b"")


async def test_each_chunk_passes_before_it_is_looked_at(settings: Settings) -> None:
    """Nothing is held back: the client has each message before the app goes on."""
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for n, message in enumerate(answer(event({"a": 1}), event(usage(1, 2)), headers=STREAM)):
            await send(message)
            assert n + 1 == len(sent)

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": ASK, "more_body": False}

    await limited(settings, app=app)(http_scope(method="POST"), receive, send)


async def test_the_app_is_believed_rather_than_the_answer(settings: Settings) -> None:
    """The last that it said, of a policy or of all; it may be more than the answer says, less, or nothing."""
    told = answer(json.dumps(usage(300, 300)).encode())
    for used, left in ((5, 995), (0, 995), (600, 395)):
        app = limited(settings, "1000/hour; 100000/day")
        await request(app, Ending(told, 0, used=used))
        assert left == await remaining(app)


async def test_what_was_used_of_one_policy(settings: Settings) -> None:
    """A rule's name stands for all its policies; what counts no tokens is an error, and so is what is no number."""
    said: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        limit = scope["state"]["rate_limit"]
        limit.used(7)
        limit.used(20, "tokens-3600s")
        for wrong in ((-1,), (True,), (1.5,), ("7",), (7, "requests"), (7, "nobody")):
            with pytest.raises(ValueError, match=r"whole number|does not count"):
                limit.used(*wrong)
        await playing(scope, receive, send)
        with pytest.raises(RuntimeError, match="before its last byte"):
            limit.used(7)
        said.append(limit)

    rules = [
        Rule("1000/hour; 5000/day", name="tokens", partition_by=by_header("x-key"), cost=tokens(ESTIMATE)),
        Rule("100/hour", name="requests", partition_by=by_header("x-key")),
    ]
    limited_app = RateLimitMiddleware(app, rules=rules, settings=settings)
    await request(limited_app, Ending(answer(b"{}"), 0))
    charges = Charges(
        Charge(rule.policies, rule.partition.of("k"), 1) for rule in limited_app._rules if rule.policies is not None
    )
    states = (await limited_app._engine.decide(charges, "peek")).decision.policies

    assert {"tokens-3600s": 980, "tokens-86400s": 4993, "requests": 99} == {s.name: s.remaining for s in states}
    assert said


async def test_app_may_say_what_was_used_where_nothing_counts_tokens(settings: Settings) -> None:
    """Under a rule that does not apply this time it is no error, unless it names the policy."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["rate_limit"].used(7)
        with pytest.raises(ValueError, match="No rule"):
            scope["state"]["rate_limit"].used(7, "tokens")
        await playing(scope, receive, send)

    limited_app = RateLimitMiddleware(app, "100/hour", settings=settings)
    assert 200 == (await request(limited_app, Ending(answer(b"{}"), 0)))[0]["status"]


async def test_charges_of_the_app_come_on_top(settings: Settings) -> None:
    """``charge`` adds to what was used."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["rate_limit"].charge(25)
        await playing(scope, receive, send)

    limited_app = limited(settings, app=app)
    await request(limited_app, Ending(answer(json.dumps(usage(1, 4)).encode()), 0))
    assert 1_000_000 - 30 == await remaining(limited_app)


async def test_shadow_budget_watches(settings: Settings) -> None:
    """It is settled as any other, and refuses nobody."""
    app = limited(settings, "1200/hour", shadow=True)
    told = Ending(answer(json.dumps(usage(300, 300)).encode()), 600)
    statuses = [(await request(app, told))[0]["status"] for _ in range(4)]

    assert [200] * 4 == statuses
    assert 0 == await remaining(app)


async def test_dry_run_settles(settings: Settings) -> None:
    """Every policy is a shadow then."""
    app = limited(settings.model_copy(update={"RATE_LIMIT_DRY_RUN": True}))
    await request(app, Ending(answer(json.dumps(usage(1, 4)).encode()), 0))

    assert 1_000_000 - 5 == await remaining(app)


async def test_known_refusal_reads_no_body(redis_url: str) -> None:
    """Of a key whose budget is spent nothing is read, and the refusal says what requests in flight hold."""
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


async def test_estimates_learn_from_answers_of_their_bucket(settings: Settings) -> None:
    """Once 20 answers are known, a model is taken to write what nine of ten did, others what they ask for."""
    model = by_json("model", ["small", "large"])
    app = limited(settings, "100000/hour", partition_by=[by_header("x-key"), model], cost=tokens())

    async def first_left(name: str, key: str) -> Any:
        asks = json.dumps({"model": name, "max_tokens": 9000}).encode()
        sent = await request(app, Ending(answer(json.dumps(usage(2, 50)).encode()), 0), body=asks, key=key)
        return header(sent[0], b"ratelimit")

    for n in range(20):
        await first_left("small", f"k{n}")

    assert b'"tokens";r=99948;t=3600' == await first_left("small", "new")
    assert b'"tokens";r=90998;t=3600' == await first_left("large", "new")


async def test_estimate_of_the_user(settings: Settings) -> None:
    """A callable is given the request and may read it; weights are not applied to what it says."""

    async def estimated(request: Request) -> int:
        return len((await request.json())["prompt"])

    app = limited(settings, cost=tokens(estimated, weights={"output": 4}))
    sent = await request(app, Ending(answer(json.dumps(usage(2, 50)).encode()), 0))

    assert b'"tokens";r=999960;t=3600' == header(sent[0], b"ratelimit")
    assert 1_000_000 - 202 == await remaining(app)


@pytest.mark.parametrize("said", ["5", 5.5, None, -1, True])
async def test_estimate_that_is_no_number_is_called_one(settings: Settings, said: Any) -> None:
    """The error names the argument that it is about."""
    with pytest.raises(ValueError, match=rf"^estimate={said!r} is not a whole number of units"):
        await request(limited(settings, cost=tokens(lambda request: said)), Ending(answer(b"{}"), 0))


async def test_compression_inside_is_told_once(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """What nobody here can read keeps its estimate."""
    app = limited(settings)
    brotli = Ending(answer(b"\x0b", headers=[*JSON, (b"content-encoding", b"br")]), 0)
    for _ in range(2):
        await request(app, brotli)

    assert 1_000_000 - 2 * ESTIMATE == await remaining(app)
    assert ["redis_asgi.usage_unreadable"] == [event_of(record) for record in caplog.records]


async def test_stacked_instances_settle_once(settings: Settings) -> None:
    """Of an inner one's own budget the outer one settles too."""
    manager = RedisManager(settings)
    told = Ending(answer(json.dumps(usage(1, 4)).encode()), 5)
    both = Rule("1000/hour", name="tokens", partition_by=by_header("x-key"), cost=tokens(ESTIMATE))
    own = Rule("1000/hour", name="own", partition_by=by_header("x-key"), cost=tokens(ESTIMATE))
    inner = RateLimitMiddleware(playing, rules=[both, own], redis=manager, settings=settings)
    outer = RateLimitMiddleware(inner, rules=[both], redis=manager, settings=settings)
    await request(outer, told)

    assert 995 == await remaining(outer)
    assert 995 == await remaining(inner, name="own")


async def test_budget_of_a_route(settings: Settings) -> None:
    """Behind a middleware its answers are read; without one it is charged what the app says, or the estimate."""
    limit = RateLimit("1000/hour", name="tokens", cost=tokens(ESTIMATE), partition_by=client_ip, settings=settings)
    app = FastAPI()

    @app.post("/", dependencies=[Depends(limit)])
    async def chat(request: Request, content: dict[str, Any]) -> Any:
        if "used" in content:
            request.state.rate_limit.used(content["used"])
        return usage(1, 4)

    manager = RedisManager(settings)
    around = RateLimitMiddleware(app, "100/hour", redis=manager, settings=settings)
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
    """Redis that dies between answer and settlement loses no charge; what was to come back is lost with it."""
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


async def test_cancelled_request_is_settled(settings: Settings) -> None:
    """A server that cancels before the answer gives all back; in its middle, what was sent is charged."""
    for begun, cost in ((False, 0), (True, READ + 1)):
        started = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send, begun: bool = begun, started: Any = started) -> None:
            if begun:
                for message in answer(event({"a": 1}), headers=STREAM, whole=False):
                    await send(message)
            started.set()
            await asyncio.Event().wait()

        limited_app = limited(settings, app=app)
        task = asyncio.ensure_future(request(limited_app, Ending([], 0), key=f"k{begun}"))
        await started.wait()
        task.cancel()
        await asyncio.wait({task})

        assert 1_000_000 - cost == await remaining(limited_app, key=f"k{begun}")
        assert {} == limited_app._engine.in_flight._held
