"""What is kept in the process, used by loops in several threads at once."""

import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from redis_asgi.embeddings.records.clock import Clocks
from redis_asgi.embeddings.records.codec import Value, encode
from redis_asgi.embeddings.storage.l1 import L1Cache
from redis_asgi.embeddings.storage.store import MemoryVectors, Write
from redis_asgi.settings import Settings

EPOCHS = (b"e0", b"e1")


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def kept() -> Value:
    """A value that does not expire."""
    value = encode(np.ones(8, "<f4"), born=1, own=bytes(8))
    value.expires_at = 1e12
    return value


def in_threads(work: Callable[[random.Random], object]) -> list[Exception]:
    """Do *work* many times in four threads; what it raised."""
    raised: list[Exception] = []

    def often(seed: int) -> None:
        dice = random.Random(seed)
        try:
            for _ in range(10_000):
                work(dice)
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=often, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.usefixtures("often")
def test_loops_in_several_threads_may_share_the_layer() -> None:
    """Nothing raises, and what it counts is what it holds."""
    local = L1Cache(20_000, 5, Clocks(monotonic=lambda: 0.0))

    def work(dice: random.Random) -> None:
        name, epoch = b"%d" % dice.randrange(40), dice.choice(EPOCHS)
        if dice.random() < 0.5:
            local.get(name, 0)
        else:
            local.put(name, kept())
        local.note(epoch, name, b"x" * 8, None, 0)
        local.grant(epoch, name, None)
        if dice.random() < 0.1:
            local.forget(epoch)

    assert [] == in_threads(work)
    assert local.bytes == sum(size for _, size in local._values.values()) <= 20_000


def test_a_value_that_another_thread_drops_meanwhile_is_still_found() -> None:
    """It was there when it was asked for."""
    local = L1Cache(20_000, 5, Clocks(monotonic=lambda: 0.0))
    value = kept()
    local.put(b"a", value)

    class Raced(OrderedDict[bytes, Any]):
        def get(self, key: bytes, default: Any = None) -> Any:
            found = super().get(key, default)
            local.drop(key)
            return found

    local._values = Raced(local._values)
    assert value is local.get(b"a", 0)
    assert (0, None) == (local.bytes, local.get(b"a", 0))


def test_a_reader_does_not_disturb_who_makes_room() -> None:
    """What it finds becomes the youngest, also between looking for the oldest and dropping that."""
    local = L1Cache(3_000, 5, Clocks(monotonic=lambda: 0.0))

    class Raced(OrderedDict[bytes, Any]):
        def __iter__(self) -> Iterator[bytes]:
            found = super().__iter__()
            local.get(b"0", 0)
            return found

    local._values = Raced()
    for number in range(9):
        local.put(b"%d" % number, kept())
    assert 2_000 < local.bytes == sum(size for _, size in local._values.values()) <= 3_000


@pytest.mark.usefixtures("often")
def test_loops_in_several_threads_may_share_the_memory_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """``memory://``: the same, with values that end and values that have to go."""
    store = MemoryVectors(Settings(REDIS_URL="memory://"))
    monkeypatch.setattr(store, "_limit", 8_000)

    async def some(dice: random.Random) -> None:
        names = [b"%d" % dice.randrange(40) for _ in range(2)]
        await store.write([Write(name, b"x" * 100, dice.choice([1e-9, 60.0])) for name in names])
        await store.lookup(names, 1)
        await store.claim(Write(names[0], b"y", 60.0, "absent"), 1)
        await store.delete(names[1:], 1)

    def work(dice: random.Random) -> None:
        # None of it waits.
        with pytest.raises(StopIteration):
            some(dice).send(None)

    assert [] == in_threads(work)
    assert store.bytes == sum(200 + len(name) + len(value) for name, (value, _) in store._values.items()) <= 8_000
