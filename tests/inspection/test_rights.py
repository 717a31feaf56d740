"""The least rights that will do: they suffice for all the package does,
none is idle, and nothing else is allowed.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from redis.exceptions import NoPermissionError

from redis_asgi import (
    EmbeddingCache,
    RateLimiter,
    RateLimitMiddleware,
    RedisManager,
    Rule,
    Settings,
    by_header,
    check_redis_health,
)
from redis_asgi.connection.client_factory import Client
from redis_asgi.connection.redis_argument import resolve_manager
from redis_asgi.inspection.rights import NO_PASSWORD, probe_keys, rights_of, try_rights
from redis_asgi.maintenance import flush_model
from redis_asgi.ratelimit.limits.policy import STRATEGIES, make_partition

from ..conftest import StartServer
from ..kit.servers import Cluster, ExternalServer, Server
from ..test_guides import embedding_client, not_found

pytestmark = [pytest.mark.anyio, pytest.mark.server]

PASSWORD = "s3cr3t-of-a-test"


def grant(server: ExternalServer, line: str) -> None:
    """Run a line of `Rights.line` as an administrator does."""
    server.command(*line.split(" "))


async def use_everything(settings: Settings) -> None:
    """Every part of the package once, each of which must have reached Redis."""
    limiter = RateLimiter(settings=settings)
    for strategy in STRATEGIES:
        for limits in ("3/minute", "3/minute; 9/hour"):
            decisions = [
                await limiter.consume("a", limits, name="rule", strategy=strategy)  # type: ignore[arg-type]  # its keys
                for _ in range(4)
            ]
            assert [("redis", True)] * 3 + [("redis", False)] == [(d.source, d.allowed) for d in decisions]
            assert await limiter.reset("a", name="rule")
    # Only stamps that have expired are trimmed, on Redis's own clock.
    await limiter.consume("old", "3/second", strategy="moving-window")
    await asyncio.sleep(1.05)
    await limiter.consume("old", "3/second", strategy="moving-window")
    assert await limiter.reset("old")

    # Leases that are too long are looked for only where the clock was set back.
    administrator: Any = await manager_of(settings).get_connection()
    key = make_partition("custom", "a", prefix=settings.REDIS_KEY_PREFIX).key
    for _ in range(2):
        async with limiter.slot("a", 3) as decision:
            assert ("redis", True) == (decision.source, decision.allowed)
        await administrator.execute_command("HSET", key, "default:c0:1", 10**16)

    # What is given back, for which alone a log is searched.
    rules = [
        Rule("9/minute", name="late", strategy="moving-window", count_if=lambda status: status == 200),
        Rule("9/minute", name="key", partition_by=by_header("x-api-key"), strategy="moving-window"),
    ]
    app = RateLimitMiddleware(not_found, rules=rules, on_redis_error="closed", settings=settings)
    transport = httpx.ASGITransport(app, client=("192.0.2.1", 5000))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for _ in range(3):
            assert (await client.get("/", headers={"x-api-key": "k"})).status_code == 404

    cache = EmbeddingCache(settings=settings)
    assert await cache.set_embedding("doc", [1.0, 2.0])
    assert await cache.get_embedding("doc") is not None
    assert await cache.delete_embedding("doc")
    async with embedding_client(settings) as client:
        for text, status in (("a", "stored"), ("a", "hit"), ("b", "stored")):
            answer = await client.post("/v1/embeddings", json={"model": "m", "input": text})
            assert status in answer.headers["cache-status"], answer.headers["cache-status"]
    await flush_model("m", namespace="m", settings=settings)

    # What health asks, metrics and the breaker's probe ask too.
    health = await check_redis_health(await manager_of(settings).get_connection())
    assert health["status"] == "healthy"
    assert None not in (health["used_memory"], health["connected_clients"], health["last_save_time"])


def manager_of(settings: Settings) -> RedisManager:
    """The manager that all parts of these settings share."""
    return resolve_manager(None, settings)[0]


def commands_run(server: Server) -> set[str]:
    """What ran since the statistics were reset,
    but for what the test itself and every client library asks.
    """
    stats: Any = server.client().info("commandstats")
    names = {name.removeprefix("cmdstat_") for name in stats}
    return {name for name in names if not name.startswith(("acl", "config", "auth", "hello", "client"))}


async def test_the_line_suffices_and_none_of_it_is_idle(private_server: StartServer) -> None:
    """A user made by the very line uses every command of it, and is denied none."""
    server = private_server()
    settings = Settings(
        REDIS_URL=f"{server.url}/3",
        REDIS_USERNAME="app",
        REDIS_PASSWORD=PASSWORD,
        REDIS_KEY_PREFIX="my:*app[1]\\:",
    )
    rights = rights_of(settings)
    grant(server, rights.line("app", PASSWORD))
    server.command("CONFIG", "RESETSTAT")
    await use_everything(settings)
    ran = commands_run(server)
    await manager_of(settings).close()

    assert ran == set(rights.commands)
    # CLIENT SETINFO, which redis-py sends on connecting and does without, is no command of ours.
    log: Any = server.client().acl_log()
    denied = {str(entry["object"]) for entry in log}
    assert denied <= {"client|setinfo", "client"}  # Redis 6.2 names the command alone


async def test_on_a_cluster_too(private_cluster: Cluster) -> None:
    """The line for a cluster, given to each node, suffices there;
    EVALSHA needs no more than the package sends.
    """
    settings = Settings(
        REDIS_URL=private_cluster.url, REDIS_CLUSTER=True, REDIS_USERNAME="app", REDIS_PASSWORD=PASSWORD
    )
    rights = rights_of(settings)
    for node in private_cluster.nodes:
        grant(node, rights.line("app", PASSWORD))
        node.command("CONFIG", "RESETSTAT")
    await use_everything(settings)
    ran = {name for node in private_cluster.nodes for name in commands_run(node)}
    await manager_of(settings).close()

    # ASKING is for a slot under way, which nothing here moves.
    assert ran == set(rights.commands) - {"asking"}


async def test_everything_else_is_refused(private_server: StartServer) -> None:
    """Every other command of the server, and every other key, is refused."""
    server = private_server()
    settings = Settings(REDIS_URL=server.url, REDIS_USERNAME="app", REDIS_PASSWORD=PASSWORD, REDIS_KEY_PREFIX="p:")
    rights = rights_of(settings)
    grant(server, rights.line("app", PASSWORD))
    manager = RedisManager(settings)
    client = await manager.get_connection()
    run: Callable[..., Awaitable[Any]] = client.execute_command
    allowed: list[str] = []
    for name, arity in every_command(server):
        # Those that Redis lets anybody run, before a password too.
        if name in ("auth", "hello", "quit", "reset") or name in rights.commands:
            continue
        words = [*name.upper().split("|"), *["x"] * 40][: max(abs(arity), 1)]
        try:
            await run(*words)
        except NoPermissionError:
            continue
        except Exception as error:
            # EXEC says it in its own words,
            # and MODULE and DEBUG are off by the server's configuration.
            if "NOPERM" not in str(error) and "command not allowed" not in str(error):
                allowed.append(f"{name}: {error}")
        else:
            allowed.append(name)
    assert allowed == []

    for command in (("HGET", "other", "f"), ("GET", "rate_limit:{a}"), ("MGET", "embedding:a"), ("DEL", "p:other")):
        with pytest.raises(NoPermissionError):
            await run(*command)
    assert await run("HGET", "p:rate_limit:{a}", "f") is None
    await manager.close()


def every_command(server: Server) -> list[tuple[str, int]]:
    """Name and arity of every command, and of each subcommand where the server tells them."""
    found: list[tuple[str, int]] = []
    pool = server.client().connection_pool
    connection = pool.get_connection()
    connection.send_command("COMMAND")
    for entry in connection.read_response():
        subcommands = entry[9] if len(entry) > 9 else []
        # A container without the name of a subcommand is refused for its arity.
        found += [(each[0].decode(), int(each[1])) for each in (subcommands or [entry])]
    pool.release(connection)
    assert len(found) > 200
    return found


async def missing_of(client: Client, settings: Settings) -> list[str]:
    """What `try_rights` finds missing."""
    hash_key, list_key, vector_keys = probe_keys(settings.REDIS_KEY_PREFIX)
    found = await try_rights(client.execute_command, rights_of(settings), hash_key, list_key, vector_keys)
    return [each.right for each in found]


async def test_each_missing_right_is_named(private_server: StartServer) -> None:
    """Whatever single command or pattern is taken away is what is named, and nothing is left
    behind.
    """
    server = private_server()
    settings = Settings(REDIS_URL=server.url, REDIS_USERNAME="app", REDIS_PASSWORD=PASSWORD, REDIS_KEY_PREFIX="p:")
    rights = rights_of(settings)
    manager = RedisManager(settings)
    client = await manager.get_connection()
    line = rights.line("app", PASSWORD)
    grant(server, line)
    assert await missing_of(client, settings) == []
    for command in rights.commands:
        grant(server, f"{line} -{command}")
        assert await missing_of(client, settings) == [f"+{command}"]
    for pattern in rights.keys:
        grant(server, line.replace(f" ~{pattern}", ""))
        assert await missing_of(client, settings) == [f"~{pattern}"]
    grant(server, "ACL SETUSER app reset on >" + PASSWORD)
    assert set(await missing_of(client, settings)) == {f"+{command}" for command in rights.commands}
    await manager.close()

    assert server.client().keys() == []


async def test_nothing_is_left_where_nothing_may_be_undone(private_server: StartServer) -> None:
    """Without a command to take it away again, nothing is written."""
    server = private_server()
    settings = Settings(REDIS_URL=server.url, REDIS_USERNAME="app", REDIS_PASSWORD=PASSWORD)
    line = rights_of(settings).line("app", PASSWORD)
    manager = RedisManager(settings)
    for taken in ("-unlink", "-unlink -ltrim", "-unlink -ltrim -lrem", "-unlink -ltrim -lrem -pexpire"):
        grant(server, f"{line} {taken}")
        found = await missing_of(await manager.get_connection(), settings)
        assert {right.lstrip("+") for right in found} - {"rpush"} == set(taken.replace("-", "").split())
    await manager.close()

    assert all(server.client().pttl(key) > 0 for key in server.client().keys())


async def test_the_placeholder_makes_no_user(private_server: StartServer) -> None:
    """A line whose password nobody filled in is refused by Redis."""
    server = private_server()
    line = rights_of(Settings()).line("app")
    assert NO_PASSWORD in line
    with pytest.raises(Exception, match="SETUSER"):
        grant(server, line)

    assert server.command("ACL", "USERS") == [b"default"]


def test_rights_follow_the_settings() -> None:
    """SELECT only for another database, what a cluster takes only there,
    and by what is kept on the server.
    """
    plain = rights_of(Settings())
    assert "select" not in plain.commands
    assert "select" in rights_of(Settings(REDIS_DB=2)).commands
    assert "select" in rights_of(Settings(REDIS_URL="redis://localhost/2")).commands
    cluster = rights_of(Settings(REDIS_CLUSTER=True))
    assert set(cluster.commands) - set(plain.commands) == {"get", "cluster|slots", "cluster|info", "command", "asking"}
    assert rights_of(Settings(), limits=False).keys == ("embedding:*", "embedding_*")
    assert not set(rights_of(Settings(), vectors=False).commands) & {"mget", "set", "del", "expire"}
