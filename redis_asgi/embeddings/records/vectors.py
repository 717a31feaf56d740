"""Vectors between JSON and the store: what a number's text must keep, and how it is written again.

Floats are answered numerically identical to how they were first seen. Three kinds of text occur:

- a float32 printed as its float64 twin (``.tolist()`` of most servers):
  kept as float32, printed as float64;
- the shortest text of a float32 (Rust, Go, orjson): kept as float32, printed shortest;
- anything else: kept as float64.
"""

import binascii
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import orjson
import pybase64

from .codec import HEADER_BYTES, MAX_DIMS, DType, Flag, Numbers, Value

# Without line breaks; ten times as fast as binascii's.
base64_of = pybase64.b64encode

_NUMPY = orjson.OPT_SERIALIZE_NUMPY
_FLOAT32 = int(DType.FLOAT32)
_EXACT_INT = 2**53  # a float64 holds every integer up to here


class Encoding(StrEnum):
    """The representations of a vector that can be rendered from the stored one."""

    FLOAT = "float"
    BASE64 = "base64"

    # Enum's own is written in Python, and every input of a hit looks its text up by this.
    __hash__ = str.__hash__


_BASE64 = Encoding.BASE64  # an enum's attribute costs as much as a call, and every vector is rendered


@dataclass(frozen=True, slots=True)
class Parsed:
    """A vector as an answer had it.

    Attributes:
        numbers: Shape ``(d,)``, float32, or float64 where float32 would lose something.
        flags: `Flag.SHORTEST` or 0.
        integers: Whether every number was printed without ``.`` and exponent.
    """

    numbers: Numbers
    flags: int
    integers: bool = False


def read_floats(numbers: object) -> Parsed | None:
    """Read a JSON array of numbers; ``None`` if it is not 1-D, finite,
    of numbers and of 1 to 65,535.
    """
    if not isinstance(numbers, list) or not 0 < len(numbers) <= MAX_DIMS:
        return None
    kinds = set(map(type, numbers))
    if not kinds <= {float, int}:
        return None
    if int in kinds and not all(-_EXACT_INT <= n <= _EXACT_INT for n in numbers if type(n) is int):
        return None
    wide = np.array(numbers, dtype="<f8")
    if not np.isfinite(wide).all():
        return None
    integers = float not in kinds
    with np.errstate(over="ignore"):
        narrow = wide.astype("<f4")
    if np.array_equal(narrow.astype("<f8"), wide):
        return Parsed(narrow, 0, integers)
    if np.isfinite(narrow).all() and orjson.loads(orjson.dumps(narrow, option=_NUMPY)) == numbers:
        return Parsed(narrow, Flag.SHORTEST, integers)
    return Parsed(wide, 0, integers)


def read_base64(text: object) -> Parsed | None:
    """Read base64 of little-endian float32; ``None`` if it is not that,
    empty, too long or not finite.
    """
    if not isinstance(text, str):
        return None
    try:
        raw = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        return None
    if not raw or len(raw) % 4 or len(raw) > 4 * MAX_DIMS:
        return None
    numbers = np.frombuffer(raw, dtype="<f4")
    # Their shortest text is the same float32, at half the length.
    return Parsed(numbers, Flag.SHORTEST) if np.isfinite(numbers).all() else None


def narrowed(parsed: Parsed) -> Parsed:
    """*parsed* as float16; as it is when it does not fit."""
    with np.errstate(over="ignore"):
        half = parsed.numbers.astype("<f2")
    return Parsed(half, Flag.SHORTEST) if np.isfinite(half).all() else parsed


def render(value: Value, encoding: Encoding) -> bytes:
    """The JSON text of *value*: an array of numbers, or a string of base64."""
    if encoding is _BASE64 and value.dtype == _FLOAT32:
        return b'"%b"' % base64_of(value.raw[HEADER_BYTES:])
    numbers = value.numbers
    if encoding is _BASE64:
        with np.errstate(over="ignore"):
            return b'"%b"' % base64_of(numbers.astype("<f4").tobytes())
    if numbers.dtype.itemsize == 8 or not value.flags & Flag.SHORTEST:
        return orjson.dumps(numbers.astype("<f8"), option=_NUMPY)
    return orjson.dumps(numbers.astype("<f4"), option=_NUMPY)


def trimmed(text: bytes) -> bytes:
    """A copy of what orjson wrote: its own keeps the room it had reserved,
    up to thirty times of what it used.
    """
    return b"%b" % text


def text_of(value: Value, encoding: Encoding, *, keep: bool) -> bytes:
    """The JSON text of *value*.

    Args:
        keep: It is needed again: it stays with *value*, and takes no more than its length.
    """
    text = value.texts.get(encoding)
    if text is None:
        text = render(value, encoding)
        if keep:
            value.texts[encoding] = text = trimmed(text) if encoding is not _BASE64 else text
    return text
