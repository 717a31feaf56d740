"""Diagnosis of a deployment that is well, and of what its server says."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from redis_asgi import Settings
from redis_asgi.inspection.diagnosis import diagnose
from redis_asgi.inspection.rights import rights_of

from ..conftest import StartServer
from ..kit.proxy import FaultProxy
from ..kit.servers import Server, find_binaries, wait_until
from ..kit.sharding import ShardingProxy
from .diagnosing import PASSWORD, findings, levels, the_only, wrong

pytestmark = pytest.mark.anyio


async def _read_command(reader: asyncio.StreamReader) -> list[bytes]:
    count = int((await reader.readline())[1:])
    words = []
    for _ in range(count):
        size = int((await reader.readline())[1:])
        words.append((await reader.readexactly(size + 2))[:-2])
    return words


async def _read_reply(reader: asyncio.StreamReader) -> bytes:
    line = await reader.readline()
    if line[:1] == b"$" and int(line[1:]) >= 0:
        return line + await reader.readexactly(int(line[1:]) + 2)
    if line[:1] == b"*":
        return line + b"".join([await _read_reply(reader) for _ in range(max(0, int(line[1:])))])
    return line


def bulk(text: str) -> bytes:
    """*text* as a reply."""
    return b"$%d\r\n%b\r\n" % (len(text.encode()), text.encode())


@asynccontextmanager
async def lying(server: Server, lies: dict[bytes, Callable[[bytes], bytes]]) -> AsyncIterator[str]:
    """The URL of *server* behind a proxy that puts the replies to some commands through a function."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(server.host, server.port)
        with suppress(OSError, ValueError, asyncio.IncompleteReadError):
            while True:
                words = await _read_command(reader)
                back.write(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words))
                reply = await _read_reply(there)
                writer.write(lies.get(words[0].upper(), lambda said: said)(reply))
                await writer.drain()
        back.close()
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()


def replacing(*pairs: tuple[str, str]) -> Callable[[bytes], bytes]:
    """A lie that replaces parts of INFO."""

    def lie(reply: bytes) -> bytes:
        text = reply.partition(b"\r\n")[2][:-2].decode()
        for old, new in pairs:
            assert old in text, old
            text = text.replace(old, new)
        return bulk(text)

    return lie


async def test_all_is_well(private_server: StartServer) -> None:
    """A plain server is looked at in every respect, and nothing is left in it."""
    server = private_server()
    steps: list[str] = []
    found = [finding async for finding in diagnose(Settings(REDIS_URL=server.url), steps.append)]

    assert levels(found) == [
        (check, "ok")
        for check in (
            "settings",
            "connection",
            "version",
            "role",
            "rights",
            "script",
            "batch",
            "latency",
            "clock",
            "eviction",
            "clients",
            "persistence",
        )
    ]
    assert server.client().keys() == []
    assert steps == ["redis: connecting", "redis: rights", "redis: script", "redis: latency"]


@pytest.mark.parametrize("binary", find_binaries())
async def test_all_is_well_with_every_server_there_is(binary: str) -> None:
    """No server that is supported is found fault with."""
    server = Server.start(binary)
    try:
        assert await wrong(REDIS_URL=server.url) == []
    finally:
        server.stop()


async def batch_said(**values: Any) -> tuple[str, str, str]:
    """Level, text and fix of what is found about batches."""
    (found,) = [finding for finding in await findings(**values) if finding.check == "batch"]
    return found.level, found.text, found.fix


async def test_the_mode_of_batches_is_named(redis_url: str, slots_server: Server) -> None:
    """Which commands a server is sent, with what it refuses and what the settings say."""
    assert ("ok", "one command for all that waits", "") == await batch_said(REDIS_URL=redis_url)
    level, text, _ = await batch_said(REDIS_URL=redis_url, REDIS_BATCH="key")
    assert ("ok", True) == (level, "REDIS_BATCH=key" in text)
    level, text, _ = await batch_said(REDIS_URL=slots_server.url)
    assert ("ok", True) == (level, "enforces slots" in text)
    assert [] == slots_server.command("KEYS", "*")


async def test_a_cluster_of_one_node_is_no_failure(slots_server: Server) -> None:
    """All keys are there, so limits and vectors work;
    it says what will happen when the cluster grows.
    """
    found = {f.check: f.level for f in await wrong(REDIS_URL=slots_server.url)}

    assert {"cluster": "warn"} == found


async def test_a_proxy_that_shards_by_the_first_key_is_found(private_server: StartServer) -> None:
    """It refuses nothing, and puts counters where nobody finds them; what it keeps apart is found."""
    servers = [private_server() for _ in range(2)]
    async with ShardingProxy([server.port for server in servers]) as proxy:
        level, text, fix = await batch_said(REDIS_URL=proxy.url)
        apart, _, _ = await batch_said(REDIS_URL=proxy.url, REDIS_BATCH="key")

    assert ("fail", "Set REDIS_BATCH=key.") == (level, fix)
    assert "not found again" in text
    assert "ok" == apart


