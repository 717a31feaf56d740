"""The oracle: an answer through the middleware is the answer of the app alone."""

import asyncio
import base64
import random
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.settings import Settings

from ..kit.embedding_apps import FORMATS, Spy, cache_status, client, listed, read, respond, server

pytestmark = pytest.mark.anyio

TEXTS = ["a", "b b", "a ", "é", "e\u0301", "\u0000", "long " * 40, '"', "0", "[1,2]", "x:y", "naïve 🙂"]
TOKENS = [[1], [1, 2], [12], [2, 1], [0], [99_999, 3, 7], [5] * 9]


def random_body(name: str, rng: random.Random) -> dict[str, Any]:
    """A random request of one format: duplicates, single inputs, token arrays, other fields."""
    tokens = name in ("openai", "tei") and rng.random() < 0.4
    pool: list[Any] = TOKENS if tokens else TEXTS
    items: Any = [rng.choice(pool) for _ in range(rng.choice((1, 1, 2, 3, 5, 9, 20)))]
    if name == "ollama_prompt" or (name not in ("cohere", "cohere_v1") and len(items) == 1 and rng.random() < 0.5):
        items = items[0]
    body: dict[str, Any] = {FORMATS[name][1]: items}
    if name == "tei":
        body |= rng.choice(({}, {"prompt_name": "query"}))
    else:
        body["model"] = rng.choice(("m", "m2"))
    if name == "openai":
        body |= rng.choice(({}, {"encoding_format": "float"}, {"encoding_format": "base64"}))
    if name.startswith("cohere"):
        body["input_type"] = "search_query"
        body |= rng.choice(({}, {"embedding_types": ["float"]}, {"embedding_types": ["base64", "float"]}))
    return body


def values_in(name: str, answer: Any) -> dict[str, list[Any]]:
    """The vectors of an answer by representation, taken out of it."""
    if name == "openai":
        values = [item.pop("embedding") for item in answer["data"]]
        return {"base64" if isinstance(values[0], str) else "float": values}
    if name == "ollama":
        return {"float": answer.pop("embeddings")}
    if name == "ollama_prompt":
        return {"float": [answer.pop("embedding")]}
    if name == "tei":
        values, answer[:] = list(answer), []
        return {"float": values}
    values = answer.pop("embeddings")
    return values if isinstance(values, dict) else {"float": values}


def tokens_in(name: str, answer: Any) -> Any:
    """The token count of an answer, taken out of it."""
    if name == "openai":
        return answer.pop("usage")
    if name == "ollama":
        answer.pop("total_duration", None)  # of one request, so only an answer of the app's own has it
        return answer.pop("prompt_eval_count")
    return answer["meta"]["billed_units"].pop("input_tokens") if name.startswith("cohere") else None


def as_float32(value: Any) -> bytes:
    """A vector's float32 bytes, from either representation."""
    return base64.b64decode(value) if isinstance(value, str) else np.array(value, dtype="<f4").tobytes()


def in_order(name: str, answer: Any) -> Any:
    """An answer whose items are in the order of their index, as clients read them."""
    if name == "openai":
        answer["data"].sort(key=lambda item: item["index"])
    return answer


@pytest.mark.parametrize("style", ["twin", "shortest", "wide"])
@pytest.mark.parametrize("name", FORMATS)
async def test_an_answer_through_the_cache_is_the_answer_of_the_app_alone(
    name: str, style: str, any_settings: Settings
) -> None:
    """Order, index, status, vectors, headers and exact counts are those of the app, for any mix of hits."""
    rng = random.Random(f"{name}{style}")
    alone = server(Spy(style=style))
    spy = Spy(style=style, shuffle=rng, honours_base64=style != "wide")
    alone = server(Spy(style=style, honours_base64=style != "wide"))
    local = rng.choice((0, 4096, 64 * 1024 * 1024))
    settings = Settings(**any_settings.model_dump(exclude_unset=True), EMBEDDING_CACHE_L1_BYTES=local)
    cached = EmbeddingCacheMiddleware(server(spy), settings=settings)
    path = FORMATS[name][0]
    first_seen: dict[Any, str] = {}
    hits = 0
    async with client(alone) as bare, client(cached) as through:
        for _ in range(130):
            body = random_body(name, rng)
            expected, actual = [await c.post(path, json=body) for c in (bare, through)]
            assert expected.status_code == actual.status_code == 200, actual.text
            said = cache_status(actual)
            hits += "; hit" in said
            own = {"cache-status", "content-length"}
            sent, got = ({k: v for k, v in answer.headers.items() if k not in own} for answer in (expected, actual))
            assert got == ({"content-type": sent["content-type"]} if "; hit" in said else sent)
            assert [said] == actual.headers.get_list("cache-status")
            assert int(actual.headers["content-length"]) == len(actual.content)
            left, right = in_order(name, expected.json()), in_order(name, actual.json())
            if "hit" in said:  # our own rendering is in order, whatever the app's was
                assert right == actual.json()
            left_values, right_values = values_in(name, left), values_in(name, right)
            counts = [tokens_in(name, answer) for answer in (left, right)]
            items = body[FORMATS[name][1]]
            if items and isinstance(items[0], list):
                assert counts[0] == counts[1]
            assert left == {**right, "id": left["id"]} if "id" in left else left == right
            compare_vectors(body, FORMATS[name][1], left_values, right_values, first_seen)
    assert hits > 10, "the cache was never used"


