"""Reading what a model's answer used while it passes: nothing is held back, and little is kept.

An answer of up to 1 MiB that is one JSON document is parsed at its end; of a longer one the last 64
KiB are. Of a stream each event (or line) that names a usage is parsed when it is complete: whole up
to 1 MiB, beyond that from its last 64 KiB. So an answer holds at most 1 MiB beside the chunk that
passes, and costs what its length does.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from ...asgi.fields import media_type, members
from .decoder import Decoder
from .usage_bodies import TAIL, Body, Document, Events, Lines
from .usage_formats import Said, Usage

__all__ = ["Usage", "UsageReader"]

# What may say a usage. Not plain text, nor what has no media type and may be that: a model may have
# written all of it, as its user told it to.
_KINDS: dict[bytes, type[Body]] = {
    b"application/json": Document,
    b"application/jsonl": Lines,
    b"application/ndjson": Lines,
    b"application/x-jsonlines": Lines,
    b"application/x-ndjson": Lines,
    b"text/event-stream": Events,
    b"text/json": Document,
}
_FIELD = re.compile(rb"(?:\xef\xbb\xbf)?(?:data|event|id|retry)?:")
_SNIFFED = 9  # bytes, which a byte order mark and the longest name of a field have
_BLANKS_SNIFFED = 64
_OF_JSON = (b"{", b"[")


class UsageReader:
    """Reads the usage of one answer, given its chunks as they pass.

    Whatever is in them, it raises nothing.

    Args:
        status: The answer's status.
        headers: Its header fields. ``Content-Type`` says what it is, or its first bytes do where
            those are of another of the kinds that are read; without one nothing is read.
            ``Content-Encoding`` may be gzip or deflate.

    Attributes:
        status: As given.
        complete: Whether the last body message has passed; known at the end.
        usage: What it used; ``None`` before the end, and when it did not say.
        is_undeclared: Whether it has no ``Content-Type``.
        unread_encoding: The ``Content-Encoding`` behind which nothing can be read, for the caller
            to say it once; ``None`` without one. Such an answer keeps its estimate: compression
            belongs outside.
    """

    __slots__ = (
        "_body",
        "_declared",
        "_decoder",
        "_is_closed",
        "_said",
        "_start",
        "complete",
        "is_undeclared",
        "status",
        "unread_encoding",
        "usage",
    )

    def __init__(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.status = status
        self.complete = self._is_closed = self.is_undeclared = False
        self.usage: Usage | None = None
        self.unread_encoding: str | None = None
        self._said: Said | None = None
        self._body: Body | None = None
        self._decoder: Decoder | None = None
        self._start = b""  # what has passed before it is known what it is
        fields = dict(headers)
        content_type = fields.get(b"content-type", b"")
        codings: list[bytes] = []
        # Nearly always each stands there once, in lower case, and there is no encoding.
        names = b",".join((b"", *fields)).lower()
        types = names.count(b",content-type")
        if len(fields) < len(headers) or types > bool(content_type) or b",content-encoding" in names:
            content_type = next(filter(None, _values(headers, b"content-type")), b"")
            codings = _codings(_values(headers, b"content-encoding"))
        self._declared = _declared_by(content_type)
        if self._declared is None:
            self.is_undeclared = not content_type
            self._body = Body()
        elif codings:
            if codings in ([b"gzip"], [b"x-gzip"], [b"deflate"]):
                self._decoder = Decoder(is_gzip=codings != [b"deflate"])
            else:
                self.unread_encoding = b", ".join(codings).decode("latin-1")[:40]
                self._body = Body()

    @property
    def events(self) -> int:
        """The events or lines of a stream that have passed,
        without comments and ``[DONE]``; 0 of what is no stream.
        """
        return self._body.events if self._body else 0

    @property
    def bytes_sent(self) -> int:
        """The bytes that have passed, decompressed; of an event stream those of `events`."""
        return self._body.size if self._body else len(self._start)

    @property
    def smallest_event(self) -> int:
        """The bytes of the smallest of `events`; 0 without one."""
        return self._body.smallest if self._body else 0

    @property
    def output_is_known(self) -> bool:
        """Whether `usage` says the output of all that has passed:
        in a cut stream more may have come behind it.
        """
        if self._said is None or self._body is None or self.usage is None or self.usage.output is None:
            return False
        return self.complete or self._said.is_final or self._body.is_current

    def output_of_cut(self) -> float:
        """The tokens of an answer that was cut, estimated:
        ``max(events, (bytes - events * smallest event) / 4)``.

        What an event has beside its text is as long as the smallest event;
        a token is an event, or 4 bytes of text.
        """
        return max(self.events, (self.bytes_sent - self.events * self.smallest_event) / 4)

    def feed(self, body: bytes) -> None:
        """Look at a chunk that has passed."""
        if type(body) is not bytes:
            body = bytes(body)  # Starlette passes a memoryview on as it is
        reading = self._body
        if self._decoder is None:
            if len(body) > TAIL:
                self._read(body)
            elif reading is not None:
                reading.feed(body)
            elif self._declared is Document and not self._start and body.startswith(_OF_JSON):
                # Nearly every answer that is no stream: as `_begin` would have it.
                self._body = reading = Document()
                reading.feed(body)
            else:
                self._read(body)
        else:
            for decoded in self._decoder.decode(body):
                self._read(decoded)

    def close(self, complete: bool) -> None:
        """The answer has ended: *complete* if its last body message has passed. Once;
        a second time nothing happens.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self.complete = complete
        body = self._body or self._begin()
        self._body = body = body.close(complete=complete)
        first, last = body.first, body.last
        if first is not None and last is not None:
            self._said = last if first is last else first.then(last)
            self.usage = self._said.usage()

    def _read(self, chunk: bytes) -> None:
        body = self._body
        if body is None:
            self._start += chunk
            if len(self._start.lstrip()) >= _SNIFFED or len(self._start) >= _BLANKS_SNIFFED:
                self._begin()
        else:
            _feed_slices(body, chunk)

    def _begin(self) -> Body:
        """Decide what it is by what is declared and how it starts, and read that."""
        start, self._start = self._start, b""
        begun = start.lstrip()
        declared = self._declared or Document
        if _FIELD.match(begun):
            declared = Events
        elif begun.startswith(_OF_JSON) and declared is not Lines:
            declared = Document
        self._body = body = declared()
        _feed_slices(body, start)
        return body


@lru_cache(maxsize=64)
def _declared_by(content_type: bytes) -> type[Body] | None:
    """The kind of body that a ``Content-Type`` declares; ``None``: one that may not say a usage."""
    declared = media_type(content_type)
    return Document if declared.endswith(b"+json") else _KINDS.get(declared)


def _values(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> list[bytes]:
    return [value for name, value in headers if name.lower() == wanted]


def _codings(encodings: Iterable[bytes]) -> list[bytes]:
    """The codings that fields ``Content-Encoding`` name, but for ``identity``."""
    named = [coding for value in encodings for coding in members(value)]
    return [coding for coding in named if coding not in (b"", b"identity")]


def _feed_slices(body: Body, chunk: bytes) -> None:
    for start in range(0, len(chunk), TAIL):
        body.feed(chunk[start : start + TAIL])
