"""An app as it is imported, and what limits it:
middlewares are built as at its start, and no request is made.
"""

import contextlib
import difflib
import importlib
import inspect
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.endpoints import HTTPEndpoint
from starlette.routing import Host, Mount, compile_path

from ..errors import ConfigurationError
from ..ratelimit.decorator import stack_of
from ..ratelimit.overview import LimitInForce, Protection, limits_among, limits_of_route
from ..ratelimit.rules.endpoints import calls_of
from ..ratelimit.rules.routing import inner_app, routes_of
from ..settings.locations import redact

if TYPE_CHECKING:
    from ..embeddings.overview import CacheInForce

NOTHING_LIMITS = (
    "It has no RateLimitMiddleware, no RateLimit and no @rate_limit. Name the app that is served, with all that is "
    "wrapped around it."
)
_DEEPEST = 64  # apps within apps, and mounts within mounts; a wrapper that holds itself must not hold us


@dataclass(frozen=True, slots=True)
class LimitedPart:
    """A middleware that limits, or a route.

    Attributes:
        below: The path that it is mounted below.
        route: The path of the only route that it stands before,
            or that it is; ``None`` = all below.
        methods: Of that route; empty = all.
        protection: What a middleware limits; ``None`` for a route.
        limits: What stands before a route's endpoint.
        cache: Where a middleware that caches embeddings keeps them; it limits nothing.
    """

    below: str
    route: str | None = None
    methods: tuple[str, ...] = ()
    protection: Protection | None = None
    limits: tuple[LimitInForce, ...] = ()
    cache: "CacheInForce | None" = None

    @property
    def path(self) -> str:
        """Its path, parameters as they stand in the route."""
        return self.below + (self.route or "")

    def leads(self, method: str, path: str) -> bool:
        """Whether a request comes here, if no route before this one takes it."""
        if self.route is None:
            return _root_of(path, self.below) is not None
        return compile_path(self.path)[0].match(path) is not None and (not self.methods or method in self.methods)


class LimitedApp:
    """The limits of an app.

    Args:
        app: Any ASGI app; routers are known of Starlette and FastAPI, and of what is built on them.

    Attributes:
        found: Its middlewares that limit, from the outside in, and its routes,
            in the order in which they are tried.
        caches: Where its middlewares keep vectors.

    Raises:
        Exception: Whatever one of its middlewares raises when it is built.
    """

    def __init__(self, app: object) -> None:
        everything = list(_walk(app, "", None, 0))
        self.found = [each for each in everything if each.cache is None]
        self.caches = [each.cache for each in everything if each.cache is not None]

    @property
    def limits(self) -> list[LimitInForce]:
        """All of them."""
        limits: list[LimitInForce] = []
        for each in self.found:
            limits += _placed(each, each.protection.limits()) if each.protection is not None else each.limits
        return limits

    def limits_of(self, method: str, path: str) -> tuple[list[LimitInForce], bool]:
        """The limits of a request, and whether a middleware leaves its path alone.

        What a callable may say of it (``exempt=``, a partition or limits of ``None``) is not asked.
        """
        route = next((each for each in self.found if each.protection is None and each.leads(method, path)), None)
        limits: list[LimitInForce] = []
        is_exempt = False
        for each in self.found:
            if each.protection is None or not each.leads(method, path):
                continue
            if each.route is not None and (route is None or route.path != each.path):
                continue
            covering = each.protection.limits_of(_scope(method, path, _root_of(path, each.below) or ""))
            is_exempt |= covering is None
            limits += _placed(each, covering or ())
        # The methods of a class have limits of their own.
        limits += (
            each for each in (route.limits if route is not None else ()) if method in (each.methods or (method,))
        )
        return limits, is_exempt


