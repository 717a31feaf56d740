"""The shared client: opened lazily and once, per process and loop, without the traps of its library."""

import asyncio
import gc
import inspect
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import redis
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    DataError,
    MaxConnectionsError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from redis_asgi import ConfigurationError, RateLimiter, RedisManager, Settings, redis_operation
from redis_asgi.connection.client_factory import Client, QueueingPool
from redis_asgi.connection.redis_argument import resolve_manager
from redis_asgi.embeddings.storage.store import vectors_of
from redis_asgi.errors import Failure, classify
from redis_asgi.ratelimit.transport.cluster_batcher import make_batcher

from ..conftest import StartServer
from ..kit.certificates import Certificates
from ..kit.fair_time import fair_time
from ..kit.logs import event_of
from ..kit.processes import run_python
from ..kit.proxy import FaultProxy
from ..kit.servers import Cluster, ExternalServer, SentinelTrio, Server, wait_until

pytestmark = pytest.mark.anyio

SECRET = "s3cr3t-of-a-test"


async def ask(client: Client, *command: Any) -> Any:
    """Run one command."""
    execute: Callable[..., Awaitable[Any]] = client.execute_command
    return await execute(*command)


@asynccontextmanager
async def managed(**values: Any) -> AsyncIterator[RedisManager]:
    """A manager for these settings, closed at the end."""
    manager = RedisManager(Settings(**values))
    try:
        yield manager
    finally:
        await manager.close()


@asynccontextmanager
async def all_connections(manager: RedisManager, count: int) -> AsyncIterator[None]:
    """Hold *count* connections of the pool."""
    await manager.get_connection()
    pool: Any = manager.pool
    assert pool is not None
    held = [await pool.get_connection() for _ in range(count)]
    try:
        yield
    finally:
        for connection in held:
            await pool.release(connection)


# Opening


async def test_concurrent_first_calls_open_one_client(private_server: StartServer) -> None:
    """A hundred callers that come at once get the same client and share its twenty connections."""
    server = private_server()
    async with managed(REDIS_URL=server.url) as manager:
        clients = await asyncio.gather(*(manager.get_connection() for _ in range(100)))
        replies = await asyncio.gather(*(ask(client, "ECHO", str(i)) for i, client in enumerate(clients)))

        assert len({id(client) for client in clients}) == 1
        assert [str(i).encode() for i in range(100)] == replies
        assert len(server.connections()) <= 20


async def test_nothing_is_opened_before_first_use(private_server: StartServer) -> None:
    """Building a manager, and asking it for the client, connects nowhere."""
    server = private_server()
    async with managed(REDIS_URL=server.url) as manager:
        assert manager.pool is None
        await manager.get_connection()
        assert manager.pool is not None
        assert server.connections() == []


def test_pool_is_none_outside_a_loop() -> None:
    """Without a running loop there is no pool to show."""
    assert RedisManager(Settings()).pool is None


async def test_the_21st_caller_waits_for_a_connection(private_server: StartServer) -> None:
    """More callers than connections are served by as many connections as allowed, in turn."""
    server = private_server()
    async with managed(REDIS_URL=server.url) as manager:
        client = await manager.get_connection()
        waiting = [asyncio.create_task(ask(client, "BLPOP", "never", 0.3)) for _ in range(21)]
        await asyncio.sleep(0.15)
        while_waiting = len(server.connections())

        assert [None] * 21 == await asyncio.gather(*waiting)
        assert while_waiting == 19
        assert len(server.connections()) == 19


async def test_pool_size_is_the_bound(private_server: StartServer) -> None:
    """``REDIS_POOL_SIZE`` is obeyed: the app's commands have all but one, which is for limits."""
    server = private_server()
    async with managed(REDIS_URL=server.url, REDIS_POOL_SIZE=3) as manager:
        client = await manager.get_connection()
        await asyncio.gather(*(ask(client, "PING") for _ in range(50)))
        assert len(server.connections()) == 2

        async with all_connections(manager, 2):
            pool = manager.pool
            assert isinstance(pool, QueueingPool)
            await pool.release(await pool.take())
        assert len(server.connections()) == 3


