"""Where vectors, leases and epochs are kept: Redis, or this process on ``memory://``; trouble is a value.

A lookup is one pipeline of ``MGET`` in chunks (on a cluster one pipeline per node), a write pipelines of
``SET`` with a TTL. No call raises what Redis does, and none waits longer than its deadline.
"""

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import redis.asyncio as aioredis
from redis.exceptions import RedisError

from ..client import Client
from ..connection import RedisArgument, RedisManager, resolve_manager
from ..errors import Failure, classify, classify_reply
from ..settings import Settings
from .counts import Commands
from .leased import Command, checked, run

logger = logging.getLogger("redis_asgi.embeddings")

MGET_KEYS = 256  # per MGET; more and one command blocks the server for others
SET_VALUES = 64  # per pipeline of SET; more and packing the commands blocks our loop
_WRITE_PAUSE = 10.0  # seconds without writes after one that Redis had no room for
WRITE_TIMEOUT = 2.0  # seconds; nobody waits for a write but the flight it belongs to
_MEMORY_BYTES = 64 * 1024 * 1024
_ENTRY_BYTES = 200  # what Python spends on a key and its place


@dataclass(frozen=True, slots=True)
class Write:
    """One value to keep.

    Attributes:
        name: Its Redis key.
        value: What to keep.
        ttl: Seconds, above 0.
        mode: ``set`` it; set it only while ``absent``; ``renew`` the TTL of what is there.
    """

    name: bytes
    value: bytes
    ttl: float
    mode: Literal["set", "absent", "renew"] = "set"


@dataclass(frozen=True, slots=True)
class Done:
    """How a write or a delete went.

    Attributes:
        count: Values written, or deleted.
        failure: Why not all, when Redis gave no answer or refused.
    """

    count: int
    failure: Failure | None = None


class VectorStore(Protocol):
    """What the cache and the middleware need of a store."""

    @property
    def writable(self) -> bool:
        """Whether a write may succeed now, as far as is known."""

    async def lookup(self, names: Sequence[bytes], within: float) -> "list[bytes | None] | Failure":
        """The values of *names*, ``None`` where there is none."""

    async def claim(self, write: Write, within: float) -> bytes | None:
        """Keep *write* if there is nothing of its name; what is there then, or ``None`` when that is not known."""

    async def write(self, writes: Sequence[Write], within: float = WRITE_TIMEOUT) -> Done:
        """Keep *writes*; those of mode ``set`` are counted."""

    async def delete(self, names: Sequence[bytes], within: float) -> Done:
        """Forget *names*."""


