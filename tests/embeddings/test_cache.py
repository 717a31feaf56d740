"""`EmbeddingCache`: vectors by id."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest
import redis as sync_redis

from redis_asgi import EmbeddingCache
from redis_asgi.connection.manager import RedisManager
from redis_asgi.embeddings.origin.computation import Computation
from redis_asgi.embeddings.storage.store import MemoryVectors, RedisVectors
from redis_asgi.errors import ConfigurationError
from redis_asgi.settings import Settings

from ..kit.patience import PATIENCE, quiet

pytestmark = pytest.mark.anyio


@pytest.fixture
def cache(any_settings: Settings) -> EmbeddingCache:
    """A cache on a real server, and on ``memory://``."""
    return EmbeddingCache(settings=any_settings)


async def test_what_was_set_is_what_is_got(cache: EmbeddingCache) -> None:
    """Exact float32 numbers, as a writable copy; deleting says whether there was one."""
    vector = np.array([0.1, -2.5, 3e-38], dtype="<f4")
    assert await cache.set_embedding("a", vector)
    got = await cache.get_embedding("a")
    assert got is not None
    assert vector.tobytes() == got.tobytes()
    got[0] = 9
    assert vector.tobytes() == (await cache.get_many(["a"]))["a"].tobytes()
    assert [True, False] == [await cache.delete_embedding("a") for _ in range(2)]
    assert await cache.get_embedding("a") is None


async def test_many_at_once(cache: EmbeddingCache) -> None:
    """Found only, and counts."""
    assert 2 == await cache.set_many({"a": [1, 2], "b": np.array([3, 4], "<i2")})
    assert {"a": [1.0, 2.0], "b": [3.0, 4.0]} == {
        k: v.tolist() for k, v in (await cache.get_many("abc"[i] for i in (0, 1, 2, 0))).items()
    }
    assert 1 == await cache.delete_many(["a", "a", "c"])
    assert 0 == await cache.set_many({})
    assert 0 == await cache.delete_many([])
    assert {} == await cache.get_many([])


async def test_a_ttl_is_exact(redis_url: str) -> None:
    """To the second, or the millisecond where it is a fraction; under the documented key."""
    settings = Settings(REDIS_URL=redis_url, REDIS_KEY_PREFIX="app:")
    cache = EmbeddingCache(ttl=100, settings=settings)
    await cache.set_embedding("a:b", [1])
    await cache.set_embedding("c", [1], ttl=7.5)
    store = sync_redis.Redis.from_url(redis_url)
    assert 99_000 < store.pttl("app:embedding:a:b") <= 100_000
    assert 7_000 < store.pttl("app:embedding:c") <= 7_500
    store.close()


async def test_a_bare_float32_value_is_read(redis_url: str) -> None:
    """What a service wrote before this package is not lost; anything else is a miss."""
    cache = EmbeddingCache(settings=Settings(REDIS_URL=redis_url))
    store = sync_redis.Redis.from_url(redis_url)
    store.set("embedding:old", np.array([1.5, 2.5], "<f4").tobytes())
    store.set("embedding:odd", b"12345")
    store.hset("embedding:hash", "a", "b")
    store.close()
    assert ["old"] == list(await cache.get_many(["old", "odd", "hash"]))


async def test_a_value_under_another_key_is_a_miss(redis_url: str, redis_client: sync_redis.Redis) -> None:
    """Whatever mixed them up, a reply out of step or an operator's copy:
    nobody gets another id's vector.
    """
    cache = EmbeddingCache(settings=Settings(REDIS_URL=redis_url))
    await cache.set_many({"a": [1.0], "b": [2.0]})
    redis_client.copy("embedding:a", "embedding:b", replace=True)
    redis_client.copy("embedding:a", "other:embedding:a")
    assert {"a": [1.0]} == {name: vector.tolist() for name, vector in (await cache.get_many(["a", "b"])).items()}
    other = EmbeddingCache(settings=Settings(REDIS_URL=redis_url, REDIS_KEY_PREFIX="other:"))
    assert {} == await other.get_many(["a"])
    assert [[3.0]] == (await cache.get_or_compute(["b"], lambda _: [[3.0]])).tolist()
    assert [3.0] == (await cache.get_many(["b"]))["b"].tolist()


