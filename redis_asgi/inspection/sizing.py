"""Memory that a number of vectors and limited clients take, and whether the servers have it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import redis.asyncio as aioredis

from ..connection.manager import RedisManager
from ..maintenance import client_bytes, vector_bytes
from ..ratelimit.limits.policy import Policy
from ..settings import Settings
from .servers import Server


@dataclass(frozen=True, slots=True)
class Sizing:
    """The memory that one kind of thing takes.

    Attributes:
        what: In words.
        server: Where it is kept: ``redis``, or ``vectors`` for ``EMBEDDING_CACHE_REDIS_URL``.
        count: How many of them.
        each: Bytes of one.
        bytes: Of all.
        used: Bytes the server uses now, all primaries of a cluster together; ``None`` = not asked.
        maxmemory: Bytes it may use; 0 = as many as there are.
        fits: Whether all that is estimated for the server fits;
            ``None`` = not asked, or no ``maxmemory``.
    """

    what: str
    server: str
    count: int
    each: int
    bytes: int
    used: int | None = None
    maxmemory: int | None = None
    fits: bool | None = None


def estimate(
    settings: Settings,
    *,
    dims: int | None,
    vectors: int | None,
    dtype: str | None,
    clients: int | None,
    policies: Sequence[Policy],
) -> list[Sizing]:
    """The most memory in Redis of *vectors* of *dims* numbers,
    and of *clients* counted by *policies*.

    Raises:
        ValueError: When nothing is asked about, or with half of what it takes.
    """
    if (dims is None) != (vectors is None):
        raise ValueError("--dims and --count go together. Try --dims 1536 --count 1000000.")
    if dims is None and clients is None:
        raise ValueError("Nothing to estimate. Try --dims 1536 --count 1000000, or --clients 1000000.")
    found = []
    if dims is not None and vectors is not None:
        kept: Any = dtype if dtype is not None else settings.EMBEDDING_CACHE_DTYPE
        server = "redis" if settings.EMBEDDING_CACHE_REDIS_URL is None else "vectors"
        each = vector_bytes(dims, kept)
        found.append(Sizing(f"vectors of {dims} {kept} numbers", server, vectors, each, each * _checked(vectors)))
    if clients is not None:
        logs = [policy.quota for policy in policies if policy.strategy == "moving-window"]
        each = client_bytes(len(policies), moving_quotas=logs)
        noun = "policy" if len(policies) == 1 else "policies"
        what = f"clients of {len(policies)} {policies[0].strategy} {noun}"
        found.append(Sizing(what, "redis", clients, each, each * _checked(clients)))
    return found


def _checked(count: int) -> int:
    if count < 0:
        raise ValueError(f"{count} is not a number of things. Try 1000000.")
    return count


async def compare(manager: RedisManager, server: Server, sizings: Sequence[Sizing]) -> list[Sizing]:
    """The *sizings* that are kept on *server*, beside the memory that it has.

    Raises:
        redis.exceptions.RedisError: When it does not say.
    """
    mine = [sizing for sizing in sizings if sizing.server == server.name]
    if not mine:
        return []
    client = await manager.get_connection()
    if isinstance(client, aioredis.RedisCluster):
        await client.initialize()
        infos = [await client.execute_command("INFO", target_nodes=node) for node in client.get_primaries()]
    else:
        infos = [await client.execute_command("INFO")]  # type: ignore[no-untyped-call]  # theirs
    used = sum(cast("int", info.get("used_memory", 0)) for info in infos)
    limits = [cast("int", info.get("maxmemory", 0)) for info in infos]
    most = sum(limits) if all(limits) else 0
    fits = sum(sizing.bytes for sizing in mine) <= most if most else None
    return [replace(sizing, used=used, maxmemory=most, fits=fits) for sizing in mine]
