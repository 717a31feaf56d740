"""The limits that a rule goes by when its callable returns unreadable ones: those that it last
returned.
"""

import logging
import threading
from collections.abc import Callable

from ...errors import ConfigurationError
from ...events import say
from ..limits.policy import Partition, PolicySet

logger = logging.getLogger("redis_asgi.ratelimit")

# How many partitions one rule remembers; the one that changed its limits longest ago is forgotten.
MOST = 10_000


class LastLimits:
    """The last readable limits of each partition of a rule whose limits are a callable.

    A tenant's data is never an error of the app: what cannot be read is logged once, and answered
    by the partition's own last limits, else by the default ones, never by another partition's.

    Args:
        rule: Its name.
        make: Reads notation.
        default: Makes the default limits.
        note: Told of the policies of a partition that has others than before.
    """

    def __init__(
        self,
        rule: str,
        make: Callable[[str], PolicySet],
        default: Callable[[], PolicySet],
        note: Callable[[PolicySet], None],
    ) -> None:
        self._rule = rule
        self._make = make
        self._default = default
        self._note = note
        self._last: dict[bytes, PolicySet] = {}
        self._has_said = False
        self._lock = threading.Lock()  # loops in several threads may share one rule

    def read(self, said: object, partition: Partition) -> PolicySet:
        """The policies of *partition*, for which the callable *said* this."""
        policies = self._try(said)
        if policies is None:
            return self._last.get(partition.key) or self._default()
        if self._last.get(partition.key) is not policies:
            self._note(policies)
            with self._lock:
                self._last.pop(partition.key, None)
                self._last[partition.key] = policies
                if len(self._last) > MOST:
                    del self._last[next(iter(self._last))]
        return policies

    def _try(self, said: object) -> PolicySet | None:
        if not isinstance(said, str):
            self._say(f"they are of type {type(said).__name__}, not notation or None.")
            return None
        try:
            return self._make(said)
        except ConfigurationError as error:
            # What does not even begin as a limit may be anything, such as the key of who asks.
            self._say(str(error) if said.strip()[:1].isdigit() else f"a text of {len(said)} characters is no notation.")
            return None

    def _say(self, why: str) -> None:
        if not self._has_said:
            self._has_said = True
            say(logger, "limits_unreadable", rule=self._rule, why=why.rstrip("."))