async def test_float16_halves_the_memory(redis_url: str) -> None:
    """What does not fit is kept as float32."""
    cache = EmbeddingCache(settings=Settings(REDIS_URL=redis_url), dtype="float16")
    await cache.set_many({"a": [0.5] * 100, "b": [1e6] * 100})
    store = sync_redis.Redis.from_url(redis_url)
    assert [232, 432] == [store.strlen(f"embedding:{name}") for name in "ab"]
    store.close()
    assert [0.5, 1e6] == [float(v[0]) for v in (await cache.get_many("ab"[i] for i in (0, 1))).values()]


@pytest.mark.parametrize(
    ("context_id", "error"),
    [
        (5, TypeError),
        (None, TypeError),
        (b"a", TypeError),
        ("", ValueError),
        ("é" * 513, ValueError),
        ("\ud800", ValueError),
    ],
)
async def test_ids_are_checked_before_anything_is_written(
    context_id: Any, error: type[Exception], cache: EmbeddingCache
) -> None:
    """Not ``str``, empty, too long or not UTF-8."""
    for operation in (
        cache.get_embedding(context_id),
        cache.set_embedding(context_id, [1]),
        cache.set_many({"good": [1], context_id: [1]}),
        cache.delete_embedding(context_id),
        cache.get_or_compute(["good", context_id], lambda ids: [[1]] * len(ids)),
    ):
        with pytest.raises(error):
            await operation
    assert await cache.get_embedding("good") is None


@pytest.mark.parametrize(
    ("embedding", "error"),
    [
        ([], ValueError),
        (1.0, ValueError),
        ([[1.0]], ValueError),
        ([[1.0], [1.0, 2.0]], ValueError),
        ([np.nan], ValueError),
        ([np.inf], ValueError),
        ([1e39], ValueError),
        (np.zeros(65_536), ValueError),
        ([True], TypeError),
        ([1j], TypeError),
        ([None], TypeError),
        (["1"], TypeError),
        (np.array(["2020"], "datetime64[Y]"), TypeError),
    ],
    ids=lambda value: repr(value)[:25],
)
async def test_embeddings_are_checked_before_anything_is_written(
    embedding: Any, error: type[Exception], cache: EmbeddingCache
) -> None:
    """Not 1-D, empty, not finite as float32, not numbers."""
    with pytest.raises(error):
        await cache.set_many({"good": [1.0], "bad": embedding})
    assert {} == await cache.get_many(["good", "bad"])


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), True, "60"])
async def test_a_ttl_is_positive(ttl: Any, cache: EmbeddingCache) -> None:
    """At construction and at each call."""
    with pytest.raises(ConfigurationError, match="Try 3600"):
        EmbeddingCache(ttl=ttl, settings=Settings(REDIS_URL="memory://"))
    with pytest.raises(ValueError, match="ttl="):
        await cache.set_embedding("a", [1], ttl=ttl)


def test_unknown_dtypes_are_refused() -> None:
    """Only what is kept can be asked for."""
    with pytest.raises(ConfigurationError, match="float16"):
        EmbeddingCache(dtype="int8", settings=Settings(REDIS_URL="memory://"))  # type: ignore[arg-type]  # on purpose


async def test_get_or_compute_computes_what_is_missing_once(cache: EmbeddingCache) -> None:
    """Unique ids in first-seen order, results in the order given, and stored."""
    asked: list[list[str]] = []

    async def compute(ids: list[str]) -> np.ndarray:
        asked.append(ids)
        return np.array([[float(ord(name)), 0.0] for name in ids])

    await cache.set_embedding("b", [98, 0])
    ids = ["c", "b", "a", "c"]
    first, second = [await cache.get_or_compute(ids, compute) for _ in range(2)]
    assert [["c", "a"]] == asked
    assert [99.0, 98.0, 97.0, 99.0] == first[:, 0].tolist() == second[:, 0].tolist()
    assert np.float32 == first.dtype
    assert first.flags.writeable
    assert (0, 0) == (await cache.get_or_compute([], compute)).shape


