"""Counters kept in this process: the engine of ``memory://``, and the stand-in while Redis does not answer."""

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from ..settings import Settings
from .policy import MICROSECONDS, Charge, Policy
from .strategies import COUNTERS, Counter, Log, Mode, Reply, Stored

# A counter is kept this much longer (us) than it counts, as its Redis key is, in case the clock steps back.
_SLACK = MICROSECONDS


class _Held:
    """What one partition holds: a stored counter per field, and when the last of them ends (us)."""

    __slots__ = ("counters", "expires", "refused", "stamps")

    def __init__(self) -> None:
        self.counters: dict[bytes, Stored] = {}
        self.expires = 0.0
        self.refused = False
        self.stamps = 0


class LocalEngine:
    """Counters in this process, bounded: at most *max_partitions* clients and *max_stamps* log entries.

    When full, expired partitions go first, then idle ones, and those last refused only when nothing else is
    left, so that a flood of new clients does not free the clients being held back.
    """

    def __init__(self, max_partitions: int = 100_000, max_stamps: int = 1_000_000) -> None:
        self._max_partitions = max_partitions
        self._max_stamps = max_stamps
        self._stamps = 0
        self._lock = threading.Lock()  # loops in several threads may share one manager
        # Least recently used first; a partition moves between the two with its last verdict.
        self._admitted: OrderedDict[bytes, _Held] = OrderedDict()
        self._refused: OrderedDict[bytes, _Held] = OrderedDict()

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
        divisor: int = 1,
        now: int | None = None,
    ) -> Reply:
        """Decide one request as the script does.

        Args:
            receipts: For a refund, one per policy of the charges; negative for one that was not charged.
            divisor: Each quota counts as ``ceil(quota / divisor)``.
            now: Time in us; ``None`` = the monotonic clock, which no clock setting moves.
        """
        at = float(time.monotonic_ns() // 1000 if now is None else now)
        with self._lock:
            return self._decide(mode, charges, receipts, divisor, at)

    def _decide(self, mode: Mode, charges: Sequence[Charge], receipts: Sequence[int], divisor: int, at: float) -> Reply:
        counters: list[tuple[Counter, Policy, Charge, bool]] = []
        admitted = True
        for charge in charges:
            held = self._find(charge.partition.key)
            for policy in charge.policies:
                share = policy if divisor == 1 else scaled(policy, divisor)
                stored = held.counters.get(policy.field) if held is not None else None
                counter = COUNTERS[policy.strategy](share, stored, at)
                fits = charge.cost == 0 or charge.cost <= counter.free
                admitted = admitted and (fits or policy.shadow)
                counters.append((counter, policy, charge, fits))
        for i, (counter, policy, charge, fits) in enumerate(counters):
            if mode == "peek" or charge.cost == 0:
                continue
            if mode == "refund":
                if receipts[i] < 0 or not counter.refund(charge.cost, float(receipts[i])):
                    continue
            elif mode == "charge" or (admitted and fits):
                counter.charge(charge.cost)
            else:
                continue
            self._store(charge.partition.key, policy, counter)
        if mode == "consume":
            for charge in charges:
                self._touch(charge.partition.key, refused=not admitted)
            self._shrink(at)
        reply = [int(admitted)]
        for counter, policy, charge, fits in counters:
            if charge.cost == 0 or charge.cost <= counter.free:
                retry = 0.0
            elif charge.cost > policy.quota:
                retry = -1.0
            elif charge.cost > counter.quota:
                # Within the quota but above this process's share: no time is right, and its window the best guess.
                retry = counter.window
            else:
                retry = counter.wait(charge.cost, at)
            remaining = max(0.0, min(counter.quota, counter.free))
            reply += (int(fits), int(remaining), int(counter.reset(at)), int(retry), int(counter.receipt))
        return reply

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

    def _find(self, key: bytes) -> _Held | None:
        return self._admitted.get(key) or self._refused.get(key)

    def _store(self, key: bytes, policy: Policy, counter: Counter) -> None:
        held = self._find(key)
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
        held = self._find(key)
        if held is None:
            return
        if held.refused != refused:
            source, target = (self._admitted, self._refused) if refused else (self._refused, self._admitted)
            target[key] = source.pop(key)
            held.refused = refused
        else:
            (self._refused if refused else self._admitted).move_to_end(key)

    def _drop(self, key: bytes) -> None:
        held = self._admitted.pop(key, None) or self._refused.pop(key)
        self._stamps -= held.stamps

    def _shrink(self, now: float) -> None:
        # Two a call: the store shrinks faster than it grows, and no call walks it.
        for queue in (self._admitted, self._refused):
            for _ in range(2):
                oldest = next(iter(queue), None)
                if oldest is None or queue[oldest].expires + _SLACK > now:
                    break
                self._drop(oldest)
        while len(self) > self._max_partitions or self._stamps > self._max_stamps:
            # Never the client just admitted while there is another: one that is always forgotten is never limited.
            queue = self._admitted if len(self._admitted) > 1 else self._refused or self._admitted
            self._drop(next(iter(queue)))


@lru_cache(maxsize=4096)
def scaled(policy: Policy, divisor: int) -> Policy:
    """*policy* with the share of its quota that one of *divisor* processes may admit, rounded up."""
    return replace(policy, quota=-(-policy.quota // divisor))
