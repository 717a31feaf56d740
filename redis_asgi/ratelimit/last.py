"""What a rule goes by when its callable returns limits that nobody can read: those that it last returned."""

import logging
import threading
from collections.abc import Callable

from ..errors import ConfigurationError
from .policy import Partition, PolicySet

logger = logging.getLogger("redis_asgi.ratelimit")

# How many partitions one rule remembers; the one that changed its limits longest ago is forgotten.
MOST = 10_000


class LastLimits:
    """The last readable limits of each partition of a rule whose limits are a callable.

    A tenant's data is never an error of the app: what cannot be read is logged once, and answered by the partition's
    own last limits, else by the default ones, never by another partition's.

    Args:
        rule: Its name.
        make: Reads notation.
        default: Makes the default limits.
    """

    def __init__(self, rule: str, make: Callable[[str], PolicySet], default: Callable[[], PolicySet]) -> None:
        self._rule = rule
        self._make = make
        self._default = default
        self._last: dict[bytes, PolicySet] = {}
        self._has_said = False
        self._lock = threading.Lock()  # loops in several threads may share one rule

    def read(self, said: object, partition: Partition) -> PolicySet:
        """The policies of *partition*, for which the callable *said* this."""
        policies = self._try(said)
        if policies is None:
            return self._last.get(partition.key) or self._default()
        if self._last.get(partition.key) is not policies:
            with self._lock:
                self._last.pop(partition.key, None)
                self._last[partition.key] = policies
                if len(self._last) > MOST:
                    del self._last[next(iter(self._last))]
        return policies

    def _try(self, said: object) -> PolicySet | None:
        if not isinstance(said, str):
            self._say(f"limits are of type {type(said).__name__}, not notation or None.")
            return None
        try:
            return self._make(said)
        except ConfigurationError as error:
            self._say(str(error))
            return None

    def _say(self, why: str) -> None:
        if not self._has_said:
            self._has_said = True
            logger.warning(
                "redis_asgi.limits_unreadable",
                extra={
                    "code": "limits_unreadable",
                    "rule": self._rule,
                    "fix": f"Its callable returned limits that nobody can read: {why} Until then such a client has "
                    "its last readable limits, else the default ones.",
                },
            )
