"""Reading an ASGI scope: header fields, the client's address behind proxies, a buffered body."""

import ipaddress
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from functools import lru_cache
from typing import Any

from starlette.datastructures import FormData
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope

from ..settings import Settings
from ..settings.networks import UNIX, Address, Network, unmapped
from .bodies import Buffer
from .fields import media_type
from .forwarded import LISTS, only_entry

# Longer than any address with a zone; what is longer is not looked at and never kept in a cache.
_LONGEST_ADDRESS = 64


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    """Every field line of the header *name* (lower case), in order."""
    return [value for key, value in scope["headers"] if key == name]


def content_length(scope: Scope) -> int | None:
    """The ``Content-Length`` of a request;
    ``None`` when it says none that can be read, or that counts.

    A ``Transfer-Encoding`` overrides it (RFC 9112, 6.3), and some servers pass on both.
    """
    length = None
    for name, value in scope["headers"]:
        if name == b"transfer-encoding":
            return None
        if length is None and name == b"content-length" and value.isdigit() and len(value) < 19:
            length = int(value)
    return length


def is_encoded(scope: Scope) -> bool:
    """Whether a request's body is compressed, or says so; ``identity`` says that it is not."""
    if b"content-encoding" not in dict(scope["headers"]):  # nearly always
        return False
    return any(value.strip().lower() not in (b"", b"identity") for value in header_values(scope, b"content-encoding"))


def is_preflight(scope: Scope) -> bool:
    """Whether a request is a CORS preflight: the browser asks, not the client."""
    if scope.get("method") != "OPTIONS":
        return False
    names = {name for name, _ in scope["headers"]}
    return b"origin" in names and b"access-control-request-method" in names


@lru_cache(maxsize=16_384)
def _parse_address(text: str) -> Address | None:
    try:
        return unmapped(ipaddress.ip_address(text.partition("%")[0]))
    except ValueError:
        return None


def parse_address(text: str) -> Address | None:
    """Read an address as it stands in a forwarding header: with or without port, brackets or zone.

    ``::ffff:1.2.3.4`` and ``64:ff9b::1.2.3.4`` are ``1.2.3.4``. ``None`` for anything else,
    ``unknown`` and ``_hidden`` included.
    """
    text = text.strip(" \t")
    if not text or len(text) > _LONGEST_ADDRESS:
        return None
    if text.startswith("["):
        inside, bracket, port = text[1:].partition("]")
        if not bracket or (port and not (port[0] == ":" and port[1:].isdigit())):
            return None
        text = inside
    elif text.count(":") == 1 or _parse_address(text) is None:  # some write IPv6 and its port without brackets
        text, _, port = text.rpartition(":")
        if not port.isdigit():
            return None
    return _parse_address(text)


def peer_host(scope: Scope) -> str:
    """The host at the other end of the connection as the server names it; empty when it does not."""
    peer = scope.get("client")
    return (peer[0] or "") if peer else ""


class Addressing:
    """The addresses of clients, given which proxies are believed.

    Args:
        settings: ``RATE_LIMIT_TRUSTED_PROXIES``, ``_FORWARDED_HEADER`` and ``_IPV6_PREFIX`` of it.
    """

    def __init__(self, settings: Settings) -> None:
        trusted = settings.RATE_LIMIT_TRUSTED_PROXIES
        self._trusted: Sequence[Network] = tuple(ipaddress.ip_network(each) for each in trusted if each != UNIX)
        self._trusts_unix = UNIX in trusted
        self.header = settings.RATE_LIMIT_FORWARDED_HEADER.encode()
        self._prefix = settings.RATE_LIMIT_IPV6_PREFIX
        self._entries: Callable[[list[bytes]], Iterator[str]] = LISTS.get(self.header, only_entry)
        # Per instance, so that the cache dies with it.
        self._is_trusted = lru_cache(maxsize=16_384)(self._is_trusted_uncached)
        self._shared_by = lru_cache(maxsize=16_384)(self._shared_by_uncached)

    def client(self, scope: Scope) -> str | None:
        """The name of the client's counter: its address,
        or the network that an IPv6 client shares it with.

        The peer's address, unless the peer is trusted: then the believed header is walked from the
        right, over all its field lines, and the first address that is not trusted is the client. An
        entry that is no address ends the walk at the last trusted one; empty ones are not there.
        ``None`` when there is no address to be had (a unix socket that is not trusted, or whose
        proxy names no client).
        """
        peer = scope.get("client")
        host = peer[0] if peer else None
        if not host:
            if not self._trusts_unix:
                return None
            host = self._walk(scope, "")
            return self._shared_by(host) if host else None
        if len(host) > _LONGEST_ADDRESS:
            return str(host)
        if self._trusted and self._is_trusted(host):
            host = self._walk(scope, host)
        return self._shared_by(host)

    def trusts_peer(self, scope: Scope) -> bool:
        """Whether the forwarding header of this request is believed."""
        host = peer_host(scope)
        if not host:
            return self._trusts_unix
        return bool(self._trusted and len(host) <= _LONGEST_ADDRESS and self._is_trusted(host))

    def _walk(self, scope: Scope, peer: str) -> str:
        client = peer
        for entry in self._entries(header_values(scope, self.header)):
            address = parse_address(entry)
            if address is None:
                return client
            client = str(address)
            if not self._is_trusted(client):
                return client
        return client

    def _is_trusted_uncached(self, host: str) -> bool:
        address = _parse_address(host)
        return address is not None and any(address in network for network in self._trusted)

    def _shared_by_uncached(self, host: str) -> str:
        address = _parse_address(host)
        if isinstance(address, ipaddress.IPv6Address):
            return str(ipaddress.IPv6Network((int(address), self._prefix), strict=False))
        return host if address is None else str(address)


