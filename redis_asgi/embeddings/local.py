"""The in-process layer: vectors as they are answered, and what was last seen of epochs and leases."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from .codec import Value
from .lease import Lease
from .vectors import Encoding, render

_ENTRY_BYTES = 500  # what Python spends on an entry besides its texts
_MAX_SEEN = 10_000


@dataclass(slots=True, eq=False)
class Entry:
    """One input's vector with the texts it was rendered to.

    Attributes:
        value: As stored.
        expires_at: Unix seconds; ``None`` when the key does not tell.
        texts: JSON by representation.
    """

    value: Value
    expires_at: float | None
    texts: dict[Encoding, bytes] = field(default_factory=dict)

    def text(self, encoding: Encoding) -> bytes:
        """The vector's JSON, rendered once."""
        text = self.texts.get(encoding)
        if text is None:
            text = self.texts[encoding] = render(self.value, encoding)
        return text

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return _ENTRY_BYTES + len(self.value.raw) + sum(map(len, self.texts.values()))


@dataclass(frozen=True, slots=True)
class Seen:
    """An epoch or lease as Redis had it, and until when (monotonic) it is believed unasked."""

    epoch: bytes
    lease: Lease | None
    until: float


class LocalVectors:
    """The least recently used entries, at most *limit* bytes of them.

    Args:
        limit: Bytes; 0 turns the layer off.
        seconds: How long an epoch and a lease are believed without asking Redis.
        clock: Monotonic seconds.
    """

    def __init__(self, limit: int, seconds: float, clock: Callable[[], float]) -> None:
        self._limit = limit if seconds else 0
        self._seconds = seconds
        self._clock = clock
        self._entries: OrderedDict[bytes, tuple[Entry, int, int]] = OrderedDict()
        self._seen: OrderedDict[tuple[bytes, bytes], Seen] = OrderedDict()
        self.bytes = 0

    @property
    def on(self) -> bool:
        """Whether anything is kept."""
        return self._limit > 0

    def get(self, name: bytes, now: float) -> Entry | None:
        """The entry of a key, unless it has expired; *now* is Unix seconds."""
        kept = self._entries.get(name)
        if kept is None:
            return None
        entry, _, texts = kept
        if entry.expires_at is None or entry.expires_at <= now:
            self.drop(name)
            return None
        self._entries.move_to_end(name)
        if len(entry.texts) != texts:  # rendered in one more representation since
            self.put(name, entry)
        return entry

    def put(self, name: bytes, entry: Entry) -> None:
        """Keep *entry*; one without a known end, or larger than a quarter of the layer, is not kept."""
        self.drop(name)
        size = entry.bytes
        if entry.expires_at is None or size * 4 > self._limit:
            return
        self._entries[name] = (entry, size, len(entry.texts))
        self.bytes += size
        while self.bytes > self._limit:
            self.drop(next(iter(self._entries)))

    def drop(self, name: bytes) -> None:
        """Forget an entry."""
        kept = self._entries.pop(name, None)
        if kept is not None:
            self.bytes -= kept[1]

    def seen(self, epoch_name: bytes, lease_name: bytes) -> Seen | None:
        """What Redis said of this epoch and lease less than `seconds` ago."""
        kept = self._seen.get((epoch_name, lease_name))
        return kept if kept is not None and kept.until > self._clock() else None

    def note(self, epoch_name: bytes, lease_name: bytes, epoch: bytes, lease: Lease | None, asked_at: float) -> None:
        """Remember what Redis said to a question of *asked_at* (monotonic seconds)."""
        if not self.on:
            return
        self._seen[epoch_name, lease_name] = Seen(epoch, lease, asked_at + self._seconds)
        self._seen.move_to_end((epoch_name, lease_name))
        if len(self._seen) > _MAX_SEEN:
            self._seen.popitem(last=False)

    def grant(self, epoch_name: bytes, lease_name: bytes, lease: Lease | None) -> None:
        """A lease given or taken here, at once; what is known of the epoch gets no younger by it."""
        kept = self._seen.get((epoch_name, lease_name))
        if kept is not None:
            self._seen[epoch_name, lease_name] = Seen(kept.epoch, lease, kept.until)

    def forget(self, epoch_name: bytes) -> None:
        """Ask Redis again about this epoch."""
        for pair in [pair for pair in self._seen if pair[0] == epoch_name]:
            del self._seen[pair]
