"""Connections aside from the pool leave no socket behind, wherever a TLS server hangs."""

import asyncio
import gc
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as aioredis

from redis_asgi import Settings
from redis_asgi.connection import side_connection
from redis_asgi.connection.client_factory import build_client, ping
from redis_asgi.connection.health_check import Checkup
from redis_asgi.connection.side_connection import end
from redis_asgi.connection.sockets import connection_class
from redis_asgi.errors import Failure, classify

from ..kit.certificates import Certificates
from ..kit.patience import PATIENCE
from ..kit.servers import ExternalServer

pytestmark = pytest.mark.anyio

WITHIN = 1.0  # seconds, in which a busy machine shakes hands


@contextmanager
def hanging(certificates: Certificates, answers: int) -> Iterator[tuple[int, list[ssl.SSLSocket]]]:
    """A TLS server that answers so many writes of a connection,
    then neither reads nor says goodbye: a stopped process.

    Yields its port, and the connections it has taken and will not close.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server.cert, certificates.server.key)
    taken: list[ssl.SSLSocket] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                peer, _ = listener.accept()
                wrapped = context.wrap_socket(peer, server_side=True)
                taken.append(wrapped)
                for _ in range(answers):
                    # One line for each command: an array's head is all that begins a line with a
                    # star.
                    wrapped.sendall(b"+OK\r\n" * wrapped.recv(65536).count(b"*"))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1], taken
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)
    for each in taken:
        each.close()


def open_files() -> int:
    """How many this process has open."""
    return sum(1 for _ in Path("/dev/fd").iterdir())


async def checked(client: Any) -> None:
    """What health checks and metrics do, and the end of it."""
    checkup = Checkup(client, deadline=WITHIN)
    await checkup.run()
    await checkup.aclose()


async def probed(client: Any) -> None:
    """What the breaker does."""
    with suppress(TimeoutError):
        async with asyncio.timeout(WITHIN):
            await ping(client)


@pytest.mark.parametrize("answers", [0, 2], ids=["in the greeting", "at the PING"])
@pytest.mark.parametrize("ask", [probed, checked])
async def test_hung_tls_server_keeps_no_socket(
    certificates: Certificates, ask: Callable[[aioredis.Redis], Awaitable[None]], answers: int
) -> None:
    """Three questions, and not one socket of ours is left, whatever the server does not do."""
    with hanging(certificates, answers) as (port, taken):
        settings = Settings(REDIS_URL=f"rediss://127.0.0.1:{port}", REDIS_SSL_CA_CERTS=certificates.ca.cert)
        client = build_client(settings).client
        assert isinstance(client, aioredis.Redis)
        await ask(client)  # opens what stays open: certificates, random numbers
        await asyncio.sleep(0.05)
        before, had = open_files(), len(taken)
        await asyncio.gather(*(ask(client) for _ in range(3)))
        await asyncio.sleep(0.05)

        assert 3 == len(taken) - had
        assert 3 == open_files() - before  # the server's ends
        await client.aclose()


async def test_a_task_that_swallows_a_cancellation_is_ended_all_the_same() -> None:
    """As one does that is cancelled in the moment in which its connection is made."""
    accepted = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set()
        await reader.read()
        writer.close()

    async def probing() -> None:
        while True:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                await asyncio.sleep(60)
            finally:
                writer.close()

    listener = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    task = asyncio.create_task(probing())
    await accepted.wait()
    async with asyncio.timeout(PATIENCE):
        await end([task])
    assert task.cancelled()
    await end([task])
    listener.close()


async def test_a_connection_that_was_lost_is_an_outage(redis_server: ExternalServer) -> None:
    """Writing to it is a failure of the network,
    whatever Python's transports raise: 3.13's an AttributeError.
    """
    where = redis_server.client().connection_pool.connection_kwargs
    connection = connection_class(encrypted=False)(host=where["host"], port=where["port"])
    await side_connection.connect(connection)
    transport = side_connection.transport_of(connection)
    assert transport is not None
    transport.abort()

    with pytest.raises(aioredis.ConnectionError, match=r"^The connection was lost\.$") as caught:
        await side_connection.ping(connection)

    assert Failure.CONNECTION is classify(caught.value)
    await side_connection.hang_up(connection)


async def test_what_a_task_raised_that_is_ended_is_nobodys() -> None:
    """One that had failed in that moment leaves no traceback of asyncio's in the log."""
    said: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))

    async def fail() -> None:
        raise ConnectionError

    task = asyncio.create_task(fail())
    await asyncio.sleep(0)
    assert task.done()
    await end([task])
    del task
    gc.collect()

    assert [] == said