async def test_a_computation_may_be_over_before_its_task_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an eager task is that waits for nothing."""
    loop = asyncio.get_running_loop()

    def at_once(work: Coroutine[Any, Any, None]) -> asyncio.Future[None]:
        with pytest.raises(StopIteration):
            work.send(None)
        done = loop.create_future()
        done.set_result(None)
        return done

    async def compute(ids: list[str]) -> list[list[float]]:
        return [[1.0]] * len(ids)

    monkeypatch.setattr(loop, "create_task", at_once)
    found = await EmbeddingCache(settings=Settings(REDIS_URL="memory://")).get_or_compute(["eager"], compute)
    monkeypatch.undo()
    assert [[1.0]] == found.tolist()


async def test_a_sync_compute_runs_in_a_worker_thread(cache: EmbeddingCache) -> None:
    """The loop is not blocked by a model."""
    threads: list[int] = []

    def compute(ids: list[str]) -> list[list[float]]:
        threads.append(threading.get_ident())
        return [[1.0]] * len(ids)

    await cache.get_or_compute(["a"], compute)
    assert threads
    assert threading.get_ident() not in threads


async def test_concurrent_calls_share_one_computation(cache: EmbeddingCache) -> None:
    """Single-flight per id, overlapping lists included; a cancelled caller harms nobody."""
    asked: list[str] = []
    go = asyncio.Event()

    async def compute(ids: list[str]) -> list[list[float]]:
        asked.extend(ids)
        await go.wait()
        return [[float(ord(name))] for name in ids]

    tasks = [asyncio.ensure_future(cache.get_or_compute(ids, compute)) for ids in (["a", "b"], ["b", "c"], ["a"]) * 9]
    await quiet(cache._manager)
    tasks[0].cancel()
    await asyncio.sleep(0)
    go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sorted(asked) == ["a", "b", "c"]
    assert isinstance(results[0], asyncio.CancelledError)
    assert [[98.0], [99.0]] == results[1].tolist()  # type: ignore[union-attr]  # an array


async def test_when_nobody_waits_the_computation_ends(cache: EmbeddingCache) -> None:
    """The last caller's cancellation is the computation's."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def compute(_ids: list[str]) -> list[list[float]]:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return []

    task = asyncio.ensure_future(cache.get_or_compute(["a"], compute))
    async with asyncio.timeout(PATIENCE):
        await begun.wait()
        task.cancel()
        await ended.wait()
    assert [[1.0]] == (await cache.get_or_compute(["a"], lambda _: [[1.0]])).tolist()


class Broken(Exception):
    """A model's error."""


async def test_its_exception_reaches_everyone_who_waits(cache: EmbeddingCache) -> None:
    """And the next call computes again."""

    async def compute(_ids: list[str]) -> list[list[float]]:
        await asyncio.sleep(0.02)
        raise Broken

    results = await asyncio.gather(*(cache.get_or_compute(["a"], compute) for _ in range(5)), return_exceptions=True)
    assert [Broken] * 5 == [type(result) for result in results]
    assert [[1.0]] == (await cache.get_or_compute(["a"], lambda _: [[1.0]])).tolist()


class Stop(BaseException):
    """No `Exception`, as those by which test runners end a test are none."""


class Empty:
    """Ends before it begins."""

    def __iter__(self) -> Any:
        raise StopIteration


@pytest.mark.parametrize(
    ("error", "raised"), [(Stop, Stop), (StopIteration, RuntimeError)], ids=["no Exception", "StopIteration"]
)
@pytest.mark.parametrize("sync", [False, True])
async def test_no_kind_of_exception_leaves_anyone_waiting(
    error: type[BaseException], raised: type[BaseException], sync: bool, cache: EmbeddingCache
) -> None:
    """Neither those that are no `Exception` nor the one that no future can raise."""

    def compute(_ids: list[str]) -> Any:
        raise error

    async def compute_async(ids: list[str]) -> Any:
        return compute(ids)

    answer: Any = Empty()
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(raised):
            await cache.get_or_compute(["a"], compute if sync else compute_async)
        with pytest.raises(RuntimeError, match="compute raised StopIteration"):
            await cache.get_or_compute(["a"], lambda _: answer)
    assert [[1.0]] == (await cache.get_or_compute(["a"], lambda _: [[1.0]])).tolist()


@pytest.mark.parametrize("vectors", [[[1.0]], [[1.0]] * 3, [[1.0], [1.0, 2.0]], [[1.0], []]], ids=repr)
async def test_a_wrong_count_or_ragged_vectors_are_an_error(vectors: Any, cache: EmbeddingCache) -> None:
    """Nothing of it is stored."""
    with pytest.raises(ValueError, match=r"compute returned|embedding of"):
        await cache.get_or_compute(["a", "b"], lambda _: vectors)
    assert {} == await cache.get_many(["a", "b"])


