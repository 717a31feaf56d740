"""Reading a request's body for the rules that count by it: once, within bounds, and only where there is one."""

from starlette.requests import HTTPConnection, Request
from starlette.types import Scope

from ..bodies import Buffer, Document, take_document
from ..scope import header_values
from .by_body import keep_said
from .compiled import METHODS_WITH_BODY
from .plan import Plan


async def look(plan: Plan, scope: Scope, buffer: Buffer) -> bool:
    """Whether a request has a body for *plan*, which then finds in the scope what it says."""
    before = take_document(scope)
    content = await buffer.whole()
    if content == b"":
        return False
    if before is None or before.content != content:
        before = _document(content, scope)
    keep_said(scope, before, plan.readers)
    # A large one is let go here: parsed it takes many times its size, which no pause is to hold.
    buffer.keep(before, scope)
    return True


async def look_on_route(plan: Plan, conn: HTTPConnection, cap: int) -> bool:
    """`look` in front of an endpoint, where the app may have read the body already."""
    if not isinstance(conn, Request) or conn.method not in METHODS_WITH_BODY:
        return False
    content = await _body_of(conn, cap)
    if content == b"":
        return False
    keep_said(conn.scope, _document(content, conn.scope), plan.readers)
    return True


def _document(content: bytes | None, scope: Scope) -> Document:
    return Document(content, is_encoded=any(header_values(scope, b"content-encoding")))


async def _body_of(request: Request, cap: int) -> bytes | None:
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
