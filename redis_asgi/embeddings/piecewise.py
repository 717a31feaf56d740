"""Parsing a large JSON document in pieces: its long arrays of numbers are taken out, and read one at a time.

A million numbers take orjson 30 ms, in which no other request gets a turn. They are the vectors of an answer, or the
token arrays of a request.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, cast

import orjson

from .pace import Pace

# A text this short is left where it is, and parsed with the rest.
_MIN_SPAN = 256
_MIN_REQUEST = 64 * 1024  # bytes; less is parsed in half a millisecond
_PLACEHOLDER = b"\\u0000"  # the beginning of what stands for an array in the JSON
_NUMBER_CHARACTERS = b"0123456789+-.eE, \t\r\n"


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A JSON document whose long arrays of numbers are taken out, so that they can be parsed one at a time.

    Attributes:
        document: The parsed rest; each array is a placeholder in it.
        spans: The texts taken out, by placeholder.
    """

    document: object
    spans: dict[str, bytes]


def take_apart(body: bytes, most_lists: int | None = None) -> Generator[None, None, Skeleton | None]:
    """Parse *body* without its long arrays of numbers; ``None`` if it is not JSON. Pauses after each array.

    With more than *most_lists* lists of any kind, a hostile body's, it is left whole: ``None``, too.

    A text that only looks like an array, inside of a string, breaks that string's quotes and so the rest's
    syntax, or leaves a placeholder nobody asks for: see `Skeleton.spans` and what uses it.
    """
    parts: list[bytes] = []
    spans: dict[str, bytes] = {}
    copied = looked = lists = 0
    while (end := body.find(b"]", looked)) >= 0:
        # The innermost one that ends here; every byte is looked at twice at most.
        start = body.rfind(b"[", looked, end)
        looked = end + 1
        lists += 1
        if lists == most_lists:
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
    try:
        return Skeleton(orjson.loads(b"".join(parts)), spans)
    except orjson.JSONDecodeError:
        return None


def parse_whole(body: bytes) -> Generator[None, None, Skeleton | None]:
    """Parse *body* in one go: right for every document, but a large one stops the loop for long."""
    yield
    try:
        return Skeleton(orjson.loads(body), {})
    except orjson.JSONDecodeError:
        return None


async def in_turns(work: Generator[None, None, Skeleton | None], pace: Pace) -> Skeleton | None:
    """What *work* returns; the loop gets its turns in between."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return cast("Skeleton | None", end.value)
        if pace.due:
            await pace.rest()


async def parse_request(body: bytes, most_lists: int, pace: Pace) -> object:
    """`orjson.loads` of a request, token arrays one at a time; one of more than *most_lists* lists in one go.

    Raises:
        orjson.JSONDecodeError: It is not JSON.
    """
    # With no such escape in the body, no text of it equals a placeholder.
    if len(body) >= _MIN_REQUEST and _PLACEHOLDER not in body:
        skeleton = await in_turns(take_apart(body, most_lists), pace)
        if skeleton is not None and await _put_back(skeleton, pace):
            return skeleton.document
    return orjson.loads(body)


async def _put_back(skeleton: Skeleton, pace: Pace) -> bool:
    """Parse what was taken out, where inputs are: a field, or an item of one; whether that was all of it."""
    left = dict(skeleton.spans)
    fields = skeleton.document if isinstance(skeleton.document, dict) else {}
    holders: list[Any] = [fields, *(value for value in fields.values() if isinstance(value, list))]
    for holder in holders:
        for key, value in holder.items() if holder is fields else enumerate(holder):
            if isinstance(value, str) and value[:1] == "\0" and value in left:
                try:
                    holder[key] = orjson.loads(left.pop(value))
                except orjson.JSONDecodeError:
                    return False  # it ended inside of a string
                if pace.due:
                    await pace.rest()
    return not left
