"""Requests as data, and as the app and the cache see them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.types import Scope

from ...kit.embedding_apps import FORMATS, listed

# Request headers that are neither in the key nor in the lease, as far as the asks here have them.
_NEITHER = frozenset(
    {b"accept-encoding", b"cache-control", b"content-length", b"pragma", b"traceparent", b"x-request-id"}
)
_LEASE_ONLY = frozenset({b"accept", b"origin", b"referer", b"user-agent", b"x-forwarded-proto"})
_ADDRESSES = frozenset({b"x-forwarded-for", b"x-real-ip"})
CREDENTIALS = (
    "authorization",
    "api-key",
    "x-api-key",
    "apikey",
    "x-goog-api-key",
    "x-litellm-api-key",
    "ocp-apim-subscription-key",
    "x-forwarded-authorization",
    "x-auth-token",
    "x-access-token",
    "x-forwarded-user",
    "x-auth-request-user",
    "x-amzn-oidc-identity",
    "x-forwarded-client-cert",
    "cookie",
)
_CREDENTIALS = frozenset(name.encode() for name in CREDENTIALS)


@dataclass(frozen=True)
class Ask:
    """One request, as data; *headers* have lower-case names."""

    body: Mapping[str, Any]
    headers: tuple[tuple[str, str], ...] = ()
    path: str = "/v1/embeddings"
    address: str = "192.0.2.1"
    certificate: str = ""
    scheme: str = "https"
    query: str = ""

    @property
    def raw(self) -> bytes:
        """The body's bytes."""
        return orjson.dumps(self.body)

    def scope(self) -> Scope:
        """What a server makes of it."""
        own = {"host": "app", "content-type": "application/json", "content-length": str(len(self.raw))}
        named = {name for name, _ in self.headers}
        headers = [(name, value) for name, value in own.items() if name not in named] + list(self.headers)
        extensions = {"tls": _tls(self.certificate)} if self.certificate else {}
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": self.scheme,
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": self.query.encode(),
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in headers],
            "client": (self.address, 4711),
            "server": ("app", 80),
            "state": {},
            "extensions": extensions,
        }


def _tls(name: str) -> dict[str, Any]:
    chain = [f"-----BEGIN CERTIFICATE-----\n{name}\n-----END CERTIFICATE-----\n"] if name else []
    return {"client_cert_chain": chain, "client_cert_name": f"CN={name}", "tls_version": 0x0304, "server_cert": None}


@dataclass
class Request:
    """What the app makes of a scope and a body."""

    scope: Scope
    raw: bytes

    def __post_init__(self) -> None:
        self.headers = {name.decode(): value.decode() for name, value in self.scope["headers"]}
        self.fields: dict[str, Any] = orjson.loads(self.raw)
        [self.format] = [name for name, entry in FORMATS.items() if entry[0] == self.scope["path"]]
        self.input_field = FORMATS[self.format][1]
        self.items = listed(self.fields[self.input_field])
        self.sides = sides_of(self.scope, self.fields, self.input_field)

    @property
    def certificate(self) -> str:
        """The name in the client's certificate."""
        tls = (self.scope.get("extensions") or {}).get("tls") or {}
        return str(tls.get("client_cert_name", "CN="))[3:]


def member(fields: Mapping[str, Any], dotted: str) -> Any:
    """What stands at a dotted name."""
    value: Any = fields
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


@dataclass(frozen=True)
class Sides:
    """What of a request may matter, in three cuts.

    Attributes:
        door: All that a lease is for: whom the app lets in, and to what.
        who: The caller.
        vectors: All that is in the key where callers do not share.
    """

    door: object
    who: object
    vectors: object


def sides_of(scope: Scope, body: Mapping[str, Any], input_field: str) -> Sides:
    """The cuts of a request."""
    headers = sorted((name, value) for name, value in scope["headers"] if name not in _NEITHER)
    tls = str((scope.get("extensions") or {}).get("tls"))
    keys = tuple(pair for pair in headers if pair[0] in _CREDENTIALS)
    address = None if keys else (scope["client"][0], tuple(pair for pair in headers if pair[0] in _ADDRESSES))
    rest = tuple(pair for pair in headers if pair[0] not in _CREDENTIALS | _ADDRESSES)
    fields = {k: v for k, v in body.items() if k not in (input_field, "encoding_format", "user")}
    request = (scope["path"], scope["query_string"], orjson.dumps(fields, option=orjson.OPT_SORT_KEYS))
    who = (keys, tls, address)
    vectors = (request, keys, tls, tuple(pair for pair in rest if pair[0] not in _LEASE_ONLY))
    return Sides((request, who, rest, scope["scheme"]), who, vectors)
