"""JSON-RPC answers to requests that are refused before the app sees them:
the id is read from the request's body.
"""

from starlette.types import Receive, Scope

from ...asgi.bodies import Buffer, Document
from ...asgi.scope import header_values, is_encoded
from .dialects import reply, status_for


async def in_reply(status: int, body: bytes, scope: Scope, receive: Receive, cap: int) -> tuple[int, bytes]:
    """The status and the *body* of a refusal, as the answer to the request in *scope*.

    Args:
        cap: The most that is read of the request's body, in bytes;
            of a longer one the id is not known.
    """
    content = await Buffer(receive, cap=cap).whole() if scope["method"] == "POST" else None
    return answer_to(content, status, body, scope)


def answer_to(content: bytes | None, status: int, body: bytes, scope: Scope) -> tuple[int, bytes]:
    """`in_reply` to a request whose body is *content*; ``None`` = it cannot be read."""
    value = Document(content, is_encoded=is_encoded(scope)).value
    request_id = value.get("id") if isinstance(value, dict) else None
    revision = next(iter(header_values(scope, b"mcp-protocol-version")), b"").decode("latin-1")
    return status_for(scope["method"], revision, status), reply(body, request_id)
