"""Parsing in pieces gives what parsing as a whole does, whatever the text."""

import asyncio
import json
from collections.abc import Generator
from itertools import count
from typing import Any, cast

import numpy as np
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from redis_asgi.embeddings import pace, piecewise
from redis_asgi.embeddings.pace import Pace
from redis_asgi.embeddings.piecewise import Skeleton, parse_request, parse_whole, take_apart

LONG = list(range(1000, 1100))  # as JSON longer than what is left where it is
DOCUMENTS = st.recursive(
    st.one_of(st.text(alphabet='[]",\\:a1\0', max_size=9), st.integers(-9, 9), st.just(LONG), st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(alphabet='[]"\\1', max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


def finished(work: Generator[None, None, Skeleton | None]) -> Skeleton | None:
    """What *work* returns in the end."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return cast("Skeleton | None", end.value)


@given(
    DOCUMENTS,
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=60, max_size=70),
)
def test_taking_long_arrays_out_loses_nothing(document: object, numbers: list[float]) -> None:
    """Put back, the texts taken out give the document; tricky strings are never mistaken for arrays."""
    text = json.dumps(numbers)
    whole = [numbers, document, {"embedding": numbers, "text": f'x"{text}', "other": text}]
    body = json.dumps(whole).encode()
    skeleton = finished(take_apart(body)) or finished(parse_whole(body))
    assert skeleton is not None

    def put_back(value: object) -> object:
        if isinstance(value, str) and value in skeleton.spans:
            return orjson.loads(skeleton.spans[value])
        if isinstance(value, list):
            return [put_back(item) for item in value]
        return {k: put_back(v) for k, v in value.items()} if isinstance(value, dict) else value

    assert orjson.loads(body) == put_back(skeleton.document)


def test_long_arrays_are_parsed_one_at_a_time() -> None:
    """A vector of any size leaves only a placeholder behind."""
    numbers = np.random.default_rng(1).standard_normal(500).tolist()
    skeleton = finished(take_apart(json.dumps({"data": [{"embedding": numbers}] * 3}).encode()))
    assert skeleton is not None
    assert 3 == len(skeleton.spans)
    assert [numbers] * 3 == [orjson.loads(span) for span in skeleton.spans.values()]


def parsed(body: bytes, most_lists: int = 1000) -> object:
    """What a request's parser makes of *body*; what it raises is a value, too."""

    async def parse() -> object:
        try:
            return await parse_request(body, most_lists, Pace())
        except orjson.JSONDecodeError:
            return "no JSON"

    return asyncio.run(parse())


def as_a_whole(body: bytes) -> object:
    """The same by orjson alone."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return "no JSON"


TEXT = json.dumps(LONG)[:-1]  # its last bracket is missing


@given(
    st.dictionaries(st.sampled_from(["input", "model", "more"]), DOCUMENTS),
    st.integers(0, 4000),
    st.sampled_from([b"", b"]", b"[", b'"', b"\\", TEXT.encode() + b"]", b'"\\u00000"']),
)
@example({"input": [LONG, LONG]}, 0, b"")
@example({"input": ["\x000", LONG]}, 0, b"")
@example({"input": f'a"{TEXT}]b'}, 0, b"")
@example({"input": [f'{TEXT},"a]', LONG, f'{TEXT},"b]']}, 0, b"")
def test_a_request_is_what_it_is_as_a_whole(fields: dict[str, Any], at: int, harm: bytes) -> None:
    """Token arrays anywhere, texts that look like them, and bytes that do not belong there."""
    body = json.dumps(fields).encode()
    body = body[:at] + harm + body[at:]
    least, piecewise._MIN_REQUEST = piecewise._MIN_REQUEST, 0
    try:
        assert as_a_whole(body) == parsed(body)
    finally:
        piecewise._MIN_REQUEST = least


@pytest.mark.parametrize(
    "body",
    [
        b'{"input":%b,"input":%b}' % (json.dumps(LONG).encode(), json.dumps(LONG[1:]).encode()),
        b'{"a":[%b,"x],"],"b":[%b,"],"]}' % (TEXT[1:].encode(), TEXT[1:].encode()),
        b'{"input":[%b,"a],",":1,","],"]}' % TEXT[1:].encode(),
        json.dumps(LONG).encode(),
        b"[" * 500 + b"]" * 500,
    ],
    ids=["twice", "brackets in strings", "turned inside out", "no object", "deep"],
)
def test_tricks(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Duplicate names, and strings that end where an array seems to."""
    monkeypatch.setattr(piecewise, "_MIN_REQUEST", 0)
    assert as_a_whole(body) == parsed(body)


def test_token_arrays_are_parsed_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop gets turns in between; a body of more lists than inputs are allowed is not worth the search."""
    ticks = count()
    monkeypatch.setattr(pace, "perf_counter", lambda: next(ticks) * 0.001)
    rests = 0
    rest = Pace.rest

    async def counted(self: Pace) -> None:
        nonlocal rests
        rests += 1
        await rest(self)

    monkeypatch.setattr(Pace, "rest", counted)
    body = orjson.dumps({"model": "m", "input": [LONG] * 200})
    assert len(body) > piecewise._MIN_REQUEST
    assert {"model": "m", "input": [LONG] * 200} == parsed(body)
    assert rests > 100
    rests = 0
    assert {"model": "m", "input": [LONG] * 200} == parsed(body, 3)
    assert rests < 3