async def test_waiting_for_a_connection_ends_at_the_deadline(redis_url: str) -> None:
    """Nobody waits for a connection longer than ``REDIS_TIMEOUT``; it is told apart from a network failure."""
    async with managed(REDIS_URL=redis_url, REDIS_POOL_SIZE=1, REDIS_TIMEOUT=0.1) as manager:
        client = await manager.get_connection()
        async with all_connections(manager, 1):
            started, fairly = time.monotonic(), fair_time()
            with pytest.raises(MaxConnectionsError) as caught:
                await ask(client, "PING")
            waited, seconds = time.monotonic() - started, fair_time() - fairly

        assert Failure.POOL is classify(caught.value)
        assert waited >= 0.09
        assert seconds < 1
        assert await ask(client, "PING")


async def test_cancelled_wait_gives_its_turn_back(redis_url: str) -> None:
    """Callers that give up while they wait leave every connection to the others."""
    async with managed(REDIS_URL=redis_url, REDIS_POOL_SIZE=3) as manager:
        client = await manager.get_connection()
        async with all_connections(manager, 2):
            waiting = [asyncio.create_task(ask(client, "PING")) for _ in range(10)]
            await asyncio.sleep(0.01)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

        async with all_connections(manager, 2):
            pass


async def test_failed_connection_gives_its_turn_back(private_server: StartServer) -> None:
    """A connection that cannot be made takes nothing away from the pool."""
    server = private_server()
    async with managed(REDIS_URL=server.url, REDIS_POOL_SIZE=3, REDIS_TIMEOUT=0.5) as manager:
        client = await manager.get_connection()
        server.kill()
        for _ in range(5):
            with pytest.raises(RedisConnectionError):
                await ask(client, "PING")
        server.launch()

        async with all_connections(manager, 2):
            pass


# Loops, threads, processes


def test_every_loop_has_its_own_client(redis_url: str) -> None:
    """One manager serves an ``asyncio.run`` after another."""
    manager = RedisManager(Settings(REDIS_URL=redis_url))

    async def once() -> tuple[int, bool]:
        client = await manager.get_connection()
        return id(client), bool(await ask(client, "PING"))

    seen = [asyncio.run(once()) for _ in range(3)]

    assert [True] * 3 == [answered for _, answered in seen]


