"""What the routers of the wrapped app make of a path, asked of themselves: where it is rooted, and our own pages."""

from collections.abc import Iterator
from typing import Any

from starlette.routing import Host, Match, Mount
from starlette.types import Scope

from ..paths import Spellings, route_path, spellings
from ..sub_app import SubApp

_DEEPEST = 64  # apps within apps; a wrapper that holds itself must not hold us
# Where a wrapper keeps what it wraps.
_INNER = ("app", "_app", "asgi_app", "application", "wrapped")


class Routing:
    """The routers that one middleware stands before; they are walked at the first request.

    Args:
        app: The wrapped app.
    """

    def __init__(self, app: object) -> None:
        self._app = app
        self._has_walked = False
        self._own_root = ""
        self._roots: tuple[str, ...] = ()
        self._pages: frozenset[tuple[str, str]] = frozenset()

    @property
    def has_pages(self) -> bool:
        """Whether a sub-app of the package answers below the app."""
        if not self._has_walked:
            self._walk()
        return bool(self._pages)

    def path(self, scope: Scope) -> str:
        """The path as the app's router sees it."""
        if not self._has_walked:
            self._walk()
        return route_path(scope, self._own_root)

    def spellings(self, scope: Scope) -> Spellings:
        """Whatever some router may take the request's path for (see `redis_asgi.paths.spellings`)."""
        return self.spell(scope["path"], scope)

    def spell(self, path: str, scope: Scope) -> Spellings:
        """The same for *path* in place of the request's own."""
        if not self._has_walked:
            self._walk()
        root = scope.get("root_path", "")
        return spellings(path, (root, *self._roots) if root else self._roots)

    def is_page(self, scope: Scope) -> bool:
        """Whether a sub-app of the package answers this request."""
        return self.has_pages and scope["type"] == "http" and (scope["method"], self.path(scope)) in self._pages

    def _walk(self) -> None:
        self._has_walked = True
        found = list(_below(self._app))
        roots = [root for _, app in found if (root := _root_of(app))]
        self._roots = tuple(dict.fromkeys(roots))
        # Of the app itself, which replaces what the server says; those of mounted ones matter below their mount only.
        self._own_root = next((root for prefix, app in found if prefix is None and (root := _root_of(app))), "")
        self._pages = frozenset(
            (method, path)
            for prefix, app in found
            if isinstance(app, SubApp)
            for path in (f"{prefix or ''}{page or '/'}" for page in app.pages)
            for method in ("GET", "HEAD")
            if _answers(self._app, method, path) is app
        )


def _below(app: object, prefix: str | None = None, depth: int = 0) -> Iterator[tuple[str | None, object]]:
    """The apps at and below *app*, through middlewares, routers and mounts, with the mounts' path.

    A path with a parameter could be anything, and what hangs there is left out.
    """
    for _ in range(_DEEPEST):
        if app is None:
            return
        yield prefix, app
        if isinstance(app, SubApp):
            return
        if isinstance(routes := getattr(app, "routes", None), list):
            for route in routes if depth < _DEEPEST else ():
                if isinstance(route, Mount) and "{" not in route.path:
                    yield from _below(route.app, (prefix or "") + route.path, depth + 1)
            return
        app = _inner(app)


def _answers(app: object, method: str, path: str) -> object:
    """The sub-app that the routers on the way lead a request to; ``None`` where that is anything else."""
    scope: dict[str, Any] = {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}
    mounted = False
    for _ in range(_DEEPEST):
        if app is None or isinstance(app, SubApp):
            return app
        if isinstance(routes := getattr(app, "routes", None), list):
            if mounted and (root := _root_of(app)):
                scope["root_path"] = root  # for the outermost one *path* is below its root already
            app, mounted = _first_mount(routes, scope), True
        else:
            app = _inner(app)
    return None


def _first_mount(routes: list[Any], scope: Scope) -> object:
    """The app of the first route that matches, if that is a mount."""
    for route in routes:
        if isinstance(route, Host):
            return None  # whom it takes is another thing for each request
        match, child = route.matches(scope)
        if match is Match.FULL:
            scope.update(child)
            return route.app if isinstance(route, Mount) else None
    return None


def _inner(app: object) -> object:
    return next((inner for name in _INNER if (inner := getattr(app, name, None)) is not None), None)


def _root_of(app: object) -> str:
    """The ``root_path`` that an app sets by itself, as ``FastAPI(root_path=...)`` does; empty for none."""
    root = getattr(app, "root_path", "") if isinstance(getattr(app, "routes", None), list) else ""
    return root if isinstance(root, str) else ""
