"""Single-flight: concurrent misses of one input share one call of the app.

A flight is one sub-request in a task of its own, so that no caller's disconnect fails another. It
can be joined until its write has ended: later requests find its vectors in the store. Only when no
request waits any more does the app see a disconnect. A flight that ends without vectors releases
its followers, and each asks the app itself.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from ..records.codec import Value
from ..records.lease import Lease
from ..records.vectors import Encoding
from ..requests.http_caching import StorePermission
from .app_call import AppCall, AppReply

MAX_INPUTS_FOR_ALL = 16  # a flight of more is joined only by requests that are as large


@dataclass(frozen=True, slots=True)
class FlightResult:
    """The vectors and the lease of an understood answer.

    Attributes:
        values: Vectors by key.
        encodings: The representations the app used.
        lease: What a full hit may repeat of it.
        mark: Of the epoch and the model that it names, see `mark_of`.
        reply: The answer itself.
        tokens: What the app counted for it; ``None`` when it does not say.
        rule: Whether it is stored, and given to others.
        repeatable: Whether a full hit may repeat what stands around its vectors.
        is_stray: Whether it names another model than the caller's living lease, as a fallback's
            does: it answers those that wait for it, and is not kept.
    """

    values: Mapping[bytes, Value]
    encodings: tuple[Encoding, ...]
    lease: Lease
    mark: bytes
    reply: AppReply
    tokens: int | None
    rule: StorePermission
    repeatable: bool
    is_stray: bool


class Flight:
    """One sub-request under way.

    Args:
        names: The keys of its inputs.
        lease_name: On whose behalf.
        epoch: What its lookup saw.
        call: The call of the app.
        asked_at: Unix seconds.
        filling: Whether its lookup found none of its inputs, so that others need not look for them.

    Attributes:
        outcome: Resolves to the `FlightResult` for the request that began it,
            ``None`` when nothing was understood.
        landed: The same for those who joined,
            ``None`` also when the answer is only for the request that asked.
    """

    def __init__(
        self,
        names: Sequence[bytes],
        lease_name: bytes,
        epoch: bytes,
        call: AppCall,
        asked_at: float,
        *,
        filling: bool,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.names = tuple(names)
        self.lease_name = lease_name
        self.epoch = epoch
        self.call = call
        self.asked_at = asked_at
        self.filling = filling
        self.outcome: asyncio.Future[FlightResult | None] = loop.create_future()
        self.landed: asyncio.Future[FlightResult | None] = loop.create_future()
        self._owner: object = None  # the first to wait, which began it
        self._waiting: set[object] = set()
        self._abandoned = False
        self.task: asyncio.Task[None] | None = None

    def joinable(self, epoch: bytes, inputs: int) -> bool:
        """Whether a request of *inputs* inputs that saw *epoch* may wait for this."""
        return not self._abandoned and self.epoch == epoch and self.small_enough(inputs)

    def small_enough(self, inputs: int) -> bool:
        """Whether a request of *inputs* inputs does not wait for many more than its own."""
        return len(self.names) <= max(MAX_INPUTS_FOR_ALL, inputs)

    def join(self, who: object) -> None:
        """Let *who* wait for it."""
        if not self.outcome.done():
            self._owner = self._owner or who
            self._waiting.add(who)

    def leave(self, who: object, *, cancelled: bool) -> None:
        """Wait no more; the last to leave ends the call: by a disconnect,
        or as it was itself *cancelled*.
        """
        if who not in self._waiting:
            return
        self._waiting.remove(who)
        if not self._waiting and not (self.outcome.done() and self.outcome.result()):
            self._abandoned = True
            if cancelled:
                self.call.cancel()
            else:
                self.call.hang_up()

    def resolve(self, landing: FlightResult | None) -> None:
        """Tell everybody; only the first call counts."""
        if self.outcome.done():
            return
        self.outcome.set_result(landing)
        self.landed.set_result(landing if landing is not None and landing.rule.refusal is None else None)
        if landing is None:
            # It may still be on its way to the request that began it, which alone may end it.
            self._waiting &= {self._owner}
            if not self._waiting:
                self.call.hang_up()


class Flights:
    """All flights of one event loop, by the keys of their inputs.

    Args:
        remembered: Seconds for which a landed one is still found by lookups that were under way: as
            long as a lookup can take.

    Attributes:
        looking: Lookups under way; while there is none nothing that lands is remembered.
    """

    def __init__(self, remembered: float) -> None:
        self._remembered = remembered
        self._by_name: dict[bytes, Flight] = {}
        self._renewals: dict[bytes, Flight] = {}
        self._landed: dict[bytes, tuple[Flight, float]] = {}
        self.looking = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def find(self, name: bytes, asked_at: float) -> Flight | None:
        """The flight that computes the input of this key,
        or has since *asked_at* (the loop's clock).
        """
        flight, landed_at = self._landed.get(name, (None, 0.0))
        return self._by_name.get(name) or (flight if landed_at >= asked_at else None)

    def carrying(self, names: Collection[bytes]) -> dict[bytes, Flight]:
        """The flights that compute inputs of *names*,
        and that a request of all of them need not look behind.
        """
        if not self._by_name:
            return {}
        flown = [(name, flight) for name in names if (flight := self._by_name.get(name)) is not None]
        return {name: flight for name, flight in flown if flight.filling and flight.small_enough(len(names))}

    def renewal(self, lease_name: bytes, epoch: bytes, asked_at: float) -> Flight | None:
        """The call whose answer brings this lease, or has since *asked_at* (the loop's clock).

        Only one that a request with nothing else to ask may wait for.
        """
        landed, landed_at = self._landed.get(lease_name, (None, 0.0))
        flight = self._renewals.get(lease_name) or (landed if landed_at >= asked_at else None)
        return flight if flight is not None and flight.joinable(epoch, 1) else None

    def begin(
        self,
        flight: Flight,
        read: Callable[[AppReply], Awaitable[FlightResult | None]],
        write: Callable[[FlightResult], Awaitable[None]],
        *,
        shared: bool,
    ) -> None:
        """Start *flight*; others find it when it is *shared*."""
        if shared:
            for name in flight.names:
                self._by_name[name] = flight
            if flight.small_enough(1):
                self._renewals.setdefault(flight.lease_name, flight)
        app = flight.call.begin()
        task = asyncio.get_running_loop().create_task(self._fly(flight, app, read, write))
        flight.task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settle(self) -> None:
        """Wait for what is under way."""
        while self._tasks:
            await asyncio.wait(tuple(self._tasks))

    def _end(self, flight: Flight) -> None:
        loop = asyncio.get_running_loop()
        remember = self.looking > 0 and flight.landed.result() is not None
        if self._renewals.get(flight.lease_name) is flight:
            del self._renewals[flight.lease_name]
            if remember:
                self._landed[flight.lease_name] = flight, loop.time()
        for name in flight.names:
            if self._by_name.get(name) is flight:
                del self._by_name[name]
                if remember:
                    self._landed[name] = flight, loop.time()
        if remember:
            loop.call_later(self._remembered, self._forget, flight)

    def _forget(self, flight: Flight) -> None:
        for name in (*flight.names, flight.lease_name):
            if self._landed.get(name, (None, 0.0))[0] is flight:
                del self._landed[name]

    async def _fly(
        self,
        flight: Flight,
        app: "asyncio.Task[None]",
        read: Callable[[AppReply], Awaitable[FlightResult | None]],
        write: Callable[[FlightResult], Awaitable[None]],
    ) -> None:
        try:
            reply = await flight.call.reply
            landing = await read(reply) if reply is not None else None
            flight.resolve(landing)
            if landing is not None:
                await write(landing)
        except BaseException:
            app.cancel()
            raise
        finally:
            flight.resolve(None)
            self._end(flight)
        # What the app does after its answer belongs to it; its errors are the request's to raise.
        await asyncio.wait({app})
        if not app.cancelled():
            app.exception()