def test_two_loops_at_once_do_not_share_connections(redis_url: str) -> None:
    """Threads with loops of their own each have a client; nothing is bound to the other's loop."""
    manager = RedisManager(Settings(REDIS_URL=redis_url, REDIS_POOL_SIZE=2))
    meeting = threading.Barrier(2, timeout=5)
    seen: dict[int, set[int]] = {}
    clients: dict[int, Client] = {}

    async def work(me: int) -> None:
        clients[me] = await manager.get_connection()
        meeting.wait()
        ids = await asyncio.gather(*(ask(clients[me], "CLIENT", "ID") for _ in range(50)))
        seen[me] = set(ids)
        meeting.wait()

    threads = [threading.Thread(target=asyncio.run, args=(work(i),)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert clients[0] is not clients[1]
    assert seen[0]
    assert seen[1]
    assert not seen[0] & seen[1]


@pytest.mark.parametrize(
    "child_loop",
    [pytest.param("new", id="loop of its own"), pytest.param("same", id="loop made before the fork")],
)
def test_forked_process_does_not_use_its_parents_sockets(redis_url: str, child_loop: str) -> None:
    """A child forked from a process with an open pool opens its own; the parent's still works."""
    script = """
import asyncio, os, sys
from redis_asgi import RedisManager, Settings
manager = RedisManager(Settings(REDIS_URL=sys.argv[1]))
read, write = os.pipe()
loop = asyncio.new_event_loop()

async def client_id():
    return await (await manager.get_connection()).client_id()

before = loop.run_until_complete(client_id())
pid = os.fork()
if pid == 0:
    run = asyncio.run if sys.argv[2] == "new" else loop.run_until_complete
    os.write(write, str(run(client_id())).encode())
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
child = int(os.read(read, 100))
print(before == loop.run_until_complete(client_id()), child != before)
loop.run_until_complete(manager.close())
loop.close()
os.close(read)
os.close(write)
"""
    done = run_python(script, redis_url, child_loop)

    assert ("True True\n", "", 0) == (done.stdout, done.stderr, done.returncode)


@pytest.mark.parametrize("dead", [pytest.param(False, id="server alive"), pytest.param(True, id="server gone")])
def test_a_loop_that_ends_closes_silently(private_server: StartServer, dead: bool) -> None:
    """``asyncio.run`` without ``close()`` leaves no warning, with warnings as errors and in development mode."""
    server = private_server()
    script = """
import asyncio, os, signal, sys
from redis_asgi import RedisManager, Settings
manager = RedisManager(Settings(REDIS_URL=sys.argv[1]))

async def main():
    client = await manager.get_connection()
    await asyncio.gather(*(client.ping() for _ in range(5)))
    if sys.argv[2]:
        os.kill(int(sys.argv[2]), signal.SIGKILL)

for _ in range(1 if sys.argv[2] else 3):
    asyncio.run(main())
"""
    done = run_python(script, server.url, str(server.pid) if dead else "")

    assert ("", "", 0) == (done.stdout, done.stderr, done.returncode)


async def test_loop_end_leaves_no_connection(private_server: StartServer) -> None:
    """When a loop ends the server sees its connections closed."""
    server = private_server()
    manager = RedisManager(Settings(REDIS_URL=server.url))

    async def use() -> None:
        await ask(await manager.get_connection(), "PING")

    await asyncio.to_thread(asyncio.run, use())
    wait_until(lambda: server.connections() == [], "connections are closed")


# Closing


async def test_manager_is_usable_again_after_close(private_server: StartServer) -> None:
    """``close()`` ends the connections, may be called twice, and the next use opens new ones."""
    server = private_server()
    async with managed(REDIS_URL=server.url) as manager:
        first = await manager.get_connection()
        await ask(first, "PING")
        await manager.close()
        await manager.close()
        assert manager.pool is None
        wait_until(lambda: server.connections() == [], "connections are closed")

        second = await manager.get_connection()
        assert first is not second
        assert await ask(second, "PING")


async def test_close_without_use_is_nothing() -> None:
    """Closing what was never opened does no harm."""
    await RedisManager(Settings()).close()
    await RedisManager(Settings(REDIS_URL="memory://")).close()


async def test_last_user_closes(redis_url: str) -> None:
    """Of several users in a loop the last to let go closes; letting go too often does no harm."""
    async with managed(REDIS_URL=redis_url) as manager:
        manager.retain()
        manager.retain()
        client = await manager.get_connection()
        await manager.release()
        assert manager.pool is not None
        assert client is await manager.get_connection()
        await manager.release()
        assert manager.pool is None
        await manager.release()


async def test_parts_are_made_once_and_end_before_the_client(redis_url: str) -> None:
    """What lives beside the client is one per loop and can still use the client while it ends."""
    ended: list[object] = []

    class Part:
        def __init__(self, _manager: RedisManager, client: Client) -> None:
            self.client = client

        async def aclose(self) -> None:
            ended.append(await ask(self.client, "PING"))

    async with managed(REDIS_URL=redis_url) as manager:
        one = manager.per_client(Part)
        assert one is manager.per_client(Part)
        await manager.close()
        assert ended == [True]
        assert one is not manager.per_client(Part)


async def test_shared_products_are_one_per_manager() -> None:
    """Counters of ``memory://`` belong to the manager, not to the loop or the caller."""
    manager = RedisManager(Settings(REDIS_URL="memory://"))

    def make(_settings: Settings) -> object:
        return object()

    one = manager.per_process(make)

    assert one is manager.per_process(make)
    assert one is not RedisManager(manager.settings).per_process(make)


# What a caller may pass as redis=


def test_equal_settings_share_one_manager() -> None:
    """Parts that are given nothing, or equal settings, or the same URL share a manager; others do not."""
    default, ours = resolve_manager(None, None)

    assert ours
    assert default is resolve_manager(None, Settings())[0]
    by_url, ours = resolve_manager("redis://redis.test", None)
    assert ours
    assert by_url is resolve_manager("redis://redis.test", None)[0]
    assert by_url is resolve_manager(None, Settings(REDIS_URL="redis://redis.test"))[0]
    assert by_url is not default
    assert by_url is not resolve_manager("redis://redis.test/1", None)[0]


def test_url_keeps_the_other_settings() -> None:
    """``redis=URL`` changes where Redis is and nothing else."""
    manager, _ = resolve_manager("redis://redis.test", Settings(REDIS_POOL_SIZE=3, REDIS_PASSWORD=SECRET))

    assert manager.settings.REDIS_POOL_SIZE == 3
    assert manager.settings.REDIS_PASSWORD is not None
    assert manager.settings.REDIS_PASSWORD.get_secret_value() == SECRET


def test_given_manager_is_used_as_it_is() -> None:
    """A manager of the user's is the one that is used, and its life is the user's business."""
    manager = RedisManager(Settings())

    assert (manager, False) == resolve_manager(manager, None)


async def test_given_client_is_never_closed_or_changed(redis_url: str) -> None:
    """A client of the user's is handed out as it is and survives ``close()`` with its connection."""
    async with aioredis.Redis.from_url(redis_url, protocol=2, decode_responses=True) as client:
        manager, ours = resolve_manager(client, None)
        before = await ask(client, "CLIENT", "ID")

        assert not ours
        assert client is await manager.get_connection()
        assert manager.pool is client.connection_pool
        await manager.close()
        assert before == await ask(client, "CLIENT", "ID")
        assert client is await manager.get_connection()


def _retry_warnings(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if event_of(record) == "redis_asgi.client_retries"]


@pytest.mark.parametrize(
    ("make", "warnings"),
    [
        pytest.param(lambda: aioredis.Redis(), 1, id="the library's ten retries"),
        pytest.param(lambda: aioredis.Redis(retry=Retry(NoBackoff(), 1)), 1, id="one retry"),
        pytest.param(lambda: aioredis.Redis(retry=Retry(NoBackoff(), 0)), 0, id="no retry"),
        pytest.param(lambda: aioredis.Redis.from_url("redis://redis.test"), 0, id="from a URL"),
        pytest.param(lambda: aioredis.RedisCluster(host="redis.test"), 1, id="cluster's own retries"),
        pytest.param(
            lambda: aioredis.RedisCluster(host="redis.test", retry=Retry(NoBackoff(), 0)), 0, id="cluster, no retry"
        ),
    ],
)
async def test_client_that_retries_is_warned_about_once(
    caplog: pytest.LogCaptureFixture, make: Callable[[], Client], warnings: int
) -> None:
    """However many parts are given a client, one line says that its retries may count twice, and the fix."""
    client = make()
    for _ in range(3):
        resolve_manager(client, None)

    found = _retry_warnings(caplog)
    assert warnings == len(found)
    for record in found:
        assert vars(record)["code"] == "client_retries"
        assert "Retry(NoBackoff(), 0)" in vars(record)["fix"]
    if isinstance(client, aioredis.RedisCluster):
        await client.aclose()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: redis.Redis(), "is synchronous", id="sync client"),
        pytest.param(lambda: aioredis.Redis().pipeline(), "is a pipeline", id="pipeline"),
        pytest.param(lambda: redis.Redis().pipeline(), "is synchronous", id="sync pipeline"),
        pytest.param(lambda: 6379, "is not a RedisManager", id="number"),
        pytest.param(lambda: "localhost:6379", "REDIS_URL='localhost:6379'", id="not a URL"),
        pytest.param(lambda: f"http://:{SECRET}@x", "REDIS_URL=", id="wrong scheme"),
    ],
)
async def test_unfit_redis_argument_is_refused(make: Callable[[], Any], message: str) -> None:
    """What cannot work is a ``ConfigurationError`` at construction that says what to pass instead."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        resolve_manager(make(), None)

    assert SECRET not in str(caught.value)


async def test_memory_has_no_client() -> None:
    """On ``memory://`` there is nothing to connect to; the error says how to get one."""
    manager = RedisManager(Settings(REDIS_URL="memory://"))

    assert not manager.has_redis
    assert manager.pool is None
    for call in (manager.get_connection, manager.initialize_pool):
        with pytest.raises(ConfigurationError, match="Set REDIS_URL=redis://"):
            await call()
    manager.retain()
    await manager.release()


