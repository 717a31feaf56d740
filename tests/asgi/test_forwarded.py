"""Forwarding headers take time in proportion to their length,
and only as far as they are asked for.
"""

import importlib
from collections.abc import Iterator
from typing import Any, SupportsIndex

import pytest

from redis_asgi.asgi import bodies, fields, forwarded, paths


class CountingText(str):
    """Text that counts the characters that its searches may look at."""

    __slots__ = ("looked_at",)

    looked_at: int

    def rfind(self, sub: str, start: SupportsIndex | None = None, end: SupportsIndex | None = None, /) -> int:
        found = super().rfind(sub, start, end)
        self.looked_at += (len(self) if end is None else int(end)) - max(found, 0)
        return found


@pytest.mark.parametrize(
    "piece", ['"', '""', '\\"', '"\\', ",", '",', "\\", '"a",', "a", ";", '"\\\\"', '",",', ',"', '"a\\"', ', "b" ']
)
def test_elements_are_told_apart_in_one_walk(piece: str) -> None:
    """Whatever a client writes, no character is searched more than a few times."""
    text = CountingText(piece * 5_000)
    text.looked_at = 0
    list(fields.members_from_the_right(text))

    assert text.looked_at <= 4 * len(text)


def _repeats(parsed: Any) -> Iterator[tuple[str, bool]]:
    """All repetitions in a parsed regular expression: their names,
    and whether they are of one character.
    """
    for operation, arguments in parsed:
        if "REPEAT" in str(operation):
            repeated = arguments[2]
            yield str(operation), len(repeated) == 1 and str(repeated[0][0]) in ("IN", "LITERAL", "NOT_LITERAL", "ANY")
        for each in arguments if isinstance(arguments, tuple | list) else [arguments]:
            for inner in each if isinstance(each, list) else [each]:
                if type(inner).__name__ == "SubPattern":
                    yield from _repeats(inner)


@pytest.mark.parametrize("pattern", [fields._PARAMETER, paths._ABSOLUTE, bodies._TEXT])
def test_no_repetition_is_tried_again(pattern: Any) -> None:
    """Repetitions of a character are possessive,
    so that a match that fails has read each character once.

    Those of groups are not: Python 3.11.2 takes such a one for matched that is not (gh-101955).
    """
    parser = importlib.import_module("re._parser")
    found = list(_repeats(parser.parse(pattern.pattern, pattern.flags)))

    assert len(found) >= 2
    assert {("POSSESSIVE_REPEAT", True), ("MAX_REPEAT", False)} >= set(found)
    assert [("MAX_REPEAT", False), ("MAX_REPEAT", True)] == list(_repeats(parser.parse("(?:a|b*)+")))


@pytest.mark.parametrize("size", [1_000, 100_000])
def test_an_open_quote_is_read_in_one_go(size: int) -> None:
    """However many escapes a client puts into a string that it does not close, each is given up
    once.
    """
    assert [""] == list(forwarded.LISTS[b"forwarded"]([b'for="' + b"\\a" * size]))


def test_only_what_is_asked_for_is_read() -> None:
    """Each entry is looked for when it is wanted, from the right, the last line first."""
    first, last = CountingText('",' * 30_000), CountingText('junk",' * 10_000 + " for=198.51.100.7")
    for text in (first, last):
        text.looked_at = 0
    elements = fields.members_from_the_right(last)

    assert " for=198.51.100.7" == next(elements)
    assert 64 >= last.looked_at
    for read in (*forwarded.LISTS.values(), forwarded.only_entry):
        lines = [b"6.6.6.6", b"for=6.6.6.6, for=198.51.100.7"]
        assert next(read(lines[1:])).strip().endswith("198.51.100.7")


@pytest.mark.parametrize(
    "header",
    [
        "for=" + " " * 60_000 + "x y, for=192.0.2.1",
        '"' * 60_000,
        '\\"' * 30_000,
        "for=1.1.1.1;" * 5_000,
        "a=b;" * 15_000 + "for=192.0.2.1",
        ",".join(["for=10.0.0.1"] * 5_000),
        'for="' + "\\x" * 30_000 + '"',
        "," * 60_000,
    ],
    ids=lambda header: header[:16],
)
def test_hostile_headers_are_read_to_the_end(header: str) -> None:
    """All of 60 KB can be walked: what would be quadratic would not come back here."""
    for read in forwarded.LISTS.values():
        assert len(list(read([header.encode()]))) <= 5_000
