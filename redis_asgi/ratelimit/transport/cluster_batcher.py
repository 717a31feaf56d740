"""Batches on Redis Cluster: each node has its own, and a request may have parts at several."""

import asyncio

import redis.asyncio as aioredis

from ...connection.client_factory import Client, QueueingPool
from ...connection.manager import RedisManager
from .batcher import Batcher
from .check import Check, Transport, slot_key
from .direct_transport import DirectTransport
from .pooled_transport import NodeTransport, PooledTransport, TableTransport
from .slot_parts import ApartWhereAsked, Parts


class ClusterBatcher:
    """One `Batcher` per node, so that a dead node degrades only its own partitions; `Parts` are
    asked at several.
    """

    gathers = False

    def grown(self, counters: int) -> None:
        """See `Batcher.grown`: nothing grows here."""

    def __init__(self, manager: RedisManager, client: aioredis.RedisCluster) -> None:
        self.loop = asyncio.get_running_loop()
        self._manager = manager
        self._client = client
        self.closed = False
        self.breaker = None  # each node has one of its own, and where a check goes is found out for each
        self._batchers: dict[str, Batcher] = {}
        self._parts = Parts(manager, self._route, lambda: self.closed)

    def submit(self, check: Check) -> None:
        """Queue *check* at the node, or the nodes, that its keys live on."""
        if not self._parts.takes(check):
            self._route(check)

    async def aclose(self) -> None:
        """End the batches under way at every node."""
        self.closed = True
        batchers, self._batchers = list(self._batchers.values()), {}
        await asyncio.gather(*[batcher.aclose() for batcher in batchers])

    def _route(self, check: Check) -> None:
        """Queue *check*, of one partition, at its node; where that is not known, until it is."""
        if not self._submit(check):
            self._batcher("").submit(check)

    def _submit(self, check: Check) -> bool:
        try:
            node = self._client.get_node_from_key(slot_key(check).decode())
        except Exception:
            # No slot table yet, or one with a hole.
            node = None
        if node is not None:
            self._batcher(node.name).submit(check)
        return node is not None

    def _batcher(self, name: str) -> Batcher:
        batcher = self._batchers.get(name)
        if batcher is None:
            transport = NodeTransport(self._client, name) if name else TableTransport(self._client, self._submit)
            batcher = self._batchers[name] = Batcher(transport, self._manager.breaker(name))
        return batcher


def make_batcher(manager: RedisManager, client: Client) -> "Batcher | ClusterBatcher":
    """The batcher of a client in its loop: see `RedisManager.per_client`."""
    if isinstance(client, aioredis.RedisCluster):
        return ClusterBatcher(manager, client)
    pool = client.connection_pool
    transport: Transport = DirectTransport(client, pool) if isinstance(pool, QueueingPool) else PooledTransport(client)
    batcher = Batcher(transport, manager.breaker())
    batcher.apart = ApartWhereAsked(manager, batcher)
    return batcher
