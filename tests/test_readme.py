"""The README is true: its code runs, its answers come back, its table is what `Settings` says."""

import asyncio
import json
import re
import sys
import types
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest
import redis
from fastapi import FastAPI, HTTPException, Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from typer.testing import CliRunner

import redis_asgi
from redis_asgi import (
    ConfigurationError,
    EmbeddingCache,
    EmbeddingCacheMiddleware,
    RateLimiter,
    RateLimitMiddleware,
    Settings,
)
from redis_asgi.cli.commands import app as command_line
from redis_asgi.embeddings.codec import encode
from redis_asgi.embeddings.wire import DEFAULT_PATHS
from redis_asgi.events import explanations
from redis_asgi.ratelimit.local import LocalEngine
from redis_asgi.ratelimit.policies import make_policies
from redis_asgi.ratelimit.policy import Charge, make_partition

from .test_examples import serving

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SECOND = 1_000_000  # us


def blocks(language: str) -> list[str]:
    """The code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    """What stands below a heading, up to the next of its level or of a higher one."""
    level = len(title.partition(" ")[0])
    match = re.search(rf"^{re.escape(title)}\n(.*?)(?=^#{{2,{level}}} |\Z)", README, re.MULTILINE | re.DOTALL)
    assert match is not None, title
    return match[1]


# code


def first_line(code: str) -> str:
    """How a block is told apart from the others in a report."""
    return next(line for line in code.splitlines() if not line.startswith(("from", "import")) and line)


@pytest.mark.parametrize("code", blocks("python"), ids=first_line)
def test_code_runs_as_pasted(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block stands alone, and an app in it answers a request."""
    monkeypatch.setenv("REDIS_URL", "memory://")
    module = types.ModuleType("readme_block")
    # Endpoints' annotations are looked up where they were defined.
    monkeypatch.setitem(sys.modules, "readme_block", module)
    exec(compile(code, "README.md", "exec"), module.__dict__)  # noqa: S102 - our own README
    app = module.__dict__.get("app")
    if app is not None:
        assert asyncio.run(first_answer(app)).status_code < 500


async def first_answer(app: Any) -> httpx.Response:
    """What the app answers to ``GET /``."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.get("/")


# the first screen


def columns() -> list[list[str]]:
    """The two answers that stand side by side on the first screen, as lines."""
    (block,) = (block for block in blocks("console") if "curl -i" in block)
    lines = block.splitlines()
    middle = lines[0].rindex("$ curl")
    return [[line[:middle].rstrip() for line in lines], [line[middle:].rstrip() for line in lines]]


def without_seconds(text: str) -> str:
    """*text* with the seconds that depend on when one asks left open."""
    return re.sub(r"(;t=|retry-after: |Retry in )\d+", r"\1N", text)


def test_answers_are_what_the_quickstart_sends() -> None:
    """The first and the sixth answer have that status line and those fields, in that order."""
    with serving("quickstart") as example:
        answers = [example.get("/") for _ in range(6)]
    for shown, answer in zip(columns(), (answers[0], answers[5]), strict=True):
        assert shown[0].startswith("$ curl -i http://127.0.0.1:8000/")
        really = [f"HTTP/1.1 {answer.status_code} {answer.reason_phrase}"]
        really += [f"{name}: {value}" for name, value in answer.headers.items()]
        names = {line.partition(": ")[0] for line in shown[2:]}
        kept = really[:1] + [line for line in really[1:] if line.partition(": ")[0] in names]

        assert list(map(without_seconds, filter(None, shown[1:]))) == list(map(without_seconds, kept))
        assert {line.partition(": ")[0] for line in really[1:]} - names <= {
            "date",
            "server",
            "content-length",
        }


def test_problem_is_what_the_quickstart_sends() -> None:
    """The body of a 429 is the document shown."""
    (shown,) = blocks("json")
    with serving("quickstart") as example:
        body = [example.get("/") for _ in range(6)][5].text

    assert json.loads(without_seconds(shown)) == json.loads(without_seconds(body))


def test_commands_are_those_that_run() -> None:
    """The test command is the one that continuous integration runs; the other one's script exists."""
    serve, test, *_ = blocks("sh")

    assert test in (ROOT / ".ci" / "test").read_text("utf-8")
    assert (ROOT / serve.split()[-1]).exists()


def test_first_screen_is_one_screen() -> None:
    """What a reader sees first ends within 45 lines."""
    assert README[: README.index("\n## ")].count("\n") <= 45


# strategies

STEP = re.compile(
    r"^- At \*\*(\d\d):(\d\d):(\d\d)\*\* the client sends (\d+) requests?: (\d+) (?:is|are) admitted",
    re.MULTILINE,
)


