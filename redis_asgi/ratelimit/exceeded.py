"""`RateLimitExceeded`: the 429 an endpoint raises, which answers by itself in Starlette and FastAPI."""

from starlette.exceptions import HTTPException

from ..errors import RedisASGIError
from ..settings import HeaderStyle
from . import headers
from .decision import Decision


class RateLimitExceeded(RedisASGIError, HTTPException):
    """A client is over its quota.

    An ``HTTPException`` of status 429: raised in an endpoint, the framework answers with its ``headers`` (never a
    ``Content-Type``, which is the handler's) and its ``detail``, which does not name the client.

    Args:
        client_id: Who; in ``str()`` and logs only. Give an address or a digest, never a credential.
        limit: Units allowed per *window*.
        window: Seconds.
        decision: Where ``Retry-After`` and the limit fields come from; without one, ``Retry-After`` is *window*.
    """

    def __init__(
        self,
        client_id: str,
        limit: int,
        window: int,
        *,
        decision: Decision | None = None,
        style: HeaderStyle = "ietf",
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
            detail = headers.refusal_detail(decision)
        super().__init__(429, detail, {name.decode(): value.decode() for name, value in fields})

    def __str__(self) -> str:
        return f"Rate limit exceeded for {self.client_id}: {self.limit} requests per {self.window} seconds"
