"""What may be admitted at all, counted apart from the package."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from .asking import Answer
from .service import MODES


@dataclass
class Count:
    """What one client was answered by one limit.

    Attributes:
        redis: Admitted, and Redis decided.
        local: Admitted, and the process decided.
        none: Admitted, and nobody decided.
        refused: 429.
        unavailable: 503.
        other: Anything else, which is wrong.
        drained: Admitted by Redis afterwards, when all was well, until it refused.
    """

    redis: int = 0
    local: int = 0
    none: int = 0
    refused: int = 0
    unavailable: int = 0
    other: int = 0
    drained: int = 0

    @property
    def asked(self) -> int:
        """All of them, but those that only drained."""
        return self.redis + self.local + self.none + self.refused + self.unavailable + self.other

    @property
    def admitted(self) -> int:
        """Whoever decided."""
        return self.redis + self.local + self.none

    def note(self, status: int, source: str) -> None:
        """Count one answer."""
        name = source if status == 200 else {429: "refused", 503: "unavailable"}.get(status, "other")
        setattr(self, name, getattr(self, name) + 1)


class Ledger:
    """Every answer, by mode and client; `wrong` compares it with what is documented.

    Args:
        quota: Of each client, within a window that lasts longer than the whole test.
        divisor: ``RATE_LIMIT_FALLBACK_DIVISOR``.
        processes: That count on their own while Redis is away.
    """

    def __init__(self, quota: int, *, divisor: int = 1, processes: int = 1) -> None:
        self.quota = quota
        self.share = math.ceil(quota / divisor) * processes
        self.counts: defaultdict[tuple[str, str], Count] = defaultdict(Count)

    def note(self, mode: str, client: str, answer: Answer) -> None:
        """Count one answer."""
        self.counts[mode, client].note(answer.status, answer.headers.get("x-source", ""))

    @property
    def is_telling(self) -> bool:
        """Whether every mode has seen Redis decide, and not decide."""
        totals = {mode: self.total(mode) for mode in MODES}
        without = (totals["local"].local, totals["open"].none, totals["closed"].unavailable)
        return all(total.redis for total in totals.values()) and all(without)

    def total(self, mode: str) -> Count:
        """What all clients of *mode* were answered."""
        total = Count()
        for (of, _), count in self.counts.items():
            if of == mode:
                for name, value in vars(count).items():
                    setattr(total, name, getattr(total, name) + value)
        return total

    def wrong(self, mode: str) -> Mapping[str, Count]:
        """Clients of *mode* who were admitted, refused or charged otherwise than documented."""
        return {
            client: count for (of, client), count in self.counts.items() if of == mode and not self._fits(mode, count)
        }

    def _fits(self, mode: str, count: Count) -> bool:
        # In another mode the process may have decided this one too, but nobody is told.
        unsure = {"local": count.local + count.refused, "open": count.none, "closed": count.unavailable}[mode]
        charged = self.quota - count.drained
        return (
            count.other == 0
            # Redis never admits more than the quota, whatever became of its replies.
            and count.redis <= charged
            # What it has charged beyond that are requests whose reply was lost, each once.
            and charged <= count.redis + unsure
            and count.local <= (self.share if mode == "local" else 0)
            and (count.none == 0 or mode == "open")
            and (count.unavailable == 0 or mode == "closed")
        )


def figures(ledger: Ledger) -> str:
    """One line of what was counted."""
    parts = []
    for mode in MODES:
        total = ledger.total(mode)
        parts.append(
            f"{mode}: {total.asked} asked, {total.redis} by Redis, {total.local + total.none} without, "
            f"{total.refused} refused, {total.unavailable} unavailable"
        )
    return "; ".join(parts)
