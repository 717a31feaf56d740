"""What all requests of one middleware share: settings, keys, the store, the in-process layer, the flights."""

import asyncio
import logging
import os
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Scope

from ..connection import RedisManager
from ..keys import (
    Digest,
    cache_digest,
    embedding_epoch_key,
    embedding_input_key,
    embedding_input_prefix,
    embedding_lease_key,
    length_prefixed,
)
from ..settings import Settings
from .beside import names_of
from .codec import NO_EPOCH, Flag, Value
from .counts import Counts
from .http_caching import Fields, RawHeaders, Storable, by_name, storable
from .lease import Denials, Lease, encode_lease
from .local import LocalVectors
from .pace import Pace
from .single_flight import Flights, Landing
from .store import VectorStore, Write, vectors_of
from .sub_call import process_budget
from .wire import Batch, Input, WireFormat

logger = logging.getLogger("redis_asgi.embeddings")

PartitionBy = Callable[[HTTPConnection], "str | Awaitable[str | None] | None"]

_LAYOUT = b"1"  # of what is hashed; a new one never reads an old one's vectors
_CAPPED = int(Flag.CAPPED)
_SUFFIX = 8  # hexadecimal digits at the end of a key, which shorten its TTL
_EPOCH_TTL = 86_400.0  # seconds at least; one that is gone makes its vectors misses, never valid
_CLAIM_TTL = 600.0  # seconds; whoever names models that the app does not have fills Redis no longer
_EPOCH_BYTES = 8
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


