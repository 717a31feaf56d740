"""Operations of a store, and their results; trouble with Redis is a value here, never an exception."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ...errors import Failure

WRITE_TIMEOUT = 2.0  # seconds; only the flight it belongs to waits for a write

# What stands for a value that may be there or not, since its server did not say. No record of ours
# is empty, so a reader of one finds none; only ``None`` says that there is nothing.
UNKNOWN = b""


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
class WriteResult:
    """The result of a write or a delete.

    Attributes:
        count: Values written, or deleted.
        failure: Why not all, when Redis gave no answer or refused.
    """

    count: int
    failure: Failure | None = None


class VectorStore(Protocol):
    """A store as the cache and the middleware need it."""

    @property
    def writable(self) -> bool:
        """Whether a write may succeed now, as far as is known."""

    async def lookup(self, names: Sequence[bytes], within: float) -> "list[bytes | None] | Failure":
        """The values of *names*: ``None`` where there is none, `UNKNOWN` where that is not known.

        A `Failure` when nothing at all is known.
        """

    async def claim(self, write: Write, within: float) -> bytes | None:
        """Keep *write* if there is nothing of its name; what is there then,
        or ``None`` when that is not known.
        """

    async def write(self, writes: Sequence[Write], within: float = WRITE_TIMEOUT) -> WriteResult:
        """Keep *writes*; those of mode ``set`` are counted."""

    async def delete(self, names: Sequence[bytes], within: float) -> WriteResult:
        """Forget *names*."""

    async def revoke(self, names: Sequence[bytes], within: float, notes: Sequence[Write] = ()) -> WriteResult:
        """Forget *names* and keep *notes*; what fails is done as soon as Redis answers again.

        At most 10,000 of them wait for that, the oldest go first, and all with the process.
        """
