"""The master's address, asked of all sentinels at once."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import redis.asyncio as aioredis
from redis.asyncio.connection import ConnectionPool
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.exceptions import AuthenticationError, RedisError

from ..errors import Failure, classify
from ..events import say
from . import side_connection

logger = logging.getLogger("redis_asgi.connection")

MasterAnswer: TypeAlias = tuple[str, int] | Exception | None


class SentinelRefusal(AuthenticationError):
    """Every sentinel that answers refuses our login, or lets us not ask."""


class Sentinels(Sentinel):
    """Sentinels that are all asked at once: the first to know a master is believed,
    one that hangs is not waited for.

    redis-py asks one after the other, each for up to ``REDIS_TIMEOUT``, and again with every
    connection: with the first of them on a host that is gone, no check and no probe would ever find
    the master in time.

    Args:
        addresses: Host and port of each.
        options: Of the connections to them.
    """

    def __init__(self, addresses: Sequence[tuple[str, int]], options: Mapping[str, Any]) -> None:
        super().__init__([])  # type: ignore[no-untyped-call]  # theirs
        self.sentinels = [
            aioredis.Redis.from_pool(ConnectionPool(host=host, port=port, **options)) for host, port in addresses
        ]

        self._address = ", ".join(f"{host}:{port}" for host, port in addresses)
        self._is_told = False  # whether the log has a line about their refusal

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        questions = [asyncio.create_task(master_of(sentinel, service_name)) for sentinel in self.sentinels]
        others: list[Exception | None] = []
        try:
            for question in asyncio.as_completed(questions):
                answer = await question
                if isinstance(answer, tuple):
                    self._is_told = False
                    return answer
                others.append(answer)
        finally:
            await side_connection.end(questions)
        # Unless one lets us in and knows no master, that we are refused is the reason.
        refusals = [error for error in others if error is not None and is_refusal(error)]
        if refusals and None not in others:
            self._tell(refusals[0])
            raise SentinelRefusal(f"The sentinels refuse us: {refusals[0]}") from refusals[0]
        raise MasterNotFoundError(f"No sentinel knows a master {service_name!r} that is up")

    def _tell(self, refusal: Exception) -> None:
        if self._is_told:
            return
        self._is_told = True
        say(logger, "sentinels_refuse", reason=classify(refusal).value, address=self._address)


def is_refusal(error: Exception) -> bool:
    """Whether a sentinel that raised *error* is there and does not let us ask."""
    return classify(error) in (Failure.AUTH, Failure.PERMISSION)


async def master_of(sentinel: aioredis.Redis, name: str) -> MasterAnswer:
    """The master's address as *sentinel* has it;
    ``None`` when it knows none that is up, else its error.
    """
    connection = sentinel.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # theirs
    try:
        await side_connection.connect(connection)
        await side_connection.send(connection, (b"SENTINEL", b"MASTER", name.encode()))
        reply = await side_connection.receive(connection)
        said = dict(zip(reply[::2], reply[1::2], strict=True))
        flags = set(said[b"flags"].split(b","))
        if b"master" not in flags or flags & {b"s_down", b"o_down"}:
            return None
        return said[b"ip"].decode(), int(said[b"port"])
    except (LookupError, TypeError, ValueError):
        return None  # what it says is odd
    except (RedisError, OSError) as error:
        # It knows no such name, or is no sentinel.
        return None if classify(error) is Failure.REPLY else error
    finally:
        await side_connection.hang_up(connection)
