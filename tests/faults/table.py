"""Every way in which one Redis can be ill, one row each: how it comes about and ends,
and what is promised meanwhile.

A failover of sentinels, and nodes and slots of a cluster, are in ``test_topology``; clients of
another event loop and forked processes, where nothing of Redis is ill, in ``tests/connection`` and
``tests/test_telemetry.py``.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from redis_asgi import RedisManager

from ..kit.proxy import FaultProxy, Mode
from ..kit.servers import SLOTS, Server, wait_until

USER, SECRET = "app", "the-secret-of-the-laboratory"
# Seconds a request waits for Redis; where nothing is waited for,
# long enough for a machine that others use too.
DEADLINE, LONG = 0.2, 1.0


@dataclass
class Scene:
    """What a row may break: the server, the way to it, the app's own client,
    and whatever it has to put right again.
    """

    server: Server
    proxy: FaultProxy
    manager: RedisManager
    undo: list[Callable[[], Awaitable[None]]] = field(default_factory=list)

    def disconnect(self) -> None:
        """End every connection but that of the one who looks."""
        self.server.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


Step = Callable[[Scene], Awaitable[None]]


async def nothing(_scene: Scene) -> None:
    """Leave it."""


# Whoever was sent behind a batch that is given up loses the connection with it.
BEHIND = frozenset(["connection"])


@dataclass(frozen=True)
class Row:
    """One way to be ill.

    Attributes:
        inject: Makes Redis ill.
        heal: Makes it well; ``None`` where the app's own settings are at fault.
        meanwhile: Happens while requests wait.
        reason: Why checks were decided without Redis, in metrics and log;
            ``None``: Redis decided all of them.
        also: Other reasons that some of them may have, from before the first one was known.
        health: The code of the health checks; ``None``: healthy.
        pings: Whether a PING is answered all the same, so that only the app itself knows better.
        breaker: Where the circuit breaker stands once several checks have failed.
        cache: ``aside``: the app is asked and nothing kept; ``reads``: what is stored is served,
            the rest not kept; ``works``: as ever; ``any``: as ever or aside, as what lies on the
            way has it.
        log: The events of the outage, each once.
        keeps: Whether what was stored is still there afterwards.
        arguments: Of the server.
        settings: Of the app, beside the URL.
        url: With ``{address}`` of the proxy.
        before: Prepares the server.
        from_start: The app has never seen Redis well.
        patience: Seconds that a request waits for Redis; ``None``: no longer than it takes to tell.
        slow: It takes seconds, for what its server or its machine does.
        before_7: What is otherwise on Redis 6.2; ``None``: it cannot be brought about there.
    """

    inject: Step
    heal: Step | None = nothing
    meanwhile: Step = nothing
    reason: str | None = "connection"
    also: frozenset[str] = frozenset()
    health: str | None = "redis_connection"
    pings: bool = False
    breaker: Literal["closed", "open"] = "open"
    cache: Literal["aside", "reads", "works"] = "aside"
    log: tuple[str, ...] = ("redis_unavailable", "redis_back")
    keeps: bool = True
    arguments: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    url: str = f"redis://{USER}:{SECRET}@{{address}}"
    before: Step = nothing
    from_start: bool = False
    patience: float | None = None
    slow: bool = False
    before_7: Mapping[str, Any] | None = field(default_factory=dict)

    @property
    def is_waited_for(self) -> bool:
        """Whether nothing tells that Redis is ill, but that it does not answer."""
        return self.reason in ("timeout", "pool")

    @property
    def deadline(self) -> float:
        """Seconds that a request waits for Redis."""
        return self.patience or (DEADLINE if self.is_waited_for else LONG)


def way(mode: Mode, **options: Any) -> Step:
    """The proxy misbehaves."""

    async def inject(scene: Scene) -> None:
        await scene.proxy.set(mode, **options)

    return inject


def command(*parts: str | int, disconnects: bool = False) -> Step:
    """A command of an operator's; with *disconnects*, everybody has to come again."""

    async def step(scene: Scene) -> None:
        scene.server.command(*parts)
        if disconnects:
            scene.disconnect()

    return step


