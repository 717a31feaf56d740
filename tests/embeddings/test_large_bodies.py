"""Bodies that are large, late, in tiny pieces or never there:
bounded memory, and the app's to answer.
"""

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest
from starlette.types import Message, Receive, Scope, Send

from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.settings import Settings

from ..kit.embedding_apps import Spy, cache_status, client, drive, read, respond, server
from ..kit.inside import shared_of
from .bodies import JSON, ZEROS, echo

pytestmark = pytest.mark.anyio


RAW_JSON = [(b"content-type", b"application/json")]


async def test_a_million_byte_input_is_cached(settings: Settings) -> None:
    """Length is no reason to pass through; keys are of fixed size."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=settings)
    async with client(app) as c:
        for _ in range(2):
            last = await c.post("/v1/embeddings", json={"model": "m", "input": ["x" * 1_000_000]})
    assert "hit" in cache_status(last)


class Held:
    """An app that holds its requests until told to answer them, and counts what reaches it."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.open = asyncio.Event()

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        got = 0
        while True:
            message = await receive()
            got += len(message.get("body", b""))
            if not message.get("more_body", False):
                break
        self.lengths.append(got)
        await self.open.wait()
        await respond(send, b"{}", 400)


def many(item: bytes, size: int) -> bytes:
    """A JSON array of *size* bytes, or a little less."""
    return b"[" + b",".join([item] * ((size - 2) // (len(item) + 1))) + b"]"


MEBI = 1024 * 1024


HEAVY: list[tuple[str, bytes, float]] = [
    ("one input", b'{"model":"m","input":"' + b"x" * 2 * MEBI + b'"}', 5.5),
    ("inputs of 1 MB", b'{"model":"m","input":' + many(b'"' + b"x" * 10**6 + b'"', 2 * MEBI) + b"}", 5.5),
    ("token arrays", b'{"model":"m","input":' + many(many(b"99999", 4096), 2 * MEBI) + b"}", 5.5),
    ("10,000 inputs", b'{"model":"m","input":' + many(b'"' + b"x" * 400 + b'"', 2 * MEBI) + b"}", 2.1),
    ("texts of one letter", b'{"model":"m","input":' + many(b'"a"', 2 * MEBI) + b"}", 2.1),
    ("objects beside the input", b'{"model":"m","input":"a","x":' + many(b'{"":0}', 2 * MEBI) + b"}", 2.1),
    ("objects where nobody looks", b'{"model":"m","input":"a","user":' + many(b"{}", 2 * MEBI) + b"}", 2.1),
    ("a gzip bomb", ZEROS * 40, 2.1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("content", "times"), [h[1:] for h in HEAVY], ids=[h[0] for h in HEAVY])
async def test_requests_that_wait_hold_little_more_than_their_bytes(
    content: bytes, times: float, settings: Settings
) -> None:
    """While the app is at it, each keeps at most *times* its body, the client's own copy included."""
    # Beside that one: what was read, what is hashed, and what the app was sent,
    # in twice the room that it takes.
    app = Held()
    cached = EmbeddingCacheMiddleware(app, settings=settings)
    encoding = {"content-encoding": "gzip"} if content[:2] == b"\x1f\x8b" else {}

    async def ask(c: httpx.AsyncClient, n: int) -> None:
        # A body of its own for each, as a server has it; and each its own key.
        body = bytes(bytearray(content))
        await c.post("/v1/embeddings", content=body, headers=JSON | encoding | {"authorization": f"{n}"})

    async with client(cached) as c:
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        asked = [asyncio.ensure_future(ask(c, n)) for n in range(4)]
        while len(app.lengths) < 4:
            await asyncio.sleep(0.01)
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        app.open.set()
        await asyncio.gather(*asked)
    assert held - before < 4 * times * len(content) + MEBI


async def pieces(total: int) -> AsyncIterator[bytes]:
    """A body of *total* bytes without a length."""
    for _ in range(total // 65_536):
        yield b"x" * 65_536


async def test_a_hundred_megabytes_pass_through_in_little_memory(settings: Settings) -> None:
    """Over the cap what was read is replayed and the rest is streamed; no copy of the body is made."""
    total = 1600 * 65_536
    got = [0]

    async def counting(_scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            got[0] += len(message.get("body", b""))
            if not message.get("more_body", False):
                break
        await respond(send, b"{}", 413)

    app = EmbeddingCacheMiddleware(counting, settings=settings)
    tracemalloc.start()
    async with client(app) as c:
        response = await c.post("/v1/embeddings", content=pieces(total), headers=JSON)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (413, total) == (response.status_code, got[0])
    assert "detail=too-large" in cache_status(response)
    assert peak < 24 * 1024 * 1024


async def test_a_client_that_leaves_while_sending_is_the_apps_to_notice(settings: Settings) -> None:
    """A disconnect within the body is replayed like everything else."""
    seen: list[Any] = []

    async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
        seen.extend([await receive(), await receive()])

    sent = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(sent)

    async def send(_message: Any) -> None:
        raise AssertionError

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/embeddings",
        "headers": [(b"content-type", b"application/json")],
    }
    await EmbeddingCacheMiddleware(app, settings=settings)(scope, receive, send)
    assert ["http.request", "http.disconnect"] == [message["type"] for message in seen]


@pytest.mark.parametrize("how", ["cancelled", "refused"])
async def test_a_body_that_does_not_come_holds_none_of_the_budget(how: str, settings: Settings) -> None:
    """A request that is cancelled while it sends, or whose ``receive`` raises,
    leaves the process's bytes to others.
    """
    app = EmbeddingCacheMiddleware(echo([]), settings=settings)
    reads = [0]

    async def receive() -> Message:
        reads[0] += 1
        if reads[0] == 1:
            return {"type": "http.request", "body": b"x" * 1000, "more_body": True}
        if how == "refused":
            raise OverflowError("a middleware outside has read enough")
        return await asyncio.Future()

    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [*RAW_JSON]}
    before = shared_of(app).budget.left
    request = asyncio.ensure_future(drive(app, scope, receive))
    while reads[0] < 2:
        await asyncio.sleep(0)
    if how != "refused":
        request.cancel()
    with pytest.raises(OverflowError if how == "refused" else asyncio.CancelledError):
        await request
    assert before == shared_of(app).budget.left


@pytest.mark.slow
async def test_a_body_in_tiny_pieces_takes_little_more_than_its_bytes(settings: Settings) -> None:
    """Byte by byte, with empty messages in between: the app gets the same bytes, in a few messages."""
    content = b"no json " * 6_000
    left = [2 * len(content)]
    got: list[bytes] = []
    held: list[int] = []

    async def receive() -> Message:
        left[0] -= 1
        at, odd = divmod(2 * len(content) - 1 - left[0], 2)
        piece = b"" if odd else content[at : at + 1]
        return {"type": "http.request", "body": piece, "more_body": left[0] > 0}

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        held.append(tracemalloc.get_traced_memory()[0])
        more = True
        while more:
            message = await receive()
            got.append(message["body"])
            more = message["more_body"]
        await respond(send, b"{}", 400)

    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [*RAW_JSON]}
    cached = EmbeddingCacheMiddleware(app, settings=settings)
    tracemalloc.start()
    await drive(cached, scope, receive)
    tracemalloc.stop()
    assert content == b"".join(got)
    assert len(got) < len(content) // 2000
    assert held[0] < 4 * MEBI


async def test_a_stated_length_over_the_cap_is_not_read(settings: Settings) -> None:
    """The app gets the server's own messages, one at a time, as if nobody stood before it."""
    reads = [0]

    async def receive() -> Any:
        reads[0] += 1
        return {"type": "http.request", "body": b"x" * 65_536, "more_body": reads[0] < 1600}

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        assert 0 == reads[0]
        await receive()
        assert 1 == reads[0]
        await respond(send, b"{}", 413)

    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % (1600 * 65_536))]
    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": headers}
    sent = await drive(EmbeddingCacheMiddleware(app, settings=settings), scope, receive)
    assert 413 == sent[0]["status"]
    assert (b"cache-status", b"redis-asgi; fwd=bypass; detail=too-large") in sent[0]["headers"]


