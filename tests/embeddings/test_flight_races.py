"""Flights that land, and epochs that appear, while a lookup is under way."""

import asyncio
import time
from collections.abc import Sequence

import pytest

from redis_asgi.connection.manager import RedisManager
from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.embeddings.storage.operations import WRITE_TIMEOUT, Write, WriteResult
from redis_asgi.embeddings.storage.store import MemoryVectors, RedisVectors
from redis_asgi.errors import Failure
from redis_asgi.settings import Settings

from ..kit.embedding_apps import Spy, cache_status, client, server
from ..kit.inside import shared_of
from ..kit.patience import until
from .callers import Caller, Gate, quiet_of

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("leader", "follower", "inputs"),
    [
        ({"cache_control": "no-cache"}, {}, 1),
        ({"cache_control": "no-cache"}, {"cache_control": "only-if-cached"}, 1),
        ({"cache_control": "no-cache"}, {}, 40),
        ({"cache_control": "max-age=60"}, {}, 1),
        ({"authorization": "B"}, {}, 1),
    ],
    ids=["refreshed", "refreshed, only-if-cached", "refreshed with many", "too old for another", "to let another in"],
)
async def test_a_hit_does_not_wait_for_a_call_that_need_not_bring_it(
    leader: dict[str, str], follower: dict[str, str], inputs: int, any_settings: Settings
) -> None:
    """What is stored is answered while the app is asked for it once more, for whatever reason."""
    spy, gate = Spy(), Gate()
    settings = any_settings.model_copy(update={"EMBEDDING_CACHE_L1_BYTES": 0})
    app = EmbeddingCacheMiddleware(server(spy, before=gate), settings=settings, share=True)
    gate.open.set()
    items = [f"text {number}" for number in range(inputs)]
    shared_of(app).clock.wall = lambda: time.time() - 120
    await Caller(app, *items).task
    shared_of(app).clock.wall = time.time
    gate.open.clear()
    gate.reached.clear()
    asking = Caller(app, *items, **leader)
    await gate.reached.wait()
    hit = Caller(app, items[0], **follower)
    await until(hit.task.done)
    gate.open.set()
    await asking.task
    assert (200, 2) == (hit.status, spy.calls)
    assert hit.said.startswith("redis-asgi; hit; ttl=")


async def test_only_if_cached_looks_behind_a_call_under_way(any_settings: Settings) -> None:
    """Another worker may have stored meanwhile what this one computes."""
    gate, spy = Gate(), Spy()
    here = EmbeddingCacheMiddleware(server(spy, before=gate), settings=any_settings)
    slow = Caller(here, "a")
    await gate.reached.wait()
    await Caller(EmbeddingCacheMiddleware(server(spy), settings=any_settings), "a").task
    hit = Caller(here, "a", cache_control="only-if-cached")
    await until(hit.task.done)
    gate.open.set()
    await slow.task
    assert 200 == hit.status


