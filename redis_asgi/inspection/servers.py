"""The servers that some settings name, and what the package keeps on each."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..client import describe
from ..connection import RedisManager
from ..ratelimit.overview import LimitInForce
from ..settings import Settings

RULES = "rules"  # what a server is called that only the app names


@dataclass(frozen=True, slots=True)
class Server:
    """A server the settings name, and what the package keeps there.

    Attributes:
        name: ``redis``, the shared one; ``vectors``, that of ``EMBEDDING_CACHE_REDIS_URL``; or ``rules``, one that an
            app names for its limits.
        settings: Those that lead there.
        limits: Whether counters are kept there.
        vectors: Whether vectors are.
        manager: What leads there where settings do not: a client of the app's; ``None`` = the settings.
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
    """Close a manager that nobody else uses, with the client that an app has given it."""
    await manager.close()
    if type(manager) is not RedisManager and manager.has_redis:
        with suppress(Exception):
            await (await manager.get_connection()).aclose()
        await manager.close()


def servers_of(settings: Settings) -> list[Server]:
    """The shared server, and that of ``EMBEDDING_CACHE_REDIS_URL`` if there is one; none of ``memory://``."""
    found = [Server("redis", settings, limits=True, vectors=settings.EMBEDDING_CACHE_REDIS_URL is None)]
    if settings.EMBEDDING_CACHE_REDIS_URL is not None:
        # Here, because it brings numpy along, which nothing else of this module needs.
        from ..embeddings.store import resolve_vectors  # noqa: PLC0415

        found.append(Server("vectors", resolve_vectors(None, settings)[0].settings, limits=False, vectors=True))
    return [server for server in found if not server.settings.is_memory]


def servers_of_app(settings: Settings, limits: Sequence[LimitInForce]) -> list[Server]:
    """The servers of the environment's *settings* and those that an app's *limits* name, each once.

    The shared one is among them if the environment names it, or a limit is counted there.
    """
    counted: dict[RedisManager, Settings] = {}
    for limit in limits:
        if limit.manager.has_redis:
            counted.setdefault(limit.manager, limit.settings)
    used = {manager.address for manager in counted}
    found = [
        server
        for server in servers_of(settings)
        if server.name != "redis" or settings.names_redis or server.where in used
    ]
    known = {server.where for server in found}
    others = [(manager, its) for manager, its in counted.items() if manager.address not in known]
    for i, (manager, its) in enumerate(others):
        name = RULES if len(others) == 1 else f"{RULES}-{i + 1}"
        if type(manager) is RedisManager:
            within = min(settings.REDIS_TIMEOUT, its.REDIS_TIMEOUT)
            there = manager.settings.but(REDIS_KEY_PREFIX=its.REDIS_KEY_PREFIX, REDIS_TIMEOUT=within)
            found.append(Server(name, there, limits=True, vectors=False))
        else:
            found.append(Server(name, its, limits=True, vectors=False, manager=manager))
    return found
