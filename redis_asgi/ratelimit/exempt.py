"""Which requests are never counted: paths, what a callable says, and the package's own sub-apps wherever they hang."""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from inspect import isawaitable
from typing import TypeAlias

from starlette.requests import HTTPConnection
from starlette.routing import Mount
from starlette.types import ASGIApp, Scope

from ..scope import PathPattern, path_patterns, route_path
from ..settings import Settings
from ..sub_app import SubApp

Exempt: TypeAlias = str | Iterable[str] | Callable[[HTTPConnection], bool | Awaitable[bool]]

_DEEPEST = 64  # apps within apps; a wrapper that holds itself must not hold us


class Exemptions:
    """What one middleware leaves alone.

    Args:
        app: The wrapped app, whose mounts are walked at the first request.
        exempt: Path patterns, or a callable that is given the connection.
    """

    def __init__(self, app: ASGIApp, exempt: Exempt | None, settings: Settings) -> None:
        self._app = app
        self._paths = path_patterns(settings.RATE_LIMIT_EXEMPT_PATHS)
        self._says_so = exempt if callable(exempt) else None
        if not callable(exempt):
            self._paths += path_patterns(exempt)
        self._has_walked = False
        self.any = True

    async def cover(self, scope: Scope) -> bool:
        """Whether a request is left alone."""
        if not self._has_walked:
            self._has_walked = True
            self._paths += tuple(PathPattern(f"{path}/*") for path in sub_app_paths(self._app))
            self.any = bool(self._paths or self._says_so)
        if self._paths:
            path = route_path(scope)
            if any(pattern.matches(path) for pattern in self._paths):
                return True
        if self._says_so is None:
            return False
        said = self._says_so(HTTPConnection(scope))
        return bool(await said if isawaitable(said) else said)


def sub_app_paths(app: object, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """Where the package's own sub-apps are mounted below *app*, through the middlewares and routers on the way.

    Only mounts are looked at, and only for what hangs at their end; a prefix with a parameter or a ``*`` is left out.
    """
    for _ in range(_DEEPEST):
        if isinstance(app, SubApp):
            yield prefix
            return
        if isinstance(routes := getattr(app, "routes", None), list):
            for route in routes if depth < _DEEPEST else ():
                if isinstance(route, Mount) and not set(route.path) & set("{*"):
                    yield from sub_app_paths(route.app, prefix + route.path, depth + 1)
            return
        app = getattr(app, "app", None)
