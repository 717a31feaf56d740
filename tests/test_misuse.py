"""Mistakes of newcomers: each ends in an error that names the thing and says what to write instead."""

import asyncio
import inspect
import operator
from collections.abc import Callable
from typing import Any

import fastapi
import httpx
import pytest
import redis.asyncio
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

import redis_asgi
from redis_asgi.errors import ConfigurationError
from redis_asgi.misuse import check_callable, shown

# Used wrongly on purpose, as type checkers would say too.
_ANY: Any = redis_asgi
EmbeddingCache = _ANY.EmbeddingCache
EmbeddingCacheMiddleware = _ANY.EmbeddingCacheMiddleware
RateLimit = _ANY.RateLimit
RateLimiter = _ANY.RateLimiter
RateLimitMiddleware = _ANY.RateLimitMiddleware
RedisManager = _ANY.RedisManager
RedisMetrics = _ANY.RedisMetrics
Rule = _ANY.Rule
Settings = _ANY.Settings
by_header = _ANY.by_header
by_json = _ANY.by_json
by_mcp_tool = _ANY.by_mcp_tool
by_user = _ANY.by_user
client_ip = _ANY.client_ip
check_redis_health = _ANY.check_redis_health
health_app = _ANY.health_app
metrics_app = _ANY.metrics_app
rate_limit = _ANY.rate_limit
status_app = _ANY.status_app
tokens = _ANY.tokens

MEMORY = Settings(REDIS_URL="memory://")
SECRET = "hunter2"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("ok")(scope, receive, send)


async def index(request: Request) -> Response:
    return PlainTextResponse("ok")


def plain(request: Any) -> Any:
    return PlainTextResponse("ok")


class Endpoint:
    """Stands for a class of endpoints."""


def limited(*args: Any, **kwargs: Any) -> Any:
    return RateLimitMiddleware(app, *args, settings=MEMORY, **kwargs)


def cached(**kwargs: Any) -> Any:
    return EmbeddingCacheMiddleware(app, settings=MEMORY, **kwargs)


def ask(asked: Any, path: str = "/") -> None:
    """Two requests, the second of which is over a quota of 1."""

    async def twice() -> None:
        transport = httpx.ASGITransport(asked, client=("203.0.113.7", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for _ in range(2):
                await client.get(path)

    asyncio.run(twice())


def routed(endpoint: Any) -> ASGIApp:
    return Starlette(routes=[Route("/", endpoint)])


def depending(dependency: Any) -> None:
    fast = fastapi.FastAPI()
    fast.get("/", dependencies=[dependency])(index)


def decorated(decorator: Any) -> None:
    fastapi.FastAPI().get("/")(decorator(plain))


def endpoint_of(**types: Any) -> None:
    def endpoint(**kwargs: Any) -> None: ...

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=of) for name, of in types.items()]
    endpoint.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what FastAPI reads
    fastapi.FastAPI().get("/")(endpoint)


def adding(middleware: Any) -> ASGIApp:
    starlette = Starlette()
    starlette.add_middleware(middleware)
    return starlette


Wrong = Callable[..., Any]

