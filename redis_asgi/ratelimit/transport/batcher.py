"""Checks that share a round trip:
what waits while a batch is under way leaves together in the next one.

An idle limiter does not wait: a check that finds nothing in flight leaves at the end of the loop's
turn, with those that arrived in it. Under load the queue fills while Redis works, so that batches
grow with the load and trips per request fall. Many leave in two halves, so that the process has
answers to work on while Redis decides the other half: without that all come to wait at once, and
process and Redis take turns at being idle.

Far from Redis no check waits for the trip of others: a tenth of the deadline after the last batch
was written the next one leaves, so that a check has nine tenths for a trip of its own, however many
ask.

The life of a check: `Batcher.submit` puts it in the queue. When a transport has a connection in
hand it takes what waits as a `SubmittedBatch` and writes it. A check whose deadline passes, or
whose request is cancelled, before that is withdrawn and never sent; after it only the wait ends,
and the command goes on until the batch's own limit. Waiters get values, never exceptions.
"""

import asyncio
import math
from bisect import bisect_right
from itertools import accumulate, count
from random import getrandbits
from typing import TYPE_CHECKING

from ...connection.breaker import Breaker
from ...errors import Failure
from ...telemetry import telemetry
from ..limits.clock import CLOCK
from .check import Check, SubmittedBatch, Transport, by_slot, resolve, split_late, still_waiting
from .script import Call

if TYPE_CHECKING:
    from .slot_parts import ApartWhereAsked

MAX_COUNTERS = 128  # per batch; 64 cost about 0.4 ms of server time
# One leaves every tenth of the deadline, so that a trip may take as long as the deadline does.
MAX_IN_FLIGHT = 10
A_TRIP = 0.8  # of the deadline: what a round trip may take of it
MANY = 24  # checks that leave in two halves; each is then big enough to be worth its trip
LONGEST_FAREWELL = 1.0  # seconds that an end waits for answers, whatever their deadlines are


