"""Transports through redis-py: one script call over a pooled connection,
or a pipeline per cluster node.

`direct_transport` has the shorter way for pools of our own.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import redis.asyncio as aioredis
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import AskError, NoScriptError, TryAgainError

from ...connection import side_connection
from ...connection.cluster_nodes import node_connection
from ...connection.direct import exchange, untimed
from ...errors import Failure, OddReply, classify, is_crossslot
from ...telemetry import telemetry
from .batcher import Batcher
from .check import Check, SubmittedBatch, graver, resolve, spans_slots
from .script import Call


class TaskTransport:
    """Each batch is a task, for which `run` gets ready, takes what waits and sends it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._batches: dict[asyncio.Task[None], SubmittedBatch | None] = {}

    @property
    def busy(self) -> int:
        return len(self._tasks)

    def start(self, batcher: Batcher) -> None:
        self._tasks.add(batcher.loop.create_task(self._drive(batcher)))

    def read(self) -> None:
        pass  # each task reads its own

    def abort(self, batch: SubmittedBatch) -> None:
        for task, mine in self._batches.items():
            if mine is batch:
                task.cancel()

    def renew(self) -> None:
        # They are no longer counted, and end when they get to it.
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()

    def timeout_cause(self) -> Failure:
        return Failure.TIMEOUT

    async def aclose(self) -> None:
        tasks = list(self._tasks)
        self.renew()
        await side_connection.end(tasks)

    async def run(self, batcher: Batcher) -> Failure | None:
        """Get ready, `take`, send and distribute; what went wrong with some."""
        raise NotImplementedError

    def take(self, batcher: Batcher) -> SubmittedBatch | None:
        """`Batcher.take`, noting whose batch it is."""
        batch = batcher.take()
        self._batches[cast("asyncio.Task[None]", asyncio.current_task())] = batch
        return batch

    async def _drive(self, batcher: Batcher) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        # Unless all goes well: cancelled at its limit.
        failure: Failure | None = Failure.TIMEOUT
        denied = False
        try:
            failure = await self.run(batcher)
        except Exception as error:
            # RedisClusterException is no RedisError,
            # and a slot table in flux raises KeyErrors and more.
            failure = classify(error)
            if task not in self._batches:
                # A batch that has a connection takes what waits when it is back.
                denied = failure is Failure.POOL and self.busy > 1
                if not denied:
                    batcher.connect_failed(failure)
        finally:
            self._tasks.discard(task)
            batch = self._batches.pop(task, None)
            if batch is not None:
                batcher.completed(batch, failure)
            if denied:
                batcher.plan(batcher.loop.time())
            else:
                batcher.start_if_due()


class PooledTransport(TaskTransport):
    """One ``EVALSHA`` carries the whole batch over a connection of a client's pool."""

    def __init__(self, client: aioredis.Redis) -> None:
        super().__init__()
        self._pool: ConnectionPool = client.connection_pool

    def timeout_cause(self) -> Failure:
        return Failure.POOL if getattr(self._pool, "exhausted", False) else Failure.TIMEOUT

    async def run(self, batcher: Batcher) -> Failure | None:
        connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]  # a decorator of redis-py's
        try:
            with untimed(connection):
                await side_connection.freshen(connection)
                batch = self.take(batcher)
                return None if batch is None else await self._ask(batcher, connection, batch)
        except BaseException:
            # What comes there now belongs to no batch.
            await side_connection.hang_up(connection)
            raise
        finally:
            await self._pool.release(connection)

    async def _ask(self, batcher: Batcher, connection: AbstractConnection, batch: SubmittedBatch) -> Failure | None:
        calls = batcher.calls(batch.checks)
        replies = await ask(connection, calls)
        if is_crossslot(replies[0]) and spans_slots(calls[0].checks):
            batcher.again(batch)
            return None
        return hand_out(zip(calls, replies, strict=True))


async def ask(connection: AbstractConnection, calls: Sequence[Call]) -> list[Any]:
    """The replies to *calls*, which are written at once,
    and again in full where the server did not know the script.

    Error replies are among them.
    """
    replies = await exchange(connection, [call.command() for call in calls])
    unknown = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
    commands = {i: command for i in unknown if (command := calls[i].command_in_full()) is not None}
    if commands:
        telemetry().redis_script_loads.inc(len(commands))
        for i, reply in zip(commands, await exchange(connection, list(commands.values())), strict=True):
            replies[i] = reply
    return replies


def hand_out(answered: Iterable[tuple[Call, Any]]) -> Failure | None:
    """Give the checks of each call what its reply says;
    why some have no verdict, the gravest reason.

    Raises:
        OddReply: When one is no reply to its call; the others are given theirs.
    """
    worst: Failure | None = None
    odd: OddReply | None = None
    for call, reply in answered:
        if isinstance(reply, NoScriptError) and not call.checks:
            continue
        if isinstance(reply, Exception):
            failure: Failure | None = classify(reply)
        else:
            try:
                failure = call.hand_out(reply)
            except OddReply as error:
                failure, odd = Failure.REPLY, error
        if failure is not None:
            resolve(call.checks, failure)
        worst = graver(worst, failure)
    if odd is not None:
        raise odd
    return worst


class TableTransport(TaskTransport):
    """Of a cluster whose slot table is not known yet, or has a hole: reads it,
    and hands what waits to the nodes.

    Args:
        route: Submits a check at its node; ``False`` where there is none.
    """

    def __init__(self, client: aioredis.RedisCluster, route: Callable[[Check], bool]) -> None:
        super().__init__()
        self._client = client
        self._route = route

    async def run(self, batcher: Batcher) -> Failure | None:
        await self._client.initialize()
        batch = self.take(batcher)
        if batch is None:
            return None
        for check in batch.checks:
            check.written = 0.0
        astray = [check for check in batch.checks if not self._route(check)]
        batch.checks = astray
        if astray:
            return Failure.CLUSTER
        batch.is_told = True  # nothing was sent
        batcher.breaker.worked()
        return None


class NodeTransport(TaskTransport):
    """One pipeline to one node of a cluster;
    a script call must stay in one slot: one per partition.

    Args:
        node: Its name.
    """

    def __init__(self, client: aioredis.RedisCluster, node: str) -> None:
        super().__init__()
        self._client = client
        self._node = node

    async def run(self, batcher: Batcher) -> Failure | None:
        async with node_connection(self._client, self._node) as connection:
            batch = self.take(batcher)
            if batch is None:
                return None
            calls = batcher.calls(batch.checks, apart=True)
            replies = await ask(connection, calls)
            both = list(zip(calls, replies, strict=True))
            moved = [call for call, reply in both if isinstance(reply, AskError | TryAgainError)]  # a MovedError is one
            # Here, where a reply that is none drops the connection.
            worst = hand_out((call, reply) for call, reply in both if call not in moved)
        for call in moved:
            worst = graver(worst, hand_out([(call, await self._follow(call))]))
        return worst

    async def _follow(self, call: Call) -> Any:
        """The reply of the node that the partition of *call* has moved to; here nothing ran."""
        try:
            try:
                return await self._client.execute_command(*call.words())
            except NoScriptError:
                telemetry().redis_script_loads.inc()
                call.in_full = True
                return await self._client.execute_command(*call.words())
        except Exception as error:
            # A slot table in flux raises more than RedisErrors.
            return error
