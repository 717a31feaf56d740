"""Charges and refunds of requests that have ended: a check without a waiter,
which takes in more until it leaves.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ...errors import Failure
from ..limits.charge import Charge, Charges
from ..limits.counter import Mode
from ..transport.check import Check, Outcome

if TYPE_CHECKING:
    from .engine import Engine

_MOST = 32  # charges, all of which are made in this process when the trip fails


class SettlingCheck(Check):
    """Charges, or refunds, of requests that have ended."""

    __slots__ = ("_asked", "_each", "_engine")

    def __init__(self, engine: "Engine", loop: asyncio.AbstractEventLoop, mode: Mode, timeout: float) -> None:
        self._engine = engine
        self._each: dict[tuple[bytes, bytes], Charge] = {}
        self._asked = Charges()
        super().__init__(loop, mode, self._asked, timeout)

    @property
    def asked(self) -> Charges:
        asked, each = self._asked, self._each
        if len(asked) < len(each):
            asked = self._asked = Charges.plain([*each.values()])
        return asked

    @asked.setter
    def asked(self, charges: Charges) -> None:
        self._asked = charges

    def takes(self, charge: Charge, receipts: Iterable[int]) -> bool:
        """Take *charge*, of one policy, in,
        with the receipt of what is given back, and return whether it may.

        Each counter may stand in it once:
        what is asked together is read before any of it is written.
        """
        counter = charge.partition.key, charge.policies.policies[0].field
        each = self._each
        if counter in each or self.written or len(each) >= _MOST or self.future.done():
            return False
        each[counter] = charge
        self.receipts = (*self.receipts, *receipts)
        return True

    def split(self) -> Sequence[Check]:
        parts: dict[bytes, SettlingCheck] = {}
        for at, charge in enumerate(self._each.values()):
            part = parts.get(charge.partition.key)
            if part is None:
                part = SettlingCheck(self._engine, self.future.get_loop(), self.mode, self.timeout)
                parts[charge.partition.key] = part
            part.takes(charge, self.receipts[at : at + 1])
        return list(parts.values())

    def hear(self, outcome: Outcome) -> Outcome:
        if outcome is Failure.REPLY and self.asked.is_spread:
            # An odd key costs its own only:
            # all are read before one is written, so nothing of it ran.
            self._engine.settle_again(self.split())
        else:
            self._engine.settled(self.mode, self.asked, outcome)
        return outcome
