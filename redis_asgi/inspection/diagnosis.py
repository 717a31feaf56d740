"""Findings of `redis-asgi check` about the settings and the servers behind them; nothing here
prints.

`diagnose` yields one `Finding` after the other: each says what is so and, unless all is well, what
to do. A server is the shared one, or that of ``EMBEDDING_CACHE_REDIS_URL``; a node is one primary
of a cluster.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import redis.asyncio as aioredis
from redis.exceptions import RedisError

from ..connection import side_connection
from ..connection.client_factory import Client, build_client
from ..connection.cluster_nodes import SLOTS, is_no_cluster
from ..connection.manager import RedisManager
from ..connection.sentinels import is_refusal, master_of
from ..errors import Failure, classify
from ..ratelimit.limits.charge import Charge, Charges
from ..ratelimit.limits.policy import STRATEGIES, Policy, PolicySet, make_partition
from ..ratelimit.overview import LimitInForce
from ..ratelimit.transport.batcher import A_TRIP
from ..settings import Settings
from .apps import NOTHING_LIMITS
from .batching import batch_finding
from .findings import (
    Finding,
    Info,
    cache_findings,
    client_findings,
    memory_findings,
    misspelt_findings,
    persistence_findings,
    rights_findings,
    role_findings,
    rules_findings,
    settings_finding,
    tls_findings,
    version_finding,
)
from .quotas import ask, reset
from .rights import probe_keys, rights_of, try_rights
from .servers import Server, leave, servers_of, servers_of_app
from .trouble import TROUBLE, explain, explain_refusal

if TYPE_CHECKING:
    from ..embeddings.overview import CacheInForce

OnStep = Callable[[str], None]

PINGS = 100
MAX_SKEW = 2.0  # seconds
SAMPLED_SLOTS = 20  # all of them on one of two nodes by chance: once in a million times


class Node:
    """One server process that is looked at: the only one, or a primary of a cluster."""

    def __init__(self, client: Client, server: str, target: Any = None) -> None:
        self._client = client
        self._target = target
        self.server = f"{server} {target.name}" if target is not None else server

    async def run(self, *words: Any) -> Any:
        """Run a command there; its keys must live there."""
        keyless = words[0] in ("PING", "TIME", "INFO", "ASKING", "CLUSTER INFO") or (
            words[0] == "EVALSHA" and words[2] == 0
        )
        more = {"target_nodes": self._target} if self._target is not None and keyless else {}
        return await self._client.execute_command(*words, **more)

    def holds(self, key: bytes) -> bool:
        """Whether *key* lives here."""
        if self._target is None or not isinstance(self._client, aioredis.RedisCluster):
            return True
        node = self._client.get_node_from_key(key.decode())
        return node is not None and node.name == self._target.name

    async def is_whole(self, info: Info, prefix: str) -> bool:
        """Whether all slots are here: a cluster of one node, or no cluster at all.

        Args:
            prefix: Of keys that may be read, for a node that says nothing of its cluster.
        """
        if info.get("cluster_enabled") != 1:
            return True
        try:
            said = await self.run("CLUSTER INFO")
        except RedisError:
            return await self._serves_any_slot(prefix)
        said = said if isinstance(said, dict) else dict(side_connection.info_fields(said))
        return said.get("cluster_size") == "1" and said.get("cluster_slots_ok") == str(SLOTS)

    async def _serves_any_slot(self, prefix: str) -> bool:
        for _ in range(SAMPLED_SLOTS):
            try:
                await self.run("HGET", probe_keys(prefix)[0], "check")
            except RedisError as error:
                if classify(error) is Failure.CLUSTER:
                    return False
        return True

    async def info(self) -> Info:
        """``INFO``; empty where it is forbidden."""
        try:
            found = await self.run("INFO")
        except RedisError as error:
            if classify(error) in (Failure.PERMISSION, Failure.REPLY):
                return {}
            raise
        return found if isinstance(found, dict) else {}


async def diagnose(
    settings: Settings,
    on_step: OnStep = lambda _: None,
    limits: Sequence[LimitInForce] | None = None,
    caches: Sequence["CacheInForce"] = (),
) -> AsyncIterator[Finding]:
    """Look at everything that can keep the package from working well with *settings*; never on
    ``memory://``.

    Leaves nothing behind: what is written for a trial is under a random name and taken away again.

    Args:
        settings: ``REDIS_TIMEOUT`` bounds each command.
        on_step: Told what is looked at next.
        limits: What limits an app, and with that the servers that it names;
            ``None`` = only the settings are known.
        caches: Where that app keeps vectors.
    """
    if limits is None:
        yield settings_finding(settings)
    for misspelt in misspelt_findings(settings):
        yield misspelt
    servers = servers_of(settings) if limits is None else servers_of_app(settings, limits, caches)
    for rules in rules_findings(limits, servers) if limits is not None else ():
        yield rules
    for cache in cache_findings(caches, servers):
        yield cache
    if limits is not None and not limits and not caches:
        yield Finding("rules", "warn", "nothing limits this app", NOTHING_LIMITS)
    for server in servers:
        async for finding in _look_at(server, on_step):
            yield finding


async def _look_at(server: Server, on_step: OnStep) -> AsyncIterator[Finding]:
    manager = server.manager or RedisManager(server.settings)
    try:
        async for finding in _sentinels(server, on_step):
            yield finding
            if finding.level == "fail":
                return
        on_step(f"{server.name}: connecting")
        nodes = await _connect(manager, server)
        if isinstance(nodes, Finding):
            yield nodes
            return
        where = f"{manager.address} answers"
        if server.settings.REDIS_CLUSTER:
            where += f"; {SLOTS} slots on {len(nodes)} primaries"
        yield Finding("connection", "ok", where, server=server.name)
        if is_no_cluster(await manager.get_connection()):
            text = "the server tells nothing of a cluster: all keys are taken to be at its address"
            fix = "Unset REDIS_CLUSTER, and set REDIS_BATCH=key if it is an endpoint for several shards."
            yield Finding("cluster", "warn", text, fix, server.name)
        for tls in tls_findings(server):
            yield tls
        for node in nodes:
            async for finding in _node(server, manager, node, on_step):
                yield finding
    except TROUBLE as error:
        trouble = await explain(error, server.settings)
        yield Finding("connection", "fail", f"Lost while it was looked at: {trouble.text}", trouble.fix, server.name)
    finally:
        await leave(manager)


async def _connect(manager: RedisManager, server: Server) -> "list[Node] | Finding":
    try:
        client = await manager.get_connection()
        if isinstance(client, aioredis.RedisCluster):
            await client.initialize()
            nodes = [Node(client, server.name, each) for each in client.get_primaries()]
        else:
            nodes = [Node(client, server.name)]
        for node in nodes:
            await node.run("PING")
    except TROUBLE as error:
        if classify(error) is Failure.PERMISSION and "ping" in str(error).lower():
            return nodes  # connected all the same; the rights say so
        trouble = await explain(error, server.settings)
        return Finding("connection", "fail", trouble.text, trouble.fix, server.name)
    return nodes


async def _sentinels(server: Server, on_step: OnStep) -> AsyncIterator[Finding]:
    settings = server.settings
    if not settings.REDIS_SENTINELS:
        return
    on_step(f"{server.name}: asking the sentinels")
    built = build_client(settings)
    name = settings.REDIS_SENTINEL_MASTER or ""
    asked = await asyncio.gather(*(master_of(sentinel, name) for sentinel in built.sentinels))
    answers = dict(zip(settings.REDIS_SENTINELS, asked, strict=True))
    await built.client.aclose()
    masters = {"{}:{}".format(*answer) for answer in answers.values() if isinstance(answer, tuple)}
    refusals = {each: error for each, error in answers.items() if isinstance(error, Exception) and is_refusal(error)}
    trouble = next((explain_refusal(error, settings, f"sentinel {each}") for each, error in refusals.items()), None)
    if masters and len(masters) == 1 and trouble is not None:
        text = f"master {name!r} is known, but not by: {', '.join(refusals)}; {trouble.text}"
        yield Finding("sentinels", "warn", text, trouble.fix, server.name)
    elif len(masters) > 1:
        text = f"the sentinels name different masters: {', '.join(sorted(masters))}"
        yield Finding("sentinels", "warn", text, "Wait for the failover to end and check again.", server.name)
    elif masters and any(not isinstance(answer, tuple) for answer in answers.values()):
        deaf = ", ".join(address for address, answer in answers.items() if not isinstance(answer, tuple))
        text = f"master {name!r} is known, but not to: {deaf}"
        yield Finding("sentinels", "warn", text, "Start those sentinels: a failover needs most of them.", server.name)
    elif masters:
        yield Finding("sentinels", "ok", f"all {len(answers)} know the master {name!r}", server=server.name)
    elif None in answers.values():
        text = f"the sentinels know no master {name!r} that is up"
        fix = "Set REDIS_SENTINEL_MASTER to the name they watch, and see whether it is up."
        yield Finding("sentinels", "fail", text, fix, server.name)
    elif trouble is not None:
        yield Finding("sentinels", "fail", trouble.text, trouble.fix, server.name)
    else:
        text, fix = "none of the sentinels answers", "Check REDIS_SENTINELS, and that they run and may be reached."
        yield Finding("sentinels", "fail", text, fix, server.name)


async def _node(server: Server, manager: RedisManager, node: Node, on_step: OnStep) -> AsyncIterator[Finding]:
    on_step(f"{node.server}: rights")
    rights = rights_of(server.settings, limits=server.limits, vectors=server.vectors)
    hash_key, list_key, vector_keys = probe_keys(server.settings.REDIS_KEY_PREFIX, node.holds)
    missing = await try_rights(node.run, rights, hash_key, list_key, vector_keys)
    info = await node.info()
    found = [
        version_finding(info),
        *role_findings(server, info, is_whole=await node.is_whole(info, server.settings.REDIS_KEY_PREFIX)),
        *rights_findings(server, rights, missing, info),
    ]
    on_step(f"{node.server}: script")
    if server.limits:
        found.append(await _script(manager, node))
        batch = await batch_finding(node.run, server.settings)
        found += [batch] if batch is not None else []
    on_step(f"{node.server}: latency")
    if not any(each.right == "+ping" for each in missing):
        found.append(await _latency(server, node))
    if not any(each.right == "+time" for each in missing) and server.limits:
        found.append(await _clock(node))
    found += [*memory_findings(server, info), *client_findings(server, info), *persistence_findings(info)]
    for finding in found:
        yield Finding(finding.check, finding.level, finding.text, finding.fix, node.server)


async def _script(manager: RedisManager, node: Node) -> Finding:
    prefix = manager.settings.REDIS_KEY_PREFIX
    # One policy of each kind on a partition without a client, charged and then taken away.
    rates = (Policy(f"check-{name}", 2, 60, name) for name in STRATEGIES)  # type: ignore[arg-type]  # its keys
    policies = PolicySet((*rates, Policy("check-concurrency", 2, 0, "concurrency")))
    while True:
        partition = make_partition("check", secrets.token_hex(16), prefix=prefix)
        if node.holds(partition.key):
            break
    charges = Charges((Charge(policies, partition),))
    replies, times = [], []
    for i in range(3):
        started = time.perf_counter()
        timeout = manager.settings.REDIS_TIMEOUT
        replies.append(await ask(manager, "consume", charges, timeout, holders=(b"check%d" % i,)))
        times.append(time.perf_counter() - started)
    failure = next((reply for reply in replies if isinstance(reply, Failure)), None)
    with suppress(*TROUBLE):  # it ends by itself after two minutes
        await reset(manager, partition)
    if failure is not None:
        if failure is Failure.PERMISSION:
            fix = "Grant the rights above: they count inside the script too."
        elif failure is Failure.OOM:
            fix = "Raise maxmemory, or move vectors to a server of their own with EMBEDDING_CACHE_REDIS_URL."
        elif failure in (Failure.TIMEOUT, Failure.CONNECTION):
            fix = "Something on the way lets short commands pass only."
        else:
            fix = "See what else failed: role, rights and writes."
        return Finding("script", "fail", f"did not run ({failure.value})", fix)
    # Two fit and the third does not, by any of the five; they are charged together.
    if [reply[0] for reply in replies if isinstance(reply, list)] != [1, 1, 0]:
        return Finding("script", "fail", "counts wrongly", "Is something between us and Redis, such as a proxy?")
    return Finding("script", "ok", f"loads and counts, {min(times) * 1000:.1f} ms a call")


async def _latency(server: Server, node: Node) -> Finding:
    times = []
    for _ in range(PINGS):
        started = time.perf_counter()
        await node.run("PING")
        times.append(time.perf_counter() - started)
    times.sort()
    p50, p99 = times[len(times) // 2], times[len(times) * 99 // 100 - 1]
    text = f"PING p50 {p50 * 1000:.2f} ms, p99 {p99 * 1000:.2f} ms"
    # A request waits this long at most and is then decided without Redis.
    name = "RATE_LIMIT_TIMEOUT" if server.limits else "EMBEDDING_CACHE_TIMEOUT"
    deadline: float = getattr(server.settings, name)
    if p50 >= deadline:
        fix = f"Move the app nearer to Redis, or raise {name}: most requests are decided without it."
        return Finding("latency", "fail", f"{text}, above {name} ({deadline:g} s)", fix)
    # A check that comes while others are under way waits a tenth of it before its own trip.
    if p99 >= A_TRIP * deadline:
        fix = f"Move the app nearer to Redis, look at its SLOWLOG, or raise {name}."
        return Finding("latency", "warn", f"{text}, near {name} ({deadline:g} s)", fix)
    return Finding("latency", "ok", text)


async def _clock(node: Node) -> Finding:
    best: tuple[float, float] | None = None  # round trip, skew; the shortest trip tells most
    for _ in range(5):
        before = time.time()
        seconds, micros = await node.run("TIME")
        after = time.time()
        skew = int(seconds) + int(micros) / 1e6 - (before + after) / 2
        best = min(best or (after - before, skew), (after - before, skew))
    trip, skew = best or (0.0, 0.0)
    if abs(skew) > MAX_SKEW + trip / 2:
        which = "ahead of" if skew > 0 else "behind"
        fix = "Synchronise both clocks (NTP): X-RateLimit-Reset and the age of vectors are told by this host's."
        return Finding("clock", "warn", f"Redis is {abs(skew):.1f} s {which} this host", fix)
    return Finding("clock", "ok", f"{abs(skew) * 1000:.0f} ms from this host's")
