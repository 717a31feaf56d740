"""The keys of a request: of its vectors, its lease,
its model's epoch and its caller's refusals. No I/O.

Whatever may change a vector is in the key of each, so that what is unknown can only cause a miss. A
lease is named by all of that but the item, by every credential, and by the headers that only open
doors: it opens what the app has answered itself, and nothing else.
"""

from collections.abc import Iterable
from contextlib import suppress

from starlette.types import Scope

from ...keys import (
    cache_digest,
    embedding_denied_key,
    embedding_epoch_key,
    embedding_input_key,
    embedding_input_prefix,
    embedding_lease_key,
    length_prefixed,
)
from ...settings import Settings
from ..records.keys import RecordKeys
from ..wire import Batch, Input, WireFormat
from .head import SaidByHead

_LAYOUT = b"2"  # of what is hashed; a new one never reads an old one's vectors
_MAX_MEMORISED = 256
_MEMORISED_BYTES = 8 * 1024  # of what one is found by


# Root path, path, path as it was sent, query, scheme,
# address where nothing else says who asks, client certificate.
Route = tuple[str, str, bytes | None, bytes, str | None, str | None, bytes]


class Identities:
    """The identities of one middleware's requests.

    Args:
        settings: The key prefix and secret.
        namespace: In every key.
        share: Whether all credentials share their vectors.
        trusting: Whether the cache stands inside the app's own authentication,
            so that leases name no caller.
    """

    def __init__(self, settings: Settings, *, namespace: str, share: bool, trusting: bool) -> None:
        self._namespace = namespace
        self._share = share
        self._trusting = trusting
        self._secret = settings.key_secret
        self._prefix = settings.REDIS_KEY_PREFIX
        self._input_prefix = embedding_input_prefix(self._prefix)
        self._memorised: dict[tuple[object, ...], RecordKeys] = {}

    def route_of(self, scope: Scope, told: SaidByHead) -> Route:
        """The part of keys that is neither of a request's headers nor of its body."""
        # What the app routes by, which a middleware outside of us may have rewritten; and what the
        # client sent.
        return (
            scope.get("root_path", ""),  # of a mount that leaves it out of the path
            scope["path"],
            scope.get("raw_path"),
            scope.get("query_string", b""),
            scope.get("scheme"),
            _address(scope, told),
            _certificate(scope),
        )

    def identify(
        self, route: Route, told: SaidByHead, wire: WireFormat, batch: Batch, partition: str | None
    ) -> RecordKeys:
        """The keys of a request with these headers, this body and *partition*."""
        parts = (wire.name, route, told, partition, batch.model, batch.scope)
        known = self._memorised.get(parts)
        if known is not None:
            return known
        made = self._make(*parts)
        said = (*route, batch.scope, partition, told.key, told.credential, told.lease)
        size = sum([len(part) for part in said if part is not None])
        if size <= _MEMORISED_BYTES:
            self._memorised[parts] = made
            if len(self._memorised) > _MAX_MEMORISED:
                # The oldest; loops in several threads may share one middleware.
                with suppress(KeyError, RuntimeError):
                    del self._memorised[next(iter(self._memorised))]
        return made

    def denied_name(self, scope: Scope, told: SaidByHead) -> bytes:
        """The key of when the app last did not know the caller, whatever his request is."""
        return self._denied_name(self._who(told, _address(scope, told), _certificate(scope)))

    def _who(self, told: SaidByHead, address: str | None, tls: bytes) -> tuple[bytes, ...]:
        # An address is somebody where nothing else is;
        # inside the app's authentication nobody is asked who he is.
        return (b"",) if self._trusting else (_caller(told, tls), _encoded(address or ""))

    def _denied_name(self, who: tuple[bytes, ...]) -> bytes:
        return embedding_denied_key(self._prefix, (_LAYOUT, self._namespace.encode(), *who), secret=self._secret)

    def input_names(self, identity: RecordKeys, items: Iterable[Input]) -> list[bytes]:
        """The keys of the vectors of *items*."""
        prefix, scope = self._input_prefix, identity.scope
        return [embedding_input_key(prefix, scope, item.kind, item.canonical) for item in items]

    def _make(
        self, wire: str, route: Route, told: SaidByHead, partition: str | None, model: str, body: bytes
    ) -> RecordKeys:
        root, path, raw_path, query, scheme, address, tls = route
        namespace, routed = self._namespace.encode(), _encoded(path)
        sent = (raw_path or routed).partition(b"?")[0]
        if partition is not None:
            owner = (b"partition", _encoded(partition))
        elif self._share:
            owner = (b"share", b"")
        else:
            owner = (b"credential", _caller(told, tls))
        scope = cache_digest(
            (
                _LAYOUT,
                namespace,
                *owner,
                wire.encode(),
                _encoded(root),
                routed,
                sent,
                query,
                told.key,
                _encoded(model),
                body,
            ),
            secret=self._secret,
        )
        name = scope.hexdigest().encode()
        who = self._who(told, address, tls)
        doors = (told.lease, _encoded(scheme or ""))
        lease = embedding_lease_key(self._prefix, (_LAYOUT, name, *who, *doors), secret=self._secret)
        epoch = embedding_epoch_key(self._prefix, self._namespace, model, secret=self._secret)
        return RecordKeys(scope, name, lease, epoch, self._denied_name(who))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _caller(told: SaidByHead, tls: bytes) -> bytes:
    return length_prefixed((told.credential, tls))


def _address(scope: Scope, told: SaidByHead) -> str | None:
    client = scope.get("client")
    return client[0] if client and not told.has_credential else None


def _certificate(scope: Scope) -> bytes:
    """The client's certificate, as the server tells it (ASGI's TLS extension); empty without one."""
    extensions = scope.get("extensions")
    tls = extensions.get("tls") if extensions else None
    if not tls:
        return b""
    chain = tls.get("client_cert_chain") or ()
    said = (tls.get("client_cert_name") or "", tls.get("client_cert_error") or "", *chain)
    return length_prefixed([_encoded(str(part)) for part in said]) if any(said) else b""
