"""Rate limits and an embedding cache for any ASGI app, kept in one Redis.

``settings``    the environment, validated          ``connection``   one Redis client per loop, shared (``client``)
``ratelimit/``  who may ask how often               ``embeddings/``  what need not be computed again
``scope``       what is read from a request         ``keys``         names of Redis keys
``health``      probes; ``status/`` a page          ``errors``       what is raised, and how failures are sorted
``telemetry``   what is counted                     ``metrics``      and shown to Prometheus
``cli/``        ``redis-asgi``: what an operator asks (``inspection/``) and does (``maintenance``)
``testing/``    a clock to move, and what else tests of an app need

Public are the names in ``__all__`` here and in ``embeddings.wire``, ``errors``, ``maintenance``, ``telemetry``
and ``testing``; every other module, and every other name in these, may change in any release.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .connection import RedisManager, redis_operation
from .errors import ConfigurationError, RedisASGIError
from .keys import KeyManagement
from .ratelimit.decision import Decision, PolicyState
from .ratelimit.decorator import rate_limit
from .ratelimit.exceeded import RateLimitExceeded
from .ratelimit.limiter import RateLimiter
from .ratelimit.middleware import RateLimitMiddleware
from .ratelimit.partition import by_header, by_user, client_ip
from .ratelimit.request_decision import RequestDecision
from .ratelimit.route import RateLimit
from .ratelimit.rules import Rule
from .settings import Settings

if TYPE_CHECKING:
    from .embeddings import EmbeddingCache, EmbeddingCacheMiddleware
    from .health import check_redis_health, health_app
    from .maintenance import calculate_memory_usage, configure_persistence
    from .metrics import RedisMetrics, metrics_app
    from .ratelimit.current import CurrentLimit
    from .ratelimit.openapi import document_limits
    from .ratelimit.response_objects import rate_limit_responses
    from .status import status_app

__version__ = "0.1.0"

__all__ = [
    "ConfigurationError",
    "CurrentLimit",
    "Decision",
    "EmbeddingCache",
    "EmbeddingCacheMiddleware",
    "KeyManagement",
    "PolicyState",
    "RateLimit",
    "RateLimitExceeded",
    "RateLimitMiddleware",
    "RateLimiter",
    "RedisASGIError",
    "RedisManager",
    "RedisMetrics",
    "RequestDecision",
    "Rule",
    "Settings",
    "by_header",
    "by_user",
    "calculate_memory_usage",
    "check_redis_health",
    "client_ip",
    "configure_persistence",
    "document_limits",
    "health_app",
    "metrics_app",
    "rate_limit",
    "rate_limit_responses",
    "redis_operation",
    "status_app",
]

# Imported at first use: an app without embeddings should not wait 150 ms for numpy, nor for what it does not mount.
_LATE = {
    "CurrentLimit": ".ratelimit.current",
    "EmbeddingCache": ".embeddings",
    "EmbeddingCacheMiddleware": ".embeddings",
    "RedisMetrics": ".metrics",
    "calculate_memory_usage": ".maintenance",
    "check_redis_health": ".health",
    "configure_persistence": ".maintenance",
    "document_limits": ".ratelimit.openapi",
    "health_app": ".health",
    "metrics_app": ".metrics",
    "rate_limit_responses": ".ratelimit.response_objects",
    "status_app": ".status",
}


if not TYPE_CHECKING:
    # A type checker that sees it takes every misspelled name for one that is loaded late.
    def __getattr__(name: str) -> Any:
        if name in _LATE:
            return getattr(importlib.import_module(_LATE[name], __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
