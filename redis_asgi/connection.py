"""One lazily opened Redis client per process and event loop, shared by every part that is given none.

`RedisManager` owns the client and what hangs on it. Nothing connects when it is built: the first use inside a
running loop opens a pool for that loop, `close()` or the loop's own end closes it, and the next use opens a
new one. A fork or a second ``asyncio.run`` therefore never meets somebody else's sockets.
"""

import asyncio
import functools
import inspect
import logging
import os
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, ParamSpec, Protocol, TypeAlias, TypeVar, cast, overload, runtime_checkable

import redis
import redis.asyncio as aioredis
from redis.asyncio.connection import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from starlette.types import Scope

from .breaker import PROBE_EVERY, Breaker, BreakerState
from .client import Client, build_client, describe, describe_client, drop_connections, ping
from .errors import ConfigurationError, Failure, classify
from .event_loop import running_loop
from .events import say, words_for
from .locations import redact
from .misuse import Uncalled, constructor_says_what_was_meant, shown
from .settings import Settings
from .telemetry import drop_notes, tell_notes

logger = logging.getLogger("redis_asgi.connection")

_NO_DEPENDENCY = Uncalled(
    "FastAPI would ask each request for redis= and settings=, so that clients choose the server. Make it once, as in "
    "limiter = RateLimiter(), and write Depends(lambda: limiter)."
)
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Part(Protocol):
    """Something that lives beside an open client, in its loop, and ends before it."""

    async def aclose(self) -> None: ...


@runtime_checkable
class Clearable(Protocol):
    """Something that remembers what happened in this process, and can forget it."""

    def clear(self) -> None: ...


@dataclass(eq=False, slots=True)
class _Opened:
    """What one event loop has open."""

    client: Client
    own: bool  # whether it is ours to close
    sentinels: tuple[aioredis.Redis, ...] = ()
    parts: dict[object, Part] = field(default_factory=dict)
    breakers: dict[str, Breaker] = field(default_factory=dict)
    until_loop_ends: AsyncGenerator[None, None] | None = None
    users: int = 0

    def used_breakers(self) -> Iterator[Breaker]:
        """Those of servers that commands go to; a node of a cluster may have left it, or be a replica now."""
        for name, breaker in self.breakers.items():
            if isinstance(self.client, aioredis.RedisCluster) and name:
                node = self.client.get_node(node_name=name)
                if node is None or node.server_type != "primary":
                    continue
            yield breaker

    async def aclose(self) -> None:
        parts, self.parts = list(self.parts.values()), {}
        for part in parts:
            await part.aclose()
        for breaker in self.breakers.values():
            await breaker.aclose()
        if not self.own:
            return
        # A peer that is gone cannot be told goodbye; the sockets are closed all the same.
        with suppress(RedisError, OSError):
            await self.client.aclose()
        if isinstance(self.client, aioredis.Redis):
            with suppress(RedisError, OSError):
                await self.client.connection_pool.disconnect()
        for sentinel in self.sentinels:
            with suppress(RedisError, OSError):
                await sentinel.aclose()


# What is open stays alive until its loop ends or it is closed, whoever still holds its manager.
_open: set[_Opened] = set()


class _Process:
    """This process; what is asked of it for every request is an attribute, not a call.

    Attributes:
        forks: How often it was forked off since the first manager was made: other sockets for each number.
    """

    forks = 0


PROCESS = _Process()


def _note_fork() -> None:
    PROCESS.forks += 1
    drop_notes()


@functools.lru_cache(maxsize=1)
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_note_fork)


