"""Parsing a large JSON document in pieces:
its long arrays of numbers are taken out, and read one at a time.

A million numbers take orjson 30 ms, in which no other request gets a turn. They are the vectors of
an answer, or the token arrays of a request. What else a request holds so many of, it holds to do
harm: a million lists take a second, and are counted before they are parsed.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
import orjson

from ...time_slice import TimeSlice
from ..wire import TokenArray

# A text this short is left where it is, and parsed with the rest.
_MIN_SPAN = 256
_MIN_REQUEST = 64 * 1024  # bytes; less is parsed in half a millisecond
_PLACEHOLDER = b"\\u0000"  # the beginning of what stands for an array in the JSON
_NUMBER_CHARACTERS = b"0123456789+-.eE, \t\r\n"
_MIN_COUNTED = 16 * 1024  # bytes; what fits into less is parsed in two milliseconds, whatever it is
_AT_ONCE = 64 * 1024  # bytes that are counted between two looks at the clock
_QUOTE, _COMMA, _LIST, _OBJECT, _BACKSLASH = b'",[{\\'
_LISTS_AT_ONCE = 1024
_LISTS_PER_INPUT = 4
_NUMBERS_PER_INPUT = 128  # more are an array that is taken out
_LISTS_BESIDE, _STRINGS_BESIDE, _NUMBERS_BESIDE = 8 * 1024, 32 * 1024, 128 * 1024
_MOST_NUMBERS = 128 * 1024  # in one array; no model reads as many tokens

Result = TypeVar("Result")


class TooManyValues(ValueError):
    """A request that would hold up the loop while it is parsed."""


@dataclass(frozen=True, slots=True)
class Most:
    """The most that a request may hold to be parsed in one go.

    Attributes:
        lists: And objects.
        strings: Names of members among them.
        values: Members and items, less one of each list.
    """

    lists: int
    strings: int
    values: int

    @classmethod
    def of(cls, inputs: int) -> Self:
        """The most for so many *inputs*, and a generous something beside them."""
        return cls(
            _LISTS_PER_INPUT * inputs + _LISTS_BESIDE,
            inputs + _STRINGS_BESIDE,
            _NUMBERS_PER_INPUT * inputs + _NUMBERS_BESIDE,
        )


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A JSON document whose long arrays of numbers are taken out,
    so that they can be parsed one at a time.

    Attributes:
        document: The parsed rest; each array is a placeholder in it.
        spans: The texts taken out, by placeholder.
    """

    document: object
    spans: dict[str, bytes]


def is_within(body: bytes, most: Most) -> Generator[None, None, bool]:
    """Whether *body*, if it is JSON, holds no more than *most*. Pauses now and then.

    What is in its strings does not count. Most bodies have little enough of such characters with
    their strings, which is seen in a twentieth of the time that parsing takes; of others the
    strings are cut out.
    """
    for texts in (_chunks(body), _outside_strings(body)):
        lists = quotes = values = 0
        for text, cut in texts:
            of = np.frombuffer(text, np.uint8)
            quotes += cut + int(np.count_nonzero(of == _QUOTE))
            lists += int(np.count_nonzero(of == _LIST)) + int(np.count_nonzero(of == _OBJECT))
            values += int(np.count_nonzero(of == _COMMA))
            if lists > most.lists or quotes > 2 * most.strings or values > most.values:
                break
            yield
        else:
            return True
    return False


def _chunks(body: bytes) -> Iterator[tuple[bytes, int]]:
    for at in range(0, len(body), _AT_ONCE):
        yield body[at : at + _AT_ONCE], 0


def _outside_strings(body: bytes) -> Iterator[tuple[bytes, int]]:
    """The bytes outside of strings, and how many quotes were cut out, piece by piece."""
    at, inside = 0, False
    while at < len(body):
        chunk = body[at : at + _AT_ONCE]
        at += len(chunk)
        # An escape stays in one piece.
        if chunk.endswith(b"\\") and (len(chunk) - len(chunk.rstrip(b"\\"))) % 2 and at < len(body):
            chunk, at = chunk[:-1], at - 1
        if b'\\\\"' in chunk:
            chunk = chunk.replace(b"\\\\", b"  ")
        of = np.frombuffer(chunk, np.uint8)
        quotes = np.flatnonzero(of == _QUOTE)
        quotes = quotes[(quotes == 0) | (of[quotes - 1] != _BACKSLASH)]
        ends = [-1, *quotes.tolist(), len(chunk)]
        pieces = zip(ends[inside::2], ends[inside + 1 :: 2], strict=False)
        yield b"".join([chunk[start + 1 : end] for start, end in pieces]), len(quotes)
        inside ^= len(quotes) % 2 == 1


