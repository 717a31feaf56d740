"""Concurrent requests: each input computed once, and nobody pays for somebody else's departure."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import orjson
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redis_asgi.connection.manager import RedisManager
from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.embeddings.storage.operations import WRITE_TIMEOUT, Write, WriteResult
from redis_asgi.embeddings.storage.store import MemoryVectors, RedisVectors
from redis_asgi.errors import Failure
from redis_asgi.maintenance import flush_model
from redis_asgi.settings import Settings

from ..kit.embedding_apps import FORMATS, Spy, cache_status, client, read, respond, server
from ..kit.patience import PATIENCE, quiet

pytestmark = pytest.mark.anyio


class Gate:
    """An app's pause: it says when it is reached, and goes on when told to."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def __call__(self, _scope: Scope) -> None:
        self.reached.set()
        await self.open.wait()


class Caller:
    """One request, driven by hand, that can disconnect or be cancelled."""

    def __init__(self, app: ASGIApp, *items: Any, **headers: str) -> None:
        body = orjson.dumps({"model": "m", "input": list(items)})
        raw = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        raw += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self.scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/embeddings",
            "query_string": b"",
            "headers": raw,
        }
        self.sent: list[Message] = []
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._messages.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self.task = asyncio.ensure_future(app(self.scope, self._messages.get, self._send))

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    def disconnect(self) -> None:
        """The client goes away."""
        self._messages.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int:
        """Of its answer."""
        return int(self.sent[0]["status"])

    @property
    def said(self) -> str:
        """Its Cache-Status."""
        return str(dict(self.sent[0]["headers"]).get(b"cache-status", b""), "latin-1")

    @property
    def answer(self) -> Any:
        """Its body."""
        return orjson.loads(b"".join(m.get("body", b"") for m in self.sent[1:]))


async def quiet_of(app: EmbeddingCacheMiddleware) -> None:
    """Let whatever was begun come to where it waits for the test."""
    await quiet(app._shared.vectors.manager)


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something is so."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.001)


async def test_fifty_identical_requests_are_one_computation(any_settings: Settings) -> None:
    """The app computes each input once, and every caller gets the same answer."""
    spy, gate = Spy(), Gate()
    app = EmbeddingCacheMiddleware(server(spy, before=gate), settings=any_settings)
    callers = [Caller(app, "a", "b") for _ in range(50)]
    await gate.reached.wait()
    await quiet_of(app)
    gate.open.set()
    await asyncio.gather(*(caller.task for caller in callers))
    assert ["a", "b"] == spy.seen
    assert {200} == {caller.status for caller in callers}
    assert 1 == len({orjson.dumps(caller.answer["data"]) for caller in callers})
    assert 1 == len({orjson.dumps(caller.answer["usage"]) for caller in callers})
    assert {"redis-asgi; fwd=miss; stored", "redis-asgi; fwd=miss; collapsed"} == {c.said for c in callers}


async def test_overlapping_batches_share_what_they_have_in_common(any_settings: Settings) -> None:
    """A request waits for another's inputs and forwards only its own."""
    spy, gate = Spy(), Gate()
    app = EmbeddingCacheMiddleware(server(spy, before=gate), settings=any_settings)
    first = Caller(app, "a", "b")
    await gate.reached.wait()
    second = Caller(app, "b", "c", "a")
    await until(lambda: spy.calls == 2)
    gate.open.set()
    await asyncio.gather(first.task, second.task)
    assert ["a", "b", "c"] == spy.seen
    assert FORMATS["openai"][2]({"model": "m"}, ["b", "c", "a"], Spy())["data"] == second.answer["data"]


async def test_the_first_callers_disconnect_fails_nobody(any_settings: Settings) -> None:
    """The call goes on for those who joined it, and the app sees no disconnect."""
    gate, disconnected = Gate(), []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = orjson.loads(await read(receive))
        watch = asyncio.ensure_future(receive())
        await gate(scope)
        disconnected.append(watch.done())
        watch.cancel()
        await respond(send, orjson.dumps(FORMATS["openai"][2](body, body["input"], Spy())))

    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    first = Caller(cached, "a")
    await gate.reached.wait()
    second = Caller(cached, "a")
    await quiet_of(cached)
    first.disconnect()
    await quiet_of(cached)
    gate.open.set()
    await asyncio.gather(first.task, second.task)
    assert [False] == disconnected
    assert 200 == second.status


