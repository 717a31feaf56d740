"""The limiter's metrics, with every metric's children bound once."""

from functools import lru_cache
from typing import TYPE_CHECKING

from ...count_buffer import Noted, Together
from ...errors import Failure
from ...settings import OnRedisError
from ...telemetry import telemetry
from ...tracing import annotate_span, may_be_traced
from ..limits.charge import Charges, counters_of
from ..limits.refusal_memory import Known
from ..limits.reply import Reply, numbers_of

if TYPE_CHECKING:
    from ...bulk_metrics import Counter

_OUTCOMES = ("allowed", "refused", "exempt", "unavailable")
_SOURCES = ("redis", "memory", "local", "refusal_memory", "none")


class LimitMetrics:
    """The counters of one engine; all engines of a process add to the same ones.

    A policy goes by the name its rule was given, whatever a callable makes of its limits, so that
    no label grows with the traffic.
    """

    def __init__(self) -> None:
        counted = telemetry()
        self._note = counted.buffer.count
        self._add = counted.buffer.add
        self._requests = {
            outcome: {source: counted.ratelimit_requests.labels(outcome, source) for source in _SOURCES}
            for outcome in _OUTCOMES
        }
        self._waits = {source: counted.ratelimit_check_duration.labels(source) for source in ("local", "none")}
        self._policy = counted.ratelimit_policy
        self._together = lru_cache(maxsize=4096)(Together)
        self._policies: dict[str, tuple[Counter, Counter, Counter]] = {}
        self._commands = counted.redis_commands
        self._settled = counted.redis_commands.labels("settle", "ok")
        self._fallback = counted.ratelimit_fallback
        self._fallbacks: dict[tuple[OnRedisError, Failure], Counter] = {}

    def policies(self, said: "Noted | None") -> None:
        """Count what the policies of a verdict *said* that is not its request's first."""
        self._note(said)

    def request(self, outcome: str, source: str, said: "Noted | None" = None) -> None:
        """Count one request, once, and with it what the policies *said*."""
        self._note(self._requests[outcome][source], said)
        if may_be_traced():
            annotate_span(ratelimit_decision=outcome, ratelimit_source=source)

    def waited(self, source: str, seconds: float) -> None:
        """Note how long a check waited for Redis, which gave no answer."""
        self._add((self._waits[source], seconds))

    def fell_back(self, mode: OnRedisError, reason: Failure) -> None:
        """Count a check that Redis did not decide."""
        bound = self._fallbacks.get((mode, reason))
        if bound is None:
            bound = self._fallbacks[mode, reason] = self._fallback.labels(mode, reason.value)
        self._note(bound)

    def settled(self, failure: Failure | None, count: int) -> None:
        """Count so many charges or refunds that were sent after their requests' answers, and what
        came of them.
        """
        self._add((self._settled if failure is None else self._commands.labels("settle", failure.value), count))

    def admission(self, charges: Charges) -> Together:
        """The counters of an admission by all policies of *charges*."""
        if charges.admission is None:
            charges.admission = self._together(tuple(self._bound(name)[0] for name in charges.names))
        admission: Together = charges.admission
        return admission

    def decided(self, charges: Charges, reply: Reply) -> None:
        """Count what each policy of *charges* said by itself."""
        for name, (_, policy), numbers in zip(charges.names, counters_of(charges), numbers_of(reply), strict=True):
            self._note(self._bound(name)[0 if numbers.fits else 2 if policy.shadow else 1])

    def refusals(self, known: Known) -> Together:
        """The counters of refusals that were *known* without asking."""
        names = (charge.label or refusal.policy.name for charge, refusal in known)
        known.counters = counted = self._together(tuple(self._bound(name)[1] for name in names))
        return counted

    def _bound(self, name: str) -> "tuple[Counter, Counter, Counter]":
        bound = self._policies.get(name)
        if bound is None:
            labels = self._policy.labels
            bound = labels(name, "allowed"), labels(name, "refused"), labels(name, "shadow_refused")
            self._policies[name] = bound
        return bound