def compare_vectors(
    body: dict[str, Any],
    field: str,
    left: dict[str, list[Any]],
    right: dict[str, list[Any]],
    first_seen: dict[Any, str],
) -> None:
    """Equal as parsed in the representation first seen, and as float32 in the other."""
    items = body[field] if isinstance(body[field], list) and not isinstance(body[field][0], int) else [body[field]]
    if set(left) != set(right):  # asked for base64 of a server that ignores it: a full hit gives what was asked
        assert {"float"} == set(left)
        left = dict.fromkeys(right, left["float"])
    best = "float" if "float" in left and not isinstance(left["float"][0], str) else next(iter(left))
    for kind in left:
        for item, expected, actual in zip(items, left[kind], right[kind], strict=True):
            seen = first_seen.setdefault((repr(item), body.get("model"), body.get("prompt_name")), best)
            if seen == kind and type(expected) is type(actual):
                assert expected == actual
            else:
                assert as_float32(expected) == as_float32(actual)


async def test_usage_over_a_whole_stored_batch_is_what_the_app_counted(any_settings: Settings) -> None:
    """Shares are estimated, but their sum over a batch stored together is the app's own count."""
    cached = EmbeddingCacheMiddleware(server(Spy()), settings=any_settings)
    body = {"model": "m", "input": ["one", "two words here", "x " * 50]}
    async with client(cached) as c:
        cold, warm = [(await c.post("/v1/embeddings", json=body)).json() for _ in range(2)]
    assert {"prompt_tokens": 57, "total_tokens": 57} == cold["usage"] == warm["usage"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("openai", {"usage": None}),
        ("openai", {"usage": {"prompt_tokens": None, "total_tokens": 7, "completion_tokens": 0}}),
        ("openai", {"usage": {"prompt_tokens": 7.0, "total_tokens": 7.0}}),
        ("ollama", {"prompt_eval_count": None}),
        ("cohere", {"meta": {"billed_units": {"input_tokens": 7.0}}}),
        ("cohere", {"meta": {"billed_units": {"input_tokens": None}}}),
    ],
)
async def test_whatever_an_app_says_of_tokens_a_hit_says_too(name: str, said: dict[str, Any], redis_url: str) -> None:
    """Floats are counts as well; where it says nothing, nothing is said."""
    path, inputs, build = FORMATS[name]

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        body = orjson.loads(await read(receive))
        await respond(send, orjson.dumps(build(body, body[inputs], Spy()) | said))

    async with client(EmbeddingCacheMiddleware(app, settings=Settings(REDIS_URL=redis_url))) as c:
        cold, warm = [await c.post(path, json={"model": "m", inputs: ["some text"]}) for _ in range(2)]
    assert "hit" in cache_status(warm)
    assert said == {field: warm.json()[field] for field in said}
    own = {"cohere": {"id": cold.json().get("id")}, "ollama": {"total_duration": 7}}
    assert cold.json() == warm.json() | own.get(name, {})


