"""Vectors, leases and epochs on a cluster: each node is asked for its own,
and one in trouble costs its own only.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar, cast

import redis.asyncio as aioredis

from ...connection import side_connection
from ...connection.manager import RedisManager
from ...errors import Failure, classify
from .operations import UNKNOWN, WRITE_TIMEOUT, Write, WriteResult
from .owed_writes import Owed, Sent
from .pipeline import Command
from .redis_store import RedisVectors, revocation

T = TypeVar("T")
R = TypeVar("R")


class ClusterVectors:
    """The store of a cluster's client in its loop:
    one `RedisVectors` for each primary, asked at the same time.

    The values of a node that does not answer, or whose breaker is open,
    are `UNKNOWN`, and nothing is written to it.
    """

    def __init__(self, manager: RedisManager, client: aioredis.RedisCluster) -> None:
        self._manager = manager
        self._client = client
        self._nodes: dict[str, RedisVectors] = {}
        self._opening: asyncio.Task[Failure | None] | None = None
        self._owed = Owed(lambda commands: self._tell(commands, manager.settings.EMBEDDING_CACHE_TIMEOUT))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._manager.address}, {len(self._nodes)} nodes>"

    @property
    def writable(self) -> bool:
        return not self._nodes or any(node.writable for node in self._nodes.values())

    async def aclose(self) -> None:
        """End what is under way."""
        await self._owed.aclose()
        if self._opening is not None:
            await side_connection.end([self._opening])
        for node in self._nodes.values():
            await node.aclose()

    async def lookup(self, names: Sequence[bytes], within: float) -> "list[bytes | None] | Failure":
        answers = await self._at_each(names, _same, within, RedisVectors.lookup)
        if isinstance(answers, Failure):
            return answers
        found: list[bytes | None] = [UNKNOWN] * len(names)
        failures = [answer for _, answer in answers if isinstance(answer, Failure)]
        if failures and len(failures) == len(answers):
            return failures[0]
        for places, answer in answers:
            if not isinstance(answer, Failure):
                for place, value in zip(places, answer, strict=True):
                    found[place] = value
        return found

    async def claim(self, write: Write, within: float) -> bytes | None:
        if within <= 0:
            return None
        answers = await self._at_each([write], _name_of, within, lambda node, _, left: node.claim(write, left))
        if isinstance(answers, Failure) or isinstance(answers[0][1], Failure):
            return None
        return answers[0][1]

    async def write(self, writes: Sequence[Write], within: float = WRITE_TIMEOUT) -> WriteResult:
        return _sum(await self._at_each(writes, _name_of, within, RedisVectors.write))

    async def delete(self, names: Sequence[bytes], within: float) -> WriteResult:
        return _sum(await self._at_each(names, _same, within, RedisVectors.delete))

    async def revoke(self, names: Sequence[bytes], within: float, notes: Sequence[Write] = ()) -> WriteResult:
        commands = revocation(names, notes)
        failed, failure = await self._tell(commands, within)
        self._owed.add(failed)
        return WriteResult(len(commands) - len(failed), failure)

    async def _tell(self, commands: Sequence[Command], within: float) -> Sent:
        answers = await self._at_each(commands, _key_of, within, RedisVectors.tell)
        if isinstance(answers, Failure):
            return commands, answers
        failed: list[Command] = []
        first: Failure | None = None
        for places, answer in answers:
            if isinstance(answer, Failure):
                failed += [commands[place] for place in places]
                first = first or answer
            else:
                failed += answer[0]
                first = first or answer[1]
        return failed, first

    async def _at_each(
        self,
        items: Sequence[T],
        name_of: Callable[[T], bytes],
        within: float,
        do: Callable[[RedisVectors, Sequence[T], float], Awaitable[R]],
    ) -> list[tuple[list[int], R | Failure]] | Failure:
        """*do* with its *items* at every node at once:
        where they were among all, and what came of it.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within
        failure = await self._opened(within)
        if failure is not None:
            return failure
        parts: dict[str, list[int]] = {}
        for place, item in enumerate(items):
            parts.setdefault(self._owner(name_of(item)), []).append(place)

        async def part(name: str, places: list[int]) -> tuple[list[int], R | Failure]:
            if not name:
                # A slot without a node; the table may be old.
                self._manager.breaker().failed(Failure.CLUSTER, vectors=True)
                return places, Failure.CLUSTER
            return places, await do(self._node(name), [items[place] for place in places], deadline - loop.time())

        if len(parts) == 1:
            return [await part(*each) for each in parts.items()]
        return await asyncio.gather(*(part(*each) for each in parts.items()))

    def _owner(self, name: bytes) -> str:
        try:
            node = self._client.nodes_manager.get_node_from_slot(self._client.keyslot(name))
        except Exception:
            # redis-py's classes for a table with a hole differ by version.
            return ""
        return str(node.name)

    def _node(self, name: str) -> RedisVectors:
        node = self._nodes.get(name)
        if node is None:
            node = self._nodes[name] = RedisVectors(self._manager, self._client, name)
        return node

    async def _opened(self, within: float) -> Failure | None:
        """Have the slot table read if it is not; why it is not known within that time.

        In a task of its own, which no request's deadline ends.
        """
        if not self._client._initialize:
            return None
        breaker = self._manager.breaker()
        if self._opening is None or self._opening.done():
            if not breaker.admits():
                return breaker.reason
            self._opening = asyncio.get_running_loop().create_task(self._open())
        opening = self._opening
        await asyncio.wait({opening}, timeout=within)
        if opening.cancelled():
            return Failure.CONNECTION  # closed meanwhile, by whom this caller need not hear
        failure = opening.result() if opening.done() else Failure.TIMEOUT
        if failure is None:
            breaker.worked(vectors=True)
        else:
            breaker.failed(failure, vectors=True)
        return failure

    async def _open(self) -> Failure | None:
        try:
            async with asyncio.timeout(self._manager.settings.REDIS_TIMEOUT):
                await self._client.initialize()
        except Exception as error:
            # RedisClusterException is no RedisError, and nodes that disagree raise more than that.
            return classify(error)
        return None


def _same(name: bytes) -> bytes:
    return name


def _name_of(write: Write) -> bytes:
    return write.name


def _key_of(command: Command) -> bytes:
    return cast("bytes", command[1])


def _sum(answers: list[tuple[list[int], WriteResult | Failure]] | Failure) -> WriteResult:
    if isinstance(answers, Failure):
        return WriteResult(0, answers)
    done = [WriteResult(0, answer) if isinstance(answer, Failure) else answer for _, answer in answers]
    return WriteResult(sum(each.count for each in done), next((each.failure for each in done if each.failure), None))
