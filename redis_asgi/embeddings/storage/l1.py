"""The in-process layer: vectors as they are answered, and what was last seen of epochs and leases."""

import threading
from collections import OrderedDict
from dataclasses import dataclass

from ..records.clock import Clocks
from ..records.codec import Value
from ..records.lease import Lease

_VALUE_BYTES = 500  # what Python spends on a value besides its bytes and texts
_MAX_SEEN = 10_000


@dataclass(frozen=True, slots=True)
class LastSeen:
    """An epoch or lease as Redis had it, and until when (monotonic) it is believed unasked."""

    epoch: bytes
    lease: Lease | None
    until: float


class L1Cache:
    """The least recently used values with their texts, at most *limit* bytes of them.

    Args:
        limit: Bytes; 0 turns the layer off.
        seconds: How long an epoch and a lease are believed without asking Redis.
        clock: Its monotonic seconds.
    """

    def __init__(self, limit: int, seconds: float, clock: Clocks) -> None:
        self._limit = limit if seconds else 0
        self._seconds = seconds
        self._clock = clock
        self._values: OrderedDict[bytes, tuple[Value, int]] = OrderedDict()
        self._seen: OrderedDict[tuple[bytes, bytes], LastSeen] = OrderedDict()
        self.bytes = 0
        self._lock = threading.Lock()  # loops in several threads may share one middleware

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self._values)} vectors, {self.bytes} of {self._limit} bytes>"

    @property
    def on(self) -> bool:
        """Whether anything is kept."""
        return self._limit > 0

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()
            self._seen.clear()
            self.bytes = 0

    def get(self, name: bytes, now: float) -> Value | None:
        """The value of a key, unless it has expired; *now* is Unix seconds."""
        kept = self._values.get(name)
        if kept is None:
            return None
        value = kept[0]
        if value.expires_at is None or value.expires_at <= now:
            self.drop(name)
            return None
        try:
            self._values.move_to_end(name)
        except KeyError:
            return value  # another thread has just dropped it
        return value

    def put(self, name: bytes, value: Value) -> None:
        """Keep *value*; one without a known end,
        or larger than a quarter of the layer, is not kept.
        """
        size = _VALUE_BYTES + len(value.raw) + sum(map(len, value.texts.values()))
        with self._lock:
            self._drop(name)
            if value.expires_at is None or size * 4 > self._limit:
                return
            self._values[name] = (value, size)
            self.bytes += size
            while self.bytes > self._limit:
                # In one step, as a reader, who takes no lock, may put another at the end meanwhile.
                _, (_, size) = self._values.popitem(last=False)
                self.bytes -= size

    def weigh(self, name: bytes, value: Value) -> None:
        """Count what was rendered of *value* since it was put, if it is still kept."""
        kept = self._values.get(name)
        if kept is not None and kept[0] is value:
            self.put(name, value)

    def drop(self, name: bytes) -> None:
        """Forget a value."""
        with self._lock:
            self._drop(name)

    def _drop(self, name: bytes) -> None:
        kept = self._values.pop(name, None)
        if kept is not None:
            self.bytes -= kept[1]

    def seen(self, epoch_name: bytes, lease_name: bytes) -> LastSeen | None:
        """The words of Redis about this epoch and lease, if less than `seconds` old."""
        kept = self._seen.get((epoch_name, lease_name))
        return kept if kept is not None and kept.until > self._clock.monotonic() else None

    def note(self, epoch_name: bytes, lease_name: bytes, epoch: bytes, lease: Lease | None, asked_at: float) -> None:
        """Remember what Redis said to a question of *asked_at* (monotonic seconds)."""
        if not self.on:
            return
        with self._lock:
            self._seen[epoch_name, lease_name] = LastSeen(epoch, lease, asked_at + self._seconds)
            self._seen.move_to_end((epoch_name, lease_name))
            if len(self._seen) > _MAX_SEEN:
                self._seen.popitem(last=False)

    def grant(self, epoch_name: bytes, lease_name: bytes, lease: Lease | None) -> None:
        """A lease given or taken here, at once; what is known of the epoch gets no younger by it."""
        with self._lock:
            kept = self._seen.get((epoch_name, lease_name))
            if kept is not None:
                self._seen[epoch_name, lease_name] = LastSeen(kept.epoch, lease, kept.until)

    def forget(self, epoch_name: bytes) -> None:
        """Ask Redis again about this epoch."""
        with self._lock:
            for pair in [pair for pair in self._seen if pair[0] == epoch_name]:
                del self._seen[pair]
