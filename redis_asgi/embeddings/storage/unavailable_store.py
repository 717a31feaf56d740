"""The store when no client can be built: everything fails, for a reason that is known."""

from collections.abc import Sequence

from ...errors import Failure
from .operations import WRITE_TIMEOUT, Write, WriteResult


class AbsentVectors:
    """No store at all."""

    writable = False

    def __init__(self, reason: Failure) -> None:
        self._reason = reason

    async def lookup(self, names: Sequence[bytes], within: float) -> "list[bytes | None] | Failure":
        return self._reason

    async def claim(self, write: Write, within: float) -> bytes | None:
        return None

    async def write(self, writes: Sequence[Write], within: float = WRITE_TIMEOUT) -> WriteResult:
        return WriteResult(0, self._reason)

    async def delete(self, names: Sequence[bytes], within: float) -> WriteResult:
        return WriteResult(0, self._reason)

    async def revoke(self, names: Sequence[bytes], within: float, notes: Sequence[Write] = ()) -> WriteResult:
        return WriteResult(0, self._reason)
