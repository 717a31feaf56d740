"""When to leave Redis alone: after repeated failures, and after a write it had no room for."""

import asyncio
import logging

from ..errors import Failure

logger = logging.getLogger("redis_asgi.embeddings")

_FAILURES_TO_OPEN = 5
_REST = 0.5  # seconds between trials while Redis is down
_WRITE_PAUSE = 10.0  # seconds without writes after an OOM
_OPEN_AT_ONCE = (Failure.AUTH, Failure.PERMISSION)
# Our own load and odd replies say nothing about the server; OOM concerns writes only.
_NOT_COUNTED = (Failure.POOL, Failure.OOM, Failure.REPLY)


class Outage:
    """What is known about one server: one log line when it goes, one when it is back."""

    def __init__(self) -> None:
        self._clock = asyncio.get_running_loop().time
        self._failures = 0
        self._logged = False
        self._rest_until = 0.0
        self._no_writes_until = 0.0

    @property
    def resting(self) -> bool:
        """Whether to leave Redis alone now; when the rest is over, ``False`` lets exactly one caller try."""
        if not self._rest_until:
            return False
        now = self._clock()
        if now < self._rest_until:
            return True
        self._rest_until = now + _REST
        return False

    @property
    def down(self) -> bool:
        """Whether Redis was given up after repeated failures and has not answered since."""
        return self._rest_until > 0.0

    @property
    def writes_paused(self) -> bool:
        """Whether writing makes no sense now."""
        return self.down or self._clock() < self._no_writes_until

    def failed(self, failure: Failure, *, write: bool = False) -> None:
        """Note that a command gave no answer, or one that is none."""
        if write and failure in (Failure.OOM, Failure.READONLY):
            if self._clock() >= self._no_writes_until:
                logger.warning("redis_asgi.embedding_writes_paused", extra={"failure": failure.value})
            self._no_writes_until = self._clock() + _WRITE_PAUSE
            return
        if not self._logged:
            self._logged = True
            logger.warning("redis_asgi.embedding_cache_unavailable", extra={"failure": failure.value})
        if failure in _NOT_COUNTED:
            return
        self._failures += 1
        if self._failures >= _FAILURES_TO_OPEN or failure in _OPEN_AT_ONCE:
            self._rest_until = self._clock() + _REST

    def succeeded(self) -> None:
        """Note that Redis answered."""
        if self._logged:
            self._logged = False
            logger.warning("redis_asgi.embedding_cache_available")
        self._failures, self._rest_until = 0, 0.0
