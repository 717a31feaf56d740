"""`RequestDecision`: what the app finds as ``request.state.rate_limit``, and where the scope keeps
it.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import lru_cache
from typing import Any

from starlette.types import Scope

from ...connection.manager import RedisManager
from ...errors import ConfigurationError
from ...event_loop import running_loop
from ...misuse import Uncalled
from ..counting.engine import Engine
from ..counting.settlement import Change, Settlement
from ..counting.verdict import Verdict
from ..limits.charge import Charges
from ..limits.decision import Decision, merged
from ..limits.policy import Partition, Policy, PolicySet

# Where a scope keeps it, beside ``request.state.rate_limit``:
# a server may give all its requests one ``state``.
_DECISION = "redis_asgi.rate_limit"
# Where a scope keeps the `Undecided` of a middleware that decides nothing about the request.
STANDBY = "redis_asgi.rate_limit_standby"


class RequestDecision(Decision):
    """A request's `Decision` as ``request.state.rate_limit`` has it:
    with a way to charge more, or less.

    ::

        limit: RequestDecision = request.state.rate_limit  # in FastAPI, an argument ``limit: CurrentLimit``
        limit.charge(tokens)

    Its fields are read from the verdicts at the first look at one, so that a request whose app
    never does pays nothing for them.
    """

    __slots__ = ("first",)

    first: Verdict

    # Where FastAPI takes it for a body, which no client sends.
    __get_pydantic_core_schema__ = Uncalled(
        "RequestDecision is what no request holds. Write limit: CurrentLimit, or take request.state.rate_limit."
    ).__get_pydantic_core_schema__

    # It is made for each request: `keep_decision` gives it its verdict,
    # in half the time of a method in Python.
    __init__ = object.__init__

    @property
    def ledger(self) -> Settlement:
        """The changes that the response makes to the request's charges."""
        return self.first.open_ledger()

    @property
    def verdicts(self) -> Sequence[Verdict]:
        """The decisions on the request, one by one."""
        return self.first.all

    @property
    def immediate(self) -> bool:
        """Whether nothing sees the response's end, so that each change is applied at once."""
        return self.first.loop is not None

    def has_asked(
        self, manager: RedisManager, partition: Partition, policy: Policy, *, but_by: Engine | None = None
    ) -> bool:
        """Whether this request was put to that very limit already, by any engine but *but_by*."""
        return any(
            charge.partition.key == partition.key and policy in charge.policies
            for verdict in self.verdicts
            if verdict.engine is not but_by and verdict.engine.manager is manager
            for charge in verdict.charges
        )

    def __getattr__(self, name: str) -> Any:
        # Reached only while a field, which is a slot, is empty.
        if name not in _FIELDS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        whole = merged([verdict.decision for verdict in self.verdicts])
        for field in _FIELDS:
            object.__setattr__(self, field, getattr(whole, field))
        return getattr(whole, name)

    def join(self, verdict: Verdict) -> None:
        """Add the verdict of a per-route limit or an inner middleware."""
        self.first.more = (*self.first.more, verdict)
        self.first.needs_end |= verdict.needs_end
        if verdict.slot is not None:
            self.first.open_ledger()
        verdict.engine.counts.policies(verdict.uncounted)
        self._read_again()

    def turned_down(self) -> "list[tuple[Verdict, list[Change]]]":
        """See `Settlement.turned_down`."""
        if not any(verdict.charges.unread for verdict in self.verdicts):
            return []
        found = self.ledger.turned_down()
        if found:
            self._read_again()
        return found

    def _read_again(self) -> None:
        """Forget the fields that were looked at."""
        with suppress(AttributeError):  # there was no look yet
            for field in _FIELDS:
                object.__delattr__(self, field)

    def charge(self, cost: int, policy: str | None = None) -> None:
        """Add *cost* units to what this request was charged,
        or give units back when it is negative.

        For what is known only later: tokens generated, bytes sent, a cache hit. May exceed the
        quota, up to ten times: a fixed window forgets the debt at its end, the other strategies pay
        it off. Never more is given back than the request was charged.

        Args:
            policy: Only this policy; ``None`` = all that apply to the request.

        Raises:
            ValueError: If *cost* is not a whole number, or *policy* does not apply to this request.
                One that is not known while Redis does not answer is passed over: it may be of a
                rule that fails open.
            RuntimeError: After the response's last byte.
        """
        self.ledger.charge(cost, policy)

    def used(self, units: int, policy: str | None = None) -> None:
        """Say what this request has used of its budgets in tokens,
        in place of what its answer says.

        For what no answer says, and for what the app knows better.
        Said several times, the last one counts.

        Args:
            units: Of the quota, in all, 0 or more; no weights are applied.
            policy: Only this policy, or rule;
                ``None`` = all whose ``cost`` is `tokens`, of which there may be none.

        Raises:
            ValueError: If *units* is not a whole number, 0 or more,
                or *policy* does not count this request in tokens.
            RuntimeError: After the response's last byte.
        """
        self.ledger.used(units, policy)

    async def reset(self, name: str) -> bool:
        """Give the client its full quota back under *name*, such as after a login that succeeded.

        Of what this request was charged nothing remains either. Other processes may refuse the
        client from memory for up to a second more.

        Args:
            name: A rule's, or of a per-route limit its own; of several limits all are reset.

        Returns:
            Whether there was a counter to forget; ``False`` also when no limit of that name applies
            to this request, or Redis does not answer within ``RATE_LIMIT_TIMEOUT``.
        """
        return await self.ledger.reset(name)