async def _closed_with_the_loop(manager: "RedisManager", opened: _Opened) -> AsyncGenerator[None, None]:
    """Close *opened* when the loop finalises its async generators: after its tasks, before it is closed.

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
        # The loop that was to tell these takes its timers along, and the next one's would wait behind them.
        tell_notes()


@constructor_says_what_was_meant("RedisManager(Settings(REDIS_URL='redis://localhost:6379'))")
class RedisManager:
    """The one client that every part of the package shares, opened at first use.

    Args:
        settings: Where Redis is and how to reach it; ``None`` reads the environment now.

    One client per (process, event loop): a client belongs to the loop that first uses it, and a forked
    process must not share its parent's sockets. Use it from any number of tasks. After `close()` the next
    `get_connection()` opens a new pool.

    Attributes:
        fails_closed: Whether a part that uses it needs Redis: without it, that part refuses.
        keys_apart: Whether each command may name keys of one slot only, although the client is of no cluster: since
            ``REDIS_BATCH`` says so, or since `found_slots`.
        needs: A command that parts cannot do without, in a form that does nothing; empty = none. Health checks send it
            beside their PING, which a server may answer that has renamed or denied it.
    """

    owns_client = True

    def __init__(self, settings: Annotated[Settings | None, _NO_DEPENDENCY] = None) -> None:
        check_settings(settings)
        self._settings = settings if settings is not None else Settings()
        _watch_forks()
        self._opened: dict[asyncio.AbstractEventLoop, _Opened] = {}
        self._shared: dict[object, object] = {}
        self._kept: weakref.WeakSet[Clearable] = weakref.WeakSet()
        self._inherited: list[object] = []
        self._unreachable: tuple[float, Exception] | None = None
        self.fails_closed = False
        self.needs: tuple[bytes, ...] = ()
        self.keys_apart = self._settings.REDIS_BATCH == "key"
        self._forks = PROCESS.forks
        self._lock = threading.Lock()
        with _managers_lock:
            _made.add(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address})"

    @property
    def settings(self) -> Settings:
        """The settings this manager was built with."""
        return self._settings

    @property
    def address(self) -> str:
        """Where its Redis is, for people: no user and no password."""
        return describe(self._settings)

    @property
    def has_redis(self) -> bool:
        """``False`` on ``memory://``: state lives in this object and there is no client."""
        return not self._settings.is_memory

    @property
    def pool(self) -> ConnectionPool | None:
        """The running loop's connection pool; ``None`` outside a loop, when not open, or on a cluster."""
        try:
            opened = self._opened.get(running_loop())
        except RuntimeError:
            return None
        return getattr(opened.client, "connection_pool", None) if opened and self._forks == PROCESS.forks else None

    @property
    def breaker_state(self) -> BreakerState:
        """``open`` while this loop's client is left alone after failures, ``half_open`` while it is tried again.

        On a cluster each node has a breaker of its own, and the worst of them is told. ``closed`` when nothing is open.
        """
        try:
            opened = self._opened.get(running_loop())
        except RuntimeError:
            return "closed"
        states = {breaker.state for breaker in opened.used_breakers()} if opened else set()
        return "open" if "open" in states else "half_open" if "half_open" in states else "closed"

    @property
    def breaker_reason(self) -> Failure | None:
        """Why this loop's client is left alone, or has been until a moment ago; ``None`` when it is not.

        One that is to be tried again, and by nobody is, is not in doubt for ever: who is sent no requests while it is
        would never be sent one again.
        """
        try:
            opened = self._opened.get(asyncio.get_running_loop())
        except RuntimeError:
            return None
        breakers = opened.breakers.values() if opened is not None else ()
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
        """The running loop's client, with raw ``bytes`` replies; opened now if it is not, without I/O.

        Raises:
            ConfigurationError: On ``memory://``, which has no client.
        """
        return self._open().client

    async def initialize_pool(self) -> None:
        """Open the pool and wait until Redis answers a PING, trying ``REDIS_RETRY_ATTEMPTS`` times more.

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

    def hold(self) -> None:
        """Count one more user in this loop (an app whose lifespan has started)."""
        if self.has_redis:
            # The app starts all the same when no client can be built; the log has said so.
            with suppress(Exception):
                self._open().users += 1

    async def let_go(self) -> None:
        """Count one user less; the last one closes."""
        opened = self._opened.get(running_loop())
        if opened is not None:
            opened.users -= 1
            if opened.users <= 0:
                await self.close()

    def part(self, factory: Callable[["RedisManager", Client], T]) -> T:
        """The one *factory* product of this loop's client, made at first use and closed before the client."""
        opened = self._open()
        made = opened.parts.get(factory)
        if made is None:
            made = opened.parts[factory] = cast(Part, factory(self, opened.client))
        return cast(T, made)

    def breaker(self, node: str = "") -> Breaker:
        """The breaker of this loop's client; on a cluster that of a node by its name, or of its slot table."""
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
        """Note that the server has refused keys of several slots in one command; from here on none gets such a one."""
        if self.keys_apart:
            return
        self.keys_apart = True
        say(logger, "slots_enforced", address=self.address)

    def shared(self, factory: Callable[[Settings], T]) -> T:
        """The one *factory* product of this manager in this process, such as the counters of ``memory://``."""
        with self._lock:
            if factory not in self._shared:
                self._shared[factory] = factory(self._settings)
        return cast(T, self._shared[factory])

    def keep(self, part: Clearable) -> None:
        """Let `clear` clear *part* too, for as long as somebody else holds it."""
        with self._lock:
            self._kept.add(part)

    def clear(self) -> None:
        """Forget what this process remembers, such as the counters and vectors of ``memory://``; nothing in Redis."""
        with self._lock:
            parts = [*self._shared.values(), *self._kept]
        for part in parts:
            if isinstance(part, Clearable):
                part.clear()

    def _open(self) -> _Opened:
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

    def forget(self, opened: _Opened) -> None:
        """Take *opened* for closed: its loop has ended."""
        for loop, held in list(self._opened.items()):
            if held is opened:
                del self._opened[loop]

    def _connect_if_reachable(self) -> _Opened:
        """`_connect`; what it raised (such as for a cluster's host without an address) is raised again for a moment."""
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

    def _connect(self) -> _Opened:
        built = build_client(self._settings)
        return _Opened(built.client, own=True, sentinels=built.sentinels)

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


