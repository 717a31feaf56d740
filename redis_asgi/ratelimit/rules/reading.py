"""Reading a request's body for the rules that ask it: once,
within bounds, and only where there is one.
"""

from collections.abc import Sequence

from starlette.requests import HTTPConnection, Request
from starlette.types import Scope

from ...asgi.bodies import Buffer, Document, take_document
from ...asgi.scope import is_encoded
from ..budgets.estimates import Asked
from .by_body import ByBody, keep_said
from .compiled import METHODS_WITH_BODY

# What is said of a request without a body.
NO_BODY = Asked(0, None)


def look(content: bytes | None, buffer: Buffer, scope: Scope, readers: Sequence[ByBody], asks: bool) -> Asked | None:
    """Look at the *content* of a request's body: what it asks of a model,
    where that is wanted; `NO_BODY` when it has none.

    What it says to *readers* is in the scope then. Of a large body nothing else is kept:
    parsed it takes many times its size.

    Args:
        content: ``None`` when it cannot be had.
        buffer: Which has read it.
        asks: Whether to find out what it asks of a model.

    Returns:
        ``None`` also when it cannot be read.
    """
    before = take_document(scope)
    if content == b"":
        return NO_BODY
    if before is None or before.content != content:
        before = Document(content, is_encoded=is_encoded(scope))
    buffer.keep(before, scope)
    return _looked(before, scope, readers, asks)


async def look_on_route(conn: HTTPConnection, cap: int, readers: Sequence[ByBody], *, asks: bool) -> Asked | None:
    """`look` in front of an endpoint,
    where the app may have read the body already; other methods have `NO_BODY`.
    """
    if not isinstance(conn, Request) or conn.method not in METHODS_WITH_BODY:
        return NO_BODY
    content = await body_of(conn, cap)
    if content == b"":
        return NO_BODY
    document = Document(content, is_encoded=is_encoded(conn.scope))
    return _looked(document, conn.scope, readers, asks)


def _looked(document: Document, scope: Scope, readers: Sequence[ByBody], asks: bool) -> Asked | None:
    if readers:
        keep_said(scope, document, readers)
    return Asked.by(document.value) if asks and document.is_read else None


async def body_of(request: Request, cap: int) -> bytes | None:
    """The body of *request*, at most *cap* bytes; ``None`` when it cannot be had."""
    content: bytes | None = getattr(request, "_body", None)  # where Starlette keeps it
    if content is not None:
        return content if len(content) <= cap else None
    if request._stream_consumed:  # as a form
        return None
    buffer = Buffer(request._receive, cap=cap)
    content = await buffer.whole()
    request._receive = buffer.replay()
    return content