# What is written, and what the error has to say.
MISTAKES: list[tuple[str, Wrong, list[str]]] = [
    # The rules of a middleware.
    ("rules=Rule(...)", lambda: limited(rules=Rule("5/minute")), ["one Rule", "rules=[Rule(...)]"]),
    ("rules=notation", lambda: limited(rules="5/minute"), ["rules='5/minute'", "limits='5/minute'"]),
    ("rules=[notation]", lambda: limited(rules=["5/minute"]), ["'5/minute'", "no Rule", "rules=[Rule('5/minute')]"]),
    ("rules=mapping", lambda: limited(rules={"login": "5/minute"}), ["no list of rules", "name='login'"]),
    ("rules=number", lambda: limited(rules=5), ["rules=5", "rules=[Rule("]),
    ("rules=[Rule]", lambda: limited(rules=[Rule]), ["rules holds Rule", "rules=[Rule('100/minute')]"]),
    ("rules in rules", lambda: limited(rules=[[Rule("5/minute")]]), ["no Rule", "rules=[Rule("]),
    ("rules=[]", lambda: limited(rules=[]), ["limits nothing", "limits='100/minute'"]),
    ("unnamed rules", lambda: limited(rules=[Rule("5/minute"), Rule("6/hour")]), ["needs a name", "name='login'"]),
    ("limits=Rule(...)", lambda: limited(Rule("5/minute")), ["limits=", "rules=[Rule(...)]"]),
    ("limits=list", lambda: limited(["5/minute", "9/hour"]), ["['5/minute', '9/hour']", "'5/minute; 9/hour'"]),
    ("limits=number", lambda: limited(5), ["limits=5", "'100/minute'"]),
    ("limits=words", lambda: limited("five per minute"), ["limits='five per minute'", "'100/minute'"]),
    ("limits takes nothing", lambda: limited(lambda: "5/minute"), ["limits=<lambda>", "(conn)", "lambda conn:"]),
    ("limit=", lambda: limited(limit="5/minute"), ["no argument 'limit'", "Did you mean limits?"]),
    ("default_limits=", lambda: limited(default_limits=["5/minute"]), ["'default_limits'", "Did you mean limits?"]),
    ("key_func=", lambda: limited("5/minute", key_func=client_ip), ["'key_func'", "Did you mean partition_by?"]),
    ("rules by position", lambda: RateLimitMiddleware(app, "5/minute", [Rule("5/minute")]), ["write rules="]),
    ("no app", lambda: RateLimitMiddleware(limits="5/minute"), ["needs app", "RateLimitMiddleware(app"]),
    ("app=None", lambda: RateLimitMiddleware(None), ["app=None", "no ASGI app"]),
    ("app=notation", lambda: RateLimitMiddleware("5/minute"), ["app='5/minute'", "RateLimitMiddleware(app"]),
    ("strategy=token-bucket", lambda: limited("5/minute", strategy="token-bucket"), ["'token-bucket'", "Try 'gcra'"]),
    ("strategy=fixed", lambda: limited("5/minute", strategy="FIXED_WINDOW"), ["'FIXED_WINDOW'", "Try 'fixed-window'"]),
    ("on_redis_error=allow", lambda: limited("5/minute", on_redis_error="allow"), ["'allow'", "Try 'open'"]),
    ("headers=True", lambda: limited("5/minute", headers=True), ["headers=True", "ietf, legacy, both, none"]),
    ("exempt=number", lambda: limited("5/minute", exempt=5), ["exempt=5", "exempt='/internal/*'"]),
    ("exempt takes nothing", lambda: limited("5/minute", exempt=lambda: True), ["exempt=<lambda>", "(conn)"]),
    ("exempt=word", lambda: limited("5/minute", exempt="health"), ["'health'", "start with '/'"]),
    # What answers a refusal.
    (
        "on_exceeded=response",
        lambda: limited("1/hour", on_exceeded=JSONResponse({})),
        ["JSONResponse", "lambda conn"],
    ),
    (
        "on_exceeded=class",
        lambda: limited("1/hour", on_exceeded=JSONResponse),
        ["JSONResponse", "lambda conn"],
    ),
    ("on_exceeded=text", lambda: limited("1/hour", on_exceeded="no"), ["on_exceeded='no'", "lambda conn, decision"]),
    (
        "on_exceeded takes one",
        lambda: limited("1/hour", on_exceeded=lambda c: None),
        ["(conn, decision)"],
    ),
    ("on_exceeded gives dict", lambda: ask(limited("1/hour", on_exceeded=lambda c, d: {})), ["returned dict", "None"]),
    (
        "on_exceeded gives text",
        lambda: ask(limited("1/hour", on_exceeded=lambda c, d: "x")),
        ["returned str"],
    ),
    (
        "on_exceeded gives class",
        lambda: ask(limited("1/hour", on_exceeded=lambda c, d: JSONResponse)),
        ["the class JSONResponse", "no response"],
    ),
    # One rule.
    ("Rule by position", lambda: Rule("5/minute", "login"), ["limits alone by position", "name='login'"]),
    ("Rule path by position", lambda: Rule("5/minute", "/x"), ["paths='/x'"]),
    ("Rule method by position", lambda: Rule("5/minute", "POST"), ["methods='POST'"]),
    ("Rule who by position", lambda: Rule("5/minute", client_ip), ["partition_by=client_ip"]),
    ("Rule cost by position", lambda: Rule("5/minute", 2), ["cost=2"]),
    ("Rule()", lambda: Rule(), ["Rule needs limits", "Rule('5/minute'"]),
    ("Rule twice", lambda: Rule("5/minute", limits="6/minute"), ["by position and by name"]),
    ("path=", lambda: Rule("5/minute", path="/x"), ["'path'", "Did you mean paths?"]),
    ("method=", lambda: Rule("5/minute", method="POST"), ["'method'", "Did you mean methods?"]),
    ("weight=", lambda: Rule("5/minute", weight=2), ["'weight'", "Did you mean cost?"]),
    ("burst=", lambda: Rule("5/minute", burst=2), ["no argument 'burst'", "It takes limits, concurrency, name"]),
    ("methods in one", lambda: Rule("5/minute", methods="GET,POST"), ["'GET,POST'", "('GET', 'POST')"]),
    ("paths=number", lambda: Rule("5/minute", paths=5), ["paths=5", "paths='/api/*'"]),
    ("paths=route", lambda: Rule("5/minute", paths="/items/{id}"), ["'/items/{id}'", "/items/*"]),
    ("paths=[]", lambda: Rule("5/minute", paths=[]), ["covers nothing", "None for all"]),
    ("name of two words", lambda: Rule("5/minute", name="log in"), ["name='log in'", "'search'"]),
    ("shadow=text", lambda: Rule("5/minute", shadow="yes"), ["shadow='yes'", "True or False"]),
    ("cost=text", lambda: Rule("5/minute", cost="1"), ["cost='1'", "Try 1"]),
    ("cost=fraction", lambda: Rule("5/minute", cost=0.5), ["cost=0.5", "whole number"]),
    ("cost over quota", lambda: Rule("5/minute", cost=6), ["cost=6", "quota of 5", "cost=5 or less"]),
    ("cost takes nothing", lambda: Rule("5/minute", cost=lambda: 1), ["cost=<lambda>", "(request)"]),
    ("cost=tokens", lambda: Rule("5/minute", cost=redis_asgi.tokens), ["cost=tokens is not called", "cost=tokens()"]),
    ("tokens under gcra", lambda: Rule("5/minute", cost=tokens(), strategy="gcra"), ["'gcra'", "'fixed-window'"]),
    ("tokens in a log", lambda: limited(rules=[Rule("5/hour", cost=tokens())], strategy="moving-window"), ["10,000"]),
    ("count_if of tokens", lambda: Rule("5/hour", cost=tokens(), count_if=bool), ["cost=tokens()", "Leave count_if"]),
    ("tokens of a handshake", lambda: limited(rules=[Rule("5/hour", cost=tokens(), methods="WEBSOCKET")]), ["no body"]),
    ("count_if=number", lambda: Rule("5/minute", count_if=401), ["count_if=401", "lambda status"]),
    ("count_if takes nothing", lambda: Rule("5/minute", count_if=lambda: True), ["(status)"]),
    ("path and query", lambda: Rule("5/minute", paths="/api?x=1"), ["a query", "write /api"]),
    ("paths in one", lambda: Rule("5/minute", paths="/a, /b"), ["several in one", "['/a', '/b']"]),
    ("paths=Flask's route", lambda: Rule("5/minute", paths="/items/<int:id>"), ["a route's parameter", "/items/*"]),
    ("misspelt method", lambda: Rule("5/minute", methods="PSOT"), ["'PSOT'", "Did you mean 'POST'?"]),
    ("methods=any", lambda: Rule("5/minute", methods=["any"]), ["'ANY'", "Leave it out"]),
    ("methods=WS", lambda: Rule("5/minute", methods="WS"), ["Did you mean 'WEBSOCKET'?"]),
    ("exempt of callables", lambda: limited("5/minute", exempt=[lambda conn: True]), ["exempt holds", "one callable"]),
    ("exempt without a slash", lambda: limited("5/minute", exempt="health"), ["exempt='health'", "'/api/*'"]),
    # Who shares a counter.
    ("by_user()", lambda: by_user(), ["by_user needs conn", "partition_by=by_user"]),
    ("client_ip()", lambda: client_ip(), ["client_ip needs conn", "partition_by=client_ip"]),
    ("by_header", lambda: limited("5/minute", partition_by=by_header), ["not called", "by_header('x-api-key')"]),
    ("by_header of a rule", lambda: Rule("5/minute", partition_by=by_header), ["by_header('x-api-key')"]),
    ("by_header()", lambda: by_header(), ["by_header needs name", "by_header('x-api-key')"]),
    ("by_header('')", lambda: by_header(""), ["by_header('')", "by_header('x-api-key')"]),
    ("partition_by=ip", lambda: limited("5/minute", partition_by="ip"), ["'ip'", "partition_by=client_ip"]),
    ("partition_by=user", lambda: limited("5/minute", partition_by="user"), ["'user'", "partition_by=by_user"]),
    ("partition_by=header", lambda: limited("5/minute", partition_by="header:x-key"), ["by_header('x-key')"]),
    ("partition_by=name", lambda: limited("5/minute", partition_by="x-key"), ["by_header('x-key')"]),
    ("partition_by takes nothing", lambda: limited("5/minute", partition_by=lambda: "x"), ["(conn)", "lambda conn"]),
    ("partition_by takes two", lambda: limited("5/minute", partition_by=lambda a, b: "x"), ["(conn)", "'b'"]),
    ("partition_by gives number", lambda: ask(limited("5/minute", partition_by=lambda c: 5)), ["returned int", "str("]),
    ("partition_by=[]", lambda: Rule("5/minute", partition_by=[]), ["no list of parts", "[by_header('x-api-key')"]),
    ("partition_by=set", lambda: Rule("5/minute", partition_by={client_ip}), ["no list of parts"]),
    ("partition_by=kinds", lambda: Rule("5/minute", partition_by=["ip"]), ["'ip'", "partition_by=client_ip"]),
    ("partition_by=[[...]]", lambda: Rule("5/minute", partition_by=[[client_ip]]), ["a list in a list"]),
    ("by_json", lambda: Rule("5/minute", partition_by=by_json), ["by_json is not called", "by_json('model'"]),
    ("by_json()", lambda: by_json(), ["by_json needs name and values", "by_json('model'"]),
    ("by_json of nothing", lambda: by_json("model", []), ["values=[] names nothing"]),
    ("by_json of a number", lambda: by_json("model", 5), ["values=5", "neither names nor a mapping"]),
    ("by_json of booleans", lambda: by_json("stream", [True]), ["holds True", "Write 'true'"]),
    ("by_json of patterns in a set", lambda: by_json("model", {"a*", "b"}), ["patterns in no order"]),
    ("by_json of empty texts", lambda: by_json("model", {"a": ""}), ["holds ''"]),
    ("by_json without a name", lambda: by_json("a..b", ["x"]), ["by_json('a..b')", "by_json('model'"]),
    (
        "by_json of a JSON Path",
        lambda: by_json("$.metadata.tenant", "a"),
        ["another notation", "by_json('metadata.tenant'"],
    ),
    ("by_json of a JSON Pointer", lambda: by_json("/model", "a"), ["another notation", "by_json('model'"]),
    ("by_json of an item", lambda: by_json("messages[0].role", "a"), ["items of lists have no names"]),
    (
        "by_json of lists",
        lambda: by_json("model", {"small": ["a", "b"]}),
        ["holds ['a', 'b']", "{'gpt-5-mini*': 'small'"],
    ),
    ("by_json upside down", lambda: by_json("model", {"small": "a-*"}), ["Write {'a-*': 'small'}"]),
    ("by_json of arguments", lambda: by_json("model", "a*", "b*"), ["by_json", "by_json('model', ['gpt"]),
    ("by_mcp_tool of arguments", lambda: by_mcp_tool("search", "fetch_*"), ["by_mcp_tool(['search', 'fetch_*'])"]),
    ("by_mcp_tool of nothing", lambda: by_mcp_tool([]), ["names nothing", "['search', 'fetch_*']"]),
    ("partition_by=json", lambda: Rule("5/minute", partition_by="json:model"), ["partition_by=by_json('model', ["]),
    ("by_json(other='')", lambda: by_json("model", ["x"], other=""), ["other=''", "None where"]),
    ("by_mcp_tool", lambda: Rule("5/minute", partition_by=by_mcp_tool), ["by_mcp_tool is not called"]),
    ("cost=by_json", lambda: Rule("5/minute", cost=by_json("n", "1")), ["cost=", "for partition_by of a rule alone"]),
    ("exempt=by_json", lambda: limited("5/minute", exempt=by_json("n", "1")), ["for partition_by of a rule alone"]),
    ("by_json called", lambda: by_json("n", "1")(HTTPConnection({"type": "http"})), ["partition_by=by_json('n', ...)"]),
    # A limit of a route.
    ("Depends(RateLimit)", lambda: depending(fastapi.Depends(RateLimit)), ["Depends(RateLimit('5/minute'))"]),
    ("Depends(rate_limit)", lambda: depending(fastapi.Depends(rate_limit)), ["Depends(RateLimit('5/minute'))"]),
    ("Depends(rate_limit())", lambda: depending(fastapi.Depends(rate_limit("5/minute"))), ["Depends(RateLimit("]),
    ("RateLimit without Depends", lambda: depending(RateLimit("5/minute")), ["[Depends(RateLimit('5/minute'))]"]),
    ("@rate_limit in FastAPI", lambda: decorated(rate_limit), ["@rate_limit('5/minute')"]),
    ("@rate_limit", lambda: rate_limit(index), ["without a limit on index", "@rate_limit('5/minute')"]),
    ("@rate_limit at run time", lambda: ask(routed(rate_limit(plain))), ["limit on plain", "@rate_limit('5/minute')"]),
    ("@rate_limit on a class", lambda: rate_limit("5/minute")(Endpoint), ["class Endpoint", "on its methods"]),
    ("rate_limit by position", lambda: rate_limit("5/minute", "login"), ["name='login'"]),
    ("rate_limit(key_func)", lambda: rate_limit("5/minute", key_func=by_user), ["Did you mean partition_by?"]),
    ("no request", lambda: asyncio.run(rate_limit("5/minute")(lambda: None)()), ["request: Request"]),
    ("RateLimit by position", lambda: RateLimit("5/minute", "login"), ["name='login'"]),
    ("RateLimit()", lambda: RateLimit(), ["RateLimit needs limits", "RateLimit('5/minute'"]),
    ("RateLimit(times=)", lambda: RateLimit(times=5, seconds=60), ["'times'", "Did you mean limits?"]),
    ("RateLimit cost takes nothing", lambda: RateLimit("5/minute", cost=lambda: 1), ["cost=<lambda>", "(conn)"]),
    ("@RateLimit(...)", lambda: RateLimit("5/minute")(index), ["no decorator", "@rate_limit('5/minute')"]),
    ("RateLimit as a type", lambda: endpoint_of(limit=RateLimit), ["Depends(RateLimit('5/minute'))"]),
    ("RequestDecision as a type", lambda: endpoint_of(limit=redis_asgi.RequestDecision), ["limit: CurrentLimit"]),
    ("Depends(Rule)", lambda: depending(fastapi.Depends(Rule)), ["no dependency", "Depends(RateLimit('5/minute'))"]),
    ("Depends(RateLimiter)", lambda: depending(fastapi.Depends(RateLimiter)), ["clients choose", "Depends(lambda:"]),
    ("Depends(EmbeddingCache)", lambda: depending(fastapi.Depends(EmbeddingCache)), ["clients choose"]),
    ("Depends(RedisManager)", lambda: depending(fastapi.Depends(RedisManager)), ["clients choose"]),
    ("Depends(RedisMetrics)", lambda: depending(fastapi.Depends(RedisMetrics)), ["clients choose"]),
    (
        "Depends(Settings)",
        lambda: depending(fastapi.Depends(Settings)),
        ["clients choose", "Depends(lambda: settings)"],
    ),
    # A middleware where none is meant, and what is none where one is.
    ("add_middleware(made)", lambda: ask(adding(limited("5/minute"))), ["as a class", "(RateLimitMiddleware, limits="]),
    ("add_middleware(cache)", lambda: ask(adding(cached())), ["add_middleware(EmbeddingCacheMiddleware)"]),
    ("add_middleware(page)", lambda: ask(adding(health_app(settings=MEMORY))), ["app.mount('/health', health_app())"]),
    (
        "Depends(middleware)",
        lambda: depending(fastapi.Depends(RateLimitMiddleware)),
        ["no dependency", "Depends(RateLimit("],
    ),
    ("Depends(made)", lambda: depending(fastapi.Depends(limited("5/minute"))), ["no dependency", "add_middleware("]),
    ("Depends(cache)", lambda: depending(fastapi.Depends(EmbeddingCacheMiddleware)), ["no dependency"]),
    # What is mounted.
    ("health_app routed", lambda: fastapi.FastAPI().get("/h")(health_app), ["clients choose"]),
    ("health_app() routed", lambda: fastapi.FastAPI().get("/h")(health_app(settings=MEMORY)), ["app.mount('/health'"]),
    ("health_app() as a type", lambda: endpoint_of(page=type(health_app(settings=MEMORY))), ["app.mount('/health'"]),
    ("health_app() included", lambda: fastapi.FastAPI().include_router(health_app(settings=MEMORY)), ["app.mount('/h"]),
    (
        "health_app mounted",
        lambda: ask(Starlette(routes=[Mount("/h", health_app)]), "/h/"),
        ["health_app()"],
    ),
    ("health_app served", lambda: ask(health_app), ["not called", "app.mount('/health', health_app())"]),
    ("metrics_app routed", lambda: ask(routed(metrics_app)), ["app.mount('/metrics', metrics_app())"]),
    ("status_app served", lambda: ask(status_app), ["app.mount('/status', status_app())"]),
    ("health_app(app)", lambda: health_app(app), ["by name", "app.mount('/health', health_app())"]),
    ("health_app(require_redis=text)", lambda: health_app(require_redis="no"), ["require_redis='no'", "True or False"]),
    (
        "health of a sync client",
        lambda: asyncio.run(check_redis_health(redis.Redis())),
        ["synchronous", "redis.asyncio"],
    ),
    ("health of memory", lambda: asyncio.run(check_redis_health(RedisManager(MEMORY))), ["memory://"]),
    ("health_app(rediss=)", lambda: health_app(rediss="redis://h"), ["'rediss'", "Did you mean redis?"]),
    ("authorize=password", lambda: health_app(settings=MEMORY, authorize=SECRET), ["not callable", "lambda conn"]),
    ("authorize takes nothing", lambda: metrics_app(settings=MEMORY, authorize=lambda: True), ["(conn)"]),
    # The embedding cache.
    ("routes=openai", lambda: cached(routes="openai"), ["routes='openai'", "{'/v1/embeddings': 'openai'}"]),
    ("routes=[tei]", lambda: cached(routes=["tei"]), ["{'/embed': 'tei'}", "EMBEDDING_CACHE_ROUTES=tei"]),
    ("routes=path", lambda: cached(routes="/v1/embeddings"), ["{'/v1/embeddings': 'openai'}"]),
    ("routes turned round", lambda: cached(routes={"openai": "/x"}), ["the wrong way round", "{'/x': 'openai'}"]),
    ("routes={}", lambda: cached(routes={}), ["caches nothing", "leave it out"]),
    ("routes of a number", lambda: cached(routes={1: "openai"}), ["routes=1", "'/v1/embeddings'"]),
    ("routes of openapi", lambda: cached(routes={"/x": "openapi"}), ["'openapi'", "openai"]),
    ("routes by position", lambda: EmbeddingCacheMiddleware(app, {"/x": "openai"}), ["routes={'/x': 'openai'}"]),
    ("share=text", lambda: cached(share="no"), ["share='no'", "True or False"]),
    ("cache by_header", lambda: cached(partition_by=by_header), ["by_header is not called"]),
    ("cache partition_by takes nothing", lambda: cached(partition_by=lambda: "x"), ["(conn)", "lambda conn"]),
    ("ttl=text", lambda: cached(ttl="1h"), ["ttl='1h'", "number of seconds"]),
    (
        "compute=vectors",
        lambda: asyncio.run(EmbeddingCache(settings=MEMORY).get_or_compute(["a"], [[1.0]])),
        ["compute=[[1.0]]", "not callable"],
    ),
    (
        "vector before id",
        lambda: asyncio.run(EmbeddingCache("memory://").set_embedding([1.0], "a")),
        ["context_id=[1.0]", "not a str"],
    ),
    # Redis and settings.
    ("Settings(URL)", lambda: Settings(f"redis://:{SECRET}@h"), ["by name", "Settings(REDIS_URL="]),
    ("limits=URL", lambda: limited(f"redis://:{SECRET}@h"), ["limits='redis://***@h'"]),
    (
        "slot without a number",
        lambda: RateLimiter(settings=MEMORY).slot("u"),
        ["slot needs concurrency", "(client_id, 4"],
    ),
    (
        "slot of a limit",
        lambda: RateLimiter(settings=MEMORY).slot("u", limit=4),
        ["no argument 'limit'", "It takes client_id, concurrency, name:"],
    ),
    (
        "slot of three",
        lambda: RateLimiter(settings=MEMORY).slot("u", 4, "n"),
        ["client_id and concurrency alone by pos"],
    ),
    ("redis=class", lambda: RateLimiter(redis.asyncio.Redis), ["Redis is not called"]),
    ("redis=pool", lambda: RateLimiter(redis.asyncio.ConnectionPool()), ["a pool", "Redis(connection_pool=pool)"]),
    ("redis=sentinel", lambda: RateLimiter(redis.asyncio.Sentinel([("h", 1)])), ["sentinel.master_for('mymaster')"]),
    ("redis=coroutine", lambda: RateLimiter(RedisManager(MEMORY).get_connection()), ["not awaited"]),
    ("settings=mapping", lambda: limited_by({"REDIS_URL": f"redis://:{SECRET}@h"}), ["a dict", "settings=Settings("]),
    ("settings=Settings", lambda: limited_by(Settings), ["the class Settings", "settings=Settings("]),
    ("settings=URL", lambda: limited_by(f"redis://:{SECRET}@h"), ["'redis://***@h'", "Try redis="]),
    ("redis=settings", lambda: RateLimiter(MEMORY), ["redis= is given Settings", "settings="]),
    ("redis=RedisManager", lambda: RateLimiter(RedisManager), ["RedisManager()"]),
    ("redis=host:port", lambda: RateLimiter("localhost:6379"), ["'localhost:6379'", "redis://localhost:6379/0"]),
    ("RedisManager(URL)", lambda: RedisManager(f"redis://:{SECRET}@h"), ["no Settings", "Settings(REDIS_URL="]),
    ("RedisMetrics()", lambda: RedisMetrics(), ["RedisMetrics needs client"]),
    ("RateLimiter by position", lambda: RateLimiter("memory://", "gcra"), ["strategy='gcra'"]),
    (
        "URL by position",
        lambda: EmbeddingCache(None, 60, f"redis://:{SECRET}@h"),
        ["redis and ttl alone by position"],
    ),
    (
        "check_rate_limit of notation",
        lambda: asyncio.run(RateLimiter("memory://").check_rate_limit("a", "5/minute")),
        ["limit='5/minute'", "consume(client_id, '100/minute')"],
    ),
]


