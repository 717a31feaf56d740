"""The configurations whose instructions are counted: an app,
the requests it gets, and what a request may cost.

Those of the limiter are what services run, not only what is quickest; their quotas are never
reached, unless a row is about refusing. Those of the cache answer one input of 1,536 numbers in
base64.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from redis_asgi import (
    EmbeddingCacheMiddleware,
    RateLimit,
    RateLimitMiddleware,
    Rule,
    Settings,
    by_header,
    by_json,
    client_ip,
    tokens,
)

from .apps import (
    NEVER,
    QUOTA,
    SERVICE_PATH,
    SERVICE_RULES,
    THREE,
    bare,
    evalsha,
    limits_aio,
    noop,
    service_app,
    throttled_py,
)

_Build = Callable[[str], ASGIApp]
CLIENTS = 200
TEXTS = 50
_PATIENT = {"RATE_LIMIT_TIMEOUT": 20.0, "EMBEDDING_CACHE_TIMEOUT": 20.0, "REDIS_TIMEOUT": 20.0}
_KEY = "x-api-key"
_VECTOR = base64.b64encode(np.random.default_rng(7).standard_normal(1536, dtype=np.float32).tobytes()).decode()


@dataclass(frozen=True, slots=True)
class Row:
    """One configuration.

    Args:
        title: Its name in the table.
        build: Makes its app, given the URL of a Redis.
        requests: What its clients send, in turn.
        base: The name of the row that this one is compared with; None for a base itself.
        promise: The most thousands of instructions that one request costs,
            beyond those of *base* where *above*.
        refuses: All but the first request of each client is answered 429.
        needs: A module that may not be installed.
    """

    title: str
    build: _Build
    requests: Sequence[bytes]
    base: str | None = "bare"
    promise: int | None = None
    above: bool = False
    refuses: bool = False
    needs: str | None = None


def _request(line: str, *headers: str, body: bytes = b"") -> bytes:
    length = (f"Content-Length: {len(body)}",) if body else ()
    return "\r\n".join((f"{line} HTTP/1.1", "Host: 127.0.0.1", *headers, *length, "", "")).encode() + body


def _from_clients(line: str, count: int = CLIENTS) -> list[bytes]:
    return [_request(line, f"X-Forwarded-For: 10.0.0.{n}", f"X-API-Key: key-{n}") for n in range(1, count + 1)]


_ROOT = _from_clients("GET /")
_FEW = _from_clients("GET /", 3)
_ITEMS = _from_clients(f"GET {SERVICE_PATH}")
_EMBED = [
    _request(
        "POST /v1/embeddings",
        "Content-Type: application/json",
        "Authorization: Bearer sk-test",
        body=json.dumps({"model": "m", "input": f"the text {n}", "encoding_format": "base64"}).encode(),
    )
    for n in range(TEXTS)
]


def _key(connection: HTTPConnection) -> str | None:
    return connection.headers.get(_KEY)


async def _key_later(connection: HTTPConnection) -> str | None:
    return connection.headers.get(_KEY)


def _plan(connection: HTTPConnection) -> str:
    return NEVER if connection.headers.get(_KEY) else f"{QUOTA}/hour"


def _limited(app: Callable[[str], ASGIApp] = bare, limits: Any = None, **options: Any) -> Callable[[str], ASGIApp]:
    return lambda url: RateLimitMiddleware(app(url), limits, settings=Settings(REDIS_URL=url, **_PATIENT), **options)


_README_RULES = [
    Rule(f"{QUOTA}/second; {QUOTA}/hour", name="all"),
    Rule(NEVER, name="login", paths="/login", methods="POST", count_if=lambda status: status == 401),
    Rule(NEVER, name="search", paths=["/search", "/v2/search/*"], partition_by=by_header(_KEY)),
    Rule(NEVER, name="strict", partition_by=client_ip, shadow=True),
]


def _fastapi(url: str, *, depends: bool = False, middleware: bool = False) -> ASGIApp:
    from fastapi import Depends, FastAPI

    settings = Settings(REDIS_URL=url, **_PATIENT)
    route = RateLimit(NEVER, partition_by=by_header(_KEY), redis=None, settings=settings)
    app = FastAPI()

    @app.get("/", dependencies=[Depends(route)] if depends else [])
    async def _hello() -> Response:
        return PlainTextResponse("Hello, world!")

    return RateLimitMiddleware(app, NEVER, partition_by=_key, settings=settings) if middleware else app


def _answer() -> dict[str, Any]:
    item = {"object": "embedding", "index": 0, "embedding": _VECTOR}
    return {"object": "list", "model": "m", "data": [item], "usage": {"prompt_tokens": 3, "total_tokens": 3}}


def _endpoint(_: str) -> Starlette:
    async def embed(request: Request) -> JSONResponse:
        await request.json()
        return JSONResponse(_answer())

    return Starlette(routes=[Route("/v1/embeddings", embed, methods=["POST"])])


def _bytes_endpoint(_: str) -> Starlette:
    body = json.dumps(_answer()).encode()

    async def embed(request: Request) -> Response:
        await request.body()
        return Response(body, media_type="application/json")

    return Starlette(routes=[Route("/v1/embeddings", embed, methods=["POST"])])


_CHAT = [
    _request(
        "POST /v1/chat/completions",
        "Content-Type: application/json",
        f"X-API-Key: key-{n}",
        body=json.dumps(
            {
                "model": "gpt-5-mini",
                "messages": [{"role": "user", "content": f"What is {n}? " + "Tell me all of it. " * 16}] * 5,
                "temperature": 0.7,
                "max_tokens": 400,
            }
        ).encode(),
    )
    for n in range(CLIENTS)
]
_REQUESTS = Rule(NEVER, name="requests", paths="/v1/*", partition_by=by_header(_KEY))
_TOKENS = Rule(
    f"{QUOTA}/hour",
    name="tokens",
    paths="/v1/*",
    partition_by=[by_header(_KEY), by_json("model", {"gpt-5-mini*": "small", "gpt-5*": "large"})],
    cost=tokens(weights={"output": 4}),
)


def _chat(_: str) -> Starlette:
    message = {"role": "assistant", "content": "It is a number, and more than that. " * 8}
    usage = {"prompt_tokens": 480, "completion_tokens": 75, "total_tokens": 555}
    body = json.dumps({"id": "c", "model": "gpt-5-mini", "choices": [{"message": message}], "usage": usage}).encode()

    async def chat(request: Request) -> Response:
        await request.body()
        return Response(body, media_type="application/json")

    return Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])


def _one_get(url: str) -> Starlette:
    client = Redis.from_url(url)
    body = json.dumps(_answer()).encode()

    async def embed(request: Request) -> Response:
        name = hashlib.blake2b(await request.body()).digest()
        stored = await client.get(name)
        if stored is None:
            await client.set(name, body)
        return Response(stored or body, media_type="application/json")

    return Starlette(routes=[Route("/v1/embeddings", embed, methods=["POST"])])


def _cached(**settings: Any) -> _Build:
    return lambda url: EmbeddingCacheMiddleware(
        _endpoint(url), settings=Settings(REDIS_URL=url, **_PATIENT, **settings)
    )


ROWS = {
    "bare": Row("bare Starlette", service_app, _ROOT, base=None),
    "noop": Row("no-op pure ASGI", noop, _ROOT),
    "address": Row("one rule, by address", _limited(limits=NEVER), _ROOT, promise=265),
    "header": Row("by a header", _limited(limits=NEVER, partition_by=by_header(_KEY)), _ROOT, promise=265),
    "callable": Row("by a callable", _limited(limits=NEVER, partition_by=_key), _ROOT, promise=275),
    "async": Row("by an async callable", _limited(limits=NEVER, partition_by=_key_later), _ROOT, promise=295),
    "plans": Row("limits from a callable", _limited(limits=_plan, partition_by=_key), _ROOT, promise=295),
    "three": Row("three limits, by address", _limited(limits=THREE), _ROOT, promise=275),
    "three-callable": Row("three limits, by a callable", _limited(limits=THREE, partition_by=_key), _ROOT, promise=290),
    "service": Row("a service's three rules", _limited(service_app, rules=SERVICE_RULES), _ITEMS, promise=300),
    "readme": Row("the README's four rules", _limited(service_app, rules=_README_RULES), _ROOT, promise=300),
    "refused": Row("refused, by address", _limited(limits="1/hour"), _FEW, promise=155, refuses=True),
    "refused-header": Row(
        "refused, by a header", _limited(limits="1/hour", partition_by=by_header(_KEY)), _FEW, promise=155, refuses=True
    ),
    "refused-callable": Row(
        "refused, by a callable", _limited(limits="1/hour", partition_by=_key), _FEW, promise=155, refuses=True
    ),
    "evalsha": Row("one EVALSHA each", evalsha, _ROOT),
    "limits.aio": Row("limits.aio", limits_aio, _ROOT),
    "throttled-py": Row("throttled-py", throttled_py, _ROOT, needs="throttled"),
    "fastapi": Row("bare FastAPI", _fastapi, _ROOT, base=None, needs="fastapi"),
    "depends": Row(
        "FastAPI, Depends(RateLimit(...))",
        lambda url: _fastapi(url, depends=True),
        _ROOT,
        base="fastapi",
        promise=140,
        above=True,
        needs="fastapi",
    ),
    "depends-both": Row(
        "the same with the middleware",
        lambda url: _fastapi(url, depends=True, middleware=True),
        _ROOT,
        base="fastapi",
        promise=240,
        above=True,
        needs="fastapi",
    ),
    "chat": Row("2 KB of JSON, requests by a header", _limited(_chat, rules=[_REQUESTS]), _CHAT, base=None),
    "budget": Row(
        "the same with tokens by key and model",
        _limited(_chat, rules=[_REQUESTS, _TOKENS]),
        _CHAT,
        base="chat",
        promise=60,
        above=True,
    ),
    "embed": Row("bare endpoint, bytes it has", _bytes_endpoint, _EMBED, base=None),
    "one-get": Row("one GET, bytes it has", _one_get, _EMBED, base="embed"),
    "from-redis": Row("a hit from Redis", _cached(EMBEDDING_CACHE_L1_BYTES=0), _EMBED, base="embed", promise=700),
    "from-process": Row(
        "a hit from the process", _cached(EMBEDDING_CACHE_L1_SECONDS=3600), _EMBED, base="embed", promise=400
    ),
}
