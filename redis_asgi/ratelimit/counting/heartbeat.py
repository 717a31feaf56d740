"""The heartbeat of a worker: leases of requests that run are renewed,
and those of ended ones removed.
"""

import asyncio
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Literal

from ...connection.manager import RedisManager
from ...connection.open_client import PROCESS
from ...errors import Failure
from ...settings import Settings
from ..limits.charge import Charge, Charges, by_partition, counters_of
from ..limits.clock import CLOCK
from ..limits.refusal_memory import RefusalMemory
from ..transport.batcher import MAX_COUNTERS, Batcher
from ..transport.check import HoldingCheck, Outcome
from ..transport.cluster_batcher import ClusterBatcher, make_batcher
from .local_engine import LocalEngine

if TYPE_CHECKING:
    pass
from .in_flight import Ids, Place, Slot

# Seconds between heartbeats, a third of a lease; and after one that failed,
# or that something came too late for.
BEAT = 10.0
BEAT_AGAIN = 1.0
# Ids in one check of a heartbeat, which is one counter of a batch.
IDS_PER_CHECK = 128
# Ids that wait to be removed again, and for how long since the last came (s):
# of others the leases end by themselves.
MOST_OWED = 10_000
OWED_FOR = 60.0


class Heart:
    """The slots of one loop, and the heartbeat that tells Redis of them,
    while there is something to tell.
    """

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
        """The releases that Redis is still to be told of, or told again."""
        return len(self._owed) + len(self._late)

    def run(self, slot: Slot) -> None:
        """Count *slot* as in flight, from now on."""
        self._running[slot.holder] = slot
        self._local.decide("charge", slot.charges, holders=slot.holders)
        self._plan(BEAT)

    def release(self, slot: Slot) -> None:
        """Count *slot* as in flight no longer, and tell Redis so;
        of what a heartbeat renews right now, after that.
        """
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
        """Drop all that runs: its loop is closed,
        or it is in the process that this one was forked off.
        """
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
        """Send of the heartbeat as much as one batch takes,
        so that no request waits behind more than that.
        """
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
        """The batcher of the running loop;
        ``None`` where its client is closed, or as it ends, in no loop.

        No client is opened for it: a heart that beats on after the app has closed its manager would
        keep a connection.
        """
        try:
            is_here = asyncio.get_running_loop() is self.loop
            return self._manager.per_client(make_batcher) if is_here and self._manager.is_open else None
        except Exception:
            return None

    def _checks(
        self, mode: Literal["charge", "refund"], places: Iterable[tuple[Place, Charge]]
    ) -> Iterator[HoldingCheck]:
        """Checks that say *mode* of *places*, those of one counter together."""
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
        # What is owed now came while it beat, so that it was not told.
        self._plan(BEAT_AGAIN if self._has_failed or self._owed else BEAT)
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
        charged = slot.charges
        for charges in map(Charges, by_partition(charged).values()) if charged.is_spread else (charged,):
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
