"""Clients as settings describe them: alone, behind sentinels, or a cluster;
every trap avoided at construction.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import redis
import redis.asyncio as aioredis
from redis.asyncio.connection import AbstractConnection, ConnectionPool, SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.driver_info import DriverInfo
from redis.exceptions import RedisError
from redis.maint_notifications import MaintNotificationsConfig

from .._version import __version__
from ..errors import ConfigurationError
from ..events import say
from ..settings import Settings
from ..settings.locations import URL_OPTIONS_NOT_TAKEN, read_address, weakened_by
from ..telemetry import telemetry
from . import side_connection
from .cluster_nodes import QueueingCluster, first_to_answer, learn_nodes, ping_node, ping_over
from .sentinels import Sentinels
from .sockets import BoundedParser, connection_class, master_connection_class

logger = logging.getLogger("redis_asgi.connection")

Client: TypeAlias = aioredis.Redis | aioredis.RedisCluster


@dataclass(frozen=True, slots=True)
class NewClient:
    """A client that has not connected yet.

    Attributes:
        sentinels: Clients that have to be closed with it.
    """

    client: Client
    sentinels: tuple[aioredis.Redis, ...] = ()


class QueueingPool(ConnectionPool):
    """A pool whose caller waits for a free connection,
    where redis-py's raises "Too many connections".

    A semaphore before the plain pool, not ``BlockingConnectionPool``: that one costs 20 us more a
    command and reports its own exhaustion as a plain ``ConnectionError``.

    What goes through the client, the app's own commands, gets all connections but one: some of them
    may block for as long as they like (``BLPOP``, a subscription), and limits and vectors, which
    `take` theirs, still find one.

    Attributes:
        on_shortage: Called when a caller has to wait;
            holders of an idle connection give it back then.
    """

    def __init__(self, *, turn_timeout: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._turns = asyncio.Semaphore(self.max_connections)
        self._turns_of_clients = asyncio.Semaphore(max(1, self.max_connections - 1))
        self._with_clients: set[AbstractConnection] = set()
        self._turn_timeout = turn_timeout
        self.on_shortage: Callable[[], None] | None = None
        self._waiting_for_any = 0

    def __repr__(self) -> str:
        idle, in_use = len(self._available_connections), len(self._in_use_connections)
        return f"<{type(self).__name__} {in_use} in use, {idle} idle, at most {self.max_connections}>"

    @property
    def is_wanted(self) -> bool:
        """Whether a caller waits that any connection would help."""
        return self._waiting_for_any > 0

    @property
    def exhausted(self) -> bool:
        """Whether every connection is in use."""
        return self._turns.locked()

    async def get_connection(self, *_deprecated: Any, **_options: Any) -> AbstractConnection:
        await self._take_turn(self._turns_of_clients)
        try:
            connection = await self.take()
        except BaseException:
            self._turns_of_clients.release()
            raise
        self._with_clients.add(connection)
        return connection

    async def take(self) -> AbstractConnection:
        """A connection for the package itself, the last one too."""
        await self._take_turn(self._turns)
        try:
            connection: AbstractConnection = self.get_available_connection()  # type: ignore[no-untyped-call]  # theirs
        except BaseException:
            self._turns.release()
            raise
        try:
            transport = side_connection.transport_of(connection)
            if transport is not None and transport.is_closing():
                # Reset while it was idle, which redis-py notices by its next command.
                await side_connection.hang_up(connection)
            # The usual case, without the layers of redis-py's retries:
            # connected, and nothing left to read.
            if not connection.is_connected or await connection.can_read():
                await self.ensure_connection(connection)
        except BaseException:
            await self.release(connection)
            raise
        return connection

    async def _take_turn(self, turns: asyncio.Semaphore) -> None:
        if not turns.locked():
            await turns.acquire()
            return
        for_any = turns is self._turns
        if for_any and self.on_shortage is not None:
            self.on_shortage()
        began = time.monotonic()
        self._waiting_for_any += for_any
        try:
            async with asyncio.timeout(self._turn_timeout):
                await turns.acquire()
        except TimeoutError:
            message = f"No free connection within {self._turn_timeout} s"
            raise redis.exceptions.MaxConnectionsError(message) from None
        finally:
            self._waiting_for_any -= for_any
            telemetry().redis_pool_wait.observe(time.monotonic() - began)

    async def release(self, connection: AbstractConnection) -> None:
        try:
            await super().release(connection)
        finally:
            self._turns.release()
            if connection in self._with_clients:
                self._with_clients.discard(connection)
                self._turns_of_clients.release()

    def renew(self) -> None:
        """Connect anew what is in use now, once it comes back."""
        for connection in self._in_use_connections:
            connection.mark_for_reconnect()  # type: ignore[no-untyped-call]  # theirs


class QueueingSentinelPool(SentinelConnectionPool, QueueingPool):
    """The same behind the pool that asks the sentinels where the master is."""


def _read_url(url: str) -> dict[str, Any]:
    """The options of *url*, without those that would undo the choices of `build_client`."""
    options = {name: value for name, value in parse_url(url).items() if name not in URL_OPTIONS_NOT_TAKEN}
    if "path" in options:
        options["parser_class"] = BoundedParser
    else:
        options["connection_class"] = connection_class(encrypted=options.get("connection_class") is SSLConnection)
    return options


def build_client(settings: Settings) -> NewClient:
    """Make the client these settings describe. No I/O; every choice below avoids a measured trap.

    - no retries: a retried counting command counts again (connecting is retried by
      `initialize_pool` only);
    - RESP2 and no maintenance notifications:
      with them redis-py 8.1 hands out connections that a restarted server has closed;
    - ``driver_info`` instead of ``client_name``:
      an ACL without ``client|setname`` would fail every command.
    """
    if settings.is_memory:
        raise ConfigurationError(
            "REDIS_URL='memory://' has no Redis client. Set REDIS_URL=redis://localhost:6379 to use one."
        )
    common: dict[str, Any] = {
        "username": settings.REDIS_USERNAME,
        "password": settings.REDIS_PASSWORD.get_secret_value() if settings.REDIS_PASSWORD else None,
        "socket_timeout": settings.REDIS_TIMEOUT,
        "socket_connect_timeout": settings.REDIS_TIMEOUT,
        "decode_responses": False,
        "protocol": 2,
        "driver_info": DriverInfo().add_upstream_driver("redis-asgi", __version__),
        "retry": Retry(NoBackoff(), 0),
    }
    quiet = MaintNotificationsConfig(enabled=False)
    url = settings.REDIS_URL.get_secret_value() if settings.REDIS_URL else ""
    encrypted = settings.is_encrypted
    tls: dict[str, Any] = {}
    if encrypted:
        tls = {
            "ssl_ca_certs": settings.REDIS_SSL_CA_CERTS,
            "ssl_certfile": settings.REDIS_SSL_CERTFILE,
            "ssl_keyfile": settings.REDIS_SSL_KEYFILE,
        }
    weakness = weakened_by(url)
    if weakness is not None:
        say(logger, "tls_unverified", option=weakness, address=describe(settings))
    where: dict[str, Any] = {"host": settings.REDIS_HOST, "port": settings.REDIS_PORT}

    if settings.REDIS_CLUSTER:
        # Ten batches may be under way at once beside the callers that hold a turn.
        common |= {"max_connections": settings.REDIS_POOL_SIZE + 10, "maint_notifications_config": quiet}
        common |= {"ssl": encrypted, **tls} | (_read_url(url) if url else where)
        common.pop("connection_class", None)  # "kind" says it
        one = (common.pop("host", "localhost"), int(common.pop("port", 6379)))
        addresses = [read_address(each) for each in settings.REDIS_CLUSTER_NODES] or [one]
        kind = connection_class(encrypted=encrypted)
        return NewClient(QueueingCluster(addresses, turns=settings.REDIS_POOL_SIZE, kind=kind, **common))

    common |= {"db": settings.REDIS_DB}
    pool_options: dict[str, Any] = {
        "max_connections": settings.REDIS_POOL_SIZE,
        "turn_timeout": settings.REDIS_TIMEOUT,
        "maint_notifications_config": quiet,
    }
    if settings.REDIS_SENTINELS:
        kept = ("socket_timeout", "socket_connect_timeout", "protocol", "retry")
        password = settings.REDIS_SENTINEL_PASSWORD
        to_sentinels = {name: common[name] for name in kept} | tls
        to_sentinels |= {
            "username": settings.REDIS_SENTINEL_USERNAME,
            "password": password.get_secret_value() if password else None,
            "connection_class": connection_class(encrypted=encrypted),
        }
        sentinel = Sentinels([read_address(each) for each in settings.REDIS_SENTINELS], to_sentinels)
        master = sentinel.master_for(
            settings.REDIS_SENTINEL_MASTER or "",
            connection_pool_class=QueueingSentinelPool,
            connection_class=master_connection_class(encrypted=encrypted),
            **common,
            **pool_options,
            **tls,
        )
        return NewClient(master, tuple(sentinel.sentinels))
    if url:
        options = common | pool_options | tls | _read_url(url)
        return NewClient(aioredis.Redis.from_pool(QueueingPool(**options)))
    where["connection_class"] = connection_class(encrypted=encrypted)
    return NewClient(aioredis.Redis.from_pool(QueueingPool(**where, **common, **pool_options, **tls)))


def describe(settings: Settings) -> str:
    """The address that these settings point to, without user or password."""
    if settings.REDIS_SENTINELS:
        return f"sentinel master {settings.REDIS_SENTINEL_MASTER!r}"
    if settings.REDIS_CLUSTER_NODES:
        return f"cluster {','.join(settings.REDIS_CLUSTER_NODES)}"
    if settings.REDIS_URL:
        return _describe_url(settings.REDIS_URL.get_secret_value())
    return f"{settings.REDIS_HOST}:{settings.REDIS_PORT}/{settings.REDIS_DB}"


def _describe_url(url: str) -> str:
    """A valid *url* without user or password: put together from what it says,
    so that nothing else can be in it.
    """
    scheme = url.partition(":")[0]
    if scheme == "memory":
        return "'memory://'"
    options = parse_url(url)
    user = "***@" if "username" in options or "password" in options else ""
    if "path" in options:
        return repr(f"{scheme}://{user}{options['path']}")
    host = str(options.get("host", "localhost"))
    port = f":{options['port']}" if "port" in options else ""
    db = f"/{options['db']}" if "db" in options else ""
    return repr(f"{scheme}://{user}{f'[{host}]' if ':' in host else host}{port}{db}")


def describe_client(client: Client) -> str:
    """The address that a client of the user's points to, without user or password."""
    if isinstance(client, aioredis.RedisCluster):
        return f"cluster {','.join(list(client.nodes_manager.startup_nodes)[:8])}"
    pool = client.connection_pool
    if isinstance(pool, SentinelConnectionPool):
        return f"sentinel master {pool.service_name!r}"
    where = pool.connection_kwargs
    path = where.get("path")
    return str(path) if path else f"{where.get('host', 'localhost')}:{where.get('port', 6379)}/{where.get('db') or 0}"


