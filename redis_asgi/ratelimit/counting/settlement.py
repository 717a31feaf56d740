"""What one request has been charged, and what its response changes about that.

A request of which nothing changes needs none; else a `Ledger` keeps what changes, and `settle` sends the difference
once, after the last body byte, or at once where the request's first verdict has a loop to do it in.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..limits.policy import counters_of

if TYPE_CHECKING:
    from .engine import Engine
    from .verdict import Verdict

# Far above any quota, far below where a double loses a unit.
_MOST = 10**10


class Ledger:
    """What to add to the charges of one request, whose first verdict is *first*, or to give back of them."""

    __slots__ = ("_changes", "_first", "_sent")

    def __init__(self, first: "Verdict") -> None:
        self._first = first
        self._changes: list[tuple[int, str | None]] = []
        self._sent: dict[Verdict, list[int]] = {}  # what was changed so far, per policy

    def charge(self, cost: int, policy: str | None) -> None:
        """See `RequestDecision.charge`."""
        if not isinstance(cost, int) or isinstance(cost, bool):
            raise ValueError(f"cost={cost!r} is not a whole number of units.")
        verdicts = self._first.all
        policies = [p for verdict in verdicts for charge in verdict.charges for p in charge.policies]
        names = {p.name for p in policies if p.strategy != "concurrency"}
        # Without Redis, rules that fail open decide nothing: an app that names one of them is right all the same.
        degraded = any(verdict.source in ("none", "local") for verdict in verdicts)
        if policy is not None and policy not in names and not degraded:
            raise ValueError(f"policy={policy!r} does not apply to this request. It is one of {sorted(names)}.")
        if self._first.is_over:
            raise RuntimeError("The response has ended, and its charges are settled. Charge before its last byte.")
        change = (max(-_MOST, min(cost, _MOST)), policy)
        if self._first.loop is not None:
            # A sync endpoint runs in a thread.
            self._first.loop.call_soon_threadsafe(self._send, None, [change])
        else:
            self._changes.append(change)

    def settle(self, status: int | None) -> None:
        """Send what changed; *status* is the response's, ``None`` when there was none (a disconnect stays charged)."""
        if self._changes or any(verdict.charges.wait_and_see for verdict in self._first.all):
            self._send(status, self._changes)

    def _send(self, status: int | None, changes: list[tuple[int, str | None]]) -> None:
        for verdict in self._first.all:
            deltas: list[int] = []
            sent = self._sent.setdefault(verdict, [0] * verdict.charges.counters)
            taken = iter(verdict.taken)
            for charge in verdict.charges:
                free = status is not None and charge.count_if is not None and not charge.count_if(status)
                for policy in charge.policies:
                    charged = next(taken)
                    if policy.strategy == "concurrency":
                        deltas.append(0)  # a request is one, until it ends
                        continue
                    delta = sum(cost for cost, name in changes if name is None or name == policy.name)
                    # Nobody gets back more than was taken, however often they ask.
                    deltas.append(max(delta - (charged if free else 0), -charged - sent[len(deltas)]))
            if any(deltas):
                self.apply(verdict, deltas)

    async def reset(self, name: str) -> bool:
        """See `RequestDecision.reset`."""
        forgot = False
        done: set[tuple[Engine, bytes]] = set()
        for verdict in self._first.all:
            engine, taken = verdict.engine, verdict.taken
            counters = counters_of(verdict.charges)
            for i, (charge, policy) in enumerate(counters):
                partition = charge.partition
                if policy.name not in (name, f"{name}-{policy.window}s"):
                    continue
                if (engine, partition.key) not in done:
                    done.add((engine, partition.key))
                    forgot |= await engine.reset(partition, name, on_request=True)
                if forgot:
                    # Of what is forgotten nothing is given back.
                    self._sent.setdefault(verdict, [0] * len(counters))[i] = -taken[i]
        return forgot

    def turned_down(self) -> "list[tuple[Verdict, list[int]]]":
        """What to `apply` once the client has the start of an answer by which the app turns its request down.

        All but one unit of what is held by bodies that nobody could read, unless their client has gone. The verdicts
        say so already.
        """
        found = []
        for verdict in self._first.all:
            if not verdict.charges.unread:
                continue
            deltas = [
                0 if charge.unread is None or charge.unread.is_abandoned else min(0, charge.cost - units)
                for (charge, _), units in zip(counters_of(verdict.charges), verdict.taken, strict=True)
            ]
            if any(deltas):
                verdict.show([-delta for delta in deltas])
                found.append((verdict, deltas))
        return found

    def apply(self, verdict: "Verdict", deltas: Sequence[int]) -> None:
        """Send *deltas* of what *verdict* charged, and remember that they were."""
        sent = self._sent.setdefault(verdict, [0] * verdict.charges.counters)
        self._sent[verdict] = [before + now for before, now in zip(sent, deltas, strict=True)]
        verdict.engine.settle(verdict, deltas)