def _placed(found: LimitedPart, limits: Iterable[LimitInForce]) -> list[LimitInForce]:
    """The limits of a middleware as they are seen from outside of what it is mounted in."""
    if not found.path:
        return list(limits)
    if found.route is not None:
        return [replace(limit, paths=(found.path,), methods=found.methods or limit.methods) for limit in limits]
    return [
        replace(
            limit,
            paths=tuple(found.below + path for path in limit.paths or ("/*",)),
            dialects={found.below + ("/" + path).replace("//", "/"): name for path, name in limit.dialects.items()},
        )
        for limit in limits
    ]


def _scope(method: str, path: str, root: str) -> dict[str, Any]:
    is_websocket = method == "WEBSOCKET"
    about = {"type": "websocket"} if is_websocket else {"type": "http", "method": method}
    return {**about, "path": path, "raw_path": path.encode(), "root_path": root, "query_string": b"", "headers": []}


def _root_of(path: str, below: str) -> str | None:
    """The part of *path* that mounts take as their own; ``None`` when it does not lead below them."""
    if not below:
        return ""
    match = compile_path(below + "/{path:path}")[0].match(path)
    return None if match is None else path[: len(path) - len(match["path"]) - 1]


def _walk(app: object, below: str, around: Protection | None, depth: int) -> Iterator[LimitedPart]:
    """The limits at and below an app."""
    for _ in range(_DEEPEST):
        if app is None or depth > _DEEPEST:
            return
        build = getattr(app, "build_middleware_stack", None)
        if callable(build):  # Starlette's and FastAPI's app; its router is at the stack's end
            app = getattr(app, "middleware_stack", None) or build()
            continue
        protection = _protection(app)
        if protection is not None:
            yield LimitedPart(below, protection=protection)
            around = around or protection
        yield from _cache(app, below)
        if (routes := routes_of(app)) is not None:
            # A router may have middlewares of its own, which end in a method of it.
            for middleware in _chain(getattr(app, "middleware_stack", None)):
                if (protection := _protection(middleware)) is not None:
                    yield LimitedPart(below, protection=protection)
                    around = around or protection
                yield from _cache(middleware, below)
            for route in routes:
                yield from _route(route, below, around, depth + 1)
            return
        app = inner_app(app)


def _chain(app: object) -> Iterator[object]:
    for _ in range(_DEEPEST):
        if app is None:
            return
        yield app
        app = inner_app(app)


def _protection(app: object) -> Protection | None:
    # Asked for by name: nothing but the package's front knows a middleware.
    ask = getattr(app, "in_force", None)
    found = ask() if callable(ask) else None
    return found if isinstance(found, Protection) else None


def _cache(app: object, below: str) -> Iterator[LimitedPart]:
    # What is not imported is in no app, and would bring numpy along.
    if "redis_asgi.embeddings" in sys.modules:
        from ..embeddings.overview import CacheInForce  # noqa: PLC0415

        ask = getattr(app, "in_force", None)
        found = ask() if callable(ask) else None
        if isinstance(found, CacheInForce):
            yield LimitedPart(below, cache=found)


def _route(route: Any, below: str, around: Protection | None, depth: int) -> Iterator[LimitedPart]:
    candidates = getattr(route, "effective_candidates", None)
    if callable(candidates):  # FastAPI's included router
        for candidate in candidates():
            yield from _route(candidate, below, around, depth)
        return
    # Of what another router includes, the path is here, and what stands in front of it.
    route = getattr(route, "starlette_route", None) or route
    if isinstance(route, Host):
        yield from _walk(route.app, below, around, depth)
        return
    if isinstance(route, Mount):
        yield from _walk(route.app, below + route.path, around, depth)
        # What none of its routes takes comes to no route behind it either.
        yield LimitedPart(below + route.path, "/{path:path}")
        return
    endpoint, path = getattr(route, "endpoint", None), getattr(route, "path", None)
    if endpoint is None or not isinstance(path, str):
        return
    is_http = hasattr(route, "methods")
    methods = tuple(sorted(route.methods or ())) if is_http else ("WEBSOCKET",)
    for middleware in _chain(getattr(route, "app", None)):
        if (protection := _protection(middleware)) is not None:
            yield LimitedPart(below, path, methods, protection)
            around = around or protection
        yield from _cache(middleware, below)
    depended = limits_among(calls_of(getattr(route, "dependant", None)))
    limits = [
        *limits_of_route(depended, endpoint, below + path, methods, around),
        *_decorated(endpoint, below + path, methods, around),
    ]
    yield LimitedPart(below, path, methods, limits=tuple(limits))


