"""Workers with the cache before one app,
driven step by step and judged by what the app alone would answer.
"""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Literal, Self

import redis
from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Scope
from starlette.types import Send as SendMessage

from redis_asgi.connection.manager import RedisManager
from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.maintenance import FlushError, flush_model
from redis_asgi.settings import Settings

from ...kit.embedding_apps import read, respond
from ...kit.inside import shared_of
from ...kit.patience import PATIENCE
from ...kit.proxy import FaultProxy, Mode
from .asks import Ask, Request
from .judge import Call, Config, Judge, Through, Violation
from .quirks import App, Quirks

# Steps.


@dataclass(frozen=True)
class Send:
    """One request, at one worker."""

    ask: Ask
    worker: int = 0


@dataclass(frozen=True)
class Together:
    """Several at once, while the app does not answer yet; some leave,
    or are cancelled, before it does.
    """

    asks: tuple[tuple[Ask, Literal["stays", "leaves", "cancelled"]], ...]
    worker: int = 0


@dataclass(frozen=True)
class Tick:
    """Time passes."""

    seconds: float


@dataclass(frozen=True)
class Refuse:
    """The app knows somebody no more, or (0) again."""

    who: str
    status: int


@dataclass(frozen=True)
class Deploy:
    """The other deployment answers from now on."""


@dataclass(frozen=True)
class Down:
    """The app answers a status instead, raises (-1), or is well again (0)."""

    status: int


@dataclass(frozen=True)
class Retrain:
    """The model is another one behind its name;
    the operator flushes it and waits as long as is documented.
    """


@dataclass(frozen=True)
class Cut:
    """A worker loses its Redis."""

    worker: int
    mode: Mode = "refuse"


@dataclass(frozen=True)
class Mend:
    """And has it back."""

    worker: int


@dataclass(frozen=True)
class Forget:
    """Redis loses all it has."""


Step = Send | Together | Tick | Refuse | Deploy | Down | Retrain | Cut | Mend | Forget


