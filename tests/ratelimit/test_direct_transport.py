"""The limiter's own way over a pooled connection: it gives way, survives its end,
leaves redis-py's stream whole.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import hiredis
import pytest
import redis.asyncio as aioredis

from redis_asgi import RateLimiter, RedisManager, Settings
from redis_asgi.embeddings.storage.pipeline import execute
from redis_asgi.errors import Failure
from redis_asgi.ratelimit.limits.charge import Charge, Charges
from redis_asgi.ratelimit.limits.policy import Policy, PolicySet, make_partition
from redis_asgi.ratelimit.transport.batcher import MAX_COUNTERS, Batcher
from redis_asgi.ratelimit.transport.check import Check, Outcome
from redis_asgi.ratelimit.transport.cluster_batcher import make_batcher
from redis_asgi.ratelimit.transport.direct_transport import DirectTransport

from ..kit.patience import PATIENCE
from ..kit.proxy import FaultProxy
from ..kit.servers import Server

pytestmark = pytest.mark.anyio

StartServer = Callable[..., Server]
HUNDRED = PolicySet((Policy("default", 100, 60),))


def batcher_of(manager: RedisManager) -> Batcher:
    """The batcher of a manager's client in this loop, which goes over a line."""
    batcher = manager.per_client(make_batcher)
    assert isinstance(batcher, Batcher)
    assert isinstance(batcher._transport, DirectTransport)
    return batcher


async def ask(batcher: Batcher, client: str = "192.0.2.1") -> Outcome:
    """One check."""
    check = Check(
        batcher.loop, "consume", Charges((Charge(HUNDRED, make_partition("ip", client, plain=True), 1),)), 5.0
    )
    batcher.submit(check)
    return cast("Outcome", await check.future)


def remaining(outcome: Outcome) -> int:
    """What is left of the quota."""
    assert isinstance(outcome, list)
    return int(outcome[2])


async def test_one_connection_serves_everybody_in_turn(private_server: StartServer) -> None:
    """With a pool of one, the limiter gives its connection back whole,
    and gets it again; there never is another.
    """
    server = private_server()
    manager = RedisManager(Settings(REDIS_URL=server.url, REDIS_POOL_SIZE=1))
    client = await manager.get_connection()
    batcher = batcher_of(manager)
    for turn in range(1, 6):
        assert 100 - turn == remaining(await ask(batcher))
        assert await client.ping()
        assert b"x" * 70_000 == await client.echo(b"x" * 70_000)
    assert 1 == len(server.connections())
    pings = asyncio.gather(*(client.ping() for _ in range(20)))
    outcomes = await asyncio.gather(*(ask(batcher) for _ in range(20)))
    assert [True] * 20 == await pings
    assert 75 == min(remaining(outcome) for outcome in outcomes)
    assert 1 == len(server.connections())
    await manager.close()


async def test_idle_line_gives_way_to_whoever_waits(private_server: StartServer) -> None:
    """An idle limiter does not keep the only connection there is from a caller who came later."""
    server = private_server()
    manager = RedisManager(Settings(REDIS_URL=server.url, REDIS_POOL_SIZE=1, REDIS_TIMEOUT=1))
    client = await manager.get_connection()
    await ask(batcher_of(manager))
    assert None is await asyncio.wait_for(client.execute_command("BLPOP", "nothing", "0.1"), 0.9)
    assert 98 == remaining(await ask(batcher_of(manager)))
    await manager.close()


async def test_blocking_commands_never_take_the_last_connection(private_server: StartServer) -> None:
    """However many of the app's own block on the shared client,
    limits are decided in Redis meanwhile.
    """
    server = private_server()
    manager = RedisManager(Settings(REDIS_URL=server.url, REDIS_POOL_SIZE=3))
    client = await manager.get_connection()
    blocked = [asyncio.ensure_future(client.execute_command("BLPOP", "nothing", "0")) for _ in range(6)]
    while server.client().info("clients")["blocked_clients"] < 2:
        await asyncio.sleep(0.01)
    assert [99, 98] == [remaining(await ask(batcher_of(manager))) for _ in range(2)]
    assert manager.pool is not None
    assert [None] == await execute(manager.pool, [("GET", "nothing")], 5)
    assert 2 == server.client().info("clients")["blocked_clients"]
    for each in blocked:
        each.cancel()
    await asyncio.gather(*blocked, return_exceptions=True)
    await manager.close()


