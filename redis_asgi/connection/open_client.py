"""A manager's client in one event loop with all that hangs on it, and the forks of this process."""

import functools
import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import redis.asyncio as aioredis
from redis.exceptions import RedisError

from ..telemetry import discard_counts
from .breaker import Breaker
from .client_factory import Client


class Part(Protocol):
    """Something that lives beside an open client, in its loop, and ends before it."""

    async def aclose(self) -> None: ...


@runtime_checkable
class Clearable(Protocol):
    """Something that remembers what happened in this process, and can forget it."""

    def clear(self) -> None: ...


@dataclass(eq=False, slots=True)
class Opened:
    """A client in one event loop, with all that hangs on it."""

    client: Client
    own: bool  # whether it is ours to close
    sentinels: tuple[aioredis.Redis, ...] = ()
    parts: dict[object, Part] = field(default_factory=dict)
    breakers: dict[str, Breaker] = field(default_factory=dict)
    until_loop_ends: AsyncGenerator[None, None] | None = None
    users: int = 0

    def used_breakers(self) -> Iterator[Breaker]:
        """The breakers of servers that commands go to;
        a node may have left its cluster, or be a replica now.
        """
        for name, breaker in self.breakers.items():
            if isinstance(self.client, aioredis.RedisCluster) and name:
                node = self.client.get_node(node_name=name)
                if node is None or node.server_type != "primary":
                    continue
            yield breaker

    async def aclose(self) -> None:
        """Close it all, also where that is cancelled; a peer that is gone is no error."""
        parts, self.parts = list(self.parts.values()), {}
        async with AsyncExitStack() as ends:  # from the last on
            ends.push_async_callback(self._close_client)
            for each in (*self.breakers.values(), *parts):
                ends.push_async_callback(each.aclose)

    async def _close_client(self) -> None:
        if not self.own:
            return
        # A peer that is gone cannot be told goodbye; the sockets are closed all the same.
        with suppress(RedisError, OSError):
            await self.client.aclose()
        if isinstance(self.client, aioredis.Redis):
            with suppress(RedisError, OSError):
                await self.client.connection_pool.disconnect()
        for sentinel in self.sentinels:
            with suppress(RedisError, OSError):
                await sentinel.aclose()


class Process:
    """This process; what is asked of it for every request is an attribute, not a call.

    Attributes:
        forks: How often it was forked off since the first manager was made:
            other sockets for each number.
    """

    forks = 0


PROCESS = Process()


def _note_fork() -> None:
    PROCESS.forks += 1
    discard_counts()


@functools.lru_cache(maxsize=1)
def watch_forks() -> None:
    """Count forks from now on."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_note_fork)
