"""How a batch reaches Redis through redis-py: one script call over a pooled connection, or a pipeline per cluster node.

`line` has the shorter way for pools of our own.
"""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.resources import files
from itertools import groupby, islice
from typing import Any, cast

import redis.asyncio as aioredis
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import AskError, NoScriptError, ResponseError, TryAgainError

from .. import aside
from ..errors import Failure, OddReply, classify, is_crossslot
from ..nodes import node_connection
from ..telemetry import telemetry
from .batch import Batch, Batcher, Check, distribute, graver, resolve, slot_key, spans_slots, still_waiting
from .policy import WHAT_REMAINS, bulk, log_key


def _load_script() -> bytes:
    folder = files(__package__) / "scripts"
    names = ("prelude", "fixed_window", "sliding_window_counter", "moving_window", "gcra", "batch")
    return b"\n".join((folder / f"{name}.lua").read_bytes() for name in names)


SCRIPT = _load_script()
SCRIPT_SHA = hashlib.sha1(SCRIPT, usedforsecurity=False).hexdigest().encode()


# The script with nothing to decide: whether it may be called, and once it is loaded whether it runs.
NOTHING_ASKED = (b"EVALSHA", SCRIPT_SHA, b"0", b"")


def _arguments(checks: Sequence[Check], clock: int | None) -> list[bytes | int]:
    """What follows the script in a command for *checks*: number of keys, keys, clock, questions."""
    keys: list[bytes] = []
    args: list[bytes | int] = [b"" if clock is None else clock]
    for check in checks:
        args += (check.mode.encode(), len(check.charges))
        receipts = iter(check.receipts)
        for charge in check.charges:
            keys.append(charge.partition.key)
            keys += (log_key(charge.partition.key, field) for field in charge.policies.logs)
            args += (charge.policies.spec, charge.cost if charge.unread is None else WHAT_REMAINS)
            args += islice(receipts, len(charge.policies))
    return [len(keys), *keys, *args]


@lru_cache(maxsize=1024)
def _number(value: int) -> bytes:
    return bulk(b"%d" % value)


def packed(command: bytes, script: bytes, checks: Sequence[Check], clock: int | None) -> bytes:
    """The whole command of `_arguments` in RESP, joined from what charges keep ready."""
    keys: list[bytes] = []
    args: list[bytes] = []
    key_count = words = 0
    for check in checks:
        if check.receipts:
            # Rare, and interleaved with the charges: not worth a fast path.
            return _pack(command, script, _arguments(checks, clock))
        charges = check.charges
        keys.append(charges.keys)
        key_count += charges.key_count
        if check.mode == "consume":
            args.append(charges.consume)
        else:
            args += (bulk(check.mode.encode()), _number(len(charges)), charges.terms)
        words += 2 + 2 * len(charges.each)
    head = b"*%d\r\n" % (4 + key_count + words)
    time = _number(clock) if clock is not None else _NO_CLOCK
    return b"".join((head, bulk(command), bulk(script), _number(key_count), *keys, time, *args))


_NO_CLOCK = bulk(b"")


def _pack(command: bytes, script: bytes, arguments: Sequence[bytes | int]) -> bytes:
    words = [command, script, *(arg if isinstance(arg, bytes) else b"%d" % arg for arg in arguments)]
    return b"*%d\r\n" % len(words) + b"".join(map(bulk, words))


class TaskWire:
    """Each batch is a task, for which `run` gets ready, takes what waits and sends it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._batches: dict[asyncio.Task[None], Batch | None] = {}

    @property
    def busy(self) -> int:
        return len(self._tasks)

    def start(self, batcher: Batcher) -> None:
        self._tasks.add(batcher.loop.create_task(self._drive(batcher)))

    def read(self) -> None:
        pass  # each task reads its own

    def abort(self, batch: Batch) -> None:
        for task, mine in self._batches.items():
            if mine is batch:
                task.cancel()

    def renew(self) -> None:
        # They are no longer counted, and end when they get to it.
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()

    def lacks(self) -> Failure:
        return Failure.TIMEOUT

    async def aclose(self) -> None:
        tasks = list(self._tasks)
        self.renew()
        await aside.end(tasks)

    async def run(self, batcher: Batcher) -> Failure | None:
        """Get ready, `take`, send and distribute; what went wrong with some."""
        raise NotImplementedError

    def take(self, batcher: Batcher) -> Batch | None:
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
            # RedisClusterException is no RedisError, and a slot table in flux raises KeyErrors and more.
            failure = classify(error)
            if task not in self._batches:
                # A batch that has a connection takes what waits when it is back.
                denied = failure is Failure.POOL and self.busy > 1
                if not denied:
                    batcher.lost(failure)
        finally:
            self._tasks.discard(task)
            batch = self._batches.pop(task, None)
            if batch is not None:
                batcher.done(batch, failure)
            if denied:
                batcher.plan(batcher.loop.time())
            else:
                batcher.start_if_due()


class PoolWire(TaskWire):
    """One ``EVALSHA`` carries the whole batch over a connection of a client's pool."""

    def __init__(self, client: aioredis.Redis) -> None:
        super().__init__()
        self._pool: ConnectionPool = client.connection_pool

    def lacks(self) -> Failure:
        return Failure.POOL if getattr(self._pool, "exhausted", False) else Failure.TIMEOUT

    async def run(self, batcher: Batcher) -> Failure | None:
        connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]  # a decorator of redis-py's
        # The batcher's timer is the only clock: no task and no timer per command.
        timeout, connection.socket_timeout = connection.socket_timeout, None
        try:
            await aside.freshen(connection)
            batch = self.take(batcher)
            return None if batch is None else await self._ask(batcher, connection, batch)
        except BaseException:
            # Whatever comes there now is nobody's.
            await aside.hang_up(connection)
            raise
        finally:
            connection.socket_timeout = timeout
            await self._pool.release(connection)

    async def _ask(self, batcher: Batcher, connection: AbstractConnection, batch: Batch) -> Failure | None:
        groups = batcher.groups(batch.checks)
        replies = await _call(connection, b"EVALSHA", SCRIPT_SHA, groups, batcher.clock)
        if is_crossslot(replies[0]) and spans_slots(groups[0]):
            batcher.again(batch)
            return None
        unknown = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        for i in unknown:
            # Nothing ran, so sending it again cannot count twice.
            groups[i] = still_waiting(groups[i])
        unknown = [i for i in unknown if groups[i]]
        if unknown:
            telemetry().redis_script_loads.inc(len(unknown))
            more = await _call(connection, b"EVAL", SCRIPT, [groups[i] for i in unknown], batcher.clock)
            for i, reply in zip(unknown, more, strict=True):
                replies[i] = reply
            if is_crossslot(replies[0]) and spans_slots(groups[0]):
                batcher.again(batch)
                return None
        return hand_out(groups, replies)


