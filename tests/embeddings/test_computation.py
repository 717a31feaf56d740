"""Who waits for a computation: whoever is cancelled, and whenever, nobody else notices."""

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from redis_asgi import EmbeddingCache
from redis_asgi.connection.manager import RedisManager
from redis_asgi.embeddings.storage.store import MemoryVectors
from redis_asgi.settings import Settings

from ..kit.patience import PATIENCE

pytestmark = pytest.mark.anyio

Compute = Callable[[list[str]], Awaitable[Any]]


@pytest.fixture
def manager() -> RedisManager:
    """One on ``memory://`` that is the test's own."""
    return RedisManager(Settings(REDIS_URL="memory://"))


EAGER: Any = getattr(asyncio, "eager_task_factory", None)  # of Python 3.12


@pytest.fixture(params=["lazy", "eager"] if EAGER is not None else ["lazy"])
async def tasks(request: pytest.FixtureRequest) -> Any:
    """With tasks as they are, and with tasks that begin at once."""
    loop = asyncio.get_running_loop()
    if request.param == "eager":
        loop.set_task_factory(EAGER)
    yield
    loop.set_task_factory(None)


def vectors(ids: list[str]) -> list[list[float]]:
    """What every right computation of *ids* gives."""
    return [[float(ord(name)), 1.0] for name in ids]


async def settled() -> None:
    """Let everything that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


def left_over(cache: EmbeddingCache) -> tuple[list[Any], dict[str, Any]]:
    """What a cache still holds of computations."""
    return [ids for loops in cache._computing.values() for ids in loops], cache._changes._computing


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("turns", range(4))
async def test_who_comes_while_a_computation_is_given_up_has_one_of_his_own(manager: RedisManager, turns: int) -> None:
    """However long the clean-up of the cancelled one takes,
    and however soon after the cancellation he comes.
    """
    cache, go, cleaned, asked = EmbeddingCache(manager), asyncio.Event(), asyncio.Event(), 0

    async def compute(ids: list[str]) -> list[list[float]]:
        nonlocal asked
        asked += 1
        if asked == 1:
            try:
                await go.wait()
            finally:
                await cleaned.wait()
        return vectors(ids)

    first = asyncio.ensure_future(cache.get_or_compute(["a"], compute))
    await settled()
    first.cancel()
    for _ in range(turns):
        await asyncio.sleep(0)
    second = asyncio.ensure_future(cache.get_or_compute(["a"], compute))
    await settled()
    if turns:
        assert second.done()
    # Who came before anybody had left has joined a computation that was alive.
    go.set()
    cleaned.set()
    assert vectors(["a"]) == (await second).tolist()
    assert first.cancelled()
    await settled()
    assert ([], {}) == left_over(cache)


async def test_a_caller_waits_for_all_that_it_needs_from_the_start(manager: RedisManager) -> None:
    """One that needs two computations keeps the second alive while it awaits the first."""
    cache, go, asked = EmbeddingCache(manager), asyncio.Event(), list[str]()

    async def compute(ids: list[str]) -> list[list[float]]:
        asked.extend(ids)
        await go.wait()
        return vectors(ids)

    ones = [asyncio.ensure_future(cache.get_or_compute([name], compute)) for name in "ab"]
    await settled()
    both = asyncio.ensure_future(cache.get_or_compute(["a", "b"], compute))
    await settled()
    ones[1].cancel()
    await settled()
    go.set()
    assert vectors(["a", "b"]) == (await both).tolist()
    assert ["a", "b"] == asked


async def test_trying_again_after_ones_own_time_out_computes_anew(manager: RedisManager) -> None:
    """The first attempt is nobody's any more."""
    cache, asked = EmbeddingCache(manager), 0

    async def compute(ids: list[str]) -> list[list[float]]:
        nonlocal asked
        asked += 1
        if asked == 1:
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.01)
        return vectors(ids)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await cache.get_or_compute(["a"], compute)
    assert vectors(["a"]) == (await cache.get_or_compute(["a"], compute)).tolist()


