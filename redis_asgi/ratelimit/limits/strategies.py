"""The strategies in this process: the twin of ``scripts/*.lua``, decision for decision.

The engine of ``memory://``, the stand-in while Redis is gone, and the oracle that the scripts are
tested against. Both sides compute in IEEE doubles and in the same order, so their numbers agree to
the last microsecond; change one only together with the other.

``fixed-window``            the window opens at a client's first request; up to two quotas may pass around an edge.
``sliding-window-counter``  two aligned buckets, the older one fading; no burst at an edge, but a client that used its
                            quota waits up to ``window * (1 + 1 / quota)``.
``moving-window``           an exact log of every unit: precise, and memory in proportion to the quota.
``gcra``                    a token bucket: smooth, one number.
``concurrency``             no strategy to choose: the requests in flight, by their ids.
"""

import math
from array import array
from bisect import bisect_left, bisect_right

from .counter import Counter, Leases, Log, Stored

# Doubles near a quota differ from the exact number by less than this part of it.
_EDGE = 1e-12
# Less than this many units is what rounding leaves of nothing.
_DUST = 1e-9


class _FixedWindow(Counter):
    """Stored: start, count."""

    __slots__ = ("count", "start")

    def load(self, stored: tuple[float, float] | None, now: float) -> None:
        self.start, self.count = now, 0.0
        if stored is not None:
            if stored[0] > now:
                self.count, self.moved = stored[1], True
            elif now < stored[0] + self.window:
                self.start, self.count = stored
        self.free = self.quota - self.count
        self.receipt = self.start

    def wait(self, cost: int, now: float) -> float:  # noqa: ARG002 - the whole window ends at once
        return self.start + self.window - now

    def charge(self, cost: int) -> None:
        self.count = min(self.count + cost, 10 * self.quota)
        self.free = self.quota - self.count

    def refund(self, cost: int, receipt: float) -> bool:
        if receipt != self.start:
            return False
        self.count = max(0.0, self.count - cost)
        self.free = self.quota - self.count
        return True

    def reset(self, now: float) -> float:
        return 0.0 if self.count == 0 else self.start + self.window - now

    def save(self) -> tuple[Stored, float]:
        return (self.start, self.count), self.start + self.window


class _SlidingWindowCounter(Counter):
    """Stored: since when the older of those that are not 0 is counted, current, previous.

    A receipt of before that is of a counter that was forgotten since.
    """

    __slots__ = ("current", "elapsed", "index", "previous", "since")

    def load(self, stored: tuple[float, float, float] | None, now: float) -> None:
        index = float(math.floor(now / self.window))
        self.since, self.current, self.previous = now, 0.0, 0.0
        if stored is not None:
            since, current, previous = stored
            older = index - math.floor(since / self.window) - (previous > 0)
            if older == 0:
                self.since, self.current, self.previous = min(since, now), current, previous
            elif older < 0:
                # How far one had faded is not known: both in full, so that a step reopens nothing.
                self.current, self.moved = current + previous, True
            elif older == 1:
                self.since, self.previous = since, current
        self.index = index
        self.elapsed = self.at - index * self.window
        self.receipt = now
        self._weigh()

    def _weigh(self) -> None:
        faded = self.previous * (self.window - self.elapsed) / self.window
        self.free = math.floor(self.quota + self.quota * _EDGE - (faded + self.current))

    def wait(self, cost: int, now: float) -> float:  # noqa: ARG002 - `elapsed` is of now
        left = self.window - self.elapsed
        if self.current + cost <= self.quota:
            left = left - self.window * (self.quota - self.current - cost) / self.previous
        else:
            left = left + max(0.0, self.window * (1 - (self.quota - cost) / self.current))
        return math.ceil(left)

    def charge(self, cost: int) -> None:
        self.current = min(self.current + cost, 10 * self.quota)
        self._weigh()

    def refund(self, cost: int, receipt: float) -> bool:
        older = self.index - math.floor(receipt / self.window)
        if receipt < self.since:
            return False
        if older == 0:
            self.current = max(0.0, self.current - cost)
        elif older == 1:
            self.previous = max(0.0, self.previous - cost)
        else:
            return False
        self._weigh()
        return True

    def reset(self, now: float) -> float:  # noqa: ARG002 - `elapsed` is of now
        left = self.window - self.elapsed
        if self.current > 0:
            return left + self.window
        return left if self.previous > 0 else 0.0

    def save(self) -> tuple[Stored, float]:
        first = (self.index - (self.previous > 0)) * self.window
        return (max(self.since, first), self.current, self.previous), (self.index + 2) * self.window


