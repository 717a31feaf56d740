"""Refusals remembered in this process, so that a flood of refused requests costs Redis nothing."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from ...settings import Settings
from .charge import Charge, Charges, counters_of
from .policy import MICROSECONDS, Policy, log_key
from .reply import Reply, numbers_of

# A refund or reset in another process is seen this much later at most (s).
LONGEST = 1.0
# So is the end of a request in flight (s), which comes at any time.
LONGEST_IN_FLIGHT = 0.1


@dataclass(slots=True)
class Refusal:
    """One policy's refusal, with its numbers as they were.

    Attributes:
        cost: The lowest cost that was refused (units).
        at: When the numbers were true, in monotonic seconds.
        until: How long they answer for, likewise.
        reset: Until the full quota is back (us, from *at*).
        retry: Until the cost is admitted (us, from *at*); -1 when it never can be.
        asked: What was decided with it: of other limits it says nothing.
        alone: Whether no other refusal of its partition is known.
    """

    policy: Policy
    cost: int
    at: float
    until: float
    remaining: int
    reset: int
    retry: int
    asked: frozenset[tuple[bytes, bytes]]
    alone: bool = True

    def answers(self, cost: int) -> bool:
        """Whether a request of *cost* is refused too, for as long as these numbers say."""
        if cost == self.cost:
            return True
        if self.policy.strategy != "fixed-window":
            return False
        # A fixed window ends for all at once: for dearer ones,
        # and where nothing is left for every cost above 0.
        return cost > self.cost or (cost > 0 and self.remaining == 0 and self.retry > 0)

    def numbers(self, cost: int, now: float) -> tuple[int, int, int]:
        """Remaining, reset and retry of a request of *cost*, counted down to *now*."""
        passed = int((now - self.at) * MICROSECONDS)
        reset = max(0, self.reset - passed)
        if cost > self.policy.quota or self.retry < 0:
            return self.remaining, reset, -1
        return self.remaining, reset, max(0, self.retry - passed)


@dataclass(frozen=True, slots=True)
class Said:
    """The answer to a refused request, for the next ones: in one piece,
    as threads that have loops of their own may share it.

    Attributes:
        style: How it is written.
        until: How long, in monotonic seconds, the whole seconds in it stay the same.
        fields: Its header fields. Do not change them.
        body: Its body.
        decision: What it tells of.
    """

    style: object
    until: float
    fields: list[tuple[bytes, bytes]]
    body: bytes
    decision: Any


class Known(list[tuple[Charge, Refusal]]):
    """The refusals that answer some charges,
    and what is said of them again and again for as long as they do.

    Attributes:
        counters: What is counted of them, kept by `counts`.
        said: The last answer, kept by `responses`; ``None`` before the first.
        is_alone: Whether they are one,
            and no other charge was asked about that may come to be refused too.
    """

    __slots__ = ("counters", "is_alone", "said")

    def __init__(self) -> None:
        super().__init__()
        self.is_alone = False
        self.counters: Any = None
        self.said: Said | None = None

    def holds(self, now: float) -> bool:
        """Whether they still answer what they answered last, at *now* (monotonic seconds), alone."""
        if not self.is_alone:
            return False
        refusal = self[0][1]
        return refusal.alone and now < refusal.until


class RefusalMemory:
    """For each counter (policy, partition, quota) the lowest cost refused, for a second at most.

    It answers only requests of at least that cost and only for policies that enforce, so it is
    never wrong in the admitting direction, and in the refusing one only when another process has
    reset or refunded the counter within the last second. A Retry-After is never earlier than the
    truth: a dearer request is answered under a fixed window only, and one that other limits cover
    too is not. Of more than *size* partitions the one refused least recently is forgotten.
    """

    def __init__(self, size: int = 10_000) -> None:
        self._size = size
        self.partitions: OrderedDict[bytes, dict[bytes, Refusal]] = OrderedDict()
        self._forgotten: OrderedDict[bytes, float] = OrderedDict()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} clients, at most {self._size}>"

    def __len__(self) -> int:
        return len(self.partitions)

    @classmethod
    def from_settings(cls, _settings: Settings) -> "RefusalMemory":
        return cls()

    def find(self, charges: Charges, now: float) -> Known:
        """The refusals that are known of *charges* at *now* (monotonic seconds); empty when there
        are none.
        """
        kept: Known | None = charges.known
        if kept is not None and kept.holds(now):
            return kept
        known = self._find(charges, now)
        if known == kept:
            return kept
        known.is_alone = len(known) == len(charges) == 1
        charges.known = known or None
        return known

    def _find(self, charges: Charges, now: float) -> Known:
        known = Known()
        for charge in charges:
            key = charge.partition.key
            held = self.partitions.get(key)
            if held is None:
                continue
            for policy in charge.policies.policies:
                refusal = held.get(policy.field)
                if refusal is None or policy.shadow or policy.quota != refusal.policy.quota:
                    continue
                if now >= refusal.until or not (charge.cost == refusal.cost or refusal.answers(charge.cost)):
                    continue
                # A limit that was not asked then may refuse for longer.
                if charges.limits <= refusal.asked:
                    known.append((charge, refusal))
            if not known and all(now >= refusal.until for refusal in list(held.values())):
                self._expire(key, now)
        return known

    def _expire(self, key: bytes, now: float) -> None:
        """Drop a partition, unless another thread has just remembered a refusal of it."""
        with self._lock:
            held = self.partitions.get(key)
            if held is not None and all(now >= refusal.until for refusal in held.values()):
                del self.partitions[key]

    def remember(self, charges: Charges, reply: Reply, at: float) -> None:
        """Note which policies refused *charges* in *reply*,
        whose batch was written at *at* (monotonic seconds).
        """
        both = zip(counters_of(charges), numbers_of(reply), strict=True)
        with self._lock:
            for (charge, policy), (fits, remaining, reset, retry, _) in both:
                if fits or policy.shadow or at <= self._forgotten.get(charge.partition.key, -1.0):
                    continue
                longest = LONGEST
                if policy.strategy == "concurrency":
                    longest = LONGEST_IN_FLIGHT
                    if at <= self._forgotten.get(log_key(charge.partition.key, policy.field), -1.0):
                        continue
                until = at + (longest if retry < 0 else min(retry / MICROSECONDS, longest))
                held = self.partitions.setdefault(charge.partition.key, {})
                before = held.get(policy.field)
                if before is None or before.until < until or not before.answers(charge.cost):
                    if before is not None:
                        before.until = 0.0
                    new = Refusal(policy, charge.cost, at, until, remaining, reset, retry, charges.limits)
                    held[policy.field] = new
                    for each in held.values() if len(held) > 1 else ():
                        each.alone = False
                self.partitions.move_to_end(charge.partition.key)
            while len(self.partitions) > self._size:
                _end(self.partitions.popitem(last=False)[1])

    def clear(self) -> None:
        """Forget every refusal."""
        with self._lock:
            for held in self.partitions.values():
                _end(held)
            self.partitions.clear()
            self._forgotten.clear()

    def forget(self, partition: bytes, now: float) -> None:
        """Forget every refusal of a partition that was reset,
        or given something back, at *now* (monotonic seconds).

        Replies to what was asked before it are not remembered either.
        """
        with self._lock:
            _end(self.partitions.pop(partition, {}))
            self._note(partition, now)

    def end(self, charges: Charges, now: float) -> None:
        """`forget` the refusals by the limits of *charges* only,
        under which a request in flight has ended at *now*.
        """
        with self._lock:
            for charge, policy in counters_of(charges):
                refusal = self.partitions.get(charge.partition.key, {}).get(policy.field)
                if refusal is not None:
                    refusal.until = 0.0
                self._note(log_key(charge.partition.key, policy.field), now)

    def _note(self, key: bytes, now: float) -> None:
        self._forgotten[key] = now
        self._forgotten.move_to_end(key)
        while len(self._forgotten) > self._size:
            self._forgotten.popitem(last=False)


def _end(held: dict[bytes, Refusal]) -> None:
    """Let no refusal that was *held* answer any more, wherever it is still at hand."""
    for refusal in held.values():
        refusal.until = 0.0
