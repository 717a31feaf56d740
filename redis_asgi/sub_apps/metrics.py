"""`metrics_app`: what the package counts and what its Redis says,
for Prometheus or as JSON; `RedisMetrics` the last.

``/``      Prometheus text, or OpenMetrics or JSON by ``Accept``
``/json``  the same in short
"""

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from prometheus_client.exposition import choose_encoder
from starlette.requests import HTTPConnection

from .._version import __version__
from ..asgi.fields import media_type, members
from ..asgi.sub_app import Authorize, PageAnswer, SubApp, json_answer, made_by_a_call
from ..connection.client_factory import Client
from ..connection.health_cache import Target, watched
from ..connection.health_check import check
from ..connection.manager import RedisManager
from ..connection.redis_argument import RedisArgument, resolve_manager
from ..events import say
from ..misuse import constructor_says_what_was_meant
from ..settings import Settings
from ..telemetry import telemetry
from .prometheus import Families, Scrape, counted, middleware_figures, read, redis_figures

logger = logging.getLogger("redis_asgi.metrics")

_SWITCH_INTERVAL = 0.0005  # seconds

# What it says depends on what is asked for.
_VARY = ((b"vary", b"accept"),)


@constructor_says_what_was_meant("RedisMetrics(client)")
class RedisMetrics:
    """The figures of one Redis: its whole work, other apps' included.

    Args:
        client: A ``redis.asyncio`` ``Redis`` or ``RedisCluster``, or as *redis* of `metrics_app`.

    Raises:
        ConfigurationError: At construction, if *client* is something else.
    """

    def __init__(self, client: RedisArgument) -> None:
        self._manager, _ = resolve_manager(client, None)

    async def collect_metrics(self) -> dict[str, Any]:
        """Ask now, for 0.5 s at most, over a connection of its own;
        on a cluster, the sum over its primaries.

        Returns:
            ``hits``, ``misses`` and ``hit_rate`` (0.0 to 1.0; 0.0 when nothing was looked up),
            ``memory_used`` and ``peak_memory`` in bytes, ``clients``, and ``operations`` with
            ``commands_processed``, ``expired_keys`` and ``evicted_keys``. A figure that the server
            does not give is ``None``. ``{}`` when Redis, or one primary of a cluster, does not
            answer or refuses ``INFO``, and on ``memory://``.
        """
        if not self._manager.has_redis:
            return {}
        try:
            client = await self._manager.get_connection()
        except Exception:
            return {}  # no client can be built, such as for a host without an address
        health = await check(client)
        return redis_figures(health) if health.is_up and all(health.servers) else {}


class MetricsApp(SubApp):
    """The app that `metrics_app` makes."""

    def __init__(self, target: Target, authorize: Authorize | None) -> None:
        # A directory for counters that is missing is told now, not to the first scrape.
        telemetry()
        super().__init__({"": self._metrics, "/json": self._json}, authorize=authorize)
        self._target = target

    async def aclose(self) -> None:
        if self._target.is_ours:
            await self._target.own.close()

    def _manager_for(self, connection: HTTPConnection) -> RedisManager:
        """Sums over two servers would say nothing of either, so the outermost middleware's is told."""
        return self._target.managers(connection.scope)[0]

    async def _metrics(self, connection: HTTPConnection) -> PageAnswer:
        accept = ",".join(connection.headers.getlist("accept"))
        if _wants_json(accept):
            return await self._json(connection)
        manager = self._manager_for(connection)
        health, _mode = await watched(manager)
        gauges = read(manager, await _client(manager), health, version=__version__)
        encode, content_type = choose_encoder(accept)

        def text(families: Families) -> PageAnswer:
            return PageAnswer(encode(Scrape([*families, *gauges])), content_type.encode(), headers=_VARY)

        return await _with_counters(text)

    async def _json(self, connection: HTTPConnection) -> PageAnswer:
        manager = self._manager_for(connection)
        health, _mode = await watched(manager)
        about = {"version": __version__, "breaker": manager.breaker_state}

        def figures(families: Families) -> PageAnswer:
            return json_answer({**redis_figures(health), "middleware": {**about, **middleware_figures(families)}})

        return await _with_counters(figures)


async def _client(manager: RedisManager) -> Client | None:
    if not manager.has_redis:
        return None
    try:
        return await manager.get_connection()
    except Exception:
        return None  # none can be built, which the reading says already


async def _with_counters(make: Callable[[Families], PageAnswer]) -> PageAnswer:
    """Run *make* on everything counted, off the event loop:
    it takes 2 ms, or with many policies 20.
    """

    def made() -> PageAnswer:
        with _giving_way():
            return make(counted())

    try:
        return await asyncio.get_running_loop().run_in_executor(_thread(os.getpid()), made)
    except (OSError, ValueError) as error:
        # The files of several processes.
        # Less than their sum would look like counters that were reset.
        say(logger, "metrics_unreadable", error=type(error).__name__)
        return json_answer({"error": "counters_unreadable"}, status=503)


@contextmanager
def _giving_way() -> Iterator[None]:
    """Let this thread hand the interpreter over soon to who waits for it.

    By itself it does so after 5 ms, and the event loop would wait as long at every turn. The
    interval is the process's, for these milliseconds; only one thread comes here.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _SWITCH_INTERVAL))
    time.sleep(_SWITCH_INTERVAL)  # who waits already does so for the old interval
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@lru_cache(maxsize=1)
def _thread(_pid: int) -> ThreadPoolExecutor:
    """The process's own: the app's threads may all be busy when somebody looks why."""
    return ThreadPoolExecutor(1, thread_name_prefix="redis_asgi.metrics")


def _wants_json(accept: str) -> bool:
    """Whether JSON is asked for, and no format of Prometheus beside it."""
    kinds = set(map(media_type, members(accept.encode("latin-1"))))
    return b"application/json" in kinds and not kinds & {b"text/plain", b"application/openmetrics-text"}


@made_by_a_call
def metrics_app(
    *, redis: RedisArgument = None, settings: Settings | None = None, authorize: Authorize | None = None
) -> MetricsApp:
    """Make an ASGI app that shows what the package counted and what its Redis says of itself; mount
    it.

    ::

        app.mount("/metrics", metrics_app())   # a scrape asks /metrics/, a person /metrics/json

    ``/`` is Prometheus text, OpenMetrics if ``Accept`` asks for it; ``/json``, or
    ``Accept: application/json``, the figures of `RedisMetrics.collect_metrics` (``None`` where
    unknown) and a ``middleware`` block of this package's. With ``PROMETHEUS_MULTIPROC_DIR``
    counters are those of all processes together; gauges, such as the state of the breaker and the
    pool, are always those of the process that answers. Redis is asked once a second at most, health
    checks and the status page included, for 0.5 s at most, over a connection of its own.

    Args:
        redis: A ``RedisManager``, a URL or a ``redis.asyncio`` client; ``None`` = that of the
            middlewares outside, else the shared default. Of several, the outermost one's is shown.
        settings: ``None`` = from the environment.
        authorize: Given the connection, whether it may read, sync or async;
            ``False`` is a 403. ``None`` = anybody.

    Raises:
        ConfigurationError: If an argument cannot work,
            or ``PROMETHEUS_MULTIPROC_DIR`` is no writable directory.
    """
    return MetricsApp(Target(redis, settings), authorize)
