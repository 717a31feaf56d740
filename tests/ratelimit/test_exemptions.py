"""What is never counted: exactly the pages of the package's own sub-apps,
and paths that no router takes for others.
"""

from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.routing import Host, Mount, Route, Router
from starlette.types import ASGIApp

from redis_asgi import ConfigurationError, RateLimitMiddleware, RedisManager, Settings, health_app, metrics_app
from redis_asgi.asgi.sub_app import PageAnswer, SubApp, json_answer
from redis_asgi.ratelimit.rules.routing import Routing

from .harness import Spy, client_of, drive, header, http_scope, statuses, websocket_scope

pytestmark = pytest.mark.anyio

MEMORY = Settings(REDIS_URL="memory://")


async def page(conn: HTTPConnection) -> PageAnswer:
    return json_answer({"status": "fine"})


def home(request: object) -> PlainTextResponse:
    return PlainTextResponse("home")


def sub_app() -> SubApp:
    return SubApp({"": page, "/live": page})


def limited(app: ASGIApp, limits: str = "2/minute", **options: Any) -> RateLimitMiddleware:
    return RateLimitMiddleware(app, limits, redis=RedisManager(MEMORY), **options)


def _starlette() -> Starlette:
    return Starlette(routes=[Mount("/health", sub_app()), Route("/healthy", home), Route("/", home, methods=["POST"])])


def _fastapi() -> FastAPI:
    app = FastAPI()
    app.mount("/health", sub_app())
    app.add_api_route("/", lambda: "home", methods=["POST"])
    return app


def _deep() -> ASGIApp:
    return Starlette(
        routes=[
            Mount("/ops/v1", Router([Mount("/health", sub_app(), middleware=[Middleware(GZipMiddleware)])])),
            Route("/", home),
        ],
        middleware=[Middleware(GZipMiddleware)],
    )


def pages_of(app: object) -> set[str]:
    """The paths below *app* that are never counted; the same for GET and HEAD."""
    pages = Routing(app)
    assert pages.has_pages is bool(pages._pages)
    by_method = {method: {path for each, path in pages._pages if each == method} for method in ("GET", "HEAD")}
    assert by_method["GET"] == by_method["HEAD"]
    return by_method["GET"]


@pytest.mark.parametrize("build", [_starlette, _fastapi])
@pytest.mark.parametrize("outside", [True, False])
async def test_own_pages_are_not_counted(build: Any, outside: bool) -> None:
    """By GET and HEAD, around the finished app or added to it;
    everything else counts, redirects and 404s too.
    """
    app = build()
    manager = RedisManager(MEMORY)
    if outside:
        app = RateLimitMiddleware(app, "1000/minute", redis=manager)
    else:
        app.add_middleware(RateLimitMiddleware, limits="1000/minute", redis=manager)
    async with client_of(app) as client:
        asked = [
            *[(method, path) for method in ("GET", "HEAD", "POST") for path in ("/health/", "/health/live")],
            *[("GET", path) for path in ("/health/none", "/health/live/", "//health/live", "/healthy", "/")],
            ("GET", "/health/live%0A"),
            ("POST", "/"),
        ]
        answers = [(method, path, await client.request(method, path)) for method, path in asked]

    assert {("GET", "/health/"), ("HEAD", "/health/"), ("GET", "/health/live"), ("HEAD", "/health/live")} == {
        (method, path) for method, path, answer in answers if "ratelimit" not in answer.headers
    }


async def test_the_redirect_to_a_mount_is_counted() -> None:
    """It is the app's router that answers without the final slash."""
    app = limited(_starlette())

    assert [307, 307, 429] == await statuses(app, 3, "/health")
    assert [200] == await statuses(app, 1, "/health/")


async def test_a_page_is_not_a_handshake() -> None:
    """A WebSocket to a page's path is counted."""
    assert not Routing(_starlette()).is_page(websocket_scope(path="/health/live"))
    assert Routing(_starlette()).is_page(http_scope(path="/health/live"))


