"""Rate limits and an embedding cache for any ASGI app, kept in one Redis.

``settings``    the environment, validated          ``connection``  one Redis client per loop, shared
``ratelimit/``  who may ask how often               ``scope``       what is read from a request
``keys``        names of Redis keys                 ``errors``      what is raised, and how failures are sorted
"""

from .connection import RedisManager, redis_operation
from .errors import ConfigurationError, RedisASGIError
from .keys import KeyManagement
from .ratelimit.decision import Decision, PolicyState
from .ratelimit.exceeded import RateLimitExceeded
from .ratelimit.limiter import RateLimiter
from .ratelimit.middleware import RateLimitMiddleware
from .ratelimit.partition import by_header, by_user, client_ip
from .ratelimit.route import RateLimit, rate_limit
from .ratelimit.rules import Rule
from .settings import Settings

__version__ = "0.1.0"

__all__ = [
    "ConfigurationError",
    "Decision",
    "KeyManagement",
    "PolicyState",
    "RateLimit",
    "RateLimitExceeded",
    "RateLimitMiddleware",
    "RateLimiter",
    "RedisASGIError",
    "RedisManager",
    "Rule",
    "Settings",
    "by_header",
    "by_user",
    "client_ip",
    "rate_limit",
    "redis_operation",
]
