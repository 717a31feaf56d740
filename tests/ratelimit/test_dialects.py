"""Dialects: their fields and bodies as tables, and what clients of each get from a middleware and from a route."""

import itertools
import math
from typing import Any

import httpx
import jsonschema  # type: ignore[import-untyped]  # it has no types of its own
import orjson
import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import Message

from redis_asgi import (
    ConfigurationError,
    PolicyState,
    RateLimit,
    RateLimitExceeded,
    RateLimitMiddleware,
    Rule,
    Settings,
    by_header,
    by_mcp_tool,
    client_ip,
    rate_limit,
    rate_limit_responses,
)
from redis_asgi.ratelimit.answers.dialects import (
    DIALECTS,
    Refused,
    go_duration,
    reply,
    status_for,
    utc_time,
)
from redis_asgi.ratelimit.answers.rewording import rewording_in
from redis_asgi.ratelimit.limits.clock import CLOCK

from .harness import Spy, client_of, drive, header, http_scope, memory, websocket_scope

_counter = itertools.count()
OPENAI, ANTHROPIC, MCP = (DIALECTS[name] for name in ("openai", "anthropic", "mcp"))


def state(name: str, quota: int = 60, window: int = 60, *, left: int = 59, reset: float = 0.012) -> PolicyState:
    """A policy as a client stands to it."""
    return PolicyState(name, quota, window, left, reset, 0.0, False, "fixed-window")


# values


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "0s"),
        (0.0000001, "0s"),
        (0.000001, "1ms"),
        (0.012, "12ms"),
        (0.0120001, "12ms"),
        (0.012001, "13ms"),
        (0.9991, "1s"),
        (1.0, "1s"),
        (1.5, "1.5s"),
        (7.66, "7.66s"),
        (59.9999, "1m0s"),
        (60.0, "1m0s"),
        (60.052, "1m0.052s"),
        (360.0, "6m0s"),
        (3600.0, "1h0m0s"),
        (3661.5, "1h1m1.5s"),
        (86_400.0, "24h0m0s"),
        (366 * 86_400.0, "8784h0m0s"),
    ],
)
def test_durations_are_as_go_writes_them(seconds: float, expected: str) -> None:
    """Hours, minutes and seconds from the first that is not 0 on; below a second whole milliseconds."""
    assert expected == go_duration(seconds)


@given(st.integers(0, 400 * 86_400 * 1_000_000))
def test_durations_are_never_earlier_than_the_truth(us: int) -> None:
    """Read back, a duration is what it was rounded up to the millisecond."""
    text = go_duration(us / 1_000_000)
    ms = 0.0
    for unit, scale in (("ms", 1), ("h", 3_600_000), ("m", 60_000), ("s", 1000)):
        before, found, rest = text.partition(unit)
        if found and (unit != "m" or not rest.startswith("s") or before):
            ms, text = ms + float(before) * scale, rest

    assert ("", math.ceil(us / 1000)) == (text, round(ms))


@pytest.mark.parametrize(
    ("unix", "expected"),
    [
        (0.0, "1970-01-01T00:00:00Z"),
        (1_795_953_600.0, "2026-11-29T12:00:00Z"),
        (1_795_953_600.1, "2026-11-29T12:00:01Z"),
    ],
)
def test_times_are_in_utc(unix: float, expected: str) -> None:
    """RFC 3339 with a Z, rounded up to a second."""
    assert expected == utc_time(unix)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([], None),
        ([state("other"), state("tokens2"), state("tokens-per-key"), state("tokens-61s")], None),
        ([state("tokens")], "tokens"),
        ([state("tokens-60s", left=9), state("tokens-86400s", 1000, 86_400, left=8)], "tokens-86400s"),
        ([state("tokens-60s", left=9), state("tokens-86400s", 1000, 86_400, left=10)], "tokens-60s"),
        ([state("tokens-60s", left=0, reset=5.0), state("tokens-1s", 9, 1, left=0, reset=0.5)], "tokens-60s"),
    ],
)
def test_of_several_windows_the_one_with_the_least_left_is_told(
    states: list[PolicyState], expected: str | None
) -> None:
    """Of policies of one rule, and of no other, the one with the fewest units; of equals the one that is full last."""
    found = dict(OPENAI.fields(states, 0.0))
    told = next((each for each in states if each.name == expected), None)

    assert (None if told is None else b"%d" % told.quota) == found.get(b"x-ratelimit-limit-tokens")
    assert (None if told is None else b"%d" % told.remaining) == found.get(b"x-ratelimit-remaining-tokens")


