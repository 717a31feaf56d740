"""A request's question to Redis (`Check`), and those that travel together (`Batch`)."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from ...errors import Failure
from ..limits.policy import Charges
from ..limits.reply import Reply
from ..limits.strategies import Mode

if TYPE_CHECKING:
    from .batcher import Batcher

Outcome: TypeAlias = Reply | Failure


class Check:
    """One request's question. Its deadline runs from its arrival.

    Args:
        read: Makes what the waiter is given of the outcome; ``None`` = the outcome itself. It runs for a whole batch in
            one go, where the same few lines stay in the processor's caches: for each request by itself, between system
            calls, they take twice as long.
    """

    __slots__ = ("at", "charges", "deadline", "future", "mode", "read", "receipts", "timeout", "written")

    # The requests in flight that it is about: see `HoldingCheck`.
    holders: Sequence[bytes] = ()
    slot: Any = None

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        mode: Mode,
        charges: Charges,
        timeout: float,
        receipts: Sequence[int] = (),
        read: "Callable[[Check, Outcome], object] | None" = None,
    ) -> None:
        self.mode = mode
        self.charges = charges
        self.receipts = receipts
        self.timeout = timeout
        self.deadline = loop.time() + timeout
        self.written = 0.0  # when its batch was about to be written, on the loop's clock
        self.at = 0.0  # and on the limits'
        self.read = read
        self.future: asyncio.Future[Any] = loop.create_future()

    def answer(self, outcome: Outcome) -> None:
        """Give *outcome* to who waits, if anybody still does."""
        if not self.future.done():
            try:
                self.future.set_result(outcome if self.read is None else self.read(self, outcome))
            except Exception as error:
                # A defect of ours is its own request's, not its neighbours'.
                self.future.set_exception(error)

    @property
    def left(self) -> float:
        """Seconds that it had left for its trip when its batch was written."""
        return self.deadline - self.written

    def waited(self) -> float:
        """Seconds since its arrival."""
        return self.future.get_loop().time() - self.deadline + self.timeout


class HoldingCheck(Check):
    """A question about requests in flight.

    Attributes:
        holders: Their ids.
        slot: What an admission gives to the one that waits.
    """

    __slots__ = ("holders", "slot")

    holders: Sequence[bytes]
    slot: Any

    @property
    def may_have_run(self) -> bool:
        """Whether Redis may have been asked, or be asked yet."""
        return self.written > 0 or self.charges.is_spread


class Batch:
    """Checks that are sent together; from here on their command may run whatever happens."""

    __slots__ = ("calls", "checks", "is_told", "limit", "worst", "written")

    def __init__(self, checks: list[Check], written: float, limit: float) -> None:
        self.checks = checks
        self.written = written  # on the loop's clock
        self.limit = limit  # when its connection is dropped
        self.is_told = False  # whether the breaker has heard how it went
        self.calls = 1  # commands that are not answered yet
        self.worst: Failure | None = None  # of those that are


class Wire(Protocol):
    """How batches reach Redis."""

    @property
    def busy(self) -> int:
        """How many batches are under way, or prepared."""

    def start(self, batcher: "Batcher") -> None:
        """Take what waits in *batcher* and send it, as soon as there is a connection."""

    def read(self) -> None:
        """Give out replies that have come and wait for their turn."""

    def abort(self, batch: Batch) -> None:
        """Drop the connection *batch* went out on."""

    def renew(self) -> None:
        """Drop all connections, those being made included: the next batch gets a new one."""

    def lacks(self) -> Failure:
        """What a check still in the queue at its deadline was waiting for."""

    async def aclose(self) -> None:
        """End what is under way."""


def slot_key(check: Check) -> bytes:
    """The key that says which slot, and so which node, a check of one partition belongs to."""
    key: bytes = check.charges[0].partition.key
    return key


def by_slot(checks: Iterable[Check]) -> list[list[Check]]:
    """*checks* of one partition each, by what may go in one command where slots are enforced."""
    return [list(group) for _, group in groupby(sorted(checks, key=slot_key), slot_key)]


def spans_slots(checks: Iterable[Check]) -> bool:
    """Whether a command for *checks* has keys of more than one partition."""
    return len({charge.partition.key for check in checks for charge in check.charges}) > 1


def graver(one: Failure | None, other: Failure | None) -> Failure | None:
    """Of what went wrong with two commands of a batch, what is to be told of it: a `Failure.REPLY` says least."""
    return other if one is None or (one is Failure.REPLY and other is not None) else one


def still_waiting(checks: Iterable[Check]) -> list[Check]:
    """Those of *checks* without an outcome, settlements that nobody waits for included."""
    return [check for check in checks if not check.future.done()]


def resolve(checks: Iterable[Check], outcome: Outcome) -> None:
    """Give *outcome* to everyone of *checks* who still waits."""
    for check in checks:
        check.answer(outcome)


def split_late(checks: Sequence[Check], now: float) -> tuple[list[Check], list[Check]]:
    """Those of *checks* whose deadline has passed at *now* (on the loop's clock), and the others."""
    late = [check for check in checks if check.deadline <= now]
    return late, [check for check in checks if check.deadline > now] if late else list(checks)
