"""The model that an answer names: no answer holds vectors of two, and a fallback's do not stay."""

import asyncio
import random
import time
from typing import Any

import orjson
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.maintenance import flush_model
from redis_asgi.settings import Settings

from ..kit.embedding_apps import Spy, cache_status, client, listed, openai, read, respond
from ..kit.inside import shared_of
from ..kit.logs import event_of
from ..kit.patience import until
from .callers import Caller, Gate

pytestmark = pytest.mark.anyio


class Alias:
    """An app whose one model name stands for what `now` says."""

    def __init__(self, *turns: str) -> None:
        self.turns = list(turns)  # models of the next calls; the last one stays
        self.calls: list[list[str]] = []

    @property
    def app(self) -> ASGIApp:
        """To be wrapped."""
        return self._app

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = orjson.loads(await read(receive))
        model = self.turns.pop(0) if len(self.turns) > 1 else self.turns[0]
        self.calls.append(listed(body["input"]))
        await respond(send, orjson.dumps(openai(body | {"model": model}, listed(body["input"]), Spy())))


async def alone(model: str, *texts: str) -> list[Any]:
    """The vectors that *model* gives."""
    return [item["embedding"] for item in openai({"model": model}, list(texts), Spy())["data"]]


async def ask(app: ASGIApp, *texts: str) -> tuple[str, list[Any], str]:
    """The model an answer names, its vectors, and what the cache says."""
    async with client(app) as c:
        response = await c.post("/v1/embeddings", json={"model": "alias", "input": list(texts)})
    answer = response.json()
    return answer["model"], [item["embedding"] for item in answer["data"]], cache_status(response)


async def test_a_fallback_is_answered_alone_and_not_kept(any_settings: Settings) -> None:
    """While the primary is away an answer is wholly the fallback's;
    when it is back, so are its vectors.
    """
    alias = Alias("primary")
    cached = EmbeddingCacheMiddleware(alias.app, settings=any_settings)
    await ask(cached, "a")
    alias.turns = ["fallback"]
    model, vectors, _ = await ask(cached, "a", "b")
    assert ("fallback", await alone("fallback", "a", "b")) == (model, vectors)
    assert ("fallback", await alone("fallback", "c")) == (await ask(cached, "c"))[:2]
    assert ("primary", await alone("primary", "a")) == (await ask(cached, "a"))[:2]
    alias.turns = ["primary"]
    for text in "bc":
        model, vectors, said = await ask(cached, text)
        assert ("primary", await alone("primary", text)) == (model, vectors)
        assert "stored" in said


@pytest.mark.parametrize("seed", range(4))
async def test_an_alias_that_changes_at_random_costs_two_calls_a_minute_more(seed: int, any_settings: Settings) -> None:
    """That the same model answers twice in between changes nothing."""
    rng = random.Random(seed)
    alias, now = Alias(*(rng.choice(("one", "two")) for _ in range(99))), [100.0]
    cached = EmbeddingCacheMiddleware(alias.app, settings=any_settings)
    shared_of(cached).clock.monotonic = lambda: now[0]
    for number in range(40):
        texts = ("same", f"new {number}")
        model, vectors, _ = await ask(cached, *texts)
        assert await alone(model, *texts) == vectors
    assert len(alias.calls) <= 40 + 2


async def test_another_model_when_a_lease_is_renewed_early_costs_two_calls_more(any_settings: Settings) -> None:
    """Its answers renew no lease of the former one, and so nobody goes on asking."""
    alias, now = Alias("old"), [time.time()]
    cached = EmbeddingCacheMiddleware(alias.app, settings=any_settings)
    shared_of(cached).clock.wall = lambda: now[0]
    await ask(cached, "aa", "b")
    alias.turns = ["new"]
    now[0] += 280
    for model in ("new", "new", "old", "old"):
        assert (model, await alone(model, "aa", "b")) == (await ask(cached, "aa", "b"))[:2]
    assert [["aa", "b"], *(2 * [["b"], ["aa", "b"]])] == alias.calls


