"""Likely misconfigurations: each is said once, when a request shows it,
and never to a deployment that is right.
"""

import logging
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, BaseUser, SimpleUser
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from redis_asgi import RateLimiter, RateLimitMiddleware, RedisManager, Rule, Settings, by_user, rate_limit
from redis_asgi.events import EVENTS

from .harness import client_of

pytestmark = pytest.mark.anyio

MEMORY = Settings(REDIS_URL="memory://")


class Everybody(AuthenticationBackend):
    """Knows every caller by the header ``x-user``, and nobody without."""

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        name = conn.headers.get("x-user")
        return (AuthCredentials(), SimpleUser(name)) if name else None


async def index(request: Request) -> Response:
    return PlainTextResponse("ok")


def app_of(*middleware: Middleware, routes: Any = None) -> Starlette:
    return Starlette(routes=routes or [Route("/", index, methods=["GET", "POST"])], middleware=middleware)


def limits(*args: Any, **kwargs: Any) -> Middleware:
    return Middleware(RateLimitMiddleware, *args, settings=MEMORY, **kwargs)


AUTH = Middleware(AuthenticationMiddleware, backend=Everybody())
CORS = Middleware(CORSMiddleware, allow_origins=["https://page.example"])


async def said(app: ASGIApp, caplog: pytest.LogCaptureFixture, headers: dict[str, str] | None = None) -> list[str]:
    """The events of three requests."""
    with caplog.at_level(logging.WARNING, "redis_asgi"):
        async with client_of(app) as client:
            for _ in range(3):
                await client.get("/", headers=headers or {})
    for record in caplog.records:
        assert record.getMessage().startswith(f"redis_asgi.{vars(record)['code']}: ")
        assert vars(record)["fix"] in record.getMessage()
    return [vars(record)["code"] for record in caplog.records]


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        pytest.param([AUTH, limits("9/minute", partition_by=by_user)], [], id="outside"),
        pytest.param([limits("9/minute", partition_by=by_user), AUTH], ["user_middleware_missing"], id="inside"),
        pytest.param([limits("9/minute", partition_by=by_user)], ["user_middleware_missing"], id="none"),
        pytest.param(
            [limits(rules=[Rule("9/minute", name="a"), Rule("9/hour", name="b", partition_by=by_user)])],
            ["user_middleware_missing"],
            id="one-rule-of-two",
        ),
        pytest.param([limits("9/minute")], [], id="by-address"),
    ],
)
async def test_by_user_without_a_user_middleware_outside(
    stack: list[Middleware], expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody has a user then; where one is known outside,
    a caller who is not logged in is no misconfiguration.
    """
    assert expected == await said(app_of(*stack), caplog)


async def test_a_route_by_user_without_a_user_middleware(caplog: pytest.LogCaptureFixture) -> None:
    """A limit on an endpoint says the same, naming itself and how such requests are counted."""

    @rate_limit("9/minute", name="export", partition_by=by_user, settings=MEMORY)
    async def export(request: Request) -> Response:
        return PlainTextResponse("ok")

    assert ["user_middleware_missing"] == await said(app_of(routes=[Route("/", export)]), caplog)
    assert "The rule export counts by user" in caplog.text
    assert "RATE_LIMIT_MISSING_IDENTITY says (ip)" in caplog.text


FROM_PAGE = {"origin": "https://page.example"}


@pytest.mark.parametrize(
    ("app", "headers", "expected"),
    [
        pytest.param(app_of(limits("9/minute"), CORS), FROM_PAGE, ["cors_inside"], id="inside"),
        pytest.param(app_of(limits("9/minute"), AUTH, CORS), FROM_PAGE, ["cors_inside"], id="further-inside"),
        pytest.param(
            RateLimitMiddleware(app_of(CORS), "9/minute", settings=MEMORY), FROM_PAGE, ["cors_inside"], id="whole-app"
        ),
        pytest.param(app_of(limits("9/minute"), CORS), {}, [], id="no-browser-asks"),
        pytest.param(app_of(CORS, limits("9/minute")), FROM_PAGE, [], id="outside"),
        pytest.param(app_of(limits("9/minute")), FROM_PAGE, [], id="no-cors"),
        pytest.param(
            app_of(limits("9/minute"), routes=[Mount("/sub", app_of(CORS)), Route("/", index)]),
            FROM_PAGE,
            [],
            id="of-a-mounted-app",
        ),
    ],
)
async def test_cors_inside(
    app: ASGIApp, headers: dict[str, str], expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A refusal could not be read by the page:
    said when a browser asks from another page, and CORS is inside.
    """
    assert expected == await said(app, caplog, headers)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        pytest.param(Rule("5/minute", name="r", cost=lambda request: 9), ["cost_never_fits"], id="dynamic-cost"),
        pytest.param(Rule("9/hour; 5/minute", name="r", cost=lambda request: 6), ["cost_never_fits"], id="one-of-two"),
        pytest.param(Rule(lambda conn: "5/minute", name="r", cost=9), ["cost_never_fits"], id="dynamic-limits"),
        pytest.param(Rule("5/minute", name="r", cost=lambda request: 5), [], id="fits"),
        pytest.param(Rule(lambda conn: "0/minute", name="r", cost=9), [], id="always-refused"),
        pytest.param(Rule("5/minute", name="r", cost=lambda request: 9, shadow=True), [], id="shadow"),
    ],
)
async def test_a_cost_that_never_fits(rule: Rule, expected: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """It is known at run time only, and said once, with the cost, the quota and the rule."""
    assert expected == await said(app_of(limits(rules=[rule])), caplog)
    if expected:
        assert "under the rule r, whose quota is 5" in caplog.text


async def test_a_cost_of_a_route_that_never_fits(caplog: pytest.LogCaptureFixture) -> None:
    """A limit on an endpoint says it too."""

    @rate_limit("5/minute", name="r", cost=lambda conn: 7, settings=MEMORY)
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("ok")

    assert ["cost_never_fits"] == await said(app_of(routes=[Route("/", endpoint)]), caplog)
    assert "A request costs 7 under the rule r, whose quota is 5" in caplog.text


async def test_a_cost_of_a_limiter_that_never_fits(caplog: pytest.LogCaptureFixture) -> None:
    """Consuming says it, once; to peek asks whether it would fit."""
    limiter = RateLimiter(RedisManager(MEMORY))
    with caplog.at_level(logging.WARNING, "redis_asgi"):
        assert not (await limiter.peek("a", "5/minute", cost=7)).allowed
        assert [] == caplog.records
        for _ in range(3):
            assert not (await limiter.consume("a", "5/minute", cost=7, name="jobs")).allowed

    assert ["cost_never_fits"] == [vars(record)["code"] for record in caplog.records]


async def test_an_identity_returned_for_limits_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    """A callable that returns the caller's key for limits by mistake does not put it into the log."""
    rule = Rule(lambda conn: conn.headers["x-api-key"], name="plan")
    await said(app_of(limits(rules=[rule])), caplog, {"x-api-key": "sk-live-hunter2"})

    (record,) = caplog.records
    assert "limits_unreadable" == vars(record)["code"]
    assert "hunter2" not in repr(vars(record))
    assert "a text of 15 characters" in record.getMessage()


async def test_identities_are_in_no_line(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is said about a request that carries a credential and a user, neither is in it."""
    rules = [
        Rule("9/minute", name="a", partition_by=lambda conn: conn.headers["authorization"], cost=lambda request: 10),
        Rule("9/minute", name="b", partition_by=by_user),
    ]
    headers = {"authorization": "Bearer hunter2", "x-forwarded-for": "1.1.1.1", **FROM_PAGE}
    codes = await said(app_of(limits(rules=rules), CORS), caplog, headers)

    assert {"user_middleware_missing", "cors_inside", "cost_never_fits", "forwarded_header_untrusted"} == set(codes)
    assert set(codes) <= set(EVENTS)
    assert not [record for record in caplog.records if "hunter2" in repr(vars(record))]
