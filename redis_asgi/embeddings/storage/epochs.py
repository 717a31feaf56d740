"""Writes of a model's epoch: 8 random bytes, without which nothing stored of the model is valid."""

import os

from ..records.codec import NO_EPOCH
from .operations import Write

_BYTES = 8
_SECONDS = 86_400.0  # at least; one that is gone makes its vectors misses, never valid
_CLAIM_SECONDS = 600.0  # names of models that the app does not have fill Redis no longer
_FLUSH_SECONDS = 366 * 24 * 3600.0  # longer than any TTL of vectors; one that has ended validates nothing either


def claim(name: bytes) -> Write:
    """An epoch for a model that has none."""
    return Write(name, _new(), _CLAIM_SECONDS, "absent")


def renewal(name: bytes, ttl: float) -> Write:
    """The epoch that is there, kept as long as vectors of *ttl* seconds need it."""
    return Write(name, b"", _seconds(ttl), "renew")


def replacement(name: bytes, ttl: float) -> Write:
    """Another epoch for a model whose vectors live for *ttl* seconds:
    all that are stored become misses.
    """
    return Write(name, _new(), _seconds(ttl))


def flush(name: bytes) -> Write:
    """`replacement` where the TTL of the vectors is not known."""
    return Write(name, _new(), _FLUSH_SECONDS)


def as_epoch(raw: object) -> bytes:
    """The epoch in a reply of Redis; `NO_EPOCH` when that is none."""
    return raw if isinstance(raw, bytes) and len(raw) == _BYTES else NO_EPOCH


def _seconds(ttl: float) -> float:
    return max(_SECONDS, 2 * ttl)


def _new() -> bytes:
    return os.urandom(_BYTES)  # all zeros mean that there is none
