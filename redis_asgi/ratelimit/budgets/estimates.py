"""Estimates of a request's cost, read from its body: its texts and media,
and the output that it asks for.
"""

import re
import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

from .usage_formats import MOST, Usage

_QUARTERS_OF_MEDIUM = 4 * 1000  # of a token, for an image, a sound or a document within a body
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
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
    """The lengths of the last answers of one rule and bucket, in this process; 128 numbers at most."""

    __slots__ = ("_last", "_lock", "_sorted")

    def __init__(self) -> None:
        self._last: deque[int] = deque()
        self._sorted: list[int] = []
        self._lock = threading.Lock()  # loops in several threads may share one rule

    def note(self, usage: Usage) -> None:
        """Remember the output of an answer, if it is known."""
        if usage.output is None:
            return
        output = usage.output + (usage.reasoning or 0)
        with self._lock:
            if len(self._last) == _REMEMBERED:
                del self._sorted[bisect_left(self._sorted, self._last.popleft())]
            self._last.append(output)
            insort(self._sorted, output)

    @property
    def likely(self) -> int | None:
        """The 90th percentile, in tokens (the nearest rank); ``None`` until 20 are known."""
        known = len(self._sorted)
        return self._sorted[(9 * known + 9) // 10 - 1] if known >= _ENOUGH else None


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
    said = [document[name] for name in _LIMITS if name in document]
    if "options" in document and isinstance(document["options"], dict):
        said.append(document["options"].get("num_predict"))
    most = max(map(_count, said), default=0)
    if "n" in document:
        most *= _count(document["n"]) or 1
    return min(most, MOST) if most else None


def _count(value: object) -> int:
    """A whole number above 0, ``5.0`` included, up to 2^53; 0 for all else."""
    if type(value) is int or (type(value) is float and value.is_integer()):
        return min(int(value), MOST) if value > 0 else 0
    return 0


def _quarters(document: object) -> int:
    """`input_tokens` in quarters of a token."""
    quarters = 0
    left: list[Iterable[Any]] = [(document,)]
    if type(document) is dict and _HOLDS_MEDIA.isdisjoint(document):
        left = [document.values()]
    # A stack: a body may be nested deeper than Python calls.
    while left:
        for node in left.pop():
            kind = type(node)
            if kind is int or kind is float:
                continue
            if kind is str:
                # Most texts, without a call for each.
                quarters += len(node) if node.isascii() and node[4:5] != ":" else _quarters_of_text(node)
            elif kind is dict:
                if not _HOLDS_MEDIA.isdisjoint(node):
                    quarters += _more_for_media(node)
                left.append(node.values())
            elif kind is list and node:
                if type(node[0]) is dict and (plain := _quarters_of_plain(node)) is not None:
                    quarters += plain
                    continue
                whole = list(map(type, node)).count(int)
                quarters += 4 * whole
                if whole < len(node):
                    left.append(node)
    return quarters


def _quarters_of_plain(objects: list[Any]) -> int | None:
    """The count of *objects* that hold nothing but texts, such as messages; ``None``: of others."""
    try:
        texts = list(chain.from_iterable(map(dict.values, objects)))
        is_ascii = all(map(str.isascii, texts))
        size = sum(map(len, texts)) if is_ascii else len("".join(texts).encode("utf-8", "surrogatepass"))
    except TypeError:  # one of them is no object, or holds something else
        return None
    is_plain = ":" not in map(_FIFTH, texts) and _HOLDS_MEDIA.isdisjoint(chain.from_iterable(objects))
    return size if is_plain else None


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
