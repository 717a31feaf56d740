"""Charges in tokens while their requests are under way:
estimated before the app is asked, settled after the answer.
"""

import logging
import threading
from collections.abc import Container, Iterable

from starlette.types import Scope

from ...asgi.scope import content_length
from ...events import say
from ...settings import Settings
from ...telemetry import telemetry
from ..limits.charge import Charge, counters_of
from .estimates import Asked, Estimate, Outputs
from .tokens import Tokens
from .usage import UsageReader

logger = logging.getLogger("redis_asgi.ratelimit")


class Accuracy:
    """The metrics of how the estimates of one rule fare."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_warned = False
        counted = telemetry()
        self._buffer = counted.buffer
        self._used = counted.ratelimit_used_units.labels(name)
        self._too_high = counted.ratelimit_estimate_error_units.labels(name, "too_high")
        self._too_low = counted.ratelimit_estimate_error_units.labels(name, "too_low")

    def note(self, estimated: int, used: int) -> None:
        """Count a request that was *estimated* to cost so many units and has *used* so many."""
        error = self._too_low if used > estimated else self._too_high
        self._buffer.add((self._used, used), (error, abs(used - estimated)))

    def warn_of(self, encoding: str | None) -> None:
        """Say once why what answers have used is not read: their *encoding*,
        or that they have no media type.
        """
        if not self._has_warned:
            self._has_warned = True
            if encoding is not None:
                say(logger, "usage_unreadable", encoding=encoding, rule=self._name)
            else:
                say(logger, "usage_undeclared", rule=self._name)


class Budget:
    """The costs of requests of one rule and bucket, in tokens, which are known after their answers.

    Attributes:
        tokens: How they are reckoned.
        accuracy: Where it is counted how good the estimates were.
    """

    __slots__ = ("_outputs", "accuracy", "tokens")

    def __init__(self, tokens: Tokens, accuracy: Accuracy) -> None:
        self.tokens = tokens
        self.accuracy = accuracy
        self._outputs = Outputs()

    def charge(self, charge: Charge, scope: Scope, asked: Asked | None, units: int | None = None) -> Charge:
        """*charge* at the estimated cost of a request.

        Args:
            asked: What its body asks for; ``None``: it cannot be read.
            units: What a callable of the user's takes it to cost.
        """
        tokens, policies = self.tokens, charge.policies
        quota = policies.least
        if units is None and type(tokens.estimate) is int:
            units = tokens.estimate
        if units is not None:
            estimate = tokens.estimated_as(units, asked, quota=quota)
        elif asked is None:
            estimate = tokens.estimated_unread(content_length(scope), quota=quota)
        else:
            estimate = tokens.estimated(asked, quota=quota, outputs=self._outputs)
        # In their order: by name they take twice as long.
        on_redis_error, label = charge.on_redis_error, charge.label
        return Charge(
            policies, charge.partition, estimate.cost, on_redis_error, None, label, None, None, self, estimate
        )

    def used(self, estimate: Estimate, reader: UsageReader | None, is_said: bool) -> int:
        """The units that a request costs after all; to be asked once.

        Args:
            reader: Of the answer, closed; ``None`` if none has begun.
            is_said: Whether the app says what it costs.
        """
        if reader is not None:
            is_unread = reader.is_undeclared or reader.unread_encoding is not None
            # A redirect, or an answer without a body, need not say what it is.
            if is_unread and not is_said and reader.status < 300 and reader.bytes_sent:
                self.accuracy.warn_of(reader.unread_encoding)
            if reader.usage is not None and reader.complete:
                self._outputs.note(reader.usage)
        return self.tokens.settled(estimate, reader)


class InFlight:
    """Units that requests of this process hold whose answers have not ended, by counter."""

    def __init__(self) -> None:
        self._held: dict[tuple[bytes, bytes], int] = {}  # by partition and policies
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    @classmethod
    def from_settings(cls, _settings: Settings) -> "InFlight":
        return cls()

    def hold(self, spent: Iterable[tuple[int, Charge]], sign: int = 1) -> None:
        """Add what is *spent* by `Charges.spent`; with a *sign* of -1 take it away again."""
        held = self._held
        with self._lock:
            for _, charge in spent:
                counted = charge.partition.key, charge.policies.spec
                units = held.get(counted, 0) + sign * charge.cost
                if units > 0:
                    held[counted] = units
                else:
                    held.pop(counted, None)

    def most_of(self, charges: Iterable[Charge], names: Container[str]) -> int:
        """The most that they hold of one of the policies of *charges* with such *names*."""
        if not self._held:
            return 0
        held = (
            self._held.get((charge.partition.key, charge.policies.spec), 0)
            for charge, policy in counters_of(charges)
            if policy.name in names
        )
        return max(held, default=0)