well = way("pass")


async def kill(scene: Scene) -> None:
    """SIGKILL."""
    scene.server.kill()


async def start_again(scene: Scene) -> None:
    """The same server, empty."""
    await asyncio.to_thread(scene.server.restart)


async def pause(scene: Scene) -> None:
    """SIGSTOP."""
    scene.server.pause()


async def resume(scene: Scene) -> None:
    """SIGCONT."""
    scene.server.resume()


async def kill_under_way(scene: Scene) -> None:
    """SIGKILL, when requests have been sent."""
    await asyncio.sleep(0.02)
    scene.server.kill()


async def be_busy(scene: Scene) -> None:
    """Somebody's script never ends."""
    somebody = aioredis.Redis.from_url(scene.server.url, retry=Retry(NoBackoff(), 0))
    endless: Any = somebody.execute_command
    script = asyncio.create_task(endless("EVAL", "while true do end", 0))

    async def stop() -> None:
        scene.server.command("SCRIPT", "KILL")
        await asyncio.gather(script, return_exceptions=True)
        await somebody.aclose()

    scene.undo.append(stop)
    await asyncio.to_thread(wait_until, lambda: _says(scene.server, "BUSY"), "a busy server")


async def stop_being_busy(scene: Scene) -> None:
    """The operator ends it."""
    await scene.undo.pop()()


async def load(scene: Scene) -> None:
    """It starts with data that take a while."""
    scene.server.client().mset({f"other:{number}": "x" * 4096 for number in range(1000)})
    scene.server.command("CONFIG", "SET", "rdbcompression", "no")
    scene.server.command("SAVE")
    scene.server.restart(wait=False)
    await asyncio.to_thread(wait_until, lambda: _says(scene.server, "LOADING"), "a loading server")


async def finish_loading(scene: Scene) -> None:
    """The rest of it comes quickly."""
    scene.server.command("CONFIG", "SET", "key-load-delay", 0)
    await asyncio.to_thread(wait_until, lambda: not _says(scene.server, "LOADING"), "a server with its data")


def _says(server: Server, word: str) -> bool:
    try:
        server.command("PING")
    except Exception as error:
        return word in f"{type(error).__name__} {error}".upper()
    return False


async def fail_to_save(scene: Scene) -> None:
    """A snapshot that cannot be written stops the writes."""
    scene.server.command("CONFIG", "SET", "save", "3600 1")
    scene.server.folder.joinpath("dump.rdb").mkdir()
    scene.server.client().set("x", "1")
    with contextlib.suppress(Exception):
        scene.server.command("SAVE")
    scene.server.command("BGSAVE")
    told = scene.server.client().info
    wait_until(lambda: told("persistence")["rdb_last_bgsave_status"] == "err", "a failed snapshot")


async def lose_slots(scene: Scene) -> None:
    """A cluster of one that serves nothing."""
    scene.server.command("CLUSTER", "DELSLOTS", *range(SLOTS))
    ill = "cluster_state:fail"
    await asyncio.to_thread(
        wait_until, lambda: ill in str(scene.server.command("CLUSTER", "INFO")), "a cluster without slots"
    )


async def own_slots(scene: Scene) -> None:
    """It serves all of them."""
    await asyncio.to_thread(scene.server.own_all_slots)


async def hold_all_connections(scene: Scene) -> None:
    """The app's own blocking command has the only connection."""
    client: Any = await scene.manager.get_connection()
    blocking = asyncio.create_task(client.blpop("nothing", 0))
    await asyncio.to_thread(wait_until, lambda: _blocked(scene.server), "a blocked client")

    async def end() -> None:
        scene.server.command("LPUSH", "nothing", "x")
        await blocking

    scene.undo.append(end)


