"""What all requests of one middleware share: settings, keys, the store, the in-process layer, the flights."""

import asyncio
import logging
import os
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp

from ..connection import RedisManager
from ..events import say
from ..settings import Settings
from .beside import names_of, scalars
from .codec import NO_EPOCH, Flag, Value
from .counts import Counts
from .headers import HeaderClass
from .identity import Identities, Identity
from .lease import MODEL_SECONDS, Denials, Lease, encode_denied, encode_lease
from .local import LocalVectors
from .misfits import Misfits
from .novelty import Novelty
from .pace import Pace
from .single_flight import Flights, Landing
from .store import VectorStore, Write, vectors_of
from .sub_call import process_budget
from .wire import Batch

logger = logging.getLogger("redis_asgi.embeddings")

PartitionBy = Callable[[HTTPConnection], "str | Awaitable[str | None] | None"]

_CAPPED = int(Flag.CAPPED)
_SUFFIX = 8  # hexadecimal digits at the end of a key, which shorten its TTL
_EPOCH_TTL = 86_400.0  # seconds at least; one that is gone makes its vectors misses, never valid
_CLAIM_TTL = 600.0  # seconds; whoever names models that the app does not have fills Redis no longer
_EPOCH_BYTES = 8
_LAST = 0.1  # of a lease, in which one request asks the app early
_MAX_SAID = 64  # warnings about what clients name


@dataclass(frozen=True, slots=True)
class Options:
    """How one middleware is configured; the units are those of the ``EMBEDDING_CACHE_*`` settings."""

    ttl: float
    namespace: str
    share: bool
    lease: float | None  # None: "off"
    partition_by: PartitionBy | None
    settings: Settings

    @property
    def lease_seconds(self) -> float:
        """For how long a full hit is answered after the app was asked; 0 = never."""
        return min(self.ttl if self.lease is None else self.lease, MODEL_SECONDS)


