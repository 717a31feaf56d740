"""Tokens: an app's count, split over inputs and put together again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redis_asgi.embeddings.origin.tokens import TokenCount, apportion, count_all, reported
from redis_asgi.embeddings.records.codec import Flag, Value, encode
from redis_asgi.embeddings.wire import Input, Usage


def texts(*said: str) -> list[Input]:
    """Inputs."""
    return [Input(b"s", text.encode()) for text in said]


def as_bert(text: str) -> int:
    """What a model counts that puts a token before and one behind each text."""
    return 2 + max(1, len(text) // 4)


@given(st.integers(0, 10**9), st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=40))
def test_shares_have_the_sum_and_none_is_nothing(total: int, said: list[str]) -> None:
    """Whatever the app counted; a share of 0 only where it counted less than one token for each."""
    shares = apportion(total, texts(*said))
    assert shares is not None
    assert total == sum(share.tokens for share in shares)
    assert total < len(said) or min(share.tokens for share in shares) >= 1


def test_a_short_text_beside_a_long_one_has_its_own() -> None:
    """What surrounds each input is counted for each."""
    said = ["hi", "x" * 4000]
    shares = apportion(sum(map(as_bert, said)), texts(*said))
    assert shares is not None
    assert [*map(as_bert, said)] == [share.tokens for share in shares]


def test_many_short_texts_beside_a_long_one_have_about_theirs() -> None:
    """Within an eighth, where a split by bytes alone would give them half."""
    said = [*(f"query {number}" for number in range(20)), "doc " * 500]
    shares = apportion(sum(map(as_bert, said)), texts(*said))
    assert shares is not None
    short = sum(map(as_bert, said[:20]))
    assert abs(sum(share.tokens for share in shares[:20]) - short) <= short / 8


@pytest.mark.parametrize(
    ("total", "inputs", "expected"),
    [
        (None, texts("a", "b"), None),
        (7, texts("a"), [TokenCount(7, exact=True)]),
        (0, texts("a", "b"), [TokenCount(0, exact=True)] * 2),
        (
            5,
            [Input(b"t", b"[1,2]", 2), Input(b"t", b"[1,2,3]", 3)],
            [TokenCount(2, exact=True), TokenCount(3, exact=True)],
        ),
        (
            9,
            [Input(b"t", b"[1,2]", 2), Input(b"t", b"[1,2]", 2)],
            [TokenCount(5, exact=False), TokenCount(4, exact=False)],
        ),
    ],
)
def test_what_is_known_is_exact(total: int | None, inputs: list[Input], expected: list[TokenCount] | None) -> None:
    """One input, token arrays that add up, and an app that counts nothing."""
    assert expected == apportion(total, inputs)


def value(tokens: int | None, *, exact: bool) -> Value:
    """A stored vector."""
    return encode(np.ones(1, "<f4"), born=0, own=bytes(8), tokens=tokens, flags=Flag.TOKENS_EXACT if exact else 0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([value(3, exact=True), value(4, exact=False)], (7, 7)),
        ([value(0, exact=False), value(0, exact=False)], (1, 1)),
        ([value(0, exact=False), value(2, exact=True)], (2, 2)),
        ([value(0, exact=True)] * 2, (0, 0)),
        ([value(None, exact=False)] * 2, (4, 0)),
    ],
    ids=["known", "shares of nothing", "with one that counts", "counted as nothing", "not counted"],
)
def test_a_request_of_texts_is_never_reported_as_nothing(values: list[Value], expected: tuple[int, int]) -> None:
    """Unless the app itself has counted nothing; where it did not count, four bytes are a token."""
    names = [b"a", b"b"][: len(values)]
    inputs = dict(zip(names, texts("eight by", "eight by"), strict=False))
    assert expected == count_all(names, dict(zip(names, values, strict=True)), inputs)


def test_what_is_reported() -> None:
    """`original`: all; `billed`: what the app counted,
    its own words where they are about all of that.
    """
    assert Usage(9) == reported(9, 4, "original") == reported(9, 4, "original", counted=4)
    assert Usage(4, 5) == reported(9, 4, "billed") == reported(9, 4, "billed", counted=3)
    assert Usage(None, 5) == reported(9, 4, "billed", counted=4)
    assert Usage(0, 9) == reported(9, 0, "billed")
