"""What the cache counts agrees with what it did, and no label carries what somebody sent."""

import asyncio
import time
import uuid
from collections.abc import Iterator
from typing import Any, cast

import pytest
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import generate_latest
from starlette.types import ASGIApp, Receive, Scope, Send

from redis_asgi.asgi.body_budget import process_budget
from redis_asgi.embeddings.cache import EmbeddingCache
from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.embeddings.records.metrics import Items
from redis_asgi.embeddings.wire import Batch, Uncacheable
from redis_asgi.embeddings.wire.openai import OpenAI
from redis_asgi.settings import Settings
from redis_asgi.telemetry import Telemetry, fresh_telemetry

from ..kit.embedding_apps import DIMS, Spy, cache_status, client, drive, read, respond, server
from ..kit.inside import shared_of
from ..kit.patience import quiet, until
from ..kit.servers import Server
from .callers import Caller, Gate

pytestmark = pytest.mark.anyio

VALUE_BYTES = 32 + 4 * DIMS


@pytest.fixture
def counted() -> Iterator[Telemetry]:
    """A telemetry of the test's own."""
    with fresh_telemetry() as telemetry:
        yield telemetry


def memory(**more: Any) -> Settings:
    """A ``memory://`` of its own: equal settings share one."""
    return Settings(REDIS_URL="memory://", REDIS_KEY_PREFIX=f"{uuid.uuid4().hex}:", **more)


def of(telemetry: Telemetry, name: str, **labels: str) -> float:
    """One sample's value; 0 when there is none."""
    return telemetry.registry.get_sample_value(f"redis_asgi_{name}", labels) or 0


def series(telemetry: Telemetry, name: str) -> dict[str, float]:
    """The samples of a counter with one label that are not 0, by that label."""
    found = {}
    for family in telemetry.registry.collect():
        for sample in family.samples:
            if sample.name == f"redis_asgi_{name}" and sample.value:
                [label] = sample.labels.values()
                found[label] = sample.value
    return found


def ask(*items: str, **more: Any) -> dict[str, Any]:
    """A request's body."""
    return {"model": "m", "input": list(items), **more}


async def test_hits_misses_and_their_bytes_and_tokens(any_settings: Settings, counted: Telemetry) -> None:
    """A miss of 2, a hit of 2 with a duplicate, a partial of 2 and 1;
    a token per word and one more.
    """
    app = EmbeddingCacheMiddleware(server(Spy()), settings=any_settings)
    async with client(app) as c:
        for items in (("a", "b"), ("a", "b", "a"), ("a", "b", "c")):
            await c.post("/v1/embeddings", json=ask(*items))

    assert {"miss": 1, "hit": 1, "partial": 1} == series(counted, "cache_requests_total")
    assert {"hit": 4, "miss": 3} == series(counted, "cache_items_total")
    assert 3 * VALUE_BYTES == of(counted, "cache_stored_bytes_total")
    assert 4 * VALUE_BYTES == of(counted, "cache_served_bytes_total")
    assert 3 * 2 + 2 * 2 == of(counted, "cache_saved_tokens_total")
    assert 2 == of(counted, "cache_origin_duration_seconds_count")
    assert 2 == of(counted, "cache_store_duration_seconds_count")
    assert {} == series(counted, "cache_rejected_total")


async def test_a_lookup_is_timed_where_there_is_one(settings: Settings, counted: Telemetry) -> None:
    """Each trip to Redis is a command; once the epoch is seen,
    a full hit of the process needs none.
    """
    app = EmbeddingCacheMiddleware(server(Spy()), settings=settings)
    async with client(app) as c:
        for _ in range(5):
            await c.post("/v1/embeddings", json=ask("a"))

    assert {"miss": 1, "hit": 4} == series(counted, "cache_requests_total")
    assert 2 == of(counted, "cache_lookup_duration_seconds_count")
    assert 2 == of(counted, "redis_commands_total", op="lookup", outcome="ok")
    # The new model's epoch, and its first vector.
    assert 2 == of(counted, "redis_commands_total", op="store", outcome="ok")
    assert 2 == of(counted, "redis_command_duration_seconds_count", op="lookup")


