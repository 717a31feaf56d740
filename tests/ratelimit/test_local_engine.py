"""The engine in this process: its bounds, and what it forgets first."""

import gc
import random
import sys
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from redis_asgi import Settings
from redis_asgi.ratelimit.counting.local_engine import LocalEngine, scaled
from redis_asgi.ratelimit.limits.charge import Charge
from redis_asgi.ratelimit.limits.policy import MICROSECONDS, STRATEGIES, PolicySet
from redis_asgi.telemetry import fresh_telemetry

from .histories import EPOCH, Twin, charge, client, policy, snapshot

WINDOW = policy("fixed-window", 1, 10)


def use(engine: LocalEngine, names: Iterable[str], *, after: float = 0.0) -> list[bool]:
    """Whether each of these clients is admitted, *after* seconds."""
    now = EPOCH + round(after * MICROSECONDS)
    return [engine.decide("consume", (charge(WINDOW, who=who),), now=now)[0] == 1 for who in names]


def known(engine: LocalEngine) -> list[str]:
    """The clients that hold a counter, by name."""
    names = {client(who).key: who for who in "abcdefghij"}
    return sorted(names[key] for key in snapshot(engine))


def test_partitions_are_bounded() -> None:
    """However many clients come, only so many are kept."""
    engine = LocalEngine(max_partitions=100)
    use(engine, (f"10.0.{i // 256}.{i % 256}" for i in range(1000)))

    assert 100 == len(engine)


def test_least_recently_used_goes_first() -> None:
    """When full, the client that has been quiet longest is forgotten."""
    engine = LocalEngine(max_partitions=3)
    wide = policy("fixed-window", 5, 10)
    for who in "abcad":
        engine.decide("consume", (charge(wide, who=who),), now=EPOCH)

    assert ["a", "c", "d"] == known(engine)


def test_refused_clients_are_kept_when_idle_ones_go() -> None:
    """A flood of new clients does not free the ones being held back."""
    engine = LocalEngine(max_partitions=5)
    assert [True, False, True, False] == use(engine, "aabb")

    use(engine, (f"198.51.100.{i}" for i in range(200)))

    assert [False, False] == use(engine, "ab")


def test_refused_clients_are_bounded_too() -> None:
    """When nobody but refused clients is left, the one refused longest ago goes."""
    engine = LocalEngine(max_partitions=3)
    use(engine, "aabbccdd")

    assert ["b", "c", "d"] == known(engine)


def test_admitted_again_is_idle_again() -> None:
    """A client that was refused once does not keep its place for ever."""
    engine = LocalEngine(max_partitions=2)
    use(engine, "aa")
    use(engine, "abc", after=10)

    assert ["b", "c"] == known(engine)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_expired_partitions_go(strategy: str) -> None:
    """What counts for nothing any more is swept, a little with every request,
    before anything alive is evicted.
    """
    engine = LocalEngine(max_partitions=1000)
    short = policy(strategy, 5, 1)
    for i in range(500):
        engine.decide("consume", (charge(short, who=f"old-{i}"),), now=EPOCH)
    for i in range(500):
        engine.decide("consume", (charge(short, who="a"),), now=EPOCH + 4_000_000 + i)

    assert ["a"] == known(engine)


def test_stamps_are_bounded() -> None:
    """The logs of moving windows share one bound, however they are spread over clients."""
    engine = LocalEngine(max_stamps=1000)
    log = policy("moving-window", 300, 10)
    for who in "abcdef":
        assert engine.decide("consume", (charge(log, cost=300, who=who),), now=EPOCH)[0] == 1
        assert engine._stamps <= 1000

    assert ["d", "e", "f"] == known(engine)
    assert 900 == engine._stamps


def test_only_clients_that_go_before_their_time_are_counted() -> None:
    """For want of room, or of stamps; one whose window has ended has nothing left to forget."""
    with fresh_telemetry() as counted:
        engine = LocalEngine(max_partitions=3, max_stamps=100)

    def evicted() -> float | None:
        return counted.registry.get_sample_value("redis_asgi_ratelimit_local_evictions_total")

    use(engine, "abc")
    assert 0 == evicted()
    use(engine, "de")
    assert 2 == evicted()
    use(engine, "fgh", after=10.5)
    assert 2 == evicted()
    for who in "ij":
        asked = (charge(policy("moving-window", 100, 10), cost=60, who=who),)
        assert engine.decide("consume", asked, now=EPOCH + 30 * MICROSECONDS)[0] == 1
    assert 3 == evicted()


