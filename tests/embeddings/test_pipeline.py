"""One trip over a pooled connection: replies in order, nothing left over,
nothing of it left when it ends early.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import hiredis
import pytest
import redis.asyncio as aioredis
from redis.asyncio.connection import ConnectionPool
from redis.exceptions import RedisError

from redis_asgi.connection import side_connection
from redis_asgi.connection.client_factory import QueueingPool
from redis_asgi.connection.manager import RedisManager
from redis_asgi.embeddings.storage.pipeline import execute
from redis_asgi.settings import Settings

from ..kit.patience import leave_unread
from ..kit.proxy import FaultProxy
from ..kit.servers import ExternalServer, Server

pytestmark = pytest.mark.anyio

StartServer = Callable[..., Server]


async def pool_of(manager: RedisManager) -> ConnectionPool:
    """The pool of a client of ours."""
    return cast("aioredis.Redis", await manager.get_connection()).connection_pool


async def test_an_error_reply_is_one_commands_own(redis_url: str) -> None:
    """The other replies of the same trip are read, and the connection is good for the next."""
    manager = RedisManager(Settings(REDIS_URL=redis_url, REDIS_POOL_SIZE=1))
    pool = await pool_of(manager)
    await execute(pool, [("DEL", "h", "a"), ("HSET", "h", "a", "b")], 5)
    replies = await execute(pool, [("GET", "h"), ("SET", b"a", b"1"), ("GET", b"a")], 5)
    assert [True, b"OK", b"1"] == [isinstance(replies[0], hiredis.ReplyError), *replies[1:]]
    assert [b"1"] == await execute(pool, [("GET", b"a")], 5)
    await manager.close()


async def test_replies_larger_than_any_buffer_and_in_small_pieces(private_server: StartServer) -> None:
    """However the bytes arrive, the replies are the values: 3 MiB in one, and every byte alone."""
    server = private_server()
    big = bytes(range(256)) * 12_288
    async with FaultProxy(server.host, server.port) as proxy:
        manager = RedisManager(Settings(REDIS_URL=proxy.url, REDIS_POOL_SIZE=1))
        pool = await pool_of(manager)
        await execute(pool, [("SET", "big", big), ("SET", "small", b"\r\n$-1\r\n")], 5)
        assert [[big, None, b"\r\n$-1\r\n"], big] == await execute(
            pool, [("MGET", "big", "none", "small"), ("GET", "big")], 5
        )
        await proxy.set("chunk")
        assert [[b"\r\n$-1\r\n", None]] == await execute(pool, [("MGET", "small", "none")], 5)
        assert 1 == proxy.accepted
        await manager.close()


async def test_redis_py_uses_the_same_connection_in_between(private_server: StartServer) -> None:
    """With a pool of one: the stream gets its socket back whole, every time."""
    server = private_server()
    manager = RedisManager(Settings(REDIS_URL=server.url, REDIS_POOL_SIZE=1))
    client = cast("aioredis.Redis", await manager.get_connection())
    for turn in range(5):
        assert [b"%d" % turn] == await execute(client.connection_pool, [("ECHO", turn)], 5)
        assert b"x" * 70_000 == await client.echo(b"x" * 70_000)
    both = await asyncio.gather(
        *(execute(client.connection_pool, [("ECHO", n)], 5) for n in range(20)), *(client.echo(n) for n in range(20))
    )
    assert [*([b"%d" % n] for n in range(20)), *(b"%d" % n for n in range(20))] == both
    assert 1 == len(server.connections())
    await manager.close()


@pytest.mark.parametrize("how", ["deadline", "cancelled"])
async def test_what_ends_early_takes_its_connection_along(private_server: StartServer, how: str) -> None:
    """A late reply is never read as somebody else's, and the pool's place is free again."""
    server = private_server()
    manager = RedisManager(Settings(REDIS_URL=server.url, REDIS_POOL_SIZE=1))
    pool = await pool_of(manager)
    await execute(pool, [("SET", "a", "of a"), ("SET", "b", "of b")], 5)
    server.pause()
    trip = asyncio.ensure_future(execute(pool, [("GET", "a")], 0.02 if how == "deadline" else 5))
    await asyncio.sleep(0.01)
    if how == "cancelled":
        trip.cancel()
    with pytest.raises(TimeoutError if how == "deadline" else asyncio.CancelledError):
        await trip
    server.resume()
    assert [[b"of b"]] * 3 == [await execute(pool, [("GET", "b")], 5) for _ in range(3)]
    assert 1 == len(server.connections())
    await manager.close()


async def test_a_connection_cut_in_the_middle_fails_the_trip(private_server: StartServer) -> None:
    """An error of the connection at once, not at the deadline; the next trip has a new one."""
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        manager = RedisManager(Settings(REDIS_URL=proxy.url, REDIS_POOL_SIZE=1))
        pool = await pool_of(manager)
        await execute(pool, [("SET", "a", b"x" * 1_000_000)], 5)
        await proxy.set("cut_replies", times=1)
        with pytest.raises((OSError, RedisError)):
            await execute(pool, [("GET", "a")], 5)
        assert [b"x" * 1_000_000] == await execute(pool, [("GET", "a")], 5)
        await manager.close()


@pytest.mark.parametrize(
    "said",
    [b"HTTP/1.1 400 Bad Request\r\n", b"+one\r\n+too many\r\n", b"+one\r\n$5\r\n", b"*2000000000\r\n"],
    ids=["foreign", "two", "more", "much"],
)
async def test_what_is_no_answer_is_hung_up_on(said: bytes) -> None:
    """No Redis at the other end, or one out of step: nothing it says can be told apart any more."""
    greeted = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal greeted
        greeted += 1
        while data := await reader.read(65536):
            writer.write(b"+OK\r\n" * data.count(b"CLIENT") if b"GET" not in data else said)
        writer.close()

    listener = await asyncio.start_server(talk, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    manager = RedisManager(Settings(REDIS_URL=url, REDIS_POOL_SIZE=1))
    pool = await pool_of(manager)
    for turn in (1, 2):
        with pytest.raises(Exception, match=r"Protocol error|more replies|too much"):
            await execute(pool, [("GET", "a")], 5)
        assert turn == greeted
    await manager.close()
    listener.close()


async def test_every_kind_of_socket(other_socket: dict[str, Any]) -> None:
    """A unix socket and TLS carry a trip as TCP does, larger than a record,
    with redis-py's commands in between.
    """
    manager = RedisManager(Settings(**other_socket, REDIS_POOL_SIZE=1))
    client = cast("aioredis.Redis", await manager.get_connection())
    for _ in range(3):
        assert [b"y" * 500_000] == await execute(client.connection_pool, [("ECHO", b"y" * 500_000)], 5)
        assert await client.ping()
    await manager.close()


async def test_a_connection_that_was_reset_while_idle_is_replaced(private_server: StartServer) -> None:
    """A proxy or a firewall in between that resets what idles costs nobody an answer: neither a
    trip nor a command.
    """
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        manager = RedisManager(Settings(REDIS_URL=proxy.url, REDIS_POOL_SIZE=1))
        client = cast("aioredis.Redis", await manager.get_connection())
        for _ in range(3):
            assert [b"PONG"] == await execute(client.connection_pool, [("PING",)], 5)
            await proxy.set("reset")
            await proxy.set("pass")
            await asyncio.sleep(0.01)
            assert await client.ping()
            await proxy.set("reset")
            await proxy.set("pass")
            await asyncio.sleep(0.01)
        await manager.close()


@pytest.mark.parametrize("left", ["a reply", "half a reply", "reset"])
async def test_a_connection_of_a_users_client_with_something_left_to_read_is_dropped(
    redis_server: ExternalServer, left: str
) -> None:
    """Whoever left it there, what waits is never taken for the answer to the next command."""
    client = aioredis.Redis.from_url(redis_server.url, max_connections=1)
    pool = client.connection_pool
    await execute(pool, [("SET", "a", "of a"), ("SET", "b", "of b")], 5)
    connection = await pool.get_connection()
    if left == "a reply":
        await leave_unread(connection, "GET", "a")
    elif left == "half a reply":
        connection._parser._stream.feed_data(b"$4\r\nof")
    else:
        cast("Any", side_connection.transport_of(connection)).abort()
    await pool.release(connection)
    assert [[b"of b"]] * 2 == [await execute(pool, [("GET", "b")], 5) for _ in range(2)]
    await client.aclose()


async def test_a_deadline_that_a_connection_swallows_ends_the_trip_all_the_same(
    redis_server: ExternalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that is made in that very moment: nothing is sent, and the connection stays good."""
    manager = RedisManager(Settings(REDIS_URL=redis_server.url, REDIS_POOL_SIZE=1))
    pool = await pool_of(manager)
    assert isinstance(pool, QueueingPool)
    get = pool.take

    async def slowly() -> Any:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return await get()

    monkeypatch.setattr(pool, "take", slowly)
    with pytest.raises(TimeoutError):
        await execute(pool, [("SET", "late", "1")], 0.01)
    monkeypatch.undo()
    assert [None] == await execute(pool, [("GET", "late")], 5)
    assert 0 == redis_server.calls("set")
    await manager.close()
