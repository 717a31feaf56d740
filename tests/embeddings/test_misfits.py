"""Apps that do not understand smaller requests:
the cache costs two calls a minute more, and full hits go on.
"""

import random
import time
from typing import Any

import orjson
import pytest
from starlette.types import Receive, Scope, Send

from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.embeddings.origin.misfits import Misfits
from redis_asgi.settings import Settings

from ..kit.embedding_apps import Spy, cache_status, client, listed, openai, read, respond
from ..kit.inside import shared_of
from ..kit.logs import event_of

pytestmark = pytest.mark.anyio


class Odd:
    """An app with an answer that nobody understands, or a refusal, while it is `odd`."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.odd = True
        self.rng = random.Random(1)
        self.calls: list[list[Any]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = orjson.loads(await read(receive))
        items = listed(body["input"])
        self.calls.append(items)
        answer = openai({"model": "m"}, items, Spy())
        status = 200
        if self.odd and self.how == "extra":
            for item in answer["data"]:
                item["tokens"] = 3
        elif self.odd and self.how == "accepted":
            status = 202
        elif self.odd and self.how == "small" and len(items) < 3:
            status, answer = 422, {"error": "at least three"}
        elif self.how == "no base64" and body.get("encoding_format") == "base64":
            status, answer = 400, {"error": "float only"}
        elif self.how == "lengths":
            answer = openai({"model": "m"}, items, Spy(dims=5 + self.rng.randrange(2)))
        await respond(send, orjson.dumps(answer), status)


async def ask(c: Any, *items: str, **fields: str) -> Any:
    """One request."""
    return await c.post("/v1/embeddings", json={"model": "m", "input": list(items), **fields})


@pytest.mark.parametrize("how", ["extra", "accepted", "small"])
async def test_duplicates_cost_two_calls_a_minute_more(
    how: str, any_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """Five batches with a duplicate are seven calls, not ten;
    after a minute it is tried again, twice.
    """
    app, now = Odd(how), [1000.0]
    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    shared_of(cached).clock.monotonic = lambda: now[0]
    async with client(cached) as c, client(app) as bare:
        expected = (await ask(bare, "a", "b", "a")).content
        app.calls.clear()
        answers = [await ask(c, "a", "b", "a") for _ in range(5)]
        assert {expected} == {answer.content for answer in answers}
        assert 7 == len(app.calls)
        assert "redis-asgi; fwd=bypass; detail=not-understood" == cache_status(answers[-1])
        now[0] += 61
        for _ in range(5):
            await ask(c, "a", "b", "a")
        assert 7 + 7 == len(app.calls)
    assert 1 == sum(event_of(r) == "redis_asgi.embedding_answers_not_understood" for r in caplog.records)


async def test_full_hits_go_on_and_whole_requests_are_stored(any_settings: Settings) -> None:
    """What is remembered concerns requests that miss something;
    a whole one without a duplicate can still be stored.
    """
    app = Odd("small")
    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    async with client(cached) as c:
        await ask(c, "a", "b", "c")
        for number in range(2):
            assert 200 == (await ask(c, "a", "b", f"d{number}")).status_code
        assert 5 == len(app.calls)
        assert cache_status(await ask(c, "a", "b", "c")).startswith("redis-asgi; hit")
        assert "redis-asgi; fwd=miss; stored" == cache_status(await ask(c, "a", "b", "e"))
        assert ["a", "b", "e"] == app.calls[-1]
        assert cache_status(await ask(c, "e", "b", "a")).startswith("redis-asgi; hit")
        assert 6 == len(app.calls)


async def test_an_understood_answer_in_between_is_forgiving(any_settings: Settings) -> None:
    """Only two in a row are remembered."""
    app = Odd("extra")
    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    async with client(cached) as c:
        for text in "abc":
            app.odd = True
            await ask(c, text, text)
            app.odd = False
            await ask(c, text, text)
    assert 3 * 3 == len(app.calls)


async def test_who_wants_no_stored_answer_costs_no_more_either(any_settings: Settings) -> None:
    """With ``Cache-Control: no-cache`` batches with a duplicate go out whole as well."""
    app = Odd("extra")
    async with client(EmbeddingCacheMiddleware(app, settings=any_settings), **{"cache-control": "no-cache"}) as c:
        for _ in range(6):
            await ask(c, "a", "b", "a")
    assert 6 + 2 == len(app.calls)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
async def test_an_answer_to_a_whole_request_forgives_nothing(dtype: Any, redis_url: str) -> None:
    """Also where it is put together anew, as half the precision is kept."""
    app = Odd("small")
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_DTYPE=dtype)
    async with client(EmbeddingCacheMiddleware(app, settings=settings)) as c:
        await ask(c, "a", "b", "c")
        for number in range(6):
            assert 200 == (await ask(c, "a", "b", f"d{number}")).status_code
    assert 1 + 6 + 2 == len(app.calls)


async def test_a_representation_that_is_refused_is_remembered_for_itself(any_settings: Settings) -> None:
    """What the app answers in another one says nothing about it."""
    app = Odd("no base64")
    async with client(EmbeddingCacheMiddleware(app, settings=any_settings)) as c:
        await ask(c, "same")
        for number in range(6):
            assert 200 == (await ask(c, "same", f"f{number}")).status_code
            refused = await ask(c, "same", f"b{number}", encoding_format="base64")
            assert (400, {"error": "float only"}) == (refused.status_code, refused.json())
    assert 1 + 12 + 2 == len(app.calls)


async def test_vectors_whose_length_alternates_cost_two_calls_a_minute_more(any_settings: Settings) -> None:
    """An answer of the same length in between says nothing against it."""
    app = Odd("lengths")
    async with client(EmbeddingCacheMiddleware(app, settings=any_settings)) as c:
        for number in range(30):
            answer = (await ask(c, "same", f"new {number}")).json()
            assert 1 == len({len(item["embedding"]) for item in answer["data"]})
    assert 30 + 2 == len(app.calls)


async def test_nobody_asks_early_where_one_input_alone_is_refused(any_settings: Settings) -> None:
    """Hits go on until the lease ends, and what renews it then is a whole request."""
    app, now = Odd("small"), [time.time()]
    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    shared_of(cached).clock.wall = lambda: now[0]
    async with client(cached) as c:
        await ask(c, "a", "b", "c")
        now[0] += 280
        for _ in range(6):
            assert 200 == (await ask(c, "a", "b", "c")).status_code
        assert 1 + 2 * 2 == len(app.calls)
        now[0] += 30
        await ask(c, "a", "b", "c")
        assert 1 + 2 * 2 + 1 == len(app.calls)
        assert cache_status(await ask(c, "c", "b", "a")).startswith("redis-asgi; hit")


def test_what_lasts_is_not_forgiven() -> None:
    """An understood answer takes back the other strikes only."""
    misfits = Misfits()
    misfits.strike(b"s", 0.0, lasting=True)
    misfits.clear(b"s")
    assert misfits.strike(b"s", 1.0)
    misfits.clear(b"s")
    assert not misfits.remembers(b"s", 2.0)
    assert misfits.strike(b"s", 3.0, lasting=True)
    misfits.clear(b"s")
    assert misfits.remembers(b"s", 4.0)
    assert not misfits.remembers(b"s", 63.0)


def test_scopes_are_bounded() -> None:
    """A thousand are remembered, the oldest goes first."""
    misfits = Misfits()
    for number in range(1_001):
        assert not misfits.strike(b"%d" % number, 0.0)
        assert misfits.strike(b"%d" % number, 0.0)
    assert not misfits.remembers(b"0", 1.0)
    assert misfits.remembers(b"1000", 59.0)
    assert not misfits.remembers(b"1000", 60.0)
    misfits.clear(b"1000")
    assert not misfits.remembers(b"1000", 1.0)
