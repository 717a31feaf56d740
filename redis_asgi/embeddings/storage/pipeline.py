"""Commands over one connection of a pool, without the layers of redis-py above its socket.

Packing 66 keys in Python, a stream that copies what it reads, a timer per command and the client's
retries take half of a lookup's time. A lookup has its deadline and fails open, so it needs none of
them.
"""

import asyncio
from collections.abc import Sequence
from types import NoneType
from typing import Any

import hiredis
import numpy as np
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import AskError, MaxConnectionsError, RedisError, TryAgainError

from ...connection import side_connection
from ...connection.client_factory import QueueingPool
from ...connection.cluster_nodes import node_connection
from ...connection.direct import Takeover, exchange, untimed
from ...errors import OddReply

Command = tuple[bytes | str | int, ...]

# Read from the socket at most in one go, and for each word of a command:
# memory that is fresh costs more than it holds.
_READ_BYTES = 256 * 1024
_READ_BYTES_PER_WORD = 8 * 1024
_BEGINNING = 64  # bytes of a chunk that say how long a reply is to be

_VALUES = frozenset((bytes, NoneType))


def checked(commands: Sequence[Command], replies: list[Any]) -> list[Any]:
    """*replies*, if each is one that its command can have; the only place that looks.

    Raises:
        OddReply: For any other. An error reply fits every command, and every value of an ``MGET``:
            a proxy answers so for a key whose server it cannot reach.
    """
    for command, reply in zip(commands, replies, strict=True):
        if not _fits(command, reply):
            raise OddReply(f"{command[0]!r} was answered by {type(reply).__name__}")
    return replies


def _fits(command: Command, reply: Any) -> bool:
    if isinstance(reply, Exception):
        return True
    match command[0]:
        case "MGET":
            return isinstance(reply, list) and len(reply) == len(command) - 1 and _are_values(reply)
        case "GET":
            return type(reply) in _VALUES
        case "SET":
            # True: redis-py's word for it, after it has followed a slot to another node.
            return reply in (b"OK", True) or (reply is None and command[-1] == "NX")
        case "DEL" | "EXPIRE":
            return isinstance(reply, int)
    return True


def _are_values(found: list[Any]) -> bool:
    return _VALUES.issuperset(map(type, found)) or all(
        type(value) in _VALUES or isinstance(value, Exception) for value in found
    )


async def execute(pool: ConnectionPool, commands: Sequence[Command], within: float) -> list[Any]:
    """Send *commands* together and read their replies, undecoded;
    an error reply is a value among them.

    Whatever ends it early, a cancellation, the deadline of *within* seconds or a reply of another
    shape, drops the connection, so that no other caller reads what was meant for us.

    Raises:
        Exception: What redis-py does when there is no connection or no reply, none left in the pool
            among it; `TimeoutError` at the deadline; `OddReply`.
    """
    connection: AbstractConnection | None = None
    try:
        async with asyncio.timeout(within) as clock:
            ours = isinstance(pool, QueueingPool)
            connection = await (pool.take() if ours else pool.get_connection())  # type: ignore[no-untyped-call, attr-defined]  # a decorator of redis-py's
            _see_to_be_in_time(clock)
            packed = [hiredis.pack_command(command) for command in commands]  # type: ignore[arg-type]  # theirs is a tuple of one
            transport = side_connection.transport_of(connection) if isinstance(pool, QueueingPool) else None
            if transport is not None:
                size = min(_READ_BYTES, _READ_BYTES_PER_WORD * sum(map(len, commands)))
                return await _straight(connection, transport, commands, packed, size)
            if not isinstance(pool, QueueingPool):
                await side_connection.freshen(connection)  # a user's pool may not have looked
            return await _through_redis_py(connection, commands, packed)
    except TimeoutError:
        if connection is None and isinstance(pool, QueueingPool) and pool.exhausted:
            # Our own load, and nothing about the server.
            raise MaxConnectionsError(f"No free connection within {within} s") from None
        raise
    finally:
        # Out of the deadline's reach: a release that is cut short would lose the connection.
        if connection is not None:
            await pool.release(connection)


def _see_to_be_in_time(clock: asyncio.Timeout) -> None:
    # A connection that is made in the moment of the deadline swallows it, and there is no other
    # clock.
    until = clock.when()
    if until is not None and asyncio.get_running_loop().time() >= until:
        raise TimeoutError


async def run_on_node(
    cluster: RedisCluster, node: str, commands: Sequence[Command], clock: asyncio.Timeout
) -> list[Any]:
    """`execute` on one node of a cluster, by its name;
    what has moved to another one is asked for there.

    Args:
        clock: The deadline that the caller has set.
    """
    async with node_connection(cluster, node) as connection:
        _see_to_be_in_time(clock)
        packed = [hiredis.pack_command(command) for command in commands]  # type: ignore[arg-type]  # theirs is a tuple of one
        # Here, where a reply that is none drops the connection.
        replies = checked(commands, await exchange(connection, packed))
    for at, reply in enumerate(replies):
        if isinstance(reply, AskError | TryAgainError):  # a MovedError is an AskError
            try:
                # A client of the user's may decode its replies, and a vector is no text.
                replies[at] = await cluster.execute_command(*commands[at], NEVER_DECODE=[])
            except RedisError as error:
                replies[at] = error
    return checked(commands, replies)


async def _straight(
    connection: AbstractConnection,
    transport: asyncio.Transport,
    commands: Sequence[Command],
    packed: Sequence[bytes],
    size: int,
) -> list[Any]:
    replies = _Replies(transport, len(packed), size)
    try:
        transport.write(b"".join(packed))
        return checked(commands, await replies.all)
    except BaseException:
        replies.give_back()
        await side_connection.hang_up(connection)
        raise


class _Replies(Takeover, asyncio.BufferedProtocol):
    """The protocol of a connection of our own pools until all replies have come."""

    def __init__(self, transport: asyncio.Transport, count: int, size: int) -> None:
        super().__init__(transport)
        self.all: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._count = count
        self._come: list[Any] = []
        # Not a bytearray: that one is filled with zeros first.
        self._buffer = np.empty(size, np.uint8).data

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self.all.done():
            return  # cancelled: the connection is about to be dropped
        try:
            if not self.replies.has_data():
                side_connection.refuse_too_much(bytes(self._buffer[: min(nbytes, _BEGINNING)]))
            self.replies.feed(self._buffer, 0, nbytes)  # type: ignore[arg-type]  # it takes any buffer
            while (reply := self.replies.gets()) is not False:
                self._come.append(reply)
        except Exception as error:
            self.all.set_exception(error)  # no Redis at the other end
            return
        if len(self._come) < self._count:
            return
        if len(self._come) > self._count or self.replies.has_data():
            self.all.set_exception(ConnectionError("more replies than commands"))
            return
        # At once: whatever comes now belongs to no command,
        # and redis-py's stream will show that to the pool.
        self.give_back()
        self.all.set_result(self._come)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if not self.all.done():
            self.all.set_exception(exc if exc is not None else ConnectionError("closed by the server"))


async def _through_redis_py(
    connection: AbstractConnection, commands: Sequence[Command], packed: Sequence[bytes]
) -> list[Any]:
    try:
        with untimed(connection):
            return checked(commands, await exchange(connection, packed))
    except BaseException:
        await side_connection.hang_up(connection)
        raise
