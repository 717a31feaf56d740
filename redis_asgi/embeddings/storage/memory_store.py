"""The store of ``memory://``: vectors, leases and epochs in this process."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from ...errors import Failure
from ...settings import Settings
from .operations import WRITE_TIMEOUT, Write, WriteResult

_MEMORY_BYTES = 64 * 1024 * 1024
_ENTRY_BYTES = 200  # what Python spends on a key and its place


class MemoryVectors:
    """The store of ``memory://``: the least recently used values of this process, bounded by bytes.

    Args:
        settings: ``EMBEDDING_CACHE_L1_BYTES`` bounds it when that is more than 64 MiB.
        clock: Monotonic seconds.
    """

    writable = True

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = max(settings.EMBEDDING_CACHE_L1_BYTES, _MEMORY_BYTES)
        self._clock = clock
        self._values: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()
        self.bytes = 0
        self._lock = threading.Lock()  # loops in several threads may share one manager

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self._values)} values, {self.bytes} of {self._limit} bytes>"

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()
            self.bytes = 0

    async def lookup(self, names: Sequence[bytes], within: float) -> "list[bytes | None] | Failure":
        with self._lock:
            return [self._get(name) for name in names]

    async def claim(self, write: Write, within: float) -> bytes | None:
        with self._lock:
            self._write([write])
            return self._get(write.name)

    async def write(self, writes: Sequence[Write], within: float = WRITE_TIMEOUT) -> WriteResult:
        with self._lock:
            return self._write(writes)

    def _write(self, writes: Sequence[Write]) -> WriteResult:
        count = 0
        for write in writes:
            present = self._get(write.name)
            if write.mode == "renew":
                if present is not None:
                    self._values[write.name] = (present, self._clock() + write.ttl)
                continue
            if write.mode == "absent" and present is not None:
                continue
            self._drop(write.name)
            self._values[write.name] = (write.value, self._clock() + write.ttl)
            self.bytes += _ENTRY_BYTES + len(write.name) + len(write.value)
            count += write.mode == "set"
        while self.bytes > self._limit:
            self._drop(next(iter(self._values)))
        return WriteResult(count)

    async def delete(self, names: Sequence[bytes], within: float) -> WriteResult:
        with self._lock:
            return WriteResult(sum(self._get(name) is not None and self._drop(name) for name in names))

    async def revoke(self, names: Sequence[bytes], within: float, notes: Sequence[Write] = ()) -> WriteResult:
        with self._lock:
            for name in names:
                self._drop(name)
            self._write(notes)
            return WriteResult(len(names) + len(notes))

    def _get(self, name: bytes) -> bytes | None:
        kept = self._values.get(name)
        if kept is None:
            return None
        value, expires = kept
        if expires <= self._clock():
            self._drop(name)
            return None
        self._values.move_to_end(name)
        return value

    def _drop(self, name: bytes) -> bool:
        kept = self._values.pop(name, None)
        if kept is None:
            return False
        self.bytes -= _ENTRY_BYTES + len(name) + len(kept[0])
        return True
