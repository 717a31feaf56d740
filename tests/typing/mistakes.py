"""Mistakes that a type checker finds: an ignore that is not needed is an error in itself."""

from starlette.middleware import Middleware
from starlette.requests import Request

import redis_asgi
from redis_asgi import RateLimitMiddleware, RequestDecision, Rule, rate_limit


def misspelled() -> object:
    return redis_asgi.RateLimt  # type: ignore[attr-defined]


wrong_option = rate_limit("5/minute", nmae="login")  # type: ignore[call-arg]
wrong_choice = Rule("5/minute", strategy="fixed")  # type: ignore[arg-type]
wrong_callable = Rule("5/minute", partition_by="ip")  # type: ignore[arg-type]
wrong_argument = Middleware(RateLimitMiddleware, limit="5/minute")  # type: ignore[call-arg]


def endpoint(request: Request) -> None:
    limit: RequestDecision = request.state.rate_limit
    limit.charge("3")  # type: ignore[arg-type]