def limited_by(settings: Any) -> Any:
    return RateLimitMiddleware(app, "5/minute", settings=settings)


@pytest.mark.parametrize(("wrong", "says"), [pytest.param(*rest, id=name) for name, *rest in MISTAKES])
def test_a_mistake_is_told_with_what_was_meant(wrong: Wrong, says: list[str]) -> None:
    """The error names what is wrong and what to write instead, in one line, and shows no secret."""
    with pytest.raises((ConfigurationError, TypeError, AttributeError, RuntimeError)) as caught:
        wrong()
    text = str(caught.value)

    assert [] == [part for part in says if part not in text], text
    assert "\n" not in text
    assert len(text) < 400
    assert SECRET not in text


@pytest.mark.parametrize("name", [
        "EmbeddingCache", "EmbeddingCacheMiddleware", "RateLimit", "RateLimiter", "RateLimitMiddleware",
        "RedisManager", "RedisMetrics", "Rule", "by_header", "health_app", "metrics_app", "rate_limit", "status_app",
    ],
)  # fmt: skip
def test_what_is_checked_keeps_its_signature(name: str) -> None:
    """Editors, FastAPI and ``help()`` see the arguments, not what looks at them first."""
    parameters = inspect.signature(getattr(redis_asgi, name)).parameters.values()

    assert [] == [p.name for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "options"]


