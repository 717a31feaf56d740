"""The computations that an app below the embedding cache has really made."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, TypeAlias

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..embeddings import EmbeddingCache, EmbeddingCacheMiddleware
from ..embeddings.requests.routes import Endpoint, Routes
from ..embeddings.shared import Shared
from ..embeddings.wire import Batch
from .replaced import replaced

Calls: TypeAlias = list[list[Any]]


@contextmanager
def recorded_embedding_calls() -> Iterator[Calls]:
    """The inputs of each call that an app below an `EmbeddingCacheMiddleware` gets meanwhile, in
    the order of calls.

    Texts are strings, token arrays lists. Of a request that passes through, all inputs are
    computed; a body that the cache cannot split is one input, itself.
    `EmbeddingCache.get_or_compute` adds the ids that it has computed.
    """
    calls: Calls = []
    watched: dict[Shared, ASGIApp] = {}

    def watching(call: Callable[..., Any]) -> Callable[..., Any]:
        async def watched_call(self: Any, scope: Scope, receive: Receive, send: Send) -> None:
            shared = self._shared
            if shared not in watched:
                watched[shared] = shared.app
                shared.app = _noting(shared.app, self._routes, calls)
            await call(self, scope, receive, send)

        return watched_call

    def computing(get_or_compute: Callable[..., Any]) -> Callable[..., Any]:
        async def watched_one(self: Any, context_ids: Sequence[str], compute: Callable[..., Any]) -> Any:
            return await get_or_compute(self, context_ids, _noting_ids(compute, calls))

        return watched_one

    with ExitStack() as stack:
        stack.enter_context(replaced(EmbeddingCacheMiddleware, "__call__", watching))
        stack.enter_context(replaced(EmbeddingCache, "get_or_compute", computing))
        try:
            yield calls
        finally:
            for shared, app in watched.items():
                shared.app = app


def _noting(app: ASGIApp, routes: Routes, calls: Calls) -> ASGIApp:
    """*app*, whose requests are noted when it has read them."""

    async def noted(scope: Scope, receive: Receive, send: Send) -> None:
        pieces: list[bytes] = []

        async def reading() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                pieces.append(message.get("body", b""))
                if not message.get("more_body", False):
                    calls.append(_inputs(routes.match(scope), b"".join(pieces)))
            return message

        await app(scope, reading, send)

    return noted


def _inputs(matched: Endpoint | None, body: bytes) -> list[Any]:
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        return [body]
    try:
        batch = matched.wire.split(fields, matched.path_model) if matched is not None else None
    except Exception:
        batch = None  # of what a client sends; the cache lets it pass
    return [orjson.loads(each.json) for each in batch.inputs] if isinstance(batch, Batch) else [fields]


def _noting_ids(compute: Callable[..., Any], calls: Calls) -> Callable[..., Any]:
    if iscoroutinefunction(compute) or iscoroutinefunction(type(compute).__call__):

        async def noted(missing: list[str]) -> Any:
            calls.append(list(missing))
            return await compute(missing)

        return noted

    @wraps(compute, updated=())
    def noted_here(missing: list[str]) -> Any:
        calls.append(list(missing))
        return compute(missing)

    return noted_here
