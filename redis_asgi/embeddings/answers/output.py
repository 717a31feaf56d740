"""Answers of ours on their way out, in messages of moderate size."""

from starlette.types import Send

from ...asgi.problem import CONTENT_TYPE, problem
from ...time_slice import TimeSlice
from ..requests.http_caching import RawHeaders

_CHUNK = 256 * 1024  # bytes per body message
_IN_ONE = 1024 * 1024  # bytes of an answer that is sent as one message


async def send_joined(send: Send, status: int, headers: RawHeaders, pieces: list[bytes], time_slice: TimeSlice) -> None:
    """Send an answer whose body is *pieces*,
    joined so far that no copy stops the loop for long; takes them out.

    *headers* hold none that is about another body.
    """
    length = sum(map(len, pieces))
    headers = [*headers, (b"content-length", b"%d" % length)]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    if length <= _IN_ONE:
        await send({"type": "http.response.body", "body": b"".join(pieces), "more_body": False})
        return
    chunk: list[bytes] = []
    size = 0
    pieces.reverse()
    while pieces:
        piece = pieces.pop()  # each is freed once it is sent, and not all at the end
        chunk.append(piece)
        size += len(piece)
        if size >= _CHUNK:
            await send({"type": "http.response.body", "body": b"".join(chunk), "more_body": True})
            chunk, size = [], 0
            if time_slice.expired:
                await time_slice.checkpoint()
    await send({"type": "http.response.body", "body": b"".join(chunk), "more_body": False})


async def send_not_cached(send: Send) -> None:
    """The 504 that ``Cache-Control: only-if-cached`` asks for (RFC 9111, 5.2.1.7)."""
    body = problem(504, "Cache-Control: only-if-cached, and not every input is stored.")
    headers = [(b"content-type", CONTENT_TYPE), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 504, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
