"""Single-flight: what is asked for at once is computed once, whatever its callers do."""

import asyncio
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
from starlette.types import ASGIApp, Receive, Scope, Send

from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.settings import Settings

from ..kit.embedding_apps import FORMATS, Spy, cache_status, client, read, respond, server
from ..kit.inside import shared_of
from ..kit.patience import PATIENCE, until
from .callers import Caller, Gate, quiet_of

pytestmark = pytest.mark.anyio


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
    """What is only relayed is somebody's alone:
    an app that streams hears of the disconnect, or is cancelled.
    """
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
    """Who waits for two calls and is cancelled after one has brought nothing, ends the other at
    most.
    """
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
    flights = shared_of(cached).flights
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
    """Neither the original of a smaller request,
    nor what a failed flight of somebody else would have brought.
    """
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
    """VLLM's decorator: cancels the endpoint when the client disconnects,
    by reading ``receive`` until then.
    """

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
    """An app put together in vLLM's order: authentication, request ids,
    then ``--middleware``, outermost.
    """

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
    """No spin, no early disconnect, a key still needed for hits;
    a disconnect's ``200 null`` is not stored.
    """
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
    flights = shared_of(app).flights
    await flights.settle()
    assert not flights._by_name
    assert shared_of(app).budget.take(256 * 1024 * 1024)
    shared_of(app).budget.give(256 * 1024 * 1024)


async def test_an_app_that_answers_twice_as_late_is_still_one_call(settings: Settings) -> None:
    """The next identical request after an answer never misses:
    the flight is joined until its write has ended.
    """
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=settings.but(EMBEDDING_CACHE_L1_BYTES=0))
    async with client(app) as c:

        async def ask(n: int) -> httpx.Response:
            return await c.post("/v1/embeddings", json={"model": "m", "input": [str(n)]})

        for n in range(50):
            await asyncio.gather(ask(n), ask(n))
            await ask(n)
    assert 50 == spy.calls
