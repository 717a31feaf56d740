"""The parts of a scrape: the counters of this process or of all of them,
and gauges read at that moment.

Nothing here waits for anything: what Redis says of itself has been asked before (`health_cache`).
"""

import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import redis
from prometheus_client import values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from ..connection.client_factory import Client
from ..connection.manager import RedisManager
from ..connection.pool_usage import pool_usage
from ..connection.server_info import Health
from ..ratelimit.counting.local_engine import LocalEngine
from ..ratelimit.limits.refusal_memory import RefusalMemory
from ..telemetry import PREFIX, telemetry

Families: TypeAlias = list[Metric]

_BREAKER_STATES = {"closed": 0, "half_open": 1, "open": 2}

# Suffixes are redis_exporter's, so that its dashboards need another prefix only;
# INFO's name, and how primaries add up.
_SERVER_GAUGES: tuple[tuple[str, str, str, Callable[[Iterable[float]], float]], ...] = (
    ("connected_clients", "connected_clients", "Clients connected to Redis.", sum),
    ("connected_slaves", "connected_slaves", "Replicas connected to Redis.", sum),
    ("memory_used_bytes", "used_memory", "Memory that Redis has allocated.", sum),
    ("memory_used_peak_bytes", "used_memory_peak", "The most memory that Redis had allocated.", sum),
    ("memory_max_bytes", "maxmemory", "The limit of Redis' memory; 0 is none.", sum),
    ("mem_fragmentation_ratio", "mem_fragmentation_ratio", "Resident memory per allocated memory.", max),
    ("rdb_last_save_timestamp_seconds", "rdb_last_save_time", "When Redis last saved, in Unix seconds.", min),
    ("uptime_in_seconds", "uptime_in_seconds", "Seconds since Redis was started.", min),
)
_SERVER_COUNTERS = (
    ("commands_processed", "total_commands_processed", "Commands that Redis has run, for all its clients."),
    ("evicted_keys", "evicted_keys", "Keys that Redis removed to stay below maxmemory."),
    ("expired_keys", "expired_keys", "Keys whose time had come."),
    ("keyspace_hits", "keyspace_hits", "Keys that were looked up and found."),
    ("keyspace_misses", "keyspace_misses", "Keys that were looked up and not found."),
    ("rejected_connections", "rejected_connections", "Connections refused because of maxclients."),
)


class Scrape:
    """Finished families as prometheus-client's encoders take them."""

    def __init__(self, families: Families) -> None:
        self._families = families

    def collect(self) -> Families:
        return self._families


class _Files(MultiProcessCollector):
    """The counters of all processes, less files that one of them has just made and not yet begun."""

    @staticmethod
    def merge(files: list[str], accumulate: bool = True) -> Iterable[Metric]:
        merge: Callable[[list[str], bool], Iterable[Metric]] = MultiProcessCollector.merge
        try:
            return merge([each for each in files if _is_begun(each)], accumulate)
        except (RuntimeError, struct.error) as error:
            raise ValueError("A file of counters is cut off.") from error


def _is_begun(path: str) -> bool:
    with suppress(FileNotFoundError):  # one that may go is known to the reader
        return Path(path).stat().st_size > 0
    return True


def counts_in_files() -> bool:
    """Whether this process counts in ``PROMETHEUS_MULTIPROC_DIR``, beside others."""
    return values.ValueClass is not values.MutexValue


def counted() -> Families:
    """The counters and histograms of this process,
    or in multi-process mode of all of them together.

    Raises:
        OSError, ValueError: In multi-process mode, if the files cannot be read.
    """
    collector: Collector = telemetry().registry
    if counts_in_files():
        telemetry().buffer.flush()
        collector = _Files(None)  # type: ignore[no-untyped-call]  # prometheus-client's
    # The directory holds the app's own metrics too; those are the app's to show.
    return [_without_created(family) for family in collector.collect() if family.name.startswith(f"{PREFIX}_")]


def _without_created(family: Metric) -> Metric:
    """*family* without the time stamps that prometheus-client adds,
    a third of all series, that are not looked at.
    """
    family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
    return family


def read(manager: RedisManager, client: Client | None, health: Health, *, version: str) -> Families:
    """The gauges of this process and of its Redis as they are now.

    Args:
        client: The running loop's; ``None`` when there is none.
        version: The package's.
    """
    return [*_process(manager, client, health, version), *_server(_of_all(health))]


def _of_all(health: Health) -> Health:
    # Sums over some of a cluster would look to Prometheus like counters that were reset.
    return health if health.is_up else Health()


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", documentation, value=value)


