"""Where the master is, asked of all sentinels at once."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import redis.asyncio as aioredis
from redis.asyncio.connection import ConnectionPool
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.exceptions import RedisError

from . import aside


class Sentinels(Sentinel):
    """Sentinels that are all asked at once: the first to know a master is believed, one that hangs is not waited for.

    redis-py asks one after the other, each for up to ``REDIS_TIMEOUT``, and again with every connection: with the
    first of them on a host that is gone, no check and no probe would ever find the master in time.

    Args:
        addresses: Host and port of each.
        options: Of the connections to them.
    """

    def __init__(self, addresses: Sequence[tuple[str, int]], options: Mapping[str, Any]) -> None:
        super().__init__([])  # type: ignore[no-untyped-call]  # theirs
        self.sentinels = [
            aioredis.Redis.from_pool(ConnectionPool(host=host, port=port, **options)) for host, port in addresses
        ]

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        questions = [asyncio.create_task(_master_of(sentinel, service_name)) for sentinel in self.sentinels]
        try:
            for answer in asyncio.as_completed(questions):
                master = await answer
                if master is not None:
                    return master
        finally:
            for question in questions:
                question.cancel()
            await asyncio.gather(*questions, return_exceptions=True)
        raise MasterNotFoundError(f"No sentinel knows a master {service_name!r} that is up")


async def _master_of(sentinel: aioredis.Redis, name: str) -> tuple[str, int] | None:
    """Where *sentinel* says the master is; ``None`` when it does not answer, or thinks that it is down."""
    connection = sentinel.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # theirs
    try:
        await aside.connect(connection)
        await aside.send(connection, (b"SENTINEL", b"MASTER", name.encode()))
        reply = await aside.receive(connection)
        said = dict(zip(reply[::2], reply[1::2], strict=True))
        flags = set(said[b"flags"].split(b","))
        if b"master" not in flags or flags & {b"s_down", b"o_down"}:
            return None
        return said[b"ip"].decode(), int(said[b"port"])
    except (RedisError, OSError):
        return None
    finally:
        await aside.hang_up(connection)
