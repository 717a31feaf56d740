"""Forwarding headers, read from the right:
each entry only when it is asked for, each character at most once.
"""

from collections.abc import Callable, Iterator

from .fields import members_from_the_right, parameters

_BLANKS = " \t"


def only_entry(lines: list[bytes]) -> Iterator[str]:
    """The one address of a header that carries no list;
    several lines are somebody's attempt to add one.
    """
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
    """The ``for`` of every element (RFC 7239);
    an element without exactly one gives an entry that is no address.
    """
    for line in reversed(lines):
        for element in members_from_the_right(line.decode("latin-1")):
            if element.strip(_BLANKS):
                yield _node(element)


def _node(element: str) -> str:
    """The value of an element's one ``for``, unquoted; empty for none,
    for several and for what cannot be read.
    """
    values = [value for name, value in parameters(element) or () if name == "for"]
    return (values[0] or "unknown") if len(values) == 1 else ""


LISTS: dict[bytes, Callable[[list[bytes]], Iterator[str]]] = {
    b"x-forwarded-for": _x_forwarded_for,
    b"forwarded": _forwarded,
}