@pytest.mark.parametrize("shrunken", [False, True])
async def test_an_answer_over_the_cap_is_streamed(shrunken: bool, redis_url: str) -> None:
    """Too large to hold: relayed as it comes, or asked for as a whole once more; never held."""
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_MAX_RESPONSE_BYTES=1000)
    sent = [0]

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await read(receive)
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"application/json")],
            }
        )
        for _ in range(100):
            sent[0] += 100
            await send({"type": "http.response.body", "body": b" " * 100, "more_body": True})
        await send({"type": "http.response.body", "body": b"null"})

    cached = EmbeddingCacheMiddleware(app, settings=settings)
    items = ["a", "a"] if shrunken else ["a", "b"]
    async with client(cached) as c:
        response = await c.post("/v1/embeddings", json={"model": "m", "input": items})
    assert b" " * 10_000 + b"null" == response.content
    assert ("replayed" if shrunken else "not-understood") in cache_status(response)
    assert sent[0] < 12_000 if shrunken else sent[0] == 10_000


@pytest.mark.parametrize("understood", [True, False])
async def test_an_answer_in_tiny_pieces_takes_little_more_than_its_bytes(understood: bool, settings: Settings) -> None:
    """Pieces of one number each: kept in a few messages, sent on to the byte."""
    numbers: list[float | None] = [0.5] * 20_000 if understood else [0.5] * 20_000 + [None]
    answer = orjson.dumps({"data": [{"index": 0, "embedding": numbers}]})
    held: list[int] = []

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await read(receive)
        await send({"type": "http.response.start", "status": 200, "headers": [*RAW_JSON]})
        before = tracemalloc.get_traced_memory()[0]
        for at in range(0, len(answer), 4):
            await send({"type": "http.response.body", "body": answer[at : at + 4], "more_body": True})
        await send({"type": "http.response.body", "body": b" " * 200_000, "more_body": True})
        held.append(tracemalloc.get_traced_memory()[0] - before)
        await send({"type": "http.response.body"})

    cached = EmbeddingCacheMiddleware(app, settings=settings)
    tracemalloc.start()
    async with client(cached) as c:
        response = await c.post("/v1/embeddings", json={"model": "m", "input": "a"})
    tracemalloc.stop()
    assert answer + b" " * 200_000 == response.content
    assert ("stored" if understood else "not-understood") in cache_status(response)
    assert held[0] < 2 * len(response.content)


