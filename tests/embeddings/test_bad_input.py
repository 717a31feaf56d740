"""What is not understood passes through; no mistake of a wire format is an error of the app."""

import asyncio
import dataclasses
import gzip
from typing import Any

import numpy as np
import orjson
import pytest
from starlette.types import Receive, Scope, Send

from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.settings import Settings

from ..kit.embedding_apps import FORMATS, Spy, cache_status, client, read, respond, server
from ..kit.inside import shared_of
from .bodies import JSON, ZEROS, echo

pytestmark = pytest.mark.anyio


def openai(**fields: Any) -> bytes:
    """A body."""
    return orjson.dumps({"model": "m", **fields})


DEEP = b'{"model":"m","input":' + b"[" * 2000 + b"]" * 2000 + b"}"


BAD: list[tuple[str, bytes, dict[str, str], str]] = [
    ("empty body", b"", JSON, "not-json"),
    ("not JSON", b"hello", JSON, "not-json"),
    ("half of it", b'{"model":"m","input":["a"', JSON, "not-json"),
    ("NaN", b'{"model":"m","input":["a"],"x":NaN}', JSON, "not-json"),
    ("a lone surrogate", b'{"model":"m","input":["\\ud800"]}', JSON, "not-json"),
    ("UTF-16", '{"model":"m","input":"a"}'.encode("utf-16"), JSON, "not-json"),
    ("a byte order mark", b"\xef\xbb\xbf" + openai(input="a"), JSON, "not-json"),
    ("invalid UTF-8", b'{"model":"m","input":"\xff"}', JSON, "not-json"),
    ("nested too deeply", DEEP, JSON, "not-json"),
    ("a list", b'["a"]', JSON, "not-understood"),
    ("a number", b"5", JSON, "not-understood"),
    ("a model that is no string", b'{"model":{"a":1},"input":"a"}', JSON, "not-understood"),
    ("no input", b'{"model":"m"}', JSON, "not-understood"),
    ("an empty text", openai(input=""), JSON, "not-understood"),
    ("an empty list", openai(input=[]), JSON, "not-understood"),
    ("null", openai(input=None), JSON, "not-understood"),
    ("mixed kinds", openai(input=["a", [1]]), JSON, "not-understood"),
    ("booleans as tokens", openai(input=[True, False]), JSON, "not-understood"),
    ("floats as tokens", openai(input=[[1.5]]), JSON, "not-understood"),
    ("nested garbage", openai(input=[{"a": [{"b": None}]}]), JSON, "not-understood"),
    ("an image behind a URL", openai(input=[{"image": "https://x/y.png"}]), JSON, "not-understood"),
    ("one in a bucket", openai(input=[{"image": "s3://x/y"}]), JSON, "not-understood"),
    ("one behind a relative URL", openai(input=[{"image": "//x/y.png"}]), JSON, "not-understood"),
    ("one in a file", openai(input=[{"image": "/x/y.png"}]), JSON, "not-understood"),
    ("bytes behind a URL", openai(input=[{"bytes": " HTTPS://x/y"}]), JSON, "not-understood"),
    ("one behind a path of letters", openai(input=[{"image": "images/cat"}]), JSON, "not-understood"),
    ("bytes behind an id", openai(input=[{"bytes": "8c1f"}]), JSON, "not-understood"),
    ("a URL said to be an image", openai(input=["https://x/y.png"], modality="image"), JSON, "not-understood"),
    ("an object with one", openai(input=[{"text": "x"}], media_type="Image/PNG"), JSON, "not-understood"),
    ("texts among images", openai(input=["x"], modalities=["text", "image"]), JSON, "not-understood"),
    ("sounds", openai(input=["x"], input_type="audio"), JSON, "not-understood"),
    ("chat messages", openai(messages=[{"role": "user", "content": "a"}]), JSON, "not-understood"),
    ("text as plain text", openai(input="a"), {"content-type": "text/plain"}, "not-json"),
    ("another charset", openai(input="a"), {"content-type": "application/json; charset=latin-1"}, "not-json"),
    ("no content type", openai(input="a"), {}, "not-json"),
    ("gzip", gzip.compress(openai(input="a")), JSON | {"content-encoding": "gzip"}, "encoding"),
    ("a gzip bomb", ZEROS * 10, JSON | {"content-encoding": "gzip"}, "encoding"),
    ("a signed body", openai(input="a"), JSON | {"content-digest": "sha-256=:x:"}, "body-header"),
    ("an idempotency key", openai(input="a"), JSON | {"idempotency-key": "1"}, "body-header"),
    ("other encodings", openai(input="a", encoding_format="bytes"), JSON, "encoding"),
    ("nonsense as an encoding", openai(input="a", encoding_format={"a": 1}), JSON, "encoding"),
    ("late chunking", openai(input=["a"], late_chunking=True), JSON, "late-chunking"),
    ("many vectors per input", openai(input=["a"], return_multivector=True), JSON, "multi-vector"),
    ("integers", openai(input=["a"], output_dtype="int8"), JSON, "integers"),
    ("an integer beyond 64 bits", b'{"model":"m","input":"a","seed":36893488147419103233}', JSON, "not-understood"),
    ("one deep inside", b'{"model":"m","input":"a","x":[{"y":-36893488147419103233}]}', JSON, "not-understood"),
    ("big endian", openai(input=["a"], endianness="big"), JSON, "encoding"),
    ("10,000 inputs", openai(input=[str(n) for n in range(10_000)]), JSON, "too-large"),
    ("too many bytes", openai(input="x" * (8 * 1024 * 1024)), JSON, "too-large"),
    ("JSON is not accepted", openai(input="a"), JSON | {"accept": "application/octet-stream"}, "encoding"),
]