@example_settings(deadline=None)
@given(data=st.data())
def test_count_of_stamps_is_right(data: st.DataObject) -> None:
    """Charged, expired, refunded, reset, evicted: the count is that of the stamps there are."""
    engine = LocalEngine(max_partitions=3, max_stamps=40)
    log, other = policy("moving-window", 10, 2, name="log"), policy("moving-window", 20, 5, name="other")
    now = EPOCH
    for _ in range(data.draw(st.integers(1, 40))):
        now += data.draw(st.sampled_from([0, 1, 300_000, 2_500_000]))
        who = data.draw(st.sampled_from("abcde"))
        asked = (charge(log, other, cost=data.draw(st.integers(0, 12)), who=who),)
        match data.draw(st.sampled_from(["consume", "consume", "consume", "charge", "refund", "forget", "one"])):
            case "refund":
                engine.decide("refund", asked, receipts=(now, now), now=now)
            case "forget":
                engine.forget(client(who).key)
            case "one":
                engine.forget(client(who).key, [log.field])
            case "charge":
                engine.decide("charge", asked, now=now)
            case _:
                engine.decide("consume", asked, now=now)
                assert len(engine) <= 3
                assert engine._stamps <= 40
        held = sum(len(stamps) for fields in snapshot(engine).values() for _, stamps in fields.values())
        assert held == engine._stamps


def test_memory_stays_flat_over_many_random_clients() -> None:
    """Two hundred thousand clients, each new, in an engine for a thousand:
    no more memory at the end than early on.
    """
    engine = LocalEngine(max_partitions=1000)
    limits = PolicySet((policy("fixed-window", 5, 3600), policy("moving-window", 5, 60, name="log")))
    rng = random.Random(7)
    blocks = []
    for i in range(200_000):
        engine.decide("consume", (Charge(limits, client(f"{rng.getrandbits(64):x}")),), now=EPOCH + i)
        if i in (5000, 199_999):
            gc.collect()
            blocks.append(sys.getallocatedblocks())

    assert 1000 == len(engine)
    assert abs(blocks[1] - blocks[0]) < 1000


def test_flood_of_refused_clients_does_not_unlimit_new_ones() -> None:
    """When every place is held by a refused client, the next new one still is counted."""
    engine = LocalEngine(max_partitions=3)
    use(engine, "aabbcc")

    assert [True, False, False] == use(engine, "ddd")


def test_forget_drops_a_client_or_some_of_its_fields() -> None:
    """And says whether there was anything."""
    engine = LocalEngine()
    one, other = policy("gcra", name="one"), policy("moving-window", name="other")
    engine.decide("consume", (charge(one, other, who="a"),), now=EPOCH)
    key = client("a").key

    assert {one.field, other.field} == set(engine.fields(key))
    assert [True, False] == [engine.forget(key, [other.field]) for _ in range(2)]
    assert [one.field] == engine.fields(key)
    assert [True, False] == [engine.forget(key) for _ in range(2)]
    assert ([], 0) == (engine.fields(key), len(engine))


def test_forgetting_the_last_field_forgets_the_client() -> None:
    """No empty client takes up room."""
    engine = LocalEngine()
    engine.decide("consume", (charge(WINDOW, who="a"),), now=EPOCH)

    engine.forget(client("a").key, [WINDOW.field])

    assert 0 == len(engine)


def test_refused_and_free_requests_take_no_room() -> None:
    """A client that was never charged holds nothing."""
    engine = LocalEngine()
    engine.decide("consume", (charge(WINDOW, cost=2, who="a"),), now=EPOCH)
    engine.decide("consume", (charge(WINDOW, cost=0, who="b"),), now=EPOCH)
    engine.decide("peek", (charge(WINDOW, who="c"),), now=EPOCH)

    assert 0 == len(engine)


def test_clock_is_monotonic_unless_one_is_given() -> None:
    """Setting the machine's clock moves no window."""
    engine = LocalEngine()
    replies = [engine.decide("consume", (charge(WINDOW),)) for _ in range(2)]

    assert [1, 0] == [reply[0] for reply in replies]
    assert 9_000_000 < replies[1][4] <= 10_000_000


def test_bound_comes_from_the_settings() -> None:
    """``RATE_LIMIT_LOCAL_MAX_PARTITIONS`` is the number of clients kept."""
    engine = LocalEngine.from_settings(Settings(RATE_LIMIT_LOCAL_MAX_PARTITIONS=2))
    use(engine, "abcd")

    assert ["c", "d"] == known(engine)


@pytest.mark.parametrize(
    ("quota", "divisor", "share"), [(100, 4, 25), (100, 3, 34), (10, 100, 1), (1, 1, 1), (10**9, 7, 142_857_143)]
)
def test_share_is_rounded_up(quota: int, divisor: int, share: int) -> None:
    """A process never gets a share of nothing."""
    whole = policy("fixed-window", quota)

    assert share == scaled(whole, divisor).quota
    assert whole.field == scaled(whole, divisor).field


def test_one_stamp_takes_eight_bytes() -> None:
    """A moving window of ten thousand costs a client 80 KB here, not ten thousand objects."""
    twin = Twin(policy("moving-window", 10_000, 10))
    twin.consume(10_000)
    (held,) = twin.engine._admitted.values()
    (log,) = held.counters.values()

    assert sys.getsizeof(getattr(log, "stamps", None)) < 100_000
