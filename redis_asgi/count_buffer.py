"""Counts on their way to the metrics: noted in a request,
told a few times a second for all of them.
"""

import asyncio
import threading
import time
from bisect import bisect_left
from collections import Counter as Tally
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from itertools import repeat, starmap
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from prometheus_client import Counter

FLUSHED_WITHIN = 0.25  # seconds
_MOST = 4096


class Together:
    """Counters that are counted at the same time; made once for what is counted often."""

    __slots__ = ("counters",)

    def __init__(self, counters: "tuple[Counter, ...]") -> None:
        self.counters = counters


Noted: TypeAlias = "Counter | Together"


class CountBuffer:
    """Counts that the metrics were not told yet:
    a counter's lock for each request costs as much as deciding it.

    They are told a quarter of a second after the first of them, in one go, and before the registry
    or the history is read; so only a worker that answers for others in multi-process mode sees
    theirs that much later.

    Args:
        tick: See `Telemetry.tick`.
    """

    def __init__(self, tick: "Callable[[float], None]") -> None:
        self._tick = tick
        # Appending and popping are atomic: loops of several threads may note.
        self._counted: deque[Noted] = deque()
        self._added: deque[tuple[tuple[Counter, float], ...]] = deque()
        self._observed: deque[tuple[Callable[[float], None], float]] = deque()
        self._is_due = False  # whether a timer is set
        self._telling = threading.Lock()

    def count(self, what: "Noted | None", more: "Noted | None" = None) -> None:
        """Count one more of *what*, and of *more*. Call it in a loop that runs."""
        counted = self._counted
        if what is not None:
            counted.append(what)
        if more is not None:
            counted.append(more)
        if not self._is_due or len(counted) >= _MOST:
            self._see_to(len(counted))

    def add(self, *amounts: "tuple[Counter, float]") -> None:
        """Count so much more of each counter. Call it in a loop that runs."""
        self._added.append(amounts)
        if not self._is_due or len(self._added) >= _MOST:
            self._see_to(len(self._added))

    def observe(self, observe: "Callable[[float], None]", value: float) -> None:
        """Note a *value* for a histogram's *observe*. Call it in a loop that runs."""
        self._observed.append((observe, value))
        if not self._is_due or len(self._observed) >= _MOST:
            self._see_to(len(self._observed))

    def _see_to(self, waiting: int) -> None:
        """See to it that counts, of which so many of one kind are *waiting*, are told."""
        if waiting >= _MOST:
            self.flush()
        elif not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_later(FLUSHED_WITHIN, self.flush)

    def flush(self) -> None:
        """Tell the metrics."""
        self._is_due = False
        counted, added, observed = self._counted, self._added, self._observed
        if counted or added or observed:
            self._tick(time.monotonic())
        with self._telling:
            totals: dict[Noted, float] = dict(Tally(starmap(counted.popleft, repeat((), len(counted)))))
            for _ in range(len(added)):
                for counter, amount in added.popleft():
                    totals[counter] = totals.get(counter, 0) + amount
            values: defaultdict[Callable[[float], None], list[float]] = defaultdict(list)
            for _ in range(len(observed)):
                observe, value = observed.popleft()
                values[observe].append(value)
        for what, total in totals.items():
            for counter in what.counters if isinstance(what, Together) else (what,):
                counter.inc(total)
        for observe, its in values.items():
            _observe_all(observe, its)

    def discard(self) -> None:
        """Forget what was not told: the parent tells it."""
        self._telling = threading.Lock()  # who held it is not in this process, and neither is the timer
        self._is_due = False
        self._counted.clear()
        self._added.clear()
        self._observed.clear()


def _observe_all(observe: "Callable[[float], None]", values: Sequence[float]) -> None:
    """Note *values* for a histogram's *observe*, in one go for each of its buckets.

    One by one they would take it two locks and a search each.
    """
    histogram: Any = getattr(observe, "__self__", None)
    try:
        bounds, buckets, total = histogram._upper_bounds, histogram._buckets, histogram._sum
    except AttributeError:  # they are prometheus-client's own, and may be called something else one day
        for value in values:
            observe(value)
        return
    total.inc(sum(values))
    for place, times in Tally([bisect_left(bounds, value) for value in values]).items():
        buckets[place].inc(times)
