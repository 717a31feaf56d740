"""The middleware: what is refused, what the answer says, how it is built and where it stands."""

import logging
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import WebSocketRoute
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from redis_asgi import ConfigurationError, Decision, RateLimitMiddleware, Rule, Settings

from .harness import Spy, client_of, drive, header, http_scope, memory, statuses, websocket_scope

pytestmark = pytest.mark.anyio


async def test_refuses_what_is_over_quota(memory_settings: Settings) -> None:
    """The quota is admitted, the next request is not, and never reaches the app."""
    spy = Spy()
    app = RateLimitMiddleware(spy, "3/minute", settings=memory_settings)

    assert [200, 200, 200, 429, 429] == await statuses(app, 5)
    assert 3 == spy.calls


async def test_refusal_explains_itself(memory_settings: Settings) -> None:
    """A 429 says how long to wait, is not cacheable, and carries the draft's problem document."""
    app = RateLimitMiddleware(Spy(), "1/minute", settings=memory_settings)
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


async def test_admitted_response_says_how_the_client_stands(memory_settings: Settings) -> None:
    """An admitted response has the draft's fields and never Retry-After."""
    app = RateLimitMiddleware(Spy(), "5/second; 100/minute", settings=memory_settings)
    async with client_of(app) as client:
        response = await client.get("/")

    assert '"default-1s";q=5;w=1, "default-60s";q=100;w=60' == response.headers["ratelimit-policy"]
    assert '"default-1s";r=4;t=1, "default-60s";r=99;t=60' == response.headers["ratelimit"]
    assert "retry-after" not in response.headers


async def test_all_or_none(memory_settings: Settings) -> None:
    """A request refused by one limit is charged under no other."""
    app = RateLimitMiddleware(Spy(), rules=[Rule("2/hour; 10/day", name="r")], settings=memory_settings)
    async with client_of(app) as client:
        for _ in range(6):
            last = await client.get("/")

    assert '"r-3600s";r=0;t=3600, "r-86400s";r=8;t=86400' == last.headers["ratelimit"]


async def test_head_refusal_has_no_body(memory_settings: Settings) -> None:
    """HEAD counts as GET does, and its refusal has no body."""
    app = RateLimitMiddleware(Spy(), rules=[Rule("1/minute", methods="GET")], settings=memory_settings)
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
async def test_header_styles(memory_settings: Settings, style: Any, present: set[str], absent: set[str]) -> None:
    """Each style sends its own fields, on admitted and refused responses alike."""
    app = RateLimitMiddleware(Spy(), "1/minute", headers=style, settings=memory_settings)
    async with client_of(app) as client:
        for _ in range(2):
            names = set((await client.get("/")).headers)

            assert present <= names
            assert not absent & names


async def test_fields_of_the_app_stay(memory_settings: Settings) -> None:
    """A field the app has set itself is neither replaced nor doubled."""
    app = RateLimitMiddleware(Spy(headers=[(b"ratelimit", b'"app";r=1;t=1')]), "5/minute", settings=memory_settings)
    start, _ = await drive(app, http_scope())

    assert [b'"app";r=1;t=1'] == [value for name, value in start["headers"] if name == b"ratelimit"]
    assert b'"default";q=5;w=60' == header(start, b"ratelimit-policy")


async def test_redirects_carry_no_fields(memory_settings: Settings) -> None:
    """A redirect's target is counted by itself."""
    app = RateLimitMiddleware(RedirectResponse("/x"), "5/minute", settings=memory_settings)
    start, _ = await drive(app, http_scope())

    assert 307 == start["status"]
    assert header(start, b"ratelimit") is None


async def test_every_matching_rule_applies(memory_settings: Settings) -> None:
    """There is no first match: the narrow rule and the wide one both count."""
    rules = [Rule("2/minute", name="login", paths="/login", methods="POST"), Rule("4/minute", name="all")]
    app = RateLimitMiddleware(Spy(), rules=rules, settings=memory_settings)

    assert [200, 200, 429] == await statuses(app, 3, "/login", method="POST")
    assert [200, 200, 429] == await statuses(app, 3, "/other")


async def test_unmatched_request_is_not_limited(memory_settings: Settings) -> None:
    """With rules alone, a path that matches none has no limit and no fields."""
    app = RateLimitMiddleware(Spy(), rules=[Rule("1/minute", paths="/api/*")], settings=memory_settings)
    async with client_of(app) as client:
        responses = [await client.get("/free") for _ in range(3)]

    assert [200] * 3 == [response.status_code for response in responses]
    assert "ratelimit" not in responses[0].headers
    assert [200, 429] == await statuses(app, 2, "/api")


