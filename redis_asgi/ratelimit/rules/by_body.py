"""Partitions from a request's body: what they have in common, and `by_json`, a member of a JSON
body.
"""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from starlette.requests import HTTPConnection
from starlette.types import Scope

from ...asgi.bodies import Document, Member
from ...asgi.paths import TextPattern
from ...errors import ConfigurationError
from ...events import say
from ...misuse import constructor_says_what_was_meant, shown

logger = logging.getLogger("redis_asgi.ratelimit")

# Names, or patterns where * is any run of characters;
# or these with the bucket that each belongs to.
Values: TypeAlias = str | Iterable[str] | Mapping[str, str]

# Where a scope keeps what its body says, while it is decided who is counted.
_SAID = "redis_asgi.body_says"
# How JSON Path and JSON Pointer begin, and have items of lists.
_OTHER_PATH = re.compile(r"\A\$(?:[.\[]|\Z)|\A/|\[[^\]]*\]")
# Longer values are none that anybody has named.
_LONGEST = 256


@dataclass(frozen=True, slots=True)
class Said:
    """The words of a body to a rule that counts by it.

    Attributes:
        bucket: Whom it is counted as; ``None``: its rule does not apply.
        times: How many uses it is of what the rule counts.
    """

    bucket: str | None
    times: int = 1


class ByBody(ABC):
    """Counts by what a request's body says.

    Attributes:
        kind: What its identities are of.
        counts_uses: Whether a body may be several uses at once.
        reads_body: For who takes callables, but knows no body.
    """

    kind: str
    counts_uses = False
    reads_body = True

    def __init__(self, values: Values, other: str | None, what: str, example: Mapping[str, str]) -> None:
        if other is not None and (not isinstance(other, str) or not other):
            raise ConfigurationError(
                f"other={shown(other)} names no bucket. Try other='other', or None where the rule is not to apply."
            )
        self._buckets = _buckets(values, what, example)
        self._other = other
        # Per instance, so that the cache dies with it.
        self._said_of = lru_cache(maxsize=1024)(self._said_of_text)

    def __call__(self, conn: HTTPConnection) -> str | None:
        """The bucket of a request whose body was read.

        Raises:
            ConfigurationError: It was not read;
                only a rule whose ``partition_by`` it is, alone or in a list, does.
        """
        return self.said(conn.scope).bucket

    def said(self, scope: Scope) -> Said:
        """The words of a request's body.

        Raises:
            ConfigurationError: See `__call__`.
        """
        try:
            said: Said = scope[_SAID][self]
        except KeyError:
            raise ConfigurationError(
                f"{self!r} is called for a request whose body was not read for it. Give it to partition_by as it is: "
                f"partition_by={self!r}, or in a list, partition_by=[client_ip, {self!r}]."
            ) from None
        return said

    def bucket_of(self, scope: Scope) -> str | None:
        """The bucket of a request; see `said`."""
        return self.said(scope).bucket

    @abstractmethod
    def read(self, document: Document) -> Said:
        """The bucket that *document* is in."""

    def _bucket(self, value: object) -> str | None:
        """The bucket of a member's *value*; texts, whole numbers, and true and false have one."""
        return self._said(value).bucket

    def _said(self, value: object) -> Said:
        """The bucket of a member's *value*."""
        if isinstance(value, int):
            value = str(value).lower()  # true and false as JSON has them
        return self._said_of(value) if isinstance(value, str) and len(value) <= _LONGEST else Said(self._other)

    def _said_of_text(self, value: str) -> Said:
        found = (bucket for pattern, bucket in self._buckets if pattern.matches(value))
        return Said(next(found, self._other))

    def _unclear(self) -> Said:
        """Of a body that says something else to each who reads it:
        it is counted whatever it may be to the app.
        """
        return Said(self._other or "other")

    def _unread(self, document: Document) -> Said:
        """Of a body that is no JSON in UTF-8, or not to be had."""
        return self._unclear() if document.may_be_json else Said(self._other)


