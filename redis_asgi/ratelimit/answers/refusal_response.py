"""Refusals: 429, 503 or 400 with a body in the client's dialect,
for HTTP and for WebSocket handshakes.
"""

from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import TypeAlias

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...asgi.problem import POLICY_VIOLATION
from ...errors import ConfigurationError
from ...misuse import check_callable, shown
from ..counting.verdict import Verdict
from ..limits.decision import Decision
from ..limits.policy import MICROSECONDS
from ..limits.refusal_memory import Known, Said
from . import headers, refusal_bodies
from .dialects import SHORTEST_KEPT, AnswerStyle, Fields
from .json_rpc import in_reply
from .request_decision import RequestDecision

OnExceeded: TypeAlias = Callable[[HTTPConnection, Decision], ASGIApp | None | Awaitable[ASGIApp | None]]


_EXAMPLE = "lambda conn, decision: JSONResponse({'error': 'too many requests'}, 429)"


def check_on_exceeded(on_exceeded: object) -> None:
    """Check that *on_exceeded* is a callable that makes a response for each refusal.

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
    style: AnswerStyle,
    on_exceeded: OnExceeded | None,
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Answer a request that *verdict* refuses (429), or that no engine can decide (503).

    Args:
        fields: ``RateLimit`` and its kin; empty when an outer middleware writes them.
        style: How to write the body, and what stands beside ``Retry-After``.
        on_exceeded: The user's, who may answer instead.
    """
    decision = verdict.decision
    if decision.source == "none":
        fields = headers.refusal_fields(decision, style.dialect)
        await _send_body(503, refusal_bodies.reduced_capacity(style), fields, style, scope, receive, send)
        return
    fields = fields + headers.refusal_fields(decision, style.dialect)
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
            await response(scope, receive, adding(fields, send))
            return
    held = refusal_bodies.held_words(verdict.engine.in_flight.most_of(verdict.charges, decision.violated))
    await _send_body(429, refusal_bodies.refusal_body(decision, style, held), fields, style, scope, receive, send)


def answer_to(known: Known, decision: RequestDecision, style: AnswerStyle) -> Said:
    """A flood's usual refusal, for a request with that *decision*: one *known* to be one policy's,
    in a *style* that does not name the request.

    The answer of before stays where it still says what is true.
    """
    said = known.said
    if said is None or decision.first.at >= said.until or said.style is not style:
        said = known.said = _rendered(known, decision, style)
    return said


async def send_again(said: Said, scope: Scope, send: Send) -> None:
    """Send, over HTTP, what is *said* to more than one."""
    # Anew for each: who is outside may change them.
    await send({"type": "http.response.start", "status": 429, "headers": said.fields.copy()})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else said.body})


def _rendered(known: Known, decision: RequestDecision, style: AnswerStyle) -> Said:
    """The answer to what is *known*,
    kept for as long as the whole seconds in it stay the same.
    """
    verdict = decision.first
    charge, refusal = known[0]
    remaining, reset, retry = refusal.numbers(charge.cost, verdict.at)
    held = refusal_bodies.held_words(verdict.engine.in_flight.most_of((charge,), (refusal.policy.name,)))
    fields, body = refusal_bodies.rendered_refusal(refusal.policy, remaining, reset, retry, style, held)
    kept = 0.0
    if style.headers in ("ietf", "none"):  # the others hold the time of day
        left = [(us - 1) % MICROSECONDS + 1 for us in (reset, retry) if us > 0]
        kept = min(left, default=MICROSECONDS) / MICROSECONDS
        if style.dialect is not None:
            kept = min(kept, SHORTEST_KEPT)
    verdict.conclude()
    return Said(style, verdict.at + kept, fields, body, decision)


async def refuse_identity(what: str, style: AnswerStyle, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request that lacks what it would be counted by."""
    fields = [(b"cache-control", b"no-store")]
    await _send_body(400, refusal_bodies.identity_missing(what, style), fields, style, scope, receive, send)


def can_respond(scope: Scope) -> bool:
    """Whether a refusal can have a status and a body;
    a WebSocket's only through the server's extension.
    """
    return scope["type"] == "http" or "websocket.http.response" in (scope.get("extensions") or {})


async def _send_body(
    status: int, body: bytes, fields: Fields, style: AnswerStyle, scope: Scope, receive: Receive, send: Send
) -> None:
    if not can_respond(scope):
        await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": ""})
        return
    if style.names_request:
        status, body = await in_reply(status, body, scope, receive, style.body_cap)
    prefix = "websocket." if scope["type"] == "websocket" else ""
    sent = fields + refusal_bodies.content_fields(body, style)
    await send({"type": f"{prefix}http.response.start", "status": status, "headers": sent})
    shown = b"" if scope.get("method") == "HEAD" else body
    await send({"type": f"{prefix}http.response.body", "body": shown})


def adding(fields: Fields, send: Send) -> Send:
    """A ``send`` that adds *fields* to the start of a response, where it has none of that name."""

    async def adding(message: Message) -> None:
        if message["type"].endswith("http.response.start"):
            message = headers.with_fields(message, fields)
        await send(message)

    return adding
