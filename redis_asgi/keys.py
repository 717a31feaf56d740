"""Names of Redis keys: pure functions, and the only place that knows how a key is put together.

Layout of the package's own keys, after the user's ``REDIS_KEY_PREFIX``::

    rate_limit:{203.0.113.7}                    one hash per partition, a field per policy
    rate_limit:{Zm9vYmFyYmF6cXV4MTIzNA}         the same, for anything but a plain address
    rate_limit:{203.0.113.7}:default:m60:1      the log of one moving-window policy, in the same slot
    embedding:{context_id}                      one vector of `EmbeddingCache`; no braces in the real key
    embedding_input:v1:<sha256>                 one vector of the middleware
    embedding_lease:v1:<sha256>                 that the app itself answered such a request of a credential
    embedding_denied:v1:<sha256>                when the app last did not know a credential
    embedding_epoch:v1:<sha256>                 8 random bytes; vectors that carry others are misses

The braces of ``rate_limit`` are Redis Cluster's hash tag: all keys of a partition live in one slot.
"""

import base64
import hashlib
import hmac
from binascii import unhexlify
from collections.abc import Iterable
from typing import Protocol, Self

_RATE_LIMIT = "rate_limit"


class KeyManagement:
    """Compose and split ``prefix:identifier`` keys for a service's own data."""

    @staticmethod
    def generate_key(prefix: str, identifier: str) -> str:
        """Return ``"prefix:identifier"``; the identifier may hold any character, ``:`` included.

        Raises:
            ValueError: If *prefix* is empty or holds ``:``, since the key could not be split again.
        """
        if not prefix or ":" in prefix:
            raise ValueError(f"prefix={prefix!r} must be a non-empty string without ':'. Try 'embedding'.")
        return f"{prefix}:{identifier}"

    @staticmethod
    def parse_key(key: str | bytes) -> tuple[str, str]:
        """Split a key (``str``, or UTF-8 ``bytes`` as Redis returns it) at its first ``:``.

        Raises:
            ValueError: If *key* has no ``:``, an empty prefix, or is not UTF-8.
        """
        text = key.decode("utf-8") if isinstance(key, bytes) else key
        if not isinstance(text, str):
            raise TypeError(f"key={key!r} is neither str nor bytes.")
        prefix, colon, identifier = text.partition(":")
        if not colon or not prefix:
            raise ValueError(f"key={text!r} is not of the form 'prefix:identifier'.")
        return prefix, identifier


def digest(*parts: str, secret: str | None = None) -> str:
    """22 base64url characters of BLAKE2b-128 over length-prefixed *parts*, keyed by *secret* when
    given.

    Lengths go in, so that ``("a:b", "c")`` and ``("a", "b:c")`` differ. A secret of any length
    works: BLAKE2 keys are at most 64 bytes, so it is hashed to 32 first.
    """
    key = hashlib.sha256(secret.encode()).digest() if secret else b""
    state = hashlib.blake2b(digest_size=16, key=key)
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")
        state.update(len(raw).to_bytes(8, "little"))
        state.update(raw)
    return base64.urlsafe_b64encode(state.digest()).rstrip(b"=").decode()


def partition_key(prefix: str, tag: str) -> bytes:
    """The key of the hash that holds every counter of one partition."""
    return f"{prefix}{_RATE_LIMIT}:{{{tag}}}".encode()


class Digest(Protocol):
    """The common part of `hashlib` and `hmac` objects."""

    def update(self, data: bytes, /) -> None: ...
    def copy(self) -> Self: ...
    def hexdigest(self) -> str: ...


def length_prefixed(parts: Iterable[bytes]) -> bytes:
    """*parts* joined so that no two different sequences ever give the same bytes."""
    return b"".join([len(part).to_bytes(8, "little") + part for part in parts])


def cache_digest(parts: Iterable[bytes], *, secret: str | None = None) -> Digest:
    """SHA-256 over length-prefixed *parts*, keyed by *secret* when given; copy it to add more."""
    raw = length_prefixed(parts)
    return hmac.new(secret.encode(), raw, hashlib.sha256) if secret else hashlib.sha256(raw)


def embedding_key(prefix: str, context_id: str) -> bytes:
    """The key of one vector a service keeps by its own id."""
    return f"{prefix}embedding:{context_id}".encode()


def embedding_input_key(prefix: bytes, scope: Digest, kind: bytes, canonical: bytes) -> bytes:
    """The key of one input's vector under `embedding_input_prefix`; *scope* holds everything else."""
    state = scope.copy()
    # The kind is one byte, so nothing before or after the length can be mistaken for something
    # else.
    state.update(kind + len(canonical).to_bytes(8, "little") + canonical)
    return prefix + state.hexdigest().encode()


def key_mark(name: bytes, size: int = 8) -> bytes:
    """The last *size* bytes of the digest that *name* ends with, for its value to say whose it is.

    Only of a key that ends with a digest (an input's, a lease's,
    an epoch's); of one by id it is `id_mark`.
    """
    return unhexlify(name[-2 * size :])


def key_marks(names: Iterable[bytes]) -> list[bytes]:
    """`key_mark` of each, 8 bytes; in one go, as a hit of many inputs needs them all."""
    return [unhexlify(name[-16:]) for name in names]


def id_mark(name: bytes, size: int = 8) -> bytes:
    """*size* bytes of BLAKE2b over the key *name*, the user's prefix included,
    for its value to say whose it is.
    """
    return hashlib.blake2b(name, digest_size=size).digest()


def embedding_input_prefix(prefix: str) -> bytes:
    """The beginning of every `embedding_input_key`."""
    return f"{prefix}embedding_input:v1:".encode()


def embedding_lease_key(prefix: str, parts: Iterable[bytes], *, secret: str | None = None) -> bytes:
    """The key of the record that an app answered such a request of a credential itself."""
    return f"{prefix}embedding_lease:v1:{cache_digest(parts, secret=secret).hexdigest()}".encode()


def embedding_denied_key(prefix: str, parts: Iterable[bytes], *, secret: str | None = None) -> bytes:
    """The key of the record that an app did not know a credential."""
    return f"{prefix}embedding_denied:v1:{cache_digest(parts, secret=secret).hexdigest()}".encode()


def embedding_epoch_key(prefix: str, namespace: str, model: str, *, secret: str | None = None) -> bytes:
    """The key of a model's epoch: other bytes there flush the model."""
    parts = (namespace.encode(), model.encode())
    return f"{prefix}embedding_epoch:v1:{cache_digest(parts, secret=secret).hexdigest()}".encode()
