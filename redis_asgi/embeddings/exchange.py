"""One request to an embedding endpoint, from its head to its last byte.

Read, look in the process, look in Redis, join, forward, merge, send: `Exchange.run` is the story,
in that order, and what is not needed is not begun. Whatever goes wrong before the app has been
asked ends in `_bypass`: the app gets the original bytes.
"""

import asyncio
from collections.abc import Mapping

from starlette.types import Receive, Scope, Send

from ..asgi.bodies import Document, take_document
from ..errors import Failure
from ..time_slice import TimeSlice
from .answers.outcome import Outcome
from .answers.output import send_not_cached
from .assembly import Answers
from .calls import REFUSALS, AppCalls, pass_through
from .origin.single_flight import Flight, FlightResult
from .records.lease import Lease
from .records.metrics import CacheResult
from .requests import http_caching as http
from .requests.body import NOTHING_READ, let_go, read_body
from .requests.question import Question, partition_of
from .requests.routes import Endpoint
from .shared import Shared
from .storage.lookup import Stored, look_up, recall
from .wire import Uncacheable

_OF_THE_WHOLE_REQUEST = (400, 413, 422)  # may be about the request we made smaller, not about the client's
_UNKNOWN_CALLER = 401


class Exchange:
    """See the module; everything of one request lives here and ends with it."""

    def __init__(self, shared: Shared, matched: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        self._shared = shared
        self._matched = matched
        self._scope = scope
        self._receive = receive
        self._head = shared.questions.head_of(scope)
        self._outcome = Outcome(shared.counts, scope, send, status=shared.settings.EMBEDDING_CACHE_STATUS)
        self._time_slice = TimeSlice()
        self._body = NOTHING_READ
        self._question: Question
        self._is_known = False  # the line above is there
        self._found: Stored
        self._carried: Mapping[bytes, Flight] = {}
        self._refusal: str | None = None  # why nothing is written, whatever the app answers
        self._calls: AppCalls | None = None
        self._answers: Answers

    async def run(self) -> None:
        """Answer the request, and count it."""
        try:
            await self._run()
        finally:
            self._outcome.end()

    async def _run(self) -> None:
        shared = self._shared
        detail = shared.questions.refused_head(self._head, self._scope, self._matched)
        if detail is not None:
            await self._bypass(detail)
            return
        partition_by, partition = shared.options.partition_by, None
        if partition_by is not None:
            partition = await partition_of(self._scope, partition_by)
            if partition is None:
                await self._bypass("partition")
                return
        parsed = take_document(self._scope)
        limit, seconds = shared.settings.EMBEDDING_CACHE_MAX_REQUEST_BYTES, shared.settings.EMBEDDING_CACHE_BODY_SECONDS
        self._body, held = await read_body(self._receive, limit, shared.budget, seconds)
        coming = self._body.coming
        if self._body.content is None:
            # It goes to the app as it comes, and may take as long as the client likes.
            shared.budget.give(held)
            held = 0
        try:
            await self._answer(partition, parsed)
        finally:
            let_go(coming)
            shared.budget.give(held)

    async def _answer(self, partition: str | None, parsed: Document | None) -> None:
        questions, wanted = self._shared.questions, self._head.wanted
        self._time_slice.restart()
        question = await questions.read(
            self._scope, self._head, self._matched, self._body, partition, self._time_slice, parsed
        )
        if isinstance(question, Uncacheable):
            await self._bypass(question.detail)
            return
        self._question, self._is_known = question, True
        if not wanted.store:
            await self._bypass("no-store")
            return
        if questions.is_defeated_by(question, self._scope.get("query_string", b"")):
            self._refusal = "unique-header"
        near = Stored({})
        if wanted.lookup:
            near = recall(self._shared.vectors, question.identity, question.inputs, wanted.max_age)
        found = near if near.lease is not None else await self._look_up(near)
        if isinstance(found, Failure):
            await self._bypass("redis-down")
            return
        self._found = found
        self._answers = Answers(self._shared, wanted, question, found, self._outcome, self._time_slice)
        self._outcome.looked_up = True
        missing = found.missing(question.inputs)
        if not found.fits:
            await self._start_over()
        elif not missing and found.lease_left > 0 and not self._asks_early(found.lease_left):
            await self._answer_hit()
        elif wanted.only_if_cached:
            send = self._outcome.says("miss", http.status(detail="only-if-cached"))
            self._outcome.looked_up = False
            await send_not_cached(send)
        else:
            await self._forward(self._begun(), missing)

    async def _look_up(self, near: Stored) -> Stored | Failure:
        """Ask Redis for what the process does not have, but for what a flight brings anyway."""
        question, wanted, flights = self._question, self._head.wanted, self._shared.flights
        vectors, encodings = self._shared.vectors, question.batch.encodings
        names: list[bytes] = []
        if wanted.lookup:
            # Waiting for a flight will not do where the app is not to be asked.
            self._carried = {} if wanted.only_if_cached else flights.carrying(question.inputs)
            names = [name for name in question.inputs if name not in near.values and name not in self._carried]
        flights.looking += 1
        try:
            age, claims = wanted.max_age, not wanted.only_if_cached
            return await look_up(
                vectors, question.identity, names, near, encodings, self._time_slice, age, claims=claims
            )
        finally:
            # Only now: what lands while the reply is read would else be gone when it is looked for.
            flights.looking -= 1

    def _begun(self) -> AppCalls:
        """The request's calls; none is made by this."""
        if self._calls is None:
            self._calls = AppCalls(self._shared, self._scope, self._question, self._found, self._carried, self._refusal)
        return self._calls

    def _asks_early(self, left: float) -> bool:
        """Whether this request asks the app before the lease ends for all; *left*: its seconds."""
        if not self._shared.vectors.ends_soon(left) or self._head.wanted.only_if_cached:
            return False
        calls = self._begun()
        calls.early = calls.renewal() is None and not calls.goes_whole()
        return calls.early

    async def _answer_hit(self) -> None:
        lease = self._found.lease
        if lease is not None and not await self._answers.hit(lease):
            await self._bypass("not-understood")

    # Asking the app.

    async def _forward(self, calls: AppCalls, missing: list[bytes]) -> None:
        """Join what is under way, forward the rest, and answer with all of it."""
        calls.watch(self._receive)
        cancelled = True
        try:
            await self._ask(calls, missing)
            cancelled = False
        finally:
            calls.leave(cancelled=cancelled)
        error = await calls.settle()
        if error is not None:
            self._outcome.fails()
            raise error

    async def _ask(self, calls: AppCalls, missing: list[bytes]) -> None:
        found, wanted = self._found, self._head.wanted
        if (missing or found.provisional) and calls.goes_whole():
            await self._answer_whole(calls, "not-understood")
            return
        if not missing and found.lease is None and await calls.is_let_in():
            missing = found.missing(self._question.inputs)
            if not missing:
                await self._answer_collapsed()
                return
        joined = calls.join(missing) if wanted.lookup else {}
        own = [name for name in missing if name not in joined]
        # With another max-age, or without no-cache, they may be stored after all.
        filling = wanted.lookup and wanted.max_age is None and bool(own)
        if not own and calls.must_ask(joined):
            own = [calls.least()]
            joined.pop(own[0], None)
            found.provisional.pop(own[0], None)
            calls.forced = not missing
        self._outcome.expects(len(self._question.inputs), len(own), len(joined))
        flight = calls.begin(own, joinable=True, filling=filling) if own else None
        if own and flight is None:
            await self._bypass("not-understood")
            return
        for other in set(joined.values()):
            calls.waiting.wait_for(other)
        await self._answer_with(calls, flight, joined)

    # Answering.

    async def _answer_with(self, calls: AppCalls, flight: Flight | None, joined: dict[bytes, Flight]) -> None:
        landing: FlightResult | None = None
        if flight is not None:
            landing = await self._landing_of(flight)
            if landing is None:
                await self._relay(calls, flight)
                return
        leftover, lease = await calls.collect(joined)
        if leftover:
            if calls.waiting.gone:
                return
            # An error is the app's answer to the request that gets it: ask, and join no flight.
            flight = calls.begin(leftover, joinable=False)
            if flight is None:
                await self._bypass("not-understood")
                return
            asked = sum(len(mine.names) for mine in calls.made)
            self._outcome.expects(len(self._question.inputs), asked, len(joined) - len(leftover))
            landing = await self._landing_of(flight)
            if landing is None:
                await self._relay(calls, flight)
                return
        if not await self._agree(calls, landing.lease if landing is not None else lease):
            return
        if landing is not None and flight is not None:
            if not await self._answers.merged(calls, flight, landing):
                await self._replay(calls, flight)
            return
        result: CacheResult = "partial" if self._outcome.hits else "miss"
        if lease is not None and not await self._answers.kept(lease, result, self._answers.member(calls, None)):
            await self._bypass("not-understood")

    async def _agree(self, calls: AppCalls, lease: Lease | None) -> bool:
        """Whether all vectors are of the model that the newest answer named; else answer anew.

        All are asked for anew then, in one call, so that no answer holds vectors of two models.
        """
        if lease is not None and not self._found.settles_on(lease.model):
            self._shared.warnings.model_changed(self._question.batch.model, self._found.lease, lease)
            calls.strike(lasting=True)
            await self._answer_whole(calls, "replayed")
            return False
        if not self._found.fits:
            calls.strike(lasting=True)
            await self._start_over()
            return False
        return True

    async def _answer_collapsed(self) -> None:
        lease = self._found.lease
        if not self._found.fits:
            await self._start_over()
        elif lease is not None and not await self._answers.collapsed(lease):
            await self._bypass("not-understood")

    async def _landing_of(self, flight: Flight) -> FlightResult | None:
        landing = await asyncio.shield(flight.outcome)
        if landing is not None:
            self._found.values.update(landing.values)
            self._outcome.billed += landing.tokens or 0
        return landing

    async def _answer_whole(self, calls: AppCalls, detail: str) -> None:
        """Answer with one call for all inputs; *detail* where the cache cannot do that."""
        self._found.forget()
        calls.forced = calls.early = False
        names = list(self._question.inputs)
        self._outcome.expects(len(names), len(names), 0)
        # An input that was sent twice would be asked for once, and the app does not like that.
        flight = calls.begin(names, joinable=False) if names == self._question.slots else None
        if flight is None:
            await self._bypass(detail)
            return
        landing = await self._landing_of(flight)
        if landing is None:
            await self._relay(calls, flight)
        elif not await self._answers.merged(calls, flight, landing):
            await self._replay(calls, flight)

    async def _relay(self, calls: AppCalls, flight: Flight) -> None:
        """Pass on an answer that was not understood, or let the app answer the request itself."""
        status = flight.call.status
        outcome = self._outcome
        if calls.early and (status is None or status >= 500) and not calls.waiting.gone:
            # It was asked before it had to be.
            await calls.give_up(flight)
            await self._answer_hit()
            return
        if status is None:  # the app has raised, or not answered; `_forward` raises again
            if not calls.waiting.gone:
                outcome.fails()
            return
        if status in REFUSALS:
            await self._shared.vectors.deny(self._question.identity, status)
        understandable = http.is_success(status)
        self._shared.counts.rejected("not-understood" if understandable else "status")
        if calls.is_shrunken(flight) and (understandable or status in _OF_THE_WHOLE_REQUEST):
            await self._replay(calls, flight)
            return
        if understandable:
            send = outcome.bypasses("not-understood")
        else:
            send = outcome.says("miss", self._answers.member(calls, None), error=True)
        await flight.call.relay(send)

    async def _replay(self, calls: AppCalls, flight: Flight) -> None:
        calls.strike()
        await calls.give_up(flight)
        await self._bypass("replayed")

    async def _start_over(self) -> None:
        """Vectors of several lengths for one scope: the model behind the name has changed."""
        self._shared.warnings.lengths_differ(self._question.batch.model)
        await self._shared.vectors.renew_epoch(self._question.identity)
        await self._bypass("replayed")

    async def _bypass(self, detail: str) -> None:
        """Let the app answer the original request, to the byte."""
        calls, send = self._calls, self._outcome.bypasses(detail)
        if self._head.wanted.only_if_cached and detail in ("no-store", "redis-down", "replayed"):
            await send_not_cached(send)
            return
        if calls is not None:
            await calls.waiting.stop_watching()
            if calls.waiting.gone:
                return  # the app would compute for nobody, and a server may say only once that its client has gone
        receive, self._body = self._body.replay(self._receive), NOTHING_READ
        # What a call before has set in its copy of the scope is not there for this one.
        untouched = calls.untouched if calls is not None and calls.made else None
        await pass_through(self._shared.app, untouched or self._scope, receive, send, self._is_refused)

    async def _is_refused(self, status: int) -> None:
        """The app has refused this request as it came: 401 or 403."""
        if self._is_known:
            await self._shared.vectors.deny(self._question.identity, status)
        elif status == _UNKNOWN_CALLER:
            # Whatever he asked for.
            await self._shared.vectors.disown(self._shared.questions.denied_name(self._scope, self._head))
