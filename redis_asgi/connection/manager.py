"""One lazily opened Redis client per process and event loop,
shared by every part that is given none.

`RedisManager` owns the client and what hangs on it. Nothing connects when it is built: the first
use inside a running loop opens a pool for that loop, `close()` or the loop's own end closes it, and
the next use opens a new one. A fork or a second ``asyncio.run`` therefore never meets another
loop's sockets.
"""

import asyncio
import logging
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Annotated, ParamSpec, TypeVar, cast

import redis.asyncio as aioredis
from redis.asyncio.connection import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from ..errors import Failure, classify
from ..event_loop import running_loop
from ..events import say, words_for
from ..misuse import Uncalled, constructor_says_what_was_meant
from ..settings import Settings, check_settings
from ..telemetry import flush_counts
from .breaker import PROBE_EVERY, Breaker, BreakerState
from .client_factory import Client, build_client, describe, drop_connections, ping
from .open_client import PROCESS, Clearable, Opened, Part, watch_forks

logger = logging.getLogger("redis_asgi.connection")

NO_DEPENDENCY = Uncalled(
    "FastAPI would ask each request for redis= and settings=, so that clients choose the server. Make it once, as in "
    "limiter = RateLimiter(), and write Depends(lambda: limiter)."
)
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


# What is open stays alive until its loop ends or it is closed,
# even if no part holds its manager any more.
_open: set[Opened] = set()


async def _closed_with_the_loop(manager: "RedisManager", opened: Opened) -> AsyncGenerator[None, None]:
    """Close *opened* when the loop finalises its async generators:
    after its tasks, before it is closed.

    That is what lets an app without lifespan events end without a ResourceWarning, and an app's own
    teardown still use the client.
    """
    _open.add(opened)
    try:
        yield
    finally:
        _open.discard(opened)
        manager.forget(opened)
        await opened.aclose()
        # The loop that was to tell these takes its timers along,
        # and the next one's would wait behind them.
        flush_counts()


