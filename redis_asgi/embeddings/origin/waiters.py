"""The flights one request waits for, and its disconnect watcher."""

import asyncio

from starlette.types import Receive

from .single_flight import Flight


class Waiting:
    """The flights of one request: it leaves them all when its answer is out, or when its client has
    gone.

    Attributes:
        gone: Whether the client has; the answer then goes nowhere, as it would without us.
    """

    def __init__(self) -> None:
        self.gone = False
        self._flights: set[Flight] = set()
        self._watcher: asyncio.Task[None] | None = None

    def wait_for(self, flight: Flight) -> None:
        """Wait for *flight*, too."""
        flight.join(self)
        self._flights.add(flight)

    def watch(self, receive: Receive) -> None:
        """From here on look for the client's disconnect."""
        self._watcher = asyncio.get_running_loop().create_task(self._watch(receive))

    async def stop_watching(self) -> None:
        """Leave the client's next message to the app."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait({self._watcher})
            self._watcher = None

    def end(self, *, cancelled: bool) -> None:
        """Wait no more; *cancelled*: the request was."""
        if self._watcher is not None:
            self._watcher.cancel()
        self._leave(cancelled=cancelled)

    def _leave(self, *, cancelled: bool) -> None:
        flights, self._flights = self._flights, set()
        for flight in flights:
            flight.leave(self, cancelled=cancelled)

    async def _watch(self, receive: Receive) -> None:
        try:
            message = await receive()
        except Exception:
            # A server that cannot tell tells the app's next reader,
            # if there is one; the answer is still due.
            return
        if message["type"] == "http.disconnect":
            self.gone = True
            self._leave(cancelled=False)
