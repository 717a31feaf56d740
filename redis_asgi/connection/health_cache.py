"""One look a second at the server behind a manager, for its health checks,
its metrics and its status page together.

However many ask, one check is in flight in a process and event loop, in a task that no caller's end
cancels, and no caller waits for it longer than its deadline.
"""

import asyncio
import time

from starlette.types import Scope

from ..errors import Failure, classify
from ..settings import Settings
from ..telemetry import telemetry
from .client_factory import Client
from .health_check import DEADLINE, Checkup, Deployment, mode_of
from .manager import RedisManager
from .redis_argument import RedisArgument, offered_managers, resolve_manager
from .server_info import Health

_KEPT = 1.0  # seconds that a result is the answer
_KEPT_REFUSAL = 5.0  # a refused login stays refused, and each one is a line in the server's log
_GRACE = 0.05  # seconds after the deadline in which a check ends


class Target:
    """The Redis that a mounted part looks at.

    That of its own arguments if it was given any; else those of the middlewares that a request has
    come through; where there are none, the shared default.

    Args:
        redis: As everywhere; see `resolve_manager`.

    Attributes:
        own: The manager of the arguments, or the shared default.
        is_ours: Whether the life of *own* is the package's business.

    Raises:
        ConfigurationError: At construction, naming what cannot work.
    """

    def __init__(self, redis: RedisArgument, settings: Settings | None) -> None:
        self.own, self.is_ours = resolve_manager(redis, settings)
        self._is_given = redis is not None or settings is not None

    def managers(self, scope: Scope) -> tuple[RedisManager, ...]:
        """At least one; those of middlewares in their order, the outermost first."""
        return (self.own,) if self._is_given else offered_managers(scope) or (self.own,)


class Watch:
    """The checks of one open client: one in flight, and its result for a second."""

    def __init__(self, manager: RedisManager, client: Client) -> None:
        self._manager = manager
        self.mode: Deployment = mode_of(client)
        self._checkup = Checkup(client)
        self._last: Health | None = None
        self._last_at = 0.0
        self._flight: asyncio.Task[Health] | None = None

    async def health(self) -> Health:
        """A result that is no older than a second (a refused login: five),
        within the deadline of one check.
        """
        last = self._last
        if last is not None:
            kept = _KEPT_REFUSAL if last.failure is Failure.AUTH else _KEPT
            if time.monotonic() - self._last_at < kept:
                return last
        if self._flight is None or self._flight.done():
            self._flight = asyncio.create_task(self._fly())
        # Not awaited itself: who goes away would take it along.
        done, _ = await asyncio.wait({self._flight}, timeout=DEADLINE + _GRACE)
        for task in done:
            if not task.cancelled():
                return task.result()
        return Health(Failure.TIMEOUT)

    async def _fly(self) -> Health:
        health = self._last = await self._checkup.run(self._manager.needs)
        self._last_at = time.monotonic()
        counters = telemetry()
        outcome = "ok" if health.latency is not None else (health.failure or Failure.TIMEOUT).value
        counters.redis_commands.labels("ping", outcome).inc()
        if health.latency is not None:
            counters.redis_command_duration.labels("ping").observe(health.latency)
        return health

    async def aclose(self) -> None:
        if self._flight is not None:
            self._flight.cancel()
            await asyncio.wait({self._flight})
        await self._checkup.aclose()


async def watched(manager: RedisManager) -> tuple[Health, Deployment]:
    """The health of *manager*'s Redis; every caller in this event loop shares its checks.

    On ``memory://`` there is no server to ask, and no failure either.
    """
    if not manager.has_redis:
        return Health(), "memory"
    try:
        watch = manager.per_client(Watch)
    except Exception as error:
        # No client can be built, such as for a certificate that cannot be read:
        # the limits go on without, too.
        return Health(classify(error)), _mode_of_settings(manager.settings)
    return await watch.health(), watch.mode


def _mode_of_settings(settings: Settings) -> Deployment:
    return "cluster" if settings.REDIS_CLUSTER else "sentinel" if settings.REDIS_SENTINELS else "standalone"
