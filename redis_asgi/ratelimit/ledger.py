"""What one request has been charged, and what its response changes about that.

The app sees it as a `RequestDecision`. A request with one verdict, of which nothing changes, needs no more; else a
`Ledger` keeps what joins (per-route limits) and what changes, and `settle` sends the difference once, after the last
body byte.
"""

import asyncio
import itertools
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any

from starlette.types import Scope

from ..connection import RedisManager
from ..errors import ConfigurationError
from ..settings import HeaderStyle
from .decision import Decision, merged
from .engine import Engine, Verdict
from .headers import Fields, limit_fields
from .policy import Charge, Partition, Policy

# Where a scope keeps it, beside ``request.state.rate_limit``: a server may give all its requests one ``state``.
_DECISION = "redis_asgi.rate_limit"
# Where a scope keeps the `Standby` of a middleware that decides nothing about the request.
STANDBY = "redis_asgi.rate_limit_standby"
# Far above any quota, far below where a double loses a unit.
_MOST = 10**10


class Ledger:
    """The verdicts of one request, and what to add to or give back of them.

    Args:
        immediate: Apply each change at once: there is no middleware that would settle at the response's end.
    """

    __slots__ = ("_changes", "_loop", "_sent", "verdicts")

    def __init__(self, verdict: Verdict, *, immediate: bool = False) -> None:
        self.verdicts = [verdict]
        self._loop = asyncio.get_running_loop() if immediate else None
        self._changes: list[tuple[int, str | None]] = []
        self._sent: dict[Verdict, list[int]] = {}  # what was changed so far, per policy

    @property
    def immediate(self) -> bool:
        """Whether each change is applied at once."""
        return self._loop is not None

    def has_asked(
        self, manager: RedisManager, partition: Partition, policy: Policy, *, but_by: Engine | None = None
    ) -> bool:
        """Whether this request was put to that very limit already, by anybody but *but_by*."""
        return any(
            charge.partition.key == partition.key and policy in charge.policies
            for verdict in self.verdicts
            if verdict.engine is not but_by and verdict.engine.manager is manager
            for charge in verdict.charges
        )

    def charge(self, cost: int, policy: str | None) -> None:
        """See `RequestDecision.charge`."""
        if not isinstance(cost, int) or isinstance(cost, bool):
            raise ValueError(f"cost={cost!r} is not a whole number of units.")
        names = {p.name for verdict in self.verdicts for charge in verdict.charges for p in charge.policies}
        # Without Redis, rules that fail open decide nothing: an app that names one of them is right all the same.
        degraded = any(verdict.source in ("none", "local") for verdict in self.verdicts)
        if policy is not None and policy not in names and not degraded:
            raise ValueError(f"policy={policy!r} does not apply to this request. It is one of {sorted(names)}.")
        if self.is_over:
            raise RuntimeError("The response has ended, and its charges are settled. Charge before its last byte.")
        change = (max(-_MOST, min(cost, _MOST)), policy)
        if self._loop is not None:
            # A sync endpoint runs in a thread.
            self._loop.call_soon_threadsafe(self._send, None, [change])
        else:
            self._changes.append(change)

    @property
    def is_over(self) -> bool:
        """Whether it is settled."""
        return self.verdicts[0].is_over

    def count(self) -> None:
        """Count the request, once: as refused if one of its verdicts is, else as the first says."""
        first = self.verdicts[0]
        if not first.is_counted:
            next((verdict for verdict in self.verdicts if not verdict.allowed), first).count()
            first.is_counted = True

    def fields(self, style: HeaderStyle) -> Fields:
        """The header fields of all that was decided about the request. Do not change the list."""
        if len(self.verdicts) == 1:
            return self.verdicts[0].fields(style)
        return limit_fields(merged([verdict.decision for verdict in self.verdicts]), style)

    def settle(self, status: int | None) -> None:
        """Send what changed; *status* is the response's, ``None`` when there was none (a disconnect stays charged)."""
        if self.is_over:
            return
        self.verdicts[0].is_over = True
        self.count()
        if self._changes or any(verdict.charges.wait_and_see for verdict in self.verdicts):
            self._send(status, self._changes)

    def _send(self, status: int | None, changes: list[tuple[int, str | None]]) -> None:
        for verdict in self.verdicts:
            deltas: list[int] = []
            sent = self._sent.setdefault(verdict, [0] * verdict.charges.counters)
            taken = iter(verdict.taken)
            for charge in verdict.charges:
                free = status is not None and charge.count_if is not None and not charge.count_if(status)
                for policy in charge.policies:
                    charged = next(taken)
                    delta = sum(cost for cost, name in changes if name is None or name == policy.name)
                    # Nobody gets back more than was taken, however often they ask.
                    deltas.append(max(delta - (charged if free else 0), -charged - sent[len(deltas)]))
            if any(deltas):
                self.apply(verdict, deltas)

    async def reset(self, name: str) -> bool:
        """See `RequestDecision.reset`."""
        forgot = False
        done: set[tuple[Engine, bytes]] = set()
        for verdict in list(self.verdicts):
            engine, taken = verdict.engine, verdict.taken
            policies = [(charge.partition, policy) for charge in verdict.charges for policy in charge.policies]
            for i, (partition, policy) in enumerate(policies):
                if policy.name not in (name, f"{name}-{policy.window}s"):
                    continue
                if (engine, partition.key) not in done:
                    done.add((engine, partition.key))
                    forgot |= await engine.reset(partition, name, on_request=True)
                if forgot:
                    # Of what is forgotten nothing is given back.
                    self._sent.setdefault(verdict, [0] * len(policies))[i] = -taken[i]
        return forgot

    def turned_down(self) -> "list[tuple[Verdict, list[int]]]":
        """What to `apply` once the client has the start of an answer by which the app turns its request down.

        All but one unit of what is held by bodies that nobody could read, unless their client has gone. The verdicts
        say so already.
        """
        found = []
        for verdict in self.verdicts:
            if not verdict.charges.unread:
                continue
            taken, deltas = iter(verdict.taken), []
            for charge in verdict.charges:
                kept = charge.unread is None or charge.unread.is_abandoned
                for _ in charge.policies:
                    units = next(taken)
                    deltas.append(0 if kept else min(0, charge.cost - units))
            if any(deltas):
                verdict.show([-delta for delta in deltas])
                found.append((verdict, deltas))
        return found

    def apply(self, verdict: Verdict, deltas: Sequence[int]) -> None:
        """Send *deltas* of what *verdict* charged, and remember that they were."""
        sent = self._sent.setdefault(verdict, [0] * verdict.charges.counters)
        self._sent[verdict] = [before + now for before, now in zip(sent, deltas, strict=True)]
        verdict.engine.settle(verdict, deltas)