def test_fields_of_openai() -> None:
    """Three of each rule called requests or tokens; the reset until the quota is full."""
    states = [state("requests"), state("tokens", 150_000, left=149_984, reset=0.006), state("input-tokens")]

    assert {
        b"x-ratelimit-limit-requests": b"60",
        b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-reset-requests": b"12ms",
        b"x-ratelimit-limit-tokens": b"150000",
        b"x-ratelimit-remaining-tokens": b"149984",
        b"x-ratelimit-reset-tokens": b"6ms",
    } == dict(OPENAI.fields(states, 0.0))


def test_fields_of_anthropic() -> None:
    """Three of each of four rules; the reset as a time."""
    found = dict(ANTHROPIC.fields([state("requests"), state("output-tokens", 8000, left=7000)], 1_795_953_600.0))

    assert {
        b"anthropic-ratelimit-requests-limit": b"60",
        b"anthropic-ratelimit-requests-remaining": b"59",
        b"anthropic-ratelimit-requests-reset": b"2026-11-29T12:00:01Z",
        b"anthropic-ratelimit-output-tokens-limit": b"8000",
        b"anthropic-ratelimit-output-tokens-remaining": b"7000",
        b"anthropic-ratelimit-output-tokens-reset": b"2026-11-29T12:00:01Z",
    } == found
    assert [] == MCP.fields([state("requests")], 0.0)


@pytest.mark.parametrize(
    ("wait", "expected"),
    [
        (0.0, {b"retry-after-ms": b"1"}),
        (0.0121, {b"retry-after-ms": b"13"}),
        (60.0, {b"retry-after-ms": b"60000"}),
        (60.001, {b"retry-after-ms": b"60001", b"x-should-retry": b"false"}),
        (None, {b"x-should-retry": b"false"}),
    ],
)
def test_clients_are_kept_from_sleeping_for_long(wait: float | None, expected: dict[bytes, bytes]) -> None:
    """A wait of more than a minute, or one without an end, is no reason to ask again."""
    assert expected == dict(OPENAI.refusal_fields(wait)) == dict(ANTHROPIC.refusal_fields(wait))
    assert [] == MCP.refusal_fields(wait)


REFUSED = Refused(429, "Rate limit exceeded: 9 per 60 s. Retry in 7 s.", "tokens", 6.2)
TEXT = "Rate limit exceeded: 9 per 60 s. Retry in 7 s. Limit: tokens."
UNDECIDED = Refused(503, "Later.", None, 1.0)
MISSING = Refused(400, "This request needs the header 'x-api-key'.")


@pytest.mark.parametrize(
    ("dialect", "refused", "expected"),
    [
        (
            "openai",
            REFUSED,
            {"error": {"message": TEXT, "type": "tokens", "param": None, "code": "rate_limit_exceeded"}},
        ),
        (
            "openai",
            UNDECIDED,
            {"error": {"message": "Later.", "type": "server_error", "param": None, "code": None}},
        ),
        (
            "openai",
            MISSING,
            {"error": {"message": MISSING.message, "type": "invalid_request_error", "param": None, "code": None}},
        ),
        ("anthropic", REFUSED, {"type": "error", "error": {"type": "rate_limit_error", "message": TEXT}}),
        ("anthropic", UNDECIDED, {"type": "error", "error": {"type": "api_error", "message": "Later."}}),
        (
            "anthropic",
            MISSING,
            {"type": "error", "error": {"type": "invalid_request_error", "message": MISSING.message}},
        ),
        (
            "mcp",
            REFUSED,
            {"jsonrpc": "2.0", "error": {"code": -32000, "message": TEXT, "data": {"retry_after": 7}}, "id": None},
        ),
        (
            "mcp",
            MISSING,
            {
                "jsonrpc": "2.0",
                "error": {"code": -32000, "message": MISSING.message, "data": {"retry_after": None}},
                "id": None,
            },
        ),
    ],
)
def test_bodies(dialect: str, refused: Refused, expected: dict[str, Any]) -> None:
    """The body of each status in each dialect."""
    assert expected == orjson.loads(DIALECTS[dialect].body(refused))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("refused", [REFUSED, UNDECIDED, MISSING])
def test_bodies_are_as_documented(dialect: Any, refused: Refused) -> None:
    """The schema that OpenAPI is given is true of each."""
    content = rate_limit_responses(dialect=dialect)[429]["content"]

    jsonschema.validate(orjson.loads(DIALECTS[dialect].body(refused)), content["application/json"]["schema"])


