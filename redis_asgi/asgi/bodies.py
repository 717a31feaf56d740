"""Bodies of requests that are read ahead of the app: bounded,
once for all who look at them, replayed to the byte.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import orjson
from starlette.types import Message, Receive, Scope

from .body_budget import Budget, process_budget

# Where a scope keeps a body that is parsed already.
_KEPT = "redis_asgi.parsed_body"
# Parsed, a body may take thirty times its bytes:
# a longer one is looked at and parsed again for rules that need more.
KEPT_BYTES = 16 * 1024
# Lists and objects of one body, and the quotes around its texts: as many take some 20 ms each.
_MOST_CONTAINERS = 100_000
_MOST_QUOTES = 400_000
# Objects, members and values of a body whose members have to be counted one by one, in some 100 ms
# at most.
_MOST_OBJECTS, _MOST_MEMBERS, _MOST_VALUES = 50_000, 100_000, 200_000
# A text without escapes; of one that does not end all that follows,
# so that no byte is looked at for two of them.
_TEXT = re.compile(rb'"[^"]*+"?+')
# What may stand before the JSON that another parser than ours reads: blanks,
# the marks and the NULs of UTF-16 and 32.
_BEFORE_JSON = b" \t\r\n\0\xff\xfe\xef\xbb\xbf"


class Buffer:
    """The part of a request's body that is read ahead of the app, for all who look at it.

    Args:
        cap: The most that is read, in bytes.
        budget: Where its room comes from; ``None`` = the process's.

    Attributes:
        started: Whether any message of the body has come.
        more: Whether there is more to read.
        gone: The message that said that the client has left, if it did.
        is_over: Whether the body is over the cap, or the process has no room for it.
    """

    __slots__ = (
        "_budget",
        "_cap",
        "_held",
        "_is_gone_said",
        "_is_handed_out",
        "_json",
        "_kept",
        "_read",
        "_receive",
        "gone",
        "is_over",
        "more",
        "started",
    )

    def __init__(self, receive: Receive, *, cap: int, budget: Budget | None = None) -> None:
        self._receive = receive
        self._cap = cap
        self._budget = process_budget() if budget is None else budget
        # One bytearray: kept messages of one byte each would take 200 times their size. Bytes when
        # it is whole.
        self._read: bytes | bytearray = b""
        self._held = 0
        self._json: Any = None
        self._kept: Kept | None = None
        self.started = self.is_over = self._is_handed_out = self._is_gone_said = False
        self.more = True
        self.gone: Message | None = None

    def __del__(self) -> None:
        # However a request ends, the room goes with the last who could still look.
        if self._held:
            self._give()

    def _give(self) -> None:
        held, self._held = self._held, 0
        self._budget.give(held)

    async def next(self) -> Message:
        """One message more from the server."""
        message = await self._receive()
        self._keep(message)
        return message

    def _keep(self, message: Message) -> None:
        if message["type"] != "http.request":
            self.gone = message
            return
        body: bytes = message.get("body", b"")
        self.more = more = message.get("more_body", False)
        size = len(body)
        if not (self.started or more) and type(body) is bytes:
            self._read = body  # nearly always it is one message
        else:
            if not self.started:
                self._read = bytearray()
            self._read += body
        self.started = True
        if len(self._read) <= self._cap and self._budget.take(size):
            self._held += size
        else:
            self.is_over = True

    async def whole(self) -> bytes | None:
        """The whole body; ``None`` when it cannot be had:
        over the cap, no room, or the client left.
        """
        while self.more and self.gone is None and not self.is_over:
            self._keep(await self._receive())
        return None if self.is_over or self.gone is not None else self.so_far

    @property
    def so_far(self) -> bytes:
        """The bytes that were read."""
        read = self._read
        if type(read) is bytes:
            return read
        content = bytes(read)
        if not self.more:
            self._read = content
        return content

    async def json(self) -> Any:
        """The body as `json.loads` reads it, parsed once; not to be changed.

        Raises:
            ValueError: It cannot be read so; `RecursionError` likewise.
        """
        if self._json is None:
            self._json = (json.loads(await self.whole() or b""),)
        return self._json[0]

    def keep(self, document: "Document", scope: Scope) -> None:
        """Let who reads *document* next, callables and what stands behind,
        have its parse, if that is small.
        """
        if document.is_read and len(document.content) <= KEPT_BYTES:
            self._kept = scope[_KEPT] = Kept(document)
            self._json = (document.value,)

    def decided(self) -> None:
        """All is decided: no rule asks for its parse here any more."""
        self._json = None

    def expose(self) -> None:
        """A user's callable is given the parse, and may have changed it:
        no middleware behind is to believe it.
        """
        if self._kept is not None:
            self._kept.forget()

    def replay(self) -> Receive:
        """A ``receive`` that gives what was read, as one message, and then what is still to come."""
        return self._replayed if self.started or self.gone is not None else self._receive

    async def _replayed(self) -> Message:
        if self.started and not self._is_handed_out:
            return self._hand_out()
        if self.gone is not None and not self._is_gone_said:
            self._is_gone_said = True
            return self.gone
        return await self._receive()

    def _hand_out(self) -> Message:
        """The body is the app's from here on."""
        self._is_handed_out = True
        message: Message = {"type": "http.request", "body": self.so_far, "more_body": self.more}
        self._read, self._json = b"", None
        if self._held:
            self._give()
        if self._kept is not None:
            self._kept.forget()
        return message


