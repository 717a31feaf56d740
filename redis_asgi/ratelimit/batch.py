"""Checks that share a round trip: what waits while a batch is under way leaves together in the next one.

An idle limiter adds no delay: a check that finds nothing in flight starts a batch at once. Under load the queue
fills while Redis works, so that batches grow with the load and trips per request fall.

The life of a check: `Batcher.submit` puts it in the queue. When a batch has a connection in hand it takes what waits
and writes it. A check whose deadline passes, or whose request is cancelled, before that is withdrawn and never sent;
after it only the wait ends, and the command goes on until the batch's own limit. Waiters get values, never exceptions.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias, cast

from ..errors import Failure, classify, classify_reply
from .policy import Charge
from .strategies import VALUES_PER_COUNTER, Mode, Reply

Outcome: TypeAlias = Reply | Failure
MAX_COUNTERS = 128  # per batch; 64 cost about 0.4 ms of server time
MAX_IN_FLIGHT = 4


class Check:
    """One request's question. Its deadline runs from its arrival."""

    __slots__ = ("charges", "counters", "deadline", "future", "mode", "receipts", "timeout", "written")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        mode: Mode,
        charges: Sequence[Charge],
        timeout: float,
        receipts: Sequence[int] = (),
    ) -> None:
        self.mode = mode
        self.charges = charges
        self.receipts = receipts
        self.timeout = timeout
        self.deadline = loop.time() + timeout
        self.written = 0.0  # when its batch was about to be written, on the loop's clock
        self.future: asyncio.Future[Outcome] = loop.create_future()
        self.counters = 0
        for charge in charges:
            self.counters += len(charge.policies.policies)


class Wire(Protocol):
    """How a batch reaches Redis."""

    async def run(self, batcher: "Batcher") -> None:
        """Get ready, take what waits in *batcher*, send it and resolve it."""

    def lacks(self) -> Failure:
        """What a check still in the queue at its deadline was waiting for."""


class Batcher:
    """The queue and the batches in flight of one server.

    Args:
        clock: The script's time in us, for tests; ``None`` = Redis's own.
    """

    def __init__(self, wire: Wire, *, clock: int | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self._wire = wire
        self.clock = clock
        self._waiting: list[Check] = []
        self._waiting_counters = 0
        self._written: dict[asyncio.Task[None], tuple[float, list[Check]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.closed = False

    def submit(self, check: Check) -> None:
        """Queue *check*; its future resolves by its deadline, to a reply or a failure."""
        self._waiting.append(check)
        self._waiting_counters += check.counters
        if self._timer is None or check.deadline < self._timer.when():
            self._arm(check.deadline)
        self._start_if_due()

    def take(self) -> list[Check]:
        """What waits and still has somebody waiting for it, oldest first, at most `MAX_COUNTERS` counters.

        From here on its commands may run whatever happens, so only its waits can end.
        """
        now = self.loop.time()
        waiting, self._waiting, self._waiting_counters = self._waiting, [], 0
        taken: list[Check] = []
        counters = 0
        for i, check in enumerate(waiting):
            if check.deadline <= now:
                resolve([check], self._wire.lacks())
            if check.future.done():
                continue
            if taken and counters + check.counters > MAX_COUNTERS:
                self._waiting = waiting[i:]
                self._waiting_counters = sum(left.counters for left in self._waiting)
                break
            check.written = now
            taken.append(check)
            counters += check.counters
        if taken:
            limit = now + 2 * max(check.timeout for check in taken)
            self._written[cast("asyncio.Task[None]", asyncio.current_task())] = (limit, taken)
            if self._timer is None or limit < self._timer.when():
                self._arm(limit)
        return taken

    async def aclose(self) -> None:
        """End the batches under way; whoever waits is told that the connection is gone."""
        self.closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        resolve(self._waiting, Failure.CONNECTION)
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start_if_due(self) -> None:
        if self.closed:
            resolve(self._waiting, Failure.CONNECTION)
            self._waiting.clear()
            return
        under_way = len(self._tasks)
        if under_way == 0 or (self._waiting_counters >= MAX_COUNTERS and under_way < MAX_IN_FLIGHT):
            task = self.loop.create_task(self._run())
            self._tasks.add(task)
            task.add_done_callback(self._finished)

    async def _run(self) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        more = True
        while more:
            try:
                await self._wire.run(self)
            except Exception as error:
                failure = classify(error)
                if failure is Failure.POOL and len(self._tasks) > 1:
                    return  # a batch that has a connection takes what waits when it is back
                # No connection could be made: nobody who waits now would fare better.
                waiting, self._waiting, self._waiting_counters = self._waiting, [], 0
                resolve(waiting, failure)
            finally:
                _, checks = self._written.pop(task, (0.0, ()))
                resolve(checks, Failure.TIMEOUT)
            more = bool(self._waiting) and (len(self._tasks) == 1 or self._waiting_counters >= MAX_COUNTERS)

    def _finished(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if self._waiting:
            self._start_if_due()

    def _arm(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_at(when, self._tick)

    def _tick(self) -> None:
        """The only clock: end waits past their deadline and batches past their limit, then sleep to the next."""
        self._timer = None
        now = self.loop.time()
        late, self._waiting = _split(self._waiting, now)
        self._waiting_counters = sum(check.counters for check in self._waiting)
        resolve(late, self._wire.lacks())
        deadlines = [check.deadline for check in self._waiting]
        for task, (limit, checks) in list(self._written.items()):
            late, rest = _split(checks, now)
            resolve(late, Failure.TIMEOUT)
            deadlines += [check.deadline for check in rest if not check.future.done()]
            if limit <= now:
                task.cancel()
            else:
                deadlines.append(limit)
        if deadlines:
            self._arm(min(deadlines))


def _split(checks: Iterable[Check], now: float) -> tuple[list[Check], list[Check]]:
    late: list[Check] = []
    rest: list[Check] = []
    for check in checks:
        (late if check.deadline <= now else rest).append(check)
    return late, rest


def still_waiting(checks: Iterable[Check]) -> list[Check]:
    """Those of *checks* that somebody waits for, or that nobody ever did: what is settled after a response."""
    return [check for check in checks if not check.future.done()]


def resolve(checks: Iterable[Check], outcome: Outcome) -> None:
    """Give *outcome* to everyone of *checks* who still waits."""
    for check in checks:
        if not check.future.done():
            check.future.set_result(outcome)


def distribute(checks: Sequence[Check], reply: Sequence[Any]) -> None:
    """Cut the script's flat *reply* into one outcome per check; an odd key costs its own request only."""
    at = 0
    for check in checks:
        outcome: Outcome
        if reply[at] == -1:
            message = reply[at + 1]
            outcome = classify_reply(message.decode() if isinstance(message, bytes) else str(message))
            at += 2
        else:
            end = at + 1 + VALUES_PER_COUNTER * check.counters
            outcome = list(reply[at:end])
            at = end
        if not check.future.done():
            check.future.set_result(outcome)