@given(st.one_of(st.text(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False)))
def test_an_id_is_told_as_it_came(request_id: object) -> None:
    """Text and numbers, whatever they are."""
    try:
        orjson.dumps(request_id)
    except orjson.JSONEncodeError:  # half of a surrogate pair, which no JSON in UTF-8 has
        return
    answer = orjson.loads(reply(MCP.body(REFUSED), request_id))

    assert request_id == answer["id"]
    assert TEXT == answer["error"]["message"]


@pytest.mark.parametrize("request_id", [None, True, [1], {"id": 1}])
def test_what_is_no_id_is_null(request_id: object) -> None:
    """A bool is no number, and a list no name."""
    assert orjson.loads(reply(MCP.body(REFUSED), request_id))["id"] is None


@pytest.mark.parametrize(
    ("method", "revision", "status", "expected"),
    [
        ("POST", "2025-06-18", 429, 200),
        ("POST", "2026-07-27", 503, 200),
        ("POST", "", 400, 200),
        ("POST", "latest", 429, 200),
        ("POST", "DRAFT-2026-v1", 429, 200),
        ("POST", "2026-07-28", 429, 429),
        ("POST", "2027-01-01", 503, 503),
        ("GET", "2025-06-18", 429, 429),
        ("DELETE", "", 429, 429),
    ],
)
def test_older_clients_of_mcp_keep_their_session(method: str, revision: str, status: int, expected: int) -> None:
    """A status other than 200 would end it; who does not POST waits for no JSON-RPC answer."""
    assert expected == status_for(method, revision, status)


# the argument


@pytest.mark.parametrize(
    ("dialect", "words"),
    [
        ("open-ai", ["dialect='open-ai'", "openai, anthropic, mcp", "Try 'openai'"]),
        ("", ["dialect=''", "openai, anthropic, mcp"]),
        ({}, ["dialect={}", "openai, anthropic, mcp", "/v1/*"]),
        (3, ["dialect=3", "openai, anthropic, mcp"]),
        (["openai"], ["dialect=['openai']", "mapping"]),
        ({"/v1/*": "gemini"}, ["dialect['/v1/*']='gemini'", "openai, anthropic, mcp"]),
        ({"/v1/*": None}, ["dialect['/v1/*']=None", "openai, anthropic, mcp"]),
        ({"v1": "openai"}, ["'v1'", "does not start with '/'"]),
        ({"/{id}": "openai"}, ["'/{id}'", "/*"]),
        ({3: "openai"}, ["3", "no path pattern"]),
    ],
)
def test_what_cannot_be_a_dialect_is_told(dialect: Any, words: list[str]) -> None:
    """The value, and what it could be."""
    with pytest.raises(ConfigurationError) as caught:
        RateLimitMiddleware(Spy(), "1/minute", dialect=dialect, settings=memory())

    assert [] == [word for word in words if word not in str(caught.value)]


# the middleware

RULES = [
    Rule("2/minute; 100/day", name="requests"),
    Rule("1000/hour", name="tokens", cost=300),
    Rule("5/minute", name="other", shadow=True),
]


@pytest.mark.anyio
async def test_an_admitted_request_has_the_fields_of_its_dialect(settings: Settings) -> None:
    """Beside those of `headers=`, and only of the path's dialect."""
    dialect: Any = {"/v1/messages": "anthropic", "/v1/*": "openai", "/mcp": "mcp"}
    app = RateLimitMiddleware(Spy(), rules=RULES, dialect=dialect, settings=settings)
    async with client_of(app) as client:
        found = {path: dict((await client.get(path)).headers) for path in ("/v1/chat", "/v1//messages/")}
        elsewhere = await client.get("/other")

    openai, anthropic = found.values()
    assert ("2", "1") == (openai["x-ratelimit-limit-requests"], openai["x-ratelimit-remaining-requests"])
    assert ("1000", "700") == (openai["x-ratelimit-limit-tokens"], openai["x-ratelimit-remaining-tokens"])
    assert openai["x-ratelimit-reset-requests"] in ("1m0s", "59.999s", "59.998s", "59.99s")
    assert '"tokens";r=700;t=3600' in openai["ratelimit"]
    assert [] == [name for name in openai if "anthropic" in name or name.startswith("retry-after")]
    assert ("2", "0") == (
        anthropic["anthropic-ratelimit-requests-limit"],
        anthropic["anthropic-ratelimit-requests-remaining"],
    )
    assert [] == [name for name in anthropic if name.startswith("x-ratelimit")]
    assert 429 == elsewhere.status_code
    assert "application/problem+json" == elsewhere.headers["content-type"]
    assert [] == [name for name in elsewhere.headers if name.startswith(("x-ratelimit", "anthropic"))]


