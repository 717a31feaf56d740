"""Apps that misbehave are heard as they are, and nothing of theirs is stored."""

import asyncio
import base64
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import orjson
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.settings import Settings

from ..kit.embedding_apps import FORMATS, Spy, cache_status, client, listed, read, respond
from .oracle import values_in
from .requests import post_bytes

pytestmark = pytest.mark.anyio


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
    """A good server of one format until *broken* says otherwise;
    *seen* keeps the bodies it got after that.
    """
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
    """Whatever the app answers to the original request is what the client gets, and nothing of it
    is stored.

    It is called once, and once more only where its answer to a smaller request may not be the one
    to this request.
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
    """What is not base64 of as many finite float32 numbers as its neighbours have is relayed and
    not stored.
    """

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
    """A member beside the vector, alike in every item of one answer or not: the app's words, not
    stored.
    """

    async def more(send: Send, answer: Any, raw: bytes) -> None:
        for item in answer["data"]:
            item["characters"] = len(orjson.loads(raw)["input"][0])
        await respond(send, orjson.dumps(answer))

    cached = EmbeddingCacheMiddleware(misbehaving(more, [True]), settings=settings)
    for texts in (["a"], ["bbb"], ["a"], ["a", "c"]):
        answer = await post_bytes(cached, orjson.dumps({"model": "m", "input": texts}))
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
        answer = await post_bytes(cached, orjson.dumps({"model": "m", "input": ["a"], "encoding_format": wanted}))
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
    answers = [await post_bytes(cached, orjson.dumps({"model": "m", "input": texts})) for texts in (["a"], ["a", "b"])]
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
        answer = await post_bytes(cached, orjson.dumps({"model": "m", "input": texts}))
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

    answer = await post_bytes(EmbeddingCacheMiddleware(app, settings=settings), b'{"model":"m","input":["a"]}')
    assert (200, b"123") == (answer.status_code, answer.content)