MORE = {"usage": {"prompt_tokens": 5, "total_tokens": 5, "cost": 0.1, "prompt_tokens_details": {"image_count": 1}}}
META = {"meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 5, "images": 1}, "cached_tokens": 3}}
OF_ONE_REQUEST: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "openai": (MORE, {"usage": {"prompt_tokens": 5, "total_tokens": 5}}),
    "ollama": ({"prompt_eval_count": 5, "load_duration": 9}, {"prompt_eval_count": 5}),
    "cohere": (META, {"meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 5}}}),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("mode", ["original", "billed"])
@pytest.mark.parametrize("name", OF_ONE_REQUEST)
async def test_what_was_said_of_one_request_is_said_of_no_other(
    name: str, mode: str, dtype: str, redis_url: str
) -> None:
    """Costs, images, details and durations are in the app's own answer, and in none that was put together.

    What is `billed` for a part of a request is what the app has said of that part.
    """
    path, inputs, build = FORMATS[name]
    said, repeated = OF_ONE_REQUEST[name]

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        body = orjson.loads(await read(receive))
        await respond(send, orjson.dumps(build(body, body[inputs], Spy()) | said))

    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_USAGE=mode, EMBEDDING_CACHE_DTYPE=dtype)
    async with client(EmbeddingCacheMiddleware(app, settings=settings)) as c:
        bodies = [{"model": "m", inputs: items} for items in (["a"], ["a"], ["a", "b"])]
        cold, warm, partial = [(await c.post(path, json=body)).json() for body in bodies]
    assert said == {field: cold[field] for field in said}
    if mode == "original":
        twice = orjson.loads(orjson.dumps(repeated).replace(b":5", b":10"))
        for expected, answer in ((repeated, warm), (twice, partial)):
            assert expected == {field: answer[field] for field in said if field in answer}
    elif name == "openai":
        assert {"prompt_tokens": 0, "total_tokens": 0, "prompt_tokens_details": {"cached_tokens": 5}} == warm["usage"]
        assert {**said["usage"], "prompt_tokens_details": {"image_count": 1, "cached_tokens": 5}} == partial["usage"]
    elif name == "cohere":
        assert ({"input_tokens": 0}, 5) == (warm["meta"]["billed_units"], warm["meta"]["cached_tokens"])
        assert {"input_tokens": 5, "images": 1} == partial["meta"]["billed_units"]


async def test_warnings_are_of_their_own_request(settings: Settings) -> None:
    """Neither a hit nor a partial answer repeats them."""

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        body = orjson.loads(await read(receive))
        answer = FORMATS["cohere"][2](body, body["texts"], Spy())
        if "long" in body["texts"]:
            answer["meta"]["warnings"] = answer["warnings"] = ["input 0 was truncated"]
        await respond(send, orjson.dumps(answer))

    async with client(EmbeddingCacheMiddleware(app, settings=settings)) as c:
        for texts in (["a"], ["long", "a"], ["long", "a", "long"], ["long"], ["a"]):
            answer = (await c.post("/v2/embed", json={"model": "m", "texts": texts})).json()
            assert "warnings" not in answer
            assert "warnings" not in answer["meta"]


async def test_billed_usage_is_what_the_app_counted_for_this_request(redis_url: str) -> None:
    """``billed`` reports the sub-request's tokens and names the rest as cached."""
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_USAGE="billed")
    cached = EmbeddingCacheMiddleware(server(Spy()), settings=settings)
    async with client(cached) as c:
        for items in ([[1, 2]], [[1, 2], [3, 4, 5]], [[1, 2], [3, 4, 5]]):
            answer = (await c.post("/v1/embeddings", json={"model": "m", "input": items})).json()["usage"]
            details = answer.pop("prompt_tokens_details", {})
            expected = {1: (2, 0), 2: (3, 2)}[len(items)] if details.get("cached_tokens") != 5 else (0, 5)
            assert expected == (answer["total_tokens"], details.get("cached_tokens", 0))
    assert (0, 5) == expected


def quantised(body: dict[str, Any], items: list[Any], spy: Spy) -> Any:
    """A server that prints int8 whatever it is asked for; long vectors, so that they are read one at a time."""
    answer = FORMATS["openai"][2](body, items, spy)
    for item in answer["data"]:
        item["embedding"] = [round(x * 40) for x in item["embedding"]]
    return answer


@pytest.mark.parametrize("dims", [6, 300])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
async def test_integers_are_relayed_and_not_stored(dims: int, dtype: str, redis_url: str) -> None:
    """Also around a duplicate they stay the integers that they were, and a stored float stands beside none."""
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_DTYPE=dtype)
    quantises, seen = [True], Spy(dims=dims)

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        body = orjson.loads(await read(receive))
        build = quantised if quantises[0] else FORMATS["openai"][2]
        seen.seen.append(body["input"])
        await respond(send, orjson.dumps(build(body, listed(body["input"]), Spy(dims=dims))))

    def right(*items: str) -> list[Any]:
        answer: list[Any] = quantised({"model": "m"}, list(items), Spy(dims=dims))["data"]
        return answer

    async with client(EmbeddingCacheMiddleware(app, settings=settings)) as c:

        async def ask(*items: str) -> httpx.Response:
            return await c.post("/v1/embeddings", json={"model": "m", "input": items})

        for items in (["a", "b"], ["a", "b"], ["a", "b", "a"]):
            answer = await ask(*items)
            assert "redis-asgi; fwd=bypass; detail=integers" == cache_status(answer)
            assert repr(right(*items)) == repr(answer.json()["data"])
        quantises[0] = False
        await ask("a")
        quantises[0] = True
        answer = await ask("a", "b")
    assert repr(right("a", "b")) == repr(answer.json()["data"])
    assert [["a", "b"], ["a", "b"], ["a", "b"], ["a"], ["b"], ["a", "b"]] == seen.seen