class RequestDecision(Decision):
    """A request's `Decision` as ``request.state.rate_limit`` has it: with a way to charge more, or less.

    ::

        limit: RequestDecision = request.state.rate_limit  # in FastAPI, an argument ``limit: CurrentLimit``
        limit.charge(tokens)

    Its fields are read from the verdicts when somebody first looks at one, so that a request whose app never does pays
    nothing for them.
    """

    __slots__ = ("says",)

    says: Verdict | Ledger

    def __init__(self, says: Verdict | Ledger) -> None:
        object.__setattr__(self, "says", says)

    @property
    def ledger(self) -> Ledger:
        """All that is known about the request; begun when somebody first asks."""
        says = self.says
        if isinstance(says, Verdict):
            says = Ledger(says)
            object.__setattr__(self, "says", says)
        return says

    def settle(self, status: int | None) -> None:
        """See `Ledger.settle`."""
        says = self.says
        if isinstance(says, Verdict) and not says.charges.wait_and_see:
            says.is_over = True
            says.count()
        else:
            self.ledger.settle(status)

    def __getattr__(self, name: str) -> Any:
        # Reached only while a field, which is a slot, is empty.
        if name not in _FIELDS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        whole = merged([verdict.decision for verdict in self.ledger.verdicts])
        for field in _FIELDS:
            object.__setattr__(self, field, getattr(whole, field))
        return getattr(whole, name)

    def join(self, verdict: Verdict) -> None:
        """Add the verdict of a per-route limit or an inner middleware."""
        self.ledger.verdicts.append(verdict)
        self._read_again()

    def turned_down(self) -> "list[tuple[Verdict, list[int]]]":
        """See `Ledger.turned_down`."""
        says = self.says
        if isinstance(says, Verdict) and not says.charges.unread:
            return []
        found = self.ledger.turned_down()
        if found:
            self._read_again()
        return found

    def _read_again(self) -> None:
        """Forget the fields that somebody has looked at."""
        for field in _FIELDS:
            with suppress(AttributeError):  # nobody has looked yet
                object.__delattr__(self, field)

    def charge(self, cost: int, policy: str | None = None) -> None:
        """Add *cost* units to what this request was charged, or give units back when it is negative.

        For what is known only later: tokens generated, bytes sent, a cache hit. May exceed the quota, up to ten times:
        a fixed window forgets the debt at its end, the other strategies pay it off. Never more is given back than the
        request was charged.

        Args:
            policy: Only this policy; ``None`` = all that apply to the request.

        Raises:
            ValueError: If *cost* is not a whole number, or *policy* does not apply to this request. One that is not
                known while Redis does not answer is passed over: it may be of a rule that fails open.
            RuntimeError: After the response's last byte.
        """
        self.ledger.charge(cost, policy)

    async def reset(self, name: str) -> bool:
        """Give the client its full quota back under *name*, such as after a login that succeeded.

        Of what this request was charged nothing remains either. Other processes may refuse the client from memory for
        up to a second more.

        Args:
            name: A rule's, or of a per-route limit its own; of several limits all are reset.

        Returns:
            Whether there was a counter to forget; ``False`` also when no limit of that name applies to this request, or
            Redis does not answer within ``RATE_LIMIT_TIMEOUT``.
        """
        return await self.ledger.reset(name)


