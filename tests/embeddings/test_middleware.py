"""The middleware: cold and warm, around any app, built and configured in any way."""

from typing import Any

import pytest
import redis as sync_redis
import redis.asyncio as aioredis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.errors import ConfigurationError
from redis_asgi.settings import Settings

from ..kit.embedding_apps import FORMATS, Spy, cache_status, client, server
from ..kit.inside import shared_of
from ..kit.logs import event_of
from .requests import ask, body

pytestmark = pytest.mark.anyio


async def test_cold_then_warm_on_every_format(any_settings: Settings) -> None:
    """The second request never reaches the app, whatever dialect it speaks."""
    for name, (path, field, _) in FORMATS.items():
        spy = Spy()
        app = EmbeddingCacheMiddleware(server(spy), settings=any_settings)
        items: Any = "a" if name == "ollama_prompt" else ["a", "b"]
        async with client(app) as c:
            cold, warm = [await c.post(path, json={"model": "m", field: items}) for _ in range(2)]
        assert "redis-asgi; fwd=miss; stored" == cache_status(cold)
        assert cache_status(warm).startswith("redis-asgi; hit; ttl=")
        assert 1 == spy.calls, name


async def test_each_input_is_computed_once(any_settings: Settings) -> None:
    """Duplicates are forwarded once, and of a partly stored batch only the rest."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=any_settings)
    await ask(app, "a", "b", "a")
    partial = await ask(app, "c", "a", "d", "c", "b")
    assert ["a", "b", "c", "d"] == spy.seen
    assert 'redis-asgi; fwd=partial; stored; detail="hit=2 miss=2"' == cache_status(partial)


async def test_a_single_text_and_a_list_of_it_are_one_input(any_settings: Settings) -> None:
    """What was stored for ``"a"`` answers ``["a"]``; what is forwarded keeps its shape."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=any_settings)
    async with client(app) as c:
        await c.post("/v1/embeddings", json={"model": "m", "input": "a"})
        assert "hit" in cache_status(await c.post("/v1/embeddings", json={"model": "m", "input": ["a"]}))
    assert b'{"model":"m","input":"a"}' == spy.bodies[0]


async def test_images_inside_of_a_request_are_cached(any_settings: Settings) -> None:
    """As objects, and as the strings of a request that says that they are images."""
    spy, url = Spy(), "data:image/png;base64,iVBORw0KGgo="
    app = EmbeddingCacheMiddleware(server(spy), settings=any_settings)
    async with client(app) as c:
        for fields in (body({"image": url}), body({"bytes": url}), body(url, modality="image")):
            last = [await c.post("/v1/embeddings", json=fields) for _ in range(2)][1]
            assert "; hit" in cache_status(last)
    assert 3 == spy.calls


async def test_values_in_redis_are_small_and_end(settings: Settings, redis_url: str) -> None:
    """Every key has a TTL within the jitter; a vector is its header and its numbers."""
    app = EmbeddingCacheMiddleware(server(Spy(dims=1536)), settings=settings)
    await ask(app, *"abcdef")
    store = sync_redis.Redis.from_url(redis_url)
    keys = list(store.scan_iter())
    inputs = [key for key in keys if key.startswith(b"embedding_input:v1:")]
    assert (8, 6) == (len(keys), len(inputs))
    assert all(3600 * 0.9 - 2 <= store.ttl(key) <= 3600 for key in inputs)
    assert 1 < len({store.ttl(key) for key in inputs})
    assert all(store.ttl(key) > 0 for key in keys)
    assert {32 + 4 * 1536} == {store.strlen(key) for key in inputs}
    assert all((store.memory_usage(key) or 0) <= 7.5 * 1024 for key in inputs)
    store.close()


async def test_the_stated_ttl_is_the_one_in_redis(settings: Settings, redis_url: str) -> None:
    """``ttl=N`` of a hit is what Redis still gives the vector."""
    app = EmbeddingCacheMiddleware(server(Spy()), settings=settings)
    await ask(app, "a")
    said = int(cache_status(await ask(app, "a")).partition("ttl=")[2])
    store = sync_redis.Redis.from_url(redis_url)
    [key] = store.scan_iter("embedding_input:*")
    assert abs(said - store.ttl(key)) <= 1
    store.close()


# Around the app.


