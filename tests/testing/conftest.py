"""Apps on both stores, and clients of both kinds."""

from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from redis_asgi import RateLimitMiddleware, RedisManager, Settings

MakeApp = Callable[..., Starlette]


@pytest.fixture(params=["memory://", "redis"])
def manager(request: pytest.FixtureRequest) -> RedisManager:
    """One on either store."""
    url = request.param if request.param == "memory://" else request.getfixturevalue("redis_url")
    return RedisManager(Settings(REDIS_URL=url, RATE_LIMIT_TIMEOUT=20, EMBEDDING_CACHE_TIMEOUT=20))


@pytest.fixture
def make_app(manager: RedisManager) -> MakeApp:
    """``make_app(limits, **options)``: an app behind the middleware,
    which answers how its client stands.
    """

    async def stand(request: Request) -> JSONResponse:
        decision = request.state.rate_limit
        return JSONResponse({policy.name: policy.remaining for policy in decision.policies})

    def make(limits: Any = None, **options: Any) -> Starlette:
        app = Starlette(routes=[Route("/", stand, methods=["GET", "POST"])])
        app.add_middleware(RateLimitMiddleware, limits, redis=manager, **options)
        return app

    return make
