"""On a real socket, under uvicorn."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp

from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.settings import Settings

from ..kit.embedding_apps import Spy, server


@contextmanager
def served(app: ASGIApp, *, lifespan: Literal["off", "on"] = "off") -> Iterator[str]:
    """*app* on a free port, in a thread of its own."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="error", lifespan=lifespan, ws="none")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(running.serve([listener])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()
        listener.close()


@pytest.mark.slow
@pytest.mark.parametrize("local", [0, 64 * 1024 * 1024])
def test_cold_then_warm_a_hundred_times(local: int, redis_url: str) -> None:
    """512 inputs: the second request never reaches the app, from Redis and from the process."""
    spy = Spy(dims=32)
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_L1_BYTES=local, EMBEDDING_CACHE_TIMEOUT=2)
    with (
        served(EmbeddingCacheMiddleware(server(spy), settings=settings)) as url,
        httpx.Client(base_url=url) as c,
    ):
        for turn in range(100):
            body = {"model": "m", "input": [f"{turn} {n}" for n in range(512)], "encoding_format": "base64"}
            cold, warm = [c.post("/v1/embeddings", json=body) for _ in range(2)]
            assert cold.json() == warm.json()
            assert turn + 1 == spy.calls
            # Where the write has not ended yet, the second request joins the first.
            assert warm.headers["cache-status"].partition("; ttl")[0] in (
                "redis-asgi; hit",
                "redis-asgi; fwd=miss; collapsed",
            )
