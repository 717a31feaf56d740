"""Leases: that the app itself answered such a request of a caller,
and what a full hit repeats of that answer.

A middleware added last stands outside the app's own authentication, so a full hit would answer a
caller whom it has not seen. It is given only while the app's own 2xx answer to the same caller,
path, headers and body, but for the inputs, is younger than ``EMBEDDING_CACHE_LEASE``. A hit never
renews it; a 401 or 403 ends it, and a 401 ends every lease of the credential.
"""

import base64
import binascii
import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

_VERSION = 2
_MAX_BYTES = 16 * 1024  # of a record; an answer with more around its vectors is not one to repeat
_MAX_DENIED = 10_000
_MAX_READ = 64  # records kept as they were read; a caller's stays the same for many requests
MODEL_SECONDS = 300.0  # for which the model that an answer named is believed to answer still
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_OWN_DIGITS = 32  # hexadecimal, at the end of a record's key
_STATUSES = (200, 201)


@dataclass(frozen=True, slots=True)
class Lease:
    """One record.

    Attributes:
        asked_at: Unix seconds of the request that the app answered.
        answered_at: Unix seconds of its answer.
        status: 200 or 201.
        model: The model that the answer named; empty when it named none.
        headers: What a full hit repeats of its headers.
        frame: What a wire format puts around vectors.
    """

    asked_at: float
    answered_at: float
    status: int
    model: str
    headers: tuple[tuple[bytes, bytes], ...]
    frame: dict[str, Any]

    def remaining(self, duration: float, now: float) -> float:
        """Seconds until it ends; a clock that lags behind the writer's never makes it last longer."""
        return min(self.answered_at + duration - now, duration)


def encode_lease(name: bytes, lease: Lease) -> bytes | None:
    """The record of the key *name* as JSON;
    ``None`` when it is too large to keep, or its frame is no JSON.
    """
    headers = [[name.decode("latin-1"), base64.b64encode(value).decode()] for name, value in lease.headers]
    said = {
        "v": _VERSION,
        "own": _own(name),
        "asked": lease.asked_at,
        "at": lease.answered_at,
        "status": lease.status,
        "model": lease.model,
        "headers": headers,
        "frame": lease.frame,
    }
    try:
        record = orjson.dumps(said)
    except orjson.JSONEncodeError:
        return None
    return record if len(record) <= _MAX_BYTES else None


def decode_lease(name: bytes, raw: object) -> Lease | None:
    """Read the record of the key *name*; ``None`` for anything else, so that the app is asked.

    A record carries the digits of its own key, so that no other one, read by mistake, opens
    anything. A client that gets it changes nothing in it.
    """
    return _decode(name, raw) if isinstance(raw, bytes) and len(raw) <= _MAX_BYTES else None


@lru_cache(maxsize=_MAX_READ)
def _decode(name: bytes, raw: bytes) -> Lease | None:
    try:
        record = orjson.loads(raw)
        if record["v"] != _VERSION or record["own"] != _own(name) or record["status"] not in _STATUSES:
            return None
        if not isinstance(record["frame"], dict) or not isinstance(record["model"], str):
            return None
        headers = tuple((_checked_name(name), _value(value)) for name, value in record["headers"])
        times = float(record["asked"]), float(record["at"])
        return Lease(*times, int(record["status"]), record["model"], headers, record["frame"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _own(name: bytes) -> str:
    return name[-_OWN_DIGITS:].decode("latin-1")


def _checked_name(text: str) -> bytes:
    if not _NAME.fullmatch(text):
        raise ValueError("not the name of a header")
    return text.encode("latin-1")


def _value(text: str) -> bytes:
    try:
        value = base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError("not base64") from None
    if b"\r" in value or b"\n" in value or b"\0" in value:
        raise ValueError("a header value has no line breaks")
    return value


class Denials:
    """The times at which the app last refused callers,
    so that an older 2xx on its way grants nothing. Bounded.
    """

    def __init__(self) -> None:
        self._denied_at: OrderedDict[bytes, float] = OrderedDict()

    def note(self, name: bytes, at: float) -> None:
        """Remember a 401 or 403 of *at*, Unix seconds,
        by the key of a lease or of a caller's refusals.
        """
        self._denied_at[name] = max(at, self._denied_at.get(name, at))
        self._denied_at.move_to_end(name)
        if len(self._denied_at) > _MAX_DENIED:
            self._denied_at.popitem(last=False)

    def since(self, names: Sequence[bytes], moment: float) -> bool:
        """Whether there was one under any of *names* at *moment* (Unix seconds) or later."""
        denied_at = self._denied_at
        return bool(denied_at) and any(denied_at.get(name, -1.0) >= moment for name in names)


def encode_denied(at: float) -> bytes:
    """The record of a refusal of *at*, Unix seconds; rounded up,
    as what was allowed just before is not any more.
    """
    return b"%d" % math.ceil(at * 1000)


def decode_denied(raw: object) -> float | None:
    """Read such a record; infinity, so that nothing is let in, for anything else that is there."""
    if raw is None:
        return None
    if isinstance(raw, bytes) and raw.isdigit() and len(raw) < _MAX_DIGITS:
        return int(raw) / 1000
    return float("inf")


_MAX_DIGITS = 17  # far beyond any time in milliseconds


def shortest(lengths: Sequence[int]) -> int:
    """The index of the smallest number: the input that is forwarded only to be let in."""
    return min(range(len(lengths)), key=lengths.__getitem__)
