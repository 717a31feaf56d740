"""Partitions, the clients that share a counter:
the ready ``partition_by`` callables, and how any becomes one.
"""

from base64 import b64decode, b64encode, urlsafe_b64decode
from collections.abc import Awaitable, Callable, Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache
from inspect import isawaitable
from typing import Any, TypeAlias, TypeGuard, cast

from starlette.requests import HTTPConnection
from starlette.types import Scope

from ...asgi.offer import OFFER, offer_of
from ...asgi.scope import Addressing, is_plain_address
from ...errors import ConfigurationError
from ...misuse import check_callable, constructor_says_what_was_meant, says_what_was_meant, shown
from ...settings import Settings
from ..limits.policy import Partition, make_partition
from .by_body import ByBody

PartitionPart: TypeAlias = Callable[[HTTPConnection], str | None | Awaitable[str | None]]
PartitionBy: TypeAlias = PartitionPart | Sequence[PartitionPart]

# The one partition of all clients whose server gives no address (a unix socket).
UNKNOWN = "unknown"
# Their values begin with a scheme, whose case and blanks say nothing (RFC 9110, 11.1).
_CREDENTIALS = frozenset(("authorization", "proxy-authorization"))
# Longer identities are hashed each time: a cache must not hold a megabyte per entry.
LONGEST_CACHED = 256


@says_what_was_meant("partition_by=client_ip, which is called for each request")
def client_ip(conn: HTTPConnection) -> str | None:
    """Partition by the client's address: an IPv4 address, or the network of
    ``RATE_LIMIT_IPV6_PREFIX`` bits.

    Behind proxies the forwarding header is believed only from ``RATE_LIMIT_TRUSTED_PROXIES``. A
    server that gives no address puts everybody into the one partition ``unknown``.
    """
    # It is asked in one way: the middleware's (without one, the first per-route limit's), by every
    # callable of the user's, by the limits of routes below and by the app itself.
    offer = offer_of(conn.scope)
    addressing = offer.addressing if offer is not None else None
    if addressing is None:
        addressing = _default_addressing()
    return addressing.client(conn.scope) or UNKNOWN


@lru_cache(maxsize=1)
def _default_addressing() -> Addressing:
    return Addressing(Settings())


@constructor_says_what_was_meant("by_header('x-api-key')")
class by_header:  # noqa: N801 - reads as a function where it is used
    """Partition by the value of a request header, such as an API key.

    A header that nothing verifies is an identity the client chooses: whoever sends a new value for
    every request is never limited. Put the middleware inside the one that checks the key, or add a
    second rule by `client_ip`. A request without the header, or with an empty one, is counted by
    ``RATE_LIMIT_MISSING_IDENTITY``. Spaces and tabs around the value do not matter, and of
    ``Authorization`` and ``Proxy-Authorization`` neither the scheme's case nor any blanks, nor
    what a decoder of base64 forgives in a ``Basic`` credential or in a JSON Web Token's signature;
    everything else is another identity.

    Raises:
        ConfigurationError: If *name* is not a header name.
    """

    def __init__(self, name: str) -> None:
        if not isinstance(name, str) or not name or not name.isascii() or any(c in name for c in ' \t\r\n:,;"'):
            raise ConfigurationError(f"by_header({name!r}): not a header name. Try by_header('x-api-key').")
        self.name = name.lower()
        self._raw = self.name.encode()
        self._has_scheme = self.name in _CREDENTIALS

    def __call__(self, conn: HTTPConnection) -> str | None:
        return self.read(conn.scope)

    def read(self, scope: Scope) -> str | None:
        """The identity in the first field line, the one that Starlette reads;
        ``None`` when absent or empty.
        """
        raw = self._raw
        for name, value in scope["headers"]:
            if name == raw:
                text = value.decode("latin-1").strip(" \t")
                return (self.fold(text) if self._has_scheme else text) or None
        return None

    def fold(self, value: str) -> str:
        """The identity that a field *value* names, however it is spelled: ``BEARER   x`` as
        ``bearer x``.
        """
        if not self._has_scheme:
            return value.strip(" \t")
        # Whatever Python calls blank, since that is what its apps strip and split by.
        scheme, *rest = value.strip().split(maxsplit=1) or [""]
        if not rest:  # a key without a scheme is as it is
            return scheme
        scheme, credentials = scheme.lower(), rest[0]
        if scheme == "basic":
            credentials = _in_one_spelling(credentials, b64decode)
        elif credentials.startswith(("ey", "ew")):  # a JSON Web Token, which signs all but its signature
            signed, dot, signature = credentials.rpartition(".")
            credentials = signed + dot + _in_one_spelling(signature, urlsafe_b64decode)
        return f"{scheme} {credentials}"