class World:
    """See the module."""

    def __init__(self, quirks: Quirks, config: Config, url: str, prefix: str, workers: int = 1) -> None:
        self.app = App(quirks)
        self.config = config
        self.judge = Judge(self.app, config)
        self._gate: asyncio.Event | None = None
        self._url = url
        self._prefix = prefix
        self._count = workers
        self._workers: list[EmbeddingCacheMiddleware] = []
        self._managers: list[RedisManager] = []
        self._proxies: list[FaultProxy] = []
        self._cut: set[int] = set()
        self._stack = AsyncExitStack()

    @property
    def _memory(self) -> bool:
        return self._url.startswith("memory")

    async def __aenter__(self) -> Self:
        for worker in range(self._count):
            url = self._url
            if not self._memory:
                host, port = url.removeprefix("redis://").split("/")[0].split(":")
                self._proxies.append(await self._stack.enter_async_context(FaultProxy(host, int(port))))
                url = self._proxies[-1].url
            if not self._memory or not self._managers:
                self._managers.append(RedisManager(Settings(REDIS_URL=url, **self._settings())))
            self._workers.append(self._build(worker))
        return self

    async def __aexit__(self, *exc: object) -> None:
        for worker in self._workers:
            await shared_of(worker).flights.settle()
        for manager in self._managers:
            await manager.close()
        await self._stack.aclose()

    def _settings(self) -> dict[str, Any]:
        return {
            "REDIS_KEY_PREFIX": self._prefix,
            "EMBEDDING_CACHE_TIMEOUT": 5,
            "EMBEDDING_CACHE_USAGE": self.config.usage,
            **({"EMBEDDING_CACHE_IGNORED_HEADERS": self.config.ignored} if self.config.ignored else {}),
            "EMBEDDING_CACHE_L1_BYTES": 64 * 1024 * 1024 if self.config.local else 0,
        }

    def _build(self, worker: int) -> EmbeddingCacheMiddleware:
        async def app(scope: Scope, receive: Receive, send: SendMessage) -> None:
            await self._answer(worker, scope, receive, send)

        def tenant(conn: HTTPConnection) -> str | None:
            return conn.headers.get("x-tenant")

        made = EmbeddingCacheMiddleware(
            app,
            namespace="fuzz",
            share=self.config.share,
            lease=self.config.lease,
            partition_by=tenant if self.config.partition else None,
            redis=self._managers[-1],
        )
        shared_of(made).clock.wall = shared_of(made).clock.monotonic = lambda: self.judge.now
        return made

    async def _answer(self, worker: int, scope: Scope, receive: Receive, send: SendMessage) -> None:
        raw = await read(receive)
        if self.app.quirks.keeps:
            raw = (scope if self.app.quirks.keeps == "scope" else scope["state"]).setdefault("parsed_body", raw)
        request = Request(scope, raw)
        call = Call(worker, self.judge.now, request.sides, 500, self.app.state.deployment, len(request.items))
        if worker not in self._cut:
            call.seen_at = self.judge.now
        self.judge.calls.append(call)
        if self._gate is not None:
            await self._gate.wait()
        reply = self.app.answer(scope, raw)
        call.status = reply.status
        await respond(send, reply.body, reply.status, *reply.headers)

    # Playing.

    async def play(self, steps: Sequence[Step]) -> None:
        """Take *steps*, one after the other.

        Raises:
            Violation: Of the first that goes wrong.
        """
        for at, step in enumerate(steps):
            try:
                await self._take(step)
            except Violation as error:
                raise Violation(f"step {at}: {error}") from None

    async def _take(self, step: Step) -> None:
        state = self.app.state
        self.judge.now += 0.01
        match step:
            case Send(ask, worker):
                await self._send(ask, worker % self._count)
            case Together(asks, worker):
                await self._together(asks, worker % self._count)
            case Tick(seconds):
                self.judge.now += seconds
            case Refuse(who, 0):
                state.refused.pop(who, None)
            case Refuse(who, status):
                state.refused[who] = status
            case Deploy():
                state.deployment = "spare" if state.deployment == "primary" else "primary"
            case Down(status):
                state.down = status
            case Retrain():
                await self._retrain()
            case Cut(worker, mode):
                await self._lose(worker % self._count, mode)
            case Forget():
                if not self._memory:
                    redis.Redis.from_url(self._url).flushdb()
            case Mend(worker):
                await self._mend(worker % self._count)

    async def _retrain(self) -> None:
        for worker in tuple(self._cut):
            await self._mend(worker)
        self.app.state.weights += 1
        for model in ("", "m", "m2"):
            await self._flush(model)
        self.judge.now += 6  # EMBEDDING_CACHE_L1_SECONDS and one

    async def _flush(self, model: str) -> None:
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    await flush_model(model, namespace="fuzz", redis=self._managers[0])
                except FlushError:  # over a connection that was cut before
                    continue
                return

    async def _lose(self, worker: int, mode: Mode) -> None:
        if not self._memory:
            self._cut.add(worker)
            await self._proxies[worker].set(mode)

    async def _mend(self, worker: int) -> None:
        if worker not in self._cut:
            return
        await self._proxies[worker].set("pass")
        self._cut.discard(worker)
        probe = Ask({"model": "probe", "input": ["x"]}, (("x-tenant", "t"),))
        async with asyncio.timeout(PATIENCE):
            while self._managers[worker].breaker().state != "closed":
                # It lets one request through to see, once its own probe was answered.
                await self._drive(probe, worker)
                await asyncio.sleep(0.02)
        for call in self.judge.calls:
            if call.worker == worker and call.seen_at is None:
                call.seen_at = self.judge.now

    async def _send(self, ask: Ask, worker: int) -> None:
        start = len(self.judge.calls)
        through = await self._drive(ask, worker)
        self.judge.judge(ask, worker, through, start)
        self.judge.weigh(ask, worker, through, self.judge.calls[start:])

    async def _together(self, asks: Sequence[tuple[Ask, str]], worker: int) -> None:
        start, self._gate = len(self.judge.calls), asyncio.Event()
        gone = [asyncio.Event() for _ in asks]
        tasks: list[asyncio.Task[Through]] = []
        for (ask, _), left in zip(asks, gone, strict=True):
            tasks.append(asyncio.create_task(self._drive(ask, worker, left)))
            await asyncio.sleep(0.002)
        for (_, fate), task, left in zip(asks, tasks, gone, strict=True):
            if fate == "cancelled":
                task.cancel()
            elif fate == "leaves":
                left.set()
        await asyncio.sleep(0)
        self._gate.set()
        await asyncio.wait(tasks)
        self._gate = None
        await self._workers[worker]._shared.flights.settle()
        for (ask, fate), task in zip(asks, tasks, strict=True):
            if fate == "stays":
                if task.cancelled():
                    raise Violation(f"{ask}: cancelled by nobody")
                self.judge.judge(ask, worker, task.result(), start)
        calls = len(self.judge.calls) - start
        # Its own, what others did not bring, and the original:
        # all are on their way before anything is known.
        if calls > 3 * len(asks):
            raise Violation(f"{calls} calls for {len(asks)} requests")

    async def _drive(self, ask: Ask, worker: int, left: asyncio.Event | None = None) -> Through:
        through = Through(ask.scope())
        body, gone = [ask.raw], left or asyncio.Event()

        async def receive() -> Message:
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                through.status, through.headers = message["status"], list(message["headers"])
            else:
                through.body += message.get("body", b"")
                if not message.get("more_body", False):
                    gone.set()

        try:
            await self._workers[worker](through.scope, receive, send)
        except Exception as error:
            through.error = error
        return through
