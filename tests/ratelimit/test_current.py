"""`CurrentLimit`: what was decided about a request, as an argument of a FastAPI endpoint."""

import asyncio
import inspect
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from starlette.requests import HTTPConnection

from redis_asgi import CurrentLimit, RateLimit, RateLimitMiddleware, RedisManager, RequestDecision, Rule, Settings
from redis_asgi.ratelimit.current import current_limit

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


async def test_what_was_used_may_be_said_where_nothing_counts_it() -> None:
    """An endpoint says it in whatever app it stands; a number that is none is told all the same."""
    app = FastAPI()

    @app.get("/{units}")
    async def read(limit: CurrentLimit, units: int) -> None:
        limit.used(units)

    assert 200 == (await ask(app, "/5")).status_code
    with pytest.raises(ValueError, match=r"used\(-5\): not a whole number"):
        await ask(app, "/-5")


def test_each_method_works_where_nothing_was_decided() -> None:
    """What stands for the decision has its own of all that is public."""
    public = {name for name, value in vars(RequestDecision).items() if name[0] != "_" and inspect.isfunction(value)}
    internal = {"has_asked", "join", "turned_down"}

    assert set() == public - internal - set(vars(type(asyncio.run(current_limit(HTTPConnection({"type": "http"}))))))
