"""Refusals remembered in this process: what they answer, for how long, and never wrongly."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from redis_asgi import RateLimiter, RedisManager, Settings
from redis_asgi.ratelimit.counting.engine import Engine
from redis_asgi.ratelimit.counting.local_engine import LocalEngine
from redis_asgi.ratelimit.limits.charge import Charge, Charges
from redis_asgi.ratelimit.limits.policy import MICROSECONDS, STRATEGIES, Policy
from redis_asgi.ratelimit.limits.refusal_memory import RefusalMemory
from redis_asgi.ratelimit.transport.cluster_batcher import make_batcher

from ..kit.fair_time import fair_time
from ..kit.servers import ExternalServer
from .harness import changes_of
from .histories import EPOCH, charge, client, costs, deltas, policy

QUOTA = policy("gcra", 5, 60)


def remembered(*charges: Charge, cost: int = 5, at: float = 100.0) -> RefusalMemory:
    """A memory that holds the refusal of a request after *cost* units were used."""
    engine = LocalEngine()
    memory = RefusalMemory()
    for asked in charges:
        engine.decide("charge", (Charge(asked.policies, asked.partition, cost),), now=EPOCH)
    memory.remember(Charges(charges), engine.decide("consume", charges, now=EPOCH), at)
    return memory


def test_unknown_clients_are_not_answered() -> None:
    """Only what was refused is known."""
    memory = remembered(charge(QUOTA))

    assert [] == memory.find(Charges([charge(QUOTA, who="198.51.100.9")]), 100.1)
    assert [] == memory.find(Charges([charge(policy("gcra", 5, 60, name="other"))]), 100.1)


WINDOW = policy("fixed-window", 5, 60)


@pytest.mark.parametrize(("quota", "expected"), [(WINDOW, [False, True, True]), (QUOTA, [False, True, False])])
def test_answers_what_is_refused_for_as_long(quota: Policy, expected: list[bool]) -> None:
    """A cheaper request may fit, and a dearer one waits longer,
    but for the end of a fixed window: they ask.
    """
    memory = remembered(charge(quota, cost=3), cost=4)

    assert expected == [bool(memory.find(Charges([charge(quota, cost=cost)]), 100.1)) for cost in (2, 3, 4)]


@pytest.mark.parametrize(
    ("quota", "used", "refused", "expected"),
    [
        pytest.param(WINDOW, 5, 3, [False, True, True, True], id="nothing left"),
        pytest.param(QUOTA, 5, 3, [False, False, True, False], id="nothing left of a bucket"),
        pytest.param(WINDOW, 4, 3, [False, False, True, True], id="a unit left"),
        pytest.param(WINDOW, 5, 6, [False, False, False, False], id="nothing left for what never fits"),
    ],
)
def test_nothing_left_answers_every_cost_above_nothing(
    quota: Policy, used: int, refused: int, expected: list[bool]
) -> None:
    """Where a fixed window is used up; a bucket has a unit sooner than three,
    and what never fits names no time.
    """
    memory = remembered(charge(quota, cost=refused), cost=used)

    assert expected == [bool(memory.find(Charges([charge(quota, cost=cost)]), 100.1)) for cost in (0, 1, 3, 4)]


def test_remembers_the_lowest_cost_refused() -> None:
    """A dearer refusal afterwards does not forget the cheaper one."""
    engine, memory = LocalEngine(), RefusalMemory()
    engine.decide("charge", [charge(WINDOW, cost=5)], now=EPOCH)
    for cost in (3, 1, 2):
        asked = Charges([charge(WINDOW, cost=cost)])
        memory.remember(asked, engine.decide("consume", asked, now=EPOCH), 100.0)

    assert memory.find(Charges([charge(WINDOW, cost=1)]), 100.5)


def test_says_nothing_where_another_limit_applies_too() -> None:
    """A limit that was not asked then may refuse for longer, so its wait would be too short."""
    burst, login = charge(policy("fixed-window", 1, 1)), charge(policy("fixed-window", 1, 3600, name="login"))
    memory = remembered(burst, cost=1)

    assert [True, False] == [
        bool(memory.find(Charges([burst]), 100.1)),
        bool(memory.find(Charges([burst, login]), 100.1)),
    ]


def test_what_was_found_is_kept_until_more_is_known() -> None:
    """A flood's answer is made once,
    but the other limit of the same request may come to refuse it too.
    """
    burst, key = charge(WINDOW, cost=6), charge(policy("fixed-window", 5, 3600, name="key"), who="key", cost=6)
    both, memory, engine = Charges([burst, key]), RefusalMemory(), LocalEngine()
    reply = engine.decide("consume", both, now=EPOCH)
    memory.remember(both, reply, 100.0)
    memory.forget(key.partition.key, 100.0)
    found = [memory.find(both, at) for at in (100.1, 100.2)]
    memory.remember(both, reply, 100.3)

    assert [burst] == [each for each, _ in found[0]]
    assert found[0] is found[1]
    assert [burst, key] == [each for each, _ in memory.find(both, 100.4)]


def test_older_replies_do_not_undo_a_reset() -> None:
    """A refusal that was asked for before the reset is not remembered after it."""
    engine, memory = LocalEngine(), RefusalMemory()
    asked = Charges([charge(WINDOW, cost=6)])
    reply = engine.decide("consume", asked, now=EPOCH)
    memory.forget(asked[0].partition.key, 100.0)
    memory.remember(asked, reply, 99.9)
    stale = memory.find(asked, 100.1)
    memory.remember(asked, reply, 100.1)

    assert ([], True) == (stale, bool(memory.find(asked, 100.2)))


def test_numbers_are_counted_down() -> None:
    """What is answered half a second later is half a second less."""
    asked = charge(policy("fixed-window", 5, 60))
    ((_, refusal),) = remembered(asked).find(Charges([asked]), 100.5)

    assert (0, 59_500_000, 59_500_000) == refusal.numbers(1, 100.5)
    assert (0, 59_500_000, -1) == refusal.numbers(6, 100.5)


@pytest.mark.parametrize(
    ("strategy", "window", "answers"),
    [
        pytest.param("fixed-window", 60, [True, True, False], id="a second at most"),
        pytest.param("gcra", 1, [True, False, False], id="no longer than it lasts"),
    ],
)
def test_is_forgotten_in_time(strategy: str, window: int, answers: list[bool]) -> None:
    """Until the client would be admitted, and never for more than a second."""
    asked = charge(policy(strategy, 5, window))
    memory = remembered(asked)

    assert answers == [bool(memory.find(Charges([asked]), at)) for at in (100.19, 100.99, 101.0)]
    assert 0 == len(memory)


def test_impossible_cost_is_remembered_for_a_second() -> None:
    """What can never fit is answered without a trip, and without a time to come back."""
    asked = charge(QUOTA, cost=6)
    memory = remembered(asked, cost=0)

    ((_, refusal),) = memory.find(Charges([asked]), 100.5)
    assert -1 == refusal.numbers(6, 100.5)[2]
    assert [] == memory.find(Charges([charge(QUOTA, cost=5)]), 100.5)


def test_shadow_is_never_remembered() -> None:
    """A policy that only watches refuses nobody, here as anywhere."""
    shadow = policy("fixed-window", 1, 60, name="dry", shadow=True)
    asked = charge(shadow, policy("fixed-window", 5, 60, name="real"))
    memory = remembered(asked)

    ((_, refusal),) = memory.find(Charges([asked]), 100.5)
    assert "real" == refusal.policy.name
    assert [] == memory.find(Charges([charge(shadow)]), 100.5)


def test_shadow_of_now_is_not_answered_by_an_enforcing_past() -> None:
    """A rule that became a shadow refuses nothing from the same moment."""
    memory = remembered(charge(policy("fixed-window", 5, 60)))

    assert [] == memory.find(Charges([charge(policy("fixed-window", 5, 60, shadow=True))]), 100.1)


def test_other_quota_is_not_answered() -> None:
    """Limits that depend on the request:
    a refusal under a small quota says nothing about a larger one.
    """
    memory = remembered(charge(policy("fixed-window", 5, 60)))

    assert [] == memory.find(Charges([charge(policy("fixed-window", 50, 60))]), 100.1)


def test_least_recently_refused_is_forgotten() -> None:
    """Ten thousand partitions by default, here three."""
    memory = RefusalMemory(size=3)
    engine = LocalEngine()
    for who in "abcad":
        asked = Charges([charge(QUOTA, cost=6, who=who)])
        memory.remember(asked, engine.decide("consume", asked, now=EPOCH), 100.0)

    assert 3 == len(memory)
    assert [True, False, True, True] == [
        bool(memory.find(Charges([charge(QUOTA, cost=6, who=w)]), 100.1)) for w in "abcd"
    ]


class _Interrupted(OrderedDict[bytes, Any]):
    """A store during whose `setdefault` another thread gets to do something, if it can."""

    def __init__(self, other: OrderedDict[bytes, Any], does: Callable[[], object]) -> None:
        super().__init__(other)
        self._does = does

    def setdefault(self, key: bytes, default: Any = None) -> Any:
        found = super().setdefault(key, default)
        thread = threading.Thread(target=self._does)
        thread.start()
        thread.join(0.1)
        return found


def test_loops_in_two_threads_may_share_it() -> None:
    """A client that one finds expired while the other remembers its next refusal stays remembered."""
    asked = Charges([charge(WINDOW)])
    memory = remembered(charge(WINDOW), at=100.0)
    memory.partitions = _Interrupted(memory.partitions, lambda: memory.find(asked, 102.0))
    engine = LocalEngine()
    engine.decide("charge", [charge(WINDOW, cost=5)], now=EPOCH)
    memory.remember(asked, engine.decide("consume", asked, now=EPOCH), 102.0)

    assert memory.find(asked, 102.5)


@pytest.mark.anyio
async def test_loops_in_two_threads_may_share_an_engine(redis_url: str) -> None:
    """Each gets the batcher of its own loop, whatever the other has noted at that moment."""

    class Raced(Engine):
        theirs = SimpleNamespace(closed=False, loop="another")

        @property
        def _last_batcher(self) -> Any:
            return self.theirs

        @_last_batcher.setter
        def _last_batcher(self, mine: object) -> None:
            """Overwritten by the other at once."""

    manager = RedisManager(Settings(REDIS_URL=redis_url))

    assert manager.per_client(make_batcher) is Raced(manager, timeout=1.0)._batcher()

    await manager.close()


def test_forget_takes_all_of_a_client() -> None:
    """Reset or refunded: everything known of the client is asked anew."""
    asked = charge(QUOTA)
    memory = remembered(asked, charge(QUOTA, who="b"))

    memory.forget(client("203.0.113.7").key, 100.0)
    memory.forget(client("nobody").key, 100.0)

    assert [[], True] == [
        memory.find(Charges([asked]), 100.1),
        bool(memory.find(Charges([charge(QUOTA, who="b")]), 100.1)),
    ]


@example_settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_remembered_refusal_is_what_the_engine_would_say(data: st.DataObject) -> None:
    """Whatever it refuses, the engine asked at that moment would refuse too."""
    kinds = st.builds(policy, st.sampled_from(STRATEGIES), st.sampled_from([1, 3, 10]), st.sampled_from([1, 2, 60]))
    drawn = [
        policy(p.strategy, p.quota, p.window, name=f"p{i}")
        for i, p in enumerate(data.draw(st.lists(kinds, min_size=1, max_size=3)))
    ]
    engine, memory = LocalEngine(), RefusalMemory()
    kept = {cost: Charges([charge(*drawn, cost=cost)]) for cost in range(200)}
    now = EPOCH
    for _ in range(data.draw(st.integers(1, 40))):
        now += data.draw(st.one_of(st.integers(0, 50_000), deltas))
        # The same for each cost, as a middleware keeps them for a client.
        asked = kept[data.draw(costs(3))]
        known = memory.find(asked, now / MICROSECONDS)
        reply = engine.decide("peek" if known else "consume", asked, now=now)
        if known:
            assert 0 == reply[0]
        elif not reply[0]:
            memory.remember(asked, reply, now / MICROSECONDS)


@pytest.mark.anyio
async def test_flood_of_one_refused_client_makes_about_no_trips(
    redis_server: ExternalServer, manager: RedisManager
) -> None:
    """A thousand refused requests within the second: Redis sees a handful."""
    limiter = RateLimiter(manager)
    await limiter.consume("a", "1/minute")
    await limiter.consume("a", "1/minute")
    before = redis_server.calls("evalsha") + redis_server.calls("eval")

    started = time.monotonic()
    refused = [await limiter.consume("a", "1/minute") for _ in range(1000)]
    seconds = time.monotonic() - started

    assert not any(decision.allowed for decision in refused)
    assert {"redis"} == {decision.source for decision in refused}
    assert redis_server.calls("evalsha") + redis_server.calls("eval") - before <= 1 + seconds


@pytest.mark.anyio
async def test_reset_is_seen_at_once_in_this_process(manager: RedisManager) -> None:
    """Whoever was refused a moment ago and is reset is admitted."""
    limiter = RateLimiter(manager)
    story = [(await limiter.consume("a", "1/minute")).allowed for _ in range(3)]

    assert await limiter.reset("a")
    assert [True, False, False, True] == [*story, (await limiter.consume("a", "1/minute")).allowed]


@pytest.mark.anyio
async def test_refund_is_seen_at_once_in_this_process(manager: RedisManager) -> None:
    """Whoever was refused a moment ago gets a unit that was given back."""
    engine = Engine(manager, timeout=1)
    asked = Charges((charge(policy("fixed-window", 1, 60)),))
    first = await engine.decide(asked)
    assert [True, False] == [first.allowed, (await engine.decide(asked)).allowed]

    engine.settle(first, changes_of(first, [-1]))

    assert (await engine.decide(asked)).allowed


@pytest.mark.anyio
async def test_reset_in_another_process_is_seen_within_a_second(redis_url: str) -> None:
    """Two processes, here two managers: one resets, the other refuses for a second more at most."""
    settings: Any = Settings(REDIS_URL=redis_url)
    here, there = RateLimiter(RedisManager(settings)), RateLimiter(RedisManager(settings))
    await here.consume("a", "1/minute")
    refused = await here.consume("a", "1/minute")
    started = fair_time()
    assert await there.reset("a")

    while not (again := await here.consume("a", "1/minute")).allowed and fair_time() < started + 3:
        pass

    assert (False, True) == (refused.allowed, again.allowed)
    assert fair_time() - started < 1.2