@pytest.mark.parametrize(
    "values",
    [
        {"REDIS_PASSWORD": SECRET, "REDIS_USERNAME": SECRET, "REDIS_KEY_SECRET": SECRET},
        {"REDIS_URL": f"redis://app:{SECRET}@redis.test:6379/0"},
        {"REDIS_URL": f"redis://redis.test:6379/0?password={SECRET}"},
        {"REDIS_SENTINEL_PASSWORD": SECRET, "REDIS_SENTINELS": "a:1", "REDIS_SENTINEL_MASTER": "mymaster"},
    ],
    ids=["parts", "URL", "query", "sentinel"],
)
async def test_manager_shows_where_but_no_secret(values: dict[str, Any]) -> None:
    """``repr`` of a manager says where it points, and neither it nor its pool shows a password."""
    async with managed(**values) as manager:
        await manager.get_connection()
        shown = f"{manager!r} {manager!s} {manager.pool!r}"

        assert SECRET not in shown
        assert any(place in repr(manager) for place in ("redis.test", "localhost:6379/0", "mymaster"))


# The traps of the library


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
    """An ACL that allows three commands and nothing of CLIENT is enough; the prefix and user are obeyed."""
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
    """``REDIS_RETRY_ATTEMPTS`` are for connecting: a server that comes up a moment later is reached."""
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
    """A storm of cancelled commands over a slow, chopping line: every reply that arrives is its own."""
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
    """Using Redis through the package leaves redis-py's OpenTelemetry metrics off: they can deadlock."""
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