async def ping(client: Client, node: str = "") -> None:
    """Ask for a sign of life over a connection made for it,
    which shows that others can be made too.

    Args:
        node: Of a cluster, the one that is meant; empty,
            or one that is no primary any more = any primary.
    """
    if isinstance(client, aioredis.RedisCluster):
        await _ping_cluster(client, node)
    else:
        await ping_over(client.connection_pool.make_connection())  # type: ignore[no-untyped-call]  # theirs


async def _ping_cluster(client: aioredis.RedisCluster, name: str) -> None:
    await client.initialize()
    node = client.get_node(node_name=name) if name else None
    try:
        if node is not None and node.server_type == "primary":
            await ping_node(node)
        else:
            await first_to_answer(client.get_primaries())
    except BaseException as error:
        # Its slots may have moved to a replica, be it dead or silent until we are cancelled.
        if isinstance(client, QueueingCluster):
            client.learn_soon()
        elif isinstance(error, RedisError | OSError):
            await learn_nodes(client)
        raise


async def drop_connections(client: Client) -> None:
    """Close what may be connected to a server that is not the one to write to any more; it is made
    anew when needed.
    """
    if isinstance(client, aioredis.RedisCluster):
        await learn_nodes(client)
        return
    pool = client.connection_pool
    if isinstance(pool, QueueingPool):
        pool.renew()
    with suppress(RedisError, OSError):
        await pool.disconnect(inuse_connections=False)
