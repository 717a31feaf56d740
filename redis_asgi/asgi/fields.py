"""The grammar of HTTP header fields: lists, media types, parameters and quoted strings. Pure.

Time is in proportion to the length of what is read, whatever that is.
"""

import re
from collections.abc import Iterator

# One parameter with what ends it. The quantifiers of characters are possessive, so that none is
# tried again; those of groups are not, which Python 3.11.2 gets wrong (gh-101955), and have only
# one way to match.
_PARAMETER = re.compile(
    r"""[ \t]*+(?:(?P<name>[!#$%&'*+.^_`|~0-9A-Za-z-]++)[ \t]*+=[ \t]*+"""
    r"""(?:"(?P<quoted>[^"\\]*+(?:\\.[^"\\]*+)*)"|(?P<plain>[^\s";,]*+)))?[ \t]*+(?:;|\Z)""",
    re.DOTALL,
)
_QUOTED_PAIR = re.compile(r"\\(.)", re.DOTALL)


def members(value: bytes) -> list[bytes]:
    """The parts between commas, quoted or not,
    in lower case and without blanks around them; empty ones too.
    """
    return [part.strip() for part in value.lower().split(b",")]


def media_type(value: bytes) -> bytes:
    """A media type or content type in lower case, less its parameters."""
    return value.partition(b";")[0].strip().lower()


def argument(part: str) -> tuple[str, str]:
    """A directive, or a parameter, in lower case, and its argument, unquoted; ``""`` for none."""
    name, _, given = part.strip().partition("=")
    return name.lower(), given.strip().strip('"')


def parameters(text: str) -> list[tuple[str, str]] | None:
    """The names, in lower case, and values, unquoted,
    of ``name=value; name="value"``; ``None`` when it is not that.
    """
    found, at = [], 0
    while at < len(text):
        parameter = _PARAMETER.match(text, at)
        if parameter is None:
            return None
        at = parameter.end()
        name, quoted = parameter["name"], parameter["quoted"]
        if name:
            value = parameter["plain"] if quoted is None else _QUOTED_PAIR.sub(r"\1", quoted)
            found.append((name.lower(), value))
    return found


def members_from_the_right(text: str) -> Iterator[str]:
    """The parts between commas outside quotes, from the right:
    nothing written further left changes them.
    """
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
