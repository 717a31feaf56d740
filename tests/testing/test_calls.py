"""What the app below the cache has really computed."""

from typing import Any

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from redis_asgi import EmbeddingCache, EmbeddingCacheMiddleware, RedisManager
from redis_asgi.testing import recorded_embedding_calls, start_anew

from ..ratelimit.harness import client_of

pytestmark = pytest.mark.anyio


async def _embed(request: Request) -> Response:
    body = await request.json()
    given = body["input"] if isinstance(body["input"], list) else [body["input"]]
    vectors = [{"object": "embedding", "index": i, "embedding": [1.5, float(i)]} for i in range(len(given))]
    return JSONResponse({"object": "list", "data": vectors, "model": body["model"], "usage": {}})


@pytest.fixture
def app(manager: RedisManager) -> Starlette:
    """One that speaks OpenAI's format, behind the cache."""
    app = Starlette(routes=[Route("/v1/embeddings", _embed, methods=["POST"])])
    app.add_middleware(EmbeddingCacheMiddleware, namespace="test", redis=manager)
    return app


async def _ask(client: httpx.AsyncClient, given: Any, **fields: Any) -> httpx.Response:
    answer = await client.post("/v1/embeddings", json={"model": "m", "input": given, **fields})
    assert answer.status_code == 200, answer.text
    return answer


async def test_only_what_is_new_is_there(embedding_calls: list[list[Any]], app: Starlette) -> None:
    """What the cache answers is not; texts,
    token arrays and what passes through are, each as it was sent.
    """
    async with client_of(app) as client:
        await _ask(client, ["a", "b"])
        await _ask(client, ["b", "c", "a"])
        await _ask(client, "a")
        await _ask(client, [[1, 2], [3]])
        await _ask(client, ["x", "x"], late_chunking=True)

    assert [["a", "b"], ["c"], [[1, 2], [3]]] == embedding_calls[:3]
    assert 4 == len(embedding_calls)
    assert [{"model": "m", "input": ["x", "x"], "late_chunking": True}] == embedding_calls[3]


async def test_app_of_before_is_watched_and_then_left_alone(app: Starlette) -> None:
    """One that has answered already is; and what it computes afterwards is nobody's."""
    async with client_of(app) as client:
        await _ask(client, ["a"])
        with recorded_embedding_calls() as calls:
            await _ask(client, ["b"])
            calls.clear()
            await _ask(client, ["a", "b", "c"])
        await _ask(client, ["d"])

    assert [["c"]] == calls


async def test_each_test_starts_with_nothing(manager: RedisManager, app: Starlette) -> None:
    """A new start of ``memory://`` is one of the layer in the process too; in Redis vectors stay."""
    async with client_of(app) as client:
        await _ask(client, ["a"])
        start_anew()
        with recorded_embedding_calls() as calls:
            await _ask(client, ["a"])

    assert ([] if manager.has_redis else [["a"]]) == calls


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_computed_ids(embedding_calls: list[list[Any]], manager: RedisManager, kind: str) -> None:
    """`get_or_compute` says which ids it has computed."""
    cache = EmbeddingCache(manager)

    def compute(ids: list[str]) -> Any:
        return np.ones((len(ids), 2))

    async def compute_later(ids: list[str]) -> Any:
        return compute(ids)

    for ids in (["a", "b"], ["b", "c"]):
        vectors = await cache.get_or_compute(ids, compute if kind == "sync" else compute_later)
        assert (2, 2) == vectors.shape

    assert [["a", "b"], ["c"]] == embedding_calls
