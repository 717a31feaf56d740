"""The OpenAPI document of an app says what its limits may answer, where they may, and nowhere else."""

import inspect
import itertools
import re
from collections.abc import Callable
from typing import Annotated, Any

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from hypothesis import example, given
from hypothesis import strategies as st
from openapi_spec_validator import validate
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.routing import Mount, Route

from redis_asgi import (
    ConfigurationError,
    CurrentLimit,
    RateLimit,
    RateLimitMiddleware,
    RedisManager,
    Rule,
    Settings,
    by_header,
    by_json,
    document_limits,
    health_app,
    rate_limit,
    rate_limit_responses,
    tokens,
)
from redis_asgi.asgi.paths import PathPattern, PathTemplate, spellings

Limited = set[tuple[str, str, int]]

PROBLEM = "application/problem+json"


def in_memory(**settings: Any) -> RedisManager:
    return RedisManager(Settings(REDIS_URL="memory://", **settings))


def app_of(*operations: str, **options: Any) -> FastAPI:
    """An app of *operations* such as ``GET /items``,
    behind a middleware of *options* if there are any.
    """
    app = FastAPI()
    add(app, *operations)
    if options:
        app.add_middleware(RateLimitMiddleware, **{"redis": in_memory(), **options})
    return app


def add(router: FastAPI | APIRouter, *operations: str, **options: Any) -> None:
    for operation in operations:
        method, path = operation.split()

        async def endpoint(**_parameters: str) -> None: ...

        names = re.findall(r"{(\w+)", path)
        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=str) for name in names]
        setattr(endpoint, "__signature__", inspect.Signature(parameters))  # noqa: B010 - functions have none for mypy
        router.add_api_route(path, endpoint, methods=[method], **options)


def limited(app: FastAPI) -> Limited:
    """Which operations of the document say what of ours; the document is valid."""
    document = app.openapi()
    validate(document)
    return {
        (method.upper(), path, int(status))
        for path, item in document["paths"].items()
        for method, operation in item.items()
        for status, response in operation["responses"].items()
        if PROBLEM in response.get("content", {})
    }


def documented(app: FastAPI) -> Limited:
    document_limits(app)
    return limited(app)


def test_a_rule_for_all_is_written_to_all() -> None:
    """Every operation may be refused; the response has its fields and its problem document."""
    app = app_of("GET /", "POST /items", "DELETE /items/{item}", limits="5/minute")

    assert {("GET", "/", 429), ("POST", "/items", 429), ("DELETE", "/items/{item}", 429)} == documented(app)
    response = app.openapi()["paths"]["/items"]["post"]["responses"]["429"]
    assert ["Retry-After", "RateLimit-Policy", "RateLimit", "Cache-Control"] == list(response["headers"])
    assert {PROBLEM: {"schema": {"$ref": "#/components/schemas/RateLimitProblem"}}} == response["content"]
    assert "violated-policies" in app.openapi()["components"]["schemas"]["RateLimitProblem"]["properties"]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        pytest.param({"paths": "/login"}, {("GET", "/login"), ("POST", "/login")}, id="path"),
        pytest.param({"paths": "/login", "methods": "POST"}, {("POST", "/login")}, id="method"),
        pytest.param({"paths": "/LOGIN"}, set(), id="other-case"),
        pytest.param(
            {"paths": "/LOGIN", "case_sensitive": False, "methods": "GET"}, {("GET", "/login")}, id="any-case"
        ),
        pytest.param({"paths": "/users/me"}, {("GET", "/users/{user}")}, id="one-of-many"),
        pytest.param({"paths": "/users/*"}, {("GET", "/users/{user}")}, id="star"),
        pytest.param({"paths": "/users/me/keys"}, set(), id="deeper"),
        pytest.param({"paths": "/numbers/me"}, set(), id="no-number"),
        pytest.param({"paths": "/numbers/4*2"}, {("GET", "/numbers/{number}")}, id="a-number"),
        pytest.param({"paths": "/files/a/b"}, {("GET", "/files/{it}")}, id="a-path"),
        pytest.param({"paths": "*"}, None, id="everywhere"),
        pytest.param({"paths": "/nowhere"}, set(), id="nowhere"),
        pytest.param({"methods": "WEBSOCKET"}, set(), id="handshakes"),
        pytest.param({"shadow": True}, set(), id="shadow"),
        pytest.param({"cost": 0}, set(), id="free"),
        pytest.param(
            {"limits": None, "concurrency": 4, "paths": "/users/*"}, {("GET", "/users/{user}")}, id="in-flight"
        ),
        pytest.param({"partition_by": by_json("model", ["a"])}, {("POST", "/login")}, id="by the body"),
        pytest.param({"cost": tokens()}, {("POST", "/login")}, id="in tokens"),
    ],
)
def test_a_rule_is_written_where_it_may_cover(rule: dict[str, Any], expected: set[tuple[str, str]] | None) -> None:
    """A route's parameter may be what the rule names, by the convertor that the route has for it."""
    operations = (
        "GET /login",
        "POST /login",
        "GET /users/{user}",
        "GET /numbers/{number:int}",
        "GET /files/{it:path}",
    )
    found = documented(app_of(*operations, rules=[Rule(**{"limits": "5/minute", **rule})]))

    if expected is None:
        assert len(operations) == len(found)
    else:
        assert {(*each, 429) for each in expected} == found


