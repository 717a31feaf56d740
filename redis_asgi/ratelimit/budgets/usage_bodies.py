"""The bodies of answers, read as they pass for what they say of usage: a document,
events, lines, or none of these.
"""

import json
import re
from typing import Any

import orjson

from .usage_formats import Said, find_usage

WHOLE = 1 << 20  # bytes of a document or event that are kept
TAIL = 1 << 16  # bytes of a longer one
_HEAD = 512
_TRIES = 16  # of places in a tail; each costs a parse of what follows

# The end of an event, which a CR that may become a CRLF is not yet.
_BLANK_LINE = re.compile(rb"\n(?:\n|\r\n|\r(?!\n|\Z))|\r(?:\r\n|\r(?!\n|\Z))")
_LINE_END = re.compile(rb"\r\n|\n|\r")
_DATA = re.compile(rb"(?:\A|[\r\n]|\xef\xbb\xbf)data:")
_DONE = re.compile(rb"\s*data: ?\[DONE\]\s*")
_LONGEST_DONE = 24
_NAMES_USAGE = re.compile(rb'"usage"\s*+:\s*+(?!null)')
_RESPONSE_ENDS = re.compile(rb'"type"\s*+:\s*+"(response\.(?:completed|failed|incomplete))"')
# A quote that is escaped belongs to a text.
_MEMBER = re.compile(rb'"(?<!\\")(?:usage|meta|done|prompt_eval_count)"\s*+:')


class Body:
    """A body in which nothing can be found, and the base of the others.

    Attributes:
        size: Bytes that have passed; of an event stream those of its events.
        events: How many events or lines have passed.
        smallest: The bytes of the smallest of them; 0 without one.
        first: What the first document that says something of usage says.
        last: The same of the last one.
    """

    size = events = smallest = 0
    first: Said | None = None
    last: Said | None = None
    _events_at_last = 0

    @property
    def is_current(self) -> bool:
        """Whether nothing has passed since `last`."""
        return self._events_at_last == self.events

    def feed(self, chunk: bytes) -> None:
        """Look at a *chunk*, of up to `TAIL` bytes if memory is to be bounded."""
        self.size += len(chunk)

    def close(self, *, complete: bool) -> "Body":  # noqa: ARG002 - of a document it says nothing
        """Read what is left, and return the body as it turned out to be."""
        return self

    def _note(self, said: Said | None, at: int = 0) -> bool:
        """Keep what an answer or its event number *at* says, and return whether it does."""
        if not said:
            return False
        if self.first is None:
            self.first = said
        self.last = said
        self._events_at_last = at
        return True