async def test_a_flush_is_no_change_of_model(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Without a lease what was flushed is missing, in the process as in Redis:
    one call, and no word of a model.
    """
    alias, now = Alias("m"), [time.time()]
    cached = EmbeddingCacheMiddleware(alias.app, settings=Settings(REDIS_URL=redis_url))
    shared_of(cached).clock.wall = lambda: now[0]
    for _ in range(2):
        await ask(cached, "aa", "b")
    now[0] += 400
    shared_of(cached).clock.monotonic = lambda: now[0]
    await flush_model("alias", redis=redis_url)
    assert "redis-asgi; fwd=miss; stored" == (await ask(cached, "aa", "b"))[2]
    assert 2 * [["aa", "b"]] == alias.calls
    assert [] == [record for record in caplog.records if event_of(record) == "redis_asgi.embedding_model_changed"]


@pytest.mark.parametrize("lease", [None, "off"])
async def test_a_model_is_believed_for_five_minutes(lease: Any, any_settings: Settings) -> None:
    """After that at least one input shows the app's model, and only vectors of that one are used."""
    alias, now = Alias("old"), [time.time()]
    cached = EmbeddingCacheMiddleware(alias.app, lease=lease, settings=any_settings)
    shared_of(cached).clock.wall = lambda: now[0]
    await ask(cached, "aa", "b")
    alias.turns = ["new"]
    now[0] += 260
    assert ("old", await alone("old", "aa", "b")) == (await ask(cached, "aa", "b"))[:2]
    now[0] += 50
    assert ("new", await alone("new", "aa", "b")) == (await ask(cached, "aa", "b"))[:2]
    assert [["aa", "b"], ["b"], ["aa", "b"]] == alias.calls
    model, vectors, said = await ask(cached, "aa", "b")
    assert ("new", await alone("new", "aa", "b")) == (model, vectors)
    assert said.startswith("redis-asgi; hit")


async def test_who_waits_for_a_lease_gets_vectors_of_its_model(any_settings: Settings) -> None:
    """What was stored of the former model does not count, although somebody else has asked."""
    alias, gate, now = Alias("old"), Gate(), [time.time()]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await gate(scope)
        await alias.app(scope, receive, send)

    gate.open.set()
    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    shared_of(cached).clock.wall = lambda: now[0]
    await Caller(cached, "a", "b").task
    alias.turns = ["new"]
    now[0] += 400
    gate.open.clear()
    gate.reached.clear()
    first = Caller(cached, "a")
    await gate.reached.wait()
    second = Caller(cached, "b")
    await until(lambda: any(len(flight._waiting) == 2 for flight in shared_of(cached).flights._by_name.values()))
    gate.open.set()
    await asyncio.gather(first.task, second.task)
    for caller, text in ((first, "a"), (second, "b")):
        assert await alone("new", text) == [item["embedding"] for item in caller.answer["data"]]
    assert [["a", "b"], ["a"], ["b"]] == alias.calls


async def test_without_a_lease_what_is_found_counts_if_the_model_is_the_same(any_settings: Settings) -> None:
    """One input is asked for, and the others come from the store."""
    alias, now = Alias("m"), [time.time()]
    cached = EmbeddingCacheMiddleware(alias.app, settings=any_settings)
    shared_of(cached).clock.wall = lambda: now[0]
    await ask(cached, "aa", "bbb", "c")
    now[0] += 400
    model, vectors, said = await ask(cached, "aa", "bbb", "c")
    assert ("m", await alone("m", "aa", "bbb", "c")) == (model, vectors)
    assert "redis-asgi; fwd=stale; detail=lease; stored" == said
    assert [["aa", "bbb", "c"], ["c"]] == alias.calls


async def test_an_alias_that_alternates_costs_two_calls_a_minute_more(
    any_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """No answer mixes models, the log names both once,
    and what is asked is soon what was asked for.
    """
    alias, now = Alias(*("one", "two") * 40), [100.0]
    cached = EmbeddingCacheMiddleware(alias.app, settings=any_settings)
    shared_of(cached).clock.monotonic = lambda: now[0]
    for number in range(20):
        texts = ("same", f"new {number}")
        model, vectors, _ = await ask(cached, *texts)
        assert await alone(model, *texts) == vectors
    assert len(alias.calls) <= 20 + 2
    said = [record.__dict__ for record in caplog.records if event_of(record) == "redis_asgi.embedding_model_changed"]
    assert [("alias", "one", "two")] == [(line["requested"], line["before"], line["now"]) for line in said]


async def test_other_models_of_one_length_share_nothing_under_one_name(redis_url: str) -> None:
    """A lease of zero shows the app every request,
    and what was stored of another model is not used.
    """
    alias = Alias("one", "one", "two")
    cached = EmbeddingCacheMiddleware(alias.app, lease=0, settings=Settings(REDIS_URL=redis_url))
    for expected in ("one", "one", "two", "two"):
        model, vectors, _ = await ask(cached, "aa", "b")
        assert (expected, await alone(expected, "aa", "b")) == (model, vectors)