class Core:
    """See the module; one per middleware."""

    def __init__(self, app: ASGIApp, manager: RedisManager, options: Options) -> None:
        settings = options.settings
        self.app = app
        self.manager = manager
        self.options = options
        self.settings = settings
        self.wall: Callable[[], float] = time.time
        self.monotonic: Callable[[], float] = time.monotonic
        self.local = LocalVectors(settings.EMBEDDING_CACHE_L1_BYTES, settings.EMBEDDING_CACHE_L1_SECONDS, self._now)
        self.budget = process_budget()
        self.identities = Identities(
            settings,
            namespace=options.namespace,
            share=options.share,
            partitioned=options.partition_by is not None,
            trusting=options.lease is None,
        )
        self.ignored = names_of(settings.EMBEDDING_CACHE_IGNORED_FIELDS)
        self.request_lists = names_of(settings.EMBEDDING_CACHE_REQUEST_LISTS)
        self.denials, self.misfits, self._novelty = Denials(), Misfits(), Novelty()
        self.counts = Counts()
        self._lease_seconds = options.lease_seconds
        self._ttl = options.ttl
        self._ttl_spread = options.ttl * settings.EMBEDDING_CACHE_TTL_JITTER / 0xFFFFFFFF
        self._flights: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Flights] = weakref.WeakKeyDictionary()
        self._said: set[tuple[str, str]] = set()
        manager.keep(self)

    def clear(self) -> None:
        """Forget what was seen so far: the in-process layer, who was denied, what defeats the cache."""
        self.local.clear()
        self.denials, self.misfits, self._novelty = Denials(), Misfits(), Novelty()

    def _now(self) -> float:
        # Looked up at each call, so that a test can set another clock.
        return self.monotonic()

    @property
    def store(self) -> VectorStore:
        """The running loop's store."""
        return vectors_of(self.manager)

    @property
    def flights(self) -> Flights:
        """The running loop's flights."""
        loop = asyncio.get_running_loop()
        flights = self._flights.get(loop)
        if flights is None:
            flights = self._flights[loop] = Flights(self.settings.EMBEDDING_CACHE_TIMEOUT)
        return flights

    def say_once(self, event: str, *, about: str = "", **details: object) -> None:
        """Log a warning the first time only; *about*: for each of these, the first `_MAX_SAID` of all."""
        said = (event, about)
        if said not in self._said and (not about or len(self._said) < _MAX_SAID):
            self._said.add(said)
            say(logger, event, **({"about": about, **details} if about else details))

    def is_defeated_by(self, identity: Identity, batch: Batch) -> bool:
        """Whether something in the key is new in every request, so that nothing that is stored is found again."""
        again = identity.marks is not None
        if identity.marks is None:
            identity.marks = self._novelty.marks(identity.told.keyed, scalars(batch, self.ignored))
        headers = self.identities.headers
        return self._novelty.defeats(
            identity.marks, again=again, is_credential=lambda name: headers.class_of(name) is HeaderClass.CREDENTIAL
        )

    # Time to live.

    def ttl_of(self, name: bytes, cap: int | None = None) -> int:
        """Seconds a vector is kept: the TTL, shortened by up to ``TTL_JITTER`` as the key's own hash says."""
        ttl = int(self._ttl - self._ttl_spread * int(name[-_SUFFIX:], 16)) or 1
        return ttl if cap is None or cap > ttl else cap

    def expires_at(self, name: bytes, value: Value, now: float) -> float | None:
        """When a stored vector ends, in Unix seconds; ``None`` when only Redis knows."""
        if value.flags & _CAPPED:
            return None
        # A value of a clock ahead of ours is no younger than one of this moment.
        return (min(now, value.born)) + self.ttl_of(name)

    def first_end(self, values: Mapping[bytes, Value], now: float) -> float | None:
        """When the first of *values*, by key, ends; ``None`` when only Redis knows of one."""
        if next(iter(values.values())).expires_at is not None:
            ends = [value.expires_at for value in values.values() if value.expires_at is not None]
            if len(ends) == len(values):
                return min(ends)
        # Of those born in one second the key with the greatest hash ends first, and a batch is often of one second.
        last: dict[int, bytes] = {}
        for name, value in values.items():
            if value.flags & _CAPPED:
                return None
            suffix = name[-_SUFFIX:]
            if suffix > last.get(value.born, b""):
                last[value.born] = suffix
        return min(min(now, born) + self.ttl_of(suffix) for born, suffix in last.items())

    # Leases.

    def lease_left(self, identity: Identity, lease: Lease | None) -> float:
        """Seconds for which *lease* lets a full hit through; 0 or less = not."""
        if lease is None or self.is_denied(identity, lease.asked_at):
            return 0.0
        return lease.remaining(self._lease_seconds, self.wall())

    def ends_soon(self, left: float) -> bool:
        """Whether a lease of which *left* seconds are left is in its last tenth."""
        return left < self._lease_seconds * _LAST

    def is_denied(self, identity: Identity, asked_at: float) -> bool:
        """Whether the app has refused this caller since he asked at *asked_at*, as far as this process knows."""
        return self.denials.since((identity.lease_name, identity.denied_name), asked_at)

    async def deny(self, identity: Identity, status: int) -> None:
        """The app has refused this caller (401, 403): no full hit for him until the app answers him again.

        A 401 says that it does not know him, so that no lease of his stands, whatever it was for.
        """
        self.local.grant(identity.epoch_name, identity.lease_name, None)
        self.denials.note(identity.lease_name, self.wall())
        await self._revoke([identity.lease_name], identity.denied_name if status == 401 else None)

    async def disown(self, denied_name: bytes) -> None:
        """The app does not know a caller (401) who asked for what is not cached: no lease of his stands."""
        await self._revoke([], denied_name)

    async def _revoke(self, lease_names: Sequence[bytes], denied_name: bytes | None) -> None:
        now, lease = self.wall(), self.options.lease
        notes: list[Write] = []
        if denied_name is not None and lease:
            self.denials.note(denied_name, now)
            notes.append(Write(denied_name, encode_denied(now), lease))
        if lease != 0 and (lease_names or notes):
            await self.store.revoke(lease_names, self.settings.EMBEDDING_CACHE_TIMEOUT, notes)

    # Epochs.

    async def claim_epoch(self, epoch_name: bytes, within: float) -> bytes:
        """Give a model that has no epoch a new one, the same for all who try at once; `NO_EPOCH` if Redis will not.

        A missing epoch validates nothing, so an evicted one never brings flushed vectors back.
        """
        claim = Write(epoch_name, new_epoch(), _CLAIM_TTL, "absent")
        return as_epoch(await self.store.claim(claim, within))

    async def renew_epoch(self, identity: Identity) -> None:
        """Make every stored vector of the model a miss."""
        self.local.forget(identity.epoch_name)
        await self.store.write([Write(identity.epoch_name, new_epoch(), self._epoch_ttl)])

    @property
    def _epoch_ttl(self) -> float:
        return max(_EPOCH_TTL, 2 * self.options.ttl)

    # Writing.

    async def keep(self, identity: Identity, landing: Landing, asked_at: float, epoch: bytes) -> None:
        """Write an answer's vectors and its lease; in Redis, and in this process. Nothing without an epoch."""
        if landing.rule.refusal is not None:
            self._say_not_kept(landing)
            return
        if epoch == NO_EPOCH or landing.is_stray:
            return
        if not self.options.namespace:
            self.say_once("embedding_namespace_empty", address=self.manager.address)
        now = self.wall()
        cap = landing.rule.max_age
        vectors: list[Write] = []
        pace = Pace()
        for name, value in landing.values.items():
            vectors.append(Write(name, value.raw, self.ttl_of(name, cap)))
            if cap is None and self.local.on:
                value.expires_at = self.expires_at(name, value, now)
                self.local.put(name, value)
            if pace.due:
                await pace.rest()
        lease = self._lease_write(identity, landing, asked_at)
        if lease:
            self.local.grant(identity.epoch_name, identity.lease_name, landing.lease)
        renewal = Write(identity.epoch_name, b"", self._epoch_ttl, "renew")
        began = time.perf_counter()
        done = await self.store.write([renewal, *lease, *vectors])
        self.counts.store_seconds.observe(time.perf_counter() - began)
        if lease and self.is_denied(identity, asked_at):
            # Refused meanwhile, and deleted perhaps before it was there.
            await self.store.revoke([identity.lease_name], self.settings.EMBEDDING_CACHE_TIMEOUT)
        # The lease is the first that counts, the vectors are the last written.
        kept = vectors[: max(0, done.count - len(lease))]
        self.counts.stored_bytes.inc(sum(len(write.value) for write in kept))

    def _lease_write(self, identity: Identity, landing: Landing, asked_at: float) -> list[Write]:
        if self._lease_seconds <= 0 or not landing.repeatable or self.is_denied(identity, asked_at):
            return []
        record = encode_lease(identity.lease_name, landing.lease)
        return [Write(identity.lease_name, record, self._lease_seconds)] if record is not None else []

    def _say_not_kept(self, landing: Landing) -> None:
        refusal = landing.rule.refusal or ""
        self.counts.rejected(refusal)
        if refusal == "response-no-store":
            self.say_once("embedding_response_not_stored")
        elif refusal == "vary":
            self.say_once("embedding_response_varies", header=landing.rule.varies_by)


def new_epoch() -> bytes:
    """8 random bytes; all zeros mean that there is none."""
    return os.urandom(_EPOCH_BYTES)


def as_epoch(raw: object) -> bytes:
    """What Redis has as an epoch; `NO_EPOCH` when that is none."""
    return raw if isinstance(raw, bytes) and len(raw) == _EPOCH_BYTES else NO_EPOCH
