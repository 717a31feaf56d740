"""What defeats the cache is named, once, and does not fill Redis."""

import uuid
from typing import Any

import pytest
import redis

from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.embeddings.records.novelty import Novelty
from redis_asgi.settings import Settings

from ..kit.embedding_apps import Spy, cache_status, client, server
from ..kit.logs import event_of

pytestmark = pytest.mark.anyio
EVENT = "redis_asgi.embedding_cache_defeated"


def fresh() -> str:
    """A value that was never there."""
    return uuid.uuid4().hex


async def ask(c: Any, text: str, headers: dict[str, str] | None = None, query: str = "", **fields: Any) -> str:
    """What the cache says of one request."""
    response = await c.post(
        f"/v1/embeddings{query}", json={"model": "m", "input": [text], **fields}, headers=headers or {}
    )
    assert 200 == response.status_code
    return cache_status(response)


def told(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """The lines about it."""
    return [record.__dict__ for record in caplog.records if event_of(record) == EVENT]


@pytest.mark.parametrize(
    ("where", "name", "setting"),
    [
        ("header", "x-visit", "EMBEDDING_CACHE_IGNORED_HEADERS"),
        ("header", "cookie", "partition_by"),
        ("header", "authorization", "partition_by"),
        ("header", "host", "partition_by"),
        ("field", "rid", "EMBEDDING_CACHE_IGNORED_FIELDS"),
        ("field", "metadata.trace", "EMBEDDING_CACHE_IGNORED_FIELDS"),
        ("field", "events", "EMBEDDING_CACHE_IGNORED_FIELDS"),
        ("query", "string", "leave out"),
    ],
)
async def test_what_is_new_in_every_request_is_named_once_and_not_written(
    where: str, name: str, setting: str, redis_url: str, redis_client: "redis.Redis", caplog: pytest.LogCaptureFixture
) -> None:
    """From the 33rd new value in a row on nothing is written, until a value comes again."""
    app = EmbeddingCacheMiddleware(server(Spy()), settings=Settings(REDIS_URL=redis_url), namespace="n")

    async def once(value: str, text: str) -> str:
        if where == "header":
            return await ask(c, text, {name: value})
        if where == "query":
            return await ask(c, text, query=f"?at={value}")
        fields: Any = {"rid": value, "metadata.trace": {"trace": value}, "events": [{"id": value}]}
        return await ask(c, text, **{name.partition(".")[0]: fields[name]})

    async with client(app) as c:
        assert 32 * ["redis-asgi; fwd=miss; stored"] == [await once(fresh(), "a") for _ in range(32)]
        assert [] == told(caplog)
        written = redis_client.dbsize()
        values = [fresh() for _ in range(10)]
        assert 10 * ["redis-asgi; fwd=bypass; detail=unique-header"] == [await once(v, "a") for v in values]
        assert written == redis_client.dbsize()
        assert "redis-asgi; fwd=miss; stored" == await once(values[0], "a")
        assert (await once(values[0], "a")).startswith("redis-asgi; hit")
        assert "redis-asgi; fwd=miss; stored" == await once(fresh(), "a")
    [line] = told(caplog)
    assert name == line[where]
    assert setting in line["fix"]
    assert not [value for value in values if value in str(line)]


async def test_an_ignored_one_is_no_matter(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """With the settings that the line names everything hits."""
    settings = Settings(
        REDIS_URL=redis_url,
        EMBEDDING_CACHE_IGNORED_HEADERS="x-visit",
        EMBEDDING_CACHE_IGNORED_FIELDS="metadata.trace",
    )
    async with client(EmbeddingCacheMiddleware(server(Spy()), settings=settings)) as c:
        said = [await ask(c, "a", {"x-visit": fresh()}, metadata={"trace": fresh(), "team": "t"}) for _ in range(40)]
    assert 39 == sum(line.startswith("redis-asgi; hit") for line in said)
    assert [] == told(caplog)


async def test_many_callers_who_come_again_are_no_matter(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Twenty keys, in turn: each is new once."""
    async with client(EmbeddingCacheMiddleware(server(Spy()), settings=Settings(REDIS_URL=redis_url))) as c:
        said = [await ask(c, f"{n}", {"authorization": f"key {n % 20}"}) for n in range(100)]
    assert 100 * ["redis-asgi; fwd=miss; stored"] == said
    assert [] == told(caplog)


def test_its_memory_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever names and values clients make up: a table of a fixed size, and 64 names."""
    novelty = Novelty()
    for number in range(20_000):
        marks = novelty.marks([(b"x-%d" % number, b"v")], [(f"field {number}", "v" * 5), ("same", number)], b"")
        novelty.defeats(marks, again=False, is_credential=lambda _: False)
    assert len(novelty._streaks) <= 64
    assert 1 == len(caplog.records)
    assert novelty._seen is not None
    assert 8 * (1 << 17) == novelty._seen.itemsize * len(novelty._seen)


def test_names_and_values_are_not_confused() -> None:
    """A header and a field of one name are two, and so are a text and a number."""
    novelty = Novelty()
    marks = novelty.marks([(b"user", b"1")], [("user", "1"), ("user", 1), ("users", "1")], b"")
    assert 4 == len({digest for _, digest in marks})
