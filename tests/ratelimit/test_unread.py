"""What bodies cost that nobody can read: never less than good ones,
and no more than a unit where the app says no.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redis_asgi import RateLimitMiddleware, Rule, Settings
from redis_asgi.ratelimit.limits.policy import STRATEGIES

from ..kit.inside import manager_of
from .harness import all_answered, client_of, drive, header, http_scope, own_prefix, websocket_scope
from .histories import strategy_of

pytestmark = pytest.mark.anyio
stores = pytest.mark.parametrize("store", ["memory", "redis"])
strategies = pytest.mark.parametrize("strategy", STRATEGIES)
Handler = Callable[[Scope, Receive, Send], Awaitable[None]]

GARBAGE: list[Message] = [{"type": "http.request", "body": b'{"input": [', "more_body": False}]
HALF: list[Message] = [{"type": "http.request", "body": b'{"input": [', "more_body": True}]
GOOD: list[Message] = [{"type": "http.request", "body": json.dumps({"input": ["a"] * 5}).encode(), "more_body": False}]
POST = http_scope(method="POST", headers=[(b"content-type", b"application/json")])


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> Settings:
    """Counters of this test's own, in the store that it names."""
    url = request.getfixturevalue("redis_url") if "redis" in request.node.name else "memory://"
    return Settings(REDIS_URL=url, REDIS_KEY_PREFIX=own_prefix(), RATE_LIMIT_TIMEOUT=5)


async def inputs(request: Request) -> int:
    """A unit for each text of a body."""
    return len((await request.json())["input"])


class App:
    """An app that answers with *status* once it is let go, or raises,
    and knows how many requests it had at once.
    """

    def __init__(self, status: int = 400, *, leaves: bool = False) -> None:
        self.status = status
        self.leaves = leaves
        self.calls = self.most = self._now = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            while (message := await receive()).get("more_body"):
                pass
            if message["type"] == "http.disconnect" and self.leaves:
                raise ClientDisconnect
            await self.gate.wait()
            await send({"type": "http.response.start", "status": self.status, "headers": []})
            await send({"type": "http.response.body", "body": b"x"})
        finally:
            self._now -= 1


def limited(
    app: ASGIApp, settings: Settings, strategy: str, limits: str = "100/hour", **more: Any
) -> RateLimitMiddleware:
    """*app* behind a rule that counts texts."""
    rule = Rule(limits, cost=inputs, strategy=strategy_of(strategy), **more)
    return RateLimitMiddleware(app, rules=[rule], settings=settings)


async def remaining(app: ASGIApp) -> int:
    """What a client has left, as a good request of five units finds it,
    those included; 0 if it is refused.
    """
    (start, _) = await drive(app, {**POST}, *GOOD)
    fields = header(start, b"ratelimit") or b""
    return int(fields.partition(b";r=")[2].partition(b";")[0]) + 5 if start["status"] != 429 else 0


async def settled(app: RateLimitMiddleware) -> int:
    """`remaining`, after what responses have changed has been answered."""
    await all_answered(manager_of(app))
    return await remaining(app)


@stores
@strategies
async def test_hundred_garbage_bodies_at_once_are_worth_one(settings: Settings, store: str, strategy: str) -> None:
    """The first holds all that there is until the app has turned it down;
    of good ones twenty would have passed.
    """
    app = App(422)
    app.gate.clear()
    protected = limited(app, settings, strategy)
    asked = [asyncio.create_task(drive(protected, {**POST}, *GARBAGE)) for _ in range(100)]
    while app.calls + sum(task.done() for task in asked) < 100:
        await asyncio.sleep(0.01)
    assert (1, 1) == (app.calls, app.most)

    app.gate.set()
    statuses = sorted(sent[0]["status"] for sent in await asyncio.gather(*asked))

    assert [422] + [429] * 99 == statuses
    app.status = 200
    assert 99 == await settled(protected)


@stores
@strategies
@pytest.mark.parametrize("leaves", [False, True], ids=["the app answers 400", "the app raises"])
async def test_clients_that_leave_are_worth_no_more_than_one(
    settings: Settings, store: str, strategy: str, leaves: bool
) -> None:
    """A hundred that send half a body and go:
    whatever the app makes of that, the first one's hold stays.
    """
    app = App(400, leaves=leaves)
    protected = limited(app, settings, strategy)
    for _ in range(100):
        try:
            await drive(protected, {**POST}, *HALF)
        except ClientDisconnect:
            assert leaves
        await asyncio.sleep(0)

    assert 1 == app.calls
    assert 0 == await settled(protected)


@strategies
async def test_client_that_leaves_while_the_app_works_keeps_the_hold(settings: Settings, strategy: str) -> None:
    """The garbage is whole, and its client gone before the answer:
    the app that saw it go may answer what it likes.
    """

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    protected = limited(slow, settings, strategy)
    await drive(protected, {**POST}, *GARBAGE)

    assert 0 == await settled(protected)


