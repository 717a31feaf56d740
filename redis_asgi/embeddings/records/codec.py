"""A stored vector: a 32-byte header and the raw little-endian numbers. Never pickle.

::

    0   magic and version   45 31 c0 80
    4   dtype               1 float32, 2 float64, 3 float16
    5   flags               1 tokens known, 2 tokens exact, 4 shortest, 8 capped
    6   dims                u16
    8   tokens              u32, what the app counted for this input
    12  born                u32, Unix seconds
    16  epoch               8 bytes, those of the model when the vector was asked for
    24  own                 8 bytes of its own key's digest: under another key it is no value
    32  dims numbers
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import cast

import numpy as np
from numpy.typing import NDArray

MAGIC = b"\x45\x31\xc0\x80"
NO_EPOCH = bytes(8)
HEADER_BYTES = 32
MAX_DIMS = 0xFFFF
_HEADER = struct.Struct("<4sBBHII8s8s")
_U32 = 0xFFFFFFFF

Float32Array = NDArray[np.float32]
Numbers = NDArray[np.float16] | NDArray[np.float32] | NDArray[np.float64]


class DType(IntEnum):
    """The type of the numbers of one value."""

    FLOAT32 = 1
    FLOAT64 = 2
    FLOAT16 = 3


class Flag:
    """Bits: what else is known about a value. Plain integers,
    as every input of a hit looks at them.
    """

    TOKENS_KNOWN = 1
    TOKENS_EXACT = 2
    SHORTEST = 4  # the app prints the shortest text of a float32, not that of its float64 twin
    CAPPED = 8  # the app's own max-age shortened the TTL, so that it cannot be computed from the key


_NUMPY: dict[int, np.dtype[np.float16] | np.dtype[np.float32] | np.dtype[np.float64]] = {
    int(DType.FLOAT32): np.dtype("<f4"),
    int(DType.FLOAT64): np.dtype("<f8"),
    int(DType.FLOAT16): np.dtype("<f2"),
}
_ITEMSIZE: dict[int, int] = {int(code): dtype.itemsize for code, dtype in _NUMPY.items()}
_DTYPES = {dtype.str: code for code, dtype in _NUMPY.items()}


@dataclass(slots=True)
class Value:
    """One stored vector: the bytes as Redis has them, what their header says,
    and what this process made of them.

    Only the last two attributes ever change. One object,
    because a hit of many inputs makes one for each.

    Attributes:
        raw: Header and numbers.
        dtype: A `DType`.
        flags: `Flag` bits.
        dims: Numbers in the vector, 1 to 65,535.
        tokens: What the app counted for the input; 0 when unknown.
        born: Unix seconds.
        epoch: 8 bytes.
        expires_at: Unix seconds; ``None`` when it was not asked for, or the key does not tell.
        texts: JSON by representation (an `Encoding`).
    """

    raw: bytes
    dtype: int
    flags: int
    dims: int
    tokens: int
    born: int
    epoch: bytes
    expires_at: float | None = field(compare=False)
    texts: dict[str, bytes] = field(compare=False)

    @property
    def numbers(self) -> Numbers:
        """The vector, shape ``(dims,)``, read-only and in the precision it is kept in."""
        return cast("Numbers", np.frombuffer(self.raw, dtype=_NUMPY[self.dtype], offset=HEADER_BYTES))

    @property
    def float32(self) -> Float32Array:
        """A writable float32 copy of the vector, shape ``(dims,)``."""
        return self.numbers.astype("<f4")


def encode(
    numbers: Numbers,
    *,
    born: float,
    own: bytes,
    epoch: bytes = NO_EPOCH,
    tokens: int | None = None,
    flags: int = 0,
    texts: dict[str, bytes] | None = None,
) -> Value:
    """Put a header before *numbers*, shape ``(d,)``, float16,
    float32 or float64 with ``1 <= d <= 65535``.

    Args:
        numbers: Finite numbers; the caller has looked.
        born: Unix seconds.
        own: 8 bytes that say which key it is for.
        epoch: 8 bytes.
        tokens: The app's count for this input; ``None`` = unknown.
        flags: `Flag` bits; those about tokens are set here.
        texts: What it looked like when it was read.
    """
    little = np.ascontiguousarray(numbers, dtype=numbers.dtype.newbyteorder("<"))
    dtype = _DTYPES[little.dtype.str]
    flags &= ~Flag.TOKENS_KNOWN if tokens is None else ~0
    flags |= 0 if tokens is None else Flag.TOKENS_KNOWN
    count, seconds = min(tokens or 0, _U32), min(max(int(born), 0), _U32)
    dims = little.shape[0]
    header = _HEADER.pack(MAGIC, dtype, int(flags), dims, count, seconds, epoch, own)
    raw = header + little.tobytes()
    return Value(raw, dtype, int(flags), dims, count, seconds, epoch, None, texts if texts is not None else {})


def decode(raw: object, own: bytes) -> Value | None:
    """Read a value of ours; ``None`` for anything else: absent, truncated,
    foreign, of another version or key.

    Does not look whether the numbers are finite: `decode_finite` does, for many at once.
    """
    if not isinstance(raw, bytes) or len(raw) <= HEADER_BYTES:
        return None
    magic, dtype, flags, dims, tokens, born, epoch, owner = _HEADER.unpack_from(raw)
    if magic != MAGIC or owner != own or len(raw) != HEADER_BYTES + dims * _ITEMSIZE.get(dtype, 0):
        return None
    return Value(raw, dtype, flags, dims, tokens, born, epoch, None, {})


def decode_finite(raws: Sequence[object], owns: Iterable[bytes]) -> list[Value | None]:
    """`decode` each; also ``None`` for a value with a number that is NaN or infinite."""
    values = [decode(raw, own) for raw, own in zip(raws, owns, strict=True)]
    if _all_finite([value for value in values if value is not None]):
        return values
    return [value if value is not None and _all_finite([value]) else None for value in values]


def _all_finite(values: Sequence[Value]) -> bool:
    if not values:
        return True
    first = values[0]
    if len({value.dims for value in values}) > 1 or len({value.dtype for value in values}) > 1:
        return all(_all_finite([value]) for value in values)
    # In one piece, a look at all numbers costs a third of what it does one by one;
    # counting is the quickest look.
    numbers = b"".join([memoryview(value.raw)[HEADER_BYTES:] for value in values])
    words = np.frombuffer(numbers, dtype=_NUMPY[first.dtype])
    return bool(np.count_nonzero(np.isfinite(words)) == len(words))


def decode_vector(raw: object, own: bytes) -> Float32Array | None:
    """Read a vector kept by id, shape ``(d,)``: a value of ours,
    or bare little-endian float32 numbers.
    """
    value = decode(raw, own)
    if value is not None:
        with np.errstate(over="ignore"):
            found = value.float32
    elif isinstance(raw, bytes) and raw and len(raw) % 4 == 0 and raw[:3] != MAGIC[:3]:
        found = np.frombuffer(raw, dtype="<f4").astype("<f4")
    else:
        return None
    return found if bool(np.isfinite(found).all()) else None
