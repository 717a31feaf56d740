"""Settings whose counters are one test's own."""

import pytest

from redis_asgi import RateLimiter, RedisManager, Settings

from .harness import memory, own_prefix
from .limiters import in_memory


@pytest.fixture
def memory_settings() -> Settings:
    """Counters of this test's own, in the process."""
    return memory(REDIS_KEY_PREFIX=own_prefix())


@pytest.fixture(params=["memory", "redis"])
def any_settings(request: pytest.FixtureRequest) -> Settings:
    """Counters of this test's own, in either store."""
    url = "memory://" if request.param == "memory" else request.getfixturevalue("redis_url")
    return Settings(REDIS_URL=url, REDIS_KEY_PREFIX=own_prefix(), RATE_LIMIT_TIMEOUT=5)


@pytest.fixture(params=["redis", "memory"])
def either(request: pytest.FixtureRequest) -> RedisManager:
    """A manager of the shared server, and one of ``memory://``."""
    url = request.getfixturevalue("redis_url") if request.param == "redis" else "memory://"
    return RedisManager(Settings(REDIS_URL=url, RATE_LIMIT_TIMEOUT=5.0))


@pytest.fixture
def patient(redis_url: str) -> RedisManager:
    """A manager of the shared server that waits for it on a busy machine."""
    return RedisManager(Settings(REDIS_URL=redis_url, RATE_LIMIT_TIMEOUT=5.0))


@pytest.fixture(params=["redis", "memory"])
def limiter(request: pytest.FixtureRequest) -> RateLimiter:
    """A limiter on a real Redis, and one on ``memory://``."""
    if request.param == "memory":
        return in_memory()
    return RateLimiter(request.getfixturevalue("manager"), timeout=5)
