"""The routers of the wrapped app, asked themselves about a path:
where it is rooted, and our own pages.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from starlette.routing import Host, Match, Mount
from starlette.types import Scope

from ...asgi.paths import Spellings, route_path, spellings
from ...asgi.sub_app import SubApp

_DEEPEST = 64  # apps within apps; a wrapper that holds itself must not hold us
_MOST_APPS = 10_000
_DEEPEST_MOUNT = 16  # mounts within mounts that a path may have been led through in vain
_MOST_MOUNTS = 256
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
        self._mounts: list[Mount] = []
        self._pages: frozenset[tuple[str, str]] = frozenset()

    @property
    def has_pages(self) -> bool:
        """Whether a sub-app of the package answers below the app."""
        if not self._has_walked:
            self._walk()
        return bool(self._pages)

    def has_inside(self, middleware: type) -> bool:
        """Whether a *middleware* of that class stands between here and the routes of the app
        itself.
        """
        for prefix, app in islice(_below(self._app), _DEEPEST):
            if prefix is not None:
                break
            # An app that is wrapped as a whole builds its own at its first request.
            added = (getattr(each, "cls", None) for each in _listed(app, "user_middleware"))
            if isinstance(app, middleware) or any(isinstance(c, type) and issubclass(c, middleware) for c in added):
                return True
        return False

    def path(self, scope: Scope) -> str:
        """The path as the app's router sees it."""
        if not self._has_walked:
            self._walk()
        return route_path(scope, self._own_root)

    def spellings(self, scope: Scope) -> Spellings:
        """Whatever some router may take the request's path for (see
        `redis_asgi.asgi.paths.spellings`).

        Where there is a root, and the path is not below it, Starlette's mounts cannot take their
        own part away: what they hold sees the whole path, so that it may also stand below each
        mount that it leads to.
        """
        path: str = scope["path"]
        spelled = self.spell(path, scope)
        if spelled and self._mounts and (self._roots or scope.get("root_path", "")):
            below = self.path(scope)
            if self._roots or below == path:
                prefixes = (prefix for each in {path, below} for prefix in _prefixes(self._mounts, each))
                # The app and not the client decides how many there are;
                # a router within itself has countless ones.
                some = list(islice(prefixes, _MOST_MOUNTS))
                spelled += tuple(prefix + each for prefix in some for each in spelled if each[:1] == "/")
        return spelled

    def spell(self, path: str, scope: Scope) -> Spellings:
        """The spellings of *path* in place of the request's own, in an app without mounts."""
        if not self._has_walked:
            self._walk()
        root = scope.get("root_path", "")
        return spellings(path, (root, *self._roots) if root else self._roots)

    def is_page(self, scope: Scope) -> bool:
        """Whether a sub-app of the package answers this request."""
        return self.has_pages and scope["type"] == "http" and (scope["method"], self.path(scope)) in self._pages

    def _walk(self) -> None:
        self._has_walked = True
        found = list(islice(_below(self._app), _MOST_APPS))
        roots = [root for _, app in found if (root := _root_of(app))]
        self._roots = tuple(dict.fromkeys(roots))
        self._mounts = next((_mounts_of(app) for _, app in found if routes_of(app) is not None), [])
        # Of the app itself, which replaces what the server says;
        # those of mounted ones matter below their mount only.
        self._own_root = next((root for prefix, app in found if prefix is None and (root := _root_of(app))), "")
        self._pages = frozenset(
            (method, path)
            for prefix, app in found
            if isinstance(app, SubApp) and "{" not in (prefix or "")  # which could be anything
            for path in (f"{prefix or ''}{page or '/'}" for page in app.pages)
            for method in ("GET", "HEAD")
            if _answers(self._app, method, path) is app
        )


def inwards(app: object) -> Iterator[object]:
    """*app* and what it wraps, up to the first that has routes."""
    for _ in range(_DEEPEST):
        if app is None:
            return
        yield app
        if isinstance(app, SubApp) or routes_of(app) is not None:
            return
        app = inner_app(app)


def _below(app: object, prefix: str | None = None, depth: int = 0) -> Iterator[tuple[str | None, object]]:
    """The apps at and below *app*, through middlewares, routers and mounts, with the mounts' path."""
    for _ in range(_DEEPEST):
        if app is None:
            return
        yield prefix, app
        if isinstance(app, SubApp):
            return
        if routes_of(app) is not None:
            for route in _mounts_of(app) if depth < _DEEPEST else ():
                yield from _below(route.app, (prefix or "") + route.path, depth + 1)
            return
        app = inner_app(app)


def _answers(app: object, method: str, path: str) -> object:
    """The sub-app that the routers on the way lead a request to;
    ``None`` where that is anything else.
    """
    scope: dict[str, Any] = {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}
    mounted = False
    for _ in range(_DEEPEST):
        if app is None or isinstance(app, SubApp):
            return app
        if (routes := routes_of(app)) is not None:
            if mounted and (root := _root_of(app)):
                scope["root_path"] = root  # for the outermost one *path* is below its root already
            app, mounted = _first_mount(routes, scope), True
        else:
            app = inner_app(app)
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


def _prefixes(mounts: list[Mount], path: str, depth: int = 0) -> Iterator[str]:
    """The part of a path that mounts, one within the other, have taken for their own."""
    for mount in mounts if depth < _DEEPEST_MOUNT else ():
        match = mount.path_regex.match(path)
        if match is not None:
            prefix = path[: len(path) - len(match["path"]) - 1]
            yield prefix
            app: object = mount.app
            for _ in range(_DEEPEST):
                if app is None or routes_of(app) is not None:
                    break
                app = inner_app(app)
            yield from (prefix + further for further in _prefixes(_mounts_of(app), path, depth + 1))


def _listed(app: object, name: str) -> list[Any]:
    listed = getattr(app, name, None)
    return listed if isinstance(listed, list) else []


def routes_of(app: object) -> list[Any] | None:
    """The routes of an app or a router; ``None`` for what is neither."""
    routes = getattr(app, "routes", None)
    return routes if isinstance(routes, list) else None


def _mounts_of(app: object) -> list[Mount]:
    return [route for route in routes_of(app) or () if isinstance(route, Mount)]


def inner_app(app: object) -> object:
    """The app that a middleware wraps, wherever it keeps that; ``None`` when it is none."""
    return next((inner for name in _INNER if (inner := getattr(app, name, None)) is not None), None)


def _root_of(app: object) -> str:
    """The ``root_path`` that an app sets by itself,
    as ``FastAPI(root_path=...)`` does; empty for none.
    """
    root = getattr(app, "root_path", "") if routes_of(app) is not None else ""
    return root if isinstance(root, str) else ""
