"""What a Redis client raises, sorted; real errors wherever a server can be made to give them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import hiredis
import pytest
import redis.asyncio as aioredis
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import NoBackoff
from redis.crc import key_slot
from starlette.exceptions import HTTPException

from redis_asgi import ConfigurationError, RateLimitExceeded, RedisASGIError
from redis_asgi.errors import ArgumentError, Failure, OddReply, classify, classify_reply, is_crossslot

from .conftest import StartServer
from .kit.logs import event_of
from .kit.processes import run_python
from .kit.proxy import FaultProxy, Mode
from .kit.servers import Cluster, Server, free_port

pytestmark = [pytest.mark.anyio, pytest.mark.server]


def client_of(url: str, **options: Any) -> aioredis.Redis:
    """A client that neither retries nor waits."""
    options = {"socket_timeout": 0.3, **options}
    return aioredis.Redis.from_url(url, protocol=2, retry=Retry(NoBackoff(), 0), **options)


async def failure_of(client: aioredis.Redis, *command: str | int) -> Failure:
    """The failure that *command* ends in."""
    execute: Any = client.execute_command
    try:
        await execute(*command)
    except Exception as error:  # what classify() is for
        return classify(error)
    pytest.fail(f"{command} worked")


async def block(client: aioredis.Redis) -> None:
    """Keep one connection busy for 0.2 s."""
    execute: Any = client.execute_command
    await execute("BLPOP", "never", 0.2)


def test_tree_is_as_drawn() -> None:
    """One root; every leaf is a built-in or a framework's class too."""
    assert issubclass(RedisASGIError, Exception)
    assert issubclass(ConfigurationError, RedisASGIError)
    assert issubclass(ArgumentError, ConfigurationError)
    assert issubclass(ArgumentError, TypeError)
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(RateLimitExceeded, RedisASGIError)
    assert issubclass(RateLimitExceeded, HTTPException)


async def test_refused_port_is_connection(private_server: StartServer) -> None:
    """A server that is gone refuses."""
    server = private_server()
    server.kill()
    async with client_of(server.url) as client:
        assert await failure_of(client, "PING") is Failure.CONNECTION


async def test_unknown_host_is_connection() -> None:
    """A name that does not resolve is the same to a caller."""
    async with client_of("redis://no-such-host.invalid") as client:
        assert await failure_of(client, "PING") is Failure.CONNECTION


async def test_paused_server_is_timeout(private_server: StartServer) -> None:
    """A server that hangs, with or without an open connection."""
    server = private_server()
    async with client_of(server.url) as client, client_of(server.url) as late:
        await client.ping()
        server.pause()
        assert await failure_of(client, "PING") is Failure.TIMEOUT
        assert await failure_of(late, "PING") is Failure.TIMEOUT
        server.resume()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        pytest.param("reset", Failure.CONNECTION, id="reset"),
        pytest.param("cut_replies", Failure.CONNECTION, id="closed mid-flight"),
        pytest.param("blackhole", Failure.TIMEOUT, id="black hole"),
    ],
)
async def test_fault_on_the_way(private_server: StartServer, mode: Mode, expected: Failure) -> None:
    """What a bad network does to an open connection."""
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy, client_of(proxy.url) as client:
        await client.ping()
        await proxy.set(mode)
        assert expected is await failure_of(client, "PING")


async def test_missing_and_wrong_password_are_auth(private_server: StartServer) -> None:
    """NOAUTH, WRONGPASS and a user nobody knows."""
    server = private_server("--requirepass", "right")
    for options in ({}, {"password": "wrong"}, {"username": "nobody", "password": "right"}):
        async with client_of(server.url, **options) as client:
            assert await failure_of(client, "PING") is Failure.AUTH


async def test_missing_right_is_permission(private_server: StartServer) -> None:
    """NOPERM for a command, for a key, and inside a script, where it comes as a plain error."""
    server = private_server()
    server.add_user("app", ">pw", "~mine:*", "+get", "+eval", "+ping")
    async with client_of(server.url, username="app", password="pw") as client:
        assert await failure_of(client, "SET", "mine:x", "1") is Failure.PERMISSION
        assert await failure_of(client, "GET", "other:x") is Failure.PERMISSION
        for script in ("return redis.call('SET', KEYS[1], 1)", "return redis.call('GET', 'other:x')"):
            assert await failure_of(client, "EVAL", script, 1, "mine:x") is Failure.PERMISSION


