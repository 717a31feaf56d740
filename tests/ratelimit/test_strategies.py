"""What each strategy promises, held against random histories; and a second opinion."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import groupby
from types import SimpleNamespace

import limits.storage.memory
import pytest
from hypothesis import example, given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from limits import RateLimitItemPerSecond
from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter

from redis_asgi.ratelimit.counting.local_engine import LocalEngine
from redis_asgi.ratelimit.limits.counter import Mode
from redis_asgi.ratelimit.limits.policy import MICROSECONDS, STRATEGIES, Policy
from redis_asgi.ratelimit.limits.reply import charged_receipts

from .histories import EPOCH, Twin, charge, costs, deltas, deltas_and_back, numbers, policy

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
quickly = example_settings(max_examples=60, deadline=None)
quotas = st.sampled_from([1, 2, 3, 5, 10, 100])
windows = st.sampled_from([1, 2, 10, 60])


@dataclass(frozen=True)
class Wish:
    """One request of a history: how long after the last, and what it costs."""

    delta: int
    cost: int
    refunds: bool


@dataclass
class Taken:
    """A request that was admitted, and not given back since.

    Attributes:
        at: When, in time that has passed, whatever the clock said.
    """

    at: int
    cost: int
    receipts: list[int]


@cache
def histories(quota: int, *, back: bool = True, refunds: bool = True) -> st.SearchStrategy[list[Wish]]:
    """Requests against *quota* that come in bursts, rest,
    and sometimes meet a clock that stepped back.
    """
    return st.lists(
        st.builds(
            Wish,
            st.one_of(st.just(0), deltas_and_back if back else deltas),
            costs(quota),
            st.sampled_from([False, False, False, True]) if refunds else st.just(False),
        ),
        min_size=1,
        max_size=60,
    )


@st.composite
def limited(draw: st.DrawFn) -> tuple[int, int, list[Wish]]:
    """A quota, a window and a history."""
    quota = draw(quotas)
    return quota, draw(windows), draw(histories(quota))


def live(twin: Twin, history: Sequence[Wish], *, charges: bool = False, across_steps: bool = True) -> list[Taken]:
    """Put *history* to *twin*; what was admitted and kept.

    Without *across_steps* nothing is given back once the clock has been set back since.
    """
    taken: list[Taken] = []
    passed = told = 0
    for wish in history:
        twin.now += wish.delta
        passed += max(0, wish.delta)
        if wish.delta < 0 and not across_steps:
            told = len(taken)
        if wish.refunds and len(taken) > told:
            # The oldest half of the time, the newest otherwise.
            back = taken.pop(told if wish.cost % 2 else -1)
            twin.give_back(back.cost, back.receipts)
        elif charges and wish.cost % 3 == 0:
            twin.ask("charge", wish.cost)
        elif (receipts := twin.take(wish.cost)) is not None and wish.cost:
            taken.append(Taken(passed, wish.cost, receipts))
    return taken


def intervals(taken: Sequence[Taken]) -> "list[tuple[int, int]]":
    """Length (us) and cost of every run of admitted requests."""
    found = []
    for i, first in enumerate(taken):
        cost = 0
        for last in taken[i:]:
            cost += last.cost
            found.append((last.at - first.at, cost))
    return found


@quickly
@given(case=limited())
def test_fixed_window_admits_a_quota_per_window(case: tuple[int, int, list[Wish]]) -> None:
    """At most one quota within a window,
    at most two in any stretch of a window's length; refunds change neither.
    """
    quota, window, history = case
    forward = live(Twin(policy("fixed-window", quota, window)), [wish for wish in history if wish.delta >= 0])
    taken = live(Twin(policy("fixed-window", quota, window)), history)

    for _, mine in groupby(forward, lambda one: one.receipts):
        assert sum(one.cost for one in mine) <= quota
    assert all(cost <= 2 * quota for length, cost in intervals(taken) if length < window * MICROSECONDS)


@quickly
@given(case=limited())
def test_moving_window_admits_a_quota_in_every_window(case: tuple[int, int, list[Wish]]) -> None:
    """At most one quota in every half-open stretch of a window's length, wherever it begins."""
    quota, window, history = case
    taken = live(Twin(policy("moving-window", quota, window)), history)

    assert all(cost <= quota for length, cost in intervals(taken) if length < window * MICROSECONDS)


