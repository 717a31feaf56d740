"""The guides are true: what they show is what happens, and their tables are what the code says."""

import re
from typing import Any, cast

import httpx
import numpy as np
import pytest
import redis
from fastapi import FastAPI, HTTPException, Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from typer.testing import CliRunner

from redis_asgi import (
    ConfigurationError,
    EmbeddingCache,
    EmbeddingCacheMiddleware,
    RateLimiter,
    RateLimitMiddleware,
    Settings,
)
from redis_asgi.cli.commands import app as command_line
from redis_asgi.embeddings.records.codec import encode
from redis_asgi.embeddings.wire import DEFAULT_PATHS
from redis_asgi.explanations import explanations
from redis_asgi.ratelimit.counting.local_engine import LocalEngine
from redis_asgi.ratelimit.limits.charge import Charge
from redis_asgi.ratelimit.limits.policy import make_partition
from redis_asgi.ratelimit.rules.policies import make_policies

from .kit.documents import GUIDES, section, table

SECOND = 1_000_000  # us


# strategies

STEP = re.compile(
    r"^- At \*\*(\d\d):(\d\d):(\d\d)\*\* the client sends (\d+) requests?: (\d+) (?:is|are) admitted",
    re.MULTILINE,
)


@pytest.mark.parametrize("strategy", ["fixed-window", "sliding-window-counter", "moving-window", "gcra"])
def test_timeline_is_what_happens(strategy: Any) -> None:
    """Each strategy admits what its timeline says, on a clock that starts at a whole minute."""
    steps = [tuple(map(int, step)) for step in STEP.findall(section(f"## `{strategy}`"))]
    assert len(steps) >= 3
    engine = LocalEngine()
    charges = (Charge(make_policies("default", "10/minute", strategy), make_partition("ip", "192.0.2.1"), 1),)
    for hours, minutes, seconds, sent, admitted in steps:
        now = (86400 + 3600 * hours + 60 * minutes + seconds) * SECOND
        assert admitted == sum(engine.decide("consume", charges, now=now)[0] for _ in range(sent)), seconds


# configuration


def test_configuration_table_is_what_settings_say() -> None:
    """The table is what `redis-asgi settings --markdown` writes,
    and every setting says what it means.
    """
    printed = CliRunner().invoke(command_line, ["settings", "--markdown"]).stdout

    assert printed in section("## Every setting")
    assert all(field.description for field in Settings.model_fields.values())


def test_examples_of_the_table_work() -> None:
    """A value from the table's example column is accepted, or refused for a file that is not there."""
    needs = {"REDIS_SENTINELS": {"REDIS_SENTINEL_MASTER": "mymaster"}, "REDIS_CLUSTER_NODES": {"REDIS_CLUSTER": "true"}}
    for name, field in Settings.model_fields.items():
        example = str((field.examples or [field.default])[0])
        if example.startswith("/etc/"):
            with pytest.raises(ConfigurationError, match=name):
                Settings(**{name: example + ".absent"})
        else:
            Settings(**{name: example}, **needs.get(name, {}))


# logs


def test_log_table_is_what_can_be_logged() -> None:
    """Every event has a row with its level, its cause and its cure,
    and is named in full in the example.
    """
    rows = table(section("## Logs"))

    assert [[f"`{e.word}`", e.where, e.cause, e.fix] for e in explanations() if e.where != "health"] == rows


# what is in Redis


@pytest.mark.anyio
async def test_keys_are_those_shown(settings: Settings, redis_client: redis.Redis) -> None:
    """The table's keys are what an address,
    an identity and a moving window leave behind, of about that size.
    """
    rows = [row for row in table(section("## What is in Redis")) if row[0].startswith("`rate_limit:")]
    in_flight = rows.pop()
    await RateLimiter(settings=settings).consume("client-1")
    app = RateLimitMiddleware(not_found, "100/minute", strategy="moving-window", settings=settings)
    address = httpx.ASGITransport(app, client=("203.0.113.7", 50_000))
    async with httpx.AsyncClient(transport=address, base_url="http://test") as client:
        await client.get("/")

    keys = [row[0].strip("`").encode() for row in rows]
    assert sorted(keys) == sorted(redis_client.keys())
    for key, row in zip(keys, rows, strict=True):
        assert (redis_client.memory_usage(key) or 0) <= 1.5 * first_number(row[4]), key
        assert 60_000 < int(redis_client.pttl(key)) <= 61_000, key

    async with RateLimiter(settings=settings).slot(make_partition("ip", "203.0.113.7", plain=True), 4, name="streams"):
        key = in_flight[0].strip("`").encode()
        assert 0 < (redis_client.memory_usage(key) or 0) <= 1.5 * first_number(in_flight[4])
        assert 29_000 < int(redis_client.pttl(key)) <= 31_000


