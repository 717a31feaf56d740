"""What a request costs: by callables, by its body, and given back after the answer."""

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from redis_asgi import RateLimitMiddleware, Rule, Settings, by_header

from .harness import Spy, client_of, drive, header, http_scope, statuses, websocket_scope

pytestmark = pytest.mark.anyio


async def test_dynamic_limits(memory_settings: Settings) -> None:
    """A callable gives each request its limits, or None for no limit; it may be async."""

    async def plan(conn: HTTPConnection) -> str | None:
        return {"free": "1/minute", "pro": "2/minute"}.get(conn.headers.get("x-plan", ""))

    app = RateLimitMiddleware(Spy(), plan, partition_by=by_header("x-plan"), settings=memory_settings)

    assert [200, 429] == await statuses(app, 2, headers={"x-plan": "free"})
    assert [200, 200, 429] == await statuses(app, 3, headers={"x-plan": "pro"})
    assert [200] * 3 == await statuses(app, 3)


@pytest.mark.parametrize("style", ["ietf", "legacy", "both", "none"])
@pytest.mark.parametrize("store", ["memory", "redis"])
async def test_quota_of_nothing_refuses_for_good(store: str, style: Any, request: pytest.FixtureRequest) -> None:
    """A plan of ``0/minute`` is a 429 that names no time to come back,
    however it stands beside other limits.
    """
    url = request.getfixturevalue("redis_url") if store == "redis" else "memory://"
    mine = Settings(REDIS_URL=url, REDIS_KEY_PREFIX=f"z{store}{style}:")
    plans = {"free": "2/minute", "blocked": "0/minute", "mixed": "9/minute; 0/hour"}
    rules = [
        Rule(lambda conn: plans[conn.headers.get("x-plan", "free")], name="plan"),
        Rule("5/minute", name="fixed"),
        Rule("9/minute", name="free", cost=0),
    ]
    app = RateLimitMiddleware(Spy(), rules=rules, settings=mine, headers=style)
    async with client_of(app) as client:
        refused = [await client.get("/", headers={"x-plan": plan}) for plan in ("blocked", "mixed", "blocked")]
        free = [await client.get("/") for _ in range(3)]

    assert [429] * 3 + [200, 200, 429] == [response.status_code for response in refused + free]
    assert not any("retry-after" in response.headers for response in refused)
    assert {"The quota is 0: no request is admitted."} == {response.json()["detail"] for response in refused}
    if style in ("ietf", "both"):
        assert '"plan";q=0;w=60' in refused[0].headers["ratelimit-policy"]
        assert '"plan";r=0;t=60' in refused[0].headers["ratelimit"]


async def test_shadow_of_a_quota_of_nothing_refuses_nobody(memory_settings: Settings) -> None:
    """It is counted as one that would have refused, and shown to nobody."""
    app = RateLimitMiddleware(
        Spy(), rules=[Rule(lambda _conn: "0/minute", shadow=True)], settings=memory_settings, headers="both"
    )

    assert [200, 200] == await statuses(app, 2)


async def test_plan_that_nobody_can_read_is_no_error_of_the_app(memory_settings: Settings) -> None:
    """A tenant's typo is answered by what it had before, else by the default limits: never a 500."""
    said = {"a": "3/minute", "b": "100/minit"}
    capped = memory_settings.model_copy(update={"MAX_REQUESTS_PER_WINDOW": 2})
    app = RateLimitMiddleware(
        Spy(), lambda conn: said[conn.headers["x-key"]], partition_by=by_header("x-key"), settings=capped
    )
    first = await statuses(app, 1, headers={"x-key": "a"})
    said["a"] = "3 per minit"

    assert [200, 200, 200, 429] == first + await statuses(app, 3, headers={"x-key": "a"})
    assert [200, 200, 429] == await statuses(app, 3, headers={"x-key": "b"})


async def test_cost_zero_and_cost_too_big(memory_settings: Settings) -> None:
    """Cost 0 is admitted and charges nothing;
    a cost above the quota is refused for good, without Retry-After.
    """
    costs = iter([0, 0, 6, 5])
    app = RateLimitMiddleware(
        Spy(), rules=[Rule("5/minute", cost=lambda request: next(costs))], settings=memory_settings
    )
    async with client_of(app) as client:
        free, _, never, all_of_it = [await client.get("/") for _ in range(4)]

    assert '"default";r=5;t=60' == free.headers["ratelimit"]
    assert 429 == never.status_code
    assert "retry-after" not in never.headers
    assert "can never fit" in never.json()["detail"]
    assert 200 == all_of_it.status_code


