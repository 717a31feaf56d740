"""One call of the wrapped app with a body of ours,
its answer held back until it is known what it is.
"""

import asyncio
import zlib
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Scope, Send

from ...asgi.body_budget import TOGETHER, Budget
from ...time_slice import TimeSlice
from ..requests.http_caching import RawHeaders, by_name, is_encoded, is_gzip, is_json

ANSWERS = (200, 201)  # other statuses of success say something else than that this is all of it
_INFLATED_AT_ONCE = 256 * 1024  # bytes between two looks at the clock

_RESULT = "embedding_cache_result"
_OURS = frozenset({"extensions", "headers", "state", _RESULT})  # which are set for each call

# Ways to answer that bypass the body messages we read.
_UNREADABLE_EXTENSIONS = frozenset(
    {
        "http.response.early_hint",
        "http.response.pathsend",
        "http.response.push",
        "http.response.trailers",
        "http.response.zerocopysend",
    }
)


@dataclass(frozen=True, slots=True)
class AppReply:
    """A complete answer in JSON.

    Attributes:
        status: 200 or 201.
        headers: As the app sent them.
        body: As the app sent it; compressed only where that was asked for.
    """

    status: int
    headers: RawHeaders
    body: bytes


async def _nowhere(_message: Message) -> None:
    """Take a message and drop it."""


class Untouched:
    """A request's scope as it came, for each call of the app;
    what a call sets in it is not there for the next one.

    An app keeps in its scope what it has read, and finds it again:
    a parsed body, say, which is another call's.
    """

    def __init__(self, scope: Scope) -> None:
        self._outside = scope
        self._scope = dict(scope)
        self._state = dict(scope["state"])

    @property
    def headers(self) -> RawHeaders:
        """As the client sent them."""
        headers: RawHeaders = self._scope["headers"]
        return headers

    def copy(self) -> Scope:
        """A scope for one call, with a state of its own, in which is what the cache has to say."""
        state = self._outside["state"]
        said = {_RESULT: state[_RESULT]} if _RESULT in state else {}
        return {**self._scope, "state": self._state | said}

    def show(self, inside: Scope) -> None:
        """Let what stands outside see what a call has set in its copy *inside*, such as its
        ``route``.
        """
        for mine, theirs, before in (
            (self._outside, inside, self._scope),
            (self._outside["state"], inside["state"], self._state),
        ):
            for name, value in theirs.items():
                if name not in _OURS and before.get(name, self) is not value:
                    mine[name] = value


