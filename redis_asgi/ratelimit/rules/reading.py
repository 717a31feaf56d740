"""Reading a request's body for the rules that ask it: once, within bounds, and only where there is one."""

from collections.abc import Sequence
from typing import NamedTuple

from starlette.requests import HTTPConnection, Request
from starlette.types import Scope

from ...asgi.bodies import Buffer, Document, take_document
from ...asgi.scope import is_encoded
from ..budgets.estimates import Asked
from .by_body import ByBody, keep_said
from .compiled import METHODS_WITH_BODY


class Looked(NamedTuple):
    """A body that was looked at; of a large one nothing else is kept, since parsed it takes many times its size.

    Attributes:
        asked: What it asks of a model, where a rule wants to know; ``None`` also when it cannot be read.
    """

    asked: Asked | None


async def look(buffer: Buffer, scope: Scope, readers: Sequence[ByBody], *, asks: bool) -> Looked | None:
    """Look at a request's body; ``None`` when it has none.

    What it says to *readers* is in the scope then.

    Args:
        asks: Whether to find out what it asks of a model.
    """
    before = take_document(scope)
    content = await buffer.whole()
    if content == b"":
        return None
    document = before if before is not None and before.content == content else _document(content, scope)
    buffer.keep(document, scope)
    return _looked(document, scope, readers, asks=asks)


async def look_on_route(conn: HTTPConnection, cap: int, readers: Sequence[ByBody], *, asks: bool) -> Looked | None:
    """`look` in front of an endpoint, where the app may have read the body already; ``None`` also for other methods."""
    if not isinstance(conn, Request) or conn.method not in METHODS_WITH_BODY:
        return None
    content = await body_of(conn, cap)
    if content == b"":
        return None
    return _looked(_document(content, conn.scope), conn.scope, readers, asks=asks)


def _looked(document: Document, scope: Scope, readers: Sequence[ByBody], *, asks: bool) -> Looked:
    if readers:
        keep_said(scope, document, readers)
    return Looked(Asked.by(document.value) if asks and document.is_read else None)


def _document(content: bytes | None, scope: Scope) -> Document:
    return Document(content, is_encoded=is_encoded(scope))


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