# Ways to reach a server


async def test_parts_name_the_server(redis_server: ExternalServer, private_server: StartServer) -> None:
    """Host, port and database are enough."""
    server = private_server()
    async with managed(REDIS_HOST=server.host, REDIS_PORT=server.port, REDIS_DB=3) as manager:
        await ask(await manager.get_connection(), "SET", "key", "value")

    assert server.command("SELECT", 3)
    assert server.command("GET", "key") == b"value"


async def test_url_names_user_password_and_database(private_server: StartServer) -> None:
    """A URL may carry everything, and wins over the parts."""
    server = private_server()
    server.add_user("app", f">{SECRET}", "~*", "+@all")
    url = f"redis://app:{SECRET}@{server.host}:{server.port}/2"
    async with managed(REDIS_URL=url, REDIS_HOST="no.such.host.test", REDIS_PORT=1, REDIS_DB=9) as manager:
        client = await manager.get_connection()

        assert await ask(client, "ACL", "WHOAMI") == b"app"
        assert "db=2" in str(await ask(client, "CLIENT", "INFO")) or "'db': '2'" in str(
            await ask(client, "CLIENT", "INFO")
        )


async def test_unix_socket(private_server: StartServer) -> None:
    """``unix://`` reaches a server that listens on a socket file only."""
    server = private_server(unix=True)
    async with managed(REDIS_URL=server.url) as manager:
        assert await ask(await manager.get_connection(), "PING")


def tls(certificates: Certificates, **more: Any) -> dict[str, Any]:
    """Settings of a client that has a certificate."""
    pair = certificates.client
    names = {"REDIS_SSL_CERTFILE": pair.cert, "REDIS_SSL_KEYFILE": pair.key}
    return {"REDIS_SSL_CA_CERTS": certificates.ca.cert, "REDIS_TIMEOUT": 2, **names, **more}


