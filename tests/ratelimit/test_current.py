"""`CurrentLimit`: what was decided about a request, as an argument of a FastAPI endpoint."""

import asyncio
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI

from redis_asgi import CurrentLimit, RateLimit, RateLimitMiddleware, RedisManager, Rule, Settings

pytestmark = pytest.mark.anyio


async def ask(app: FastAPI, path: str = "/") -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path)


def in_memory() -> RedisManager:
    return RedisManager(Settings(REDIS_URL="memory://"))


def left(limit: CurrentLimit) -> dict[str, int]:
    return {state.name: state.remaining for state in limit.policies}


async def test_it_is_the_decision_about_the_request() -> None:
    """An endpoint reads it and charges more, as with ``request.state.rate_limit``."""
    app = FastAPI()
    app.add_middleware(RateLimitMiddleware, "10/minute", redis=in_memory())

    @app.get("/")
    async def read(limit: CurrentLimit) -> dict[str, int]:
        limit.charge(3)
        return left(limit)

    assert {"default": 9} == (await ask(app)).json()
    assert {"default": 5} == (await ask(app)).json()


@pytest.mark.parametrize("first", ["limit", "current"])
async def test_it_is_that_of_a_route_wherever_it_stands(first: str) -> None:
    """A per-route limit that is decided behind it counts as well."""
    app, manager = FastAPI(), in_memory()
    limited = RateLimit("10/minute", name="route", redis=manager)

    async def before(_limited: Annotated[None, Depends(limited)], limit: CurrentLimit) -> dict[str, int]:
        limit.charge(3)
        return left(limit)

    async def behind(limit: CurrentLimit, _limited: Annotated[None, Depends(limited)]) -> dict[str, int]:
        limit.charge(3)
        return left(limit)

    app.get("/")(before if first == "limit" else behind)

    assert {"route": 9} == (await ask(app)).json()
    await asyncio.sleep(0.01)  # without a middleware a charge is made by itself, right behind
    assert {"route": 5} == (await ask(app)).json()


async def test_where_no_limit_applies_it_admits_and_charges_nobody() -> None:
    """An exempt path, a tenant without a limit and an app without the middleware need no ``if``."""
    plain, limited = FastAPI(), FastAPI()
    rules = [Rule(lambda conn: None, name="plan"), Rule("1/minute", name="other", paths="/other")]
    limited.add_middleware(RateLimitMiddleware, rules=rules, exempt="/exempt", redis=in_memory())

    async def read(limit: CurrentLimit) -> dict[str, Any]:
        limit.charge(3)
        reset = await limit.reset("plan")
        return {"allowed": limit.allowed, "degraded": limit.degraded, "policies": limit.policies, "reset": reset}

    for app in (plain, limited):
        for path in ("/", "/exempt"):
            app.get(path)(read)
            expected = {"allowed": True, "degraded": False, "policies": [], "reset": False}
            assert expected == (await ask(app, path)).json()


async def test_a_charge_that_is_no_number_is_told_all_the_same() -> None:
    """What would fail with a limit fails without one."""
    app = FastAPI()

    @app.get("/")
    async def read(limit: CurrentLimit) -> None:
        limit.charge(1.5)  # type: ignore[arg-type]  # on purpose

    with pytest.raises(ValueError, match=r"cost=1\.5 is not a whole number"):
        await ask(app)
