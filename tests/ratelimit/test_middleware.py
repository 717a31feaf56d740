"""`RateLimitMiddleware`: rules, answers, and that everything else passes through untouched."""

import asyncio
import gc
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from redis_asgi import ConfigurationError, Decision, RateLimitMiddleware, Rule, Settings, by_header, by_user, client_ip

from .harness import Spy, client_of, drive, header, http_scope, memory, statuses, websocket_scope

pytestmark = pytest.mark.anyio


async def test_refuses_what_is_over_quota(settings: Settings) -> None:
    """The quota is admitted, the next request is not, and never reaches the app."""
    spy = Spy()
    app = RateLimitMiddleware(spy, "3/minute", settings=settings)

    assert [200, 200, 200, 429, 429] == await statuses(app, 5)
    assert 3 == spy.calls


async def test_refusal_explains_itself(settings: Settings) -> None:
    """A 429 says how long to wait, is not cacheable, and carries the draft's problem document."""
    app = RateLimitMiddleware(Spy(), "1/minute", settings=settings)
    async with client_of(app) as client:
        await client.get("/")
        refused = await client.get("/")

    assert "no-store" == refused.headers["cache-control"]
    assert 59 <= int(refused.headers["retry-after"]) <= 60
    assert "application/problem+json" == refused.headers["content-type"]
    assert str(len(refused.content)) == refused.headers["content-length"]
    problem = refused.json()
    assert "https://iana.org/assignments/http-problem-types#quota-exceeded" == problem["type"]
    assert ["default"] == problem["violated-policies"]
    assert "203.0.113.7" not in refused.text


async def test_admitted_response_says_how_the_client_stands(settings: Settings) -> None:
    """An admitted response has the draft's fields and never Retry-After."""
    app = RateLimitMiddleware(Spy(), "5/second; 100/minute", settings=settings)
    async with client_of(app) as client:
        response = await client.get("/")

    assert '"default-1s";q=5;w=1, "default-60s";q=100;w=60' == response.headers["ratelimit-policy"]
    assert '"default-1s";r=4;t=1, "default-60s";r=99;t=60' == response.headers["ratelimit"]
    assert "retry-after" not in response.headers


async def test_all_or_none(settings: Settings) -> None:
    """A request refused by one limit is charged under no other."""
    app = RateLimitMiddleware(Spy(), rules=[Rule("2/hour; 10/day", name="r")], settings=settings)
    async with client_of(app) as client:
        for _ in range(6):
            last = await client.get("/")

    assert '"r-3600s";r=0;t=3600, "r-86400s";r=8;t=86400' == last.headers["ratelimit"]


async def test_head_refusal_has_no_body(settings: Settings) -> None:
    """HEAD counts as GET does, and its refusal has no body."""
    app = RateLimitMiddleware(Spy(), rules=[Rule("1/minute", methods="GET")], settings=settings)
    await statuses(app, 1)
    sent = await drive(app, http_scope(method="HEAD"))

    assert 429 == sent[0]["status"]
    assert b"" == sent[1]["body"]


@pytest.mark.parametrize(
    ("style", "present", "absent"),
    [
        ("ietf", {"ratelimit", "ratelimit-policy"}, {"x-ratelimit-limit"}),
        ("legacy", {"x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"}, {"ratelimit"}),
        ("both", {"ratelimit", "x-ratelimit-reset"}, set()),
        ("none", set(), {"ratelimit", "ratelimit-policy", "x-ratelimit-limit"}),
    ],
)
async def test_header_styles(settings: Settings, style: Any, present: set[str], absent: set[str]) -> None:
    """Each style sends its own fields, on admitted and refused responses alike."""
    app = RateLimitMiddleware(Spy(), "1/minute", headers=style, settings=settings)
    async with client_of(app) as client:
        for _ in range(2):
            names = set((await client.get("/")).headers)

            assert present <= names
            assert not absent & names


async def test_fields_of_the_app_stay(settings: Settings) -> None:
    """A field the app has set itself is neither replaced nor doubled."""
    app = RateLimitMiddleware(Spy(headers=[(b"ratelimit", b'"app";r=1;t=1')]), "5/minute", settings=settings)
    start, _ = await drive(app, http_scope())

    assert [b'"app";r=1;t=1'] == [value for name, value in start["headers"] if name == b"ratelimit"]
    assert b'"default";q=5;w=60' == header(start, b"ratelimit-policy")


async def test_redirects_carry_no_fields(settings: Settings) -> None:
    """A redirect's target is counted by itself."""
    app = RateLimitMiddleware(RedirectResponse("/x"), "5/minute", settings=settings)
    start, _ = await drive(app, http_scope())

    assert 307 == start["status"]
    assert header(start, b"ratelimit") is None


async def test_every_matching_rule_applies(settings: Settings) -> None:
    """There is no first match: the narrow rule and the wide one both count."""
    rules = [Rule("2/minute", name="login", paths="/login", methods="POST"), Rule("4/minute", name="all")]
    app = RateLimitMiddleware(Spy(), rules=rules, settings=settings)

    assert [200, 200, 429] == await statuses(app, 3, "/login", method="POST")
    assert [200, 200, 429] == await statuses(app, 3, "/other")


