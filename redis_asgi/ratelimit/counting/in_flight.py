"""What this process has in flight under concurrency limits: a `Slot` for each request, and the `Heart` of each loop.

Redis has an id for each request in flight, and the end of its lease. What it is told about an id says the same however
often it comes, and nothing about another: a lost reply, a lost release, a check that was late or cancelled, and a Redis
that was emptied are all mended by saying again what runs, and what does not run any more. That is a heartbeat. A worker
that is killed says nothing, and its leases end.

The life of a slot: its id goes to Redis with the check. An admission, whoever gives it, makes it run: it is counted in
this process, renewed by each heartbeat, and released once, when its request ends. What may reach Redis after that (a
check or a renewal that had no answer) makes it doubtful: it is then owed, and the heartbeats remove it again until one
of them has been answered.
"""

import asyncio
import secrets
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, count, islice
from typing import TYPE_CHECKING, Literal, TypeAlias

from ...connection.manager import RedisManager
from ...connection.open_client import PROCESS
from ...errors import Failure
from ...settings import Settings
from ..limits.clock import CLOCK
from ..limits.decision import Decision, Source
from ..limits.policy import Charge, Charges, counters_of
from ..limits.refusal_memory import RefusalMemory
from ..limits.reply import Reply, numbers_of
from ..transport.batcher import MAX_COUNTERS, Batcher
from ..transport.check import Check, HoldingCheck, Outcome
from ..transport.cluster_batcher import ClusterBatcher, make_batcher
from .local_engine import LocalEngine
from .verdict import Verdict

if TYPE_CHECKING:
    from .engine import Engine

# Seconds between heartbeats, a third of a lease; and after one that failed.
BEAT = 10.0
BEAT_AGAIN = 1.0
# Ids in one check of a heartbeat, which is one counter of a batch.
IDS_PER_CHECK = 128
# Ids that wait to be removed again, and for how long since the last came (s): of others the leases end by themselves.
MOST_OWED = 10_000
OWED_FOR = 60.0

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
        """What of its charges *verdict* has made: not those of shadows that would have refused."""
        # Redis may have made them all.
        if self.is_doubtful or verdict.reply is None:
            return self.charges
        both = zip(counters_of(verdict.charges), numbers_of(verdict.reply), strict=True)
        unmade = {(charge.partition.key, policy.field) for (charge, policy), each in both if not each.fits}
        fit = [c for c, policy in counters_of(self.charges) if (c.partition.key, policy.field) not in unmade]
        return self.charges if len(fit) == len(self.charges) else Charges(fit)

    def abandon(self, check: Check) -> None:
        """Release it, whose *check* nobody waits for any more."""
        if not self._is_answered:
            self.is_doubtful = self.is_known = check.may_have_run
        self.release()

    def release(self) -> None:
        """Let it be in flight no longer; again and again if need be."""
        if not self._is_over:
            self._is_over = True
            self._heart.release(self)


class HeldVerdict(Verdict):
    """A verdict by which a request is in flight until it ends, if it is admitted: its *slot* is the request's."""

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


