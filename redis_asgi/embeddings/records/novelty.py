"""Noticing what defeats the cache: a header, a field or a query that is new in every request.

Such a request can hit nothing, and what it would store could not be found again: while that lasts
nothing is written, and the log names the header or the field once, with the setting that leaves it
out of the key. Only digests are kept.
"""

import hashlib
import logging
import os
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable

from ...events import SaidOnce, say

logger = logging.getLogger("redis_asgi.embeddings")

Marks = tuple[tuple[str, int], ...]

_IN_A_ROW = 32  # values never seen before, one a request
_MAX_NAMES = 64
_SLOTS = 1 << 17  # of 8 bytes; a value that another one has pushed out counts as new
_SHOWN = 80  # characters of a name that the client chose, in a log
_HEADER, _FIELD, _QUERY = "header ", "field ", "query string"


class Novelty:
    """The values that one middleware has seen, in a fixed room."""

    def __init__(self) -> None:
        self._key = os.urandom(16)
        self._seen: array[int] | None = None
        self._streaks: OrderedDict[str, int] = OrderedDict()
        self._once = SaidOnce(logger, _MAX_NAMES)

    def marks(
        self, headers: Iterable[tuple[bytes, bytes]], fields: Iterable[tuple[str, object]], query: bytes
    ) -> Marks:
        """Digests of what stands in the key: header values,
        body fields by their dotted names, and the query.
        """
        named = [(_HEADER + name.decode("latin-1"), value) for name, value in headers]
        named += [(_FIELD + name, repr(value).encode("utf-8", "replace")) for name, value in fields]
        if query:
            named.append((_QUERY, query))
        return tuple((name, self._digest(name, value)) for name, value in named)

    def defeats(self, marks: Marks, *, again: bool, is_credential: Callable[[bytes], bool]) -> bool:
        """Note a request; whether it brings a new value of a name whose last 32 requests all did.

        Args:
            marks: What it says, see `marks`.
            again: Whether an equal request was noted before, so that nothing of it can be new.
            is_credential: Whether a header says who asks.
        """
        if again and not self._streaks:
            return False
        if self._seen is None:
            self._seen = array("Q", bytes(8 * _SLOTS))
        defeated = False
        for name, digest in marks:
            slot = digest % _SLOTS
            if self._seen[slot] == digest:
                self._streaks.pop(name, None)
                continue
            self._seen[slot] = digest
            streak = self._streaks[name] = self._streaks.pop(name, 0) + 1
            if len(self._streaks) > _MAX_NAMES:
                self._streaks.popitem(last=False)
            # The first ones were stored; from here on none would be found.
            if streak > _IN_A_ROW:
                defeated = True
                self._say(name, is_credential)
        return defeated

    def _digest(self, name: str, value: bytes) -> int:
        text = name.encode("utf-8", "replace")
        hashed = hashlib.blake2b(b"%d:%b%b" % (len(text), text, value), digest_size=8, key=self._key)
        return int.from_bytes(hashed.digest(), "little") or 1

    def _say(self, name: str, is_credential: Callable[[bytes], bool]) -> None:
        if not self._once.is_new("embedding_cache_defeated", name):
            return
        kind, _, shown = name[: len(_HEADER) + _SHOWN].partition(" ")
        if kind == "header" and (shown == "host" or is_credential(shown.encode("latin-1"))):
            fix = (
                "It says who asks. If one caller's values change, as tokens and cookies do, give partition_by what "
                "stays the same of him; if it says nothing, take it out of EMBEDDING_CACHE_CREDENTIAL_HEADERS."
            )
        elif name == _QUERY:
            fix = "Let clients leave out what chooses no model."
        else:
            fix = (
                "Does it choose a tenant, a model or a permission? If not, put it into "
                f"EMBEDDING_CACHE_IGNORED_{'HEADERS' if kind == 'header' else 'FIELDS'}."
            )
        what = f"The {kind} {shown}"
        say(logger, "embedding_cache_defeated", what=what, cure=fix, **{kind: shown})
