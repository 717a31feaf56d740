"""`document_limits`: what a refused client gets, in an app's OpenAPI document.

A rule covers paths, so the paths of the generated document say which operations it covers. A
per-route limit belongs to an endpoint, which FastAPI's own walk over its routes finds, the one that
the document is generated from.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from starlette.types import ASGIApp

from ...asgi.paths import PathTemplate
from ...errors import ConfigurationError
from ...settings import HeaderStyle, Settings
from ..decorator import limits_of
from ..route import RateLimit
from ..rules.endpoints import calls_of
from .apps_within import FoundApp, apps_within, routes_of
from .response_objects import Document, add_problem, response_of

_METHODS = frozenset(("get", "put", "post", "delete", "options", "head", "patch", "trace"))
_NONE: frozenset[int] = frozenset()


def document_limits(app: ASGIApp) -> None:
    """Write into the OpenAPI document of *app* what its limits may answer, and only where they may.

    429 for every operation that a rule or a per-route limit covers, 503 where one fails closed, and
    400 where one refuses a request without an identity, each with its fields and its problem
    document. A rule whose paths cover some of a route's (``/users/me`` of ``/users/{id}``) covers
    it; shadows refuse nobody, and exempt paths are left alone. A response that the app has
    documented itself under the same status stays as it is.

    The document is generated as before, at the first call of ``app.openapi()``, and completed then,
    for FastAPI apps mounted in *app* too. Call it last: what is mounted later is not seen.

    Args:
        app: A FastAPI app, or what wraps it, such as a ``RateLimitMiddleware`` around it.

    Raises:
        ConfigurationError: If there is no FastAPI app.
    """
    within = (found.app for found in apps_within(app))
    documented = {id(each): each for each in within if callable(getattr(each, "openapi", None))}
    if not documented:
        raise ConfigurationError(
            f"document_limits({app!r}): there is no app with an openapi() in it. Give it a FastAPI app, after its "
            "routes and mounts."
        )
    for each in documented.values():
        each.openapi = _Documenting(app, each, each.openapi)


@dataclass(eq=False)
class _Documenting:
    """``openapi()`` of one app, with its limits.

    Attributes:
        top: What `document_limits` was given; the limits of *app* are between the two.
    """

    top: object
    app: Any
    generate: Callable[[], Document]
    _last: tuple[Document, bool] | None = field(default=None, init=False)

    def __call__(self) -> Document:
        document = self.generate()
        # Once the app has started, what was only listed as its middleware is there.
        state = getattr(self.app, "middleware_stack", None) is not None
        if self._last is None or self._last[0] is not document or self._last[1] is not state:
            self._complete(document)
            self._last = document, state
        return document

    def _complete(self, document: Document) -> None:
        places = [found for found in apps_within(self.top) if found.app is self.app]
        routes = {
            (route.path_format, method): route
            for route in routes_of(self.app)
            if getattr(route, "path_format", None) and getattr(route, "methods", None)
            for method in route.methods
        }
        problem: Document | None = None
        for path, item in document.get("paths", {}).items():
            for method in _METHODS & item.keys():
                route = routes.get((path, method.upper()))
                by_rule, by_route = _NONE, _NONE
                for place in places:
                    by_rule |= _by_rules(place, method.upper(), path, route)
                    by_route |= _by_limits(place, route)
                if not by_rule | by_route:
                    continue
                dialect = _dialect(places[0], path, route)
                if dialect is None:
                    problem = problem or add_problem(document)
                responses = item[method].setdefault("responses", {})
                for status in sorted(by_rule | by_route):
                    if str(status) not in responses:
                        responses[str(status)] = response_of(
                            status,
                            _style(places[0], route),
                            problem or {},
                            dialect=dialect,
                            by_route=status in by_route,
                        )


def _by_rules(place: FoundApp, method: str, path: str, route: Any) -> frozenset[int]:
    """The answers that the middlewares around an app may give in place of one of its operations."""
    found = _NONE
    for coverage, at in place.around:
        own, spelled = _spelled(place, at, path, route)
        found |= coverage.statuses(method, own, spelled)
    return found


def _dialect(place: FoundApp, path: str, route: Any) -> str | None:
    """The dialect of what answers in place of an operation:
    that of the outermost middleware that has one there.
    """
    found = (coverage.dialect(_spelled(place, at, path, route)[1]) for coverage, at in place.around)
    return next((dialect for dialect in found if dialect is not None), None)


def _spelled(place: FoundApp, at: str, path: str, route: Any) -> tuple[PathTemplate, tuple[PathTemplate, ...]]:
    """An operation's path as a middleware mounted at *at* sees it, and whatever else it may be."""
    convertors = getattr(route, "param_convertors", None)
    whole = place.prefix + path
    # Below a mount the path has been taken for the root, and a rule may mean either.
    below = whole.removeprefix(at)
    texts = dict.fromkeys((whole, below, place.root + whole))
    return PathTemplate(below, convertors), tuple(PathTemplate(text, convertors) for text in texts)


def _by_limits(place: FoundApp, route: Any) -> frozenset[int]:
    """The answers that the limits of a route itself may give."""
    settings = _settings(place)
    return _NONE.union(*(limit.statuses(settings) for limit in _limits(route)))


def _limits(route: Any) -> Iterator[RateLimit]:
    yield from (call for call in calls_of(getattr(route, "dependant", None)) if isinstance(call, RateLimit))
    yield from limits_of(getattr(route, "endpoint", None))


def _settings(place: FoundApp) -> Settings | None:
    """The settings of the middleware that per-route limits go by."""
    return next((coverage.settings for coverage, _ in place.around), None)


def _style(place: FoundApp, route: Any) -> HeaderStyle:
    styles = (coverage.style for coverage, _ in place.around)
    alone = (limit.settings_under(None).RATE_LIMIT_HEADERS for limit in _limits(route))
    return next(chain(styles, alone))
