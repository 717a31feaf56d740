"""Stored values: exact, and nothing else is ever read as one."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redis_asgi.embeddings.records.codec import (
    HEADER_BYTES,
    MAGIC,
    Flag,
    Value,
    decode,
    decode_finite,
    decode_vector,
    encode,
)

OWN = bytes(range(1, 9))

FLOAT32 = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50)
FLOAT64 = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=50)
FLOAT16 = st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1, max_size=50)


@given(
    st.one_of(
        FLOAT32.map(lambda n: np.array(n, "<f4")),
        FLOAT64.map(lambda n: np.array(n, "<f8")),
        FLOAT16.map(lambda n: np.array(n, "<f2")),
        FLOAT32.map(lambda n: np.array(n, ">f4")),
    ),
    st.binary(min_size=8, max_size=8),
    st.one_of(st.none(), st.integers(0, 2**32 - 1)),
    st.integers(0, 2**32 - 1),
)
def test_decoding_gives_back_what_was_encoded(numbers: np.ndarray, epoch: bytes, tokens: int | None, born: int) -> None:
    """Bit for bit, in any of the three precisions, with everything the header says."""
    value = encode(numbers, born=born, own=OWN, epoch=epoch, tokens=tokens, flags=Flag.SHORTEST)
    read = decode(value.raw, OWN)
    assert isinstance(read, Value)
    assert value == read
    assert numbers.tobytes() == read.numbers.astype(numbers.dtype).tobytes()
    assert (epoch, tokens or 0, born) == (read.epoch, read.tokens, read.born)
    assert (tokens is not None) == bool(read.flags & Flag.TOKENS_KNOWN)
    assert HEADER_BYTES + numbers.nbytes == len(value.raw)


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda rest: MAGIC + rest[:20] + OWN + rest[20:])))
def test_no_bytes_make_decoding_raise(raw: bytes) -> None:
    """Anything at all is a value whose length fits its header, or none; both readers."""
    value = decode(raw, OWN)
    if value is not None:
        assert raw == value.raw
        assert value.dims == value.numbers.shape[0] <= len(raw)
    vector = decode_vector(raw, OWN)
    if vector is not None:
        assert np.isfinite(vector).all()
        assert vector.nbytes <= 2 * len(raw)


GOOD = encode(np.array([1.0, 2.0], "<f4"), born=1, own=OWN).raw


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(None, id="absent"),
        pytest.param("text", id="a client that decodes"),
        pytest.param(b"", id="empty"),
        pytest.param(GOOD[:-1], id="truncated"),
        pytest.param(GOOD + b"\0", id="too long"),
        pytest.param(b"E2" + GOOD[2:], id="foreign magic"),
        pytest.param(GOOD[:3] + b"\x7f" + GOOD[4:], id="other version"),
        pytest.param(GOOD[:4] + b"\x07" + GOOD[5:], id="unknown dtype"),
        pytest.param(GOOD[:6] + struct.pack("<H", 3) + GOOD[8:], id="wrong dims"),
        pytest.param(GOOD[:24] + b"\0" + GOOD[25:], id="another key's"),
        pytest.param(MAGIC + bytes(20) + OWN, id="no dims"),
    ],
)
def test_what_is_not_a_value_of_ours_is_a_miss(raw: object) -> None:
    """Corrupt, truncated, foreign and other-version values are not read, by id neither."""
    assert decode(raw, OWN) is None
    if raw != b"E2" + GOOD[2:]:
        assert decode_vector(raw, OWN) is None


def test_bare_float32_is_a_vector_by_id_only() -> None:
    """A value without a header is read as float32 numbers where a service keeps its own ids."""
    raw = np.array([1.5, -2.0], "<f4").tobytes()
    assert decode(raw, OWN) is None
    assert [1.5, -2.0] == decode_vector(raw, OWN).tolist()  # type: ignore[union-attr]  # it is one


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_a_miss(number: float) -> None:
    """A corrupt vector is never served, with a header or without."""
    numbers = np.array([1.0, number], "<f4")
    assert decode_vector(encode(numbers, born=1, own=OWN).raw, OWN) is None
    assert decode_vector(numbers.tobytes(), OWN) is None


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
@pytest.mark.parametrize("epoch", [bytes(8), b"\xff" * 8, b"\0\0\xc0\x7f" * 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_only_the_values_that_are_not_finite_are_misses(dtype: str, epoch: bytes, bad: float) -> None:
    """Whatever stands in their headers, of one shape or of several,
    and however large the others' numbers.
    """
    largest = np.finfo(dtype).max
    good = [encode(np.full(6, n, dtype), born=n, own=OWN, epoch=epoch).raw for n in (0, 1)]
    good.append(encode(np.full(6, largest, dtype), born=1, own=OWN, epoch=epoch).raw)
    numbers = np.ones(6, dtype)
    numbers[3] = bad
    broken = encode(numbers, born=1, own=OWN, epoch=epoch).raw
    other = encode(np.ones(5, dtype), born=1, own=OWN, epoch=epoch).raw

    for raws, expected in (
        (good, [1, 1, 1]),
        ([*good, broken], [1, 1, 1, 0]),
        ([broken, broken], [0, 0]),
        ([other, broken, None, b"x"], [1, 0, 0, 0]),
    ):
        assert [bool(n) for n in expected] == [value is not None for value in decode_finite(raws, [OWN] * len(raws))]
