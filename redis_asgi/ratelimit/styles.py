"""`Styles`: in which dialect a middleware speaks to the client of each path."""

from collections.abc import Mapping
from typing import TypeAlias, get_args

from starlette.types import Scope

from ..asgi.paths import PathPattern
from ..errors import ConfigurationError
from ..misuse import shown
from ..settings import HeaderStyle
from ..settings.types import pattern_problem
from .answers.dialects import DIALECTS, AnswerStyle, DialectName
from .rules.checks import check_choice
from .rules.recent import Recent
from .rules.routing import Routing

# One for every path, or path patterns with the dialect of each.
Dialects: TypeAlias = DialectName | Mapping[str, DialectName]
# Each pattern with its dialect, in the order in which they are tried.
DialectPaths: TypeAlias = tuple[tuple[PathPattern, str], ...]

_EVERYWHERE = "*"
_CHOICES = get_args(DialectName)
_EXAMPLE = "{'/v1/messages': 'anthropic', '/v1/*': 'openai'}"
_KEPT = 1_000_000  # bytes, about, of paths that were asked for lately


def dialect_paths(dialect: Dialects | None) -> DialectPaths:
    """The argument *dialect*, read; ``None`` = none anywhere.

    Raises:
        ConfigurationError: Names the value, and the choices.
    """
    if dialect is None:
        return ()
    if isinstance(dialect, str):
        check_choice("dialect", dialect, _CHOICES)
        return ((PathPattern(_EVERYWHERE), dialect),)
    if not isinstance(dialect, Mapping) or not dialect:
        choices = ", ".join(_CHOICES)
        raise ConfigurationError(
            f"dialect={shown(dialect)} is none of {choices}, nor a mapping of path patterns to them. Try 'openai', or "
            f"{_EXAMPLE}."
        )
    for pattern, name in dialect.items():
        problem = pattern_problem(pattern) if isinstance(pattern, str) else f"is no path pattern. Try {_EXAMPLE}."
        if problem:
            raise ConfigurationError(f"dialect={{{shown(pattern)}: ...}}: {shown(pattern)} {problem}")
        check_choice(f"dialect[{pattern!r}]", name, _CHOICES)
    return tuple((PathPattern(pattern), name) for pattern, name in dialect.items())


class Styles:
    """The style of each path; chosen once for as long as the path is asked for.

    Args:
        paths: The first that covers a path, in whatever spelling, says its dialect.
        routing: The routers of the wrapped app, for what they may take the path for.
        body_cap: The most that is read of a request's body for the name that the client gives it,
            in bytes.
    """

    def __init__(self, paths: DialectPaths, routing: Routing, headers: HeaderStyle, body_cap: int) -> None:
        self._routing = routing
        self._elsewhere = AnswerStyle(headers)
        self._styles = tuple((pattern, AnswerStyle(headers, DIALECTS[name], body_cap)) for pattern, name in paths)
        self._by_path: Recent[tuple[str, str], AnswerStyle] = Recent(_KEPT, lambda key: 300 + 4 * len("".join(key)))

    def of(self, scope: Scope) -> AnswerStyle:
        """The style for a request."""
        key = scope["path"], scope.get("root_path", "")
        return self._by_path.young.get(key) or self._by_path.find(key, lambda _: self._choose(scope))

    def _choose(self, scope: Scope) -> AnswerStyle:
        spelled = self._routing.spellings(scope)
        return next((style for pattern, style in self._styles if pattern.covers(spelled)), self._elsewhere)
