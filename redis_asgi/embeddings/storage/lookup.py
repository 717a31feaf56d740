"""Finding what is stored: in the process when that is enough, else in one trip to Redis."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from ...errors import Failure
from ...keys import key_marks
from ...time_slice import TimeSlice
from ..records.codec import NO_EPOCH, Value, decode_finite
from ..records.keys import RecordKeys, epoch_part, mark_of
from ..records.lease import Lease, decode_denied, decode_lease
from ..records.vectors import Encoding, text_of
from .epochs import as_epoch
from .vector_cache import VectorCache

_AT_ONCE = 64  # values looked at between two looks at the clock


@dataclass(slots=True)
class Stored:
    """The records that a request has to start from.

    Attributes:
        values: Vectors by key, of the model that the lease names;
            without a lease those that this process had.
        epoch: The model's; `NO_EPOCH` when Redis has none and takes none,
            so that nothing can be stored.
        lease: The caller's; ``None`` when none is alive.
        lease_left: Seconds for which it lets full hits through.
        provisional: Without a lease: vectors by key, of whatever model;
            the app's next answer says which count.
        asked_at: When Redis was asked, on the loop's clock.
        size: Bytes of the vectors that were found.
    """

    values: dict[bytes, Value]
    epoch: bytes = NO_EPOCH
    lease: Lease | None = None
    lease_left: float = 0.0
    provisional: dict[bytes, Value] = field(default_factory=dict)
    asked_at: float = 0.0
    size: int = 0

    def missing(self, names: Collection[bytes]) -> list[bytes]:
        """The keys of *names* that nothing at hand will do for."""
        if len(self.values) == len(names):
            return []
        return [name for name in names if name not in self.values and name not in self.provisional]

    @property
    def fits(self) -> bool:
        """Whether all vectors that count are of one length."""
        return len({value.dims for value in self.values.values()}) <= 1

    def believe(self, lease: Lease) -> None:
        """Take *lease* for the caller's: of what is provisional,
        the vectors of its model count, no others.
        """
        mark = mark_of(self.epoch, lease.model)
        self.lease = lease
        self.values |= {name: value for name, value in self.provisional.items() if value.epoch == mark}
        self.provisional = {}

    def settles_on(self, model: str) -> bool:
        """Whether all that is at hand is of *model*,
        what is provisional included, which then counts.
        """
        mark = mark_of(self.epoch, model)
        at_hand = (*self.values.values(), *self.provisional.values())
        if {value.epoch for value in at_hand} - {mark}:
            return False
        self.values |= self.provisional
        self.provisional = {}
        return True

    def forget(self) -> None:
        """Start from nothing."""
        self.values, self.provisional, self.size = {}, {}, 0

    def weigh(self) -> None:
        """Note how much was found."""
        self.size = sum([len(value.raw) for value in (self.values or self.provisional).values()])


def recall(vectors: VectorCache, identity: RecordKeys, names: Collection[bytes], max_age: float | None) -> Stored:
    """The values that this process has of *names*;
    with the lease if that is all, and known to be valid.

    Args:
        vectors: Where.
        identity: Whose request it is.
        names: Keys of its inputs.
        max_age: Seconds; older vectors do not count. ``None`` = any age.
    """
    if not vectors.local.on:
        return Stored({})
    now = vectors.clock.wall()
    oldest = _oldest(max_age, now)
    values: dict[bytes, Value] = {}
    get = vectors.local.get
    for name in names:
        value = get(name, now)
        if value is not None and value.born >= oldest:
            values[name] = value
    found = Stored(values)
    seen = vectors.local.seen(identity.epoch_name, identity.lease_name) if len(values) == len(names) else None
    if seen is not None and seen.lease is not None:
        mark = mark_of(seen.epoch, seen.lease.model)
        left = vectors.lease_left(identity, seen.lease)
        if left > 0 and {value.epoch for value in values.values()} == {mark}:
            found.epoch, found.lease, found.lease_left = seen.epoch, seen.lease, left
            found.weigh()
    return found


async def look_up(
    vectors: VectorCache,
    identity: RecordKeys,
    names: Sequence[bytes],
    near: Stored,
    encodings: Sequence[Encoding],
    time_slice: TimeSlice,
    max_age: float | None,
    *,
    claims: bool,
) -> Stored | Failure:
    """Ask Redis for vectors, and for the epoch and the lease of a request.

    Args:
        vectors: Where.
        identity: Whose request it is.
        names: Keys of the vectors to ask for.
        near: What this process has.
        encodings: The representations that the answer needs.
        time_slice: Of the request.
        max_age: Seconds; older vectors do not count. ``None`` = any age.
        claims: Whether a model without an epoch gets one.
    """
    asked_at, on_loop = vectors.clock.monotonic(), asyncio.get_running_loop().time()
    began = perf_counter()
    records = [identity.epoch_name, identity.lease_name, identity.denied_name]
    reply = await vectors.store.lookup([*records, *names], vectors.lookup_within)
    took = perf_counter() - began
    vectors.counts.looked_up(took)
    if isinstance(reply, Failure):
        return reply
    found = _start(vectors, identity, reply[: len(records)], asked_at)
    found.asked_at = on_loop
    if found.epoch == NO_EPOCH and claims:
        # Before anything is computed, so that everyone who computes for this model has the same.
        found.epoch = await vectors.claim_epoch(identity.epoch_name, vectors.lookup_within - took)
    if found.epoch != NO_EPOCH:
        time_slice.restart()
        now = vectors.clock.wall()
        await _take(vectors, found, names, reply[len(records) :], encodings, time_slice, now, _oldest(max_age, now))
        outdated = _sort(vectors, found, near.values)
        if outdated:
            # Flushed, or of another model: another worker may have computed them since.
            again = await vectors.store.lookup(outdated, vectors.lookup_within - (perf_counter() - began))
            if not isinstance(again, Failure):
                await _take(vectors, found, outdated, again, encodings, time_slice, now, _oldest(max_age, now))
    found.weigh()
    return found


def _start(vectors: VectorCache, identity: RecordKeys, records: Sequence[bytes | None], asked_at: float) -> Stored:
    epoch, raw, denied = records
    lease = decode_lease(identity.lease_name, raw)
    denied_at = decode_denied(denied)
    if lease is not None and denied_at is not None and denied_at >= lease.asked_at:
        lease = None
    found = Stored({}, as_epoch(epoch))
    if found.epoch != NO_EPOCH:
        vectors.local.note(identity.epoch_name, identity.lease_name, found.epoch, lease, asked_at)
    # Also not after a refusal that Redis did not hear of, or that overtook this reply.
    left = vectors.lease_left(identity, lease)
    if left > 0:
        found.lease, found.lease_left = lease, left
    return found


async def _take(
    vectors: VectorCache,
    found: Stored,
    names: Sequence[bytes],
    raws: Sequence[bytes | None],
    encodings: Sequence[Encoding],
    time_slice: TimeSlice,
    now: float,
    oldest: float,
) -> None:
    lease = found.lease
    mark = mark_of(found.epoch, lease.model) if lease is not None else None
    values = found.provisional if mark is None else found.values
    part = epoch_part(found.epoch)
    keeps = vectors.local.on and mark is not None
    for start in range(0, len(names), _AT_ONCE):
        chunk = slice(start, start + _AT_ONCE)
        read = decode_finite(raws[chunk], key_marks(names[chunk]))
        for name, value in zip(names[chunk], read, strict=True):
            if value is None or value.born < oldest:
                continue
            if value.epoch != mark if mark is not None else not value.epoch.startswith(part):
                continue
            values[name] = value
            if keeps:
                value.expires_at = vectors.expires_at(name, value, now)
                for encoding in encodings:
                    text_of(value, encoding, keep=True)
                vectors.local.put(name, value)
                if time_slice.expired:
                    await time_slice.checkpoint()
        if time_slice.expired:
            await time_slice.checkpoint()


def _sort(vectors: VectorCache, found: Stored, near: Mapping[bytes, Value]) -> list[bytes]:
    """Put what this process had to what Redis has,
    by the model that the lease names; the names that do not count.
    """
    lease, part = found.lease, epoch_part(found.epoch)
    mark = mark_of(found.epoch, lease.model) if lease is not None else None
    values = found.provisional if mark is None else found.values
    outdated = []
    for name, value in near.items():
        if value.epoch == mark if mark is not None else value.epoch.startswith(part):
            values[name] = value
        else:
            vectors.local.drop(name)
            outdated.append(name)
    return outdated


def _oldest(max_age: float | None, now: float) -> float:
    """The first second that a vector may have been born in."""
    return 0.0 if max_age is None else now - max_age
