"""The outcome of one request, said in one place: to the header,
the state, the metrics and the span.
"""

from typing import Literal

from starlette.types import Message, Scope, Send

from ...tracing import annotate_span, may_be_traced
from ..records.metrics import CacheMetrics, CacheResult
from ..requests import http_caching as http
from .result import EmbeddingCacheResult


class Outcome:
    """One request's; the one that answers it says here what the answer is, and gets what to send it
    by.

    Args:
        counts: Of the middleware.
        scope: Whose state tells the app and what stands outside.
        send: The server's.
        status: Whether ``Cache-Status`` is sent.

    Attributes:
        hits: Different inputs found.
        misses: Different inputs that the app computes for this request.
        collapsed: Different inputs that others were computing.
        tokens: What the app would have counted; 0 until that is known.
        billed: What it counted for this request.
        looked_up: Whether the answer is made of what a lookup found, or did not find.
    """

    __slots__ = (
        "_counts",
        "_reason",
        "_result",
        "_saved_tokens",
        "_scope",
        "_send",
        "_served_bytes",
        "_status",
        "billed",
        "collapsed",
        "hits",
        "looked_up",
        "misses",
        "tokens",
    )

    def __init__(self, counts: CacheMetrics, scope: Scope, send: Send, *, status: bool) -> None:
        self._counts = counts
        self._scope = scope
        self._send = send
        self._status = status
        self._result: CacheResult = "error"  # while nothing else is said
        self._reason = ""
        self._served_bytes = self._saved_tokens = 0
        self.hits = self.misses = self.collapsed = self.tokens = self.billed = 0
        self.looked_up = False

    def says(self, result: CacheResult, member: str, *, reason: str = "", error: bool = False) -> Send:
        """Say that the request is a *result*; gives the ``send`` of its answer,
        with *member* in ``Cache-Status``.

        Args:
            result: For the metrics; a ``stale`` one is a hit or a miss for the app.
            member: See `http_caching.status`.
            reason: The token of a bypass.
            error: Whether the answer is none that was asked for: the metrics count it as an error.
        """
        self._reason = reason
        self._turns_out("error" if error else result)
        self._show(result)
        return _with_status(self._send, member) if self._status else self._send

    def bypasses(self, detail: str) -> Send:
        """Say that the app answers the original request, for the reason *detail*."""
        self.looked_up = False
        self.hits = self.misses = self.collapsed = 0
        return self.says("bypass", http.status("fwd=bypass", detail=detail), reason=detail)

    def fails(self) -> None:
        """Say that there is no answer."""
        self._turns_out("error")

    def expects(self, inputs: int, misses: int, collapsed: int) -> None:
        """Say how the request looks before it is answered;
        it counts as that if nothing else is said.

        Args:
            inputs: How many different ones it has.
            misses: Those that the app is asked for.
            collapsed: Those that others bring.
        """
        self.hits, self.misses, self.collapsed = inputs - misses - collapsed, misses, collapsed
        result: CacheResult = "partial" if self.hits else "miss"
        self._turns_out(result)
        self._show(result)

    def _turns_out(self, result: CacheResult) -> None:
        self._result = result
        if may_be_traced():
            annotate_span(cache_result=result)

    def _show(self, result: CacheResult) -> None:
        outcome: Literal["hit", "miss", "partial", "bypass"]
        if result in ("hit", "miss", "partial", "bypass"):
            outcome = result
        else:
            outcome = "miss" if not self.hits else "partial" if self.misses else "hit"
        self._scope["state"]["embedding_cache_result"] = EmbeddingCacheResult(
            outcome, self.hits, self.misses, self.collapsed, self.tokens, self.billed
        )

    def member(self, *, stored: bool, refusal: str | None, forced: bool, anew: bool) -> str:
        """The ``Cache-Status`` of an answer that the app had a part in.

        Args:
            stored: Whether that is kept.
            refusal: Why not, where the app's answer says so.
            forced: Whether the app was asked only to let the caller in.
            anew: Whether the client wanted no stored answer.
        """
        kept = ("stored",) if stored else ()
        if forced:
            return http.status("fwd=stale", "detail=lease", *kept)
        if anew:
            return http.status("fwd=request", *kept)
        if self.hits:
            collapsed = f" collapsed={self.collapsed}" if self.collapsed else ""
            return http.status("fwd=partial", *kept, detail=f"hit={self.hits} miss={self.misses}{collapsed}")
        if refusal is not None:
            return http.status("fwd=bypass", detail=refusal)
        return http.status("fwd=miss", *kept, *(("collapsed",) if self.collapsed else ()))

    def served(self, size: int, saved_tokens: int) -> None:
        """Say how many bytes of stored vectors go out, and how many tokens the app need not count."""
        self._served_bytes, self._saved_tokens = size, saved_tokens

    def end(self) -> None:
        """Count the request."""
        looked_up = self.looked_up
        self._counts.request(
            self._result,
            self._reason,
            hits=self.hits if looked_up else 0,
            misses=self.misses if looked_up else 0,
            collapsed=self.collapsed if looked_up else 0,
            size=self._served_bytes,
            tokens=self._saved_tokens,
        )


def _with_status(send: Send, member: str) -> Send:
    """A ``send`` that appends *member* to the answer's ``Cache-Status``."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (b"cache-status", member.encode())]
            message = {**message, "headers": headers}
        await send(message)

    return sent