class Heart:
    """The slots of one loop, and the heartbeat that tells Redis of them, while there is something to tell."""

    def __init__(self, manager: RedisManager, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._manager = manager
        self._local = manager.per_process(LocalEngine.from_settings)
        self._refusals = manager.per_process(RefusalMemory.from_settings)
        self._timeout = manager.settings.RATE_LIMIT_TIMEOUT
        self._running: dict[bytes, Slot] = {}
        self._renewing: dict[bytes, Slot] = {}
        self._late: list[Slot] = []  # released during a heartbeat that renews them
        self._owed: dict[Place, Charge] = {}
        self._owed_until = 0.0  # on the loop's clock
        self._under_way: asyncio.Future[None] | None = None
        self._to_say: Iterator[HoldingCheck] = iter(())
        self._checks_left = 0  # of those that were sent
        self._has_failed = False
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._running)

    @property
    def owes(self) -> int:
        """How many releases Redis is still to be told of, or told again."""
        return len(self._owed) + len(self._late)

    def run(self, slot: Slot) -> None:
        """Count *slot* as in flight, from now on."""
        self._running[slot.holder] = slot
        self._local.decide("charge", slot.charges, holders=slot.holders)
        self._plan(BEAT)

    def release(self, slot: Slot) -> None:
        """Count *slot* as in flight no longer, and tell Redis so; of what a heartbeat renews right now, after that."""
        self.drop(slot)
        self._refusals.end(slot.charges, CLOCK.monotonic())
        if slot.holder in self._renewing:
            self._late.append(slot)
        elif slot.is_known:
            self._tell(slot)

    def drop(self, slot: Slot) -> None:
        """Take *slot* out of what runs in this process."""
        self._running.pop(slot.holder, None)
        self._local.decide("refund", slot.charges, receipts=[0] * slot.charges.counters, holders=slot.holders)

    def end(self) -> None:
        """Drop all that runs: its loop is closed, or it is in the process that this one was forked off."""
        for slot in list(self._running.values()):
            self.drop(slot)

    def beat(self) -> "asyncio.Future[None]":
        """Renew what runs, and remove again what is owed; done when all of that is answered."""
        if self._under_way is not None:
            return self._under_way
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        done = self._under_way = self.loop.create_future()
        self._has_failed = False
        if self.loop.time() > self._owed_until:
            self._owed.clear()
        self._renewing = dict(self._running)
        renewed = [place for slot in self._renewing.values() for place in _places(slot)]
        self._to_say = chain(self._checks("charge", renewed), self._checks("refund", list(self._owed.items())))
        self._say_more()
        return done

    def _say_more(self) -> None:
        """Send of the heartbeat as much as one batch takes, so that no request waits behind more than that."""
        batcher = self._batcher()
        if batcher is None or (batcher.breaker is not None and batcher.breaker.state == "open"):
            self._has_failed = True
            self._to_say = iter(())
        else:
            for check in islice(self._to_say, MAX_COUNTERS - self._checks_left):
                self._checks_left += 1
                batcher.submit(check)
        if not self._checks_left:
            self._has_beaten()

    def _batcher(self) -> Batcher | ClusterBatcher | None:
        """What takes checks in the running loop; ``None`` where no client can be built, or, as one ends, in no loop."""
        try:
            is_here = asyncio.get_running_loop() is self.loop
            return self._manager.per_client(make_batcher) if is_here else None
        except Exception:
            return None

    def _checks(
        self, mode: Literal["charge", "refund"], places: Iterable[tuple[Place, Charge]]
    ) -> Iterator[HoldingCheck]:
        """What says *mode* of *places*, those of one counter together."""
        by_counter: dict[tuple[bytes, bytes], tuple[Charge, list[bytes]]] = {}
        for (holder, key, field), charge in places:
            by_counter.setdefault((key, field), (charge, []))[1].append(holder)
        for charge, holders in by_counter.values():
            for first in range(0, len(holders), IDS_PER_CHECK):
                check = self._check(mode, Charges((charge,)), holders[first : first + IDS_PER_CHECK])
                for holder in check.holders if mode == "charge" else ():
                    self._renewing[holder].is_known = True
                check.future.add_done_callback(partial(self._has_said, check))
                yield check

    def _check(self, mode: Literal["charge", "refund"], charges: Charges, holders: Sequence[bytes]) -> HoldingCheck:
        receipts = [0] * charges.counters if mode == "refund" else ()
        return HoldingCheck(self.loop, mode, charges, self._timeout, receipts, holders=holders)

    def _has_said(self, check: HoldingCheck, answered: "asyncio.Future[Outcome]") -> None:
        """Note what came of one *check* of the heartbeat, and of the last one that it has beaten."""
        failed = isinstance(answered.result(), Failure)
        self._has_failed |= failed
        if check.mode == "charge":
            # It may be carried out later than any release.
            for holder in check.holders if failed else ():
                self._renewing[holder].is_doubtful = True
        elif not failed or answered.result() is Failure.PERMISSION:
            ((charge, policy),) = counters_of(check.asked)
            for holder in check.holders:
                self._owed.pop((holder, charge.partition.key, policy.field), None)
        self._checks_left -= 1
        self._say_more()

    def _has_beaten(self) -> None:
        done, self._under_way = self._under_way, None
        self._renewing = {}
        late, self._late = self._late, []
        for slot in late:
            if slot.is_known:
                self._tell(slot)
        self._plan(BEAT_AGAIN if self._has_failed else BEAT)
        if done is not None and not done.done():
            done.set_result(None)

    def _plan(self, seconds: float) -> None:
        """Beat in so many *seconds*, unless that is planned already, or there is nothing to tell."""
        if (
            self._timer is None
            and self._under_way is None
            and (self._running or self._owed)
            and self._manager.has_redis
        ):
            self._timer = self.loop.call_later(seconds, self.beat)

    def _tell(self, slot: Slot) -> None:
        """Let Redis remove *slot*, in the next shared batch."""
        if slot.is_doubtful:
            self._owe(slot)
        batcher = self._batcher()
        if batcher is None:
            self._owe(slot)
            return
        for charges in _by_partition(slot.charges):
            check = self._check("refund", charges, slot.holders)
            check.future.add_done_callback(partial(self._has_told, slot))
            batcher.submit(check)

    def _has_told(self, slot: Slot, answered: "asyncio.Future[Outcome]") -> None:
        outcome = answered.result()
        if isinstance(outcome, Failure) and outcome is not Failure.PERMISSION:
            self._owe(slot)
        else:
            # Who was refused in the meantime need not wait.
            self._refusals.end(slot.charges, CLOCK.monotonic())

    def _owe(self, slot: Slot) -> None:
        """Let the heartbeats remove *slot* again."""
        self._owed.update(_places(slot))
        self._owed_until = self.loop.time() + OWED_FOR
        while len(self._owed) > MOST_OWED:
            del self._owed[next(iter(self._owed))]
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._plan, BEAT)