async def test_unmatched_request_is_not_limited(settings: Settings) -> None:
    """With rules alone, a path that matches none has no limit and no fields."""
    app = RateLimitMiddleware(Spy(), rules=[Rule("1/minute", paths="/api/*")], settings=settings)
    async with client_of(app) as client:
        responses = [await client.get("/free") for _ in range(3)]

    assert [200] * 3 == [response.status_code for response in responses]
    assert "ratelimit" not in responses[0].headers
    assert [200, 429] == await statuses(app, 2, "/api")


async def test_exempt_paths_and_callable(settings: Settings) -> None:
    """Exempt requests are not counted: by pattern, by the environment's patterns, or by a callable."""
    by_path = RateLimitMiddleware(Spy(), "1/minute", exempt=["/health/*"], settings=settings)
    by_env = RateLimitMiddleware(
        Spy(), "1/minute", settings=settings.model_copy(update={"RATE_LIMIT_EXEMPT_PATHS": ("/h*",)})
    )

    async def internal(conn: HTTPConnection) -> bool:
        return conn.headers.get("x-internal") == "yes"

    by_callable = RateLimitMiddleware(Spy(), "1/minute", exempt=internal, settings=settings)

    assert [200] * 3 == await statuses(by_path, 3, "/health/live")
    assert [200] * 3 == await statuses(by_env, 3, "/health")
    assert [200] * 3 == await statuses(by_callable, 3, headers={"x-internal": "yes"})
    assert [200, 429] == await statuses(by_callable, 2)


async def test_preflights_are_the_browsers(settings: Settings) -> None:
    """A CORS preflight is counted only by a rule that names OPTIONS; another OPTIONS request is counted."""
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    app = RateLimitMiddleware(Spy(), "1/minute", settings=settings)
    naming = RateLimitMiddleware(Spy(), rules=[Rule("1/minute", name="o", methods="OPTIONS")], settings=settings)

    assert [200] * 3 == await statuses(app, 3, method="OPTIONS", headers=preflight)
    assert [200, 429] == await statuses(app, 2, method="OPTIONS")
    assert [200, 429] == await statuses(naming, 2, method="OPTIONS", headers=preflight)


async def test_partition_by_header_and_user(settings: Settings) -> None:
    """Each key has its own counter, and nobody without one shares a keyed client's."""
    app = RateLimitMiddleware(Spy(), "1/minute", partition_by=by_header("X-API-Key"), settings=settings)

    assert [200, 429] == await statuses(app, 2, headers={"x-api-key": "a"})
    assert [200, 429] == await statuses(app, 2, headers={"x-api-key": "b"})
    assert [200, 429] == await statuses(app, 2)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("ip", [200, 429, 200]), ("skip", [200, 200, 200]), ("shared", [200, 429, 429]), ("refuse", [400, 400, 400])],
)
async def test_missing_identity(mode: Any, expected: list[int]) -> None:
    """Requests without the header are counted by address, not at all, together, or refused with 400."""
    settings = memory(RATE_LIMIT_MISSING_IDENTITY=mode, REDIS_KEY_PREFIX=f"m-{mode}:")
    app = RateLimitMiddleware(Spy(), "1/minute", partition_by=by_header("x-api-key"), settings=settings)
    first, second = await statuses(app, 2), await statuses(app, 1, address="203.0.113.8")

    assert expected == first + second


async def test_user_partition(settings: Settings) -> None:
    """An authenticated user is counted by identity, whatever address it comes from."""

    class User:
        is_authenticated = True
        identity = "ada"

    app = RateLimitMiddleware(Spy(), "1/minute", partition_by=by_user, settings=settings)
    first = await drive(app, http_scope(user=User()))
    second = await drive(app, http_scope(user=User(), client=("198.51.100.1", 1)))

    assert [200, 429] == [first[0]["status"], second[0]["status"]]


async def test_custom_partition_of_none_leaves_the_rule(settings: Settings) -> None:
    """A callable that returns None takes the request out of its rule; async ones are awaited."""

    async def tenant(conn: HTTPConnection) -> str | None:
        return conn.headers.get("x-tenant")

    app = RateLimitMiddleware(Spy(), "1/minute", partition_by=tenant, settings=settings)

    assert [200] * 3 == await statuses(app, 3)
    assert [200, 429] == await statuses(app, 2, headers={"x-tenant": "t"})


async def test_client_ip_inside_a_callable_believes_the_same_proxies() -> None:
    """A user's callable that asks client_ip gets the address behind the trusted proxy."""
    settings = memory(RATE_LIMIT_TRUSTED_PROXIES="203.0.113.0/24", REDIS_KEY_PREFIX="inner:")
    seen: list[str | None] = []

    def partition(conn: HTTPConnection) -> str | None:
        seen.append(client_ip(conn))
        return seen[-1]

    app = RateLimitMiddleware(Spy(), "1/minute", partition_by=partition, settings=settings)
    await statuses(app, 1, headers={"x-forwarded-for": "6.6.6.6, 198.51.100.9"})

    assert ["198.51.100.9"] == seen


