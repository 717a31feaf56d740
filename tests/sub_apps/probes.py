"""Health checks, asked as a kubelet or a person asks them."""

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from redis_asgi import (
    RedisManager,
    Settings,
    health_app,
)
from redis_asgi.asgi.sub_app import SubApp
from redis_asgi.connection import health_cache
from redis_asgi.connection.health_cache import Watch
from redis_asgi.sub_apps.health import HealthApp

from ..kit.fair_time import fair_time
from ..kit.servers import Server

StartServer = Callable[..., Server]


DEADLINE = 0.5  # seconds of a check, as the package has it
NOWHERE = "redis://someuser:somesecret@127.0.0.1:1"


@asynccontextmanager
async def client_of(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client in front of *app*."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


async def probe(app: ASGIApp, path: str = "/ready") -> tuple[int, dict[str, Any], float]:
    """Status, body and seconds of one probe."""
    async with client_of(app) as client:
        started = fair_time()
        response = await client.get(path)
        return response.status_code, response.json(), fair_time() - started


def app_on(url: str, *, require_redis: bool | None = None, **settings: Any) -> SubApp:
    """A health app on a manager of its own."""
    manager = RedisManager(Settings(REDIS_URL=url, **settings))
    return health_app(redis=manager, require_redis=require_redis)


def app_manager(app: SubApp) -> RedisManager:
    """The manager of a health app."""
    assert isinstance(app, HealthApp)
    return app._target.own


def forget(app: SubApp) -> None:
    """Let a second pass: the next probe checks again."""
    app_manager(app).per_client(Watch)._last = None


def hurry(app: SubApp, patch: pytest.MonkeyPatch) -> None:
    """Let its checks end by the package's deadline from now on; all that was well before had time."""
    app_manager(app).per_client(Watch)._checkup._deadline = DEADLINE
    patch.setattr(health_cache, "DEADLINE", DEADLINE)


async def assert_ill(app: ASGIApp, error: str, *, status: int = 200) -> None:
    """``/ready`` and ``/`` name *error* within their deadline,
    ``/live`` does not mind, and nothing is given away.
    """
    ready, body, seconds = await probe(app)
    assert (status, "unhealthy" if status == 503 else "degraded", error) == (ready, body["status"], body["error"])
    assert seconds < DEADLINE + 0.4
    overview, full, seconds = await probe(app, "/")
    assert (status, body["status"], error) == (overview, full["status"], full["error"])
    assert seconds < DEADLINE + 0.4
    live, alive, seconds = await probe(app, "/live")
    assert (200, {"status": "alive"}) == (live, alive)
    assert seconds < 0.1
    for text in (str(body), str(full)):
        assert re.search(r":\d{4,5}|127\.0|localhost|some|user|password|Error|Exception|\(", text) is None, text
