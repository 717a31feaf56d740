"""``redis-asgi check`` names what is wrong with a server, and what to do; of a good one it finds nothing."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import redis

from redis_asgi import Settings
from redis_asgi.inspection.diagnosis import diagnose
from redis_asgi.inspection.findings import Finding
from redis_asgi.inspection.rights import rights_of

from ..conftest import StartServer
from ..kit.certificates import Certificates
from ..kit.proxy import FaultProxy
from ..kit.servers import Cluster, SentinelTrio, Server, find_binaries, wait_until
from ..kit.sharding import ShardingProxy

pytestmark = pytest.mark.anyio

PASSWORD = "s3cr3t-of-a-test"


async def findings(**values: Any) -> list[Finding]:
    """All that is found with these settings."""
    # A busy machine is no finding.
    patient = {"REDIS_TIMEOUT": 2, "RATE_LIMIT_TIMEOUT": 5, "EMBEDDING_CACHE_TIMEOUT": 5}
    return [finding async for finding in diagnose(Settings(**{**patient, **values}))]


async def wrong(**values: Any) -> list[Finding]:
    """What is not well with these settings; each says what to do, and none holds the password."""
    found = await findings(**values)
    for finding in found:
        assert PASSWORD not in f"{finding.text}{finding.fix}"
        assert bool(finding.fix) == (finding.level != "ok")
    return [finding for finding in found if finding.level != "ok"]


async def the_only(**values: Any) -> Finding:
    """The one thing that is not well."""
    (finding,) = await wrong(**values)
    return finding


def levels(found: list[Finding]) -> list[tuple[str, str]]:
    """What was looked at, and how it is."""
    return [(finding.check, finding.level) for finding in found]


# a proxy that answers some commands itself


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


# what is well


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
    """All keys are there, so limits and vectors work; it says what will happen when the cluster grows."""
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


# connecting


@pytest.mark.parametrize(
    ("values", "text", "fix"),
    [
        pytest.param({"REDIS_URL": "redis://127.0.0.1:1"}, "refuses connections", "server runs", id="refused"),
        pytest.param(
            {"REDIS_URL": "redis://127.0.0.1:1", "REDIS_CLUSTER": True},
            "refuses connections",
            "server runs",
            id="cluster refused",
        ),
        pytest.param({"REDIS_HOST": "host.invalid"}, "cannot be resolved", "REDIS_HOST", id="unknown host"),
        pytest.param({"REDIS_URL": "unix:///nowhere/redis.sock"}, "no socket", "path", id="no socket"),
    ],
)
async def test_unreachable(values: dict[str, Any], text: str, fix: str) -> None:
    """A server that cannot be reached, and why."""
    found = await the_only(**values)

    assert ("connection", "fail") == (found.check, found.level)
    assert text in found.text
    assert fix in found.fix


@pytest.mark.parametrize("cluster_mode", [False, True])
async def test_passwords(cluster_mode: bool, private_server: StartServer) -> None:
    """No password where one is wanted, a wrong one, and one too many are told apart."""
    more = {"REDIS_CLUSTER": True} if cluster_mode else {}
    locked = private_server("--requirepass", "right", *(["--cluster-enabled", "yes"] if cluster_mode else []))
    wanted = await the_only(REDIS_URL=locked.url, **more)
    refused = await the_only(REDIS_URL=locked.url, REDIS_PASSWORD=PASSWORD, **more)
    in_url = await the_only(REDIS_URL=locked.url.replace("//", f"//app:{PASSWORD}@"), **more)

    assert "wants a password" in wanted.text
    assert "refuses the user name or the password" in refused.text
    assert "REDIS_PASSWORD" in wanted.fix
    assert "refuses the user name or the password" in in_url.text


async def test_a_password_too_many(redis_url: str) -> None:
    """A password for a server that has none."""
    found = await the_only(REDIS_URL=redis_url, REDIS_PASSWORD=PASSWORD)

    assert "no password" in found.text
    assert found.fix == "Unset REDIS_PASSWORD."


async def test_a_password_too_many_in_the_url(redis_url: str) -> None:
    """Then it is there that it must go."""
    found = await the_only(REDIS_URL=redis_url.replace("//", f"//:{PASSWORD}@"))

    assert found.fix == "Take the password out of REDIS_URL."


async def test_no_such_database(redis_url: str) -> None:
    """A database that the server does not have."""
    found = await the_only(REDIS_URL=f"{redis_url}/999")

    assert "no such database" in found.text


async def test_a_hung_server(private_server: StartServer) -> None:
    """A server that is stopped is waited for as long as the setting says."""
    server = private_server()
    server.pause()
    try:
        found = await the_only(REDIS_URL=server.url, REDIS_TIMEOUT=0.2)
    finally:
        server.resume()

    assert "does not answer within 0.2 s" in found.text


async def test_a_server_lost_on_the_way(private_server: StartServer) -> None:
    """Losing the server in the middle is a finding too, after those before it."""
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        got = diagnose(Settings(REDIS_URL=proxy.url, REDIS_TIMEOUT=1))
        found = []
        async for finding in got:
            found.append(finding)
            if finding.check == "connection" and finding.level == "ok":
                await proxy.set("refuse")

    assert levels(found) == [("settings", "ok"), ("connection", "ok"), ("connection", "fail")]
    assert "Lost" in found[-1].text


async def test_no_connection_left(private_server: StartServer) -> None:
    """A server that is full says so."""
    server = private_server("--maxclients", "1")
    server.client().ping()
    found = await the_only(REDIS_URL=server.url)

    assert "no connection left" in found.text


# TLS


async def test_tls_is_well(tls_server: Server, certificates: Certificates) -> None:
    """With all certificates right, TLS is said to be verified."""
    pair = certificates.client
    values = {
        "REDIS_SSL_CA_CERTS": certificates.ca.cert,
        "REDIS_SSL_CERTFILE": pair.cert,
        "REDIS_SSL_KEYFILE": pair.key,
    }
    found = await findings(REDIS_URL=tls_server.url, **values)
    assert ("tls", "ok") in levels(found)
    assert {finding.level for finding in found} == {"ok"}

    unsafe = await the_only(REDIS_URL=f"{tls_server.url}?ssl_cert_reqs=none", **values)
    assert ("tls", "warn") == (unsafe.check, unsafe.level)


async def test_plain_to_a_tls_port(tls_server: Server) -> None:
    """A client without TLS at a port that has it."""
    found = await the_only(REDIS_URL=tls_server.url.replace("rediss", "redis"))

    assert "speaks TLS, and we do not" in found.text
    assert "rediss://" in found.fix


@pytest.mark.parametrize("how", ["rediss", "REDIS_SSL"])
async def test_tls_to_a_plain_port(how: str, private_server: StartServer) -> None:
    """A client with TLS at a port without it."""
    server = private_server()
    values: dict[str, Any] = {"REDIS_URL": server.url.replace("redis:", "rediss:")}
    if how == "REDIS_SSL":
        values = {"REDIS_HOST": server.host, "REDIS_PORT": server.port, "REDIS_SSL": True}
    found = await the_only(**values)

    assert "does not speak TLS, and we do" in found.text


async def test_certificates(tls_server: Server, stranger_server: Server, certificates: Certificates) -> None:
    """An unknown authority, another host's certificate and a missing client certificate are told apart."""
    unknown = await the_only(REDIS_URL=tls_server.url, REDIS_SSL_CA_CERTS=certificates.other_ca.cert)
    name = await the_only(REDIS_URL=stranger_server.url, REDIS_SSL_CA_CERTS=certificates.ca.cert)
    missing = await the_only(REDIS_URL=tls_server.url, REDIS_SSL_CA_CERTS=certificates.ca.cert)

    assert "REDIS_SSL_CA_CERTS" in unknown.fix
    assert "ismatch" in name.text
    assert "name that the certificate is made out to" in name.fix
    assert "REDIS_SSL_CERTFILE" in missing.fix


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
    """PINGs that take 0.8 of the deadline are a warning; slower ones mean that Redis decides nothing."""
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
    """A snapshot that failed, or an append-only file that cannot be written, is told before writes stop."""
    server = private_server()
    failed = replacing(("rdb_last_bgsave_status:ok", "rdb_last_bgsave_status:err"))
    async with lying(server, {b"INFO": failed}) as url:
        assert ("persistence", "warn") == ((only := await the_only(REDIS_URL=url)).check, only.level)
    failed = replacing(("aof_enabled:0", "aof_enabled:1"), ("aof_last_write_status:ok", "aof_last_write_status:err"))
    async with lying(server, {b"INFO": failed}) as url:
        assert "append-only" in (await the_only(REDIS_URL=url)).text