async def test_the_first_callers_cancellation_fails_nobody(any_settings: Settings) -> None:
    """A caller whose task is cancelled leaves; the others get their answer."""
    spy, gate = Spy(), Gate()
    app = EmbeddingCacheMiddleware(server(spy, before=gate), settings=any_settings)
    first = Caller(app, "a")
    await gate.reached.wait()
    second = Caller(app, "a")
    await quiet_of(app)
    first.task.cancel()
    await asyncio.wait({first.task})
    gate.open.set()
    await second.task
    assert first.task.cancelled()
    assert (200, 1) == (second.status, spy.calls)


@pytest.mark.parametrize("cancelled", [False, True])
async def test_the_app_learns_when_nobody_waits_any_more(cancelled: bool, any_settings: Settings) -> None:
    """After the last disconnect the app sees one; after the last cancellation it is cancelled."""
    started, seen = asyncio.Event(), []

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await read(receive)
        started.set()
        try:
            seen.append((await receive())["type"])
            await respond(send, b"null")
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    callers = [Caller(cached, "a") for _ in range(3)]
    await started.wait()
    await quiet_of(cached)
    for caller in callers:
        assert not seen
        if cancelled:
            caller.task.cancel()
        else:
            caller.disconnect()
        await quiet_of(cached)
    await asyncio.wait({caller.task for caller in callers})
    await until(lambda: bool(seen))
    assert ["cancelled" if cancelled else "http.disconnect"] == seen[:1]


@pytest.mark.parametrize("followed", [False, True])
@pytest.mark.parametrize("cancelled", [False, True])
async def test_an_answer_that_flows_ends_with_its_client(
    cancelled: bool, followed: bool, any_settings: Settings
) -> None:
    """What is only relayed is somebody's alone: an app that streams hears of the disconnect, or is cancelled."""
    gate = Gate()
    ended: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read(receive)
        if gate.open.is_set():
            # A follower's own: it is still at it when the first one goes.
            await until(lambda: bool(ended))
            await respond(send, b"{}", 503)
            return
        await gate(scope)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        heard = asyncio.ensure_future(receive())
        try:
            while not heard.done():
                await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
                await asyncio.sleep(0.001)
            ended.append((await heard)["type"])
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        finally:
            heard.cancel()

    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    first = Caller(cached, "a")
    await gate.reached.wait()
    second = Caller(cached, "a") if followed else None
    await quiet_of(cached)
    gate.open.set()
    await until(lambda: len(first.sent) > 2)
    if cancelled:
        first.task.cancel()
    else:
        first.disconnect()
    await until(lambda: bool(ended))
    await asyncio.wait({first.task})
    assert ["cancelled" if cancelled else "http.disconnect"] == ended
    if second is not None:
        await second.task
        assert 503 == second.status


async def test_what_the_app_does_after_its_answer_is_no_followers_to_end(any_settings: Settings) -> None:
    """Who waits for two calls and is cancelled after one has brought nothing, ends the other at most."""
    one, other, background = asyncio.Event(), asyncio.Event(), asyncio.Event()
    done: list[str] = []

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        if b'"other"' in await read(receive):
            await other.wait()
            await respond(send, b"null")
            await background.wait()
            done.append("background")
        else:
            await one.wait()
            await respond(send, b"null")

    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    flights = cached._shared.flights
    leaders = Caller(cached, "one"), Caller(cached, "other")
    await until(lambda: len(flights._by_name) == 2)
    follower = Caller(cached, "one", "other")
    await until(lambda: {2} == {len(flight._waiting) for flight in flights._by_name.values()})
    other.set()
    await until(lambda: len(leaders[1].sent) == 2)
    follower.task.cancel()
    await asyncio.wait({follower.task})
    await quiet_of(cached)
    one.set()
    background.set()
    await asyncio.gather(*(leader.task for leader in leaders))
    assert ["background"] == done