class RedisVectors:
    """The store of one client in its loop: see `RedisManager.part`."""

    def __init__(self, manager: RedisManager, client: Client) -> None:
        self._client = client
        self._breaker = manager.breaker()
        self._no_writes_until = 0.0
        self._commands = Commands()
        self._is_cluster = isinstance(client, aioredis.RedisCluster)

    @property
    def writable(self) -> bool:
        return self._breaker.state == "closed" and time.monotonic() >= self._no_writes_until

    async def aclose(self) -> None:
        """Nothing is under way between calls."""

    async def lookup(self, names: Sequence[bytes], within: float) -> "list[bytes | None] | Failure":
        if not self._breaker.admits():
            return self._breaker.reason
        replies = await self._execute(self._reads(names), within, op="lookup")
        if isinstance(replies, Failure):
            return replies
        found: list[bytes | None] = []
        for reply in replies:
            if isinstance(reply, Exception):
                failure = _classify(reply)
                self._failed(failure)
                return failure
            found.extend(_values(reply))
        self._breaker.worked()
        return found

    def _reads(self, names: Sequence[bytes]) -> list[Command]:
        if self._is_cluster:
            # A cluster has no MGET across slots; the client makes one pipeline per node of these.
            return [("GET", name) for name in names]
        return [("MGET", *names[start : start + MGET_KEYS]) for start in range(0, len(names), MGET_KEYS)]

    async def claim(self, write: Write, within: float) -> bytes | None:
        if not self.writable or within <= 0 or not self._breaker.admits():
            return None
        commands = [_command(write), *self._reads([write.name])]
        replies = await self._execute(commands, within, op="store", write=True)
        if isinstance(replies, Failure):
            return None
        for reply in replies:
            if isinstance(reply, Exception):
                self._failed(_classify(reply), write=True)
                return None
        self._breaker.worked()
        return _values(replies[-1])[0]

    async def write(self, writes: Sequence[Write], within: float = WRITE_TIMEOUT) -> Done:
        count, failure = 0, None
        deadline = time.monotonic() + within
        for start in range(0, len(writes), SET_VALUES):
            left = deadline - time.monotonic()
            if time.monotonic() < self._no_writes_until or left <= 0 or not self._breaker.admits():
                return Done(count, failure or Failure.CONNECTION)
            chunk = writes[start : start + SET_VALUES]
            replies = await self._execute([_command(write) for write in chunk], left, op="store", write=True)
            if isinstance(replies, Failure):
                return Done(count, replies)
            for write, reply in zip(chunk, replies, strict=True):
                if isinstance(reply, Exception):
                    failure = _classify(reply)
                elif write.mode == "set":
                    count += 1
            if failure is not None:
                self._failed(failure, write=True)
                return Done(count, failure)
            self._breaker.worked()
        return Done(count)

    async def delete(self, names: Sequence[bytes], within: float) -> Done:
        if not self._breaker.admits():
            return Done(0, self._breaker.reason)
        replies = await self._execute([("DEL", name) for name in names], within, op="store")
        if isinstance(replies, Failure):
            return Done(0, replies)
        failures = [_classify(reply) for reply in replies if isinstance(reply, Exception)]
        if failures:
            self._failed(failures[0])
        return Done(sum(reply for reply in replies if isinstance(reply, int)), failures[0] if failures else None)

    def _failed(self, failure: Failure, *, write: bool = False) -> None:
        if not write or failure is not Failure.OOM:
            self._breaker.failed(failure, vectors=True)
            return
        # What is there can still be read.
        if time.monotonic() >= self._no_writes_until:
            logger.warning("redis_asgi.embedding_writes_paused", extra={"failure": failure.value})
        self._no_writes_until = time.monotonic() + _WRITE_PAUSE

    async def _execute(
        self, commands: Sequence[Command], within: float, *, op: Literal["lookup", "store"], write: bool = False
    ) -> list[Any] | Failure:
        began = time.perf_counter()
        replies = await self._send(commands, within, write=write)
        failure: Failure | None = None
        if isinstance(replies, Failure):
            failure = replies
        else:
            failure = next((_classify(reply) for reply in replies if isinstance(reply, Exception)), None)
        self._commands.count(op, failure, time.perf_counter() - began)
        return replies

    async def _send(self, commands: Sequence[Command], within: float, *, write: bool) -> list[Any] | Failure:
        try:
            if isinstance(self._client, aioredis.RedisCluster):
                async with asyncio.timeout(within):
                    return await _pipelined(self._client, commands)
            return await run(self._client.connection_pool, commands, within)
        except Exception as error:
            # Fails open: whatever the client raises is a miss. RedisClusterException is no RedisError, and a
            # slot table in flux raises KeyErrors and more.
            failure = classify(error)
            self._failed(failure, write=write)
            return failure


async def _pipelined(cluster: aioredis.RedisCluster, commands: Sequence[Command]) -> list[Any]:
    pipeline = cluster.pipeline()
    for command in commands:
        # A client of the user's may decode its replies, and a vector is no text.
        pipeline.execute_command(*command, NEVER_DECODE=[])
    return checked(commands, await pipeline.execute(raise_on_error=False))


def _values(reply: Any) -> Sequence[bytes | None]:
    """A list is a chunk, anything else the one value of a cluster's ``GET``."""
    return reply if isinstance(reply, list) else (reply,)