def test_the_other_refusals_are_written_where_they_may_happen() -> None:
    """503 where a rule fails closed, 400 where an identity is required,
    each beside the 429 of its rule.
    """
    rules = [
        Rule("5/minute", name="all"),
        Rule("5/minute", name="closed", paths="/closed", on_redis_error="closed"),
        Rule("5/minute", name="key", paths="/key", partition_by=by_header("x-api-key")),
        Rule("5/minute", name="own", paths="/own", partition_by=lambda conn: None),
    ]
    operations = ("GET /open", "GET /closed", "GET /key", "GET /own")
    refusing = app_of(*operations, rules=rules, redis=in_memory(RATE_LIMIT_MISSING_IDENTITY="refuse"))
    counting = app_of(*operations, rules=rules)

    every = {("GET", operation.split()[1], 429) for operation in operations}
    assert every | {("GET", "/closed", 503), ("GET", "/key", 400)} == documented(refusing)
    assert every | {("GET", "/closed", 503)} == documented(counting)
    assert ["Retry-After", "Cache-Control"] == list(
        refusing.openapi()["paths"]["/closed"]["get"]["responses"]["503"]["headers"]
    )


def test_exempt_paths_are_left_alone() -> None:
    """Of the middleware and of the settings, where every path of the route is exempt."""
    app = app_of(
        "GET /items",
        "GET /hooks/{hook}",
        "GET /about",
        "GET /docs/{page}",
        limits="5/minute",
        exempt=["/hooks/*", "/docs/one"],
        redis=in_memory(RATE_LIMIT_EXEMPT_PATHS="/about"),
    )
    before = app_of("GET /hooks/{hook}").openapi()["paths"]["/hooks/{hook}"]["get"]["responses"]

    assert {("GET", "/items", 429), ("GET", "/docs/{page}", 429)} == documented(app)
    assert before == app.openapi()["paths"]["/hooks/{hook}"]["get"]["responses"]


def test_limits_of_routes_are_written_to_theirs() -> None:
    """As dependencies of the route, of its routers and of an argument,
    and as a decorator; below another dependency.
    """
    app, outer, inner = FastAPI(), APIRouter(prefix="/outer"), APIRouter(prefix="/inner")
    limit = RateLimit("5/minute", redis=in_memory())
    closed = RateLimit("5/minute", redis=in_memory(), on_redis_error="closed")

    async def user(_limited: Annotated[None, Depends(limit)]) -> str:
        return "somebody"

    async def argument(user: Annotated[str, Depends(user)]) -> None: ...

    @rate_limit("5/minute", redis=in_memory())
    async def decorated(request: Request) -> None: ...

    @rate_limit("5/minute", redis=in_memory(), shadow=True)
    async def shadowed(request: Request, limit: CurrentLimit) -> None: ...

    add(app, "GET /free")
    add(app, "GET /route", dependencies=[Depends(closed)])
    app.get("/argument")(argument)
    app.get("/decorated")(decorated)
    app.get("/shadowed")(shadowed)
    add(inner, "GET /items/{item:int}", "POST /items")
    outer.include_router(inner, dependencies=[Depends(limit)])
    add(outer, "GET /free")
    app.include_router(outer, prefix="/v1")

    assert {
        ("GET", "/route", 429),
        ("GET", "/route", 503),
        ("GET", "/argument", 429),
        ("GET", "/decorated", 429),
        ("GET", "/v1/outer/inner/items/{item}", 429),
        ("POST", "/v1/outer/inner/items", 429),
    } == documented(app)
    # FastAPI's own handler answers a route's refusal,
    # where the app has none that makes problem documents.
    assert {PROBLEM, "application/json"} == set(app.openapi()["paths"]["/route"]["get"]["responses"]["429"]["content"])


