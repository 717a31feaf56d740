"""Random histories of requests, and the twin that they are put to:
what the strategies' property tests share.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from hypothesis import strategies as st

from redis_asgi.ratelimit.counting.local_engine import LocalEngine
from redis_asgi.ratelimit.limits.charge import Charge
from redis_asgi.ratelimit.limits.counter import Log, Mode
from redis_asgi.ratelimit.limits.policy import MICROSECONDS, STRATEGIES, Partition, Policy, PolicySet, make_partition
from redis_asgi.ratelimit.limits.reply import Numbers, Reply, charged_receipts, numbers_of
from redis_asgi.settings import StrategyName

# A time like today's: 16 digits, which is where careless arithmetic loses microseconds.
EPOCH = 1_763_848_800_000_000


def numbers(reply: Reply) -> list[Numbers]:
    """A reply, counter by counter."""
    return numbers_of(reply)


def client(value: str) -> Partition:
    """A partition of an address, or of anything else, by name."""
    return make_partition("ip", value, plain=True)


def policy(strategy: str, quota: int = 5, window: int = 10, *, name: str = "default", shadow: bool = False) -> Policy:
    """A policy, with what a story needs said."""
    return Policy(name, quota, window, strategy_of(strategy), shadow)


def strategy_of(name: str) -> StrategyName:
    """The strategy of that name."""
    return next(known for known in _STRATEGY_NAMES if known == name)


_STRATEGY_NAMES: tuple[StrategyName, ...] = ("fixed-window", "sliding-window-counter", "moving-window", "gcra")
assert set(_STRATEGY_NAMES) == set(STRATEGIES)


def charge(*policies: Policy, cost: int = 1, who: str = "203.0.113.7") -> Charge:
    """One rule's charge."""
    return Charge(PolicySet(policies), client(who), cost)


class Keeping(LocalEngine):
    """One that sweeps nothing away, as Redis does:
    there no time passes while a test tells the time.
    """

    def _shrink(self, now: float) -> None:
        pass


class Twin:
    """A `LocalEngine` with a clock in hand, asked about one rule at a time."""

    def __init__(self, *policies: Policy, who: str = "203.0.113.7", engine: LocalEngine | None = None) -> None:
        self.policies = PolicySet(policies)
        self.partition = client(who)
        self.engine = engine if engine is not None else LocalEngine()
        self.now = EPOCH
        self.divisor = 1

    def ask(self, mode: Mode, cost: int = 1, *, at: int | None = None, receipts: Sequence[int] = ()) -> Reply:
        """Decide one request of *cost* at *at* (us; ``None`` = the clock in hand)."""
        return self.engine.decide(
            mode,
            (Charge(self.policies, self.partition, cost),),
            receipts=receipts,
            divisor=self.divisor,
            now=self.now if at is None else at,
        )

    def consume(self, cost: int = 1) -> bool:
        """Whether a request of *cost* is admitted now."""
        return self.ask("consume", cost)[0] == 1

    def peek(self, cost: int = 1, *, at: int | None = None) -> Numbers:
        """The only policy's numbers for a request of *cost*."""
        (found,) = numbers(self.ask("peek", cost, at=at))
        return found

    def take(self, cost: int = 1) -> "list[int] | None":
        """Consume, and what gives it back; ``None`` when refused."""
        reply = self.ask("consume", cost)
        return charged_receipts(reply) if reply[0] else None

    def give_back(self, cost: int, receipts: Sequence[int]) -> None:
        """Refund what `take` was charged."""
        self.ask("refund", cost, receipts=receipts)

    def sleep(self, seconds: float) -> None:
        """Move the clock on."""
        self.now += round(seconds * MICROSECONDS)

    def snapshot(self) -> Any:
        """Everything the engine knows about every partition, in a form to compare."""
        return snapshot(self.engine)


def snapshot(engine: LocalEngine) -> dict[bytes, dict[bytes, Any]]:
    """Every stored number of *engine*; stamps that have expired do not count."""
    found: dict[bytes, dict[bytes, Any]] = {}
    for queue in (engine._admitted, engine._refused):
        for key, held in queue.items():
            found[key] = {
                field: (stored.last, list(stored.stamps)) if isinstance(stored, Log) else stored
                for field, stored in held.counters.items()
            }
    return found


# Where arithmetic goes wrong: nothing, one microsecond,
# a window and a microsecond either side of it, and back.
deltas = st.one_of(
    st.sampled_from([0, 0, 1, 2, 1000, 333_333, 999_999, 1_000_000, 1_000_001, 2_500_001, 9_999_999, 10_000_000]),
    st.integers(0, 3_000_000),
    st.integers(0, 25_000_000),
)
# Below 0 the clock is set back, and no time passes.
steps_back = st.one_of(
    st.sampled_from([-1, -999_999, -1_000_000, -10_000_000, -3_600_000_000]),
    st.integers(-3_000_000, -1),
    st.integers(-10 * 86_400_000_000, -1),
)
deltas_and_back = st.one_of(deltas, deltas, deltas, steps_back)


@cache
def costs(quota: int, *, factor: int = 2) -> st.SearchStrategy[int]:
    """Costs of a request against *quota*: mostly one, now and then more than can ever fit."""
    return st.one_of(st.just(1), st.integers(0, quota), st.integers(0, factor * quota))
