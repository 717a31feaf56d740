"""Numbers between JSON and the store."""

import base64
import json
import tracemalloc

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redis_asgi.embeddings.records.codec import Flag, encode
from redis_asgi.embeddings.records.vectors import Encoding, read_base64, read_floats, render, text_of
from redis_asgi.embeddings.wire.format import read_inputs

FLOATS32 = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20)
FLOATS = st.lists(st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-99, 99)), min_size=1)


@given(st.one_of(FLOATS, FLOATS32, FLOATS32.map(lambda n: [float(str(np.float32(x))) for x in n])))
def test_floats_are_rendered_as_the_numbers_that_were_read(numbers: list[float]) -> None:
    """Whatever the app printed, a hit parses to the same numbers, and base64 is their float32."""
    parsed = read_floats(numbers)
    assert parsed is not None
    value = encode(parsed.numbers, born=0, own=bytes(8), flags=parsed.flags)
    assert numbers == json.loads(render(value, Encoding.FLOAT))
    with np.errstate(over="ignore"):
        expected = np.array(numbers, dtype="<f8").astype("<f4").tobytes()
    assert expected == base64.b64decode(json.loads(render(value, Encoding.BASE64)))


@pytest.mark.parametrize(
    ("text", "integers"),
    [("[1,0,-3]", True), ("[1,0.0,-3]", False), ("[1,2e0]", False), ("[0,0,0]", True), ("[-0.0]", False)],
)
def test_integers_are_told_from_floats(text: str, integers: bool) -> None:
    """One number with a dot or an exponent makes a vector of floats."""
    parsed = read_floats(orjson.loads(text))
    assert parsed is not None
    assert integers == parsed.integers


@given(FLOATS32)
def test_base64_is_rendered_as_the_bytes_that_were_read(numbers: list[float]) -> None:
    """Exact as base64, and the same float32 numbers as floats."""
    raw = np.array(numbers, "<f4").tobytes()
    parsed = read_base64(base64.b64encode(raw).decode())
    assert parsed is not None
    value = encode(parsed.numbers, born=0, own=bytes(8), flags=parsed.flags)
    assert raw == base64.b64decode(orjson.loads(render(value, Encoding.BASE64)))
    assert raw == np.array(orjson.loads(render(value, Encoding.FLOAT)), "<f4").tobytes()


@pytest.mark.parametrize(
    "numbers",
    [
        [],
        [True, 1.0],
        [1.0, None],
        ["1"],
        [[1.0]],
        {"a": 1},
        "AAAA",
        1.0,
        [2**60 + 1],
        [1.0] * 65_536,
        [10**400],
    ],
    ids=lambda n: repr(n)[:20],
)
def test_what_is_not_one_vector_of_numbers_is_not_read(numbers: object) -> None:
    """Not 1-D, empty, mixed, too long or not exact: the answer is not understood."""
    assert read_floats(numbers) is None


@pytest.mark.parametrize("text", ["", "AAA=", "AAAA", "AA AA AA=", "AACAfw==", "AADAfw==", "????", 5, None])
def test_what_is_not_base64_of_float32_is_not_read(text: object) -> None:
    """Loose base64, odd lengths, NaN and infinity are not understood."""
    assert read_base64(text) is None


def test_what_is_kept_takes_no_more_than_its_length() -> None:
    """What the in-process layer counts is what it holds;
    the same for token arrays, which wait for the app.
    """
    numbers = np.random.default_rng(1).standard_normal(1536).astype("<f4")
    values = [encode(numbers, born=1, own=bytes(8), flags=Flag.SHORTEST) for _ in range(50)]
    tokens = [99_999] * 700
    tracemalloc.start()
    made = [text_of(value, encoding, keep=True) for encoding in Encoding for value in values]
    read = read_inputs([tokens] * 50)
    assert read is not None
    lengths = sum(map(len, made)) + sum(len(item.canonical) for item in read[0])
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 1.1 * lengths