@pytest.mark.anyio
@pytest.mark.parametrize(("style", "names"), [("none", 0), ("legacy", 3), ("both", 5)])
async def test_a_dialect_is_beside_any_style_of_fields(settings: Settings, style: Any, names: int) -> None:
    """`headers=` says what else is written, on admitted and refused ones."""
    rules = [Rule("1/minute", name="requests")]
    app = RateLimitMiddleware(Spy(), rules=rules, headers=style, dialect="openai", settings=settings)
    async with client_of(app) as client:
        for _ in range(3):
            answer = await client.get("/")
            theirs = [name for name in answer.headers if name.endswith("-requests")]
            ours = [name for name in answer.headers if "ratelimit" in name and name not in theirs]
            assert (3, names) == (len(theirs), len(ours))


@pytest.mark.anyio
async def test_fields_of_a_provider_behind_the_app_stay(settings: Settings) -> None:
    """An app that passes on what its upstream said keeps those."""
    upstream = Spy(headers=[(b"x-ratelimit-remaining-requests", b"7")])
    app = RateLimitMiddleware(upstream, rules=[Rule("9/minute", name="requests")], dialect="openai", settings=settings)
    async with client_of(app) as client:
        answer = await client.get("/")

    assert ["7"] == answer.headers.get_list("x-ratelimit-remaining-requests")
    assert "9" == answer.headers["x-ratelimit-limit-requests"]


@pytest.mark.anyio
async def test_remembered_refusals_are_kept_for_each_dialect(settings: Settings, redis_url: str) -> None:
    """One counter refuses on paths of several dialects: each gets its own, in whatever order they ask."""
    settings = Settings(REDIS_URL=redis_url, REDIS_KEY_PREFIX=settings.REDIS_KEY_PREFIX)
    dialect: Any = {"/a": "anthropic", "/o": "openai", "/m": "mcp"}
    app = RateLimitMiddleware(Spy(), rules=[Rule("1/minute", name="requests")], dialect=dialect, settings=settings)
    async with client_of(app) as client:
        await client.get("/")
        answers = [await client.get(path) for path in ("/o", "/a", "/", "/m", "/o", "/o", "/a", "/a", "/", "/m")]

    kinds = {"/o": {"error"}, "/a": {"type", "error"}, "/m": {"jsonrpc", "error", "id"}}
    for answer in answers:
        path = answer.request.url.path
        assert 429 == answer.status_code
        assert kinds.get(path, {"type", "title", "status", "detail", "violated-policies"}) == set(answer.json())
        assert path == "/" or "application/json" == answer.headers["content-type"]
        assert str(len(answer.content)) == answer.headers["content-length"]
        assert ("retry-after-ms" in answer.headers) is (path in ("/o", "/a"))
        assert 59 <= int(answer.headers["retry-after"]) <= 60


@pytest.mark.anyio
async def test_a_remembered_refusal_counts_down(settings: Settings, redis_url: str, monkeypatch: Any) -> None:
    """What says milliseconds is not kept for a whole second."""
    settings = Settings(REDIS_URL=redis_url, REDIS_KEY_PREFIX=settings.REDIS_KEY_PREFIX)
    app = RateLimitMiddleware(Spy(), rules=[Rule("1/minute", name="requests")], dialect="openai", settings=settings)
    start = CLOCK.monotonic()
    async with client_of(app) as client:
        await client.get("/")
        await client.get("/")
        said = []
        for later in (0.3, 0.35, 0.6):
            monkeypatch.setattr(CLOCK, "monotonic", lambda later=later: start + later)
            said.append(int((await client.get("/")).headers["retry-after-ms"]))

    assert (0, 300) == (said[0] - said[1], said[0] - said[2])


@pytest.mark.anyio
async def test_a_wait_of_hours_is_no_reason_to_retry(settings: Settings) -> None:
    """Nor is a cost that never fits."""
    rules = [
        Rule("2/day", name="requests", paths="/day"),
        Rule("2/day", name="tokens", paths="/big", cost=lambda conn: 3),
    ]
    app = RateLimitMiddleware(Spy(), rules=rules, dialect="openai", settings=settings)
    async with client_of(app) as client:
        for _ in range(2):
            await client.get("/day")
        day, big = await client.get("/day"), await client.get("/big")

    assert ("false", "false") == (day.headers["x-should-retry"], big.headers["x-should-retry"])
    assert "requests" == day.json()["error"]["type"]
    assert "retry-after-ms" not in big.headers
    assert "never fit" in big.json()["error"]["message"]
    assert "tokens" == big.json()["error"]["type"]