async def test_a_bare_str_is_no_list_of_ids(cache: EmbeddingCache) -> None:
    """A text is not a list of characters."""
    with pytest.raises(TypeError):
        await cache.get_or_compute("abc", lambda ids: [[1.0]] * len(ids))


@pytest.mark.parametrize("other", [False, True], ids=["the same cache", "another"])
@pytest.mark.parametrize("change", ["set", "delete"])
@pytest.mark.parametrize("when", ["computing", "writing"])
async def test_a_change_while_an_id_is_computed_wins(
    change: str, when: str, other: bool, any_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set or delete begun before the computation is over decides what is kept, also through
    another cache.
    """
    manager = RedisManager(any_settings)
    cache = EmbeddingCache(manager)
    changed_by = EmbeddingCache(manager) if other else cache
    reached, go = asyncio.Event(), asyncio.Event()

    async def pause() -> None:
        reached.set()
        await go.wait()

    if when == "writing":
        kind = MemoryVectors if any_settings.is_memory else RedisVectors
        write, first = kind.write, [True]

        async def slow(self: Any, writes: Any, *rest: Any) -> Any:
            if first.pop() if first else False:
                await pause()
            return await write(self, writes, *rest)

        monkeypatch.setattr(kind, "write", slow)

    async def compute(ids: list[str]) -> list[list[float]]:
        if when == "computing":
            await pause()
        return [[1.0]] * len(ids)

    computing = asyncio.ensure_future(cache.get_or_compute(["a"], compute))
    await reached.wait()
    operation = changed_by.set_embedding("a", [2.0]) if change == "set" else changed_by.delete_embedding("a")
    changing = asyncio.ensure_future(operation)
    await quiet(cache._manager)
    go.set()
    await asyncio.gather(computing, changing)
    kept = await cache.get_embedding("a")
    assert ([2.0] if change == "set" else None) == (None if kept is None else kept.tolist())


async def test_a_change_waits_for_a_write_of_another_loop(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops in threads of their own are one process, too."""
    manager = RedisManager(Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_TIMEOUT=5))
    write, reached, go = RedisVectors.write, threading.Event(), threading.Event()

    async def slow(self: Any, writes: Any, *rest: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            reached.set()
            await asyncio.to_thread(go.wait)
        return await write(self, writes, *rest)

    monkeypatch.setattr(RedisVectors, "write", slow)

    async def compute() -> None:
        await EmbeddingCache(manager).get_or_compute(["a"], lambda _: [[1.0]])
        await manager.close()

    thread = threading.Thread(target=lambda: asyncio.run(compute()))
    thread.start()
    await asyncio.to_thread(reached.wait)
    cache = EmbeddingCache(manager)
    changing = asyncio.ensure_future(cache.set_embedding("a", [2.0]))
    await quiet(manager)
    go.set()
    assert await changing
    await asyncio.to_thread(thread.join)
    found = await cache.get_embedding("a")
    assert [2.0] == (None if found is None else found.tolist())


async def test_a_change_waits_no_longer_than_a_write_takes(redis_url: str) -> None:
    """A loop that was closed amid a write, or left behind by a fork, never ends it."""
    cache = EmbeddingCache(settings=Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_TIMEOUT=0.5))
    left = Computation(["a"], {})
    cache._changes.begin(left)
    left.writing = True
    async with asyncio.timeout(PATIENCE):
        assert await cache.set_embedding("a", [1.0])


async def test_vectors_of_two_models_are_not_stacked(cache: EmbeddingCache) -> None:
    """Stored and computed lengths differ: an error that says what to do."""
    await cache.set_embedding("a", [1.0, 2.0])
    with pytest.raises(ValueError, match="Delete those"):
        await cache.get_or_compute(["a", "b"], lambda _: [[1.0]])


def test_the_package_imports_without_numpy() -> None:
    """``import redis_asgi`` is quick; the embedding names load when used."""
    import subprocess
    import sys

    code = (
        "import sys, redis_asgi, redis_asgi.settings, redis_asgi.maintenance\n"
        "assert 'numpy' not in sys.modules\n"
        "redis_asgi.EmbeddingCacheMiddleware\n"
        "assert 'numpy' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