@quickly
@given(case=limited())
def test_sliding_window_counter_admits_less_than_two_quotas(case: tuple[int, int, list[Wish]]) -> None:
    """In a stretch shorter than the window: a quota,
    and of a second one no more than the stretch's part of it.
    """
    quota, window, history = case
    taken = live(Twin(policy("sliding-window-counter", quota, window)), history)
    whole = window * MICROSECONDS

    assert all(cost <= quota * (1 + Fraction(length, whole)) for length, cost in intervals(taken) if length < whole)


@quickly
@given(case=limited())
@example(case=(1, 2, [Wish(-5, 1, False), Wish(2_000_000, 1, False)]))
@example(
    case=(
        2,
        2,
        [Wish(0, 1, r) for r in (False, False, True)]
        + [Wish(1_000_000, 1, False)]
        + [Wish(0, 1, r) for r in (False, True, False)],
    )
)
@example(
    case=(
        100,
        1,
        [Wish(0, 1, False), Wish(999_999, 1, False), Wish(-999_999, 57, False), Wish(0, 1, True), Wish(0, 43, False)],
    )
)
def test_gcra_admits_a_burst_and_what_refills(case: tuple[int, int, list[Wish]]) -> None:
    """In any stretch: a quota at once, and a quota per window on top;
    a late refund buys nothing more. How much has drained of a charge of before the clock was set
    back is not known, so that giving it back may buy as much.
    """
    quota, window, history = case
    taken = live(Twin(policy("gcra", quota, window)), history, across_steps=False)
    # Receipts are whole microseconds, rounded down: an early refund by less than one each.
    grain = Fraction(len(history) * quota, window * MICROSECONDS) + Fraction(1, 10**6)

    for length, cost in intervals(taken):
        assert cost <= quota + Fraction(length * quota, window * MICROSECONDS) + grain


def test_fixed_window_opens_at_the_first_request() -> None:
    """The window belongs to the client: it opens when the client comes, not at the full minute."""
    twin = Twin(policy("fixed-window", 2, 10))
    story = []
    for wait in (0.25, 9.0, 0.5, 0.5, 9.999_999, 0.000_001):
        twin.sleep(wait)
        story.append((twin.consume(), twin.peek().reset))

    assert [
        (True, 10_000_000),
        (True, 1_000_000),
        (False, 500_000),
        (True, 10_000_000),
        (True, 1),
        (True, 10_000_000),
    ] == story


def test_two_quotas_may_pass_around_an_edge_of_a_fixed_window() -> None:
    """That is its price, said in its description; the moving window does not pay it."""
    passed = {}
    for strategy in STRATEGIES:
        twin = Twin(policy(strategy, 5, 10))
        twin.now += (-twin.now) % 10_000_000
        twin.consume()
        twin.sleep(9.999)
        admitted = [twin.consume() for _ in range(5)]
        twin.sleep(0.002)
        passed[strategy] = sum(admitted + [twin.consume() for _ in range(5)])

    # The moving window forgets the first of all at that edge; a token bucket is nearly full again.
    assert {"fixed-window": 9, "sliding-window-counter": 4, "moving-window": 5, "gcra": 5} == passed


@every_strategy
@quickly
@given(data=st.data())
def test_remaining_is_exact(strategy: str, data: st.DataObject) -> None:
    """A request of what remains would be admitted, one unit more would not."""
    quota = data.draw(quotas)
    twin = Twin(policy(strategy, quota, data.draw(windows)))
    live(twin, data.draw(histories(quota)), charges=data.draw(st.booleans()))

    remaining = twin.peek().remaining

    assert 0 <= remaining <= quota
    assert remaining == 0 or twin.peek(remaining).fits
    assert not twin.peek(remaining + 1).fits


