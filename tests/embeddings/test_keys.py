"""Keys: whatever may change a vector is in them, and nothing can be mistaken for something else."""

import itertools
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from redis_asgi.connection import RedisManager
from redis_asgi.embeddings.beside import scope_of
from redis_asgi.embeddings.core import Core, Options
from redis_asgi.embeddings.http_caching import by_name
from redis_asgi.embeddings.routes import read_routes
from redis_asgi.embeddings.wire import WIRE_FORMATS, Batch
from redis_asgi.settings import Settings

SETTINGS = Settings(REDIS_URL="memory://")


async def no_app(_scope: Scope, _receive: Receive, _send: Send) -> None:
    """Never called."""


def make_core(settings: Settings = SETTINGS, *, namespace: str = "", share: bool = False) -> Core:
    """The core of a middleware."""
    options = Options(3600, namespace, share, 300.0, None, settings)
    return Core(no_app, RedisManager(settings), options)


CORE = make_core()


def key_of(
    fields: Any,
    *,
    wire: str = "openai",
    path: str = "/v1/embeddings",
    raw_path: bytes | None = None,
    query: bytes = b"",
    headers: tuple[tuple[bytes, bytes], ...] = (),
    partition: str | None = None,
    core: Core = CORE,
) -> bytes:
    """The key of the only input of a request."""
    scope = {"path": path, "raw_path": raw_path, "query_string": query}
    batch = WIRE_FORMATS[wire].split(orjson.loads(orjson.dumps(fields)), None)
    assert isinstance(batch, Batch), batch
    batch.scope = scope_of(batch, core.ignored)
    identity = core.identify(scope, by_name(headers), WIRE_FORMATS[wire], batch, partition)
    return core.input_names(identity, batch.inputs)[0]


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
    *(("query", {"query": query}) for query in (b"a=1", b"a=2", b"a=1&a=2")),
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
        )
    ),
    *(("partition", {"partition": text}) for text in ("", "a", "b", "Bearer a", "\ud800")),
    *(("namespace", {"core": make_core(namespace=text)}) for text in ("a", "b")),
    ("share", {"core": make_core(share=True)}),
    ("secret", {"core": make_core(Settings(REDIS_URL="memory://", REDIS_KEY_SECRET="s"))}),
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
            query=query,
            headers=((b"openai-project", project.encode()),),
        )
        for model, text, task, project, query in requests
    }
    assert 2 == len(keys)


def test_what_cannot_change_a_vector_is_not_in_the_key() -> None:
    """The representation, the user, ids of a request, the order of fields and of headers share a key."""
    fields = {"model": "m", "input": "q"}
    same = [
        {"input": ["q"], "model": "m"},
        fields | {"encoding_format": "base64"},
        fields | {"encoding_format": "float", "user": "u", "request_id": "r", "priority": 3},
    ]
    assert {key_of(fields)} == {key_of(other) for other in same}
    assert key_of(fields) == key_of(fields, headers=((b"user-agent", b"x"), (b"x-request-id", b"1")))


def test_keys_have_the_documented_names() -> None:
    """``{prefix}embedding_input:v1:<sha256>``, and the same for leases and epochs."""
    core = make_core(Settings(REDIS_URL="memory://", REDIS_KEY_PREFIX="app:"))
    batch = WIRE_FORMATS["openai"].split({"model": "m", "input": "q"}, None)
    assert isinstance(batch, Batch)
    identity = core.identify({"path": "/"}, {}, WIRE_FORMATS["openai"], batch, None)
    names = [core.input_names(identity, batch.inputs)[0], identity.lease_name, identity.epoch_name]
    for kind, name in zip(("input", "lease", "epoch"), names, strict=True):
        assert name.startswith(f"app:embedding_{kind}:v1:".encode())
        assert 64 == len(name.rpartition(b":")[2])


def test_leases_are_per_credential_path_model_and_origin_also_where_vectors_are_shared() -> None:
    """Under ``share`` and ``partition_by`` the lease stays with the credential."""
    core = make_core(share=True)
    wire = WIRE_FORMATS["openai"]
    names = set()
    for model, path, key, origin in itertools.product("ab", "/x", (b"1", b"2"), (b"o1", b"o2")):
        batch = wire.split({"model": model, "input": "q"}, None)
        assert isinstance(batch, Batch)
        headers = [(b"authorization", key), (b"origin", origin)]
        names.add(core.identify({"path": path}, by_name(headers), wire, batch, None).lease_name)
    assert 2 * 2 * 2 * 2 == len(names)


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
