"""What a refused client gets: 429, 503 or 400 as problem documents, for HTTP and for WebSocket handshakes."""

from collections.abc import Awaitable, Callable, Sequence
from inspect import isawaitable
from typing import TypeAlias

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import ConfigurationError
from ...misuse import check_callable, shown
from ...settings import HeaderStyle
from ..counting.verdict import Verdict
from ..limits.decision import Decision
from ..limits.policy import MICROSECONDS
from ..limits.refusal_memory import Known
from . import headers
from .headers import Fields

OnExceeded: TypeAlias = Callable[[HTTPConnection, Decision], ASGIApp | None | Awaitable[ASGIApp | None]]

# RFC 6455: policy violation, "when there is no other more suitable status code".
POLICY_VIOLATION = 1008


_EXAMPLE = "lambda conn, decision: JSONResponse({'error': 'too many requests'}, 429)"


def check_on_exceeded(on_exceeded: object) -> None:
    """What may answer in place of the 429 is a callable that makes a response for each refusal.

    Raises:
        ConfigurationError: If it is none, such as a response, or a response's class.
    """
    kind = on_exceeded if isinstance(on_exceeded, type) else type(on_exceeded)
    if issubclass(kind, Response):
        name = shown(kind)
        raise ConfigurationError(f"on_exceeded={name} is not called for each refusal. Try {_EXAMPLE}.")
    check_callable("on_exceeded", on_exceeded, "conn, decision", _EXAMPLE)


async def send_refusal(
    verdict: Verdict,
    fields: Fields,
    on_exceeded: OnExceeded | None,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Answer a request that *verdict* refuses (429), or that nobody can decide (503).

    Args:
        fields: ``RateLimit`` and its kin; empty when an outer middleware writes them.
        on_exceeded: The user's, who may answer instead.
    """
    decision = verdict.decision
    if decision.source == "none":
        await _send_problem(503, headers.reduced_capacity(), headers.refusal_fields(decision), scope, send)
        return
    fields = fields + headers.refusal_fields(decision)
    if on_exceeded is not None and can_respond(scope):
        said = on_exceeded(HTTPConnection(scope), decision)
        response = await said if isawaitable(said) else said
        if response is not None:
            if isinstance(response, type) or not callable(response):
                what = f"the class {shown(response)}" if isinstance(response, type) else type(response).__name__
                raise TypeError(
                    f"on_exceeded returned {what}, which is no response. Return one, as does {_EXAMPLE}, or None "
                    "for the usual 429."
                )
            await response(scope, receive, _adding(fields, send))
            return
    await _send_problem(429, headers.quota_exceeded(decision), fields, scope, send)


def remembered_refusal(verdict: Verdict, known: Known, style: HeaderStyle, scope: Scope) -> tuple[Message, Message]:
    """What `send_refusal` sends for what a flood consists of: a refusal *known* to be one policy's, over HTTP."""
    if verdict.at >= known.answers_until:
        _render(known, style, verdict.at)
    fields, body = known.answer
    # Anew for each: who is outside may change them.
    start = {"type": "http.response.start", "status": 429, "headers": fields.copy()}
    return start, {"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body}


def _render(known: Known, style: HeaderStyle, now: float) -> None:
    """Make the answer of what is *known*, kept for as long as the whole seconds in it stay the same."""
    charge, refusal = known[0]
    remaining, reset, retry = refusal.numbers(charge.cost, now)
    known.answer = headers.rendered_refusal(refusal.policy, remaining, reset, retry, style)
    if style in ("ietf", "none"):  # the others hold the time of day
        left = [(us - 1) % MICROSECONDS + 1 for us in (reset, retry) if us > 0]
        known.answers_until = now + min(left, default=MICROSECONDS) / MICROSECONDS


async def refuse_identity(what: str, scope: Scope, send: Send) -> None:
    """Answer a request that lacks what it would be counted by."""
    await _send_problem(400, headers.identity_missing(what), [(b"cache-control", b"no-store")], scope, send)


def can_respond(scope: Scope) -> bool:
    """Whether a refusal can have a status and a body; a WebSocket's only through the server's extension."""
    return scope["type"] == "http" or "websocket.http.response" in (scope.get("extensions") or {})


async def _send_problem(status: int, body: bytes, fields: Fields, scope: Scope, send: Send) -> None:
    if not can_respond(scope):
        await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": ""})
        return
    prefix = "websocket." if scope["type"] == "websocket" else ""
    sent = fields + headers.content_fields(body)
    await send({"type": f"{prefix}http.response.start", "status": status, "headers": sent})
    shown = b"" if scope.get("method") == "HEAD" else body
    await send({"type": f"{prefix}http.response.body", "body": shown})


def _adding(fields: Sequence[tuple[bytes, bytes]], send: Send) -> Send:
    """A ``send`` that adds *fields* to the start of a response, where it has none of that name."""

    async def adding(message: Message) -> None:
        if message["type"].endswith("http.response.start"):
            message = headers.with_fields(message, fields)
        await send(message)

    return adding
