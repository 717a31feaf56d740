"""The wire format of hand-written services."""

from typing import Any

import httpx
import orjson
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.embeddings.wire import Batch, Simple
from redis_asgi.errors import ConfigurationError
from redis_asgi.settings import Settings

from ..kit.embedding_apps import cache_status, client, read, respond, vector

pytestmark = pytest.mark.anyio


def service(field: str, vectors: str, seen: list[Any], around: Any = None) -> ASGIApp:
    """A service that takes *field* and answers *vectors*,
    with what *around* makes of the texts beside them.
    """

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        body = orjson.loads(await read(receive))
        texts = [body[field]] if isinstance(body[field], str) else body[field]
        seen.append(texts)
        more = around(texts) if around is not None else {}
        numbers = [vector(text, body.get("model")).tolist() for text in texts]
        await respond(send, orjson.dumps({**more, vectors: numbers}))

    return app


def through(app: ASGIApp, settings: Settings) -> httpx.AsyncClient:
    """A client of *app* behind the cache, as the environment configures it."""
    given = settings.model_dump(exclude_unset=True)
    return client(EmbeddingCacheMiddleware(app, settings=Settings(**given, EMBEDDING_CACHE_ROUTES="simple:/embed")))


@pytest.mark.parametrize("model", [{}, {"model": "m"}])
@pytest.mark.parametrize("field", ["texts", "inputs", "sentences", "input"])
@pytest.mark.parametrize("vectors", ["embeddings", "vectors", "data"])
async def test_usual_names_are_understood(
    field: str, vectors: str, model: dict[str, str], any_settings: Settings
) -> None:
    """With a model or without; only what is not stored is computed,
    and a hit is the app's own answer.
    """
    seen: list[Any] = []
    app = service(field, vectors, seen, lambda texts: {"dim": 6})
    async with client(service(field, vectors, [], lambda texts: {"dim": 6})) as alone, through(app, any_settings) as c:
        for texts in (["a", "b"], ["a", "b"], ["b", "c", "b"], "c"):
            body = {field: texts, **model}
            expected, actual = [await each.post("/embed", json=body) for each in (alone, c)]
            assert expected.json() == actual.json()
    assert "; hit" in cache_status(actual)
    assert [["a", "b"], ["c"]] == seen


@pytest.mark.parametrize(
    "body",
    [
        {"texts": ["a"], "inputs": ["b"]},
        {"texts": ["a"], "input": "b"},
        {"text": "a"},
        {"texts": [1, 2]},
        {"texts": [["a"]]},
        {"texts": [{"text": "a"}]},
        {"texts": []},
        {"texts": ["a"], "model": 5},
        {"texts": ["a"], "late_chunking": True},
    ],
    ids=repr,
)
def test_other_bodies_are_not_understood(body: dict[str, Any]) -> None:
    """Two names of inputs, and what is no text."""
    assert not isinstance(Simple().split(body, None), Batch)


def test_a_field_that_is_null_is_none() -> None:
    """Clients that fill in a form send all its names."""
    assert isinstance(Simple().split({"texts": ["a"], "inputs": None}, None), Batch)


@pytest.mark.parametrize(
    "answer",
    [
        [[0.5]],
        {},
        {"embeddings": [[0.5]], "vectors": [[0.5]]},
        {"embeddings": [0.5]},
        {"embeddings": [[0.5], [0.5]]},
        {"embeddings": {"0": [0.5]}},
        {"other": [[0.5]]},
    ],
    ids=repr,
)
async def test_other_answers_are_relayed(answer: Any, any_settings: Settings) -> None:
    """Two names of vectors, none, or another number of them: nothing is stored."""

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await read(receive)
        await respond(send, orjson.dumps(answer))

    async with through(app, any_settings) as c:
        for _ in range(2):
            response = await c.post("/embed", json={"texts": ["a"]})
            assert answer == response.json()
            assert "redis-asgi; fwd=bypass; detail=not-understood" == cache_status(response)


async def test_what_stands_around_is_true_of_the_request(any_settings: Settings) -> None:
    """Texts, flags and lengths are repeated; counts, tokens,
    ids and the echo are made anew; the rest is left out.
    """
    calls: list[Any] = []

    def around(texts: list[str]) -> dict[str, Any]:
        return {
            "model": "mini",
            "ok": True,
            "none": None,
            "dim": 6,
            "count": len(texts),
            "size": 99,
            "texts": texts,
            "tokens": 3 * len(texts),
            "took_ms": 12,
            "score": [1] * 5,
            "id": f"r{len(calls)}",
            "warnings": ["truncated"] if "long" in texts else [],
            "usage": {"total_tokens": 3 * len(texts), "cost": 0.1},
            "meta": {"dims": 6, "n": len(texts), "elapsed": 0.5, "device": "cpu", "a": {"b": {"c": {"d": "deep"}}}},
        }

    def expected(texts: list[str]) -> dict[str, Any]:
        said = {"model": "mini", "ok": True, "none": None, "dim": 6, "count": len(texts), "texts": texts}
        said |= {"tokens": 3 * len(texts), "usage": {"total_tokens": 3 * len(texts)}}
        return said | {"meta": {"dims": 6, "n": len(texts), "device": "cpu", "a": {"b": {}}}}

    async with through(service("texts", "embeddings", calls, around), any_settings) as c:
        cold = (await c.post("/embed", json={"texts": ["a"]})).json()
        hits = [(await c.post("/embed", json={"texts": ["a", "a"]})).json() for _ in range(2)]
        partial = (await c.post("/embed", json={"texts": ["a", "b", "long"]})).json()
    assert {**around(["a"]), "id": "r1"} == {name: value for name, value in cold.items() if name != "embeddings"}
    assert 3 == len({cold["id"], *(hit["id"] for hit in hits)})
    for texts, answer in ((["a", "a"], hits[0]), (["a", "a"], hits[1]), (["a", "b", "long"], partial)):
        answer.pop("embeddings")
        answer.pop("id")
        assert expected(texts) == answer


async def test_names_of_ones_own(settings: Settings) -> None:
    """Given in code, one for the texts and one for the vectors; others are fields like any."""
    seen: list[Any] = []
    app = service("passages", "dense", seen, lambda texts: {"data": "x"})
    routes = {"/encode": Simple(inputs="passages", vectors="dense")}
    async with client(EmbeddingCacheMiddleware(app, settings=settings, routes=routes)) as c:
        cold, warm = [await c.post("/encode", json={"passages": ["a"]}) for _ in range(2)]
        other = await c.post("/encode", json={"passages": ["a"], "texts": ["b"]})
    assert "; hit" in cache_status(warm)
    assert cold.json() == warm.json()
    assert "detail=not-understood" in cache_status(other)


def test_other_names_have_other_keys() -> None:
    """Two lists of vectors in one answer are two things."""
    formats = [Simple(), Simple(vectors="dense"), Simple(vectors="sparse"), Simple(inputs="dense")]
    assert 4 == len({wire.name for wire in formats})


@pytest.mark.parametrize("given", [{"inputs": ""}, {"vectors": 5}])
def test_a_name_that_is_none_is_found_at_construction(given: dict[str, Any]) -> None:
    """With what would do."""
    with pytest.raises(ConfigurationError, match="Try 'texts'"):
        Simple(**given)


def test_simple_needs_a_path() -> None:
    """It has no usual one."""
    settings = Settings(REDIS_URL="memory://", EMBEDDING_CACHE_ROUTES="openai,simple")
    with pytest.raises(ConfigurationError, match="Try simple:/embed"):
        EmbeddingCacheMiddleware(service("texts", "data", []), settings=settings)
