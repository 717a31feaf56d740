"""A connection aside from any pool:
who looks at a server takes none that a request would need, and leaves none.

redis-py ends a TLS connection by a goodbye whose answer it awaits for up to 30 s, in the
background: with a server that hangs, one socket for each question. Here a connection is dropped at
once, whatever state it is in; `hang_up` does so with a pool's, too, and `freshen` sees to it that
nothing is left in it.
"""

import asyncio
import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, InvalidResponse  # noqa: A004 - redis-py's, which `classify` knows

from ..errors import OddReply

_CANCEL_AGAIN = 0.05  # seconds
_TOO_MUCH = re.compile(rb"(?:[*~>%|]\d{1,7}\r\n)*[*~>%|]\d{8}")  # arrays and what RESP3 has like them, nested or not


async def connect(connection: AbstractConnection) -> None:
    """Connect and log in, without trying again; a failure leaves no socket.

    Raises:
        Exception: What redis-py does; or a cancellation.
    """
    transports: list[asyncio.Transport | None] = []
    greet = connection.redis_connect_func

    async def greet_noted(it: AbstractConnection) -> None:
        # redis-py forgets the transport when the greeting fails.
        transports.append(transport_of(it))
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


def see_it_open(connection: AbstractConnection) -> None:
    """Refuse to write to a connection that was lost:
    Python 3.13's transports raise an `AttributeError` then.

    Raises:
        redis.exceptions.ConnectionError: It was.
    """
    transport = transport_of(connection)
    if transport is not None and transport.is_closing():
        raise ConnectionError("The connection was lost.")


async def send(connection: AbstractConnection, *commands: tuple[bytes, ...]) -> None:
    """Send *commands* in one write."""
    see_it_open(connection)
    await connection.send_packed_command(connection.pack_commands(commands), check_health=False)


async def receive(connection: AbstractConnection) -> Any:
    """The next reply, undecoded.

    Raises:
        Exception: What redis-py does, error replies included; `hang_up` is left to the caller.
    """
    return await connection.read_response(disable_decoding=True, disconnect_on_error=False)


def refuse_too_much(beginning: bytes) -> None:
    """Refuse a reply of more elements than any command asks for, which begins so.

    hiredis makes room at once for what is announced, and Python's garbage collector walks through
    it again and again: two thousand million elements that never come held a process up for a
    minute.

    Raises:
        InvalidResponse: It announces ten million or more.
    """
    if _TOO_MUCH.match(beginning):
        raise InvalidResponse("The reply announces too much.")


async def ping(connection: AbstractConnection, *more: tuple[bytes, ...]) -> None:
    """PING, with *more* in the same write, whose replies are left to the caller.

    Raises:
        OddReply: When what comes is no answer to a PING.
        Exception: As of `receive`.
    """
    await send(connection, (b"PING",), *more)
    said = await receive(connection)
    if said != b"PONG":
        raise OddReply(f"PING was answered by {type(said).__name__}")


async def freshen(connection: AbstractConnection) -> None:
    """Make a pooled connection fit for the next command: connected, and with nothing left to read.

    What waits there belongs to no command, and would be taken for the answer to the next one, so
    the connection is dropped. redis-py leaves that look out when maintenance notifications are on,
    as they are by default.

    Raises:
        Exception: What redis-py does when it cannot connect.
    """
    transport = transport_of(connection)
    # One that was reset while it was idle would be noticed by the next command only.
    reset = transport is not None and transport.is_closing()
    if connection.is_connected and (reset or await connection.can_read()):
        await hang_up(connection)
    if not connection.is_connected:
        await connection.connect()  # type: ignore[no-untyped-call]  # redis-py's


async def hang_up(connection: AbstractConnection) -> None:
    """Close at once: a peer that hangs is not waited for,
    neither for its goodbye nor for what it never read.
    """
    _abort(transport_of(connection))
    with suppress(Exception):
        await connection.disconnect(nowait=True)


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel *tasks* and wait until they have ended, with whatever they raise:
    who ends them does not ask for it.

    Again and again: asyncio's ``open_connection`` swallows a cancellation that comes in the moment
    in which the connection is made, and who connects in a loop would go on for ever.
    """
    ending = list(tasks)
    left = {task for task in ending if not task.done()}
    cancelled: asyncio.CancelledError | None = None
    while left:
        for task in left:
            task.cancel()
        try:
            _, left = await asyncio.wait(left, timeout=_CANCEL_AGAIN)
        except asyncio.CancelledError as error:
            # Who ends us has to wait, too: no other task would cancel them again.
            cancelled = error
            left = {task for task in left if not task.done()}
    for task in ending:
        if not task.cancelled():
            task.exception()  # asyncio would else log what one raised that had ended in this very moment
    if cancelled is not None:
        raise cancelled


def info_fields(reply: object) -> Iterator[tuple[str, str]]:
    """The ``name:value`` lines of a reply to INFO, or to CLUSTER INFO; none of anything else."""
    text = reply.decode(errors="replace") if isinstance(reply, bytes) else reply if isinstance(reply, str) else ""
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            yield name, value


def transport_of(connection: AbstractConnection) -> asyncio.Transport | None:
    """The transport of *connection*; ``None`` when it is not open,
    or not redis-py's own kind of connection.
    """
    writer = getattr(connection, "_writer", None)
    return writer.transport if isinstance(writer, asyncio.StreamWriter) else None  # type: ignore[return-value]  # a stream's


def _abort(transport: asyncio.Transport | None) -> None:
    if transport is not None:
        with suppress(Exception):
            transport.abort()
