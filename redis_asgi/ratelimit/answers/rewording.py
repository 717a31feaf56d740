"""`Rewording`: a refusal that an endpoint's limit raises,
said in the dialect of the middleware outside.

The limit raises an ``HTTPException``, so that the app's own handler may answer it. What Starlette's
and FastAPI's handlers make of one knows no dialect: their bodies are put into it on their way out.
A body that the app made itself stays as it is.
"""

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import Message, Scope, Send

from ..limits.decision import Decision
from .dialects import AnswerStyle, Refused
from .json_rpc import answer_to
from .refusal_bodies import refused_by

# Where a scope keeps the `Rewording` of its response.
REWORDING = "redis_asgi.rewording"
# What the frameworks' handlers add to the text, where it is told as JSON;
# six bytes for each of its characters.
_AROUND = 100


class Rewording:
    """The response to one request, on its way to the server;
    it passes untouched unless something is `offered`.

    Args:
        style: With a dialect.
        send: The server's.
    """

    __slots__ = ("_body", "_held", "_offered", "_send", "style")

    def __init__(self, style: AnswerStyle, send: Send) -> None:
        self.style = style
        self._send = send
        self._offered: tuple[int, str, int, bytes] | None = None
        self._held: list[Message] = []
        self._body = b""

    def offer(self, refused: Refused, conn: HTTPConnection, content: bytes | None) -> None:
        """Answer so, where *refused* is about to be told by a framework's own handler.

        Args:
            content: The request's body, for a dialect that names the request; ``None`` = it cannot
                be read.
        """
        dialect = self.style.dialect
        if dialect is not None:
            status, body = refused.status, dialect.body(refused)
            if self.style.names_request:
                status, body = answer_to(content, status, body, conn.scope)
            self._offered = refused.status, refused.message, status, body

    async def send(self, message: Message) -> None:
        """Pass *message* on, or hold it until it is known who has made the answer."""
        if self._offered is None:
            await self._send(message)
            return
        kind = message["type"]
        if kind == "http.response.start" and message["status"] == self._offered[0]:
            self._held = [message]
            return
        if not self._held or kind != "http.response.body":
            held = [*self._held, message]
        else:
            self._held.append(message)
            self._body += message.get("body", b"")
            more = message.get("more_body")
            if more and len(self._body) <= _AROUND + 6 * len(self._offered[1]):
                return
            is_ours = not more and _is_of_framework(self._body, self._offered[1])
            held = _reworded(self._held[0], *self._offered[2:]) if is_ours else self._held
        self._offered, self._held = None, []
        for each in held:
            await self._send(each)


def rewording_in(scope: Scope) -> Rewording | None:
    """The rewording of the response to a request;
    ``None`` where no middleware outside has a dialect.
    """
    rewording: Rewording | None = scope.get(REWORDING)
    return rewording


def refused_as(error: HTTPException, decision: Decision | None) -> Refused:
    """The words of a dialect about an *error* that a limit raises;
    *decision* is the one that refuses, if one does.
    """
    if error.status_code == 429 and decision is not None:
        return refused_by(decision, error.detail)
    return Refused(error.status_code, error.detail, None, None if decision is None else decision.retry_after)


def _is_of_framework(body: bytes, detail: str) -> bool:
    """Whether *body* is what Starlette or FastAPI make of an ``HTTPException`` with that *detail*."""
    if body == detail.encode():
        return True
    try:
        return bool(orjson.loads(body) == {"detail": detail})
    except orjson.JSONDecodeError:
        return False


def _reworded(start: Message, status: int, body: bytes) -> list[Message]:
    kept = [(name, value) for name, value in start["headers"] if name not in (b"content-type", b"content-length")]
    fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return [
        {**start, "status": status, "headers": [*kept, *fields]},
        {"type": "http.response.body", "body": body},
    ]