RedisArgument: TypeAlias = Annotated[RedisManager | Client | str | None, _NO_DEPENDENCY]


class _GivenClient(RedisManager):
    """A client the user made: used as it is, in its loop, never closed and never reconfigured."""

    owns_client = False

    def __init__(self, client: Client, settings: Settings) -> None:
        super().__init__(settings)
        self._client = client

    @property
    def address(self) -> str:
        return describe_client(self._client)

    @property
    def has_redis(self) -> bool:
        return True

    def _connect(self) -> _Opened:
        return _Opened(self._client, own=False)


def _may_pass(error: Exception) -> bool:
    # A wrong password stays wrong; trying again only fills the server's ACL log.
    return classify(error) not in (Failure.AUTH, Failure.PERMISSION)


# One shared default per settings for as long as the process lives: the counters of memory:// are in it.
_managers: dict[Settings, RedisManager] = {}
_given: weakref.WeakValueDictionary[tuple[int, Settings], RedisManager] = weakref.WeakValueDictionary()
_made: weakref.WeakSet[RedisManager] = weakref.WeakSet()
_managers_lock = threading.RLock()  # who makes one for these tables holds it already
_warned_about: weakref.WeakSet[Client] = weakref.WeakSet()
_misspelt: set[str] = set()


def all_managers() -> list[RedisManager]:
    """Every manager of this process that is still there, whoever made it."""
    with _managers_lock:
        return list(_made)


def check_settings(settings: object) -> None:
    """Refuse what is given for settings and is none.

    Raises:
        ConfigurationError: Says what was meant, and shows no password.
    """
    if settings is None or isinstance(settings, Settings):
        return
    meant = "settings=Settings(REDIS_URL='redis://localhost:6379')"
    if isinstance(settings, str):
        raise ConfigurationError(f"settings={redact(settings)} is a text, and no Settings. Try redis=, or {meant}.")
    what = "the class Settings itself" if settings is Settings else f"a {type(settings).__name__}, and no Settings"
    raise ConfigurationError(f"settings= is given {what}. Try {meant}.")


def resolve_manager(redis: RedisArgument, settings: Settings | None) -> tuple[RedisManager, bool]:
    """The manager behind a ``redis=`` argument, and whether its life is the package's business.

    ``None`` and a URL give the manager shared by all parts with equal settings; a ``RedisManager`` or a
    client is the user's and is never closed by the package.

    Raises:
        ConfigurationError: For a sync client, a pipeline, a malformed URL or anything else.
    """
    check_settings(settings)
    if isinstance(redis, RedisManager):
        return redis, False
    settings = settings if settings is not None else Settings()
    _warn_of_near_misses(settings)
    if redis is None or isinstance(redis, str):
        if redis is not None:
            settings = settings.but(REDIS_URL=redis)
        with _managers_lock:
            manager = _managers.get(settings)
            if manager is None:
                manager = _managers[settings] = RedisManager(settings)
        return manager, True
    client = _checked_client(redis)
    with _managers_lock:
        # A living manager keeps its client alive, so that the id stays the client's.
        given = _given.get((id(client), settings))
        if given is None:
            given = _given[id(client), settings] = _GivenClient(client, settings)
    return given, False


