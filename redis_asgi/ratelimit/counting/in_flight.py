"""Requests in flight under concurrency limits: a `Slot` for each, and the `Heart` of each loop.

Redis has an id for each request in flight, and the end of its lease. What it is told about an id
says the same however often it comes, and nothing about another: a lost reply, a lost release, a
check that was late or cancelled, and a Redis that was emptied are all mended by saying again what
runs, and what does not run any more. That is a heartbeat. A worker that is killed says nothing, and
its leases end.

The life of a slot: its id goes to Redis with the check. An admission, from wherever, makes it run:
it is counted in this process, renewed by each heartbeat, and released once, when its request ends.
What may reach Redis after that (a check or a renewal that had no answer) makes it doubtful: it is
then owed, and the heartbeats remove it again until one of them has been answered.
"""

import secrets
from itertools import count
from typing import TYPE_CHECKING, TypeAlias

from ...connection.open_client import PROCESS
from ...errors import Failure
from ..limits.charge import Charges, counters_of
from ..limits.decision import Decision, Source
from ..limits.reply import Reply, numbers_of
from ..transport.check import Check, Outcome
from .verdict import Verdict

if TYPE_CHECKING:
    from .engine import Engine
    from .heartbeat import Heart


# What those of `RateLimiter.slot` are counted as together; no rule has such a name.
SLOTS = "slot()"
# An id, the partition and the policy's field under which it is in flight.
Place: TypeAlias = tuple[bytes, bytes, bytes]


class Ids:
    """Ids that no other process has: random in each, also in one that was forked off, then counted."""

    def __init__(self) -> None:
        self._forks = -1
        self._mine = b""
        self._numbers = count()

    def next(self) -> bytes:
        """One that was never given out."""
        if self._forks != PROCESS.forks:
            self._forks = PROCESS.forks
            self._mine = secrets.token_urlsafe(9).encode()
        return b"%s%x" % (self._mine, next(self._numbers))


class Slot:
    """One request's place under the concurrency limits that cover it.

    Attributes:
        holder: Its id.
        holders: The same, as checks take it.
        charges: What it is in flight under.
        is_doubtful: Whether Redis may come to know it after it was released.
        is_known: Whether Redis may know it.
    """

    __slots__ = ("_heart", "_is_answered", "_is_over", "charges", "holder", "holders", "is_doubtful", "is_known")

    def __init__(self, heart: "Heart", holder: bytes, charges: Charges) -> None:
        self._heart = heart
        self.holder = holder
        self.holders = (holder,)
        self.charges = charges
        self.is_doubtful = self.is_known = False
        self._is_answered = self._is_over = False

    def answered(self, verdict: Verdict) -> None:
        """Run, if *verdict*, which is on its request, admits it."""
        self._is_answered = True
        self.is_known = self.is_doubtful or verdict.source == "redis"
        if verdict.allowed:
            self.charges = self._under(verdict)
            if self.charges.counters:
                self._heart.run(self)
                verdict.open_ledger()  # by which its end is looked at
                return
        if self.is_doubtful:
            self.release()
        self._is_over = True

    def _under(self, verdict: Verdict) -> Charges:
        """The charges that *verdict* has made: not those of shadows that would have refused."""
        # Redis may have made them all.
        if self.is_doubtful or verdict.reply is None:
            return self.charges
        both = zip(counters_of(verdict.charges), numbers_of(verdict.reply), strict=True)
        unmade = {(charge.partition.key, policy.field) for (charge, policy), each in both if not each.fits}
        fit = [c for c, policy in counters_of(self.charges) if (c.partition.key, policy.field) not in unmade]
        return self.charges if len(fit) == len(self.charges) else Charges(fit)

    def abandon(self, check: Check) -> None:
        """Release it, whose *check* no request waits for any more."""
        if not self._is_answered:
            self.is_doubtful = self.is_known = check.may_have_run
        self.release()

    def release(self) -> None:
        """Let it be in flight no longer; again and again if need be."""
        if not self._is_over:
            self._is_over = True
            self._heart.release(self)


class HeldVerdict(Verdict):
    """A verdict by which a request is in flight until it ends,
    if it is admitted: its *slot* is the request's.
    """

    __slots__ = ("holders", "slot")

    def __init__(self, engine: "Engine", charges: Charges, slot: Slot) -> None:
        super().__init__(engine, charges)
        self.slot: Slot = slot
        self.holders = slot.holders

    def hear(self, outcome: Outcome) -> None:
        if isinstance(outcome, Failure):
            # What is denied has not run.
            self.slot.is_doubtful = self.may_have_run and outcome is not Failure.PERMISSION
        else:
            # Of a refusal in parts one may have been admitted.
            self.slot.is_doubtful = self.asked.is_spread and not outcome[0]
        super().hear(outcome)

    def decide(self, source: Source, reply: Reply) -> None:
        super().decide(source, reply)
        self.slot.answered(self)

    def leave(self, decision: Decision) -> None:
        super().leave(decision)
        self.slot.answered(self)
