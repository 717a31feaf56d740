"""A denial that Redis could not be told reaches it as soon as it answers again."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
import redis as sync_redis
from starlette.types import Receive, Scope, Send

from redis_asgi import EmbeddingCacheMiddleware, Settings
from redis_asgi.connection.manager import RedisManager
from redis_asgi.embeddings.storage import owed_writes as module
from redis_asgi.embeddings.storage.operations import Write, WriteResult
from redis_asgi.embeddings.storage.owed_writes import Owed, Sent
from redis_asgi.embeddings.storage.pipeline import Command
from redis_asgi.embeddings.storage.store import vectors_of
from redis_asgi.errors import Failure

from ..kit.embedding_apps import Spy, cache_status, client, respond, server
from ..kit.patience import PATIENCE, until
from ..kit.servers import Cluster, ExternalServer, Server
from .test_faults import settings_of

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVERY", 0.01)
    monkeypatch.setattr(module, "_SLOWLY", 0.02)


@pytest.fixture
async def manager(own_server: Server) -> AsyncIterator[RedisManager]:
    """Of a server that a test may stop."""
    manager = RedisManager(settings_of(own_server.url, EMBEDDING_CACHE_TIMEOUT=0.1))
    yield manager
    await manager.close()


NOTE = Write(b"denied", b"at", 60)


async def test_what_is_revoked_is_gone_at_once(redis_url: str, redis_client: sync_redis.Redis) -> None:
    """And the note of it is there, with its time to live."""
    for url in (redis_url, "memory://"):
        manager = RedisManager(Settings(REDIS_URL=url))
        store = vectors_of(manager)
        await store.write([Write(b"a", b"1", 60), Write(b"b", b"2", 60)])
        assert WriteResult(3) == await store.revoke([b"a", b"absent"], 5, [NOTE])
        assert [None, b"2", b"at"] == await store.lookup([b"a", b"b", b"denied"], 5)
        await manager.close()
    assert 58 < redis_client.ttl("denied") <= 60


@pytest.mark.parametrize("how", ["hung", "killed"])
async def test_what_could_not_be_revoked_is_when_redis_is_back(
    own_server: Server, manager: RedisManager, how: str
) -> None:
    """Nobody has to ask for anything in between, and nothing else is touched."""
    store = vectors_of(manager)
    every = [Write(b"%d" % number, b"lease", 60) for number in range(200)]
    assert WriteResult(200) == await store.write(every)
    own_server.pause()
    for number in range(150):
        done = await store.revoke([b"%d" % number], 0.02, [NOTE] if number == 0 else [])
        assert 0 == done.count
        assert done.failure is not None
    if how == "killed":
        own_server.restart()
        for each in every:
            own_server.command("SET", each.name, each.value)
    else:
        own_server.resume()
    await until(lambda: own_server.client().dbsize() == 51)
    assert b"at" == own_server.client().get("denied")
    async with asyncio.timeout(PATIENCE):
        while await store.lookup([b"0", b"149", b"150", b"199"], 1) != [None, None, b"lease", b"lease"]:
            await asyncio.sleep(0.01)


async def test_a_lost_right_is_tried_again_now_and_then(own_server: Server) -> None:
    """What is refused is kept, for the day that it is allowed."""
    own_server.add_user("app", ">pw", "~*", "+@all", "-del")
    manager = RedisManager(settings_of(own_server.url, REDIS_USERNAME="app", REDIS_PASSWORD="pw"))
    store = vectors_of(manager)
    assert WriteResult(1) == await store.write([Write(b"a", b"1", 60)])
    assert WriteResult(1, Failure.PERMISSION) == await store.revoke([b"a"], 1, [NOTE])
    assert [b"1", b"at"] == await store.lookup([b"a", b"denied"], 1)
    own_server.add_user("app", ">pw", "~*", "+@all")
    await until(lambda: own_server.client().exists("a") == 0)
    await manager.close()


async def test_closing_gives_up_what_is_owed(own_server: Server, manager: RedisManager) -> None:
    """No task is left behind, and what is opened next owes nothing."""
    own_server.pause()
    assert 0 == (await vectors_of(manager).revoke([b"a"], 0.02)).count
    await manager.close()
    own_server.resume()
    own_server.command("SET", "a", "1")
    assert [b"1"] == await vectors_of(manager).lookup([b"a"], 1)


async def test_the_oldest_go_when_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The latest command of a key is the one that is sent, in the order of the last refusals."""
    monkeypatch.setattr(module, "_MOST", 3)
    sent: list[Command] = []

    async def tell(commands: Sequence[Command]) -> Sent:
        sent.extend(commands)
        return (), None

    queue = Owed(tell)
    queue.add([("DEL", b"%d" % number) for number in range(5)])
    queue.add([("SET", b"2", b"new")])
    assert 3 == len(queue)
    await until(lambda: not len(queue))
    assert [("DEL", b"3"), ("DEL", b"4"), ("SET", b"2", b"new")] == sent