def _warn_of_near_misses(settings: Settings) -> None:
    """Name variables that look like settings and are none, each once in a process."""
    for variable, meant in settings.near_misses.items():
        if variable not in _misspelt:
            _misspelt.add(variable)
            say(logger, "misspelt_setting", variable=variable, meant=meant)


def _checked_client(client: object) -> Client:
    kind = f"{type(client).__module__}.{type(client).__qualname__}"
    if isinstance(client, aioredis.client.Pipeline):
        raise ConfigurationError(f"redis={kind} is a pipeline. Pass the redis.asyncio client it came from.")
    if isinstance(client, aioredis.Redis | aioredis.RedisCluster):
        retry = client.get_retry() if isinstance(client, aioredis.Redis) else client.retry
        if retry is not None and retry.get_retries() > 0 and client not in _warned_about:
            _warned_about.add(client)
            say(logger, "client_retries", retries=retry.get_retries(), address=describe_client(client))
        return client
    if isinstance(client, redis.Redis | redis.RedisCluster):
        raise ConfigurationError(f"redis={kind} is synchronous and would block the event loop. Use redis.asyncio.")
    if isinstance(client, Settings):
        raise ConfigurationError("redis= is given Settings. Try settings=.")
    if isinstance(client, type):
        raise ConfigurationError(
            f"redis={client.__name__} is not called: it is a class. Try redis={client.__name__}()."
        )
    if inspect.iscoroutine(client):
        client.close()
        raise ConfigurationError(f"redis={shown(client)} is not awaited. Pass the RedisManager itself, or a URL.")
    if isinstance(client, aioredis.ConnectionPool):
        raise ConfigurationError(f"redis={kind} is a pool. Try redis=redis.asyncio.Redis(connection_pool=pool).")
    if isinstance(client, aioredis.Sentinel):
        raise ConfigurationError(f"redis={kind} is no client. Try redis=sentinel.master_for('mymaster').")
    raise ConfigurationError(
        f"redis={kind} is not a RedisManager, a URL or a redis.asyncio client. Try redis='redis://localhost:6379'."
    )


# Where a scope keeps the managers of the middlewares that its request has come through: nothing that a client sends
# becomes a key of the scope itself.
_MANAGERS = "redis_asgi.managers"


def offer_manager(scope: Scope, manager: RedisManager) -> None:
    """Tell the package's own sub-apps below that a middleware uses *manager*."""
    outer = scope.get(_MANAGERS, ())
    if manager not in outer:
        scope[_MANAGERS] = (*outer, manager)


def offered_managers(scope: Scope) -> tuple[RedisManager, ...]:
    """The managers of the middlewares that a request has come through, the outermost first."""
    offered: tuple[RedisManager, ...] = scope.get(_MANAGERS, ())
    return offered


@overload
def redis_operation(function: Callable[P, Awaitable[R]], /) -> Callable[P, Awaitable[R]]: ...
@overload
def redis_operation() -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Awaitable[R]]]: ...
def redis_operation(function: Callable[..., Any] | None = None, /) -> Callable[..., Any]:
    """Log a Redis error of an ``async def`` function by kind and re-raise it; with or without parentheses.

    ``redis_asgi.connection_failed`` when Redis was not reached, ``redis_asgi.operation_failed`` for any
    other ``RedisError``; the operation's name is in the record's ``operation``.

    Raises:
        TypeError: At decoration, if *function* is not an ``async def`` function.
    """
    if function is None:
        return redis_operation
    if not inspect.iscoroutinefunction(function):
        raise TypeError(f"redis_operation needs an 'async def' function, not {function!r}.")
    name = function.__qualname__

    @functools.wraps(function)
    async def logged(*args: Any, **kwargs: Any) -> Any:
        try:
            return await function(*args, **kwargs)
        except RedisConnectionError as error:
            say(logger, "connection_failed", operation=name, error=type(error).__name__, **words_for(classify(error)))
            raise
        except RedisError as error:
            say(logger, "operation_failed", operation=name, error=type(error).__name__, **words_for(classify(error)))
            raise

    return logged