async def test_exempt_paths_and_callable(memory_settings: Settings) -> None:
    """Exempt requests are not counted: by pattern, by the environment's patterns, or by a callable."""
    by_path = RateLimitMiddleware(Spy(), "1/minute", exempt=["/health/*"], settings=memory_settings)
    by_env = RateLimitMiddleware(
        Spy(), "1/minute", settings=memory_settings.model_copy(update={"RATE_LIMIT_EXEMPT_PATHS": ("/h*",)})
    )

    async def internal(conn: HTTPConnection) -> bool:
        return conn.headers.get("x-internal") == "yes"

    by_callable = RateLimitMiddleware(Spy(), "1/minute", exempt=internal, settings=memory_settings)

    assert [200] * 3 == await statuses(by_path, 3, "/health/live")
    assert [200] * 3 == await statuses(by_env, 3, "/health")
    assert [200] * 3 == await statuses(by_callable, 3, headers={"x-internal": "yes"})
    assert [200, 429] == await statuses(by_callable, 2)


async def test_preflights_are_the_browsers(memory_settings: Settings) -> None:
    """A CORS preflight is counted only by a rule that names OPTIONS;
    another OPTIONS request is counted.
    """
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    app = RateLimitMiddleware(Spy(), "1/minute", settings=memory_settings)
    naming = RateLimitMiddleware(Spy(), rules=[Rule("1/minute", name="o", methods="OPTIONS")], settings=memory_settings)

    assert [200] * 3 == await statuses(app, 3, method="OPTIONS", headers=preflight)
    assert [200, 429] == await statuses(app, 2, method="OPTIONS")
    assert [200, 429] == await statuses(naming, 2, method="OPTIONS", headers=preflight)


async def test_shadow_rule_only_watches(memory_settings: Settings) -> None:
    """A shadow policy never refuses and is in no header, but the decision shows it."""
    seen: list[Decision] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["state"]["rate_limit"])
        await PlainTextResponse("ok")(scope, receive, send)

    rules = [Rule("1/minute", name="new", shadow=True), Rule("10/minute", name="old")]
    limited = RateLimitMiddleware(app, rules=rules, settings=memory_settings)

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


async def test_on_exceeded_may_answer(memory_settings: Settings) -> None:
    """The user's response replaces the 429 and gets its fields; None leaves it; async works."""

    async def answer(conn: HTTPConnection, decision: Decision) -> Response | None:
        assert not decision.allowed
        return JSONResponse({"error": "slow down"}, 420) if "x-json" in conn.headers else None

    app = RateLimitMiddleware(Spy(), "1/minute", on_exceeded=answer, settings=memory_settings)
    async with client_of(app) as client:
        await client.get("/")
        own = await client.get("/", headers={"x-json": "1"})
        default = await client.get("/")

    assert (420, {"error": "slow down"}) == (own.status_code, own.json())
    assert {"retry-after", "ratelimit"} <= set(own.headers)
    assert 429 == default.status_code


async def test_websocket_handshakes(memory_settings: Settings) -> None:
    """An admitted handshake carries the fields on accept;
    a refused one is a 429, or a close with 1008.
    """

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    app = RateLimitMiddleware(Starlette(routes=[WebSocketRoute("/", endpoint)]), "1/minute", settings=memory_settings)
    connect: Message = {"type": "websocket.connect"}
    admitted = await drive(app, websocket_scope(), connect)
    answered = await drive(app, websocket_scope(extensions={"websocket.http.response": {}}), connect)
    closed = await drive(app, websocket_scope(), connect)

    assert ["websocket.accept", "websocket.close"] == [message["type"] for message in admitted]
    assert b'"default";r=0;t=60' == header(admitted[0], b"ratelimit")
    assert ["websocket.http.response.start", "websocket.http.response.body"] == [m["type"] for m in answered]
    assert 429 == answered[0]["status"]
    assert [{"type": "websocket.close", "code": 1008, "reason": ""}] == closed


async def test_a_handshake_is_one_whatever_else_its_scope_says(memory_settings: Settings) -> None:
    """A server that gives a handshake its method makes it no request, and no request one."""
    app = RateLimitMiddleware(Spy(), rules=[Rule("1/minute", methods="GET", paths="/a")], settings=memory_settings)
    handshake = websocket_scope(path="/a", method="GET")
    plans = [app._plans.of(scope) for scope in (handshake, http_scope(path="/a"), handshake)]

    assert plans[0] is plans[2] is not plans[1]


async def test_likely_misconfigurations_are_said_once(
    memory_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """A forwarding header from a stranger, and no client address at all,
    are logged once each, with a fix.
    """
    app = RateLimitMiddleware(Spy(), "100/minute", settings=memory_settings)
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
        ({"exempt": "health"}, "exempt='health'"),
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


def test_async_count_if_is_refused() -> None:
    """It would be asked while the response goes out, and could only be true."""

    async def later(status: int) -> bool:
        return True

    with pytest.raises(ConfigurationError, match="async"):
        Rule("1/minute", count_if=later)  # type: ignore[arg-type]  # the mistake in question
