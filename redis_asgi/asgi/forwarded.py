"""Forwarding headers, read from the right: each entry only when it is asked for, each character at most once."""

import re
from collections.abc import Callable, Iterator

_BLANKS = " \t"
# One parameter of a Forwarded element with what ends it. The quantifiers of characters are possessive, so that none is
# tried again; those of groups are not, which Python 3.11.2 gets wrong (gh-101955), and have only one way to match.
_PARAMETER = re.compile(
    r"""[ \t]*+(?:(?P<name>[!#$%&'*+.^_`|~0-9A-Za-z-]++)[ \t]*+=[ \t]*+"""
    r"""(?:"(?P<quoted>[^"\\]*+(?:\\.[^"\\]*+)*)"|(?P<plain>[^\s";,]*+)))?[ \t]*+(?:;|\Z)""",
    re.DOTALL,
)
_QUOTED_PAIR = re.compile(r"\\(.)", re.DOTALL)


def only_entry(lines: list[bytes]) -> Iterator[str]:
    """The one address of a header that carries no list; several lines are somebody's attempt to add one."""
    if len(lines) == 1:
        yield lines[0].decode("latin-1")


def _x_forwarded_for(lines: list[bytes]) -> Iterator[str]:
    for line in reversed(lines):
        end = len(line)
        while end >= 0:
            start = line.rfind(b",", 0, end) + 1
            entry = line[start:end].decode("latin-1")
            if entry.strip(_BLANKS):
                yield entry
            end = start - 1


def _forwarded(lines: list[bytes]) -> Iterator[str]:
    """The ``for`` of every element (RFC 7239); an element without exactly one gives an entry that is no address."""
    for line in reversed(lines):
        for element in _elements(line.decode("latin-1")):
            if element.strip(_BLANKS):
                yield _node(element)


def _elements(text: str) -> Iterator[str]:
    """The parts between commas outside quotes, from the right: nothing written further left changes them."""
    end = at = len(text)
    comma = quote = at
    while True:
        # Each is looked for again only once it has been passed, so that no character is seen twice.
        comma = comma if comma < at else text.rfind(",", 0, at)
        quote = quote if quote < at else text.rfind('"', 0, at)
        if comma < 0 and quote < 0:
            yield text[:end]
            return
        if comma > quote:
            yield text[comma + 1 : end]
            end = at = comma
        else:
            at = _opening(text, quote)
            if at < 0:
                yield text[:end]  # an open quote; what is left of it could be anything
                return


def _opening(text: str, closing: int) -> int:
    """The index at which the quoted string that ends at *closing* begins; -1 for nowhere."""
    at = text.rfind('"', 0, closing)
    while at > 0 and text[at - 1] == "\\":
        first = at - 1
        while first > 0 and text[first - 1] == "\\":
            first -= 1
        if (at - first) % 2 == 0:
            return at
        at = text.rfind('"', 0, first)
    return at


def _node(element: str) -> str:
    """The value of an element's one ``for``, unquoted; empty for none, for several and for what cannot be read."""
    node, at = "", 0
    while at < len(element):
        parameter = _PARAMETER.match(element, at)
        if parameter is None:
            return ""
        at = parameter.end()
        if (parameter["name"] or "").lower() == "for":
            if node:
                return ""
            quoted = parameter["quoted"]
            node = (parameter["plain"] if quoted is None else _QUOTED_PAIR.sub(r"\1", quoted)) or "unknown"
    return node


LISTS: dict[bytes, Callable[[list[bytes]], Iterator[str]]] = {
    b"x-forwarded-for": _x_forwarded_for,
    b"forwarded": _forwarded,
}
