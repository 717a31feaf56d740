"""`request.state.rate_limit.reset`: a client that has shown that it means well starts anew."""

import asyncio
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from redis_asgi import RateLimit, RateLimitMiddleware, Rule, Settings
from redis_asgi.ratelimit.limits.policy import STRATEGIES

from .harness import client_of, own_prefix, statuses

pytestmark = pytest.mark.anyio


def login_app(settings: Settings, name: str = "login", **rule: Any) -> tuple[ASGIApp, list[bool]]:
    """An app whose good log-ins forget the bad ones, and what each reset said."""
    resets: list[bool] = []

    async def login(request: Request) -> Response:
        await asyncio.sleep(0)
        if "good" not in request.query_params:
            return PlainTextResponse("no", 401)
        resets.append(await request.state.rate_limit.reset(name))
        return PlainTextResponse("in")

    app = Starlette(routes=[Route("/login", login)])
    rules = [Rule(**({"limits": "5/minute; 9/hour", "name": "login"} | rule)), Rule("1000/hour", name="other")]
    app.add_middleware(RateLimitMiddleware, rules=rules, settings=settings)
    return app, resets


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("store", ["memory", "redis"])
@pytest.mark.parametrize("count_if", [None, lambda status: status == 401], ids=["always", "failures"])
async def test_login_that_succeeds_forgets_the_failures(
    store: str, strategy: Any, count_if: Any, request: pytest.FixtureRequest
) -> None:
    """The very counters that the middleware charged, the request's own units too, and no others."""
    url = request.getfixturevalue("redis_url") if store == "redis" else "memory://"
    mine = Settings(REDIS_URL=url, REDIS_KEY_PREFIX=own_prefix())
    app, resets = login_app(mine, strategy=strategy, count_if=count_if)

    bad = await statuses(app, 3, "/login")
    assert [200] == await statuses(app, 1, "/login?good")
    bad += await statuses(app, 6, "/login")

    assert [401] * 8 + [429] == bad
    assert [True] == resets
    async with client_of(app) as client:
        fields = (await client.get("/login")).headers["ratelimit"]
    assert '"login-60s";r=0' in fields
    assert "other" not in fields or '"other";r=99' in fields


async def test_reset_of_what_does_not_apply_forgets_nothing(memory_settings: Settings) -> None:
    """Another rule's name, a policy of another request, nonsense:
    nothing there, and no error of the app.
    """
    for name in ("log", "login-7s", "", "a b", "login-60s-60s"):
        app, resets = login_app(memory_settings, name, limits="50/minute; 90/hour")
        await statuses(app, 1, "/login")
        assert [200] == await statuses(app, 1, "/login?good")
        assert [False] == resets


async def test_reset_waits_for_redis_no_longer_than_a_check() -> None:
    """Redis is gone: the log-in goes on, its counters are what this process has."""
    gone = Settings(REDIS_URL="redis://127.0.0.1:9", RATE_LIMIT_TIMEOUT=0.1, REDIS_KEY_PREFIX=own_prefix())
    app, resets = login_app(gone)

    assert [401, 401] == await statuses(app, 2, "/login")
    assert [200] == await asyncio.wait_for(statuses(app, 1, "/login?good"), 5)
    assert [False] == resets


@pytest.mark.parametrize("with_middleware", [False, True])
async def test_reset_of_a_routes_limit(memory_settings: Settings, with_middleware: bool) -> None:
    """A per-route limit is reset by its own name, with the middleware and without."""
    app = FastAPI()

    @app.get("/login", dependencies=[Depends(RateLimit("2/minute", name="login", settings=memory_settings))])
    async def login(request: Request, *, good: bool = False) -> bool:
        return good and bool(await request.state.rate_limit.reset("login"))

    asked: ASGIApp = RateLimitMiddleware(app, "100/minute", settings=memory_settings) if with_middleware else app
    async with client_of(asked) as client:
        responses = [await client.get("/login", params={"good": good}) for good in (False, True, False, False, False)]

    assert [200, 200, 200, 200, 429] == [response.status_code for response in responses]
    assert [False, True, False, False] == [response.json() for response in responses[:4]]
