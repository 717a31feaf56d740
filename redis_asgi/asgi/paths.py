"""Paths as an app may read them: the spellings of each, and the patterns that cover or exempt them.

A rule and the app's router must never disagree in the client's favour. Routers forgive: slashes too
many or too few, a fragment, a final newline, whatever stands before the path. So a path is looked
at in each spelling that some router takes it for, and a rule covers it if its pattern covers any of
them, where an exemption has to cover them all.
"""

import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

from starlette.convertors import (
    CONVERTOR_TYPES,
    Convertor,
    FloatConvertor,
    IntegerConvertor,
    StringConvertor,
    UUIDConvertor,
)
from starlette.types import Scope

from ..errors import ConfigurationError
from ..settings.types import pattern_problem

# The path as it stands, then what else it may be; none at all: it may be anything.
Spellings: TypeAlias = tuple[str, ...]
# A pattern between its stars: what stands before the first,
# the parts between, what stands behind the last.
_Parts: TypeAlias = tuple[str, tuple[str, ...], str | None]

# Longer ones are spelled each time: a cache must not hold what a client makes long.
LONGEST_CACHED = 256
# What no router or URL parser reads in two ways;
# every quantifier is possessive, so that none is tried again.
_ABSOLUTE = re.compile(r"(?:https?+|wss?+)://[a-z0-9._:\[\]-]++(?P<path>/[^?#;\x00-\x20\x7f]*+|)", re.IGNORECASE)
_SLASHES = re.compile("//+")
_STARS = re.compile(r"\*\*+")
_PARAMETER = re.compile(r"\{(?P<name>[^{}:]+)(?::(?P<kind>[^{}]+))?\}")
_NOWHERE = "\ue000"  # a character that stands in no pattern


def route_path(scope: Scope, root: str = "") -> str:
    """The decoded path below ``root_path``, by Starlette's own rule.

    Args:
        root: What the app sets ``root_path`` to before its router looks;
            empty = it leaves the server's.
    """
    path: str = scope["path"]
    root = root or scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        return path[len(root) :]
    return path


def spellings(path: str, roots: tuple[str, ...] = ()) -> Spellings:
    """*path* as it stands, and whatever else a router may take it for, in time linear in its
    length.

    In this order, the earlier ones kept where a later step loses something: the path of an
    absolute-form target; less the fragment behind ``#``; less what stands up to and with each of
    *roots*; less final slashes; slashes at the start as one; all runs of slashes as one; dots and
    backslashes as a file system reads them.

    None at all, since it is read in too many ways to list, has what does not begin like a path or a
    plain absolute-form target, and what ends in a newline: a regular expression's ``$`` forgives
    that, and Starlette's mounts then cut the path in the wrong place.
    """
    if _is_plain(path):
        below = [_below(path, root) for root in roots if root in path]
        if all(map(_is_plain, below)):
            return (path, *below)
    return _cached(path, roots) if len(path) <= LONGEST_CACHED else _spell(path, roots)


def _is_plain(path: str) -> bool:
    """Whether nothing in *path* could be read in another way, but for roots."""
    return (
        path[:1] == "/"
        and path[-1] not in "/\n"
        and "//" not in path
        and "/." not in path
        and "#" not in path
        and "\\" not in path
    )


def _spell(path: str, roots: tuple[str, ...]) -> Spellings:
    target = path or "/"
    if target.endswith("\n"):
        return ()
    if not target.startswith("/"):
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is None:
            return ()
        target = absolute["path"] or "/"
    found = [target, target.partition("#")[0]]
    found += [_below(each, root) for each in (path, *found) for root in roots if root in each]
    found = list(dict.fromkeys(each.rstrip("/") for each in found))
    further = ["/" + each.lstrip("/") for each in found if each.startswith("//")]
    further += [_one_slash_each(each) for each in found if "//" in each]
    further += [_as_file(each) for each in found if "/." in each or "\\" in each]
    return tuple(dict.fromkeys((path, *found, *further)))


_cached = lru_cache(maxsize=1024)(_spell)


def _below(path: str, root: str) -> str:
    # Some frameworks cut at its first occurrence, wherever that is,
    # and not only between two segments.
    return "/" + path.partition(root)[2].removeprefix("/")


def _one_slash_each(path: str) -> str:
    return "/" + "/".join(filter(None, path.split("/")))


def _as_file(path: str) -> str:
    normal = posixpath.normpath(path.replace("\\", "/"))
    return "/" + normal.lstrip("/") if normal.strip("/") else ""