async def test_a_flight_that_lands_during_a_lookup_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody was computing is not asked of the store,
    so his answer counts also when it comes first.
    """
    spy, gate, slow = Spy(), Gate(), asyncio.Event()
    look_up = MemoryVectors.lookup
    settings = Settings(REDIS_URL="memory://", REDIS_KEY_PREFIX="lands:", EMBEDDING_CACHE_L1_BYTES=0)
    app = EmbeddingCacheMiddleware(server(spy, before=gate), settings=settings)

    async def slowly(store: MemoryVectors, names: list[bytes], within: float) -> "list[bytes | None] | Failure":
        found = await look_up(store, names, within)
        await slow.wait()
        return found

    first = Caller(app, "a")
    await gate.reached.wait()
    monkeypatch.setattr(MemoryVectors, "lookup", slowly)
    second = Caller(app, "a")
    await quiet_of(app)
    gate.open.set()
    await first.task
    slow.set()
    await second.task

    assert 1 == spy.calls
    assert first.answer["data"] == second.answer["data"]
    assert "redis-asgi; fwd=miss; collapsed" == second.said


async def test_a_lease_that_lands_during_a_lookup_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors are in the process before their lease is in Redis:
    who comes in between asks the app nothing.
    """
    spy, written, answered = Spy(), asyncio.Event(), asyncio.Event()
    look_up, write = MemoryVectors.lookup, MemoryVectors.write
    settings = Settings(REDIS_URL="memory://", REDIS_KEY_PREFIX="lands-lease:")
    app = EmbeddingCacheMiddleware(server(spy), settings=settings)

    async def write_slowly(store: MemoryVectors, writes: Sequence[Write], within: float = WRITE_TIMEOUT) -> WriteResult:
        await written.wait()
        return await write(store, writes, within)

    async def look_up_slowly(store: MemoryVectors, names: list[bytes], within: float) -> "list[bytes | None] | Failure":
        found = await look_up(store, names, within)
        await answered.wait()
        return found

    monkeypatch.setattr(MemoryVectors, "write", write_slowly)
    first = Caller(app, "a")
    await until(lambda: bool(first.sent))
    monkeypatch.setattr(MemoryVectors, "lookup", look_up_slowly)
    second = Caller(app, "a")
    await until(lambda: shared_of(app).flights.looking == 1)
    written.set()
    await first.task
    answered.set()
    await second.task

    assert 1 == spy.calls
    assert first.answer["data"] == second.answer["data"]
    assert "redis-asgi; fwd=stale; detail=lease; collapsed" == second.said


async def test_a_flight_that_lands_during_a_lookup_it_began_after_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two callers look up at once; one has its answer before the other knows that nothing was
    stored.
    """
    spy, slow = Spy(), asyncio.Event()
    look_up = MemoryVectors.lookup
    settings = Settings(REDIS_URL="memory://", REDIS_KEY_PREFIX="began:", EMBEDDING_CACHE_L1_BYTES=0)
    app = EmbeddingCacheMiddleware(server(spy), settings=settings)
    await Caller(app, "whose epoch is known from now on").task
    lookups: list[object] = []

    async def second_is_slow(store: MemoryVectors, names: list[bytes], within: float) -> "list[bytes | None] | Failure":
        await asyncio.sleep(0)
        found = await look_up(store, names, within)
        lookups.append(names)
        if len(lookups) == 2:
            await slow.wait()
        return found

    monkeypatch.setattr(MemoryVectors, "lookup", second_is_slow)
    first, second = Caller(app, "a"), Caller(app, "a")
    await first.task
    slow.set()
    await second.task
    later = Caller(app, "a")
    await later.task

    assert 2 == spy.calls
    assert first.answer["data"] == second.answer["data"]
    assert "redis-asgi; fwd=miss; collapsed" == second.said
    assert later.said.startswith("redis-asgi; hit")


async def test_an_epoch_that_appears_during_a_lookup_parts_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """One caller's reply is from before another service gave the model its epoch, the other's from
    after.
    """
    spy, slow = Spy(), asyncio.Event()
    look_up = MemoryVectors.lookup
    settings = Settings(REDIS_URL="memory://", REDIS_KEY_PREFIX="appears:", EMBEDDING_CACHE_L1_BYTES=0)
    app, other = (EmbeddingCacheMiddleware(server(spy), settings=settings) for _ in range(2))
    lookups: list[object] = []

    async def first_is_slow(store: MemoryVectors, names: list[bytes], within: float) -> "list[bytes | None] | Failure":
        found = await look_up(store, names, within)
        lookups.append(names)
        if len(lookups) == 1:
            await slow.wait()
        return found

    monkeypatch.setattr(MemoryVectors, "lookup", first_is_slow)
    first = Caller(app, "a")
    await until(lambda: len(lookups) == 1)
    await Caller(other, "of another service").task
    second = Caller(app, "a")
    await second.task
    slow.set()
    await first.task
    later = Caller(app, "a")
    await later.task

    assert ["of another service", "a"] == spy.seen
    assert "redis-asgi; fwd=miss; collapsed" == first.said
    assert later.said.startswith("redis-asgi; hit")


async def test_landed_flights_are_forgotten_when_no_lookup_can_need_them() -> None:
    """Their vectors stay in memory only while somebody looks up,
    and then no longer than a lookup takes.
    """
    settings = Settings(REDIS_URL="memory://", REDIS_KEY_PREFIX="forgotten:", EMBEDDING_CACHE_TIMEOUT=0.01)
    app = EmbeddingCacheMiddleware(server(Spy()), settings=settings)
    await Caller(app, "a", "b").task
    flights = shared_of(app).flights
    assert (0, 0) == (flights.looking, len(flights._landed))
    flights.looking += 1
    await Caller(app, "c", "d").task
    assert 3 == len(flights._landed)  # two inputs, and the lease that came with them
    await until(lambda: not flights._landed)


# A model that nobody has stored a vector of yet, so that Redis has no epoch of it.


async def test_a_new_models_concurrent_lookups_meet(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find that there is no epoch; one has its vector stored before the other hears so."""
    spy, slow = Spy(), asyncio.Event()
    look_up = RedisVectors.lookup
    app = EmbeddingCacheMiddleware(server(spy), settings=Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_L1_BYTES=0))
    lookups: list[object] = []

    async def second_is_slow(store: RedisVectors, names: list[bytes], within: float) -> "list[bytes | None] | Failure":
        found = await look_up(store, names, within)
        lookups.append(names)
        if len(lookups) == 2:
            await slow.wait()
        return found

    monkeypatch.setattr(RedisVectors, "lookup", second_is_slow)
    first, second = Caller(app, "a"), Caller(app, "a")
    await asyncio.wait({first.task, second.task}, return_when=asyncio.FIRST_COMPLETED)
    slow.set()
    await asyncio.gather(first.task, second.task)
    later = Caller(app, "a")
    await later.task

    assert ["a"] == spy.seen
    assert first.answer["data"] == second.answer["data"]
    assert later.said.startswith("redis-asgi; hit")