class Kept:
    """A small body that is parsed already, for who stands behind and reads the same one.

    It is there until the body is handed out: who wants it takes it first.
    """

    __slots__ = ("document",)

    def __init__(self, document: "Document") -> None:
        self.document: Document | None = document

    def forget(self) -> None:
        """Take it back: no middleware behind finds it."""
        self.document = None


def take_document(scope: Scope) -> "Document | None":
    """The parse of the body by a middleware outside, if there is one; it is the taker's alone then."""
    kept: Kept | None = scope.pop(_KEPT, None)
    if kept is None:
        return None
    document = kept.document
    kept.forget()
    return document


class Document:
    """A body as JSON in UTF-8, parsed once.

    Args:
        content: The whole body; ``None`` when it could not be read.
        is_encoded: Whether it is compressed, or says so.

    Attributes:
        content: The body; empty where it could not be read.
        is_read: Whether it is JSON in UTF-8 that is not made to be slow.
        value: What it says.
        may_be_json: Whether it is, or may be to another parser:
            what is no JSON in UTF-8 to us may be in UTF-16.
    """

    __slots__ = ("_members", "content", "is_read", "may_be_json", "value")

    def __init__(self, content: bytes | None, *, is_encoded: bool = False) -> None:
        self.content = content or b""
        self.value: Any = None
        self.is_read = False
        self._members: tuple[Any] | None = None
        if content is not None and not is_encoded and (len(content) <= _MOST_CONTAINERS or _is_within(content)):
            try:
                self.value = orjson.loads(content)
                self.is_read = True
            except orjson.JSONDecodeError:
                pass
        self.may_be_json = (
            self.is_read
            or content is None
            or is_encoded
            or content.lstrip(_BEFORE_JSON)[:1] in (b"{", b"[")
        )  # fmt: skip

    def has_twice(self, path: Sequence["Member"]) -> bool:
        """Whether one of the members that lead along *path* stands twice at its level: who reads
        it, reads which?
        """
        for member in path:
            if not member.stands_once(self.content):
                break
        else:
            return False
        at = self.members()
        if at is None:
            return True
        for member in path:
            if has_twice(at, member.name):
                return True
            at = at.get(member.name) if isinstance(at, dict) else None
        return False

    def members(self) -> Any:
        """The same value, for `has_twice`; ``None`` when it holds too much to tell."""
        if self._members is None:
            found = None
            content = self.content
            if (
                content.count(b"{") <= _MOST_OBJECTS
                and content.count(b":") <= _MOST_MEMBERS
                and (content.count(b",") <= _MOST_VALUES or without_texts(content).count(b",") <= _MOST_VALUES)
            ):
                # It may nest deeper, or have a longer number, than this one reads.
                with suppress(ValueError, RecursionError):
                    found = json.loads(content, object_pairs_hook=_members)
            self._members = (found,)
        return self._members[0]


def has_twice(value: object, name: str) -> bool:
    """Whether *value*, of `Document.members`, is an object in which the member *name* stands twice."""
    return isinstance(value, _Twice) and name in value.twice


class Member:
    """The name of a member, as one looks for it in JSON, where each character may be an escape.

    Args:
        name: Without quotes, backslashes and control characters.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._quoted = b'"%b"' % name.encode("utf-8", "surrogatepass")
        self._is_plain = name.replace("_", "").isalnum() and name.isascii()
        spelled = "".join(map(_spelled, name)).encode("utf-8", "surrogatepass")
        # A quote behind a backslash is a part of some text;
        # else only the name of a member has a colon behind it.
        self._pattern = re.compile(rb'"(?<!\\")%b"[ \t\r\n]*+:' % spelled)

    def stands_once(self, content: bytes) -> bool:
        """Whether some JSON has a member of this name once at most, at whatever level."""
        # To look for one byte takes a tenth of what it takes to look for four.
        if self._is_plain and content.count(self._quoted) < 2 and (b"\\" not in content or b"\\u00" not in content):
            return True
        first = self._pattern.search(content)
        return first is None or self._pattern.search(content, first.end()) is None


def _spelled(character: str) -> str:
    """A regular expression for all spellings of a *character* in JSON."""
    units = character.encode("utf-16-be", "surrogatepass")
    escapes = "".join(rf"\\u(?i:{units[i : i + 2].hex()})" for i in range(0, len(units), 2))
    if character == "/":
        escapes += r"|\\/"
    return f"(?:{re.escape(character)}|{escapes})"


class _Twice(dict[str, Any]):
    """An object in which members stand twice.

    Attributes:
        twice: Their names.
    """

    twice: frozenset[str] = frozenset()


def _members(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    twice = _Twice(found)
    twice.twice = frozenset(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
    return twice


def _is_within(content: bytes) -> bool:
    """Whether *content*, a long one, is parsed in a time that its size explains:
    not a million lists, or texts.
    """
    # Less those within texts, of which JSON that is a text has many.
    if content.count(b'"') - content.count(b'\\"') > _MOST_QUOTES:
        return False
    if content.count(b"[") + content.count(b"{") <= _MOST_CONTAINERS:
        return True
    bare = without_texts(content)
    return bare.count(b"[") + bare.count(b"{") <= _MOST_CONTAINERS


def without_texts(content: bytes) -> bytes:
    """What of some JSON stands outside of its texts, in a time and room that its size explains."""
    return _TEXT.sub(b"", content.replace(rb"\\", b"").replace(rb"\"", b""))