class _Gcra(Counter):
    """Stored: time, what was owed then (units, fractional), the quota it was owed under.

    So what is owed is a share of the quota: a changed quota scales it,
    and while it stays units are exact.
    """

    __slots__ = ("owed",)

    def load(self, stored: tuple[float, float, float] | None, now: float) -> None:
        self.owed = 0.0
        if stored is not None:
            at, owed, under = stored
            if under != self.quota:
                owed = owed * self.quota / under
            if at > now:
                self.owed, self.moved = owed, True
            else:
                self.owed = max(0.0, owed - (now - at) * self.quota / self.window)
        # What may have drained since the charge is not given back, whatever was refunded meanwhile.
        self.receipt = self.at
        self._settle()

    def _settle(self) -> None:
        if self.owed < max(_DUST, self.quota * _EDGE):
            self.owed = 0.0
        self.free = math.floor(self.quota + self.quota * _EDGE - self.owed)

    def wait(self, cost: int, now: float) -> float:  # noqa: ARG002 - what is owed is of now
        return math.ceil((self.owed + cost - self.quota) * self.window / self.quota)

    def charge(self, cost: int) -> None:
        self.owed = min(self.owed + cost, 10 * self.quota)
        self._settle()

    def refund(self, cost: int, receipt: float) -> bool:
        if receipt > self.at:
            return False  # of before the clock was set back
        late = self.at - receipt
        back = min(self.owed, max(0.0, cost - late * self.quota / self.window))
        if back == 0:
            return False
        self.owed = self.owed - back
        self._settle()
        return True

    def reset(self, now: float) -> float:  # noqa: ARG002 - what is owed is of now
        return math.ceil(self.owed * self.window / self.quota)

    def save(self) -> tuple[Stored, float]:
        return (self.at, self.owed, self.quota), self.at + math.ceil(self.owed * self.window / self.quota)


class _MovingWindow(Counter):
    """Stored: a `Log`, changed in place."""

    __slots__ = ("cut", "log", "used")

    def load(self, stored: Log | None, now: float) -> None:
        self.log = stored if stored is not None else Log()
        self.moved = self.log.last > now
        self.cut = bisect_right(self.log.stamps, self.at - self.window)
        self.receipt = self.at
        self._settle()

    def _settle(self) -> None:
        self.used = len(self.log.stamps) - self.cut
        self.free = self.quota - self.used

    def _stamp(self, position: int) -> float:
        return min(self.log.stamps[position], self.at)

    def move(self) -> None:
        stamps = self.log.stamps
        kept = bisect_right(stamps, self.at)
        stamps[kept:] = array("d", [self.at]) * (len(stamps) - kept)
        self.log.last = self.at

    def wait(self, cost: int, now: float) -> float:
        return self._stamp(self.cut + self.used + cost - int(self.quota) - 1) + self.window - now

    def charge(self, cost: int) -> None:
        cost = max(0, min(cost, 10 * int(self.quota) - self.used))
        del self.log.stamps[: self.cut]
        self.cut = 0
        self.log.stamps.extend(array("d", [self.at]) * cost)
        self.log.last = self.at
        self._settle()

    def refund(self, cost: int, receipt: float) -> bool:
        stamps = self.log.stamps
        end = bisect_right(stamps, receipt)
        start = max(end - cost, bisect_left(stamps, receipt))
        if start >= end:
            return False
        del stamps[start:end]
        # Stamps before the cut were spent already; taking them away gives nothing back.
        self.cut -= max(0, min(end, self.cut) - start)
        self._settle()
        return True

    def reset(self, now: float) -> float:
        return self._stamp(-1) + self.window - now if self.used else 0.0

    def save(self) -> tuple[Stored, float]:
        return self.log, self.log.last + self.window


# Until the next place comes free, which cannot be known (us).
_SOON = 1_000_000.0


class _Concurrency(Counter):
    """Stored: `Leases`, changed in place; charges and refunds say the same however often they come."""

    __slots__ = ("leases", "used")

    def load(self, stored: Leases | None, now: float) -> None:
        self.leases = leases = stored if stored is not None else Leases()
        self.moved = leases.last > now
        self.receipt = 0.0
        self._count()

    def _count(self) -> None:
        ends = self.leases.ends
        is_seen = self.leases.length == math.inf  # until its end
        self.used = len(ends) if is_seen else sum(end > self.at for end in ends.values())
        self.free = self.quota - self.used

    def _drop_expired(self) -> None:
        leases = self.leases
        if leases.length < math.inf:
            leases.ends = {holder: end for holder, end in leases.ends.items() if end > self.at}

    def move(self) -> None:
        leases = self.leases
        till = self.at + leases.length
        leases.ends = {holder: min(end, till) for holder, end in leases.ends.items()}
        leases.last = self.at

    def wait(self, cost: int, now: float) -> float:  # noqa: ARG002 - no end is told before
        return _SOON

    def charge(self, cost: int) -> None:  # noqa: ARG002 - a request is one
        self._drop_expired()
        leases = self.leases
        for holder in leases.holders:
            leases.ends[holder] = self.at + leases.length
        leases.last = self.at
        self._count()

    def refund(self, cost: int, receipt: float) -> bool:  # noqa: ARG002 - the id is the receipt
        self._drop_expired()
        for holder in self.leases.holders:
            self.leases.ends.pop(holder, None)
        self._count()
        return False

    def reset(self, now: float) -> float:  # noqa: ARG002 - likewise
        return _SOON if self.used else 0.0

    def save(self) -> tuple[Stored, float]:
        return self.leases, self.at + self.leases.length


COUNTERS: dict[str, type[Counter]] = {
    "fixed-window": _FixedWindow,
    "sliding-window-counter": _SlidingWindowCounter,
    "moving-window": _MovingWindow,
    "gcra": _Gcra,
    "concurrency": _Concurrency,
}
