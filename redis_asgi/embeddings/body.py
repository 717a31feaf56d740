"""Reading a request's body without taking it from the app: what was read can be replayed, to the byte."""

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.types import Message, Receive

from .sub_call import TOGETHER, Budget


@dataclass(frozen=True, slots=True)
class Body:
    """What was read of a request.

    Attributes:
        messages: As they came, small ones put together.
        content: The whole body; ``None`` when it was not read to its end.
    """

    messages: Sequence[Message]
    content: bytes | None

    def replay(self, receive: Receive) -> Receive:
        """A ``receive`` that gives what was read, then what *receive* gives."""
        messages = iter(self.messages)

        async def replayed() -> Message:
            for message in messages:
                return message
            return await receive()

        return replayed


async def read_body(receive: Receive, limit: int, budget: Budget) -> tuple[Body, int]:
    """Read up to *limit* bytes; stops at a disconnect and where *budget* ends.

    Returns:
        What was read, and how many bytes of *budget* it holds.
    """
    messages: list[Message] = []
    chunks: list[bytes] = []
    held = 0
    try:
        while True:
            message = await receive()
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
                return Body(messages, chunks[0] if len(chunks) == 1 else b"".join(chunks)), held
    except BaseException:
        # Cancelled, or stopped by what stands outside of us.
        budget.give(held)
        raise
