"""Paths: below a root, in every spelling, and the patterns that cover them."""

import re
from typing import SupportsIndex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette._utils import get_route_path
from starlette.types import Scope

from redis_asgi import ConfigurationError
from redis_asgi.asgi.paths import LONGEST_CACHED, PathPattern, path_patterns, route_path, spellings


def http(path: str, root_path: str = "") -> Scope:
    """A request's scope."""
    return {"type": "http", "path": path, "root_path": root_path}


@pytest.mark.parametrize(
    ("path", "root_path", "expected"),
    [
        pytest.param("/api/x", "", "/api/x", id="no root"),
        pytest.param("/root/api/x", "/root", "/api/x", id="below the root"),
        pytest.param("/root", "/root", "", id="the root itself"),
        pytest.param("/root/", "/root", "/", id="the root with a slash"),
        pytest.param("/rooted/x", "/root", "/rooted/x", id="only the same letters"),
        pytest.param("/api/x", "/root", "/api/x", id="server that strips the root"),
        pytest.param("/api/x/", "", "/api/x/", id="trailing slash"),
        pytest.param("/ü/%2F", "", "/ü/%2F", id="already decoded"),
    ],
)
def test_route_path(path: str, root_path: str, expected: str) -> None:
    """The path below ``root_path``, as it stands."""
    assert expected == route_path(http(path, root_path))


def test_the_apps_own_root_wins() -> None:
    """What an app sets its root to counts for its router, whatever the server says."""
    assert "/x" == route_path(http("/own/x", "/server"), "/own")
    assert "/server/x" == route_path(http("/server/x", "/server"), "/own")


@given(path=st.from_regex(r"/[a/]{0,6}", fullmatch=True), root=st.from_regex(r"(/a{1,3}|/){0,2}", fullmatch=True))
def test_route_path_follows_starlette(path: str, root: str) -> None:
    """The rule is the framework's own."""
    scope = http(path, root)

    assert get_route_path(scope) == route_path(scope)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        pytest.param("/login", ["/login"], id="plain"),
        pytest.param("/", ["/", ""], id="top"),
        pytest.param("", ["", ""], id="empty"),
        pytest.param("/login/", ["/login/", "/login"], id="final slash"),
        pytest.param("/login//", ["/login//", "/login"], id="final slashes"),
        pytest.param("//login", ["//login", "/login"], id="slashes at the start"),
        pytest.param("//a//b", ["//a//b", "/a//b", "/a/b"], id="runs of slashes, at the start alone too"),
        pytest.param("/login#x", ["/login#x", "/login"], id="fragment"),
        pytest.param("/login?x#y#z", ["/login?x#y#z", "/login?x"], id="fragment behind an encoded question mark"),
        pytest.param("/x/../login", ["/x/../login", "/login"], id="dots"),
        pytest.param("/../../login", ["/../../login", "/login"], id="dots beyond the top"),
        pytest.param("/.", ["/.", ""], id="the top as a file"),
        pytest.param("/x\\.\\login", ["/x\\.\\login", "/x/login"], id="backslashes"),
        pytest.param("/.well-known", ["/.well-known"], id="a name with a dot"),
        pytest.param("/api/login", ["/api/login", "/login"], id="root"),
        pytest.param("/v1/api/login", ["/v1/api/login", "/login"], id="root in the middle"),
        pytest.param("/apilogin", ["/apilogin", "/login"], id="root without a slash behind it"),
        pytest.param("/api", ["/api", ""], id="root alone"),
        pytest.param("http://x/login", ["http://x/login", "/login"], id="absolute form"),
        pytest.param("HTTPS://[::1]:8/", ["HTTPS://[::1]:8/", ""], id="absolute form of the top"),
        pytest.param("http://x", ["http://x", ""], id="absolute form without a path"),
    ],
)
def test_spellings(path: str, expected: list[str]) -> None:
    """As it stands first, then whatever else a router takes it for (the root is ``/api``)."""
    assert list(dict.fromkeys(expected)) == list(spellings(path, ("/api",)))


