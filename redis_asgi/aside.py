"""A connection aside from any pool: who looks at a server takes none that a request would need, and leaves none.

redis-py ends a TLS connection by a goodbye whose answer it awaits for up to 30 s, in the background: with a server that
hangs, one socket for each question. Here a connection is dropped at once, whatever state it is in.
"""

import inspect
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff


async def connect(connection: AbstractConnection) -> None:
    """Connect and log in, without trying again; a failure leaves no socket.

    Raises:
        Exception: What redis-py does; or a cancellation.
    """
    transports: list[Any] = []
    greet = connection.redis_connect_func

    async def greet_noted(it: AbstractConnection) -> None:
        # redis-py forgets the transport when the greeting fails.
        transports.append(_transport(it))
        if greet is None:
            await it.on_connect()
        elif inspect.iscoroutinefunction(greet):
            await greet(it)
        else:
            greet(it)

    connection.retry = Retry(NoBackoff(), 0)
    connection.redis_connect_func = greet_noted  # type: ignore[assignment]  # any coroutine function will do
    try:
        await connection.connect()  # type: ignore[no-untyped-call]  # redis-py's
    except BaseException:
        for transport in transports:
            _abort(transport)
        await hang_up(connection)
        raise
    finally:
        connection.redis_connect_func = greet


async def send(connection: AbstractConnection, *commands: tuple[bytes, ...]) -> None:
    """Send *commands* in one write."""
    await connection.send_packed_command(connection.pack_commands(commands), check_health=False)


async def receive(connection: AbstractConnection) -> Any:
    """The next reply, undecoded.

    Raises:
        Exception: What redis-py does, error replies included; `hang_up` is left to the caller.
    """
    return await connection.read_response(disable_decoding=True, disconnect_on_error=False)


async def hang_up(connection: AbstractConnection) -> None:
    """Close at once: a peer that hangs is not waited for, neither for its goodbye nor for what it never read."""
    _abort(_transport(connection))
    with suppress(Exception):
        await connection.disconnect(nowait=True)


def info_fields(reply: object) -> Iterator[tuple[str, str]]:
    """The ``name:value`` lines of a reply to INFO, or to CLUSTER INFO; none of anything else."""
    text = reply.decode(errors="replace") if isinstance(reply, bytes) else reply if isinstance(reply, str) else ""
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            yield name, value


def _transport(connection: AbstractConnection) -> Any:
    return getattr(getattr(connection, "_writer", None), "transport", None)


def _abort(transport: Any) -> None:
    if transport is not None:
        with suppress(Exception):
            transport.abort()
