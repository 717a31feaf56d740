"""Vectors, leases and epochs on one Redis server, or on one node of a cluster.

A lookup is one pipeline of ``MGET`` in chunks, of one key each where keys may not go together, or
of ``GET`` on a cluster; a write pipelines of ``SET`` with a TTL. No call raises what Redis does;
none waits longer than its deadline.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, Literal

import redis.asyncio as aioredis
from redis.exceptions import RedisError

from ...connection.client_factory import Client
from ...connection.manager import RedisManager
from ...errors import Failure, classify, classify_reply, is_crossslot
from ...events import say
from ..records.metrics import Commands
from .joint_lookup import JointLookups
from .operations import UNKNOWN, WRITE_TIMEOUT, Write, WriteResult
from .owed_writes import Owed, Sent
from .pipeline import Command, execute, run_on_node

logger = logging.getLogger("redis_asgi.embeddings")

MGET_KEYS = 256  # per MGET; more and one command blocks the server for others
SET_VALUES = 64  # per pipeline of SET; more and packing the commands blocks our loop
_WRITE_PAUSE = 10.0  # seconds without writes after one that Redis had no room for
_DOUBT = 1.0  # seconds without writes to a node that has just not answered, for which its neighbours' would wait
_SAYS_NOTHING = frozenset((Failure.OOM, Failure.POOL, Failure.REPLY))  # about whether the node answers


class RedisVectors:
    """The store of one server in its loop: see `RedisManager.per_client`.

    Args:
        node: Of a cluster, the name of the one that is meant.
    """

    def __init__(self, manager: RedisManager, client: Client, node: str = "") -> None:
        self._manager = manager
        self._client = client
        self._node = node
        self._address = f"{node} of {manager.address}" if node else manager.address
        self._breaker = manager.breaker(node)
        self._turns = asyncio.Semaphore(manager.settings.REDIS_POOL_SIZE)
        self._no_writes_until = 0.0
        self._commands = Commands()
        self._lookups = JointLookups(self._look_up)
        self._owed = Owed(lambda commands: self.tell(commands, manager.settings.EMBEDDING_CACHE_TIMEOUT))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._address}, breaker {self._breaker.state}>"

    @property
    def writable(self) -> bool:
        return self._breaker.state == "closed" and time.monotonic() >= self._no_writes_until

    async def aclose(self) -> None:
        """End what is under way."""
        await self._owed.aclose()
        await self._lookups.aclose()

    async def lookup(self, names: Sequence[bytes], within: float) -> "list[bytes | None] | Failure":
        # A cluster has asked each node for a part already, and each part has a deadline of its own.
        return await (self._look_up if self._node else self._lookups.look_up)(names, within)

    async def _look_up(self, names: Sequence[bytes], within: float) -> "list[bytes | None] | Failure":
        if not self._breaker.admits():
            return self._breaker.reason
        deadline = time.monotonic() + within
        reads = self._reads(names)
        replies = await self._execute(reads, within, op="lookup")
        if len(reads) < len(names) and not isinstance(replies, Failure) and any(map(is_crossslot, replies)):
            # A fact about the server, not about its health.
            self._manager.found_slots()
            reads = self._reads(names)
            replies = await self._execute(reads, deadline - time.monotonic(), op="lookup")
        if isinstance(replies, Failure):
            return replies
        if all(isinstance(reply, Exception) for reply in replies):
            failure = _classify(replies[0])  # nothing at all is known
            self._failed(failure)
            return failure
        found: list[bytes | None] = []
        for read, reply in zip(reads, replies, strict=True):
            if not isinstance(reply, Exception):
                found += _values(reply)
            elif (failure := _classify(reply)) is Failure.REPLY:
                # Such as WRONGTYPE, and that key's own;
                # or the command is not there, and nothing is known of any.
                found += [UNKNOWN] * (len(read) - 1)
            else:
                self._failed(failure)
                return failure
        self._breaker.worked(vectors=True)
        return found

    def _reads(self, names: Sequence[bytes]) -> list[Command]:
        if self._node:
            # A cluster has no MGET across slots.
            return [("GET", name) for name in names]
        most = 1 if self._manager.keys_apart else MGET_KEYS
        return [("MGET", *names[start : start + most]) for start in range(0, len(names), most)]

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
        self._breaker.worked(vectors=True)
        return _values(replies[-1])[0]

    async def write(self, writes: Sequence[Write], within: float = WRITE_TIMEOUT) -> WriteResult:
        count, failure = 0, None
        deadline = time.monotonic() + within
        for start in range(0, len(writes), SET_VALUES):
            left = deadline - time.monotonic()
            if time.monotonic() < self._no_writes_until or left <= 0 or not self._breaker.admits():
                return WriteResult(count, failure or Failure.CONNECTION)
            chunk = writes[start : start + SET_VALUES]
            replies = await self._execute([_command(write) for write in chunk], left, op="store", write=True)
            if isinstance(replies, Failure):
                return WriteResult(count, replies)
            for write, reply in zip(chunk, replies, strict=True):
                if isinstance(reply, Exception):
                    failure = _classify(reply)
                elif write.mode == "set":
                    count += 1
            if failure is not None:
                self._failed(failure, write=True)
                return WriteResult(count, failure)
            self._breaker.worked(vectors=True)
        return WriteResult(count)

    async def delete(self, names: Sequence[bytes], within: float) -> WriteResult:
        replies, failure = await self._order([("DEL", name) for name in names], within)
        return WriteResult(sum(reply for reply in replies if isinstance(reply, int)), failure)

    async def revoke(self, names: Sequence[bytes], within: float, notes: Sequence[Write] = ()) -> WriteResult:
        commands = revocation(names, notes)
        failed, failure = await self.tell(commands, within)
        self._owed.add(failed)
        return WriteResult(len(commands) - len(failed), failure)

    async def tell(self, commands: Sequence[Command], within: float) -> Sent:
        """Send *commands*, each on its own: those that failed, and why the first did."""
        replies, failure = await self._order(commands, within)
        if not replies:
            return commands, failure
        pairs = zip(commands, replies, strict=True)
        return [command for command, reply in pairs if isinstance(reply, Exception)], failure

    async def _order(self, commands: Sequence[Command], within: float) -> tuple[list[Any], Failure | None]:
        """The replies, none when there is no answer at all, and the first failure among them."""
        if not self._breaker.admits():
            return [], self._breaker.reason
        replies = await self._execute(commands, within, op="store", write=True)
        if isinstance(replies, Failure):
            return [], replies
        failure = next((_classify(reply) for reply in replies if isinstance(reply, Exception)), None)
        if failure is not None:
            self._failed(failure, write=True)
        else:
            self._breaker.worked(vectors=True)
        return replies, failure

    def _failed(self, failure: Failure, *, write: bool = False) -> None:
        if not write or failure is not Failure.OOM:
            if self._node and failure not in _SAYS_NOTHING:
                self._no_writes_until = max(self._no_writes_until, time.monotonic() + _DOUBT)
            self._breaker.failed(failure, vectors=True)
            return
        # What is there can still be read.
        if time.monotonic() >= self._no_writes_until:
            say(logger, "embedding_writes_paused", reason=failure.value, address=self._address)
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
                async with asyncio.timeout(within) as clock, self._turns:
                    return await run_on_node(self._client, self._node, commands, clock)
            return await execute(self._client.connection_pool, commands, within)
        except Exception as error:
            # Fails open: whatever the client raises is a miss. RedisClusterException is no
            # RedisError, and a slot table in flux raises KeyErrors and more.
            failure = classify(error)
            self._failed(failure, write=write)
            return failure


def revocation(names: Sequence[bytes], notes: Sequence[Write]) -> list[Command]:
    """The commands that forget *names* and keep *notes*."""
    return [*(("DEL", name) for name in names), *map(_command, notes)]


def _values(reply: Any) -> "list[bytes | None]":
    """The values that an ``MGET`` or a ``GET`` found;
    an error for one key is of a proxy that lost its server.
    """
    if not isinstance(reply, list):
        return [reply]
    return [UNKNOWN if isinstance(value, Exception) else value for value in reply]


def _classify(reply: Exception) -> Failure:
    return classify(reply) if isinstance(reply, RedisError) else classify_reply(str(reply))


def _command(write: Write) -> Command:
    whole = int(write.ttl)
    expiry: tuple[str, int] = ("EX", whole) if whole == write.ttl else ("PX", max(1, round(write.ttl * 1000)))
    if write.mode == "renew":
        return ("EXPIRE", write.name, max(1, whole))
    return ("SET", write.name, write.value, *expiry, *(("NX",) if write.mode == "absent" else ()))
