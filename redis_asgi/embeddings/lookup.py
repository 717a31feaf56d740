"""Finding what is stored: in the process when that is enough, else in one trip to Redis."""

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from ..errors import Failure
from ..keys import key_marks
from .codec import NO_EPOCH, Value, decode_finite
from .core import Core, as_epoch
from .http_caching import Wanted
from .identity import Identity, epoch_part, mark_of
from .lease import Lease, decode_denied, decode_lease
from .pace import Pace
from .single_flight import Flight
from .vectors import Encoding, text_of

_AT_ONCE = 64  # values looked at between two looks at the clock


@dataclass(slots=True)
class Found:
    """What a request has to start from.

    Attributes:
        epoch: The model's; `NO_EPOCH` when Redis has none and takes none, so that nothing can be stored.
        lease: The caller's; ``None`` when none is alive.
        lease_left: Seconds for which it lets full hits through.
        values: Vectors by key, of the model that the lease names.
        provisional: Without a lease: vectors by key, of whatever model; the app's next answer says which count.
        flights: Those that were not asked for because somebody was computing them; he may have landed by now.
        asked_at: When the others were asked for, on the loop's clock.
    """

    epoch: bytes = NO_EPOCH
    lease: Lease | None = None
    lease_left: float = 0.0
    values: dict[bytes, Value] = field(default_factory=dict)
    provisional: dict[bytes, Value] = field(default_factory=dict)
    flights: dict[bytes, Flight] = field(default_factory=dict)
    asked_at: float = 0.0

    def believe(self, lease: Lease) -> None:
        """Take *lease* for the caller's: of what is provisional, the vectors of its model count, no others."""
        mark = mark_of(self.epoch, lease.model)
        self.lease = lease
        self.values |= {name: value for name, value in self.provisional.items() if value.epoch == mark}
        self.provisional = {}


async def look_up(
    core: Core,
    identity: Identity,
    names: Collection[bytes],
    wanted: Wanted,
    encodings: Sequence[Encoding],
    pace: Pace,
) -> Found | Failure:
    """Find vectors, epoch and lease of one request."""
    local = _in_process(core, names, wanted) if wanted.lookup and core.local.on else {}
    seen = core.local.seen(identity.epoch_name, identity.lease_name)
    if seen is not None and seen.lease is not None and len(local) == len(names):
        left, mark = core.lease_left(identity, seen.lease), mark_of(seen.epoch, seen.lease.model)
        if left > 0 and {value.epoch for value in local.values()} == {mark}:
            return Found(seen.epoch, seen.lease, left, local)
    # What a flight brings anyway is not asked for, unless waiting for it will not do.
    flights = core.flights
    carried = flights.carrying(names) if wanted.lookup and not wanted.only_if_cached else {}
    ask = [name for name in names if name not in local and name not in carried] if wanted.lookup else []
    asked_at, on_loop = core.monotonic(), asyncio.get_running_loop().time()
    deadline = core.settings.EMBEDDING_CACHE_TIMEOUT
    began = perf_counter()
    flights.looking += 1
    try:
        records = [identity.epoch_name, identity.lease_name, identity.denied_name]
        reply = await core.store.lookup([*records, *ask], deadline)
        took = perf_counter() - began
        core.counts.looked_up(took)
        if isinstance(reply, Failure):
            return reply
        found = _start(core, identity, reply[: len(records)], asked_at)
        if found.epoch == NO_EPOCH and not wanted.only_if_cached:
            # Before anything is computed, so that everyone who computes for this model has the same.
            found.epoch = await core.claim_epoch(identity.epoch_name, deadline - took)
        pace.begin()
        found.flights, found.asked_at = carried, on_loop
        await _take(core, found, ask, reply[len(records) :], wanted, encodings, pace)
    finally:
        # Only now: what lands while the reply is read would else be gone when it is looked for.
        flights.looking -= 1
    _sort(core, found, local)
    return found


def _in_process(core: Core, names: Collection[bytes], wanted: Wanted) -> dict[bytes, Value]:
    now = core.wall()
    oldest = _oldest(wanted, now)
    local: dict[bytes, Value] = {}
    for name in names:
        value = core.local.get(name, now)
        if value is not None and value.born >= oldest:
            local[name] = value
    return local


def _start(core: Core, identity: Identity, records: Sequence[bytes | None], asked_at: float) -> Found:
    epoch, raw, denied = records
    lease = decode_lease(identity.lease_name, raw)
    denied_at = decode_denied(denied)
    if lease is not None and denied_at is not None and denied_at >= lease.asked_at:
        lease = None
    found = Found(as_epoch(epoch))
    if found.epoch != NO_EPOCH:
        core.local.note(identity.epoch_name, identity.lease_name, found.epoch, lease, asked_at)
    # Also not after a refusal that Redis did not hear of, or that overtook this reply.
    left = core.lease_left(identity, lease)
    if left > 0:
        found.lease, found.lease_left = lease, left
    return found


async def _take(
    core: Core,
    found: Found,
    names: Sequence[bytes],
    raws: Sequence[bytes | None],
    wanted: Wanted,
    encodings: Sequence[Encoding],
    pace: Pace,
) -> None:
    now = core.wall()
    oldest = _oldest(wanted, now)
    if found.epoch == NO_EPOCH:
        return
    lease = found.lease
    mark = mark_of(found.epoch, lease.model) if lease is not None else None
    values = found.provisional if mark is None else found.values
    part = epoch_part(found.epoch)
    keeps = core.local.on and mark is not None
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
                value.expires_at = core.expires_at(name, value, now)
                for encoding in encodings:
                    text_of(value, encoding, keep=True)
                core.local.put(name, value)
                if pace.due:
                    await pace.rest()
        if pace.due:
            await pace.rest()


def _sort(core: Core, found: Found, local: dict[bytes, Value]) -> None:
    """Put what this process had to what Redis has, by the model that the lease names."""
    if found.epoch == NO_EPOCH:
        return
    if found.lease is None:
        part = epoch_part(found.epoch)
        found.provisional |= {name: value for name, value in local.items() if value.epoch.startswith(part)}
        return
    mark = mark_of(found.epoch, found.lease.model)
    for name, value in local.items():
        if value.epoch == mark:
            found.values[name] = value
        else:
            core.local.drop(name)


def _oldest(wanted: Wanted, now: float) -> float:
    """The first second that a vector may have been born in."""
    return 0.0 if wanted.max_age is None else now - wanted.max_age