async def test_a_client_that_leaves_first_is_not_cancelled_with_the_last(any_settings: Settings) -> None:
    """Its request ends as one whose client has gone: nobody cancelled it."""
    gate = Gate()
    app = EmbeddingCacheMiddleware(server(Spy(), before=gate), settings=any_settings)
    first = Caller(app, "a")
    await gate.reached.wait()
    last = Caller(app, "a")
    await quiet_of(app)
    first.disconnect()
    await quiet_of(app)
    last.task.cancel()
    await asyncio.wait({first.task, last.task})
    assert last.task.cancelled()
    assert first.task.exception() is None


@pytest.mark.parametrize("role", ["of its own", "of another"])
async def test_nothing_is_asked_again_for_a_client_that_has_gone(role: str, any_settings: Settings) -> None:
    """Neither the original of a smaller request, nor what a failed flight of somebody else would have brought."""
    gate, bodies = Gate(), []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bodies.append(await read(receive))
        await gate(scope)
        # What vLLM's does once it hears of the disconnect.
        await respond(send, b"null")

    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    first = Caller(cached, "a", "a")
    await gate.reached.wait()
    leaving = first if role == "of its own" else Caller(cached, "a")
    await quiet_of(cached)
    leaving.disconnect()
    await quiet_of(cached)
    gate.open.set()
    async with asyncio.timeout(PATIENCE):
        await asyncio.wait({leaving.task})
        await asyncio.wait({first.task})
    assert not leaving.sent
    # Somebody who stays is asked for once more: he gets the answer to the original.
    assert (1 if leaving is first else 2) == len(bodies)


async def test_an_error_is_the_apps_answer_to_each_request_that_gets_it(any_settings: Settings) -> None:
    """Followers of a flight that fails ask the app themselves; nobody is handed another's error."""
    gate, calls = Gate(), []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read(receive)
        calls.append(dict(scope["headers"])[b"x-request-id"])
        await gate(scope)
        await respond(send, b'{"caller":"%b"}' % calls[-1] if len(calls) == 1 else b"{}", 503)

    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    first = Caller(cached, "a", x_request_id="0")
    await gate.reached.wait()
    rest = [Caller(cached, "a", x_request_id=str(n)) for n in (1, 2, 3)]
    await quiet_of(cached)
    assert 1 == len(calls)
    gate.open.set()
    await asyncio.gather(first.task, *(caller.task for caller in rest))
    assert {b"0", b"1", b"2", b"3"} == set(calls)
    assert 4 == len(calls)
    assert {503} == {caller.status for caller in (first, *rest)}


async def test_a_large_flight_is_not_joined_by_small_requests(any_settings: Settings) -> None:
    """A query does not wait for a re-index: of more than 16 inputs only as large a request waits."""
    spy, gate = Spy(), Gate()
    inner, held = server(spy), server(spy, before=gate)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        large = int(dict(scope["headers"])[b"content-length"]) > 100
        await (held if large else inner)(scope, receive, send)

    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    large = Caller(cached, *(f"text {n}" for n in range(17)))
    await gate.reached.wait()
    small = Caller(cached, "text 3")
    await small.task
    assert 2 == spy.calls
    as_large = Caller(cached, *(f"text {n}" for n in range(17)))
    await quiet_of(cached)
    gate.open.set()
    await asyncio.gather(large.task, as_large.task)
    assert 2 == spy.calls
    assert "collapsed" in as_large.said


async def test_a_flush_is_not_outrun_by_joining(redis_url: str) -> None:
    """Who asks after a flush does not join a computation begun before it."""
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_L1_BYTES=0)
    spy, gate = Spy(), Gate()
    app = EmbeddingCacheMiddleware(server(spy, before=gate), settings=settings)
    before = Caller(app, "a")
    await gate.reached.wait()
    await flush_model("m", settings=settings)
    after = Caller(app, "a")
    await until(lambda: spy.calls == 2)
    gate.open.set()
    await asyncio.gather(before.task, after.task)
    assert 2 == spy.calls


