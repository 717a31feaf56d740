"""What the limiter counts, with every metric's children bound once."""

import asyncio
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import Failure
from ..settings import OnRedisError
from ..telemetry import telemetry
from ..tracing import annotate_span
from .policy import Charge
from .strategies import VALUES_PER_COUNTER, Reply

if TYPE_CHECKING:
    from prometheus_client import Counter

_OUTCOMES = ("allowed", "refused", "exempt", "unavailable")
_SOURCES = ("redis", "memory", "local", "refusal_memory", "none")


class Counts:
    """The counters of one engine; all engines of a process add to the same ones.

    What a turn of the event loop brings is added up and told to the metrics once, at its end: a counter's lock, once
    per request, would cost as much as deciding it. A policy goes by the name its rule was given, whatever a callable
    makes of its limits, so that no label grows with the traffic.
    """

    def __init__(self) -> None:
        counted = telemetry()
        self._tick = counted.tick
        self._requests = {
            (outcome, source): counted.ratelimit_requests.labels(outcome, source)
            for outcome in _OUTCOMES
            for source in _SOURCES
        }
        self._waits = {source: counted.ratelimit_check_duration.labels(source) for source in ("redis", "local", "none")}
        self._policy = counted.ratelimit_policy
        self._policies: dict[str, tuple[Counter, Counter, Counter]] = {}
        self._fallback = counted.ratelimit_fallback
        self._fallbacks: dict[tuple[OnRedisError, Failure], Counter] = {}
        # Appending and popping are atomic: loops of several threads may use one engine.
        self._noted: deque[Counter] = deque()
        self._longest: dict[str, float] = {}
        self._told_by: asyncio.AbstractEventLoop | None = None

    def request(self, outcome: str, source: str) -> None:
        """Count one request, once."""
        self._note(self._requests[outcome, source])
        if "opentelemetry.trace" in sys.modules:
            annotate_span(ratelimit_decision=outcome, ratelimit_source=source)

    def waited(self, source: str, seconds: float) -> None:
        """Note how long a check took for which Redis was asked; of those that end together, the longest is told."""
        if seconds > self._longest.get(source, -1.0):
            self._longest[source] = seconds

    def fell_back(self, mode: OnRedisError, reason: Failure) -> None:
        """Count a check that Redis did not decide."""
        bound = self._fallbacks.get((mode, reason))
        if bound is None:
            bound = self._fallbacks[mode, reason] = self._fallback.labels(mode, reason.value)
        self._note(bound)

    def decided(self, charges: Sequence[Charge], reply: Reply) -> None:
        """Count what each policy of *charges* said by itself."""
        at = 1
        for charge in charges:
            for policy in charge.policies.policies:
                bound = self._bound(charge.label or policy.name)
                self._note(bound[0 if reply[at] else 2 if policy.shadow else 1])
                at += VALUES_PER_COUNTER

    def known(self, charge: Charge, policy: str) -> None:
        """Count a refusal by *policy* that was known without asking."""
        self._note(self._bound(charge.label or policy)[1])

    def _bound(self, name: str) -> "tuple[Counter, Counter, Counter]":
        bound = self._policies.get(name)
        if bound is None:
            labels = self._policy.labels
            bound = labels(name, "allowed"), labels(name, "refused"), labels(name, "shadow_refused")
            self._policies[name] = bound
        return bound

    def _note(self, counter: "Counter") -> None:
        self._noted.append(counter)
        if self._told_by is None or self._told_by.is_closed():
            self._told_by = asyncio.get_running_loop()
            self._told_by.call_soon(self._tell)

    def _tell(self) -> None:
        self._told_by = None  # first: what is noted from here on is told next time
        self._tick(time.monotonic())
        noted = self._noted
        totals: dict[Counter, int] = {}
        while noted:
            counter = noted.popleft()
            totals[counter] = totals.get(counter, 0) + 1
        for counter, total in totals.items():
            counter.inc(total)
        while self._longest:
            source, seconds = self._longest.popitem()
            self._waits[source].observe(seconds)