def is_plain_address(client: str) -> bool:
    """Whether *client*, as `Addressing.client` gives it, is an address or a network,
    not whatever a server believed.
    """
    if len(client) > _LONGEST_ADDRESS:
        return False
    try:
        read = ipaddress.IPv6Network(client) if "/" in client else ipaddress.ip_address(client)
    except ValueError:
        return False
    return client == str(read)


class UnreadableBody(Exception):
    """A body over the cap, cut short,
    or not the JSON or form that was asked for; never leaves the package.
    """


class BufferedRequest(Request):
    """A request whose body may be read ahead of the app: bounded here,
    and replayed byte for byte to the app.

    A WebSocket handshake is a GET whose body is empty.

    Args:
        cap: The most that is read, in bytes.
        buffer: In place of *cap*: what reads the body for all who ask about the same request.

    Attributes:
        unreadable: Whether it was over the cap, cut short,
            or not the JSON or form that was asked for.
    """

    def __init__(self, scope: Scope, receive: Receive, *, cap: int = 0, buffer: Buffer | None = None) -> None:
        self._of_app = receive
        self._is_handshake = scope["type"] == "websocket"
        if self._is_handshake:
            scope = {**scope, "type": "http", "method": "GET"}
            buffer = Buffer(_no_body, cap=cap)
        self._buffer = Buffer(receive, cap=cap) if buffer is None else buffer
        # What others have read comes first.
        self._is_behind = self._buffer.started
        self.unreadable = False
        super().__init__(scope, self._next)

    @property
    def is_abandoned(self) -> bool:
        """Whether the client left while its body was read."""
        return self._buffer.gone is not None

    async def _next(self) -> Message:
        buffer = self._buffer
        if self._is_behind:
            self._is_behind = False
            message: Message = {"type": "http.request", "body": buffer.so_far, "more_body": buffer.more}
        elif buffer.gone is not None:
            return buffer.gone
        else:
            message = await buffer.next()
        if buffer.is_over:
            raise self._refuse()
        return message

    def _refuse(self) -> UnreadableBody:
        # Noted, since the callable may catch it.
        self.unreadable = True
        return UnreadableBody()

    async def body(self) -> bytes:
        body = await self._buffer.whole()
        if body is None:
            raise self._refuse()
        # Where Starlette's own stream() and form() look for it.
        self._body = body
        return body

    async def json(self) -> Any:
        await self.body()
        self._buffer.expose()
        try:
            return await self._buffer.json()
        except (ValueError, RecursionError):
            raise self._refuse() from None

    async def stream(self) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(super().stream()) as chunks:
                async for chunk in chunks:
                    yield chunk
        except ClientDisconnect:
            raise self._refuse() from None

    async def _get_form(self, **bounds: Any) -> FormData:
        kind = media_type(self.headers.get("content-type", "").encode("latin-1"))
        if kind not in _FORMS:
            # Starlette reads an empty form then, and an empty one is cheap.
            raise self._refuse()
        # What the server raises while it is read is not the client's doing;
        # all that the parser raises then is.
        await self.body()
        try:
            return await super()._get_form(**bounds)
        except AssertionError:  # the parser is not installed
            raise
        except Exception:
            raise self._refuse() from None

    async def close(self) -> None:
        """Close the files of a form; of the body nothing more is read here."""
        await super().close()
        # It would refer to itself, and keep the room of its body until the collector comes.
        self._receive = _no_body

    def replay(self) -> Receive:
        """A ``receive`` that gives what was read, as one message, and then what is still to come."""
        return self._of_app if self._is_handshake else self._buffer.replay()


_FORMS = frozenset((b"multipart/form-data", b"application/x-www-form-urlencoded"))


async def _no_body() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}