@pytest.mark.parametrize("how", ["URL", "parts"])
async def test_tls_with_a_client_certificate(tls_server: Server, certificates: Certificates, how: str) -> None:
    """``rediss://`` and ``REDIS_SSL`` speak TLS with our CA and show our certificate."""
    url = {"REDIS_URL": tls_server.url}
    parts = {"REDIS_SSL": True, "REDIS_HOST": "127.0.0.1", "REDIS_PORT": tls_server.port}
    async with managed(**tls(certificates, **(url if how == "URL" else parts))) as manager:
        assert await ask(await manager.get_connection(), "PING")


@pytest.mark.parametrize("how", ["URL", "parts"])
async def test_tls_with_an_unknown_authority_fails(tls_server: Server, certificates: Certificates, how: str) -> None:
    """A server whose certificate our CA has not signed is not talked to."""
    url: dict[str, Any] = {"REDIS_URL": tls_server.url}
    parts = {"REDIS_SSL": True, "REDIS_HOST": "127.0.0.1", "REDIS_PORT": tls_server.port}
    values = tls(certificates, **(url if how == "URL" else parts), REDIS_SSL_CA_CERTS=certificates.other_ca.cert)
    async with managed(**values) as manager:
        with pytest.raises(RedisConnectionError, match="CERTIFICATE_VERIFY_FAILED") as caught:
            await ask(await manager.get_connection(), "PING")

    assert Failure.CONNECTION is classify(caught.value)


