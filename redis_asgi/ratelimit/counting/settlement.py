"""Settlement: the charges of one request, and the changes that its response makes to them.

A request of which nothing changes needs none; else a `Settlement` keeps what changes, and `settle` sends the difference
once, after the last body byte, or at once where the request's first verdict has a loop to do it in.
"""

from collections.abc import Mapping, Sequence
from operator import add
from typing import TYPE_CHECKING

from ..budgets.spending import Spending
from ..budgets.usage import UsageReader
from ..limits.charge import Charge, counters_of
from ..limits.policy import Policy

if TYPE_CHECKING:
    from .engine import Engine
    from .verdict import Verdict

# Far above any quota, far below where a double loses a unit.
_MOST = 10**10


def _names(policy: Policy) -> tuple[str, str]:
    """The names of *policy*: its own and its rule's."""
    return policy.name, policy.name.removesuffix(f"-{policy.window}s")


def check_used(units: object) -> None:
    """Check that what was used is a whole number of units, 0 or more.

    Raises:
        ValueError: If it is not; ``True`` is no number.
    """
    if not isinstance(units, int) or isinstance(units, bool) or units < 0:
        raise ValueError(f"used({units!r}): not a whole number of units, 0 or more.")


class Settlement:
    """Units to add to the charges of one request, whose first verdict is *first*, or to give back of them.

    Attributes:
        reader: Looks for what the answer has used; ``None`` before it has begun.
    """

    __slots__ = ("_booked", "_changes", "_first", "_said", "_sent", "_spendings", "reader")

    def __init__(self, first: "Verdict") -> None:
        self._first = first
        self._spendings: dict[Verdict, Mapping[Charge, Spending]] = {}
        self._said: dict[str | None, int] = {}  # what the app says that was used, by policy
        self._booked: dict[tuple[Charge, Policy], int] = {}  # what of that was sent
        self._changes: list[tuple[int, str | None]] = []
        self._sent: dict[Verdict, list[int]] = {}  # what was changed so far, per policy
        self.reader: UsageReader | None = None

    @property
    def spends(self) -> bool:
        """Whether something is known only when the answer has ended."""
        return bool(self._spendings)

    def spend(self, verdict: "Verdict", spendings: Mapping[Charge, Spending]) -> None:
        """Settle *spendings*, what the cost of charges of *verdict* is to be known by, with the rest."""
        if not verdict.allowed:
            return
        # Fewer, where some rules fail open.
        mine = {charge: spendings[charge] for charge in verdict.charges if charge in spendings}
        if mine:
            self._spendings[verdict] = mine
            if self._first.loop is None:
                verdict.engine.in_flight.hold(mine)

    def used(self, units: int, policy: str | None) -> None:
        """See `RequestDecision.used`."""
        check_used(units)
        if self._first.is_over:
            raise RuntimeError("The response has ended, and its charges are settled. Say it before its last byte.")
        names = {
            name
            for spendings in self._spendings.values()
            for charge in spendings
            for each in charge.policies
            for name in _names(each)
        }
        if policy is not None and policy not in names and not self._is_degraded:
            which = f"It is one of {sorted(names)}" if names else "No rule with cost=tokens() does"
            raise ValueError(f"policy={policy!r} does not count this request in tokens. {which}.")
        units = min(units, _MOST)
        if self._first.loop is not None:
            self._first.loop.call_soon_threadsafe(self._book, policy, units)
        else:
            self._said[policy] = units

    def charge(self, cost: int, policy: str | None) -> None:
        """See `RequestDecision.charge`."""
        if not isinstance(cost, int) or isinstance(cost, bool):
            raise ValueError(f"cost={cost!r} is not a whole number of units.")
        verdicts = self._first.all
        policies = [p for verdict in verdicts for charge in verdict.charges for p in charge.policies]
        names = {p.name for p in policies if p.strategy != "concurrency"}
        if policy is not None and policy not in names and not self._is_degraded:
            raise ValueError(f"policy={policy!r} does not apply to this request. It is one of {sorted(names)}.")
        if self._first.is_over:
            raise RuntimeError("The response has ended, and its charges are settled. Charge before its last byte.")
        change = (max(-_MOST, min(cost, _MOST)), policy)
        if self._first.loop is not None:
            # A sync endpoint runs in a thread.
            self._first.loop.call_soon_threadsafe(self._send, None, [change])
        else:
            self._changes.append(change)

    @property
    def _is_degraded(self) -> bool:
        """Whether some limits may be unknown: without Redis rules that fail open decide nothing."""
        return any(verdict.source in ("none", "local") for verdict in self._first.all)

    def settle(self, status: int | None) -> None:
        """Send what changed; *status* is the response's, ``None`` when there was none (a disconnect stays charged)."""
        if self.reader is not None:
            self.reader.close(complete=False)  # unless it is closed already
        if self._changes or self._spendings or any(verdict.charges.status_decides for verdict in self._first.all):
            self._send(status, self._changes)
        for verdict, spendings in self._spendings.items():
            verdict.engine.in_flight.hold(spendings, sign=-1)

    def _send(self, status: int | None, changes: list[tuple[int, str | None]]) -> None:
        for verdict in self._first.all:
            deltas: list[int] = []
            sent = self._sent.get(verdict) or [0] * verdict.charges.counters
            spendings = self._spendings.get(verdict, {}) if self._first.loop is None else {}
            taken = iter(verdict.taken)
            for charge in verdict.charges:
                free = status is not None and charge.count_if is not None and not charge.count_if(status)
                spending = spendings.get(charge)
                if spending is None and not changes and not free:
                    for _ in charge.policies.policies:
                        next(taken)
                        deltas.append(0)
                    continue
                used = None if spending is None else spending.used(self.reader)
                for policy in charge.policies.policies:
                    charged = next(taken)
                    if policy.strategy == "concurrency":
                        deltas.append(0)  # a request is one, until it ends
                        continue
                    delta = 0
                    for cost, name in changes:
                        if name is None or name == policy.name:
                            delta += cost
                    if used is not None and charged:
                        delta += self._used_of(policy, used) - charged
                    # No request gets back more than was taken, however often it asks.
                    deltas.append(max(delta - (charged if free else 0), -charged - sent[len(deltas)]))
                if spending is not None and used is not None:
                    spending.accuracy.note(spending.estimate.cost, self._used_of(charge.policies.policies[0], used))
            if any(deltas):
                self.apply(verdict, deltas)

    def _used_of(self, policy: Policy, used: int) -> int:
        """The units that the app says count for *policy*, else *used*, which the answer says."""
        if not self._said:
            return used
        return next((self._said[name] for name in (*_names(policy), None) if name in self._said), used)

    def _book(self, name: str | None, units: int) -> None:
        """Make what was charged by the policy *name* (``None``: all) *units*, at once: nothing sees the answer."""
        for verdict, spendings in self._spendings.items():
            deltas = []
            both = zip(counters_of(verdict.charges), verdict.taken, strict=True)
            for (charge, policy), charged in both:
                delta = 0
                if charge in spendings and charged and (name is None or name in _names(policy)):
                    delta = units - charged - self._booked.get((charge, policy), 0)
                    self._booked[charge, policy] = units - charged
                deltas.append(delta)
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
        """Changes to `apply` once the client has the start of an answer by which the app turns its request down.

        All but one unit of what is held by bodies that could not be read, unless their client has gone. The verdicts
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
        sent = self._sent.get(verdict)
        self._sent[verdict] = list(deltas) if sent is None else list(map(add, sent, deltas))
        verdict.engine.settle(verdict, deltas)
