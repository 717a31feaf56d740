"""What the server behind a client says of itself (``INFO``), asked over a connection of its own.

The connection is none of the pool's: a pool that is exhausted or hangs is what one looks at the figures for, and a
question that hangs holds nothing that a request would need. It lives for one question, of which there is at most one
a second.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import redis.asyncio as aioredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ResponseError

from . import aside
from .client import Client
from .connection import RedisManager
from .errors import Failure, classify
from .telemetry import telemetry

DEADLINE = 0.5  # seconds, for connecting and every reply
_GRACE = 0.05  # seconds after it in which a question ends
_KEPT = 1.0  # seconds that a reading is the answer


@dataclass(frozen=True, slots=True)
class Reading:
    """What was learnt at one time.

    Attributes:
        failure: Why Redis did not answer; ``None`` when it did, also if it refuses ``INFO``.
        servers: The fields of ``INFO``, a mapping for every primary; empty when one of them said nothing.
    """

    failure: Failure | None = None
    servers: tuple[Mapping[str, str], ...] = ()

    def number(self, name: str, combine: Callable[[Iterable[float]], float] = sum) -> float | None:
        """A field of all primaries as one number; ``None`` when it is unknown of any of them.

        Args:
            combine: How those of several primaries become one.
        """
        found = []
        for server in self.servers:
            try:
                found.append(float(server[name]))
            except (KeyError, ValueError):
                return None
        return combine(found) if found else None

    def count(self, name: str) -> int | None:
        """A field of all primaries, summed, as a whole number; ``None`` when it is unknown of any of them."""
        number = self.number(name)
        return None if number is None else int(number)

    @property
    def server(self) -> str:
        """Name and version of the server, such as ``redis 7.0.15``; ``unknown`` when it does not say."""
        said = self.servers[0] if self.servers else {}
        for field in ("valkey_version", "dragonfly_version", "redis_version"):
            if field in said:
                return f"{field.removesuffix('_version')} {said[field]}"
        return "unknown"


async def read_server(client: Client, *, deadline: float = DEADLINE) -> Reading:
    """Ask every primary behind *client*, within *deadline* seconds; never raises but for a cancellation.

    All of them or none: sums over some would look to Prometheus like counters that were reset.
    """
    began = time.monotonic()
    try:
        async with asyncio.timeout(deadline):
            servers = await _ask_all(client)
        reading = Reading(None, servers if all(servers) else ())
    except Exception as error:
        # A client of the user's may be in any state; whatever it raises, there is no answer.
        reading = Reading(classify(error))
    counted = telemetry()
    counted.redis_commands.labels("info", reading.failure or "ok").inc()
    counted.redis_command_duration.labels("info").observe(time.monotonic() - began)
    return reading


async def _ask_all(client: Client) -> tuple[Mapping[str, str], ...]:
    if not isinstance(client, aioredis.RedisCluster):
        return (await _ask(client.connection_pool.make_connection),)
    await client.initialize()
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_ask(partial(node.connection_class, **node.connection_kwargs)))
                for node in client.get_primaries()
            ]
    except ExceptionGroup as errors:
        # A primary may have handed its slots on, which the next reading should know.
        with suppress(Exception):
            await client.nodes_manager.initialize()
        raise errors.exceptions[0] from None
    return tuple(task.result() for task in tasks)


async def _ask(connect: Callable[[], AbstractConnection]) -> Mapping[str, str]:
    """The fields of ``INFO``; none when it is refused by a server that answers a PING."""
    connection = connect()
    try:
        await aside.connect(connection)
        await aside.send(connection, (b"PING",), (b"INFO",))
        await aside.receive(connection)
        try:
            return dict(aside.info_fields(await aside.receive(connection)))
        except ResponseError:
            return {}
    finally:
        await aside.hang_up(connection)


class ServerWatch:
    """The readings of one open client: one in flight, and its result for a second, whoever asks."""

    def __init__(self, _manager: RedisManager, client: Client) -> None:
        self._client = client
        self._last: Reading | None = None
        self._last_at = 0.0
        self._flight: asyncio.Task[Reading] | None = None

    async def read(self) -> Reading:
        """A reading no older than a second, within `DEADLINE`."""
        if self._last is not None and time.monotonic() - self._last_at < _KEPT:
            return self._last
        if self._flight is None:
            self._flight = asyncio.create_task(self._fly())
        # Waited for, not awaited: who goes away must not take it along.
        done, _ = await asyncio.wait({self._flight}, timeout=DEADLINE + _GRACE)
        return next((task.result() for task in done if not task.cancelled()), Reading(Failure.TIMEOUT))

    async def _fly(self) -> Reading:
        try:
            self._last = await read_server(self._client)
            self._last_at = time.monotonic()
            return self._last
        finally:
            self._flight = None

    async def aclose(self) -> None:
        if self._flight is not None:
            self._flight.cancel()
            await asyncio.wait({self._flight})


async def watched(manager: RedisManager) -> Reading:
    """What the Redis of *manager* says, shared by everybody in this event loop who asks within a second.

    On ``memory://`` there is nobody to ask, and no failure either.
    """
    if not manager.has_redis:
        return Reading()
    try:
        watch = manager.part(ServerWatch)
    except Exception as error:
        # No client can be built, such as for a host without an address: the limits go on without, too.
        return Reading(classify(error))
    return await watch.read()