async def test_spoofed_header_changes_nothing_unless_trusted() -> None:
    """X-Forwarded-For from a peer that is not trusted buys no new counter; from a trusted one it names the client."""
    untrusting = RateLimitMiddleware(Spy(), "1/minute", settings=memory(REDIS_KEY_PREFIX="u:"))
    trusting = RateLimitMiddleware(
        Spy(), "1/minute", settings=memory(REDIS_KEY_PREFIX="v:", RATE_LIMIT_TRUSTED_PROXIES="203.0.113.7")
    )

    assert [200] == await statuses(untrusting, 1, headers={"x-forwarded-for": "1.1.1.1"})
    assert [429] == await statuses(untrusting, 1, headers={"x-forwarded-for": "2.2.2.2"})
    assert [200] == await statuses(trusting, 1, headers={"x-forwarded-for": "9.9.9.9, 1.1.1.1"})
    assert [429] == await statuses(trusting, 1, headers={"x-forwarded-for": "8.8.8.8, 1.1.1.1"})
    assert [200] == await statuses(trusting, 1, headers={"x-forwarded-for": "1.1.1.2"})


async def test_dynamic_limits(settings: Settings) -> None:
    """A callable gives each request its limits, or None for no limit; it may be async."""

    async def plan(conn: HTTPConnection) -> str | None:
        return {"free": "1/minute", "pro": "2/minute"}.get(conn.headers.get("x-plan", ""))

    app = RateLimitMiddleware(Spy(), plan, partition_by=by_header("x-plan"), settings=settings)

    assert [200, 429] == await statuses(app, 2, headers={"x-plan": "free"})
    assert [200, 200, 429] == await statuses(app, 3, headers={"x-plan": "pro"})
    assert [200] * 3 == await statuses(app, 3)


@pytest.mark.parametrize("style", ["ietf", "legacy", "both", "none"])
@pytest.mark.parametrize("store", ["memory", "redis"])
async def test_quota_of_nothing_refuses_for_good(store: str, style: Any, request: pytest.FixtureRequest) -> None:
    """A plan of ``0/minute`` is a 429 that names no time to come back, however it stands beside other limits."""
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


async def test_shadow_of_a_quota_of_nothing_refuses_nobody(settings: Settings) -> None:
    """It is counted as one that would have refused, and shown to nobody."""
    app = RateLimitMiddleware(
        Spy(), rules=[Rule(lambda _conn: "0/minute", shadow=True)], settings=settings, headers="both"
    )

    assert [200, 200] == await statuses(app, 2)


async def test_plan_that_nobody_can_read_is_no_error_of_the_app(settings: Settings) -> None:
    """A tenant's typo is answered by what it had before, else by the default limits: never a 500."""
    said = {"a": "3/minute", "b": "100/minit"}
    capped = settings.model_copy(update={"MAX_REQUESTS_PER_WINDOW": 2})
    app = RateLimitMiddleware(
        Spy(), lambda conn: said[conn.headers["x-key"]], partition_by=by_header("x-key"), settings=capped
    )
    first = await statuses(app, 1, headers={"x-key": "a"})
    said["a"] = "3 per minit"

    assert [200, 200, 200, 429] == first + await statuses(app, 3, headers={"x-key": "a"})
    assert [200, 200, 429] == await statuses(app, 3, headers={"x-key": "b"})


async def test_cost_zero_and_cost_too_big(settings: Settings) -> None:
    """Cost 0 is admitted and charges nothing; a cost above the quota is refused for good, without Retry-After."""
    costs = iter([0, 0, 6, 5])
    app = RateLimitMiddleware(Spy(), rules=[Rule("5/minute", cost=lambda request: next(costs))], settings=settings)
    async with client_of(app) as client:
        free, _, never, all_of_it = [await client.get("/") for _ in range(4)]

    assert '"default";r=5;t=60' == free.headers["ratelimit"]
    assert 429 == never.status_code
    assert "retry-after" not in never.headers
    assert "can never fit" in never.json()["detail"]
    assert 200 == all_of_it.status_code


async def test_cost_from_the_body_is_replayed_to_the_app(settings: Settings) -> None:
    """A cost callable may read the JSON body, and the app still receives it byte for byte, however it was cut."""

    async def inputs(request: Request) -> int:
        return len((await request.json())["input"])

    spy = Spy()
    app = RateLimitMiddleware(spy, rules=[Rule("10/minute", cost=inputs)], settings=settings)
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
async def test_unreadable_body_is_never_the_cheap_one(settings: Settings, body: bytes) -> None:
    """A body that is no JSON, or over the cap, takes all that remains, and the app receives it as it was."""

    async def inputs(request: Request) -> int:
        return len((await request.json())["input"])

    capped = settings.model_copy(update={"RATE_LIMIT_BODY_CAP": 2000})
    spy = Spy()
    app = RateLimitMiddleware(spy, rules=[Rule("10/minute", cost=inputs)], settings=capped)
    async with client_of(app) as client:
        response = await client.post("/", content=body)

    assert '"default";r=0;t=60' == response.headers["ratelimit"]
    assert [body] == spy.bodies


