"""Requests whose keys live in several slots:
asked part by part where each command may name keys of one slot only.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

from ...connection.manager import RedisManager
from ...errors import Failure
from ..limits.charge import Charge, Charges, by_partition
from ..limits.clock import CLOCK
from ..limits.policy import Policy
from ..limits.refusal_memory import RefusalMemory
from ..limits.reply import Numbers, Reply, charged_receipts, numbers_of, reply_of
from .batcher import Batcher
from .check import Check, HoldingCheck, Outcome, resolve


class Parts:
    """Asks a request's parts at once, and puts what comes of them together.

    If one refuses, the others are refunded by receipt:
    for that moment they are counted too much, never too little.

    Args:
        route: Queues a check of one partition.
        is_closed: Whether nothing is sent any more.
    """

    def __init__(self, manager: RedisManager, route: Callable[[Check], None], is_closed: Callable[[], bool]) -> None:
        self._loop = asyncio.get_running_loop()
        self._route = route
        self._is_closed = is_closed
        self._refusals = manager.per_process(RefusalMemory.from_settings)

    def takes(self, check: Check) -> bool:
        """Ask *check* in parts, if it has several partitions; whether that is so."""
        parts = by_partition(check.asked)
        if len(parts) == 1:
            return False
        if check.mode in ("charge", "refund"):
            for part in check.split():
                self._route(part)
            check.future.cancel()  # nobody waits for it
            return True
        asked = [self._part(check, Charges(charges)) for charges in parts.values()]
        left = len(asked)

        def one_answered(_: asyncio.Future[Outcome]) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self._combine(check, asked)

        def withdraw(_: asyncio.Future[Outcome]) -> None:
            # No request waits any more: what is not written yet is not sent.
            for part in asked:
                if not part.written:
                    part.future.cancel()

        check.future.add_done_callback(withdraw)
        for part in asked:
            part.deadline = check.deadline
            part.future.add_done_callback(one_answered)
            self._route(part)
        return True

    def _part(self, check: Check, charges: Charges) -> Check:
        if not (charges.holds and check.holders):
            return Check(self._loop, check.mode, charges, check.timeout)
        return HoldingCheck(self._loop, check.mode, charges, check.timeout, holders=check.holders)

    def _combine(self, check: Check, parts: Sequence[Check]) -> None:
        check.written = min(part.written for part in parts)
        check.at = min(part.at for part in parts)
        outcomes = [Failure.TIMEOUT if part.future.cancelled() else part.future.result() for part in parts]
        failure = next((outcome for outcome in outcomes if isinstance(outcome, Failure)), None)
        replies = [outcome if isinstance(outcome, list) else [0] for outcome in outcomes]
        admitted = failure is None and all(reply[0] for reply in replies)
        numbers: dict[int, list[Numbers]] = {}
        for part, reply in zip(parts, replies, strict=True):
            back = check.mode == "consume" and reply[0] and not admitted
            if back and not self._is_closed():
                self._give_back(part, reply)
            said = iter(numbers_of(reply))
            for charge in part.asked:
                mine = list(islice(said, len(charge.policies)))
                if back:
                    mine = [_untaken(charge, policy, each) for policy, each in zip(charge.policies, mine, strict=True)]
                numbers[id(charge)] = mine
        outcome = failure or reply_of(admitted, [each for charge in check.asked for each in numbers[id(charge)]])
        resolve([check], outcome)

    def _give_back(self, part: Check, reply: Reply) -> None:
        """Refund what *part* was charged by *reply*, and forget whom that refused meanwhile.

        Not what is in flight: who asked releases it by its id, or keeps it.
        """
        said = iter(zip(numbers_of(reply), charged_receipts(reply), strict=True))
        charges: list[Charge] = []
        receipts: list[int] = []
        for charge in part.asked:
            mine = list(islice(said, len(charge.policies)))
            if charge.policies.holds:
                continue
            taken = max(charge.taken(numbers.fits) for numbers, _ in mine)
            charges.append(charge if charge.unread is None else replace(charge, cost=taken, unread=None))
            receipts += (receipt for _, receipt in mine)
        if not charges:
            return
        refund = Check(self._loop, "refund", Charges(charges), part.timeout, receipts)

        def forget(_: asyncio.Future[Outcome]) -> None:
            self._refusals.forget(part.asked[0].partition.key, CLOCK.monotonic())

        refund.future.add_done_callback(forget)
        self._route(refund)


class ApartWhereAsked:
    """Keeps the partitions apart of one server that enforces slots, as soon as that is known.

    See `RedisManager.keys_apart`.
    """

    def __init__(self, manager: RedisManager, batcher: Batcher) -> None:
        self._manager = manager
        # What is asked in parts was admitted as a whole.
        self._parts = Parts(manager, lambda part: batcher.submit(part, is_admitted=True), lambda: batcher.closed)
        self.takes = self._parts.takes

    @property
    def now(self) -> bool:
        return self._manager.keys_apart

    def found(self) -> None:
        self._manager.found_slots()


def _untaken(charge: Charge, policy: Policy, numbers: Numbers) -> Numbers:
    """*numbers* of before *charge* was made."""
    return numbers._replace(remaining=min(policy.quota, numbers.remaining + charge.taken(numbers.fits)))
