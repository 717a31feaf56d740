"""Refusals remembered in this process, so that a flood of refused requests costs Redis nothing."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from ..settings import Settings
from .policy import MICROSECONDS, Charge, Policy
from .strategies import VALUES_PER_COUNTER, Reply

# A refund or reset in another process is seen this much later at most (s).
LONGEST = 1.0


@dataclass(slots=True)
class Refusal:
    """One policy's refusal, with its numbers as they were.

    Attributes:
        cost: The lowest cost that was refused (units).
        at: When the numbers were true, in monotonic seconds.
        until: How long they answer for, likewise.
        reset: Until the full quota is back (us, from *at*).
        retry: Until the cost is admitted (us, from *at*); -1 when it never can be.
    """

    policy: Policy
    cost: int
    at: float
    until: float
    remaining: int
    reset: int
    retry: int

    def numbers(self, cost: int, now: float) -> tuple[int, int, int]:
        """Remaining, reset and retry of a request of *cost*, counted down to *now*."""
        passed = int((now - self.at) * MICROSECONDS)
        reset = max(0, self.reset - passed)
        if cost > self.policy.quota:
            return self.remaining, reset, -1
        return self.remaining, reset, max(0, self.retry - passed)


class RefusalMemory:
    """For each counter (policy, partition, quota) the lowest cost refused, for a second at most.

    It answers only requests of at least that cost and only for policies that enforce, so it is never wrong in
    the admitting direction, and in the refusing one only when another process has reset or refunded the
    counter within the last second. The partition refused least recently of more than *size* is forgotten.
    """

    def __init__(self, size: int = 10_000) -> None:
        self._size = size
        self._partitions: OrderedDict[bytes, dict[bytes, Refusal]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._partitions)

    @classmethod
    def from_settings(cls, _settings: Settings) -> "RefusalMemory":
        return cls()

    def find(self, charges: Sequence[Charge], now: float) -> list[tuple[Charge, Refusal]]:
        """What is known to refuse *charges* at *now* (monotonic seconds); empty when nothing is."""
        known: list[tuple[Charge, Refusal]] = []
        for charge in charges:
            key = charge.partition.key
            held = self._partitions.get(key)
            if held is None:
                continue
            for policy in charge.policies.policies:
                refusal = held.get(policy.field)
                if refusal is None or policy.shadow or policy.quota != refusal.policy.quota:
                    continue
                if now < refusal.until and charge.cost >= refusal.cost:
                    known.append((charge, refusal))
            if not known and all(now >= refusal.until for refusal in held.values()):
                self._partitions.pop(key, None)
        return known

    def remember(self, charges: Sequence[Charge], reply: Reply, at: float) -> None:
        """Note which policies refused *charges* in *reply*, whose batch was written at *at* (monotonic seconds)."""
        position = 1
        with self._lock:
            for charge in charges:
                for policy in charge.policies.policies:
                    fits, remaining, reset, retry, _ = reply[position : position + VALUES_PER_COUNTER]
                    position += VALUES_PER_COUNTER
                    if fits or policy.shadow:
                        continue
                    until = at + (LONGEST if retry < 0 else min(retry / MICROSECONDS, LONGEST))
                    held = self._partitions.setdefault(charge.partition.key, {})
                    before = held.get(policy.field)
                    if before is None or before.cost >= charge.cost or before.until < until:
                        held[policy.field] = Refusal(policy, charge.cost, at, until, remaining, reset, retry)
                    self._partitions.move_to_end(charge.partition.key)
            while len(self._partitions) > self._size:
                self._partitions.popitem(last=False)

    def forget(self, partition: bytes) -> None:
        """Forget every refusal of a partition: it was reset, or given something back."""
        with self._lock:
            self._partitions.pop(partition, None)
