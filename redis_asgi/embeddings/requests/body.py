"""Reading a request's body without taking it from the app:
what was read can be replayed, to the byte.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.types import Message, Receive

from ...asgi.body_budget import TOGETHER, Budget


@dataclass(frozen=True, slots=True)
class Body:
    """The part of a request that was read.

    Attributes:
        messages: As they came, small ones put together.
        content: The whole body; ``None`` when it was not read to its end.
        coming: The next message, which did not come in time.
    """

    messages: Sequence[Message]
    content: bytes | None
    coming: "asyncio.Task[Message] | None" = None

    def replay(self, receive: Receive) -> Receive:
        """A ``receive`` that gives what was read, then what *receive* gives."""
        messages = [*reversed(self.messages)]
        coming = self.coming

        async def replayed() -> Message:
            nonlocal coming
            if messages:
                return messages.pop()  # and is let go
            if coming is not None:
                # Shielded: an app that stops waiting for it may ask again.
                message = await asyncio.shield(coming)
                coming = None
                return message
            return await receive()

        return replayed


NOTHING_READ = Body((), None)


async def read_body(receive: Receive, limit: int, budget: Budget, seconds: float) -> tuple[Body, int]:
    """Read up to *limit* bytes in up to *seconds*; stops at a disconnect and where *budget* ends.

    Who sends a little and then waits holds memory that others need;
    nothing is held before the first bytes are there.

    Returns:
        What was read, and how many bytes of *budget* it holds.
    """
    messages: list[Message] = []
    chunks: list[bytes] = []
    held = 0
    deadline = 0.0
    coming: asyncio.Task[Message] | None = None
    try:
        while True:
            if not messages:
                message = await receive()
            else:
                deadline = deadline or asyncio.get_running_loop().time() + seconds
                coming = asyncio.ensure_future(_next(receive))
                # Not a time-out around it: a message that comes while it is cancelled could be
                # lost.
                await asyncio.wait({coming}, timeout=deadline - asyncio.get_running_loop().time())
                if not coming.done():
                    return Body(messages, None, coming), held
                message, coming = coming.result(), None
            chunk = message.get("body", b"")
            if message["type"] != "http.request" or held + len(chunk) > limit or not budget.take(len(chunk)):
                return Body([*messages, message], None), held
            held += len(chunk)
            if chunks and len(chunks[-1]) + len(chunk) <= TOGETHER:
                messages.pop()
                chunk = chunks.pop() + chunk
                message = {**message, "body": chunk}
            messages.append(message)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return Body(messages, bytes(chunks[0]) if len(chunks) == 1 else b"".join(chunks)), held
    except BaseException:
        # Cancelled, or stopped by what stands outside of us.
        let_go(coming)
        budget.give(held)
        raise


def let_go(coming: "asyncio.Task[Message] | None") -> None:
    """Wait no more for a message that will not be asked for;
    once it has come or failed, that is all.
    """
    if coming is not None and not coming.cancel() and not coming.cancelled():
        coming.exception()  # seen


async def _next(receive: Receive) -> Message:
    return await receive()