async def test_cost_from_the_body_is_replayed_to_the_app(memory_settings: Settings) -> None:
    """A cost callable may read the JSON body,
    and the app still receives it byte for byte, however it was cut.
    """

    async def inputs(request: Request) -> int:
        return len((await request.json())["input"])

    spy = Spy()
    app = RateLimitMiddleware(spy, rules=[Rule("10/minute", cost=inputs)], settings=memory_settings)
    body = json.dumps({"input": ["a"] * 7}).encode()
    pieces: list[Message] = [
        {"type": "http.request", "body": body[i : i + 5], "more_body": i + 5 < len(body)}
        for i in range(0, len(body), 5)
    ]
    first = await drive(app, http_scope(method="POST"), *pieces)
    second = await drive(app, http_scope(method="POST"), *pieces)

    assert [body] == spy.bodies
    assert b'"default";r=3;t=60' == header(first[0], b"ratelimit")
    assert 429 == second[0]["status"]


@pytest.mark.parametrize(
    "body",
    [b"{", b"\xff\xfe", b"[" * 100_000, b'{"input": ' + b" " * 3000 + b"[]}"],
    ids=["cut", "bytes", "nested", "big"],
)
async def test_unreadable_body_is_never_the_cheap_one(memory_settings: Settings, body: bytes) -> None:
    """A body that is no JSON, or over the cap, takes all that remains,
    and the app receives it as it was.
    """

    async def inputs(request: Request) -> int:
        return len((await request.json())["input"])

    capped = memory_settings.model_copy(update={"RATE_LIMIT_BODY_CAP": 2000})
    spy = Spy()
    app = RateLimitMiddleware(spy, rules=[Rule("10/minute", cost=inputs)], settings=capped)
    async with client_of(app) as client:
        response = await client.post("/", content=body)

    assert '"default";r=0;t=60' == response.headers["ratelimit"]
    assert [body] == spy.bodies


async def test_body_is_not_read_unless_asked(memory_settings: Settings) -> None:
    """A rule without a cost callable never touches receive."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("ok")(scope, receive, send)

    async def receive() -> Message:
        raise AssertionError("somebody read the body")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await RateLimitMiddleware(app, "1/minute", settings=memory_settings)(http_scope(), receive, send)

    assert 200 == sent[0]["status"]


async def test_users_exceptions_reach_the_apps_error_handling(memory_settings: Settings) -> None:
    """What a user's callable raises is never swallowed into "not limited"."""

    def broken(conn: HTTPConnection) -> str:
        raise LookupError("tenant")

    app = RateLimitMiddleware(Spy(), "1/minute", partition_by=broken, settings=memory_settings)
    with pytest.raises(LookupError, match="tenant"):
        await drive(app, http_scope())

    negative = RateLimitMiddleware(Spy(), rules=[Rule("5/minute", cost=lambda request: -1)], settings=memory_settings)
    with pytest.raises(ValueError, match="cost=-1"):
        await drive(negative, http_scope())


