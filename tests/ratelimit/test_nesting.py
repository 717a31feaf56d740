"""Instances within one another, and other middlewares, servers and apps around them."""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from redis_asgi import ConfigurationError, RateLimitMiddleware, Rule, Settings

from ..kit.inside import engine_of, manager_of
from .harness import Spy, client_of, drive, header, http_scope, statuses, websocket_scope

pytestmark = pytest.mark.anyio


async def test_mounted_twice_counts_once(memory_settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """The inner instance skips what the outer one has charged,
    says so once, and adds what is its own.
    """
    inner = RateLimitMiddleware(
        Spy(), rules=[Rule("3/minute", name="a"), Rule("9/minute", name="b")], settings=memory_settings
    )
    app = RateLimitMiddleware(inner, rules=[Rule("3/minute", name="a")], settings=memory_settings)
    with caplog.at_level(logging.WARNING, "redis_asgi"):
        async with client_of(app) as client:
            responses = [await client.get("/") for _ in range(4)]

    assert [200, 200, 200, 429] == [response.status_code for response in responses]
    assert '"a";r=2;t=60, "b";r=8;t=60' == responses[0].headers["ratelimit"]
    assert ["mounted_twice"] == [record.__dict__["code"] for record in caplog.records]


async def test_an_inner_instance_keeps_what_it_charges(memory_settings: Settings) -> None:
    """What the outer one has left to it whole is the same as ever,
    so that made up requests push out nothing.
    """
    inner = RateLimitMiddleware(Spy(), rules=[Rule("9/minute", name="b", cost=lambda _: 1)], settings=memory_settings)
    app = RateLimitMiddleware(inner, rules=[Rule("9/minute", name="a")], settings=memory_settings)

    kept = []
    for _ in range(3):
        assert 200 == (await drive(app, http_scope()))[0]["status"]
        kept.append(len(engine_of(inner).plans.charges.young))

    assert kept[0] == kept[2]


async def _events(request: Request) -> Response:
    async def chunks() -> AsyncIterator[str]:
        for i in range(3):
            yield f"data: {i}\n\n"

    return StreamingResponse(chunks(), media_type="text/event-stream")


async def _echo(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text(await websocket.receive_text())
    await websocket.close(4000)


def _not_here(request: Request) -> Response:
    raise HTTPException(410)


done: list[str] = []


def _with_task(request: Request) -> Response:
    return PlainTextResponse("ok", background=BackgroundTask(done.append, "background"))


ROUTES = [
    Route("/events", _events),
    Route("/gone", _not_here),
    Route("/task", _with_task),
    Mount("/sub", routes=[Route("/deep", lambda request: PlainTextResponse(request.url.path))]),
    WebSocketRoute("/ws", _echo),
]


@pytest.mark.parametrize(
    ("scope", "messages"),
    [
        (http_scope(path="/events"), []),
        (http_scope(path="/gone"), []),
        (http_scope(path="/nowhere"), []),
        (http_scope(path="/task"), []),
        (http_scope(path="/sub/deep"), []),
        (websocket_scope(path="/ws"), [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "hi"}]),
    ],
    ids=["stream", "HTTPException", "404", "background", "mount", "websocket"],
)
async def test_message_by_message_the_same(memory_settings: Settings, scope: Scope, messages: list[Message]) -> None:
    """But for its two header fields, the app's messages are those it sends alone."""
    app = Starlette(routes=ROUTES)
    alone = await drive(app, dict(scope), *messages)
    limited = await drive(RateLimitMiddleware(app, "9/minute", settings=memory_settings), dict(scope), *messages)
    for message in limited:
        if "headers" in message:
            ours = [field for field in message["headers"] if field[0].startswith(b"ratelimit")]
            message["headers"] = [field for field in message["headers"] if field not in ours]

            assert 2 == len(ours)
    for message in alone:
        message.get("headers")

    assert [_plain(message) for message in alone] == [_plain(message) for message in limited]


def _plain(message: Message) -> dict[str, Any]:
    return {**message, "headers": list(message["headers"])} if "headers" in message else dict(message)


async def test_unknown_messages_pass_through(memory_settings: Settings) -> None:
    """Early hints, pathsend and trailers reach the server as they were sent, before, between and
    after.
    """
    messages: list[Message] = [
        {"type": "http.response.early_hint", "links": [b"</x>"]},
        {"type": "http.response.start", "status": 200, "headers": ((b"a", b"b"),), "trailers": True},
        {"type": "http.response.pathsend", "path": "/x"},
        {"type": "http.response.trailers", "headers": []},
    ]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    sent = await drive(RateLimitMiddleware(app, "9/minute", settings=memory_settings), http_scope())

    assert [messages[0], messages[2], messages[3]] == [sent[0], sent[2], sent[3]]
    assert (b"a", b"b") == sent[1]["headers"][0]
    assert sent[1]["trailers"]
    assert ((b"a", b"b"),) == messages[1]["headers"]


async def test_a_request_leaves_nothing_to_the_collector(memory_settings: Settings) -> None:
    """Neither an admitted nor a refused request makes a reference cycle, which would double its
    cost.
    """
    app = RateLimitMiddleware(Spy(), "500/minute", settings=memory_settings)

    class Server:
        def __init__(self) -> None:
            self.scope = http_scope()

        async def send(self, message: Message) -> None:
            return None

        async def receive(self) -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

    async def request() -> None:
        server = Server()
        await app(server.scope, server.receive, server.send)

    for _ in range(5):
        await request()
    gc.collect()
    gc.disable()
    try:
        for _ in range(1000):
            await request()
        app.app.scopes.clear()  # type: ignore[attr-defined]  # the spy's

        # A few dozen objects of an earlier test's app may be let go of meanwhile; its caches are
        # cycles.
        assert gc.collect() < 500
    finally:
        gc.enable()


async def test_root_path_and_mounts(memory_settings: Settings) -> None:
    """A pattern is about the path below root_path, so that a mounted app keeps its rules."""
    inner = RateLimitMiddleware(Spy(), rules=[Rule("1/minute", paths="/items")], settings=memory_settings)
    app = Starlette(routes=[Mount("/api/v1", app=inner)])

    assert [200, 429] == await statuses(app, 2, "/api/v1/items")
    assert [200, 200] == await statuses(app, 2, "/api/v1/others")


async def test_as_starlette_middleware_it_survives_500s(memory_settings: Settings) -> None:
    """An unhandled exception passes through unchanged, and is counted."""

    def broken(request: Request) -> Response:
        raise KeyError("x")

    app = Starlette(
        routes=[Route("/", broken)],
        middleware=[Middleware(RateLimitMiddleware, limits="1/minute", settings=memory_settings)],
    )
    with pytest.raises(KeyError):
        await statuses(app, 1)

    assert [429] == await statuses(app, 1)


async def test_lifespan_holds_the_shared_manager(redis_url: str) -> None:
    """The client stays open for the app's own teardown,
    the last of two apps closes it, and it opens again after.
    """
    settings = Settings(REDIS_URL=redis_url)
    answers: list[bool] = []

    def app(name: str) -> RateLimitMiddleware:
        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            client = await manager_of(limited).get_connection()
            answers.append(bool(await client.ping()))

        limited = RateLimitMiddleware(
            Starlette(routes=[Route("/", lambda request: PlainTextResponse(name))], lifespan=lifespan),
            "100/minute",
            settings=settings,
        )
        return limited

    first, second = app("first"), app("second")
    async with _running(first), _running(second):
        await statuses(first, 1)
        await statuses(second, 1)
        pool = manager_of(first).pool
    assert manager_of(first) is manager_of(second)
    assert [True, True] == answers
    assert pool is not None
    assert manager_of(first).pool is None
    assert [200] == await statuses(first, 1)
    await manager_of(first).close()


@asynccontextmanager
async def _running(app: RateLimitMiddleware) -> AsyncIterator[None]:
    started, stopping, stopped = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def receive() -> Message:
        if not started.is_set():
            return {"type": "lifespan.startup"}
        await stopping.wait()
        return {"type": "lifespan.shutdown"}

    async def send(message: Message) -> None:
        (started if message["type"] == "lifespan.startup.complete" else stopped).set()

    task = asyncio.create_task(app({"type": "lifespan", "asgi": {}, "state": {}}, receive, send))
    await started.wait()
    yield
    stopping.set()
    await stopped.wait()
    await task


async def test_inner_limit_of_another_quota_is_enforced(memory_settings: Settings) -> None:
    """Only the very same limit is skipped: a tighter one inside still refuses."""
    inner = RateLimitMiddleware(Spy(), rules=[Rule("2/minute", name="inner")], settings=memory_settings)
    app = RateLimitMiddleware(inner, "100/minute", settings=memory_settings)

    assert [200, 200, 429] == await statuses(app, 3)


@pytest.mark.parametrize("inner", ["2/minute", "100/hour", lambda _conn: "2/minute"], ids=["quota", "window", "plan"])
async def test_inner_limit_of_the_same_name_is_said_to_be_one_too_many(memory_settings: Settings, inner: Any) -> None:
    """At the first request: two limits of one name would share a counter,
    or at least look as if they did.
    """
    app = RateLimitMiddleware(
        RateLimitMiddleware(Spy(), inner, settings=memory_settings), "100/minute", settings=memory_settings
    )

    with pytest.raises(ConfigurationError, match=r"name='default' stands for two limits.*100/60 s"):
        await statuses(app, 1)


async def test_members_stand_in_the_order_of_the_rules(memory_settings: Settings) -> None:
    """A rule whose cost is a callable keeps its place in the header."""
    rules = [Rule("9/minute", name="priced", cost=lambda request: 2), Rule("9/minute", name="plain")]
    app = RateLimitMiddleware(Spy(), rules=rules, settings=memory_settings)
    start, _ = await drive(app, http_scope())

    assert b'"priced";r=7;t=60, "plain";r=8;t=60' == header(start, b"ratelimit")


async def test_server_that_reuses_its_state_is_limited(memory_settings: Settings) -> None:
    """A decision left in the state by an earlier request does not count for the next one."""
    app = RateLimitMiddleware(Spy(), "1/minute", settings=memory_settings)
    state: dict[str, Any] = {}
    starts = [(await drive(app, http_scope(state=state)))[0] for _ in range(4)]

    assert [200, 429, 429, 429] == [start["status"] for start in starts]
    # Nor does a refusal: it is no outer instance that would write the fields.
    assert [b'"default";r=0;t=60'] * 4 == [header(start, b"ratelimit") for start in starts]


async def test_requests_at_once_are_apart_where_a_server_reuses_its_state(memory_settings: Settings) -> None:
    """One that is under way is no outer instance to another:
    each has the fields of its own, and of no other client.
    """
    began, go_on = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        began.set()
        await go_on.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    app = RateLimitMiddleware(slow, "9/minute", settings=memory_settings)
    state: dict[str, Any] = {}
    first = asyncio.create_task(drive(app, http_scope(state=state)))
    await began.wait()
    second = asyncio.create_task(drive(app, http_scope(state=state, client=("203.0.113.8", 50_000))))
    await asyncio.sleep(0)
    go_on.set()
    starts = [sent[0] for sent in await asyncio.gather(first, second)]

    assert [b'"default";r=8;t=60'] * 2 == [header(start, b"ratelimit") for start in starts]