def _blocked(server: Server) -> bool:
    return bool(server.client().info("clients")["blocked_clients"])


async def let_go_of_them(scene: Scene) -> None:
    """It is answered."""
    await scene.undo.pop()()


async def forget_the_user(scene: Scene) -> None:
    """The app's password is another now; whoever is logged in is logged out."""
    scene.server.command("ACL", "SETUSER", USER, "resetpass", ">another")
    scene.disconnect()


_odd = partial(
    Row,
    reason="reply",
    health="redis_reply",
    breaker="closed",
    log=("command_failed",),
    url="redis://{address}",
)
_fine = partial(Row, reason=None, health=None, breaker="closed", cache="works", log=())
_probes_work = partial(Row, pings=True)

# What the server itself does: on every version alike.
OF_THE_SERVER: dict[str, Row] = {
    "killed": Row(kill, start_again, keeps=False),
    "killed under way": Row(pause, start_again, meanwhile=kill_under_way, keeps=False),
    "hung": Row(pause, resume, reason="timeout", also=BEHIND, health="redis_timeout"),
    "loading": Row(
        load,
        finish_loading,
        reason="loading",
        also=frozenset(["connection"]),
        health="redis_loading",
        keeps=False,
        arguments=("--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024"),
        before_7=None,
    ),
    "busy": Row(be_busy, stop_being_busy, reason="busy", health="redis_busy", arguments=("--lua-time-limit", "1")),
    "no password": Row(
        command("CONFIG", "SET", "requirepass", "another", disconnects=True),
        command("CONFIG", "SET", "requirepass", ""),
        reason="auth",
        also=frozenset(["connection"]),
        health="redis_auth",
        url="redis://{address}",
    ),
    "wrong password": Row(
        forget_the_user,
        command("ACL", "SETUSER", USER, f">{SECRET}"),
        reason="auth",
        also=frozenset(["connection"]),
        health="redis_auth",
    ),
    "no rights": Row(
        command("ACL", "SETUSER", USER, "-@all"),
        command("ACL", "SETUSER", USER, "+@all"),
        reason="permission",
        health="redis_permission",
    ),
    "no right to the script": _probes_work(
        command("ACL", "SETUSER", USER, "-evalsha", "-eval"),
        command("ACL", "SETUSER", USER, "+evalsha", "+eval"),
        reason="permission",
        health="redis_permission",
    ),
    "no right within the script": _probes_work(
        command("ACL", "SETUSER", USER, "-hset"),
        command("ACL", "SETUSER", USER, "+hset"),
        reason="permission",
        health="redis_permission",
    ),
    "no right to a TTL": _probes_work(
        command("ACL", "SETUSER", USER, "-pexpire"),
        command("ACL", "SETUSER", USER, "+pexpire"),
        reason="permission",
        health="redis_permission",
    ),
    "a replica": Row(
        command("REPLICAOF", "127.0.0.1", "1"),
        command("REPLICAOF", "NO", "ONE"),
        reason="readonly",
        health="redis_readonly",
    ),
    "a replica without its primary": Row(
        command("REPLICAOF", "127.0.0.1", "1"),
        command("REPLICAOF", "NO", "ONE"),
        reason="readonly",
        health="redis_readonly",
        arguments=("--replica-serve-stale-data", "no"),
    ),
    "no snapshot": Row(
        fail_to_save,
        command("CONFIG", "SET", "stop-writes-on-bgsave-error", "no"),
        reason="readonly",
        health="redis_readonly",
    ),
    "too few replicas": _probes_work(
        command("CONFIG", "SET", "min-replicas-to-write", 1),
        command("CONFIG", "SET", "min-replicas-to-write", 0),
        reason="readonly",
        health="redis_readonly",
    ),
    "no memory": Row(
        command("CONFIG", "SET", "maxmemory", 1),
        command("CONFIG", "SET", "maxmemory", 0),
        reason="oom",
        health="redis_oom",
        breaker="closed",
        cache="reads",
        log=("redis_unavailable", "embedding_writes_paused", "redis_back"),
        arguments=("--maxmemory-policy", "noeviction"),
    ),
    "too many clients": Row(
        command("CONFIG", "SET", "maxclients", 1, disconnects=True), command("CONFIG", "SET", "maxclients", 10_000)
    ),
    "no slots": _probes_work(
        lose_slots,
        own_slots,
        reason="cluster",
        health="redis_cluster",
        before=own_slots,
        log=("slots_enforced", "redis_unavailable", "redis_back"),
        arguments=("--cluster-enabled", "yes", "--cluster-node-timeout", "500"),
        slow=True,
    ),
    "script cache flushed": _fine(command("SCRIPT", "FLUSH")),
    "a database that is not there": _odd(nothing, None, url="redis://{address}/99", from_start=True),
    "no EVALSHA": _odd(
        nothing, None, pings=True, cache="works", arguments=("--rename-command", "EVALSHA", ""), from_start=True
    ),
    "no MGET": _odd(
        nothing,
        None,
        reason=None,
        also=frozenset(["reply"]),
        health=None,
        arguments=("--rename-command", "MGET", ""),
        from_start=True,
    ),
}

