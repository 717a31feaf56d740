"""Findings from the settings and a server's INFO: how well the package will work with them. No I/O."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..connection.manager import RedisManager
from ..errors import Failure
from ..ratelimit.overview import LimitInForce
from ..settings import Settings
from ..settings.locations import weakened_by
from ..settings.notation import parse_limits
from .rights import DISPENSABLE, MissingRight, Rights, user_of
from .servers import CACHE, RULES, Server

if TYPE_CHECKING:
    from ..embeddings.overview import CacheInForce

Level = Literal["ok", "warn", "fail"]
Info = Mapping[str, Any]

OLDEST_REDIS = (6, 2)
OLDEST_VALKEY = (7, 2)
_FULL = 0.9  # of maxmemory


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: What was looked at, such as ``rights``.
        level: ``ok``, ``warn`` (it works, and may surprise) or ``fail`` (something will not work).
        text: What is so.
        fix: What to do; empty when all is well.
        server: ``redis``, or ``vectors`` for ``EMBEDDING_CACHE_REDIS_URL``;
            a cluster's node as ``redis host:port``.
    """

    check: str
    level: Level
    text: str
    fix: str = ""
    server: str = ""


def settings_finding(settings: Settings) -> Finding:
    """The limits that the settings give a client."""
    limits = "; ".join(f"{limit.quota} per {limit.window} s" for limit in parse_limits(settings.default_limits))
    return Finding(
        "settings",
        "ok",
        f"{limits} by {settings.RATE_LIMIT_PARTITION}, {settings.RATE_LIMIT_STRATEGY}; "
        f"without Redis: {settings.RATE_LIMIT_ON_REDIS_ERROR}",
    )


def misspelt_findings(settings: Settings) -> list[Finding]:
    """Variables that look like settings and are none."""
    return [
        Finding("settings", "warn", f"{variable} is no setting and changes nothing", f"Is {meant} meant? Rename it.")
        for variable, meant in settings.near_misses.items()
    ]


def rules_findings(limits: Sequence[LimitInForce], servers: Sequence[Server]) -> list[Finding]:
    """The servers that an app's limits are counted on."""
    names: dict[RedisManager, list[str]] = {}
    for limit in limits:
        names.setdefault(limit.manager, []).append(limit.name)
    found = []
    for manager, its in names.items():
        listed = ", ".join(dict.fromkeys(its))
        if not manager.has_redis:
            fix = "Each worker counts for itself, and a restart forgets: give the app a Redis."
            found.append(Finding("rules", "warn", f"{listed}: counted in the app's process (memory://)", fix))
            continue
        where = manager.address
        server = next((server for server in servers if server.where == where), None)
        text = f"{listed}: counted in {where}"
        if server is not None and server.name.startswith(RULES):
            text += ", which the app names itself"
        found.append(Finding("rules", "ok", text, server=server.name if server is not None else ""))
    return found


def cache_findings(caches: Sequence["CacheInForce"], servers: Sequence[Server]) -> list[Finding]:
    """The servers that an app's caches keep vectors on."""
    found = []
    for cache in caches:
        if not cache.manager.has_redis:
            fix = "Each worker computes for itself, and a restart forgets: give the app a Redis."
            found.append(Finding("cache", "warn", "vectors: kept in the app's process (memory://)", fix))
            continue
        where = cache.manager.address
        server = next((server for server in servers if server.where == where), None)
        itself = ", which the app names itself" if server is not None and server.name.startswith((RULES, CACHE)) else ""
        text = f"vectors: kept in {where}{itself}"
        found.append(Finding("cache", "ok", text, server=server.name if server is not None else ""))
    return found


def tls_findings(server: Server) -> list[Finding]:
    """Whether the way there is safe; nothing without TLS."""
    settings = server.settings
    url = settings.REDIS_URL.get_secret_value() if settings.REDIS_URL else ""
    if not settings.is_encrypted:
        return []
    weakness = weakened_by(url)
    if weakness is not None:
        fix = "Take it out of the URL, and set REDIS_SSL_CA_CERTS to the authority's certificate."
        text = f"the URL says not to verify all of the certificate ({weakness})"
        return [Finding("tls", "warn", text, fix, server.name)]
    return [Finding("tls", "ok", "encrypted; certificate and host name verified", server=server.name)]


def version_finding(info: Info) -> Finding:
    """Whether the server is new enough."""
    valkey = info.get("valkey_version")
    name, text = ("Valkey", valkey) if valkey else ("Redis", info.get("redis_version"))
    if text is None:
        return Finding("version", "warn", "unknown: INFO is forbidden", "Allow +info: health and metrics read it.")
    numbers = tuple(int(part) for part in re.findall(r"\d+", str(text))[:2])
    oldest = OLDEST_VALKEY if valkey else OLDEST_REDIS
    if numbers < oldest:
        wanted = ".".join(map(str, oldest))
        return Finding("version", "fail", f"{name} {text} is older than {wanted}", f"Upgrade to {name} {wanted}.")
    return Finding("version", "ok", f"{name} {text}")


def role_findings(server: Server, info: Info, *, is_whole: bool = False) -> list[Finding]:
    """Whether it takes writes, and is addressed as what it is.

    Args:
        is_whole: Whether it holds all keys, though it may be a node of a cluster.
    """
    found = []
    if info.get("role") == "slave":
        fix = "Point it at the primary, or set REDIS_SENTINELS and REDIS_SENTINEL_MASTER, which follow it."
        found.append(Finding("role", "fail", "a read-only replica: nothing can be counted or stored", fix))
    elif info:
        found.append(Finding("role", "ok", "primary"))
    if info.get("cluster_enabled") == 1 and not server.settings.REDIS_CLUSTER:
        fix = "Set REDIS_CLUSTER=true."
        if is_whole:
            text = "a cluster of one node, addressed as one server: nothing is found any more once it has a second"
            found.append(Finding("cluster", "warn", text, fix))
        else:
            text = "a node of a cluster, addressed as if it were alone: most keys live elsewhere"
            found.append(Finding("cluster", "fail", text, fix))
    return found