async def test_the_app_sees_what_was_found(settings: Settings) -> None:
    """``request.state`` has the cache, and the result for the endpoint and for what stands outside."""
    results: list[Any] = []

    async def endpoint(request: Request) -> JSONResponse:
        results.append(request.state.embedding_cache_result)
        fields = await request.json()
        await request.state.embedding_cache.set_embedding("x", [1.0])
        return JSONResponse(FORMATS["openai"][2](fields, fields["input"], Spy()))

    inner = Starlette(routes=[Route("/v1/embeddings", endpoint, methods=["POST"])])
    cached = EmbeddingCacheMiddleware(inner, settings=settings)

    async def outside(scope: Scope, receive: Receive, send: Send) -> None:
        await cached(scope, receive, send)
        results.append(scope["state"]["embedding_cache_result"])

    await ask(outside, [1], [2, 3])
    await ask(outside, [1], [4])
    await ask(outside, [1], [1], [4])
    shown = [(r.outcome, r.hits, r.misses, r.tokens, r.billed_tokens) for r in results]
    assert [
        ("miss", 0, 2, 0, 0),
        ("miss", 0, 2, 3, 3),
        ("partial", 1, 1, 0, 0),
        ("partial", 1, 1, 2, 1),
        ("hit", 2, 0, 3, 0),
    ] == shown


async def test_a_mounted_app_is_cached(settings: Settings) -> None:
    """Under a mount the path less its root is the endpoint."""
    spy = Spy()

    async def unmounted(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        await server(spy)({**scope, "path": path}, receive, send)

    app = Starlette(routes=[Mount("/models", app=EmbeddingCacheMiddleware(unmounted, settings=settings))])
    for _ in range(2):
        last = await ask(app, "a", path="/models/v1/embeddings")
    assert "hit" in cache_status(last)
    assert 1 == spy.calls


async def test_other_requests_are_not_touched(settings: Settings) -> None:
    """GET, other paths, and other bodies pass with the very messages of the server."""
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope["path"], receive, send))

    async def receive() -> Any:
        raise AssertionError

    async def send(_message: Any) -> None:
        raise AssertionError

    cached = EmbeddingCacheMiddleware(app, settings=settings)
    for kind, method, path in (
        ("http", "GET", "/v1/embeddings"),
        ("http", "POST", "/v1/models"),
        ("websocket", "", "/v1/embeddings"),
    ):
        await cached({"type": kind, "method": method, "path": path, "headers": []}, receive, send)
    assert [(path, receive, send) for path in ("/v1/embeddings", "/v1/models", "/v1/embeddings")] == seen


async def test_the_sub_request_fits_its_body(settings: Settings) -> None:
    """It has its own length, asks for no compression, and keeps every other header."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=settings)
    await ask(app, "a")
    await ask(app, "a", "b", **{"x-request-id": "7", "expect": "100-continue"})
    headers = spy.headers[1]
    assert b'{"model":"m","input":["b"]}' == spy.bodies[1]
    assert (b"27", b"identity", b"7") == tuple(
        headers[n] for n in (b"content-length", b"accept-encoding", b"x-request-id")
    )
    assert b"expect" not in headers


async def test_a_custom_wire_format_can_be_routed(settings: Settings) -> None:
    """Anything with the names of the Protocol speaks for a path of the user's."""
    spy = Spy()
    inner = server(spy)

    async def moved(scope: Scope, receive: Receive, send: Send) -> None:
        await inner({**scope, "path": "/embed"}, receive, send)

    app = EmbeddingCacheMiddleware(moved, settings=settings, routes={"/mine": "tei"})
    async with client(app) as c:
        for _ in range(2):
            last = await c.post("/mine", json={"inputs": ["a"]})
    assert "hit" in cache_status(last)


async def test_configured_by_the_environment_alone(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> None:
    """``EmbeddingCacheMiddleware(app)`` works, as vLLM's ``--middleware`` builds it."""
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("EMBEDDING_CACHE_REDIS_URL", redis_url)
    monkeypatch.setenv("EMBEDDING_CACHE_ROUTES", "openai:/mine, tei")
    monkeypatch.setenv("EMBEDDING_CACHE_TTL", "100")
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy))
    async with client(app) as c:
        said = [cache_status(await c.post("/embed", json={"inputs": ["a"]})) for _ in range(2)]
        assert "" == cache_status(await c.post("/v1/embeddings", json=body("a")))
    assert "hit" in said[1]
    assert 89 <= int(said[1].partition("ttl=")[2]) <= 100


async def test_a_decoding_client_of_the_users_is_fine(redis_url: str) -> None:
    """``decode_responses=True`` does not break vectors, and the client is left open."""
    user_client = aioredis.Redis.from_url(redis_url, decode_responses=True)
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), redis=user_client, settings=Settings(EMBEDDING_CACHE_L1_BYTES=0))
    for _ in range(2):
        last = await ask(app, "a", "b")
    assert "hit" in cache_status(last)
    assert await user_client.ping()
    await user_client.aclose()