async def test_connection_that_the_server_closes_is_replaced(private_server: StartServer) -> None:
    """CLIENT KILL between two checks, or an idle timeout:
    the next check is answered by Redis all the same.
    """
    server = private_server()
    manager = RedisManager(Settings(REDIS_URL=server.url))
    batcher = batcher_of(manager)
    for turn in range(1, 4):
        assert 100 - turn == remaining(await ask(batcher))
        server.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await asyncio.sleep(0.01)
    assert "closed" == manager.breaker_state
    await manager.close()


async def test_connection_that_ends_under_way_fails_its_batch_once(private_server: StartServer) -> None:
    """The batch is a lost one, charged at most once; what comes after goes over a new connection."""
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        manager = RedisManager(Settings(REDIS_URL=proxy.url))
        batcher = batcher_of(manager)
        await ask(batcher)
        await proxy.set("cut_replies", times=1)
        assert Failure.CONNECTION is await ask(batcher)
        assert 97 == remaining(await ask(batcher))
        await manager.close()


async def test_replies_that_came_before_the_end_are_given_out(private_server: StartServer) -> None:
    """A connection that ends right behind its replies takes none of them along."""
    manager = RedisManager(Settings(REDIS_URL=private_server().url))
    batcher = batcher_of(manager)
    await ask(batcher)
    assert isinstance(batcher._transport, DirectTransport)
    line = batcher._transport._line
    assert line is not None
    receive = line.data_received

    def receive_the_last(data: bytes) -> None:
        receive(data)
        line.transport.abort()

    line.data_received = receive_the_last  # type: ignore[method-assign]
    outcomes = await asyncio.gather(*(ask(batcher, f"192.0.2.{n}") for n in range(5)))
    assert [98, 99, 99, 99, 99] == sorted(remaining(outcome) for outcome in outcomes)
    assert batcher._transport._line is not line
    await manager.close()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        pytest.param(b"HTTP/1.1 400 Bad Request", Failure.CONNECTION, id="no reply"),
        pytest.param(b"*1\r\n*2000000000", Failure.CONNECTION, id="more than can be"),
        pytest.param(b":1", Failure.REPLY, id="number"),
        pytest.param(b"+OK", Failure.REPLY, id="status"),
        pytest.param(b"$-1", Failure.REPLY, id="nothing"),
        pytest.param(b"*-1", Failure.REPLY, id="no list"),
        pytest.param(b"*0", Failure.REPLY, id="empty"),
        pytest.param(b"*1\r\n:1", Failure.REPLY, id="short"),
        pytest.param(b"*1\r\n:-1", Failure.REPLY, id="no message"),
        pytest.param(b"*2\r\n:%d\r\n*6" + b"\r\n:1" * 6, [1] * 6, id="a reply"),
        pytest.param(b"*2\r\n:1\r\n*6" + b"\r\n:1" * 6, Failure.REPLY, id="another call's"),
        pytest.param(b"*2\r\n:%d\r\n*3" + b"\r\n:1" * 3, Failure.REPLY, id="another question's"),
        pytest.param(b"*3\r\n:%d" + b"\r\n*6" + b"\r\n:1" * 6 + b"\r\n:1", Failure.REPLY, id="one too many"),
        pytest.param(b"*2\r\n:%d\r\n:1", Failure.REPLY, id="a number for numbers"),
        pytest.param(b"*2\r\n:%d\r\n*6" + b"\r\n:1" * 5 + b"\r\n+OK", Failure.REPLY, id="no numbers"),
    ],
)
async def test_what_is_no_redis_is_hung_up_on(said: bytes, expected: Outcome) -> None:
    """What is no reply to it ends the connection,
    and the check fails at once; nothing is read out of step.
    """

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            number = re.search(rb"\r\n(\d+)\r\n\$0\r\n\r\n", data)  # what stands before the clock
            answer = said.replace(b"%d", number[1]) if number else said
            writer.write(b"+OK\r\n" * data.count(b"CLIENT") if b"EVAL" not in data else answer + b"\r\n")
        writer.close()

    listener = await asyncio.start_server(talk, "127.0.0.1", 0)
    manager = RedisManager(Settings(REDIS_URL=f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}"))
    async with asyncio.timeout(PATIENCE):
        assert expected == await ask(batcher_of(manager))
    assert not batcher_of(manager)._sent
    await manager.close()
    listener.close()


async def test_swallowed_reply_gives_nobody_anothers_verdict(private_server: StartServer) -> None:
    """What is out of step fails, and its connection with it:
    a client without quota gets no one else's admission.
    """
    server = private_server()
    async with swallowing(server) as (port, swallow):
        manager = RedisManager(Settings(REDIS_URL=f"redis://127.0.0.1:{port}"))
        batcher = batcher_of(manager)
        await asyncio.gather(*(ask(batcher, "full") for _ in range(100)))
        before = wire_of(batcher)._line
        swallow.append(1)
        outcomes = await asyncio.gather(
            *(ask(batcher, "full") for _ in range(MAX_COUNTERS)),
            *(ask(batcher, f"192.0.{n // 200}.{n % 200}") for n in range(2 * MAX_COUNTERS)),
        )

        assert not swallow
        assert {Failure.REPLY} == {outcome for outcome in outcomes if not isinstance(outcome, list)}
        assert [] == [outcome for outcome in outcomes[:MAX_COUNTERS] if isinstance(outcome, list) and outcome[0]]
        assert 98 == remaining(await ask(batcher, "192.0.0.1"))
        assert before is not wire_of(batcher)._line
        await manager.close()


def wire_of(batcher: Batcher) -> DirectTransport:
    """The line that a batcher goes over."""
    assert isinstance(batcher._transport, DirectTransport)
    return batcher._transport


@asynccontextmanager
async def swallowing(server: Server) -> AsyncIterator[tuple[int, list[int]]]:
    """A proxy's port, and a list: for each element it swallows one reply to a script, whole."""
    swallow: list[int] = []

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(server.host, server.port)

        async def forth() -> None:
            while data := await reader.read(65536):
                back.write(data)
            back.close()

        going = asyncio.ensure_future(forth())
        replies, reply = hiredis.Reader(), b""
        while byte := await there.read(1):
            reply += byte
            replies.feed(byte)
            whole = replies.gets()
            if whole is not False:
                if isinstance(whole, list) and swallow:
                    swallow.pop()
                else:
                    writer.write(reply)
                reply = b""
        writer.close()
        await going

    listener = await asyncio.start_server(relay, "127.0.0.1", 0)
    yield listener.sockets[0].getsockname()[1], swallow
    listener.close()


async def test_trial_does_not_wait_behind_checks_of_the_outage(redis_url: str) -> None:
    """A check that waits for a connection that never comes leaves with the trial, over a new one."""
    manager = RedisManager(Settings(REDIS_URL=redis_url))
    batcher = batcher_of(manager)
    assert isinstance(batcher._transport, DirectTransport)
    pool = batcher._transport._pool
    connect = pool.get_connection
    pool.get_connection = asyncio.Event().wait  # type: ignore[assignment,method-assign]  # for ever
    before = asyncio.ensure_future(ask(batcher))
    await asyncio.sleep(0)
    pool.get_connection = connect  # type: ignore[method-assign]
    batcher.breaker.state = "half_open"
    async with asyncio.timeout(PATIENCE):
        assert [99, 98] == [remaining(outcome) for outcome in await asyncio.gather(before, ask(batcher))]
    assert "closed" == manager.breaker_state
    await manager.close()


async def test_two_replies_that_come_together_are_told_apart(private_server: StartServer) -> None:
    """More checks than a batch holds go out before the first is answered,
    and each gets its own numbers.
    """
    manager = RedisManager(Settings(REDIS_URL=private_server().url))
    batcher = batcher_of(manager)
    await ask(batcher)
    outcomes = await asyncio.gather(*(ask(batcher, f"192.0.{n // 200}.{n % 200}") for n in range(400)))
    assert {99} == {remaining(outcome) for outcome in outcomes}
    outcomes = await asyncio.gather(*(ask(batcher, "198.51.100.1") for _ in range(100)))
    assert list(range(99, -1, -1)) == [remaining(outcome) for outcome in outcomes]
    await manager.close()


async def test_every_kind_of_socket(other_socket: dict[str, Any]) -> None:
    """A unix socket and TLS carry batches as TCP does,
    with the checks and commands of others in between.
    """
    manager = RedisManager(Settings(**other_socket, REDIS_POOL_SIZE=1))
    client = await manager.get_connection()
    for turn in range(1, 4):
        assert 100 - turn == remaining(await ask(batcher_of(manager), "203.0.113.200"))
        assert await client.ping()
    outcomes = await asyncio.gather(*(ask(batcher_of(manager), "203.0.113.201") for _ in range(50)))
    assert 50 == min(remaining(outcome) for outcome in outcomes)
    await client.flushdb()
    await manager.close()


async def test_users_own_pool_is_left_to_redis_py(redis_url: str) -> None:
    """A given client lends a connection for one batch at a time and has all of them back after it."""
    client = aioredis.Redis.from_url(redis_url, max_connections=1)
    limiter = RateLimiter(client)
    for turn in range(1, 4):
        decision = await limiter.consume("a", "9/minute")
        assert ("redis", 9 - turn) == (decision.source, decision.policies[0].remaining)
        assert await client.ping()
    await client.aclose()