class Batcher:
    """The queue and the batches in flight of one server.

    Attributes:
        apart: Whether and how partitions are kept apart; ``None`` where that is decided elsewhere.
    """

    def __init__(self, transport: Transport, breaker: Breaker) -> None:
        self.apart: ApartWhereAsked | None = None
        self.loop = asyncio.get_running_loop()
        self._numbers = count(getrandbits(40))  # of another process on the way to one server: other numbers
        self.closed = False
        self._transport = transport
        self.breaker = breaker
        self._waiting: list[Check] = []
        self._waiting_counters = 0
        self._hurry = math.inf  # the shortest timeout of those that wait, in seconds
        self._sent: set[SubmittedBatch] = set()
        self._renewed = -1  # after which good probe of the breaker's the connections were last made anew
        self._written = 0.0  # the last of all batches, on the loop's clock
        self._timer: asyncio.TimerHandle | None = None
        self._armed_for = math.inf
        self._departure: asyncio.TimerHandle | None = None
        self._departs_at = math.inf
        counted = telemetry()
        self._add = counted.buffer.add
        self._size = counted.redis_batch_size
        self._duration = counted.redis_command_duration.labels("check")
        self._wait = counted.ratelimit_check_duration.labels("redis")
        self._commands = counted.redis_commands
        self._ok = counted.redis_commands.labels("check", "ok")

    def __repr__(self) -> str:
        under_way = sum(len(batch.checks) for batch in self._sent)
        return f"<{type(self).__name__} {len(self._waiting)} checks wait, {under_way} under way, {self.breaker!r}>"

    def switch_to(self, transport: Transport) -> None:
        """Send what is taken from now on over *transport*."""
        self._transport = transport

    def submit(self, check: Check, *, is_admitted: bool = False) -> None:
        """Queue *check*; its future resolves by its deadline, to a reply or a failure.

        Args:
            is_admitted: Whether the breaker has been asked about it.
        """
        if self.breaker.state != "closed" and not is_admitted:
            if not self.breaker.admits():
                check.answer(self.breaker.reason)
                return
            # The trial must not wait for a connection of the outage, nor behind those who did. One
            # that is made since then is left to it: far away that takes longer than a trial waits.
            if self._renewed != self.breaker.good_probes:
                self._renewed = self.breaker.good_probes
                self._transport.renew()
            self.loop.call_soon(self.start_if_due)
        if check.asked.is_spread and self.apart is not None and self.apart.now and self.apart.takes(check):
            return
        waiting = self._waiting
        waiting.append(check)
        self._waiting_counters += check.asked.counters
        if check.deadline < self._armed_for:
            self._arm(check.deadline)
        # Behind one that waits already, and is in no less of a hurry,
        # there is nothing to do until the batch is full.
        if self._waiting_counters >= MAX_COUNTERS:
            self.start_if_due()
        elif check.timeout < self._hurry:
            self._hurry = check.timeout
            if self._transport.busy == 0:
                self.loop.call_soon(self.start_if_due)
            else:
                self.plan()

    @property
    def gathers(self) -> bool:
        """Whether one check may be about several partitions."""
        return self.apart is None or not self.apart.now

    def grown(self, counters: int) -> None:
        """Note that a check that waits is about so many *counters* more."""
        self._waiting_counters += counters
        if self._waiting_counters >= MAX_COUNTERS:
            self.start_if_due()

    def start_if_due(self) -> None:
        """Send what waits, if nothing is under way or it fills a batch; else plan when."""
        if self.closed:
            self._fail_waiting(Failure.CONNECTION)
        elif self._waiting:
            busy, many = self._transport.busy, len(self._waiting) >= MANY
            if busy == 0 or (self._waiting_counters >= MAX_COUNTERS and busy < MAX_IN_FLIGHT):
                self._transport.start(self)
                if busy == 0 and many:
                    self._transport.start(self)
            elif busy < MAX_IN_FLIGHT:
                self.plan()

    def plan(self, since: float | None = None) -> None:
        """See to it that what waits leaves a tenth of its deadline after the last batch did.

        Args:
            since: Count from then instead, on the loop's clock.
        """
        due = (self._written if since is None else since) + self._hurry / MAX_IN_FLIGHT
        # Nearly always there is one already:
        # the last batch was written after it was planned, and `_depart` plans anew.
        if due < self._departs_at:
            if self._departure is not None:
                self._departure.cancel()
            self._departure, self._departs_at = self.loop.call_at(due, self._depart), due

    def _depart(self) -> None:
        self._departure, self._departs_at = None, math.inf
        self._transport.read()
        # One that is getting ready takes all that waits;
        # with too many under way the next reply plans anew.
        if self._waiting and len(self._sent) >= self._transport.busy < MAX_IN_FLIGHT:
            if self.loop.time() >= self._written + self._hurry / MAX_IN_FLIGHT:
                self._transport.start(self)
            else:
                self.plan()

    @property
    def waits(self) -> bool:
        """Whether anything waits to be sent."""
        return bool(self._waiting)

    def take(self) -> SubmittedBatch | None:
        """The checks that wait and are still waited for, oldest first,
        at most `MAX_COUNTERS` counters.

        Half of it, when it is many and the first to be under way.
        """
        now, at = self.loop.time(), CLOCK.monotonic()
        waiting = self._waiting
        if now >= self._armed_for:  # no deadline is before that
            late, waiting = split_late(waiting, now)
            resolve(late, self._transport.timeout_cause())
        taken = still_waiting(waiting)
        room = len(taken)
        if room >= MANY and not self._sent:
            room //= 2
        if self._waiting_counters > MAX_COUNTERS:
            filled = list(accumulate(check.asked.counters for check in taken))
            room = max(1, min(room, bisect_right(filled, MAX_COUNTERS)))
        self._wait_on(taken[room:])
        del taken[room:]
        if not taken:
            self.breaker.withdrawn()
            return None
        for check in taken:
            check.written, check.at = now, at
        batch = SubmittedBatch(taken, now, now + 2 * max([check.timeout for check in taken]))
        self._written = now
        self._sent.add(batch)
        if batch.limit < self._armed_for:
            self._arm(batch.limit)
        return batch

    def completed(self, batch: SubmittedBatch, failure: Failure | None) -> None:
        """Note how *batch* went; who still waits for an answer of it is given *failure*."""
        self._sent.discard(batch)
        if failure is not None:
            resolve(batch.checks, failure)
        self._tell(batch, failure)

    def again(self, batch: SubmittedBatch) -> None:
        """Ask once more what *batch* did, each partition by a command of its own:
        it was refused, and nothing ran.

        That is a fact about the server, not about its health, so the breaker hears nothing.
        """
        self._sent.discard(batch)
        batch.is_told = True
        checks, batch.checks = still_waiting(batch.checks), []
        if self.apart is not None:
            self.apart.found()
        for check in checks:
            self.submit(check, is_admitted=True)

    def calls(self, checks: list[Check], *, apart: bool = False) -> list[Call]:
        """The commands for *checks*: one for all of them, unless partitions are kept apart."""
        apart = apart or (self.apart is not None and self.apart.now)
        groups = by_slot(checks) if apart else [checks]
        return [Call(group, next(self._numbers), CLOCK.redis) for group in groups]

    def connect_failed(self, failure: Failure) -> None:
        """Note that no connection could be made: no check that waits now would fare better."""
        self._commands.labels("check", failure.value).inc()
        self.breaker.failed(failure)
        self._fail_waiting(failure)

    async def aclose(self) -> None:
        """End when all that was asked is answered, or late: what the requests cost that have just
        ended is among it. Who asks meanwhile is told that the connection is gone.
        """
        asked = [check.future for checks in (self._waiting, *(b.checks for b in self._sent)) for check in checks]
        try:
            if asked:
                await asyncio.wait(asked, timeout=LONGEST_FAREWELL)
        finally:
            self.closed = True
        await self._transport.aclose()
        self._fail_waiting(Failure.CONNECTION)
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._armed_for = None, math.inf
        if self._departure is not None:
            self._departure.cancel()
            self._departure, self._departs_at = None, math.inf

    def _tell(self, batch: SubmittedBatch, failure: Failure | None) -> None:
        if batch.is_told or self.closed:
            return
        batch.is_told = True
        now = self.loop.time()
        size, duration = (self._size, len(batch.checks)), (self._duration, now - batch.written)
        if failure is None:
            oldest = batch.checks[0]
            self._add((self._ok, 1), size, duration, (self._wait, now - oldest.deadline + oldest.timeout))
            self.breaker.worked()
        else:
            self._add(size, duration)
            self._commands.labels("check", failure.value).inc()
            self.breaker.failed(failure)

    def _fail_waiting(self, failure: Failure) -> None:
        waiting = self._waiting
        self._wait_on([])
        resolve(waiting, failure)

    def _wait_on(self, checks: list[Check]) -> None:
        """Let just *checks* wait."""
        self._waiting = checks
        self._waiting_counters = sum([check.asked.counters for check in checks])
        self._hurry = min([check.timeout for check in checks], default=math.inf)

    def _arm(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # One turn of the loop later: when the loop itself was held up,
        # replies that have come are read first.
        self._timer, self._armed_for = self.loop.call_at(when, self.loop.call_soon, self._tick), when

    def _tick(self) -> None:
        """The only clock: end waits past their deadline and batches past their limit, then sleep to
        the next.
        """
        self._timer, self._armed_for = None, math.inf
        self._transport.read()
        now = self.loop.time()
        late, rest = split_late(self._waiting, now)
        self._wait_on(rest)
        if late and not self._sent:
            if self.breaker.state == "closed":
                self.breaker.failed(self._transport.timeout_cause())
            else:
                # A trial that was not even sent says nothing:
                # its connection is still being made, or says so itself.
                self.breaker.withdrawn()
        resolve(late, self._transport.timeout_cause())
        deadlines = [check.deadline for check in self._waiting]
        for batch in tuple(self._sent):
            late, rest = split_late(batch.checks, now)
            late = still_waiting(late)
            # Of one that waited for long before it was written,
            # for a connection far away, only the limit tells.
            if batch.limit <= now or any(check.left >= A_TRIP * check.timeout for check in late):
                self._tell(batch, Failure.TIMEOUT)
            resolve(late, Failure.TIMEOUT)
            deadlines += [check.deadline for check in rest if not check.future.done()]
            if batch.limit <= now:
                self._transport.abort(batch)
            else:
                deadlines.append(batch.limit)
        if deadlines:
            self._arm(min(deadlines))