async def test_body_is_not_read_unless_asked(settings: Settings) -> None:
    """A rule without a cost callable never touches receive."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("ok")(scope, receive, send)

    async def receive() -> Message:
        raise AssertionError("somebody read the body")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await RateLimitMiddleware(app, "1/minute", settings=settings)(http_scope(), receive, send)

    assert 200 == sent[0]["status"]


async def test_users_exceptions_reach_the_apps_error_handling(settings: Settings) -> None:
    """What a user's callable raises is never swallowed into "not limited"."""

    def broken(conn: HTTPConnection) -> str:
        raise LookupError("tenant")

    app = RateLimitMiddleware(Spy(), "1/minute", partition_by=broken, settings=settings)
    with pytest.raises(LookupError, match="tenant"):
        await drive(app, http_scope())

    negative = RateLimitMiddleware(Spy(), rules=[Rule("5/minute", cost=lambda request: -1)], settings=settings)
    with pytest.raises(ValueError, match="cost=-1"):
        await drive(negative, http_scope())


async def _settled() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_count_if_gives_back(settings: Settings) -> None:
    """Only failed logins count: a success is charged on arrival and given back after its response."""
    outcomes = iter([200, 200, 401, 401, 200])

    async def login(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(status_code=next(outcomes))(scope, receive, send)

    app = RateLimitMiddleware(login, rules=[Rule("2/minute", count_if=lambda status: status >= 400)], settings=settings)

    assert [200, 200, 401, 401, 429] == await statuses(app, 5)


async def test_exception_counts_as_500_and_a_disconnect_stays_charged(settings: Settings) -> None:
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
        app = RateLimitMiddleware(inner, rules=[Rule("5/minute", count_if=count_if)], settings=settings)
        with pytest.raises(error):
            await drive(app, http_scope())

    assert [500] == seen


async def test_charge_until_the_last_byte(settings: Settings) -> None:
    """The app may charge what it only knows later, for one policy or all, and give back what it was charged."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        limit = scope["state"]["rate_limit"]
        limit.charge(4)
        limit.charge(-2, policy="default-60s")
        await PlainTextResponse("ok")(scope, receive, send)
        with pytest.raises(RuntimeError, match="settled"):
            limit.charge(1)
        with pytest.raises(ValueError, match="policy='nope'"):
            limit.charge(1, policy="nope")

    limited = RateLimitMiddleware(app, "10/minute; 100/hour", settings=settings)
    async with client_of(limited) as client:
        await client.get("/")
        response = await client.get("/")

    assert '"default-60s";r=6;t=60, "default-3600s";r=94;t=3600' == response.headers["ratelimit"]


async def test_nobody_gets_back_more_than_was_taken(settings: Settings) -> None:
    """Giving back a thousand units restores only this request's own."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["rate_limit"].charge(-1000)
        await PlainTextResponse("ok")(scope, receive, send)

    generous = RateLimitMiddleware(app, "5/minute", settings=settings)
    plain = RateLimitMiddleware(Spy(), "5/minute", settings=settings)
    await statuses(plain, 2)
    await statuses(generous, 3)
    async with client_of(plain) as client:
        response = await client.get("/")

    assert '"default";r=2;t=60' == response.headers["ratelimit"]


async def test_shadow_rule_only_watches(settings: Settings) -> None:
    """A shadow policy never refuses and is in no header, but the decision shows it."""
    seen: list[Decision] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["state"]["rate_limit"])
        await PlainTextResponse("ok")(scope, receive, send)

    rules = [Rule("1/minute", name="new", shadow=True), Rule("10/minute", name="old")]
    limited = RateLimitMiddleware(app, rules=rules, settings=settings)

    assert [200, 200] == await statuses(limited, 2)
    assert [True, 0, 8] == [seen[1].policies[0].shadow, seen[1].policies[0].remaining, seen[1].policies[1].remaining]
    assert isinstance(seen[1], Decision)


async def test_dry_run_makes_every_policy_a_shadow() -> None:
    """RATE_LIMIT_DRY_RUN refuses nobody and sends no fields."""
    app = RateLimitMiddleware(Spy(), "1/minute", settings=memory(RATE_LIMIT_DRY_RUN=True, REDIS_KEY_PREFIX="dry:"))
    async with client_of(app) as client:
        responses = [await client.get("/") for _ in range(3)]

    assert [200] * 3 == [response.status_code for response in responses]
    assert "ratelimit" not in responses[0].headers


async def test_on_exceeded_may_answer(settings: Settings) -> None:
    """The user's response replaces the 429 and gets its fields; None leaves it; async works."""

    async def answer(conn: HTTPConnection, decision: Decision) -> Response | None:
        assert not decision.allowed
        return JSONResponse({"error": "slow down"}, 420) if "x-json" in conn.headers else None

    app = RateLimitMiddleware(Spy(), "1/minute", on_exceeded=answer, settings=settings)
    async with client_of(app) as client:
        await client.get("/")
        own = await client.get("/", headers={"x-json": "1"})
        default = await client.get("/")

    assert (420, {"error": "slow down"}) == (own.status_code, own.json())
    assert {"retry-after", "ratelimit"} <= set(own.headers)
    assert 429 == default.status_code