OF_ALL_ELSE: dict[str, Row] = {
    # on the way
    "refused": Row(way("refuse"), well),
    "refused from the start": Row(way("refuse"), well, from_start=True),
    "reset": Row(way("reset"), well),
    "closed instead of replies": Row(way("cut_replies"), well),
    "torn replies": Row(way("torn_replies"), well),
    "one byte and silence": Row(way("begun_replies"), well, reason="timeout", also=BEHIND, health="redis_timeout"),
    "black hole": Row(way("blackhole"), well, reason="timeout", also=BEHIND, health="redis_timeout"),
    "black hole from the start": Row(way("blackhole"), well, reason="timeout", health="redis_timeout", from_start=True),
    "lost replies": Row(way("drop_replies"), well, reason="timeout", also=BEHIND, health="redis_timeout"),
    "too slow": Row(way("delay", seconds=3 * DEADLINE), well, reason="timeout", also=BEHIND, health="redis_timeout"),
    "slow": _fine(way("delay", seconds=DEADLINE / 10), well),
    "replies in single bytes": _fine(way("chunk"), well),
    "a name without an address": Row(nothing, None, url=f"redis://{USER}:{SECRET}@nowhere.invalid", from_start=True),
    # replies of another shape, to whatever was asked
    "a number for a reply": _odd(way("answer", reply=b":42\r\n"), well),
    "OK for a reply": _odd(way("answer", reply=b"+OK\r\n"), well),
    "nothing for a reply": _odd(way("answer", reply=b"*-1\r\n"), well),
    "an empty list for a reply": _odd(way("answer", reply=b"*0\r\n"), well),
    "the beginning of a reply without an end": Row(way("answer", reply=b"*1\r\n*2000000000\r\n"), well),
    "another protocol": Row(way("answer", reply=b"HTTP/1.1 400 Bad Request\r\n\r\n"), well),
    # at this end
    "all connections in use": Row(
        hold_all_connections,
        let_go_of_them,
        reason="pool",
        health=None,
        breaker="closed",
        log=("command_failed",),
        settings={"REDIS_POOL_SIZE": 1, "REDIS_TIMEOUT": 30},  # for which the app's command may block
    ),
    "a plain server for TLS": Row(
        nothing,
        None,
        url=f"rediss://{USER}:{SECRET}@{{address}}",
        reason="timeout",
        health="redis_timeout",
        from_start=True,
        # Each attempt to connect reads the machine's certificates, which keeps the loop busy.
        patience=LONG,
        slow=True,
    ),
}

ROWS = OF_THE_SERVER | OF_ALL_ELSE