async def test_a_body_that_is_late_passes_through_and_holds_nothing(settings: Settings) -> None:
    """After ``BODY_SECONDS`` the app gets what came and what comes,
    to the byte; others may use the memory.
    """
    seen: list[bytes] = []
    late = settings.model_copy(update={"EMBEDDING_CACHE_BODY_SECONDS": 0.01})
    app = EmbeddingCacheMiddleware(echo(seen), settings=late)
    body = orjson.dumps({"model": "m", "input": ["x" * 10_000]})
    pieces = [body[at : at + 4_000] for at in range(0, len(body), 4_000)]
    go = asyncio.Event()
    left = iter(pieces)
    before = shared_of(app).budget.left

    async def receive() -> Message:
        piece = next(left)
        if piece is pieces[1]:
            await go.wait()
        return {"type": "http.request", "body": piece, "more_body": piece is not pieces[-1]}

    scope: Scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [*RAW_JSON]}
    request = asyncio.ensure_future(drive(app, scope, receive))
    while "embedding_cache_result" not in scope.get("state", {}):
        await asyncio.sleep(0.001)
    assert before == shared_of(app).budget.left
    go.set()
    [start, *_] = await request
    assert [body] == seen
    assert b"redis-asgi; fwd=bypass; detail=busy" == dict(start["headers"])[b"cache-status"]