async def test_websocket_handshakes(settings: Settings) -> None:
    """An admitted handshake carries the fields on accept; a refused one is a 429, or a close with 1008."""

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    app = RateLimitMiddleware(Starlette(routes=[WebSocketRoute("/", endpoint)]), "1/minute", settings=settings)
    connect: Message = {"type": "websocket.connect"}
    admitted = await drive(app, websocket_scope(), connect)
    answered = await drive(app, websocket_scope(extensions={"websocket.http.response": {}}), connect)
    closed = await drive(app, websocket_scope(), connect)

    assert ["websocket.accept", "websocket.close"] == [message["type"] for message in admitted]
    assert b'"default";r=0;t=60' == header(admitted[0], b"ratelimit")
    assert ["websocket.http.response.start", "websocket.http.response.body"] == [m["type"] for m in answered]
    assert 429 == answered[0]["status"]
    assert [{"type": "websocket.close", "code": 1008, "reason": ""}] == closed


async def test_mounted_twice_counts_once(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """The inner instance skips what the outer one has charged, says so once, and adds what is its own."""
    inner = RateLimitMiddleware(
        Spy(), rules=[Rule("3/minute", name="a"), Rule("9/minute", name="b")], settings=settings
    )
    app = RateLimitMiddleware(inner, rules=[Rule("3/minute", name="a")], settings=settings)
    with caplog.at_level(logging.WARNING, "redis_asgi"):
        async with client_of(app) as client:
            responses = [await client.get("/") for _ in range(4)]

    assert [200, 200, 200, 429] == [response.status_code for response in responses]
    assert '"a";r=2;t=60, "b";r=8;t=60' == responses[0].headers["ratelimit"]
    assert ["mounted_twice"] == [record.__dict__["code"] for record in caplog.records]


async def test_an_inner_instance_keeps_what_it_charges(settings: Settings) -> None:
    """What the outer one has left to it whole is the same as ever, so that made up requests push out nothing."""
    inner = RateLimitMiddleware(Spy(), rules=[Rule("9/minute", name="b", cost=lambda _: 1)], settings=settings)
    app = RateLimitMiddleware(inner, rules=[Rule("9/minute", name="a")], settings=settings)

    kept = []
    for _ in range(3):
        assert 200 == (await drive(app, http_scope()))[0]["status"]
        kept.append(len(inner._engine.plans.charges.young))

    assert kept[0] == kept[2]


async def test_a_handshake_is_one_whatever_else_its_scope_says(settings: Settings) -> None:
    """A server that gives a handshake its method makes it no request, and no request one."""
    app = RateLimitMiddleware(Spy(), rules=[Rule("1/minute", methods="GET", paths="/a")], settings=settings)
    handshake = websocket_scope(path="/a", method="GET")
    plans = [app._plans.of(scope) for scope in (handshake, http_scope(path="/a"), handshake)]

    assert plans[0] is plans[2] is not plans[1]


async def test_likely_misconfigurations_are_said_once(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """A forwarding header from a stranger, and no client address at all, are logged once each, with a fix."""
    app = RateLimitMiddleware(Spy(), "100/minute", settings=settings)
    with caplog.at_level(logging.WARNING, "redis_asgi"):
        for _ in range(3):
            await drive(app, http_scope(headers=[(b"x-forwarded-for", b"1.1.1.1")]))
            await drive(app, http_scope(client=None))
            # uvicorn has applied this one: the peer is the header's address.
            await drive(app, http_scope(headers=[(b"x-forwarded-for", b"203.0.113.7")]))

    assert ["forwarded_header_untrusted", "no_client_address"] == [r.__dict__["code"] for r in caplog.records]
    assert all(record.__dict__["fix"] for record in caplog.records)


async def test_a_trusted_unix_socket_is_no_misconfiguration(caplog: pytest.LogCaptureFixture) -> None:
    """Unless the proxy names nobody; a header of one's own choice from a stranger is told of too."""
    settings = memory(RATE_LIMIT_TRUSTED_PROXIES="unix", RATE_LIMIT_FORWARDED_HEADER="x-real-ip")
    app = RateLimitMiddleware(Spy(), "100/minute", settings=settings)
    codes = []
    for client, headers in ((None, [(b"x-real-ip", b"1.1.1.1")]), (None, []), (("2.2.2.2", 1), [(b"x-real-ip", b"1")])):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "redis_asgi"):
            await drive(app, http_scope(client=client, headers=headers))
        codes.append([record.__dict__["code"] for record in caplog.records])

    assert [[], ["no_client_address"], ["forwarded_header_untrusted"]] == codes


async def test_no_address_is_one_partition(settings: Settings) -> None:
    """Clients of a unix socket share one counter, which is nobody else's."""
    app = RateLimitMiddleware(Spy(), "1/minute", settings=settings)
    seen = [(await drive(app, http_scope(client=None)))[0]["status"] for _ in range(2)]

    assert [200, 429] == seen
    assert [200] == await statuses(app, 1)


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x-api-key", b"\xff\xfe\x00")],
        [(b"x-api-key", b"k" * 1_000_000)],
        [(b"x-api-key", b"")],
        [(b"x-api-key", b"a:b{c}\r\nd")],
        [(b"x-forwarded-for", b"\xff, [::1, ,,,")],
    ],
    ids=["not UTF-8", "a megabyte", "empty", "separators", "broken forwarding"],
)
async def test_hostile_headers_have_a_defined_answer(settings: Settings, headers: list[tuple[bytes, bytes]]) -> None:
    """Whatever a header holds, the limit holds and nothing raises."""
    trusting = settings.model_copy(update={"RATE_LIMIT_TRUSTED_PROXIES": ("203.0.113.7",)})
    app = RateLimitMiddleware(Spy(), "1/minute", partition_by=by_header("x-api-key"), settings=trusting)
    seen = [(await drive(app, http_scope(headers=headers)))[0]["status"] for _ in range(2)]

    assert [200, 429] == seen