async def _call(
    connection: AbstractConnection, command: bytes, script: bytes, groups: Sequence[list[Check]], clock: int | None
) -> list[Any]:
    """A command for each of *groups* in one write, and its replies; error replies are among them."""
    await connection.send_packed_command([packed(command, script, group, clock) for group in groups])
    return [await _reply(connection) for _ in groups]


async def _reply(connection: AbstractConnection) -> Any:
    try:
        return await connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return error


def hand_out(groups: Sequence[list[Check]], replies: Sequence[Any]) -> Failure | None:
    """Give each of *groups* what its reply says; why some have no verdict, the gravest reason.

    Raises:
        OddReply: When one is no reply to its group; the others are given theirs.
    """
    worst: Failure | None = None
    odd: OddReply | None = None
    for group, reply in zip(groups, replies, strict=True):
        if isinstance(reply, NoScriptError) and not group:
            continue
        if isinstance(reply, Exception):
            failure: Failure | None = classify(reply)
        else:
            try:
                failure = distribute(group, reply)
            except OddReply as error:
                failure, odd = Failure.REPLY, error
        if failure is not None:
            resolve(group, failure)
        worst = graver(worst, failure)
    if odd is not None:
        raise odd
    return worst


class TableWire(TaskWire):
    """Of a cluster whose slot table is not known yet, or has a hole: reads it, and hands what waits to the nodes.

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


class NodeWire(TaskWire):
    """One pipeline to one node of a cluster; a script call must stay in one slot: one per partition.

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
            checks = sorted(batch.checks, key=slot_key)
            groups = [list(group) for _, group in groupby(checks, slot_key)]
            replies = await _pipeline(connection, b"EVALSHA", SCRIPT_SHA, groups, batcher.clock)
            unknown = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
            for i in unknown:
                groups[i] = still_waiting(groups[i])
            unknown = [i for i in unknown if groups[i]]
            if unknown:
                telemetry().redis_script_loads.inc(len(unknown))
                again = await _pipeline(connection, b"EVAL", SCRIPT, [groups[i] for i in unknown], batcher.clock)
                for i, reply in zip(unknown, again, strict=True):
                    replies[i] = reply
        for i, reply in enumerate(replies):
            if isinstance(reply, AskError | TryAgainError):  # a MovedError is an AskError
                replies[i] = await self._follow(groups[i], batcher.clock)
        return hand_out(groups, replies)

    async def _follow(self, group: list[Check], clock: int | None) -> Any:
        """The reply of the node that the partition of *group* has moved to; here nothing ran."""
        arguments = _arguments(group, clock)
        try:
            try:
                return await self._client.execute_command("EVALSHA", SCRIPT_SHA, *arguments)
            except NoScriptError:
                telemetry().redis_script_loads.inc()
                return await self._client.execute_command("EVAL", SCRIPT, *arguments)
        except Exception as error:
            # A slot table in flux raises more than RedisErrors.
            return error


async def _pipeline(
    connection: AbstractConnection, command: bytes, script: bytes, groups: Sequence[list[Check]], clock: int | None
) -> list[Any]:
    """The reply to each of *groups*, an error reply being one."""
    await connection.send_packed_command(b"".join(packed(command, script, group, clock) for group in groups))
    replies: list[Any] = []
    for _ in groups:
        try:
            replies.append(await connection.read_response(disable_decoding=True))
        except ResponseError as error:
            replies.append(error)
    return replies
