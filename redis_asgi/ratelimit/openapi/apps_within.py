"""The apps within an app: those that are wrapped, mounted and included in it,
and the middlewares on the way there.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

from starlette.middleware import Middleware
from starlette.routing import Host, Mount
from starlette.types import Receive, Scope, Send

from ..rules.coverage import Coverage, Covering
from ..rules.routing import inwards

_PLAIN_PARAMETER = re.compile(r"\{([^{}:]+)\}")
_DEEPEST = 16  # apps mounted within apps
_MOST_APPS = 1000


@dataclass(frozen=True, slots=True)
class FoundApp:
    """An app with routes, and what a request has come through on its way there.

    Attributes:
        prefix: The path that it is mounted below.
        around: Each middleware, and the path that this one is mounted below.
        root: The ``root_path`` that the outermost app sets, or the empty text.
    """

    app: Any
    prefix: str
    around: tuple[tuple[Coverage, str], ...]
    root: str


def apps_within(app: object) -> list[FoundApp]:
    """Every app with routes that requests to *app* may come to, itself included, and how."""
    # One that is mounted in itself, twice, would be found for ever.
    return list(islice(_walk(app), _MOST_APPS))


def _walk(app: object, outer: FoundApp | None = None, path: str = "", depth: int = 0) -> Iterator[FoundApp]:
    """The apps with routes at and below *app*, which is mounted at *path*."""
    prefix = (outer.prefix if outer else "") + path
    around = list(outer.around) if outer else []
    for each in inwards(app):
        if isinstance(each, Covering):
            around.append((each.coverage(), prefix))
        if not isinstance(getattr(each, "routes", None), list):
            continue
        around += ((coverage, prefix) for coverage in _added_to(each))
        root = outer.root if outer else getattr(each, "root_path", "")
        found = FoundApp(each, prefix, tuple(around), root if isinstance(root, str) else "")
        yield found
        for route in routes_of(each) if depth < _DEEPEST else ():
            mount = getattr(route, "original_route", route)
            if isinstance(mount, Mount | Host):
                below = _PLAIN_PARAMETER.sub(r"{\1:str}", route.path) if isinstance(mount, Mount) else ""
                yield from _walk(mount.app, found, below, depth + 1)


def _added_to(app: Any) -> Iterator[Coverage]:
    """The limiting middlewares of ``add_middleware``;
    before an app's first request they are only listed.
    """
    stack = getattr(app, "middleware_stack", None)
    if stack is not None:
        yield from (each.coverage() for each in inwards(stack) if isinstance(each, Covering))
        return
    for listed in getattr(app, "user_middleware", ()):
        if isinstance(listed.cls, type) and issubclass(listed.cls, Covering):
            coverage = _listed.get(listed)
            if coverage is None:
                made: Any = listed.cls
                coverage = _listed[listed] = made(_nothing, *listed.args, **listed.kwargs).coverage()
            yield coverage


# What is listed is built once for its rules, so that it warns of them once.
_listed: WeakKeyDictionary[Middleware, Coverage] = WeakKeyDictionary()


async def _nothing(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """A stand-in for the wrapped app of a middleware that is only asked for its rules."""


def routes_of(app: Any) -> Sequence[Any]:
    """The routes of *app*, those of included routers too, as FastAPI walks them."""
    try:
        from fastapi.routing import iter_route_contexts  # noqa: PLC0415
    except ImportError:  # no FastAPI, or one (before 0.137) whose apps list them all
        routes: Sequence[Any] = app.routes
        return routes
    return tuple(iter_route_contexts(app.routes))