class Hearts:
    """The hearts of one manager in this process."""

    def __init__(self) -> None:
        self._ids = Ids()
        self._hearts: dict[asyncio.AbstractEventLoop, Heart] = {}
        self._forks = PROCESS.forks
        self._lock = threading.Lock()  # loops in several threads may share one manager

    @classmethod
    def from_settings(cls, _settings: Settings) -> "Hearts":
        return cls()

    def begin(self, manager: RedisManager, charges: Charges) -> Slot:
        """A slot for a request that is about to be put to *charges*, in the running loop."""
        return Slot(self.heart(manager), self._ids.next(), charges.in_flight)

    def heart(self, manager: RedisManager) -> Heart:
        """The running loop's."""
        loop = asyncio.get_running_loop()
        heart = self._hearts.get(loop)
        if heart is None or self._forks != PROCESS.forks:
            with self._lock:
                of_parent, self._forks = self._forks != PROCESS.forks, PROCESS.forks
                for gone in [heart.loop for heart in self._hearts.values() if of_parent or heart.loop.is_closed()]:
                    self._hearts.pop(gone).end()
                heart = self._hearts[loop] = Heart(manager, loop)
        return heart


def _places(slot: Slot) -> list[tuple[Place, Charge]]:
    return [((slot.holder, c.partition.key, policy.field), c) for c, policy in counters_of(slot.charges)]


def _by_partition(charges: Charges) -> list[Charges]:
    """*charges*, those of one partition together: on a cluster each may live on another node."""
    if not charges.is_spread:
        return [charges]
    parts: dict[bytes, list[Charge]] = {}
    for charge in charges:
        parts.setdefault(charge.partition.key, []).append(charge)
    return [Charges(mine) for mine in parts.values()]