async def test_a_compute_that_is_not_stopped_by_its_cancellation_keeps_nothing(manager: RedisManager) -> None:
    """What it gives later is nobody's, and may be older than what was computed meanwhile."""
    cache, go = EmbeddingCache(manager), asyncio.Event()

    async def stubborn(_ids: list[str]) -> list[list[float]]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await go.wait()
        return [[-1.0]]

    first = asyncio.ensure_future(cache.get_or_compute(["a"], stubborn))
    await settled()
    first.cancel()
    await settled()
    await cache.set_embedding("a", [2.0])
    go.set()
    await settled()
    kept = await cache.get_embedding("a")
    assert [2.0] == (None if kept is None else kept.tolist())
    assert ([], {}) == left_over(cache)


async def test_nothing_is_computed_for_nobody(manager: RedisManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when a lookup goes on after its cancellation, as a connection just made does."""
    cache, asked = EmbeddingCache(manager), list[str]()

    async def stubborn(_self: MemoryVectors, names: list[bytes], _within: float) -> list[bytes | None]:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return [None] * len(names)

    async def compute(ids: list[str]) -> list[list[float]]:
        asked.extend(ids)
        return vectors(ids)

    monkeypatch.setattr(MemoryVectors, "lookup", stubborn)
    caller = asyncio.ensure_future(cache.get_or_compute(["a"], compute))
    await settled()
    caller.cancel()
    await settled()
    assert [] == asked
    assert ([], {}) == left_over(cache)


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("where", ["in it", "in a thread", "from outside", "before it has begun"])
async def test_nobody_else_sees_a_cancellation(manager: RedisManager, where: str) -> None:
    """A compute that was cancelled by something of its own,
    or by whoever cancels all tasks, is an error.
    """
    cache = EmbeddingCache(manager)

    def in_a_thread(_ids: list[str]) -> Any:
        raise asyncio.CancelledError

    async def compute(_ids: list[str]) -> Any:
        if where == "in it":
            raise asyncio.CancelledError
        await asyncio.sleep(60)

    before = asyncio.all_tasks()
    callers = [
        asyncio.ensure_future(cache.get_or_compute(["a"], in_a_thread if where == "in a thread" else compute))
        for _ in range(2)
    ]
    if where == "from outside":
        await settled()
    while where in ("from outside", "before it has begun"):
        others = asyncio.all_tasks() - before - set(callers)
        for other in others:
            other.cancel()
        if others:
            break
        await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE):
        results = await asyncio.gather(*callers, return_exceptions=True)
    assert [RuntimeError] * 2 == [type(result) for result in results]
    assert "compute raised CancelledError" in str(results[0])
    await settled()
    assert ([], {}) == left_over(cache)
    assert vectors(["a"]) == (await cache.get_or_compute(["a"], lambda ids: vectors(ids))).tolist()


def test_loops_do_not_meet_in_a_computation() -> None:
    """Each thread's loop computes for itself; a cancellation in one is none in another."""
    manager = RedisManager(Settings(REDIS_URL="memory://"))
    cache, results = EmbeddingCache(manager), list[Any]()

    async def compute(ids: list[str]) -> list[list[float]]:
        await asyncio.sleep(0.001 * (len(ids) + ord(ids[0][0]) % 7))
        return vectors([name[0] for name in ids])

    async def callers(seed: int) -> None:
        rng = random.Random(seed)
        names = [rng.choice("abc") + str(turn % 20) for turn in range(60)]
        made = [asyncio.ensure_future(cache.get_or_compute([name], compute)) for name in names]
        await asyncio.sleep(0)
        left = [task for task in made if rng.random() < 0.5]
        for task in left:
            task.cancel()
        done = await asyncio.gather(*made, return_exceptions=True)
        results.extend(
            repr(result) if isinstance(result, BaseException) else result.tolist() == vectors([name[0]])
            for task, name, result in zip(made, names, done, strict=True)
            if task not in left
        )

    threads = [threading.Thread(target=lambda n=n: asyncio.run(callers(n))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {True} == set(results)
    assert {} == cache._changes._computing


class Broken(Exception):
    """A model's error."""


class World:
    """Callers of one cache that come, wait,
    leave and change things in an order that a seed decides.
    """

    def __init__(self, manager: RedisManager, seed: int) -> None:
        self.rng = random.Random(seed)
        self.caches = [EmbeddingCache(manager), EmbeddingCache(manager)]
        self.callers: dict[asyncio.Task[Any], list[str]] = {}
        self.cancelled: set[asyncio.Task[Any]] = set()
        self.gates: list[asyncio.Event] = []
        self.changes: list[asyncio.Task[Any]] = []

    def compute(self) -> Compute:
        """One of the kinds of computation that a service may have."""
        kind = self.rng.choice(["plain", "plain", "slow to end", "stubborn", "broken", "cancelled", "at once"])
        gate = asyncio.Event()
        self.gates.append(gate)

        async def computed(ids: list[str]) -> Any:
            try:
                if kind != "at once":
                    await gate.wait()
            except asyncio.CancelledError:
                for _ in range(3 if kind in ("slow to end", "stubborn") else 0):
                    await asyncio.sleep(0)
                if kind != "stubborn":
                    raise
            if kind == "broken":
                raise Broken
            if kind == "cancelled":
                raise asyncio.CancelledError
            return np.array(vectors(ids))

        return computed

    def step(self) -> None:
        """Let one thing happen."""
        what, cache = self.rng.random(), self.rng.choice(self.caches)
        ids = self.rng.sample("abcd", self.rng.randint(1, 3))
        waiting = [task for task in self.callers if not task.done() and task not in self.cancelled]
        if what < 0.45:
            task = asyncio.ensure_future(cache.get_or_compute(ids, self.compute()))
            self.callers[task] = ids
        elif what < 0.75 and waiting:
            task = self.rng.choice(waiting)
            self.cancelled.add(task)
            task.cancel()
        elif what < 0.9 and self.gates:
            self.rng.choice(self.gates).set()
        elif what < 0.95:
            self.changes.append(asyncio.ensure_future(cache.delete_many(ids)))
        else:
            known = dict(zip(ids, vectors(ids), strict=True))
            self.changes.append(asyncio.ensure_future(cache.set_many(known)))

    async def run(self) -> None:
        """Let 40 things happen, some in one turn of the loop; then let everybody end."""
        for _ in range(40):
            self.step()
            for _ in range(self.rng.choice((0, 0, 1, 2, 7))):
                await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE):
            while not all(task.done() for task in (*self.callers, *self.changes)):
                for gate in self.gates:
                    gate.set()
                await asyncio.sleep(0)
        await settled()

    def wrong(self) -> Iterator[str]:
        """What no caller may see."""
        for task, ids in self.callers.items():
            if task.cancelled():
                if task not in self.cancelled:
                    yield f"{ids} cancelled by nobody"
            elif (error := task.exception()) is not None:
                if not isinstance(error, Broken | RuntimeError):
                    yield f"{ids} raised {error!r}"
            elif task.result().tolist() != vectors(ids):
                yield f"{ids} got {task.result()}"
        for cache in self.caches:
            if left_over(cache) != ([], {}):
                yield f"left over: {left_over(cache)}"


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("first_seed", range(0, 400, 100))
async def test_no_order_of_events_reaches_who_was_not_cancelled(first_seed: int) -> None:
    """Right vectors or a compute's own error for everybody who stays;
    nothing is left when all have gone.
    """
    for seed in range(first_seed, first_seed + 100):
        world = World(RedisManager(Settings(REDIS_URL="memory://")), seed)
        await world.run()
        assert [] == list(world.wrong()), seed