@pytest.mark.anyio
async def test_the_rule_of_several_windows_is_named(settings: Settings) -> None:
    """The type is the rule's name, without the window."""
    app = RateLimitMiddleware(
        Spy(), rules=[Rule("1/minute; 5/day", name="tokens")], dialect="openai", settings=settings
    )
    async with client_of(app) as client:
        await client.get("/")
        error = (await client.get("/")).json()["error"]

    assert "tokens" == error["type"]
    assert error["message"].startswith("Rate limit exceeded: 1 per 60 s. Retry in ")
    assert error["message"].endswith("Limit: tokens.")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("dialect", "kinds"),
    [("openai", ("server_error", "invalid_request_error")), ("anthropic", ("api_error", "invalid_request_error"))],
)
async def test_what_is_no_429_is_told_in_the_dialect_too(dialect: Any, kinds: tuple[str, str]) -> None:
    """503 while nobody can decide, 400 without an identity."""
    gone = Settings(REDIS_URL="redis://127.0.0.1:1", RATE_LIMIT_MISSING_IDENTITY="refuse")
    app = RateLimitMiddleware(
        Spy(),
        rules=[Rule("1/minute", name="requests", partition_by=by_header("x-api-key"))],
        on_redis_error="closed",
        dialect=dialect,
        settings=gone,
    )
    async with client_of(app) as client:
        unavailable = await client.get("/", headers={"x-api-key": "secret-key"})
        missing = await client.get("/")

    assert (503, 400) == (unavailable.status_code, missing.status_code)
    assert kinds == (unavailable.json()["error"]["type"], missing.json()["error"]["type"])
    assert ("1", "1000") == (unavailable.headers["retry-after"], unavailable.headers["retry-after-ms"])
    assert "secret-key" not in unavailable.text
    assert "x-api-key" in missing.json()["error"]["message"]
    for answer in (unavailable, missing):
        assert "application/json" == answer.headers["content-type"]
        assert "no-store" == answer.headers["cache-control"]


@pytest.mark.anyio
async def test_on_exceeded_still_wins(settings: Settings) -> None:
    """What the user answers is not touched, but for the fields."""
    app = RateLimitMiddleware(
        Spy(),
        rules=[Rule("1/minute", name="requests")],
        dialect={"/mcp": "mcp", "/*": "openai"},
        on_exceeded=lambda conn, decision: PlainTextResponse("mine", 420),
        settings=settings,
    )
    async with client_of(app) as client:
        await client.get("/")
        answers = [await client.get("/"), await client.post("/mcp", json={"id": 1})]

    assert [(420, "mine"), (420, "mine")] == [(answer.status_code, answer.text) for answer in answers]
    assert "0" == answers[0].headers["x-ratelimit-remaining-requests"]
    assert "retry-after-ms" in answers[0].headers


@pytest.mark.anyio
async def test_no_body_for_head(settings: Settings) -> None:
    """The length is that of the body a GET would get."""
    app = RateLimitMiddleware(Spy(), rules=[Rule("1/minute", name="requests")], dialect="openai", settings=settings)
    async with client_of(app) as client:
        await client.get("/")
        head, get = await client.head("/"), await client.get("/")

    assert (429, b"") == (head.status_code, head.content)
    assert get.headers["content-length"] == head.headers["content-length"]


@pytest.mark.anyio
async def test_websockets_have_no_dialect(settings: Settings) -> None:
    """A handshake is refused with a problem document, and carries the standard fields alone."""
    app = RateLimitMiddleware(Spy(), rules=[Rule("1/minute", name="requests")], dialect="openai", settings=settings)
    scope: Any = {"extensions": {"websocket.http.response": {}}}
    await drive(app, http_scope())
    sent = await drive(app, websocket_scope(**scope))

    assert b"application/problem+json" == header(sent[0], b"content-type")
    assert [] == [name for name, _ in sent[0]["headers"] if name.endswith((b"-requests", b"-ms"))]


@pytest.mark.anyio
async def test_one_within_another(settings: Settings) -> None:
    """The inner one's dialect holds where the outer has none, the outer one's where both have one."""
    outer_rules, inner_rules = [Rule("9/minute", name="all")], [Rule("1/minute", name="requests")]
    cases: Any = ((None, "openai", "requests"), ("anthropic", "openai", "rate_limit_error"))
    for outer, inner, kind in cases:
        own = memory(REDIS_KEY_PREFIX=f"d{next(_counter)}:")
        app = RateLimitMiddleware(
            RateLimitMiddleware(Spy(), rules=inner_rules, dialect=inner, settings=own),
            rules=outer_rules,
            dialect=outer,
            settings=own,
        )
        async with client_of(app) as client:
            admitted, refused = await client.get("/"), await client.get("/")

        assert kind == refused.json()["error"]["type"]
        name = "x-ratelimit-remaining-requests" if outer is None else "anthropic-ratelimit-requests-remaining"
        assert ["0"] == admitted.headers.get_list(name) == refused.headers.get_list(name)
        assert '"all";r=8' in admitted.headers["ratelimit"]
        assert ["no-store"] == refused.headers.get_list("cache-control")


