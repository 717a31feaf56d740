"""What stands beside the inputs of a request."""

import logging
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.embeddings.requests.parallel_lists import names_of, refusal_beside, scope_of, values
from redis_asgi.embeddings.wire import WIRE_FORMATS, Batch, Uncacheable
from redis_asgi.settings import Settings

from ..kit.embedding_apps import FORMATS, Spy, cache_status, client, server
from ..kit.logs import event_of

SETTINGS = Settings(REDIS_URL="memory://")
LISTS = names_of(SETTINGS.EMBEDDING_CACHE_REQUEST_LISTS)


def batch_of(fields: dict[str, Any], wire: str = "openai") -> Batch:
    """A request, cut into its inputs."""
    batch = WIRE_FORMATS[wire].split(orjson.loads(orjson.dumps(fields)), None)
    assert isinstance(batch, Batch), batch
    return batch


def beside(more: dict[str, Any], inputs: Any = ("x", "y"), lists: Any = LISTS) -> tuple[str, str] | None:
    """Why a request with *more* fields is uncacheable, and which of them it is."""
    refusal = refusal_beside(batch_of({"model": "m", "input": inputs, **more}), lists)
    return None if refusal is None else (refusal.detail, refusal.field)


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"lora_path": ["alice", "bob"]}, "lora_path"),
        ({"embed_overrides": [[0.5], None]}, "embed_overrides"),
        ({"extra": {"instructions": ["a", "b"]}}, "extra.instructions"),
        ({"by_input": {"0": "a", "1": "b"}}, "by_input"),
        ({"a": {"b": {"c": {"d": {"e": {"f": {"g": ["x", "y"]}}}}}}}, "a.b.c.d.e.f.g"),
        ({"a": [{"b": 1}, {"b": 2}, {"b": ["x", "y"]}]}, "a.b"),
        ({"user": ["u1", "u2"]}, "user"),
        ({"metadata": {"tags": ["a"], "labels": ["a", "b"]}}, "metadata.labels"),
    ],
)
def test_a_list_as_long_as_the_inputs_may_belong_to_them(more: dict[str, Any], field: str) -> None:
    """Whatever its name and depth; also an object whose members are all named by numbers."""
    assert ("item-lists", field) == beside(more)


@pytest.mark.parametrize(
    "more",
    [
        {"lora_path": ["alice"]},
        {"lora_path": ["alice", "bob", "carol"]},
        {"lora_path": "alice"},
        {"by_input": {"0": "a", "one": "b"}},
        {"tags": ["a", "b"], "metadata": {"tags": ["a", "b"]}, "provider": {"order": ["a", "b"]}},
        {"fallbacks": [{"models": ["a", "b"]}, {"x": ["a", "b"]}]},
        {"stop": ["a", "b"], "dimensions": 2},
    ],
)
def test_other_lists_are_about_the_whole_request(more: dict[str, Any]) -> None:
    """Of another length, or named in the setting, with all that is in them."""
    assert beside(more) is None


@pytest.mark.parametrize("inputs", ["x", ["x"], [1, 2]], ids=repr)
def test_one_input_has_no_list_beside_it(inputs: Any) -> None:
    """A list of one says the same for each; a token array is one input."""
    assert beside({"lora_path": ["alice"], "ids": [1, 2]}, inputs) is None


def test_duplicates_count_as_they_were_sent() -> None:
    """Twice the same text with two adapters are two inputs."""
    assert ("item-lists", "lora_path") == beside({"lora_path": ["alice", "bob"]}, ["x", "x"])


def test_a_format_knows_its_own_lists() -> None:
    """Cohere's types are about the whole request, whatever the setting says."""
    fields = {"model": "m", "texts": ["x", "y"], "embedding_types": ["float", "base64"]}
    assert refusal_beside(batch_of(fields, "cohere"), names_of(())) is None
    assert refusal_beside(batch_of(fields | {"other": [1, 2]}, "cohere"), names_of(())) is not None


def nested(value: Any, depth: int) -> Any:
    """*value* in *depth* lists of one."""
    for _ in range(depth):
        value = [value]
    return value


def test_what_is_too_deep_to_look_at_passes_through() -> None:
    """Eight levels are looked at, and nothing beyond is taken for harmless."""
    assert beside({"x": nested(1, 8)}) is None
    assert beside({"x": nested(0.5, 8)}) is None
    assert ("not-understood", "") == beside({"x": nested(1, 9)})
    assert ("not-understood", "") == beside({"x": nested(2.0**70, 8)})


