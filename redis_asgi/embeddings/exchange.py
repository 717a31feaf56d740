"""One request to an embedding endpoint, from its body to its last byte.

Read, look up, join, forward, merge, send: `Exchange.run` is the story, in that order. Whatever goes wrong
before the app has been asked ends in `_bypass`: the app gets the original bytes.
"""

import asyncio
import os
from collections.abc import Collection, Sequence
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from ..errors import Failure
from . import http_caching as http
from .asking import ask_app
from .body import Body, let_go, read_body
from .codec import NO_EPOCH, Value
from .core import Core
from .counts import Result
from .identity import mark_of
from .lease import Lease, shortest
from .lookup import Found, look_up
from .outcome import Outcome
from .pace import Pace
from .question import Question, question_of, say_broken
from .reading import head_refusal, partition_of, split
from .rendering import rendered
from .routes import Matched
from .sending import send_joined, send_not_cached
from .single_flight import Flight, Landing
from .sub_call import Untouched
from .tokens import count_all, reported
from .vectors import Encoding
from .waiting import Waiting
from .wire import Fresh, Uncacheable, Usage

_OF_THE_WHOLE_REQUEST = (400, 413, 422)  # may be about the request we made smaller, not about the client's
_REFUSALS = (401, 403)
_UNKNOWN_CALLER = 401
_SUCCESS = 2  # hundred and something


