"""Estimates of a request's cost, read from its body: its texts and media,
and the output that it asks for.
"""

import re
import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

from .usage_formats import MOST, Usage

_QUARTERS_OF_MEDIUM = 4 * 1000  # of a token, for an image, a sound or a document within a body
_SAYS_OUTPUT = frozenset(("max_tokens", "max_completion_tokens", "max_output_tokens", "options", "n"))
# Nothing is repeated but characters: a group would keep a place to go back to for each time.
_DATA_URL = re.compile(r"data:(?:[\w.+-]++/[\w.+-]++)?(?:;[^,\s]*+)?,", re.ASCII | re.IGNORECASE)
# Beside base64 under "data" they say what it is.
_SAYS_MEDIUM = frozenset(("media_type", "mime_type", "mimeType", "format"))
_HOLDS_MEDIA = frozenset(("data", "images"))
_FIFTH = itemgetter(slice(4, 5))  # character of a text, which is a colon in each URL of data
_REMEMBERED, _ENOUGH = 128, 20  # outputs


class Estimate(NamedTuple):
    """The charge of a request before its answer.

    Attributes:
        cost: Units of the quota, whole.
        input: What of it is for what is read; in parts of a unit, of `Tokens` alone to understand.
        output: What of it is for the answer; likewise.
    """

    cost: int
    input: int
    output: int


class Asked(NamedTuple):
    """The part of a request's body that its cost depends on; of a large body all that need be kept.

    Attributes:
        quarters: Of a token, that are read.
        output: See `asked_output`.
    """

    quarters: int
    output: int | None

    @classmethod
    def by(cls, document: object) -> "Asked":
        """The wishes of *document*, as JSON made it."""
        return cls(_quarters(document), asked_output(document))


class Outputs:
    """The lengths of the last answers of one rule and bucket, in this process; 128 numbers at most.

    Attributes:
        likely: The 90th percentile, in tokens (the nearest rank); ``None`` until 20 are known.
    """

    __slots__ = ("_last", "_lock", "_sorted", "likely")

    def __init__(self) -> None:
        self._last: deque[int] = deque()
        self._sorted: list[int] = []
        self._lock = threading.Lock()  # loops in several threads may share one rule
        self.likely: int | None = None

    def note(self, usage: Usage) -> None:
        """Remember the output of an answer, if it is known."""
        *_, output, reasoning = usage
        if output is None:
            return
        if reasoning:
            output += reasoning
        last, ranked = self._last, self._sorted
        with self._lock:
            if len(last) == _REMEMBERED:
                del ranked[bisect_left(ranked, last.popleft())]
            last.append(output)
            insort(ranked, output)
            known = len(ranked)
            if known >= _ENOUGH:
                self.likely = ranked[(9 * known + 9) // 10 - 1]


def input_tokens(document: object) -> float:
    """The tokens that are read of a request, in exact quarters: a guess, which must not be nothing.

    A quarter for each byte of UTF-8 of each text; 1 for each whole number of a list, which is a
    token; 1,000 for each image, sound or file that the body holds itself, as a ``data:`` URL or in
    base64.

    Args:
        document: Its body as JSON made it, however deep.
    """
    return _quarters(document) / 4


def asked_output(document: object) -> int | None:
    """The tokens that a request lets the model write; ``None`` if it does not say, or nonsense.

    The largest of ``max_tokens``, ``max_completion_tokens``, ``max_output_tokens`` and
    ``options.num_predict``, of those that are whole numbers above 0, times ``n`` if that is one
    too; 2^53 at most.
    """
    if not isinstance(document, dict):
        return None
    most, times = 0, 1
    for name in _SAYS_OUTPUT.intersection(document):
        value = document[name]
        if name == "n":
            times = _count(value) or 1
        else:
            if name == "options":
                value = value.get("num_predict") if isinstance(value, dict) else None
            most = max(most, _count(value))
    return min(most * times, MOST) if most else None


def _count(value: object) -> int:
    """A whole number above 0, ``5.0`` included, up to 2^53; 0 for all else."""
    if type(value) is int or (type(value) is float and value.is_integer()):
        return min(int(value), MOST) if value > 0 else 0
    return 0


def _quarters(document: object) -> int:
    """`input_tokens` in quarters of a token."""
    quarters = 0
    texts: list[str] = []
    # A stack: a body may be nested deeper than Python calls.
    left: list[Iterable[Any]] = [(document,)]
    while left:
        for node in left.pop():
            kind = type(node)
            if kind is str:
                texts.append(node)
            elif kind is dict:
                if not _HOLDS_MEDIA.isdisjoint(node):
                    quarters += _more_for_media(node)
                left.append(node.values())
            elif kind is list and node:
                items, kinds = node, list(map(type, node))
                quarters += 4 * kinds.count(int)
                if kinds.count(dict) == len(items) and _HOLDS_MEDIA.isdisjoint(chain.from_iterable(items)):
                    # Such as messages: all values in one go.
                    items = list(chain.from_iterable(map(dict.values, items)))
                    kinds = list(map(type, items))
                if kinds.count(str) == len(items):
                    texts += items
                elif kinds.count(int) < len(items):
                    left.append(items)
    return quarters + _quarters_of_texts(texts)


def _quarters_of_texts(texts: Sequence[str]) -> int:
    whole = "".join(texts)
    if ":" in whole and ":" in map(_FIFTH, texts):
        return sum(map(_quarters_of_text, texts))
    return len(whole) if whole.isascii() else len(whole.encode("utf-8", "surrogatepass"))


def _quarters_of_text(text: str) -> int:
    if text[:5].lower() == "data:" and _DATA_URL.match(text):
        return _QUARTERS_OF_MEDIUM
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _more_for_media(holder: dict[str, object]) -> int:
    """The count of the media that *holder* has in base64, less theirs as texts."""
    more = 0
    data, images = holder.get("data"), holder.get("images")
    if type(data) is str and (holder.get("type") == "base64" or not _SAYS_MEDIUM.isdisjoint(holder)):
        more += _QUARTERS_OF_MEDIUM - _quarters_of_text(data)
    if type(images) is list:
        for image in images:
            if type(image) is str and "://" not in image[:16]:
                more += _QUARTERS_OF_MEDIUM - _quarters_of_text(image)
    return more
