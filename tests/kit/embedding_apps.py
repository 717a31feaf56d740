"""Embedding servers as pure ASGI apps, one per wire format: deterministic,
and they remember what they saw.
"""

import base64
import hashlib
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, cast

import httpx
import numpy as np
import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

DIMS = 6
Build = Callable[[dict[str, Any], list[Any], "Spy"], Any]


def vector(item: object, model: object, dims: int = DIMS) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The one right vector of an input, shape ``(dims,)``."""
    seed = hashlib.sha256(repr((item, model)).encode()).digest()
    return np.random.default_rng(int.from_bytes(seed[:8], "little")).standard_normal(dims).astype("<f4")


def as_floats(numbers: np.ndarray[Any, np.dtype[np.float32]], style: str) -> list[float]:
    """The numbers as a server prints them: float32 twins, shortest float32, or rounded float64."""
    if style == "twin":
        return cast("list[float]", numbers.tolist())
    if style == "shortest":
        return cast("list[float]", orjson.loads(orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY)))
    return [float(x) * (1 + 2**-40) for x in numbers]


def count_tokens(item: object) -> int:
    """Tokens of a token array are its length; a text has one per word and one more."""
    return len(item) if isinstance(item, list) else len(str(item).split()) + 1


def listed(value: object) -> list[Any]:
    """The inputs of a request as a list."""
    if isinstance(value, list) and value and not isinstance(value[0], int):
        return value
    return [value]


@dataclass
class Spy:
    """What an app was asked, and how it behaves."""

    style: str = "twin"
    dims: int = DIMS
    shuffle: random.Random | None = None
    honours_base64: bool = True
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[bytes, bytes]] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """How often it was called."""
        return len(self.bodies)


def openai(body: dict[str, Any], items: list[Any], spy: Spy) -> Any:
    """OpenAI's answer."""
    data = []
    for index, item in enumerate(items):
        numbers = vector(item, body.get("model"), spy.dims)
        value: Any = as_floats(numbers, spy.style)
        if body.get("encoding_format") == "base64" and spy.honours_base64:
            value = base64.b64encode(numbers.tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": value})
    if spy.shuffle is not None:
        spy.shuffle.shuffle(data)
    tokens = sum(map(count_tokens, items))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": body.get("model"), "usage": usage}


def ollama(body: dict[str, Any], items: list[Any], spy: Spy) -> Any:
    """Ollama's answer."""
    vectors = [as_floats(vector(item, body["model"], spy.dims), spy.style) for item in items]
    if "prompt" in body:
        return {"embedding": vectors[0]}
    tokens = sum(map(count_tokens, items))
    return {"model": body["model"], "embeddings": vectors, "total_duration": 7, "prompt_eval_count": tokens}


def cohere(body: dict[str, Any], items: list[Any], spy: Spy) -> Any:
    """Cohere's answer, version 2, and version 1 by type."""
    numbers = [vector(item, body["model"], spy.dims) for item in items]
    by_type: dict[str, Any] = {}
    for kind in body.get("embedding_types") or ["float"]:
        by_type[kind] = [
            as_floats(n, spy.style) if kind == "float" else base64.b64encode(n.tobytes()).decode() for n in numbers
        ]
    meta = {"api_version": {"version": "2"}, "billed_units": {"input_tokens": sum(map(count_tokens, items))}}
    answer = {"id": "abc", "embeddings": by_type, "texts": items, "meta": meta}
    return answer | {"response_type": "embeddings_by_type"}


def cohere_v1(body: dict[str, Any], items: list[Any], spy: Spy) -> Any:
    """Cohere's answer, version 1."""
    answer = cohere(body, items, spy)
    if body.get("embedding_types") is None:
        answer |= {"embeddings": answer["embeddings"]["float"], "response_type": "embeddings_floats"}
    return answer


def tei(body: dict[str, Any], items: list[Any], spy: Spy) -> Any:
    """TEI's answer."""
    return [as_floats(vector(item, body.get("prompt_name"), spy.dims), spy.style) for item in items]


FORMATS: dict[str, tuple[str, str, Build]] = {
    "openai": ("/v1/embeddings", "input", openai),
    "ollama": ("/api/embed", "input", ollama),
    "ollama_prompt": ("/api/embeddings", "prompt", ollama),
    "cohere": ("/v2/embed", "texts", cohere),
    "cohere_v1": ("/v1/embed", "texts", cohere_v1),
    "tei": ("/embed", "inputs", tei),
}


async def read(receive: Receive) -> bytes:
    """The whole body."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body
        body += bytes(message.get("body", b""))
        if not message.get("more_body", False):
            return body


async def respond(send: Send, body: bytes, status: int = 200, *headers: tuple[bytes, bytes]) -> None:
    """Send a whole answer, JSON unless *headers* say otherwise."""
    named = {name for name, _ in headers}
    own = [] if b"content-type" in named else [(b"content-type", b"application/json")]
    sent = [*own, (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": sent})
    await send({"type": "http.response.body", "body": body})


def server(spy: Spy, *, before: Callable[[Scope], Awaitable[None]] | None = None) -> ASGIApp:
    """An app that speaks every format."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        raw = await read(receive)
        spy.bodies.append(raw)
        spy.headers.append(dict(scope["headers"]))
        try:
            body = orjson.loads(raw)
            [(_, name, build)] = [entry for entry in FORMATS.values() if entry[0] == scope["path"]]
            items = listed(body[name])
            if not items or any(not item for item in items):
                raise ValueError("empty input")
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            await respond(send, orjson.dumps({"error": str(error), "got": len(raw)}), 400)
            return
        spy.seen += items
        if before is not None:
            await before(scope)
        await respond(send, orjson.dumps(build(body, items, spy)), 200, (b"x-app", b"yes"))

    return app


def client(app: ASGIApp, **headers: str) -> httpx.AsyncClient:
    """A client of *app*, without a socket."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app", headers=headers, timeout=30)


def cache_status(response: httpx.Response) -> str:
    """What the middleware says it did."""
    return str(response.headers.get("cache-status", ""))


async def drive(app: ASGIApp, scope: Scope, receive: Receive) -> list[Message]:
    """Call *app* and collect what it sends."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent
