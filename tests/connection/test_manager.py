"""One client per loop: opened at first use, waited for, closed by its last user."""

import asyncio
import gc
import threading
import time

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import (
    MaxConnectionsError,
)

from redis_asgi import RateLimiter, RedisManager, Settings
from redis_asgi.connection.client_factory import Client, QueueingPool
from redis_asgi.embeddings.storage.store import vectors_of
from redis_asgi.errors import Failure, classify
from redis_asgi.ratelimit.transport.cluster_batcher import make_batcher

from ..conftest import StartServer
from ..kit.fair_time import fair_time
from ..kit.processes import run_python
from ..kit.servers import wait_until
from .managers import SECRET, all_connections, ask, managed

pytestmark = pytest.mark.anyio


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
    """Nobody waits for a connection longer than ``REDIS_TIMEOUT``;
    it is told apart from a network failure.
    """
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
    """``asyncio.run`` without ``close()`` leaves no warning,
    with warnings as errors and in development mode.
    """
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


async def test_client_outlives_a_manager_that_nobody_keeps(redis_url: str) -> None:
    """What a manager has opened in this loop stays open until the loop ends, whoever holds the
    manager.
    """
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