async def test_replica_is_readonly(replica: Server) -> None:
    """A write to a replica, plain and inside a script."""
    async with client_of(replica.url) as client:
        assert await failure_of(client, "SET", "x", "1") is Failure.READONLY
        assert await failure_of(client, "EVAL", "return redis.call('SET', KEYS[1], 1)", 1, "x") is Failure.READONLY


CAUGHT = "local fine, error = pcall(redis.call, {0}) return type(error) == 'table' and error.err or tostring(error)"
RAISED = """
local fine, error = pcall(function() local said = redis.pcall({0}) error(said.err) end)
return type(error) == 'table' and error.err or tostring(error)
"""
ESCAPED = "\n\nreturn redis.call({0})"


async def failure_in(client: aioredis.Redis, script: str) -> Failure:
    """The failure that *script* answers, or ends in."""
    execute: Any = client.execute_command
    try:
        said = await execute("EVAL", script, 1, "mine")
    except Exception as error:  # what classify() is for
        return classify(error)
    return classify_reply(said.decode())


@pytest.mark.parametrize("script", [CAUGHT, RAISED, ESCAPED], ids=["caught", "raised again", "escaped"])
async def test_error_inside_a_script_is_read_past_its_position(any_server: StartServer, script: str) -> None:
    """Whatever a version puts before what went wrong in a script,
    and however it gets out, it is of its own kind.
    """
    server = any_server()
    server.add_user("app", ">pw", "~mine", "+@all", "-hset")
    write = script.format("'SET', 'mine', '1'")
    async with client_of(server.url) as client, client_of(server.url, username="app", password="pw") as app:
        assert await failure_in(app, script.format("'HSET', 'mine', 'a', 'b'")) is Failure.PERMISSION
        assert await failure_in(app, script.format("'GET', 'other'")) is Failure.PERMISSION
        await client.hset("hash", "a", "b")
        assert await failure_in(client, script.format("'GET', 'hash'")) is Failure.REPLY
        assert await failure_in(client, script.format("'NOSUCHCOMMAND'")) is Failure.REPLY
        server.command("CONFIG", "SET", "maxmemory", "1")
        assert await failure_in(client, write) is Failure.OOM
        server.command("CONFIG", "SET", "maxmemory", "0")
        server.command("CONFIG", "SET", "min-replicas-to-write", "1")
        assert await failure_in(client, write) is Failure.READONLY
        server.command("CONFIG", "SET", "min-replicas-to-write", "0")
        server.command("REPLICAOF", "127.0.0.1", "1")
        assert await failure_in(client, write) is Failure.READONLY


async def test_slot_of_another_inside_a_script_is_cluster(any_server: StartServer) -> None:
    """A script that meets a key whose slot nobody serves is told so without a word like
    CLUSTERDOWN.
    """
    server = any_server("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no")
    server.own_all_slots()
    server.command("CLUSTER", "DELSLOTS", key_slot(b"key"))
    async with client_of(server.url) as client:
        for script in (CAUGHT, RAISED, ESCAPED):
            assert await failure_in(client, script.format("'GET', 'key'")) is Failure.CLUSTER, script


async def test_full_server_is_oom(private_server: StartServer) -> None:
    """Maxmemory reached with nothing to evict, plain and inside a script."""
    server = private_server("--maxmemory", "1")
    async with client_of(server.url) as client:
        assert await failure_of(client, "SET", "x", "1") is Failure.OOM
        assert await failure_of(client, "EVAL", "return redis.call('INCR', KEYS[1])", 1, "x") is Failure.OOM


async def test_somebodys_script_makes_it_busy(private_server: StartServer) -> None:
    """While a script runs too long every command, PING too, is answered BUSY."""
    server = private_server("--lua-time-limit", "10")
    async with client_of(server.url) as client, client_of(server.url) as other:
        loop: Any = other.execute_command
        script = asyncio.create_task(loop("EVAL", "while true do end", 0))
        await asyncio.sleep(0.1)
        try:
            assert await failure_of(client, "PING") is Failure.BUSY
        finally:
            server.command("SCRIPT", "KILL")
            await asyncio.gather(script, return_exceptions=True)


async def test_other_error_replies_are_reply(redis_url: str) -> None:
    """WRONGTYPE, an unknown command, a database that is not there."""
    async with client_of(redis_url) as client:
        await client.set("text", "x")
        assert await failure_of(client, "HGETALL", "text") is Failure.REPLY
        assert await failure_of(client, "NOSUCHCOMMAND") is Failure.REPLY
    async with client_of(redis_url, db=9999) as client:
        assert await failure_of(client, "PING") is Failure.REPLY


