"""HTTP's rules of caching: ``Cache-Control`` of requests and answers,
``Vary``, ``Cache-Status``. Pure.

RFC 9111 (directives) and RFC 9211 (``Cache-Status``).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...asgi.fields import argument, media_type, members

RawHeaders = Sequence[tuple[bytes, bytes]]
HeaderFields = Mapping[bytes, Sequence[bytes]]  # every value of each header, in order, by its name in lower case

# Headers that bind a body to a digest, a signature or one use: a body of ours would not fit them.
BODY_BINDING = frozenset(
    {
        b"content-digest",
        b"content-md5",
        b"digest",
        b"idempotency-key",
        b"repr-digest",
        b"signature",
        b"signature-input",
        b"x-amz-content-sha256",
    }
)
# What a merged body makes wrong.
_OF_THE_BODY = frozenset(
    {
        b"content-digest",
        b"content-length",
        b"content-md5",
        b"digest",
        b"etag",
        b"repr-digest",
        b"transfer-encoding",
    }
)
# Headers of an answer that a full hit replays, besides access-control-*: what it is,
# and what keeps a browser safe.
_REPLAYED = frozenset(
    {
        b"content-security-policy",
        b"content-type",
        b"permissions-policy",
        b"referrer-policy",
        b"strict-transport-security",
        b"vary",
        b"x-content-type-options",
        b"x-frame-options",
    }
)
_SHOWN = 80  # characters of a name that the app chose, in a log
_MAX_LENGTH_DIGITS = 19
_MAX_DIGITS = 11  # three thousand years; more are no more
# We answer the one ourselves, and the other chooses the lease.
_VARY_ALLOWED = frozenset({b"accept-encoding", b"origin"})


def by_name(headers: RawHeaders) -> HeaderFields:
    """Read *headers* once, for many questions about them."""
    fields: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        fields.setdefault(name.lower(), []).append(value)
    return fields


def directives(fields: HeaderFields) -> dict[str, str]:
    """``Cache-Control`` as a mapping of lower-case names to arguments (``""`` when a directive has
    none).
    """
    found: dict[str, str] = {}
    for value in fields.get(b"cache-control", ()):
        for part in value.decode("latin-1").split(","):
            name, given = argument(part)
            if name:
                found.setdefault(name, given)
    return found


def seconds(given: str | None) -> int | None:
    """A delta-seconds argument; ``None`` when it is absent or not a number (RFC 9111, 1.2.2)."""
    return int(given[:_MAX_DIGITS]) if given and given.isascii() and given.isdigit() else None


@dataclass(frozen=True, slots=True)
class RequestDirectives:
    """The wishes of a request's ``Cache-Control``.

    Attributes:
        lookup: Whether a stored answer will do.
        store: Whether the answer may be stored.
        only_if_cached: 504 rather than a call of the app.
        max_age: Seconds; older vectors are misses. ``None`` = any age.
    """

    lookup: bool = True
    store: bool = True
    only_if_cached: bool = False
    max_age: int | None = None


def wanted(fields: HeaderFields) -> RequestDirectives:
    """Read a request's ``Cache-Control``."""
    asked = directives(fields)
    if not asked:
        # What HTTP/1.0 had for it counts where there is nothing else (RFC 9111, 5.4).
        old = b"pragma" in fields and any(b"no-cache" in value.lower() for value in fields[b"pragma"])
        return _ANYTHING if not old else _ANEW
    max_age = seconds(asked.get("max-age"))
    store = "no-store" not in asked
    return RequestDirectives(
        store and "no-cache" not in asked and max_age != 0, store, "only-if-cached" in asked, max_age
    )


_ANYTHING = RequestDirectives()
_ANEW = RequestDirectives(lookup=False)


@dataclass(frozen=True, slots=True)
class StorePermission:
    """Whether an answer may be stored, and for how long.

    Attributes:
        refusal: Why not: a ``detail`` of ``Cache-Status``; ``None`` = it may.
        max_age: Seconds at most; ``None`` = the TTL of the settings.
        varies_by: The request header that ``Vary`` names and the key lacks.
    """

    refusal: str | None = None
    max_age: int | None = None
    varies_by: str = ""


