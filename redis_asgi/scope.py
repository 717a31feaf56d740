"""What is read from an ASGI scope: the route path, the client's address behind proxies, a buffered body."""

import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from starlette.requests import Request
from starlette.types import Message, Receive, Scope

from .errors import ConfigurationError
from .settings import Network, Settings

# Longer than any address with a zone; what is longer is not looked at and never kept in a cache.
_LONGEST_ADDRESS = 64
_FORWARDED_FOR = re.compile(r'(?:^|;)\s*for\s*=\s*(?:"([^"]*)"|([^;\s]*))\s*(?:;|$)', re.IGNORECASE)


def route_path(scope: Scope) -> str:
    """The decoded path below ``root_path``, by Starlette's own rule; one trailing slash is ignored."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        path = path[len(root) :]
    return path.removesuffix("/")


@dataclass(frozen=True, slots=True)
class PathPattern:
    """A path where ``*`` is any run of characters, ``/`` included; ``/api/*`` also matches ``/api``.

    Matching takes time in proportion to the path, whatever the pattern: no regular expression is involved.
    """

    pattern: str

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern.startswith(("/", "*")):
            raise ConfigurationError(f"paths={self.pattern!r} does not start with '/' or '*'. Try '/api/*'.")

    def matches(self, path: str) -> bool:
        """Whether *path*, as `route_path` gives it, is covered."""
        if self.pattern.endswith("/*") and self._covers(self.pattern[:-2], path):
            return True
        pattern = self.pattern.removesuffix("/")
        return self._covers(pattern, path)

    @staticmethod
    def _covers(pattern: str, path: str) -> bool:
        head, *middle = pattern.split("*")
        if not middle:
            return path == pattern
        tail = middle.pop()
        if len(path) < len(head) + len(tail) or not (path.startswith(head) and path.endswith(tail)):
            return False
        at, end = len(head), len(path) - len(tail)
        for part in middle:
            found = path.find(part, at, end)
            if found < 0:
                return False
            at = found + len(part)
        return True


def path_patterns(paths: str | Iterable[str] | None) -> tuple[PathPattern, ...]:
    """One pattern or several as a tuple of `PathPattern`."""
    return tuple(PathPattern(path) for path in ([paths] if isinstance(paths, str) else paths or ()))


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    """Every field line of the header *name* (lower case), in order."""
    return [value for key, value in scope["headers"] if key == name]


def is_preflight(scope: Scope) -> bool:
    """Whether a request is a CORS preflight: the browser asks, not the client."""
    if scope.get("method") != "OPTIONS":
        return False
    names = {name for name, _ in scope["headers"]}
    return b"origin" in names and b"access-control-request-method" in names


@lru_cache(maxsize=16_384)
def _parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Read an address as it stands in a forwarding header: with or without port, brackets or zone.

    ``::ffff:1.2.3.4`` is ``1.2.3.4``. ``None`` for anything else, ``unknown`` and ``_hidden`` included.
    """
    text = text.strip()
    if not text or len(text) > _LONGEST_ADDRESS:
        return None
    if text.startswith("["):
        inside, bracket, port = text[1:].partition("]")
        if not bracket or (port and not (port[0] == ":" and port[1:].isdigit())):
            return None
        text = inside
    elif text.count(":") == 1:
        text, _, port = text.partition(":")
        if not port.isdigit():
            return None
    return _parse_address(text)


def peer_host(scope: Scope) -> str:
    """The host at the other end of the connection as the server names it; empty when it does not."""
    peer = scope.get("client")
    return (peer[0] or "") if peer else ""


class Addressing:
    """Who a request comes from, given which proxies are believed.

    Args:
        settings: ``RATE_LIMIT_TRUSTED_PROXIES``, ``_FORWARDED_HEADER`` and ``_IPV6_PREFIX`` of it.
    """

    def __init__(self, settings: Settings) -> None:
        self._trusted: Sequence[Network] = tuple(map(ipaddress.ip_network, settings.RATE_LIMIT_TRUSTED_PROXIES))
        self.header = settings.RATE_LIMIT_FORWARDED_HEADER.encode()
        self._prefix = settings.RATE_LIMIT_IPV6_PREFIX
        self._entries: Callable[[bytes], list[str]] = _forwarded if self.header == b"forwarded" else _x_forwarded_for
        # Per instance, so that the cache dies with it.
        self._is_trusted = lru_cache(maxsize=16_384)(self._is_trusted_uncached)
        self._shared_by = lru_cache(maxsize=16_384)(self._shared_by_uncached)

    def client(self, scope: Scope) -> str | None:
        """What the client's counter is called: its address, or the network an IPv6 client shares it with.

        The peer's address, unless the peer is trusted: then the believed header is walked from the right, over all
        its field lines, and the first address that is not trusted is the client. An entry that is no address ends the
        walk at the last trusted one. ``None`` when the server gives no peer (a unix socket).
        """
        peer = scope.get("client")
        host = peer[0] if peer else None
        if not host:
            return None
        if len(host) > _LONGEST_ADDRESS:
            return str(host)
        if self._trusted and self._is_trusted(host):
            host = self._walk(scope, host)
        return self._shared_by(host)

    def trusts_peer(self, scope: Scope) -> bool:
        """Whether the forwarding header of this request is believed."""
        host = peer_host(scope)
        return bool(host and self._trusted and len(host) <= _LONGEST_ADDRESS and self._is_trusted(host))

    def _walk(self, scope: Scope, peer: str) -> str:
        client = peer
        for line in reversed(header_values(scope, self.header)):
            for entry in reversed(self._entries(line)):
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
    """Whether *client*, as `Addressing.client` gives it, is an address or a network, not whatever a server believed."""
    if len(client) > _LONGEST_ADDRESS:
        return False
    try:
        read = ipaddress.IPv6Network(client) if "/" in client else ipaddress.ip_address(client)
    except ValueError:
        return False
    return client == str(read)


def _x_forwarded_for(line: bytes) -> list[str]:
    return line.decode("latin-1").split(",")


def _forwarded(line: bytes) -> list[str]:
    """The ``for`` of every element (RFC 7239); an element without one gives an entry that is no address."""
    text = line.decode("latin-1")
    if text.count('"') % 2:
        # A client's open quote would swallow the element that the proxy has put behind it.
        return [""]
    found = []
    for element in _split_outside_quotes(text):
        match = _FORWARDED_FOR.search(element)
        found.append((match[1] or match[2] or "") if match else "")
    return found


def _split_outside_quotes(text: str) -> list[str]:
    parts, start, quoted = [], 0, False
    for i, char in enumerate(text):
        if char == '"':
            quoted = not quoted
        elif char == "," and not quoted:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


class UnreadableBody(Exception):
    """A body over the cap, cut short, or not the JSON that was asked for; never leaves the package."""


class BufferedRequest(Request):
    """A request whose body may be read ahead of the app: bounded here, and replayed byte for byte to the app.

    Attributes:
        unreadable: Whether it was over the cap, cut short, or not the JSON that was asked for.
    """

    def __init__(self, scope: Scope, receive: Receive, *, cap: int) -> None:
        self._upstream = receive
        self._cap = cap
        self._read = bytearray()
        self._started = False
        self._more = True
        self._disconnected: Message | None = None
        self.unreadable = False
        super().__init__(scope, self._next)

    async def _next(self) -> Message:
        message = await self._upstream()
        if message["type"] != "http.request":
            self._disconnected = message
            return message
        self._started = True
        body: bytes = message.get("body", b"")
        self._more = message.get("more_body", False)
        # One bytearray: kept messages of one byte each would take 200 times their size.
        self._read += body
        if len(self._read) > self._cap:
            raise self._refuse()
        return message

    def _refuse(self) -> UnreadableBody:
        # Noted, since the callable may catch it.
        self.unreadable = True
        return UnreadableBody()

    async def body(self) -> bytes:
        while self._more:
            await self._next()
            if self._disconnected is not None:
                raise self._refuse()
        # Where Starlette's own stream() and form() look for it.
        self._body = bytes(self._read)
        return self._body

    async def json(self) -> Any:
        body = await self.body()
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise self._refuse() from None

    def replay(self) -> Receive:
        """A ``receive`` that gives what was read, as one message, and then what is still to come."""
        if not self._started and self._disconnected is None:
            return self._upstream
        pending: list[Message] = []
        if self._started:
            pending.append({"type": "http.request", "body": bytes(self._read), "more_body": self._more})
            self._read.clear()
        if self._disconnected is not None:
            pending.append(self._disconnected)
        pending.reverse()

        async def receive() -> Message:
            return pending.pop() if pending else await self._upstream()

        return receive