@stores
@strategies
async def test_garbage_in_turn_costs_one_each_where_the_app_turns_it_down(
    settings: Settings, store: str, strategy: str
) -> None:
    """A typo locks nobody out: one unit a time, and the answer's fields say so at once."""
    app = App(400)
    protected = limited(app, settings, strategy)
    told = []
    for _ in range(3):
        (start, _) = await drive(protected, {**POST}, *GARBAGE)
        told.append(header(start, b"ratelimit"))
        await all_answered(manager_of(protected))

    assert [b"r=99", b"r=98", b"r=97"] == [(field or b"").split(b";")[1] for field in told]
    app.status = 200
    assert 97 == await settled(protected)


@strategies
@pytest.mark.parametrize(("status", "left"), [(200, 0), (299, 0), (302, 99), (404, 99), (499, 99), (500, 0), (503, 0)])
async def test_only_an_answer_that_turns_it_down_gives_back(
    settings: Settings, strategy: str, status: int, left: int
) -> None:
    """3xx and 4xx give back all but one unit;
    what the app did something for, or broke on, keeps it.
    """
    app = App(status)
    protected = limited(app, settings, strategy)
    await drive(protected, {**POST}, *GARBAGE)
    app.status = 200

    assert left == await settled(protected)


@strategies
async def test_exception_keeps_the_hold(settings: Settings, strategy: str) -> None:
    """What no handler of the app turned into an answer is a 500."""

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise LookupError

    protected = limited(broken, settings, strategy)
    with pytest.raises(LookupError):
        await drive(protected, {**POST}, *GARBAGE)

    (start, _) = await drive(protected, {**POST}, *GARBAGE)
    assert 429 == start["status"]


@strategies
async def test_server_that_cannot_send_the_answer_keeps_the_hold(settings: Settings, strategy: str) -> None:
    """The client was gone when the 400 went out."""
    protected = limited(App(400), settings, strategy)
    messages = iter(GARBAGE)

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        raise OSError

    with pytest.raises(OSError):
        await protected({**POST}, receive, send)

    assert 0 == await settled(protected)


@strategies
async def test_whatever_remains_admits_it(settings: Settings, strategy: str) -> None:
    """After nineteen good ones of five, a typo finds five units,
    then one less each time, until none is left.
    """
    app = App(200)
    protected = limited(app, settings, strategy)
    for _ in range(19):
        await drive(protected, {**POST}, *GOOD)
    app.status = 400
    statuses = []
    for _ in range(7):
        (start, _) = await drive(protected, {**POST}, *GARBAGE)
        statuses.append(start["status"])
        await asyncio.sleep(0)

    assert [400] * 5 + [429] * 2 == statuses


async def test_least_of_several_limits_is_held_under_each(settings: Settings) -> None:
    """Five a second and a hundred an hour: five are held under both, and four given back to both."""
    app = App(400)
    app.gate.clear()
    protected = limited(app, settings, "fixed-window", "5/day; 100/hour")
    asked = asyncio.create_task(drive(protected, {**POST}, *GARBAGE))
    while not app.calls:
        await asyncio.sleep(0)
    app.gate.set()
    (start, _) = await asked

    assert b'"default-86400s";r=4;t=86400, "default-3600s";r=99;t=3600' == header(start, b"ratelimit")


async def test_shadow_has_no_say_in_what_is_held(settings: Settings) -> None:
    """A shadow rule with little left neither makes garbage cheap nor is overdrawn by it."""
    app = App(200)
    rules = [
        Rule("100/hour", name="real", cost=inputs),
        Rule("3/hour", name="watched", cost=inputs, shadow=True),
    ]
    protected = RateLimitMiddleware(app, rules=rules, settings=settings)
    (first, _) = await drive(protected, {**POST}, *GARBAGE)
    (second, _) = await drive(protected, {**POST}, *GARBAGE)

    assert [200, 429] == [first["status"], second["status"]]
    assert b'"real";r=0;t=3600' == header(first, b"ratelimit")


async def test_count_if_gives_back_the_rest_once(settings: Settings) -> None:
    """A garbage body that is turned down and does not count:
    the hold at the answer's start, the one unit after it.
    """
    app = App(400)
    protected = limited(app, settings, "fixed-window", count_if=lambda status: status == 200)
    await drive(protected, {**POST}, *GARBAGE)
    app.status = 200

    assert 100 == await settled(protected)


async def test_holds_of_an_inner_middleware_are_given_back_too(settings: Settings) -> None:
    """The outer one writes the fields of both, and gives back for both."""
    app = App(400)
    inner = RateLimitMiddleware(app, rules=[Rule("50/hour", name="texts", cost=inputs)], settings=settings)
    protected = RateLimitMiddleware(inner, "10/minute", settings=settings)
    (start, _) = await drive(protected, {**POST}, *GARBAGE)

    assert b'"default";r=9;t=60, "texts";r=49;t=3600' == header(start, b"ratelimit")
    await asyncio.sleep(0)
    (start, _) = await drive(protected, {**POST}, *GARBAGE)
    assert b'"default";r=8;t=60, "texts";r=48;t=3600' == header(start, b"ratelimit")


