"""A request's question to Redis (`Check`), and those that travel together (`SubmittedBatch`)."""

import asyncio
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from ...errors import Failure
from ..limits.charge import Charges
from ..limits.counter import Mode
from ..limits.reply import Reply

if TYPE_CHECKING:
    from .batcher import Batcher

Outcome: TypeAlias = Reply | Failure


class Check:
    """One question, of a request most of all. Its deadline runs from its arrival.

    Attributes:
        is_asked: Whether Redis is asked, so that there is a *future*.
        asked: What about.
        written: When its batch was about to be written, on the loop's clock; 0.0 before.
        at: The same on the limits' clock.
    """

    __slots__ = ("asked", "at", "deadline", "future", "is_asked", "mode", "receipts", "timeout", "written")

    # The ids of the requests in flight that it is about; of others it says nothing.
    holders: Sequence[bytes] = ()

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        mode: Mode,
        charges: Charges,
        timeout: float,
        receipts: Sequence[int] = (),
    ) -> None:
        self.mode = mode
        self.receipts: Sequence[int] = receipts
        self.begin(loop, charges, timeout)

    def begin(self, loop: asyncio.AbstractEventLoop, charges: Charges, timeout: float) -> None:
        """Ask about *charges*, and wait for an answer from now on."""
        self.is_asked = True
        self.asked = charges
        self.written = self.at = 0.0
        self.timeout = timeout
        self.deadline = loop.time() + timeout
        self.future: asyncio.Future[Any] = loop.create_future()

    def answer(self, outcome: Outcome) -> None:
        """Give *outcome* to its request, if that still waits."""
        future = self.future
        if not future.done():
            try:
                future.set_result(self.hear(outcome))
            except Exception as error:
                # A defect of ours is its own request's, not its neighbours'.
                future.set_exception(error)

    def hear(self, outcome: Outcome) -> object:
        """The value that the waiter is given of *outcome*.

        It runs for a whole batch in one go, where the same few lines stay in the processor's
        caches: for each request by itself, between system calls, they take twice as long.
        """
        return outcome

    def split(self) -> "Sequence[Check]":
        """One for each partition that it is about, in its place,
        where nobody waits for it; else itself.
        """
        return (self,)

    @property
    def may_have_run(self) -> bool:
        """Whether Redis may have been asked already, or be asked yet."""
        return self.written > 0 or self.asked.is_spread

    @property
    def left(self) -> float:
        """Seconds that it had left for its trip when its batch was written."""
        return self.deadline - self.written

    def waited(self) -> float:
        """Seconds since its arrival."""
        return self.future.get_loop().time() - self.deadline + self.timeout


class HoldingCheck(Check):
    """A question about the requests in flight of these *holders*."""

    __slots__ = ("holders",)

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        mode: Mode,
        charges: Charges,
        timeout: float,
        receipts: Sequence[int] = (),
        *,
        holders: Sequence[bytes],
    ) -> None:
        super().__init__(loop, mode, charges, timeout, receipts)
        self.holders = holders


class SubmittedBatch:
    """Checks that are sent together; from here on their command may run whatever happens."""

    __slots__ = ("calls", "checks", "is_told", "limit", "worst", "written")

    def __init__(self, checks: list[Check], written: float, limit: float) -> None:
        self.checks = checks
        self.written = written  # on the loop's clock
        self.limit = limit  # when its connection is dropped
        self.is_told = False  # whether the breaker has heard how it went
        self.calls = 1  # commands that are not answered yet
        self.worst: Failure | None = None  # of those that are


class Transport(Protocol):
    """A way by which batches reach Redis."""

    @property
    def busy(self) -> int:
        """The number of batches under way, or prepared."""

    def start(self, batcher: "Batcher") -> None:
        """Take what waits in *batcher* and send it, as soon as there is a connection."""

    def read(self) -> None:
        """Give out replies that have come and wait for their turn."""

    def abort(self, batch: SubmittedBatch) -> None:
        """Drop the connection *batch* went out on."""

    def renew(self) -> None:
        """Drop all connections, those being made included: the next batch gets a new one."""

    def timeout_cause(self) -> Failure:
        """The failure of a check still in the queue at its deadline."""

    async def aclose(self) -> None:
        """End what is under way."""


def slot_key(check: Check) -> bytes:
    """The key that says which slot, and so which node, a check of one partition belongs to."""
    key: bytes = check.asked[0].partition.key
    return key


def by_slot(checks: Iterable[Check]) -> list[list[Check]]:
    """*checks* of one partition each, by what may go in one command where slots are enforced."""
    return [list(group) for _, group in groupby(sorted(checks, key=slot_key), slot_key)]


def spans_slots(checks: Iterable[Check]) -> bool:
    """Whether a command for *checks* has keys of more than one partition."""
    return len({charge.partition.key for check in checks for charge in check.asked}) > 1


def graver(one: Failure | None, other: Failure | None) -> Failure | None:
    """Of what went wrong with two commands of a batch,
    what is to be told of it: a `Failure.REPLY` says least.
    """
    return other if one is None or (one is Failure.REPLY and other is not None) else one


def still_waiting(checks: Iterable[Check]) -> list[Check]:
    """The *checks* without an outcome, settlements without a waiter included."""
    return [check for check in checks if not check.future.done()]


def resolve(checks: Iterable[Check], outcome: Outcome) -> None:
    """Give *outcome* to everyone of *checks* who still waits."""
    for check in checks:
        check.answer(outcome)


def split_late(checks: Sequence[Check], now: float) -> tuple[list[Check], list[Check]]:
    """The *checks* whose deadline has passed at *now* (on the loop's clock), and the others."""
    late = [check for check in checks if check.deadline <= now]
    return late, [check for check in checks if check.deadline > now] if late else list(checks)