@every_strategy
@quickly
@given(data=st.data())
def test_retry_is_exact(strategy: str, data: st.DataObject) -> None:
    """Refused now, admitted after ``retry_after``, and not a moment earlier;
    never, only if it exceeds the quota.
    """
    quota = data.draw(quotas)
    twin = Twin(policy(strategy, quota, data.draw(windows)))
    live(twin, data.draw(histories(quota)), charges=data.draw(st.booleans()))
    cost = data.draw(costs(quota))

    found = twin.peek(cost)

    assert (found.retry == -1) == (cost > quota)
    assert (found.retry == 0) == found.fits
    if found.retry > 0:
        assert twin.peek(cost, at=twin.now + found.retry).fits
        # A microsecond of rounding either way.
        assert not twin.peek(cost, at=max(twin.now, twin.now + found.retry - 3)).fits


@every_strategy
@quickly
@given(data=st.data())
def test_reset_is_exact(strategy: str, data: st.DataObject) -> None:
    """After ``reset`` the full quota is back, and not a moment earlier."""
    quota = data.draw(quotas)
    twin = Twin(policy(strategy, quota, data.draw(windows)))
    live(twin, data.draw(histories(quota)), charges=data.draw(st.booleans()))

    reset = twin.peek().reset

    assert quota == twin.peek(at=twin.now + reset).remaining
    assert reset == 0 or twin.peek(at=max(twin.now, twin.now + reset - 3)).remaining < quota


@every_strategy
@quickly
@given(data=st.data())
def test_what_looks_changes_nothing(strategy: str, data: st.DataObject) -> None:
    """A peek, a refused request and one that costs nothing leave every number as it was."""
    quota = data.draw(quotas)
    twin = Twin(policy(strategy, quota, data.draw(windows)))
    live(twin, data.draw(histories(quota)))
    before = twin.snapshot()
    for delta in data.draw(st.lists(deltas, max_size=5)):
        twin.now += delta
        looks: list[tuple[Mode, int]] = [("peek", data.draw(costs(quota))), ("consume", 0), ("consume", quota + 1)]
        for mode, cost in looks:
            twin.ask(mode, cost)
            # What says nothing any more may be swept away.
            assert twin.snapshot() in (before, {})


@quickly
@given(data=st.data())
def test_refused_request_charges_no_policy(data: st.DataObject) -> None:
    """All or nothing, over several rules of several clients: one refusal,
    and every number is as it was.
    """
    engine = LocalEngine()
    groups = [[policy(s, data.draw(quotas), 60, name=f"{i}-{s}") for s in STRATEGIES] for i in range(2)]
    now = EPOCH
    for _ in range(25):
        now += data.draw(st.integers(0, 2_000_000))
        cost = data.draw(st.integers(1, 3))
        asked = [charge(*group, cost=cost, who=f"203.0.113.{i}") for i, group in enumerate(groups)]
        before = Twin(engine=engine).snapshot()
        reply = engine.decide("consume", asked, now=now)
        assert all(found.fits for found in numbers(reply)) == bool(reply[0])
        if not reply[0]:
            assert before == Twin(engine=engine).snapshot()


@every_strategy
@quickly
@given(data=st.data())
def test_refund_at_once_restores_everything(strategy: str, data: st.DataObject) -> None:
    """Taken and given back at the same moment, a request has left no trace in any answer."""
    quota = data.draw(quotas)
    twin = Twin(policy(strategy, quota, data.draw(windows)))
    live(twin, data.draw(histories(quota, back=False)))
    before = twin.peek()
    cost = data.draw(st.integers(1, quota))

    receipts = twin.take(cost)
    if receipts is not None:
        twin.give_back(cost, receipts)

    after = twin.peek()
    assert before.remaining == after.remaining
    assert abs(before.retry - after.retry) <= 1
    if strategy != "fixed-window":  # a window that was opened stays open
        assert abs(before.reset - after.reset) <= 1