async def _events(request: Request) -> Response:
    async def chunks() -> AsyncIterator[str]:
        for i in range(3):
            yield f"data: {i}\n\n"

    return StreamingResponse(chunks(), media_type="text/event-stream")


async def _echo(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text(await websocket.receive_text())
    await websocket.close(4000)


def _not_here(request: Request) -> Response:
    raise HTTPException(410)


done: list[str] = []


def _with_task(request: Request) -> Response:
    return PlainTextResponse("ok", background=BackgroundTask(done.append, "background"))


ROUTES = [
    Route("/events", _events),
    Route("/gone", _not_here),
    Route("/task", _with_task),
    Mount("/sub", routes=[Route("/deep", lambda request: PlainTextResponse(request.url.path))]),
    WebSocketRoute("/ws", _echo),
]


@pytest.mark.parametrize(
    ("scope", "messages"),
    [
        (http_scope(path="/events"), []),
        (http_scope(path="/gone"), []),
        (http_scope(path="/nowhere"), []),
        (http_scope(path="/task"), []),
        (http_scope(path="/sub/deep"), []),
        (websocket_scope(path="/ws"), [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "hi"}]),
    ],
    ids=["stream", "HTTPException", "404", "background", "mount", "websocket"],
)
async def test_message_by_message_the_same(settings: Settings, scope: Scope, messages: list[Message]) -> None:
    """But for its two header fields, the app's messages are those it sends alone."""
    app = Starlette(routes=ROUTES)
    alone = await drive(app, dict(scope), *messages)
    limited = await drive(RateLimitMiddleware(app, "9/minute", settings=settings), dict(scope), *messages)
    for message in limited:
        if "headers" in message:
            ours = [field for field in message["headers"] if field[0].startswith(b"ratelimit")]
            message["headers"] = [field for field in message["headers"] if field not in ours]

            assert 2 == len(ours)
    for message in alone:
        message.get("headers")

    assert [_plain(message) for message in alone] == [_plain(message) for message in limited]


def _plain(message: Message) -> dict[str, Any]:
    return {**message, "headers": list(message["headers"])} if "headers" in message else dict(message)


async def test_unknown_messages_pass_through(settings: Settings) -> None:
    """Early hints, pathsend and trailers reach the server as they were sent, before, between and after."""
    messages: list[Message] = [
        {"type": "http.response.early_hint", "links": [b"</x>"]},
        {"type": "http.response.start", "status": 200, "headers": ((b"a", b"b"),), "trailers": True},
        {"type": "http.response.pathsend", "path": "/x"},
        {"type": "http.response.trailers", "headers": []},
    ]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    sent = await drive(RateLimitMiddleware(app, "9/minute", settings=settings), http_scope())

    assert [messages[0], messages[2], messages[3]] == [sent[0], sent[2], sent[3]]
    assert (b"a", b"b") == sent[1]["headers"][0]
    assert sent[1]["trailers"]
    assert ((b"a", b"b"),) == messages[1]["headers"]


async def test_a_request_leaves_nothing_to_the_collector(settings: Settings) -> None:
    """Neither an admitted nor a refused request makes a reference cycle, which would double its cost."""
    app = RateLimitMiddleware(Spy(), "500/minute", settings=settings)

    class Server:
        def __init__(self) -> None:
            self.scope = http_scope()

        async def send(self, message: Message) -> None:
            return None

        async def receive(self) -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

    async def request() -> None:
        server = Server()
        await app(server.scope, server.receive, server.send)

    for _ in range(5):
        await request()
    gc.collect()
    gc.disable()
    try:
        for _ in range(1000):
            await request()
        app.app.scopes.clear()  # type: ignore[attr-defined]  # the spy's

        # A few dozen objects of an earlier test's app may be let go of meanwhile; its caches are cycles.
        assert gc.collect() < 500
    finally:
        gc.enable()


async def test_root_path_and_mounts(settings: Settings) -> None:
    """A pattern is about the path below root_path, so that a mounted app keeps its rules."""
    inner = RateLimitMiddleware(Spy(), rules=[Rule("1/minute", paths="/items")], settings=settings)
    app = Starlette(routes=[Mount("/api/v1", app=inner)])

    assert [200, 429] == await statuses(app, 2, "/api/v1/items")
    assert [200, 200] == await statuses(app, 2, "/api/v1/others")


async def test_as_starlette_middleware_it_survives_500s(settings: Settings) -> None:
    """An unhandled exception passes through unchanged, and is counted."""

    def broken(request: Request) -> Response:
        raise KeyError("x")

    app = Starlette(
        routes=[Route("/", broken)],
        middleware=[Middleware(RateLimitMiddleware, limits="1/minute", settings=settings)],
    )
    with pytest.raises(KeyError):
        await statuses(app, 1)

    assert [429] == await statuses(app, 1)