def storable(fields: HeaderFields, is_in_key: Callable[[bytes], bool]) -> StorePermission:
    """Read an answer's ``Cache-Control`` and ``Vary``; *is_in_key*:
    whether a request header is in the key.
    """
    said = directives(fields)
    stated = said["s-maxage"] if "s-maxage" in said else said.get("max-age")
    max_age = seconds(stated)
    # What is no number counts as 0 (RFC 9111, 4.2.1).
    if (stated is not None and not max_age) or not said.keys().isdisjoint(("no-store", "private", "no-cache")):
        return StorePermission("response-no-store")
    for value in fields.get(b"vary", ()):
        for name in members(value):
            if name and name not in _VARY_ALLOWED and (name == b"*" or not is_in_key(name)):
                return StorePermission("vary", varies_by=name.decode("latin-1")[:_SHOWN])
    return StorePermission(None, max_age)


def binds_its_body(fields: HeaderFields) -> bool:
    """Whether a request carries a header that only fits its own bytes."""
    return not BODY_BINDING.isdisjoint(fields)


def is_json(fields: HeaderFields) -> bool:
    """Whether the content type is JSON in UTF-8, as JSON is unless it says otherwise."""
    values = fields.get(b"content-type", ())
    if len(values) != 1:
        return False
    kind = media_type(values[0])
    named = map(argument, values[0].decode("latin-1").lower().split(";")[1:])
    charsets = {charset for name, charset in named if name == "charset"}
    return (kind == b"application/json" or kind.endswith(b"+json")) and charsets <= {"utf-8", "utf8"}


def is_encoded(fields: HeaderFields) -> bool:
    """Whether the body is compressed or otherwise not what its content type says."""
    return any(value.strip().lower() not in (b"", b"identity") for value in fields.get(b"content-encoding", ()))


def accepts_json(fields: HeaderFields) -> bool:
    """Whether ``Accept`` leaves room for JSON; a stored answer is nothing else."""
    accepted = b",".join(fields.get(b"accept", ())).lower()
    return not accepted or any(kind in accepted for kind in (b"json", b"application/*", b"*/*"))


def content_length(headers: RawHeaders) -> int:
    """The length that a request states; 0 when it states none."""
    values = [value for name, value in headers if name == b"content-length"]
    return int(values[0]) if len(values) == 1 and values[0].isdigit() and len(values[0]) < _MAX_LENGTH_DIGITS else 0


def is_success(status: int) -> bool:
    """Whether *status* is two hundred and something."""
    return 200 <= status < 300


def less_body(headers: RawHeaders) -> RawHeaders:
    """An answer's headers, less those that fit its own body only."""
    return [(name, value) for name, value in headers if name.lower() not in _OF_THE_BODY]


def is_gzip(fields: HeaderFields) -> bool:
    """Whether the body is compressed with gzip, and in no other way."""
    return [value.strip().lower() for value in fields.get(b"content-encoding", ())] in ([b"gzip"], [b"x-gzip"])


def accepts_gzip(headers: RawHeaders) -> bool:
    """Whether ``Accept-Encoding`` names gzip; where it only may be meant,
    an answer that is not compressed will do.
    """
    for name, value in headers:
        if name.lower() == b"accept-encoding":
            for coding in members(value):
                kind, _, weight = coding.partition(b";")
                if kind.strip() == b"gzip":
                    return weight.replace(b" ", b"").strip(b"0.") != b"q="
    return False


def for_sub_request(headers: RawHeaders, length: int, *, gzip: bool = False) -> list[tuple[bytes, bytes]]:
    """A request's headers for a body of ours,
    whose answer we mean to read: not compressed, or by *gzip*.
    """
    dropped = (b"content-length", b"transfer-encoding", b"expect", b"accept-encoding", b"trailer")
    kept = [(name, value) for name, value in headers if name.lower() not in dropped]
    return [*kept, (b"accept-encoding", b"gzip" if gzip else b"identity"), (b"content-length", b"%d" % length)]


def replayed(headers: RawHeaders) -> list[tuple[bytes, bytes]]:
    """The headers of an answer that a full hit repeats; never ``Set-Cookie``."""
    lowered = ((name.lower(), value) for name, value in headers)
    return [(n, value) for n, value in lowered if n in _REPLAYED or n.startswith(b"access-control-")]


def status(*members: str, detail: str | None = None) -> str:
    """One ``Cache-Status`` member of ours, its parameters in the order given."""
    parts: Iterable[str] = ("redis-asgi", *members)
    if detail is not None:
        parts = (*parts, f'detail="{detail}"' if " " in detail else f"detail={detail}")
    return "; ".join(parts)