async def test_what_is_owed_anew_while_it_is_sent_is_sent_again() -> None:
    """A refusal that comes meanwhile is newer than what Redis has just been told."""
    sent: list[Command] = []

    async def tell(commands: Sequence[Command]) -> Sent:
        sent.extend(commands)
        if len(sent) == 1:
            queue.add([("DEL", bytes([97]))])
        return (), None

    queue = Owed(tell)
    queue.add([("DEL", bytes([97]))])
    await until(lambda: not len(queue))
    assert [("DEL", b"a")] * 2 == sent


async def test_a_cluster_is_told_node_by_node(private_cluster: Cluster) -> None:
    """Those of the hung node wait for it, and nobody waits for them."""
    settings = settings_of(private_cluster.url, REDIS_CLUSTER=True, EMBEDDING_CACHE_TIMEOUT=0.1)
    manager = RedisManager(settings)
    store = vectors_of(manager)
    names = [b"%d" % number for number in range(300)]
    assert WriteResult(300) == await store.write([Write(name, b"lease", 60) for name in names], 5)
    lost, *well = private_cluster.nodes
    theirs = [name for name in names if private_cluster.node_of(name) is lost]
    lost.pause()
    assert 300 - len(theirs) == (await store.revoke(names, 0.1)).count
    assert [0, 0] == [node.client().dbsize() for node in well]
    lost.resume()
    await until(lambda: lost.client().dbsize() == 0)
    await manager.close()


async def test_without_a_slot_table_all_is_owed(private_cluster: Cluster) -> None:
    """And told when there is one."""
    manager = RedisManager(settings_of(private_cluster.url, REDIS_CLUSTER=True, EMBEDDING_CACHE_TIMEOUT=0.1))
    for node in private_cluster.nodes:
        node.command("SET", next(name for name in ("a", "b", "c") if private_cluster.node_of(name) is node), "1")
    for node in private_cluster.nodes:
        node.pause()
    assert 0 == (await vectors_of(manager).revoke([b"a", b"b", b"c"], 0.05)).count
    for node in private_cluster.nodes:
        node.resume()
    await until(lambda: [node.client().dbsize() for node in private_cluster.nodes] == [0, 0, 0])
    await manager.close()


async def test_a_shared_server_is_left_in_peace(redis_server: ExternalServer) -> None:
    """Where nothing is owed there is no task."""
    manager = RedisManager(Settings(REDIS_URL=redis_server.url))
    before = len(asyncio.all_tasks())
    assert WriteResult(1) == await vectors_of(manager).revoke([b"a"], 1)
    assert before == len(asyncio.all_tasks())
    await manager.close()


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refusal_while_redis_is_away_reaches_other_processes(own_server: Server, status: int) -> None:
    """Whose lease is in Redis is asked again by everyone soon after Redis is back; others stay let
    in.
    """
    allowed = {"alice", "bob"}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if dict(scope["headers"])[b"authorization"].decode() in allowed:
            await embeddings(scope, receive, send)
        else:
            await respond(send, b"{}", status)

    embeddings = server(Spy())
    managers = [RedisManager(settings_of(own_server.url, EMBEDDING_CACHE_TIMEOUT=0.1)) for _ in range(2)]
    workers = [client(EmbeddingCacheMiddleware(app, namespace="n", redis=manager)) for manager in managers]

    async def ask(worker: int, who: str, item: str = "text") -> tuple[int, str]:
        body = {"model": "m", "input": [item]}
        response = await workers[worker].post("/v1/embeddings", json=body, headers={"authorization": who})
        return response.status_code, cache_status(response)

    for who in ("alice", "bob"):
        await ask(0, who)
        assert "hit" in (await ask(1, who))[1]
    allowed.remove("alice")
    own_server.pause()
    assert status == (await ask(0, "alice", "new"))[0]
    own_server.resume()
    async with asyncio.timeout(PATIENCE):
        while "hit" not in (await ask(1, "bob"))[1] or (await ask(1, "alice"))[0] == 200:
            await asyncio.sleep(0.01)
    assert status == (await ask(1, "alice"))[0]
    assert "hit" in (await ask(1, "bob"))[1]
    for worker, manager in zip(workers, managers, strict=True):
        await worker.aclose()
        await manager.close()