def take_apart(body: bytes, most: Most | None = None) -> Generator[None, None, Skeleton | None]:
    """Parse *body* without its long arrays of numbers;
    ``None`` if it is not JSON. Pauses after each array.

    With more than *most* beside those arrays, a hostile body's, it is left whole: ``None``, too.

    A text that only looks like an array, inside of a string, breaks that string's quotes and so the
    rest's syntax, or leaves a placeholder that is not asked for: see `Skeleton.spans` and what uses
    it.
    """
    parts: list[bytes] = []
    spans: dict[str, bytes] = {}
    copied = looked = lists = 0
    while (end := body.find(b"]", looked)) >= 0:
        # The innermost one that ends here; every byte is looked at twice at most.
        start = body.rfind(b"[", looked, end)
        looked = end + 1
        lists += 1
        if not lists % _LISTS_AT_ONCE:
            yield
        if most is not None and lists > most.lists:
            return None
        if start < 0 or end - start < _MIN_SPAN:
            continue
        # The first characters tell numbers from texts; the parser of the span judges the rest.
        if body[start + 1 : start + 33].strip(_NUMBER_CHARACTERS):
            continue
        name = f"\x00{len(spans)}"
        spans[name] = body[start : end + 1]
        parts += (body[copied:start], b'"%b%d"' % (_PLACEHOLDER, len(spans) - 1))
        copied = end + 1
        yield
    parts.append(body[copied:])
    rest = b"".join(parts)
    if most is not None and not (yield from is_within(rest, most)):
        return None
    try:
        return Skeleton(orjson.loads(rest), spans)
    except orjson.JSONDecodeError:
        return None


def parse_whole(body: bytes) -> Generator[None, None, Skeleton | None]:
    """Parse *body* in one go: right for every document, but a large one stops the loop for long."""
    yield
    try:
        return Skeleton(orjson.loads(body), {})
    except orjson.JSONDecodeError:
        return None


async def in_turns(work: Generator[None, None, Result], time_slice: TimeSlice) -> Result:
    """Run *work* to its result; the loop gets its turns in between."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: Result = end.value
            return result
        if time_slice.expired:
            await time_slice.checkpoint()


async def parse_request(body: bytes, inputs: int, time_slice: TimeSlice) -> object:
    """`orjson.loads` of a request for at most so many *inputs*, token arrays one at a time.

    Raises:
        orjson.JSONDecodeError: It is not JSON.
        TooManyValues: It holds more than such a request.
    """
    if len(body) < _MIN_COUNTED:
        return orjson.loads(body)
    most = Most.of(inputs)
    # With no such escape in the body, no text of it equals a placeholder.
    if len(body) >= _MIN_REQUEST and _PLACEHOLDER not in body:
        skeleton = await in_turns(take_apart(body, most), time_slice)
        if skeleton is not None and await _put_back(skeleton, time_slice):
            return skeleton.document
    if not await in_turns(is_within(body, most), time_slice):
        raise TooManyValues
    return orjson.loads(body)


async def _put_back(skeleton: Skeleton, time_slice: TimeSlice) -> bool:
    """Parse what was taken out, where inputs are: a field,
    or an item of one; whether that was all of it.
    """
    left = dict(skeleton.spans)
    fields = skeleton.document if isinstance(skeleton.document, dict) else {}
    holders: list[Any] = [fields, *(value for value in fields.values() if isinstance(value, list))]
    for holder in holders:
        for key, value in holder.items() if holder is fields else enumerate(holder):
            if isinstance(value, str) and value[:1] == "\0" and value in left:
                span = left.pop(value)
                if len(span) > 2 * _MOST_NUMBERS and span.count(b",") >= _MOST_NUMBERS:
                    raise TooManyValues
                try:
                    holder[key] = TokenArray.of(orjson.loads(span))
                except orjson.JSONDecodeError:
                    return False  # it ended inside of a string
                if time_slice.expired:
                    await time_slice.checkpoint()
    return not left
