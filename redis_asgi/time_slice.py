"""Letting other requests in while a large batch is worked on."""

import asyncio
from time import perf_counter

_TURN = 0.002  # seconds of work between two looks at the loop


class TimeSlice:
    """Says when the loop has been kept for long enough:
    ``if time_slice.expired: await time_slice.checkpoint()``.

    One for all that a request does, as several small pieces of work make a long one.
    """

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start to count, as the loop has just run for others."""
        self._until = perf_counter() + _TURN

    @property
    def expired(self) -> bool:
        """Whether others should get a turn now."""
        return perf_counter() >= self._until

    async def checkpoint(self) -> None:
        """Let the loop run what waits."""
        await asyncio.sleep(0)
        self.restart()