# MCP

CALL = {"jsonrpc": "2.0", "id": "call-1", "method": "tools/call", "params": {"name": "search"}}


def tools(settings: Settings, spy: Spy, **options: Any) -> RateLimitMiddleware:
    """An MCP server behind a limit of one call a minute."""
    rules = [Rule("1/minute", name="calls", paths="/mcp")]
    return RateLimitMiddleware(spy, rules=rules, dialect={"/mcp": "mcp"}, settings=settings, **options)


@pytest.mark.anyio
@pytest.mark.parametrize(("revision", "status"), [("2026-07-28", 429), ("2025-06-18", 200), (None, 200)])
async def test_a_tool_call_is_refused_by_its_id(settings: Settings, revision: str | None, status: int) -> None:
    """A JSON-RPC error that the client takes for the answer to its call, with the status that it can read."""
    spy = Spy()
    headers = {} if revision is None else {"mcp-protocol-version": revision}
    async with client_of(tools(settings, spy)) as client:
        await client.post("/mcp", json=CALL)
        refused = await client.post("/mcp", json=CALL, headers=headers)

    assert (status, "application/json") == (refused.status_code, refused.headers["content-type"])
    assert str(len(refused.content)) == refused.headers["content-length"]
    answer = refused.json()
    assert ("2.0", "call-1", -32000) == (answer["jsonrpc"], answer["id"], answer["error"]["code"])
    assert int(refused.headers["retry-after"]) == answer["error"]["data"]["retry_after"]
    assert "Limit: calls." in answer["error"]["message"]
    assert 1 == spy.calls


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"id":7}', 7),
        (b'{"id":7.5}', 7.5),
        (b'{"id":"\\u00e4"}', "ä"),
        (b'{"id":null}', None),
        (b'{"id":true}', None),
        (b'{"id":{"a":1}}', None),
        (b'{"method":"notifications/initialized"}', None),
        (b'[{"id":7}]', None),
        (b'{"id":7', None),
        (b"", None),
        (b"\xff\xfe", None),
        (b'{"id":' + b"[" * 200_000, None),
        (b'{"id":1e999}', None),
        (b'{"id":7,"params":"' + b"x" * 70_000 + b'"}', None),
    ],
)
async def test_an_id_that_cannot_be_read_is_null(content: bytes, expected: object) -> None:
    """Whatever stands in a body, it is bounded, and never a 500."""
    settings = memory(REDIS_KEY_PREFIX=f"d{next(_counter)}:", RATE_LIMIT_BODY_CAP=65_536)
    async with client_of(tools(settings, Spy())) as client:
        await client.post("/mcp", content=b"{}")
        refused = await client.post("/mcp", content=content)

    assert (200, expected) == (refused.status_code, refused.json()["id"])


@pytest.mark.anyio
@pytest.mark.parametrize(("coding", "expected"), [("identity", 7), ("Identity", 7), ("gzip", None)])
async def test_an_id_is_read_unless_the_body_is_encoded(settings: Settings, coding: str, expected: object) -> None:
    """``identity`` says that it is not."""
    async with client_of(tools(settings, Spy())) as client:
        await client.post("/mcp", content=b"{}")
        refused = await client.post("/mcp", content=b'{"id":7}', headers={"content-encoding": coding})

    assert expected == refused.json()["id"]


@pytest.mark.anyio
async def test_a_body_is_read_at_a_refusal_only(settings: Settings) -> None:
    """On a path of MCP, that is, and by POST: elsewhere nobody waits for it."""
    app = RateLimitMiddleware(Spy(), "1/minute", dialect={"/mcp": "mcp", "/v1/*": "openai"}, settings=settings)
    asked: list[str] = []

    async def receive() -> Message:
        asked.append("read")
        return {"type": "http.request", "body": b'{"id":1}', "more_body": False}

    await drive(app, http_scope())
    for method, path, reads in (("POST", "/v1/chat", 0), ("POST", "/", 0), ("GET", "/mcp", 0), ("POST", "/mcp", 1)):
        asked.clear()
        sent: list[Message] = []

        async def send(message: Message, sent: list[Message] = sent) -> None:
            sent.append(message)

        await app(http_scope(method=method, path=path), receive, send)
        assert (reads, 2) == (len(asked), len(sent)), path
    assert 1 == orjson.loads(sent[1]["body"])["id"]


