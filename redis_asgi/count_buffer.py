"""Counts on their way to the metrics: noted in a request,
told a few times a second for all of them.
"""

import asyncio
import threading
import time
from collections import Counter as Tally
from collections import defaultdict, deque
from collections.abc import Callable
from itertools import repeat, starmap
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from .bulk_metrics import Counter, Histogram

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
        self._added: deque[tuple[tuple[Counter | Histogram, float], ...]] = deque()
        self._room = 0  # how many of a kind may wait: none until a timer is set
        self._telling = threading.Lock()

    def count(self, what: "Noted | None", more: "Noted | None" = None) -> None:
        """Count one more of *what*, and of *more*. Call it in a loop that runs."""
        counted = self._counted
        if what is not None:
            counted.append(what)
        if more is not None:
            counted.append(more)
        if len(counted) >= self._room:
            self._see_to(len(counted))

    def add(self, *amounts: "tuple[Counter | Histogram, float]") -> None:
        """Count so much more of each counter, and let each histogram observe so much.
        Call it in a loop that runs.
        """
        self._added.append(amounts)
        self._see_to(len(self._added))

    def _see_to(self, waiting: int) -> None:
        """See to it that counts, of which so many of one kind are *waiting*, are told."""
        if waiting >= _MOST:
            self.flush()
        elif not self._room:
            self._room = _MOST
            asyncio.get_running_loop().call_later(FLUSHED_WITHIN, self.flush)

    def flush(self) -> None:
        """Tell the metrics."""
        self._room = 0
        counted, added = self._counted, self._added
        if counted or added:
            self._tick(time.monotonic())
        amounts: defaultdict[Counter | Histogram, list[float]] = defaultdict(list)
        with self._telling:
            for what, times in Tally(starmap(counted.popleft, repeat((), len(counted)))).items():
                for counter in what.counters if isinstance(what, Together) else (what,):
                    amounts[counter].append(times)
            for _ in range(len(added)):
                for metric, amount in added.popleft():
                    amounts[metric].append(amount)
        for metric, each in amounts.items():
            metric.tell(each)

    def discard(self) -> None:
        """Forget what was not told: the parent tells it."""
        self._telling = threading.Lock()  # who held it is not in this process, and neither is the timer
        self._room = 0
        self._counted.clear()
        self._added.clear()
