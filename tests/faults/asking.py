"""One request to the app under test, without a socket, and its answer."""

import asyncio
import time
from dataclasses import dataclass
from itertools import count
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Scope

from ..ratelimit.harness import http_scope
from .service import numbers

Header = tuple[bytes, bytes]
_PORTS = count(1024)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, and how long its last byte took, in seconds."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return orjson.loads(self.body)

    @property
    def is_degraded(self) -> bool:
        """Whether the app was told that Redis had not decided."""
        return self.headers.get("x-source") in ("local", "none")


class Exchange:
    """One request: ``await run()`` for its answer; `steps` for one that has nothing to wait for."""

    def __init__(self, app: ASGIApp, path: str, *headers: Header, body: bytes = b"", **scope: Any) -> None:
        self._app = app
        self._scope: Scope = http_scope(path=path, raw_path=path.encode(), headers=[*headers], state={}, **scope)
        self._messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        self._sent: list[Message] = []
        self._is_over = asyncio.Event()
        self._ended = 0.0

    async def _receive(self) -> Message:
        if self._messages:
            return self._messages.pop()
        await self._is_over.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self._sent.append(message)
        self._ended = time.perf_counter()
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_over.set()

    async def run(self) -> Answer:
        """The answer."""
        began = time.perf_counter()
        await self._app(self._scope, self._receive, self._send)
        return self._answer(self._ended - began)

    def waits(self) -> bool:
        """Whether the request, run now, has to wait for anything at all; to be called within the
        loop.
        """
        running = self._app(self._scope, self._receive, self._send).__await__()
        try:
            next(running)
        except StopIteration:
            return False
        running.close()
        return True

    def _answer(self, seconds: float) -> Answer:
        start = self._sent[0]
        headers = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        body = b"".join(message.get("body", b"") for message in self._sent[1:])
        return Answer(start["status"], headers, body, seconds)


def limited(app: ASGIApp, mode: str, client: str) -> Exchange:
    """A request from the address *client* that the limit of *mode* covers."""
    return Exchange(app, f"/{mode}", client=(client, next(_PORTS)))


def embedding(app: ASGIApp, credential: str, *texts: str) -> Exchange:
    """A request for the vectors of *texts*."""
    headers = ((b"content-type", b"application/json"), (b"authorization", credential.encode()))
    return Exchange(app, "/v1/embeddings", *headers, body=embedding_body(texts), method="POST")


def embedding_body(texts: tuple[str, ...]) -> bytes:
    """The body of a request for the vectors of *texts*."""
    return orjson.dumps({"model": "m", "input": texts})


def assert_right(body: bytes, credential: str, texts: tuple[str, ...]) -> None:
    """*body* has the vectors of *texts* for *credential*, in their order, and nobody else's."""
    data = orjson.loads(body)["data"]

    assert list(range(len(texts))) == [entry["index"] for entry in data]
    assert [numbers(text, credential) for text in texts] == [entry["embedding"] for entry in data], (credential, texts)