async def test_count_if_gives_back(memory_settings: Settings) -> None:
    """Only failed logins count: a success is charged on arrival and given back after its response."""
    outcomes = iter([200, 200, 401, 401, 200])

    async def login(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(status_code=next(outcomes))(scope, receive, send)

    app = RateLimitMiddleware(
        login, rules=[Rule("2/minute", count_if=lambda status: status >= 400)], settings=memory_settings
    )

    assert [200, 200, 401, 401, 429] == await statuses(app, 5)


async def test_exception_counts_as_500_and_a_disconnect_stays_charged(memory_settings: Settings) -> None:
    """count_if is told 500 for an app that raises; a client that goes away gets nothing back."""
    seen: list[int] = []

    def count_if(status: int) -> bool:
        seen.append(status)
        return False

    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    async def left_alone(scope: Scope, receive: Receive, send: Send) -> None:
        raise asyncio.CancelledError

    for inner, error in ((failing, ZeroDivisionError), (left_alone, asyncio.CancelledError)):
        app = RateLimitMiddleware(inner, rules=[Rule("5/minute", count_if=count_if)], settings=memory_settings)
        with pytest.raises(error):
            await drive(app, http_scope())

    assert [500] == seen


async def test_charge_until_the_last_byte(memory_settings: Settings) -> None:
    """The app may charge what it only knows later, for one policy or all,
    and give back what it was charged.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        limit = scope["state"]["rate_limit"]
        limit.charge(4)
        limit.charge(-2, policy="default-60s")
        await PlainTextResponse("ok")(scope, receive, send)
        with pytest.raises(RuntimeError, match="settled"):
            limit.charge(1)
        with pytest.raises(ValueError, match="policy='nope'"):
            limit.charge(1, policy="nope")

    limited = RateLimitMiddleware(app, "10/minute; 100/hour", settings=memory_settings)
    async with client_of(limited) as client:
        await client.get("/")
        response = await client.get("/")

    assert '"default-60s";r=6;t=60, "default-3600s";r=94;t=3600' == response.headers["ratelimit"]


async def test_nobody_gets_back_more_than_was_taken(memory_settings: Settings) -> None:
    """Giving back a thousand units restores only this request's own."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["rate_limit"].charge(-1000)
        await PlainTextResponse("ok")(scope, receive, send)

    generous = RateLimitMiddleware(app, "5/minute", settings=memory_settings)
    plain = RateLimitMiddleware(Spy(), "5/minute", settings=memory_settings)
    await statuses(plain, 2)
    await statuses(generous, 3)
    async with client_of(plain) as client:
        response = await client.get("/")

    assert '"default";r=2;t=60' == response.headers["ratelimit"]


async def test_errors_of_the_apps_own_network_count_as_500(memory_settings: Settings) -> None:
    """An app whose database is down raises an OSError too:
    that is its failure, not the client's absence.
    """
    seen: list[int] = []

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ConnectionRefusedError

    async def gone(message: Message) -> None:
        raise BrokenPipeError

    def count_if(status: int) -> bool:
        seen.append(status)
        return True

    rules = [Rule("9/minute", count_if=count_if)]
    with pytest.raises(ConnectionRefusedError):
        await drive(RateLimitMiddleware(broken, rules=rules, settings=memory_settings), http_scope())
    app = RateLimitMiddleware(PlainTextResponse("ok"), rules=rules, settings=memory_settings)
    with pytest.raises(BrokenPipeError):
        await app(http_scope(), _nothing, gone)

    assert [500, 200] == seen


async def _nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def test_handshake_closed_before_accept_counts_as_403(memory_settings: Settings) -> None:
    """What the server answers such a handshake is what count_if is asked."""
    seen: list[int] = []

    async def refusing(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.close", "code": 1000})

    def count_if(status: int) -> bool:
        seen.append(status)
        return True

    app = RateLimitMiddleware(refusing, rules=[Rule("9/minute", count_if=count_if)], settings=memory_settings)
    await drive(app, websocket_scope())

    assert [403] == seen


async def test_body_then_stream_inside_a_cost_callable(memory_settings: Settings) -> None:
    """A callable may read the body in any of Starlette's ways, one after the other."""

    async def size(request: Request) -> int:
        first = len(await request.body())
        second = sum([len(chunk) async for chunk in request.stream()])
        assert first == second
        return first

    spy = Spy()
    app = RateLimitMiddleware(spy, rules=[Rule("9/minute", cost=size)], settings=memory_settings)
    async with client_of(app) as client:
        response = await client.post("/", content=b"12345")

    assert '"default";r=4;t=60' == response.headers["ratelimit"]
    assert [b"12345"] == spy.bodies


async def test_callable_that_forgives_a_big_body_does_not_make_it_cheap(memory_settings: Settings) -> None:
    """What cannot be read takes all that remains, whatever the callable made of the error."""

    async def forgiving(request: Request) -> int:
        try:
            return len(await request.json())
        except Exception:
            return 1

    capped = memory_settings.model_copy(update={"RATE_LIMIT_BODY_CAP": 10})
    app = RateLimitMiddleware(Spy(), rules=[Rule("9/minute", cost=forgiving)], settings=capped)
    async with client_of(app) as client:
        response = await client.post("/", content=b"x" * 100)

    assert '"default";r=0;t=60' == response.headers["ratelimit"]


async def test_remembered_refusal_of_another_cost_is_not_repeated(redis_url: str) -> None:
    """A flood's answer is kept in full, but one that can never fit is not told when to come back."""

    async def cost(request: Request) -> int:
        return int(request.query_params["cost"])

    app = RateLimitMiddleware(Spy(), rules=[Rule("9/minute", cost=cost)], settings=Settings(REDIS_URL=redis_url))
    async with client_of(app) as client:
        responses = [await client.get("/", params={"cost": cost}) for cost in (9, 1, 1, 1000, 1)]

    assert [200, 429, 429, 429, 429] == [response.status_code for response in responses]
    assert ["60", "60", None, "60"] == [response.headers.get("retry-after") for response in responses[1:]]
    assert "can never fit" in responses[3].json()["detail"]


async def test_remembered_refusal_is_in_the_state_like_any_other(redis_url: str) -> None:
    """What stands outside, such as an access log, sees the decision of a flood's every request."""
    app = RateLimitMiddleware(Spy(), "1/minute", settings=Settings(REDIS_URL=redis_url))
    scopes = [http_scope() for _ in range(4)]
    for scope in scopes:
        await drive(app, scope)
    decisions = [scope["state"]["rate_limit"] for scope in scopes]

    assert [True, False, False, False] == [decision.allowed for decision in decisions]
    assert [("default",)] * 3 == [decision.violated for decision in decisions[1:]]
    assert all(0 < decision.retry_after <= 60 for decision in decisions[1:])