@pytest.mark.parametrize(
    "arguments",
    [
        {"routes": {"/x": "nope"}},
        {"routes": {"x": "openai"}},
        {"routes": {"/x": 5}},
        {"ttl": 0},
        {"ttl": True},
        {"ttl": "60"},
        {"lease": -1},
        {"lease": "never"},
        {"namespace": 5},
        {"partition_by": "tenant"},
        {"redis": "http://x"},
    ],
    ids=repr,
)
def test_misuse_is_found_at_construction(arguments: dict[str, Any]) -> None:
    """Every argument is checked before the first request."""
    with pytest.raises(ConfigurationError, match="Try "):
        EmbeddingCacheMiddleware(server(Spy()), settings=Settings(), **arguments)


def test_unknown_wire_formats_in_the_environment_are_found_at_construction() -> None:
    """``EMBEDDING_CACHE_ROUTES`` with a typo names itself and what would work."""
    with pytest.raises(ConfigurationError, match=r"EMBEDDING_CACHE_ROUTES='opanai'.*openai"):
        EmbeddingCacheMiddleware(server(Spy()), settings=Settings(EMBEDDING_CACHE_ROUTES="opanai"))


async def test_the_shared_client_is_held_while_the_app_lives(settings: Settings) -> None:
    """The lifespan opens it, and closes it before the server hears of the end; the app's own events
    pass.
    """
    app = EmbeddingCacheMiddleware(Starlette(), settings=settings)
    manager = shared_of(app).vectors.manager
    events = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    sent = []

    async def receive() -> Any:
        return next(events)

    async def send(message: Any) -> None:
        sent.append((message["type"], manager.pool is not None))

    await app({"type": "lifespan", "state": {}}, receive, send)
    assert ["lifespan.startup.complete", "lifespan.shutdown.complete"] == [kind for kind, _ in sent]
    assert [True, False] == [is_open for _, is_open in sent]


async def test_the_shared_client_is_held_before_the_app_starts(settings: Settings) -> None:
    """An app whose start uses the client, and whose other user ends meanwhile, keeps it."""
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert "lifespan.startup" == (await receive())["type"]
        await manager.initialize_pool()
        manager.retain()
        await manager.release()
        seen.append(manager.pool is not None)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    cached = EmbeddingCacheMiddleware(app, settings=settings)
    manager = shared_of(cached).vectors.manager
    events = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> Any:
        return next(events)

    async def send(message: Any) -> None:
        seen.append(manager.pool is not None)

    await cached({"type": "lifespan", "state": {}}, receive, send)
    assert [True, True, False] == seen


# Settings that say what is in a key, and where vectors are.


async def test_an_empty_namespace_is_said_once_at_the_first_store(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Not at start, not when nothing is stored, and never with one."""
    said = "redis_asgi.embedding_namespace_empty"
    named = EmbeddingCacheMiddleware(server(Spy()), settings=Settings(REDIS_URL=redis_url), namespace="model@1")
    unnamed = EmbeddingCacheMiddleware(server(Spy()), settings=Settings(REDIS_URL=redis_url))
    await ask(named, "a")
    await ask(unnamed, "a", **{"cache-control": "no-store"})
    assert not [record for record in caplog.records if event_of(record) == said]
    for text in "abc":
        await ask(unnamed, text)
    [record] = [record for record in caplog.records if event_of(record) == said]
    assert "EMBEDDING_CACHE_NAMESPACE" in record.fix  # type: ignore[attr-defined]  # an extra


async def test_vectors_can_have_a_server_of_their_own(own_server: Any, redis_url: str) -> None:
    """``EMBEDDING_CACHE_REDIS_URL``:
    nothing of the cache is on the shared server, and its death is no matter.
    """
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_REDIS_URL=own_server.url, EMBEDDING_CACHE_L1_BYTES=0)
    app = EmbeddingCacheMiddleware(server(Spy()), settings=settings)
    await ask(app, "a")
    assert "; hit" in cache_status(await ask(app, "a"))
    shared = sync_redis.Redis.from_url(redis_url)
    assert (0, 3) == (shared.dbsize(), own_server.client().dbsize())
    shared.close()
    elsewhere = Settings(REDIS_URL="redis://127.0.0.1:1", EMBEDDING_CACHE_REDIS_URL=own_server.url)
    assert "; hit" in cache_status(await ask(EmbeddingCacheMiddleware(server(Spy()), settings=elsewhere), "a"))


async def test_a_changed_model_is_logged_once(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """However often lengths differ, the operator reads it once, with what to do."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=settings)
    for dims in (5, 6, 7):
        spy.dims = dims
        await ask(app, "a", f"new {dims}")
        await ask(app, "a", f"newer {dims}")
    records = [r for r in caplog.records if event_of(r) == "redis_asgi.embedding_lengths_differ"]
    assert 1 == len(records)
    assert "EMBEDDING_CACHE_NAMESPACE" in records[0].fix  # type: ignore[attr-defined]  # an extra