async def test_what_cannot_be_sent_is_reply(redis_url: str) -> None:
    """Hostile input is no trouble of the server: it must not open a breaker."""
    async with client_of(redis_url) as client:
        assert await failure_of(client, "GET", "\ud800") is Failure.REPLY
        assert await failure_of(client, "GET", None) is Failure.REPLY  # type: ignore[arg-type]  # the point


async def test_exhausted_pool_is_pool(redis_url: str) -> None:
    """redis-py's own pool raises when every connection is in use."""
    async with client_of(redis_url, max_connections=1, socket_timeout=5) as client:
        waiting = asyncio.create_task(block(client))
        await asyncio.sleep(0.05)
        assert await failure_of(client, "PING") is Failure.POOL
        await waiting


async def test_too_many_clients_is_connection(private_server: StartServer) -> None:
    """maxclients: the server hangs up."""
    server = private_server("--maxclients", "2")
    async with client_of(server.url) as one, client_of(server.url) as two:
        await one.ping()
        assert await failure_of(two, "PING") is Failure.CONNECTION


def test_client_of_another_loop_is_wrong_loop(redis_url: str) -> None:
    """A client that was used in a loop that has ended raises a ``RuntimeError``."""
    script = """
import asyncio, sys
import redis.asyncio
from redis_asgi.errors import classify
client = redis.asyncio.Redis.from_url(sys.argv[1])
async def use():
    await client.ping()
asyncio.run(use())
try:
    asyncio.run(use())
except RuntimeError as error:
    print(classify(error))
"""
    # The misuse leaves sockets behind, hence another process and no -W error.
    assert run_python(script, redis_url, flags=()).stdout == "wrong_loop\n"


async def test_unserved_and_foreign_slots_are_cluster(private_cluster: Cluster) -> None:
    """A key of a slot that nobody serves, a key of another node, and keys of two slots at once."""
    node = private_cluster.node_of("key")
    other = next(each for each in private_cluster.nodes if each is not node)
    async with client_of(other.url) as client:
        assert await failure_of(client, "GET", "key") is Failure.CLUSTER
    async with client_of(node.url) as client:
        assert await failure_of(client, "MGET", "key", "other-key") is Failure.CLUSTER
        node.command("CLUSTER", "DELSLOTS", key_slot(b"key"))
        assert await failure_of(client, "GET", "key") is Failure.CLUSTER


async def test_master_no_sentinel_knows_is_cluster() -> None:
    """Sentinels that are gone, or know no such master."""
    make: Any = Sentinel
    sentinel = make([("127.0.0.1", free_port())], sentinel_kwargs={"retry": Retry(NoBackoff(), 0)})
    with pytest.raises(MasterNotFoundError) as caught:
        await sentinel.discover_master("mymaster")
    for each in sentinel.sentinels:
        await each.aclose()

    assert classify(caught.value) is Failure.CLUSTER