@pytest.mark.anyio
async def test_embedding_keys_are_those_shown(settings: Settings, redis_client: redis.Redis) -> None:
    """The table's keys are what a vector by id and an embedding request leave behind, of about that
    size.
    """
    rows = [row for row in table(section("## What is in Redis")) if row[0].startswith("`embedding")]
    await EmbeddingCache(settings=settings).set_embedding("doc-1", [0.5] * 1536)
    async with embedding_client(settings) as client:
        await client.post("/v1/embeddings", json={"model": "m", "input": "a text"})
        await client.post("/v1/embeddings", json={"model": "m", "input": "a text"}, headers={"x-api-key": "unknown"})

    left: Any = redis_client.keys()
    keys = {re.sub(r"[0-9a-f]{64}", "<sha256>", key.decode()): key for key in left}
    assert sorted(row[0].strip("`") for row in rows) == sorted(keys)
    seconds = {"`EMBEDDING_CACHE_TTL`": (3240, 3600), "its": (3600, 3600), "`EMBEDDING_CACHE_LEASE`": (300, 300)}
    for name, _, _, lives, size in rows:
        key = keys[name.strip("`")]
        least, most = seconds.get(re.split("[ ,]", lives)[0], (86_400, 86_400))
        assert (redis_client.memory_usage(key) or 0) == about(first_number(size), redis_client), key
        assert least - 10 < redis_client.ttl(key) <= most, key


def about(size: int, client: redis.Redis) -> Any:
    """What equals *size* within a tenth,
    or within a third where Redis has another allocator than its own jemalloc.
    """
    info = cast("dict[str, str]", client.info("memory"))
    return pytest.approx(size, rel=0.1 if info["mem_allocator"].startswith("jemalloc") else 1 / 3)


def first_number(text: str) -> int:
    """``7,304 for …`` as 7304."""
    return int(re.findall(r"\d+", text.replace(",", ""))[0])


async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("", 404)(scope, receive, send)


# the embedding cache


def embedding_client(settings: Settings) -> httpx.AsyncClient:
    """A client of an embedding server behind the cache; its vectors have 1,536 numbers."""
    app = FastAPI()
    app.add_middleware(EmbeddingCacheMiddleware, namespace="m", settings=settings)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> dict[str, Any]:
        if "x-api-key" in request.headers:
            raise HTTPException(401)
        body = await request.json()
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        data = [{"object": "embedding", "index": i, "embedding": [0.5] * 1536} for i in range(len(texts))]
        return {"object": "list", "data": data, "model": "m", "usage": {"prompt_tokens": 9, "total_tokens": 9}}

    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.anyio
async def test_cache_status_is_what_is_shown() -> None:
    """A first, a second and a partly new request are answered with the fields shown."""
    shown = re.findall(
        r"cache-status: (redis-asgi; \S.*?)(?:  |$|`)", GUIDES["embeddings"].text.partition("\n## ")[0], re.MULTILINE
    )
    async with embedding_client(Settings(REDIS_URL="memory://", REDIS_KEY_PREFIX="guide:")) as client:
        batches = [["a", "b"], ["a", "b"], ["a", "c"]]
        answers = [await client.post("/v1/embeddings", json={"model": "m", "input": batch}) for batch in batches]

    really = [answer.headers["cache-status"] for answer in answers]
    assert [re.sub(r"ttl=\d+", "ttl=N", s) for s in shown] == [re.sub(r"ttl=\d+", "ttl=N", s) for s in really]


@pytest.mark.parametrize("format_name", ["openai", "ollama", "cohere", "tei"])
def test_paths_are_those_shown(format_name: str) -> None:
    """The table of wire formats has the paths of each."""
    (row,) = [row for row in table(section("## What makes a request cacheable")) if row[0] == f"`{format_name}`"]

    assert list(DEFAULT_PATHS[format_name]) == re.findall(r"`(/[^`]*)`", row[1])


def test_memory_is_what_is_shown(redis_client: redis.Redis) -> None:
    """A vector takes the bytes that the table says, within what allocators differ by."""
    for cells in table(section("## Memory in Redis")):
        dims, *shown = (first_number(cell) for cell in cells)
        for size, dtype in zip(shown, ("<f2", "<f4", "<f8"), strict=True):
            key = "embedding_input:v1:" + "0" * 64
            redis_client.set(key, encode(np.ones(dims, dtype=dtype), born=0.0, own=bytes(8)).raw, ex=60)
            assert (redis_client.memory_usage(key) or 0) == about(size, redis_client)
