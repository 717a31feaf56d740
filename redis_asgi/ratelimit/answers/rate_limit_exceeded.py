"""`RateLimitExceeded`: the 429 an endpoint raises,
which answers by itself in Starlette and FastAPI.
"""

import math

from starlette.exceptions import HTTPException

from ...errors import RedisASGIError
from ...settings import HeaderStyle
from ..counting.verdict import Verdict
from ..limits.decision import Decision
from . import headers, refusal_bodies
from .dialects import AnswerStyle, Fields


class RateLimitExceeded(RedisASGIError, HTTPException):
    """A client is over its quota.

    An ``HTTPException`` of status 429: raised in an endpoint, the framework answers with its
    ``headers`` (never a ``Content-Type``, which is the handler's) and its ``detail``, which does
    not name the client.

    Args:
        client_id: Who; in ``str()`` and logs only. Give an address or a digest, never a credential.
        limit: Units allowed per *window*.
        window: Seconds.
        decision: Where ``Retry-After`` and the limit fields come from;
            without one, ``Retry-After`` is *window*.
    """

    def __init__(
        self, client_id: str, limit: int, window: int, *, decision: Decision | None = None, style: HeaderStyle = "ietf"
    ) -> None:
        self.client_id = client_id
        self.limit = limit
        self.window = window
        self.decision = decision
        if decision is None:
            fields = [(b"cache-control", b"no-store"), (b"retry-after", str(window).encode())]
            detail = f"Rate limit exceeded: {limit} per {window} s. Retry in {window} s."
        else:
            fields = headers.limit_fields(decision, style) + headers.refusal_fields(decision)
            detail = refusal_bodies.refusal_detail(decision)
        super().__init__(429, detail, _texts(fields))

    def __str__(self) -> str:
        return f"Rate limit exceeded for {self.client_id}: {self.limit} requests per {self.window} seconds"


def _texts(fields: Fields) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in fields}


def refusal_on(decision: Decision, verdict: Verdict, style: AnswerStyle) -> HTTPException:
    """The exception of an endpoint that *verdict*,
    a part of the *decision* on its request, refuses.
    """
    refusing = [state for state in verdict.decision.policies if state.name in verdict.decision.violated]
    if not refusing:  # no engine could decide, and the limit fails closed
        return HTTPException(
            503, refusal_bodies.UNDECIDED, _texts(headers.refusal_fields(verdict.decision, style.dialect))
        )
    worst = max(refusing, key=lambda state: math.inf if state.retry_after is None else state.retry_after)
    whose = next(charge for charge in verdict.charges if any(p.name == worst.name for p in charge.policies))
    error = RateLimitExceeded(whose.partition.label, worst.quota, worst.window, decision=decision, style=style.headers)
    if style.dialect is not None:
        more = headers.dialect_fields(decision, style.dialect) + style.dialect.refusal_fields(decision.retry_after)
        error.headers = {**(error.headers or {}), **_texts(more)}
    error.detail += refusal_bodies.held_words(
        verdict.engine.in_flight.most_of(verdict.charges, verdict.decision.violated)
    )
    return error