@constructor_says_what_was_meant("by_json('model', ['gpt-5-mini*', 'gpt-5*'])")
class by_json(ByBody):  # noqa: N801 - reads as a function where it is used
    """Partition by a member of the request's JSON body, such as the ``model`` of a chat.

    ::

        Rule("60/minute", name="chat", paths="/v1/*", partition_by=[by_header("x-api-key"), by_json("model", MODELS)])

    The rule covers requests with a body, whatever its ``Content-Type``, and without *methods* only
    those of POST, PUT and PATCH. Of all rules together a body is read once, up to
    ``RATE_LIMIT_BODY_CAP``, and the app receives the same bytes. Texts, whole numbers, ``true`` and
    ``false`` are values.

    Args:
        name: The member's; dots descend into objects: ``metadata.tenant``.
        values: Names, or patterns where ``*`` is any run of characters; the first that matches is
            the bucket. Or a mapping of these to the buckets:
            ``{"gpt-5-mini*": "small", "gpt-5*": "large"}``.
        other: The one bucket of every other value, so that invented names get no fresh counter, of
            requests without the member, and of bodies that are unreadable: over the cap, no JSON in
            UTF-8, or with the member twice at its level. ``None``: the rule does not apply to other
            values; to a body that the app may still read as one of *values* (over the cap, in
            UTF-16, with the member twice) it does, in the bucket ``other``.

    Raises:
        ConfigurationError: For a *name* that no member has, or *values* that match nothing.
    """

    def __init__(self, name: str, values: Values, *, other: str | None = "other") -> None:
        if not isinstance(name, str) or not all(map(_is_member, name.split("."))):
            raise ConfigurationError(f"by_json({shown(name)}): not the name of a member. Try by_json('model', ['a*']).")
        if _OTHER_PATH.search(name):
            raise ConfigurationError(
                f"by_json({name!r}) is a path of another notation. Name the member, with dots where it is within "
                f"others; items of lists have no names: by_json({_plain_path(name)!r}, ...)."
            )
        super().__init__(values, other, f"by_json({name!r})", {"gpt-5-mini*": "small", "gpt-5*": "large"})
        self.kind = f"json:{name}"
        self._name = name
        self._path = tuple(map(Member, name.split(".")))

    def __repr__(self) -> str:
        return f"by_json({self._name!r}, ...)"

    def read(self, document: Document) -> Said:
        if not document.is_read:
            return self._unread(document)
        if document.has_twice(self._path):
            return self._unclear()
        value = document.value
        for member in self._path:
            if not isinstance(value, dict):
                return Said(self._other)
            value = value.get(member.name)
        return self._said(value)


def _is_member(name: str) -> bool:
    return bool(name) and name.isprintable() and '"' not in name and "\\" not in name


def _plain_path(path: str) -> str:
    """The members that a JSON path or pointer names,
    as `by_json` has them; of one to an item an example.
    """
    names = [name for name in re.split(r"[$./\[\]'\"]+", path) if name]
    return ".".join(names) if names and all(map(str.isidentifier, names)) else "model"


def _buckets(values: object, what: str, instance: Mapping[str, str]) -> tuple[tuple[TextPattern, str], ...]:
    """*values* as patterns in their order, each with its bucket;
    an *instance* is shown where they are none.

    Raises:
        ConfigurationError: If they are none.
    """
    example = f"Try {list(instance)}, or {instance}."
    pairs: Sequence[tuple[object, object]]
    if isinstance(values, str):
        pairs = [(values, values)]
    elif isinstance(values, Mapping):
        pairs = list(values.items())
    elif isinstance(values, Iterable):
        listed = list(values)
        if isinstance(values, AbstractSet) and any("*" in each for each in listed if isinstance(each, str)):
            raise ConfigurationError(f"{what}: values={shown(values)} has patterns in no order. {example}")
        pairs = [(each, each) for each in listed]
    else:
        raise ConfigurationError(f"{what}: values={shown(values)} is neither names nor a mapping of them. {example}")
    if not pairs:
        raise ConfigurationError(f"{what}: values={values!r} names nothing. {example}")
    for pair in pairs:
        for each in pair:
            if not isinstance(each, str) or not each:
                meant = f"Write {str(each).lower()!r}." if isinstance(each, bool | int) else example
                raise ConfigurationError(f"{what}: values holds {shown(each)}, which is no text. {meant}")
        pattern, bucket = pair
        if "*" in str(bucket) and "*" not in str(pattern):
            raise ConfigurationError(
                f"{what}: values has {shown(pattern)} for the pattern {shown(bucket)}, whose bucket it would be. "
                f"Write {{{shown(bucket)}: {shown(pattern)}}}."
            )
    written = [(str(pattern), TextPattern(str(pattern)), str(bucket)) for pattern, bucket in pairs]
    for at, (pattern, _, bucket) in enumerate(written):
        # A * is matched by nothing but a *,
        # so that what matches the pattern itself matches all that it does.
        hiding = next(
            (text for text, before, other in written[:at] if other != bucket and before.matches(pattern)), None
        )
        if hiding is not None:
            say(logger, "values_hidden", values=what, hidden=shown(pattern), hiding=shown(hiding))
    return tuple((pattern, bucket) for _, pattern, bucket in written)


def keep_said(scope: Scope, document: Document, readers: Iterable[ByBody]) -> None:
    """Ask *document* what *readers* count by, for `ByBody.said`."""
    said = scope.setdefault(_SAID, {})
    for reader in readers:
        said[reader] = reader.read(document)