def _decorated(
    endpoint: object, path: str, methods: tuple[str, ...], around: Protection | None
) -> Iterator[LimitInForce]:
    """The limits that decorate an endpoint, or the methods of a class that is one."""
    if inspect.isclass(endpoint) and issubclass(endpoint, HTTPEndpoint):
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            within, placed = stack_of(getattr(endpoint, method.lower(), None))
            served = ("GET", "HEAD") if method == "GET" and not hasattr(endpoint, "head") else (method,)
            yield from limits_of_route(placed, within, path, served, around)
        return
    within, placed = stack_of(endpoint)
    yield from limits_of_route(placed, within, path, methods, around)


def load_app(name: str) -> object:
    """Import an app by ``module:attribute``, from the working directory too, as servers do.

    Args:
        name: With ``()`` behind it what is there is called, and makes the app.

    Raises:
        ConfigurationError: Says in a line what of that did not work, and where.
    """
    module_name, colon, attribute = name.partition(":")
    factory = attribute.endswith("()")
    attribute = attribute.removesuffix("()")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise ConfigurationError(
            f"--app={name!r} is not module:attribute. Try --app main:app, or --app main:make_app()."
        )
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    # What it prints is no part of a result.
    with contextlib.redirect_stdout(sys.stderr):
        with _blamed(f"importing {module_name!r}", module_name):
            module = importlib.import_module(module_name)
        app: object = module
        for part in attribute.split("."):
            if not hasattr(app, part):
                near = difflib.get_close_matches(part, dir(app), n=1)
                hint = f"Did you mean {near[0]}?" if near else "Name the variable that holds the app."
                raise ConfigurationError(f"--app={name!r}: {module_name!r} has no {attribute!r}. {hint}")
            app = getattr(app, part)
        if factory:
            with _blamed(f"calling {attribute}()"):
                app = app() if callable(app) else app
        if not callable(app) or inspect.isclass(app):
            raise ConfigurationError(f"--app={name!r} is no ASGI app but {type(app).__name__}. Name the app itself.")
        if not factory and inspect.isfunction(app) and not inspect.signature(app).parameters:
            raise ConfigurationError(f"--app={name!r} takes no request. If it makes the app: --app '{name}()'")
    return app


def limits_in(app: object) -> LimitedApp:
    """`LimitedApp` of *app*.

    Raises:
        ConfigurationError: When one of its middlewares cannot be built.
    """
    with contextlib.redirect_stdout(sys.stderr), _blamed("building the app's middlewares"):
        return LimitedApp(app)


@contextlib.contextmanager
def _blamed(doing: str, module_name: str = "") -> Iterator[None]:
    """The exception that the app's own code raises, in a line: what, and where."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigurationError(
                f"There is no module {error.name!r} in {Path.cwd()} nor among what is installed. Go to the directory "
                "that the app is started from, or set PYTHONPATH."
            ) from None
        at = _where(error)
        # What other code says may hold a secret.
        said = error.problems if isinstance(error, ConfigurationError) else (redact(str(error))[1:-1],)
        raise ConfigurationError(*(f"{doing} failed{at}: {type(error).__name__}: {each}" for each in said)) from None


def _where(error: BaseException) -> str:
    """The last line of the app's own that had a part in it;
    nothing where that is in libraries only.
    """
    if isinstance(error, SyntaxError):
        return f" at {error.filename}:{error.lineno}"
    ours = str(Path(__file__).parents[1])
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if not frame.filename.startswith(("<", ours)) and "site-packages" not in path.parts:
            return f" at {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}:{frame.lineno}"
    return ""