class Document(Body):
    """One JSON document; several lines of them that nothing has declared are found out at the end."""

    _is_long = False
    _kept: bytes | bytearray = b""

    def feed(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if not self._kept:
            self._kept = chunk  # often the only one
            return
        if isinstance(self._kept, bytes):
            self._kept = bytearray(self._kept)
        self._kept += chunk
        if len(self._kept) > (2 * TAIL if self._is_long else WHOLE):
            self._is_long = True
            del self._kept[:-TAIL]

    def close(self, *, complete: bool) -> Body:
        kept, self._kept = bytes(self._kept), b""
        if self._is_long:
            self._note(find_usage(_from_tail(kept), streamed=False))
            return self
        document = _loads(kept)
        if document is None and b"\n" in kept.strip():
            lines = Lines()
            lines.feed(kept)
            return lines.close(complete=complete)
        self._note(find_usage(document, streamed=False))
        return self


class Lines(Body):
    """Documents, each on a line of its own (NDJSON)."""

    def __init__(self) -> None:
        self._pending = bytearray()
        # Those that name a usage but are not parsed yet, and their numbers:
        # of many that say one, the last will do.
        self._named: list[tuple[int, bytes]] = []
        self._named_size = 0
        # Of one that is too long to be kept: how it began, and how many bytes are gone.
        self._head = b""
        self._dropped = 0

    def feed(self, chunk: bytes) -> None:
        pending = self._pending
        if not pending and self._is_one(chunk):
            self._take(chunk)
            return
        searched = len(pending)
        pending += chunk
        start = 0
        while True:
            end = self._end(pending, max(start, searched - 2))
            if end < 0:
                break
            self._take(bytes(pending[start:end]))
            start = searched = end
        del pending[:start]
        if len(pending) > (2 * TAIL if self._dropped else WHOLE):
            if not self._dropped:
                self._head = bytes(pending[:_HEAD])
            self._dropped += len(pending) - TAIL
            del pending[:-TAIL]

    def close(self, *, complete: bool) -> Body:
        left = bytes(self._pending)
        self._pending.clear()
        if left:
            smallest = self.smallest
            self._take(left)
            # A CR was waited for that may have become a CRLF.
            if not complete and not left.endswith((b"\r\r", b"\n\r")):
                # What was cut says nothing of how small a whole one is.
                self.smallest = smallest
        self._settle()
        return self

    def _is_one(self, chunk: bytes) -> bool:
        """Whether *chunk* is exactly one line, as servers send them."""
        return chunk.find(b"\n") == len(chunk) - 1 >= 0

    def _end(self, pending: bytearray, start: int) -> int:
        """The end of the first line that ends behind *start*; -1 if none does."""
        return pending.find(b"\n", start) + 1 or -1

    def _take(self, line: bytes) -> None:
        if line.isspace() and not self._dropped:
            self.size += len(line)
            return
        is_long = self._count(line)
        if b'eval_count"' in line or (b'"usage"' in line and _NAMES_USAGE.search(line)):
            self._keep(line, is_long=is_long)

    def _keep(self, event: bytes, *, is_long: bool) -> None:
        """Keep *event*, which names a usage, until it is known whether a later one says what it is."""
        if is_long:
            self._settle()
            self._note(find_usage(self._end_of(event), streamed=True), self.events)
        elif self.first is None:
            self._note(self._said_by(event), self.events)
        else:
            self._named.append((self.events, event))
            self._named_size += len(event)
            if self._named_size > TAIL:
                self._settle()

    def _settle(self) -> None:
        """Parse what was kept, from the last on, until one says something."""
        named, self._named, self._named_size = self._named, [], 0
        for number, event in reversed(named):
            if self._note(self._said_by(event), number):
                return

    def _said_by(self, line: bytes) -> Said | None:
        return find_usage(_loads(line), streamed=True)

    def _end_of(self, line: bytes) -> object:
        """The value at the end of a long *line*."""
        return _from_tail(line)

    def _count(self, event: bytes) -> bool:
        """Count *event*, and say whether it is only the end of one."""
        dropped, self._dropped = self._dropped, 0
        size = dropped + len(event)
        self.size += size
        self.events += 1
        if size < self.smallest or not self.smallest:
            self.smallest = size
        return dropped > 0


class Events(Lines):
    """Server-sent events, as the HTML standard reads them."""

    _has_cr = False

    def _is_one(self, chunk: bytes) -> bool:
        if b"\r" in chunk:
            crlf = chunk.count(b"\r\n")
            is_plain = crlf == chunk.count(b"\r") == chunk.count(b"\n")
            return is_plain and chunk.find(b"\r\n\r\n") == len(chunk) - 4 and len(chunk) > 4
        return chunk.find(b"\n\n") == len(chunk) - 2 and len(chunk) > 2

    def _end(self, pending: bytearray, start: int) -> int:
        if not self._has_cr:
            self._has_cr = pending.find(b"\r", start) >= 0
        if not self._has_cr:
            end = pending.find(b"\n\n", start)
            return end + 2 if end >= 0 else -1
        found = _BLANK_LINE.search(pending, start)
        return found.end() if found else -1

    def _take(self, event: bytes) -> None:
        # Of a long one it stands at its start.
        has_data = event.startswith(b"data:") or b"\ndata:" in event
        if not has_data and not _DATA.search(self._head if self._dropped else event):
            self._dropped = 0  # a comment, which no model said
            return
        if len(event) <= _LONGEST_DONE and not self._dropped and _DONE.fullmatch(event):
            return
        is_long = self._count(event)
        if b'"usage"' in event and _NAMES_USAGE.search(event):
            self._keep(event, is_long=is_long)

    def _said_by(self, event: bytes) -> Said | None:
        return find_usage(_loads(_data(event)), streamed=True)

    def _end_of(self, event: bytes) -> object:
        # Of a response that has ended, or of a chunk.
        data = _data(event, is_end=True)
        document = _from_tail(data, b'{"response":{')
        if document is None:
            return _from_tail(data)
        kind = _RESPONSE_ENDS.search(self._head)
        if kind is not None:
            document.setdefault("type", kind[1].decode())
        return document


def _data(event: bytes, *, is_end: bool = False) -> bytes:
    """The data of *event*: what its ``data`` fields hold; *is_end*:
    the first line has lost how it began.
    """
    lines = _LINE_END.split(event)
    found = [lines.pop(0)] if is_end else []
    for line in lines:
        begun = line.removeprefix(b"\xef\xbb\xbf")
        if begun.startswith(b"data:"):
            found.append(begun[5:])
    return b"\n".join(found)


def _loads(text: bytes) -> object:
    """The value of *text* in JSON; ``None`` if it is none.
    NaN and half a character spoil nothing beside them.
    """
    try:
        return orjson.loads(text)
    except ValueError:
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _from_tail(tail: bytes, opening: bytes = b"{") -> dict[str, Any] | None:
    """The last members of an object of which only the end is there;
    ``None`` if it does not end, or has none of ours.

    What stands from a member to the end is one object with *opening* before it, or the member is of
    another one: no text can look so, since its quotes are escaped, and no inner object ends so
    early.
    """
    found: dict[str, Any] | None = None
    # What stands before the very start is unknown.
    starts = [match.start() for match in _MEMBER.finditer(tail, 1)]
    for start in reversed(starts[-_TRIES:]):
        try:
            found = orjson.loads(opening + tail[start:])
        except ValueError:
            continue
    return found
