"""`document_limits` and `rate_limit_responses`: what a refused client gets, in an app's OpenAPI document.

A rule covers paths, so the paths of the generated document say which operations it covers. A per-route limit belongs to
an endpoint, which FastAPI's own walk over its routes finds, the one that the document is generated from.
"""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, TypeAlias, get_args
from weakref import WeakKeyDictionary

from starlette.middleware import Middleware
from starlette.routing import Host, Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from ..asgi.paths import PathTemplate
from ..errors import ConfigurationError
from ..settings import HeaderStyle, Settings
from .answers.headers import PROBLEM_JSON
from .decorator import limits_of
from .route import RateLimit
from .rules.coverage import Coverage, Covering
from .rules.endpoints import calls_of
from .rules.routing import inwards
from .rules.rule import check_choice

Document: TypeAlias = dict[str, Any]

_METHODS = frozenset(("get", "put", "post", "delete", "options", "head", "patch", "trace"))
_PLAIN_PARAMETER = re.compile(r"\{([^{}:]+)\}")
_NONE: frozenset[int] = frozenset()
_DEEPEST = 16  # apps mounted within apps
_MOST_APPS = 1000
_NAME = "RateLimitProblem"

_PROBLEM: Document = {
    "title": _NAME,
    "description": "A problem document (RFC 9457).",
    "type": "object",
    "properties": {
        "type": {"type": "string", "format": "uri-reference", "description": "Which kind of problem it is."},
        "title": {"type": "string"},
        "status": {"type": "integer", "description": "The status of the response."},
        "detail": {"type": "string", "description": "One sentence or two for a person."},
        "violated-policies": {
            "type": "array",
            "items": {"type": "string"},
            "description": "Names of the policies that refused the request, of a 429.",
        },
    },
    "required": ["type", "title", "status", "detail"],
}
_DETAIL: Document = {"type": "object", "properties": {"detail": {"type": "string"}}, "required": ["detail"]}
_DESCRIPTIONS = {
    400: "The request lacks what it would be counted by.",
    429: "A rate limit refuses the request.",
    503: "A rate limit cannot be checked right now.",
}


def _header(description: str, kind: str = "string") -> Document:
    return {"description": description, "schema": {"type": kind}}


_NO_STORE = {"Cache-Control": _header("`no-store`")}
_IETF = {
    "RateLimit-Policy": _header("The policies that apply: a quota `q` per window of `w` seconds each."),
    "RateLimit": _header("How the client stands to each: `r` units remain, and `t` seconds until more do."),
}
_LEGACY = {
    "X-RateLimit-Limit": _header("Units per window, of the policy that matters most.", "integer"),
    "X-RateLimit-Remaining": _header("Units that remain.", "integer"),
    "X-RateLimit-Reset": _header("When the quota is back, in Unix seconds.", "integer"),
}


def rate_limit_responses(
    *, headers: HeaderStyle = "ietf", fails_closed: bool = False, needs_identity: bool = False
) -> dict[int | str, dict[str, Any]]:
    """What a limit may answer, for ``responses=`` of a FastAPI app, router or route.

    ::

        @app.get("/report", dependencies=[Depends(limit)], responses=rate_limit_responses())

    `document_limits` finds by itself which operations are limited; this is for what it cannot see, such as a limit
    that a dependency of your own asks, or a proxy's.

    Args:
        headers: Which fields a 429 carries; as ``headers=`` of the middleware.
        fails_closed: Also the 503 of a limit that is ``on_redis_error="closed"``.
        needs_identity: Also the 400 of ``RATE_LIMIT_MISSING_IDENTITY=refuse``.

    Raises:
        ConfigurationError: If *headers* is none of those.
    """
    check_choice("headers", headers, get_args(HeaderStyle))
    found = {400: needs_identity, 429: True, 503: fails_closed}
    return {status: _response(status, headers, _PROBLEM) for status, may in found.items() if may}


def _response(status: int, style: HeaderStyle, problem: Document, *, by_route: bool = True) -> Document:
    """The Response Object of *status*; a route's own is made by the app's handler of ``HTTPException``."""
    fields: Document = {}
    if status == 429:
        fields |= {"Retry-After": _header("Seconds until it is admitted; absent where it never can be.", "integer")}
        fields |= (_IETF if style in ("ietf", "both") else {}) | (_LEGACY if style in ("legacy", "both") else {})
    elif status == 503:
        fields |= {"Retry-After": _header("Seconds until it is worth another try.", "integer")}
    content = {PROBLEM_JSON.decode(): {"schema": problem}}
    if by_route:
        content["application/json"] = {"schema": _DETAIL}
    # A copy: the user may change what one operation says.
    return copy.deepcopy({"description": _DESCRIPTIONS[status], "headers": fields | _NO_STORE, "content": content})