@dataclass(frozen=True, slots=True)
class PathPattern:
    """A path where ``*`` is any run of characters, ``/`` included;
    ``/api/*`` also matches ``/api``.

    Matching takes time in proportion to the path, whatever the pattern:
    no regular expression is involved.

    Args:
        case_sensitive: Whether ``/Login`` is another path than ``/login``.

    Raises:
        ConfigurationError: If it could never match.
    """

    pattern: str
    case_sensitive: bool = True
    _exact: tuple[_Parts, ...] = field(init=False, repr=False, compare=False)
    _forgiving: tuple[_Parts, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise ConfigurationError(f"paths={self.pattern!r} is no path pattern. Try '/api/*'.")
        problem = pattern_problem(self.pattern)
        if problem:
            raise ConfigurationError(f"paths={self.pattern!r} {problem}")
        pattern = self.pattern if self.case_sensitive else self.pattern.casefold()
        object.__setattr__(self, "_exact", tuple(map(_parts, _with_bare(pattern))))
        forms = [form for one in (pattern, _SLASHES.sub("/", pattern)) for form in _with_bare(one.rstrip("/"))]
        object.__setattr__(self, "_forgiving", tuple(_parts(form.rstrip("/")) for form in dict.fromkeys(forms)))

    def matches(self, path: str) -> bool:
        """Whether *path* is covered as it stands."""
        if not self.case_sensitive:
            path = path.casefold()
        return any(_covers(parts, path) for parts in self._exact)

    def covers(self, spelled: Spellings) -> bool:
        """Whether any spelling of a path (see `spellings`) is covered;
        a final slash of the pattern says nothing.
        """
        for path in spelled:
            text = path if self.case_sensitive else path.casefold()
            for parts in self._forgiving:
                if _covers(parts, text):
                    return True
        return not spelled


class TextPattern:
    """A text where ``*`` is any run of characters; matching takes time in proportion to the text."""

    def __init__(self, pattern: str) -> None:
        self._parts = _parts(pattern)

    def matches(self, text: str) -> bool:
        """Whether *text* is one of those."""
        return _covers(self._parts, text)


class PathTemplate:
    """The paths of a route with parameters, such as ``/items/{id}``.

    Args:
        text: With ``{name}`` or ``{name:convertor}`` for a parameter.
        convertors: What Starlette reads the parameters with, by name, where *text* does not say.
            What neither says may be anything.
    """

    def __init__(self, text: str, convertors: Mapping[str, Convertor[Any]] | None = None) -> None:
        self.text = text
        self._parts: list[str | _Parameter] = []  # in turn a character, or a parameter
        at = 0
        for found in _PARAMETER.finditer(text):
            self._parts += text[at : found.start()]
            kind = found["kind"]
            convertor = CONVERTOR_TYPES.get(kind) if kind else (convertors or {}).get(found["name"])
            self._parts.append(_parameter(convertor))
            at = found.end()
        self._parts += text[at:]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"

    def may_match(self, pattern: PathPattern) -> bool:
        """Whether *pattern* covers one of the paths,
        as `PathPattern.covers` does where they are plain.
        """
        parts = self._parts
        if not pattern.case_sensitive:
            parts = [part.casefold() if isinstance(part, str) else part for part in parts]
        return any(_meet(form, parts) for form in pattern._forgiving)

    def always_matches(self, pattern: PathPattern) -> bool:
        """Whether *pattern* covers each of the paths as it stands:
        of a parameter only a star covers all.
        """
        return pattern.matches("".join(part if isinstance(part, str) else _NOWHERE for part in self._parts))


def path_patterns(paths: str | Iterable[str] | None, *, case_sensitive: bool = True) -> tuple[PathPattern, ...]:
    """One pattern or several as a tuple of `PathPattern`."""
    return tuple(PathPattern(path, case_sensitive) for path in ([paths] if isinstance(paths, str) else paths or ()))


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A route's parameter: any characters that *fits* is true of, or nothing if it *may_be_empty*."""

    fits: Callable[[str], bool]
    may_be_empty: bool = False


_CHARACTERS: Mapping[type, str] = {
    IntegerConvertor: "0123456789",
    FloatConvertor: "0123456789.",
    UUIDConvertor: "0123456789abcdefABCDEF-",
}


def _parameter(convertor: Convertor[Any] | None) -> _Parameter:
    kind = type(convertor)  # a subclass may read anything
    if kind is StringConvertor:
        return _Parameter(lambda char: char != "/")
    if kind in _CHARACTERS:
        return _Parameter(_CHARACTERS[kind].__contains__)
    return _Parameter(lambda _: True, may_be_empty=True)


def _meet(pattern: _Parts, template: Sequence[str | _Parameter]) -> bool:
    """Whether *pattern* covers some path of *template*, final slashes aside;
    each two places are looked at once.
    """
    # On both sides in turn what stands there, and whether it may stand there again, or not at all.
    head, middle, tail = pattern
    ours: list[tuple[str | None, bool]] = [(char, False) for char in head]
    for part in (*middle, *([] if tail is None else [tail])):
        ours += [(None, True), *((char, False) for char in part)]
    ours.append(("/", True))
    theirs: list[tuple[str | _Parameter, bool]] = []
    for each in template:
        if isinstance(each, str) or not each.may_be_empty:
            theirs.append((each, False))
        if not isinstance(each, str):
            theirs.append((each, True))
    todo = [(0, 0)]
    seen = set(todo)
    while todo:
        i, j = todo.pop()
        if i == len(ours) and j == len(theirs):
            return True
        further = []
        if i < len(ours) and ours[i][1]:
            further.append((i + 1, j))
        if j < len(theirs) and theirs[j][1]:
            further.append((i, j + 1))
        if i < len(ours) and j < len(theirs) and _fit(ours[i][0], theirs[j][0]):
            further.append((i + (not ours[i][1]), j + (not theirs[j][1])))
        todo += [pair for pair in further if pair not in seen]
        seen.update(further)
    return False


def _fit(ours: str | None, theirs: str | _Parameter) -> bool:
    """Whether a pattern's character (``None``: any) may be a template's."""
    if ours is None:
        return True
    return ours == theirs if isinstance(theirs, str) else theirs.fits(ours)


def _with_bare(pattern: str) -> tuple[str, ...]:
    """*pattern*, and for ``/api/*`` also ``/api``."""
    return (pattern, pattern[:-2]) if pattern.endswith("/*") else (pattern,)


def _parts(pattern: str) -> _Parts:
    head, *rest = _STARS.sub("*", pattern).split("*")
    return (head, tuple(rest[:-1]), rest[-1]) if rest else (head, (), None)


def _covers(parts: _Parts, path: str) -> bool:
    head, middle, tail = parts
    if tail is None:
        return path == head
    if len(path) < len(head) + len(tail) or not (path.startswith(head) and path.endswith(tail)):
        return False
    at, end = len(head), len(path) - len(tail)
    for part in middle:
        found = path.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True
