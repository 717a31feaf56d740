"""Answers of the middleware in the dialects of models' providers."""

from typing import Any

import pytest
from starlette.responses import PlainTextResponse

from redis_asgi import (
    RateLimitMiddleware,
    Rule,
    Settings,
    by_header,
)
from redis_asgi.ratelimit.limits.clock import CLOCK

from .harness import Spy, client_of, drive, header, http_scope, memory, own_prefix, websocket_scope

RULES = [
    Rule("2/minute; 100/day", name="requests"),
    Rule("1000/hour", name="tokens", cost=300),
    Rule("5/minute", name="other", shadow=True),
]


@pytest.mark.anyio
async def test_an_admitted_request_has_the_fields_of_its_dialect(memory_settings: Settings) -> None:
    """Beside those of `headers=`, and only of the path's dialect."""
    dialect: Any = {"/v1/messages": "anthropic", "/v1/*": "openai", "/mcp": "mcp"}
    app = RateLimitMiddleware(Spy(), rules=RULES, dialect=dialect, settings=memory_settings)
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
async def test_a_dialect_is_beside_any_style_of_fields(memory_settings: Settings, style: Any, names: int) -> None:
    """`headers=` says what else is written, on admitted and refused ones."""
    rules = [Rule("1/minute", name="requests")]
    app = RateLimitMiddleware(Spy(), rules=rules, headers=style, dialect="openai", settings=memory_settings)
    async with client_of(app) as client:
        for _ in range(3):
            answer = await client.get("/")
            theirs = [name for name in answer.headers if name.endswith("-requests")]
            ours = [name for name in answer.headers if "ratelimit" in name and name not in theirs]
            assert (3, names) == (len(theirs), len(ours))


@pytest.mark.anyio
async def test_fields_of_a_provider_behind_the_app_stay(memory_settings: Settings) -> None:
    """An app that passes on what its upstream said keeps those."""
    upstream = Spy(headers=[(b"x-ratelimit-remaining-requests", b"7")])
    app = RateLimitMiddleware(
        upstream, rules=[Rule("9/minute", name="requests")], dialect="openai", settings=memory_settings
    )
    async with client_of(app) as client:
        answer = await client.get("/")

    assert ["7"] == answer.headers.get_list("x-ratelimit-remaining-requests")
    assert "9" == answer.headers["x-ratelimit-limit-requests"]


@pytest.mark.anyio
async def test_remembered_refusals_are_kept_for_each_dialect(memory_settings: Settings, redis_url: str) -> None:
    """One counter refuses on paths of several dialects:
    each gets its own, in whatever order they ask.
    """
    settings = Settings(REDIS_URL=redis_url, REDIS_KEY_PREFIX=memory_settings.REDIS_KEY_PREFIX)
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
async def test_a_remembered_refusal_counts_down(memory_settings: Settings, redis_url: str, monkeypatch: Any) -> None:
    """What says milliseconds is not kept for a whole second."""
    settings = Settings(REDIS_URL=redis_url, REDIS_KEY_PREFIX=memory_settings.REDIS_KEY_PREFIX)
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
async def test_a_wait_of_hours_is_no_reason_to_retry(memory_settings: Settings) -> None:
    """Nor is a cost that never fits."""
    rules = [
        Rule("2/day", name="requests", paths="/day"),
        Rule("2/day", name="tokens", paths="/big", cost=lambda conn: 3),
    ]
    app = RateLimitMiddleware(Spy(), rules=rules, dialect="openai", settings=memory_settings)
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
async def test_the_rule_of_several_windows_is_named(memory_settings: Settings) -> None:
    """The type is the rule's name, without the window."""
    app = RateLimitMiddleware(
        Spy(), rules=[Rule("1/minute; 5/day", name="tokens")], dialect="openai", settings=memory_settings
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
async def test_on_exceeded_still_wins(memory_settings: Settings) -> None:
    """What the user answers is not touched, but for the fields."""
    app = RateLimitMiddleware(
        Spy(),
        rules=[Rule("1/minute", name="requests")],
        dialect={"/mcp": "mcp", "/*": "openai"},
        on_exceeded=lambda conn, decision: PlainTextResponse("mine", 420),
        settings=memory_settings,
    )
    async with client_of(app) as client:
        await client.get("/")
        answers = [await client.get("/"), await client.post("/mcp", json={"id": 1})]

    assert [(420, "mine"), (420, "mine")] == [(answer.status_code, answer.text) for answer in answers]
    assert "0" == answers[0].headers["x-ratelimit-remaining-requests"]
    assert "retry-after-ms" in answers[0].headers


@pytest.mark.anyio
async def test_no_body_for_head(memory_settings: Settings) -> None:
    """The length is that of the body a GET would get."""
    app = RateLimitMiddleware(
        Spy(), rules=[Rule("1/minute", name="requests")], dialect="openai", settings=memory_settings
    )
    async with client_of(app) as client:
        await client.get("/")
        head, get = await client.head("/"), await client.get("/")

    assert (429, b"") == (head.status_code, head.content)
    assert get.headers["content-length"] == head.headers["content-length"]


@pytest.mark.anyio
async def test_websockets_have_no_dialect(memory_settings: Settings) -> None:
    """A handshake is refused with a problem document, and carries the standard fields alone."""
    app = RateLimitMiddleware(
        Spy(), rules=[Rule("1/minute", name="requests")], dialect="openai", settings=memory_settings
    )
    scope: Any = {"extensions": {"websocket.http.response": {}}}
    await drive(app, http_scope())
    sent = await drive(app, websocket_scope(**scope))

    assert b"application/problem+json" == header(sent[0], b"content-type")
    assert [] == [name for name, _ in sent[0]["headers"] if name.endswith((b"-requests", b"-ms"))]


@pytest.mark.anyio
async def test_one_within_another(memory_settings: Settings) -> None:
    """The inner one's dialect holds where the outer has none, the outer one's where both have one."""
    outer_rules, inner_rules = [Rule("9/minute", name="all")], [Rule("1/minute", name="requests")]
    cases: Any = ((None, "openai", "requests"), ("anthropic", "openai", "rate_limit_error"))
    for outer, inner, kind in cases:
        own = memory(REDIS_KEY_PREFIX=own_prefix())
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
