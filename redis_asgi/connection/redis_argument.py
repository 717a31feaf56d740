"""The manager that a part uses, given its ``redis=`` and ``settings=``."""

import inspect
import logging
import weakref
from typing import Annotated, TypeAlias

import redis
import redis.asyncio as aioredis
from starlette.types import Scope

from ..asgi.offer import offer_of
from ..errors import ConfigurationError
from ..events import say
from ..misuse import shown
from ..settings import Settings, check_settings
from .client_factory import Client, describe_client
from .manager import NO_DEPENDENCY, RedisManager, managers_lock
from .open_client import Opened

logger = logging.getLogger("redis_asgi.connection")

RedisArgument: TypeAlias = Annotated[RedisManager | Client | str | None, NO_DEPENDENCY]


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

    def _connect(self) -> Opened:
        return Opened(self._client, own=False)


# One shared default per settings for as long as the process lives:
# the counters of memory:// are in it.
_managers: dict[Settings, RedisManager] = {}
_given: weakref.WeakValueDictionary[tuple[int, Settings], RedisManager] = weakref.WeakValueDictionary()
_warned_about: weakref.WeakSet[Client] = weakref.WeakSet()
_misspelt: set[str] = set()


def resolve_manager(redis: RedisArgument, settings: Settings | None) -> tuple[RedisManager, bool]:
    """The manager behind a ``redis=`` argument, and whether its life is the package's business.

    ``None`` and a URL give the manager shared by all parts with equal settings; a ``RedisManager``
    or a client is the user's and is never closed by the package.

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
        with managers_lock:
            manager = _managers.get(settings)
            if manager is None:
                manager = _managers[settings] = RedisManager(settings)
        return manager, True
    client = _checked_client(redis)
    with managers_lock:
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
    refuse_sync("redis", client)
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


def refuse_sync(label: str, client: object) -> None:
    """Refuse a *client* whose commands would block the event loop.

    Raises:
        ConfigurationError: Says what is meant.
    """
    if isinstance(client, redis.Redis | redis.RedisCluster):
        kind = f"{type(client).__module__}.{type(client).__qualname__}"
        raise ConfigurationError(f"{label}={kind} is synchronous and would block the event loop. Use redis.asyncio.")


def offered_managers(scope: Scope) -> tuple[RedisManager, ...]:
    """The managers of the middlewares that a request has come through, the outermost first."""
    offer = offer_of(scope)
    return () if offer is None else offer.managers
