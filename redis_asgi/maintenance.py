"""What an operator does now and then: flush a model."""

import os

from .connection import RedisArgument
from .embeddings.store import Write, resolve_vectors, vectors_of
from .errors import Failure, RedisASGIError
from .keys import embedding_epoch_key
from .settings import Settings

_EPOCH_TTL = 366 * 24 * 3600.0  # seconds; one that has ended validates nothing either


class FlushError(RedisASGIError):
    """Redis did not take the new epoch: stored vectors are still served."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"Redis did not take the flush ({failure.value}). Try again when it answers.")
        self.failure = failure


async def flush_model(
    model: str, *, namespace: str | None = None, redis: RedisArgument = None, settings: Settings | None = None
) -> None:
    """Make every stored vector of *model*, as requests name it, a miss: in Redis now, everywhere after 5 s.

    Writes one key; Redis takes the memory back as the vectors end. A computation under way is flushed too.

    Args:
        model: The name in the requests; ``""`` for TEI, which has none.
        namespace: ``None`` = ``EMBEDDING_CACHE_NAMESPACE``.
        redis: As of `EmbeddingCacheMiddleware`.
        settings: ``None`` reads the environment now.

    Raises:
        FlushError: When Redis did not take it.
    """
    manager, is_ours = resolve_vectors(redis, settings)
    settings = settings if settings is not None else manager.settings
    namespace = settings.EMBEDDING_CACHE_NAMESPACE if namespace is None else namespace
    name = embedding_epoch_key(settings.REDIS_KEY_PREFIX, namespace, model, secret=settings.key_secret)
    opened_before = not is_ours or manager.pool is not None
    done = await vectors_of(manager).write([Write(name, os.urandom(8), _EPOCH_TTL)], settings.REDIS_TIMEOUT)
    if not opened_before and not settings.REDIS_CLUSTER:
        # Nobody else in this loop uses the client; a cluster's has no pool to tell by and ends with the loop.
        await manager.close()
    if done.failure is not None:
        raise FlushError(done.failure)