def _classify(reply: Exception) -> Failure:
    return classify(reply) if isinstance(reply, RedisError) else classify_reply(str(reply))


def _command(write: Write) -> Command:
    whole = int(write.ttl)
    expiry: tuple[str, int] = ("EX", whole) if whole == write.ttl else ("PX", max(1, round(write.ttl * 1000)))
    if write.mode == "renew":
        return ("EXPIRE", write.name, max(1, whole))
    return ("SET", write.name, write.value, *expiry, *(("NX",) if write.mode == "absent" else ()))


class MemoryVectors:
    """The store of ``memory://``: the least recently used values of this process, bounded by bytes.

    Args:
        settings: ``EMBEDDING_CACHE_L1_BYTES`` bounds it when that is more than 64 MiB.
        clock: Monotonic seconds.
    """

    writable = True

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = max(settings.EMBEDDING_CACHE_L1_BYTES, _MEMORY_BYTES)
        self._clock = clock
        self._values: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()
        self.bytes = 0
        self._lock = threading.Lock()  # loops in several threads may share one manager

    async def lookup(self, names: Sequence[bytes], within: float) -> "list[bytes | None] | Failure":
        with self._lock:
            return [self._get(name) for name in names]

    async def claim(self, write: Write, within: float) -> bytes | None:
        with self._lock:
            self._write([write])
            return self._get(write.name)

    async def write(self, writes: Sequence[Write], within: float = WRITE_TIMEOUT) -> Done:
        with self._lock:
            return self._write(writes)

    def _write(self, writes: Sequence[Write]) -> Done:
        count = 0
        for write in writes:
            present = self._get(write.name)
            if write.mode == "renew":
                if present is not None:
                    self._values[write.name] = (present, self._clock() + write.ttl)
                continue
            if write.mode == "absent" and present is not None:
                continue
            self._drop(write.name)
            self._values[write.name] = (write.value, self._clock() + write.ttl)
            self.bytes += _ENTRY_BYTES + len(write.name) + len(write.value)
            count += write.mode == "set"
        while self.bytes > self._limit:
            self._drop(next(iter(self._values)))
        return Done(count)

    async def delete(self, names: Sequence[bytes], within: float) -> Done:
        with self._lock:
            return Done(sum(self._get(name) is not None and self._drop(name) for name in names))

    def _get(self, name: bytes) -> bytes | None:
        kept = self._values.get(name)
        if kept is None:
            return None
        value, expires = kept
        if expires <= self._clock():
            self._drop(name)
            return None
        self._values.move_to_end(name)
        return value

    def _drop(self, name: bytes) -> bool:
        kept = self._values.pop(name, None)
        if kept is None:
            return False
        self.bytes -= _ENTRY_BYTES + len(name) + len(kept[0])
        return True


def resolve_vectors(redis: RedisArgument, settings: Settings | None) -> tuple[RedisManager, bool]:
    """`resolve_manager`, with ``EMBEDDING_CACHE_REDIS_URL`` as the default when it is set."""
    if redis is not None:
        return resolve_manager(redis, settings)
    settings = settings if settings is not None else Settings()
    if settings.EMBEDDING_CACHE_REDIS_URL is not None:
        # A server of its own: nothing that says where the shared one is, and none of its secrets, goes along.
        elsewhere: dict[str, Any] = {
            "REDIS_URL": settings.EMBEDDING_CACHE_REDIS_URL.get_secret_value(),
            "REDIS_USERNAME": None,
            "REDIS_PASSWORD": None,
            "REDIS_DB": 0,
            "REDIS_SSL": False,
            "REDIS_SENTINELS": (),
            "REDIS_SENTINEL_MASTER": None,
            "REDIS_CLUSTER": False,
        }
        settings = Settings(**{**settings.model_dump(exclude_unset=True), **elsewhere})
    return resolve_manager(None, settings)


def vectors_of(manager: RedisManager) -> VectorStore:
    """The store behind *manager* in the running loop."""
    return manager.part(RedisVectors) if manager.has_redis else manager.shared(MemoryVectors)
