"""The short way to Redis: batches written straight to the socket of a pooled connection, replies
read as they arrive.

A `DirectConnection` takes the socket over from redis-py: no task, no timer and no stream between a
batch and its reply, which halves what a trip costs the process. Another caller of the pool who
waits for a connection gets this one as soon as it is idle.
"""

import asyncio
from collections import deque
from typing import Any

import hiredis
import redis.asyncio as aioredis
from redis.asyncio.connection import AbstractConnection

from ...connection import side_connection
from ...connection.client_factory import QueueingPool
from ...connection.direct import Takeover
from ...errors import Failure, OddReply, classify, classify_reply, is_crossslot
from ...telemetry import telemetry
from .batcher import Batcher
from .check import SubmittedBatch, graver, resolve, spans_slots
from .pooled_transport import PooledTransport
from .script import Call


class DirectConnection(Takeover, asyncio.Protocol):
    """One connection while the limiter has it: a queue of batches,
    answered in the order they were sent.
    """

    def __init__(
        self, owner: "DirectTransport", batcher: Batcher, connection: AbstractConnection, transport: asyncio.Transport
    ) -> None:
        super().__init__(transport)
        self.connection = connection
        self.sent: deque[tuple[SubmittedBatch, Call]] = deque()
        self.under_way = 0  # batches
        self._why: Failure | None = None  # it was dropped
        self._owner = owner
        self._batcher = batcher
        self._unread: list[bytes] = []

    def send(self, batch: SubmittedBatch) -> None:
        """Write *batch*."""
        self.under_way += 1
        calls = self._batcher.calls(batch.checks)
        batch.calls = len(calls)
        for call in calls:
            self.sent.append((batch, call))
            self.transport.write(call.command())

    def hang_up(self, why: Failure | None = None) -> None:
        """Drop the connection at once; what was sent is told so, or *why*."""
        self._why = why or self._why
        self._owner.lost(self)
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        unread = self._unread
        unread.append(data)
        if len(unread) > 1:
            return
        if not self._batcher.waits and len(self.sent) == 1 and len(self.sent[0][1].checks) == 1:
            self.read()
            return
        # Two turns of the loop later the requests that came in together with it are waiting. They
        # leave in the next batch, and only then are the answers of this one worked on.
        soon = self._batcher.loop.call_soon
        soon(soon, self.read)

    def read(self) -> None:
        """Give out the replies that have come, and send what waits."""
        if not self._unread:
            return
        if not self._give_out():
            # No Redis at the other end, or one out of step:
            # nothing it says can be told apart any more.
            self.hang_up()
            return
        if not self.sent:
            self._owner.idle(self)
        self._batcher.start_if_due()

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.lost(self)
        self._give_out()
        failure = self._why or (classify(exc) if exc is not None else Failure.CONNECTION)
        while self.sent:
            self._batcher.completed(self.sent.popleft()[0], failure)
        super().connection_lost(exc)
        self._batcher.start_if_due()

    def _give_out(self) -> bool:
        """Answer who the unread replies are for; whether they are replies."""
        unread, self._unread = self._unread, []
        replies = self.replies
        try:
            for data in unread:
                if not replies.has_data():
                    side_connection.refuse_too_much(data)
                replies.feed(data)
            while (reply := replies.gets()) is not False:
                self._answer(reply)
        except Exception as error:
            self._why = classify(error)
            return False
        return True

    def _answer(self, reply: Any) -> None:
        if not self.sent:
            raise OddReply("Nothing was asked.")
        batch, call = self.sent[0]
        if not isinstance(reply, hiredis.ReplyError):
            failure = call.hand_out(reply)
            self.sent.popleft()  # not before the reply has proved to be one, else nothing would fail it
            self._answered(batch, failure)
            return
        self.sent.popleft()
        if str(reply).startswith("NOSCRIPT") and not call.in_full:
            command = call.command_in_full()
            if command is None:
                self._answered(batch, None)
            else:
                telemetry().redis_script_loads.inc()
                self.sent.append((batch, call))
                self.transport.write(command)
        elif is_crossslot(reply) and spans_slots(call.checks):
            self.under_way -= 1
            self._batcher.again(batch)
        else:
            failure = classify_reply(str(reply))
            resolve(call.checks, failure)
            self._answered(batch, failure)

    def _answered(self, batch: SubmittedBatch, failure: Failure | None) -> None:
        """Note how a command of *batch* went, and with the last one the batch."""
        batch.calls -= 1
        batch.worst = graver(batch.worst, failure)
        if not batch.calls:
            self.under_way -= 1
            self._batcher.completed(batch, batch.worst)