def _in_one_spelling(text: str, decode: Callable[[bytes], bytes]) -> str:
    """*text*, which is base64, less what decoders skip: foreign characters, padding, spare bits."""
    try:
        return b64encode(decode(text.encode() + b"==")).decode()
    except ValueError:
        return text


@says_what_was_meant("partition_by=by_user, which is called for each request")
def by_user(conn: HTTPConnection) -> str | None:
    """Partition by the authenticated user that Starlette's ``AuthenticationMiddleware`` put into
    the scope.

    Its ``identity``, else its ``display_name``. That middleware must be outside this one (added
    later). Nobody logged in is counted by ``RATE_LIMIT_MISSING_IDENTITY``.
    """
    return _read_user(conn.scope)


def _read_user(scope: Scope) -> str | None:
    user = scope.get("user")
    if user is None or not getattr(user, "is_authenticated", False):
        return None
    try:
        identity = user.identity
    except (AttributeError, NotImplementedError):
        identity = getattr(user, "display_name", None)
    return str(identity) or None if identity is not None else None


def check_partition_by(partition_by: object) -> None:
    """Check that *partition_by* is a callable that takes the connection, or several of these.

    Raises:
        ConfigurationError: If it is none, or takes something else.
    """
    if _is_several(partition_by):
        if isinstance(partition_by, AbstractSet) or not partition_by:
            raise ConfigurationError(
                f"partition_by={shown(partition_by)} is no list of parts. Try [by_header('x-api-key'), client_ip]."
            )
        for part in partition_by:
            if _is_several(part):
                raise ConfigurationError("partition_by= holds a list in a list. Write all parts in one.")
            check_partition_by(part)
        return
    if isinstance(partition_by, ByBody):
        return
    if isinstance(partition_by, type) and issubclass(partition_by, ByBody):
        raise ConfigurationError(
            f"partition_by={shown(partition_by)} is not called: by which values? "
            "Try by_json('model', ['gpt-5-mini*', 'gpt-5*']) or by_mcp_tool(['search', 'fetch_*'])."
        )
    if partition_by is by_header:
        raise ConfigurationError("partition_by=by_header is not called: by which header? Try by_header('x-api-key').")
    if isinstance(partition_by, str):
        # As RATE_LIMIT_PARTITION has it, or the header's bare name.
        header = partition_by.removeprefix("header:")
        meant = {"ip": "client_ip", "user": "by_user"}.get(partition_by, f"by_header({header!r})")
        if partition_by.startswith("json:") or partition_by == "model":
            meant = f"by_json({partition_by.removeprefix('json:')!r}, ['gpt-5-mini*', 'gpt-5*'])"
        known = "client_ip, by_user or by_header('x-api-key')"
        raise ConfigurationError(
            f"partition_by={shown(partition_by)} is not callable. Try partition_by={meant}, one of {known}."
        )
    example = "client_ip, by_header('x-api-key'), by_user or lambda conn: conn.headers.get('x-tenant')"
    check_callable("partition_by", partition_by, "conn", example)


def _is_several(value: object) -> TypeGuard[Sequence[object] | AbstractSet[object]]:
    return isinstance(value, Sequence | AbstractSet) and not isinstance(value, str | bytes) and not callable(value)