@pytest.mark.parametrize(("content", "headers", "detail"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
async def test_what_is_not_understood_passes_through(
    content: bytes, headers: dict[str, str], detail: str, settings: Settings
) -> None:
    """The app gets the original bytes once and its answer is relayed;
    the reason is in ``Cache-Status``.
    """
    seen: list[bytes] = []
    app = EmbeddingCacheMiddleware(echo(seen), settings=settings)
    async with client(app) as c:
        response = await c.post("/v1/embeddings", content=content, headers=headers)
    assert (400, b'{"error":"bad"}') == (response.status_code, response.content)
    assert [content] == seen
    assert f"redis-asgi; fwd=bypass; detail={detail}" == cache_status(response)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/api/embed", {"model": "m", "input": []}),
        ("/api/embed", {"model": "m", "input": "a", "keep_alive": 0}),
        *(("/api/embed", {"model": "m", "input": "a", "keep_alive": zero}) for zero in ("0", "0s", "0m", "0h0m", 0.5)),
        ("/api/embeddings", {"model": "m", "prompt": ["a"]}),
        ("/api/embed", {"model": "m", "input": ""}),
        ("/api/embeddings", {"model": "m", "prompt": ""}),
        ("/v2/embed", {"model": "m", "texts": "a"}),
        ("/v2/embed", {"model": "m", "texts": ["a"], "images": ["b"]}),
        ("/v2/embed", {"model": "m", "texts": ["a"], "embedding_types": ["int8"]}),
        ("/v2/embed", {"model": "m", "texts": ["a"], "embedding_types": [{}]}),
        ("/embed", {"inputs": [["a", "b"]]}),
        ("/embed", {"inputs": {"a": "b"}}),
    ],
    ids=repr,
)
async def test_other_formats_pass_what_they_do_not_understand(
    path: str, fields: dict[str, Any], settings: Settings
) -> None:
    """Loading and unloading models, images, integers and pairs are the app's alone."""
    seen: list[bytes] = []
    app = EmbeddingCacheMiddleware(echo(seen), settings=settings)
    async with client(app) as c:
        response = await c.post(path, json=fields)
        sent = response.request.content
    assert [sent] == seen
    assert "fwd=bypass" in cache_status(response)


async def test_ollama_needs_no_content_type(settings: Settings) -> None:
    """Its clients send none."""
    app = EmbeddingCacheMiddleware(server(Spy()), settings=settings)
    async with client(app) as c:
        for _ in range(2):
            last = await c.post("/api/embed", content=b'{"model":"m","input":"a"}')
    assert "hit" in cache_status(last)


async def test_duplicate_json_keys_are_not_read_two_ways(settings: Settings) -> None:
    """What is keyed is what is forwarded: a body of ours, with each key once."""
    spy = Spy()
    app = EmbeddingCacheMiddleware(server(spy), settings=settings)
    async with client(app) as c:
        for content in (b'{"model":"m","input":"a","input":"b"}', b'{"model":"x","model":"m","input":"b"}'):
            last = await c.post("/v1/embeddings", content=content, headers=JSON)
    assert [b'{"model":"m","input":"b"}'] == spy.bodies
    assert "hit" in cache_status(last)


async def test_a_wire_format_that_raises_harms_nobody(settings: Settings) -> None:
    """A user's format with a bug is a bypass, or a relayed answer, never a 500 of ours."""
    openai_format: Any = type(app_format())

    class Broken(openai_format):  # type: ignore[misc]  # a class found at run time
        name = "broken"

        def read(self, *_arguments: Any) -> Any:
            raise KeyError("read")

    class Worse(Broken):
        def split(self, *_arguments: Any) -> Any:
            raise KeyError("split")

    routes = {"/v1/embeddings": Broken(), "/embeddings": Worse()}
    inner = server(Spy())

    async def moved(scope: Scope, receive: Receive, send: Send) -> None:
        await inner({**scope, "path": "/v1/embeddings"}, receive, send)

    app = EmbeddingCacheMiddleware(moved, settings=settings, routes=routes)
    async with client(app) as c:
        for path in routes:
            response = await c.post(path, json={"model": "m", "input": ["a", "a"]})
            assert FORMATS["openai"][2]({"model": "m"}, ["a", "a"], Spy()) == response.json()
            assert "fwd=bypass" in cache_status(response)