def test_limits_of_a_route_go_by_the_middleware() -> None:
    """Its ``on_redis_error``, its missing identities and its fields;
    exempt from the rules, not from them.
    """
    settings = {"RATE_LIMIT_ON_REDIS_ERROR": "closed", "RATE_LIMIT_MISSING_IDENTITY": "refuse"}
    app = app_of(
        rules=[Rule("5/minute", paths="/other")], exempt="/route", headers="legacy", redis=in_memory(**settings)
    )
    add(app, "GET /route", dependencies=[Depends(RateLimit("5/minute", partition_by=by_header("x-api-key")))])

    assert {("GET", "/route", 400), ("GET", "/route", 429), ("GET", "/route", 503)} == documented(app)
    headers = app.openapi()["paths"]["/route"]["get"]["responses"]["429"]["headers"]
    assert {"Retry-After", "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "Cache-Control"} == set(
        headers
    )


def test_what_the_app_says_itself_stays() -> None:
    """A 429 of its own, and everything else in the document; the generation of others is as before."""
    own = {429: {"description": "Too fast.", "content": {"text/plain": {"schema": {"type": "string"}}}}}
    app = app_of(limits="5/minute")
    add(app, "GET /own", responses=own)
    add(app, "GET /ours", responses=rate_limit_responses(headers="both", fails_closed=True, needs_identity=True))
    before = get_openapi(title=app.title, version=app.version, routes=app.routes)
    document_limits(app)
    document = app.openapi()

    assert before == get_openapi(title=app.title, version=app.version, routes=app.routes)
    assert before["paths"] == document["paths"]
    assert {("GET", "/ours", 400), ("GET", "/ours", 429), ("GET", "/ours", 503)} == limited(app)
    assert 7 == len(document["paths"]["/ours"]["get"]["responses"]["429"]["headers"])


def test_callbacks_and_webhooks_are_requests_of_the_app_itself() -> None:
    """They go out, so that no limit covers them."""
    app, callbacks = app_of(limits="5/minute"), APIRouter()
    add(callbacks, "POST /told")

    @app.webhooks.post("/event")
    async def event() -> None: ...

    @app.post("/subscribe", callbacks=callbacks.routes)
    async def subscribe() -> None: ...

    assert {("POST", "/subscribe", 429)} == documented(app)
    told = app.openapi()["paths"]["/subscribe"]["post"]["callbacks"]["endpoint"]["/told"]["post"]
    assert ["200"] == list(told["responses"])
    assert ["200"] == list(app.openapi()["webhooks"]["/event"]["post"]["responses"])


def test_apps_mounted_below_are_documented_too() -> None:
    """Each by the middlewares that its requests come through, whatever a rule takes for its path."""
    inner, outer = app_of("GET /items", "GET /things", rules=[Rule("5/minute", paths="/things")]), app_of("GET /items")
    outer.add_middleware(RateLimitMiddleware, rules=[Rule("5/minute", paths="/v*/items")], redis=in_memory())
    outer.mount("/v1/{tenant}", inner)
    outer.mount("/health", health_app())
    document_limits(outer)

    assert set() == limited(outer)
    assert {("GET", "/things", 429), ("GET", "/items", 429)} == limited(inner)


def test_an_app_within_itself_is_documented() -> None:
    """However often it is mounted there."""
    app = app_of("GET /items", limits="5/minute")
    app.mount("/a", app)
    app.mount("/b", app)

    assert {("GET", "/items", 429)} == documented(app)


def test_a_root_path_may_be_what_a_rule_means() -> None:
    """A rule covers the path with the app's root and without."""
    for paths in ("/api/items", "/items"):
        app = FastAPI()
        app.root_path = "/api"
        add(app, "GET /items", "GET /other")
        app.add_middleware(RateLimitMiddleware, rules=[Rule("5/minute", paths=paths)], redis=in_memory())

        assert {("GET", "/items", 429)} == documented(app)


