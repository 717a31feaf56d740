"""Scopes whose app does not answer a smaller request as the cache needs it, remembered for a minute."""

from collections import OrderedDict
from dataclasses import dataclass

_STRIKES = 2
_SECONDS = 60.0
_MAX_SCOPES = 1_000


@dataclass(slots=True)
class _Struck:
    strikes: int
    until: float


class Misfits:
    """What a call more than without the cache has taught: at most two of them a minute and scope. Bounded.

    A *scope* is everything in the key but the item, so the caller's own unless callers share.
    """

    def __init__(self) -> None:
        self._scopes: OrderedDict[bytes, _Struck] = OrderedDict()

    def strike(self, scope: bytes, now: float) -> bool:
        """Note that an answer to a shrunken request was of no use; whether that is remembered from now on.

        Args:
            scope: Its name.
            now: Monotonic seconds.
        """
        struck = self._scopes.pop(scope, None)
        if struck is None or struck.until <= now:
            struck = _Struck(0, 0.0)
        struck.strikes += 1
        struck.until = now + _SECONDS
        self._scopes[scope] = struck
        if len(self._scopes) > _MAX_SCOPES:
            self._scopes.popitem(last=False)
        return struck.strikes >= _STRIKES

    def clear(self, scope: bytes) -> None:
        """Note that one was understood."""
        if self._scopes:
            self._scopes.pop(scope, None)

    def remembers(self, scope: bytes, now: float) -> bool:
        """Whether requests of *scope* that miss something go out whole, at *now* (monotonic seconds)."""
        struck = self._scopes.get(scope)
        return struck is not None and struck.strikes >= _STRIKES and struck.until > now