@pytest.mark.parametrize("dims", [6, 300])
async def test_integers_among_floats_are_stored(dims: int, any_settings: Settings) -> None:
    """A vector of ones beside one of floats, and whole numbers in that, come back numerically the same."""
    vectors = {"ones": [0, 1] * (dims // 2), "some": [1, 0.5] * (dims // 2)}

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        items = orjson.loads(await read(receive))["input"]
        data = [{"index": index, "embedding": vectors[item]} for index, item in enumerate(items)]
        await respond(send, orjson.dumps({"data": data}))

    async with client(EmbeddingCacheMiddleware(app, settings=any_settings)) as c:
        body = {"model": "m", "input": ["ones", "some"]}
        cold, warm = [await c.post("/v1/embeddings", json=body) for _ in range(2)]
    assert "; hit" in cache_status(warm)
    assert cold.json() == warm.json()


@pytest.mark.parametrize("refuses", [False, True])
async def test_an_empty_text_among_others_is_the_apps_to_refuse(refuses: bool, settings: Settings) -> None:
    """One that takes it has it cached as any text; one that does not is heard, and the others are still stored."""
    build = FORMATS["openai"][2]

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        body = orjson.loads(await read(receive))
        if refuses and "" in body["input"]:
            await respond(send, b'{"error":"input %d"}' % body["input"].index(""), 400)
            return
        await respond(send, orjson.dumps(build(body, body["input"], Spy())))

    cached = EmbeddingCacheMiddleware(app, settings=settings)
    async with client(app) as bare, client(cached) as through:
        for texts in (["a", ""], ["a", "b"], ["a", "b", ""], [""], ["", "b"], ["", "b"]):
            body = {"model": "m", "input": texts}
            expected, actual = [await c.post("/v1/embeddings", json=body) for c in (bare, through)]
            assert expected.status_code == actual.status_code
            assert expected.json().get("data") == actual.json().get("data")
            assert expected.json().get("error") == actual.json().get("error")
    assert refuses != ("; hit" in cache_status(actual))


async def test_a_request_without_a_model_is_cached(any_settings: Settings) -> None:
    """It shares nothing with one that names a model."""
    spy = Spy()
    async with client(EmbeddingCacheMiddleware(server(spy), settings=any_settings)) as c:
        for body in ({"input": ["a"]}, {"input": ["a"], "model": "m"}):
            cold, warm = [await c.post("/v1/embeddings", json=body) for _ in range(2)]
            assert "fwd=miss" in cache_status(cold)
            assert "; hit" in cache_status(warm)
            assert cold.json() == warm.json()
    assert 2 == spy.calls


# An app that misbehaves.

Misbehave = Callable[[Send, Any, bytes], Awaitable[None]]


async def _not_a_number(send: Send, answer: Any, _raw: bytes) -> None:
    answer["data"][0]["embedding"][0] = None
    await respond(send, orjson.dumps(answer).replace(b"null", b"NaN"))


async def _null_component(send: Send, answer: Any, _raw: bytes) -> None:
    answer["data"][0]["embedding"][0] = None
    await respond(send, orjson.dumps(answer))


async def _null_vector(send: Send, answer: Any, _raw: bytes) -> None:
    answer["data"][0]["embedding"] = None
    await respond(send, orjson.dumps(answer))


async def _short(send: Send, answer: Any, _raw: bytes) -> None:
    answer["data"].pop()
    await respond(send, orjson.dumps(answer))


async def _long(send: Send, answer: Any, _raw: bytes) -> None:
    answer["data"].append({**answer["data"][0], "index": len(answer["data"])})
    await respond(send, orjson.dumps(answer))


async def _ragged(send: Send, answer: Any, _raw: bytes) -> None:
    answer["data"][-1]["embedding"].pop()
    answer["data"][0]["embedding"] += [1.0] * (len(answer["data"]) == 1)
    answer["data"][0]["embedding"] = [answer["data"][0]["embedding"]] if len(answer["data"]) == 1 else [0.5]
    await respond(send, orjson.dumps(answer))


async def _two_dimensional(send: Send, answer: Any, _raw: bytes) -> None:
    for item in answer["data"]:
        item["embedding"] = [item["embedding"]]
    await respond(send, orjson.dumps(answer))


async def _booleans(send: Send, answer: Any, _raw: bytes) -> None:
    answer["data"][0]["embedding"] = [True] * len(answer["data"][0]["embedding"])
    await respond(send, orjson.dumps(answer))


async def _duplicate_index(send: Send, answer: Any, _raw: bytes) -> None:
    for item in answer["data"]:
        item["index"] = 0 if len(answer["data"]) > 1 else 5
    await respond(send, orjson.dumps(answer))


async def _compressed(send: Send, answer: Any, _raw: bytes) -> None:
    # Not in the way that was asked for.
    await respond(send, zlib.compress(orjson.dumps(answer)), 200, (b"content-encoding", b"deflate"))


async def _just_null(send: Send, _answer: Any, _raw: bytes) -> None:
    await respond(send, b"null")


async def _other_type(send: Send, answer: Any, _raw: bytes) -> None:
    await respond(send, orjson.dumps(answer), 200, (b"content-type", b"text/plain"))


async def _accepted(send: Send, answer: Any, _raw: bytes) -> None:
    await respond(send, orjson.dumps(answer), 202)


async def _too_long(send: Send, _answer: Any, raw: bytes) -> None:
    # Says how long the request was: an answer to a smaller one would show.
    await respond(send, b'{"error":"input too long: %d"}' % len(raw), 413)


async def _unprocessable(send: Send, _answer: Any, raw: bytes) -> None:
    await respond(send, b'{"error":"input[%d]"}' % raw.count(b'","'), 422)


async def _busy(send: Send, _answer: Any, _raw: bytes) -> None:
    await respond(send, b'{"error":"busy"}', 429, (b"retry-after", b"7"))


async def _event_stream(send: Send, _answer: Any, raw: bytes) -> None:
    start = {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", b"text/event-stream")],
    }
    await send(start)
    for part in (b"data: 1\n\n", b"data: %d\n\n" % len(raw), b""):
        await send({"type": "http.response.body", "body": part, "more_body": part != b""})


MISBEHAVIOURS = [
    _not_a_number,
    _null_component,
    _null_vector,
    _short,
    _long,
    _ragged,
    _two_dimensional,
    _booleans,
    _duplicate_index,
    _compressed,
    _just_null,
    _other_type,
    _accepted,
    _too_long,
    _unprocessable,
    _busy,
    _event_stream,
]


def misbehaving(misbehave: Misbehave, broken: list[bool], name: str = "openai", seen: Spy | None = None) -> ASGIApp:
    """A good server of one format until *broken* says otherwise; *seen* keeps the bodies it got after that."""
    good = Spy()
    _, field, build = FORMATS[name]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raw = await read(receive)
        body = orjson.loads(raw)
        answer = build(body, listed(body[field]), good)
        if not broken[0]:
            await respond(send, orjson.dumps(answer))
            return
        if seen is not None:
            seen.bodies.append(raw)
        await misbehave(send, answer, raw)

    return app


@pytest.mark.parametrize("stored", [[], ["a", "b"]], ids=["cold", "partly-stored"])
@pytest.mark.parametrize("misbehave", MISBEHAVIOURS, ids=lambda f: f.__name__.strip("_"))
async def test_a_misbehaving_app_is_heard_as_it_is(
    misbehave: Misbehave, stored: list[str], any_settings: Settings
) -> None:
    """Whatever the app answers to the original request is what the client gets, and nothing of it is stored.

    It is called once, and once more only where its answer to a smaller request may not be the one to this request.
    """
    broken, seen = [False], Spy()
    app = misbehaving(misbehave, broken)
    cached = EmbeddingCacheMiddleware(misbehaving(misbehave, broken, seen=seen), settings=any_settings)
    body = {"model": "m", "input": ["a", "b", "c", "d"]}
    async with client(app) as bare, client(cached) as through:
        if stored:
            await through.post("/v1/embeddings", json={"model": "m", "input": stored})
        broken[0] = True
        expected, actual = [await c.post("/v1/embeddings", json=body) for c in (bare, through)]
        assert expected.status_code == actual.status_code
        assert expected.content == actual.content
        assert "stored" not in cache_status(actual)
        headers = {**actual.headers}
        assert 1 == len(actual.headers.get_list("cache-status"))
        headers.pop("cache-status")
        assert {**expected.headers} == headers
        assert (2 if stored and expected.status_code != 429 else 1) == seen.calls
        assert orjson.loads(seen.bodies[-1]) == (
            body if seen.calls == 2 or not stored else body | {"input": ["c", "d"]}
        )
        broken[0] = False
        again = await through.post("/v1/embeddings", json=body)
        assert "hit; ttl" not in cache_status(again)
        right = FORMATS["openai"][2](body, ["a", "b", "c", "d"], Spy())
        assert right["data"] == again.json()["data"]


def _set(vectors: list[Any], value: Any) -> None:
    vectors[0] = value


MUTATIONS: dict[str, Callable[[list[Any]], object]] = {
    "short": lambda vectors: vectors.pop(),
    "long": lambda vectors: vectors.append(vectors[0]),
    "ragged": lambda vectors: vectors[-1].pop(),
    "null component": lambda vectors: _set(vectors[0], None),
    "a component that is no number": lambda vectors: _set(vectors[0], "0.5"),
    "booleans": lambda vectors: _set(vectors, [True] * len(vectors[0])),
    "null": lambda vectors: _set(vectors, None),
    "empty": lambda vectors: _set(vectors, []),
    "an object": lambda vectors: _set(vectors, {"0": 0.5}),
    "a text": lambda vectors: _set(vectors, "abc"),
    "two-dimensional": lambda vectors: _set(vectors, [vectors[0]]),
    "infinite": lambda vectors: _set(vectors[0], "1e400"),
    "NaN": lambda vectors: _set(vectors[0], "NaN"),
}
PLACES: dict[str, Callable[[Any], list[Any]]] = {
    "ollama": lambda answer: answer["embeddings"],
    "cohere": lambda answer: answer["embeddings"]["float"],
    "cohere_v1": lambda answer: answer["embeddings"],
    "tei": lambda answer: answer,
}


@pytest.mark.parametrize("stored", [False, True], ids=["cold", "partly-stored"])
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", PLACES)
async def test_wrong_vectors_of_any_format_are_the_apps_to_answer(
    name: str, mutation: str, stored: bool, settings: Settings
) -> None:
    """Cohere's, Ollama's and TEI's answers are placed by position, and just as much looked at."""

    async def wrong(send: Send, answer: Any, _raw: bytes) -> None:
        MUTATIONS[mutation](PLACES[name](answer))
        await respond(send, orjson.dumps(answer).replace(b'"1e400"', b"1e400").replace(b'"NaN"', b"NaN"))

    broken = [False]
    app = misbehaving(wrong, broken, name)
    cached = EmbeddingCacheMiddleware(app, settings=settings)
    path, field, build = FORMATS[name]
    texts = ["a", "b", "c"]
    body: dict[str, Any] = {"model": "m", field: texts}
    async with client(app) as bare, client(cached) as through:
        if stored:
            await through.post(path, json=body | {field: ["a"]})
        broken[0] = True
        expected, actual = [await c.post(path, json=body) for c in (bare, through)]
        assert (200, expected.content) == (actual.status_code, actual.content)
        assert "fwd=bypass" in cache_status(actual)
        broken[0] = False
        again = await through.post(path, json=body)
    assert "; hit" not in cache_status(again)
    assert PLACES[name](build(body, texts, Spy())) == PLACES[name](again.json())


NOT_BASE64 = {
    "not base64": "!!!!",
    "a line break": base64.b64encode(bytes(24)).decode()[:16] + "\n" + base64.b64encode(bytes(24)).decode()[16:],
    "half a number": base64.b64encode(bytes(22)).decode(),
    "no padding": base64.b64encode(bytes(20)).decode().rstrip("="),
    "NaN": base64.b64encode(np.array([0, 0, 0, 0, 0, np.nan], "<f4").tobytes()).decode(),
    "infinite": base64.b64encode(np.array([0, 0, 0, 0, 0, np.inf], "<f4").tobytes()).decode(),
    "another length": base64.b64encode(bytes(28)).decode(),
    "empty": "",
    "floats among base64": [0.5] * 6,
}


@pytest.mark.parametrize("stored", [False, True], ids=["cold", "partly-stored"])
@pytest.mark.parametrize("value", NOT_BASE64.values(), ids=NOT_BASE64)
@pytest.mark.parametrize("name", ["openai", "cohere"])
async def test_wrong_base64_is_the_apps_to_answer(name: str, value: Any, stored: bool, settings: Settings) -> None:
    """What is not base64 of as many finite float32 numbers as its neighbours have is relayed and not stored."""

    async def wrong(send: Send, answer: Any, _raw: bytes) -> None:
        if name == "openai":
            answer["data"][-1]["embedding"] = value
        else:
            answer["embeddings"]["base64"][-1] = value
        await respond(send, orjson.dumps(answer))

    broken = [False]
    app = misbehaving(wrong, broken, name)
    cached = EmbeddingCacheMiddleware(app, settings=settings)
    path, field, _ = FORMATS[name]
    body: dict[str, Any] = {"model": "m", field: ["a", "b", "c"]}
    body |= {"encoding_format": "base64"} if name == "openai" else {"embedding_types": ["base64"]}
    async with client(app) as bare, client(cached) as through:
        if stored:
            await through.post(path, json=body | {field: ["a"]})
        broken[0] = True
        expected, actual = [await c.post(path, json=body) for c in (bare, through)]
        assert (200, expected.content) == (actual.status_code, actual.content)
        assert "fwd=bypass" in cache_status(actual)
        broken[0] = False
        right, again = [await c.post(path, json=body) for c in (bare, through)]
    assert "; hit" not in cache_status(again)
    assert values_in(name, right.json()) == values_in(name, again.json())


async def test_what_an_item_says_of_its_own_input_is_not_said_of_another(settings: Settings) -> None:
    """A member beside the vector, alike in every item of one answer or not: the app's words, not stored."""

    async def more(send: Send, answer: Any, raw: bytes) -> None:
        for item in answer["data"]:
            item["characters"] = len(orjson.loads(raw)["input"][0])
        await respond(send, orjson.dumps(answer))

    cached = EmbeddingCacheMiddleware(misbehaving(more, [True]), settings=settings)
    for texts in (["a"], ["bbb"], ["a"], ["a", "c"]):
        answer = await _post(cached, orjson.dumps({"model": "m", "input": texts}))
        assert {len(texts[0])} == {item["characters"] for item in answer.json()["data"]}
        assert "detail=not-understood" in cache_status(answer)


async def test_an_item_names_the_representation_it_is_in(settings: Settings) -> None:
    """llama.cpp's says which it is: a hit in the other one does not repeat that."""

    async def named(send: Send, answer: Any, raw: bytes) -> None:
        for item in answer["data"]:
            item["encoding_format"] = orjson.loads(raw)["encoding_format"]
        await respond(send, orjson.dumps(answer))

    cached = EmbeddingCacheMiddleware(misbehaving(named, [True]), settings=settings)
    for wanted in ("base64", "float", "base64"):
        answer = await _post(cached, orjson.dumps({"model": "m", "input": ["a"], "encoding_format": wanted}))
        [item] = answer.json()["data"]
        assert (wanted, wanted == "base64") == (item["encoding_format"], isinstance(item["embedding"], str))
    assert "; hit" in cache_status(answer)


async def test_a_partly_stored_answer_has_the_apps_headers_but_for_its_body(settings: Settings) -> None:
    """Of the sub-request's answer everything is repeated except what spoke of that body alone."""
    own = [
        (b"etag", b'"1"'),
        (b"digest", b"x"),
        (b"content-digest", b"x"),
        (b"content-md5", b"x"),
        (b"repr-digest", b"x"),
    ]
    kept = [(b"x-request-id", b"1"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"server-timing", b"x;dur=1")]

    async def more(send: Send, answer: Any, _raw: bytes) -> None:
        await respond(send, orjson.dumps(answer), 200, *own, *kept)

    cached = EmbeddingCacheMiddleware(misbehaving(more, [True]), settings=settings)
    # Clients of their own: one that sends the cookie back is another caller.
    answers = [await _post(cached, orjson.dumps({"model": "m", "input": texts})) for texts in (["a"], ["a", "b"])]
    for answer, sent in zip(answers, (own + kept, kept), strict=True):
        got = [
            pair for pair in answer.headers.raw if pair[0] not in (b"content-type", b"content-length", b"cache-status")
        ]
        assert sorted(sent) == sorted(got)
        assert int(answer.headers["content-length"]) == len(answer.content)
    assert "fwd=partial" in cache_status(answers[1])


class Halfway(Exception):
    """What the app below dies of."""


@pytest.mark.parametrize("stored", [[], ["a"]], ids=["cold", "partly-stored"])
@pytest.mark.parametrize("when", ["before", "after-start", "after-some"])
async def test_an_app_that_fails_fails_the_same_way_through_the_cache(
    when: str, stored: list[str], settings: Settings
) -> None:
    """The same messages are sent and the same exception is raised; the app's own 500 stays its own."""
    broken = [False]

    async def fail(send: Send, _answer: Any, raw: bytes) -> None:
        if when != "before":
            headers = [(b"content-type", b"application/json"), (b"x-length", b"%d" % len(raw))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        if when == "after-some":
            await send({"type": "http.response.body", "body": b'{"data":[', "more_body": True})
        raise Halfway(str(len(raw)))

    async def outcome(app: ASGIApp) -> tuple[str, list[Any]]:
        body = orjson.dumps({"model": "m", "input": ["a", "b"]})
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/embeddings",
            "headers": headers,
            "query_string": b"",
        }
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": body}

        async def send(message: Any) -> None:
            kept = [h for h in message.get("headers", ()) if h[0] != b"cache-status"]
            sent.append({**message, "headers": kept} if "headers" in message else message)

        with pytest.raises(Halfway) as caught:
            await app(scope, receive, send)
        return str(caught.value), sent

    app = misbehaving(fail, broken)
    cached = EmbeddingCacheMiddleware(app, settings=settings)
    if stored:
        async with client(cached) as through:
            await through.post("/v1/embeddings", json={"model": "m", "input": stored})
    broken[0] = True
    expected, actual = await outcome(app), await outcome(cached)
    if when == "before":  # an error that says nothing about the body may come from the smaller request
        expected, actual = ("", expected[1]), ("", actual[1])
    assert expected == actual


async def test_a_streamed_answer_is_understood_and_stored(settings: Settings) -> None:
    """JSON in many small messages without a length is an answer like any other."""
    spy = Spy()

    async def chunked(send: Send, answer: Any, _raw: bytes) -> None:
        spy.bodies.append(b"")
        body = orjson.dumps(answer)
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for at in range(0, len(body), 100):
            await send({"type": "http.response.body", "body": body[at : at + 100], "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    cached = EmbeddingCacheMiddleware(misbehaving(chunked, [True]), settings=settings)
    async with client(cached) as c:
        cold, warm = [await c.post("/v1/embeddings", json={"model": "m", "input": ["a", "b"]}) for _ in range(2)]
    assert cold.json()["data"] == warm.json()["data"]
    assert 1 == spy.calls


@pytest.mark.parametrize("status", [200, 500])
async def test_headers_that_can_be_read_only_once_are_kept(status: int, settings: Settings) -> None:
    """An iterator is as good as a list: for a miss, a partial, a hit, and what is only relayed."""

    async def once(send: Send, answer: Any, _raw: bytes) -> None:
        headers = iter([(b"content-type", b"application/json"), (b"x-app", b"yes")])
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": orjson.dumps(answer)})

    cached = EmbeddingCacheMiddleware(misbehaving(once, [True]), settings=settings)
    for texts in (["a"], ["a", "b"], ["a"]):
        answer = await _post(cached, orjson.dumps({"model": "m", "input": texts}))
        assert "application/json" == answer.headers["content-type"]
        assert ("x-app" in answer.headers) == ("; hit" not in cache_status(answer))
    assert ("; hit" in cache_status(answer)) == (status == 200)


@pytest.mark.parametrize("kind", [b"text/plain", b"application/json"])
async def test_an_app_may_send_from_several_tasks(kind: bytes, settings: Settings) -> None:
    """What one sends while the answer's start is on its way comes after it, in order."""

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await read(receive)

        async def beat() -> None:
            for body in (b"1", b"2"):
                await send({"type": "http.response.body", "body": body, "more_body": True})

        beats = asyncio.ensure_future(beat())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await beats
        await send({"type": "http.response.body", "body": b"3"})

    answer = await _post(EmbeddingCacheMiddleware(app, settings=settings), b'{"model":"m","input":["a"]}')
    assert (200, b"123") == (answer.status_code, answer.content)


async def test_a_changed_model_behind_the_same_name_starts_over(settings: Settings) -> None:
    """A fresh vector of another length drops the stored ones, and this request is the app's alone."""
    spy = Spy()
    cached = EmbeddingCacheMiddleware(server(spy), settings=settings)
    async with client(cached) as c:
        await c.post("/v1/embeddings", json={"model": "m", "input": ["a"]})
        spy.dims = 9
        mixed = await c.post("/v1/embeddings", json={"model": "m", "input": ["a", "b"]})
        after = await c.post("/v1/embeddings", json={"model": "m", "input": ["a"]})
    assert "fwd=bypass; detail=replayed" in cache_status(mixed)
    assert [9, 9] == [len(item["embedding"]) for item in mixed.json()["data"]]
    assert 9 == len(after.json()["data"][0]["embedding"])
    assert "fwd=miss" in cache_status(after)


async def _post(app: ASGIApp, body: bytes, **headers: str) -> httpx.Response:
    async with client(app) as c:
        return await c.post("/v1/embeddings", content=body, headers={"content-type": "application/json", **headers})


async def test_float16_answers_the_same_cold_and_warm(redis_url: str) -> None:
    """With ``DTYPE=float16`` a miss already answers what will be stored."""
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_DTYPE="float16", EMBEDDING_CACHE_L1_BYTES=0)
    cached = EmbeddingCacheMiddleware(server(Spy()), settings=settings)
    body = orjson.dumps({"model": "m", "input": ["a", "b"]})
    cold, warm = [await _post(cached, body) for _ in range(2)]
    exact = FORMATS["openai"][2]({"model": "m"}, ["a", "b"], Spy())["data"]
    assert cold.json()["data"] == warm.json()["data"] != exact
    got = [item["embedding"] for item in warm.json()["data"]]
    np.testing.assert_allclose(got, [item["embedding"] for item in exact], rtol=1e-3)
