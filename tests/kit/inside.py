"""The parts within what users construct: the one place of the tests that knows their private names."""

from redis_asgi import EmbeddingCacheMiddleware, RateLimiter, RateLimitMiddleware, RedisManager
from redis_asgi.embeddings.shared import Shared
from redis_asgi.ratelimit.counting.engine import Engine


def engine_of(limiting: RateLimiter | RateLimitMiddleware) -> Engine:
    """The engine that decides."""
    return limiting._engine


def manager_of(limiting: RateLimiter | RateLimitMiddleware) -> RedisManager:
    """The manager of its Redis."""
    return engine_of(limiting).manager


def shared_of(caching: EmbeddingCacheMiddleware) -> Shared:
    """The parts that its requests share."""
    return caching._shared
