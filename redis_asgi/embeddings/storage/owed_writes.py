"""Writes that did not reach Redis, and are made as soon as it answers again."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

from ...connection import side_connection
from ...errors import Failure
from .pipeline import Command

_MOST = 10_000
_AT_ONCE = 64
_EVERY = 0.5  # seconds between two attempts, which cost nothing while the breaker is open
_SLOWLY = 30.0  # after an answer that will be the same again
_REFUSED = frozenset((Failure.AUTH, Failure.PERMISSION, Failure.REPLY))

Sent = tuple[Sequence[Command], Failure | None]


class Owed:
    """Commands about one key each, the latest of each key, that are sent until they are answered.

    At most 10,000 wait, the oldest go first, and all with the process.
    One task repeats them while there are any.

    Args:
        tell: Sends some, and says which of them failed, and why the first did.
    """

    def __init__(self, tell: Callable[[Sequence[Command]], Awaitable[Sent]]) -> None:
        self._tell = tell
        self._commands: OrderedDict[object, Command] = OrderedDict()
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._commands)

    def add(self, commands: Sequence[Command]) -> None:
        """Send *commands* when that is possible again."""
        for command in commands:
            self._commands[command[1]] = command
            self._commands.move_to_end(command[1])
        while len(self._commands) > _MOST:
            self._commands.popitem(last=False)
        if self._commands and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._repeat())

    async def aclose(self) -> None:
        """Give up."""
        if self._task is not None:
            await side_connection.end([self._task])

    async def _repeat(self) -> None:
        failure: Failure | None = None
        try:
            while self._commands:
                await asyncio.sleep(_SLOWLY if failure in _REFUSED else _EVERY)
                failure = await self._sweep()
        finally:
            self._task = None

    async def _sweep(self) -> Failure | None:
        """Try all once: on a cluster those of one node may fail, and not those behind them."""
        commands = list(self._commands.values())
        worst: Failure | None = None
        for start in range(0, len(commands), _AT_ONCE):
            some = commands[start : start + _AT_ONCE]
            failed, failure = await self._tell(some)
            worst = worst or failure
            left = set(map(id, failed))
            for command in some:
                # A later one of the same key is still owed.
                if id(command) not in left and self._commands.get(command[1]) is command:
                    del self._commands[command[1]]
            await asyncio.sleep(0)  # an open breaker answers at once
        return worst
