"""The offers of the middlewares that a request has come through, to its limits and to the app."""

from typing import Any

from starlette.types import Scope

from .scope import Addressing

# Where a scope keeps the `Offer`: nothing that a client sends becomes a key of the scope itself.
OFFER = "redis_asgi.offer"


class Offer:
    """The offer of one middleware, the same for all its requests: one entry of a scope. Immutable.

    Attributes:
        managers: The managers of Redis, the outermost one's first; no two the same.
        addressing: Whose addresses are believed; ``None`` = no limit has said so.
        style: In which style a limiter answers; ``None`` = there is none outside.
    """

    __slots__ = ("_joined", "addressing", "managers", "style")

    def __init__(self, *managers: Any, addressing: Addressing | None = None, style: Any = None) -> None:
        self.managers: tuple[Any, ...] = managers
        self.addressing = addressing
        self.style = style
        self._joined: tuple[Offer, Offer] | None = None  # what was outside last, and both

    def below(self, outer: "Offer | None") -> "Offer":
        """This one within *outer*: its own addressing,
        and the style that all of an answer has been given outside.
        """
        if outer is None:
            return self
        known = self._joined
        if known is None or known[0] is not outer:
            joined = Offer(
                *outer.managers,
                *(manager for manager in self.managers if manager not in outer.managers),
                addressing=self.addressing or outer.addressing,
                style=outer.style or self.style,
            )
            known = self._joined = outer, joined
        return known[1]

    def in_style(self, style: Any) -> "Offer":
        """The same with another *style*."""
        return Offer(*self.managers, addressing=self.addressing, style=style)


def offer_of(scope: Scope) -> Offer | None:
    """What is offered to a request here."""
    offer: Offer | None = scope.get(OFFER)
    return offer
