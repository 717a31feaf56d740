"""Apps and drivers that the middleware's tests share."""

import itertools
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redis_asgi import RedisManager, Settings
from redis_asgi.ratelimit.counting.settlement import Change
from redis_asgi.ratelimit.counting.verdict import Verdict
from redis_asgi.ratelimit.limits.charge import counters_of
from redis_asgi.ratelimit.transport.batcher import Batcher
from redis_asgi.ratelimit.transport.cluster_batcher import ClusterBatcher, make_batcher

from ..kit.patience import until_calm

MEMORY = Settings(REDIS_URL="memory://")
_prefixes = itertools.count()


def own_prefix() -> str:
    """A prefix of keys that no other test has."""
    return f"t{next(_prefixes)}:"


def memory(**values: Any) -> Settings:
    """Settings on ``memory://``; a prefix of their own keeps tests apart that share the manager."""
    return Settings(REDIS_URL="memory://", **values)


@asynccontextmanager
async def client_of(app: ASGIApp, *, address: str = "203.0.113.7") -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client in front of *app*, from *address*."""
    transport = httpx.ASGITransport(app, client=(address, 50_000))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def statuses(app: ASGIApp, count: int, path: str = "/", **request: Any) -> list[int]:
    """The status codes of *count* requests in turn."""
    method = request.pop("method", "GET")
    address = request.pop("address", "203.0.113.7")
    async with client_of(app, address=address) as client:
        return [(await client.request(method, path, **request)).status_code for _ in range(count)]


class Spy:
    """A raw ASGI app that counts its calls and keeps what it received."""

    def __init__(self, *, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = (), body: bytes = b"ok") -> None:
        self.calls = 0
        self.bodies: list[bytes] = []
        self.scopes: list[Scope] = []
        self._start = {"type": "http.response.start", "status": status, "headers": list(headers)}
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        self.scopes.append(scope)
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.bodies.append(body)
        await send(dict(self._start))
        await send({"type": "http.response.body", "body": self._body})


def http_scope(**changes: Any) -> Scope:
    """An HTTP scope as a server makes it."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/",
        "raw_path": b"/",
        "root_path": "",
        "query_string": b"",
        "headers": [],
        "client": ("203.0.113.7", 50_000),
        "server": ("testserver", 80),
    }
    return {**scope, **changes}


def websocket_scope(**changes: Any) -> Scope:
    """A WebSocket handshake as a server makes it."""
    scope = http_scope(type="websocket", scheme="ws", subprotocols=[])
    del scope["method"]
    return {**scope, **changes}


async def drive(app: ASGIApp, scope: Scope, *messages: Message) -> list[Message]:
    """Run *app* once: it receives *messages* in turn, then disconnects; what it sent."""
    waiting = list(messages) or [{"type": "http.request", "body": b"", "more_body": False}]
    gone: Message = {"type": "http.disconnect" if scope["type"] == "http" else "websocket.disconnect", "code": 1005}
    sent: list[Message] = []

    async def receive() -> Message:
        return waiting.pop(0) if waiting else gone

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def header(message: Message, name: bytes) -> bytes | None:
    """The value of a response's header, ``None`` when it has none."""
    return next((value for key, value in message["headers"] if key.lower() == name), None)


async def all_answered(manager: RedisManager) -> None:
    """Wait until all that is to be sent has been answered:
    what a response has changed is settled behind it.
    """
    batchers: Sequence[Batcher] = ()
    if manager.has_redis:
        made = manager.per_client(make_batcher)
        batchers = tuple(made._batchers.values()) if isinstance(made, ClusterBatcher) else (made,)
    await until_calm(lambda: any(each._waiting or each._sent or each._transport.busy for each in batchers))


def changes_of(verdict: Verdict, deltas: Sequence[int]) -> list[Change]:
    """The changes of *deltas*, one for each counter that *verdict* charged, for `Engine.settle`."""
    both = zip(counters_of(verdict.charges), deltas, strict=True)
    return [(at, charge, policy, delta) for at, ((charge, policy), delta) in enumerate(both) if delta]