def rights_findings(server: Server, rights: Rights, missing: Sequence[MissingRight], info: Info) -> list[Finding]:
    """The rights that `try_rights` found *missing*."""
    denied = [each.right for each in missing if each.failure is Failure.PERMISSION]
    unknown = [each.right.lstrip("+") for each in missing if each.failure is Failure.REPLY]
    # A node that is addressed as if it were alone is told about already.
    astray = Failure.CLUSTER if not server.settings.REDIS_CLUSTER else None
    others = [each for each in missing if not each.right and each.failure is not astray]
    found = []
    if denied:
        user = user_of(server.settings)
        fix = (
            f"As an administrator: ACL SETUSER {user} {' '.join(denied)}. "
            f"`redis-asgi acl --user {user}` prints all that is needed."
        )
        level: Level = "warn" if DISPENSABLE.issuperset(denied) else "fail"
        found.append(Finding("rights", level, f"missing: {' '.join(denied)}", fix))
    if unknown:
        text = f"the server does not know: {', '.join(unknown)}"
        fix = "Undo the rename-command of its configuration, or choose a server that has them."
        found.append(Finding("rights", "fail", text, fix))
    if others and info.get("role") != "slave":
        found.append(_writes(others[0]))
    if not found:
        text = f"all {len(rights.commands)} commands are allowed on {' '.join(rights.keys)}"
        found.append(Finding("rights", "ok", text))
    return found


def _writes(refused: MissingRight) -> Finding:
    fixes = {
        Failure.OOM: "Raise maxmemory, or move vectors to a server of their own with EMBEDDING_CACHE_REDIS_URL.",
        Failure.READONLY: "A snapshot fails, or replicas are missing: the server's log says which.",
        Failure.LOADING: "Wait until it has read its data from disk.",
        Failure.BUSY: "Somebody's script blocks it: SCRIPT KILL ends it.",
    }
    fix = fixes.get(refused.failure, "Check the cluster's health: CLUSTER INFO.")
    return Finding("writes", "fail", f"refused ({refused.failure.value}): {refused.text}", fix)


def memory_findings(server: Server, info: Info) -> list[Finding]:
    """Whether counters may be dropped, or writes refused, for want of memory."""
    most, policy = info.get("maxmemory"), str(info.get("maxmemory_policy", ""))
    if most is None or not policy:
        return []
    used = int(info.get("used_memory", 0))
    if not most:
        return [Finding("eviction", "ok", "maxmemory is 0: nothing is evicted")]
    found = []
    evicted = int(info.get("evicted_keys", 0))
    so_far = f"; {evicted} keys were" if evicted else ""
    if policy == "noeviction":
        found.append(Finding("eviction", "ok", f"maxmemory-policy is {policy}"))
        if used > _FULL * int(most):
            text = f"{used / int(most):.0%} of maxmemory is used, and {policy} then refuses every write"
            found.append(Finding("memory", "warn", text, "Raise maxmemory. `redis-asgi memory --live` estimates it."))
    elif server.limits:
        fix = "Set maxmemory-policy noeviction"
        fix += ", and give vectors a server of their own (EMBEDDING_CACHE_REDIS_URL)." if server.vectors else "."
        # Every counter has a TTL, so that volatile-* takes them as well as allkeys-*.
        text = f"maxmemory-policy is {policy}: a full server drops counters, and with them limits{so_far}"
        found.append(Finding("eviction", "warn", text, fix))
    else:
        found.append(Finding("eviction", "ok", f"maxmemory-policy is {policy}: vectors make room for newer ones"))
    return found


def client_findings(server: Server, info: Info) -> list[Finding]:
    """Whether one more process finds connections."""
    connected, most = info.get("connected_clients"), info.get("maxclients")
    if connected is None or most is None:
        return []
    pool = server.settings.REDIS_POOL_SIZE
    text = f"{connected} of {most} connections in use"
    if int(connected) + pool > int(most):
        fix = f"Raise maxclients, or lower REDIS_POOL_SIZE ({pool} for each process)."
        return [Finding("clients", "warn", f"{text}, too few left for one more process", fix)]
    return [Finding("clients", "ok", text)]


def persistence_findings(info: Info) -> list[Finding]:
    """Whether what is counted and stored survives a restart."""
    if "rdb_last_bgsave_status" not in info:
        return []
    if info["rdb_last_bgsave_status"] != "ok":
        fix = "Look at the server's log and disk; with stop-writes-on-bgsave-error it refuses every write meanwhile."
        return [Finding("persistence", "warn", "the last snapshot failed", fix)]
    if info.get("aof_enabled") and info.get("aof_last_write_status", "ok") != "ok":
        fix = "Look at the server's log and disk."
        return [Finding("persistence", "warn", "the append-only file cannot be written", fix)]
    at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(int(info.get("rdb_last_save_time", 0))))
    aof = "append-only file on" if info.get("aof_enabled") else "append-only file off"
    # What is lost is a limit's past and vectors that can be computed again: no fault, but good to
    # know.
    return [Finding("persistence", "ok", f"{aof}; last snapshot, or start, {at}")]