async def test_missing_rights(private_server: StartServer) -> None:
    """The right that is missing is named, with the command that grants it; INFO alone is only a warning."""
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


# clusters and sentinels


async def test_a_cluster_is_looked_at_node_by_node(cluster: Cluster) -> None:
    """Each primary is looked at, with keys of its own slots, and nothing is left behind."""
    found = await findings(REDIS_URL=cluster.url, REDIS_CLUSTER=True)

    assert {finding.level for finding in found} == {"ok"}
    for node in cluster.nodes:
        mine = [finding.check for finding in found if finding.server == f"redis 127.0.0.1:{node.port}"]
        assert {"rights", "script", "latency", "clock", "version"} <= set(mine)
        assert node.client().keys() == []
        assert node.calls("rpush") > 0


async def test_one_node_lacks_a_right(private_cluster: Cluster) -> None:
    """Users are each node's own: the one that lacks something is named."""
    settings = {"REDIS_URL": private_cluster.url, "REDIS_CLUSTER": True, "REDIS_USERNAME": "app"}
    settings["REDIS_PASSWORD"] = PASSWORD
    line = rights_of(Settings(**settings)).line("app", PASSWORD).split()
    for node in private_cluster.nodes:
        node.command(*line)
    assert await wrong(**settings) == []
    private_cluster.nodes[2].command(*line, "-lindex")
    found = await wrong(**settings)
    assert found[0].server == f"redis 127.0.0.1:{private_cluster.nodes[2].port}"
    assert found[0].text == "missing: +lindex"

    for node in private_cluster.nodes:
        node.command(*line, "-cluster|slots")
    only = await the_only(**settings)
    assert "cluster|slots" in only.fix


