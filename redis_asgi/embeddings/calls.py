"""The calls of the app that one request makes or joins,
and what they have taught about requests like it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .app_flight import ask_app
from .origin.app_call import Untouched
from .origin.single_flight import Flight
from .origin.waiters import Waiting
from .records.lease import Lease, shortest
from .requests.question import Question
from .shared import Shared
from .storage.lookup import Stored

REFUSALS = (401, 403)


class AppCalls:
    """The calls of one request.

    Args:
        shared: Of the middleware.
        scope: The request's, as it came.
        question: What it asks.
        found: What was found.
        carried: Flights by key that were under way before Redis was asked;
            each may have ended meanwhile.
        refusal: Why nothing is kept of their answers, whatever they say.

    Attributes:
        untouched: The request's scope, for each call of the app.
        waiting: Whom the request waits for, and whether its client waits.
        made: Flights that it has begun.
        forced: Whether something is forwarded only because there is no lease, or soon none.
        early: Whether there is one still.
    """

    def __init__(
        self,
        shared: Shared,
        scope: Scope,
        question: Question,
        found: Stored,
        carried: Mapping[bytes, Flight],
        refusal: str | None,
    ) -> None:
        self._shared = shared
        self._question = question
        self._found = found
        self._carried = carried
        self._refusal = refusal
        self._given_up: Flight | None = None
        self.untouched = Untouched(scope)
        self.waiting = Waiting()
        self.made: list[Flight] = []
        self.forced = False
        self.early = False

    def begin(self, names: Sequence[bytes], *, joinable: bool, filling: bool = False) -> Flight | None:
        """Ask the app for inputs; ``None`` when the wire format fails."""
        flight = ask_app(
            self._shared,
            self.untouched,
            self._question,
            self._found,
            names,
            self.waiting,
            refusal=self._refusal,
            joinable=joinable,
            filling=filling,
        )
        if flight is not None:
            self.made.append(flight)
        return flight

    def join(self, missing: Sequence[bytes]) -> dict[bytes, Flight]:
        """The flights of others that bring inputs of *missing*, by key."""
        joined: dict[bytes, Flight] = {}
        flights, found = self._shared.flights, self._found
        for name in missing:
            flight = self._carried.get(name) or flights.find(name, found.asked_at)
            if flight is not None and flight.joinable(found.epoch, len(self._question.inputs)):
                joined[name] = flight
        return joined

    def least(self) -> bytes:
        """The key of the shortest input, which is forwarded only for the app to let the caller in."""
        names = list(self._question.inputs)
        return names[shortest([len(self._question.inputs[name].canonical) for name in names])]

    def must_ask(self, joined: Mapping[bytes, Flight]) -> bool:
        """Whether the app itself has to see this caller although others bring all that is missing."""
        if not joined or self._shared.options.lease == 0:
            return True
        name = self._question.identity.lease_name
        # Whom the app has refused since then, it has to see again.
        same = any(other.lease_name == name and not self._was_refused_since(other) for other in joined.values())
        return not same and self._found.lease is None

    def renewal(self) -> Flight | None:
        """A call under way that asks for the same caller."""
        found = self._found
        return self._shared.flights.renewal(self._question.identity.lease_name, found.epoch, found.asked_at)

    async def is_let_in(self) -> bool:
        """Wait for a call under way that asks for the same caller;
        whether it has brought the lease.
        """
        flight = self.renewal()
        if self._shared.options.lease == 0 or flight is None or self._was_refused_since(flight):
            return False
        self.waiting.wait_for(flight)
        landing = await asyncio.shield(flight.landed)
        if landing is None or not landing.repeatable or self._was_refused_since(flight):
            return False
        self._found.believe(landing.lease)
        return True

    async def collect(self, joined: Mapping[bytes, Flight]) -> tuple[list[bytes], Lease | None]:
        """Wait for the vectors of *joined*: the keys that failed,
        and what the app said last to this caller.
        """
        failed: list[bytes] = []
        lease = self._found.lease
        for name, other in joined.items():
            brought = await asyncio.shield(other.landed)
            if brought is None:
                failed.append(name)
                continue
            self._found.values[name] = brought.values[name]
            if other.lease_name == self._question.identity.lease_name:
                lease = brought.lease
        return failed, lease

    def _was_refused_since(self, flight: Flight) -> bool:
        return self._shared.vectors.is_denied(self._question.identity, flight.asked_at)

    def is_shrunken(self, flight: Flight) -> bool:
        """Whether the sub-request is not, input by input, what the client sent."""
        return list(flight.names) != self._question.slots

    # Whether a smaller request than the client's is of any use.

    @property
    def _misfit(self) -> bytes:
        """The key by which `Misfits` knows such requests."""
        return b" ".join(
            [self._question.identity.scope_name, *(encoding.encode() for encoding in self._question.batch.encodings)]
        )

    def goes_whole(self) -> bool:
        """Whether a smaller request would only be a call more."""
        return self._shared.misfits.remembers(self._misfit, self._shared.clock.monotonic())

    def strike(self, *, lasting: bool = False) -> None:
        """Note a call more than without the cache: after two in a minute,
        requests of this scope go out whole.
        """
        if self._shared.misfits.strike(self._misfit, self._shared.clock.monotonic(), lasting=lasting):
            self._shared.warnings.say("embedding_answers_not_understood", wire_format=self._question.wire.name)

    def fitted(self) -> None:
        """Note that the answer to a smaller request was understood."""
        self._shared.misfits.clear(self._misfit)

    # The end.

    def watch(self, receive: Receive) -> None:
        """From here on look for the client's disconnect."""
        self.waiting.watch(receive)

    async def give_up(self, flight: Flight) -> None:
        """End a call whose request is put to the app once more, or answered without it."""
        await flight.call.give_up()
        self._given_up = flight

    def leave(self, *, cancelled: bool) -> None:
        """Wait no more; *cancelled*: the request was."""
        for flown in self.made:
            flown.call.discard()
        self.waiting.end(cancelled=cancelled)

    async def settle(self) -> BaseException | None:
        """Wait for what was begun, its writes included; what the app has raised,
        for the request to raise again.
        """
        for mine in self.made:
            if mine.task is not None:
                await asyncio.shield(mine.task)
            if mine.call.error is not None and mine is not self._given_up and not mine.call.cancelled:
                return mine.call.error
        return None


async def pass_through(
    app: ASGIApp, scope: "Scope | Untouched", receive: Receive, send: Send, refused: Callable[[int], Awaitable[None]]
) -> None:
    """Let *app* answer a request as it came.

    Args:
        app: The wrapped app.
        scope: The request's; where the app was called before, that of before these calls.
        receive: Replays what was read.
        send: The server's.
        refused: Told of a 401 or 403 before it goes out.
    """
    untouched = scope if isinstance(scope, Untouched) else None
    inside = scope.copy() if isinstance(scope, Untouched) else scope

    async def watched(message: Message) -> None:
        if message["type"] == "http.response.start":
            if untouched is not None:
                untouched.show(inside)
            if message["status"] in REFUSALS:
                await refused(message["status"])
        await send(message)

    try:
        await app(inside, receive, watched)
    finally:
        if untouched is not None:
            untouched.show(inside)