@pytest.mark.parametrize(
    "path",
    ["login", "*", "x:80", "http:/login", "http:login", "http://u@x/login", "http://x/login;a", "http://x/lo\ngin",
     "http://x?/login", " /login", "\n/login", "\\login", "ftp://x/login", "?/login",
     "#", ".", "\n", "/\n", "/login\n", "/login\n\n", "http://x/login\n"],
)  # fmt: skip
def test_what_is_no_path_may_be_any(path: str) -> None:
    """It is read in too many ways, so that every rule covers it and no exemption does."""
    assert () == spellings(path)
    assert PathPattern("/somewhere/else").covers(spellings(path))


def test_each_root_is_cut_by_itself() -> None:
    """Many roots, each of them in the path, do not multiply."""
    roots = tuple(f"/r{number}" for number in range(20))
    found = spellings("".join(roots) + "/login", roots)

    assert "/login" in found
    assert len(found) <= 21


HOSTILE = ["/", "//", "/.", "/..", "\n", "#", "?", "/api", "api/", "a", "\\", "/a//", "%"]


@pytest.mark.parametrize("piece", HOSTILE)
@pytest.mark.parametrize("before", ["/", "http://x/", "/api//", "x"])
def test_spellings_grow_with_the_path_only(piece: str, before: str) -> None:
    """However a path is put together, there are a few spellings, and none is longer than it."""
    for length in (1_000, 64_000):
        path = (before + piece * length)[:length] + "/x//.\\#?"
        found = spellings(path, ("/api", "/own"))

        assert len(found) <= 32
        assert all(len(each) <= len(path) + 1 for each in found)


def test_long_paths_are_not_kept() -> None:
    """A cache must not hold what a client makes long."""
    from redis_asgi.asgi.paths import _cached

    before = _cached.cache_info().currsize
    for number in range(10):
        spellings(f"/{number}" + "a" * LONGEST_CACHED)

    assert before == _cached.cache_info().currsize


PATTERNS = [
    ("/api", "/api", True),
    ("/api", "/api/x", False),
    ("/api", "/apis", False),
    ("/api", "/API", False),
    ("/api/*", "/api/x", True),
    ("/api/*", "/api/x/y", True),
    ("/api/*", "/api", True),
    ("/api/*", "/api/", True),
    ("/api/*", "/apis", False),
    ("/api*", "/apis/x", True),
    ("/*/items", "/a/items", True),
    ("/*/items", "/a/b/items", True),
    ("/*/items", "/items", False),
    ("/*/items", "/a/items/x", False),
    ("*", "", True),
    ("*", "/anything", True),
    ("/*", "", True),
    ("/*", "/anything", True),
    ("/", "/", True),
    ("/", "/x", False),
    ("*.json", "/x/y.json", True),
    ("*.json", "/x/y.jsonl", False),
    ("/a*b*c", "/abc", True),
    ("/a*b*c", "/acb", False),
    ("/a*a", "/a", False),
    ("/ab*ba", "/aba", False),
    ("/a**b", "/axb", True),
    ("/v?/x", "/v1/x", False),
    ("/v[12]/x", "/v1/x", False),
    ("/a.c", "/abc", False),
    ("/a.c", "/a.c", True),
    ("/a*c", "/a\nc", True),
]


@pytest.mark.parametrize(("pattern", "path", "expected"), PATTERNS)
def test_path_pattern(pattern: str, path: str, expected: bool) -> None:
    """``*`` is any run of characters,
    ``/*`` at the end also nothing at all, and nothing else is special.
    """
    assert expected is PathPattern(pattern).matches(path)
    assert expected is PathPattern(pattern).covers(spellings(path))