@pytest.mark.parametrize("strategy", ["fixed-window", "sliding-window-counter", "moving-window", "gcra"])
def test_timeline_is_what_happens(strategy: Any) -> None:
    """Each strategy admits what its timeline says, on a clock that starts at a whole minute."""
    steps = [tuple(map(int, step)) for step in STEP.findall(section(f"#### `{strategy}`"))]
    assert len(steps) >= 3
    engine = LocalEngine()
    charges = (Charge(make_policies("default", "10/minute", strategy), make_partition("ip", "192.0.2.1"), 1),)
    for hours, minutes, seconds, sent, admitted in steps:
        now = (86400 + 3600 * hours + 60 * minutes + seconds) * SECOND
        assert admitted == sum(engine.decide("consume", charges, now=now)[0] for _ in range(sent)), seconds


# configuration


def table(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[1:]]


def test_configuration_table_is_what_settings_say() -> None:
    """The table is what `redis-asgi settings --markdown` writes, and every setting says what it means."""
    printed = CliRunner().invoke(command_line, ["settings", "--markdown"]).stdout

    assert printed in section("## Configuration")
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
    """Every event has a row with its level, its cause and its cure, and is named in full in the example."""
    rows = table(section("## Logs"))

    assert [[f"`{e.word}`", e.where, e.cause, e.fix] for e in explanations() if e.where != "health"] == rows


# what is in Redis


@pytest.mark.anyio
async def test_keys_are_those_shown(settings: Settings, redis_client: redis.Redis) -> None:
    """The table's keys are what an address, an identity and a moving window leave behind, of about that size."""
    rows = [row for row in table(section("## What is in Redis")) if row[0].startswith("`rate_limit:")]
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


@pytest.mark.anyio
async def test_embedding_keys_are_those_shown(settings: Settings, redis_client: redis.Redis) -> None:
    """The table's keys are what a vector by id and an embedding request leave behind, of about that size."""
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
    """What equals *size* within a tenth, or within a third where Redis has another allocator than its own jemalloc."""
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
    shown = re.findall(r"cache-status: (redis-asgi; \S.*?)(?:  |$|`)", section("## Embedding cache"), re.MULTILINE)
    async with embedding_client(Settings(REDIS_URL="memory://", REDIS_KEY_PREFIX="readme:")) as client:
        batches = [["a", "b"], ["a", "b"], ["a", "c"]]
        answers = [await client.post("/v1/embeddings", json={"model": "m", "input": batch}) for batch in batches]

    really = [answer.headers["cache-status"] for answer in answers]
    assert [re.sub(r"ttl=\d+", "ttl=N", s) for s in shown] == [re.sub(r"ttl=\d+", "ttl=N", s) for s in really]


@pytest.mark.parametrize("format_name", ["openai", "ollama", "cohere", "tei"])
def test_paths_are_those_shown(format_name: str) -> None:
    """The table of wire formats has the paths of each."""
    (row,) = [row for row in table(section("### What makes a request cacheable")) if row[0] == f"`{format_name}`"]

    assert list(DEFAULT_PATHS[format_name]) == re.findall(r"`(/[^`]*)`", row[1])


def test_memory_is_what_is_shown(redis_client: redis.Redis) -> None:
    """A vector takes the bytes that the table says, within what allocators differ by."""
    for cells in table(section("### Memory in Redis")):
        dims, *shown = (first_number(cell) for cell in cells)
        for size, dtype in zip(shown, ("<f2", "<f4", "<f8"), strict=True):
            key = "embedding_input:v1:" + "0" * 64
            redis_client.set(key, encode(np.ones(dims, dtype=dtype), born=0.0, own=bytes(8)).raw, ex=60)
            assert (redis_client.memory_usage(key) or 0) == about(size, redis_client)


# manners


def test_links_lead_somewhere() -> None:
    """Relative links name a file, and links within the page a heading."""
    headings = {
        re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("https://"):
            assert (ROOT / target).exists(), target


def test_source_files_are_there() -> None:
    """What is named for reading exists."""
    for path in re.findall(r"`([a-z_./*]+\.(?:py|lua))`", section("## Reading the source")):
        assert list((ROOT / "redis_asgi").glob(path)), path


def test_public_names_are_named() -> None:
    """Every public name is in the README or in an example."""
    text = README + "".join(p.read_text("utf-8") for p in (ROOT / "examples").glob("*.py"))
    assert [name for name in redis_asgi.__all__ if not re.search(rf"\b{name}\b", text)] == []
