"""Parsing in pieces gives what parsing as a whole does, whatever the text."""

import asyncio
import json
from collections.abc import Generator
from itertools import count
from typing import Any, TypeVar

import numpy as np
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from redis_asgi import time_slice
from redis_asgi.embeddings.requests import chunked_json as piecewise
from redis_asgi.embeddings.requests.chunked_json import (
    Most,
    TooManyValues,
    is_within,
    parse_request,
    parse_whole,
    take_apart,
)
from redis_asgi.time_slice import TimeSlice

LONG = list(range(1000, 1100))  # as JSON longer than what is left where it is
DOCUMENTS = st.recursive(
    st.one_of(st.text(alphabet='[]",\\:a1\0', max_size=9), st.integers(-9, 9), st.just(LONG), st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(alphabet='[]"\\1', max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


Result = TypeVar("Result")


def finished(work: Generator[None, None, Result]) -> Result:
    """What *work* returns in the end."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: Result = end.value
            return result


@given(
    DOCUMENTS,
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=60, max_size=70),
)
def test_taking_long_arrays_out_loses_nothing(document: object, numbers: list[float]) -> None:
    """Put back, the texts taken out give the document;
    tricky strings are never mistaken for arrays.
    """
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


def parsed(body: bytes, inputs: int = 1000) -> object:
    """What a request's parser makes of *body*; what it raises is a value, too."""

    async def parse() -> object:
        try:
            return await parse_request(body, inputs, TimeSlice())
        except orjson.JSONDecodeError:
            return "no JSON"
        except TooManyValues:
            return "too many"

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
    """The loop gets turns in between, and lists of another kind are not worth the search."""
    ticks = count()
    monkeypatch.setattr(time_slice, "perf_counter", lambda: next(ticks) * 0.001)
    rests = 0
    rest = TimeSlice.checkpoint

    async def counted(self: TimeSlice) -> None:
        nonlocal rests
        rests += 1
        await rest(self)

    monkeypatch.setattr(TimeSlice, "checkpoint", counted)
    body = orjson.dumps({"model": "m", "input": [LONG] * 200})
    assert len(body) > piecewise._MIN_REQUEST
    assert {"model": "m", "input": [LONG] * 200} == parsed(body)
    assert rests > 100
    rests = 0
    monkeypatch.setattr(piecewise, "_LISTS_BESIDE", 100)
    assert "too many" == parsed(body.replace(b"[1000", b"[[], 1000"), 3)
    assert rests < 10


@given(
    DOCUMENTS,
    st.integers(1, 7),
    st.tuples(*[st.integers(0, 12)] * 3),
    st.booleans(),
)
@example({'"': '\\"', "\\": "[\\\\", "a": ["\\", '"']}, 2, (2, 3, 3), False)
def test_values_are_counted_outside_of_strings(
    document: object, at_once: int, most: tuple[int, int, int], escaped: bool
) -> None:
    """Whatever quotes, escapes and brackets are in them,
    and wherever the body is cut to be looked at.
    """
    body = json.dumps(document, ensure_ascii=escaped).encode()
    lists = strings = values = 0

    def count(value: object) -> None:
        nonlocal lists, strings, values
        if isinstance(value, str):
            strings += 1
        if isinstance(value, list | dict):
            lists += 1
            values += max(0, len(value) - 1)
            for item in value:
                count(item)
        if isinstance(value, dict):
            for item in value.values():
                count(item)

    count(document)
    before, piecewise._AT_ONCE = piecewise._AT_ONCE, at_once + 1
    try:
        within = finished(is_within(body, Most(*most)))
    finally:
        piecewise._AT_ONCE = before
    assert (lists <= most[0] and strings <= most[1] and values <= most[2]) == within


MEBI = 1024 * 1024


def many(item: bytes, size: int = MEBI) -> bytes:
    """Items of a JSON array of about *size* bytes."""
    return b",".join([item] * (size // (len(item) + 1)))


HOSTILE: dict[str, bytes] = {
    "lists": b'{"input":[%b]}' % many(b"[]"),
    "nested lists": b'{"input":[%b]}' % many(b"[[[]]]"),
    "deep lists": b'{"input":%b' % (b"[" * MEBI),
    "objects": b'{"input":"a","x":[%b]}' % many(b'{"":0}'),
    "names": b"{%b}" % b",".join(b'"n%d":0' % number for number in range(MEBI // 10)),
    "texts": b'{"input":[%b]}' % many(b'""'),
    "numbers": b'{"input":[%b]}' % many(b"1"),
    "numbers in short arrays": b'{"input":[%b]}' % many(b"[%b]" % many(b"1", 200)),
    "arrays in a place of no inputs": b'{"x":{"y":[%b]}}' % many(b"[%b]" % many(b"1", 4000)),
    "lists and the escape of a placeholder": b'{"x":"\\u0000","input":[%b]}' % many(b"[]"),
    "lists and an escaped quote": b'{"x":"\\"","input":[%b]}' % many(b"[]"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_body_of_too_many_values_is_not_parsed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they are: nothing long is given to the parser, which would hold up the loop."""
    given: list[int] = []

    class Counted:
        JSONDecodeError = orjson.JSONDecodeError

        @staticmethod
        def loads(text: bytes) -> Any:
            given.append(len(text))
            return orjson.loads(text)

    monkeypatch.setattr(piecewise, "orjson", Counted)
    assert "too many" == parsed(HOSTILE[name], 100)
    assert max(given, default=0) <= 64 * 1024


@pytest.mark.parametrize(
    "fields",
    [
        {"input": ['a[]{},"\\' * 1000] * 100},
        {"input": ['"' * 5000, "\\" * 5001, "[" * 90_000, "é" * 9000]},
        {"input": [LONG * 5] * 100},
        {"input": [[1, 2, 3]] * 50 + [LONG] * 150},
        {"input": [{"text": "x" * 700}] * 100},
        {"input": ["x" * 90_000], "metadata": {f"n{number}": [number] for number in range(2000)}},
        {"input": ["x" * 90_000], "user": "\0"},
    ],
    ids=["texts of code", "of quotes and brackets", "token arrays", "of two lengths", "objects", "metadata", "a zero"],
)
def test_a_large_request_of_honest_inputs_is_parsed(fields: dict[str, Any]) -> None:
    """What is in texts is no list, and token arrays may be long."""
    body = json.dumps(fields).encode()
    assert len(body) > piecewise._MIN_REQUEST
    assert fields == parsed(body, 200)