class AppCall:
    """The app's view: a request with our body, a ``receive`` that then waits,
    a ``send`` that works as usual.

    Args:
        app: The wrapped app.
        scope: The request's, of which the app gets a copy.
        headers: For *body*.
        body: What the app reads.
        limit: Bytes of an answer that are held back at most; a larger one can only be relayed.
        budget: What all calls may hold together.

    Attributes:
        reply: Resolves to the `AppReply`,
            or to ``None`` when the answer can only be relayed, or there is none.
        start: The app's ``http.response.start``, once it has come.
        error: What the app raised, once it has.
        cancelled: Whether we ended it, as no request waited any more;
            what it raised is then dropped.
    """

    def __init__(
        self,
        app: ASGIApp,
        scope: "Untouched",
        headers: RawHeaders,
        body: bytes,
        *,
        limit: int,
        budget: Budget,
    ) -> None:
        self._app = app
        self._scope = scope.copy()
        extensions = self._scope.get("extensions") or {}
        kept = {name: value for name, value in extensions.items() if name not in _UNREADABLE_EXTENSIONS}
        self._scope.update(extensions=kept, headers=headers)
        self._untouched = scope
        self._body: bytes | None = body
        self._gzip = (b"accept-encoding", b"gzip") in headers
        self._limit = limit
        self._budget = budget
        loop = asyncio.get_running_loop()
        self.reply: asyncio.Future[AppReply | None] = loop.create_future()
        self.start: Message | None = None
        self.error: BaseException | None = None
        self.cancelled = False
        self._sink: asyncio.Future[Send] = loop.create_future()
        self._hung_up = asyncio.Event()
        self._ended = asyncio.Event()
        self._kept: list[Message] = []
        self._held = 0
        self._flowing = False  # messages go to the sink
        self._drained = False  # as they come, nothing is kept any more
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> "asyncio.Task[None]":
        """Call the app, in a task with this context's variables."""
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(self._end)
        return self._task

    @property
    def status(self) -> int | None:
        """The answer's status; ``None`` before it starts."""
        return self.start["status"] if self.start is not None else None

    @property
    def headers(self) -> RawHeaders:
        """The answer's headers; none before it starts."""
        return self.start.get("headers", ()) if self.start is not None else ()

    def hang_up(self) -> None:
        """Let the app see a disconnect: no request waits for its answer any more."""
        self._hung_up.set()

    def discard(self) -> None:
        """Let the rest of the answer go nowhere."""
        if not self._sink.done():
            self._sink.set_result(_nowhere)

    async def give_up(self) -> None:
        """End the call: the request will be put to the app once more, and never twice at a time."""
        self.discard()
        self.hang_up()
        if self._task is not None and not self._complete:
            self._task.cancel()
        await self._ended.wait()

    def cancel(self) -> None:
        """End the call as a server does that cancels its request."""
        self.cancelled = True
        self.discard()
        self.hang_up()
        if self._task is not None:
            self._task.cancel()

    async def relay(self, send: Send) -> None:
        """Pass the answer on, what is held first; returns when it is complete or the app has ended."""
        if not self._sink.done():
            self._sink.set_result(send)
        if self._flowing:
            await self._ended.wait()
            return
        for message in self._kept:
            await send(message)

    @property
    def _complete(self) -> bool:
        return self.reply.done() and not self._flowing and self.reply.result() is not None

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
        except BaseException as error:
            # Kept for the request that gets this answer, which raises it again.
            self.error = error
            if not isinstance(error, Exception):
                raise

    def _promising(self, start: Message) -> bool:
        fields = by_name(start.get("headers", ()))
        readable = not is_encoded(fields) or (self._gzip and is_gzip(fields))
        return start["status"] in ANSWERS and is_json(fields) and readable

    def _end(self, _task: "asyncio.Task[None]") -> None:
        self._untouched.show(self._scope)
        # Not in `_run`: a task that is cancelled before its first step runs none of its code.
        if not self.reply.done():
            self.reply.set_result(None)
        self._budget.give(self._held)
        self._held = 0
        self._hung_up.set()
        self._ended.set()

    async def _receive(self) -> Message:
        body, self._body = self._body, None
        if body is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        await self._hung_up.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._drained:
            await self._sink.result()(message)
            return
        if self._flowing:
            self._kept.append(message)  # of another task of the app, after what is on its way
            return
        if message["type"] == "http.response.start":
            # An app may pass headers that can be read only once.
            self.start = {**message, "headers": [*message.get("headers", ())]}
            self._untouched.show(self._scope)
            self._kept.append(self.start)
            if not self._promising(self.start):
                await self._flow()
        elif message["type"] == "http.response.body":
            body = message.get("body", b"")
            self._keep(message, body)
            held = self._held + len(body)
            if held > self._limit or not self._budget.take(len(body)):
                await self._flow()
                return
            self._held = held
            if not message.get("more_body", False):
                self._finish()
        else:
            self._kept.append(message)

    def _keep(self, message: Message, body: bytes) -> None:
        last: Message = self._kept[-1] if self._kept else {}
        before = last.get("body", b"")
        if last.get("more_body", False) and len(before) + len(body) <= TOGETHER:
            self._kept.pop()
            message = {**message, "body": b"%b%b" % (before, body)}
        self._kept.append(message)

    def _finish(self) -> None:
        bodies = [m.get("body", b"") for m in self._kept if m["type"] == "http.response.body"]
        whole = bytes(bodies[0]) if len(bodies) == 1 else b"".join(bodies)
        if not self.reply.done():
            self.reply.set_result(
                AppReply(self.start["status"], self.headers, whole) if self.start is not None else None
            )
        self._hung_up.set()

    async def _flow(self) -> None:
        """Leave the answer to be understood elsewhere, and wait until it is taken."""
        if not self.reply.done():
            self.reply.set_result(None)
        self._flowing = True
        sink = await asyncio.shield(self._sink)
        self._budget.give(self._held)
        self._held = 0
        try:
            for message in self._kept:  # which may get longer
                await sink(message)
        finally:
            self._kept, self._drained = [], True


async def inflated(reply: AppReply, limit: int, budget: Budget, time_slice: TimeSlice) -> tuple[bytes | None, int]:
    """The body of *reply*, not compressed, and how many bytes of *budget* it holds.

    ``None`` when it is not the gzip that it says, or more than *limit* bytes.
    """
    if not is_encoded(by_name(reply.headers)):
        return reply.body, 0
    inflating = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    pieces: list[bytes] = []
    held, left = 0, reply.body
    try:
        while left and not inflating.eof:
            piece = inflating.decompress(left, _INFLATED_AT_ONCE)
            left = inflating.unconsumed_tail
            if held + len(piece) > limit or not budget.take(len(piece)):
                return None, held
            held += len(piece)
            pieces.append(piece)
            if time_slice.expired:
                await time_slice.checkpoint()
    except zlib.error:
        return None, held
    except BaseException:
        budget.give(held)
        raise
    return (b"".join(pieces) if inflating.eof and not inflating.unused_data else None), held
