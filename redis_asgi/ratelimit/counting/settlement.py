"""Settlement: the charges of one request, and the changes that its response makes to them.

A request of which nothing changes needs none; else a `Settlement` keeps what changes, and `settle`
sends the difference once, after the last body byte, or at once where the request's first verdict
has a loop to do it in.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from ..budgets.usage import UsageReader
from ..limits.charge import Charge, counters_of
from ..limits.policy import Policy

if TYPE_CHECKING:
    from .engine import Engine
    from .verdict import Verdict

# A counter of a verdict, by its number, whose charge and policy it is,
# and the units to add or (negative) to give back.
Change: TypeAlias = tuple[int, Charge, Policy, int]
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
    """Units to add to the charges of one request,
    whose first verdict is *first*, or to give back of them.

    Attributes:
        reader: Looks for what the answer has used; ``None`` before it has begun.
        spends: Whether something is known only when the answer has ended.
    """

    __slots__ = ("_booked", "_changes", "_first", "_said", "_sent", "reader", "spends")

    def __init__(self, first: "Verdict") -> None:
        self._first = first
        self._said: dict[str | None, int] = {}  # what the app says that was used, by policy
        self._booked: dict[tuple[Charge, Policy], int] = {}  # what of that was sent
        self._changes: list[tuple[int, str | None]] = []
        self._sent: dict[tuple[Verdict, int], int] = {}  # what was changed so far, by counter
        self.reader: UsageReader | None = None
        self.spends = False

    def spend(self, verdict: "Verdict") -> None:
        """Settle what *verdict*, which spends, was charged at an estimate, with the rest."""
        self.spends = True
        if self._first.loop is None:
            verdict.engine.in_flight.hold(verdict.spent)

    def used(self, units: int, policy: str | None) -> None:
        """See `RequestDecision.used`."""
        check_used(units)
        if self._first.is_over:
            raise RuntimeError("The response has ended, and its charges are settled. Say it before its last byte.")
        names = {
            name
            for verdict in self._first.all
            for _, charge in verdict.spent
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
            self._first.loop.call_soon_threadsafe(self._send, change)
        else:
            self._changes.append(change)

    @property
    def _is_degraded(self) -> bool:
        """Whether some limits may be unknown: without Redis rules that fail open decide nothing."""
        return any(verdict.source in ("none", "local") for verdict in self._first.all)

    def settle(self, status: int | None) -> None:
        """Send what changed; *status* is the response's,
        ``None`` when there was none (a disconnect stays charged).
        """
        if self.reader is not None:
            self.reader.close(complete=False)  # unless it is closed already
        for verdict in self._first.all:
            spent = verdict.spent
            if spent:
                verdict.engine.in_flight.hold(spent, -1)
            if spent or self._changes or verdict.charges.status_decides:
                verdict.engine.settle(verdict, self._due(verdict, status, self._changes, spent))

    def _send(self, change: tuple[int, str | None]) -> None:
        for verdict in self._first.all:
            self.apply(verdict, self._due(verdict, None, [change]))

    def _due(
        self,
        verdict: "Verdict",
        status: int | None,
        changes: Sequence[tuple[int, str | None]],
        spent: Sequence[tuple[int, Charge]] = (),
    ) -> list[Change]:
        """The changes to *verdict*: of what it *spent*, by the *status*, and by the app."""
        due: list[Change] = []
        charges = verdict.charges
        for start, charge in zip(charges.starts, charges, strict=True) if changes or charges.status_decides else spent:
            used = self._used(charge) if spent and charge.estimate is not None else -1
            is_free = charge.count_if is not None and status is not None and not charge.count_if(status)
            for counter, policy in enumerate(charge.policies.policies, start):
                charged = verdict.taken_by(counter, charge)
                units = 0
                if is_free:
                    units = -charged
                elif used >= 0 and charged:
                    units = (self._said_of(policy, used) if self._said else used) - charged
                for cost, name in changes:
                    if name is None or name == policy.name:
                        units += cost
                # No request gets back more than was taken, however often it asks.
                if units < 0:
                    units = max(units, -charged - self._sent.get((verdict, counter), 0))
                if units and policy.strategy != "concurrency":  # a request in flight is one, until it ends
                    due.append((counter, charge, policy, units))
        return due

    def _used(self, charge: Charge) -> int:
        """The units that the answer says of a *charge* at an estimate."""
        budget, estimate = charge.budget, charge.estimate
        said = self._said
        used: int = budget.used(estimate, self.reader, bool(said))
        budget.accuracy.note(estimate.cost, self._said_of(charge.policies.policies[0], used) if said else used)
        return used

    def _said_of(self, policy: Policy, used: int) -> int:
        """The units that the app says count for *policy*, else *used*, which the answer says."""
        return next((self._said[name] for name in (*_names(policy), None) if name in self._said), used)

    def _book(self, name: str | None, units: int) -> None:
        """Make what was charged by the policy *name* (``None``: all) *units*,
        at once: nothing sees the answer.
        """
        for verdict in self._first.all:
            found: list[Change] = []
            for at, (charge, policy) in enumerate(counters_of(verdict.charges)):
                charged = verdict.taken_by(at, charge)
                if charge.estimate is not None and charged and (name is None or name in _names(policy)):
                    delta = units - charged - self._booked.get((charge, policy), 0)
                    self._booked[charge, policy] = units - charged
                    if delta:
                        found.append((at, charge, policy, delta))
            self.apply(verdict, found)

    async def reset(self, name: str) -> bool:
        """See `RequestDecision.reset`."""
        forgot = False
        done: set[tuple[Engine, bytes]] = set()
        for verdict in self._first.all:
            engine, taken = verdict.engine, verdict.taken
            for i, (charge, policy) in enumerate(counters_of(verdict.charges)):
                partition = charge.partition
                if policy.name not in (name, f"{name}-{policy.window}s"):
                    continue
                if (engine, partition.key) not in done:
                    done.add((engine, partition.key))
                    forgot |= await engine.reset(partition, name, on_request=True)
                if forgot:
                    # Of what is forgotten nothing is given back.
                    self._sent[verdict, i] = -taken[i]
        return forgot

    def turned_down(self) -> "list[tuple[Verdict, list[Change]]]":
        """Changes to `apply` once the client has the start of an answer by which the app turns its
        request down.

        All but one unit of what is held by bodies that could not be read, unless their client has
        gone. The verdicts say so already.
        """
        found = []
        for verdict in self._first.all:
            if not verdict.charges.unread:
                continue
            back = [0] * verdict.charges.counters
            changes: list[Change] = []
            for at, (charge, policy) in enumerate(counters_of(verdict.charges)):
                if charge.unread is not None and not charge.unread.is_abandoned:
                    back[at] = max(0, verdict.taken_by(at, charge) - charge.cost)
                    if back[at]:
                        changes.append((at, charge, policy, -back[at]))
            if changes:
                verdict.show(back)
                found.append((verdict, changes))
        return found

    def apply(self, verdict: "Verdict", changes: Sequence[Change]) -> None:
        """Send *changes* of what *verdict* charged, and remember that they were."""
        for at, _, _, units in changes:
            self._sent[verdict, at] = self._sent.get((verdict, at), 0) + units
        verdict.engine.settle(verdict, changes)
