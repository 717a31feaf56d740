"""Leases: that the app itself answered a credential, and what a full hit repeats of that answer.

A middleware added last stands outside the app's own authentication, so a full hit would answer a caller
nobody has looked at. It is given only while the app's own 2xx answer to the same credential, path, model and
origin is younger than ``EMBEDDING_CACHE_LEASE``. A hit never renews it; a 401 or 403 ends it.
"""

import base64
import binascii
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

_VERSION = 1
_MAX_BYTES = 16 * 1024  # of a record; an answer with more around its vectors is not one to repeat
_MAX_DENIED = 10_000
_MAX_READ = 64  # records kept as they were read; a caller's stays the same for many requests


@dataclass(frozen=True, slots=True)
class Lease:
    """One record.

    Attributes:
        answered_at: Unix seconds of the app's answer.
        headers: What a full hit repeats of its headers.
        frame: What a wire format puts around vectors.
    """

    answered_at: float
    headers: tuple[tuple[bytes, bytes], ...]
    frame: dict[str, Any]

    def remaining(self, duration: float, now: float) -> float:
        """Seconds until it ends; a clock that lags behind the writer's never makes it last longer."""
        return min(self.answered_at + duration - now, duration)


def encode_lease(lease: Lease) -> bytes | None:
    """The record as JSON; ``None`` when it is too large to keep, or a wire format's frame is no JSON."""
    headers = [[name.decode("latin-1"), base64.b64encode(value).decode()] for name, value in lease.headers]
    try:
        record = orjson.dumps({"v": _VERSION, "at": lease.answered_at, "headers": headers, "frame": lease.frame})
    except orjson.JSONEncodeError:
        return None
    return record if len(record) <= _MAX_BYTES else None


@lru_cache(maxsize=_MAX_READ)
def decode_lease(raw: bytes | None) -> Lease | None:
    """Read a record; ``None`` for anything else, so that the app is asked. Whoever gets it changes nothing in it."""
    if raw is None:
        return None
    try:
        record = orjson.loads(raw)
        if record["v"] != _VERSION or not isinstance(record["frame"], dict):
            return None
        headers = tuple((name.encode("latin-1"), _value(value)) for name, value in record["headers"])
        return Lease(float(record["at"]), headers, record["frame"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
        return None


def _value(text: str) -> bytes:
    try:
        value = base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError("not base64") from None
    if b"\r" in value or b"\n" in value:
        raise ValueError("a header value has no line breaks")
    return value


class Denials:
    """When the app last refused whom, so that an older 2xx, still on its way, grants nothing. Bounded."""

    def __init__(self) -> None:
        self._denied_at: OrderedDict[bytes, float] = OrderedDict()

    def note(self, lease_name: bytes, at: float) -> None:
        """Remember a 401 or 403 of *at*, Unix seconds."""
        self._denied_at[lease_name] = at
        self._denied_at.move_to_end(lease_name)
        if len(self._denied_at) > _MAX_DENIED:
            self._denied_at.popitem(last=False)

    def since(self, lease_name: bytes, moment: float) -> bool:
        """Whether there was one at *moment* (Unix seconds) or later."""
        return self._denied_at.get(lease_name, -1.0) >= moment


def shortest(lengths: Sequence[int]) -> int:
    """The index of the smallest number: the input that is forwarded only to be let in."""
    return min(range(len(lengths)), key=lengths.__getitem__)
