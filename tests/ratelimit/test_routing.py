"""What the wrapped app's routers make of a path: its root, and what mounts let through."""

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, Router

from redis_asgi.asgi.paths import PathPattern
from redis_asgi.ratelimit.rules.routing import Routing

from .harness import Spy, http_scope
from .routers import Answer, ask, limited


def page(_request: Request) -> PlainTextResponse:
    return PlainTextResponse("page")


def _fastapi(root: str, *routes: Any) -> FastAPI:
    app = FastAPI(openapi_url=None)
    app.root_path = root
    app.router.routes.extend(routes)
    return app


def answer(app: Any, pattern: str, target: str, root: str = "") -> Answer:
    return asyncio.run(ask(limited(app, pattern), target, root=root))


TENANTS = Mount("/{tenant}", routes=[Route("/admin/login", page)])
DEEPER = Mount("/{tenant}", routes=[Mount("/{team}", routes=[Route("/admin/login", page)])])


@pytest.mark.parametrize(
    ("app", "target", "root"),
    [
        pytest.param(Starlette(routes=[TENANTS]), "/x/admin/login", "", id="as it should be"),
        pytest.param(Starlette(routes=[TENANTS]), "/admin/login%0A", "", id="newline"),
        pytest.param(Starlette(routes=[TENANTS]), "/admin/login", "/api", id="a path that is not below the root"),
        pytest.param(Starlette(routes=[DEEPER]), "/admin/login", "/api", id="two mounts that take nothing"),
        pytest.param(_fastapi("/api", TENANTS), "/admin/login", "", id="nor below the app's own root"),
        pytest.param(_fastapi("/api", TENANTS), "/api/x/admin/login", "", id="below the app's own root"),
        pytest.param(
            Starlette(routes=[Mount("/{tenant}", _fastapi("/api", Route("/admin/login", page)))]),
            "/admin/login",
            "",
            id="nor below the root of a mounted app",
        ),
    ],
)
def test_mounts_that_lose_their_way(app: Any, target: str, root: str) -> None:
    """Starlette's mounts take their part away only where the path begins with the root; the rule
    counts anyhow.
    """
    assert Answer(200, "page", counted=True) == answer(app, "/*/admin/login", target, root)


@settings(max_examples=200, deadline=None)
@given(
    path=st.lists(st.sampled_from(["/", "//", "/a", "/b", "a", "/a/b", "\n", "/.", "/..", "/api"]), max_size=6),
    root=st.sampled_from(["", "/a", "/b", "/a/", "/", "/api"]),
    own=st.sampled_from(["", "", "/a", "/api", "/a/b"]),
)
def test_whatever_a_router_reaches_is_covered(path: list[str], root: str, own: str) -> None:
    """Mounts with and without parameters in each other,
    whatever the server and the app take for their root.
    """

    def named(full: str) -> Route:
        return Route("/" + full.rpartition("/")[2], lambda _request: PlainTextResponse(full))

    inner = Mount("/a", routes=[named("/{t}/a/a"), named("/{t}/a/b"), Route("/a/b", page)])
    app = _fastapi(own, named("/a"), Mount("/{t}", routes=[named("/{t}/b"), inner, Route("/b/a", page)]))
    routing = Routing(app)
    scope = http_scope(path="/" + "".join(path), root_path=root)
    reached = asyncio.run(ask(app, "/", root=root, path=scope["path"])).endpoint
    patterns = {"page": ["/*/a/a/b", "/*/b/a"]}.get(reached, [reached.replace("{t}", "*")])

    if reached.startswith(("/", "page")):
        spelled = routing.spellings(scope)
        assert any(PathPattern(pattern).covers(spelled) for pattern in patterns)


def test_paths_that_stay_below_the_root_have_no_other_spelling() -> None:
    """A mount that works adds nothing, so that no other rule counts."""
    app = Starlette(routes=[Mount("/a", routes=[Route("/b", page)])])

    assert ("/a/b",) == Routing(app).spellings(http_scope(path="/a/b"))
    assert ("/api/a/b", "/a/b") == Routing(app).spellings(http_scope(path="/api/a/b", root_path="/api"))
    assert ("/a/b", "/a/a/b") == Routing(app).spellings(http_scope(path="/a/b", root_path="/api"))
    assert ("/x",) == Routing(app).spellings(http_scope(path="/x", root_path="/api"))
    assert ("/a/b",) == Routing(Spy()).spellings(http_scope(path="/a/b", root_path="/api"))


def test_routers_within_themselves_are_not_countless() -> None:
    """Two mounts of a router in itself would double with every level."""
    router = Router([Route("/x", page)])
    router.routes += [Mount("/a", router), Mount("/{b}", router)]
    spelled = Routing(router).spellings(http_scope(path="/a/x", root_path="/api"))

    assert 2 <= len(spelled) <= 257