class Exchange:
    """See the module; everything of one request lives here and ends with it."""

    def __init__(self, core: Core, matched: Matched, scope: Scope, receive: Receive, send: Send) -> None:
        self._core = core
        self._matched = matched
        self._scope = scope
        self._receive = receive
        self._head = core.identities.heads.read(scope["headers"])
        self._wanted = self._head.wanted
        self._outcome = Outcome(core.counts, scope, send, status=core.settings.EMBEDDING_CACHE_STATUS)
        self._body = Body((), None)
        self._question: Question
        self._is_known = False  # the line above is there
        self._untouched: Untouched
        self._found = Found()
        self._values: dict[bytes, Value] = {}
        self._refusal: str | None = None  # why nothing is written, whatever the app answers
        self._forced = False  # something is forwarded only because there is no lease
        self._early = False  # the same, although there is one still
        self._waiting = Waiting()
        self._pace = Pace()
        self._own: list[Flight] = []
        self._found_bytes = 0  # of the vectors that were stored
        self._replayed: Flight | None = None

    async def run(self) -> None:
        """Answer the request, and count it."""
        try:
            await self._run()
        finally:
            self._outcome.end()

    async def _run(self) -> None:
        core = self._core
        limit = core.settings.EMBEDDING_CACHE_MAX_REQUEST_BYTES
        detail = head_refusal(self._head, self._scope["headers"], self._matched, limit)
        if detail is not None:
            await self._bypass(detail)
            return
        partition_by, partition = core.options.partition_by, None
        if partition_by is not None:
            partition = await partition_of(self._scope, partition_by)
            if partition is None:
                await self._bypass("partition")
                return
        seconds = core.settings.EMBEDDING_CACHE_BODY_SECONDS
        self._body, held = await read_body(self._receive, limit, core.budget, seconds)
        coming = self._body.coming
        if self._body.content is None:
            # It goes to the app as it comes, and may take as long as the client likes.
            core.budget.give(held)
            held = 0
        try:
            await self._run_with_body(partition)
        finally:
            let_go(coming)
            core.budget.give(held)

    async def _run_with_body(self, partition: str | None) -> None:
        self._pace.begin()
        batch = await split(self._core, self._matched, self._body, self._pace)
        if isinstance(batch, Uncacheable):
            await self._bypass(batch.detail)
            return
        core, wire = self._core, self._matched.wire
        try:
            self._question = await question_of(core, self._scope, self._head, wire, batch, partition, self._pace)
        except Exception as error:
            say_broken(core, wire, "split", error)
            await self._bypass("not-understood")
            return
        self._is_known = True
        if not self._wanted.store:
            await self._bypass("no-store")
            return
        if core.is_defeated_by(self._question.identity, batch):
            self._refusal = "unique-header"
        found = await look_up(
            core, self._question.identity, self._question.inputs, self._wanted, batch.encodings, self._pace
        )
        if isinstance(found, Failure):
            await self._bypass("redis-down")
            return
        self._found, self._values = found, found.values
        self._outcome.looked_up = True
        self._found_bytes = sum([len(value.raw) for value in (found.values or found.provisional).values()])
        missing = self._missing()
        left = found.lease_left if not missing else 0.0
        if not self._fits():
            await self._start_over()
        elif left > 0 and not self._asks_early(left):
            await self._answer_hit()
        elif self._wanted.only_if_cached:
            send = self._outcome.says("miss", http.status(detail="only-if-cached"))
            self._outcome.looked_up = False
            await send_not_cached(send)
        else:
            await self._forward(missing)

    def _missing(self) -> list[bytes]:
        """The keys of inputs that nothing at hand will do for."""
        values, provisional = self._values, self._found.provisional
        if len(values) == len(self._question.inputs):
            return []
        return [name for name in self._question.inputs if name not in values and name not in provisional]

    def _fits(self) -> bool:
        """Whether all vectors at hand are of one length."""
        return len({value.dims for value in self._values.values()}) <= 1

    def _asks_early(self, left: float) -> bool:
        """Whether this request asks the app before the lease, of which *left* seconds are left, ends for all."""
        self._early = (
            self._core.ends_soon(left)
            and not self._wanted.only_if_cached
            and self._renewal() is None
            and not self._goes_whole()
        )
        return self._early

    # Asking the app.

    async def _forward(self, missing: list[bytes]) -> None:
        """Join what is under way, forward the rest, and answer with all of it."""
        self._untouched = Untouched(self._scope)
        self._waiting.watch(self._receive)
        cancelled = True
        try:
            await self._ask(missing)
            cancelled = False
        finally:
            for flown in self._own:
                flown.call.discard()
            self._waiting.end(cancelled=cancelled)
        for mine in self._own:
            if mine.task is not None:
                await asyncio.shield(mine.task)
            if mine.call.error is not None and mine is not self._replayed and not mine.call.cancelled:
                self._outcome.fails()
                raise mine.call.error

    async def _ask(self, missing: list[bytes]) -> None:
        if (missing or self._found.provisional) and self._goes_whole():
            await self._answer_whole("not-understood")
            return
        if not missing and self._found.lease is None and await self._is_let_in():
            missing = self._missing()
            if not missing:
                await self._answer_collapsed()
                return
        joined = self._join(missing)
        own = [name for name in missing if name not in joined]
        # With another max-age, or without no-cache, they may be stored after all.
        filling = self._wanted.lookup and self._wanted.max_age is None and bool(own)
        if not own and self._must_ask(joined):
            names = list(self._question.inputs)
            own = [names[shortest([len(self._question.inputs[name].canonical) for name in names])]]
            joined.pop(own[0], None)
            self._found.provisional.pop(own[0], None)
            self._forced = not missing
        self._note(own, joined)
        flight = self._begin(own, shared=True, filling=filling) if own else None
        if own and flight is None:
            await self._bypass("not-understood")
            return
        for other in set(joined.values()):
            self._waiting.wait_for(other)
        await self._answer_with(flight, joined)

    async def _is_let_in(self) -> bool:
        """Wait for a call under way that asks for the same caller; whether it has brought the lease."""
        flight = self._renewal()
        if self._core.options.lease == 0 or flight is None or self._was_refused_since(flight):
            return False
        self._waiting.wait_for(flight)
        landing = await asyncio.shield(flight.landed)
        if landing is None or not landing.repeatable or self._was_refused_since(flight):
            return False
        self._found.believe(landing.lease)
        return True

    def _renewal(self) -> Flight | None:
        found = self._found
        return self._core.flights.renewal(self._question.identity.lease_name, found.epoch, found.asked_at)

    def _join(self, missing: Sequence[bytes]) -> dict[bytes, Flight]:
        if not self._wanted.lookup:
            return {}
        joined: dict[bytes, Flight] = {}
        flights, asked_at = self._core.flights, self._found.asked_at
        for name in missing:
            flight = self._found.flights.get(name) or flights.find(name, asked_at)
            if flight is not None and flight.joinable(self._found.epoch, len(self._question.inputs)):
                joined[name] = flight
        return joined

    def _must_ask(self, joined: dict[bytes, Flight]) -> bool:
        """Whether the app itself has to see this caller although others bring all that is missing."""
        if not joined or self._core.options.lease == 0:
            return True
        name = self._question.identity.lease_name
        # Whom the app has refused since then, it has to see again.
        same = any(other.lease_name == name and not self._was_refused_since(other) for other in joined.values())
        return not same and self._found.lease is None

    def _was_refused_since(self, flight: Flight) -> bool:
        return self._core.is_denied(self._question.identity, flight.asked_at)

    def _begin(self, names: Sequence[bytes], *, shared: bool, filling: bool = False) -> Flight | None:
        flight = ask_app(
            self._core,
            self._untouched,
            self._question,
            self._found,
            names,
            self._waiting,
            refusal=self._refusal,
            shared=shared,
            filling=filling,
        )
        if flight is not None:
            self._own.append(flight)
        return flight

    # Answering.

    async def _answer_with(self, flight: Flight | None, joined: dict[bytes, Flight]) -> None:
        landing: Landing | None = None
        lease = self._found.lease
        if flight is not None:
            landing = await self._landing_of(flight)
            if landing is None:
                await self._relay(flight)
                return
        leftover: list[bytes] = []
        for name, other in joined.items():
            brought = await asyncio.shield(other.landed)
            if brought is None:
                leftover.append(name)
                continue
            self._values[name] = brought.values[name]
            if other.lease_name == self._question.identity.lease_name:
                lease = brought.lease
        if leftover:
            if self._waiting.gone:
                return
            # An error is always the app's answer to the request that gets it: ask, and join nobody.
            flight = self._begin(leftover, shared=False)
            if flight is None:
                await self._bypass("not-understood")
                return
            asked = [name for mine in self._own for name in mine.names]
            self._note(asked, [name for name in joined if name not in leftover])
            landing = await self._landing_of(flight)
            if landing is None:
                await self._relay(flight)
                return
        if not await self._agree(landing.lease if landing is not None else lease):
            return
        if landing is not None and flight is not None:
            await self._answer_merged(flight, landing)
        elif lease is not None:
            await self._answer_from(lease, "partial" if self._outcome.hits else "miss", self._member(None))

    async def _agree(self, lease: Lease | None) -> bool:
        """Whether all vectors at hand are of the model that the newest answer named; if not, the request is answered.

        Of what is provisional the vectors of that model count. All others are asked for anew, in one call with the
        rest, so that no answer holds vectors of two models.
        """
        found = self._found
        if lease is not None:
            mark = mark_of(found.epoch, lease.model)
            at_hand = (*self._values.values(), *found.provisional.values())
            if {value.epoch for value in at_hand} - {mark}:
                self._say_model(lease.model)
                self._strike(lasting=True)
                await self._answer_whole("replayed")
                return False
            self._values |= found.provisional
            found.provisional = {}
        if not self._fits():
            self._strike(lasting=True)
            await self._start_over()
            return False
        return True

    async def _landing_of(self, flight: Flight) -> Landing | None:
        landing = await asyncio.shield(flight.outcome)
        if landing is not None:
            self._values.update(landing.values)
            self._outcome.billed += landing.tokens or 0
        return landing

    async def _answer_whole(self, detail: str) -> None:
        """Ask for all inputs in one call, and answer with its answer alone; *detail* where the cache cannot do that."""
        self._values, self._found.provisional, self._found_bytes = {}, {}, 0
        self._forced = self._early = False
        names = list(self._question.inputs)
        self._note(names, ())
        # An input that was sent twice would be asked for once, and the app does not like that.
        flight = self._begin(names, shared=False) if names == self._question.slots else None
        if flight is None:
            await self._bypass(detail)
            return
        landing = await self._landing_of(flight)
        if landing is None:
            await self._relay(flight)
        else:
            await self._answer_merged(flight, landing)

    async def _relay(self, flight: Flight) -> None:
        """Pass on an answer that was not understood, or put the original request to the app instead."""
        status = flight.call.status
        outcome = self._outcome
        if self._early and (status is None or status >= 500) and not self._waiting.gone:
            # It was asked before it had to be.
            await self._give_up(flight)
            await self._answer_hit()
            return
        if status is None:  # the app has raised, or not answered; `_forward` raises again
            if not self._waiting.gone:
                outcome.fails()
            return
        if status in _REFUSALS:
            await self._core.deny(self._question.identity, status)
        understandable = status // 100 == _SUCCESS
        self._core.counts.rejected("not-understood" if understandable else "status")
        if self._is_shrunken(flight) and (understandable or status in _OF_THE_WHOLE_REQUEST):
            await self._replay(flight)
            return
        if understandable:
            send = outcome.bypasses("not-understood")
        else:
            send = outcome.says("miss", self._member(None), error=True)
        await flight.call.relay(send)

    async def _give_up(self, flight: Flight) -> None:
        await flight.call.give_up()
        self._replayed = flight

    async def _replay(self, flight: Flight) -> None:
        self._strike()
        await self._give_up(flight)
        await self._bypass("replayed")

    @property
    def _misfit(self) -> bytes:
        """What `Misfits` knows such requests by."""
        return b" ".join(
            [self._question.identity.scope_name, *(encoding.encode() for encoding in self._question.batch.encodings)]
        )

    def _goes_whole(self) -> bool:
        """Whether a smaller request would only be a call more."""
        return self._core.misfits.remembers(self._misfit, self._core.monotonic())

    def _strike(self, *, lasting: bool = False) -> None:
        """A call more than without the cache: after two of them in a minute, requests of this scope go out whole."""
        core = self._core
        if core.misfits.strike(self._misfit, core.monotonic(), lasting=lasting):
            core.say_once(
                "redis_asgi.embedding_answers_not_understood",
                wire_format=self._question.wire.name,
                fix="The app does not answer a smaller request as it answers the whole one. For a minute at a time "
                "its requests with a miss go out whole. See what it answers to fewer inputs.",
            )

    def _is_shrunken(self, flight: Flight) -> bool:
        """Whether the sub-request is not, input by input, what the client sent."""
        return list(flight.names) != self._question.slots

    async def _start_over(self) -> None:
        """Vectors of several lengths for one scope: the model behind the name has changed."""
        self._core.say_once(
            "redis_asgi.embedding_lengths_differ",
            model=self._question.batch.model[:80],
            fix="Set EMBEDDING_CACHE_NAMESPACE to your model and its revision.",
        )
        await self._core.renew_epoch(self._question.identity)
        await self._bypass("replayed")

    def _say_model(self, model: str) -> None:
        self._core.say_once(
            "redis_asgi.embedding_model_changed",
            requested=self._question.batch.model[:80],
            before=self._found.lease.model[:80] if self._found.lease is not None else None,
            now=model[:80],
            fix="The app answers with different models under one name; their vectors are kept apart.",
        )

    async def _answer_hit(self) -> None:
        now = self._core.wall()
        end = self._core.first_end(self._values, now)
        ttl = (f"ttl={max(0, int(end - now))}",) if end is not None else ()
        self._outcome.hits, self._outcome.misses = len(self._question.inputs), 0
        if self._found.lease is not None:
            await self._answer_from(self._found.lease, "hit", http.status("hit", *ttl))

    async def _answer_collapsed(self) -> None:
        """Answer with what was stored, as another request has just brought the lease."""
        self._outcome.hits, self._outcome.misses = len(self._question.inputs), 0
        if not self._fits():
            await self._start_over()
        elif self._found.lease is not None:
            member = http.status("fwd=stale", "detail=lease", "collapsed")
            await self._answer_from(self._found.lease, "stale", member)

    async def _answer_from(self, lease: Lease, result: Result, member: str) -> None:
        """Answer without a call of our own: with what the app said last time to this caller."""
        fresh = Fresh(int(self._core.wall()), os.urandom(16).hex())
        tokens, counted = count_all(self._question.slots, self._values, self._question.inputs)
        usage = reported(tokens, self._outcome.billed, self._core.settings.EMBEDDING_CACHE_USAGE)
        pieces = await self._pieces(lease.frame, self._question.batch.encodings, usage, fresh)
        if pieces is None:
            await self._bypass("not-understood")
            return
        self._outcome.tokens = tokens
        send = self._outcome.says(result, member)
        self._outcome.served(self._found_bytes, counted)
        await send_joined(send, lease.status, lease.headers, pieces, self._pace)

    async def _answer_merged(self, flight: Flight, landing: Landing) -> None:
        if self._outcome.hits and landing.rule.refusal == "integers":
            # What was found is of another time: of the one kind nothing is stored.
            await self._replay(flight)
            return
        half = self._core.settings.EMBEDDING_CACHE_DTYPE == "float16"
        tokens, _ = count_all(self._question.slots, self._values, self._question.inputs)
        pieces: list[bytes] | None = None
        if half or self._is_shrunken(flight):
            mode = self._core.settings.EMBEDDING_CACHE_USAGE
            usage = reported(tokens, self._outcome.billed, mode, counted=landing.tokens)
            usage = usage if self._is_shrunken(flight) else Usage()
            pieces = await self._pieces(landing.lease.frame, landing.encodings, usage, None)
            if pieces is None and self._is_shrunken(flight):
                await self._replay(flight)
                return
            if self._is_shrunken(flight):
                self._core.misfits.clear(self._misfit)
        outcome = self._outcome
        outcome.hits = len(self._question.inputs) - outcome.misses - outcome.collapsed
        outcome.tokens = tokens
        member = self._member(landing)
        refusal = landing.rule.refusal
        if self._wanted.lookup and not outcome.hits and refusal is not None:
            send = outcome.says("bypass", member, reason=refusal)
        else:
            send = outcome.says("stale" if self._forced else "partial" if outcome.hits else "miss", member)
            saved = sum(self._values[name].tokens for name in self._question.slots if name not in landing.values)
            outcome.served(self._found_bytes, saved)
        if pieces is None:
            # Nothing was added, so the app's own words will do.
            await flight.call.relay(send)
            return
        await send_joined(send, landing.reply.status, landing.reply.headers, pieces, self._pace)

    @property
    def _may_store(self) -> bool:
        return self._found.epoch != NO_EPOCH and self._core.store.writable

    def _member(self, landing: Landing | None) -> str:
        """Our member of ``Cache-Status``; *landing*: our own sub-request's, if understood."""
        outcome = self._outcome
        stored: tuple[str, ...] = ()
        refusal = landing.rule.refusal if landing is not None else None
        if landing is not None and refusal is None and not landing.is_stray and self._may_store:
            stored = ("stored",)
        if self._forced:
            return http.status("fwd=stale", "detail=lease", *stored)
        if not self._wanted.lookup:
            return http.status("fwd=request", *stored)
        if outcome.hits:
            collapsed = f" collapsed={outcome.collapsed}" if outcome.collapsed else ""
            return http.status("fwd=partial", *stored, detail=f"hit={outcome.hits} miss={outcome.misses}{collapsed}")
        if refusal is not None:
            return http.status("fwd=bypass", detail=refusal)
        return http.status("fwd=miss", *stored, *(("collapsed",) if outcome.collapsed else ()))

    def _note(self, own: Collection[bytes], joined: Collection[bytes]) -> None:
        """Say, before the app is asked for *own*, what is found and what others bring."""
        outcome = self._outcome
        outcome.misses, outcome.collapsed = len(own), len(joined)
        outcome.hits = len(self._question.inputs) - len(own) - len(joined)
        outcome.note("partial" if outcome.hits else "miss")

    async def _pieces(
        self, frame: dict[str, Any], encodings: Sequence[Encoding], usage: Usage, fresh: Fresh | None
    ) -> list[bytes] | None:
        return await rendered(self._core, self._question, self._values, frame, encodings, usage, fresh, self._pace)

    async def _bypass(self, detail: str) -> None:
        """Let the app answer the original request, to the byte."""
        send = self._outcome.bypasses(detail)
        if self._wanted.only_if_cached and detail in ("no-store", "redis-down", "replayed"):
            await send_not_cached(send)
            return
        await self._waiting.stop_watching()
        if self._waiting.gone:
            return  # the app would compute for nobody, and a server may say only once that its client has gone

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and scope is not self._scope:
                self._untouched.show(scope)
            if message["type"] == "http.response.start" and message["status"] in _REFUSALS:
                await self._is_refused(message["status"])
            await send(message)

        receive, self._body = self._body.replay(self._receive), Body((), None)
        scope = self._untouched.copy() if self._own else self._scope
        try:
            await self._core.app(scope, receive, watched)
        finally:
            if scope is not self._scope:
                self._untouched.show(scope)

    async def _is_refused(self, status: int) -> None:
        """The app has refused this request as it came: 401 or 403."""
        core = self._core
        if self._is_known:
            await core.deny(self._question.identity, status)
        elif status == _UNKNOWN_CALLER:
            # Whatever he asked for.
            await core.disown(core.identities.denied_name(self._scope, self._head.told))
