"""Small lookups that begin together share a trip, and nothing else."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.embeddings.storage.joint_lookup import JointLookups, Values
from redis_asgi.errors import Failure
from redis_asgi.settings import Settings

from ..kit.embedding_apps import Spy, client, server
from ..kit.inside import shared_of
from ..kit.patience import PATIENCE

pytestmark = pytest.mark.anyio


class Trips:
    """A server that answers each key with itself, when it is let."""

    def __init__(self) -> None:
        self.asked: list[list[bytes]] = []
        self.answers = asyncio.Event()
        self.answers.set()
        self.failure: Failure | None = None

    async def __call__(self, names: Sequence[bytes], within: float) -> Values | Failure:
        self.asked.append(list(names))
        await self.answers.wait()
        return self.failure or [None if name == b"none" else name for name in names]


async def test_lookups_of_one_turn_share_a_trip_and_its_keys() -> None:
    """Each key is asked for once, and each caller gets its own in its own order."""
    trips = Trips()
    joint = JointLookups(trips)

    found = await asyncio.gather(*(joint.look_up(names, 1) for names in ([b"e", b"a"], [b"none", b"e"], [b"a", b"b"])))

    assert [[b"e", b"a"], [None, b"e"], [b"a", b"b"]] == found
    assert [[b"e", b"a", b"none", b"b"]] == trips.asked


async def test_a_lookup_waits_for_none_that_is_under_way() -> None:
    """Whoever comes while a trip is under way has one of its own."""
    trips = Trips()
    trips.answers.clear()
    joint = JointLookups(trips)
    first = asyncio.ensure_future(joint.look_up([b"a"], 1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    second = asyncio.ensure_future(joint.look_up([b"b"], 1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    assert [[b"a"], [b"b"]] == trips.asked
    trips.answers.set()
    assert ([b"a"], [b"b"]) == (await first, await second)


async def test_large_lookups_and_other_deadlines_go_alone() -> None:
    """A long reply keeps no short one waiting,
    and nobody waits longer than he said; a trip holds 64 keys at most.
    """
    trips = Trips()
    joint = JointLookups(trips)
    many = [b"%d" % n for n in range(17)]
    sixteens = [[b"%d %d" % (at, n) for n in range(16)] for at in range(5)]

    await asyncio.gather(joint.look_up([b"a"], 1), joint.look_up(many, 1), joint.look_up([b"b"], 0.5))
    assert [[b"a"], many, [b"b"]] == sorted(trips.asked, key=lambda names: (names != [b"a"], names == [b"b"]))
    trips.asked.clear()
    await asyncio.gather(*(joint.look_up(names, 1) for names in sixteens))
    assert [64, 16] == [len(names) for names in trips.asked]


async def test_a_failure_is_everybodys() -> None:
    """Nobody hangs: a failure, a defect and an end reach all who wait."""
    trips = Trips()
    trips.failure = Failure.TIMEOUT
    joint = JointLookups(trips)
    failed = await asyncio.gather(*(joint.look_up([name], 1) for name in (b"a", b"b")))
    assert [Failure.TIMEOUT] * 2 == failed

    trips.answers.clear()
    waiting = [asyncio.ensure_future(joint.look_up([name], 1)) for name in (b"a", b"b")]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await joint.aclose()
    assert [Failure.CONNECTION] * 2 == await asyncio.gather(*waiting)


async def test_an_end_before_the_trip_has_left_reaches_all_who_wait() -> None:
    """A store that is closed in the very turn in which somebody asks leaves nobody hanging, nor
    whoever comes later.
    """
    joint = JointLookups(Trips())
    waiting = [asyncio.ensure_future(joint.look_up([name], 1)) for name in (b"a", b"b")]
    closing = asyncio.ensure_future(joint.aclose())

    async with asyncio.timeout(PATIENCE):
        assert [Failure.CONNECTION] * 2 == await asyncio.gather(*waiting)
        await closing
        assert [b"c"] == await joint.look_up([b"c"], 1)


@pytest.mark.parametrize("left", [0, 1])
async def test_who_is_cancelled_takes_nothing_from_the_others(left: int) -> None:
    """Before and after the trip has left; and where nobody waits any more, none leaves."""
    trips = Trips()
    trips.answers.clear()
    joint = JointLookups(trips)
    waiting = [asyncio.ensure_future(joint.look_up([name], 1)) for name in (b"a", b"b")]
    for _ in range(1 + left):
        await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    trips.answers.set()

    assert [b"b"] == await waiting[1]
    assert waiting[0].cancelled()
    trips.asked.clear()
    alone = asyncio.ensure_future(joint.look_up([b"c"], 1))
    await asyncio.sleep(0)
    alone.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    assert [] == trips.asked


async def test_requests_of_one_turn_share_a_trip_to_redis(settings: Settings) -> None:
    """Of callers with different credentials, too, who get what is theirs."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=settings)
    async with client(app) as c:
        manager = shared_of(app).vectors.manager

        async def ask(caller: int) -> Any:
            body = {"model": "m", "input": f"text {caller % 4}"}
            got = await c.post("/v1/embeddings", json=body, headers={"authorization": f"Bearer {caller}"})
            assert got.status_code == 200
            return got.json()["data"]

        first = [await ask(caller) for caller in range(8)]
        shared_of(app).vectors.local._seen.clear()
        redis = await manager.get_connection()
        before = (await redis.info("commandstats"))["cmdstat_mget"]["calls"]
        again = await asyncio.gather(*(ask(caller) for caller in range(8)))
        after = (await redis.info("commandstats"))["cmdstat_mget"]["calls"]

    assert first == again
    assert 8 == spy.calls
    assert after - before < 8