@given(
    st.recursive(
        st.one_of(st.none(), st.integers(-9, 9), st.floats(-9, 9), st.text(max_size=3)),
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=2), inner, max_size=4)),
        max_leaves=20,
    )
)
def test_nothing_else_is_refused(value: Any) -> None:
    """A body is refused exactly when a plain recursion finds such a list in it, or more than eight
    levels.
    """

    def found(value: Any, depth: int) -> bool:
        if not isinstance(value, list | dict):
            return False
        long = len(value) == 3 and (isinstance(value, list) or all(name.isdecimal() for name in value))
        items = value.values() if isinstance(value, dict) else value
        return depth > 8 or long or any(found(item, depth + 1) for item in items)

    assert found(value, 1) == (beside({"x": value}, ["a", "b", "c"], names_of(())) is not None)


IGNORED = names_of(("user", "metadata.trace_id", "a.b.c"))


def scope_with(**more: Any) -> bytes:
    """The scope of a request with *more* fields."""
    return scope_of(batch_of({"model": "m", "input": "x", **more}), IGNORED)


@pytest.mark.parametrize(
    ("more", "same"),
    [
        ({"user": "u"}, {}),
        ({"user": {"id": 1}}, {}),
        ({"metadata": {"trace_id": "1", "tags": ["a"]}}, {"metadata": {"tags": ["a"], "trace_id": "2"}}),
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"d": 2}}}),
        ({"encoding_format": "base64"}, {}),
    ],
)
def test_ignored_fields_are_not_in_the_scope(more: dict[str, Any], same: dict[str, Any]) -> None:
    """Whatever is in them; what stands beside them in an object still is."""
    assert scope_with(**more) == scope_with(**same)


@pytest.mark.parametrize(
    ("more", "other"),
    [
        ({"metadata": {"trace_id": "1"}}, {}),
        ({"metadata": {"tags": ["a"]}}, {"metadata": {"tags": ["b"]}}),
        ({"metadata": "1"}, {"metadata": "2"}),
        ({"metadata": [{"trace_id": "1"}]}, {"metadata": [{"trace_id": "2"}]}),
        ({"metadata.trace_id": "1"}, {}),
        ({"trace_id": "1"}, {}),
        ({"x": {"user": "1"}}, {"x": {"user": "2"}}),
        ({"dimensions": 8}, {"dimensions": 8.0}),
    ],
)
def test_everything_else_is_in_the_scope(more: dict[str, Any], other: dict[str, Any]) -> None:
    """A name is only ignored where it was named, in objects of that path."""
    assert scope_with(**more) != scope_with(**other)


def test_values_of_the_scope_are_found_by_dotted_name() -> None:
    """Those that may be new in every request: texts, numbers and lists,
    not the inputs, nor what is ignored.
    """
    more = {"user": "u", "encoding_format": "float", "n": 1, "metadata": {"trace_id": "1", "id": "2", "x": {"y": 0.5}}}
    batch = batch_of({"model": "m", "input": "x", "list": ["a"], "none": None, "flag": True, **more})
    found = {"model": "m", "list": ["a"], "n": 1, "metadata.id": "2", "metadata.x.y": 0.5}
    assert found == dict(values(batch, IGNORED))


def test_a_long_list_is_not_gone_through() -> None:
    """It would be hashed at every request."""
    batch = batch_of({"model": "m", "input": "x", "list": ["a" * 10_000]})
    batch = replace(batch, scope=scope_of(batch, IGNORED))
    assert {"model": "m"} == dict(values(batch, IGNORED))


def test_a_body_of_many_scalars_is_not_gone_through() -> None:
    """A client may send tens of thousands; the first ones are enough to see what changes."""
    batch = batch_of({"model": "m", "input": "x", **{f"n{number}": number for number in range(1000)}})
    assert ["model", *(f"n{number}" for number in range(63))] == [name for name, _ in values(batch, IGNORED)]


