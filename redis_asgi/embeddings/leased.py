"""Commands over one connection of a pool, without the layers of redis-py's client above it.

Packing 66 keys in Python, a timer per command and the client's retries take a third of a lookup's time. A lookup
has its deadline and fails open, so it needs none of them.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import ResponseError

Command = tuple[bytes | str | int, ...]


async def run(pool: ConnectionPool, commands: Sequence[Command], within: float) -> list[Any]:
    """Send *commands* together and read their replies, undecoded; an error reply is a value among them.

    Whatever ends it early, a cancellation or the deadline of *within* seconds, drops the connection, so that nobody
    else reads what was meant for us.

    Raises:
        Exception: What redis-py does when there is no connection or no reply; `TimeoutError` at the deadline.
    """
    connection: AbstractConnection | None = None
    try:
        async with asyncio.timeout(within):
            connection = await pool.get_connection()  # type: ignore[no-untyped-call]  # a decorator of redis-py's
            return await _run(connection, commands)
    finally:
        # Out of the deadline's reach: a release that is cut short would lose the connection.
        if connection is not None:
            await pool.release(connection)


async def _run(connection: AbstractConnection, commands: Sequence[Command]) -> list[Any]:
    # Ours is the only clock: no task and no timer per command.
    timeout, connection.socket_timeout = connection.socket_timeout, None
    try:
        await connection.send_packed_command([hiredis.pack_command(command) for command in commands])  # type: ignore[arg-type]  # theirs is a tuple of one
        return [await _reply(connection) for _ in commands]
    finally:
        connection.socket_timeout = timeout


async def _reply(connection: AbstractConnection) -> Any:
    try:
        return await connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return error