async def test_a_late_body_whose_client_goes_ends_with_it(settings: Settings) -> None:
    """The message that was waited for is the disconnect, and the app hears of it."""
    late = settings.model_copy(update={"EMBEDDING_CACHE_BODY_SECONDS": 0.01})
    heard: list[str] = []

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] != "http.disconnect":
            heard.append(message["type"])
        heard.append("http.disconnect")

    messages: asyncio.Queue[Message] = asyncio.Queue()
    messages.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
    scope: Scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [*RAW_JSON]}
    request = asyncio.ensure_future(drive(EmbeddingCacheMiddleware(app, settings=late), scope, messages.get))
    while not heard:
        await asyncio.sleep(0.001)
    messages.put_nowait({"type": "http.disconnect"})
    assert [] == await request
    assert ["http.request", "http.disconnect"] == heard


@pytest.mark.parametrize("fails", [False, True])
async def test_a_late_body_that_nobody_reads_leaves_nothing_behind(fails: bool, settings: Settings) -> None:
    """An app that answers without it ends the wait for the rest."""
    late = settings.model_copy(update={"EMBEDDING_CACHE_BODY_SECONDS": 0.01})
    first = iter([{"type": "http.request", "body": b"{", "more_body": True}])
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reported.append(context))
    broken = asyncio.Event()

    async def receive() -> Message:
        for message in first:
            return message
        await broken.wait()
        raise OSError("the client has gone")

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        if fails:
            broken.set()
            await asyncio.sleep(0.01)
        await respond(send, b"{}", 401)

    before = asyncio.all_tasks()
    scope: Scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [*RAW_JSON]}
    [start, *_] = await drive(EmbeddingCacheMiddleware(app, settings=late), scope, receive)
    assert 401 == start["status"]
    await asyncio.sleep(0)
    assert before == asyncio.all_tasks()
    gc.collect()
    assert [] == reported


async def test_a_full_budget_lets_requests_pass(settings: Settings) -> None:
    """When the process holds 256 MiB of bodies, by whichever middleware, more are not read."""
    seen: list[bytes] = []
    app = EmbeddingCacheMiddleware(echo(seen), settings=settings)
    other = EmbeddingCacheMiddleware(echo(seen), settings=settings)
    held = 256 * 1024 * 1024
    assert shared_of(other).budget.take(held)
    async with client(app) as c:
        response = await c.post("/v1/embeddings", json={"model": "m", "input": "a"})
        assert "detail=busy" in cache_status(response)
        assert [response.request.content] == seen
        shared_of(other).budget.give(held)
        assert "busy" not in cache_status(await c.post("/v1/embeddings", json={"model": "m", "input": "a"}))


@pytest.mark.slow
async def test_memory_stays_flat_over_many_different_requests(redis_url: str) -> None:
    """Different models, credentials, origins and inputs leave nothing behind but bounded layers."""
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_L1_BYTES=200_000)
    app = EmbeddingCacheMiddleware(server(Spy()), settings=settings)

    async def some(start: int) -> None:
        async with client(app) as c:
            for n in range(start, start + 400):
                headers = {"authorization": f"key {n}", "origin": f"https://{n}"}
                await c.post("/v1/embeddings", json={"model": f"m{n}", "input": [f"{n}"]}, headers=headers)

    tracemalloc.start()
    await some(0)
    before, _ = tracemalloc.get_traced_memory()
    await some(1000)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert shared_of(app).vectors.local.bytes <= 200_000
    assert after - before < 3_000_000
