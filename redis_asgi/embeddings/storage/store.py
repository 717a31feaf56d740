"""The store behind a manager, and all that others need to use one."""

import redis.asyncio as aioredis

from ...connection.client_factory import Client
from ...connection.manager import RedisManager
from ...connection.redis_argument import RedisArgument, resolve_manager
from ...errors import classify
from ...settings import NO_SERVER, Settings
from .cluster_store import ClusterVectors
from .memory_store import MemoryVectors
from .operations import UNKNOWN, VectorStore, Write, WriteResult
from .redis_store import RedisVectors
from .unavailable_store import AbsentVectors

__all__ = [
    "UNKNOWN",
    "ClusterVectors",
    "MemoryVectors",
    "RedisVectors",
    "VectorStore",
    "Write",
    "WriteResult",
    "resolve_vectors",
    "vectors_of",
]


def resolve_vectors(redis: RedisArgument, settings: Settings | None) -> tuple[RedisManager, bool]:
    """`resolve_manager`, with ``EMBEDDING_CACHE_REDIS_URL`` as the default when it is set."""
    if redis is not None:
        return resolve_manager(redis, settings)
    settings = settings if settings is not None else Settings()
    if settings.EMBEDDING_CACHE_REDIS_URL is not None:
        url = settings.EMBEDDING_CACHE_REDIS_URL.get_secret_value()
        elsewhere = {**NO_SERVER, "REDIS_CLUSTER": False, "REDIS_URL": url}
        settings = settings.but(**elsewhere)
    return resolve_manager(None, settings)


def vectors_of(manager: RedisManager) -> VectorStore:
    """The store behind *manager* in the running loop."""
    if not manager.has_redis:
        return manager.per_process(MemoryVectors)
    try:
        return manager.per_client(_make_vectors)
    except Exception as error:
        # No client can be built, such as for a cluster's host without an address.
        return AbsentVectors(classify(error))


def _make_vectors(manager: RedisManager, client: Client) -> RedisVectors | ClusterVectors:
    if isinstance(client, aioredis.RedisCluster):
        return ClusterVectors(manager, client)
    return RedisVectors(manager, client)