async def test_tls_without_a_ca_uses_the_systems(tls_server: Server) -> None:
    """Without ``REDIS_SSL_CA_CERTS`` a private CA is not trusted: verification is never off."""
    async with managed(REDIS_URL=tls_server.url, REDIS_TIMEOUT=2) as manager:
        with pytest.raises(RedisConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            await ask(await manager.get_connection(), "PING")


async def test_tls_verifies_the_host_name(stranger_server: Server, certificates: Certificates) -> None:
    """A good certificate for another host is refused."""
    async with managed(**tls(certificates, REDIS_URL=stranger_server.url)) as manager:
        with pytest.raises(RedisConnectionError, match=r"[Hh]ostname mismatch"):
            await ask(await manager.get_connection(), "PING")


@pytest.mark.parametrize("how", ["URL", "parts"])
async def test_cluster_serves_keys_of_every_node(cluster: Cluster, how: str) -> None:
    """``REDIS_CLUSTER`` finds all nodes from one and closes cleanly; it has no single pool."""
    node = cluster.nodes[1]
    where = {"REDIS_URL": node.url} if how == "URL" else {"REDIS_HOST": node.host, "REDIS_PORT": node.port}
    async with managed(REDIS_CLUSTER=True, **where) as manager:
        client = await manager.get_connection()
        for i in range(20):
            await ask(client, "SET", f"key-{i}", str(i))
        assert manager.pool is None

    sizes = [int(each.command("DBSIZE")) for each in cluster.nodes]
    assert sum(sizes) == 20
    assert all(sizes)


async def test_cluster_callers_wait_for_a_turn(cluster: Cluster) -> None:
    """More callers than ``REDIS_POOL_SIZE`` wait; the nodes' pools never say "Too many connections"."""
    async with managed(REDIS_CLUSTER=True, REDIS_URL=cluster.url, REDIS_POOL_SIZE=2) as manager:
        client = await manager.get_connection()
        replies = await asyncio.gather(*(ask(client, "INCR", "counter") for _ in range(200)))

        assert list(range(1, 201)) == sorted(replies)


async def test_cluster_client_follows_a_moved_slot(private_cluster: Cluster) -> None:
    """A slot that moves to another node is found there, and nothing is counted twice."""
    async with managed(REDIS_CLUSTER=True, REDIS_URL=private_cluster.url) as manager:
        client = await manager.get_connection()
        assert await ask(client, "INCR", "key") == 1
        source = private_cluster.node_of("key")
        private_cluster.move_slot(12539, next(node for node in private_cluster.nodes if node is not source))

        assert await ask(client, "INCR", "key") == 2


async def test_sentinel_finds_the_master_and_the_next_one(sentinels: SentinelTrio) -> None:
    """Through sentinels the master is reached, and after a failover the promoted replica."""
    async with managed(
        REDIS_SENTINELS=sentinels.addresses, REDIS_SENTINEL_MASTER=sentinels.MASTER, REDIS_TIMEOUT=1
    ) as manager:
        client = await manager.get_connection()
        assert await ask(client, "SET", "key", "value")
        assert manager.pool is not None
        before, after = sentinels.servers
        assert before.client().get("key") == b"value"
        before.kill()
        await asyncio.to_thread(wait_until, lambda: sentinels.primary() is after, "failover")

        deadline = fair_time() + 5
        while True:
            try:
                await ask(client, "SET", "key", "again")
                break
            except (RedisError, OSError):
                assert fair_time() < deadline
                await asyncio.sleep(0.02)
        assert after.client().get("key") == b"again"


async def test_hung_sentinel_is_not_waited_for(sentinels: SentinelTrio) -> None:
    """All are asked at once: the one that answers is enough; when none does, the reason is that there is no master."""
    async with managed(
        REDIS_SENTINELS=sentinels.addresses, REDIS_SENTINEL_MASTER=sentinels.MASTER, REDIS_TIMEOUT=1
    ) as manager:
        for sentinel in sentinels.sentinels[:2]:
            sentinel.pause()
        try:
            client = await manager.get_connection()
            began = fair_time()
            assert await ask(client, "PING")
            assert fair_time() - began < 0.5
        finally:
            for sentinel in sentinels.sentinels[:2]:
                sentinel.resume()
        await manager.close()
        for sentinel in sentinels.sentinels:
            sentinel.kill()
        with pytest.raises(MasterNotFoundError):
            await ask(await manager.get_connection(), "PING")


async def test_sentinel_that_knows_no_master_is_passed_over(
    sentinels: SentinelTrio, redis_server: ExternalServer
) -> None:
    """One that watches others, and one that is none at all."""
    stranger = redis_server.url.rpartition("/")[2]
    settings: dict[str, Any] = {"REDIS_SENTINELS": (stranger, *sentinels.addresses), "REDIS_TIMEOUT": 1}
    async with managed(**settings, REDIS_SENTINEL_MASTER=sentinels.MASTER) as manager:
        assert await ask(await manager.get_connection(), "PING")
    async with managed(**settings, REDIS_SENTINEL_MASTER="another") as manager:
        with pytest.raises(MasterNotFoundError, match="'another'"):
            await ask(await manager.get_connection(), "PING")


# redis_operation


def _errors(caplog: pytest.LogCaptureFixture) -> list[tuple[str, int, str, str]]:
    return [
        (event_of(r), r.levelno, vars(r)["operation"], vars(r)["error"])
        for r in caplog.records
        if r.name.startswith("redis_asgi")
    ]


@pytest.mark.parametrize(
    ("error", "event"),
    [
        pytest.param(RedisConnectionError("x"), "redis_asgi.connection_failed", id="connection"),
        pytest.param(AuthenticationError("x"), "redis_asgi.connection_failed", id="authentication"),
        pytest.param(ResponseError("x"), "redis_asgi.operation_failed", id="reply"),
        pytest.param(RedisTimeoutError("x"), "redis_asgi.operation_failed", id="timeout"),
    ],
)
async def test_operation_logs_redis_errors_by_kind_and_reraises(
    caplog: pytest.LogCaptureFixture, error: Exception, event: str
) -> None:
    """The error that was raised comes out as it was; one line says which kind and which operation."""

    @redis_operation
    async def fetch() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        await fetch()

    assert error is caught.value
    assert [(event, logging.ERROR, fetch.__qualname__, type(error).__name__)] == _errors(caplog)


async def test_operation_leaves_other_errors_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Errors that are not of Redis are none of its business."""

    @redis_operation
    async def fetch() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await fetch()

    assert [] == _errors(caplog)


async def test_operation_keeps_signature_and_metadata() -> None:
    """A decorated function looks and behaves like the function; parentheses make no difference."""

    async def fetch(key: str, *, default: int = 3) -> tuple[str, int]:
        """Fetch."""
        return key, default

    for decorated in (redis_operation(fetch), redis_operation()(fetch)):
        plain: Any = decorated
        assert ("x", 3) == await decorated("x")
        assert ("y", 4) == await decorated("y", default=4)
        assert inspect.signature(fetch) == inspect.signature(decorated)
        assert ("fetch", "Fetch.") == (plain.__name__, plain.__doc__)
        assert plain.__wrapped__ is fetch
        assert inspect.iscoroutinefunction(decorated)


def test_operation_refuses_what_is_not_async_def() -> None:
    """Only ``async def`` functions can be waited for; anything else fails when it is decorated."""

    def plain() -> None: ...

    async def generator() -> AsyncIterator[int]:
        yield 1

    class CallableObject:
        async def __call__(self) -> None: ...

    for unfit in (plain, generator, CallableObject(), CallableObject, lambda: None, 3):
        with pytest.raises(TypeError, match="async def"):
            redis_operation(cast("Any", unfit))
        with pytest.raises(TypeError, match="async def"):
            redis_operation()(cast("Any", unfit))


async def test_a_given_client_is_one_manager(redis_url: str) -> None:
    """Two parts given the same client share its batches, refusals and local counters."""
    client = aioredis.Redis.from_url(redis_url)
    first, _ = resolve_manager(client, None)
    second, _ = resolve_manager(client, None)
    other, _ = resolve_manager(aioredis.Redis.from_url(redis_url), None)
    await client.aclose()

    assert first is second
    assert first is not other


async def test_unverified_tls_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    """A URL that turns certificate checks off logs a warning with the fix, and no password."""
    manager = RedisManager(Settings(REDIS_URL="valkeys://:hunter2@localhost:6380?ssl_check_hostname=no"))
    await manager.get_connection()
    await manager.close()
    (record,) = [record for record in caplog.records if event_of(record) == "redis_asgi.tls_unverified"]

    assert "REDIS_SSL_CA_CERTS" in record.__dict__["fix"]
    assert "hunter2" not in str(record.__dict__)


async def test_client_outlives_a_manager_that_nobody_keeps(redis_url: str) -> None:
    """What a manager has opened in this loop stays open until the loop ends, whoever holds the manager."""
    client = await RedisManager(Settings(REDIS_URL=redis_url)).get_connection()
    gc.collect()
    answers = await asyncio.gather(*(client.ping() for _ in range(5)))

    assert all(answers)


def test_loops_are_not_kept(redis_url: str) -> None:
    """A worker that runs one loop after the other keeps nothing of those that have ended."""
    manager = RedisManager(Settings(REDIS_URL=redis_url))

    async def main() -> None:
        await (await manager.get_connection()).ping()

    for _ in range(5):
        asyncio.run(main())

    assert {} == manager._opened


async def test_a_debugger_shows_states_and_no_secret(private_server: StartServer) -> None:
    """Pool, breaker, batcher and stores say how they stand; none shows a password."""
    server = private_server("--requirepass", SECRET)
    async with managed(REDIS_URL=server.url.replace("://", f"://:{SECRET}@")) as manager:
        await RateLimiter(manager).consume("client")
        store, batcher = vectors_of(manager), manager.per_client(make_batcher)
        await store.lookup([b"a"], 1)
        shown = [repr(each) for each in (manager, manager.pool, manager.breaker(), batcher, store)]
        manager.breaker().failed(Failure.AUTH)
        shown.append(repr(manager.breaker()))

    assert not [text for text in shown if SECRET in text]
    assert shown[1].endswith("1 in use, 1 idle, at most 20>")
    assert ["closed", "open for auth"] == [text.rstrip(">").split(", ")[-1] for text in (shown[2], shown[5])]
    assert "0 checks wait, 0 under way" in shown[3]
    assert "breaker closed" in shown[4]