@pytest.mark.anyio
@pytest.mark.parametrize("wrap", ["around", "mounted", "started"])
async def test_it_finds_the_middleware_wherever_it_is(wrap: str) -> None:
    """Around the finished app, of an app around it, and in the stack of an app that has started."""
    app = FastAPI()
    add(app, "GET /items")
    options: dict[str, Any] = {"rules": [Rule("5/minute", paths="*/items")], "redis": in_memory()}
    if wrap == "around":
        document_limits(CORSMiddleware(RateLimitMiddleware(app, **options)))
    elif wrap == "mounted":
        middleware = [Middleware(CORSMiddleware), Middleware(RateLimitMiddleware, **options)]
        document_limits(Starlette(routes=[Mount("/v1", app)], middleware=middleware))
    else:
        app.add_middleware(CORSMiddleware)
        app.add_middleware(RateLimitMiddleware, **options)
        app.add_middleware(CORSMiddleware)
        document_limits(app)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            assert app.openapi() == (await client.get("/openapi.json")).json()

    assert {("GET", "/items", 429)} == limited(app)
    assert app.openapi() is app.openapi()


LIMITS: dict[str, dict[str, Any]] = {
    "/429": {"name": "often"},
    "/400": {"name": "who", "partition_by": by_header("x-api-key")},
    "/503": {"name": "closed", "on_redis_error": "closed"},
}


@pytest.mark.anyio
@pytest.mark.parametrize("style", ["ietf", "legacy", "both", "none"])
@pytest.mark.parametrize("of", ["rule", "route"])
@pytest.mark.parametrize("path", LIMITS)
async def test_what_is_written_is_what_is_answered(path: str, of: str, style: Any) -> None:
    """Each of the three, by a rule and by a route, has the fields,
    the type and the members that are written.
    """
    url = "redis://127.0.0.1:1" if path == "/503" else "memory://"
    manager = RedisManager(Settings(REDIS_URL=url, RATE_LIMIT_MISSING_IDENTITY="refuse"))
    rule = Rule("1/hour", paths=path if of == "rule" else "/elsewhere", **LIMITS[path])
    limits = [] if of == "rule" else [Depends(RateLimit("1/hour", **LIMITS[path]))]
    app = app_of(rules=[rule], redis=manager, headers=style)
    add(app, f"GET {path}", dependencies=limits)
    document_limits(app)
    document = app.openapi()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await client.get(path)
        answer = await client.get(path)

    assert path == f"/{answer.status_code}"
    written = document["paths"][path]["get"]["responses"][path[1:]]
    schema = written["content"][answer.headers["content-type"]]["schema"]
    schema = document["components"]["schemas"]["RateLimitProblem"] if "$ref" in schema else schema
    assert set(schema["required"]) <= answer.json().keys() <= schema["properties"].keys()
    fields = {name.lower() for name in written["headers"]}
    assert answer.headers.keys() - {"content-type", "content-length"} <= fields
    # The 400 of a route is one of the framework's own.
    assert (of, path) == ("route", "/400") or fields <= answer.headers.keys()


def test_routes_added_later_are_documented() -> None:
    """A document that FastAPI generates anew is completed anew."""
    app = app_of("GET /one", limits="5/minute")
    assert {("GET", "/one", 429)} == documented(app)
    add(app, "GET /two")
    app.openapi_schema = None

    assert {("GET", "/one", 429), ("GET", "/two", 429)} == limited(app)


def test_a_document_of_the_apps_own_making_is_completed() -> None:
    """Its paths say which operations there are, also those of no route here;
    a name that is taken is not used.
    """
    app = app_of(rules=[Rule("5/minute", paths="/elsewhere/a/b")])
    taken = {"type": "string"}
    item = {"name": "it", "in": "path", "required": True, "schema": {"type": "string"}}

    def own() -> dict[str, Any]:
        def path(summary: str) -> dict[str, Any]:
            operation = {"responses": {"200": {"description": "fine"}}}
            return {"summary": summary, "parameters": [item], "get": operation}

        paths = {each: path("no method") for each in ("/elsewhere/{it}", "/{it}/other")}
        about = {"openapi": "3.1.0", "info": {"title": "own", "version": "1"}}
        return {**about, "paths": paths, "components": {"schemas": {"RateLimitProblem": taken}}}

    setattr(app, "openapi", own)  # noqa: B010 - as FastAPI's documentation does
    document_limits(app)
    document = app.openapi()
    validate(document)

    assert {"200", "429"} == set(document["paths"]["/elsewhere/{it}"]["get"]["responses"])
    assert {"RateLimitProblem": taken} == {k: v for k, v in document["components"]["schemas"].items() if k[-1] != "_"}