def document_limits(app: ASGIApp) -> None:
    """Write into the OpenAPI document of *app* what its limits may answer, and only where they may.

    429 for every operation that a rule or a per-route limit covers, 503 where one fails closed, and 400 where one
    refuses a request without an identity, each with its fields and its problem document. A rule whose paths cover some
    of a route's (``/users/me`` of ``/users/{id}``) covers it; shadows refuse nobody, and exempt paths are left alone.
    A response that the app has documented itself under the same status stays as it is.

    The document is generated as before, at the first call of ``app.openapi()``, and completed then, for FastAPI apps
    mounted in *app* too. Call it last: what is mounted later is not seen.

    Args:
        app: A FastAPI app, or what wraps it, such as a ``RateLimitMiddleware`` around it.

    Raises:
        ConfigurationError: If there is no FastAPI app.
    """
    documented = {id(found.app): found.app for found in _found(app) if callable(getattr(found.app, "openapi", None))}
    if not documented:
        raise ConfigurationError(
            f"document_limits({app!r}): there is no app with an openapi() in it. Give it a FastAPI app, after its "
            "routes and mounts."
        )
    for each in documented.values():
        each.openapi = _Documenting(app, each, each.openapi)


@dataclass(frozen=True, slots=True)
class _Found:
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


def _found(app: object) -> list[_Found]:
    # One that is mounted in itself, twice, would be found for ever.
    return list(islice(_walk(app), _MOST_APPS))


def _walk(app: object, outer: _Found | None = None, path: str = "", depth: int = 0) -> Iterator[_Found]:
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
        found = _Found(each, prefix, tuple(around), root if isinstance(root, str) else "")
        yield found
        for route in _routes(each) if depth < _DEEPEST else ():
            mount = getattr(route, "original_route", route)
            if isinstance(mount, Mount | Host):
                below = _PLAIN_PARAMETER.sub(r"{\1:str}", route.path) if isinstance(mount, Mount) else ""
                yield from _walk(mount.app, found, below, depth + 1)


def _added_to(app: Any) -> Iterator[Coverage]:
    """What limits an app by ``add_middleware``; before its first request those are only listed."""
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
    """What a middleware wraps that is only asked for its rules."""


def _routes(app: Any) -> Sequence[Any]:
    """The routes of *app*, those of included routers too, as FastAPI walks them."""
    try:
        from fastapi.routing import iter_route_contexts  # noqa: PLC0415
    except ImportError:  # no FastAPI, or one (before 0.137) whose apps list them all
        routes: Sequence[Any] = app.routes
        return routes
    return tuple(iter_route_contexts(app.routes))


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
        places = [found for found in _found(self.top) if found.app is self.app]
        routes = {
            (route.path_format, method): route
            for route in _routes(self.app)
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
                problem = problem or _add_problem(document)
                responses = item[method].setdefault("responses", {})
                for status in sorted(by_rule | by_route):
                    if str(status) not in responses:
                        style = _style(places[0], route)
                        responses[str(status)] = _response(status, style, problem, by_route=status in by_route)


def _by_rules(place: _Found, method: str, path: str, route: Any) -> frozenset[int]:
    """What the middlewares around an app may answer in place of one of its operations."""
    convertors = getattr(route, "param_convertors", None)
    whole = place.prefix + path
    found = _NONE
    for coverage, at in place.around:
        # Below a mount the path has been taken for the root, and a rule may mean either.
        below = whole.removeprefix(at)
        texts = dict.fromkeys((whole, below, place.root + whole))
        spelled = tuple(PathTemplate(text, convertors) for text in texts)
        found |= coverage.statuses(method, PathTemplate(below, convertors), spelled)
    return found


def _by_limits(place: _Found, route: Any) -> frozenset[int]:
    """What the limits of a route itself may answer."""
    settings = _settings(place)
    return _NONE.union(*(limit.statuses(settings) for limit in _limits(route)))


def _limits(route: Any) -> Iterator[RateLimit]:
    yield from (call for call in calls_of(getattr(route, "dependant", None)) if isinstance(call, RateLimit))
    yield from limits_of(getattr(route, "endpoint", None))


def _settings(place: _Found) -> Settings | None:
    """Those of the middleware that per-route limits go by."""
    return next((coverage.settings for coverage, _ in place.around), None)


def _style(place: _Found, route: Any) -> HeaderStyle:
    styles = (coverage.style for coverage, _ in place.around)
    alone = (limit.settings_under(None).RATE_LIMIT_HEADERS for limit in _limits(route))
    return next(chain(styles, alone))


def _add_problem(document: Document) -> Document:
    """A reference to the problem document's schema, under a name that nothing else in *document* has."""
    schemas: Document = document.setdefault("components", {}).setdefault("schemas", {})
    name = _NAME
    while schemas.setdefault(name, copy.deepcopy(_PROBLEM)) != _PROBLEM:
        name += "_"
    return {"$ref": f"#/components/schemas/{name}"}