async def test_sub_app_at_the_top_leaves_the_limits_on() -> None:
    """Probes at ``/live`` and ``/ready`` are free, whatever else is below ``/`` is not."""
    app = limited(Starlette(routes=[Route("/api", home), Mount("/", health_app(settings=MEMORY))]))

    assert [200, 200, 429] == await statuses(app, 3, "/api")
    assert [429, 429] == await statuses(app, 2, "/none")
    assert [200] * 3 == await statuses(app, 3, "/live")


async def test_routes_beside_a_sub_app_are_counted() -> None:
    """The app's own page below the same prefix is no page of the sub-app."""
    app = limited(Starlette(routes=[Route("/metrics/report", home), Mount("/metrics", metrics_app(settings=MEMORY))]))

    assert [200, 200, 429] == await statuses(app, 3, "/metrics/report")
    assert {"/metrics/", "/metrics/json"} == pages_of(app)


@pytest.mark.parametrize(
    ("routes", "expected"),
    [
        pytest.param([Route("/h/live", home), Mount("/h", sub_app())], {"/h/"}, id="a route stands before it"),
        pytest.param([Route("/h/{name}", home), Mount("/h", sub_app())], {"/h/"}, id="a parameter stands before it"),
        pytest.param([Route("/h/{p:path}", home), Mount("/h", sub_app())], set(), id="a path stands before it"),
        pytest.param([Mount("/h", Spy()), Mount("/h", sub_app())], set(), id="a mount stands before it"),
        pytest.param([Mount("/", Spy()), Mount("/h", sub_app())], set(), id="everything stands before it"),
        pytest.param([Mount("/h", sub_app()), Mount("/", Spy())], {"/h/", "/h/live"}, id="it stands first"),
        pytest.param([Mount("/h", sub_app()), Mount("/h", sub_app())], {"/h/", "/h/live"}, id="twice"),
        pytest.param(
            [Route("/h/live", home, methods=["POST"]), Mount("/h", sub_app())], {"/h/", "/h/live"}, id="another method"
        ),
        pytest.param([Host("a.example", Spy()), Mount("/h", sub_app())], set(), id="a host may take it"),
        pytest.param([Mount("/h", sub_app()), Host("a.example", Spy())], {"/h/", "/h/live"}, id="a host behind it"),
        pytest.param([Mount("/{tenant}", sub_app())], set(), id="a parameter in its path"),
        pytest.param([Mount("/a*b", sub_app())], {"/a*b/", "/a*b/live"}, id="a star in its path"),
        pytest.param([Host("a.example", Router([Mount("/h", sub_app())]))], set(), id="below a host"),
    ],
)
def test_pages_are_where_the_routers_lead(routes: list[Any], expected: set[str]) -> None:
    """A page counts for one only if the first route that matches its path is the sub-app's mount."""
    assert expected == pages_of(Starlette(routes=routes))


def test_mounts_are_walked_through_routers_and_middlewares() -> None:
    """Three levels down, each wrapped, in whatever attribute."""

    class Wrapper:
        def __init__(self, app: Any) -> None:
            self._app = app

    assert {"/ops/v1/health/", "/ops/v1/health/live"} == pages_of(_deep()) == pages_of(Wrapper(_deep()))
    assert {"/", "/live"} == pages_of(sub_app())


@pytest.mark.parametrize("app", [Spy(), Starlette(), object(), None, sub_app])
def test_apps_without_mounts_have_none(app: object) -> None:
    """Any callable is an ASGI app."""
    assert set() == pages_of(app)


def test_walks_end() -> None:
    """A wrapper around itself, and a router within itself, are walked to a depth, not for ever."""

    class Ouroboros:
        def __init__(self) -> None:
            self.app = self

    router = Router([Mount("/health", sub_app())])
    router.routes.append(Mount("/again", router))

    assert set() == pages_of(Ouroboros())
    assert {"/health/live", "/again/health/live"} < pages_of(router)


