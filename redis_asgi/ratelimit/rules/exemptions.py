"""Requests that are never counted: by path, by a callable's word,
and the pages of the package's own sub-apps.
"""

from collections.abc import Awaitable, Callable, Iterable
from inspect import isawaitable
from typing import TypeAlias

from starlette.requests import HTTPConnection
from starlette.types import Scope

from ...asgi.paths import PathPattern, path_patterns
from ...errors import ConfigurationError
from ...misuse import check_callable, shown
from ...settings import Settings
from ...settings.types import pattern_problem
from .routing import Routing

Exempt: TypeAlias = str | Iterable[str] | Callable[[HTTPConnection], bool | Awaitable[bool]]


class Exemptions:
    """The requests that one middleware leaves alone.

    Of the package's own sub-apps that is exactly the pages that they answer, and of the user's
    patterns what they cover however the path is spelled: a request is served uncounted only if that
    is what every router would say.

    Args:
        routing: The routers of the wrapped app.
        exempt: Path patterns, or a callable that is given the connection.
    """

    def __init__(self, routing: Routing, exempt: Exempt | None, settings: Settings) -> None:
        self._routing = routing
        self._paths = path_patterns(settings.RATE_LIMIT_EXEMPT_PATHS)
        self._says_so = exempt if callable(exempt) else None
        if callable(exempt) or not isinstance(exempt, Iterable | None):
            check_callable("exempt", exempt, "conn", "exempt='/internal/*', or lambda conn: 'x-probe' in conn.headers")
        else:
            for path in [exempt] if isinstance(exempt, str) else exempt or ():
                if not isinstance(path, str):
                    hint = "Try exempt=['/internal/*'], or one callable."
                    raise ConfigurationError(f"exempt holds {shown(path)}, which is no path pattern. {hint}")
                problem = pattern_problem(path)
                if problem:
                    raise ConfigurationError(f"exempt={path!r} {problem}")
                self._paths += path_patterns(path)
        self.any = True  # until `look`

    @property
    def paths(self) -> tuple[PathPattern, ...]:
        """The patterns of the user's."""
        return self._paths

    def look(self) -> None:
        """Find out whether there is *any*, once the app has all its routes."""
        self.any = bool(self._paths or self._says_so or self._routing.has_pages)

    @property
    def asks(self) -> bool:
        """Whether a callable of the user's has to be asked where the path does not say so."""
        return self._says_so is not None

    async def ask(self, scope: Scope) -> bool:
        """Whether the user's callable leaves a request alone."""
        said = self._says_so(HTTPConnection(scope)) if self._says_so is not None else False
        return bool(await said if isawaitable(said) else said)

    def cover_path(self, scope: Scope) -> bool:
        """Whether a request is left alone for its path, whatever a callable would say."""
        return self._routing.is_page(scope) or bool(self._paths and self._is_exempt_path(scope))

    def _is_exempt_path(self, scope: Scope) -> bool:
        path = self._routing.path(scope)
        if not any(pattern.matches(path) for pattern in self._paths):
            return False
        spelled = self._routing.spell(path, scope)
        return bool(spelled) and all(
            any(pattern.matches(each) or pattern.covers((each,)) for pattern in self._paths) for each in spelled
        )
