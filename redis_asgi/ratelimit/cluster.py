"""Batches on Redis Cluster: each node has its own, and a request may have parts at several."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

import redis.asyncio as aioredis

from ..client import Client, Turnstile
from ..connection import RedisManager
from ..errors import Failure
from .batch import Batcher, Check, Outcome, Wire, resolve
from .line import LineWire
from .policy import Charge, Charges
from .refusals import RefusalMemory
from .strategies import VALUES_PER_COUNTER, Reply, charged_receipts
from .wires import NodeWire, PoolWire, TableWire, slot_key


class ClusterBatcher:
    """One `Batcher` per node, so that a dead node degrades only its own partitions.

    A request whose rules partition differently lives in several slots. Its parts are asked at once; if one refuses,
    the others are refunded by receipt: for that moment they are counted too much, never too little.
    """

    def __init__(self, manager: RedisManager, client: aioredis.RedisCluster, *, clock: int | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self._manager = manager
        self._client = client
        self._clock = clock
        self.closed = False
        self.breaker = None  # each node has one of its own, and where a check goes is found out for each
        self._batchers: dict[str, Batcher] = {}
        self._refusals = manager.shared(RefusalMemory.from_settings)

    def submit(self, check: Check) -> None:
        """Queue *check* at the node, or the nodes, that its keys live on."""
        parts = _by_partition(check.charges)
        if len(parts) == 1 or check.mode in ("charge", "refund"):
            self._route(check)
            return
        asked = [Check(self.loop, check.mode, Charges(charges), check.timeout) for charges in parts.values()]
        left = len(asked)

        def one_answered(_: asyncio.Future[Outcome]) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self._combine(check, asked)

        def withdraw(_: asyncio.Future[Outcome]) -> None:
            # Nobody waits any more: what is not written yet is not sent.
            for part in asked:
                if not part.written:
                    part.future.cancel()

        check.future.add_done_callback(withdraw)
        for part in asked:
            part.future.add_done_callback(one_answered)
            self._route(part)

    async def aclose(self) -> None:
        """End the batches under way at every node."""
        self.closed = True
        batchers, self._batchers = list(self._batchers.values()), {}
        for batcher in batchers:
            await batcher.aclose()

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
            wire = NodeWire(self._client, name) if name else TableWire(self._client, self._submit)
            batcher = self._batchers[name] = Batcher(wire, self._manager.breaker(name), clock=self._clock)
        return batcher

    def _combine(self, check: Check, parts: Sequence[Check]) -> None:
        check.written = min(part.written for part in parts)
        outcomes = [Failure.TIMEOUT if part.future.cancelled() else part.future.result() for part in parts]
        failure = next((outcome for outcome in outcomes if isinstance(outcome, Failure)), None)
        replies = [outcome if isinstance(outcome, list) else [0] for outcome in outcomes]
        admitted = failure is None and all(reply[0] for reply in replies)
        numbers: dict[int, Reply] = {}
        for part, reply in zip(parts, replies, strict=True):
            back = check.mode == "consume" and reply[0] and not admitted
            if back and not self.closed:
                self._give_back(part, reply)
            at = 1
            for charge in part.charges:
                end = at + VALUES_PER_COUNTER * len(charge.policies)
                numbers[id(charge)] = mine = reply[at:end]
                at = end
                for i, policy in enumerate(charge.policies if back else ()):
                    fits, remaining = VALUES_PER_COUNTER * i, VALUES_PER_COUNTER * i + 1
                    if mine[fits]:
                        mine[remaining] = min(policy.quota, mine[remaining] + charge.taken(mine[fits]))
        if failure is not None:
            resolve([check], failure)
            return
        combined = [int(admitted)]
        for charge in check.charges:
            combined += numbers[id(charge)]
        resolve([check], combined)

    def _give_back(self, part: Check, reply: Reply) -> None:
        """Refund what *part* was charged by *reply*, and forget whom that refused meanwhile."""
        fits = iter(reply[1::VALUES_PER_COUNTER])
        charges = []
        for charge in part.charges:
            taken = max(charge.taken(next(fits)) for _ in charge.policies)
            charges.append(charge if charge.unread is None else replace(charge, cost=taken, unread=None))
        refund = Check(self.loop, "refund", Charges(charges), part.timeout, charged_receipts(reply))

        def forget(_: asyncio.Future[Outcome]) -> None:
            self._refusals.forget(part.charges[0].partition.key, time.monotonic())

        refund.future.add_done_callback(forget)
        self._route(refund)


def _by_partition(charges: Sequence[Charge]) -> dict[bytes, list[Charge]]:
    parts: dict[bytes, list[Charge]] = {}
    for charge in charges:
        parts.setdefault(charge.partition.key, []).append(charge)
    return parts


def make_batcher(manager: RedisManager, client: Client) -> "Batcher | ClusterBatcher":
    """The batcher of a client in its loop: see `RedisManager.part`."""
    if isinstance(client, aioredis.RedisCluster):
        return ClusterBatcher(manager, client)
    pool = client.connection_pool
    wire: Wire = LineWire(client, pool) if isinstance(pool, Turnstile) else PoolWire(client)
    return Batcher(wire, manager.breaker())
