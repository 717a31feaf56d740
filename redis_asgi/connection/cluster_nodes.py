"""The nodes of a cluster: which of them to believe about the others,
and a connection to one by its name.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import redis.asyncio as aioredis
from redis.asyncio.cluster import ClusterNode, NodesManager
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisClusterException, ResponseError

from ..errors import Failure, classify
from ..events import say
from . import side_connection
from .direct import untimed
from .resolver import known_without_asking
from .sockets import NamedConnection

logger = logging.getLogger("redis_asgi.connection")

SLOTS = 16384
_LEARN_EVERY = 1.0  # seconds; a node that is down is probed more often


class _Asked(ClusterNode):
    """A node that is asked for the slot table, over connections of its own.

    Args:
        is_only: Whether it is the only one that was given. When it tells nothing of a cluster then
            (its commands are not allowed, unknown, or not for a server alone), all keys are there,
            as at an endpoint for several shards.

    Attributes:
        refusal: Why it did not tell the table, if it is one of a cluster:
            redis-py takes any reason for its being none.
        is_alone: Whether it has told of itself only, for that reason.
    """

    def __init__(self, host: str, port: str | int, *, is_only: bool, **options: Any) -> None:
        super().__init__(host, port, **options)
        self.refusal: ResponseError | None = None
        self.is_alone = False
        self._is_only = is_only

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().execute_command(*args, **options)
        except ResponseError as error:
            if classify(error) is not Failure.REPLY:
                self.refusal = error
            elif self._is_only:
                self.is_alone = True
                return [[0, SLOTS - 1, [self.host, self.port, ""]]]
            raise


class Nodes(NodesManager):
    """The slot table, told by the first node to answer of all that were ever given or are known.

    redis-py asks one after the other, each for up to ``REDIS_TIMEOUT``, so that one that hangs
    keeps a cluster off. It forgets what it was given when it knows others, and would never find a
    cluster again that has moved as a whole; and whenever it asks, it makes every connection anew.

    Attributes:
        is_alone: Whether the only address tells nothing of a cluster,
            so that all slots are taken to be its own.
    """

    def __init__(self, like: NodesManager) -> None:
        given = list(like.startup_nodes.values())
        super().__init__(given, like.require_full_coverage, like.connection_kwargs)
        self._given = [(node.host, node.port) for node in given]
        self.is_alone = False
        self._one_at_a_time = asyncio.Lock()

    async def initialize(self, *_args: Any, **_options: Any) -> None:
        epoch = self._epoch
        async with self._one_at_a_time:
            if self._epoch == epoch:
                await self._ask(dict.fromkeys([*((n.host, n.port) for n in self.nodes_cache.values()), *self._given]))

    async def _ask(self, addresses: Iterable[tuple[str, str | int]]) -> None:
        # Not over connections in use, or that a node that was restarted has left behind.
        is_only = len(self._given) == 1
        left = [_Asked(host, port, is_only=is_only, **self.connection_kwargs) for host, port in addresses]
        known = self.startup_nodes
        error: Exception | None = None
        while left:
            try:
                node = await first_to_answer(left)
            except Exception:
                if error is None:
                    raise
                raise error  # noqa: B904 - what was found out first, and not by the rest
            left.remove(node)
            self.startup_nodes = {node.name: node}
            try:
                await super().initialize()
            except BaseException as failed:
                self.startup_nodes = known
                if not isinstance(failed, Exception):
                    raise
                # Another one may know more: it is no cluster, or has lost sight of the others.
                error = error or node.refusal or failed
            else:
                self._note(node.name, is_alone=node.is_alone)
                self.startup_nodes = dict(self.nodes_cache)
                await self._choose_default(node.name)
                return
            finally:
                with suppress(Exception):
                    await node.disconnect()
        raise error or RedisClusterException("no address of the cluster")

    def _note(self, address: str, *, is_alone: bool) -> None:
        if is_alone and not self.is_alone:
            say(logger, "no_cluster", address=address)
        self.is_alone = is_alone

    async def _choose_default(self, name: str) -> None:
        """Ask what concerns no key of a primary that is there, if there is one."""
        node = self.nodes_cache.get(name)
        if node is None or node.server_type != "primary":
            with suppress(Exception):
                node = await first_to_answer(self.get_nodes_by_server_type("primary"))
        if node is not None:
            self.default_node = node

    def set_nodes(self, old: dict[str, ClusterNode], new: dict[str, ClusterNode], remove_old: bool = False) -> None:
        same = [name for name in old if name in new and old[name].server_type == new[name].server_type]
        kept = {name: old.pop(name) for name in same}
        super().set_nodes(old, {name: node for name, node in new.items() if name not in kept}, remove_old)
        old.update(kept)


class QueueingCluster(aioredis.RedisCluster):
    """A cluster client whose callers wait for one of so many turns; its nodes' pools only raise.

    Args:
        addresses: Host and port of nodes, of which any may be gone.
        turns: How many commands may be under way at once.
        kind: The class of its connections.
        options: Those of redis-py's client.
    """

    def __init__(
        self, addresses: Sequence[tuple[str, int]], *, turns: int, kind: type[NamedConnection], **options: Any
    ) -> None:
        # redis-py would look up the name of this machine, and wait for it.
        given = [ClusterNode((known_without_asking(host) or (host,))[0], port) for host, port in addresses]
        super().__init__(startup_nodes=given, **options)
        self._turns = asyncio.Semaphore(turns)
        # The nodes yet to be found are made of it.
        self.connection_kwargs["connection_class"] = kind
        self.nodes_manager = Nodes(self.nodes_manager)
        self._learning: asyncio.Task[None] | None = None

    async def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        async with self._turns:
            return await super().execute_command(*args, **kwargs)

    def learn_soon(self) -> None:
        """Have the slot table read again, in the background, once a second at most."""
        if self._learning is None or self._learning.done():
            self._learning = asyncio.get_running_loop().create_task(self._learn())

    async def _learn(self) -> None:
        await learn_nodes(self)
        await asyncio.sleep(_LEARN_EVERY)

    async def aclose(self) -> None:
        if self._learning is not None:
            await side_connection.end([self._learning])
        await super().aclose()


def is_no_cluster(client: object) -> bool:
    """Whether *client* is one of a cluster whose only address tells nothing of one."""
    return isinstance(client, QueueingCluster) and isinstance(nodes := client.nodes_manager, Nodes) and nodes.is_alone


async def learn_nodes(client: aioredis.RedisCluster) -> None:
    """Read the slot table of *client* again, if a node tells it."""
    # What it raises when no node answers, or when they disagree, is no RedisError.
    with suppress(Exception):
        await client.nodes_manager.initialize()


async def ping_node(node: ClusterNode) -> None:
    """Ask *node* for a sign of life over a connection made for it.

    Raises:
        Exception: What redis-py does, when there is none.
    """
    await ping_over(node.connection_class(**node.connection_kwargs))


async def ping_over(connection: AbstractConnection) -> None:
    """Ask for a sign of life over *connection*, and close it.

    Raises:
        Exception: What redis-py does, when there is none.
    """
    try:
        await side_connection.connect(connection)
        await side_connection.ping(connection)
    finally:
        await side_connection.hang_up(connection)


_Node = TypeVar("_Node", bound=ClusterNode)


async def first_to_answer(nodes: Iterable[_Node]) -> _Node:
    """Whichever of *nodes* answers first; all are asked at once.

    Raises:
        Exception: When none does, what the first of them raised, a refused login before all else.
    """
    asked = {asyncio.ensure_future(ping_node(node)): node for node in nodes}
    waiting = set(asked)
    errors: list[BaseException] = []
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                # Who may not run PING has been answered all the same.
                if error is None or classify(error) is Failure.PERMISSION:
                    return asked[task]
                errors.append(error)
    finally:
        await side_connection.end(waiting)
    errors.sort(key=lambda error: classify(error) is not Failure.AUTH)
    raise errors[0] if errors else RedisClusterException("the cluster has no such nodes")


@asynccontextmanager
async def node_connection(client: aioredis.RedisCluster, name: str) -> AsyncIterator[AbstractConnection]:
    """A connection of the pool of the node *name*, with nothing left to read and no timer.

    Not by redis-py's pipeline, which waits for all nodes when one of them hangs.
    An error drops the connection.

    Raises:
        Exception: What redis-py does when it cannot connect.
    """
    node = client.get_node(node_name=name)
    if node is None:
        raise RedisClusterException("the cluster has no such node any more")
    connection = node.acquire_connection()
    try:
        if connection.should_reconnect():  # type: ignore[no-untyped-call]  # theirs
            await side_connection.hang_up(connection)
        await side_connection.freshen(connection)
        with untimed(connection):
            yield connection
    except BaseException:
        await side_connection.hang_up(connection)
        raise
    finally:
        node.release(connection)
