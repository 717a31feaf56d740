"""The app within: its scope, its compressed answers, its calls that do not end."""

import asyncio
import gzip
from typing import Any

import orjson
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.settings import Settings

from ..kit.embedding_apps import FORMATS, Spy, cache_status, respond, server
from ..kit.inside import shared_of
from ..kit.patience import PATIENCE
from .requests import ask

pytestmark = pytest.mark.anyio


async def test_what_the_app_sets_in_its_scope_is_seen_outside(settings: Settings) -> None:
    """A middleware around the cache finds the route, as without it,
    when the answer starts and afterwards.
    """
    seen: list[tuple[str, Any]] = []

    async def embeddings(request: Request) -> JSONResponse:
        body = await request.json()
        return JSONResponse(FORMATS["openai"][2](body, body["input"], Spy()))

    inner = Starlette(routes=[Mount("/{team}", routes=[Route("/v1/embeddings", embeddings, methods=["POST"])])])
    cached = EmbeddingCacheMiddleware(inner, settings=settings, routes={"/one/v1/embeddings": "openai"})

    async def outside(scope: Scope, receive: Receive, send: Send) -> None:
        async def watch(message: Any) -> None:
            seen.append((message["type"], scope.get("path_params")))
            await send(message)

        before = {name: scope[name] for name in ("path", "headers")}
        await cached(scope, receive, watch)
        seen.append(("after", scope.get("endpoint") is embeddings))
        assert before == {name: scope[name] for name in before}

    await ask(outside, "a", path="/one/v1/embeddings")
    assert ("http.response.start", {"team": "one"}) == seen[0]
    assert ("after", True) == seen[-1]


@pytest.mark.parametrize("where", ["scope", "state"])
async def test_a_replay_finds_nothing_of_the_first_call(where: str, settings: Settings) -> None:
    """An app that keeps a parsed body in its scope or state reads the one of the call that it
    answers.
    """
    calls = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        kept = scope if where == "scope" else scope["state"]
        if "parsed" not in kept:
            kept["parsed"] = orjson.loads((await receive())["body"])
        items = kept["parsed"]["input"]
        calls.append(items)
        answer = FORMATS["openai"][2]({"model": "m"}, items, Spy())
        await respond(send, orjson.dumps(answer), 200 if len(items) > 1 else 422)

    seen: list[Any] = []

    async def outside(scope: Scope, receive: Receive, send: Send) -> None:
        await EmbeddingCacheMiddleware(app, settings=settings)(scope, receive, send)
        seen.append((scope if where == "scope" else scope["state"])["parsed"]["input"])
        seen.append(scope["state"]["embedding_cache_result"].outcome)

    answer = await ask(outside, "x", "x")
    assert (200, 2) == (answer.status_code, len(answer.json()["data"]))
    assert [["x"], ["x", "x"]] == calls
    assert [["x", "x"], "bypass"] == seen


async def test_a_replay_is_routed_as_the_first_call_was(settings: Settings) -> None:
    """What a mount has set for the smaller request does not lead the whole one elsewhere."""
    calls = []

    async def embeddings(request: Request) -> JSONResponse:
        body = await request.json()
        calls.append(body["input"])
        if len(body["input"]) < 2:
            return JSONResponse({"error": "two"}, 422)
        return JSONResponse(FORMATS["openai"][2](body, body["input"], Spy()))

    inner = Starlette(routes=[Mount("/a", routes=[Route("/v1/embeddings", embeddings, methods=["POST"])])])
    cached = EmbeddingCacheMiddleware(inner, settings=settings, routes={"/a/v1/embeddings": "openai"})
    answer = await ask(cached, "x", "x", path="/a/v1/embeddings")
    assert 200 == answer.status_code
    assert [["x"], ["x", "x"]] == calls


