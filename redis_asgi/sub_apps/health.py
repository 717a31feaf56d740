"""`health_app`: is the process alive, can it serve, and how is its Redis;
`check_redis_health` asks the last alone.

``/live``   nothing is asked; always 200
``/ready``  healthy or degraded 200, unhealthy 503
``/``       the same status, and what Redis says of itself

However many ask, at most one check a second is made (`health_cache`).
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

from starlette.requests import HTTPConnection

from ..asgi.sub_app import Authorize, PageAnswer, SubApp, json_answer, made_by_a_call
from ..connection.client_factory import Client
from ..connection.health_cache import Target, watched
from ..connection.health_check import Deployment, check, mode_of
from ..connection.manager import RedisManager
from ..connection.redis_argument import RedisArgument, refuse_sync
from ..connection.server_info import Health
from ..errors import Failure
from ..misuse import check_flag
from ..settings import Settings
from ..telemetry import telemetry

Status: TypeAlias = Literal["healthy", "degraded", "unhealthy"]

_WORSE = ("healthy", "degraded", "unhealthy")
# No PING and no INFO shows a right that the script lacks, writes that are stopped,
# or a slot that is served elsewhere.
_NOT_LOOKED_AT = frozenset((Failure.PERMISSION, Failure.READONLY, Failure.CLUSTER))


async def check_redis_health(client: Client | RedisManager) -> dict[str, Any]:
    """Ask the Redis behind *client* how it is,
    over a connection of its own, within 0.5 s; whatever becomes of it, nothing is raised.

    Args:
        client: A ``redis.asyncio`` ``Redis`` or ``RedisCluster``,
            with ``decode_responses`` or without, or a ``RedisManager``.

    Returns:
        ``status`` is ``healthy``; ``degraded`` when it answers but takes no writes, or when some of
        a cluster's nodes are gone; or ``unhealthy``, and then everything else but ``error`` is
        ``None``. ``connected_clients``, ``used_memory`` (such as ``"1.53M"``), ``last_save_time``
        (ISO 8601, UTC), ``latency_ms`` and ``mode``; ``None`` where Redis does not say. On a
        cluster: summed over its primaries, the oldest save and the slowest answer. ``error`` is
        ``None`` or a code such as ``redis_timeout``, with ``errors.Failure`` for its second word.

    Raises:
        ConfigurationError: For a sync client, and on ``memory://``.
    """
    if isinstance(client, RedisManager):
        client = await client.get_connection()
    refuse_sync("client", client)
    health = await check(client)
    if health.failure is not None and not health.partial:
        return {"status": "unhealthy", "error": code_of(health.failure), **_described(Health(), None)}
    status: Status = "healthy" if health.failure is None else "degraded"
    return {"status": status, "error": code_of(health.failure), **_described(health, mode_of(client))}


def code_of(failure: Failure | None) -> str | None:
    """A failure as health checks name it."""
    return None if failure is None else f"redis_{failure.value}"


def _described(health: Health, mode: Deployment | None) -> dict[str, Any]:
    saved = None if health.saved_at is None else datetime.fromtimestamp(health.saved_at, UTC)
    return {
        "mode": mode,
        "latency_ms": None if health.latency is None else round(health.latency * 1000, 3),
        "connected_clients": health.clients,
        "used_memory": None if health.memory is None else human_bytes(health.memory),
        "last_save_time": None if saved is None else saved.isoformat().replace("+00:00", "Z"),
    }


def human_bytes(count: float) -> str:
    """*count* bytes as Redis writes ``used_memory_human``: ``512B``, ``1.53M``."""
    if count < 1024:
        return f"{int(count)}B"
    power = min(int(math.log2(count)) // 10, 4)
    return f"{count / 1024**power:.2f}{'BKMGT'[power]}"


@dataclass(frozen=True, slots=True)
class AppHealth:
    """The answer of a health check, and its reason.

    Attributes:
        error: A code, ``None`` when all is well.
        manager: Whose Redis it is about.
        breaker: ``closed``, ``half_open`` or ``open``: open when the limits do not even ask Redis.
    """

    status: Status
    error: str | None
    breaker: str
    health: Health
    mode: Deployment
    manager: RedisManager


async def worst_standing(managers: Sequence[RedisManager], *, require_redis: bool | None = None) -> AppHealth:
    """The health of the app with the Redis that it stands worst with; of equal ones with the first.

    All are asked at the same time.
    """
    found = await asyncio.gather(*(standing(manager, require_redis=require_redis) for manager in managers))
    return max(found, key=lambda each: _WORSE.index(each.status))


async def standing(manager: RedisManager, *, require_redis: bool | None = None) -> AppHealth:
    """The health of the app with the Redis of *manager*; arguments as of `health_app`."""
    health, mode = await watched(manager)
    breaker = manager.breaker_state
    required = manager.fails_closed if require_redis is None else require_redis
    # Of these only commands are told, and a look sends none.
    known = manager.breaker_reason
    failure = health.failure or (known if known in _NOT_LOOKED_AT else None)
    error = code_of(failure) or ("breaker_open" if breaker == "open" else None)
    if error is None:
        # What is odd may be few clients' keys: no reason to send the others no requests.
        refused = manager.is_refused
        error = code_of(Failure.REPLY) if refused else None
        status: Status = "degraded" if refused else "healthy"
    elif required and not _serves_some(health):
        status = "unhealthy"
    else:
        status = "degraded"
    return AppHealth(status, error, breaker, health, mode, manager)


def _serves_some(health: Health) -> bool:
    # A cluster without one of its nodes; a replica serves nothing that charges a counter.
    return health.partial and health.failure is Failure.CLUSTER


class HealthApp(SubApp):
    """The app that `health_app` makes."""

    def __init__(self, target: Target, *, authorize: Authorize | None, require_redis: bool | None) -> None:
        pages = {"": self._overview, "/ready": self._ready, "/live": self._live}
        if require_redis is not None:
            check_flag("require_redis", require_redis)
        # A restart because of a wrong credential would help nobody.
        super().__init__(pages, authorize=authorize, open_pages=frozenset(["/live"]))
        telemetry()  # a directory for counters that is missing is told now, not to the first probe
        self._target = target
        self._require_redis = require_redis

    async def _live(self, _connection: HTTPConnection) -> PageAnswer:
        return _ALIVE

    async def _now(self, connection: HTTPConnection) -> AppHealth:
        return await worst_standing(self._target.managers(connection.scope), require_redis=self._require_redis)

    async def _ready(self, connection: HTTPConnection) -> PageAnswer:
        now = await self._now(connection)
        return _answer(now, {"status": now.status, "error": now.error})

    async def _overview(self, connection: HTTPConnection) -> PageAnswer:
        now = await self._now(connection)
        return _answer(
            now, {"status": now.status, "error": now.error, "breaker": now.breaker, **_described(now.health, now.mode)}
        )


_ALIVE = json_answer({"status": "alive"})


def _answer(now: AppHealth, body: Mapping[str, Any]) -> PageAnswer:
    return json_answer(body, status=503 if now.status == "unhealthy" else 200)


@made_by_a_call
def health_app(
    *,
    redis: RedisArgument = None,
    settings: Settings | None = None,
    authorize: Authorize | None = None,
    require_redis: bool | None = None,
) -> SubApp:
    """Probes as an ASGI app, to be mounted at ``/health``, say.

    ``/live`` asks nothing and is always 200. ``/ready`` and ``/`` send Redis a PING, and where
    limits need it a script call that does nothing, at most once a second, and answer within 0.6 s:
    ``healthy`` or ``degraded`` with 200 (Redis is gone, read-only or loading, or the breaker is
    open, and the app serves all the same), ``unhealthy`` with 503. ``/`` adds what Redis says of
    itself. Errors are codes; no host, port, user or message is shown.

    Args:
        redis: A ``RedisManager``, a URL or a ``redis.asyncio`` client; ``None`` = that of the
            middlewares outside, else the shared default. Of several, the one that the app stands
            worst with is told.
        settings: ``None`` = from the environment.
        authorize: Given the connection, whether it may read ``/ready`` and ``/``, sync or async;
            ``False`` is a 403. ``/live`` says nothing and asks no server.
        require_redis: Whether the app is ``unhealthy`` without Redis; ``None`` = whether any part
            on the same manager fails closed.

    Raises:
        ConfigurationError: At construction, naming what cannot work.
    """
    return HealthApp(Target(redis, settings), authorize=authorize, require_redis=require_redis)