@every_strategy
def test_refund_after_its_window_gives_nothing(strategy: str) -> None:
    """What is given back late never touches a window it was not taken from."""
    twin = Twin(policy(strategy, 5, 10))
    receipts = twin.take(5)
    assert receipts is not None
    twin.sleep(20.1)
    for _ in range(5):
        twin.consume()

    twin.give_back(5, receipts)

    assert 0 == twin.peek().remaining


@every_strategy
@quickly
@given(data=st.data())
def test_clients_are_independent(strategy: str, data: st.DataObject) -> None:
    """Two clients in one engine get the answers that each would get alone."""
    quota, window = data.draw(quotas), data.draw(windows)
    limit = policy(strategy, quota, window)
    shared = LocalEngine()
    together = [Twin(limit, who=who, engine=shared) for who in ("a", "b")]
    alone = [Twin(limit, who=who) for who in ("a", "b")]
    now = EPOCH
    for wish in data.draw(histories(quota, back=False, refunds=False)):
        now += wish.delta
        who = wish.delta % 2
        assert alone[who].ask("consume", wish.cost, at=now) == together[who].ask("consume", wish.cost, at=now)


@quickly
@given(data=st.data())
def test_shadow_never_changes_a_verdict(data: st.DataObject) -> None:
    """With and without shadow policies, every enforcing policy gives the same numbers."""
    kinds = st.builds(policy, st.sampled_from(STRATEGIES), quotas, windows)
    enforcing = [_named(p, f"real-{i}") for i, p in enumerate(data.draw(st.lists(kinds, min_size=1, max_size=3)))]
    watching = [
        _named(p, f"dry-{i}", shadow=True) for i, p in enumerate(data.draw(st.lists(kinds, min_size=1, max_size=3)))
    ]
    plain, watched = Twin(*enforcing), Twin(*enforcing, *watching)
    for wish in data.draw(histories(5, back=False, refunds=False)):
        plain.now = watched.now = plain.now + wish.delta
        before = numbers(watched.ask("peek", wish.cost))[len(enforcing) :]
        without, with_ = plain.ask("consume", wish.cost), watched.ask("consume", wish.cost)

        assert without == with_[: len(without)]
        after = numbers(with_)[len(enforcing) :]
        for was, found in zip(before, after, strict=True):
            # Charged when the request is admitted and it would itself admit it.
            charged = wish.cost if with_[0] and was.fits else 0
            assert was.remaining - charged == found.remaining


def _named(one: Policy, name: str, *, shadow: bool = False) -> Policy:
    return Policy(name, one.quota, one.window, one.strategy, shadow)


def test_shadow_that_would_have_refused_is_not_charged() -> None:
    """Its receipt says so, and what is given back later does not make it negative."""
    real, dry = policy("fixed-window", 5, name="real"), policy("fixed-window", 1, name="dry", shadow=True)
    twin = Twin(real, dry)
    first, second = twin.ask("consume"), twin.ask("consume")

    assert [[EPOCH, EPOCH], [EPOCH, -1]] == [charged_receipts(first), charged_receipts(second)]
    twin.give_back(1, charged_receipts(second))
    assert [4, 0] == [found.remaining for found in numbers(twin.ask("peek"))]


@every_strategy
def test_charge_may_exceed_the_quota_up_to_ten_times(strategy: str) -> None:
    """A debt is refused for as long as it takes, and never grows beyond ten quotas."""
    twin = Twin(policy(strategy, 5, 10))
    for _ in range(3):
        twin.ask("charge", 1000)
    found = twin.peek()

    assert (False, 0) == (found.fits, found.remaining)
    longest = {"fixed-window": 10, "sliding-window-counter": 20, "moving-window": 10, "gcra": 100}[strategy]
    assert found.retry <= longest * MICROSECONDS
    twin.now += found.retry
    assert twin.consume()


def test_only_the_fixed_window_forgets_a_debt_at_its_end() -> None:
    """Three quotas charged at once: after one window (gcra and the counter: not yet) all is
    forgiven.
    """
    free = {}
    for strategy in STRATEGIES:
        twin = Twin(policy(strategy, 10, 10))
        twin.now += (-twin.now) % 10_000_000
        twin.ask("charge", 30)
        twin.sleep(10)
        free[strategy] = twin.peek().remaining

    assert {"fixed-window": 10, "moving-window": 10, "sliding-window-counter": 0, "gcra": 0} == free