class MissingIdentity(Exception):
    """A request lacks what its rule counts by, and ``RATE_LIMIT_MISSING_IDENTITY`` is ``refuse``."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class Partitioner:
    """Turns what a ``partition_by`` callable says of a request into a `Partition`.

    Args:
        partition_by: ``None`` = ``RATE_LIMIT_PARTITION``.
        addressing: Whose addresses are believed; ``None`` = what the scope says.

    Attributes:
        kind: What identities are of: ``ip``, ``header:NAME``, ``user``,
            ``json:NAME``, ``mcp_tool`` or ``custom``.
        read: Reads the identity from a scope,
            where that takes no callable of the user's; ``None`` where it does.
        by: That callable.
        missing: What a request without an identity is counted by, see
            ``RATE_LIMIT_MISSING_IDENTITY``.
        readers: Those of it that count by the request's body.
    """

    def __init__(self, partition_by: PartitionPart | None, settings: Settings, addressing: Addressing | None) -> None:
        if partition_by is None:
            partition_by = _from_setting(settings.RATE_LIMIT_PARTITION)
        check_partition_by(partition_by)
        self.by: Callable[[HTTPConnection], Any] = partition_by
        self.readers: tuple[ByBody, ...] = ()
        self._prefix = settings.REDIS_KEY_PREFIX
        self._secret = settings.key_secret
        self.missing = settings.RATE_LIMIT_MISSING_IDENTITY
        self._by_address = partition_by is client_ip
        self.kind = "custom"
        self.read: Callable[[Scope], str | None] | None = None
        if partition_by is client_ip:
            self.kind, self.read = "ip", self._read_address if addressing is None else addressing.client
        elif isinstance(partition_by, by_header):
            self.kind, self.read = f"header:{partition_by.name}", partition_by.read
        elif partition_by is by_user:
            self.kind, self.read = "user", _read_user
        elif isinstance(partition_by, ByBody):
            self.kind, self.readers, self.read = partition_by.kind, (partition_by,), partition_by.bucket_of
        # Per instance, so that the caches die with it.
        self._of_value = lru_cache(maxsize=16_384)(self._name_value)
        self._of_client = lru_cache(maxsize=16_384)(self.of_address)

    @property
    def counts_users(self) -> bool:
        """Whether it counts by the user whom a middleware has put in the scope."""
        return self.kind == "user"

    @property
    def refuses(self) -> bool:
        """Whether a request without the identity is refused."""
        return self.missing == "refuse" and self._may_miss

    @property
    def _may_miss(self) -> bool:
        return self.kind == "user" or self.kind.startswith("header:")

    async def settle(self, said: object, scope: Scope) -> "str | Partition | None":
        """The identity of a request of which `by` or `read` *said* this;
        ``None``: its rule does not apply.

        Raises:
            MissingIdentity: No identity, and the setting says to refuse.
        """
        if not isinstance(said, str) and isawaitable(said):
            said = await said
        if isinstance(said, str):
            return said
        if said is not None:
            raise TypeError(
                f"partition_by returned {type(said).__name__}, not str or None. Return text, such as str(user.id)."
            )
        if self._by_address:
            return UNKNOWN
        if self.missing == "skip" or not self._may_miss:
            return None
        if self.missing == "refuse":
            raise MissingIdentity(self.kind)
        return self._of_client(self._read_address(scope)) if self.missing == "ip" else ""

    def of(self, name: "str | Partition") -> Partition:
        """The partition of whom a request is counted as."""
        if isinstance(name, Partition):
            return name
        return self._of_value(name) if len(name) <= LONGEST_CACHED else self._name_value(name)

    def bucket_of(self, name: Any) -> Any:
        """The part of *name* that the body says, which is one of few that a rule names."""
        return name if self.readers else None

    def _read_address(self, scope: Scope) -> str | None:
        return cast("Addressing", scope[OFFER].addressing).client(scope)

    def of_address(self, client: str | None) -> Partition:
        """The partition of a client as `Addressing.client` names it."""
        client = client or UNKNOWN
        return make_partition(
            "ip", client, prefix=self._prefix, secret=self._secret, plain=is_plain_address(client) or client == UNKNOWN
        )

    def _name_value(self, value: str) -> Partition:
        if self._by_address:
            return self.of_address(value)
        return make_partition(self.kind, value, prefix=self._prefix, secret=self._secret)


def _from_setting(partition: str) -> PartitionPart:
    if partition == "ip":
        return client_ip
    return by_user if partition == "user" else by_header(partition.removeprefix("header:"))
