"""Counters kept in this process: the engine of ``memory://``,
and the stand-in while Redis does not answer.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TypeAlias, cast

from ...settings import Settings
from ...telemetry import telemetry
from ..limits.charge import Charge
from ..limits.clock import CLOCK
from ..limits.counter import Counter, Leases, Log, Mode, Stored
from ..limits.policy import MICROSECONDS, Policy
from ..limits.reply import Reply
from ..limits.strategies import COUNTERS

# A counter is kept this much longer (us) than it counts,
# as its Redis key is, in case the clock steps back.
_SLACK = MICROSECONDS


class _Held:
    """The counters of one partition, by field, and when the last of them ends (us)."""

    __slots__ = ("counters", "expires", "stamps")

    def __init__(self) -> None:
        self.counters: dict[bytes, Stored] = {}
        self.expires = 0.0
        self.stamps = 0


# One counter of a request: what its policy says of its charge (itself, the cost,
# whether it admits it), and where it is kept.
_Asked: TypeAlias = tuple[Counter, Policy, Charge, int, bool, _Held | None]


class LocalEngine:
    """Counters in this process, bounded:
    at most *max_partitions* clients and *max_stamps* log entries.

    Of concurrency limits it knows all that runs in this process, wherever admitted; each entry
    lasts for *lease* us unless it is renewed.

    When full, expired partitions go first, then idle ones, and those last refused only when nothing
    else is left, so that a flood of new clients does not free the clients being held back. Every
    client that goes before its time is counted.
    """

    def __init__(self, max_partitions: int = 100_000, max_stamps: int = 1_000_000, *, lease: float = math.inf) -> None:
        self._lease = lease
        # Beside the others, which may be swept away:
        # what runs in this process is here until it ends.
        self._in_flight: dict[tuple[bytes, bytes], Leases] = {}
        self._max_partitions = max_partitions
        self._max_stamps = max_stamps
        self._stamps = 0
        self._evictions = telemetry().ratelimit_local_evictions
        self._lock = threading.Lock()  # loops in several threads may share one manager
        # Least recently used first; a partition moves between the two with its last verdict.
        self._admitted: OrderedDict[bytes, _Held] = OrderedDict()
        self._refused: OrderedDict[bytes, _Held] = OrderedDict()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} clients, at most {self._max_partitions}>"

    def __len__(self) -> int:
        return len(self._admitted) + len(self._refused)

    @classmethod
    def from_settings(cls, settings: Settings) -> "LocalEngine":
        return cls(settings.RATE_LIMIT_LOCAL_MAX_PARTITIONS)

    def decide(
        self,
        mode: Mode,
        charges: Sequence[Charge],
        *,
        receipts: Sequence[int] = (),
        holders: Sequence[bytes] = (),
        divisor: int = 1,
        now: int | None = None,
    ) -> Reply:
        """Decide one request as the script does.

        Args:
            receipts: For a refund, one per policy of the charges;
                negative for one that was not charged.
            holders: The ids of the requests in flight that it is about.
            divisor: Each quota counts as ``ceil(quota / divisor)``.
            now: Time in us; ``None`` = the monotonic clock, which no clock setting moves.
        """
        at = float(CLOCK.monotonic_ns() // 1000 if now is None else now)
        with self._lock:
            return self._decide(mode, charges, receipts, holders, divisor, at)

    def _decide(
        self,
        mode: Mode,
        charges: Sequence[Charge],
        receipts: Sequence[int],
        holders: Sequence[bytes],
        divisor: int,
        at: float,
    ) -> Reply:
        asked: list[_Asked] = []
        admitted, moved = True, False
        for charge in charges:
            held = self._find(charge.partition.key)
            counters = []
            for policy in charge.policies.policies:
                share = policy if divisor == 1 else scaled(policy, divisor)
                stored: Stored | None = held.counters.get(policy.field) if held is not None else None
                if policy.strategy == "concurrency":
                    stored = self._leases(charge, policy, holders)
                counters.append(COUNTERS[policy.strategy](share, stored, at))
            cost = charge.cost if charge.unread is None else _rest(charge, counters)
            for counter, policy in zip(counters, charge.policies.policies, strict=True):
                fits = (cost == 0 or cost <= counter.free) and policy.quota > 0
                if not fits and not policy.shadow:
                    admitted = False
                moved = moved or counter.moved
                asked.append((counter, policy, charge, cost, fits, held))
        if mode != "peek" and (admitted or moved or mode != "consume"):
            self._change(mode, asked, receipts, admitted=admitted)
        if mode == "consume":
            for charge in charges:
                self._touch(charge.partition.key, refused=not admitted)
            self._shrink(at)
        reply = [int(admitted)]
        for counter, policy, charge, taken, fits, _ in asked:
            cost, free, quota = charge.cost, counter.free, counter.quota
            if quota == 0:
                retry = -1.0
            elif cost == 0 or cost <= free:
                retry = 0.0
            elif cost > policy.quota:
                retry = -1.0
            elif cost > quota:
                # Within the quota but above this process's share: no time is right,
                # and its window the best guess.
                retry = counter.window
            else:
                retry = counter.wait(cost, at)
            remaining = max(0.0, min(quota, free))
            reset = counter.reset(at) if quota > 0 else 0.0
            said = int(fits) if charge.unread is None else taken * fits
            reply += (said, int(remaining), int(reset), int(retry), int(counter.receipt))
        return reply

    def _change(self, mode: Mode, asked: Sequence[_Asked], receipts: Sequence[int], *, admitted: bool) -> None:
        for i, (counter, policy, charge, cost, fits, held) in enumerate(asked):
            if policy.quota == 0:
                continue
            changes = counter.moved
            if changes:
                counter.move()
            if mode == "refund":
                changes |= receipts[i] >= 0 and cost > 0 and counter.refund(cost, float(receipts[i]))
            elif cost > 0 and (mode == "charge" or (admitted and fits)):
                counter.charge(cost)
                changes = True
            if policy.strategy == "concurrency":
                self._keep(charge, policy, counter)
            elif changes:
                self._store(charge.partition.key, held, policy, counter)

    def clear(self) -> None:
        """Drop every partition."""
        with self._lock:
            self._admitted.clear()
            self._refused.clear()
            self._in_flight.clear()
            self._stamps = 0

    def in_flight(self) -> dict[str, int]:
        """The requests that run in this process under each concurrency limit,
        by the label they are counted as.
        """
        with self._lock:
            found: dict[str, int] = {}
            for leases in self._in_flight.values():
                found[leases.label] = found.get(leases.label, 0) + len(leases.ends)
        return found

    def forget(self, key: bytes, fields: Sequence[bytes] | None = None) -> bool:
        """Drop a partition, or some of its fields; whether there was something to drop."""
        with self._lock:
            held = self._find(key)
            if held is None:
                return False
            if fields is None:
                self._drop(key)
                return True
            gone = [held.counters.pop(field) for field in fields if field in held.counters]
            self._count_stamps(held)
            if not held.counters:
                self._drop(key)
            return bool(gone)

    def fields(self, key: bytes) -> list[bytes]:
        """The fields a partition holds."""
        held = self._find(key)
        return list(held.counters) if held is not None else []

    def _leases(self, charge: Charge, policy: Policy, holders: Sequence[bytes]) -> Leases:
        """The requests in flight under one policy, and the one at hand."""
        leases = self._in_flight.get((charge.partition.key, policy.field))
        if leases is None:
            leases = Leases(self._lease, charge.label or policy.name)
        leases.holders = holders
        return leases

    def _keep(self, charge: Charge, policy: Policy, counter: Counter) -> None:
        leases = cast("Leases", counter.save()[0])
        if leases.ends:
            self._in_flight[charge.partition.key, policy.field] = leases
        else:
            self._in_flight.pop((charge.partition.key, policy.field), None)

    def _find(self, key: bytes) -> _Held | None:
        return self._admitted.get(key) or self._refused.get(key)

    def _store(self, key: bytes, held: _Held | None, policy: Policy, counter: Counter) -> None:
        if held is None:
            held = self._find(key)  # another charge of the same request may have made it
        if held is None:
            held = self._admitted[key] = _Held()
        held.counters[policy.field], expires = counter.save()
        held.expires = max(held.expires, expires)
        if policy.strategy == "moving-window":
            self._count_stamps(held)

    def _count_stamps(self, held: _Held) -> None:
        stamps = sum(len(log.stamps) for log in held.counters.values() if isinstance(log, Log))
        self._stamps += stamps - held.stamps
        held.stamps = stamps

    def _touch(self, key: bytes, *, refused: bool) -> None:
        now, before = (self._refused, self._admitted) if refused else (self._admitted, self._refused)
        if key in now:
            now.move_to_end(key)
        elif key in before:
            now[key] = before.pop(key)

    def _drop(self, key: bytes) -> None:
        held = self._admitted.pop(key, None) or self._refused.pop(key)
        self._stamps -= held.stamps

    def _shrink(self, now: float) -> None:
        # Two a call: the store shrinks faster than it grows, and no call walks it.
        for queue in (self._admitted, self._refused):
            for _ in range(2 if queue else 0):
                oldest = next(iter(queue), None)
                if oldest is None or queue[oldest].expires + _SLACK > now:
                    break
                self._drop(oldest)
        while len(self) > self._max_partitions or self._stamps > self._max_stamps:
            # Never the client just admitted while there is another:
            # one that is always forgotten is never limited.
            queue = self._admitted if len(self._admitted) > 1 else self._refused or self._admitted
            oldest = next(iter(queue))
            if queue[oldest].expires > now:
                self._evictions.inc()
            self._drop(oldest)


def _rest(charge: Charge, counters: Sequence[Counter]) -> int:
    """The units that remain of the least of its enforcing policies, at least 1;
    a shadow policy has no say in it.
    """
    both = list(zip(counters, charge.policies.policies, strict=True))
    free = [counter.free for counter, policy in both if not policy.shadow] or [counter.free for counter in counters]
    return max(1, int(min(free)))


@lru_cache(maxsize=4096)
def scaled(policy: Policy, divisor: int) -> Policy:
    """*policy* with the share of its quota that one of *divisor* processes may admit, rounded up."""
    return replace(policy, quota=-(-policy.quota // divisor))
