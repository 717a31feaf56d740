"""The answers that a middleware may give in place of the app, for the app's documents."""

from dataclasses import dataclass

from ...asgi.paths import PathPattern, PathTemplate
from ...settings import HeaderStyle, Settings
from .compiled import CompiledRule


@dataclass(frozen=True, slots=True)
class Coverage:
    """The rules of one middleware and what they leave alone.

    Attributes:
        exempt: Paths that no rule covers.
        style: Of the header fields.
        dialects: Path patterns with the dialect of each; the first that covers a path counts.
    """

    rules: tuple[CompiledRule, ...]
    exempt: tuple[PathPattern, ...]
    settings: Settings
    style: HeaderStyle
    dialects: tuple[tuple[PathPattern, str], ...] = ()

    def statuses(self, method: str, own: PathTemplate, all_: tuple[PathTemplate, ...]) -> frozenset[int]:
        """The answers that it may give to requests of *method* for a route.

        Args:
            own: The route's path as the middleware's app sees it.
            all_: The same, and what else it may be.
        """
        if any(own.always_matches(pattern) for pattern in self.exempt):
            return frozenset()
        return frozenset().union(*(rule.statuses for rule in self.rules if rule.may_cover(method, all_)))

    def dialect(self, all_: tuple[PathTemplate, ...]) -> str | None:
        """The dialect in which it answers on a route; *all_* as of `statuses`."""
        covering = (name for pattern, name in self.dialects if any(path.may_match(pattern) for path in all_))
        return next(covering, None)


class Covering:
    """The base of a middleware that limits what it wraps,
    for who must not import the middleware itself.
    """

    def coverage(self) -> Coverage:
        """The answers that it may give in place of the app."""
        raise NotImplementedError