async def test_fifty_identical_requests_for_a_new_model_are_one_computation(redis_url: str) -> None:
    """Also when the app answers at once, model after model."""
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_TIMEOUT=5)
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=settings)
    async with client(app) as c:
        for model in map(str, range(20)):
            body = {"model": model, "input": ["a", "b"]}
            await asyncio.gather(*(c.post("/v1/embeddings", json=body) for _ in range(50)))
            warm = await c.post("/v1/embeddings", json=body)
            assert cache_status(warm).startswith("redis-asgi; hit")
    assert 20 * ["a", "b"] == spy.seen


async def test_two_workers_agree_on_a_new_model(redis_url: str) -> None:
    """One stores its first vector while the other computes;
    nothing is computed twice or lost by that.
    """
    spy, gate = Spy(), Gate()
    settings = [Settings(REDIS_URL=redis_url, REDIS_POOL_SIZE=size) for size in (4, 5)]
    slow = EmbeddingCacheMiddleware(server(spy, before=gate), settings=settings[0], redis=RedisManager(settings[0]))
    quick = EmbeddingCacheMiddleware(server(spy), settings=settings[1], redis=RedisManager(settings[1]))
    first = Caller(slow, "a")
    await gate.reached.wait()
    other = Caller(quick, "b")
    await other.task
    second = Caller(slow, "a")
    await quiet_of(slow)
    gate.open.set()
    await asyncio.gather(first.task, second.task)
    later = [Caller(app, "a", "b") for app in (quick, slow)]
    await asyncio.gather(*(caller.task for caller in later))

    assert ["a", "b"] == spy.seen
    assert first.answer["data"] == second.answer["data"]
    assert ["redis-asgi; hit"] * 2 == [caller.said[:15] for caller in later]
