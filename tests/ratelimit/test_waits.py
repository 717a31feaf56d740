"""Whatever is stored, and however the quota was changed since:
the wait told is true, and of a bounded length.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import cast

import pytest
import redis
from hypothesis import HealthCheck, example, given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from redis_asgi.ratelimit.counting.local_engine import LocalEngine, _Held
from redis_asgi.ratelimit.limits.counter import Log, Stored
from redis_asgi.ratelimit.limits.policy import MICROSECONDS, STRATEGIES, Policy, log_key
from redis_asgi.ratelimit.limits.reply import Numbers
from redis_asgi.settings import StrategyName

from .histories import EPOCH, Twin, charge, client, numbers, policy, strategy_of
from .test_scripts import Script, script  # noqa: F401 - a fixture

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
often = example_settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
WHO = "203.0.113.7"


@dataclass(frozen=True)
class Case:
    """A counter as it is found, and what is asked of it.

    Attributes:
        stored: The numbers of its field; of a moving window its stamps.
        debts: Under which quota how much is charged on top.
        quota: What the quota is by now.
    """

    strategy: StrategyName
    window: int
    stored: tuple[float, ...]
    debts: tuple[tuple[int, int], ...]
    quota: int
    cost: int

    def policy(self, quota: int) -> Policy:
        """Its policy while the quota was *quota*."""
        return policy(self.strategy, quota, self.window)


# Made once for each window and strategy:
# to make a strategy costs hypothesis more than to draw from it.
WINDOWS = st.sampled_from([1, 2, 7, 60, 3600, 86_400, 366 * 86_400])
COUNTS = st.one_of(st.integers(0, 20), st.integers(0, 10**10))
BUCKETS = st.one_of(st.integers(-3, 2), st.integers(-(10**6), 2))


@cache
def ages(window: int) -> st.SearchStrategy[int]:
    """How long ago (us) something was, of before the clock was set back too."""
    width = window * MICROSECONDS
    edges = [0, 1, width // 2, width - 1, width, width + 1]
    return st.one_of(
        st.sampled_from(edges),
        st.integers(0, 2 * width),
        st.sampled_from([-age for age in edges]),
        st.integers(-(10**15), 0),
    )


@cache
def stamps(window: int) -> st.SearchStrategy[list[int]]:
    """The ages of a moving window's requests."""
    return st.lists(ages(window), max_size=40)


@cache
def quotas(most: int) -> st.SearchStrategy[int]:
    """From one to *most*."""
    return st.one_of(st.sampled_from([1, 2, 3, 7, 10, 100, 9_999, most]), st.integers(1, most))