async def test_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """``RateLimitMiddleware(app)`` takes limits, partition, headers and Redis from variables."""
    monkeypatch.setenv("REDIS_URL", "memory://")
    monkeypatch.setenv("REDIS_KEY_PREFIX", "env:")
    monkeypatch.setenv("RATE_LIMITS", "1/hour")
    monkeypatch.setenv("RATE_LIMIT_PARTITION", "header:x-team")
    monkeypatch.setenv("RATE_LIMIT_HEADERS", "legacy")
    app = RateLimitMiddleware(Spy())
    async with client_of(app) as client:
        first = await client.get("/", headers={"x-team": "a"})
        second = await client.get("/", headers={"x-team": "a"})

    assert ("1", "0") == (first.headers["x-ratelimit-limit"], first.headers["x-ratelimit-remaining"])
    assert 429 == second.status_code


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"limits": "100"}, "limits='100'"),
        ({"limits": "1/second; 5/second"}, "same window"),
        ({"strategy": "leaky"}, "strategy='leaky'"),
        ({"on_redis_error": "panic"}, "on_redis_error='panic'"),
        ({"headers": "draft-6"}, "headers='draft-6'"),
        ({"rules": [Rule("1/second", name="a"), Rule("1/second", name="a")]}, "name='a'"),
        ({"rules": [Rule("1/second"), Rule("2/second")]}, "needs a name"),
        ({"rules": ["1/second"]}, "no Rule"),
        ({"exempt": "health"}, "paths='health'"),
        ({"on_exceeded": "no"}, "on_exceeded='no'"),
        ({"partition_by": "ip"}, "partition_by='ip'"),
        ({"redis": "http://localhost"}, "REDIS_URL='http://localhost'"),
        ({"redis": object()}, "redis=builtins.object"),
    ],
)
def test_misuse_fails_at_construction(arguments: dict[str, Any], named: str) -> None:
    """One clear ConfigurationError that names the argument, before any request."""
    with pytest.raises(ConfigurationError) as raised:
        RateLimitMiddleware(Spy(), **arguments)

    assert named in str(raised.value)


async def test_lifespan_holds_the_shared_manager(redis_url: str) -> None:
    """The client stays open for the app's own teardown, the last of two apps closes it, and it opens again after."""
    settings = Settings(REDIS_URL=redis_url)
    answers: list[bool] = []

    def app(name: str) -> RateLimitMiddleware:
        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            client = await limited._manager.get_connection()
            answers.append(bool(await client.ping()))

        limited = RateLimitMiddleware(
            Starlette(routes=[Route("/", lambda request: PlainTextResponse(name))], lifespan=lifespan),
            "100/minute",
            settings=settings,
        )
        return limited

    first, second = app("first"), app("second")
    async with _running(first), _running(second):
        await statuses(first, 1)
        await statuses(second, 1)
        pool = first._manager.pool
    assert first._manager is second._manager
    assert [True, True] == answers
    assert pool is not None
    assert first._manager.pool is None
    assert [200] == await statuses(first, 1)
    await first._manager.close()


@asynccontextmanager
async def _running(app: RateLimitMiddleware) -> AsyncIterator[None]:
    started, stopping, stopped = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def receive() -> Message:
        if not started.is_set():
            return {"type": "lifespan.startup"}
        await stopping.wait()
        return {"type": "lifespan.shutdown"}

    async def send(message: Message) -> None:
        (started if message["type"] == "lifespan.startup.complete" else stopped).set()

    task = asyncio.create_task(app({"type": "lifespan", "asgi": {}, "state": {}}, receive, send))
    await started.wait()
    yield
    stopping.set()
    await stopped.wait()
    await task


async def test_inner_limit_of_another_quota_is_enforced(settings: Settings) -> None:
    """Only the very same limit is skipped: a tighter one inside still refuses."""
    inner = RateLimitMiddleware(Spy(), rules=[Rule("2/minute", name="inner")], settings=settings)
    app = RateLimitMiddleware(inner, "100/minute", settings=settings)

    assert [200, 200, 429] == await statuses(app, 3)


@pytest.mark.parametrize("inner", ["2/minute", "100/hour", lambda _conn: "2/minute"], ids=["quota", "window", "plan"])
async def test_inner_limit_of_the_same_name_is_said_to_be_one_too_many(settings: Settings, inner: Any) -> None:
    """At the first request: two limits of one name would share a counter, or at least look as if they did."""
    app = RateLimitMiddleware(RateLimitMiddleware(Spy(), inner, settings=settings), "100/minute", settings=settings)

    with pytest.raises(ConfigurationError, match=r"name='default' stands for two limits.*100/60 s"):
        await statuses(app, 1)


async def test_members_stand_in_the_order_of_the_rules(settings: Settings) -> None:
    """A rule whose cost is a callable keeps its place in the header."""
    rules = [Rule("9/minute", name="priced", cost=lambda request: 2), Rule("9/minute", name="plain")]
    app = RateLimitMiddleware(Spy(), rules=rules, settings=settings)
    start, _ = await drive(app, http_scope())

    assert b'"priced";r=7;t=60, "plain";r=8;t=60' == header(start, b"ratelimit")