async def test_pages_below_a_root_of_the_apps_own() -> None:
    """What a FastAPI app sets as its root counts for its pages and its exempt paths."""
    app = FastAPI()
    app.root_path = "/api"
    app.mount("/health", sub_app())
    app.add_api_route("/free", lambda: "free")
    app.add_api_route("/login", lambda: "in")
    outside = limited(app, exempt="/free")

    for path in ("/api/health/live", "/api/free", "/free"):
        assert [200] * 3 == await statuses(outside, 3, path)
    assert [200, 200, 429] == await statuses(outside, 3, "/api/login")


async def test_a_root_below_a_mount_hides_its_pages() -> None:
    """A mounted app that replaces its root looks elsewhere for its own mounts; nothing is exempt on
    a guess.
    """
    inner = FastAPI()
    inner.root_path = "/other"
    inner.mount("/health", sub_app())

    assert set() == pages_of(Starlette(routes=[Mount("/inner", inner)]))


@pytest.mark.parametrize(
    ("pattern", "path", "root", "exempt"),
    [
        pytest.param("/free", "/free", "", True, id="as it stands"),
        pytest.param("/free", "/root/free", "/root", True, id="below the root"),
        pytest.param("/free/*", "/free", "", True, id="the directory"),
        pytest.param("/free/*", "/free/", "", True, id="the directory with a slash"),
        pytest.param("/free/*", "/free/a//b/", "", True, id="all spellings are exempt"),
        pytest.param("/free/*", "/free/a/../b", "", True, id="dots that stay within"),
        pytest.param("/", "/", "", True, id="top"),
        pytest.param("/free", "/free/", "", False, id="another slash"),
        pytest.param("/free", "/free\n", "", False, id="a newline"),
        pytest.param("/free", "//free", "", False, id="slashes"),
        pytest.param("/free", "/FREE", "", False, id="case"),
        pytest.param("/free", "http://x/free", "", False, id="absolute form"),
        pytest.param("*", "http:/login", "", False, id="no path"),
        pytest.param("/free/*", "/free/../login", "", False, id="dots that lead out"),
        pytest.param("*.css", "/login#.css", "", False, id="fragment"),
        pytest.param("/free/*", "/free/root/login", "/root", False, id="a root further in"),
        pytest.param("/login", "/root/login", "/other", False, id="another root"),
    ],
)
async def test_exempt_is_what_no_router_takes_for_more(pattern: str, path: str, root: str, exempt: bool) -> None:
    """As it stands, and in no other spelling outside of what is exempt."""
    scope = http_scope(path=path, root_path=root)
    for app in (limited(Spy(), exempt=pattern), limited(Spy(), exempt=[pattern, "/never"])):
        sent = await drive(app, dict(scope))
        assert exempt is (header(sent[0], b"ratelimit") is None)


@given(path=st.from_regex(r"/[a/.#\n\\]{0,10}", fullmatch=True))
def test_exempt_patterns_take_in_no_more_than_a_rule(path: str) -> None:
    """Whatever is exempt by a pattern would be covered by a rule of it."""
    from redis_asgi.asgi.paths import PathPattern, spellings
    from redis_asgi.ratelimit.rules.exemptions import Exemptions

    exemptions = Exemptions(Routing(Spy()), ["/a/*", "*a.a"], MEMORY)
    if exemptions._is_exempt_path(http_scope(path=path)):
        assert any(PathPattern(pattern).covers(spellings(path)) for pattern in ("/a/*", "*a.a"))


async def test_exempt_refuses_a_routes_parameter() -> None:
    """In the argument and in the setting."""
    with pytest.raises(ConfigurationError, match=r"write /items/\*"):
        limited(Spy(), exempt="/items/{id}")
    with pytest.raises(ConfigurationError, match=r"RATE_LIMIT_EXEMPT_PATHS.*write /items/\*"):
        Settings(RATE_LIMIT_EXEMPT_PATHS="/items/{id}")