async def test_what_waits_for_anothers_computation_is_collapsed(any_settings: Settings, counted: Telemetry) -> None:
    """Three callers of one input: one miss, two collapsed, whose tokens are saved."""
    spy, gate = Spy(), Gate()
    app = EmbeddingCacheMiddleware(server(spy, before=gate), settings=any_settings)
    callers = [Caller(app, "a") for _ in range(3)]
    await gate.reached.wait()
    await quiet(shared_of(app).vectors.manager)
    gate.open.set()
    await asyncio.gather(*(caller.task for caller in callers))

    assert 1 == spy.calls
    assert {"miss": 3} == series(counted, "cache_requests_total")
    assert {"miss": 1, "collapsed": 2} == series(counted, "cache_items_total")
    assert 2 * 2 == of(counted, "cache_saved_tokens_total")
    assert 0 == of(counted, "cache_served_bytes_total")


async def test_without_a_lease_a_hit_is_stale(counted: Telemetry) -> None:
    """The app is asked only to let the caller in."""
    app = EmbeddingCacheMiddleware(server(Spy()), lease=0, settings=memory())
    async with client(app) as c:
        await c.post("/v1/embeddings", json=ask("a"))
        await c.post("/v1/embeddings", json=ask("a"))

    assert {"miss": 1, "stale": 1} == series(counted, "cache_requests_total")
    assert {"miss": 2} == series(counted, "cache_items_total")


TOKENS: dict[str, dict[str, Any]] = {
    "late-chunking": {"json": ask("a", late_chunking=True)},
    "multi-vector": {"json": ask("a", return_multivector=True)},
    "encoding": {"json": ask("a", encoding_format="ubinary")},
    "integers": {"json": ask("a", output_dtype="int8")},
    "not-json": {"content": b"{", "headers": {"content-type": "application/json"}},
    "body-header": {"json": ask("a"), "headers": {"content-digest": "x"}},
    "no-store": {"json": ask("a"), "headers": {"cache-control": "no-store"}},
    "too-large": {"json": ask("a", "b", "c")},
    "item-lists": {"json": ask("a", "b", instructions=["x", "y"])},
    "not-understood": {"json": {"model": "m"}},
}


@pytest.mark.parametrize("token", TOKENS)
async def test_a_bypass_is_counted_by_its_token(token: str, counted: Telemetry) -> None:
    """What the answer's Cache-Status says; no input is counted."""
    settings = memory(EMBEDDING_CACHE_MAX_INPUTS=2)
    async with client(EmbeddingCacheMiddleware(server(Spy()), settings=settings)) as c:
        response = await c.post("/v1/embeddings", **TOKENS[token])

    assert f"redis-asgi; fwd=bypass; detail={token}" == cache_status(response)
    assert {"bypass": 1} == series(counted, "cache_requests_total")
    assert {token: 1} == series(counted, "cache_bypass_total")
    assert {} == series(counted, "cache_items_total")