def raising(*_arguments: Any) -> Any:
    """A format's mistake."""
    raise KeyError("x")


def replaced(**fields: Any) -> Any:
    """What the OpenAI format says, with other *fields*."""
    return lambda step, *arguments: dataclasses.replace(step(*arguments), **fields)


def doubled(step: Any, *arguments: Any) -> Any:
    """What the OpenAI format reads, with the first vector twice."""
    answer = step(*arguments)
    return dataclasses.replace(answer, values={kind: [read[0], *read] for kind, read in answer.values.items()})


MISTAKES: dict[str, tuple[str, Any]] = {
    "split raises": ("split", raising),
    "split gives nothing": ("split", lambda *_: None),
    "no inputs": ("split", replaced(inputs=())),
    "no representation": ("split", replaced(encodings=())),
    "inputs are texts": ("split", replaced(inputs=("a", "b"))),
    "no model": ("split", replaced(model=None)),
    "shrink raises": ("shrink", raising),
    "shrink gives text": ("shrink", lambda step, *arguments: step(*arguments).decode()),
    "read raises": ("read", raising),
    "read gives a document": ("read", lambda *_: {}),
    "a vector too many": ("read", doubled),
    "tokens are text": ("read", replaced(tokens="7")),
    "the frame is no JSON": ("read", replaced(frame={"fields": {"x": b""}, "usage": None, "item": {}})),
    "render raises": ("render", raising),
    "render gives nothing": ("render", lambda *_: None),
    "render gives no pieces": ("render", lambda *_: []),
    "render gives one piece": ("render", lambda step, *arguments: b"".join(step(*arguments))),
    "render gives texts": ("render", lambda step, *arguments: [piece.decode() for piece in step(*arguments)]),
}


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize(("step", "mistake"), MISTAKES.values(), ids=MISTAKES)
async def test_no_mistake_of_a_wire_format_is_an_error_of_the_app(
    step: str, mistake: Any, half: bool, redis_url: str
) -> None:
    """Whatever a user's format does or returns: cold, warm,
    partly stored and with a duplicate, the app's answer.
    """
    right = app_format()

    class Mistaken(type(right)):  # type: ignore[misc]  # a class found at run time
        name = "mistaken"

    setattr(Mistaken, step, lambda _self, *arguments: mistake(getattr(right, step), *arguments))
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_DTYPE="float16" if half else "float32")
    app = server(Spy())
    cached = EmbeddingCacheMiddleware(app, settings=settings, routes={"/v1/embeddings": Mistaken()})
    async with client(app) as bare, client(cached) as c:
        for items in (["a", "b"], ["a", "b"], ["b", "c"], ["a", "d", "d"]):
            body = {"model": "m", "input": items}
            expected, actual = [await each.post("/v1/embeddings", json=body) for each in (bare, c)]
            assert 200 == actual.status_code
            for one, other in zip(expected.json()["data"], actual.json()["data"], strict=True):
                assert np.allclose(one["embedding"], other["embedding"], atol=0.001 if half else 0)
    flights = shared_of(cached).flights
    assert ({}, 0) == (flights._by_name, flights.looking)


async def test_a_follower_whose_format_fails_later_gets_the_apps_answer(settings: Settings) -> None:
    """It waited for a flight that failed, and cannot ask for less: the app gets its original."""
    right, shrunk, open_ = app_format(), [0], asyncio.Event()

    class Tired(type(right)):  # type: ignore[misc]  # a class found at run time
        name = "tired"

        def shrink(self, *arguments: Any) -> Any:
            shrunk[0] += 1
            return right.shrink(*arguments) if shrunk[0] == 1 else None

    seen: list[bytes] = []

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(await read(receive))
        await open_.wait()
        await respond(send, b'{"error":"busy"}', 503)

    cached = EmbeddingCacheMiddleware(app, settings=settings, routes={"/v1/embeddings": Tired()})
    async with client(cached) as c:
        both = [asyncio.ensure_future(c.post("/v1/embeddings", json={"model": "m", "input": "a"})) for _ in range(2)]
        await asyncio.sleep(0.1)
        assert 1 == len(seen)
        open_.set()
        answers = await asyncio.gather(*both)
    assert [503, 503] == [answer.status_code for answer in answers]
    assert [False, True] == sorted("not-understood" in cache_status(answer) for answer in answers)
    assert answers[0].request.content == seen[1]


def app_format() -> Any:
    """The OpenAI format of the package."""
    from redis_asgi.embeddings.wire import WIRE_FORMATS

    return WIRE_FORMATS["openai"]
