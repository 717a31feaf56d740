"""Keys: whatever may change a vector is in them, and nothing can be mistaken for something else."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redis_asgi.embeddings.records.keys import RecordKeys
from redis_asgi.embeddings.requests.head import Heads
from redis_asgi.embeddings.requests.headers import HeaderClass, Headers
from redis_asgi.embeddings.requests.keyspace import Identities
from redis_asgi.embeddings.requests.parallel_lists import names_of, scope_of
from redis_asgi.embeddings.requests.routes import read_routes
from redis_asgi.embeddings.wire import WIRE_FORMATS, Batch
from redis_asgi.settings import Settings

SETTINGS = Settings(REDIS_URL="memory://")


def make(settings: Settings = SETTINGS, **options: Any) -> Identities:
    """The identities of a middleware."""
    usual: dict[str, Any] = {"namespace": "", "share": False, "trusting": False}
    return Identities(settings, **(usual | options))


IDENTITIES = make()
HEADS = Heads(Headers(SETTINGS, shared=False))


def identity_of(
    fields: Any = None,
    *,
    wire: str = "openai",
    headers: tuple[tuple[bytes, bytes], ...] = (),
    partition: str | None = None,
    identities: Identities = IDENTITIES,
    **scope: Any,
) -> tuple[RecordKeys, bytes]:
    """The identity of a request, and the key of its first input."""
    scope = {"path": "/v1/embeddings", "raw_path": None, "query_string": b"", "scheme": "http"} | scope
    parsed = orjson.loads(orjson.dumps(fields or {"model": "m", "input": "q"}))
    batch = WIRE_FORMATS[wire].split(parsed, None)
    assert isinstance(batch, Batch), batch
    batch.scope = scope_of(batch, names_of(SETTINGS.EMBEDDING_CACHE_IGNORED_FIELDS))
    told = HEADS.read(headers).told
    identity = identities.identify(identities.route_of(scope, told), told, WIRE_FORMATS[wire], batch, partition)
    return identity, identities.input_names(identity, batch.inputs)[0]


def key_of(fields: Any = None, **request: Any) -> bytes:
    """The key of the only input of a request."""
    return identity_of(fields, **request)[1]


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1Pe"
TRICKY = ["m", "m:x", "x", '"', "m\0", "m\0x", "a,b", "{", "é", "e\u0301", " m", "M", "1", "[1]"]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *(("text", {"fields": {"model": "m", "input": text}}) for text in TRICKY),
    *(("model", {"fields": {"model": text, "input": "q"}}) for text in TRICKY),
    *(("tokens", {"fields": {"model": "m", "input": tokens}}) for tokens in ([1], [1, 1], [11], [2])),
    ("object", {"fields": {"model": "m", "input": [{"text": "m"}]}}),
    *(
        ("object", {"fields": {"model": "m", "input": [{kind: image}]}})
        for kind in ("image", "bytes")
        for image in (PNG + "AAAA", PNG + "AAAB", f"data:image/png;base64,{PNG}", "data:image/png;,m")
    ),
    *(
        ("field", {"fields": {"model": "m", "input": "q", name: value}})
        for name in ("dimensions", "input_type", "task", "prompt", "cache_salt", "anything")
        for value in (256, "256", 256.0, None, [256], {"256": True})
    ),
    *(("path", {"path": path}) for path in ("/embeddings", "/v1/embeddings/", "/v1")),
    *(("rewritten path", {"path": path, "raw_path": b"/sent"}) for path in ("/v1/embeddings", "/embeddings")),
    ("raw path", {"raw_path": b"/v1/%65mbeddings"}),
    *(("mount", {"root_path": root}) for root in ("/a", "/b")),
    *(("query", {"query_string": query}) for query in (b"a=1", b"a=2", b"a=1&a=2")),
    ("format", {"wire": "ollama"}),
    *(
        ("header", {"headers": headers})
        for headers in (
            ((b"authorization", b"Bearer a"),),
            ((b"authorization", b"Bearer ab"),),
            ((b"authorization", b"Bearer a"), (b"x-api-key", b"b")),
            ((b"authorization", b"Bearer a"), (b"api-key", b"b")),
            ((b"authorization", b"Bearer a"), (b"authorization", b"b")),
            ((b"authorization", b""),),
            ((b"cookie", b"Bearer a"),),
            ((b"openai-organization", b"o"),),
            ((b"openai-project", b"o"),),
            ((b"x-litellm-tags", b"o"),),
            ((b"host", b"a.example"),),
            ((b"host", b"b.example"),),
            ((b"x-base-url", b"a"),),
            ((b"x-base-url", b"a"), (b"x-base-url", b"b")),
            ((b"x-base-url", b"b"), (b"x-base-url", b"a")),
            ((b"x-base-url", b"a, b"),),
            ((b"accept-language", b"de"),),
            ((b"content-type", b"application/json"),),
            ((b"content-type", b"application/vnd.api+json"),),
        )
    ),
    *(("partition", {"partition": text}) for text in ("", "a", "b", "Bearer a", "\ud800")),
    *(("namespace", {"identities": make(namespace=text)}) for text in ("a", "b")),
    ("share", {"identities": make(share=True)}),
    ("secret", {"identities": make(Settings(REDIS_URL="memory://", REDIS_KEY_SECRET="s"))}),
]


def test_everything_that_may_change_a_vector_has_its_own_key() -> None:
    """Any two of many requests that differ in one thing differ in their key."""
    keys: dict[bytes, Any] = {}
    base: dict[str, Any] = {"fields": {"model": "m", "input": "q"}}
    changes: list[tuple[str, dict[str, Any]]] = [("base", {}), *VARIANTS]
    for kind, change in changes:
        key = key_of(**(base | change))
        same = repr({**base, **change})
        assert keys.setdefault(key, same) == same, f"{kind} {change} shares a key"


PART = st.text(alphabet=':,"[]{}\0a1\\', max_size=6)


@given(
    st.lists(
        st.tuples(PART.filter(bool), PART.filter(bool), PART, PART, st.sampled_from([b"", b"a", b"a&b"])),
        min_size=2,
        max_size=2,
        unique=True,
    )
)
def test_no_delimiter_trick_moves_a_boundary(requests: list[tuple[str, str, str, str, bytes]]) -> None:
    """Parts are length-prefixed: moving characters from one to the next is another key."""
    keys = {
        key_of(
            {"model": model, "input": text, "task": task},
            query_string=query,
            headers=((b"openai-project", project.encode()),),
        )
        for model, text, task, project, query in requests
    }
    assert 2 == len(keys)


def test_what_cannot_change_a_vector_is_not_in_the_key() -> None:
    """The representation, the user, ids of a request,
    the order of fields and of headers share a key.
    """
    fields = {"model": "m", "input": "q"}
    same = [
        {"input": ["q"], "model": "m"},
        fields | {"encoding_format": "base64"},
        fields | {"encoding_format": "float", "user": "u", "request_id": "r", "priority": 3},
    ]
    assert {key_of(fields)} == {key_of(other) for other in same}
    assert key_of(fields) == key_of(fields, headers=((b"user-agent", b"x"), (b"x-request-id", b"1")))


def test_keys_have_the_documented_names() -> None:
    """``{prefix}embedding_input:v1:<sha256>``, and the same for leases, epochs and refusals."""
    identity, name = identity_of(identities=make(Settings(REDIS_URL="memory://", REDIS_KEY_PREFIX="app:")))
    names = [name, identity.lease_name, identity.epoch_name, identity.denied_name]
    for kind, name in zip(("input", "lease", "epoch", "denied"), names, strict=True):
        assert name.startswith(f"app:embedding_{kind}:v1:".encode())
        assert 64 == len(name.rpartition(b":")[2])


DOORS: list[dict[str, Any]] = [
    {},
    {"fields": {"model": "m", "input": "q", "adapter": "private"}},
    {"path": "/embeddings"},
    {"partition": "t"},
    {"scheme": "https"},
    {"client": ("192.0.2.1", 5)},
    {"client": ("192.0.2.2", 5)},
    {"extensions": {"tls": {"client_cert_name": "CN=a"}}},
    {"extensions": {"tls": {"client_cert_name": "CN=b"}}},
    {"extensions": {"tls": {"client_cert_chain": ["PEM"]}}},
    *(
        {"headers": ((name, value),)}
        for name in (
            b"authorization",
            b"x-litellm-api-key",
            b"x-goog-api-key",
            b"ocp-apim-subscription-key",
            b"x-forwarded-authorization",
            b"apikey",
            b"x-auth-request-email",
            b"x-gateway-of-our-own",
            b"origin",
            b"referer",
            b"user-agent",
            b"accept",
            b"x-forwarded-proto",
            b"x-forwarded-for",
            b"cf-connecting-ip",
            b"cloudfront-viewer-address",
            b"x-appengine-inbound-appid",
            b"x-azure-fdid",
            b"cf-worker",
            b"host",
            b"openai-organization",
        )
        for value in (b"1", b"2")
    ),
]


@pytest.mark.parametrize("share", [True, False])
def test_a_lease_opens_only_what_the_app_has_seen(share: bool) -> None:
    """Requests that differ in anything that may open a door have leases of their own, shared
    vectors or not.
    """
    identities = make(share=share)
    names = [identity_of(**door, identities=identities)[0].lease_name for door in DOORS]
    assert len(names) == len(set(names))


def test_an_address_is_somebody_only_where_no_credential_is() -> None:
    """Beside a credential header the way to the service changes no lease;
    the port of an address never does.
    """
    key = (b"authorization", b"k")
    one = identity_of(headers=(key, (b"x-forwarded-for", b"192.0.2.1")), client=("192.0.2.9", 1))[0]
    other = identity_of(headers=(key, (b"x-forwarded-for", b"192.0.2.2")), client=("192.0.2.8", 1))[0]
    assert one.lease_name == other.lease_name
    ports = [
        identity_of(headers=((b"x-forwarded-for", value),), client=("192.0.2.9", port))[0].lease_name
        for port, value in enumerate((b"192.0.2.1:5, 10.0.0.1", b"192.0.2.1:6, 10.0.0.1:7", b"192.0.2.1, 10.0.0.1"))
    ]
    assert 1 == len(set(ports))
    bare = [
        identity_of(headers=((b"cloudfront-viewer-address", b"2001:db8::1:%d" % port),))[0].lease_name
        for port in (46532, 46533)
    ]
    assert 1 == len(set(bare))


def test_inside_the_apps_own_authentication_a_lease_names_no_caller() -> None:
    """``LEASE=off``: credentials and addresses are left out, what chooses the frame is not."""
    identities = make(share=True, trusting=True)

    def lease(**request: Any) -> bytes:
        return identity_of(identities=identities, **request)[0].lease_name

    assert lease() == lease(headers=((b"authorization", b"k"),)) == lease(client=("192.0.2.1", 1))
    assert lease() != lease(headers=((b"origin", b"https://a"),))


def test_a_credential_that_the_app_does_not_know_has_one_record_for_all_its_scopes() -> None:
    """The record of a 401 is named by the caller alone."""
    key = ((b"authorization", b"k"),)
    names = {
        identity_of(headers=key)[0].denied_name,
        identity_of({"model": "other", "input": "q"}, headers=key, path="/embeddings")[0].denied_name,
    }
    assert 1 == len(names)
    assert identity_of()[0].denied_name not in names


HARMLESS = (
    b"traceparent", b"baggage", b"sentry-trace", b"x-request-id", b"x-my-own-request-id", b"x-acme-trace-id",
    b"x-stainless-arch", b"x-fern-platform", b"x-amzn-trace-id", b"content-length", b"accept-encoding", b"connection",
    b"via", b"cf-ray", b"cloudfront-viewer-country", b"sec-ch-ua", b"cache-control",
)  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_headers_are_in_neither_key_nor_lease(name: bytes) -> None:
    """What differs in every request and chooses nothing costs no miss."""
    plain, other = identity_of(), identity_of(headers=((name, b"9f3a"),))
    assert (plain[0].lease_name, plain[1]) == (other[0].lease_name, other[1])


@pytest.mark.parametrize("name", [b"host", b"cookie", b"x-forwarded-host", b"x-litellm-session-id", b"x-ms-date"])
def test_headers_that_may_choose_are_in_the_key(name: bytes) -> None:
    """Never harmless: what routes, and what is on no list."""
    assert key_of() != key_of(headers=((name, b"9f3a"),))


TOKEN = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=20)


@given(TOKEN, st.booleans())
def test_an_unlisted_header_is_in_the_key(name: str, share: bool) -> None:
    """Whatever stands in no group parts the keys; only what a group or a setting names does not."""
    headers = Headers(SETTINGS, shared=share)
    raw = name.encode()
    kind = headers.class_of(raw)
    identities = make(share=share)
    parts = key_of(identities=identities) != key_of(headers=((raw, b"v"),), identities=identities)
    assert parts == (kind is HeaderClass.KEY or (kind is HeaderClass.CREDENTIAL and not share))


def test_the_order_of_names_does_not_count_that_of_values_does() -> None:
    """Proxies order headers as they like; the values of one name are a list."""
    a, b = (b"x-a", b"1"), (b"x-b", b"2")
    assert key_of(headers=(a, b)) == key_of(headers=(b, a))
    assert key_of(headers=((b"x-a", b"1"), (b"x-a", b"2"))) != key_of(headers=((b"x-a", b"2"), (b"x-a", b"1")))


def test_no_credential_is_in_a_repr() -> None:
    """What names a caller is nowhere to be read."""
    headers = ((b"authorization", b"hunter2"),)
    identity, _ = identity_of(headers=headers)
    head = HEADS.read(headers)
    assert "hunter2" not in repr(identity) + repr(head) + repr(head.told)


@pytest.mark.parametrize(
    ("path", "root", "model"),
    [
        ("/v1/embeddings", "", None),
        ("/proxy/v1/embeddings", "/proxy", None),
        ("/v3/embeddings", "", None),
        ("/openai/deployments/ada/embeddings", "", "ada"),
        ("/openai/deployments/azure/ada/embeddings", "", "azure/ada"),
        ("/engines/a\nb/embeddings", "", "a\nb"),
    ],
)
def test_routes_match_the_whole_path_or_the_path_less_its_root(path: str, root: str, model: str | None) -> None:
    """A mounted app is found, and ``{model}`` spans slashes."""
    matched = read_routes(None, ("openai",)).match({"path": path, "root_path": root})
    assert matched is not None
    assert model == matched.path_model


@pytest.mark.parametrize(
    "path", ["/v1/embeddings/", "/x/v1/embeddings", "/openai/deployments//embeddings/x", "/engines//embeddings", "/"]
)
def test_other_paths_are_not_embedding_endpoints(path: str) -> None:
    """Matching is exact."""
    assert read_routes(None, ("openai",)).match({"path": path, "root_path": ""}) is None