@pytest.mark.parametrize(
    ("token", "header"), [("response-no-store", (b"cache-control", b"no-store")), ("vary", (b"vary", b"accept"))]
)
async def test_an_answer_that_may_not_be_stored_is_rejected(
    token: str, header: tuple[bytes, bytes], counted: Telemetry
) -> None:
    """Its request is a bypass, its inputs were misses, nothing is stored."""
    inner = server(Spy())

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def with_header(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        await inner(scope, receive, with_header)

    async with client(EmbeddingCacheMiddleware(app, settings=memory())) as c:
        response = await c.post("/v1/embeddings", json=ask("a", "b"))

    assert f"redis-asgi; fwd=bypass; detail={token}" == cache_status(response)
    assert {token: 1} == series(counted, "cache_bypass_total") == series(counted, "cache_rejected_total")
    assert {"bypass": 1} == series(counted, "cache_requests_total")
    assert {"miss": 2} == series(counted, "cache_items_total")
    assert 0 == of(counted, "cache_stored_bytes_total")


async def test_a_full_process_and_a_dead_redis_are_bypasses(counted: Telemetry) -> None:
    """``busy``, and ``redis-down`` with the failure of the command."""
    busy = EmbeddingCacheMiddleware(server(Spy()), settings=memory())
    down = EmbeddingCacheMiddleware(server(Spy()), settings=Settings(REDIS_URL="redis://127.0.0.1:1/0"))
    async with client(busy) as c, client(down) as d:
        assert process_budget().take(256 * 1024 * 1024)
        await c.post("/v1/embeddings", json=ask("a"))
        process_budget().give(256 * 1024 * 1024)
        await d.post("/v1/embeddings", json=ask("a"))

    assert {"busy": 1, "redis-down": 1} == series(counted, "cache_bypass_total")
    assert {"bypass": 2} == series(counted, "cache_requests_total")
    assert 1 == of(counted, "redis_commands_total", op="lookup", outcome="connection")
    assert 0 == of(counted, "redis_commands_total", op="lookup", outcome="ok")


async def test_a_client_that_leaves_while_sending_says_nothing_of_the_process(counted: Telemetry) -> None:
    """Only a process that holds too much is ``busy``."""
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": headers}
    await drive(EmbeddingCacheMiddleware(server(Spy()), settings=memory()), scope, receive)

    assert {"not-understood": 1} == series(counted, "cache_bypass_total")


async def test_a_replayed_request_counts_once(counted: Telemetry) -> None:
    """The app refuses the smaller request: the original is answered, and none of its inputs by us."""
    inner = server(Spy())

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = await read(receive)
        if body == b'{"model":"m","input":["b"]}':
            await respond(send, b"{}", 422)
            return
        sent = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return sent.pop()

        await inner(scope, again, send)

    async with client(EmbeddingCacheMiddleware(app, settings=memory())) as c:
        await c.post("/v1/embeddings", json=ask("a"))
        response = await c.post("/v1/embeddings", json=ask("a", "b"))

    assert "redis-asgi; fwd=bypass; detail=replayed" == cache_status(response)
    assert {"miss": 1, "bypass": 1} == series(counted, "cache_requests_total")
    assert {"replayed": 1} == series(counted, "cache_bypass_total")
    assert {"miss": 1} == series(counted, "cache_items_total")
    assert {"status": 1} == series(counted, "cache_rejected_total")


async def test_errors_of_the_app_are_errors(counted: Telemetry) -> None:
    """A 500, and an exception; an answer that is none of an embedding server's is a bypass."""

    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        body = await read(receive)
        if b"raise" in body:
            raise RuntimeError("of the app")
        await respond(send, b"{}", 500 if b"fail" in body else 200)

    async with client(EmbeddingCacheMiddleware(failing, settings=memory())) as c:
        await c.post("/v1/embeddings", json=ask("fail"))
        with pytest.raises(RuntimeError, match="of the app"):
            await c.post("/v1/embeddings", json=ask("raise"))
        await c.post("/v1/embeddings", json=ask("odd"))

    assert {"error": 2, "bypass": 1} == series(counted, "cache_requests_total")
    assert {"not-understood": 1} == series(counted, "cache_bypass_total")
    assert {"status": 1, "not-understood": 1} == series(counted, "cache_rejected_total")
    assert 3 == of(counted, "cache_origin_duration_seconds_count")


async def test_every_request_counts_once_also_when_its_caller_goes(counted: Telemetry) -> None:
    """Disconnected or cancelled while the app computes: misses, no errors of the app."""
    spy, gate = Spy(), Gate()
    app = EmbeddingCacheMiddleware(server(spy, before=gate), settings=memory())
    callers = [Caller(app, text) for text in "abc"]
    await until(lambda: spy.calls == 3)
    callers[0].disconnect()
    callers[1].task.cancel()
    await quiet(shared_of(app).vectors.manager)
    gate.open.set()
    await asyncio.wait({caller.task for caller in callers}, timeout=5)

    assert {"miss": 3} == series(counted, "cache_requests_total")


async def test_only_if_cached_counts_no_input(counted: Telemetry) -> None:
    """Nothing was computed for it."""
    app = EmbeddingCacheMiddleware(server(Spy()), settings=memory())
    async with client(app, **{"cache-control": "only-if-cached"}) as c:
        assert 504 == (await c.post("/v1/embeddings", json=ask("a"))).status_code

    assert {"miss": 1} == series(counted, "cache_requests_total")
    assert {} == series(counted, "cache_items_total")


class Chatty(OpenAI):
    """A wire format that says why in words of the request."""

    def split(self, fields: dict[str, Any], path_model: str | None) -> Batch | Uncacheable:
        """Never cacheable."""
        return Uncacheable(str(fields["input"]))


async def test_no_label_carries_what_somebody_sent(redis_url: str, counted: Telemetry) -> None:
    """Texts, models, keys, paths, credentials and words of a wire format stay out; so do addresses
    of Redis.
    """
    settings = Settings(REDIS_URL=redis_url)

    def app_of(**options: Any) -> ASGIApp:
        return EmbeddingCacheMiddleware(server(Spy()), settings=settings, **options)

    nobody = app_of(partition_by=lambda conn: None)
    for app in (app_of(), app_of(routes={"/v1/embeddings": Chatty()}), nobody):
        async with client(app, authorization="Bearer whispered") as c:
            for body in (ask("whispered"), ask("whispered", model="whispered-model")):
                await c.post("/v1/embeddings", json=body)
    text = generate_latest(counted.registry).decode()

    assert {"miss": 2, "bypass": 4} == series(counted, "cache_requests_total")
    assert {"other": 2, "partition": 2} == series(counted, "cache_bypass_total")
    assert "whispered" not in text
    assert "embedding_input" not in text
    assert redis_url.split("/")[2] not in text


async def test_other_routes_count_nothing(counted: Telemetry) -> None:
    """A request that is not to an embedding endpoint leaves no trace."""
    before = generate_latest(counted.registry)
    app = EmbeddingCacheMiddleware(server(Spy()), settings=memory())
    made = generate_latest(counted.registry)
    async with client(app) as c:
        await c.get("/v1/embeddings")
        await c.post("/v1/completions", json=ask("a"))

    assert b"\nredis_asgi_cache_requests_total{" not in before
    assert without_times(made) == without_times(generate_latest(counted.registry))


def without_times(text: bytes) -> list[bytes]:
    """An exposition without when its series were made."""
    return [line for line in text.splitlines() if b"_created" not in line]


async def test_the_cache_by_ids_counts_its_ids(redis_url: str, counted: Telemetry) -> None:
    """Hits, misses and ids another call was already at; each trip to Redis."""
    cache = EmbeddingCache(settings=Settings(REDIS_URL=redis_url))
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def compute(ids: list[str]) -> list[list[float]]:
        begun.set()
        await go_on.wait()
        return [[1.0]] * len(ids)

    assert await cache.set_embedding("a", [1.0])
    assert ["a"] == list(await cache.get_many(["a", "b", "a"]))
    first = asyncio.ensure_future(cache.get_or_compute(["a", "b", "c"], compute))
    await begun.wait()
    second = asyncio.ensure_future(cache.get_or_compute(["b", "c", "b"], compute))
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(first, second)

    assert {"hit": 2, "miss": 3, "collapsed": 2} == series(counted, "cache_items_total")
    assert {} == series(counted, "cache_requests_total")
    assert 2 == of(counted, "redis_commands_total", op="lookup", outcome="ok")
    assert 2 == of(counted, "redis_commands_total", op="store", outcome="ok")


async def test_a_full_redis_is_a_failed_store(own_server: Server, counted: Telemetry) -> None:
    """OOM: the trip is counted by its failure, and no byte as stored."""
    app = EmbeddingCacheMiddleware(server(Spy()), settings=Settings(REDIS_URL=own_server.url))
    own_server.client().config_set("maxmemory", "1")
    async with client(app) as c:
        await c.post("/v1/embeddings", json=ask("a"))

    assert 1 == of(counted, "redis_commands_total", op="store", outcome="oom")
    assert 0 == of(counted, "redis_commands_total", op="store", outcome="ok")
    assert 0 == of(counted, "cache_stored_bytes_total")


async def test_history_has_the_inputs_of_an_interval(counted: Telemetry) -> None:
    """The request that finds an interval ended counts into the next one."""
    items = Items()
    items.add(hits=3, misses=2)
    counted._due = time.monotonic()
    app = EmbeddingCacheMiddleware(server(Spy()), settings=memory())
    async with client(app) as c:
        await c.post("/v1/embeddings", json=ask("a"))

    first = counted.history()[0]
    assert (3, 2) == (first.hits, first.misses)
    assert 3 == series(counted, "cache_items_total")["miss"]


async def test_the_span_says_what_the_cache_did(counted: Telemetry) -> None:
    """On the span that is current, before the answer's first byte."""
    tracer = TracerProvider().get_tracer("test")
    app = EmbeddingCacheMiddleware(server(Spy()), settings=memory())
    said: list[Any] = []

    async def traced(scope: Scope, receive: Receive, send: Send) -> None:
        with tracer.start_as_current_span("request") as span:

            async def noting(message: Any) -> None:
                if message["type"] == "http.response.start":
                    said.append(dict(cast("Any", span).attributes).get("redis_asgi.cache.result"))
                await send(message)

            await app(scope, receive, noting)

    async with client(traced) as c:
        for body in (ask("a"), ask("a"), ask("a", "b"), ask("a", stream=True)):
            await c.post("/v1/embeddings", json=body)

    assert ["miss", "hit", "partial", "bypass"] == said
