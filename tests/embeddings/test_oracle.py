"""The answer through the cache is the one of the app alone, its usage included."""

import base64
import random
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from starlette.types import Receive, Scope, Send

from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.settings import Settings

from ..kit.embedding_apps import FORMATS, Spy, cache_status, client, listed, read, respond, server
from .oracle import values_in
from .requests import post_bytes

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
    """Order, index, status, vectors,
    headers and exact counts are those of the app, for any mix of hits.
    """
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
    """Costs, images, details and durations are in the app's own answer,
    and in none that was put together.

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
    """A server that prints int8 whatever it is asked for; long vectors,
    so that they are read one at a time.
    """
    answer = FORMATS["openai"][2](body, items, spy)
    for item in answer["data"]:
        item["embedding"] = [round(x * 40) for x in item["embedding"]]
    return answer


@pytest.mark.parametrize("dims", [6, 300])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
async def test_integers_are_relayed_and_not_stored(dims: int, dtype: str, redis_url: str) -> None:
    """Also around a duplicate they stay the integers that they were,
    and a stored float stands beside none.
    """
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
    """A vector of ones beside one of floats, and whole numbers in that,
    come back numerically the same.
    """
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
    """One that takes it has it cached as any text; one that does not is heard,
    and the others are still stored.
    """
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


async def test_float16_answers_the_same_cold_and_warm(redis_url: str) -> None:
    """With ``DTYPE=float16`` a miss already answers what will be stored."""
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_DTYPE="float16", EMBEDDING_CACHE_L1_BYTES=0)
    cached = EmbeddingCacheMiddleware(server(Spy()), settings=settings)
    body = orjson.dumps({"model": "m", "input": ["a", "b"]})
    cold, warm = [await post_bytes(cached, body) for _ in range(2)]
    exact = FORMATS["openai"][2]({"model": "m"}, ["a", "b"], Spy())["data"]
    assert cold.json()["data"] == warm.json()["data"] != exact
    got = [item["embedding"] for item in warm.json()["data"]]
    np.testing.assert_allclose(got, [item["embedding"] for item in exact], rtol=1e-3)
