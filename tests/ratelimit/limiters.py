"""Limiters without a middleware."""

from typing import Any

from redis_asgi import RateLimiter, RedisManager, Settings


def in_memory(**values: Any) -> RateLimiter:
    """A limiter with counters of its own."""
    return RateLimiter(RedisManager(Settings(REDIS_URL="memory://", **values)))


async def verdicts(limiter: RateLimiter, count: int, *args: Any, **kwargs: Any) -> list[bool]:
    """What *count* requests of the same kind are told in turn."""
    return [(await limiter.consume(*args, **kwargs)).allowed for _ in range(count)]
