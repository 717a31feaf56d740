"""The app's response on its way out: fields are added at its start, charges are settled at its end."""

from collections.abc import Awaitable, Sequence

from starlette.requests import ClientDisconnect
from starlette.types import Message, Scope, Send

from ...asgi.offer import offer_of
from ..budgets.usage import UsageReader
from ..counting.settlement import Change
from ..counting.verdict import Verdict
from . import headers
from .dialects import AnswerStyle, plain_style
from .request_decision import RequestDecision, Undecided

_STARTS = frozenset(("http.response.start", "websocket.accept", "websocket.http.response.start"))
# What a body is sent by, itself or as a file that the server has.
_BODIES = frozenset(
    ("http.response.body", "http.response.pathsend", "http.response.zerocopysend", "websocket.http.response.body")
)


def style_of(scope: Scope, decision: RequestDecision) -> AnswerStyle:
    """The style of the answers to a request: of a middleware outside, else the settings'."""
    offer = offer_of(scope)
    style: AnswerStyle | None = None if offer is None else offer.style
    return style or plain_style(decision.first.engine.settings.RATE_LIMIT_HEADERS)


def text_fields(decision: RequestDecision, scope: Scope) -> dict[str, str]:
    """The header fields of all that was decided about a request, as frameworks take them."""
    fields = headers.fields_of(decision.first, style_of(scope, decision))
    return {name.decode(): value.decode() for name, value in fields}


class LimitedResponse:
    """The app's response on its way out: fields added once, at its start,
    and charges settled at its end.

    Nothing that the scope holds refers to it:
    a cycle through ``send`` would leave every request to the collector.
    """

    __slots__ = ("_back", "_gone", "_reader", "_send", "_style", "_verdict", "decision", "status")

    def __init__(self, decision: RequestDecision, style: AnswerStyle, send: Send) -> None:
        self.decision = decision
        self._verdict = decision.first
        self._style = style
        self._send = send
        self._gone = False
        self._reader: UsageReader | None = None  # of what it has used, where that is to be known
        self._back: Sequence[tuple[Verdict, list[Change]]] = ()  # what its start gives back, once it is sent
        self.status: int | None = None

    def send(self, message: Message) -> Awaitable[None]:
        """Send *message*; without a coroutine of its own where nothing is to be done after it."""
        verdict = self._verdict
        kind = message["type"]
        if kind not in _BODIES:
            message = self._start(kind, message)
        elif not message.get("more_body") and not verdict.needs_end:
            verdict.settle(self.status)
        return self._followed(message) if verdict.needs_end else self._send(message)

    async def _followed(self, message: Message) -> None:
        """Send *message*, and settle what it changes."""
        back, self._back = self._back, ()
        try:
            await self._send(message)
        except OSError:
            self._gone = True
            raise
        reader = self._reader
        if message["type"] in _BODIES:
            if reader is not None:
                reader.feed(message.get("body") or b"")
            if not message.get("more_body"):
                if reader is not None:
                    reader.close(complete=True)
                self._verdict.settle(self.status)
        for verdict, changes in back:
            self.decision.ledger.apply(verdict, changes)

    def _start(self, kind: str, message: Message) -> Message:
        """*message* with the fields, if it is a start."""
        if kind not in _STARTS:
            if kind == "websocket.close" and self.status is None:
                self.status = 403  # what the server answers a handshake that is closed before accept
                self._back = self.decision.turned_down()
            return message
        self.status = status = message.get("status", 101)
        verdict = self._verdict
        if verdict.needs_end and 300 <= status < 500:
            self._back = self.decision.turned_down()
        verdict.count()
        # The draft has no fields on redirects: their target is counted by itself.
        if not 300 <= status < 400:
            fields = verdict.rendered
            if fields is None or verdict.more or not self._style.is_plain:
                fields = headers.fields_of(verdict, self._style)
            message = headers.with_fields(message, fields)
        ledger = verdict.ledger
        if ledger is not None and ledger.spends:
            written = message.get("headers") or ()
            if type(written) is not list:
                # An app may pass headers that can be read only once.
                message = {**message, "headers": (written := [*written])}
            self._reader = ledger.reader = UsageReader(status, written)
        return message

    def failed(self, error: BaseException) -> None:
        """Settle for an app that raised: a 500, unless the client has gone;
        what that asked for stays charged.
        """
        gone = self._gone or isinstance(error, ClientDisconnect) or not isinstance(error, Exception)
        self._verdict.settle(self.status if gone else 500)


class UncoveredResponse:
    """The response to a request that no rule covers: untouched,
    unless a per-route limit decides about it.
    """

    __slots__ = ("_of_route", "_send", "_standby", "_style")

    def __init__(self, standby: Undecided, style: AnswerStyle, send: Send) -> None:
        self._standby = standby
        self._style = style
        self._send = send
        self._of_route: LimitedResponse | None = None

    def send(self, message: Message) -> Awaitable[None]:
        response = self._response()
        return self._send(message) if response is None else response.send(message)

    def end(self, error: BaseException | None = None) -> None:
        """Count, and settle what was decided, when the app has returned or raised."""
        response = self._response()
        if response is None:
            self._standby.engine.counts.request("exempt", "none")
        elif error is not None:
            response.failed(error)
        else:
            response.decision.first.settle(response.status)

    def _response(self) -> LimitedResponse | None:
        decision = self._standby.decision
        if self._of_route is None and decision is not None:
            self._of_route = LimitedResponse(decision, self._style, self._send)
        return self._of_route
