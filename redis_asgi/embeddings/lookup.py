"""Finding what is stored: in the process when that is enough, else in one trip to Redis."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ..errors import Failure
from .codec import Value, all_finite, decode
from .core import Core, Identity
from .http_caching import Wanted
from .lease import Lease, decode_lease
from .local import Entry
from .pace import Pace
from .vectors import Encoding

_AT_ONCE = 64  # values looked at between two looks at the clock
_EPOCH_BYTES = 8


@dataclass(slots=True)
class Found:
    """What a request has to start from.

    Attributes:
        epoch: The model's, or the one this process proposes when there is none.
        epoch_known: Whether it is in Redis.
        lease: The caller's; ``None`` when there is none.
        entries: Vectors by key.
    """

    epoch: bytes = b""
    epoch_known: bool = False
    lease: Lease | None = None
    entries: dict[bytes, Entry] = field(default_factory=dict)


async def look_up(
    core: Core, identity: Identity, names: Collection[bytes], wanted: Wanted, encodings: Sequence[Encoding]
) -> Found | Failure:
    """Find vectors, epoch and lease of one request."""
    local = _in_process(core, names, wanted) if wanted.lookup and core.local.on else {}
    seen = core.local.seen(identity.epoch_name, identity.lease_name)
    if seen is not None and len(local) == len(names) and core.lease_left(seen.lease) > 0:
        current = all(entry.value.epoch == seen.epoch for entry in local.values())
        if current:
            return Found(seen.epoch, epoch_known=True, lease=seen.lease, entries=local)
    # What a flight brings anyway is not asked for.
    flights = core.flights
    ask = [name for name in names if wanted.lookup and name not in local and flights.find(name) is None]
    asked_at = core.monotonic()
    deadline = core.settings.EMBEDDING_CACHE_TIMEOUT
    reply = await core.store.lookup([identity.epoch_name, identity.lease_name, *ask], deadline)
    if isinstance(reply, Failure):
        return reply
    found = _start(core, identity, reply[0], reply[1], asked_at)
    for name, entry in local.items():
        if entry.value.epoch == found.epoch:
            found.entries[name] = entry
        else:
            core.local.drop(name)
    await _take(core, found, ask, reply[2:], wanted, encodings)
    return found


def _in_process(core: Core, names: Collection[bytes], wanted: Wanted) -> dict[bytes, Entry]:
    now = core.wall()
    local: dict[bytes, Entry] = {}
    for name in names:
        entry = core.local.get(name, now)
        if entry is not None and _is_young_enough(entry.value, wanted, now):
            local[name] = entry
    return local


def _start(core: Core, identity: Identity, epoch: bytes | None, lease: bytes | None, asked_at: float) -> Found:
    found = Found(lease=decode_lease(lease))
    # A refusal that Redis did not hear of, or that overtook this reply.
    if found.lease is not None and core.denials.since(identity.lease_name, found.lease.answered_at):
        found.lease = None
    if epoch is not None and len(epoch) == _EPOCH_BYTES:
        found.epoch, found.epoch_known = epoch, True
        core.settle_candidate(identity.epoch_name)
        core.local.note(identity.epoch_name, identity.lease_name, epoch, found.lease, asked_at)
    else:
        found.epoch = core.candidate(identity.epoch_name)
    return found


async def _take(
    core: Core,
    found: Found,
    names: Sequence[bytes],
    raws: Sequence[bytes | None],
    wanted: Wanted,
    encodings: Sequence[Encoding],
) -> None:
    now, pace, keeps = core.wall(), Pace(), core.local.on
    for start in range(0, len(names), _AT_ONCE):
        values: dict[bytes, Value] = {}
        chunk = slice(start, start + _AT_ONCE)
        for name, raw in zip(names[chunk], raws[chunk], strict=True):
            value = decode(raw)
            if value is not None and value.epoch == found.epoch and _is_young_enough(value, wanted, now):
                values[name] = value
        if not all_finite(list(values.values())):
            values = {name: value for name, value in values.items() if all_finite([value])}
        for name, value in values.items():
            entry = found.entries[name] = Entry(value, core.expires_at(name, value, now), {})
            if keeps:
                for encoding in encodings:
                    entry.text(encoding)
                core.local.put(name, entry)
                if pace.due:
                    await pace.rest()
        if pace.due:
            await pace.rest()


def _is_young_enough(value: Value, wanted: Wanted, now: float) -> bool:
    return wanted.max_age is None or now - value.born <= wanted.max_age
