"""Rate limits and an embedding cache for any ASGI app, kept in one Redis.

``settings/``   the environment, validated          ``connection/``  one Redis client per loop, shared
``ratelimit/``  who may ask how often               ``embeddings/``  what need not be computed again
``asgi/``       what is read from a request         ``sub_apps/``    health checks, metrics, a status page
``errors``      what is raised, and why             ``events``       what is logged, and what to do
``telemetry``   what is counted                     ``keys``         names of Redis keys
``cli/``        ``redis-asgi``: what an operator asks (``inspection/``) and does (``maintenance``)
``testing/``    a clock to move, and what else tests of an app need

Public are the names in ``__all__`` here and in ``embeddings.wire``, ``errors``, ``maintenance``,
``telemetry`` and ``testing``; every other module, and every other name in these, may change in any
release.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__
from .connection.manager import RedisManager
from .connection.operation import redis_operation
from .errors import ConfigurationError, RedisASGIError
from .keys import KeyManagement
from .ratelimit.answers.rate_limit_exceeded import RateLimitExceeded
from .ratelimit.answers.request_decision import RequestDecision
from .ratelimit.budgets.tokens import tokens
from .ratelimit.decorator import rate_limit
from .ratelimit.limiter import RateLimiter
from .ratelimit.limits.decision import Decision, PolicyState
from .ratelimit.middleware import RateLimitMiddleware
from .ratelimit.route import RateLimit
from .ratelimit.rules.by_body import by_json
from .ratelimit.rules.by_mcp_tool import by_mcp_tool
from .ratelimit.rules.partition import by_header, by_user, client_ip
from .ratelimit.rules.rule import Rule
from .settings import Settings

if TYPE_CHECKING:
    from .embeddings import EmbeddingCache, EmbeddingCacheMiddleware
    from .maintenance import calculate_memory_usage, configure_persistence
    from .ratelimit.current import CurrentLimit
    from .ratelimit.openapi.document import document_limits
    from .ratelimit.openapi.response_objects import rate_limit_responses
    from .sub_apps.health import check_redis_health, health_app
    from .sub_apps.metrics import RedisMetrics, metrics_app
    from .sub_apps.status import status_app

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
    "by_json",
    "by_mcp_tool",
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
    "tokens",
]

# Imported at first use: an app without embeddings should not wait 150 ms for numpy,
# nor for what it does not mount.
_LATE = {
    "CurrentLimit": ".ratelimit.current",
    "EmbeddingCache": ".embeddings",
    "EmbeddingCacheMiddleware": ".embeddings",
    "RedisMetrics": ".sub_apps.metrics",
    "calculate_memory_usage": ".maintenance",
    "check_redis_health": ".sub_apps.health",
    "configure_persistence": ".maintenance",
    "document_limits": ".ratelimit.openapi.document",
    "health_app": ".sub_apps.health",
    "metrics_app": ".sub_apps.metrics",
    "rate_limit_responses": ".ratelimit.openapi.response_objects",
    "status_app": ".sub_apps.status",
}


if not TYPE_CHECKING:
    # A type checker that sees it takes every misspelled name for one that is loaded late.
    def __getattr__(name: str) -> Any:
        if name in _LATE:
            return getattr(importlib.import_module(_LATE[name], __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
