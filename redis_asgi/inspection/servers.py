"""The servers that some settings name, and what the package keeps on each."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..connection.client_factory import describe
from ..connection.manager import RedisManager
from ..ratelimit.overview import LimitInForce
from ..settings import Settings

if TYPE_CHECKING:
    from ..embeddings.overview import CacheInForce

RULES, CACHE = "rules", "cache"  # what servers are called that only the app names


@dataclass(frozen=True, slots=True)
class Server:
    """A server the settings name, and what the package keeps there.

    Attributes:
        name: ``redis``, the shared one; ``vectors``, that of ``EMBEDDING_CACHE_REDIS_URL``; or
            ``rules`` and ``cache``, those that an app names for its limits and its vectors.
        settings: Those that lead there.
        limits: Whether counters are kept there.
        vectors: Whether vectors are.
        manager: What leads there where settings do not:
            a client of the app's; ``None`` = the settings.
    """

    name: str
    settings: Settings
    limits: bool
    vectors: bool
    manager: RedisManager | None = None

    @property
    def where(self) -> str:
        """Its address, without user or password."""
        return self.manager.address if self.manager is not None else describe(self.settings)


async def leave(manager: RedisManager) -> None:
    """Close a manager without other users, with the client that an app has given it."""
    await manager.close()
    if type(manager) is not RedisManager and manager.has_redis:
        with suppress(Exception):
            await (await manager.get_connection()).aclose()
        await manager.close()


def servers_of(settings: Settings) -> list[Server]:
    """The shared server, and that of ``EMBEDDING_CACHE_REDIS_URL`` if there is one; none of
    ``memory://``.
    """
    found = [Server("redis", settings, limits=True, vectors=settings.EMBEDDING_CACHE_REDIS_URL is None)]
    if settings.EMBEDDING_CACHE_REDIS_URL is not None:
        # Here, because it brings numpy along, which nothing else of this module needs.
        from ..embeddings.storage.store import resolve_vectors  # noqa: PLC0415

        found.append(Server("vectors", resolve_vectors(None, settings)[0].settings, limits=False, vectors=True))
    return [server for server in found if not server.settings.is_memory]


def servers_of_app(
    settings: Settings, limits: Sequence[LimitInForce], caches: Sequence["CacheInForce"] = ()
) -> list[Server]:
    """The servers of the environment's *settings* and those that an app names for *limits* and
    *caches*, each once.

    The shared one is among them if the environment names it, or something of the app is kept there.
    """
    used: dict[RedisManager, Settings] = {}
    named = [(limit.manager, limit.settings) for limit in limits]
    for manager, its in [*named, *((cache.manager, cache.settings) for cache in caches)]:
        if manager.has_redis:
            used.setdefault(manager, its)
    counted = {limit.manager.address for limit in limits}
    cached = {cache.manager.address for cache in caches}
    known = {
        server.where: server
        for server in servers_of(settings)
        if server.name != "redis" or settings.names_redis or server.where in counted | cached
    }
    found = list(known.values())
    others = {manager.address: (manager, its) for manager, its in used.items() if manager.address not in known}
    for where, (manager, its) in others.items():
        kind = RULES if where in counted else CACHE
        alike = [other for other in others if (other in counted) == (where in counted)]
        name = kind if len(alike) == 1 else f"{kind}-{alike.index(where) + 1}"
        if type(manager) is RedisManager:
            within = min(settings.REDIS_TIMEOUT, its.REDIS_TIMEOUT)
            there = manager.settings.but(REDIS_KEY_PREFIX=its.REDIS_KEY_PREFIX, REDIS_TIMEOUT=within)
            found.append(Server(name, there, where in counted, where in cached))
        else:
            found.append(Server(name, its, where in counted, where in cached, manager))
    return found
