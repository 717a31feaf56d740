"""The outcome of a check: a frozen `Decision`, read from the numbers a strategy replies with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .charge import Charge, counters_of
from .policy import MICROSECONDS, Policy
from .reply import Reply, numbers_of

Source: TypeAlias = Literal["redis", "memory", "local", "none"]


@dataclass(frozen=True, slots=True)
class PolicyState:
    """One policy as one client stands to it.

    Attributes:
        name: The policy's name.
        quota: Units allowed per window, or how many requests in flight.
        window: Seconds; 0 where it is requests in flight.
        remaining: The largest cost that would be admitted now, 0 to ``quota``.
        reset: Seconds until the full quota is back; 0.0 when it is.
            Unknown of requests in flight: 1.0.
        retry_after: Seconds until the same cost is admitted next, if nobody else asks; 0.0 when it
            would be at once, ``None`` when it exceeds the quota and never can be. Unknown of
            requests in flight: 1.0.
        shadow: Whether it only watches.
        strategy: How it counts; ``concurrency`` where it is requests in flight.
    """

    name: str
    quota: int
    window: int
    remaining: int
    reset: float
    retry_after: float | None
    shadow: bool
    strategy: str


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a request may go on, and how its client stands.

    Attributes:
        allowed: Whether it was admitted; all policies were charged then, and none otherwise.
        source: Who decided: ``redis``; ``memory`` (a ``memory://`` manager); ``local`` (this
            process, while Redis does not answer); ``none`` (no engine: ``on_redis_error`` is
            ``open`` or ``closed``).
        retry_after: Seconds until it would be admitted; ``None`` when it was,
            or when its cost can never fit.
        policies: The policies asked, in order; from a remembered refusal only the violated ones.
        violated: Names of the enforcing policies that refused it.
    """

    allowed: bool
    source: Source
    retry_after: float | None = None
    policies: tuple[PolicyState, ...] = ()
    violated: tuple[str, ...] = ()

    @property
    def degraded(self) -> bool:
        """Whether Redis should have decided but did not."""
        return self.source in ("local", "none")


def policy_state(policy: Policy, remaining: int, reset: int, retry: int) -> PolicyState:
    """The state in a strategy's numbers: units, us, and us with -1 for "never"."""
    again = None if retry < 0 else retry / MICROSECONDS
    return PolicyState(
        policy.name, policy.quota, policy.window, remaining, reset / MICROSECONDS, again, policy.shadow, policy.strategy
    )


def read_reply(charges: Sequence[Charge], reply: Reply, source: Source) -> Decision:
    """The decision in a strategy's reply to *charges*."""
    states = []
    violated = []
    for (_, policy), numbers in zip(counters_of(charges), numbers_of(reply), strict=True):
        state = policy_state(policy, numbers.remaining, numbers.reset, numbers.retry)
        states.append(state)
        if not numbers.fits and not policy.shadow:
            violated.append(state)
    if reply[0]:
        return Decision(True, source, None, tuple(states))
    return refusal_of(tuple(states), violated, source)


def refusal_of(states: tuple[PolicyState, ...], violated: Sequence[PolicyState], source: Source) -> Decision:
    """A refusal by *violated*: it lasts as long as the slowest of them."""
    return Decision(False, source, _longest(violated), states, tuple(state.name for state in violated))


def _longest(refusing: "Sequence[PolicyState] | Sequence[Decision]") -> float | None:
    waits = [one.retry_after for one in refusing]
    return None if None in waits else max((wait for wait in waits if wait is not None), default=None)


def merged(decisions: Sequence[Decision]) -> Decision:
    """All decisions about a request as one: admitted if all admit, degraded if one is."""
    if len(decisions) == 1:
        return decisions[0]
    refusing = [decision for decision in decisions if not decision.allowed]
    deciding = next((decision for decision in decisions if decision.degraded), decisions[0])
    return Decision(
        not refusing,
        deciding.source,
        _longest(refusing),
        tuple(state for decision in decisions for state in decision.policies),
        tuple(name for decision in decisions for name in decision.violated),
    )
