"""The clock that limits go by, held still and moved by hand: on ``memory://``, and on a real Redis.

Redis's scripts are given the time instead of asking for it. Their keys stay ten minutes longer than
they count, since Redis itself still lets them expire in real time, and those of the clients that
were counted are removed at the end.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any, cast

import redis.asyncio as aioredis
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection

from ..connection import side_connection
from ..connection.client_factory import Client
from ..connection.manager import RedisManager
from ..ratelimit.counting.engine import Engine
from ..ratelimit.counting.local_engine import LocalEngine
from ..ratelimit.limits.charge import Charges
from ..ratelimit.limits.clock import CLOCK
from ..ratelimit.limits.policy import MICROSECONDS, log_key
from ..ratelimit.limits.refusal_memory import RefusalMemory
from .replaced import replaced

_REMOVED_WITHIN = 2.0  # seconds
_MOST = 10**9  # seconds; scripts reckon with whole microseconds below 2^53
# Seconds from one look at the clock to the next: a second that has passed is never,
# by rounding, a bit less than one.
_LOOK = 1e-7


class RateLimitClock:
    """The time of every limit of this process, which stands still until it is moved.

    It begins at the time of day. Only limits go by it: deadlines of requests to Redis, the life of
    vectors in the cache and other processes on the same Redis go by the real one. So do the ten
    seconds after which Redis is told again what is in flight: of what was before 30 s of this clock
    it knows nothing until then.
    """

    def __init__(self) -> None:
        self._began = time.time_ns() // 1000
        self._began_here = time.monotonic_ns() // 1000
        self._passed = 0
        self._looks = count()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(now={self.now!r})"

    @property
    def now(self) -> float:
        """Seconds since 1970, as `time.time`."""
        return (self._began + self._passed) / MICROSECONDS

    def advance(self, seconds: float) -> None:
        """Let *seconds* pass, 0 to 10^9; a fraction is kept to the microsecond.

        Raises:
            ValueError: If *seconds* is no such number.
        """
        if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds <= _MOST:
            raise ValueError(f"seconds={seconds!r} is not a number of seconds to let pass. Try 61.")
        self._passed += round(seconds * MICROSECONDS)
        CLOCK.redis = self._began + self._passed

    def _hold(self) -> None:
        CLOCK.monotonic_ns = lambda: (self._began_here + self._passed) * 1000
        CLOCK.monotonic = lambda: (self._began_here + self._passed) / MICROSECONDS + next(self._looks) * _LOOK
        CLOCK.unix = lambda: self.now
        CLOCK.redis = self._began


class _Counted:
    """The partitions that were asked about, with their keys; forgotten in the end."""

    def __init__(self) -> None:
        self._keys: dict[RedisManager, dict[bytes, set[bytes]]] = {}

    def noting(self, ask: Callable[..., Any]) -> Callable[..., Any]:
        """`Engine.ask` that notes what it is asked."""

        def noted(engine: Engine, charges: Charges, *args: Any, **kwargs: Any) -> Any:
            of_manager = self._keys.setdefault(engine.manager, {})
            for charge in charges:
                key = charge.partition.key
                of_manager.setdefault(key, {key}).update(log_key(key, field) for field in charge.policies.logs)
            return ask(engine, charges, *args, **kwargs)

        return noted

    def forget(self) -> None:
        """Forget them, here and in Redis: their times may be later than the real one."""
        for manager, partitions in self._keys.items():
            engine, refusals = (
                manager.per_process(LocalEngine.from_settings),
                manager.per_process(RefusalMemory.from_settings),
            )
            for key in partitions:
                engine.forget(key)
                refusals.forget(key, CLOCK.monotonic())
        in_redis = {manager: partitions for manager, partitions in self._keys.items() if manager.has_redis}
        if in_redis:
            # A loop of its own, which cannot run in a thread that has one running.
            thread = threading.Thread(target=lambda: asyncio.run(_remove(in_redis)))
            thread.start()
            thread.join()


async def _remove(partitions: dict[RedisManager, dict[bytes, set[bytes]]]) -> None:
    removals = (_remove_from(manager, list(keys.values())) for manager, keys in partitions.items())
    # A server may have ended with the test; keys that cannot be removed expire.
    with suppress(TimeoutError):
        async with asyncio.timeout(_REMOVED_WITHIN):
            await asyncio.gather(*removals, return_exceptions=True)


async def _remove_from(manager: RedisManager, groups: list[set[bytes]]) -> None:
    client = await manager.get_connection()
    for keys in groups:
        if manager.owns_client:
            await client.execute_command("UNLINK", *keys)
            continue
        # The connections of a user's client belong to another loop.
        connection = _make_connection(client, next(iter(keys)))
        await side_connection.connect(connection)
        try:
            await side_connection.send(connection, (b"UNLINK", *keys))
            await side_connection.receive(connection)
        finally:
            await side_connection.hang_up(connection)


def _make_connection(client: Client, key: bytes) -> AbstractConnection:
    if isinstance(client, aioredis.RedisCluster):
        node = cast("ClusterNode", client.get_node_from_key(key.decode()))
        return node.connection_class(**node.connection_kwargs)
    return client.connection_pool.make_connection()  # type: ignore[no-untyped-call,no-any-return]  # redis-py's


_held: RateLimitClock | None = None


def current_clock() -> RateLimitClock | None:
    """The clock that is held; ``None`` when limits go by the real one."""
    return _held


@contextmanager
def held_clock() -> Iterator[RateLimitClock]:
    """Hold the clock of all limits of this process;
    what was counted meanwhile is forgotten, in Redis too.

    Raises:
        RuntimeError: If it is held already.
    """
    global _held  # noqa: PLW0603 - there is one clock in a process
    if _held is not None:
        raise RuntimeError("The clock of the limits is held already. Use the one that is there: rate_limit_clock.")
    clock, counted = RateLimitClock(), _Counted()
    with replaced(Engine, "ask", counted.noting):
        _held = clock
        clock._hold()
        try:
            yield clock
        finally:
            CLOCK.let_go()
            _held = None
            counted.forget()