class Undecided:
    """A request that a middleware decides nothing about,
    as it leaves it to the per-route limits behind it.

    Attributes:
        engine: The one to decide by.
        sees_end: Whether it writes the fields of what they decide, and settles that at the
            response's end; not for what is exempt.
        decision: That, once there is one.
    """

    __slots__ = ("decision", "engine", "sees_end")

    def __init__(self, engine: Engine, *, sees_end: bool) -> None:
        self.engine = engine
        self.sees_end = sees_end
        self.decision: RequestDecision | None = None


def decision_of(scope: Scope) -> RequestDecision | None:
    """The decision on this very request so far; ``None`` also when its response has ended."""
    decision: RequestDecision | None = scope.get(_DECISION)
    return None if decision is None or decision.first.is_over else decision


def decided_about(scope: Scope) -> RequestDecision | None:
    """The decision on a request, over or not."""
    decision: RequestDecision | None = scope.get(_DECISION)
    return decision


def is_over(scope: Scope) -> bool:
    """Whether what was decided about a request in this scope is settled."""
    decision = decided_about(scope)
    return decision is not None and decision.first.is_over


def check_names(decision: RequestDecision | None, asking: Iterable[Charges], *, but_by: Engine | None = None) -> bool:
    """Refuse two limits of one name on one request: they would share a counter,
    and look like one in the fields.

    Args:
        decision: What was decided about the request so far, by any engine but *but_by*.

    Returns:
        Whether some name stands twice, both times for the same.

    Raises:
        ConfigurationError: Names them.
    """
    before = decision.verdicts if decision is not None else ()
    known = [verdict.charges.sets for verdict in before if verdict.engine is not but_by]
    return _has_twice((*known, *(charges.sets for charges in asking)))


@lru_cache(maxsize=4096)
def _has_twice(known: tuple[tuple[PolicySet, ...], ...]) -> bool:
    named: dict[str, Policy] = {}
    policies = [policy for sets in known for policies in sets for policy in policies]
    for policy in policies:
        other = named.setdefault(policy.name, policy)
        if other != policy:
            raise ConfigurationError(
                f"name={policy.name!r} stands for two limits on one request, {_written(other)} and "
                f"{_written(policy)}, which would share a counter. Give each its own name=."
            )
    return len(named) < len(policies)


def _written(policy: Policy) -> str:
    quota = f"{policy.quota}/{policy.window} s" if policy.window else f"{policy.quota} in flight"
    return f"{quota} by {policy.strategy}{' (shadow)' if policy.shadow else ''}"


def keep_decision(scope: Scope, first: Verdict) -> RequestDecision:
    """The decision that begins with a verdict,
    put where the app finds it, and where `decision_of` does.
    """
    decision: RequestDecision = RequestDecision()
    _set_first(decision, first)
    scope[_DECISION] = scope.setdefault("state", {})["rate_limit"] = decision
    return decision


def put_decision(scope: Scope, decision: RequestDecision) -> None:
    """Put *decision*, of another request, where `keep_decision` puts one."""
    scope[_DECISION] = scope.setdefault("state", {})["rate_limit"] = decision


def begin_decision(scope: Scope, verdict: Verdict) -> RequestDecision:
    """The decision of a request about which a middleware has said nothing."""
    decision = keep_decision(scope, verdict)
    standby: Undecided | None = scope.get(STANDBY)
    if standby is not None and standby.sees_end:
        standby.decision = decision
    else:
        verdict.loop = running_loop()
        verdict.count()
    return decision


_set_first: Callable[[RequestDecision, Verdict], None] = vars(RequestDecision)["first"].__set__  # a slot
_FIELDS = tuple(field.name for field in fields(Decision))
