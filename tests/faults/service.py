"""The app under test: limits that fail locally, open and closed, the cache,
and the pages, over one manager.

``uvicorn --factory tests.faults.service:served`` serves it, configured by the environment.
"""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import ASGIApp
from starlette.websockets import WebSocket

from redis_asgi import (
    EmbeddingCacheMiddleware,
    RateLimitMiddleware,
    RedisManager,
    Rule,
    Settings,
    client_ip,
    health_app,
    metrics_app,
    status_app,
)
from redis_asgi.settings import OnRedisError, StrategyName

from ..kit.embedding_apps import vector

MODES: tuple[OnRedisError, ...] = ("local", "open", "closed")


def numbers(text: str, credential: str) -> list[float]:
    """The one right vector of *text* for the owner of *credential*:
    no two callers may ever share one.
    """
    return [float(number) for number in vector(text, credential)]


class Endpoints:
    """The app behind the middlewares.

    Args:
        reached: A file that gets a line ``address source`` for each limited request that came
            through, so that the work of several processes can be counted without Redis; ``None`` =
            none.
    """

    def __init__(self, reached: Path | None = None) -> None:
        self._reached = -1 if reached is None else os.open(reached, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, connection: HTTPConnection) -> str:
        """Who decided about this request."""
        source = str(connection.state.rate_limit.source)
        if self._reached >= 0:
            address = connection.client.host if connection.client else "unknown"
            # One write in append mode is one line, whoever writes beside it.
            os.write(self._reached, f"{address} {source}\n".encode())
        return source

    async def limited(self, request: Request) -> Response:
        return Response(b"ok", headers={"x-source": self.note(request), "x-at": f"{time.monotonic()}"})

    async def upload(self, request: Request) -> Response:
        source = self.note(request)
        return JSONResponse({"read": len(await request.body())}, headers={"x-source": source})

    async def echo(self, socket: WebSocket) -> None:
        self.note(socket)
        await socket.accept()
        async for text in socket.iter_text():
            await socket.send_text(text)

    async def embed(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        texts = body["input"]
        credential = request.headers.get("authorization", "")
        data = [
            {"object": "embedding", "index": index, "embedding": numbers(text, credential)}
            for index, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        return JSONResponse({"object": "list", "data": data, "model": body["model"], "usage": usage})

    async def process(self, _request: Request) -> Response:
        """What this process holds, and its time."""
        return JSONResponse(held(), headers={"x-at": f"{time.monotonic()}"})


def held() -> dict[str, int]:
    """What this process holds: bytes of memory, tasks, open files."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    files = len(list(Path("/proc/self/fd").iterdir()))
    return {"resident": resident, "tasks": len(asyncio.all_tasks()), "files": files}


def build(
    manager: RedisManager,
    endpoints: Endpoints,
    *,
    quota: int = 5,
    strategy: StrategyName | None = None,
    sabotage: str = "",
) -> ASGIApp:
    """The finished app.

    Args:
        quota: Units of each client per hour, on each of ``/local``, ``/open`` and ``/closed``.
        sabotage: With ``vectors`` in it what is not to be shared is, with ``counters`` one client
            counts as many: what an oracle has to notice.
    """
    redis: dict[str, Any] = {"redis": manager, "settings": manager.settings}
    app: ASGIApp = Starlette(
        routes=[
            *(Route(f"/{mode}", endpoints.limited) for mode in MODES),
            Route("/local/upload", endpoints.upload, methods=["POST"]),
            WebSocketRoute("/local/socket", endpoints.echo),
            Route("/v1/embeddings", endpoints.embed, methods=["POST"]),
            Route("/process", endpoints.process),
            Mount("/health", health_app(**redis)),
            Mount("/optional", health_app(require_redis=False, **redis)),
            Mount("/metrics", metrics_app(**redis)),
            Mount("/status", status_app(**redis)),
        ]
    )
    app = EmbeddingCacheMiddleware(app, share="vectors" in sabotage, **redis)
    by = _by_connection if "counters" in sabotage else client_ip
    rules = [
        Rule(f"{quota}/hour", name=mode, paths=f"/{mode}*", partition_by=by, on_redis_error=mode, strategy=strategy)
        for mode in MODES
    ]
    return RateLimitMiddleware(app, rules=rules, **redis)


def _by_connection(connection: HTTPConnection) -> str:
    return str(connection.client) + connection.headers.get("x-connection", "")


def served() -> ASGIApp:
    """The app as the environment describes it: ``FAULTS_QUOTA``,
    ``FAULTS_REACHED``, ``FAULTS_SABOTAGE``.
    """
    manager = RedisManager(Settings())
    reached = os.environ.get("FAULTS_REACHED")
    return build(
        manager,
        Endpoints(Path(reached) if reached else None),
        quota=int(os.environ["FAULTS_QUOTA"]),
        sabotage=os.environ.get("FAULTS_SABOTAGE", ""),
    )