def _process(manager: RedisManager, client: Client | None, health: Health, version: str) -> Iterator[Metric]:
    server = health.server if manager.has_redis else "memory"
    about = GaugeMetricFamily(
        f"{PREFIX}_build_info", "What runs here; always 1.", labels=("version", "redis_client", "server")
    )
    about.add_metric((version, redis.__version__, server), 1)
    yield about
    yield _gauge("breaker_state", "The breaker: 0 closed, 1 half open, 2 open.", _BREAKER_STATES[manager.breaker_state])
    yield _gauge(
        "ratelimit_local_partitions",
        "Clients counted in this process.",
        len(manager.per_process(LocalEngine.from_settings)),
    )
    yield _gauge(
        "ratelimit_local_partitions_max",
        "The most clients that are counted in this process.",
        manager.settings.RATE_LIMIT_LOCAL_MAX_PARTITIONS,
    )
    yield _gauge(
        "ratelimit_remembered_refusals",
        "Clients this process refuses without asking Redis.",
        len(manager.per_process(RefusalMemory.from_settings)),
    )
    in_flight = GaugeMetricFamily(
        f"{PREFIX}_ratelimit_in_flight",
        "Requests of this process that are in flight under a concurrency limit.",
        labels=("policy",),
    )
    for policy, number in manager.per_process(LocalEngine.from_settings).in_flight().items():
        in_flight.add_metric((policy,), number)
    yield in_flight
    if manager.has_redis:
        yield _gauge("redis_up", "Whether Redis answered a PING in time.", health.is_up)
        connections = GaugeMetricFamily(
            f"{PREFIX}_redis_pool_connections", "Connections of this process's pool.", labels=("state",)
        )
        pool = None if client is None else pool_usage(client)
        if pool is not None:
            for state, number in (("in_use", pool.in_use), ("idle", pool.idle), ("max", pool.most)):
                connections.add_metric((state,), number)
        yield connections


def _server(health: Health) -> Iterator[Metric]:
    for suffix, field, documentation, combine in _SERVER_GAUGES:
        number = health.number(field, combine)
        if number is not None:
            yield _gauge(f"server_{suffix}", documentation, number)
    for suffix, field, documentation in _SERVER_COUNTERS:
        total = health.number(field)
        if total is not None:
            yield CounterMetricFamily(f"{PREFIX}_server_{suffix}", documentation, value=total)


def redis_figures(health: Health) -> dict[str, Any]:
    """The ``INFO`` of a server about its whole work, other apps' included;
    memory in bytes, ``None`` = not known.

    ``hit_rate`` is hits per lookup, 0.0 when there were none.
    """
    health = _of_all(health)
    hits, misses = health.count("keyspace_hits"), health.count("keyspace_misses")
    return {
        "hits": hits,
        "misses": misses,
        "hit_rate": None if hits is None or misses is None else _ratio(hits, hits + misses),
        "memory_used": health.count("used_memory"),
        "peak_memory": health.count("used_memory_peak"),
        "clients": health.count("connected_clients"),
        "operations": {
            "commands_processed": health.count("total_commands_processed"),
            "expired_keys": health.count("expired_keys"),
            "evicted_keys": health.count("evicted_keys"),
        },
    }


def middleware_figures(families: Families) -> dict[str, Any]:
    """The counts of the package itself, for people and scripts rather than for Prometheus."""
    sums: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    policies: dict[str, dict[str, int]] = {}
    for sample in (sample for family in families for sample in family.samples):
        name = sample.name.removeprefix(f"{PREFIX}_").removesuffix("_total")
        if name == "ratelimit_policy":
            outcomes = policies.setdefault(sample.labels["policy"], {"allowed": 0, "refused": 0, "shadow_refused": 0})
            outcomes[sample.labels["outcome"]] += int(sample.value)
        else:
            sums[name][sample.labels.get("outcome") or sample.labels.get("result") or ""] += int(sample.value)
    requests, inputs = sums["ratelimit_requests"], sums["cache_items"]
    return {
        "ratelimit": {
            **{outcome: requests[outcome] for outcome in ("allowed", "refused", "exempt", "unavailable")},
            "fallbacks": sums["ratelimit_fallback"][""],
            "policies": policies,
        },
        "cache": {
            "requests": {
                result: sums["cache_requests"][result]
                for result in ("hit", "partial", "miss", "stale", "bypass", "error")
            },
            "inputs": {result: inputs[result] for result in ("hit", "miss", "collapsed")},
            "hit_rate": _ratio(inputs["hit"], inputs["hit"] + inputs["miss"]),
            **{name: sums[f"cache_{name}"][""] for name in ("saved_tokens", "stored_bytes", "served_bytes")},
        },
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
