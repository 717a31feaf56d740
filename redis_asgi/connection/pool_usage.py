"""The connections that a client has open now, for those who look."""

from dataclasses import dataclass

import redis.asyncio as aioredis

from .client_factory import Client


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """Connections of this process's pool; on a cluster those to all nodes."""

    in_use: int
    idle: int
    most: int


def pool_usage(client: Client) -> PoolUsage | None:
    """The connections that *client* has, and may have;
    ``None`` for a pool of the user's own making.
    """
    try:
        if isinstance(client, aioredis.RedisCluster):
            nodes = client.get_nodes()
            idle = sum(len(node._free) for node in nodes)
            opened = sum(len(node._connections) for node in nodes)
            return PoolUsage(opened - idle, idle, sum(node.max_connections for node in nodes))
        pool = client.connection_pool
        return PoolUsage(len(pool._in_use_connections), len(pool._available_connections), pool.max_connections)
    except AttributeError:
        return None  # redis-py tells by private attributes only
