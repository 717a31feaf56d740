"""The head of a request as the cache reads it: in one pass,
and once for all requests that say the same. Pure.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ...asgi.fields import media_type
from ...keys import length_prefixed
from . import http_caching as http
from .headers import HeaderClass, Headers
from .http_caching import HeaderFields, RawHeaders, RequestDirectives

_MAX_MEMORISED = 256  # heads
_MEMORISED_BYTES = 8 * 1024  # of one
_MAX_NAMES = 4096  # which are the client's
_LONGEST_NAME = 256  # bytes; what is longer is not remembered
# App Gateway and CloudFront send address:port, with another port for each connection;
# behind a bare IPv6 address five digits are one.
_PORT = re.compile(rb"(\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}|\]|:[0-9A-Fa-f]{1,4}(?=:\d{5})):\d{1,5}")
_CONTENT_TYPE = b"content-type"
# What clients without a key and proxies without a certificate put into a credential header.
_OF_NOBODY = frozenset((b"", b"bearer", b"basic", b"none", b"null", b"(null)", b"-"))
# Of no class that counts, or perhaps not,
# and yet they decide whether and how a request is looked up.
_DECIDING = http.BODY_BINDING | {b"accept", b"cache-control", b"content-encoding", _CONTENT_TYPE, b"pragma"}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SaidByHead:
    """The headers of a request, as far as they count; each part an encoding of names and values.

    Attributes:
        key: Headers of the class *key*, without credentials.
        credential: Credential headers.
        lease: Headers of the class *lease*;
            where no credential header says anything the address headers, too.
        has_credential: Whether a credential header says anything.
        keyed: Name and value of each header in the key, credentials too when they are.
    """

    key: bytes
    credential: bytes
    lease: bytes
    has_credential: bool
    keyed: Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Head:
    """Of one request, and of all whose headers say the same.

    Attributes:
        told: What is in keys.
        wanted: What its ``Cache-Control`` asks for.
        refusal: Why it passes through, whatever its body is; ``None`` when that decides.
        is_json: Whether it says that its body is JSON.
    """

    told: SaidByHead
    wanted: RequestDirectives
    refusal: str | None
    is_json: bool


class _Counting(dict[bytes, bool]):
    """Whether a header counts, by its name as it was sent; bounded."""

    def __init__(self, headers: Headers) -> None:
        super().__init__()
        self._headers = headers

    def __missing__(self, name: bytes) -> bool:
        lowered = name.lower()
        counts = lowered in _DECIDING or self._headers.class_of(lowered) is not HeaderClass.NEITHER
        if len(name) <= _LONGEST_NAME:
            if len(self) >= _MAX_NAMES:
                self.clear()  # a client makes names up; the usual ones are back at once
            self[name] = counts
        return counts


class Heads:
    """The heads that one middleware has read.

    Args:
        headers: The classes of its headers.
    """

    def __init__(self, headers: Headers) -> None:
        self._headers = headers
        self._counting = _Counting(headers)
        self._memorised: dict[RawHeaders, Head] = {}

    def read(self, sent: RawHeaders) -> Head:
        """Read the headers of one request."""
        counting = self._counting
        # Ids and lengths, which differ every time, are not among these.
        kept = tuple([pair for pair in sent if counting[pair[0]]])
        try:
            known = self._memorised.get(kept)
        except TypeError:  # a server that sends lists
            kept = tuple([(name, value) for name, value in kept])
            known = self._memorised.get(kept)
        if known is not None:
            return known
        made = self._make(kept)
        if sum([len(name) + len(value) for name, value in kept]) <= _MEMORISED_BYTES:
            self._memorised[kept] = made
            if len(self._memorised) > _MAX_MEMORISED:
                # The oldest; loops in several threads may share one middleware.
                with suppress(KeyError, RuntimeError):
                    del self._memorised[next(iter(self._memorised))]
        return made

    def _make(self, kept: RawHeaders) -> Head:
        fields = http.by_name(kept)
        refusal: str | None = None
        if http.binds_its_body(fields):
            refusal = "body-header"
        elif http.is_encoded(fields) or not http.accepts_json(fields):
            refusal = "encoding"
        return Head(self._tell(fields), http.wanted(fields), refusal, http.is_json(fields))

    def _tell(self, fields: HeaderFields) -> SaidByHead:
        headers = self._headers
        key: list[bytes] = []
        credential: list[bytes] = []
        lease: list[bytes] = []
        addresses: list[bytes] = []
        keyed: list[tuple[bytes, bytes]] = []
        has_credential = False
        for name, values in sorted(fields.items()):
            kind = headers.class_of(name)
            if kind is HeaderClass.CREDENTIAL:
                credential += _flat(name, values)
                has_credential = has_credential or not _OF_NOBODY.issuperset(value.strip().lower() for value in values)
            elif kind is HeaderClass.LEASE:
                lease += _flat(name, values)
            elif kind is HeaderClass.ADDRESS:
                addresses += _flat(name, [_PORT.sub(rb"\1", value) for value in values])
            if kind is HeaderClass.KEY or headers.is_keyed(name):
                if name == _CONTENT_TYPE and not headers.is_keyed(name):
                    key += _flat(name, [media_type(value) for value in values])
                    continue
                key += _flat(name, values)
            if headers.is_in_key(name):
                keyed.append((name, b",".join(values)))
        if not has_credential:
            lease += addresses
        return SaidByHead(
            length_prefixed(key), length_prefixed(credential), length_prefixed(lease), has_credential, tuple(keyed)
        )


def _flat(name: bytes, values: Sequence[bytes]) -> list[bytes]:
    return [name, b"%d" % len(values), *values]