@asynccontextmanager
async def answering(line: str) -> AsyncIterator[str]:
    """A server that answers everything with one line; gives its URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            writer.write(f"{line}\r\n".encode())
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("-LOADING Redis is loading the dataset in memory", Failure.LOADING),
        ("-BUSY Redis is busy running a script.", Failure.BUSY),
        ("-MASTERDOWN Link with MASTER is down", Failure.READONLY),
        ("-CLUSTERDOWN The cluster is down", Failure.CLUSTER),
        ("-TRYAGAIN Multiple keys request during rehashing of slot", Failure.CLUSTER),
        ("-MOVED 3999 127.0.0.1:6381", Failure.CLUSTER),
        ("-ASK 3999 127.0.0.1:6381", Failure.CLUSTER),
        ("-CROSSSLOT Keys in request don't hash to the same slot", Failure.CLUSTER),
        ("-MISCONF Redis is configured to save RDB snapshots", Failure.READONLY),
        ("-NOREPLICAS Not enough good replicas to write.", Failure.READONLY),
        ("-READONLY You can't write against a read only replica.", Failure.READONLY),
        ("-OOM command not allowed when used memory > 'maxmemory'.", Failure.OOM),
        ("-NOAUTH Authentication required.", Failure.AUTH),
        ("-WRONGPASS invalid username-password pair", Failure.AUTH),
        ("-NOPERM this user has no permissions", Failure.PERMISSION),
        ("-ERR Protocol error: unauthenticated multibulk length", Failure.AUTH),
        ("-ERR Protocol error: unauthenticated bulk length", Failure.AUTH),
        ("-ERR Protocol error: invalid bulk length", Failure.REPLY),
        ("-ERR max number of clients reached", Failure.CONNECTION),
        ("-WRONGTYPE Operation against a key", Failure.REPLY),
        ("-ERR unknown command", Failure.REPLY),
    ],
    ids=lambda value: value.split()[0].lstrip("-") if isinstance(value, str) and value[:1] == "-" else None,
)
async def test_error_line_as_redis_py_raises_it(line: str, expected: Failure) -> None:
    """Each error reply arrives at its failure through the class redis-py makes of it."""
    async with answering(line) as url, client_of(url, driver_info=None) as client:
        assert expected is await failure_of(client, "GET", "x")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (exceptions.SlotNotCoveredError("x"), Failure.CLUSTER),
        (exceptions.RedisClusterException("x"), Failure.CLUSTER),
        (exceptions.ClusterDownError("x"), Failure.CLUSTER),
        (exceptions.MaxConnectionsError("x"), Failure.POOL),
        (exceptions.BusyLoadingError("x"), Failure.LOADING),
        (exceptions.AuthenticationError("x"), Failure.AUTH),
        (exceptions.AuthorizationError("x"), Failure.PERMISSION),
        (exceptions.TimeoutError("x"), Failure.TIMEOUT),
        (TimeoutError("x"), Failure.TIMEOUT),
        (OSError("x"), Failure.CONNECTION),
        (RuntimeError("Event loop is closed"), Failure.WRONG_LOOP),
        (exceptions.InvalidResponse("x"), Failure.CONNECTION),
        (KeyError("x"), Failure.CONNECTION),
        (ValueError("x"), Failure.CONNECTION),
        (hiredis.ProtocolError("x"), Failure.CONNECTION),
        (EOFError("x"), Failure.CONNECTION),
        (OddReply("x"), Failure.REPLY),
        (TypeError("x"), Failure.DEFECT),
        (AttributeError("x"), Failure.DEFECT),
        (NotImplementedError("x"), Failure.DEFECT),
        (RecursionError("x"), Failure.DEFECT),
        (Exception("x"), Failure.DEFECT),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_class_decides_where_there_is_no_reply(error: Exception, expected: Failure) -> None:
    """The classes of redis-py, most specific first; what is unknown is a defect."""
    assert expected is classify(error)


def test_a_defect_is_logged_once_with_its_traceback(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place that raises what no Redis causes is told once, however often it does."""
    monkeypatch.setattr("redis_asgi.errors._said", set())

    def one() -> None:
        raise TypeError("takes no such argument")

    def other() -> None:
        raise AttributeError("has no such attribute")

    for raise_it in (one, other, one, other):
        with pytest.raises((TypeError, AttributeError)) as caught:
            raise_it()
        assert classify(caught.value) is Failure.DEFECT

    assert ["redis_asgi.defect"] * 2 == [event_of(record) for record in caplog.records]
    assert "in one" in caplog.text
    assert "has no such attribute" in caplog.text


@pytest.mark.parametrize("text", ["", " ", "-", "busy", "BUSYKEY Target key name already exists", "LOADINGS"])
def test_only_the_whole_first_word_counts(text: str) -> None:
    """A reply that merely starts like a known one is of no known kind."""
    assert classify_reply(text) is Failure.REPLY


def test_failures_are_labels() -> None:
    """Failures are the closed set that logs, health codes and metrics use."""
    expected = "timeout connection auth permission readonly loading busy oom cluster pool wrong_loop reply defect"

    assert expected.split() == [str(failure) for failure in Failure]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (exceptions.ClusterCrossSlotError("Keys in request don't hash to the same slot"), True),
        (Exception("CROSSSLOT Keys in request don't hash to the same slot"), True),
        (exceptions.ResponseError("MOVED 1 127.0.0.1:1"), False),
        (b"CROSSSLOT", False),
        (None, False),
    ],
)
def test_a_refusal_of_keys_of_several_slots_is_told_apart(reply: object, expected: bool) -> None:
    """As redis-py raises it, and as hiredis gives it; a value is none."""
    assert expected is is_crossslot(reply)
