"""A cache that is bounded by what it weighs, and as fast as a dictionary for what was used lately."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The values that were used lately: at least *limit* of them by weight, and at most twice that.

    When the young generation is full it becomes the old one,
    and what was in that and not used meanwhile is forgotten.

    Args:
        limit: What one generation may weigh.
        weigh: What a key and its value weigh, of the key;
            none that weighs more than a hundredth of *limit* is kept.

    Attributes:
        young: For a first look; what is not here may still be known to `find`.
    """

    __slots__ = ("_limit", "_old", "_weigh", "_weight", "young")

    def __init__(self, limit: int, weigh: Callable[[K], int]) -> None:
        self._limit = limit
        self._weigh = weigh
        self._weight = 0
        self._old: dict[K, V] = {}
        self.young: dict[K, V] = {}

    def of(self, key: K, make: Callable[[K], V]) -> V:
        """The same as `find`, whatever the value; quick for what is `young`."""
        value = self.young.get(key)
        return value if value is not None else self.find(key, make)

    def find(self, key: K, make: Callable[[K], V]) -> V:
        """The value kept of *key*, else the one that *make* makes of it."""
        value = self._old.pop(key, None)
        if value is None:
            value = make(key)
        weight = self._weigh(key)
        if weight * 100 <= self._limit:
            if self._weight + weight > self._limit:
                self._old, self.young, self._weight = self.young, {}, 0
            self.young[key] = value
            self._weight += weight
        return value