async def test_cluster_or_not(private_cluster: Cluster, redis_url: str) -> None:
    """A node of a cluster taken for a server alone, a server alone for a cluster, and slots that nobody serves."""
    alone = await wrong(REDIS_URL=private_cluster.url)
    assert alone[0].fix == "Set REDIS_CLUSTER=true."
    single = await the_only(REDIS_URL=redis_url, REDIS_CLUSTER=True)
    assert ("warn", "cluster") == (single.level, single.check)
    assert single.fix.startswith("Unset REDIS_CLUSTER")
    nodes = {"REDIS_CLUSTER_NODES": [redis_url.removeprefix("redis://").split("/")[0], "127.0.0.1:1"]}
    assert (await the_only(REDIS_CLUSTER=True, **nodes)).fix == "Unset REDIS_CLUSTER."

    for node in private_cluster.nodes:
        with suppress(redis.exceptions.ResponseError):  # it has heard so from another one
            node.command("CLUSTER", "DELSLOTS", *range(16_000, 16_384))
    found = await the_only(REDIS_URL=private_cluster.url, REDIS_CLUSTER=True)
    assert "16000 of 16384 slots" in found.text


async def test_a_node_that_says_nothing_of_its_cluster(private_cluster: Cluster, private_server: StartServer) -> None:
    """Whether it has all keys is found out by asking for some."""
    one = private_server("--cluster-enabled", "yes")
    one.own_all_slots()
    for server, level in ((one, "warn"), (private_cluster.nodes[0], "fail")):
        server.command("ACL", "SETUSER", "default", "-cluster")
        found = await wrong(REDIS_URL=server.url)
        assert (level, "Set REDIS_CLUSTER=true.") == (found[0].level, found[0].fix)


async def test_sentinels(sentinels: SentinelTrio) -> None:
    """All well; a name they do not watch; one that is silent; none that answers."""
    settings = {"REDIS_SENTINELS": ",".join(sentinels.addresses), "REDIS_SENTINEL_MASTER": "mymaster"}
    found = await findings(**settings)
    assert found[1].text == "all 3 know the master 'mymaster'"
    assert {finding.level for finding in found} == {"ok"}

    other = await the_only(**{**settings, "REDIS_SENTINEL_MASTER": "other"})
    assert "know no master 'other'" in other.text

    sentinels.sentinels[0].kill()
    silent = await the_only(**settings)
    assert ("warn", sentinels.addresses[0] in silent.text) == (silent.level, True)

    for sentinel in sentinels.sentinels[1:]:
        sentinel.kill()
    none = await the_only(**settings)
    assert "none of the sentinels answers" in none.text


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
