"""A look at the server behind a client: one PING,
with INFO beside it, over a connection of its own.

A PING takes less than what the package does,
so a command that it cannot do without may be sent along.

The connection is none of the pool's, so that a pool in which everything waits or hangs is no reason
to be called ill, and a check that hangs holds nothing that a request would need. Whatever happens,
a check ends by its deadline.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import NoneType
from typing import Any, Literal, TypeAlias

import redis.asyncio as aioredis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.exceptions import ResponseError

from ..errors import Failure, OddReply, classify, is_unknown_command
from . import side_connection
from .client_factory import Client
from .cluster_nodes import SLOTS
from .server_info import Health

Deployment: TypeAlias = Literal["standalone", "sentinel", "cluster", "memory"]
NodeAddress: TypeAlias = tuple[str, int]
Command: TypeAlias = tuple[bytes, ...]

DEADLINE = 0.5  # seconds for connecting and every reply together
_ALONE: NodeAddress = ("", 0)  # there is but one server, whatever its address is now


@dataclass(slots=True)
class _Report:
    """The replies of one server, filled in as they arrive."""

    address: NodeAddress
    failure: Failure | None = None
    latency: float | None = None
    reused: bool = False  # over a connection from an earlier check
    refused: Failure | None = None  # why it does not take the command that is needed
    about: Mapping[str, str] = field(default_factory=dict)  # INFO
    cluster: Mapping[str, str] = field(default_factory=dict)  # CLUSTER INFO
    slots: Mapping[NodeAddress, int] | None = None  # how many each primary serves, as this node sees it


async def check(client: Client) -> Health:
    """Look once, now; never raises but for a cancellation, and leaves no connection."""
    checkup = Checkup(client)
    try:
        return await checkup.run()
    finally:
        await checkup.aclose()


class Checkup:
    """Checks one client's server or servers, and keeps the connections from one check to the next.

    Not for concurrent checks; its holder closes it, in the same event loop.
    """

    def __init__(self, client: Client, *, deadline: float = DEADLINE) -> None:
        self._client = client
        self._deadline = deadline
        self._needs: Command = ()
        self._connections: dict[NodeAddress, AbstractConnection] = {}

    async def run(self, needs: Command = ()) -> Health:
        """Look once more; never raises but for a cancellation.

        Args:
            needs: A command that the server has to take,
                and which may be neither denied nor renamed; empty = none.
        """
        self._needs = needs
        until = asyncio.get_running_loop().time() + self._deadline
        try:
            health, is_stale = await self._look(until)
            if is_stale and asyncio.get_running_loop().time() < until:
                # Over an old connection: the server may have restarted since, or handed its role
                # on.
                await self.aclose()
                health, _ = await self._look(until)
        except Exception as error:
            # A client of the user's may have any state; whatever it raises, there is no answer.
            return Health(classify(error))
        return health

    async def aclose(self) -> None:
        """Close the connections; the next check opens new ones."""
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            await side_connection.hang_up(connection)
        await asyncio.sleep(0)  # in which the loop closes the sockets

    async def _look(self, until: float) -> tuple[Health, bool]:
        """The health found, and whether a connection of an earlier check is to blame for it."""
        if isinstance(self._client, aioredis.RedisCluster):
            reports = await self._ask_cluster(self._client, until)
            is_stale = any(report.reused and report.failure is not None for report in reports)
            return _health_of_cluster(reports), is_stale
        report = await self._ask(_ALONE, self._client.connection_pool.make_connection, ((b"INFO",),), until)
        health = _health_of_server(report)
        return health, report.reused and health.failure is not None

    async def _ask(self, address: NodeAddress, connect: Any, more: Sequence[Command], until: float) -> _Report:
        """PING, *more* and what is needed, in one write;
        what went wrong before the PONG is the report's failure.
        """
        report = _Report(address)
        connection = self._connections.pop(address, None)
        report.reused = connection is not None
        if connection is None:
            connection = connect()
        try:
            async with asyncio.timeout_at(until):
                if not report.reused:
                    await side_connection.connect(connection)
                started = time.monotonic()
                await side_connection.ping(connection, *more, *filter(None, [self._needs]))
                report.latency = time.monotonic() - started
                await _read_more(connection, len(more), report)
                if self._needs:
                    report.refused = await _refusal(connection)
        except BaseException as error:
            await side_connection.hang_up(connection)
            if not isinstance(error, Exception):
                raise
            # Once it has answered the PING, only what it says of itself is missing.
            report.failure = classify(error) if report.latency is None or isinstance(error, OddReply) else None
        else:
            self._connections[address] = connection
        return report

    async def _ask_cluster(self, client: aioredis.RedisCluster, until: float) -> list[_Report]:
        """Ask every primary the client knows, and every primary that those name;
        only if none answers, the others.
        """
        nodes = client.nodes_manager
        known = {(str(n.host), int(n.port)): n for n in (*nodes.startup_nodes.values(), *nodes.nodes_cache.values())}
        pattern = next(iter(known.values()))
        current = (nodes.nodes_cache or nodes.startup_nodes).values()
        primaries = {(str(n.host), int(n.port)) for n in current if n.server_type != "replica"}
        more = ((b"INFO",), (b"CLUSTER", b"INFO"), (b"CLUSTER", b"SLOTS"))
        reports: list[_Report] = []
        seen: set[NodeAddress] = set()
        waiting: set[asyncio.Task[_Report]] = set()

        def ask(addresses: Iterable[NodeAddress]) -> None:
            for address in set(addresses) - seen:
                seen.add(address)
                where = {"host": address[0], "port": address[1]}
                connect = partial(pattern.connection_class, **{**pattern.connection_kwargs, **where})
                waiting.add(asyncio.create_task(self._ask(address, connect, more, until)))

        ask(primaries or known)
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                waiting -= done
                for report in (task.result() for task in done):
                    reports.append(report)
                    if report.slots is not None:
                        report.slots = {nodes.remap_host_port(*a): count for a, count in report.slots.items()}
                        ask(report.slots)
                if not waiting and all(report.failure is not None for report in reports):
                    ask(known)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        for address in set(self._connections) - seen:
            await side_connection.hang_up(self._connections.pop(address))
        return reports


async def _read_more(connection: AbstractConnection, count: int, report: _Report) -> None:
    """The replies to INFO, CLUSTER INFO and CLUSTER SLOTS; one that is forbidden says nothing.

    Raises:
        OddReply: When one is of another shape.
    """
    replies: list[Any] = []
    for _ in range(count):
        try:
            replies.append(await side_connection.receive(connection))
        except ResponseError:
            replies.append(None)
    if any(not isinstance(reply, bytes | NoneType) for reply in replies[:2]):
        raise OddReply("INFO was answered by no text")
    report.about = dict(side_connection.info_fields(replies[0]))
    if count > 1:
        report.cluster = dict(side_connection.info_fields(replies[1]))
        try:
            report.slots = _slots(replies[2], report.address[0])
        except (LookupError, TypeError, ValueError, AttributeError):
            raise OddReply("CLUSTER SLOTS was answered by no slots") from None


async def _refusal(connection: AbstractConnection) -> Failure | None:
    """The reason why the needed command was not taken;
    an answer of another error, such as NOSCRIPT, is none.
    """
    try:
        await side_connection.receive(connection)
    except ResponseError as error:
        failure = classify(error)
        if failure is Failure.PERMISSION or is_unknown_command(error):
            return failure
    return None


def _slots(reply: object, asked: str) -> Mapping[NodeAddress, int] | None:
    """The number of slots that each primary serves, of a reply to ``CLUSTER SLOTS``."""
    if not isinstance(reply, list):
        return None
    found: Counter[NodeAddress] = Counter()
    for first, last, primary, *_replicas in reply:
        # A node that does not know its own address says nothing,
        # and means the one that it was asked at.
        host = primary[0].decode() if primary[0] not in (None, b"", b"?") else asked
        found[host, int(primary[1])] += last - first + 1
    return found


def _health_of_server(report: _Report) -> Health:
    failure = report.failure
    partial = False
    if failure is None and report.about.get("role") == "slave":
        failure = Failure.READONLY
    if failure is None and _is_full(report):
        failure = Failure.OOM
    if failure is None:
        failure = report.refused
    if failure in (Failure.READONLY, Failure.OOM):
        partial = True
    return _health([report], failure, partial=partial)


def _is_full(report: _Report) -> bool:
    """Whether the server refuses writes for want of memory, which a PING does not show."""
    about = report.about
    try:
        used = int(about["used_memory"]) - int(about.get("mem_not_counted_for_evict", 0))
        return about["maxmemory_policy"] == "noeviction" and 0 < int(about["maxmemory"]) < used
    except (KeyError, ValueError):
        return False


def _health_of_cluster(reports: Sequence[_Report]) -> Health:
    answers = [report for report in reports if report.failure is None]
    if not answers:
        # The reason that most give.
        reasons = Counter(report.failure for report in reports)
        return Health(reasons.most_common(1)[0][0])
    view = max(answers, key=_authority)
    if view.slots is None:  # the ACL forbids CLUSTER SLOTS, which no client can do without
        return _health(answers, Failure.CLUSTER if len(answers) < len(reports) else None, partial=True)
    primaries = [report for report in answers if report.address in view.slots]
    if view.cluster.get("cluster_state") == "fail" or not primaries:
        return _health(primaries, Failure.CLUSTER)
    is_whole = len(primaries) == len(view.slots) and sum(view.slots.values()) == SLOTS
    if is_whole and any(map(_is_full, primaries)):
        return _health(primaries, Failure.OOM, partial=True)
    if is_whole:
        return _health(primaries, next((report.refused for report in primaries if report.refused), None))
    return _health(primaries, Failure.CLUSTER, partial=True)


def _authority(report: _Report) -> tuple[bool, bool, int]:
    """The node whose view of a cluster counts: it sees the cluster well,
    and has seen the latest election.
    """
    epoch = report.cluster.get("cluster_current_epoch", "0")
    return report.slots is not None, report.cluster.get("cluster_state") != "fail", int(epoch)


def _health(reports: Sequence[_Report], failure: Failure | None, *, partial: bool = False) -> Health:
    latency = max((report.latency for report in reports if report.latency is not None), default=None)
    return Health(failure, partial, latency, () if latency is None else tuple(report.about for report in reports))


def mode_of(client: Client) -> Deployment:
    """The kind of deployment that *client* talks to."""
    if isinstance(client, aioredis.RedisCluster):
        return "cluster"
    return "sentinel" if isinstance(client.connection_pool, SentinelConnectionPool) else "standalone"
