"""Limits that are off: nobody is refused, and the app finds what it always finds."""

import logging
from typing import Any

import pytest
import redis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from redis_asgi import RateLimiter, RateLimitMiddleware, RedisManager, Rule, rate_limit
from redis_asgi.testing import limits_off

from ..ratelimit.harness import client_of
from .conftest import MakeApp

pytestmark = pytest.mark.anyio
NOWHERE = "redis://127.0.0.1:1"


@pytest.mark.parametrize("limits", ["1/second", "2/minute; 1/hour", lambda conn: "0/minute"])
async def test_nobody_is_refused(rate_limits_off: None, make_app: MakeApp, limits: Any) -> None:
    """However many ask, each has the whole quota."""
    async with client_of(make_app(limits)) as client:
        answers = [await client.get("/") for _ in range(5)]

    assert [200] * 5 == [answer.status_code for answer in answers]
    assert 1 == len({answer.text for answer in answers})


async def test_redis_is_not_asked(rate_limits_off: None, caplog: pytest.LogCaptureFixture) -> None:
    """A limit that fails closed admits without a server, and none is missed."""

    async def words(request: Request) -> Response:
        request.state.rate_limit.charge(7, policy="words")
        return JSONResponse([policy.name for policy in request.state.rate_limit.policies])

    rules = [Rule("5/minute", name="words", on_redis_error="closed", cost=3)]
    app = Starlette(routes=[Route("/", words)])
    app.add_middleware(RateLimitMiddleware, rules=rules, redis=NOWHERE)
    with caplog.at_level(logging.WARNING):
        async with client_of(app) as client:
            answers = [await client.get("/") for _ in range(3)]
        limiter = RateLimiter(NOWHERE)
        decisions = [await limiter.consume("ada", "1/minute") for _ in range(2)]
        found = await limiter.reset("ada")

    assert [["words"]] * 3 == [answer.json() for answer in answers]
    assert 2 * [(True, False)] == [(decision.allowed, decision.degraded) for decision in decisions]
    assert found is False
    assert [] == caplog.records


async def test_limit_of_a_route_is_off(rate_limits_off: None, manager: RedisManager) -> None:
    """A decorated endpoint is asked as often as one likes."""

    @rate_limit("1/hour", redis=manager)
    async def report(request: Request) -> Response:
        return Response()

    async with client_of(Starlette(routes=[Route("/", report)])) as client:
        assert [200] * 3 == [(await client.get("/")).status_code for _ in range(3)]


async def test_nothing_is_counted(make_app: MakeApp, redis_client: redis.Redis) -> None:
    """Who asks while they are off has its quota afterwards."""
    async with client_of(make_app("1/minute")) as client:
        with limits_off():
            await client.get("/")
        answers = [(await client.get("/")).status_code for _ in range(2)]

    assert [200, 429] == answers


async def test_known_refusal_is_off_too(make_app: MakeApp) -> None:
    """What the process remembers of a client does not refuse it."""
    async with client_of(make_app("1/minute")) as client:
        before = [(await client.get("/")).status_code for _ in range(3)]
        with limits_off():
            answer = (await client.get("/")).status_code

    assert ([200, 429, 429], 200) == (before, answer)