async def test_the_least_rights_suffice(private_server: StartServer) -> None:
    """A user of the line that ``acl`` prints is not found fault with."""
    server = private_server()
    settings = {"REDIS_URL": server.url, "REDIS_USERNAME": "app", "REDIS_PASSWORD": PASSWORD}
    server.command(*rights_of(Settings(**settings)).line("app", PASSWORD).split())

    assert await wrong(**settings) == []
    assert server.client().keys() == []


async def test_a_server_of_the_vectors_own(private_server: StartServer) -> None:
    """Each server is looked at for what it keeps, and no secret goes from one to the other."""
    counters = private_server("--requirepass", PASSWORD)
    vectors = private_server("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    settings = {"REDIS_URL": counters.url, "REDIS_PASSWORD": PASSWORD, "EMBEDDING_CACHE_REDIS_URL": vectors.url}
    found = await findings(**settings)

    assert {finding.level for finding in found} == {"ok"}
    checks = {server: [f.check for f in found if f.server == server] for server in ("redis", "vectors")}
    assert "script" in checks["redis"]
    assert "script" not in checks["vectors"]
    assert "rights" in checks["vectors"]
    vectors.kill()
    assert ("vectors", "connection") == ((only := await the_only(**settings)).server, only.check)


async def test_vectors_elsewhere_in_memory(redis_url: str) -> None:
    """A server that is none is not looked at."""
    found = await findings(REDIS_URL=redis_url, EMBEDDING_CACHE_REDIS_URL="memory://")

    assert {finding.server for finding in found} == {"", "redis"}


# what a server says


async def test_a_replica(replica: Server) -> None:
    """A read-only replica is named, and blamed for what it refuses, not its rights."""
    found = await wrong(REDIS_URL=replica.url)

    assert [("role", "fail"), ("script", "fail")] == levels(found)
    assert "replica" in found[0].text
    assert "REDIS_SENTINELS" in found[0].fix


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random", "volatile-ttl"])
async def test_eviction_that_drops_counters(policy: str, private_server: StartServer) -> None:
    """Every policy that evicts keys with a TTL may drop counters: those are all of ours."""
    server = private_server("--maxmemory", "100mb", "--maxmemory-policy", policy)
    found = await the_only(REDIS_URL=server.url)

    assert ("eviction", "warn") == (found.check, found.level)
    assert policy in found.text
    assert "noeviction" in found.fix
    assert "EMBEDDING_CACHE_REDIS_URL" in found.fix
    server.command("CONFIG", "SET", "maxmemory", "0")
    assert await wrong(REDIS_URL=server.url) == []


async def test_a_full_server(private_server: StartServer) -> None:
    """A server without memory refuses writes; one that is nearly full will."""
    server = private_server("--maxmemory", "1", "--maxmemory-policy", "noeviction")
    found = await wrong(REDIS_URL=server.url)
    assert [("writes", "fail"), ("script", "fail"), ("memory", "warn")] == levels(found)
    assert "oom" in found[0].text

    used = int(server.client().info("memory")["used_memory"])
    server.command("CONFIG", "SET", "maxmemory", int(used * 1.06))
    nearly = await wrong(REDIS_URL=server.url)
    assert ("memory", "warn") in levels(nearly)


@pytest.mark.parametrize(
    ("says", "level"),
    [
        pytest.param("redis_version:5.0.14", "fail", id="Redis 5"),
        pytest.param("redis_version:6.0.20", "fail", id="Redis 6.0"),
        pytest.param("redis_version:6.2.0", "ok", id="Redis 6.2"),
        pytest.param("redis_version:10.1.0", "ok", id="Redis 10"),
        pytest.param("redis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:7.1.9", "fail", id="older Valkey"),
        pytest.param("redis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:7.2.4", "ok", id="Valkey 7.2"),
    ],
)
async def test_versions(says: str, level: str, private_server: StartServer) -> None:
    """Servers before Redis 6.2 and Valkey 7.2 are too old."""
    server = private_server()
    if "valkey" in str(server.client().info("server")):
        pytest.skip("the lie is about a Redis")
    version = server.client().info("server")["redis_version"]
    async with lying(server, {b"INFO": replacing((f"redis_version:{version}", says))}) as url:
        found = await findings(REDIS_URL=url)

    (finding,) = [finding for finding in found if finding.check == "version"]
    assert (level, says.rpartition(":")[2] in finding.text) == (finding.level, True)
    assert ("Upgrade" in finding.fix) == (level == "fail")


@pytest.mark.parametrize(("seconds", "direction"), [(3600, "ahead of"), (-90, "behind"), (1, "")])
async def test_clock_skew(seconds: int, direction: str, private_server: StartServer) -> None:
    """A clock more than two seconds off is told, with the direction."""
    server = private_server()

    def shifted(reply: bytes) -> bytes:
        first = reply.split(b"\r\n")[2]
        return reply.replace(first, b"%d" % (int(first) + seconds), 1)

    async with lying(server, {b"TIME": shifted}) as url:
        found = [finding for finding in await findings(REDIS_URL=url) if finding.check == "clock"]

    assert [("clock", "warn" if direction else "ok")] == levels(found)
    if direction:
        told = re.search(r"is ([\d.]+) s (ahead of|behind)", found[0].text)
        assert told is not None
        assert direction == told[2]
        assert float(told[1]) == pytest.approx(abs(seconds), abs=1)


@pytest.mark.slow
async def test_slow_answers(private_server: StartServer) -> None:
    """PINGs that take 0.8 of the deadline are a warning;
    slower ones mean that Redis decides nothing.
    """
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        await proxy.set("delay", seconds=0.02)
        slow = [f for f in await findings(REDIS_URL=proxy.url, RATE_LIMIT_TIMEOUT=0.0245) if f.check == "latency"]
        slower = [f for f in await findings(REDIS_URL=proxy.url, RATE_LIMIT_TIMEOUT=0.01) if f.check == "latency"]

    assert [("latency", "warn")] == levels(slow)
    assert [("latency", "fail")] == levels(slower)
    assert "RATE_LIMIT_TIMEOUT" in slower[0].fix


async def test_too_few_connections(private_server: StartServer) -> None:
    """A server with no room for one more process's pool."""
    server = private_server("--maxclients", "10")
    found = await the_only(REDIS_URL=server.url)

    assert ("clients", "warn") == (found.check, found.level)
    assert await wrong(REDIS_URL=server.url, REDIS_POOL_SIZE=3) == []


async def test_failing_snapshots(private_server: StartServer) -> None:
    """A snapshot that failed, or an append-only file that cannot be written, is told before writes
    stop.
    """
    server = private_server()
    failed = replacing(("rdb_last_bgsave_status:ok", "rdb_last_bgsave_status:err"))
    async with lying(server, {b"INFO": failed}) as url:
        assert ("persistence", "warn") == ((only := await the_only(REDIS_URL=url)).check, only.level)
    failed = replacing(("aof_enabled:0", "aof_enabled:1"), ("aof_last_write_status:ok", "aof_last_write_status:err"))
    async with lying(server, {b"INFO": failed}) as url:
        assert "append-only" in (await the_only(REDIS_URL=url)).text


async def test_missing_rights(private_server: StartServer) -> None:
    """The right that is missing is named,
    with the command that grants it; INFO alone is only a warning.
    """
    server = private_server()
    settings = {"REDIS_URL": server.url.replace("//", f"//app:{PASSWORD}@")}
    line = rights_of(Settings(**settings)).line("app", PASSWORD)
    server.command(*line.split(), "-hset")
    found = await wrong(**settings)
    assert [("rights", "fail"), ("script", "fail")] == levels(found)
    assert found[0].text == "missing: +hset"
    assert "ACL SETUSER app +hset." in found[0].fix

    server.command(*line.split(), "-info")
    found = await wrong(**settings)
    assert [("version", "warn"), ("rights", "warn")] == levels(found)

    server.command(*line.split(), "-ping", "-time")
    found = await wrong(**settings)
    assert ("rights", "fail") in levels(found)
    assert {"+ping", "+time"} <= set(found[0].text.split())


@pytest.mark.parametrize(
    ("command", "reply", "check", "says"),
    [
        pytest.param(b"PING", "LOADING Redis is loading", "connection", "reading its data from disk", id="loading"),
        pytest.param(b"HSET", "MISCONF Redis is configured to save", "writes", "refused (readonly)", id="no snapshots"),
        pytest.param(b"RPUSH", "NOREPLICAS Not enough good replicas", "writes", "refused (readonly)", id="no replicas"),
    ],
)
async def test_what_redis_cannot_do_now(
    command: bytes, reply: str, check: str, says: str, private_server: StartServer
) -> None:
    """A server that is loading, or takes no writes for a reason of its own."""
    async with lying(private_server(), {command: lambda _: f"-{reply}\r\n".encode()}) as url:
        found = await wrong(REDIS_URL=url)

    assert (check, "fail") == (found[0].check, found[0].level)
    assert says in found[0].text


async def test_a_renamed_command(private_server: StartServer) -> None:
    """A command that the server does not have is no matter of rights."""
    server = private_server("--rename-command", "UNLINK", "")
    found = await wrong(REDIS_URL=server.url)

    assert found[0].text == "the server does not know: unlink"
    assert "rename-command" in found[0].fix


async def test_a_blocked_server(private_server: StartServer) -> None:
    """A server that is blocked by a script is told as that."""
    server = private_server("--lua-time-limit", "50")
    other = server.client()
    connection = other.connection_pool.get_connection()
    connection.send_command("EVAL", "while true do end", "0")

    def busy() -> bool:
        try:
            other.ping()
        except Exception as error:
            return "BUSY" in str(error)
        return False

    wait_until(busy, "the script blocks")
    found = await the_only(REDIS_URL=server.url)
    other.execute_command("SCRIPT", "KILL")
    connection.disconnect()

    assert "blocked by somebody's script" in found.text