@pytest.mark.anyio
async def test_ignored_fields_are_forwarded(redis_url: str) -> None:
    """They make no miss, and the app still sees them."""
    spy = Spy()
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_IGNORED_FIELDS="rid, metadata.trace_id")
    async with client(EmbeddingCacheMiddleware(server(spy), settings=settings)) as c:
        for number in range(3):
            body = {"model": "m", "input": ["a"], "rid": f"{number}", "metadata": {"trace_id": number, "team": "x"}}
            said = cache_status(await c.post("/v1/embeddings", json=body))
        other = await c.post("/v1/embeddings", json={"model": "m", "input": ["a"], "user": "u"})
    assert "; hit" in said
    assert "fwd=miss" in cache_status(other)
    first = orjson.loads(spy.bodies[0])
    assert ("0", {"trace_id": 0, "team": "x"}) == (first["rid"], first["metadata"])


@pytest.mark.anyio
async def test_long_arrays_are_looked_at_like_others(any_settings: Settings) -> None:
    """One that is read by itself, as token arrays are, may belong to the inputs as well."""
    app = EmbeddingCacheMiddleware(server(Spy()), settings=any_settings)
    texts = [f"{number} " * 40 for number in range(500)]
    async with client(app) as c:
        for beside in (list(range(1000, 1500)), [list(range(1000, 1500)), "x"]):
            said = await c.post("/v1/embeddings", json={"model": "m", "input": texts, "offsets": beside})
            assert "redis-asgi; fwd=bypass; detail=item-lists" == cache_status(said)


def test_names_of_a_setting_are_a_tree() -> None:
    """The wider of two names holds, in either order."""
    assert {"a": None, "b": {"c": {"d": None}}} == names_of(("a", "b.c.d"))
    assert {"a": None} == names_of(("a", "a.b")) == names_of(("a.b", "a"))


@pytest.mark.anyio
async def test_item_lists_reach_the_app_as_they_are(any_settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of such a request is dropped, reordered or stored;
    the log names the field once, with the setting.
    """
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=any_settings)
    bodies = [
        {"model": "m", "input": texts, field: ["alice", "bob"]}
        for field in ("lora_path", "instructions")
        for texts in (["x", "x"], ["x", "y"], ["y", "x"])
    ]
    with caplog.at_level(logging.WARNING, "redis_asgi.embeddings"):
        async with client(app) as c:
            said = [cache_status(await c.post("/v1/embeddings", json=body)) for body in bodies]
    assert {"redis-asgi; fwd=bypass; detail=item-lists"} == {*said}
    assert bodies == [orjson.loads(body) for body in spy.bodies]
    logged = [record for record in caplog.records if event_of(record) == "redis_asgi.embedding_item_lists"]
    assert ["lora_path", "instructions"] == [record.__dict__["about"] for record in logged]
    assert all("EMBEDDING_CACHE_REQUEST_LISTS" in record.__dict__["fix"] for record in logged)


@pytest.mark.anyio
async def test_names_that_clients_choose_do_not_fill_the_log(
    any_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """A few dozen different ones are logged, each cut, and no more are remembered."""
    app = EmbeddingCacheMiddleware(server(Spy()), settings=any_settings)
    with caplog.at_level(logging.WARNING, "redis_asgi.embeddings"):
        async with client(app) as c:
            for number in range(100):
                name = f"{number}" * 100
                await c.post("/v1/embeddings", json={"model": "m", "input": ["a", "b"], name: [1, 2]})
    logged = [record for record in caplog.records if event_of(record) == "redis_asgi.embedding_item_lists"]
    assert 32 < len(logged) <= 64
    assert all(len(record.__dict__["about"]) <= 80 for record in logged)


@pytest.mark.anyio
async def test_lists_of_the_whole_request_are_cached_with_it(redis_url: str) -> None:
    """They are in the key as they are, and what the setting adds is no item list any more."""
    spy = Spy()
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_REQUEST_LISTS="tags, extra.layers")
    path, field, _ = FORMATS["openai"]
    async with client(EmbeddingCacheMiddleware(server(spy), settings=settings)) as c:
        for more in ({"tags": ["a", "b"]}, {"extra": {"layers": [1, 2]}}, {"tags": ["b", "a"]}):
            body = {"model": "m", field: ["x", "y"], **more}
            cold, warm = [cache_status(await c.post(path, json=body)) for _ in range(2)]
            assert "fwd=miss" in cold
            assert "; hit" in warm
    assert 3 == spy.calls


def test_uncacheable_of_a_users_format_needs_no_field() -> None:
    """It is for the log of those that have one."""
    assert "" == Uncacheable("mine").field
