"""A large batch lets others run, and lets go of what it has sent;
by a clock of the test's own, never by waiting.
"""

import asyncio
import tracemalloc
from itertools import count

import orjson
import pytest
from starlette.types import Message

from redis_asgi import time_slice
from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.settings import Settings

from .kit.embedding_apps import Spy, server

pytestmark = pytest.mark.anyio


async def post(app: EmbeddingCacheMiddleware, body: bytes, sent: list[int]) -> None:
    """One request, whose answer is thrown away;
    *sent* gets the memory in use at each message of it.
    """
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "query_string": b"", "headers": headers}
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        for message in messages:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(_message: Message) -> None:
        sent.append(tracemalloc.get_traced_memory()[0])

    await app(scope, receive, send)


@pytest.mark.parametrize("inputs", [1, 16])
async def test_small_pieces_of_work_add_up(inputs: int, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Naming, finding and writing are one request's work:
    it gives way when together they have taken 2 ms.
    """
    app = EmbeddingCacheMiddleware(server(Spy()), settings=Settings(REDIS_URL=redis_url))
    body = orjson.dumps({"model": "m", "input": [f"text {n}" for n in range(inputs)]})
    await post(app, body, [])
    ticks = count()
    monkeypatch.setattr(time_slice, "perf_counter", lambda: next(ticks) * 0.0005)
    rests = 0
    rest = time_slice.TimeSlice.checkpoint

    async def counted(self: time_slice.TimeSlice) -> None:
        nonlocal rests
        rests += 1
        await rest(self)

    monkeypatch.setattr(time_slice.TimeSlice, "checkpoint", counted)
    await post(app, body, [])
    # Looks at the clock: one for the names, one for every four texts.
    assert (inputs > 1) is bool(rests)


@pytest.mark.parametrize("local_bytes", [0, 64 * 1024 * 1024])
async def test_what_is_sent_is_let_go(redis_url: str, local_bytes: int) -> None:
    """An answer of many megabytes is not held until its end,
    unless the process keeps the vectors anyway.
    """
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_L1_BYTES=local_bytes, EMBEDDING_CACHE_TIMEOUT=5)
    app = EmbeddingCacheMiddleware(server(Spy(dims=1536)), settings=settings)
    body = orjson.dumps({"model": "m", "input": [f"text {n}" for n in range(200)]})
    await post(app, body, [])
    sent: list[int] = []
    tracemalloc.start()
    try:
        await post(app, body, sent)
    finally:
        tracemalloc.stop()
    assert len(sent) > 10
    freed = sent[0] - sent[-1]
    assert freed > 5_000_000 if local_bytes == 0 else abs(freed) < 1_000_000
