"""The package's own sub-apps are never counted, wherever they are mounted; what only looks like one is."""

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Mount, Route, Router
from starlette.types import ASGIApp

from redis_asgi import RateLimitMiddleware, RedisManager, Settings
from redis_asgi.ratelimit.exempt import sub_app_paths
from redis_asgi.sub_app import Answer, SubApp, json_answer

from .harness import Spy, client_of

pytestmark = pytest.mark.anyio

MEMORY = Settings(REDIS_URL="memory://")


async def page(conn: HTTPConnection) -> Answer:
    return json_answer({"status": "fine"})


def home(request: object) -> PlainTextResponse:
    return PlainTextResponse("home")


def sub_app() -> SubApp:
    return SubApp({"": page, "live": page, "/live": page})


def _starlette() -> Starlette:
    return Starlette(routes=[Mount("/health", sub_app()), Route("/healthy", home), Route("/", home)])


def _fastapi() -> ASGIApp:
    app = FastAPI()
    app.mount("/health", sub_app())
    app.add_api_route("/", lambda: "home")
    app.add_api_route("/healthy", lambda: "home")
    return app


def _deep() -> ASGIApp:
    return Starlette(
        routes=[
            Mount("/ops/v1", Router([Mount("/health", sub_app(), middleware=[Middleware(GZipMiddleware)])])),
            Route("/healthy", home),
            Route("/", home),
        ],
        middleware=[Middleware(GZipMiddleware)],
    )


@pytest.mark.parametrize("build", [_starlette, _fastapi])
@pytest.mark.parametrize("outside", [True, False])
async def test_own_sub_apps_are_not_counted(build: object, outside: bool) -> None:
    """With and without the final slash, below it, around the finished app or added to it; everything else counts."""
    manager = RedisManager(MEMORY)
    app = build()  # type: ignore[operator]
    if outside:
        app = RateLimitMiddleware(app, "2/minute", redis=manager)
    else:
        app.add_middleware(RateLimitMiddleware, limits="2/minute", redis=manager)
    async with client_of(app) as client:
        probes = [await client.get(path) for path in ("/health/live", "/health/", "/health", "/health/none") * 3]
        counted = [(await client.get(path)).status_code for path in ("/healthy", "/", "/")]

    assert {200, 307, 404} == {probe.status_code for probe in probes}
    assert not [probe for probe in probes if "ratelimit" in probe.headers]
    assert [200, 200, 429] == counted


async def test_mounts_are_walked_through_routers_and_middlewares() -> None:
    """Three levels down, each wrapped."""
    assert ["/ops/v1/health"] == list(sub_app_paths(_deep()))
    app = RateLimitMiddleware(_deep(), "1/minute", redis=RedisManager(MEMORY))
    async with client_of(app) as client:
        assert [200] * 3 == [(await client.get("/ops/v1/health/live")).status_code for _ in range(3)]


@pytest.mark.parametrize("app", [Spy(), Starlette(), object(), None, sub_app])
def test_apps_without_mounts_have_none(app: object) -> None:
    """Any callable is an ASGI app."""
    assert [] == list(sub_app_paths(app))


def test_what_is_no_plain_mount_is_left_out() -> None:
    """A parameter in the path could take in anything; a wrapper around itself ends."""

    class Ouroboros:
        def __init__(self) -> None:
            self.app = self

    router = Router([Mount("/{tenant}", sub_app()), Host("a.example", Router([Mount("/health", sub_app())]))])

    assert [] == list(sub_app_paths(router))
    assert [] == list(sub_app_paths(Ouroboros()))


def test_a_router_within_itself_ends() -> None:
    """A cycle of mounts is walked to a depth, not for ever."""
    router = Router([Mount("/health", sub_app())])
    router.routes.append(Mount("/again", router))

    assert "/health" in list(sub_app_paths(router))