async def test_errors_of_the_apps_own_network_count_as_500(settings: Settings) -> None:
    """An app whose database is down raises an OSError too: that is its failure, not the client's absence."""
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
        await drive(RateLimitMiddleware(broken, rules=rules, settings=settings), http_scope())
    app = RateLimitMiddleware(PlainTextResponse("ok"), rules=rules, settings=settings)
    with pytest.raises(BrokenPipeError):
        await app(http_scope(), _nothing, gone)

    assert [500, 200] == seen


async def _nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def test_handshake_closed_before_accept_counts_as_403(settings: Settings) -> None:
    """What the server answers such a handshake is what count_if is asked."""
    seen: list[int] = []

    async def refusing(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.close", "code": 1000})

    def count_if(status: int) -> bool:
        seen.append(status)
        return True

    app = RateLimitMiddleware(refusing, rules=[Rule("9/minute", count_if=count_if)], settings=settings)
    await drive(app, websocket_scope())

    assert [403] == seen


@pytest.mark.parametrize("client", [None, (None, 0), ("", 0)])
async def test_peers_without_an_address_share(settings: Settings, client: Any) -> None:
    """However a server says that it does not know, nothing raises and all of them are one partition."""
    trusting = settings.model_copy(update={"RATE_LIMIT_TRUSTED_PROXIES": ("10.0.0.1",)})
    app = RateLimitMiddleware(Spy(), "1/minute", settings=trusting)
    scope = http_scope(client=client, headers=[(b"x-forwarded-for", b"1.1.1.1")])
    seen = [(await drive(app, dict(scope)))[0]["status"] for _ in range(2)]

    assert [200, 429] == seen


@pytest.mark.parametrize("host", ["1.2.3.4/x}{y z", "1.2.3.4/\ud800", "localhost", "::1/64"])
async def test_peer_text_that_is_no_address_is_hashed(settings: Settings, host: str) -> None:
    """What a server believed of a header never stands in a key as it came."""
    app = RateLimitMiddleware(Spy(), "1/minute", settings=settings)
    seen = [(await drive(app, http_scope(client=(host, 1))))[0]["status"] for _ in range(2)]
    scope = http_scope(client=(host, 1))
    charges = await app._plans.of(scope).charges(scope)

    assert [200, 429] == seen
    assert host.encode("utf-8", "replace") not in charges[0].partition.key


async def test_body_then_stream_inside_a_cost_callable(settings: Settings) -> None:
    """A callable may read the body in any of Starlette's ways, one after the other."""

    async def size(request: Request) -> int:
        first = len(await request.body())
        second = sum([len(chunk) async for chunk in request.stream()])
        assert first == second
        return first

    spy = Spy()
    app = RateLimitMiddleware(spy, rules=[Rule("9/minute", cost=size)], settings=settings)
    async with client_of(app) as client:
        response = await client.post("/", content=b"12345")

    assert '"default";r=4;t=60' == response.headers["ratelimit"]
    assert [b"12345"] == spy.bodies


async def test_callable_that_forgives_a_big_body_does_not_make_it_cheap(settings: Settings) -> None:
    """What cannot be read takes all that remains, whatever the callable made of the error."""

    async def forgiving(request: Request) -> int:
        try:
            return len(await request.json())
        except Exception:
            return 1

    capped = settings.model_copy(update={"RATE_LIMIT_BODY_CAP": 10})
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


async def test_server_that_reuses_its_state_is_limited(settings: Settings) -> None:
    """A decision left in the state by an earlier request does not count for the next one."""
    app = RateLimitMiddleware(Spy(), "1/minute", settings=settings)
    state: dict[str, Any] = {}
    starts = [(await drive(app, http_scope(state=state)))[0] for _ in range(4)]

    assert [200, 429, 429, 429] == [start["status"] for start in starts]
    # Nor does a refusal: it is no outer instance that would write the fields.
    assert [b'"default";r=0;t=60'] * 4 == [header(start, b"ratelimit") for start in starts]


async def test_requests_at_once_are_apart_where_a_server_reuses_its_state(settings: Settings) -> None:
    """One that is under way is no outer instance to another: each has the fields of its own, and of no other client."""
    began, go_on = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        began.set()
        await go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    app = RateLimitMiddleware(slow, "9/minute", settings=settings)
    state: dict[str, Any] = {}
    first = asyncio.create_task(drive(app, http_scope(state=state)))
    await began.wait()
    second = asyncio.create_task(drive(app, http_scope(state=state, client=("203.0.113.8", 50_000))))
    await asyncio.sleep(0)
    go_on.set()
    starts = [sent[0] for sent in await asyncio.gather(first, second)]

    assert [b'"default";r=8;t=60'] * 2 == [header(start, b"ratelimit") for start in starts]


def test_async_count_if_is_refused() -> None:
    """It would be asked while the response goes out, and could only be true."""

    async def later(status: int) -> bool:
        return True

    with pytest.raises(ConfigurationError, match="async"):
        Rule("1/minute", count_if=later)  # type: ignore[arg-type]  # the mistake in question
