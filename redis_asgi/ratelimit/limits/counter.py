"""One counter while a request is decided, and what is stored of it."""

from array import array
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from .policy import LEASE, MICROSECONDS, Policy

Mode = Literal["consume", "peek", "charge", "refund"]
# What is kept of one counter: numbers, the log of a moving window, or who is in flight.
Stored: TypeAlias = "tuple[float, ...] | Log | Leases"


class Counter:
    """One counter while a request is decided; a subclass is one strategy.

    Built from what is stored (``None`` when nothing is) without touching it; `save` gives what to
    store.

    Attributes:
        moved: Whether the stored time is in the future, which a clock that was set back leaves: it
            counts as now, what was counted stays, and what was counted then is not given back.
            `move` and `save` make it so for good.
    """

    __slots__ = ("at", "free", "moved", "quota", "receipt", "window")

    free: float
    receipt: float

    def __init__(self, policy: Policy, stored: "Stored | None", now: float) -> None:
        self.quota = float(policy.quota)
        self.window = float(policy.window * MICROSECONDS)
        self.at = now
        self.moved = False
        self.load(stored, now)

    def load(self, stored: Any, now: float) -> None:
        """Read what is stored: `free` (the largest cost admitted at *now*,
        below 0 when in debt) and `receipt`.
        """
        raise NotImplementedError

    def move(self) -> None:
        """Before anything else changes, change what lies in the future; only where `save` does not."""

    def wait(self, cost: int, now: float) -> float:
        """Time from *now* (us) until a *cost* that does not fit now, but can, is admitted."""
        raise NotImplementedError

    def charge(self, cost: int) -> None:
        """Take *cost* units, also beyond the quota, up to ten of them."""
        raise NotImplementedError

    def refund(self, cost: int, receipt: float) -> bool:
        """Give *cost* back to the charge that gave *receipt*; ``False`` when that no longer counts."""
        raise NotImplementedError

    def reset(self, now: float) -> float:
        """Time from *now* (us) until the full quota is back."""
        raise NotImplementedError

    def save(self) -> tuple[Stored, float]:
        """The value to store, and the time (us) from which it says nothing any more."""
        raise NotImplementedError


class Log:
    """The stamps of one moving window, ascending, one per unit; those before `cut` have expired."""

    __slots__ = ("last", "stamps")

    def __init__(self) -> None:
        self.last = 0.0
        self.stamps = array("d")


class Leases:
    """The requests in flight under one concurrency limit.

    Args:
        length: How long one of them is taken to be unless that is said again (us);
            infinite where its end is seen.

    Attributes:
        ends: The end of each one's lease (us), by its id.
        holders: The ids that the change at hand is about.
        last: When one was last added or renewed (us).
        label: What they are counted as.
    """

    __slots__ = ("ends", "holders", "label", "last", "length")

    def __init__(self, length: float = LEASE * MICROSECONDS, label: str = "") -> None:
        self.length = length
        self.label = label
        self.ends: dict[bytes, float] = {}
        self.holders: Sequence[bytes] = ()
        self.last = 0.0