@every_strategy
@quickly
@given(data=st.data())
def test_fallback_share_is_the_quota_divided_and_rounded_up(strategy: str, data: st.DataObject) -> None:
    """With a divisor a process admits ``ceil(quota / divisor)`` at once,
    and what the strategy promises of that.
    """
    quota, window = data.draw(quotas), data.draw(windows)
    twin = Twin(policy(strategy, quota, window))
    twin.divisor = divisor = data.draw(st.integers(1, 2 * quota))
    share = -(-quota // divisor)

    assert [True] * share + [False] == [twin.consume() for _ in range(share + 1)]
    taken = live(twin, data.draw(histories(quota)))
    whole = window * MICROSECONDS
    most = 2 * share
    assert all(cost <= most for length, cost in intervals(taken) if length < whole)


@every_strategy
def test_cost_above_the_share_is_told_to_wait_a_window(strategy: str) -> None:
    """It fits the quota but not this process's share of it: no time is right,
    and it is not called impossible.
    """
    twin = Twin(policy(strategy, 10, 10))
    twin.divisor = 5

    assert [(False, 10_000_000), (False, -1)] == [(n.fits, n.retry) for n in (twin.peek(3), twin.peek(11))]


@every_strategy
def test_request_that_costs_nothing_is_admitted_at_a_full_counter(strategy: str) -> None:
    """Cost 0 asks for nothing and is never refused."""
    twin = Twin(policy(strategy, 1))

    assert [True, False, True] == [twin.consume(cost) for cost in (1, 1, 0)]


@every_strategy
def test_clock_that_stepped_back_reopens_nothing(strategy: str) -> None:
    """A quota that is used stays used, however far the clock went back."""
    twin = Twin(policy(strategy, 3, 10))
    twin.sleep(5)
    for _ in range(3):
        assert twin.consume()
    for back in (1, 5, 60, 3600):
        found = twin.peek(at=twin.now - back * MICROSECONDS)
        assert (False, 0) == (found.fits, found.remaining)
        assert found.retry <= (2 if strategy == "sliding-window-counter" else 1) * 10 * MICROSECONDS


class _IdleTimer:
    """limits sweeps expired keys from a thread, which reads the clock too;
    its answers do not depend on it.
    """

    def __init__(self, *_: object) -> None:
        pass

    def start(self) -> None:
        pass

    def is_alive(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("strategy", "second_opinion"),
    [("fixed-window", FixedWindowRateLimiter), ("moving-window", MovingWindowRateLimiter)],
)
@quickly
@given(data=st.data())
def test_limits_is_of_the_same_opinion(
    strategy: str, second_opinion: type[FixedWindowRateLimiter] | type[MovingWindowRateLimiter], data: st.DataObject
) -> None:
    """At cost 1 the verdicts are those of the ``limits`` library, on a clock that both are given."""
    quota, window = data.draw(quotas), data.draw(windows)
    moments: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits.storage.memory, "time", SimpleNamespace(time=lambda: moments[-1]))
        patch.setattr(limits.storage.memory, "threading", SimpleNamespace(Timer=_IdleTimer, RLock=threading.RLock))
        theirs = second_opinion(limits.storage.memory.MemoryStorage())
        item = RateLimitItemPerSecond(quota, window)
        twin = Twin(policy(strategy, quota, window))
        # Small, so that a double holds nanoseconds beside it.
        twin.now = 1000 * MICROSECONDS
        for delta in data.draw(st.lists(st.one_of(st.just(0), deltas), min_size=1, max_size=4 * quota + 20)):
            twin.now += delta
            # limits keeps a stamp that is exactly one window old,
            # this package does not; a nanosecond decides.
            later = len(moments) * 1e-9 if strategy == "moving-window" else 0.0
            moments.append(twin.now / MICROSECONDS + later)
            assert theirs.hit(item, "client") == twin.consume()