def test_an_app_without_a_document_is_told() -> None:
    """What cannot be documented is an error at once, and so are fields of no kind."""
    with pytest.raises(ConfigurationError, match="no app with an openapi"):
        document_limits(Starlette(routes=[Route("/", lambda request: None)]))
    with pytest.raises(ConfigurationError, match="headers='all' is not one of"):
        rate_limit_responses(headers="all")  # type: ignore[arg-type]  # on purpose


def test_no_429_where_there_is_no_limit() -> None:
    """An app without limits is documented as before."""
    app = app_of("GET /items")
    before = app_of("GET /items").openapi()
    document_limits(app)

    assert before == app.openapi()


# Which routes a pattern may cover, against all short values of their parameters.

_KINDS: dict[str, Callable[[str], bool]] = {
    "str": lambda value: bool(value) and "/" not in value,
    "path": lambda value: True,
    "int": str.isdigit,
}
_VALUES = ["".join(each) for length in range(4) for each in itertools.product("a1/", repeat=length)]
_texts = st.text("a1/", max_size=3)
_patterns = st.text("a1/*", max_size=3).map(lambda text: f"/{text}")


@given(pattern=_patterns, before=_texts, kind=st.sampled_from(list(_KINDS)), behind=_texts)
@example(pattern="/a*", before="", kind="int", behind="")
@example(pattern="/", before="", kind="path", behind="/")
@example(pattern="/*1", before="a", kind="str", behind="a")
def test_may_match_is_what_some_value_does(pattern: str, before: str, kind: str, behind: str) -> None:
    """The patterns are shorter than the values tried, so that one of these does if any does."""
    asked = PathPattern(pattern)
    template = PathTemplate(f"/{before}{{it:{kind}}}{behind}")
    paths = [f"/{before}{value}{behind}" for value in _VALUES if _KINDS[kind](value)]
    plain = [path for path in paths if "//" not in path]
    covered = [path for path in plain if asked.covers(spellings(path))]

    if covered:
        assert template.may_match(asked)
    elif len(paths) == len(plain):
        assert not template.may_match(asked)
    if template.always_matches(asked):
        assert all(asked.matches(path) for path in paths)
    elif kind != "int":
        assert not all(asked.matches(f"/{before}{value}{behind}") for value in ("b", "bb"))


def test_a_dialect_is_documented() -> None:
    """Of each path's own, with its fields and the schema of its body;
    a route's limit too, elsewhere as ever.
    """
    app = app_of("POST /v1/messages", "POST /v1/chat", "POST /mcp", "GET /about")
    add(app, "POST /v1/images/{image_id}", dependencies=[Depends(RateLimit("5/minute"))])
    dialect: Any = {"/v1/messages": "anthropic", "/v1/*": "openai", "/mcp": "mcp"}
    rules = [Rule("5/minute", name="requests", on_redis_error="closed", methods=["GET", "POST"])]
    app.add_middleware(RateLimitMiddleware, rules=rules, dialect=dialect, redis=in_memory())
    document_limits(app)
    document = app.openapi()
    validate(document)

    told = {path: next(iter(item.values()))["responses"] for path, item in document["paths"].items()}
    names = {
        path: sorted(responses["429"]["content"]["application/json"]["schema"]["properties"])
        for path, responses in told.items()
        if path != "/about"
    }
    assert {
        "/v1/messages": ["error", "type"],
        "/v1/chat": ["error"],
        "/mcp": ["error", "id", "jsonrpc"],
        "/v1/images/{image_id}": ["error"],
    } == names
    assert [PROBLEM] == list(told["/about"]["429"]["content"])
    assert {"anthropic-ratelimit-input-tokens-reset", "x-should-retry"} <= set(told["/v1/messages"]["429"]["headers"])
    assert {"x-ratelimit-reset-tokens", "retry-after-ms"} <= set(told["/v1/chat"]["429"]["headers"])
    assert "retry-after-ms" in told["/v1/chat"]["503"]["headers"]
    assert {"RateLimit", "RateLimit-Policy", "Retry-After", "Cache-Control"} == set(told["/mcp"]["429"]["headers"])


def test_responses_of_a_dialect() -> None:
    """By hand too, and a name that is none is told."""
    found = rate_limit_responses(dialect="openai", fails_closed=True)

    assert [["application/json"], ["application/json"]] == [list(each["content"]) for each in found.values()]
    with pytest.raises(ConfigurationError, match="dialect='gemini' is not one of openai, anthropic, mcp"):
        rate_limit_responses(dialect="gemini")  # type: ignore[arg-type]