class Standby:
    """What a middleware that decides nothing about a request leaves to the per-route limits behind it.

    Attributes:
        engine: The one to decide by.
        sees_end: Whether it writes the fields of what they decide, and settles that at the response's end; not for what
            is exempt.
        decision: That, once there is one.
    """

    __slots__ = ("decision", "engine", "sees_end")

    def __init__(self, engine: Engine, *, sees_end: bool) -> None:
        self.engine = engine
        self.sees_end = sees_end
        self.decision: RequestDecision | None = None


def decision_of(scope: Scope) -> RequestDecision | None:
    """What was decided about this very request so far; ``None`` also when its response has ended."""
    decision: RequestDecision | None = scope.get(_DECISION)
    return None if decision is None or decision.says.is_over else decision


def decided_about(scope: Scope) -> RequestDecision | None:
    """What was decided about a request, over or not."""
    decision: RequestDecision | None = scope.get(_DECISION)
    return decision


def is_over(scope: Scope) -> bool:
    """Whether what was decided about a request in this scope is settled."""
    decision = decided_about(scope)
    return decision is not None and decision.says.is_over


def check_names(decision: RequestDecision | None, charges: Iterable[Charge], *, but_by: Engine | None = None) -> None:
    """Refuse two limits of one name on one request: they would share a counter, and look like one in the fields.

    Args:
        decision: What was decided about the request so far, by anybody but *but_by*.

    Raises:
        ConfigurationError: Names them.
    """
    before = decision.ledger.verdicts if decision is not None else ()
    known = itertools.chain(*(verdict.charges for verdict in before if verdict.engine is not but_by), charges)
    named: dict[str, Policy] = {}
    for charge in known:
        for policy in charge.policies:
            other = named.setdefault(policy.name, policy)
            if other is not policy and other != policy:
                raise ConfigurationError(
                    f"name={policy.name!r} stands for two limits on one request, {_written(other)} and "
                    f"{_written(policy)}, which would share a counter. Give each its own name=."
                )


def _written(policy: Policy) -> str:
    return f"{policy.quota}/{policy.window} s by {policy.strategy}{' (shadow)' if policy.shadow else ''}"


def keep_decision(scope: Scope, decision: RequestDecision) -> None:
    """Put *decision* where the app finds it, and where `decision_of` does."""
    scope[_DECISION] = scope.setdefault("state", {})["rate_limit"] = decision


_FIELDS = tuple(field.name for field in fields(Decision))