async def test_under_share_a_follower_without_a_lease_asks_the_app_itself(any_settings: Settings) -> None:
    """A flight lets in nobody but its own caller: an unknown key gets the app's 401."""
    spy, gate = Spy(), Gate()
    inner = server(spy, before=gate)
    refused: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if dict(scope["headers"])[b"authorization"] != b"good":
            refused.append(await read(receive))
            await respond(send, b"{}", 401)
            return
        await inner(scope, receive, send)

    cached = EmbeddingCacheMiddleware(app, settings=any_settings, share=True)
    first = Caller(cached, "aa", "b", authorization="good")
    await gate.reached.wait()
    same, other = (
        Caller(cached, "aa", "b", authorization="good"),
        Caller(cached, "aa", "b", authorization="bad"),
    )
    await other.task
    gate.open.set()
    await asyncio.gather(first.task, same.task)
    assert (200, 200, 401) == (first.status, same.status, other.status)
    assert [b'{"model":"m","input":["b"]}'] == refused
    assert 1 == spy.calls


async def test_a_refused_caller_does_not_join_what_was_asked_before(any_settings: Settings) -> None:
    """The app has answered 401 since: whoever comes then meets it, not an older request's answer."""
    gate, keys, calls = Gate(), {b"good"}, [0]
    inner = server(Spy(), before=gate)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        calls[0] += 1
        if dict(scope["headers"])[b"authorization"] not in keys:
            await read(receive)
            await respond(send, b"{}", 401)
            return
        await inner(scope, receive, send)

    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    older = Caller(cached, "a", authorization="good")
    await gate.reached.wait()
    joined = Caller(cached, "a", authorization="good")
    await quiet_of(cached)
    assert 1 == calls[0]
    keys.clear()
    refused = Caller(cached, "b", authorization="good")
    await refused.task
    later = Caller(cached, "a", authorization="good")
    await quiet_of(cached)
    gate.open.set()
    await asyncio.gather(older.task, joined.task, later.task)
    assert [200, 200, 401, 401] == [caller.status for caller in (older, joined, refused, later)]


async def test_a_later_2xx_of_an_older_request_does_not_undo_a_refusal(any_settings: Settings) -> None:
    """An answer asked for before a 401 grants no lease after it."""
    spy, gate, keys = Spy(), Gate(), {"key"}
    inner, held = server(spy), server(spy, before=gate)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if headers[b"authorization"].decode() not in keys:
            await read(receive)
            await respond(send, b"{}", 401)
            return
        await (held if b"x-slow" in headers else inner)(scope, receive, send)

    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    slow = Caller(cached, "slow", authorization="key", x_slow="1")
    await gate.reached.wait()
    keys.clear()
    assert 401 == await _status(Caller(cached, "b", authorization="key"))
    gate.open.set()
    await slow.task
    assert 200 == slow.status
    assert 401 == await _status(Caller(cached, "slow", authorization="key"))


async def _status(caller: Caller) -> int:
    await caller.task
    return caller.status