class DirectTransport:
    """The transport of a pool of our own."""

    def __init__(self, client: aioredis.Redis, pool: QueueingPool) -> None:
        self._client = client
        self._pool = pool
        self._line: DirectConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._has_lost_one = False
        self._returning: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> int:
        line = self._line
        return (line.under_way if line is not None else 0) + (self._connecting is not None)

    def timeout_cause(self) -> Failure:
        return Failure.POOL if self._pool.exhausted and self._line is None else Failure.TIMEOUT

    def start(self, batcher: Batcher) -> None:
        line = self._line
        # The pool may want the connection made anew.
        if line is not None and not line.sent and line.connection.should_reconnect():  # type: ignore[no-untyped-call]
            self._return(line)
            line = None
        if line is None:
            if self._connecting is None:
                self._connecting = batcher.loop.create_task(self._connect(batcher))
            return
        batch = batcher.take()
        if batch is not None:
            line.send(batch)

    def read(self) -> None:
        if self._line is not None:
            self._line.read()

    def abort(self, batch: SubmittedBatch) -> None:
        if self._line is not None and any(call[0] is batch for call in self._line.sent):
            self._line.hang_up(Failure.TIMEOUT)

    def renew(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._line is not None:
            self._line.hang_up()

    async def aclose(self) -> None:
        connecting = self._connecting
        self.renew()
        if connecting is not None:
            await asyncio.wait([connecting])
        if self._returning:
            await asyncio.wait(self._returning)

    def idle(self, line: DirectConnection) -> None:
        """All of *line* is answered: another caller of the pool who waits for a connection gets it."""
        if self._pool.is_wanted:
            self._return(line)

    def lost(self, line: DirectConnection) -> None:
        """The connection of *line* is gone."""
        if self._line is line:
            self._line = None
            self._has_lost_one = True
            self._later(self._drop(line.connection))

    def _give_way(self) -> None:
        if self._line is not None and not self._line.sent:
            self._return(self._line)

    def _return(self, line: DirectConnection) -> None:
        self._line = None
        line.give_back()
        self._later(self._pool.release(line.connection))

    async def _drop(self, connection: AbstractConnection) -> None:
        try:
            await connection.disconnect(nowait=True)
        finally:
            await self._pool.release(connection)

    def _later(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)

    async def _connect(self, batcher: Batcher) -> None:
        me = asyncio.current_task()
        try:
            connection = await self._pool.take()
        except Exception as error:
            if self._connecting is me:
                self._connecting = None
                batcher.connect_failed(classify(error))
            return
        transport = side_connection.transport_of(connection)
        if self._connecting is not me:
            pass
        elif transport is not None:
            self._connecting = None
            if self._has_lost_one:
                self._has_lost_one = False
                telemetry().redis_reconnects.inc()
            self._pool.on_shortage = self._give_way
            self._line = DirectConnection(self, batcher, connection, transport)
            batcher.start_if_due()
            return
        else:
            # Not redis-py's own kind of connection: go through its layers.
            self._connecting = None
            batcher.switch_to(PooledTransport(self._client))
        await self._pool.release(connection)
        batcher.start_if_due()
