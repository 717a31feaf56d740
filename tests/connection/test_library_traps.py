"""Traps of redis-py that our clients avoid."""

import asyncio
import random
import time
from typing import cast

import pytest
from redis.exceptions import (
    AuthenticationError,
    DataError,
    RedisError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from redis_asgi.connection.client_factory import Client
from redis_asgi.errors import Failure, classify

from ..conftest import StartServer
from ..kit.fair_time import fair_time
from ..kit.processes import run_python
from ..kit.proxy import FaultProxy
from .managers import SECRET, all_connections, ask, managed

pytestmark = pytest.mark.anyio


async def test_command_whose_reply_is_lost_is_counted_once(private_server: StartServer) -> None:
    """A counting command is never sent again, though the server ran it and the answer was lost."""
    server = private_server()
    async with (
        FaultProxy(server.host, server.port) as proxy,
        managed(REDIS_URL=proxy.url, REDIS_RETRY_ATTEMPTS=5) as manager,
    ):
        client = await manager.get_connection()
        await ask(client, "PING")
        # Only this one: a retry would get through.
        await proxy.set("cut_replies", times=1)
        with pytest.raises(RedisConnectionError):
            await ask(client, "INCR", "counter")

        assert await ask(client, "GET", "counter") == b"1"


async def test_command_without_a_reply_is_counted_once(private_server: StartServer) -> None:
    """The same when the answer just does not come within ``REDIS_TIMEOUT``."""
    server = private_server()
    async with (
        FaultProxy(server.host, server.port) as proxy,
        managed(REDIS_URL=proxy.url, REDIS_TIMEOUT=0.1, REDIS_RETRY_ATTEMPTS=5) as manager,
    ):
        client = await manager.get_connection()
        await ask(client, "PING")
        await proxy.set("drop_replies", times=1)
        started, fairly = time.monotonic(), fair_time()
        with pytest.raises(RedisTimeoutError):
            await ask(client, "INCR", "counter")
        waited, seconds = time.monotonic() - started, fair_time() - fairly

        assert await ask(client, "GET", "counter") == b"1"
        assert waited >= 0.09
        assert seconds < 1


@pytest.mark.parametrize("unix", [pytest.param(False, id="TCP"), pytest.param(True, id="unix socket")])
async def test_restart_of_the_server_fails_no_first_command(private_server: StartServer, unix: bool) -> None:
    """Connections that a restarted server has closed are noticed before they are used."""
    server = private_server(unix=unix)
    async with managed(REDIS_URL=server.url) as manager:
        async with all_connections(manager, 10):
            pass
        server.restart()
        await asyncio.sleep(0.05)  # the loop has to run to see that they were closed
        client = await manager.get_connection()

        assert [True] * 10 == await asyncio.gather(*(ask(client, "PING") for _ in range(10)))


async def test_connecting_says_no_more_than_needed(private_server: StartServer) -> None:
    """A new connection sends no HELLO (RESP2), no name and asks for no maintenance notifications."""
    server = private_server()
    server.flush()
    async with managed(REDIS_URL=server.url) as manager:
        await ask(await manager.get_connection(), "PING")
        stats = cast("dict[str, object]", server.client().info("commandstats"))

    sent = {name.removeprefix("cmdstat_").lower() for name in stats} - {"config|resetstat", "info", "config"}
    assert sent <= {"ping", "client|setinfo"}


async def test_user_without_client_rights_can_work(private_server: StartServer) -> None:
    """An ACL that allows three commands and nothing of CLIENT is enough;
    the prefix and user are obeyed.
    """
    server = private_server()
    server.add_user("app", f">{SECRET}", "~*", "+ping", "+incr", "+info")
    async with managed(
        REDIS_PORT=server.port, REDIS_HOST=server.host, REDIS_USERNAME="app", REDIS_PASSWORD=SECRET
    ) as m:
        client = await m.get_connection()

        assert await ask(client, "INCR", "counter") == 1
        with pytest.raises(RedisError) as caught:
            await ask(client, "GET", "counter")
        assert Failure.PERMISSION is classify(caught.value)


async def test_replies_are_raw_bytes(redis_url: str) -> None:
    """Values are bytes that need not be text."""
    async with managed(REDIS_URL=redis_url) as manager:
        client = await manager.get_connection()
        await ask(client, "SET", "key", b"\xff\x00")

        assert await ask(client, "GET", "key") == b"\xff\x00"


@pytest.mark.parametrize(
    "query",
    ["decode_responses=true", "protocol=3", "client_name=x", "retry_on_timeout=true"],
)
async def test_url_cannot_undo_what_avoids_a_trap(private_server: StartServer, query: str) -> None:
    """Options in a URL reach redis-py, but not those the package relies on."""
    server = private_server()
    server.flush()
    async with FaultProxy(server.host, server.port) as proxy, managed(REDIS_URL=f"{proxy.url}?{query}") as manager:
        client = await manager.get_connection()
        await ask(client, "SET", "key", b"\xff")
        assert await ask(client, "GET", "key") == b"\xff"
        await proxy.set("cut_replies", times=1)
        with pytest.raises(RedisConnectionError):
            await ask(client, "INCR", "counter")
        assert await ask(client, "GET", "counter") == b"1"

    assert server.calls("hello") == 0
    assert server.calls("client|setname") == 0


@pytest.mark.parametrize("how", ["a command", "initialize_pool"])
async def test_wrong_password_fails_fast_and_once(private_server: StartServer, how: str) -> None:
    """A wrong password is tried once: no backoff, no flood of the server's ACL log."""
    server = private_server()
    server.add_user("app", ">right", "~*", "+@all")
    async with managed(
        REDIS_HOST=server.host, REDIS_PORT=server.port, REDIS_USERNAME="app", REDIS_PASSWORD=SECRET
    ) as manager:
        client = await manager.get_connection()
        started = fair_time()
        with pytest.raises(AuthenticationError) as caught:
            await (manager.initialize_pool() if how == "initialize_pool" else ask(client, "PING"))
        took = fair_time() - started

    attempts = [int(entry["count"]) for entry in cast("list[dict[str, str]]", server.client().acl_log())]
    assert attempts == [1]
    assert took < 0.5
    assert Failure.AUTH is classify(caught.value)
    assert SECRET not in str(caught.value)


async def test_initialize_pool_waits_for_a_server_that_is_starting(private_server: StartServer) -> None:
    """``REDIS_RETRY_ATTEMPTS`` are for connecting:
    a server that comes up a moment later is reached.
    """
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy, managed(REDIS_URL=proxy.url) as manager:
        await proxy.set("refuse")
        starting = asyncio.create_task(manager.initialize_pool())
        await asyncio.sleep(0.02)
        await proxy.set("pass")
        await starting

        assert manager.pool is not None


async def test_initialize_pool_gives_up(private_server: StartServer) -> None:
    """After its attempts the last error is raised."""
    server = private_server()
    server.kill()
    async with managed(REDIS_HOST=server.host, REDIS_PORT=server.port, REDIS_RETRY_ATTEMPTS=1) as manager:
        with pytest.raises(RedisConnectionError):
            await manager.initialize_pool()


async def test_cancelled_commands_never_mix_up_replies(private_server: StartServer) -> None:
    """A storm of cancelled commands over a slow, chopping line:
    every reply that arrives is its own.
    """
    server = private_server()
    dice = random.Random(0)
    wrong: list[object] = []
    done = 0

    async def worker(client: Client, name: int) -> None:
        nonlocal done
        for i in range(40):
            said = f"{name}-{i}-".encode() * dice.randint(1, 50)
            # Some in any case have the time they need, however slow the machine.
            within = dice.choice([dice.uniform(0.0005, 0.012)] * 3 + [5.0])
            try:
                heard = await asyncio.wait_for(ask(client, "ECHO", said), within)
            except TimeoutError:
                continue
            done += 1
            if heard != said:
                wrong.append((said, heard))

    async with (
        FaultProxy(server.host, server.port) as proxy,
        managed(REDIS_URL=proxy.url, REDIS_POOL_SIZE=5, REDIS_TIMEOUT=5) as manager,
    ):
        client = await manager.get_connection()
        await proxy.set("delay", seconds=0.002)
        storm = asyncio.gather(*(worker(client, n) for n in range(8)))
        await asyncio.sleep(0.3)
        await proxy.set("chunk")
        await storm
        await proxy.set("pass")

        assert wrong == []
        assert done > 10
        # Nothing leaked either: every connection can still be had.
        async with all_connections(manager, 4):
            pass


async def test_bad_key_is_an_input_error(redis_url: str) -> None:
    """What cannot be a key fails before anything is sent and leaves the connection good."""
    async with managed(REDIS_URL=redis_url) as manager:
        client = await manager.get_connection()
        with pytest.raises(DataError):
            await ask(client, "GET", None)
        with pytest.raises(UnicodeEncodeError):
            await ask(client, "GET", "\ud800")

        assert await ask(client, "PING")


def test_no_telemetry_is_switched_on(redis_url: str) -> None:
    """Using Redis through the package leaves redis-py's OpenTelemetry metrics off: they can
    deadlock.
    """
    script = """
import asyncio, sys
from redis.observability import get_observability_instance
from redis_asgi import RedisManager, Settings
async def main():
    await (await RedisManager(Settings(REDIS_URL=sys.argv[1])).get_connection()).ping()
asyncio.run(main())
print(get_observability_instance().is_enabled())
"""
    done = run_python(script, redis_url)

    assert ("False\n", "", 0) == (done.stdout, done.stderr, done.returncode)