@pytest.mark.parametrize(
    ("pattern", "path", "covered"),
    [
        pytest.param("/api/", "/api", True, id="final slash of the pattern"),
        pytest.param("/api", "/api/", True, id="final slash of the path"),
        pytest.param("/api/*/", "/api", True, id="star and slash"),
        pytest.param("/", "", True, id="top"),
        pytest.param("//api//x", "/api/x", True, id="slashes of the pattern"),
        pytest.param("/files/*/download", "/files//download", True, id="star for nothing"),
        pytest.param("/files/*/download", "//files//download#", True, id="star for nothing, and more"),
        pytest.param("/files/x/download", "/files//x//download", True, id="slashes of the path"),
        pytest.param("/login", "/login\n", True, id="newline"),
        pytest.param("/login", "/logins", False, id="another path"),
    ],
)
def test_what_is_forgiven(pattern: str, path: str, covered: bool) -> None:
    """A rule covers what some router takes for its path; as it stands the path is another one."""
    assert covered is PathPattern(pattern).covers(spellings(path))
    assert not PathPattern(pattern).matches(path) or pattern.startswith("/files/*")


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("/login", "/LOGIN", True),
        ("/LOGIN", "/login", True),
        ("/Straße/*", "/STRASSE/x", True),
        ("/K", "/\u212a", True),
        ("/login", "/LOGIN#x", True),
        ("/login", "/LOGON", False),
    ],
)
def test_case_counts_unless_told(pattern: str, path: str, expected: bool) -> None:
    """``case_sensitive=False`` folds both sides, for frameworks whose routers do."""
    assert expected is PathPattern(pattern, case_sensitive=False).covers(spellings(path))
    assert not PathPattern(pattern).covers(spellings(path))


def _oracle(pattern: str, path: str) -> bool:
    def covers(text: str) -> bool:
        return re.fullmatch(".*".join(map(re.escape, text.split("*"))), path, re.DOTALL) is not None

    return covers(pattern) or (pattern.endswith("/*") and covers(pattern[:-2]))


@given(
    pattern=st.from_regex(r"[/*][ab/*]{0,8}", fullmatch=True),
    path=st.from_regex(r"(/[ab/]{0,8})?", fullmatch=True),
)
def test_path_pattern_agrees_with_a_regular_expression(pattern: str, path: str) -> None:
    """Whatever the pattern, the answer is that of the obvious regular expression, and a rule covers
    no less.
    """
    expected = _oracle(pattern, path)

    assert expected is PathPattern(pattern).matches(path)
    assert not expected or PathPattern(pattern).covers(spellings(path))


class CountingPath(str):
    """A path that counts where it is searched from."""

    __slots__ = ("searched",)

    searched: list[tuple[int, int]]

    def find(self, sub: str, start: SupportsIndex | None = None, end: SupportsIndex | None = None, /) -> int:
        found = super().find(sub, start, end)
        self.searched.append((int(start or 0), found if found >= 0 else len(self)))
        return found


def test_hostile_pattern_walks_the_path_once() -> None:
    """Where a regular expression would try every split,
    each part is looked for once, and never back.
    """
    path = CountingPath("/" + "a" * 5000)
    path.searched = []
    pattern = PathPattern("/" + "*a" * 200 + "*b*c")

    assert not pattern.matches(path)
    starts = [start for start, _ in path.searched]
    assert len(starts) <= 202
    assert sorted(starts) == starts
    assert all(found <= start + 1 for start, found in path.searched[:-1])


@pytest.mark.parametrize("pattern", ["", "api", " /api", "http://x/api", 5, None])
def test_pattern_that_could_match_nothing_is_refused(pattern: str) -> None:
    """A pattern starts like a path or with a star."""
    with pytest.raises(ConfigurationError, match=r"Try '/api/\*'"):
        PathPattern(pattern)


@pytest.mark.parametrize(
    ("pattern", "instead"),
    [
        ("/items/{id}", "/items/*"),
        ("/items/{id:int}/buy", "/items/*/buy"),
        ("/{a}/{b}", "/*/*"),
        ("/{path:path}", "/*"),
        ("/items/{id", "/items/id"),
    ],
)
def test_route_parameters_are_refused(pattern: str, instead: str) -> None:
    """A route's parameter would match nothing, silently: the error says what to write."""
    with pytest.raises(ConfigurationError) as caught:
        PathPattern(pattern)

    assert repr(pattern) in str(caught.value)
    assert str(caught.value).endswith(f"write {instead}")


def test_patterns_come_alone_or_in_numbers() -> None:
    """One pattern, several, or none."""
    assert path_patterns("/a") == (PathPattern("/a"),)
    assert path_patterns(["/a", "/b"]) == (PathPattern("/a"), PathPattern("/b"))
    assert path_patterns(None) == ()
    assert path_patterns("/a", case_sensitive=False) == (PathPattern("/a", case_sensitive=False),)