@dataclass(frozen=True, slots=True)
class Identity:
    """Where a request's records are.

    Attributes:
        scope: The digest that input keys begin with.
        lease_name: The lease's key.
        epoch_name: The epoch's key.
    """

    scope: Digest
    lease_name: bytes
    epoch_name: bytes


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
        self.ignored = names_of(settings.EMBEDDING_CACHE_IGNORED_FIELDS)
        self.request_lists = names_of(settings.EMBEDDING_CACHE_REQUEST_LISTS)
        self.denials = Denials()
        self.counts = Counts()
        self._ttl = options.ttl
        self._ttl_spread = options.ttl * settings.EMBEDDING_CACHE_TTL_JITTER / 0xFFFFFFFF
        self._secret = settings.key_secret
        self._prefix = settings.REDIS_KEY_PREFIX
        self._input_prefix = embedding_input_prefix(self._prefix)
        self._credentials = tuple(name.encode() for name in settings.EMBEDDING_CACHE_CREDENTIAL_HEADERS)
        self._vary = tuple(name.encode() for name in settings.EMBEDDING_CACHE_VARY)
        self.keyed = frozenset(settings.EMBEDDING_CACHE_CREDENTIAL_HEADERS + settings.EMBEDDING_CACHE_VARY)
        self._flights: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Flights] = weakref.WeakKeyDictionary()
        self._said: set[tuple[str, str]] = set()

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
            logger.warning(event, extra={"about": about, **details} if about else details)

    # Names.

    def identify(self, scope: Scope, fields: Fields, wire: WireFormat, batch: Batch, partition: str | None) -> Identity:
        """The keys of a request; whatever may change a vector is in, so the unknown can only cause a miss."""
        namespace = self.options.namespace
        # What the app routes by, which a middleware outside of us may have rewritten; and what the client sent.
        path = scope["path"].encode("utf-8", "surrogatepass")
        raw_path = (scope.get("raw_path") or path).partition(b"?")[0]
        where = length_prefixed((wire.name.encode(), path, raw_path, scope.get("query_string", b"")))
        credential = length_prefixed(_flat(fields, self._credentials))
        if partition is not None:
            owner = (b"partition", partition.encode("utf-8", "surrogatepass"))
        elif self.options.share:
            owner = (b"share", b"")
        else:
            owner = (b"credential", credential)
        varied = length_prefixed(_flat(fields, self._vary))
        digest = cache_digest(
            (_LAYOUT, namespace.encode(), *owner, where, varied, batch.model.encode(), batch.scope),
            secret=self._secret,
        )
        origin = length_prefixed(fields.get(b"origin", ()))
        who = b"" if self.options.lease is None else credential
        lease_parts = (_LAYOUT, namespace.encode(), who, where, batch.model.encode(), origin)
        return Identity(
            digest,
            embedding_lease_key(self._prefix, lease_parts, secret=self._secret),
            embedding_epoch_key(self._prefix, namespace, batch.model, secret=self._secret),
        )

    def input_names(self, identity: Identity, items: Iterable[Input]) -> list[bytes]:
        """The keys of the vectors of *items*."""
        prefix, scope = self._input_prefix, identity.scope
        return [embedding_input_key(prefix, scope, item.kind, item.canonical) for item in items]

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

    def lease_left(self, lease: Lease | None) -> float:
        """Seconds for which *lease* lets a full hit through; 0 or less = not."""
        if lease is None:
            return 0.0
        duration = self.options.ttl if self.options.lease is None else self.options.lease
        return lease.remaining(duration, self.wall())

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

    def may_store(self, headers: RawHeaders) -> Storable:
        """Whether an answer with *headers* may be stored."""
        return storable(by_name(headers), self.keyed)

    async def keep(self, identity: Identity, landing: Landing, asked_at: float, epoch: bytes) -> None:
        """Write an answer's vectors and its lease; in Redis, and in this process. Nothing without an epoch."""
        if landing.refusal is not None:
            self.counts.rejected(landing.refusal)
            if landing.refusal == "response-no-store":
                self.say_once("redis_asgi.embedding_response_not_stored", fix="Its Cache-Control forbids it.")
            return
        if epoch == NO_EPOCH:
            return
        if not self.options.namespace:
            self.say_once(
                "redis_asgi.embedding_namespace_empty",
                fix="Any service on this Redis answering that path and model shares its vectors. "
                "Set EMBEDDING_CACHE_NAMESPACE to your model and its revision.",
            )
        now = self.wall()
        cap = self.may_store(landing.reply.headers).max_age
        vectors: list[Write] = []
        pace = Pace()
        for name, value in landing.values.items():
            vectors.append(Write(name, value.raw, self.ttl_of(name, cap)))
            if cap is None and self.local.on:
                value.expires_at = self.expires_at(name, value, now)
                self.local.put(name, value)
            if pace.due:
                await pace.rest()
        lease = self._lease_write(identity, landing.lease, asked_at)
        if lease:
            self.local.grant(identity.epoch_name, identity.lease_name, landing.lease)
        renewal = Write(identity.epoch_name, b"", self._epoch_ttl, "renew")
        began = time.perf_counter()
        done = await self.store.write([renewal, *lease, *vectors])
        self.counts.store_seconds.observe(time.perf_counter() - began)
        if lease and self.denials.since(identity.lease_name, asked_at):
            # Refused meanwhile, and deleted perhaps before it was there.
            await self.store.delete([identity.lease_name], self.settings.EMBEDDING_CACHE_TIMEOUT)
        # The lease is the first that counts, the vectors are the last written.
        kept = vectors[: max(0, done.count - len(lease))]
        self.counts.stored_bytes.inc(sum(len(write.value) for write in kept))

    def _lease_write(self, identity: Identity, lease: Lease, asked_at: float) -> list[Write]:
        duration = self.options.ttl if self.options.lease is None else self.options.lease
        record = encode_lease(lease) if duration > 0 else None
        if record is None or self.denials.since(identity.lease_name, asked_at):
            return []
        return [Write(identity.lease_name, record, duration)]

    async def deny(self, identity: Identity) -> None:
        """The app has refused this credential: no full hit for it until the app answers it again."""
        self.denials.note(identity.lease_name, self.wall())
        self.local.grant(identity.epoch_name, identity.lease_name, None)
        await self.store.delete([identity.lease_name], self.settings.EMBEDDING_CACHE_TIMEOUT)


def _flat(fields: Fields, names: Iterable[bytes]) -> list[bytes]:
    flat: list[bytes] = []
    for name in names:
        values = fields.get(name, ())
        flat += (b"%d" % len(values), *values)
    return flat


def new_epoch() -> bytes:
    """8 random bytes; all zeros mean that there is none."""
    return os.urandom(_EPOCH_BYTES)


def as_epoch(raw: object) -> bytes:
    """What Redis has as an epoch; `NO_EPOCH` when that is none."""
    return raw if isinstance(raw, bytes) and len(raw) == _EPOCH_BYTES else NO_EPOCH