@pytest.mark.anyio
async def test_a_client_that_leaves_in_its_body_gets_no_id(settings: Settings) -> None:
    """The refusal goes nowhere then, but nothing breaks."""
    app = tools(settings, Spy())
    await drive(app, http_scope(method="POST", path="/mcp"))
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(http_scope(method="POST", path="/mcp"), receive, send)

    assert orjson.loads(sent[1]["body"])["id"] is None


@pytest.mark.anyio
async def test_a_body_that_a_rule_has_read_has_its_id(settings: Settings) -> None:
    """Rules by the tool read it first; it is there for the answer too."""
    rules = [Rule("1/minute", name="tools", paths="/mcp", partition_by=by_mcp_tool("search"))]
    spy = Spy()
    app = RateLimitMiddleware(spy, rules=rules, dialect={"/mcp": "mcp"}, settings=settings)
    async with client_of(app) as client:
        for _ in range(2):
            answer = await client.post("/mcp", json=CALL)

    assert "call-1" == answer.json()["id"]
    assert 1 == spy.calls


@pytest.mark.anyio
@pytest.mark.parametrize("status", [400, 503])
async def test_a_body_is_received_once_whatever_is_answered(status: int) -> None:
    """A server gives it once: who asks again waits until the client has left."""
    settings = memory(RATE_LIMIT_MISSING_IDENTITY="refuse")
    if status == 503:
        settings = Settings(REDIS_URL="redis://127.0.0.1:1", RATE_LIMIT_ON_REDIS_ERROR="closed")
    by: list[Any] = [by_mcp_tool(["search"]), by_header("x-api-key") if status == 400 else client_ip]
    app = RateLimitMiddleware(Spy(), rules=[Rule("9/minute", partition_by=by)], dialect="mcp", settings=settings)
    messages: list[Message] = [{"type": "http.request", "body": orjson.dumps(CALL), "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"mcp-protocol-version", b"2026-07-28")]
    await app(http_scope(method="POST", path="/mcp", headers=headers), receive, send)

    assert (status, "call-1") == (sent[0]["status"], orjson.loads(sent[1]["body"])["id"])


# limits of routes

ELSEWHERE = [Rule("9/minute", name="elsewhere", paths="/elsewhere")]


def fastapi_app(settings: Settings, dialect: Any, **limit: Any) -> FastAPI:
    """One endpoint with a limit of its own, below a middleware without rules."""
    app = FastAPI()
    app.add_middleware(RateLimitMiddleware, rules=ELSEWHERE, dialect=dialect, settings=settings)

    @app.post("/v1/chat", dependencies=[Depends(RateLimit("1/minute", name="requests", **limit))])
    async def chat(request: Request) -> Any:
        return await request.json()

    return app


def starlette_app(settings: Settings, dialect: Any, **limit: Any) -> Starlette:
    """The same, by the decorator."""

    @rate_limit("1/minute", name="requests", **limit)
    async def chat(request: Request) -> JSONResponse:
        return JSONResponse(await request.json())

    app = Starlette(routes=[Route("/v1/chat", chat, methods=["POST"])])
    app.add_middleware(RateLimitMiddleware, rules=ELSEWHERE, dialect=dialect, settings=settings)
    return app


@pytest.mark.anyio
@pytest.mark.parametrize("make", [fastapi_app, starlette_app])
async def test_a_route_answers_in_the_dialect_outside(settings: Settings, make: Any) -> None:
    """Its refusal has the fields and the body of the middleware's dialect, whichever framework tells it."""
    async with client_of(make(settings, "openai")) as client:
        admitted = await client.post("/v1/chat", json={})
        refused = await client.post("/v1/chat", json={})

    assert "0" == admitted.headers["x-ratelimit-remaining-requests"]
    assert (429, "application/json") == (refused.status_code, refused.headers["content-type"])
    assert ["0"] == refused.headers.get_list("x-ratelimit-remaining-requests")
    assert ["application/json"] == refused.headers.get_list("content-type")
    assert "retry-after-ms" in refused.headers
    assert ("requests", "rate_limit_exceeded") == (refused.json()["error"]["type"], refused.json()["error"]["code"])
    assert str(len(refused.content)) == refused.headers["content-length"]


@pytest.mark.anyio
@pytest.mark.parametrize("make", [fastapi_app, starlette_app])
async def test_a_route_of_mcp_names_the_request(settings: Settings, make: Any) -> None:
    """With the status that the client can read."""
    async with client_of(make(settings, "mcp")) as client:
        await client.post("/v1/chat", json=CALL)
        older = await client.post("/v1/chat", json=CALL)
        newer = await client.post("/v1/chat", json=CALL, headers={"mcp-protocol-version": "2026-07-28"})

    assert (200, 429) == (older.status_code, newer.status_code)
    assert ("call-1", "call-1") == (older.json()["id"], newer.json()["id"])


@pytest.mark.anyio
@pytest.mark.parametrize("make", [fastapi_app, starlette_app])
async def test_a_route_that_cannot_be_decided_says_so(make: Any) -> None:
    """503 and 400 of a route, in the dialect too."""
    gone = Settings(REDIS_URL="redis://127.0.0.1:1", RATE_LIMIT_MISSING_IDENTITY="refuse")
    app = make(gone, "anthropic", on_redis_error="closed", partition_by=by_header("x-api-key"))
    async with client_of(app) as client:
        unavailable = await client.post("/v1/chat", json={}, headers={"x-api-key": "k"})
        missing = await client.post("/v1/chat", json={})

    assert (503, "api_error") == (unavailable.status_code, unavailable.json()["error"]["type"])
    assert "1000" == unavailable.headers["retry-after-ms"]
    assert (400, "invalid_request_error") == (missing.status_code, missing.json()["error"]["type"])


@pytest.mark.anyio
async def test_the_apps_own_handler_wins(settings: Settings) -> None:
    """What it answers is not touched, in one part or in several."""
    app = fastapi_app(settings, "openai")
    app.add_exception_handler(RateLimitExceeded, lambda request, error: JSONResponse({"mine": "x" * 5000}, 429))
    async with client_of(app) as client:
        await client.post("/v1/chat", json={})
        refused = await client.post("/v1/chat", json={})

    assert {"mine"} == set(refused.json())


@pytest.mark.anyio
async def test_a_route_without_a_dialect_is_as_it_was(settings: Settings) -> None:
    """Elsewhere the framework's own body stays."""
    async with client_of(fastapi_app(settings, {"/v2/*": "openai"})) as client:
        await client.post("/v1/chat", json={})
        refused = await client.post("/v1/chat", json={})

    assert {"detail"} == set(refused.json())
    assert [] == [name for name in refused.headers if name.endswith(("-requests", "-ms"))]


@pytest.mark.anyio
async def test_a_refusal_that_the_app_swallows_is_no_answer(settings: Settings) -> None:
    """The app may catch what a limit raises, and answer something else with the same status, or another one."""

    @rate_limit("1/minute", name="requests")
    async def limited(request: Request) -> JSONResponse:
        return JSONResponse({})

    async def endpoint(request: Request) -> JSONResponse:
        try:
            return await limited(request)
        except HTTPException as error:
            status = int(request.query_params["status"])
            return JSONResponse({"detail": f"not {error.detail}"}, status)

    app = Starlette(routes=[Mount("/v1", routes=[Route("/chat", endpoint)])])
    limits = RateLimitMiddleware(app, rules=ELSEWHERE, dialect="openai", settings=settings)
    async with client_of(limits) as client:
        await client.get("/v1/chat?status=200")
        found = [await client.get("/v1/chat", params={"status": status}) for status in (200, 429)]

    assert [200, 429] == [answer.status_code for answer in found]
    assert all(answer.json()["detail"].startswith("not ") for answer in found)


@pytest.mark.anyio
@pytest.mark.parametrize("chunks", [1, 3, 40])
async def test_a_body_in_parts_is_told_apart_too(settings: Settings, chunks: int) -> None:
    """Some middleware may cut a body: the framework's is known at its end, any other passes whole."""
    detail = "d" * 90

    async def app(scope: Any, receive: Any, send: Any) -> None:
        rewording = rewording_in(scope)
        assert rewording is not None
        rewording.offer(Refused(429, detail, "requests", 1.0), Request(scope), None)
        body = orjson.dumps({"detail": detail}) if chunks < 40 else b"y" * 2000
        size = -(-len(body) // chunks)
        await send({"type": "http.response.start", "status": 429, "headers": []})
        for at in range(0, len(body), size):
            await send({"type": "http.response.body", "body": body[at : at + size], "more_body": True})
        await send({"type": "http.response.body"})

    async with client_of(RateLimitMiddleware(app, rules=ELSEWHERE, dialect="openai", settings=settings)) as client:
        answer: httpx.Response = await client.get("/")

    assert (b"y" * 2000 == answer.content) is (chunks == 40)
    assert chunks == 40 or "requests" == answer.json()["error"]["type"]