@constructor_says_what_was_meant("RedisManager(Settings(REDIS_URL='redis://localhost:6379'))")
class RedisManager:
    """The one client that every part of the package shares, opened at first use.

    Args:
        settings: Where Redis is and how to reach it; ``None`` reads the environment now.

    One client per (process, event loop): a client belongs to the loop that first uses it, and a
    forked process must not share its parent's sockets. Use it from any number of tasks. After
    `close()` the next `get_connection()` opens a new pool.

    Attributes:
        fails_closed: Whether a part that uses it needs Redis: without it, that part refuses.
        keys_apart: Whether each command may name keys of one slot only, although the client is of
            no cluster: since ``REDIS_BATCH`` says so, or since `found_slots`.
        needs: A command that parts cannot do without, in a form that does nothing; empty = none.
            Health checks send it beside their PING, which a server may answer that has renamed or
            denied it.
    """

    owns_client = True

    def __init__(self, settings: Annotated[Settings | None, NO_DEPENDENCY] = None) -> None:
        check_settings(settings)
        self._settings = settings if settings is not None else Settings()
        watch_forks()
        self._opened: dict[asyncio.AbstractEventLoop, Opened] = {}
        self._shared: dict[object, object] = {}
        self._kept: weakref.WeakSet[Clearable] = weakref.WeakSet()
        self._inherited: list[object] = []
        self._unreachable: tuple[float, Exception] | None = None
        self.fails_closed = False
        self.needs: tuple[bytes, ...] = ()
        self.keys_apart = self._settings.REDIS_BATCH == "key"
        self._forks = PROCESS.forks
        self._lock = threading.Lock()
        with managers_lock:
            _made.add(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address})"

    @property
    def settings(self) -> Settings:
        """The settings this manager was built with."""
        return self._settings

    @property
    def address(self) -> str:
        """The address of its Redis, for people: no user and no password."""
        return describe(self._settings)

    @property
    def has_redis(self) -> bool:
        """``False`` on ``memory://``: state lives in this object and there is no client."""
        return not self._settings.is_memory

    @property
    def pool(self) -> ConnectionPool | None:
        """The running loop's connection pool; ``None`` outside a loop,
        when not open, or on a cluster.
        """
        try:
            opened = self._opened.get(running_loop())
        except RuntimeError:
            return None
        return getattr(opened.client, "connection_pool", None) if opened and self._forks == PROCESS.forks else None

    @property
    def breaker_state(self) -> BreakerState:
        """``open`` while this loop's client is left alone after failures,
        ``half_open`` while it is tried again.

        On a cluster each node has a breaker of its own, and the worst of them is told.
        ``closed`` when nothing is open.
        """
        try:
            opened = self._opened.get(running_loop())
        except RuntimeError:
            return "closed"
        states = {breaker.state for breaker in opened.used_breakers()} if opened else set()
        return "open" if "open" in states else "half_open" if "half_open" in states else "closed"

    @property
    def breaker_reason(self) -> Failure | None:
        """The reason why this loop's client is left alone,
        or has been until a moment ago; ``None`` when it is not.

        One that is to be tried again, and is not, is not in doubt for ever: an app that is sent no
        requests while it is would never be sent one again.
        """
        try:
            opened = self._opened.get(asyncio.get_running_loop())
        except RuntimeError:
            return None
        breakers = opened.used_breakers() if opened is not None else ()
        return next((breaker.reason for breaker in breakers if breaker.is_in_doubt), None)

    @property
    def is_refused(self) -> bool:
        """Whether this loop's client, which is not left alone, is answered by odd replies only."""
        try:
            opened = self._opened.get(asyncio.get_running_loop())
        except RuntimeError:
            return False
        return opened is not None and any(breaker.is_refused for breaker in opened.used_breakers())

    async def get_connection(self) -> Client:
        """The running loop's client, with raw ``bytes`` replies;
        opened now if it is not, without I/O.

        Raises:
            ConfigurationError: On ``memory://``, which has no client.
        """
        return self._open().client

    async def initialize_pool(self) -> None:
        """Open the pool and wait until Redis answers a PING,
        trying ``REDIS_RETRY_ATTEMPTS`` times more.

        Optional: everything opens at first use anyway. Call it at start to fail early.

        Raises:
            redis.exceptions.RedisError: What the last attempt raised.
            ConfigurationError: On ``memory://``, which has no pool.
        """
        client = self._open().client
        attempts = Retry(
            ExponentialBackoff(cap=1.0, base=0.05),
            self._settings.REDIS_RETRY_ATTEMPTS,
            (RedisConnectionError, RedisTimeoutError, OSError),  # type: ignore[arg-type]  # any class will do
        )

        async def ping() -> None:
            await client.ping()

        async def again(_error: Exception) -> None:
            return None

        await attempts.call_with_retry(ping, again, _may_pass)

    async def close(self) -> None:
        """Close what the running loop has open; idempotent, and the next use opens it again."""
        if self._forks != PROCESS.forks:
            self._forget_parent()
        opened = self._opened.pop(running_loop(), None)
        if opened is None:
            return
        if opened.until_loop_ends is None:
            await opened.aclose()
        else:
            await opened.until_loop_ends.aclose()

    def retain(self) -> None:
        """Count one more user in this loop (an app whose lifespan has started)."""
        if self.has_redis:
            # The app starts all the same when no client can be built; the log has said so.
            with suppress(Exception):
                self._open().users += 1

    async def release(self) -> None:
        """Count one user less; the last one closes."""
        opened = self._opened.get(running_loop())
        if opened is not None:
            opened.users -= 1
            if opened.users <= 0:
                await self.close()

    @property
    def is_open(self) -> bool:
        """Whether the running loop has a client, which has been opened and not been closed since."""
        return self._forks == PROCESS.forks and running_loop() in self._opened

    def per_client(self, factory: Callable[["RedisManager", Client], T]) -> T:
        """The one *factory* product of this loop's client,
        made at first use and closed before the client.
        """
        opened = self._open()
        made = opened.parts.get(factory)
        if made is None:
            made = opened.parts[factory] = cast(Part, factory(self, opened.client))
        return cast(T, made)

    def breaker(self, node: str = "") -> Breaker:
        """The breaker of this loop's client;
        on a cluster that of a node by its name, or of its slot table.
        """
        opened = self._open()
        breaker = opened.breakers.get(node)
        if breaker is None:
            client = opened.client
            # Once the slot table is read, commands go by the nodes' own.
            trial = bool(node) or not isinstance(client, aioredis.RedisCluster)
            breaker = Breaker(
                lambda: ping(client, node), lambda: drop_connections(client), node, address=self.address, trial=trial
            )
            opened.breakers[node] = breaker
        return breaker

    def found_slots(self) -> None:
        """Note that the server has refused keys of several slots in one command;
        from here on none gets such a one.
        """
        if self.keys_apart:
            return
        self.keys_apart = True
        say(logger, "slots_enforced", address=self.address)

    def per_process(self, factory: Callable[[Settings], T]) -> T:
        """The one *factory* product of this manager in this process,
        such as the counters of ``memory://``.
        """
        with self._lock:
            if factory not in self._shared:
                self._shared[factory] = factory(self._settings)
        return cast(T, self._shared[factory])

    def keep(self, part: Clearable) -> None:
        """Let `clear` clear *part* too, for as long as its holder keeps it."""
        with self._lock:
            self._kept.add(part)

    def clear(self) -> None:
        """Forget what this process remembers,
        such as the counters and vectors of ``memory://``; nothing in Redis.
        """
        with self._lock:
            parts = [*self._shared.values(), *self._kept]
        for part in parts:
            if isinstance(part, Clearable):
                part.clear()

    def _open(self) -> Opened:
        loop = running_loop()
        if self._forks != PROCESS.forks:
            self._forget_parent()
        opened = self._opened.get(loop)
        if opened is None:
            self._drop_closed_loops()
            opened = self._connect_if_reachable()
            opened.until_loop_ends = _closed_with_the_loop(self, opened)
            # Run it to its yield, which registers it with the loop; it awaits nothing before that.
            with suppress(StopIteration):
                opened.until_loop_ends.__anext__().__await__().send(None)
            with self._lock:
                self._opened[loop] = opened
        return opened

    def forget(self, opened: Opened) -> None:
        """Take *opened* for closed: its loop has ended."""
        for loop, held in list(self._opened.items()):
            if held is opened:
                del self._opened[loop]

    def _connect_if_reachable(self) -> Opened:
        """`_connect`; what it raised (such as for a cluster's host without an address) is raised
        again for a moment.
        """
        if self._unreachable is not None:
            since, error = self._unreachable
            if time.monotonic() - since < PROBE_EVERY:
                raise error
        try:
            opened = self._connect()
        except Exception as error:
            failure = classify(error)
            if self._unreachable is None and failure is not Failure.DEFECT:
                say(logger, "redis_unavailable", **words_for(failure), address=self.address)
            self._unreachable = (time.monotonic(), error)
            raise
        self._unreachable = None
        return opened

    def _connect(self) -> Opened:
        built = build_client(self._settings)
        return Opened(built.client, own=True, sentinels=built.sentinels)

    def _drop_closed_loops(self) -> None:
        # Only a loop that was closed without shutdown_asyncgens() is still here.
        for loop, opened in list(self._opened.items()):
            if loop.is_closed():
                del self._opened[loop]
                _open.discard(opened)

    def _forget_parent(self) -> None:
        # Kept alive on purpose: finalising the parent's transports here would touch its selector.
        self._inherited.append(dict(self._opened))
        self._opened = {}
        self._forks = PROCESS.forks


def _may_pass(error: Exception) -> bool:
    # A wrong password stays wrong; trying again only fills the server's ACL log.
    return classify(error) not in (Failure.AUTH, Failure.PERMISSION)


_made: weakref.WeakSet[RedisManager] = weakref.WeakSet()
managers_lock = threading.RLock()  # held already by those who make one for a table of their own


def all_managers() -> list[RedisManager]:
    """Every manager of this process that is still there."""
    with managers_lock:
        return list(_made)