async def test_app_sees_what_is_held_and_what_came_back(settings: Settings) -> None:
    """The decision in the request's state says at each moment how the client stands."""
    seen: list[tuple[int, float]] = []

    async def look(request: Request) -> PlainTextResponse:
        state = request.state.rate_limit.policies[0]
        seen.append((state.remaining, state.reset))
        return PlainTextResponse("no", 400)

    async def outside(scope: Scope, receive: Receive, send: Send) -> None:
        await protected(scope, receive, send)
        state = scope["state"]["rate_limit"].policies[0]
        seen.append((state.remaining, state.reset))

    app = Starlette(routes=[Route("/", look, methods=["POST"])])
    protected = limited(app, settings, "gcra", "100/1000 seconds")
    await drive(outside, {**POST, "state": {}}, *GARBAGE)

    assert [(0, 1000.0), (99, 10.0)] == seen


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\nbad\r\n"),
        ({"content-type": "multipart/form-data"}, b"hello"),
        ({"content-type": "multipart/form-data; boundary=x"}, b"--x\r\n\r\n\r\n"),
        ({"content-type": "application/json"}, b"a=1"),
        ({"content-type": "application/x-www-form-urlencoded"}, b"a=" + b"x" * 3000),
    ],
    ids=["broken", "no boundary", "no name", "no form", "big"],
)
async def test_broken_form_is_a_body_like_broken_json(settings: Settings, headers: dict[str, str], body: bytes) -> None:
    """No form of a client's makes an error of the app: it holds what remains,
    and reaches the app as it was.
    """

    async def fields(request: Request) -> int:
        async with request.form() as form:
            return len(form)

    got = []

    async def endpoint(request: Request) -> PlainTextResponse:
        got.append(await request.body())
        return PlainTextResponse("ok")

    capped = settings.model_copy(update={"RATE_LIMIT_BODY_CAP": 2000})
    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(RateLimitMiddleware, rules=[Rule("10/minute", cost=fields)], settings=capped)
    async with client_of(app) as client:
        response = await client.post("/", content=body, headers=headers)

    assert (200, '"default";r=0;t=60') == (response.status_code, response.headers["ratelimit"])
    assert [body] == got


async def test_good_form_costs_what_the_callable_says(settings: Settings) -> None:
    """Its files are closed afterwards, and the app parses it once more."""

    async def fields(request: Request) -> int:
        return len(await request.form())

    async def endpoint(request: Request) -> PlainTextResponse:
        async with request.form() as form:
            return PlainTextResponse(",".join(form))

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    app.add_middleware(RateLimitMiddleware, rules=[Rule("10/minute", cost=fields)], settings=settings)
    async with client_of(app) as client:
        response = await client.post("/", data={"a": "1", "b": "2"}, files={"f": b"x" * 5000})

    assert ("a,b,f", '"default";r=7;t=60') == (response.text, response.headers["ratelimit"])


@pytest.mark.parametrize("read", ["nothing", "body", "json", "form"])
async def test_handshake_under_a_cost_callable_has_an_empty_body(settings: Settings, read: str) -> None:
    """A rule without methods covers handshakes:
    their callable gets a request without a body, and the app its own.
    """
    requests = []

    async def cost(request: Request) -> int:
        requests.append(request.headers.get("x"))
        if read != "nothing":
            await getattr(request, read)()
        return 2

    got = []

    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        got.append(await receive())
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close"})

    app = RateLimitMiddleware(endpoint, rules=[Rule("9/minute", cost=cost)], settings=settings)
    sent = await drive(app, websocket_scope(headers=[(b"x", b"y")]), {"type": "websocket.connect"})

    # An empty body is neither JSON nor a form, so that it takes what there is.
    left = b"7" if read in ("nothing", "body") else b"0"
    assert b'"default";r=%b;t=60' % left == header(sent[0], b"ratelimit")
    assert ([{"type": "websocket.connect"}], ["y"]) == (got, requests)


async def test_handshake_that_the_app_closes_gives_back(settings: Settings) -> None:
    """Closed before accept is a 403 to its client."""

    async def refusing(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.close"})

    app = RateLimitMiddleware(refusing, rules=[Rule("9/minute", cost=inputs)], settings=settings)
    for _ in range(3):
        await drive(app, websocket_scope(), {"type": "websocket.connect"})
        await asyncio.sleep(0)

    scope = websocket_scope(extensions={"websocket.http.response": {}})
    sent = [await drive(app, scope, {"type": "websocket.connect"}) for _ in range(7)]
    assert ["websocket.close"] * 6 + ["websocket.http.response.start"] == [messages[0]["type"] for messages in sent]
