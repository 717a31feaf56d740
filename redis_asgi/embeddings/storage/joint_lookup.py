"""One trip for the small lookups that begin together: in one turn of the loop,
so that none waits for another.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from ...connection import side_connection
from ...errors import Failure

Values = list[bytes | None]

_MOST_OF_ONE = 16  # keys of a lookup that goes with others; a larger one's reply is long
_MOST = 64  # keys of a trip


class _Trip:
    """A trip that lookups share: keys, each once, and the lookups that wait for them."""

    def __init__(self, within: float) -> None:
        self.within = within
        self.places: dict[bytes, int] = {}
        self.waiting: list[tuple[asyncio.Future[Values | Failure], Sequence[bytes]]] = []

    def resolve(self, reply: Values | Failure) -> None:
        for future, names in self.waiting:
            if not future.done():  # cancelled
                future.set_result(reply if isinstance(reply, Failure) else [reply[self.places[name]] for name in names])


class JointLookups:
    """The lookups of one store.

    Args:
        look_up: Asks the server for the values of keys, within so many seconds.
    """

    def __init__(self, look_up: Callable[[Sequence[bytes], float], Awaitable[Values | Failure]]) -> None:
        self._look_up = look_up
        self._trip: _Trip | None = None  # which leaves at the loop's next turn
        self._tasks: dict[asyncio.Task[None], _Trip] = {}

    async def look_up(self, names: Sequence[bytes], within: float) -> Values | Failure:
        """The values of *names*; in one trip with those that others ask for in this turn of the
        loop.

        A cancelled lookup takes nothing from the others: what has left goes on until its deadline.
        """
        if len(names) > _MOST_OF_ONE:
            return await self._look_up(names, within)
        trip = self._trip
        loop = asyncio.get_running_loop()
        if trip is None or trip.within != within or len(trip.places) + len(names) > _MOST:
            trip = self._trip = _Trip(within)
            task = loop.create_task(self._leave(trip))
            self._tasks[task] = trip
            task.add_done_callback(self._ended)
        places = trip.places
        for name in names:
            places.setdefault(name, len(places))
        future: asyncio.Future[Values | Failure] = loop.create_future()
        trip.waiting.append((future, names))
        return await future

    async def aclose(self) -> None:
        """End what is under way."""
        await side_connection.end(self._tasks)

    async def _leave(self, trip: _Trip) -> None:
        if self._trip is trip:
            self._trip = None
        if not all(future.done() for future, _ in trip.waiting):
            trip.resolve(await self._look_up(list(trip.places), trip.within))

    def _ended(self, task: asyncio.Task[None]) -> None:
        trip = self._tasks.pop(task)
        # Here and not in `_leave`: a task that is cancelled before its first step runs none of its
        # own lines.
        if self._trip is trip:
            self._trip = None
        trip.resolve(Failure.CONNECTION)  # only where `_leave` did not: the store was closed