@cache
def charges(most: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Under which quota how much is charged on top."""
    return st.lists(st.tuples(quotas(most), st.one_of(st.integers(1, 20), st.integers(1, 10**4))), max_size=2)


@st.composite
def cases(draw: st.DrawFn, strategy: str) -> Case:
    """Counters found in any state, of before the clock was set back too,
    whose quota was changed once or more.
    """
    window = draw(WINDOWS)
    most = 10_000 if strategy == "moving-window" else 10**9
    stored: tuple[float, ...]
    if strategy == "fixed-window":
        stored = (EPOCH - draw(ages(window)), draw(COUNTS))
    elif strategy == "sliding-window-counter":
        stored = (EPOCH // (window * MICROSECONDS) - draw(BUCKETS), draw(COUNTS), draw(COUNTS))
    elif strategy == "moving-window":
        stored = tuple(sorted(EPOCH - age for age in draw(stamps(window))))
    else:
        under = draw(quotas(most))
        owed = draw(st.one_of(st.integers(0, 10 * under), st.floats(0, 10 * under), st.floats(0, 1e-6)))
        stored = (EPOCH - draw(ages(window)), owed, under)
    quota = draw(quotas(most))
    debts = draw(charges(most))
    cost = draw(st.one_of(st.sampled_from([1, quota]), st.integers(1, quota)))
    return Case(strategy_of(strategy), window, stored, tuple(debts), quota, cost)


def found(case: Case) -> Twin:
    """A twin with the counter of *case* in it, as it was found."""
    stored: Stored = case.stored
    if case.strategy == "moving-window":
        stored = log = Log()
        log.stamps.extend(case.stored)
        log.last = max(case.stored, default=0.0)
    engine = LocalEngine()
    held = engine._admitted[client(WHO).key] = _Held()
    held.expires = math.inf
    held.counters[case.policy(case.quota).field] = stored
    twin = Twin(case.policy(case.quota), engine=engine)
    for quota, cost in case.debts:
        Twin(case.policy(quota), engine=engine).ask("charge", cost)
    return twin


def store(server: redis.Redis, case: Case) -> None:
    """Put the counter of *case* into Redis, as it was found."""
    key, field = client(WHO).key, case.policy(case.quota).field
    server.unlink(key, log_key(key, field))
    text = b" ".join(b"%.17g" % number for number in case.stored)
    if case.strategy == "moving-window":
        text = b"%d" % max(case.stored, default=0)
        if case.stored:
            server.rpush(log_key(key, field), *(int(stamp) for stamp in case.stored))
    server.hset(key, field.decode(), text)


def kept(twin: Twin, case: Case) -> tuple[float, ...]:
    """The numbers of the counter of *case* in *twin*; of a moving window its stamps."""
    held = twin.engine._find(client(WHO).key)
    assert held is not None
    stored = held.counters[case.policy(case.quota).field]
    return tuple(stored.stamps) if isinstance(stored, Log) else cast("tuple[float, ...]", stored)


def kept_in_redis(server: redis.Redis, case: Case) -> tuple[float, ...]:
    """The same in Redis."""
    key, field = client(WHO).key, case.policy(case.quota).field
    if case.strategy == "moving-window":
        return tuple(map(float, server.lrange(log_key(key, field), 0, -1)))
    raw = server.hget(key, field.decode())
    assert raw is not None
    return tuple(map(float, raw.split()))


def longest(case: Case, owed: float) -> float:
    """The longest wait (us) that the strategy of *case* may tell; *owed* in quotas."""
    windows = {"sliding-window-counter": 2.0, "gcra": max(1.0, owed)}.get(case.strategy, 1.0)
    return math.ceil(windows * case.window * MICROSECONDS) + 1


def quotas_owed(twin: Twin, case: Case) -> float:
    """How many quotas the bucket of *case* owes; 0 for the other strategies."""
    if case.strategy != "gcra":
        return 0.0
    _, owed, under = kept(twin, case)
    return owed / under


@every_strategy
@often
@given(data=st.data())
def test_wait_is_true_and_bounded_whatever_is_stored(strategy: str, data: st.DataObject) -> None:
    """At most a window (two for the counter; for a bucket its debt),
    admitted after it, and not before.
    """
    case = data.draw(cases(strategy))
    twin = found(case)
    looked = twin.peek(case.cost)
    (told,) = numbers(twin.ask("consume", case.cost))
    if told.fits:
        assert 0 == looked.retry
        return

    assert looked == told
    assert 0 < told.retry <= longest(case, quotas_owed(twin, case))
    assert twin.peek(case.cost, at=EPOCH + told.retry).fits
    # Counts are told apart to 1e-12 of the quota and a rounding,
    # and at the slowest one unit fades in a window.
    grain = math.ceil(max(1e-9, 2e-12 * case.quota) * case.window * MICROSECONDS)
    early = EPOCH + told.retry - 3 - grain
    assert early <= EPOCH or not twin.peek(case.cost, at=early).fits


@every_strategy
@often
@given(data=st.data())
def test_full_quota_is_back_after_reset_whatever_is_stored(strategy: str, data: st.DataObject) -> None:
    """And no later than the wait for the whole quota, which is the same thing."""
    case = data.draw(cases(strategy))
    twin = found(case)
    twin.ask("consume", 0)
    told = twin.peek()

    assert case.quota == twin.peek(at=EPOCH + told.reset).remaining
    assert told.reset <= longest(case, quotas_owed(twin, case))


@every_strategy
@often
@given(data=st.data())
def test_script_tells_what_the_twin_tells(
    script: Script,  # noqa: F811 - the fixture
    strategy: str,
    data: st.DataObject,
) -> None:
    """From any stored state, through debts under other quotas, number for number,
    now and at the end of the wait.
    """
    case = data.draw(cases(strategy))
    store(script.server, case)
    for quota, cost in case.debts:
        script.decide("charge", [charge(case.policy(quota), cost=cost)], now=EPOCH)
    twin = found(case)
    asked = [charge(case.policy(case.quota), cost=case.cost)]

    (told,) = numbers(script.decide("peek", asked, now=EPOCH))
    assert twin.peek(case.cost) == told
    if not told.fits:
        assert twin.ask("consume", case.cost) == script.decide("consume", asked, now=EPOCH)
    assert kept(twin, case) == kept_in_redis(script.server, case)
    later = EPOCH + max(0, told.retry)
    assert told.fits or numbers(script.decide("peek", asked, now=later))[0].fits
    assert twin.ask("consume", case.cost, at=later) == script.decide("consume", asked, now=later)


@every_strategy
def test_lowered_quota_is_waited_for_no_longer_than_its_window(strategy: str) -> None:
    """A thousand a day, all used, and then ten a day: a day (two for the counter), not ninety-nine."""
    twin = Twin(policy(strategy, 1000, 86_400))
    assert twin.consume(1000)
    twin.policies = Twin(policy(strategy, 10, 86_400)).policies

    told = twin.peek()

    assert (False, 0) == (told.fits, told.remaining)
    assert told.retry <= (2 if strategy == "sliding-window-counter" else 1) * 86_400 * MICROSECONDS
    twin.now += told.retry
    assert twin.consume()


def test_bucket_keeps_its_share_through_every_quota() -> None:
    """Half used is half used, however often the quota changes, and it drains in the same time."""
    engine = LocalEngine()
    Twin(policy("gcra", 10, 60), engine=engine).consume(5)
    looks = [Twin(policy("gcra", quota, 60), engine=engine).peek() for quota in (1000, 2, 10, 10**9)]

    assert [500, 1, 5, 500_000_000] == [look.remaining for look in looks]
    assert {30_000_000} == {look.reset for look in looks}
    for quota in (1000, 7, 10**9, 10):
        Twin(policy("gcra", quota, 60), engine=engine).ask("charge", 0)
        assert Twin(policy("gcra", quota, 60), engine=engine).consume(0)
    assert 5 == Twin(policy("gcra", 10, 60), engine=engine).peek().remaining


@pytest.mark.parametrize("quota", [1, 3, 10, 1000, 10**6])
def test_every_unit_of_a_bucket_is_there(quota: int) -> None:
    """Used one by one at one moment,
    a whole quota is admitted and no unit more: rounding takes none.
    """
    twin = Twin(policy("gcra", quota, 60))
    steps = min(quota, 20_000)
    assert twin.consume(quota - steps)

    assert all(twin.consume() for _ in range(steps))
    assert not twin.consume()


@given(owed=st.floats(0, 1e-9, exclude_max=True), quota=st.sampled_from([1, 10, 1000]))
@example(owed=1e-16, quota=1)
def test_dust_is_nothing(owed: float, quota: int) -> None:
    """What rounding leaves of nothing keeps no client waiting, and no quota from being full."""
    case = Case("gcra", 60, (EPOCH, owed, quota), (), quota, quota)

    assert Numbers(fits=True, remaining=quota, reset=0, retry=0, receipt=EPOCH) == found(case).peek(quota)
