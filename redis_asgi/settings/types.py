"""The types of the fields of `Settings`, each with the check that says why a value is none."""

import re
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, SecretStr
from pydantic_settings import NoDecode

from .locations import check_addresses, check_host, check_readable, check_url, redact
from .networks import read_network
from .notation import read_limits

StrategyName = Literal["fixed-window", "sliding-window-counter", "moving-window", "gcra"]
OnRedisError = Literal["local", "open", "closed"]
HeaderStyle = Literal["ietf", "legacy", "both", "none"]
OnMissingIdentity = Literal["ip", "skip", "shared", "refuse"]
CacheUsage = Literal["original", "billed"]
CacheDType = Literal["float32", "float16"]

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def _split(value: object) -> object:
    """``"a, b"``, as it stands in a variable, as ``("a", "b")``."""
    if isinstance(value, str):
        return tuple(part for part in (raw.strip() for raw in value.split(",")) if part)
    return value


def _key_prefix(value: str) -> str:
    if re.search(r"[{}\s\x00-\x1f\x7f]", value) or not value.isprintable():
        raise ValueError("braces, blanks and control characters are refused")
    return value


def _limits(value: str) -> str:
    read_limits(value)
    return value


def _partition(value: str) -> str:
    kind, _, name = value.partition(":")
    if value in ("ip", "user") or (kind == "header" and _TOKEN.fullmatch(name)):
        return value
    raise ValueError("not ip, user or header:NAME")


def _networks(value: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(read_network, value))


def _header_name(value: str) -> str:
    if not _TOKEN.fullmatch(value):
        raise ValueError("not a header name")
    return value.lower()


def _paths(value: tuple[str, ...]) -> tuple[str, ...]:
    for path in value:
        problem = pattern_problem(path)
        if problem:
            raise ValueError(f"{path!r} {problem}")
    return value


def pattern_problem(pattern: str) -> str | None:
    """The fault of a path pattern and what to write instead; ``None`` if it can match."""
    if not pattern.startswith(("/", "*")):
        return "does not start with '/' or '*'. Try '/api/*'."
    if "{" in pattern or "}" in pattern:
        plain = re.sub(r"[{}]", "", re.sub(r"\{[^{}]*\}", "*", pattern))
        return f"has a route's parameter, which no pattern knows: write {plain}"
    if re.search(r"/<[^/]*>", pattern):
        return f"has a route's parameter, which no pattern knows: write {re.sub('<[^/]*>', '*', pattern)}"
    if re.search(r"\?[^/]*=", pattern):
        return f"has a query, which is no part of a path: write {pattern.partition('?')[0]}"
    if ",/" in pattern or ", /" in pattern:
        return f"is several in one: write {[part.strip() for part in pattern.split(',')]}"
    return None


def _header_names(value: tuple[str, ...]) -> tuple[str, ...]:
    for name in value:
        if not _TOKEN.fullmatch(name) or "*" in name[:-1] or name == "*":
            raise ValueError(f"{redact(name)} is not a header name, nor the beginning of some and a *")
    return tuple(name.lower() for name in value)


def overlap(name: str, other: str) -> bool:
    """Whether two header names, each perhaps the beginning of some and a ``*``, can stand for the
    same one.
    """
    if name.endswith("*") and other.endswith("*"):
        return name[:-1].startswith(other[:-1]) or other[:-1].startswith(name[:-1])
    if name.endswith("*"):
        return other.startswith(name[:-1])
    return name.startswith(other[:-1]) if other.endswith("*") else name == other


def _field_names(value: tuple[str, ...]) -> tuple[str, ...]:
    for name in value:
        if not all(name.split(".")):
            raise ValueError(f"{name!r} is not a body field, dotted where it is inside of another")
    return value


def _routes(value: tuple[str, ...]) -> tuple[str, ...]:
    for route in value:
        name, colon, path = route.partition(":")
        if not re.fullmatch(r"[a-z0-9_]+", name) or (colon and not path.startswith("/")):
            raise ValueError("not a list of NAME or NAME:/path")
    return value


Host: TypeAlias = Annotated[str, AfterValidator(check_host)]
Url: TypeAlias = Annotated[SecretStr, AfterValidator(check_url)]
Readable: TypeAlias = Annotated[str, AfterValidator(check_readable)]
KeyPrefix: TypeAlias = Annotated[str, AfterValidator(_key_prefix)]
Notation: TypeAlias = Annotated[str, AfterValidator(_limits)]
PartitionName: TypeAlias = Annotated[str, AfterValidator(_partition)]
HeaderName: TypeAlias = Annotated[str, AfterValidator(_header_name)]
# Lists: in a variable separated by commas, kept as tuples.
Texts: TypeAlias = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Addresses: TypeAlias = Annotated[Texts, AfterValidator(check_addresses)]
Networks: TypeAlias = Annotated[Texts, AfterValidator(_networks)]
Paths: TypeAlias = Annotated[Texts, AfterValidator(_paths)]
HeaderNames: TypeAlias = Annotated[Texts, AfterValidator(_header_names)]
FieldNames: TypeAlias = Annotated[Texts, AfterValidator(_field_names)]
RouteNames: TypeAlias = Annotated[Texts, AfterValidator(_routes)]