@pytest.mark.parametrize("accepts", ["gzip", "br, gzip;q=0.5", "gzip;q=0", "br", "*", ""])
async def test_a_compressed_miss_stays_compressed_and_is_stored(accepts: str, any_settings: Settings) -> None:
    """What compresses inside of the cache does so for a client that asks for it, as without the
    cache.
    """
    bare = GZipMiddleware(server(Spy()), minimum_size=1)
    cached = EmbeddingCacheMiddleware(bare, settings=any_settings)
    expected = await ask(bare, "a", "b", **{"accept-encoding": accepts})
    cold = await ask(cached, "a", "b", **{"accept-encoding": accepts})
    assert "redis-asgi; fwd=miss; stored" == cache_status(cold)
    if accepts not in ("*", "gzip;q=0"):  # Starlette looks for the word alone
        assert expected.headers.get("content-encoding") == cold.headers.get("content-encoding")
    assert expected.json() == cold.json()
    warm = await ask(cached, "a", "b", **{"accept-encoding": accepts})
    assert "; hit" in cache_status(warm)
    assert (expected.json(), None) == (warm.json(), warm.headers.get("content-encoding"))
    partial = await ask(cached, "a", "c", **{"accept-encoding": accepts})
    assert "fwd=partial" in cache_status(partial)


@pytest.mark.parametrize("spoil", [lambda b: b[:-9], lambda b: b + b"more", lambda b: b"{}", lambda b: b""])
async def test_an_answer_that_is_not_the_gzip_it_says_is_passed_on(spoil: Any, settings: Settings) -> None:
    """To the byte, and nothing of it is stored."""
    answer = orjson.dumps(FORMATS["openai"][2]({"model": "m"}, ["a"], Spy()))
    sent = spoil(gzip.compress(answer))
    seen: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, sent, 200, (b"content-encoding", b"gzip"))

    async def outside(scope: Scope, receive: Receive, send: Send) -> None:
        async def watch(message: Any) -> None:
            seen.append(message.get("body", b""))
            await send({**message, "headers": []} if message["type"] == "http.response.start" else message)

        await EmbeddingCacheMiddleware(app, settings=settings)(scope, receive, watch)

    await ask(outside, "a", **{"accept-encoding": "gzip"})
    assert sent == b"".join(seen)


async def test_a_compressed_answer_that_is_too_large_is_passed_on(settings: Settings) -> None:
    """A megabyte of zeros in a thousand bytes takes no more memory than one that is not compressed
    may.
    """
    body = gzip.compress(b" " * 1_000_000 + orjson.dumps(FORMATS["openai"][2]({"model": "m"}, ["a"], Spy())))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, body, 200, (b"content-encoding", b"gzip"))

    small = settings.model_copy(update={"EMBEDDING_CACHE_MAX_RESPONSE_BYTES": 500_000})
    cached = EmbeddingCacheMiddleware(app, settings=small)
    before = shared_of(cached).budget.left
    said = await ask(cached, "a", **{"accept-encoding": "gzip"})
    assert "redis-asgi; fwd=bypass; detail=not-understood" == cache_status(said)
    assert before == shared_of(cached).budget.left


async def test_a_computation_that_does_not_end_holds_up_no_shutdown(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for, but not for ever; the client is closed under it."""
    monkeypatch.setattr("redis_asgi.embeddings.middleware._SETTLES_WITHIN", 0.01)
    app = EmbeddingCacheMiddleware(Starlette(), settings=settings)
    endless = asyncio.create_task(asyncio.sleep(60))
    shared_of(app).flights._tasks.add(endless)
    events = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    sent = []

    async def receive() -> Any:
        return next(events)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async with asyncio.timeout(PATIENCE):
        await app({"type": "lifespan", "state": {}}, receive, send)
    endless.cancel()

    assert ["lifespan.startup.complete", "lifespan.shutdown.complete"] == sent
    assert shared_of(app).vectors.manager.pool is None


async def test_other_middlewares_may_stand_outside_and_inside(settings: Settings) -> None:
    """``BaseHTTPMiddleware`` and compression around it, compression within:
    misses, partial and full hits.
    """
    spy = Spy()

    async def passing(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["x-outside"] = "yes"
        return response

    inner = GZipMiddleware(server(spy), minimum_size=10)
    app = Starlette(
        routes=[Mount("/", app=EmbeddingCacheMiddleware(inner, settings=settings))],
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=passing),
            Middleware(GZipMiddleware, minimum_size=10),
        ],
    )
    for items in (["a", "b"], ["b", "c"], ["c", "a", "b"]):
        response = await ask(app, *items)
        assert FORMATS["openai"][2]({"model": "m"}, items, Spy())["data"] == response.json()["data"]
        assert "yes" == response.headers["x-outside"]
        assert "gzip" == response.headers["content-encoding"]
    assert ["a", "b", "c"] == spy.seen
    assert "hit" in cache_status(response)
