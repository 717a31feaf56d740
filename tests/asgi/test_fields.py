"""The grammar of header fields, as tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redis_asgi.asgi.fields import argument, media_type, members, members_from_the_right, parameters


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"gzip", [b"gzip"]),
        (b" GZip ,\tbr", [b"gzip", b"br"]),
        (b"a,,b", [b"a", b"", b"b"]),
        (b"", [b""]),
        (b'private="a,b"', [b'private="a', b'b"']),
    ],
)
def test_members_are_told_apart_at_every_comma(value: bytes, expected: list[bytes]) -> None:
    """Lists are read as the fields of caching and negotiation have it, quotes or not."""
    assert expected == members(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a, b", [" b", "a"]),
        ('a="1,2", b', [" b", 'a="1,2"']),
        ('a="\\",", b', [" b", 'a="\\","']),
        ('a="\\\\", b', [" b", 'a="\\\\"']),
        ("", [""]),
        ('a, b"', ['a, b"']),
    ],
)
def test_members_from_the_right_leave_quotes_alone(text: str, expected: list[str]) -> None:
    """A comma in quotes ends no member, and an open quote hides what stands before it."""
    assert expected == list(members_from_the_right(text))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"text/plain", b"text/plain"),
        (b" Application/JSON ; charset=utf-8", b"application/json"),
        (b";q=1", b""),
        (b"", b""),
    ],
)
def test_a_media_type_has_no_parameters(value: bytes, expected: bytes) -> None:
    """What follows the first semicolon is left out, and so is case."""
    assert expected == media_type(value)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("no-store", ("no-store", "")),
        (" Max-Age=5", ("max-age", "5")),
        ('max-age="5"', ("max-age", "5")),
        ("max-age= 5 ", ("max-age", "5")),
        ("a=b=c", ("a", "b=c")),
        ("=5", ("", "5")),
        ("", ("", "")),
    ],
)
def test_a_directive_has_a_name_and_an_argument(part: str, expected: tuple[str, str]) -> None:
    """The name loses its case, the argument its quotes."""
    assert expected == argument(part)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("for=192.0.2.1", [("for", "192.0.2.1")]),
        ('For="[2001:db8::1]:80" ; proto=https;', [("for", "[2001:db8::1]:80"), ("proto", "https")]),
        ('for="a\\"b"', [("for", 'a"b')]),
        ("for=", [("for", "")]),
        (";;for=a;", [("for", "a")]),
        ("", []),
        ("for", None),
        ("for=a b", None),
        ('for="a', None),
        ("f or=a", None),
    ],
)
def test_parameters_are_read_whole_or_not_at_all(text: str, expected: list[tuple[str, str]] | None) -> None:
    """What cannot be read says nothing, whatever stands before it."""
    assert expected == parameters(text)


@given(st.lists(st.tuples(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.text(st.characters(codec="latin-1")))))
def test_parameters_written_in_quotes_are_read_back(pairs: list[tuple[str, str]]) -> None:
    """Whatever a value holds, it is the one that was quoted."""
    quoted = ((name, value.replace("\\", "\\\\").replace('"', '\\"')) for name, value in pairs)

    assert pairs == parameters("; ".join(f'{name}="{value}"' for name, value in quoted))
