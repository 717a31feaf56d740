"""Commands over one connection without redis-py's layers above its socket:
instead of its stream, or through it.

redis-py connects, logs in, and finds the master. `Takeover` is what its socket reports to from then
on, for as long as we have it; `exchange` goes through the stream for connections that are not
redis-py's own kind, with neither a task nor a timer per command. Either way the caller has the only
clock.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ResponseError

from . import side_connection


class Takeover(asyncio.BaseProtocol):
    """The protocol of a connection's socket while we have it;
    redis-py's stream learns only that it was lost.

    Args:
        transport: Of the connection, see `side_connection.transport_of`.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.replies = hiredis.Reader()
        self._theirs = transport.get_protocol()
        transport.set_protocol(self)

    def give_back(self) -> None:
        """Let redis-py's stream have the socket again; nothing may be under way."""
        self.transport.set_protocol(self._theirs)

    def connection_lost(self, exc: Exception | None) -> None:
        self._theirs.connection_lost(exc)


@contextmanager
def untimed(connection: AbstractConnection) -> Iterator[None]:
    """Let *connection* wait for replies as long as its caller does."""
    timeout, connection.socket_timeout = connection.socket_timeout, None
    try:
        yield
    finally:
        connection.socket_timeout = timeout


async def exchange(connection: AbstractConnection, packed: Sequence[bytes]) -> list[Any]:
    """The replies to commands that are written at once, undecoded; error replies are among them.

    Raises:
        Exception: What redis-py does when there is no reply; `hang_up` is left to the caller.
    """
    side_connection.see_it_open(connection)
    await connection.send_packed_command(packed)
    return [await _reply(connection) for _ in packed]


async def _reply(connection: AbstractConnection) -> Any:
    try:
        return await connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return error