async def test_a_refusal_during_a_write_ends_the_lease_for_every_worker(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 401 may overtake the 2xx whose lease is on its way to Redis; the lease does not outlive it there."""
    writing, go = asyncio.Event(), asyncio.Event()
    write = RedisVectors.write

    async def slowly(store: RedisVectors, writes: Sequence[Write], within: float = WRITE_TIMEOUT) -> WriteResult:
        if not writing.is_set():  # that of the answer; a refusal's own record is written at once
            writing.set()
            await go.wait()
        return await write(store, writes, within)

    monkeypatch.setattr(RedisVectors, "write", slowly)
    inner, keys = server(Spy()), {"key"}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        known = dict(scope["headers"])[b"authorization"].decode() in keys
        await (inner(scope, receive, send) if known else respond(send, b"{}", 401))

    settings = Settings(REDIS_URL=redis_url)
    here, elsewhere = (EmbeddingCacheMiddleware(app, redis=RedisManager(settings)) for _ in range(2))
    first = Caller(here, "a", authorization="key")
    await writing.wait()
    keys.clear()
    assert 401 == await _status(Caller(here, "b", authorization="key"))
    go.set()
    await first.task
    assert 200 == first.status
    assert 401 == await _status(Caller(elsewhere, "a", authorization="key"))


async def test_no_store_is_not_joined_and_joins_nobody(any_settings: Settings) -> None:
    """Its answer is its own."""
    spy, gate = Spy(), Gate()
    app = EmbeddingCacheMiddleware(server(spy, before=gate), settings=any_settings)
    callers = [Caller(app, "a", cache_control="no-store") for _ in range(3)]
    await until(lambda: spy.calls == 3)
    gate.open.set()
    await asyncio.gather(*(caller.task for caller in callers))
    assert {"redis-asgi; fwd=bypass; detail=no-store"} == {caller.said for caller in callers}


async def test_background_tasks_of_the_app_run_after_its_answer(settings: Settings) -> None:
    """The client has its answer before they begin, and the request ends after them."""
    events: list[str] = []

    async def later() -> None:
        events.append("background" if caller.sent[-1:] and not caller.sent[-1].get("more_body") else "too early")

    async def endpoint(request: Request) -> Response:
        fields = await request.json()
        answer = FORMATS["openai"][2](fields, fields["input"], Spy())
        return JSONResponse(answer, background=BackgroundTask(wait_then_later))

    async def wait_then_later() -> None:
        await until(lambda: len(caller.sent) > 1)
        await later()

    app = EmbeddingCacheMiddleware(
        Starlette(routes=[Route("/v1/embeddings", endpoint, methods=["POST"])]), settings=settings
    )
    caller = Caller(app, "a")
    await caller.task
    assert ["background"] == events


def with_cancellation(endpoint: Any) -> Any:
    """VLLM's decorator: cancels the endpoint when the client disconnects, by reading ``receive`` until then."""

    async def listen(request: Request, reads: list[int]) -> None:
        while True:
            message = await request.receive()
            reads.append(1)
            if message["type"] == "http.disconnect":
                return

    async def wrapped(request: Request) -> Response:
        reads: list[int] = []
        request.app.state.reads.append(reads)
        await request.body()
        handler = asyncio.create_task(endpoint(request))
        listener = asyncio.create_task(listen(request, reads))
        done, pending = await asyncio.wait({handler, listener}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        return handler.result() if handler in done else JSONResponse(None)

    return wrapped


class _Authentication:
    """vLLM's, as far as it matters here."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if dict(scope["headers"]).get(b"authorization", b"").decode() != f"Bearer {self.key}":
            await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def vllm(settings: Settings, spy: Spy, gate: Gate) -> Starlette:
    """An app put together in vLLM's order: authentication, request ids, then ``--middleware``, outermost."""

    async def endpoint(request: Request) -> Response:
        fields = orjson.loads(await request.body())
        spy.bodies.append(await request.body())
        await gate(request.scope)
        return JSONResponse(FORMATS["openai"][2](fields, fields["input"], spy))

    async def request_id(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["x-request-id"] = request.headers.get("x-request-id", "none")
        return response

    app = Starlette(routes=[Route("/v1/embeddings", with_cancellation(endpoint), methods=["POST"])])
    app.state.reads = []
    app.add_middleware(_Authentication, key="secret")
    app.add_middleware(BaseHTTPMiddleware, dispatch=request_id)
    app.add_middleware(EmbeddingCacheMiddleware, settings=settings)
    return app


async def test_vllms_order_and_its_cancellation_loop_work(settings: Settings) -> None:
    """No spin, no early disconnect, a key still needed for hits; a disconnect's ``200 null`` is not stored."""
    spy, gate = Spy(), Gate()
    app = vllm(settings, spy, gate)
    gone = Caller(app, "gone", authorization="Bearer secret")
    await gate.reached.wait()
    await asyncio.sleep(0.05)
    assert [[]] == app.state.reads, "it must wait for a disconnect that has not come"
    gone.disconnect()
    await gone.task
    assert [[1]] == app.state.reads
    assert "stored" not in gone.said
    gate.open.set()
    async with client(app, authorization="Bearer secret") as c:
        said = [cache_status(await c.post("/v1/embeddings", json={"model": "m", "input": ["gone"]})) for _ in "ab"]
    assert "fwd=miss; stored" in said[0]
    assert "hit" in said[1]
    async with client(app, authorization="Bearer wrong") as c:
        assert 401 == (await c.post("/v1/embeddings", json={"model": "m", "input": ["gone"]})).status_code


async def test_a_storm_of_cancelled_requests_never_mixes_answers(any_settings: Settings) -> None:
    """Whoever is left gets the right vectors, and no flight or task stays behind."""
    spy = Spy()

    async def a_moment(_scope: Scope) -> None:
        await asyncio.sleep(0.003)

    app = EmbeddingCacheMiddleware(server(spy, before=a_moment), settings=any_settings)
    for turn in range(15):
        callers = [Caller(app, f"a{n % 7}", f"b{(n * turn) % 11}", f"{turn}") for n in range(20)]
        await asyncio.sleep(0.0005 * (turn % 5))
        for caller in callers[::3]:
            caller.task.cancel()
        for caller in callers[1::3]:
            caller.disconnect()
        await asyncio.wait({caller.task for caller in callers})
        for n, caller in enumerate(callers):
            if caller.task.cancelled() or n % 3 == 1:
                continue
            items = [f"a{n % 7}", f"b{(n * turn) % 11}", f"{turn}"]
            assert FORMATS["openai"][2]({"model": "m"}, items, Spy())["data"] == caller.answer["data"]
    flights = app._shared.flights
    await flights.settle()
    assert not flights._by_name
    assert app._shared.budget.take(256 * 1024 * 1024)
    app._shared.budget.give(256 * 1024 * 1024)


async def test_an_app_that_answers_twice_as_late_is_still_one_call(settings: Settings) -> None:
    """The next identical request after an answer never misses: the flight is joined until its write has ended."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=settings.but(EMBEDDING_CACHE_L1_BYTES=0))
    async with client(app) as c:

        async def ask(n: int) -> httpx.Response:
            return await c.post("/v1/embeddings", json={"model": "m", "input": [str(n)]})

        for n in range(50):
            await asyncio.gather(ask(n), ask(n))
            await ask(n)
    assert 50 == spy.calls


@pytest.mark.parametrize(
    ("leader", "follower", "inputs"),
    [
        ({"cache_control": "no-cache"}, {}, 1),
        ({"cache_control": "no-cache"}, {"cache_control": "only-if-cached"}, 1),
        ({"cache_control": "no-cache"}, {}, 40),
        ({"cache_control": "max-age=60"}, {}, 1),
        ({"authorization": "B"}, {}, 1),
    ],
    ids=["refreshed", "refreshed, only-if-cached", "refreshed with many", "too old for another", "to let another in"],
)
async def test_a_hit_does_not_wait_for_a_call_that_need_not_bring_it(
    leader: dict[str, str], follower: dict[str, str], inputs: int, any_settings: Settings
) -> None:
    """What is stored is answered while the app is asked for it once more, for whatever reason."""
    spy, gate = Spy(), Gate()
    settings = any_settings.model_copy(update={"EMBEDDING_CACHE_L1_BYTES": 0})
    app = EmbeddingCacheMiddleware(server(spy, before=gate), settings=settings, share=True)
    gate.open.set()
    items = [f"text {number}" for number in range(inputs)]
    app._shared.clock.wall = lambda: time.time() - 120
    await Caller(app, *items).task
    app._shared.clock.wall = time.time
    gate.open.clear()
    gate.reached.clear()
    asking = Caller(app, *items, **leader)
    await gate.reached.wait()
    hit = Caller(app, items[0], **follower)
    await until(hit.task.done)
    gate.open.set()
    await asking.task
    assert (200, 2) == (hit.status, spy.calls)
    assert hit.said.startswith("redis-asgi; hit; ttl=")


async def test_only_if_cached_looks_behind_a_call_under_way(any_settings: Settings) -> None:
    """Another worker may have stored meanwhile what this one computes."""
    gate, spy = Gate(), Spy()
    here = EmbeddingCacheMiddleware(server(spy, before=gate), settings=any_settings)
    slow = Caller(here, "a")
    await gate.reached.wait()
    await Caller(EmbeddingCacheMiddleware(server(spy), settings=any_settings), "a").task
    hit = Caller(here, "a", cache_control="only-if-cached")
    await until(hit.task.done)
    gate.open.set()
    await slow.task
    assert 200 == hit.status


async def test_a_flight_that_lands_during_a_lookup_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody was computing is not asked of the store, so his answer counts also when it comes first."""
    spy, gate, slow = Spy(), Gate(), asyncio.Event()
    look_up = MemoryVectors.lookup
    settings = Settings(REDIS_URL="memory://", REDIS_KEY_PREFIX="lands:", EMBEDDING_CACHE_L1_BYTES=0)
    app = EmbeddingCacheMiddleware(server(spy, before=gate), settings=settings)

    async def slowly(store: MemoryVectors, names: list[bytes], within: float) -> "list[bytes | None] | Failure":
        found = await look_up(store, names, within)
        await slow.wait()
        return found

    first = Caller(app, "a")
    await gate.reached.wait()
    monkeypatch.setattr(MemoryVectors, "lookup", slowly)
    second = Caller(app, "a")
    await quiet_of(app)
    gate.open.set()
    await first.task
    slow.set()
    await second.task

    assert 1 == spy.calls
    assert first.answer["data"] == second.answer["data"]
    assert "redis-asgi; fwd=miss; collapsed" == second.said


async def test_a_lease_that_lands_during_a_lookup_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors are in the process before their lease is in Redis: who comes in between asks the app nothing."""
    spy, written, answered = Spy(), asyncio.Event(), asyncio.Event()
    look_up, write = MemoryVectors.lookup, MemoryVectors.write
    settings = Settings(REDIS_URL="memory://", REDIS_KEY_PREFIX="lands-lease:")
    app = EmbeddingCacheMiddleware(server(spy), settings=settings)

    async def write_slowly(store: MemoryVectors, writes: Sequence[Write], within: float = WRITE_TIMEOUT) -> WriteResult:
        await written.wait()
        return await write(store, writes, within)

    async def look_up_slowly(store: MemoryVectors, names: list[bytes], within: float) -> "list[bytes | None] | Failure":
        found = await look_up(store, names, within)
        await answered.wait()
        return found

    monkeypatch.setattr(MemoryVectors, "write", write_slowly)
    first = Caller(app, "a")
    await until(lambda: bool(first.sent))
    monkeypatch.setattr(MemoryVectors, "lookup", look_up_slowly)
    second = Caller(app, "a")
    await until(lambda: app._shared.flights.looking == 1)
    written.set()
    await first.task
    answered.set()
    await second.task

    assert 1 == spy.calls
    assert first.answer["data"] == second.answer["data"]
    assert "redis-asgi; fwd=stale; detail=lease; collapsed" == second.said


async def test_a_flight_that_lands_during_a_lookup_it_began_after_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two callers look up at once; one has its answer before the other knows that nothing was stored."""
    spy, slow = Spy(), asyncio.Event()
    look_up = MemoryVectors.lookup
    settings = Settings(REDIS_URL="memory://", REDIS_KEY_PREFIX="began:", EMBEDDING_CACHE_L1_BYTES=0)
    app = EmbeddingCacheMiddleware(server(spy), settings=settings)
    await Caller(app, "whose epoch is known from now on").task
    lookups: list[object] = []

    async def second_is_slow(store: MemoryVectors, names: list[bytes], within: float) -> "list[bytes | None] | Failure":
        await asyncio.sleep(0)
        found = await look_up(store, names, within)
        lookups.append(names)
        if len(lookups) == 2:
            await slow.wait()
        return found

    monkeypatch.setattr(MemoryVectors, "lookup", second_is_slow)
    first, second = Caller(app, "a"), Caller(app, "a")
    await first.task
    slow.set()
    await second.task
    later = Caller(app, "a")
    await later.task

    assert 2 == spy.calls
    assert first.answer["data"] == second.answer["data"]
    assert "redis-asgi; fwd=miss; collapsed" == second.said
    assert later.said.startswith("redis-asgi; hit")


async def test_an_epoch_that_appears_during_a_lookup_parts_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """One caller's reply is from before another service gave the model its epoch, the other's from after."""
    spy, slow = Spy(), asyncio.Event()
    look_up = MemoryVectors.lookup
    settings = Settings(REDIS_URL="memory://", REDIS_KEY_PREFIX="appears:", EMBEDDING_CACHE_L1_BYTES=0)
    app, other = (EmbeddingCacheMiddleware(server(spy), settings=settings) for _ in range(2))
    lookups: list[object] = []

    async def first_is_slow(store: MemoryVectors, names: list[bytes], within: float) -> "list[bytes | None] | Failure":
        found = await look_up(store, names, within)
        lookups.append(names)
        if len(lookups) == 1:
            await slow.wait()
        return found

    monkeypatch.setattr(MemoryVectors, "lookup", first_is_slow)
    first = Caller(app, "a")
    await until(lambda: len(lookups) == 1)
    await Caller(other, "of another service").task
    second = Caller(app, "a")
    await second.task
    slow.set()
    await first.task
    later = Caller(app, "a")
    await later.task

    assert ["of another service", "a"] == spy.seen
    assert "redis-asgi; fwd=miss; collapsed" == first.said
    assert later.said.startswith("redis-asgi; hit")


async def test_landed_flights_are_forgotten_when_no_lookup_can_need_them() -> None:
    """Their vectors stay in memory only while somebody looks up, and then no longer than a lookup takes."""
    settings = Settings(REDIS_URL="memory://", REDIS_KEY_PREFIX="forgotten:", EMBEDDING_CACHE_TIMEOUT=0.01)
    app = EmbeddingCacheMiddleware(server(Spy()), settings=settings)
    await Caller(app, "a", "b").task
    flights = app._shared.flights
    assert (0, 0) == (flights.looking, len(flights._landed))
    flights.looking += 1
    await Caller(app, "c", "d").task
    assert 3 == len(flights._landed)  # two inputs, and the lease that came with them
    await until(lambda: not flights._landed)


# A model that nobody has stored a vector of yet, so that Redis has no epoch of it.


async def test_a_new_models_concurrent_lookups_meet(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find that there is no epoch; one has its vector stored before the other hears so."""
    spy, slow = Spy(), asyncio.Event()
    look_up = RedisVectors.lookup
    app = EmbeddingCacheMiddleware(server(spy), settings=Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_L1_BYTES=0))
    lookups: list[object] = []

    async def second_is_slow(store: RedisVectors, names: list[bytes], within: float) -> "list[bytes | None] | Failure":
        found = await look_up(store, names, within)
        lookups.append(names)
        if len(lookups) == 2:
            await slow.wait()
        return found

    monkeypatch.setattr(RedisVectors, "lookup", second_is_slow)
    first, second = Caller(app, "a"), Caller(app, "a")
    await asyncio.wait({first.task, second.task}, return_when=asyncio.FIRST_COMPLETED)
    slow.set()
    await asyncio.gather(first.task, second.task)
    later = Caller(app, "a")
    await later.task

    assert ["a"] == spy.seen
    assert first.answer["data"] == second.answer["data"]
    assert later.said.startswith("redis-asgi; hit")


async def test_fifty_identical_requests_for_a_new_model_are_one_computation(redis_url: str) -> None:
    """Also when the app answers at once, model after model."""
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_TIMEOUT=5)
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=settings)
    async with client(app) as c:
        for model in map(str, range(20)):
            body = {"model": model, "input": ["a", "b"]}
            await asyncio.gather(*(c.post("/v1/embeddings", json=body) for _ in range(50)))
            warm = await c.post("/v1/embeddings", json=body)
            assert cache_status(warm).startswith("redis-asgi; hit")
    assert 20 * ["a", "b"] == spy.seen


async def test_two_workers_agree_on_a_new_model(redis_url: str) -> None:
    """One stores its first vector while the other computes; nothing is computed twice or lost by that."""
    spy, gate = Spy(), Gate()
    settings = [Settings(REDIS_URL=redis_url, REDIS_POOL_SIZE=size) for size in (4, 5)]
    slow = EmbeddingCacheMiddleware(server(spy, before=gate), settings=settings[0], redis=RedisManager(settings[0]))
    quick = EmbeddingCacheMiddleware(server(spy), settings=settings[1], redis=RedisManager(settings[1]))
    first = Caller(slow, "a")
    await gate.reached.wait()
    other = Caller(quick, "b")
    await other.task
    second = Caller(slow, "a")
    await quiet_of(slow)
    gate.open.set()
    await asyncio.gather(first.task, second.task)
    later = [Caller(app, "a", "b") for app in (quick, slow)]
    await asyncio.gather(*(caller.task for caller in later))

    assert ["a", "b"] == spy.seen
    assert first.answer["data"] == second.answer["data"]
    assert ["redis-asgi; hit"] * 2 == [caller.said[:15] for caller in later]
