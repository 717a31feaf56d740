"""Scopes whose app does not answer a smaller request as the cache needs it, remembered for a
minute.
"""

from collections import OrderedDict
from dataclasses import dataclass

_STRIKES = 2
_SECONDS = 60.0
_MAX_SCOPES = 1_000


@dataclass(slots=True)
class _Struck:
    strikes: int
    lasting: int  # of them
    until: float


class Misfits:
    """Lessons of calls that the app would not have had without the cache:
    after two, none for a minute. Bounded.

    A *scope* is everything in the key but the item, so the caller's own unless callers share, and
    the representation asked for, of which an app may refuse one.
    """

    def __init__(self) -> None:
        self._scopes: OrderedDict[bytes, _Struck] = OrderedDict()

    def strike(self, scope: bytes, now: float, *, lasting: bool = False) -> bool:
        """Note that an answer to a shrunken request was of no use;
        whether that is remembered from now on.

        Args:
            scope: Its name.
            now: Monotonic seconds.
            lasting: Whether an understood answer says nothing against it, as where models take
                turns.
        """
        struck = self._scopes.pop(scope, None)
        if struck is None or struck.until <= now:
            struck = _Struck(0, 0, 0.0)
        struck.strikes += 1
        struck.lasting += lasting
        struck.until = now + _SECONDS
        self._scopes[scope] = struck
        if len(self._scopes) > _MAX_SCOPES:
            self._scopes.popitem(last=False)
        return struck.strikes >= _STRIKES

    def clear(self, scope: bytes) -> None:
        """Note that one was understood."""
        struck = self._scopes.get(scope) if self._scopes else None
        if struck is None:
            return
        struck.strikes = struck.lasting
        if not struck.lasting:
            self._scopes.pop(scope, None)

    def remembers(self, scope: bytes, now: float) -> bool:
        """Whether requests of *scope* that miss something go out whole, at *now* (monotonic
        seconds).
        """
        struck = self._scopes.get(scope)
        return struck is not None and struck.strikes >= _STRIKES and struck.until > now
