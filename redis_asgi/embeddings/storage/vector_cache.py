"""Records by key, in this process and in Redis: vectors, leases, epochs and refusals of callers.

Knows keys and values, and nothing of requests,
wire formats or calls of the app. Reading is `look_up`'s.
"""

import time
from collections.abc import Mapping, Sequence

from ...connection.manager import RedisManager
from ...time_slice import TimeSlice
from ..records.clock import Clocks
from ..records.codec import NO_EPOCH, Flag, Value
from ..records.keys import RecordKeys
from ..records.lease import Denials, Lease, encode_denied, encode_lease
from ..records.metrics import CacheMetrics
from ..records.options import Options
from ..records.warnings import Warnings
from . import epochs
from .l1 import L1Cache
from .store import VectorStore, Write, vectors_of

_CAPPED = int(Flag.CAPPED)
_SUFFIX = 8  # hexadecimal digits at the end of a key, which shorten its TTL
_LAST = 0.1  # of a lease, in which one request asks the app early
_UNKNOWN_CALLER = 401


class VectorCache:
    """Of one middleware.

    Args:
        manager: Of the Redis that keeps it.
        options: Its configuration.
        clock: The time.
        counts: Of the middleware.
        warnings: What it has warned of.

    Attributes:
        local: The layer in this process.
        lookup_within: Seconds that a lookup may take.
    """

    def __init__(
        self, manager: RedisManager, options: Options, clock: Clocks, counts: CacheMetrics, warnings: Warnings
    ) -> None:
        settings = options.settings
        self.manager = manager
        self.clock = clock
        self.counts = counts
        self.lookup_within = settings.EMBEDDING_CACHE_TIMEOUT
        self.local = L1Cache(settings.EMBEDDING_CACHE_L1_BYTES, settings.EMBEDDING_CACHE_L1_SECONDS, clock)
        self._warnings = warnings
        self._denials = Denials()
        self._has_namespace = bool(options.namespace)
        self._lease = options.lease
        self._lease_seconds = options.lease_seconds
        self._ttl = options.ttl
        self._ttl_spread = options.ttl * settings.EMBEDDING_CACHE_TTL_JITTER / 0xFFFFFFFF

    def clear(self) -> None:
        """Forget the layer in this process, and who was denied."""
        self.local.clear()
        self._denials = Denials()

    @property
    def store(self) -> VectorStore:
        """The running loop's store."""
        return vectors_of(self.manager)

    # Time to live.

    def ttl_of(self, name: bytes, cap: int | None = None) -> int:
        """Seconds a vector is kept: the TTL,
        shortened by up to ``TTL_JITTER`` as the key's own hash says.
        """
        ttl = int(self._ttl - self._ttl_spread * int(name[-_SUFFIX:], 16)) or 1
        return ttl if cap is None or cap > ttl else cap

    def expires_at(self, name: bytes, value: Value, now: float) -> float | None:
        """The end of a stored vector, in Unix seconds; ``None`` when only Redis knows."""
        if value.flags & _CAPPED:
            return None
        # A value of a clock ahead of ours is no younger than one of this moment.
        return (min(now, value.born)) + self.ttl_of(name)

    def first_end(self, values: Mapping[bytes, Value], now: float) -> float | None:
        """The end of the first of *values*, by key; ``None`` when only Redis knows of one."""
        if next(iter(values.values())).expires_at is not None:
            ends = [value.expires_at for value in values.values() if value.expires_at is not None]
            if len(ends) == len(values):
                return min(ends)
        # Of those born in one second the key with the greatest hash ends first,
        # and a batch is often of one second.
        last: dict[int, bytes] = {}
        for name, value in values.items():
            if value.flags & _CAPPED:
                return None
            suffix = name[-_SUFFIX:]
            if suffix > last.get(value.born, b""):
                last[value.born] = suffix
        return min(min(now, born) + self.ttl_of(suffix) for born, suffix in last.items())

    # Leases.

    def lease_left(self, identity: RecordKeys, lease: Lease | None) -> float:
        """Seconds for which *lease* lets a full hit through; 0 or less = not."""
        if lease is None or self.is_denied(identity, lease.asked_at):
            return 0.0
        return lease.remaining(self._lease_seconds, self.clock.wall())

    def ends_soon(self, left: float) -> bool:
        """Whether a lease of which *left* seconds are left is in its last tenth."""
        return left < self._lease_seconds * _LAST

    def is_denied(self, identity: RecordKeys, asked_at: float) -> bool:
        """Whether the app has refused this caller since he asked at *asked_at*, as far as this
        process knows.
        """
        return self._denials.since((identity.lease_name, identity.denied_name), asked_at)

    async def deny(self, identity: RecordKeys, status: int) -> None:
        """The app has refused this caller (401, 403):
        no full hit for him until the app answers him again.

        A 401 says that it does not know him, so that no lease of his stands, whatever it was for.
        """
        self.local.grant(identity.epoch_name, identity.lease_name, None)
        self._denials.note(identity.lease_name, self.clock.wall())
        await self._revoke([identity.lease_name], identity.denied_name if status == _UNKNOWN_CALLER else None)

    async def disown(self, denied_name: bytes) -> None:
        """The app does not know a caller (401) who asked for what is not cached: no lease of his
        stands.
        """
        await self._revoke([], denied_name)

    async def _revoke(self, lease_names: Sequence[bytes], denied_name: bytes | None) -> None:
        now, lease = self.clock.wall(), self._lease
        notes: list[Write] = []
        if denied_name is not None and lease:
            self._denials.note(denied_name, now)
            notes.append(Write(denied_name, encode_denied(now), lease))
        if lease != 0 and (lease_names or notes):
            await self.store.revoke(lease_names, self.lookup_within, notes)

    # Epochs.

    async def claim_epoch(self, epoch_name: bytes, within: float) -> bytes:
        """Give a model that has no epoch a new one,
        the same for all who try at once; `NO_EPOCH` if Redis will not.

        A missing epoch validates nothing, so an evicted one never brings flushed vectors back.
        """
        return epochs.as_epoch(await self.store.claim(epochs.claim(epoch_name), within))

    async def renew_epoch(self, identity: RecordKeys) -> None:
        """Make every stored vector of the model a miss."""
        self.local.forget(identity.epoch_name)
        await self.store.write([epochs.replacement(identity.epoch_name, self._ttl)])

    # Writing.

    def may_store(self, epoch: bytes) -> bool:
        """Whether what is computed under *epoch* can be kept now, as far as is known."""
        return epoch != NO_EPOCH and self.store.writable

    async def keep(
        self,
        identity: RecordKeys,
        epoch: bytes,
        values: Mapping[bytes, Value],
        lease: Lease,
        *,
        repeatable: bool,
        max_age: int | None,
    ) -> None:
        """Write an answer's vectors and its lease; in Redis,
        and in this process. Nothing without an epoch.

        Args:
            identity: Whose they are.
            epoch: What its lookup saw.
            values: Vectors by key.
            lease: What the app has answered.
            repeatable: Whether a full hit may repeat it.
            max_age: Seconds for which they are kept at most; ``None`` = the TTL.
        """
        if epoch == NO_EPOCH:
            return
        if not self._has_namespace:
            self._warnings.say("embedding_namespace_empty", address=self.manager.address)
        now = self.clock.wall()
        vectors: list[Write] = []
        time_slice = TimeSlice()
        for name, value in values.items():
            vectors.append(Write(name, value.raw, self.ttl_of(name, max_age)))
            if max_age is None and self.local.on:
                value.expires_at = self.expires_at(name, value, now)
                self.local.put(name, value)
            if time_slice.expired:
                await time_slice.checkpoint()
        granted = self._grant(identity, lease) if repeatable else []
        began = time.perf_counter()
        done = await self.store.write([epochs.renewal(identity.epoch_name, self._ttl), *granted, *vectors])
        self.counts.store_seconds.observe(time.perf_counter() - began)
        if granted and self.is_denied(identity, lease.asked_at):
            # Refused meanwhile, and deleted perhaps before it was there.
            await self.store.revoke([identity.lease_name], self.lookup_within)
        # The lease is the first that counts, the vectors are the last written.
        kept = vectors[: max(0, done.count - len(granted))]
        self.counts.stored_bytes.inc(sum(len(write.value) for write in kept))

    def _grant(self, identity: RecordKeys, lease: Lease) -> list[Write]:
        if self._lease_seconds <= 0 or self.is_denied(identity, lease.asked_at):
            return []
        record = encode_lease(identity.lease_name, lease)
        if record is None:
            return []
        self.local.grant(identity.epoch_name, identity.lease_name, lease)
        return [Write(identity.lease_name, record, self._lease_seconds)]