def test_a_callable_of_any_kind_is_taken() -> None:
    """Methods, objects, partial functions, defaults, and what Python cannot look into."""

    class Tenant:
        def __call__(self, conn: object, *, strict: bool = True) -> str:
            return "t"

        def of(self, conn: object) -> str:
            return "t"

    for value in (Tenant(), Tenant().of, lambda *args: "t", lambda conn, more=1: "t", str, operator.attrgetter("url")):
        check_callable("partition_by", value, "conn", "by_user")


def test_what_servers_look_for_is_found() -> None:
    """An instance is an ASGI app by what servers go by,
    though Python names its call by what was meant.
    """
    for made in (limited("5/minute"), cached(), health_app(settings=MEMORY)):
        assert inspect.iscoroutinefunction(made.__call__)
        assert not hasattr(made, "routes")


@pytest.mark.parametrize("method", ["GET", "purge", "PROPPATCH", "M", "LAUNCH"])
def test_a_method_of_an_apps_own_is_taken(method: str) -> None:
    """Only what is like a usual one is taken for a typo of it."""
    assert (method.upper(),) == Rule("5/minute", methods=method).methods


def test_a_long_value_is_cut() -> None:
    """A value in an error is a line at most, and a function is its name."""
    assert 60 == len(shown("x" * 500))
    assert "index" == shown(index)
    assert SECRET not in shown({"url": f"redis://:{SECRET}@h:1/0"})
