"""Names of Redis keys: pure functions, and the only place that knows how a key is put together.

Layout of the package's own keys, after the user's ``REDIS_KEY_PREFIX``::

    rate_limit:{203.0.113.7}                    one hash per partition, a field per policy
    rate_limit:{Zm9vYmFyYmF6cXV4MTIzNA}         the same, for anything but a plain address
    rate_limit:{203.0.113.7}:default:m60:1      the log of one moving-window policy, in the same slot

The braces are Redis Cluster's hash tag: all keys of a partition live in one slot.
"""

import base64
import hashlib

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
        prefix, colon, identifier = text.partition(":")
        if not colon or not prefix:
            raise ValueError(f"key={text!r} is not of the form 'prefix:identifier'.")
        return prefix, identifier


def digest(*parts: str, secret: str | None = None) -> str:
    """22 base64url characters of BLAKE2b-128 over length-prefixed *parts*, keyed by *secret* when given.

    Lengths go in, so that ``("a:b", "c")`` and ``("a", "b:c")`` differ. A secret of any length works:
    BLAKE2 keys are at most 64 bytes, so it is hashed to 32 first.
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
