"""Callers that wait, go and are cancelled, and gates that hold the app."""

import asyncio
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Scope

from redis_asgi import EmbeddingCacheMiddleware

from ..kit.inside import shared_of
from ..kit.patience import quiet


class Gate:
    """An app's pause: it says when it is reached, and goes on when told to."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def __call__(self, _scope: Scope) -> None:
        self.reached.set()
        await self.open.wait()


class Caller:
    """One request, driven by hand, that can disconnect or be cancelled."""

    def __init__(self, app: ASGIApp, *items: Any, **headers: str) -> None:
        body = orjson.dumps({"model": "m", "input": list(items)})
        raw = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        raw += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self.scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/embeddings",
            "query_string": b"",
            "headers": raw,
        }
        self.sent: list[Message] = []
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._messages.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self.task = asyncio.ensure_future(app(self.scope, self._messages.get, self._send))

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    def disconnect(self) -> None:
        """The client goes away."""
        self._messages.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int:
        """Of its answer."""
        return int(self.sent[0]["status"])

    @property
    def said(self) -> str:
        """Its Cache-Status."""
        return str(dict(self.sent[0]["headers"]).get(b"cache-status", b""), "latin-1")

    @property
    def answer(self) -> Any:
        """Its body."""
        return orjson.loads(b"".join(m.get("body", b"") for m in self.sent[1:]))


async def quiet_of(app: EmbeddingCacheMiddleware) -> None:
    """Let whatever was begun come to where it waits for the test."""
    await quiet(shared_of(app).vectors.manager)
